"""A device whose streams run in any order that their events permit, the same again for the same ``Schedule``.

The stand-in's streams are threads, whose order is the operating system's. Here everything runs on the calling thread:
work lies in its stream's queue until the schedule, or somebody's waiting, lets it go. A wait that was left out lets
work run too early in some schedule, and bytes come out wrong. Device memory that is freed is handed out again at once
to the stream it was allocated on, as torch's and cupy's allocators do; pinned memory that is touched after it was given
back is a fault.
"""

from __future__ import annotations

import ctypes
import random
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.backends.fake_cupy import FakeCupy, OutOfMemoryError, StandInBackend


@dataclass(slots=True)
class Mark:
    """An event as it was recorded once; to record it again makes another."""

    passed: bool = True  # an event that was never recorded is complete, as in CUDA
    at: int = 0


@dataclass(slots=True)
class Schedule:
    """``order``: which stream goes first where several can, in the order of their creation (upload, compute,
    download, canary); random where it is empty. ``eager``: how likely a piece of work follows each call."""

    seed: int = 0
    order: tuple[int, ...] = ()
    eager: float = 0.0
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def pick(self, ready: list[int]) -> int:
        return min(ready, key=self.order.index) if self.order else self.random.choice(ready)

    def goes_on(self) -> bool:
        return self.random.random() < self.eager


class Stream:
    """The backend's own streams, and number -1, CUDA's default one."""

    def __init__(self, device: Simulator, number: int) -> None:
        self.device, self.number = device, number
        self.ptr = number
        self.work: deque[Callable[[], None] | Mark] = deque()  # a mark is to be waited for

    def enqueue(self, work: Callable[[], None] | Mark) -> None:
        self.work.append(work)
        self.device.go_on()

    def wait_event(self, event: Event) -> None:
        self.enqueue(event.mark)

    def synchronize(self) -> None:
        self.device.run_until(lambda: not self.work)

    def __enter__(self) -> Stream:
        self.device.current_streams.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        self.device.current_streams.pop()


class Event:
    def __init__(self, device: Simulator) -> None:
        self.device = device
        self.mark = Mark()

    def record(self, stream: Stream) -> None:
        mark = self.mark = Mark(passed=False)

        def passes() -> None:
            mark.passed, mark.at = True, self.device.done

        stream.enqueue(passes)

    def synchronize(self) -> None:
        mark = self.mark
        self.device.run_until(lambda: mark.passed)


class Simulator(FakeCupy):
    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.done = 0  # pieces of work
        self.lanes: list[Stream] = []
        self.current_streams = [Stream(self, -1)]
        self.kept: list[Any] = []  # all memory there ever was: what comes too late shall find it
        self.free: dict[tuple[int, int], list[np.ndarray[Any, Any]]] = {}
        self.given_back: list[tuple[int, int]] = []  # pinned memory, (first byte, last byte)
        self.faults: list[str] = []
        self.refuse_copy = -1  # the copy with this number from now on fails when it is asked for
        self.cuda.Event = lambda block: Event(self)
        self.cuda.get_elapsed_time = lambda begin, end: float(end.mark.at - begin.mark.at)

    # --- running

    def go_on(self) -> None:
        while self.schedule.goes_on() and self._step():
            pass

    def run_until(self, over: Callable[[], bool]) -> None:
        while not over():
            assert self._step(), "everything waits for something: this never ends"

    def _step(self) -> bool:
        ready = [stream.number for stream in self.lanes if stream.work and _can_run(stream.work[0])]
        if not ready:
            return False
        work = self.lanes[self.schedule.pick(ready)].work.popleft()
        self.done += 1
        if not isinstance(work, Mark):
            work()
        return True

    # --- what the backend calls

    def _stream(self, non_blocking: bool, priority: int = 0) -> Any:
        assert non_blocking, "a blocking stream waits for the legacy default stream"
        stream = self.streams[len(self.lanes)] = Stream(self, len(self.lanes))  # type: ignore[assignment]
        self.lanes.append(stream)
        return stream

    def _memcpy(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        self.refuse_copy -= 1
        if self.refuse_copy == 0:
            raise self.cuda.runtime.CUDARuntimeError("cudaErrorInvalidValue: invalid argument")
        host = source if kind == self.cuda.runtime.memcpyHostToDevice else target

        def copies() -> None:
            if any(host <= last and host + nbytes > first for first, last in self.given_back):
                self.faults.append("a copy touches host memory that was given back")
            ctypes.memmove(target, source, nbytes)

        self.copies += 1
        self.streams[stream].enqueue(copies)

    def empty(self, nbytes: int, dtype: type) -> np.ndarray[Any, Any]:
        if self.used + nbytes > self.budget:
            raise OutOfMemoryError(f"{nbytes} bytes asked, {self.budget - self.used} left")
        self.used += nbytes
        free = self.free.setdefault((self.current_streams[-1].number, nbytes), [])
        memory = free.pop() if free else self._make(nbytes)
        array = as_array(memory.ctypes.data, nbytes)
        weakref.finalize(array, self._returns, memory, free)
        return array

    def _make(self, nbytes: int) -> np.ndarray[Any, Any]:
        self.kept.append(np.full(nbytes, 0xA5, np.uint8))
        return self.kept[-1]  # type: ignore[no-any-return]

    def _returns(self, memory: np.ndarray[Any, Any], free: list[np.ndarray[Any, Any]]) -> None:
        self.used -= memory.nbytes
        free.append(memory)

    def _pinned(self, nbytes: int) -> Any:
        memory = self._make(nbytes)

        class Pinned(ctypes.c_uint8 * nbytes):  # type: ignore[misc]
            ptr = memory.ctypes.data

        pinned = Pinned.from_address(memory.ctypes.data)
        weakref.finalize(pinned, self.given_back.append, (memory.ctypes.data, memory.ctypes.data + nbytes - 1))
        return pinned

    def close(self) -> None:
        pass  # there are no threads

    # --- what a processor's work is made of

    def launch(self, work: Callable[..., None], *arrays: np.ndarray[Any, Any]) -> None:
        """``work(*arrays)`` on the current stream. Like a kernel it knows addresses, and keeps no memory alive."""
        known = [(as_array(array.ctypes.data, array.nbytes).reshape(array.shape)) for array in arrays]
        assert all(array.flags.c_contiguous for array in arrays)
        self.current_streams[-1].enqueue(lambda: work(*known))


def _can_run(work: Callable[[], None] | Mark) -> bool:
    return not isinstance(work, Mark) or work.passed


def as_array(address: int, nbytes: int) -> np.ndarray[Any, Any]:
    there: Any = (ctypes.c_uint8 * nbytes).from_address(address)
    return np.frombuffer(there, np.uint8)


class SimulatedBackend(StandInBackend):
    """The cupy backend's own code on a ``Simulator``."""

    schedule = Schedule()
    fake: Any

    def __init__(self) -> None:
        super().__init__()
        self.fake = Simulator(self.schedule)

    def _gpu(self) -> None:
        """No figures, and no thread that reads them: some of these backends are never closed."""

    def _assign(self, target: Any, value: Any) -> None:
        def assigns(target: Any, value: Any) -> None:
            target[...] = value

        self.fake.launch(assigns, target, value)

    def _clear(self, array: Any, stream: Any) -> None:
        with stream:
            self.fake.launch(lambda array: array.fill(0), array)
