"""How many of a stream's frames may fail: a share of the last seconds. Outcomes and the time in, a verdict out.

A frame that fails costs the other streams something: its batch is computed again in halves until it stands alone. So a
stream that goes on failing is better ended. Times are seconds of any clock that does not run backwards.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

SECONDS: Final = 10
LEAST: Final = 50
"""Frames in that time before there is a verdict: two seconds at 25 fps. A stream of under five a second has none."""


@dataclass(slots=True)
class _Second:
    at: int
    frames: int = 0
    failed: int = 0


class ErrorBudget:
    """``share`` (0 to 1) of the frames may fail; with 1 all of them may."""

    def __init__(self, share: float) -> None:
        self.frames = 0  # of the last SECONDS, this one among them
        self.failed = 0
        self._share = share
        self._seconds: deque[_Second] = deque()

    def spend(self, failed: bool, now: float) -> bool:
        """Count a frame; True where more have failed than may."""
        at = int(now)
        if not self._seconds or self._seconds[-1].at != at:
            self._seconds.append(_Second(at))
            while self._seconds[0].at <= at - SECONDS:
                old = self._seconds.popleft()
                self.frames -= old.frames
                self.failed -= old.failed
        newest = self._seconds[-1]
        newest.frames += 1
        newest.failed += failed
        self.frames += 1
        self.failed += failed
        return failed and self.frames >= LEAST and self.failed > self._share * self.frames
