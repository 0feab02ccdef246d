"""A stand-in for the part of cupy that the backend calls, for machines without a GPU.

What makes it worth running: each stream is a thread, so copies really happen later and out of step, and only events
order them. Device memory is host memory with a budget, filled with a pattern when it is allocated. Code that runs
under ``with stream:`` (a processor's) runs on the caller's thread after the stream has come to rest. Each thread has a
current device, the first one until it says otherwise, and a call from a thread with another one is an error: CUDA would
make a context there.
"""

from __future__ import annotations

import ctypes
import itertools
import queue
import threading
import time
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import array_api_compat.numpy as numpy_xp
import numpy as np
from gpu_byoc_backends._cupy import CupyLibrary
from gpu_byoc_backends.cupy_cuda import CupyBackend

PATIENCE = 20.0  # seconds before a test that waits for ever is failed


class CUDARuntimeError(RuntimeError):
    pass


class OutOfMemoryError(MemoryError):
    pass


class Stream:
    def __init__(self, fake: FakeCupy) -> None:
        self.fake = fake
        self.device_id = fake.current
        self.ptr = next(fake.numbers)
        self.priority = 0
        self.open = threading.Event()  # cleared by a test to hold the work back
        self.open.set()
        self._work: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"fake stream {self.ptr}")
        self._thread.start()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            self.open.wait(PATIENCE)
            work()

    def enqueue(self, work: Callable[[], Any]) -> None:
        self.fake.check(self.device_id)
        self._work.put(work)

    def wait_event(self, event: Event) -> None:
        passed = event.passed
        self.enqueue(lambda: passed.wait(PATIENCE))

    def synchronize(self) -> None:
        rest = Event()
        rest.record(self)
        rest.synchronize()
        self.fake.check(self.device_id)

    def __enter__(self) -> Stream:
        self.synchronize()
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def join(self) -> None:
        self.open.set()
        self._work.put(None)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


class Event:
    def __init__(self) -> None:
        self.passed = threading.Event()
        self.passed.set()  # an event that was never recorded is complete, as in CUDA
        self.at = 0.0
        self.stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        passed = self.passed = threading.Event()
        self.stream = stream

        def mark() -> None:
            self.at = time.perf_counter()
            passed.set()

        stream.enqueue(mark)

    def synchronize(self) -> None:
        assert self.passed.wait(PATIENCE), "an event never came"
        if self.stream is not None:
            self.stream.fake.check(self.stream.device_id)


class Device(str):
    """What numpy calls its device, with what cupy's can do."""

    id: int
    fake: FakeCupy

    def use(self) -> None:
        self.fake.threads.device = self.id

    def __enter__(self) -> None:
        self.use()  # every thread here has one device

    def __exit__(self, *exc: object) -> None:
        pass


class FakeCupy:
    """Stands where the module ``cupy`` would: ``uint8``, ``empty``, ``cuda.*``."""

    __version__ = "stand-in"
    uint8 = np.uint8
    ndarray = np.ndarray

    def __init__(self) -> None:
        self.numbers = itertools.count(1)
        self.streams: dict[int, Stream] = {}
        self.threads = threading.local()
        self.lost = ""  # set by a test: the device fails for good
        self.pinnable = True
        self.budget = 1 << 30  # bytes of device memory
        self.used = 0
        self.allocations = 0
        self.copies = 0
        runtime = SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            memcpyHostToDevice=1,
            memcpyDeviceToHost=2,
            memcpyAsync=self._memcpy,
            memsetAsync=self._memset,
            runtimeGetVersion=lambda: 12090,
            getDeviceProperties=lambda index: {"name": b"stand-in", "major": 9, "minor": 0},
            memGetInfo=self._mem_get_info,
        )
        self.cuda = SimpleNamespace(
            runtime=runtime,
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            Device=self._device,
            Stream=self._stream,
            Event=lambda block: Event(),
            PinnedMemory=self._pinned,
            PinnedMemoryPointer=lambda memory, offset: memory,
            get_elapsed_time=lambda begin, end: (end.at - begin.at) * 1e3,
        )

    @property
    def current(self) -> int:
        return getattr(self.threads, "device", 0)

    def check(self, device: int) -> None:
        assert self.current == device, f"a thread whose device is {self.current} works with device {device}"
        if self.lost:
            raise CUDARuntimeError(self.lost)

    def from_dlpack(self, array: Any) -> np.ndarray[Any, Any]:
        return np.from_dlpack(array)

    def empty(self, nbytes: int, dtype: type) -> np.ndarray[Any, Any]:
        self.check(self.current)
        if self.used + nbytes > self.budget:
            raise OutOfMemoryError(f"{nbytes} bytes asked, {self.budget - self.used} left")
        self.used += nbytes
        self.allocations += 1
        array: np.ndarray[Any, Any] = np.full(nbytes, 0xA5, dtype)
        weakref.finalize(array, self._freed, nbytes)
        return array

    def get_default_memory_pool(self) -> SimpleNamespace:
        return SimpleNamespace(free_all_blocks=lambda: None)

    def close(self) -> None:
        for stream in self.streams.values():
            stream.join()

    def _mem_get_info(self) -> tuple[int, int]:
        self.check(self.current)
        return self.budget - self.used, self.budget

    def _freed(self, nbytes: int) -> None:
        self.used -= nbytes

    def _stream(self, non_blocking: bool, priority: int = 0) -> Stream:
        assert non_blocking, "a blocking stream waits for the legacy default stream"
        stream = Stream(self)
        stream.priority = priority
        self.streams[stream.ptr] = stream
        return stream

    def _pinned(self, nbytes: int) -> Any:
        if not self.pinnable:
            raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")

        class Pinned(ctypes.c_uint8 * nbytes):  # type: ignore[misc]
            @property
            def ptr(self) -> int:
                return ctypes.addressof(self)

        return Pinned()

    def _device(self, index: int) -> Device:
        device = Device("cpu")
        device.id, device.fake = index, self
        return device

    def _memset(self, target: int, value: int, nbytes: int, stream: int) -> None:
        self.streams[stream].enqueue(lambda: ctypes.memset(target, value, nbytes))

    def _memcpy(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        self.copies += 1
        self.streams[stream].enqueue(lambda: ctypes.memmove(target, source, nbytes))


class FakeLibrary(CupyLibrary):  # type: ignore[misc]  # mypy knows it as backends/
    def __init__(self, device: str, fake: FakeCupy) -> None:
        self.fake = fake
        super().__init__(device)

    def _import(self) -> tuple[Any, Any]:
        return self.fake, numpy_xp


class StandInBackend(CupyBackend):  # type: ignore[misc]  # mypy knows it as backends/
    """The cupy backend's own code on ``FakeCupy``; only what needs CUDA itself is replaced."""

    name = "stand-in"

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeCupy()

    @classmethod
    def available(cls, device: str | None) -> str | None:
        return None

    def _open_library(self) -> CupyLibrary:
        return FakeLibrary(self.device, self.fake)

    def _address(self, array: Any) -> int:
        return int(array.ctypes.data)

    def close(self) -> None:
        try:
            super().close()
        finally:
            self.fake.close()
