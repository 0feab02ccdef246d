"""A device whose memory runs out: smaller batches at once, larger ones later; nobody fails who could be served."""

from __future__ import annotations

import queue
import threading
from typing import Any

import pytest
from gpu_byoc_backends.numpy_cpu import NumpyBackend

from gpu_byoc.backend import Batch
from gpu_byoc.engine.device import Outcome
from gpu_byoc.engine.engine import Lease
from gpu_byoc.errors import BackendUnavailable, DeviceOutOfMemory
from gpu_byoc.frames import FrameSpec
from tests.support.engines import SPEC, WAIT, Gated, House, value


class Small(NumpyBackend):  # type: ignore[misc]
    """Memory for ``fits`` frames in a batch; ``crowded`` batches do not fit the first time, as if a pool held it."""

    def __init__(self, fits: int, crowded: int = 0) -> None:
        super().__init__()
        self.fits = fits
        self.crowded = crowded
        self.sizes: list[int] = []

    def submit(self, batch: Batch) -> Any:
        self.sizes.append(len(batch.slots))
        if len(batch.slots) > self.fits:
            raise DeviceOutOfMemory("full")
        if self.crowded:
            self.crowded -= 1
            raise DeviceOutOfMemory("crowded")
        return super().submit(batch)


def burst(house: House, processor: Gated, count: int) -> list[tuple[Lease, queue.Queue[Outcome]]]:
    """``count`` frames of as many streams that wait together while the device is busy with another one."""
    while not processor.entered.empty():
        processor.entered.get()
    processor.gate = threading.Event()
    blocker = house.submit(0, "blocker")
    processor.entered.get(timeout=WAIT)
    jobs = [house.submit(n, f"s{n}") for n in range(1, count + 1)]
    processor.gate.set()
    assert blocker[1].get(timeout=WAIT).error is None
    blocker[0].release()
    return jobs


def served(jobs: list[tuple[Lease, queue.Queue[Outcome]]]) -> list[Outcome]:
    outcomes = [outcome.get(timeout=WAIT) for _, outcome in jobs]
    for number, (lease, _) in enumerate(jobs, start=1):
        assert value(lease) == {number + 1}
        lease.release()
    return outcomes


def limit(house: House) -> int:
    (room,) = house.engine.rooms()
    return int(room["max_batch"])


def test_a_batch_that_does_not_fit_is_halved_and_the_next_ones_are_small_at_once() -> None:
    processor, backend = Gated(), Small(fits=2)
    house = House(processor, backend, slots=16, max_batch=8)
    assert all(outcome.error is None for outcome in served(burst(house, processor, 8)))
    assert backend.sizes == [1, 8, 4, 2, 2, 4, 2, 2], "order is kept"
    assert house.engine.out_of_memory == 3
    assert limit(house) == 2
    assert all(outcome.error is None for outcome in served(burst(house, processor, 8)))
    assert backend.sizes[8:] == [1, 2, 2, 2, 2], "no batch fails that is known not to fit"
    house.engine.close()


def test_it_grows_back_once_there_is_memory_again() -> None:
    processor, backend = Gated(), Small(fits=2)
    house = House(processor, backend, slots=16, max_batch=4)
    served(burst(house, processor, 4))
    assert limit(house) == 2
    backend.fits = 8
    (room,) = house.engine._rooms.values()
    for patience, grown in ((room.limit.patience, 2), (0, 4)):  # long before its time, and then
        room.limit.patience = patience
        lease, outcome = house.submit(1, frames=2)
        assert outcome.get(timeout=WAIT).error is None
        lease.release()
        assert limit(house) == grown
    assert house.engine.out_of_memory == 1
    backend.sizes.clear()
    served(burst(house, processor, 4))
    assert backend.sizes == [1, 4]
    house.engine.close()


def test_one_size_that_is_too_large_leaves_the_others_alone() -> None:
    processor, backend = Gated(), Small(fits=0)
    house = House(processor, backend, slots=8, max_batch=8)
    lease, outcome = house.submit(1, frames=8, spec=FrameSpec(64, 64))
    error = outcome.get(timeout=WAIT).error
    assert isinstance(error, DeviceOutOfMemory)
    assert backend.sizes == [8, 8], "a job is never split, and tried once more as it is"
    lease.release()
    backend.fits = 8
    house.submit(1)[1].get(timeout=WAIT)
    assert {room["frame_bytes"]: room["max_batch"] for room in house.engine.rooms()} == {64 * 64 * 3: 4, SPEC.nbytes: 8}
    house.engine.close()


def test_a_single_frame_is_tried_once_more_when_the_backend_has_freed_its_pool() -> None:
    backend = Small(fits=8, crowded=1)
    house = House(Gated(), backend)
    lease, outcome = house.submit(1)
    assert outcome.get(timeout=WAIT).error is None
    assert value(lease) == {2}
    assert backend.sizes == [1, 1]
    assert house.engine.out_of_memory == 1
    lease.release()
    backend.crowded = 2
    lease, outcome = house.submit(1)
    error = outcome.get(timeout=WAIT).error
    assert isinstance(error, DeviceOutOfMemory)
    assert error.status == 503
    lease.release()
    assert house.engine.fatal is None, "the next one may fit"
    house.engine.close()


def test_released_while_it_is_tried_again_the_slots_come_back_once() -> None:
    class Slow(Small):
        def submit(self, batch: Batch) -> Any:
            if len(self.sizes) == 1:
                entered.set()
                assert gate.wait(WAIT)
            return super().submit(batch)

    entered, gate = threading.Event(), threading.Event()
    house = House(Gated(), Slow(fits=0), slots=2, max_batch=2)
    lease, outcome = house.submit(1)
    assert entered.wait(WAIT)
    lease.release()
    assert house.free() == 1, "the device still has it"
    gate.set()
    house.engine.close()
    assert house.free() == 2
    assert outcome.empty()


class Unpinned(NumpyBackend):  # type: ignore[misc]
    """A GPU's backend on a host that pins ``pins`` bytes at the most."""

    device = "cuda:0"
    require_pinned = False
    pins = 0

    def arena(self, nbytes: int, slots: int) -> Any:
        if self.require_pinned and nbytes * slots > self.pins:
            raise BackendUnavailable("host memory is not pinned")
        arena = super().arena(nbytes, slots)
        arena.pinned = nbytes * slots <= self.pins
        return arena


def test_memory_that_has_to_be_pinned_and_cannot_be_ends_the_start() -> None:
    with pytest.raises(BackendUnavailable, match="not pinned"):
        House(Gated(), Unpinned(), require_pinned=True)


def test_memory_that_has_to_be_pinned_and_runs_out_later_fails_those_that_want_it() -> None:
    backend = Unpinned()
    backend.pins = 8192
    house = House(Gated(), backend, slots=4, max_batch=4, require_pinned=True)
    house.lease().release()
    assert house.engine.rooms()[0]["pinned"] is True
    with pytest.raises(BackendUnavailable, match="not pinned"):
        house.lease(spec=FrameSpec(64, 64))
    house.lease().release()
    assert house.engine.fatal is None
    house.engine.close()


def test_without_the_flag_unpinned_memory_is_used_and_shown() -> None:
    house = House(Gated(), Unpinned())
    house.lease().release()
    assert house.engine.rooms()[0]["pinned"] is False
    house.engine.close()


def test_a_gpu_that_says_nothing_about_pinning_is_not_taken_at_its_word() -> None:
    class Silent(NumpyBackend):  # type: ignore[misc]
        device = "npu:0"

    with pytest.raises(BackendUnavailable, match="does not say"):
        House(Gated(), Silent(), require_pinned=True)
    House(Gated(), require_pinned=True).engine.close()  # numpy has nothing to copy to
