"""A rate with room for bursts. Amounts and the time in, yes or no or a wait out.

Times are seconds of any one clock that does not run backwards.
"""

from __future__ import annotations

from typing import Final

BURST: Final = 2.0
"""Seconds' worth that may come at once: media comes in segments of one to two seconds."""


class Pace:
    """``rate`` a second, ``BURST`` seconds' worth of it at once. Over any time of t seconds no more than
    rate * (t + BURST) is let through, and one amount."""

    def __init__(self, rate: float, now: float) -> None:
        self._rate = rate
        self._most = rate * BURST
        self._left = self._most
        self._at = now

    def affords(self, amount: float, now: float) -> bool:
        """Whether there is room for ``amount``. If so it is spent. What is more than fits at all passes when
        everything is unspent."""
        self._earn(now)
        if self._left < min(amount, self._most):
            return False
        self._left -= amount
        return True

    def wait(self, amount: float, now: float) -> float:
        """Spend ``amount``, and wait for so many seconds before anything more is taken."""
        self._earn(now)
        self._left -= amount
        return max(0.0, -self._left / self._rate)

    def _earn(self, now: float) -> None:
        self._left = min(self._most, self._left + (now - self._at) * self._rate)
        self._at = now
