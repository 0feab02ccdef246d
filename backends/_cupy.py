"""cupy as an array library, and whether it can use a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ._driver import device_index, driver_problem, import_problem, nvrtc_package
from ._library import says_full


class _Handle:
    """A stream that is known by its CUDA handle only."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


class CupyLibrary:
    """``device`` is ``cuda:N``."""

    name = "cupy"

    def __init__(self, device: str) -> None:
        self.cupy, self.xp = self._import()
        self.device: Any = self.cupy.cuda.Device(device_index(device))

    def _import(self) -> tuple[Any, Any]:
        import array_api_compat.cupy as xp
        import cupy

        return cupy, xp

    def use(self) -> None:
        self.device.use()

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        with self.device, stream:
            yield

    def external(self, handle: int) -> Any:
        with self.device:
            if hasattr(self.cupy.cuda.Stream, "from_external"):  # cupy 14, where ExternalStream is deprecated
                return self.cupy.cuda.Stream.from_external(_Handle(handle))
            return self.cupy.cuda.ExternalStream(handle, self.device.id)

    def borrow(self, array: Any) -> Any:
        return self.cupy.from_dlpack(array)

    def is_array(self, value: Any) -> bool:
        return isinstance(value, self.cupy.ndarray)

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, self.cupy.cuda.memory.OutOfMemoryError) or says_full(error)

    def free_cached(self) -> None:
        self.cupy.get_default_memory_pool().free_all_blocks()


def problem(device: str | None) -> str | None:
    """Why cupy cannot use ``device``, or None."""
    index = device_index(device)
    if index is None:
        return f"cupy runs on cuda or cuda:N, not on {device!r}; --backend numpy runs on the CPU"
    if reason := import_problem("cupy"):
        return reason
    from cupy.cuda import nvrtc, runtime

    built_for = runtime.runtimeGetVersion() // 1000
    if reason := driver_problem("cupy", built_for, index):
        return reason
    try:
        nvrtc.getVersion()
    except RuntimeError as error:
        return f"cupy finds no NVRTC to compile kernels with ({error}): pip install {nvrtc_package(built_for)}"
    return None
