"""An array library as a processor meets it, whichever backend owns the memory.

A backend has one of its own. A processor that says ``arrays = "torch"`` or ``"cupy"`` is shown the same device memory
as arrays of that library: DLPack hands over pointer, shape and strides, nothing is copied, and the library's current
stream is the backend's compute stream, so there is nothing to wait for either.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, Protocol

from gpu_byoc.errors import BackendUnavailable, said_by

_FULL = (
    *("cudaErrorMemoryAllocation", "CUDA error: out of memory"),  # the runtime, as cupy says it and as torch does
    *("CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED"),  # the driver, and cuBLAS
)


def says_full(error: BaseException) -> bool:
    """Whether an error of CUDA's own, which neither library has an exception of its own for, says that memory ran out:
    their messages begin with or name what the call returned."""
    return isinstance(error, RuntimeError) and any(name in said_by(error) for name in _FULL)


class Library(Protocol):
    """torch or cupy on one device. Current device and current stream are a thread's own, in both."""

    name: str
    xp: Any  # array_api_compat's namespace
    device: Any  # what ``xp`` functions take as ``device=``

    def use(self) -> None:
        """Make the device the calling thread's current one. A thread that works with another current device makes a
        context there, which is some hundred MB of that device's memory."""
        ...

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Makes ``stream`` the library's current one in this thread, for the code of a processor."""
        ...

    def external(self, handle: int) -> Any:
        """Another library's stream, by its CUDA handle, as a stream of this one. Who made it keeps it alive."""
        ...

    def borrow(self, array: Any) -> Any:
        """Another library's array as one of this library over the same memory, for use on the current stream."""
        ...

    def is_array(self, value: Any) -> bool: ...

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether the library says by ``error`` that device memory ran out."""
        ...

    def free_cached(self) -> None:
        """Give memory that the library keeps for itself back to the device."""
        ...


_HOMES = {"torch": ("._torch", "TorchLibrary"), "cupy": ("._cupy", "CupyLibrary")}


def invite(name: str, device: str, wanted_by: str) -> Library:
    """The library ``name`` on another backend's ``device``.

    Raises:
        BackendUnavailable: it is unknown, not installed, or cannot use that device.
    """
    if name not in _HOMES:
        raise BackendUnavailable(f"{wanted_by} has arrays = {name!r}; it is one of {', '.join(_HOMES)}, or is left out")
    module, cls = _HOMES[name]
    home = import_module(module, __package__)
    if reason := home.problem(device):
        raise BackendUnavailable(f"{wanted_by} takes {name} arrays: {reason}")
    library: Library = getattr(home, cls)(device)
    return library
