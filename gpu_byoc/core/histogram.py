"""Counts by size. Integers in and out; cheap enough for the device thread, which holds a lock anyway when it counts.

One bisection a value: no label look-up, no lock of its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Reading:
    """A histogram at one moment: how many values were at most each bound (cumulative, the last entry is all of them),
    and what they add up to."""

    bounds: tuple[int, ...]
    upto: tuple[int, ...]
    total: int


class Histogram:
    """``bounds`` ascend; what is larger than the last is counted beyond it."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: Sequence[int]) -> None:
        self._bounds = tuple(bounds)
        if not self._bounds or any(a >= b for a, b in zip(self._bounds, self._bounds[1:], strict=False)):
            raise ValueError(f"bounds must ascend, got {self._bounds}")
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0

    def add(self, value: int, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._total += value * times

    def read(self) -> Reading:
        return Reading(self._bounds, tuple(accumulate(self._counts)), self._total)
