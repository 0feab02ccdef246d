"""The backend contract.

What a backend must do, in this order of importance:

1. **Same bytes as numpy.** For any input the output equals that of the numpy backend, byte for byte.
2. **Own the memory.** ``arena`` allocates host memory once; nothing is allocated or pinned per frame.
3. **Enqueue, never wait.** ``submit`` returns as soon as the work is on its way; only ``Submission.wait`` waits.
   (A backend without a device of its own does the work inside ``submit``: there is nothing to wait for.)
4. **Write only finished work.** A slot keeps the frame that came in until its whole batch has succeeded, then holds
   the frame that goes out. After a failure the slots of that batch still hold their input, so that halves of it can
   be tried again.
5. **Tell the time.** ``Submission.wait`` returns what the device spent, copies and computation apart.

Everything is called from one thread, the engine's device thread, but for four: ``Arena.view`` and ``info`` may be
called from any thread, ``Submission.wait`` from a second one where ``depth`` is more than 1, ``probe`` from a third.

Two things a backend may have and need not, because what they are for needs a device of its own: ``probe`` (see
``Probing``) and ``require_pinned`` (see ``Pinning``).

A processor's exception is let through as it is: the engine finds the frame that causes it. What means the device itself
is gone is raised as ``DeviceLost``; memory that ran out as ``DeviceOutOfMemory``. A backend that works in place and
fails in the middle of it raises ``ProcessorSpoiled``: that batch is not tried again.

Found by entry point, group ``gpu_byoc.backends``: a class without constructor arguments. ``available`` is a
classmethod that answers without allocating anything: ``None``, or why the backend cannot open here and what to do.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from gpu_byoc.frames import FrameSpec
from gpu_byoc.processor import Processor


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """What one batch cost its device, in integer nanoseconds.

    ``compute_ns`` is the processor's own time, ``copy_ns`` the copies to and from the device together.
    """

    compute_ns: int
    copy_ns: int = 0


class Arena(Protocol):
    """Preallocated host memory for ``slots`` frames of ``nbytes`` bytes each, side by side."""

    nbytes: int
    slots: int
    pinned: bool

    def view(self, first: int, count: int = 1) -> memoryview:
        """Writable bytes of ``count`` slots from ``first`` on, without a copy. Callable from any thread."""
        ...

    def close(self) -> None:
        """Give the memory back. No view is used afterwards."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """Frames of one spec with one set of parameters, ``len(slots)`` of them, in slot order of submission."""

    spec: FrameSpec
    arena: Arena
    slots: tuple[int, ...]
    params: Any


class Submission(Protocol):
    """A batch on its way."""

    def wait(self) -> BatchTimes:
        """Return when the slots hold the output; raise what went wrong. Called once."""
        ...


class Backend(Protocol):
    """Owns memory, streams and timing of one device."""

    name: str
    device: str  # what it runs on, in words for status: "cpu", "cuda:0"
    depth: int  # batches it can have on their way at once; 1 where submit does the work itself
    batches: bool  # False where a batch only makes its first frame wait for its last: each item then goes alone

    @classmethod
    def available(cls, device: str | None) -> str | None:
        """None if it can open on ``device`` (None: any), else why not and what to do about it."""
        ...

    def open(self, device: str | None, processor: Processor) -> None:
        """Take the device, set the processor up, warm up. May be slow. Raises BackendUnavailable."""
        ...

    def arena(self, nbytes: int, slots: int) -> Arena:
        """Host memory for ``slots`` frames of ``nbytes`` bytes, pinned if the backend can."""
        ...

    def submit(self, batch: Batch) -> Submission:
        """Put a batch on its way without waiting for it."""
        ...

    def info(self) -> Mapping[str, Any]:
        """Facts for status: device name, library versions, ``degraded`` with reasons (a list of strings)."""
        ...

    def close(self) -> None:
        """Shut the processor down and give everything back. Called once, also after a failed ``open``."""
        ...


@runtime_checkable
class Probing(Protocol):
    """A backend that can be asked for a sign of life."""

    def probe(self) -> None:
        """Do something tiny on the device, on a stream of its own, and wait for it. Raises DeviceLost.

        Called every half second on a thread of its own, while batches are on their way; never before ``open`` has
        returned or once ``close`` was called. That it does not return means that the device hangs, so it must not
        wait for any lock or stream that a batch may hold for long, nor allocate.
        """
        ...


@runtime_checkable
class Pinning(Protocol):
    """A backend whose copies want pinned memory. Set, ``arena`` raises BackendUnavailable where it cannot pin."""

    require_pinned: bool


class HostArena:
    """An arena of ordinary memory: anonymous pages, of which nothing is resident before it is used."""

    pinned = False

    def __init__(self, nbytes: int, slots: int) -> None:
        self.nbytes = nbytes
        self.slots = slots
        self._bytes = memoryview(mmap.mmap(-1, nbytes * slots))

    def view(self, first: int, count: int = 1) -> memoryview:
        return self._bytes[first * self.nbytes : (first + count) * self.nbytes]

    def close(self) -> None:
        self._bytes.release()  # the pages go with the last view


def runs(slots: tuple[int, ...]) -> list[tuple[int, int]]:
    """Neighbouring slots merged, order kept: ``(4, 5, 6, 1)`` -> ``[(4, 3), (1, 1)]`` as (first, count)."""
    merged: list[tuple[int, int]] = []
    for slot in slots:
        if merged and slot == merged[-1][0] + merged[-1][1]:
            merged[-1] = (merged[-1][0], merged[-1][1] + 1)
        else:
            merged.append((slot, 1))
    return merged
