"""Calls of the CUDA driver that torch and cupy have no public name for. Whoever makes one has a context: its library
has made a device the thread's current one."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Load = Callable[[str], Any]

log = logging.getLogger(__name__)

_THREAD_LOCAL: Final = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
_PORTABLE: Final = 1  # CU_MEMHOSTREGISTER_PORTABLE: pinned for every device

_registered: dict[int, NDArray[np.uint8]] = {}
"""By address. Kept until ``unpin``: pages that were unmapped while registered would leave the driver with a claim on an
address at which something else may come to lie."""


def ignore_captures(load: Load = ctypes.CDLL) -> None:
    """A CUDA graph that another thread captures in mode "global", which is the default, is no concern of this thread
    any more: what waits for an event or asks for memory here neither fails nor invalidates the capture (CUDA Driver
    API, cuThreadExchangeStreamCaptureMode). Where it cannot be said the thread stays as it is."""
    mode = ctypes.c_int(_THREAD_LOCAL)
    try:
        status = load("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    except (OSError, AttributeError) as error:
        status = error
    if status:
        log.info("graph captures in a processor may fail under load: %s", status)


def pin(memory: NDArray[np.uint8], load: Load = ctypes.CDLL) -> str:
    """Page-lock ``memory``, exactly as much as there is. Empty, or why not.

    By the driver, not by torch.cuda.cudart(): a refusal that the CUDA runtime has seen is reported once more by
    whatever kernel torch launches next, and torch has no public call to forget it.
    """
    cuda, address = load("libcuda.so.1"), memory.ctypes.data
    status = cuda.cuMemHostRegister_v2(
        ctypes.c_void_p(address), ctypes.c_size_t(memory.nbytes), ctypes.c_uint(_PORTABLE)
    )
    if not status:
        _registered[address] = memory
    return _text(cuda, status)


def unpin(memory: NDArray[np.uint8], load: Load = ctypes.CDLL) -> str:
    """The reverse. Empty, or why not: it stays pinned then, until the process ends."""
    cuda, address = load("libcuda.so.1"), memory.ctypes.data
    status = cuda.cuMemHostUnregister(ctypes.c_void_p(address))
    if not status:
        _registered.pop(address, None)
    return _text(cuda, status)


def _text(cuda: Any, status: int) -> str:
    if not status:
        return ""
    name = ctypes.c_char_p()
    cuda.cuGetErrorName(status, ctypes.byref(name))
    return f"CUDA error {status}, {(name.value or b'unknown').decode()}"
