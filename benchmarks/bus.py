"""One GPU through one library as plainly as it goes: memory, copies, streams and events, and nothing of ours.

Ceilings are measured with it. Times are taken by the device's own events, so the clock stops when the device has.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gpu_byoc.frames import FrameSpec
from gpu_byoc.processor import ArrayProcessor, kernel_forms
from gpu_byoc.processors.green_tint import GreenTint

from .harness import Window

Bytes: TypeAlias = NDArray[np.uint8]
Enqueue: TypeAlias = Callable[[], object]


def pixels(nbytes: int, seed: int = 1) -> Bytes:
    """Random bytes: zeros would be compressed by some devices and predicted by some CPUs."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


class Bus(ABC):
    """One GPU through one library. Arrays are flat uint8 and can be cut; jobs are enqueued, only ``span`` waits."""

    library: str
    xp: Any

    @abstractmethod
    def host(self, nbytes: int, *, pinned: bool) -> Any:
        """Memory of the host."""

    @abstractmethod
    def numpy(self, host: Any) -> Bytes:
        """The same memory as a numpy array."""

    @abstractmethod
    def empty(self, nbytes: int) -> Any:
        """Memory of the device."""

    @abstractmethod
    def stream(self) -> Any: ...

    @abstractmethod
    def event(self) -> Any: ...

    @abstractmethod
    def elapsed(self, begin: Any, end: Any) -> float:
        """Seconds between two events that have passed."""

    @abstractmethod
    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Makes ``stream`` the current one."""

    @abstractmethod
    def copy(self, target: Any, source: Any, stream: Any) -> Enqueue:
        """What enqueues ``target[...] = source``, between host and device or on the device."""

    @abstractmethod
    def registered(self, host: Any) -> AbstractContextManager[None]:
        """Ordinary host memory, pinned for the time of the block."""

    def kernel(self, processor: ArrayProcessor, array: Any, spec: FrameSpec, stream: Any) -> Enqueue:
        """What enqueues the processor on frames that lie in ``array``, in the first form that runs."""
        frames = array.reshape(-1, *spec.shape)
        params = processor.Params()

        def generic(frames: Any, params: Any) -> None:
            processor.process_batch(frames, params, self.xp)

        def enqueue() -> None:
            with self.on(stream):
                form(frames, params)

        for form in (*kernel_forms(processor, self.library), generic):
            try:
                enqueue()
            except Exception:  # a compiler that is missing, a source that does not build: the backend goes on, too
                if form is generic:
                    raise
            else:
                break
        return enqueue

    def span(self, jobs: Sequence[tuple[Any, Enqueue]], times: int) -> float:
        """Device seconds from the start of the first to the end of the last job, over ``times`` rounds of all of them,
        for one round. Streams run side by side, each starts when the first does."""
        streams = list({id(stream): stream for stream, _ in jobs}.values())
        first, begin, end = streams[0], self.event(), self.event()
        begin.record(first)
        for stream in streams[1:]:
            stream.wait_event(begin)
        for _ in range(times):
            for _, enqueue in jobs:
                enqueue()
        for stream in streams[1:]:
            done = self.event()
            done.record(stream)
            first.wait_event(done)
        end.record(first)
        end.synchronize()
        return self.elapsed(begin, end) / times

    def windows(self, jobs: Sequence[tuple[Any, Enqueue]], seconds: float) -> Callable[[], Window]:
        """Windows of ``span``. A span has rounds for a millisecond, so that a launch hides behind the work of the one
        before it."""
        times = max(1, min(64, round(1e-3 / max(1e-6, self.span(jobs, 2)))))

        def window() -> Window:
            used, began, taken = time.process_time(), time.perf_counter(), list[float]()
            while len(taken) < 3 or time.perf_counter() - began < seconds:
                taken.append(self.span(jobs, times))
            wall, cpu = time.perf_counter() - began, time.process_time() - used
            return Window(tuple(taken), wall / times, cpu / times)  # as of one round for each span

        return window


class TorchBus(Bus):
    """``cuda:0``; on ``cpu`` everything happens at once, which is for tests."""

    library = "torch"

    def __init__(self, device: str = "cuda:0") -> None:
        import array_api_compat.torch as xp
        import torch

        self._torch: Any = torch
        self.xp = xp
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda"

    def host(self, nbytes: int, *, pinned: bool) -> Any:
        if pinned and self._cuda:
            return self._torch.empty(nbytes, dtype=self._torch.uint8, pin_memory=True)
        return self._torch.from_numpy(np.empty(nbytes, np.uint8))

    def numpy(self, host: Any) -> Bytes:
        array: Bytes = host.numpy()
        return array

    def empty(self, nbytes: int) -> Any:
        return self._torch.empty(nbytes, dtype=self._torch.uint8, device=self._device)

    def stream(self) -> Any:
        return self._torch.cuda.Stream(self._device) if self._cuda else AtOnce()

    def event(self) -> Any:
        return self._torch.cuda.Event(enable_timing=True, blocking=True) if self._cuda else Now()

    def elapsed(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1e3

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        with self._torch.no_grad(), self._torch.cuda.stream(stream) if self._cuda else nullcontext():
            yield

    def copy(self, target: Any, source: Any, stream: Any) -> Enqueue:
        def enqueue() -> None:
            with self.on(stream):
                target.copy_(source, non_blocking=True)

        return enqueue

    @contextmanager
    def registered(self, host: Any) -> Iterator[None]:
        if not self._cuda:
            yield
            return
        runtime = self._torch.cuda.cudart()
        if status := int(runtime.cudaHostRegister(host.data_ptr(), host.numel(), 0)):
            raise RuntimeError(f"cudaHostRegister of {host.numel()} bytes: CUDA error {status}")
        try:
            yield
        finally:
            runtime.cudaHostUnregister(host.data_ptr())


class AtOnce:
    """A stream whose work is done when the call returns."""

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Now:
    """An event in such a stream."""

    at = 0.0

    def record(self, stream: Any) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Now) -> float:
        """Milliseconds, as torch's."""
        return (end.at - self.at) * 1e3


class CupyBus(Bus):
    """The first GPU. ``cupy`` and ``xp`` are the modules, where a test has others."""

    library = "cupy"

    def __init__(self, cupy: Any = None, xp: Any = None) -> None:
        self._cupy: Any = cupy or import_module("cupy")
        self._runtime: Any = self._cupy.cuda.runtime
        self.xp = xp or import_module("array_api_compat.cupy")

    def host(self, nbytes: int, *, pinned: bool) -> Any:
        if not pinned:
            return np.empty(nbytes, np.uint8)
        memory = self._cupy.cuda.PinnedMemoryPointer(self._cupy.cuda.PinnedMemory(nbytes), 0)
        return np.frombuffer(memory, np.uint8, nbytes)

    def numpy(self, host: Any) -> Bytes:
        array: Bytes = host
        return array

    def empty(self, nbytes: int) -> Any:
        return self._cupy.empty(nbytes, self._cupy.uint8)

    def stream(self) -> Any:
        return self._cupy.cuda.Stream(non_blocking=True)

    def event(self) -> Any:
        return self._cupy.cuda.Event(block=True)

    def elapsed(self, begin: Any, end: Any) -> float:
        return float(self._cupy.cuda.get_elapsed_time(begin, end)) / 1e3

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        return stream  # type: ignore[no-any-return]

    def copy(self, target: Any, source: Any, stream: Any) -> Enqueue:
        (to, on_device), (origin, from_device) = self._place(target), self._place(source)
        kind = {
            (True, False): self._runtime.memcpyHostToDevice,
            (False, True): self._runtime.memcpyDeviceToHost,
            (True, True): self._runtime.memcpyDeviceToDevice,
        }[on_device, from_device]
        nbytes = min(target.nbytes, source.nbytes)

        def enqueue(kept: object = (target, source)) -> None:  # the addresses alone would not keep them
            self._runtime.memcpyAsync(to, origin, nbytes, kind, stream.ptr)

        return enqueue

    def _place(self, array: Any) -> tuple[int, bool]:
        """(address, whether it is the device's)."""
        if isinstance(array, self._cupy.ndarray):
            return int(array.data.ptr), True
        return int(array.ctypes.data), False

    @contextmanager
    def registered(self, host: Any) -> Iterator[None]:
        self._runtime.hostRegister(host.ctypes.data, host.nbytes, 0)
        try:
            yield
        finally:
            self._runtime.hostUnregister(host.ctypes.data)


class Plain:
    """The same frames and the same kernel without an engine: one buffer each side, one batch at a time."""

    def __init__(self, bus: Bus, spec: FrameSpec, batch: int) -> None:
        self._bus, self._spec = bus, spec
        nbytes = spec.nbytes * batch
        self._up, self._down = bus.stream(), bus.stream()
        self._device = (bus.empty(nbytes), bus.empty(nbytes))
        self._pinned, self._pageable = bus.host(nbytes, pinned=True), bus.host(nbytes, pinned=False)
        self._back = bus.host(nbytes, pinned=True)
        for host in (self._pinned, self._pageable, self._back):
            bus.numpy(host)[:] = pixels(nbytes)

    def both_ways(self, seconds: float) -> Callable[[], Window]:
        up = self._bus.copy(self._device[0], self._pinned, self._up)
        down = self._bus.copy(self._back, self._device[1], self._down)
        return self._bus.windows([(self._up, up), (self._down, down)], seconds)

    def in_sequence(self, *, pinned: bool) -> Callable[[], None]:
        """Copy up, kernel, copy down on one stream, and wait."""
        host = self._pinned if pinned else self._pageable
        steps = [
            self._bus.copy(self._device[0], host, self._up),
            self._bus.kernel(GreenTint(), self._device[0], self._spec, self._up),
            self._bus.copy(host, self._device[0], self._up),
        ]

        def once() -> None:
            for enqueue in steps:
                enqueue()
            self._up.synchronize()

        return once

    def one_way(self, seconds: float, *, up: bool) -> Callable[[], Window]:
        place = (self._device[0], self._pinned) if up else (self._back, self._device[0])
        return self._bus.windows([(self._up, self._bus.copy(*place, self._up))], seconds)

    def resident(self) -> Callable[[], None]:
        """The kernel on frames that lie on the device and stay there, and wait."""
        kernel = self._bus.kernel(GreenTint(), self._device[0], self._spec, self._up)

        def once() -> None:
            kernel()
            self._up.synchronize()

        return once


BUSES: Final[dict[str, Callable[[], Bus]]] = {"cupy": CupyBus, "torch": TorchBus}
