"""What stands between a CUDA library and a GPU, asked in the order in which it goes wrong, each with its cure."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
from collections.abc import Callable
from importlib.metadata import packages_distributions
from typing import Any, Final

MIN_DRIVER: Final = {11: "450.80", 12: "525.60", 13: "580.65"}
"""Oldest Linux driver that runs programs of a CUDA major version (NVIDIA, CUDA Compatibility, table 2)."""

_NO_DEVICE: Final = 100  # CUDA_ERROR_NO_DEVICE
_CURES: Final = {
    100: "the driver sees no GPU: start the container with --gpus all, or unset an empty CUDA_VISIBLE_DEVICES",
    802: "the GPU's fabric is not ready: start nvidia-fabricmanager on the host",
    803: "driver library and kernel module differ in version: reboot the host after the driver update",
    804: "a CUDA forward-compatibility library hides the driver: remove cuda-compat from the image",
    999: "the driver is in a bad state: try nvidia-smi on the host, reload nvidia_uvm or reboot",
}


_PACKAGES: Final = {"torch": "torch", "cupy": "cupy-cuda12x nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12"}
"""What the extra of that name brings, as pip is told it: right in a checkout and where only the wheel is installed."""


def nvrtc_package(cuda: int) -> str:
    """The wheel of NVRTC for a CUDA major version; NVIDIA's names carry no number from 13 on."""
    return f"nvidia-cuda-nvrtc-cu{cuda}" if cuda < 13 else f"nvidia-cuda-nvrtc~={cuda}.0"


def device_index(device: str | None) -> int | None:
    """``None`` and ``cuda`` -> 0, ``cuda:N`` -> N; None for anything else."""
    match = re.fullmatch(r"cuda(?::(\d{1,3}))?", device or "cuda")
    return None if match is None else int(match[1] or 0)


def dotted(version: int) -> str:
    """12080 -> "12.8", as CUDA counts."""
    return f"{version // 1000}.{version % 1000 // 10}"


def import_problem(module: str) -> str | None:
    """Why ``module`` cannot be imported, or None. A missing module is not imported to find that out."""
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed: pip install {_PACKAGES[module]}"
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken wheel raises whatever it likes: ImportError, OSError, RuntimeError
        # by the name it was installed under: cupy has one for each CUDA major version
        installed = " ".join(packages_distributions().get(module, [])) or _PACKAGES[module]
        return (
            f"{module} is installed but does not import ({type(error).__name__}: {error}): "
            f"reinstall it with pip install --force-reinstall {installed}"
        )
    return None


def driver_problem(library: str, built_for: int, index: int, load: Callable[[str], Any] = ctypes.CDLL) -> str | None:
    """Why ``library``, built for CUDA ``built_for`` (major version), cannot use GPU ``index``, or None.

    Asks the driver itself, allocating nothing on the GPU. ``load`` opens a shared library by name.
    """
    try:
        cuda = load("libcuda.so.1")
    except OSError:
        return (
            "no NVIDIA driver here (libcuda.so.1 is missing): start the container with --gpus all, which needs the "
            "NVIDIA Container Toolkit on the host; without a container install the driver"
        )
    version = ctypes.c_int(0)
    if cuda.cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value // 1000 < built_for:
        newer = f"to {MIN_DRIVER[built_for]} or later" if built_for in MIN_DRIVER else "to one made for it"
        return (
            f"the NVIDIA driver is too old: it goes up to CUDA {dotted(version.value)}, this {library} is built for "
            f"CUDA {built_for}: update the driver {newer}, or install a {library} built for CUDA "
            f"{version.value // 1000}"
        )
    if status := cuda.cuInit(0):
        return f"the NVIDIA driver does not start (CUDA error {status}): {_cure(status)}"
    count = ctypes.c_int(0)
    if status := cuda.cuDeviceGetCount(ctypes.byref(count)):
        return f"the NVIDIA driver does not count its GPUs (CUDA error {status}): {_cure(status)}"
    if count.value == 0:
        return _CURES[_NO_DEVICE]
    if index >= count.value:
        return (
            f"cuda:{index} was asked for, but GPUs are counted from 0 and {count.value} can be seen: choose a lower "
            "one, or look at --gpus and CUDA_VISIBLE_DEVICES"
        )
    return None


def _cure(status: int) -> str:
    return _CURES.get(status, "try nvidia-smi on the host")
