"""cupy: CUDA devices with kernels written in CUDA C++."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ._cupy import CupyLibrary, problem
from ._device import DeviceBackend
from ._driver import device_index, dotted
from ._lanes import Event, Slab, Stream


class CupyBackend(DeviceBackend):
    """``cuda`` (the first GPU, and the default) or ``cuda:N``."""

    name = "cupy"

    @classmethod
    def available(cls, device: str | None) -> str | None:
        return problem(device)

    def _open_library(self) -> CupyLibrary:
        return CupyLibrary(self.device)

    def _take(self, device: str | None) -> CupyLibrary:
        self.device = f"cuda:{device_index(device)}"
        library = self._open_library()
        self._cupy, self._runtime = library.cupy, library.cupy.cuda.runtime
        return library

    def _facts(self) -> Mapping[str, Any]:
        return {
            "cupy": self._cupy.__version__,
            "cuda": dotted(self._runtime.runtimeGetVersion()),
            "device_name": self._runtime.getDeviceProperties(device_index(self.device))["name"].decode(),
        }

    def _gpu(self) -> Mapping[str, Any] | None:
        index = device_index(self.device)
        one = self._runtime.getDeviceProperties(index)
        return {"index": index, "name": one["name"].decode(), "major": one["major"], "minor": one["minor"]}

    def _memory(self) -> tuple[int, int]:
        free, total = self._runtime.memGetInfo()
        return free, total

    def _slab(self, nbytes: int) -> Slab:
        try:
            # Not by cupy.cuda.alloc_pinned_memory: its pool rounds up to a power of two and keeps what comes back.
            memory = self._cupy.cuda.PinnedMemory(nbytes)
        except self._runtime.CUDARuntimeError as error:
            pageable = np.empty(nbytes, np.uint8)
            return Slab(pageable, pageable.ctypes.data, pinned=False, why_not=str(error))
        pointer = self._cupy.cuda.PinnedMemoryPointer(memory, 0)
        return Slab(np.frombuffer(pointer, np.uint8, nbytes), pointer.ptr, pinned=True)

    def _empty(self, nbytes: int) -> Any:
        return self._cupy.empty(nbytes, self._cupy.uint8)

    def _stream(self, urgent: bool = False) -> Stream:
        # -1 is a higher priority than 0 on every GPU that has more than one, and CUDA's 0 on the others.
        return self._cupy.cuda.Stream(non_blocking=True, priority=-1 if urgent else 0)  # type: ignore[no-any-return]

    def _handle(self, stream: Any) -> int:
        return int(stream.ptr)

    def _event(self) -> Event:
        # block: the device thread sleeps while it waits; the cores belong to decoders and encoders.
        return self._cupy.cuda.Event(block=True)  # type: ignore[no-any-return]

    def _upload(self, array: Any, at: int, slab: Slab, start: int, nbytes: int, stream: Any) -> None:
        kind = self._runtime.memcpyHostToDevice
        self._runtime.memcpyAsync(self._address(array) + at, slab.handle + start, nbytes, kind, stream.ptr)

    def _download(self, slab: Slab, start: int, array: Any, at: int, nbytes: int, stream: Any) -> None:
        kind = self._runtime.memcpyDeviceToHost
        self._runtime.memcpyAsync(slab.handle + start, self._address(array) + at, nbytes, kind, stream.ptr)

    def _address(self, array: Any) -> int:
        return int(array.data.ptr)

    def _assign(self, target: Any, value: Any) -> None:
        target[...] = value

    def _clear(self, array: Any, stream: Any) -> None:
        self._runtime.memsetAsync(self._address(array), 0, array.nbytes, stream.ptr)

    def _elapsed_ns(self, begin: Event, end: Event) -> float:
        return float(self._cupy.cuda.get_elapsed_time(begin, end)) * 1e6
