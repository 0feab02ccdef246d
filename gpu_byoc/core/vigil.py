"""When is a device or a processor stuck? Decided from looks at what is under way, taken every so often.

The rules, all of them:

* A batch is stuck when it has been the oldest on its way for ``batch_limit``; so is any other call of the backend.
* The device is stuck when one and the same probe has not been answered for ``device_limit`` and in that time nothing
  else came back from it either: busy, but moving, is not stuck.
* Only time in which somebody looked counts. Between two looks at most ``longest_step`` has passed, whatever the clock
  says: a process that was stopped, or in which one piece of code held up all others, has not seen its device hang.

Times are integer nanoseconds of any one clock; a limit of 0 is never reached.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable


class Stuck(enum.Enum):
    DEVICE = "device"
    PROCESSOR = "processor"


class Vigil:
    """One device's."""

    def __init__(self, device_limit: int, batch_limit: int, longest_step: int) -> None:
        self._longest = longest_step
        self._probe = _Wait(device_limit)
        self._batch = _Wait(batch_limit)
        self._at: int | None = None

    def look(self, now: int, probe: int | None, batch: int | None, landed: int) -> Stuck | None:
        """What has been stuck for too long, if anything: then raise the alarm, and look no more.

        ``probe`` is the number of the probe that waits for its answer, ``batch`` that of the oldest batch on its way
        or of another call (None: there is neither), ``landed`` how many batches have ended so far.
        """
        step = 0 if self._at is None else min(now - self._at, self._longest)
        self._at = now
        probe_over = self._probe.see(None if probe is None else (probe, landed), step)
        batch_over = self._batch.see(batch, step)
        if probe_over:
            return Stuck.DEVICE
        return Stuck.PROCESSOR if batch_over else None


class _Wait:
    """For how long the same thing has been waited for."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._thing: Hashable = None
        self._waited = 0

    def see(self, thing: Hashable, step: int) -> bool:
        """True once ``thing`` has been there for the limit."""
        self._waited = self._waited + step if thing is not None and thing == self._thing else 0
        self._thing = thing
        return 0 < self._limit <= self._waited
