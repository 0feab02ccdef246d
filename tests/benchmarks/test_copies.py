"""Copies: the bus over real streams of the stand-in, each kind of copy, and what goes wrong in it."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from benchmarks import bench_copies, registry, runner
from benchmarks.bench_copies import KINDS, Road, measure
from benchmarks.bus import TorchBus, pixels
from benchmarks.harness import Sheet, Size
from benchmarks.sides import Side, guarded, target
from gpu_byoc.frames import FrameSpec
from gpu_byoc.processors.green_tint import GreenTint
from tests.support.gpus import StandInBus, stand_in


def of(sheet: Sheet, part: str) -> dict[str, dict[str, Any]]:
    """Rows whose names contain ``part``."""
    return {row["name"]: row for row in sheet.rows if part in row["name"]}


def test_the_group_runs_here_and_writes_what_a_result_file_may_hold() -> None:
    group = registry.group("copies")
    assert group is not None
    rows = runner.measure([group], Size.TINY, runner.Quiet())["groups"]["copies"]["rows"]
    memcpy = [row for row in rows if row["name"].startswith("memcpy")]
    assert len(memcpy) == 4
    assert all(row["gb_per_s"] > 0 for row in memcpy)
    assert not [row for row in rows if "failed" in row]


def test_every_kind_of_copy_is_measured_in_the_direction_it_says() -> None:
    sheet = Sheet(Size.TINY)
    with stand_in() as (side, bus):
        measure(sheet, [side])
    assert not of(sheet, "from here on"), sheet.rows
    for kind in KINDS:
        rows = of(sheet, f"stand-in: {kind}, ")
        assert len(rows) == 4, kind
        for row in rows.values():
            assert row["gb_per_s"] > 0
            assert (row["place"], row["what"]) == ("stand-in", kind)
    assert set(bus.kinds) == {"up", "down", "across"}
    assert bus.registrations[:4] == [1, -1, 1, -1]
    assert sum(bus.registrations) == 0
    assert len(sheet.rows) == sheet.expected


@pytest.mark.parametrize(
    ("drop", "kinds"),
    [
        ("up", ["pageable up", "pinned up", "pinned both ways"]),
        ("down", ["pageable down", "pinned down", "pageable both ways", "pinned up"]),  # nothing can be looked at
        ("across", ["on the device"]),
    ],
)
def test_a_copy_that_does_not_arrive_is_a_failed_row(drop: str, kinds: list[str]) -> None:
    sheet = Sheet(Size.TINY)
    with stand_in() as (side, bus):
        prepare, bus_drop = Road.__init__, drop

        def init(road: Road, *args: Any) -> None:
            prepare(road, *args)
            bus.drop = bus_drop

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Road, "__init__", init)
            measure(sheet, [side])
    for kind in kinds:
        row = of(sheet, f"stand-in: {kind}, ")[f"stand-in: {kind}, 32x16, 1 frame"]
        assert "other bytes" in row.get("failed", ""), row


def test_a_gpu_that_is_not_there_is_skipped_by_name_and_reason() -> None:
    sheet = Sheet(Size.TINY)
    with stand_in(why_not="no driver: install one") as (side, bus):
        measure(sheet, [side, Side("odd", side.make, None)])
    assert of(sheet, "stand-in")["stand-in: copies"]["skipped"] == "no driver: install one"
    assert "odd: copies" in of(sheet, "odd")
    assert not bus.kinds


def test_a_machine_with_little_memory_skips_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_copies, "too_much", lambda nbytes: "needs more" if nbytes > 20_000 else None)
    sheet = Sheet(Size.TINY)
    measure(sheet, [])
    assert sorted(row.get("skipped", "") for row in sheet.rows) == ["", "", "needs more", "needs more"]


def test_a_span_ends_when_every_stream_has() -> None:
    bus = StandInBus()
    try:
        first, second = bus.stream(), bus.stream()
        source, there = bus.host(1000, pinned=True), bus.empty(1000)
        source[:] = pixels(1000)
        jobs = [(first, bus.copy(there, source, first)), (second, bus.copy(bus.empty(1000), source, second))]
        second.open.clear()
        taken: list[float] = []
        thread = threading.Thread(target=lambda: taken.append(bus.span(jobs, 3)))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive(), "it did not wait for the second stream"
        second.open.set()
        thread.join(20)
        assert taken[0] >= 0.2 / 3, "the time is that of the longest stream, for one of three rounds"
        assert bus.kinds == ["up"] * 6
        assert np.array_equal(there, source)
    finally:
        bus.fake.close()


@pytest.mark.needs_torch
def test_the_bus_of_torch_does_the_same_on_its_cpu_device() -> None:
    bus = TorchBus("cpu")
    spec = FrameSpec(8, 4)
    road = Road(bus, 2 * spec.nbytes)
    for kind in KINDS:
        road.erase(2 * spec.nbytes)
        assert road.wrong(kind, 2 * spec.nbytes), f"{kind}: nothing was copied yet"
        window = road.window(kind, spec.nbytes, 2, 0.001)()
        assert len(window.seconds) >= 3
        assert min(window.seconds) > 0
        assert road.wrong(kind, 2 * spec.nbytes) == ""
    road.erase(2 * spec.nbytes)
    stream = bus.stream()
    bus.copy(road.device[0], road.pinned[0], stream)()
    bus.kernel(GreenTint(), road.device[0], spec, stream)()
    green = bus.numpy(road.device[0])[1::3]
    assert np.array_equal(green, np.minimum(bus.numpy(road.pinned[0])[1::3], 95) + 160)  # once to try it, once more


def test_what_a_part_of_a_group_raises_becomes_a_failed_row() -> None:
    def part() -> None:
        raise RuntimeError("broken wheel")

    sheet = Sheet(Size.TINY)
    with guarded(sheet, "this part"):
        part()
    assert sheet.rows == [{"name": "this part", "failed": "RuntimeError: broken wheel"}]


def test_targets_are_met_missed_or_skipped() -> None:
    sheet = Sheet(Size.TINY)
    target(sheet, "a", 0.9, at_least=0.85)
    target(sheet, "b", 0.8, at_least=0.85)
    target(sheet, "c", 3.0, at_most=3)
    target(sheet, "d", 3.1, at_most=3)
    target(sheet, "e", None, "no GPU", at_least=1)
    target(sheet, "f", None, at_least=1)
    assert [(row.get("met"), row.get("skipped")) for row in sheet.rows] == [
        ("yes", None),
        ("no", None),
        ("yes", None),
        ("no", None),
        (None, "no GPU"),
        (None, "not measured in this run"),
    ]
    assert sheet.rows[0] == {"name": "target: a", "wanted": "at least 0.85", "reached": 0.9, "met": "yes"}
