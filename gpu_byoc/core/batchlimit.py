"""How many frames of one size share a batch after memory has run out: halved at once, doubled back slowly.

After ``patience`` the next batch that fills the limit and succeeds doubles it. Each time that memory runs out doubles
the patience, so that a device that stays short of it is rarely bothered. The halves of a batch that did not fit, which
may not fit either, are the same time. At the top it is forgotten likewise.

Times are integer nanoseconds of any one clock.
"""

from __future__ import annotations

PATIENCE = 2_000_000_000
"""Doubled by the first failure: four seconds until more is tried. Not measured on a GPU."""

MOST_PATIENCE = 64 * PATIENCE
"""Two minutes. A try that fails costs a device its pool of memory, so there are no more than that."""


class BatchLimit:
    """``frames`` is what holds now, between 1 and ``most``."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.frames = most
        self.patience = PATIENCE
        self._since = 0
        self._fitted = True  # something has, since the last failure

    def failed(self, frames: int, now: int) -> None:
        """A batch of ``frames`` frames did not fit into memory."""
        if self._fitted and frames <= self.frames:  # else part of a larger one, or from before the limit
            self.patience = min(MOST_PATIENCE, self.patience * 2)
        self.frames = max(1, min(self.frames, frames // 2))
        self._since = now
        self._fitted = False

    def fitted(self, frames: int, now: int) -> None:
        """A batch of ``frames`` frames succeeded. Half the limit or less says nothing about it: a batch that is full
        has more, whatever the size of its jobs, which are never split."""
        self._fitted = True
        if frames * 2 <= self.frames or now - self._since < self.patience:
            return
        self._since = now
        if self.frames < self.most:
            self.frames = min(self.most, self.frames * 2)
        else:
            self.patience = PATIENCE
