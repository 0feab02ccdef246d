"""Who is measured: the backends of this machine, at which frame sizes and batches, against which targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import psutil

from gpu_byoc.backend import Backend
from gpu_byoc.errors import BackendUnavailable
from gpu_byoc.frames import FrameSpec
from gpu_byoc.plugins import backend_names, load_backend

from .bus import BUSES, Bus
from .harness import Sheet, Size

SPECS: Final = (FrameSpec(640, 480), FrameSpec(1280, 720), FrameSpec(1920, 1080))


@dataclass(frozen=True, slots=True)
class Side:
    """A backend on a device. ``why_not`` says why it cannot be measured here."""

    label: str
    make: Callable[[], Backend]
    device: str | None
    why_not: str = ""
    bus: Callable[[], Bus] | None = None
    """The same GPU without us; None where there is none, or no GPU."""


def sides() -> list[Side]:
    """Every backend that is installed; torch also on the CPU."""
    found = []
    for name in sorted(backend_names()):
        for device in (None, "cpu") if name == "torch" else (None,):
            label = f"{name} on the CPU" if device else name
            try:
                backend = load_backend(name)
                why_not = backend.available(device) or ""
            except BackendUnavailable as error:
                found.append(Side(label, _nothing, device, str(error)))
                continue
            bus = BUSES.get(name) if device is None else None
            found.append(Side(label, backend, device, why_not, bus))
    return found


def _nothing() -> Backend:
    raise AssertionError("a side that says why not is not measured")


def batches(size: Size) -> tuple[int, ...]:
    return size.pick((1, 8), (1, 8), (1, 2, 4, 8, 16, 32, 64))


def specs(size: Size) -> tuple[FrameSpec, ...]:
    return size.pick((FrameSpec(32, 16), FrameSpec(64, 32)), SPECS[::2], SPECS)


def named(spec: FrameSpec, frames: int = 1) -> str:
    """``640x480, 8 frames``: how rows are called."""
    return f"{spec.width}x{spec.height}, {frames} frame{'s' if frames > 1 else ''}"


def columns(spec: FrameSpec, batch: int) -> dict[str, Any]:
    return {"size": f"{spec.width}x{spec.height}", "batch": batch}


def too_much(nbytes: int) -> str | None:
    """Why ``nbytes`` of host memory are not taken; a quarter of what is free at the most."""
    free = psutil.virtual_memory().available
    if nbytes <= free // 4:
        return None
    return f"needs {nbytes >> 20} MiB of host memory, and a quarter of what is free here is {free >> 22} MiB"


CPU_BATCH: Final = 64 << 20


def too_long_on_a_cpu(nbytes: int) -> str | None:
    """Larger batches lie outside of a CPU's caches as this does, and each call takes up to seconds."""
    if nbytes <= CPU_BATCH:
        return None
    return f"over {CPU_BATCH >> 20} MiB a batch a call takes too long: read the row of the next smaller batch"


@contextmanager
def guarded(sheet: Sheet, name: str) -> Iterator[None]:
    """A part of a group that must not take the others with it: what it raises becomes a failed row."""
    try:
        yield
    except Exception as error:  # a library's own, a driver's, ours: the run ends with status 1 whatever it is
        sheet.fail(name, f"{type(error).__name__}: {error}")


def target(
    sheet: Sheet,
    name: str,
    reached: float | None,
    why_not: str = "",
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> None:
    """A row that says whether a target is met; skipped, with ``why_not``, where nothing was measured."""
    if reached is None:
        sheet.skip(f"target: {name}", why_not or "not measured in this run")
        return
    if at_least is not None:
        wanted, met = f"at least {at_least:g}", reached >= at_least
    else:
        assert at_most is not None, "a target has a side"
        wanted, met = f"at most {at_most:g}", reached <= at_most
    sheet.row(f"target: {name}", wanted=wanted, reached=reached, met="yes" if met else "no")
