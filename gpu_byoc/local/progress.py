"""Bounds on the time in which nothing of a job moves: one for the client, a longer one for the next hop."""

from __future__ import annotations

import asyncio
from types import TracebackType


class Stalled(Exception):
    """Nothing moved for too long.

    ``phase`` is who was waited for: "body" (the client, to send), "answer" (the next hop) or "reader" (the client, to
    take the answer). ``answering`` says that the head of an answer has gone out to the client.
    """

    def __init__(self, phase: str, answering: bool, seconds: float) -> None:
        super().__init__(f"nothing moved for {seconds:g} seconds (waiting for: {phase})")
        self.phase = phase
        self.answering = answering


class Progress:
    """Bounds the time in which nothing moves; a job as a whole may take as long as it needs.

    ``stall`` seconds for the client, to send more or to take more; ``answer`` seconds for the next hop: a processor's
    whole thinking time is in there. ``async with``; whoever moves bytes calls ``moved``, and says with ``from_client``
    and ``to_client`` when it waits for the client. Raises Stalled out of the block. One timer that is armed again only
    when it fires, because a timer a piece would cost as much as the piece.
    """

    __slots__ = (
        *("_answer", "_handle", "_last", "_loop", "_stall", "_stalled", "_timeout"),
        *("answering", "from_client", "to_client"),
    )

    def __init__(self, stall: float, answer: float) -> None:
        self._stall = stall
        self._answer = answer
        self._loop = asyncio.get_running_loop()
        self._timeout = asyncio.timeout(None)
        self._handle: asyncio.TimerHandle | None = None
        self._stalled: Stalled | None = None
        self._last = 0.0
        self.from_client = False
        self.to_client = False
        self.answering = False

    def moved(self) -> None:
        self._last = self._loop.time()

    @property
    def phase(self) -> str:
        """Who is waited for. A client that does not read comes first: it may be why all the rest stands still."""
        return "reader" if self.to_client else "body" if self.from_client else "answer"

    async def __aenter__(self) -> Progress:
        await self._timeout.__aenter__()
        self._last = self._loop.time()
        self._handle = self._loop.call_later(min(self._stall, self._answer), self._check)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.cancel()
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError as expired:
            assert self._stalled is not None
            raise self._stalled from expired

    def _check(self) -> None:
        now = self._loop.time()
        limit = self._answer if self.phase == "answer" else self._stall
        due = self._last + limit
        if now >= due:
            self._handle = None
            self._stalled = Stalled(self.phase, self.answering, limit)
            self._timeout.reschedule(now)
        else:
            # No later than after the shorter limit: the phase may be another one by then.
            self._handle = self._loop.call_at(min(due, now + min(self._stall, self._answer)), self._check)
