"""The engine's benchmark: on numpy, on the stand-in of a GPU, on torch's CPU device; targets and the crossover."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import bench_engine, registry, runner
from benchmarks.bench_engine import Loop, measure, started
from benchmarks.bus import TorchBus
from benchmarks.crossover import Point, crossover
from benchmarks.harness import Sheet, Size
from benchmarks.sides import Side, sides
from gpu_byoc.backend import Batch
from gpu_byoc.errors import ProcessorFailed
from gpu_byoc.frames import FrameSpec
from gpu_byoc.plugins import load_backend
from tests.support.gpus import stand_in

SPEC = FrameSpec(32, 16)


def rows_of(sheet: Sheet, part: str) -> list[dict[str, Any]]:
    return [row for row in sheet.rows if part in row["name"]]


def numpy_side(backend: Any = None) -> Side:
    return Side("numpy", backend or load_backend("numpy"), None)


def test_the_group_runs_here_and_skips_the_rest_by_name_and_reason() -> None:
    group = registry.group("engine")
    assert group is not None
    rows = runner.measure([group], Size.TINY, runner.Quiet())["groups"]["engine"]["rows"]
    by_name = {row["name"]: row for row in rows}
    assert not [row for row in rows if "failed" in row]
    row = by_name["numpy, 64x32, 8 frames"]
    assert row["frames_per_second"] == pytest.approx(8e6 / row["p50_us"])
    assert row["of_ceiling"] > 0
    assert by_name["numpy, one frame through an idle engine, 32x16, 1 frame"]["times_floor"] > 1
    for side in sides():
        if side.why_not:
            assert by_name[f"{side.label}: engine"]["skipped"] == side.why_not
        if side.bus and side.why_not:
            assert sum(name.startswith(f"target: {side.label}, ") for name in by_name) == 4
            assert "crossover: from which frame size and batch on a GPU wins" in by_name


def checked(sheet: Sheet, label: str, depths: int) -> None:
    """All that a GPU's rows have to be."""
    assert not [row for row in sheet.rows if "failed" in row], rows_of(sheet, "")
    assert len([row for row in rows_of(sheet, f"{label}, ") if row.get("what") == "engine"]) == 4
    for what in ("in sequence", "pageable"):
        rows = [row for row in sheet.rows if row.get("what") == what]
        assert [row["batch"] for row in rows] == [8, 8]
        assert all(row["engine_gain"] > 0 for row in rows)
    measured = [row for row in sheet.rows if row.get("what") == "depth"]
    assert [row["depth"] for row in measured] == list(range(1, depths + 1))
    assert len(rows_of(sheet, "on their way at once")) == 4
    targets = rows_of(sheet, "target: ")
    assert [row["wanted"] for row in targets] == ["at least 0.85", "at least 1.7", "at least 1.5", "at most 3"]
    assert all(row["met"] in ("yes", "no") for row in targets)
    worst = min(row["of_ceiling"] for row in sheet.rows if row.get("what") == "engine" and row["batch"] == 8)
    assert targets[0]["reached"] == worst
    table = [row for row in sheet.rows if row.get("what") == "crossover"]
    assert len([row for row in table if "gpu_us" in row]) == 4
    assert [row["batch"] for row in table if "from_size" in row] == [1, 8]
    for row in table:
        if "gpu_us" in row:
            assert row["faster"] == ("GPU" if row["gpu_us"] < row["cpu_us"] else "CPU")
            assert row["faster_on_device"] == ("GPU" if row["on_device_us"] < row["cpu_us"] else "CPU")


def without_numpy(sheet: Sheet) -> Sheet:
    sheet.rows = [row for row in sheet.rows if row.get("backend") != "numpy"]
    return sheet


def test_a_gpu_is_measured_in_every_way() -> None:
    sheet = Sheet(Size.TINY)
    with stand_in() as (side, bus):
        measure(sheet, [side, numpy_side()])
    checked(without_numpy(sheet), "stand-in", depths=4)
    assert set(bus.kinds) == {"up", "down"}


@pytest.mark.needs_torch
def test_torch_goes_the_same_way_on_its_cpu_device() -> None:
    side = Side("torch", load_backend("torch"), "cpu", "", lambda: TorchBus("cpu"))
    sheet = Sheet(Size.TINY)
    measure(sheet, [side, numpy_side()])
    checked(without_numpy(sheet), "torch", depths=1)


def test_a_gpu_that_is_not_there_is_skipped_with_its_targets() -> None:
    sheet = Sheet(Size.TINY)
    with stand_in(why_not="no driver: install one") as (side, _):
        measure(sheet, [side])
    assert [row["skipped"] for row in sheet.rows[:-1]] == ["no driver: install one"] * 5
    assert sheet.rows[-1]["skipped"] == "no backend opens on a GPU here"


class Wrong(load_backend("numpy")):  # type: ignore[misc]
    """One wrong byte in each batch."""

    def submit(self, batch: Batch) -> Any:
        flight = super().submit(batch)
        batch.arena.view(batch.slots[-1])[-1] ^= 1
        return flight


class Broken(load_backend("numpy")):  # type: ignore[misc]
    def submit(self, batch: Batch) -> Any:
        raise RuntimeError("an unlucky frame")


def test_wrong_output_and_failing_batches_are_failed_rows() -> None:
    sheet = Sheet(Size.TINY)
    measure(sheet, [numpy_side(Wrong)])
    assert {row["failed"] for row in rows_of(sheet, "numpy, ")} == {"1 bytes differ from numpy's"}
    assert len(rows_of(sheet, "numpy, ")) == 5
    sheet = Sheet(Size.TINY)
    measure(sheet, [numpy_side(Broken)])
    assert [row["name"] for row in rows_of(sheet, "numpy, ")] == [
        "numpy, batches of 1, from here on",
        "numpy, batches of 8, from here on",
        "numpy, one frame through an idle engine",
    ]
    assert all("an unlucky frame" in row["failed"] for row in rows_of(sheet, "numpy, "))


def test_the_loop_keeps_batches_whole_and_gives_every_slot_back() -> None:
    seen: set[int] = set()

    class Watching(load_backend("numpy")):  # type: ignore[misc]
        def submit(self, batch: Batch) -> Any:
            seen.add(len(batch.slots))
            return super().submit(batch)

    with started(numpy_side(Watching), 3, SPEC.nbytes) as engine:
        loop = Loop(engine, SPEC, 3)
        assert loop.fill() == ""
        window = loop.window(0.01)()
        assert loop.once() > 0
        (room,) = engine.rooms()
    assert seen == {3}
    assert len(window.seconds) >= 3
    assert sum(window.seconds) == pytest.approx(window.wall)
    assert (room["slots"], room["free"]) == (12, 12)
    assert len(window.tally) == len(window.seconds)


def test_a_failed_batch_is_raised_and_the_engine_still_closes() -> None:
    side = numpy_side(Broken)
    with pytest.raises(ProcessorFailed, match="an unlucky frame"), started(side, 2, SPEC.nbytes) as engine:
        Loop(engine, SPEC, 2).once()
    assert not engine.alive


WIDTHS = (32, 64, 128)


def points(*faster: tuple[float, float]) -> list[Point]:
    """The CPU takes 1; (GPU there and back, GPU resident) at each of WIDTHS. Largest first: order does not matter."""
    made = [Point(FrameSpec(w, w), 8, 1.0, *gpu) for w, gpu in zip(WIDTHS, faster, strict=True)]
    return made[::-1]


@pytest.mark.parametrize(
    ("seconds", "there_and_back", "resident"),
    [
        (((2, 2), (2, 0.5), (0.5, 0.5)), "128x128", "64x64"),
        (((2, 0.1), (2, 0.1), (2, 0.1)), "never", "always"),
        (((0.5, 2), (2, 2), (0.5, 1.0)), "128x128", "never"),  # a lucky small one does not count; nor does a draw
    ],
)
def test_the_crossover(seconds: tuple[tuple[float, float], ...], there_and_back: str, resident: str) -> None:
    assert crossover(points(*seconds), resident=False) == there_and_back
    assert crossover(points(*seconds), resident=True) == resident


@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_the_gpu_wins_at_the_crossover_and_everywhere_above(wins: list[bool]) -> None:
    made = [Point(FrameSpec(w + 1, 1), 1, 1.0, 0.5 if win else 2.0, 2.0) for w, win in enumerate(wins)]
    found = crossover(made, resident=False)
    first = {"always": 0, "never": len(wins)}.get(found)
    if first is None:
        first = int(found.partition("x")[0]) - 1
    assert all(wins[first:])
    assert first == 0 or not wins[first - 1]


def test_a_backend_keeps_its_own_depth_where_it_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    sheet = Sheet(Size.TINY)
    side = numpy_side()

    class One(load_backend("numpy")):  # type: ignore[misc]
        def open(self, device: str | None, processor: Any) -> None:
            super().open(device, processor)
            self.depth = 1

    monkeypatch.setattr(bench_engine, "MANY", 2)
    bench_engine._depths(sheet, Side("one", One, side.device))
    assert [("skipped" in row) for row in sheet.rows] == [False, True, True, True]
    assert "has 1 on its way" in sheet.rows[1]["skipped"]
