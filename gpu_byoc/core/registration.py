"""When to register with the orchestrator, and which bearer tokens it may show us. Events and the time in, answers out.

::

    WAITING, REGISTERED, FAILING --accepted--> REGISTERED --failed--> FAILING
    WAITING --failed--> FAILING
    any --leave--> LEFT                     nothing is due any more

An orchestrator forgets a worker when it restarts, after one refused connection and after one 401, and says so to
nobody. So a registration that was accepted is repeated all the time. Each one hands out a new token:

* one that is on its way may be in force before its answer is here, so its token counts from the moment it is sent;
* one whose answer never came may be in force too, so the next attempt sends the same token again: at any time the
  orchestrator holds a token that is accepted here;
* the token that it replaces stays good for OVERLAP seconds: calls that carry it are on their way.

Times are seconds of any one clock that does not run backwards.
"""

from __future__ import annotations

import enum
import hmac
from collections.abc import Callable
from typing import Final

FIRST_RETRY: Final = 1.0
"""Seconds until the second attempt, on average; doubled each time up to the period. An orchestrator that restarts is
back in a few seconds."""

OVERLAP: Final = 10.0
"""Seconds for which a replaced token is accepted: more than a call spends between the orchestrator's look at its table
and our reading of its head, with a slow connect in between."""

JITTER: Final = 0.1
"""The part of the period by which it varies both ways, so that workers that were started together do not stay so."""


class State(enum.Enum):
    WAITING = "waiting"  # no attempt has been answered yet
    REGISTERED = "registered"
    FAILING = "failing"  # the last attempt failed; the orchestrator may still have the one before
    LEFT = "left"


class Registrar:
    """One worker at one orchestrator. ``random`` gives numbers from 0 to 1; ``new_token`` a secret nobody can guess.

    When ``due`` has come call ``attempt``, send what it returns, and tell the outcome with ``accepted`` or ``failed``;
    both return whether that is news. ``due`` is None once we have left.
    """

    def __init__(self, now: float, period: float, random: Callable[[], float], new_token: Callable[[], str]) -> None:
        self.state = State.WAITING
        self.code = ""  # of the last failure; "" after a success
        self.due: float | None = now
        self.last_success: float | None = None
        self.sent = False  # an orchestrator may know us, so there is something to be undone
        self._period = period
        self._random = random
        self._new_token = new_token
        self._failures = 0
        self._first_success: float | None = None
        self._pending: str | None = None
        self._current: str | None = None
        self._old: dict[str, float] = {}  # token: until when

    def attempt(self) -> str:
        """The token to register with. It is accepted from now on."""
        self.sent = True
        if self._pending is None:
            self._pending = self._new_token()
        return self._pending

    def accepted(self, now: float) -> bool:
        """The orchestrator has taken the last attempt. True if it had not taken the one before."""
        if self._current is not None:
            self._old[self._current] = now + OVERLAP
        self._current, self._pending = self._pending, None
        self._failures = 0
        self.last_success = now
        if self._first_success is None:
            self._first_success = now
        if self.state is State.LEFT:
            return False
        news, self.state, self.code = self.state is not State.REGISTERED, State.REGISTERED, ""
        self.due = now + self._period * (1 + JITTER * (2 * self._random() - 1))
        return news

    def failed(self, now: float, code: str) -> bool:
        """The last attempt was refused, or nobody knows what became of it. True if that is new, or for a new reason."""
        if self.state is State.LEFT:
            return False
        news = (self.state, self.code) != (State.FAILING, code)
        self.state, self.code = State.FAILING, code
        delay = min(self._period, FIRST_RETRY * 2 ** min(self._failures, 30))
        self._failures += 1
        self.due = now + delay * (0.5 + self._random())
        return news

    def leave(self) -> None:
        """Nothing more is due; unregister if ``sent``. Tokens stay good: calls are on their way."""
        self.state, self.due = State.LEFT, None

    def strict(self, now: float) -> bool:
        """Whether a call with another token is none of the orchestrator's. Before it has taken us, and for OVERLAP
        seconds after that, it may be one that was meant for the worker that was here before."""
        return self._first_success is not None and now >= self._first_success + OVERLAP

    def allows(self, token: str, now: float) -> bool:
        """Whether a call that shows this token comes from the orchestrator. Takes the same time for any wrong one."""
        self._old = {old: until for old, until in self._old.items() if until > now}
        given, good = token.encode("utf-8", "surrogateescape"), False
        for known in self.tokens:
            good |= hmac.compare_digest(known.encode(), given)
        return good

    @property
    def tokens(self) -> list[str]:
        """Those that are accepted, or were until a moment ago."""
        return [token for token in (self._pending, self._current, *self._old) if token is not None]
