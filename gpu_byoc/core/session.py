"""The life of a live stream, and what is counted of it. Events and the time in, words and numbers out.

::

    STARTING --frame--> RUNNING
    STARTING, RUNNING --stop or input_ended--> FLUSHING --flushed--> ENDED
    any but the last two --failed--> FAILED

Times are seconds of any one clock that does not run backwards; latencies are seconds.
"""

from __future__ import annotations

import enum
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any


class State(enum.Enum):
    STARTING = "starting"
    RUNNING = "running"
    FLUSHING = "flushing"
    ENDED = "ended"
    FAILED = "failed"


_OVER = frozenset({State.ENDED, State.FAILED})
_NEXT = {
    ("frame", State.STARTING): State.RUNNING,
    ("frame", State.RUNNING): State.RUNNING,
    ("frame", State.FLUSHING): State.FLUSHING,
    ("stop", State.STARTING): State.FLUSHING,
    ("stop", State.RUNNING): State.FLUSHING,
    ("stop", State.FLUSHING): State.FLUSHING,
    ("input_ended", State.STARTING): State.FLUSHING,
    ("input_ended", State.RUNNING): State.FLUSHING,
    ("input_ended", State.FLUSHING): State.FLUSHING,
    ("flushed", State.FLUSHING): State.ENDED,
    ("failed", State.STARTING): State.FAILED,
    ("failed", State.RUNNING): State.FAILED,
    ("failed", State.FLUSHING): State.FAILED,
}

WINDOW = 512
"""Latencies kept for percentiles: twenty seconds at 25 fps, enough for a p99."""


@dataclass(slots=True)
class Second:
    """What happened since the last heartbeat."""

    frames_in: int = 0
    frames_out: int = 0
    since: float = 0.0


@dataclass(slots=True)
class Session:
    """One stream. ``reason`` says why it is over, for people; ``dropped`` and ``problems`` count by reason."""

    began: float
    state: State = State.STARTING
    reason: str = ""
    frames_in: int = 0
    frames_out: int = 0
    width: int = 0
    height: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    _latencies: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _second: Second = field(default_factory=Second)

    @property
    def over(self) -> bool:
        return self.state in _OVER

    def happen(self, event: str, reason: str = "") -> bool:
        """Take note of an event; False if it changes nothing any more. The first reason is kept; that of a
        failure is added to it.

        Raises:
            ValueError: the event cannot happen in this state.
        """
        if self.over:
            return False
        state = _NEXT.get((event, self.state))
        if state is None:
            raise ValueError(f"a stream that is {self.state.value} cannot have {event}")
        if event == "failed" and self.reason:
            self.reason = f"{self.reason}; then: {reason}"
        self.reason = self.reason or reason
        changed, self.state = state is not self.state, state
        return changed

    def came_in(self) -> None:
        self.frames_in += 1
        self._second.frames_in += 1

    def went_out(self, latency: float) -> None:
        self.frames_out += 1
        self._second.frames_out += 1
        self._latencies.append(latency)

    def took_back(self, count: int, reason: str) -> None:
        """So many of the frames that went out did not arrive after all."""
        self.frames_out -= count
        self.dropped[reason] += count

    def latency(self, q: float) -> float | None:
        """The q-quantile of the last latencies; None before the first."""
        if not self._latencies:
            return None
        ordered = sorted(self._latencies)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    def beat(self, now: float) -> dict[str, float]:
        """Frames a second, in and out, since the last call."""
        last, self._second = self._second, Second(since=now)
        span = max(now - (last.since or self.began), 1e-9)
        return {"ingress": last.frames_in / span, "egress": last.frames_out / span}

    def numbers(self) -> dict[str, Any]:
        """For status and events."""
        p50, p95, p99 = (self.latency(q) for q in (0.5, 0.95, 0.99))
        return {
            "state": self.state.value,
            "reason": self.reason,
            "frames_in": self.frames_in,
            "frames_out": self.frames_out,
            "dropped": dict(self.dropped),
            "problems": dict(self.problems),
            "latency_seconds": {"p50": p50, "p95": p95, "p99": p99},
            "dimensions": {"width": self.width, "height": self.height},
        }
