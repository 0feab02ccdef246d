"""Clients whose jobs the processor mostly fails at: theirs run alone, so that others' are not computed again for them.

A batch that fails is tried again in halves, down to the job that causes it; the others in it are unharmed, but late,
and the device does their work more than once. The verdict is that on a live stream (``core.errorbudget``), over jobs.
They are not refused: a client may be many behind one address, and alone a job costs others no more than any does.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

from gpu_byoc.core.errorbudget import SECONDS, ErrorBudget


class Suspects:
    """By client. ``share`` (0 to 1) of its jobs may fail; with 1 all of them may. ``most`` clients are remembered, of
    those whose jobs failed; the one that was heard of least recently is forgotten. Times are seconds of any clock that
    does not run backwards. Any thread may call."""

    def __init__(self, share: float, most: int) -> None:
        self.found = 0  # verdicts, for the metrics
        self.forgotten = 0
        self._share = share
        self._most = most
        self._budgets: OrderedDict[Hashable, ErrorBudget] = OrderedDict()
        self._until: dict[Hashable, float] = {}
        self._lock = threading.Lock()

    def alone(self, client: Hashable, now: float) -> bool:
        """Whether its jobs are to run alone now."""
        return now < self._until.get(client, now)

    def ran(self, client: Hashable, failed: bool, now: float) -> None:
        """The processor is through with one of its jobs. The first that fails is where counting begins."""
        with self._lock:
            self._count(client, failed, now)

    def _count(self, client: Hashable, failed: bool, now: float) -> None:
        budget = self._budgets.get(client)
        if budget is None:
            if not failed:
                return
            budget = self._budgets[client] = ErrorBudget(self._share)
        self._budgets.move_to_end(client)
        if budget.spend(failed, now):
            self.found += not self.alone(client, now)
            self._until[client] = now + SECONDS
        while len(self._budgets) > self._most:
            self.forgotten += 1
            forgotten, _ = self._budgets.popitem(last=False)
            self._until.pop(forgotten, None)
