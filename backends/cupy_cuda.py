"""cupy: CUDA devices with kernels written in CUDA C++."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from ._device import DeviceBackend
from ._driver import device_index, dotted, driver_problem, import_problem
from ._lanes import Event, Slab, Stream


class CupyBackend(DeviceBackend):
    """``cuda`` (the first GPU, and the default) or ``cuda:N``."""

    name = "cupy"

    @classmethod
    def available(cls, device: str | None) -> str | None:
        index = device_index(device)
        if index is None:
            return f"cupy runs on cuda or cuda:N, not on {device!r}; --backend numpy runs on the CPU"
        if problem := import_problem("cupy", "cupy"):
            return problem
        return _cuda_problem(index)

    def _load(self) -> tuple[Any, Any]:
        """cupy, and its array API namespace."""
        import array_api_compat.cupy as xp
        import cupy

        return cupy, xp

    def _take(self, device: str | None) -> tuple[Any, Any]:
        self._cupy, xp = self._load()
        self._runtime = self._cupy.cuda.runtime
        index = device_index(device)
        self.device = f"cuda:{index}"
        self._cupy_device = self._cupy.cuda.Device(index)
        self._cupy_device.use()  # for this thread, the one that all calls come from
        return xp, self._cupy_device

    def _facts(self) -> Mapping[str, Any]:
        if not self.device:
            return {}
        return {
            "cupy": self._cupy.__version__,
            "cuda": dotted(self._runtime.runtimeGetVersion()),
            "device_name": self._runtime.getDeviceProperties(self._cupy_device.id)["name"].decode(),
        }

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

    def _stream(self) -> Stream:
        return self._cupy.cuda.Stream(non_blocking=True)  # type: ignore[no-any-return]

    def _event(self) -> Event:
        # block: the device thread sleeps while it waits; the cores belong to decoders and encoders.
        return self._cupy.cuda.Event(block=True)  # type: ignore[no-any-return]

    def _on(self, stream: Stream) -> AbstractContextManager[Any]:
        return self._current(stream)

    @contextmanager
    def _current(self, stream: Any) -> Iterator[None]:
        with self._cupy_device, stream:
            yield

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

    def _elapsed_ns(self, begin: Event, end: Event) -> float:
        return float(self._cupy.cuda.get_elapsed_time(begin, end)) * 1e6

    def _is_array(self, value: Any) -> bool:
        return isinstance(value, self._cupy.ndarray)

    def _is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, self._cupy.cuda.memory.OutOfMemoryError)

    def _free_cached(self) -> None:
        self._cupy.get_default_memory_pool().free_all_blocks()


def _cuda_problem(index: int) -> str | None:
    from cupy.cuda import nvrtc, runtime

    if problem := driver_problem("cupy", runtime.runtimeGetVersion() // 1000, index):
        return problem
    try:
        nvrtc.getVersion()
    except RuntimeError as error:
        return f"cupy finds no NVRTC to compile kernels with ({error}): pip install nvidia-cuda-nvrtc-cu12"
    return None
