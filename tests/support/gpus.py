"""A GPU that is none, as benchmarks see one: the cupy backend's own code and the benchmarks' bus, on the stand-in."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import array_api_compat.numpy as numpy_xp

from benchmarks.bus import CupyBus
from benchmarks.sides import Side
from tests.backends.fake_cupy import FakeCupy, StandInBackend


class StandInBus(CupyBus):
    """``kinds`` collects the direction of each copy: up, down, across. ``registrations`` is +1 and -1 in turn."""

    def __init__(self) -> None:
        self.fake = FakeCupy()
        self.kinds: list[str] = []
        self.registrations: list[int] = []
        self.drop = ""  # a test: copies of this kind are enqueued, and do nothing
        self._ranges: list[tuple[int, int]] = []
        runtime = self.fake.cuda.runtime
        runtime.memcpyDeviceToDevice = 3
        runtime.hostRegister = lambda address, nbytes, flags: self.registrations.append(1)
        runtime.hostUnregister = lambda address: self.registrations.append(-1)
        super().__init__(self.fake, numpy_xp)
        plain, names = runtime.memcpyAsync, {1: "up", 2: "down", 3: "across"}

        def memcpy(target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
            self.kinds.append(names[kind])
            if self.drop != names[kind]:
                plain(target, source, nbytes, kind, stream)

        runtime.memcpyAsync = memcpy

    def empty(self, nbytes: int) -> Any:
        array = super().empty(nbytes)
        place = (array.ctypes.data, array.ctypes.data + nbytes)
        self._ranges.append(place)
        weakref.finalize(array, self._ranges.remove, place)  # somebody else's address soon
        return array

    def _place(self, array: Any) -> tuple[int, bool]:
        address = array.ctypes.data
        return address, any(first <= address < last for first, last in self._ranges)


@contextmanager
def stand_in(backend: type[Any] = StandInBackend, why_not: str = "") -> Iterator[tuple[Side, StandInBus]]:
    """A side with a GPU, and its bus."""
    bus = StandInBus()
    try:
        yield Side("stand-in", backend, None, why_not, lambda: bus), bus
    finally:
        bus.fake.close()
