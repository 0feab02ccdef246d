"""Questions to libraries and drivers, each asked in a process of its own with a deadline.

A broken wheel may crash the process that imports it, and a driver in a bad state may never answer. ``start`` begins a
probe, ``Probe.answer`` is what it found out, or in words why there is no answer. What a probe returns is JSON.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

DEADLINE: Final = 60.0
"""Seconds for all probes together, which run side by side. The first import of a CUDA torch from a cold disk takes
tens of them."""

SLOTS: Final = 32
FULL_HD: Final = (1920, 1080)
"""What a GPU backend is asked to pin: the arena of a worker with default settings for full HD, 190 MiB."""

# The child gets this process's import path, so that it finds what this one finds, and not what lies in its folder.
_CHILD: Final = (
    "import sys; sys.path[:] = {path!r}; from gpu_byoc.checks.probes import child; child({name!r}, {args!r})"
)
_MARK: Final = "gpu-byoc-probe: "


@dataclass(frozen=True, slots=True)
class Answer:
    """``value`` is what the probe returned; ``trouble`` is set instead where there is none."""

    value: Any = None
    trouble: str = ""


class Probe:
    """A child process on its way."""

    def __init__(self, name: str, *args: str) -> None:
        self._deadline = time.monotonic() + DEADLINE
        self._child = subprocess.Popen(
            [sys.executable, "-c", _CHILD.format(path=sys.path, name=name, args=args)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )

    def answer(self) -> Answer:
        """Waits until the deadline at the latest."""
        try:
            said, _ = self._child.communicate(timeout=max(0.1, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.close()
            return Answer(trouble=f"no answer within {DEADLINE:g} s")
        lines = said.rstrip().splitlines()
        for line in reversed(lines):
            if line.startswith(_MARK):
                return Answer(**json.loads(line.removeprefix(_MARK)))
        code = self._child.returncode
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        return Answer(trouble=f"the process that asked ended with {how}" + (f": {lines[-1][:200]}" if lines else ""))

    def close(self) -> None:
        """End the child. One that hangs inside a driver ignores even SIGKILL: it is not waited for."""
        self._child.kill()
        try:
            self._child.communicate(timeout=2)
        except subprocess.TimeoutExpired:
            pass


def child(name: str, args: tuple[str, ...]) -> None:
    """The other side of ``Probe``."""
    try:
        answer = {"value": PROBES[name](*args)}
    except Exception as error:  # whatever a broken library raises is what the doctor wants to hear
        answer = {"trouble": f"{type(error).__name__}: {error}"}
    print(_MARK + json.dumps(answer, default=str), flush=True)


# --- in the child


def imports(module: str) -> str:
    """The version of a module that must import."""
    importlib.import_module(module)
    from importlib.metadata import version

    return version(module)


def driver(load: Callable[[str], Any] = ctypes.CDLL) -> dict[str, Any] | None:
    """None without a driver; else ``version``, ``cuda`` (the newest it runs, 12080 for 12.8), ``error`` (a CUDA status)
    and ``gpus``, each with ``name``, ``memory`` (bytes) and ``capability``. ``load`` opens a shared library by name.
    """
    try:
        cuda = load("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int(0)
    newest = number.value if cuda.cuDriverGetVersion(ctypes.byref(number)) == 0 else 0
    newest = number.value or newest
    error = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(number))
    gpus = [] if error else [_gpu(cuda, index) for index in range(number.value)]
    return {"version": _driver_version(load), "cuda": newest, "error": error, "gpus": gpus}


def _gpu(cuda: Any, index: int) -> dict[str, Any]:
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(256)
    memory, major, minor = ctypes.c_size_t(0), ctypes.c_int(0), ctypes.c_int(0)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # ..._MINOR
    return {
        "name": name.value.decode(errors="replace"),
        "memory": memory.value,
        "capability": f"{major.value}.{minor.value}",
    }


def _driver_version(load: Callable[[str], Any]) -> str:
    """``550.54.15``, from NVML; empty where a container does not have it."""
    try:
        nvml = load("libnvidia-ml.so.1")
    except OSError:
        return ""
    text = ctypes.create_string_buffer(81)  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE and one
    if nvml.nvmlInit_v2():
        return ""
    nvml.nvmlSystemGetDriverVersion(text, 80)
    nvml.nvmlShutdown()
    return text.value.decode(errors="replace")


def runtime(library: str) -> dict[str, Any] | None:
    """``version`` of torch or cupy and ``cuda`` it is built for (12080 for 12.8, 0 for a build without); None where it
    is not installed."""
    if importlib.util.find_spec(library) is None:
        return None
    module = importlib.import_module(library)
    if library == "cupy":
        return {"version": module.__version__, "cuda": module.cuda.runtime.runtimeGetVersion()}
    major, _, minor = (module.version.cuda or "0").partition(".")
    return {"version": module.__version__, "cuda": int(major) * 1000 + int(minor or 0) * 10}


def backend(name: str) -> dict[str, Any]:
    """Open a backend as the worker does, pin an arena's memory, run one frame. ``why_not``: what it says itself."""
    from gpu_byoc.backend import Batch
    from gpu_byoc.errors import BackendUnavailable
    from gpu_byoc.frames import FrameSpec
    from gpu_byoc.plugins import load_backend
    from gpu_byoc.processors.green_tint import GreenTint

    try:
        kind = load_backend(name)
        if why_not := kind.available(None):
            return {"why_not": why_not}
        opened, spec = kind(), FrameSpec(*FULL_HD)
        try:
            opened.open(None, GreenTint())
            arena = opened.arena(spec.nbytes, SLOTS)
            opened.submit(Batch(spec, arena, (0,), GreenTint.Params())).wait()
            info = dict(opened.info())
            return {"device": opened.device, "pinned": arena.pinned, "degraded": info.pop("degraded", []), "info": info}
        finally:
            opened.close()
    except BackendUnavailable as error:
        return {"why_not": str(error)}


def codec(name: str, mode: str) -> str | None:
    """Why an encoder (mode ``w``) or a decoder (``r``) does not work here, or None. Only opening it tells: all of them
    are compiled in everywhere. An encoder also codes one picture.
    """
    import av
    import av.error
    import av.logging

    from gpu_byoc.errors import GpuByocError
    from gpu_byoc.frames import FrameSpec
    from gpu_byoc.media.encode import Encoder, EncoderSettings

    av.logging.set_level(av.logging.ERROR)
    with av.logging.Capture() as said:
        try:
            if mode == "r":
                av.CodecContext.create(name, "r").open()
            else:
                spec = FrameSpec(256, 256)
                encoder = Encoder(spec, settings=EncoderSettings(name))
                if not encoder.encode(memoryview(bytes(spec.nbytes)), 0, key=True) + encoder.flush():
                    return "it opens, but codes nothing"
        except (av.error.FFmpegError, GpuByocError, ValueError) as error:  # ValueError: not compiled in
            return said[0][2].strip() if said else str(error)
    return None


PROBES: Final[dict[str, Callable[..., Any]]] = {
    "imports": imports,
    "driver": driver,
    "runtime": runtime,
    "backend": backend,
    "codec": codec,
}
