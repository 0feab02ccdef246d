"""Arrivals, why batches left, and the load on a real engine at a tiny size."""

from __future__ import annotations

import itertools
import queue
import threading
from typing import Any

import pytest
from gpu_byoc_backends.numpy_cpu import NumpyBackend
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import bench_batching
from benchmarks.bench_batching import Case, Nothing
from benchmarks.engine_load import IN_FLIGHT, JITTER, Reasons, Tally, arrivals, loader, summed
from benchmarks.harness import Sheet, Size
from benchmarks.schema import _rows
from benchmarks.sides import Side
from gpu_byoc.config import EngineConfig
from gpu_byoc.engine.device import Outcome
from gpu_byoc.errors import ProcessorFailed
from gpu_byoc.frames import FrameSpec
from gpu_byoc.processors.green_tint import GreenTint
from gpu_byoc.processors.passthrough import Passthrough
from tests.support.engines import Gated


class Held(Passthrough):
    """Waits at its gate."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
        assert self.gate.wait(20)
        return frames


SPEC = FrameSpec(8, 4)
SIDE = Side("numpy", NumpyBackend, None)
FULL, MS = 4, 1_000_000


@given(st.lists(st.floats(5, 120), min_size=1, max_size=5), st.floats(0.1, 3), st.integers(0, 9))
def test_frames_keep_their_streams_beat(rates: list[float], seconds: float, seed: int) -> None:
    found = arrivals(rates, seconds, seed)
    assert found == sorted(found, key=lambda each: each.due)
    for stream, rate in enumerate(rates):
        mine = [each for each in found if each.stream == stream]
        interval = 1e9 / rate
        assert abs(len(mine) - seconds * rate) <= 1
        steps = [after.due - before.due for before, after in itertools.pairwise(mine)]
        assert all(interval * (1 - 2 * JITTER) - 2 <= step <= interval * (1 + 2 * JITTER) + 2 for step in steps[1:])
        assert all(abs(each.deadline - each.due - interval) <= 1 for each in mine)


def test_streams_do_not_begin_together() -> None:
    firsts = {each.stream: each.due for each in reversed(arrivals([25.0] * 8, 1.0))}
    assert len(set(firsts.values())) == 8


def left(wait_ms: float, *queued: int) -> Tally:
    tally, reasons = Tally(), Reasons(EngineConfig(max_batch=FULL, max_wait_ms=wait_ms))
    for each in queued:
        reasons.add(Outcome(None, queue_ns=each, batch=len(queued)), tally)
    return tally


@pytest.mark.parametrize(
    ("wait_ms", "queued", "why"),
    [
        (0.0, [9] * FULL, "full"),
        (2.0, [3 * MS] * FULL, "full"),  # full and late: it would have left anyway
        (0.0, [5 * MS, 1], "free"),
        (2.0, [1, 2 * MS], "waited"),
        (2.0, [1, 2 * MS - 1], "free"),
    ],
)
def test_why_a_batch_left(wait_ms: float, queued: list[int], why: str) -> None:
    tally = left(wait_ms, *queued)
    assert tally.left == {why: 1}
    assert tally.batches == {len(queued): 1}


def test_half_a_batch_has_not_left() -> None:
    tally, reasons = Tally(), Reasons(EngineConfig(max_batch=FULL))
    reasons.add(Outcome(None, batch=2), tally)
    assert not tally.batches


def test_sums() -> None:
    one, other = left(0.0, 1, 2), left(0.0, *[3] * FULL)
    one.refused, other.refused, other.queued = 1, 2, [7]
    total = summed([one, other])
    assert total.batches == {2: 1, FULL: 1}
    assert total.left == {"free": 1, "full": 1}
    assert (total.refused, total.queued) == (3, [7])


def test_a_closed_loop_counts_every_frame_and_gives_every_slot_back() -> None:
    with loader(SIDE, Nothing(), SPEC, EngineConfig(slots=8, max_batch=FULL)) as driver:
        window = driver.closed(3, 0.02)()
        tally, rooms = window.tally, driver._engine.rooms()
    assert len(window.seconds) == len(tally.queued) >= 3 * IN_FLIGHT
    assert sum(size * count for size, count in tally.batches.items()) == len(window.seconds)
    assert window.rate > 0
    assert all(room["free"] == room["slots"] for room in rooms)


def test_an_open_loop_offers_what_its_plan_says() -> None:
    with loader(SIDE, GreenTint(), SPEC, EngineConfig(slots=8, max_batch=FULL)) as driver:
        window = driver.open((100.0, 50.0), 0.2)()
        tally = window.tally
    planned = arrivals((100.0, 50.0), 0.2)
    assert tally.offered == len(planned) == len(window.seconds) + tally.refused
    assert len(tally.late) == len(planned)
    assert min(tally.late) >= 0
    assert window.wall >= planned[-1].due / 1e9


def test_what_comes_too_fast_is_refused_and_what_is_out_too_late_is_overdue() -> None:
    """100 frames a second and one slot that a processor holds until half of them have come."""
    processor = Held()
    with loader(SIDE, processor, SPEC, EngineConfig(slots=1, max_batch=1)) as driver:
        opener = threading.Timer(0.1, processor.gate.set)
        opener.start()
        tally = driver.open((100.0,), 0.2)().tally
        opener.join()
    assert tally.refused >= 5
    assert tally.overdue >= 1
    assert tally.refused + len(tally.queued) == tally.offered


def test_a_failed_frame_is_an_error_and_no_figure() -> None:
    with loader(SIDE, Gated(), SPEC, EngineConfig(slots=2, max_batch=1)) as driver:
        with pytest.raises(ProcessorFailed, match="thirteen"):
            driver.once(bytes([13]) * SPEC.nbytes)
        assert driver._landed.empty()
        assert driver._engine.rooms()[0]["free"] == 2


def test_what_comes_back_is_what_the_processor_makes() -> None:
    with loader(SIDE, GreenTint(), SPEC, EngineConfig(slots=2, max_batch=1)) as driver:
        assert driver.once(bytes(SPEC.nbytes)) == bytes([0, 80, 0]) * SPEC.pixels


def test_nothing_to_wait_for_is_an_error() -> None:
    with loader(SIDE, Nothing(), SPEC, EngineConfig(slots=2, max_batch=1)) as driver, pytest.raises(queue.Empty):
        driver._take(Tally(), 0.001)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (Case(True, 1), "closed, 1 stream"),
        (Case(False, 16, 8, 2.0), "open, 16 streams, batch 8, wait 2 ms"),
        (Case(False, 90, load=0.8), "open, 80% of the closed peak"),
    ],
)
def test_names_of_cases(case: Case, name: str) -> None:
    assert case.name == name


def test_no_closed_loop_waits_for_slots() -> None:
    for size in Size:
        for case in bench_batching.cases(Sheet(size)):
            assert case.config.slots >= IN_FLIGHT * case.streams


def test_a_tiny_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_batching, "SPEC", SPEC)
    monkeypatch.setattr(bench_batching, "LOADS", ((0.01,),) * 3)
    sheet = Sheet(Size.TINY)
    missing = Side("cupy", SIDE.make, None, "cupy is not installed")
    bench_batching.measure(sheet, [SIDE, missing])
    rows = {row["name"]: row for row in sheet.rows}
    assert rows["cupy: batching"] == {"name": "cupy: batching", "skipped": "cupy is not installed"}
    assert len(rows) == 1 + 2 * (len(bench_batching.cases(sheet)) + 1) == sheet.expected
    peak = rows["numpy, no-op, closed, 2 streams"]
    assert peak["frames_per_second"] > 0
    assert peak["cpu_seconds_per_million_frames"] > 0
    assert peak["queue_p50_us"] <= peak["queue_p99_us"]
    assert peak["batches_left"]
    live = rows["numpy, green_tint, open, 2 streams"]
    assert live["missed"] >= 0
    assert live["offered_per_second"] > 0
    assert not _rows("batching", sheet.rows)


def test_wrong_output_is_a_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    class Liar(GreenTint):
        kernels = {"numpy": lambda src, dst, params: None}

    monkeypatch.setattr(bench_batching, "SPEC", SPEC)
    sheet = Sheet(Size.TINY)
    assert bench_batching._case(sheet, SIDE, Liar(), Case(True, 1)) == 0.0
    assert sheet.rows == [
        {"name": "numpy, green_tint, closed, 1 stream", "failed": "what came out differs from numpy's"}
    ]


def test_shares_name_the_three_most_frequent() -> None:
    assert bench_batching._shares({"1": 10, "2": 60, "3": 1, "8": 29}) == "2: 60%, 8: 29%, 1: 10%"
    assert bench_batching._shares({"1": 999, "2": 1}) == "1: 100%"
