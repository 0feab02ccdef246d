"""How busy a GPU is, from NVIDIA's management library, which asks no CUDA context and so waits for no batch; and what a
backend has read of its GPU, kept up to date beside everything else.

It counts GPUs in its own way, so one is found by its UUID, which the CUDA driver knows by CUDA's index. Where either
library is missing (a container without the ``utility`` capability), there are no figures.
"""

from __future__ import annotations

import ctypes
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Final

Load = Callable[[str], Any]

READ_SECONDS: Final = 0.5


def gpu_uuid(index: int, load: Load = ctypes.CDLL) -> str | None:
    """The UUID of CUDA's GPU ``index``, without the prefix that says whether it is a whole one; None if unknown."""
    try:
        cuda = load("libcuda.so.1")
        device, raw = ctypes.c_int(), (ctypes.c_ubyte * 16)()
        done = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), index)
        done = done or cuda.cuDeviceGetUuid_v2(ctypes.byref(raw), device)
    except (OSError, AttributeError):  # no driver, or one older than 470
        return None
    return None if done else str(uuid.UUID(bytes=bytes(raw)))


class _Utilization(ctypes.Structure):  # nvmlUtilization_t
    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


class Meter:
    """``read`` may be called from any thread, one at a time."""

    def __init__(self, name: str | None, load: Load = ctypes.CDLL) -> None:
        self._nvml, self._handle = None, ctypes.c_void_p()
        if name is None:
            return
        try:
            nvml = load("libnvidia-ml.so.1")
        except OSError:
            return
        if nvml.nvmlInit_v2() == 0:
            for prefix in ("GPU-", "MIG-"):
                if nvml.nvmlDeviceGetHandleByUUID((prefix + name).encode(), ctypes.byref(self._handle)) == 0:
                    self._nvml = nvml
                    return

    def read(self) -> tuple[int | None, int | None]:
        """(percent of the last sample, up to a second, in which a kernel ran; in which its memory was read or written).
        None where unknown, as for a part of a GPU (MIG)."""
        now = _Utilization()
        if self._nvml is None or self._nvml.nvmlDeviceGetUtilizationRates(self._handle, ctypes.byref(now)) != 0:
            return None, None
        return now.gpu, now.memory


class Figures:
    """``latest`` is what ``read`` said last, on a thread of its own: a management library that is slow or hangs holds
    nothing up but its figures."""

    def __init__(self, read: Callable[[], Mapping[str, Any]], first: Mapping[str, Any]) -> None:
        self.latest = first
        self._read = read
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpu-byoc-figures", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(READ_SECONDS):
            try:
                self.latest = self._read()
            except Exception:  # the device's, whatever it is: its canary is there to say so
                return

    def close(self) -> None:
        """A second is long enough for a library that answers; one that does not is left behind."""
        self._over.set()
        self._thread.join(1.0)
