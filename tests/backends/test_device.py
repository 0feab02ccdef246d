"""Streams, lanes and failures of the device backends, on a device that can be held, starved and broken."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from gpu_byoc_backends._lanes import Lane, LanePool

from gpu_byoc.backend import BatchTimes
from gpu_byoc.errors import BackendUnavailable, DeviceLost, DeviceOutOfMemory
from gpu_byoc.frames import FrameSpec
from gpu_byoc.processor import ArrayProcessor, NoParams
from gpu_byoc.processors.passthrough import Passthrough
from tests.backends.fake_cupy import CUDARuntimeError, StandInBackend
from tests.backends.kit import House, noise

SPEC = FrameSpec(8, 4)  # 96 bytes


class Invert(ArrayProcessor):
    def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
        return frames ^ 0xFF


class InvertInPlace(Invert):
    """The same as a kernel, which may write to the lane."""

    @staticmethod
    def kernel(frames: Any, params: Any) -> Any:
        np.bitwise_xor(frames, 0xFF, out=frames)
        return frames

    kernels = {"stand-in": kernel}


class InvertIntoTheSame(Invert):
    """The same into an array that is used again for the next batch."""

    kept = np.zeros((16, *SPEC.shape), np.uint8)

    def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
        return np.bitwise_xor(frames, 0xFF, out=self.kept[: len(frames)])


@pytest.fixture(params=[Invert, InvertInPlace, InvertIntoTheSame])
def backend(request: pytest.FixtureRequest) -> Iterator[StandInBackend]:
    yield from _opened(request.param())


@pytest.fixture
def plain() -> Iterator[StandInBackend]:
    yield from _opened(Invert())


def _opened(processor: ArrayProcessor) -> Iterator[StandInBackend]:
    backend = StandInBackend()
    try:
        backend.open(None, processor)
        yield backend
    finally:
        backend.fake.lost = ""
        backend.close()


def stream(backend: StandInBackend, name: str) -> Any:
    """One of the stand-in's streams, whose ``open`` a test may clear to hold its work."""
    return getattr(backend, name)


def test_submit_returns_while_downloads_are_held_and_slots_keep_their_input(backend: StandInBackend) -> None:
    house = House.of(backend, SPEC, 8)
    down = stream(backend, "_down")
    down.open.clear()
    flying = []
    for seed, slots in enumerate([(0, 1), (5, 4), (7, 2)]):
        frames = noise(seed, 2, SPEC)
        flying.append((backend.submit(house.put(slots, frames, NoParams())), slots, frames))
    house.check()  # all computed, nothing written
    down.open.set()
    for submission, slots, frames in flying:
        submission.wait()
        house.expect(slots, frames ^ np.uint8(0xFF))
    house.check()


def test_the_upload_comes_before_the_processor(plain: StandInBackend) -> None:
    """Held uploads hold the processor's call; only the event between the streams makes it so."""
    house, frames = House.of(plain, SPEC, 1), noise(0, 1, SPEC)
    up = stream(plain, "_up")
    up.open.clear()
    with ThreadPoolExecutor(1) as thread:
        submitting = thread.submit(plain.submit, house.put((0,), frames, NoParams()))
        with pytest.raises(TimeoutError):
            submitting.result(timeout=0.1)
        up.open.set()
        submitting.result().wait()
    house.expect((0,), frames ^ np.uint8(0xFF))
    house.check()


class InvertLater(ArrayProcessor):
    """A kernel that is enqueued like one of CUDA: it runs when the stream gets there, and a test may hold it."""

    def setup(self, xp: Any, device: Any) -> None:
        self.go = threading.Event()
        self.compute: Any = None
        self.kernels = {"stand-in": self.kernel}  # type: ignore[misc]

    def kernel(self, frames: Any, params: Any) -> Any:
        def run() -> None:
            self.go.wait(20)
            np.bitwise_xor(frames, 0xFF, out=frames)

        if self.compute is not None:
            self.compute.enqueue(run)
        return frames


def test_the_processor_comes_before_the_download() -> None:
    later = InvertLater()
    for backend in _opened(later):
        later.compute, down = stream(backend, "_compute"), stream(backend, "_down")
        house, frames = House.of(backend, SPEC, 2), noise(0, 2, SPEC)
        submission = backend.submit(house.put((1, 0), frames, NoParams()))  # returns before the kernel ran
        with ThreadPoolExecutor(1) as thread:
            downloading = thread.submit(down.synchronize)
            with pytest.raises(TimeoutError):
                downloading.result(timeout=0.1)
            house.check()
            later.go.set()
            downloading.result()
        submission.wait()
        house.expect((1, 0), frames ^ np.uint8(0xFF))
        house.check()


def test_neighbouring_slots_are_one_copy_each_way(plain: StandInBackend) -> None:
    house = House.of(plain, SPEC, 8)
    plain.submit(house.put((2, 3, 4, 5, 0), noise(0, 5, SPEC), NoParams())).wait()
    assert plain.fake.copies == 4


@pytest.mark.parametrize("slots", [(5, 4, 3, 2), (4, 2, 5, 3)])
def test_neighbours_are_one_copy_in_whatever_order_they_were_handed_out(plain: StandInBackend, slots: Any) -> None:
    """Free slots are handed out last in, first out: what was given back in order comes out backwards."""
    house, frames = House.of(plain, SPEC, 8), noise(0, 4, SPEC)
    plain.submit(house.put(slots, frames, NoParams())).wait()
    assert plain.fake.copies == 2
    house.expect(slots, frames ^ np.uint8(0xFF))
    house.check()


def test_a_lane_may_come_back_while_others_are_dropped() -> None:
    """They are on two threads. Here the other one gives its lane back at the worst moment: in the middle of a look."""
    pool = LanePool(lambda nbytes, bucket: Lane(nbytes, bucket, None, ()))
    late = [pool.make(8, bucket) for bucket in (1, 2, 4)]

    class Size(int):
        def __eq__(self, other: object) -> bool:
            if late:
                pool.give(late.pop())
            return int(self) == other

        __hash__ = int.__hash__

    for nbytes in (5, 6, 7):
        pool.give(pool.make(Size(nbytes), 1))
    pool.drop(6)
    assert sorted(nbytes for nbytes, _ in pool._idle) == [5, 7, 8, 8, 8]


def test_device_memory_is_allocated_once_and_freed_with_its_arena(backend: StandInBackend) -> None:
    house = House.of(backend, SPEC, 8)
    before = backend.fake.used  # the canary's

    def two_in_flight() -> None:
        flying = [backend.submit(house.put(slots, noise(0, 3, SPEC), NoParams())) for slots in [(0, 1, 2), (5, 6, 7)]]
        for submission in flying:
            submission.wait()

    two_in_flight()
    allocations = backend.fake.allocations
    for _ in range(5):
        two_in_flight()
    backend.submit(house.put((0, 1, 2, 3), noise(0, 4, SPEC), NoParams())).wait()  # 3 and 4 frames share a bucket
    assert backend.fake.allocations == allocations
    assert backend.fake.used > before
    house.arena.close()
    assert backend.fake.used == before


def test_an_arena_that_is_closed_twice_is_closed(plain: StandInBackend) -> None:
    arena = plain.arena(96, 2)
    kept = arena.view(1)
    arena.close()
    arena.close()
    kept[0] = 7  # a view that a transport still holds keeps its memory


# --- memory that runs out


def test_idle_lanes_of_other_sizes_make_room(plain: StandInBackend) -> None:
    large, small = House.of(plain, FrameSpec(64, 64), 1), House.of(plain, SPEC, 1)
    plain.submit(large.put((0,), noise(0, 1, large.spec), NoParams())).wait()
    plain.fake.budget = plain.fake.used + 100  # not enough for two arrays of 96 bytes beside the idle lane
    frames = noise(1, 1, SPEC)
    plain.submit(small.put((0,), frames, NoParams())).wait()
    small.expect((0,), frames ^ np.uint8(0xFF))
    small.check()


def test_a_batch_that_does_not_fit_says_so_and_a_smaller_one_works(plain: StandInBackend) -> None:
    plain.fake.budget = 500
    house, frames = House.of(plain, SPEC, 8), noise(0, 8, SPEC)
    with pytest.raises(DeviceOutOfMemory, match=r"cuda:0 .*--max-batch"):
        plain.submit(house.put(tuple(range(8)), frames, NoParams())).wait()
    house.check()
    plain.submit(house.put((0, 1), frames[:2], NoParams())).wait()
    house.expect((0, 1), frames[:2] ^ np.uint8(0xFF))
    house.check()


class Greedy(ArrayProcessor):
    """Allocates on the device as it goes, like a model."""

    fake: Any

    def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
        self.fake.empty(400 * len(frames), np.uint8)
        return frames


def test_memory_that_runs_out_in_a_processor_is_the_device_s(plain: StandInBackend) -> None:
    before = plain.fake.used
    greedy = plain._processor = Greedy()
    greedy.fake, plain.fake.budget = plain.fake, 900
    house, frames = House.of(plain, SPEC, 2), noise(0, 2, SPEC)
    house.expect((0, 1), frames)
    with pytest.raises(DeviceOutOfMemory):
        plain.submit(house.put((0, 1), frames, NoParams())).wait()
    assert plain.fake.used == before, "idle lanes are freed"
    for slot in (0, 1):
        plain.submit(house.put((slot,), frames[[slot]], NoParams())).wait()
    house.check()


class SaysFull(ArrayProcessor):
    """CUDA, or cuBLAS, says itself that there is no memory: neither library has an exception of its own for that."""

    text: str

    def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
        raise CUDARuntimeError(self.text)


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("cudaErrorMemoryAllocation: out of memory", True),
        ("CUBLAS_STATUS_ALLOC_FAILED", True),
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        ("cudaErrorInvalidValue: invalid argument", False),
    ],
)
def test_memory_that_cuda_itself_says_ran_out(plain: StandInBackend, text: str, full: bool) -> None:
    says = plain._processor = SaysFull()
    says.text = text
    house, frames = House.of(plain, SPEC, 1), noise(0, 1, SPEC)
    with pytest.raises(DeviceOutOfMemory if full else CUDARuntimeError):
        plain.submit(house.put((0,), frames, NoParams()))
    house.check()


def test_a_device_that_is_full_when_it_opens() -> None:
    backend = StandInBackend()
    backend.fake.budget = 8
    with pytest.raises(BackendUnavailable, match=r"cannot open cuda:3 \(16 bytes asked, 8 left\).* all of its memory"):
        backend.open("cuda:3", Passthrough())
    backend.close()


# --- pinned memory


def test_pinned_memory_is_said_to_be(plain: StandInBackend) -> None:
    assert plain.arena(96, 2).pinned
    assert plain.info()["degraded"] == []


def test_memory_that_cannot_be_pinned_is_said_once_and_works(plain: StandInBackend, caplog: Any) -> None:
    plain.fake.pinnable = False
    house, frames = House.of(plain, SPEC, 2), noise(0, 2, SPEC)
    assert not house.arena.pinned
    plain.arena(96, 2)
    (reason,) = plain.info()["degraded"]
    assert "not pinned (cudaErrorMemoryAllocation" in reason
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    plain.submit(house.put((0, 1), frames, NoParams())).wait()
    house.expect((0, 1), frames ^ np.uint8(0xFF))
    house.check()


def test_memory_that_must_be_pinned(plain: StandInBackend) -> None:
    plain.fake.pinnable = False
    plain.require_pinned = True
    with pytest.raises(BackendUnavailable, match=r"not pinned .* --slots"):
        plain.arena(96, 2)


# --- a device that fails for good


class Breaks(ArrayProcessor):
    """Does to the device what an illegal address does, and notices something else."""

    fake: Any

    def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
        self.fake.lost = "cudaErrorIllegalAddress: an illegal memory access was encountered"
        raise KeyError("an exception that says nothing of devices")


def test_a_device_that_breaks_under_a_processor(plain: StandInBackend) -> None:
    house = House.of(plain, SPEC, 1)
    breaks = plain._processor = Breaks()
    breaks.fake = plain.fake
    with pytest.raises(DeviceLost, match=r"cuda:0 failed for good \(cudaErrorIllegalAddress.*restart") as caught:
        plain.submit(house.put((0,), noise(0, 1, SPEC), NoParams()))
    assert isinstance(caught.value.__cause__, KeyError)
    house.check()


def test_a_device_that_breaks_in_flight_stays_lost(plain: StandInBackend) -> None:
    house = House.of(plain, SPEC, 2)
    batch = house.put((0,), noise(0, 1, SPEC), NoParams())
    submission = plain.submit(batch)
    plain.fake.lost = "cudaErrorLaunchFailure"
    with pytest.raises(DeviceLost, match="cudaErrorLaunchFailure"):
        submission.wait()
    plain.fake.lost = ""
    with pytest.raises(DeviceLost, match="cudaErrorLaunchFailure"):
        plain.submit(batch)


def test_a_device_that_does_not_open() -> None:
    backend = StandInBackend()

    def refuse(non_blocking: bool, priority: int) -> Any:
        raise CUDARuntimeError("cudaErrorDevicesUnavailable")

    backend.fake.cuda.Stream = refuse
    with pytest.raises(BackendUnavailable, match=r"cannot open cuda:3 \(cudaErrorDevicesUnavailable\).*nvidia-smi"):
        backend.open("cuda:3", Passthrough())
    backend.close()


# --- kernels


class BadKernel(Invert):
    @staticmethod
    def kernel(frames: Any, params: Any) -> Any:
        raise RuntimeError("no compiler")

    kernels = {"stand-in": kernel}


def test_a_kernel_that_does_not_build_is_said_and_the_generic_form_used() -> None:
    for backend in _opened(BadKernel()):
        (reason,) = backend.info()["degraded"]
        assert "no stand-in kernel of BadKernel runs here (kernel: RuntimeError: no compiler)" in reason
        house, frames = House.of(backend, SPEC, 1), noise(0, 1, SPEC)
        assert isinstance(backend.submit(house.put((0,), frames, NoParams())).wait(), BatchTimes)
        house.expect((0,), frames ^ np.uint8(0xFF))
        house.check()


# --- torch says "out of memory" by a class of its own


@pytest.mark.needs_torch
def test_torch_out_of_memory_in_a_processor() -> None:
    import torch
    from gpu_byoc_backends.torch_cuda import TorchBackend

    class Full(ArrayProcessor):
        def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    backend = TorchBackend()
    backend.open("cpu", Full())
    house = House.of(backend, SPEC, 1)
    with pytest.raises(DeviceOutOfMemory, match=r"2.00 GiB.*--max-batch"):
        backend.submit(house.put((0,), noise(0, 1, SPEC), NoParams()))
    house.check()
    backend.close()
