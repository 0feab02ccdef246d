"""torch: CUDA devices, and torch's own CPU device, which runs the same road without streams."""

from __future__ import annotations

import mmap
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._cuda import pin, unpin
from ._device import DeviceBackend
from ._driver import device_index
from ._lanes import Event, Slab, Stream
from ._torch import TorchLibrary, problem


class _CpuStream:
    """Torch on the CPU has done a call's work when the call returns."""

    cuda_stream = 0

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _CpuEvent:
    """The clock, read when the mark is set."""

    at_ns = 0

    def record(self, stream: Any) -> None:
        self.at_ns = time.perf_counter_ns()

    def synchronize(self) -> None:
        pass


class TorchBackend(DeviceBackend):
    """``cuda`` (the first GPU, and the default), ``cuda:N``, or ``cpu``."""

    name = "torch"
    _library: TorchLibrary

    @classmethod
    def available(cls, device: str | None) -> str | None:
        return problem(device)

    def _take(self, device: str | None) -> TorchLibrary:
        self._cuda = device != "cpu"
        self.device = f"cuda:{device_index(device)}" if self._cuda else "cpu"
        if not self._cuda:
            self.depth = 1
        library = TorchLibrary(self.device)
        self._torch, self._torch_device = library.torch, library.device
        return library

    def _facts(self) -> Mapping[str, Any]:
        facts = {"torch": self._torch.__version__}
        if self._cuda:
            facts["cuda"] = self._torch.version.cuda
            facts["device_name"] = self._torch.cuda.get_device_name(self._torch_device)
        return facts

    def _gpu(self) -> Mapping[str, Any] | None:
        if not self._cuda:
            return None
        one = self._torch.cuda.get_device_properties(self._torch_device)
        return {"index": self._torch_device.index, "name": one.name, "major": one.major, "minor": one.minor}

    def _memory(self) -> tuple[int, int]:
        free, total = self._torch.cuda.mem_get_info(self._torch_device)
        return free, total

    def _slab(self, nbytes: int) -> Slab:
        # Not torch's pinned memory, which is rounded up to a power of two and kept when it comes back. Anonymous pages
        # that are shared, as mmap's are here: after a fork the device and this process still mean the same ones.
        host = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
        tensor = self._torch.from_numpy(host)
        if not self._cuda:
            return Slab(host, tensor, pinned=False)
        self._enter()
        if why_not := pin(host):
            return Slab(host, tensor, pinned=False, why_not=why_not)
        return Slab(host, tensor, pinned=True, unpin=lambda: self._unpin(host))

    def _unpin(self, host: NDArray[np.uint8]) -> None:
        self._enter()
        if why_not := unpin(host):
            raise self._lose(RuntimeError(f"host memory does not come back: {why_not}"))

    def _empty(self, nbytes: int) -> Any:
        return self._torch.empty(nbytes, dtype=self._torch.uint8, device=self._torch_device)

    def _stream(self, urgent: bool = False) -> Stream:
        if not self._cuda:
            return _CpuStream()
        return self._torch.cuda.Stream(self._torch_device, priority=-1 if urgent else 0)  # type: ignore[no-any-return]

    def _handle(self, stream: Any) -> int:
        return int(stream.cuda_stream)

    def _event(self) -> Event:
        # blocking: the device thread sleeps while it waits; the cores belong to decoders and encoders.
        return self._torch.cuda.Event(enable_timing=True, blocking=True) if self._cuda else _CpuEvent()

    def _upload(self, array: Any, at: int, slab: Slab, start: int, nbytes: int, stream: Stream) -> None:
        with self._library.on(stream):
            array[at : at + nbytes].copy_(slab.handle[start : start + nbytes], non_blocking=True)

    def _download(self, slab: Slab, start: int, array: Any, at: int, nbytes: int, stream: Stream) -> None:
        with self._library.on(stream):
            slab.handle[start : start + nbytes].copy_(array[at : at + nbytes], non_blocking=True)

    def _assign(self, target: Any, value: Any) -> None:
        target.copy_(value)

    def _clear(self, array: Any, stream: Stream) -> None:
        with self._library.on(stream):
            array.zero_()

    def _elapsed_ns(self, begin: Any, end: Any) -> float:
        if self._cuda:
            return float(begin.elapsed_time(end)) * 1e6
        return float(end.at_ns - begin.at_ns)
