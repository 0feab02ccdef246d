"""Kernels: each backend through its contract, outputs checked, ceilings of the same run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import bench_kernels, registry, runner
from benchmarks.bench_kernels import Case, expect, measure, page_loop
from benchmarks.harness import Sheet, Size
from benchmarks.sides import Side, sides
from gpu_byoc.backend import Batch, BatchTimes, HostArena
from gpu_byoc.frames import FrameSpec
from gpu_byoc.plugins import load_backend
from gpu_byoc.processors.green_tint import GreenTint
from tests.support.gpus import stand_in


def rows_of(sheet: Sheet, part: str) -> list[dict[str, Any]]:
    return [row for row in sheet.rows if part in row["name"]]


@given(st.binary(min_size=3, max_size=60))
def test_the_pages_loop_is_green_tint(data: bytes) -> None:
    frame = data[: len(data) // 3 * 3]
    pixels = np.frombuffer(frame, np.uint8).reshape(1, 1, -1, 3)
    assert page_loop(frame) == expect(GreenTint(), pixels).tobytes()


def test_the_group_runs_here_and_skips_the_rest_by_name_and_reason() -> None:
    group = registry.group("kernels")
    assert group is not None
    rows = runner.measure([group], Size.TINY, runner.Quiet())["groups"]["kernels"]["rows"]
    by_name = {row["name"]: row for row in rows}
    assert by_name["the page's Python loop, 32x16, 1 frame"]["frames_per_second"] > 0
    for processor in ("green_tint", "grayscale"):
        row = by_name[f"numpy, {processor}, 64x32, 8 frames"]
        assert row["device_us"] <= row["p50_us"] * 10
        assert row["of_ceiling"] > 0
    assert "gb_per_s" not in by_name["numpy, passthrough, 64x32, 8 frames"], "there is nothing to count"
    for side in sides():
        if side.why_not:
            assert by_name[f"{side.label}: kernels"]["skipped"] == side.why_not
    assert not [row for row in rows if "failed" in row]


def test_a_gpu_is_measured_against_a_copy_on_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "TARGET_CASE", (FrameSpec(64, 32), 8))
    sheet = Sheet(Size.TINY)
    with stand_in() as (side, bus):
        measure(sheet, [side])
    assert not [row for row in sheet.rows if "failed" in row]
    assert len(rows_of(sheet, "stand-in, green_tint, ")) == 4
    for row in rows_of(sheet, "stand-in, green_tint, "):
        assert row["copy_us"] > 0
        assert row["of_ceiling"] == pytest.approx(row["of_ceiling"])
    assert set(bus.kinds) == {"across"}
    (verdict,) = rows_of(sheet, "target:")
    (row,) = rows_of(sheet, "stand-in, green_tint, 64x32, 8 frames")
    assert verdict["reached"] == row["of_ceiling"]
    assert verdict["met"] == ("yes" if row["of_ceiling"] >= 0.7 else "no")


class Wrong(load_backend("numpy")):  # type: ignore[misc]
    """numpy, with one wrong byte in the last frame."""

    def submit(self, batch: Batch) -> Any:
        flight = super().submit(batch)
        last = batch.arena.view(batch.slots[-1])
        last[-1] ^= 1
        return flight


def test_wrong_output_is_a_failed_row_and_no_figure() -> None:
    sheet = Sheet(Size.TINY)
    measure(sheet, [Side("wrong", Wrong, None)])
    rows = rows_of(sheet, "wrong, ")
    assert len(rows) == 12
    assert {row["failed"] for row in rows} >= {"1 of 1536 bytes differ from numpy's"}
    assert all("failed" in row for row in rows)


class Dead(load_backend("numpy")):  # type: ignore[misc]
    def open(self, device: str | None, processor: Any) -> None:
        raise RuntimeError("no such device")


def test_a_backend_that_breaks_leaves_the_others_their_rows() -> None:
    sheet = Sheet(Size.TINY)
    measure(sheet, [Side("dead", Dead, None), Side("numpy", load_backend("numpy"), None)])
    assert [row["failed"] for row in rows_of(sheet, "dead")] == ["RuntimeError: no such device"] * 3
    assert len(rows_of(sheet, "numpy, ")) == 12


class Scripted:
    """A backend that does nothing, and says what it took."""

    def arena(self, nbytes: int, slots: int) -> HostArena:
        return HostArena(nbytes, slots)

    def submit(self, batch: Batch) -> Scripted:
        return self

    def wait(self) -> BatchTimes:
        return BatchTimes(compute_ns=3000, copy_ns=2000)


def test_device_and_copy_time_are_what_the_backend_says() -> None:
    backend: Any = Scripted()
    case = Case(backend, GreenTint(), FrameSpec(4, 4), 3)
    assert "differ from numpy's" in case.wrong()
    window = case.window(0.0)()
    assert len(window.seconds) == 1
    ((device, host, copies),) = window.tally
    assert (device, copies) == (3000, 2000)
    assert 0 < host <= window.seconds[0] * 1e9
    assert case.alone().seconds == (3e-6,)
    case.close()


def test_batches_that_take_too_long_on_a_cpu_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.sides.CPU_BATCH", 6000)
    sheet = Sheet(Size.TINY)
    measure(sheet, [Side("numpy", load_backend("numpy"), None)])
    skipped = {row["name"] for row in rows_of(sheet, "numpy, green_tint") if "skipped" in row}
    assert skipped == {
        f"numpy, green_tint, {case}" for case in ("32x16, 8 frames", "64x32, 1 frame", "64x32, 8 frames")
    }


@pytest.mark.needs_torch
def test_torch_on_the_cpu_is_a_backend_of_its_own() -> None:
    (side,) = (side for side in sides() if side.label == "torch on the CPU")
    sheet = Sheet(Size.TINY)
    measure(sheet, [side])
    assert not [row for row in sheet.rows if "failed" in row]
    assert len([row for row in rows_of(sheet, "torch on the CPU, ") if row.get("device_us")]) == 12
