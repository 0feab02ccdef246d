"""The search, what binds, CPU by thread, and a tiny run with real processes."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import bench_capacity
from benchmarks.bench_capacity import MOST, Copies, Search
from benchmarks.binding import (
    DECODE,
    DEVICE,
    ENCODE,
    LOOP,
    OTHER,
    Evidence,
    Sample,
    Spent,
    Watch,
    binding,
    role,
    spent,
)
from benchmarks.harness import Sheet, Size
from benchmarks.live_trial import House, Trial, first_frame, in_words, jitter
from benchmarks.schema import _rows
from gpu_byoc.local.streamclient import Figures
from gpu_byoc.local.streamrig import Rig
from tests.support.processes import running
from tests.support.workers import asynchronous

BUDGET = 0.1


# --- the search


@given(st.integers(0, MOST + 5), st.integers(2, MOST))
def test_the_search_finds_how_many_fit(fits: int, guess: int) -> None:
    search, tried = Search(MOST), []
    now = search.next(1)
    while now is not None:
        assert 1 <= now <= MOST
        assert now not in tried
        tried.append(now)
        search.told(now, now <= fits)
        now = search.next(guess)
    assert search.best == min(fits, MOST)
    assert search.failed == (None if fits >= MOST else fits + 1)
    assert len(tried) <= 16


def test_the_search_goes_where_one_stream_lets_expect() -> None:
    search = Search(MOST)
    assert search.next(1) == 1
    search.told(1, True)
    assert search.next(11) == 11


def test_no_stream_fits() -> None:
    search = Search(MOST)
    search.told(1, False)
    assert search.next(9) is None
    assert search.best == 0


def trial(worst: float = 0.05, missed: int = 0, errors: tuple[str, ...] = ()) -> Trial:
    return Trial(2, worst, missed, errors, {}, None, (0.0, 0.0), 50.0)


@pytest.mark.parametrize(
    ("seen", "passes"),
    [
        (trial(), True),
        (trial(worst=BUDGET), True),
        (trial(worst=BUDGET + 1e-6), False),
        (trial(missed=1), False),
        (trial(errors=("refused",)), False),
    ],
)
def test_what_passes(seen: Trial, passes: bool) -> None:
    assert seen.passes(BUDGET) is passes


# --- what binds


def seen(
    roles: dict[str, float],
    machine: float = 1.0,
    busiest: dict[str, float] | None = None,
    beside: float = 0.2,
    on_gpu: bool = False,
    device: tuple[float, float] = (0.0, 0.0),
) -> Evidence:
    used = Spent(2.0, roles, busiest or {}, {"client": beside}, machine)
    return Evidence(2, used, 0.1, 0.2, on_gpu, *device)


@pytest.mark.parametrize(
    ("evidence", "said"),
    [
        (seen({ENCODE: 1.0, DECODE: 0.6}, machine=2.0), "encode: 2.0 of 2 cores were busy"),
        (seen({ENCODE: 0.6, DECODE: 1.2}, machine=1.9), "decode: "),
        (seen({ENCODE: 0.2, DECODE: 0.1, LOOP: 0.05}, machine=0.7, beside=0.1), "none of those measured: "),
        (seen({DEVICE: 0.95, ENCODE: 0.3}, busiest={DEVICE: 0.95, ENCODE: 0.1}), "kernel: one thread was busy 95%"),
        (seen({LOOP: 0.97}, busiest={LOOP: 0.97}), "event loop: one thread was busy 97%"),
        (seen({ENCODE: 0.92}, busiest={ENCODE: 0.92}), "encode: one thread"),
        (seen({ENCODE: 0.5}, on_gpu=True, device=(0.2, 0.75)), "copy: the GPU was busy 95%"),
        (seen({ENCODE: 0.5}, on_gpu=True, device=(0.8, 0.15)), "kernel: the GPU was busy 95%"),
        (seen({ENCODE: 0.3, DECODE: 0.2}, machine=2.0), "other programs: 2.0 of 2 cores were busy (1.3 of them"),
    ],
)
def test_binding(evidence: Evidence, said: str) -> None:
    assert binding(evidence).startswith(said)


def test_a_busy_device_is_no_gpu_where_there_is_none() -> None:
    assert binding(seen({ENCODE: 0.5}, device=(0.8, 0.15))).startswith("none of those measured")


def test_the_conversions_are_taken_out_of_decode_and_encode() -> None:
    stages = seen({DECODE: 0.5, ENCODE: 0.9, DEVICE: 0.1, LOOP: 0.05}).stages
    assert stages == pytest.approx({"decode": 0.4, "encode": 0.7, "copy": 0.3, "kernel": 0.1, "event loop": 0.05})


def test_a_conversion_is_never_more_than_its_thread() -> None:
    stages = seen({DECODE: 0.05}).stages
    assert stages["decode"] == 0
    assert stages["copy"] == pytest.approx(0.05)


# --- CPU by thread


@pytest.mark.parametrize(
    ("name", "is_main", "wanted"),
    [
        ("python", True, LOOP),
        ("12cd34-1-decode", False, DECODE),
        ("12cd34-1-encode", False, ENCODE),
        ("gpu-byoc-numpy", False, DEVICE),
        ("y-cuda-landing", False, DEVICE),
        ("-byoc-processor", False, OTHER),
        ("asyncio_0", False, OTHER),
    ],
)
def test_roles(name: str, is_main: bool, wanted: str) -> None:
    assert role(name, "numpy", is_main) == wanted


def sample(at: float, threads: dict[tuple[int, str], float], client: float, machine: float) -> Sample:
    return Sample(at, threads, {"client": client}, machine)


def test_what_was_spent_between_two_samples() -> None:
    samples = [
        sample(0.0, {(1, LOOP): 9.0}, 9.0, 99.0),
        sample(1.0, {(1, LOOP): 10.0, (2, DECODE): 1.0}, 10.0, 100.0),
        sample(2.0, {(1, LOOP): 10.1, (2, DECODE): 1.5}, 10.2, 101.0),
        sample(3.0, {(1, LOOP): 10.2, (2, DECODE): 2.0, (3, DECODE): 0.4}, 10.4, 103.0),
        sample(4.0, {(1, LOOP): 99.0}, 99.0, 999.0),
    ]
    used = spent(samples, 0.5, 3.5)
    assert used is not None
    assert used.seconds == 2.0
    assert used.roles == pytest.approx({LOOP: 0.1, DECODE: 0.7})
    assert used.busiest == pytest.approx({LOOP: 0.1, DECODE: 0.5})
    assert used.beside == pytest.approx({"client": 0.2})
    assert used.machine == pytest.approx(1.5)
    assert used.others == pytest.approx(0.5)


def test_one_sample_says_nothing() -> None:
    assert spent([sample(1.0, {}, 0.0, 0.0)], 0.0, 9.0) is None


def decoding(watch: Watch) -> float:
    """CPU seconds of threads that decode, in the last sample."""
    threads = watch.samples[-1].threads if watch.samples else {}
    return sum(used for (_, what), used in threads.items() if what == DECODE)


@asynchronous
async def test_the_watch_sees_a_thread_by_the_name_the_kernel_has() -> None:
    """This process burns CPU on a thread that calls itself one that decodes."""
    over = threading.Event()

    def burn() -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text("x-decode")
        until = time.thread_time() + 0.1
        while time.thread_time() < until:
            pass
        over.wait()

    thread = threading.Thread(target=burn)
    thread.start()
    watch = Watch(os.getpid(), "numpy", {"myself": os.getpid()})
    task = asyncio.create_task(watch.run())
    try:
        async with asyncio.timeout(20):
            while decoding(watch) < 0.08:  # noqa: ASYNC110 - samples are taken, not announced
                await asyncio.sleep(0.02)
    finally:
        over.set()
        task.cancel()
        await asyncio.wait([task])
        thread.join()
    assert any(what == LOOP for _, what in watch.samples[0].threads)
    assert watch.samples[-1].beside["myself"] > 0.08
    assert watch.samples[-1].machine > 0


def test_our_own_threads_have_names_for_the_kernel() -> None:
    program = ("-m", "benchmarks.named_threads")
    with running("serve", "--backend", "numpy", "--host", "127.0.0.1", "--port", "0", program=program) as worker:
        worker.wait_for("listening on port")
        tasks = Path(f"/proc/{worker.popen.pid}/task")
        names = {role(name.read_text().strip(), "numpy", False) for name in tasks.glob("*/comm")}
        assert DEVICE in names


# --- figures of a stream


def test_cores_in_words() -> None:
    assert in_words({"decode": 0.514, "encode": 0.92, "event loop": 0.001}) == "encode 0.92, decode 0.51"


def test_a_failed_trial_is_tried_again_and_the_better_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = iter([trial(missed=3), trial(), trial(worst=0.3), trial(worst=0.2)])
    monkeypatch.setattr(bench_capacity, "trial", lambda home, plan, streams: next(trials))
    home, plan = object(), object()
    assert bench_capacity._tried(home, plan, 2, BUDGET, again=True).passes(BUDGET)  # type: ignore[arg-type]
    assert bench_capacity._tried(home, plan, 2, BUDGET, again=True).worst == 0.2  # type: ignore[arg-type]


def test_what_was_not_searched_to_its_end_says_at_least() -> None:
    sheet, search = Sheet(Size.QUICK), Search(MOST)
    seen = {count: trial() for count in (1, 8)}
    for count in seen:
        search.told(count, True)
    home = House(Rig("", "", None, None), "numpy", 0, 0, 1.0)
    bench_capacity._answer(sheet, "numpy, 64x48", home, search, seen, Copies(0.0, 0.0), BUDGET, unfinished=True)
    (row,) = sheet.rows
    assert row["answer"] == "at least 8 streams at p95 <= 100 ms"
    assert row["streams_that_fit"] == 8
    assert row["binding"] == "nothing yet: no trial failed, of 8 streams at the most"
    assert "failed_at" not in row


def test_none_fits_and_says_why() -> None:
    sheet, search = Sheet(Size.QUICK), Search(MOST)
    search.told(1, False)
    home = House(Rig("", "", None, None), "numpy", 0, 0, 1.0)
    bench_capacity._answer(sheet, "numpy, 64x48", home, search, {1: trial(worst=1.5)}, Copies(0.0, 0.0), BUDGET)
    (row,) = sheet.rows
    assert (row["answer"], row["streams_that_fit"]) == ("none", 0)
    assert row["why"] == "one stream: 0 frames missed, p95 1500 ms"
    assert row["failed_at"] == 1
    assert not _rows("capacity", sheet.rows)


def test_jitter_is_how_far_neighbours_differ() -> None:
    figures = Figures(published={0: 1.0, 10: 2.0, 20: 3.0}, received={20: 3.5, 0: 1.1, 10: 2.3})
    assert jitter(figures) == pytest.approx(0.2)
    assert first_frame(figures) == pytest.approx(0.1)


def test_one_picture_has_no_jitter() -> None:
    assert jitter(Figures(published={0: 1.0}, received={0: 1.1})) == 0.0


# --- all of it


@pytest.mark.timeout(120)
def test_a_tiny_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """One stream and more of 64x48 for a second: rows, an answer, what binds and a peak."""
    monkeypatch.setattr(bench_capacity, "SIZES", ((64, 48),))
    monkeypatch.setattr(bench_capacity, "backends", lambda: {"cupy": "no GPU here", "numpy": ""})
    sheet = Sheet(Size.TINY)
    bench_capacity.run(sheet, budget_ms=5000.0)
    rows = {row["name"]: row for row in sheet.rows}
    assert not _rows("capacity", sheet.rows)
    assert rows["cupy: capacity"]["skipped"] == "no GPU here"
    one = rows["numpy, 64x48, paced, 1 stream"]
    assert one["passed"] == "yes", one
    assert one["frames_in"] == one["frames_out"] > 0
    assert one["worst_p95_ms"] == one["p95_ms"]
    assert one["p50_ms"] <= one["p95_ms"] <= one["p99_ms"]
    assert one["cpu_ms"] > 0
    assert one["first_frame_ms"] > 0
    answer = rows["numpy, 64x48, how many"]
    assert answer["answer"].endswith("at p95 <= 5000 ms")
    assert answer["streams_that_fit"] >= 1
    assert answer["binding"]
    peak = rows["numpy, 64x48, peak"]
    assert "failed" not in peak, peak
    assert peak["missed"] == 0
    assert peak["frames_per_second"] > 0
