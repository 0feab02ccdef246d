"""Memory of the device backends: slabs on the host, lanes on the device, and the marks that order their streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpu_byoc.backend import Arena


class Event(Protocol):
    """A mark in a stream, as torch and cupy have it."""

    def record(self, stream: Any) -> Any: ...

    def synchronize(self) -> Any: ...


class Stream(Protocol):
    """Work in order, as torch and cupy have it."""

    def wait_event(self, event: Any) -> Any: ...

    def synchronize(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Slab:
    """Host memory of one arena: ``host`` to look at it, ``handle`` what the library copies from and to."""

    host: NDArray[np.uint8]
    handle: Any
    pinned: bool
    why_not: str = ""  # why it is not pinned although it should be
    unpin: Callable[[], None] | None = None  # where it is not unpinned by being forgotten


class SlabArena:
    """An arena over one slab. Views that outlive it keep the slab alive."""

    def __init__(self, nbytes: int, slots: int, slab: Slab, closed: Callable[[SlabArena], None]) -> None:
        self.nbytes = nbytes
        self.slots = slots
        self.pinned = slab.pinned
        self.slab: Slab | None = slab
        self._bytes = slab.host.data
        self._closed = closed

    def view(self, first: int, count: int = 1) -> memoryview:
        return self._bytes[first * self.nbytes : (first + count) * self.nbytes]

    def close(self) -> None:
        if self.slab is not None:
            slab, self.slab = self.slab, None
            self._bytes.release()
            self._closed(self)
            if slab.unpin is not None:
                slab.unpin()


@dataclass(slots=True)
class Lane:
    """Device memory and marks of one batch: flat uint8 of ``bucket * nbytes`` bytes."""

    nbytes: int
    bucket: int
    frames: Any
    marks: tuple[Event, ...]  # in0, in1, c0, c1, out0, out1
    result: Any = None  # made when a processor first returns an array of its own


@dataclass(frozen=True, slots=True)
class Canary:
    """What a probe works with: a stream, a few bytes and a mark that no batch touches."""

    stream: Stream
    memory: Any
    done: Event


@dataclass(slots=True)
class LanePool:
    """Idle lanes by frame size and bucket. There are as many lanes as batches were ever in flight together.

    Lanes are taken and dropped by the thread that submits, and given back by the one that waits.
    """

    make: Callable[[int, int], Lane]
    _idle: dict[tuple[int, int], list[Lane]] = field(default_factory=dict)

    def take(self, nbytes: int, frames: int) -> Lane:
        """A lane for at least ``frames`` frames of ``nbytes`` bytes; buckets are powers of two."""
        bucket = 1 << (frames - 1).bit_length()
        idle = self._idle.get((nbytes, bucket))
        return idle.pop() if idle else self.make(nbytes, bucket)

    def give(self, lane: Lane) -> None:
        """The lane's last mark has passed."""
        self._idle.setdefault((lane.nbytes, lane.bucket), []).append(lane)

    def drop(self, nbytes: int | None = None) -> None:
        """Free the idle lanes of one frame size, or all."""
        for key in list(self._idle):  # a copy, made in one step: another thread may give a lane back meanwhile
            if nbytes in (None, key[0]):
                self._idle.pop(key, None)


def slab_of(arena: Arena) -> Slab:
    """The slab behind an arena that this backend made and that is still open."""
    assert isinstance(arena, SlabArena), "a batch's arena comes from the backend that runs it"
    assert arena.slab is not None, "the arena is closed"
    return arena.slab
