"""Several engines behind one door: who goes where, what adds up, and one that is lost ends them all."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gpu_byoc_backends.numpy_cpu import NumpyBackend

from gpu_byoc.backend import Batch
from gpu_byoc.config import EngineConfig
from gpu_byoc.core.meter import Usage
from gpu_byoc.engine.device import Outcome
from gpu_byoc.engine.engine import Engine, Lease
from gpu_byoc.engine.fleet import Fleet
from gpu_byoc.errors import DeviceLost, Draining, GpuByocError, Overloaded, TooLarge
from gpu_byoc.frames import FrameSpec
from tests.support.engines import SPEC, WAIT, Door, Gated, value

LARGE = FrameSpec(40, 20)


class Row(Door):
    """A fleet of numpy engines, each with a gated processor of its own."""

    def __init__(self, count: int, backend: type[NumpyBackend] = NumpyBackend, **config: Any) -> None:
        self.processors = [Gated() for _ in range(count)]
        settings = EngineConfig(**{"slots": 4, "max_batch": 2} | config)
        self.fleet = Fleet([Engine(backend(), each, settings) for each in self.processors])
        super().__init__(self.fleet, self.processors[0])
        for opened in self.fleet.start():
            opened.result(WAIT)
        self.fleet.open_name("jobs")

    def shut(self) -> None:
        for processor in self.processors:
            processor.gate = threading.Event()

    def open(self) -> None:
        for processor in self.processors:
            if processor.gate is not None:
                processor.gate.set()

    def where(self, lease: Lease) -> int:
        return self.fleet.engines.index(lease._engine)


@contextlib.contextmanager
def row(count: int, **config: Any) -> Iterator[Row]:
    it = Row(count, **config)
    yield it
    it.open()
    it.fleet.close()


def test_jobs_go_to_the_least_loaded_device() -> None:
    with row(3) as it:
        leases = [it.lease() for _ in range(6)]
        assert [it.where(lease) for lease in leases] == [0, 1, 2, 0, 1, 2]
        leases[1].release()
        assert it.where(it.lease()) == 1
        large = it.lease(spec=LARGE)
        assert it.where(large) == 0
        assert [it.where(it.lease()) for _ in range(2)] == [1, 2], "one large frame weighs more than some small ones"


def test_an_idle_fleet_uses_its_first_device() -> None:
    with row(2) as it:
        for _ in range(3):
            lease, outcome = it.submit(1)
            assert outcome.get(timeout=WAIT).error is None
            lease.release()
            assert it.where(lease) == 0
        assert [len(engine.rooms()) for engine in it.fleet.engines] == [1, 0], "no memory is made that nobody needs"


def test_a_free_slot_is_worth_more_than_a_light_load() -> None:
    with row(2) as it:
        small = [it.lease() for _ in range(8)]
        for lease in small:
            if it.where(lease) == 1:
                lease.release()
        it.lease(spec=LARGE)  # on 1, which is empty
        assert it.where(it.lease()) == 1, "0 has fewer bytes in the house, and no slot"


def test_a_full_house_refuses_and_counts_once() -> None:
    with row(2, memory=4 * SPEC.nbytes) as it:
        first = it.lease()
        assert it.where(first) == 0
        second = it.lease(spec=FrameSpec(4, 4))
        assert it.where(second) == 1
        with pytest.raises(Overloaded):
            it.lease(spec=FrameSpec(1, 1))
        assert it.fleet.refused == 1
        with pytest.raises(TooLarge):
            it.lease(frames=3)
        assert it.fleet.refused == 1


def test_a_lighter_device_that_refuses_is_not_the_last_word() -> None:
    """Few bytes in the house, and yet no memory for another size: the next device is asked."""
    with row(2, memory=4 * SPEC.nbytes) as it:
        small = it.lease()  # on 0, whose memory now is all of that size
        more = [it.lease(), it.lease()]
        assert [it.where(lease) for lease in more] == [1, 0]
        more[0].release()  # 1 is idle: its memory can be had
        more[1].release()
        other = it.lease(spec=FrameSpec(4, 1), frames=2)
        assert it.where(other) == 1
        third = it.lease(spec=FrameSpec(4, 1), frames=2)
        assert it.where(third) == 1, "0 is lighter, but has no memory for it"
        assert it.fleet.refused == 0
        small.release()


def test_a_stream_is_placed_once_and_stays() -> None:
    with row(2) as it:
        fleet = it.fleet
        busy = it.lease(spec=LARGE)
        assert it.where(busy) == 0
        placed = [fleet.engines.index(fleet.open_stream(f"s{n}")) for n in range(4)]
        assert placed == [1, 0, 1, 0], "fewest streams first, then the least loaded"
        assert [fleet.streams_on(engine) for engine in fleet.engines] == [2, 2]
        fleet.end_stream("s0")
        fleet.end_stream("s2")
        assert [fleet.streams_on(engine) for engine in fleet.engines] == [2, 0]
        assert fleet.engines.index(fleet.open_stream("s5")) == 1
        busy.release()


def test_all_books_add_up_over_the_devices() -> None:
    with row(3) as it:
        fleet, leases, outcomes = it.fleet, [], []
        engines = {name: fleet.open_stream(name) for name in ("a", "b", "c", "d")}
        it.shut()
        for number in range(12):
            name = ("a", "b", "c", "d", "jobs", "jobs")[number % 6]
            lease, outcome = (Stream(engines[name], it) if name in engines else it).submit(number, name)
            leases.append(lease)
            outcomes.append(outcome)
        it.open()
        results = [outcome.get(timeout=WAIT) for outcome in outcomes]
        assert {it.where(lease) for lease in leases} == {0, 1, 2}
        for number, lease in enumerate(leases):
            assert value(lease) == {number + 1}
            lease.release()
        ended = fleet.end_stream("d")
        rows, totals, devices = fleet.usage()
        assert set(totals) == {"jobs", "a", "b", "c", "(ended)"}
        assert totals["(ended)"] == ended == Usage(2, ended.batches, ended.compute_ns, ended.copy_ns, ended.queue_ns)
        assert devices.frames == 12 == sum(usage.frames for usage in totals.values())
        compute = sum(result.compute_ns for result in results)
        assert devices.compute_ns == compute == sum(usage.compute_ns for usage in totals.values())
        assert compute == sum(usage.compute_ns for _, _, usage in rows)
        assert compute == sum(engine.spent().compute_ns for engine in fleet.engines)
        assert len({(second, name) for second, name, _ in rows}) == len(rows), "one row per second and name"
        assert [row[0] for row in rows] == sorted(row[0] for row in rows)
        assert totals["a"] == fleet.total("a") == engines["a"].total("a")
        assert fleet.total("nobody") == Usage()


class Stream(Door):
    """One live stream: its leases come from its own engine."""

    def __init__(self, engine: Engine, it: Row) -> None:
        super().__init__(engine, it.processors[0])


class Losing(NumpyBackend):  # type: ignore[misc]
    """Is lost by a frame of thirteens."""

    def submit(self, batch: Batch) -> Any:
        if batch.arena.view(batch.slots[0])[0] == 13:
            raise DeviceLost("an illegal address was met")
        return super().submit(batch)


def test_one_lost_device_is_fatal_and_the_others_finish() -> None:
    with row(2, backend=Losing) as it:
        told: queue.Queue[GpuByocError] = queue.Queue()
        it.fleet.on_fatal(told.put)
        it.shut()
        good = it.submit(1)
        bad = it.submit(13)
        assert {it.where(good[0]), it.where(bad[0])} == {0, 1}
        assert isinstance(bad[1].get(timeout=WAIT).error, DeviceLost)
        assert isinstance(told.get(timeout=WAIT), DeviceLost)
        assert isinstance(it.fleet.fatal, DeviceLost)
        with pytest.raises(Draining):
            [it.lease() for _ in range(4)]
        it.open()
        assert good[1].get(timeout=WAIT).error is None
        assert value(good[0]) == {2}
        good[0].release()
        bad[0].release()
        later: queue.Queue[GpuByocError] = queue.Queue()
        it.fleet.on_fatal(later.put)
        assert isinstance(later.get(timeout=WAIT), DeviceLost), "whoever asks late is told all the same"
    assert not it.fleet.alive


def test_closing_refuses_everywhere_before_it_waits_anywhere() -> None:
    with row(2, slots=2) as it:
        it.shut()
        jobs = [it.submit(n) for n in range(2)]
        for processor in it.processors:
            processor.entered.get(timeout=WAIT)
        waiting = [it.submit(n) for n in range(2, 4)]
        closing = threading.Thread(target=it.fleet.close, args=(False,))
        closing.start()
        assert all(isinstance(outcome.get(timeout=WAIT).error, Draining) for _, outcome in waiting)
        with pytest.raises(Draining):
            it.lease()
        it.open()
        closing.join(WAIT)
        assert not closing.is_alive()
        assert [outcome.get(timeout=WAIT).error for _, outcome in jobs] == [None, None]
        for lease, _ in jobs + waiting:
            lease.release()
        assert it.free() == 4


def test_a_deadline_is_for_the_whole_fleet() -> None:
    with row(3) as it:
        it.shut()
        for n in range(3):
            it.submit(n)
        for processor in it.processors:
            processor.entered.get(timeout=WAIT)
        closing = threading.Thread(target=it.fleet.close, args=(False, 0.05))
        closing.start()
        closing.join(WAIT)
        assert not closing.is_alive(), "three stuck devices hold it up no longer than one"
        assert it.fleet.alive
    assert not it.fleet.alive


def test_devices_have_names_that_differ() -> None:
    with row(3) as it:
        assert [name for name, _ in it.fleet.named()] == ["cpu", "cpu#2", "cpu#3"]
        it.lease().release()
        assert [room["device"] for room in it.fleet.rooms()] == ["cpu"]


def test_many_threads_lose_nothing() -> None:
    """Eight callers hammer three devices with two sizes, a third of them giving up at a random moment."""
    errors: list[BaseException] = []
    with row(3, slots=4) as it:

        def caller(number: int) -> None:
            rng = np.random.default_rng(number)
            try:
                for _ in range(40):
                    spec = (SPEC, FrameSpec(5, 3))[int(rng.integers(2))]
                    try:
                        lease, outcome = it.submit(int(rng.integers(0, 12)), "jobs", spec=spec)
                    except Overloaded:
                        continue
                    if rng.random() < 0.3:
                        lease.release()
                        continue
                    assert outcome.get(timeout=WAIT).error is None
                    assert len(value(lease)) == 1
                    lease.release()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=caller, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        assert not errors
    _, totals, devices = it.fleet.usage()
    assert sum(usage.compute_ns for usage in totals.values()) == devices.compute_ns
    assert all(room["free"] == room["slots"] for room in it.fleet.rooms())


def test_an_outcome_says_where() -> None:
    with row(2) as it:
        lease, outcome = it.submit(1)
        result: Outcome = outcome.get(timeout=WAIT)
        assert result.device == "cpu"
        lease.release()
