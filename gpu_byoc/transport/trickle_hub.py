"""Trickle channels on an event loop: the core, a clock, and the waking of whoever waits for a segment.

The HTTP server is one user of a hub; parts of the same process may publish and subscribe directly.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, Self

from gpu_byoc.core.cursor import ABSENT, LATEST, SEQ, Ask, Subscription
from gpu_byoc.core.trickle import NEWEST, Channel, Limits, Segment, Trickle
from gpu_byoc.errors import ChannelMissing

PIECE: Final = 256 << 10
"""Bytes that are handed to a reader at once, about: fewer system calls for one that is behind, and no more memory."""


class Hub:
    """All methods are for the event loop that the hub is used on. What changes something wakes who waits for it."""

    def __init__(
        self, limits: Limits | None = None, changefeed: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._core = Trickle(limits or Limits(), clock(), changefeed)
        self._waiting: dict[Segment, set[asyncio.Future[None]]] = {}
        self._core.changed()  # nobody waits yet

    @property
    def names(self) -> list[str]:
        return list(self._core.channels)

    @property
    def waiting(self) -> int:
        """How many wait for a segment, readers and silent publishers."""
        return sum(map(len, self._waiting.values()))

    def channel(self, name: str) -> Channel | None:
        return self._core.channels.get(name)

    def create(self, name: str, mime: str) -> Channel:
        """The channel of that name. Raises Overloaded if there are too many."""
        channel = self._core.create(name, mime, self._clock())
        self.wake()
        return channel

    def delete(self, name: str) -> bool:
        """Close and forget a channel; False if there was none."""
        there = self._core.delete(name, self._clock())
        self.wake()
        return there

    def append(self, channel: Channel, segment: Segment, data: bytes) -> None:
        """A publisher's next bytes. Raises TooLarge over a bound."""
        try:
            channel.append(segment, data, self._clock())
        finally:
            self.wake()

    def write(self, name: str, data: bytes) -> None:
        """A whole segment at the channel's next index: a message from this process.

        Raises:
            ChannelMissing: there is no such channel (any more).
            TooLarge: over a bound; nothing of it is kept.
        """
        try:
            self._need(name).write(data, self._clock())
        finally:
            self.wake()

    def subscribe(self, name: str, start: int = NEWEST) -> LocalSubscriber:
        """The channel's segments from ``start`` on. Raises ChannelMissing if there is no such channel."""
        return LocalSubscriber(self, self._need(name), start)

    async def fresh(self, segment: Segment, seen: int) -> list[bytes]:
        """The chunks after the first ``seen``, a piece's worth at most, waiting for one; none once it has ended."""
        while seen == len(segment.chunks):
            if segment.ended:
                return []
            await self.changed(segment)
        size, end = 0, seen
        while end < len(segment.chunks) and size < PIECE:
            size += len(segment.chunks[end])
            end += 1
        return segment.chunks[seen:end]

    async def read(self, segment: Segment) -> bytes:
        """All of a segment, when it has ended."""
        await self.ended(segment)
        return b"".join(segment.chunks)

    async def changed(self, segment: Segment) -> None:
        """Return when the segment has more bytes, or has ended."""
        waiter = asyncio.get_running_loop().create_future()
        waiters = self._waiting.setdefault(segment, set())
        waiters.add(waiter)
        try:
            await waiter
        finally:
            waiters.discard(waiter)  # after a cancel; else it has been taken out already
            if not waiters and self._waiting.get(segment) is waiters:
                del self._waiting[segment]

    async def ended(self, segment: Segment) -> None:
        """Return when the segment has ended."""
        while segment.ended is None:
            await self.changed(segment)

    def wake(self) -> None:
        """Wake those who wait for what has changed. Call after a call into a channel."""
        for segment in self._core.changed():
            for waiter in self._waiting.pop(segment, ()):
                if not waiter.done():
                    waiter.set_result(None)

    async def sweep(self, every: float) -> None:
        """Delete idle channels, looking every so many seconds, until cancelled."""
        while True:
            await asyncio.sleep(every)
            self.sweep_now()

    def sweep_now(self) -> list[str]:
        idle = self._core.sweep(self._clock())
        self.wake()
        return idle

    def close(self) -> None:
        """Close all channels; nobody waits for anything after this."""
        self._core.close()
        self.wake()

    def _need(self, name: str) -> Channel:
        channel = self.channel(name)
        if channel is None:
            raise ChannelMissing(f"no channel {name!r} here; create it first")
        return channel


class LocalSubscriber:
    """An async iterator over the segments of a channel in this process: in order, empty ones left out, until the
    channel is closed. A segment is given when it has its first byte; ``Hub.fresh`` and ``Hub.read`` read it.

    Who falls more than a ring behind goes on at the next segment to be written, as a remote subscriber would;
    ``skipped`` counts what was missed.
    """

    def __init__(self, hub: Hub, channel: Channel, start: int) -> None:
        self._hub = hub
        self._channel = channel
        self._cursor = Subscription(start)

    @property
    def skipped(self) -> int:
        return self._cursor.skipped

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Segment:
        while not self._channel.closed:
            segment = self._channel.find(self._cursor.ask().seq)
            self._hub.wake()  # a segment that was waited for may have lost its slot to this one
            if segment is None:
                ask = self._cursor.answered(ABSENT, {LATEST: str(self._channel.next_seq)})
                assert isinstance(ask, Ask), "an absent segment is asked for again"
                await asyncio.sleep(ask.after)
                continue
            while not segment.chunks and segment.ended is None:
                await self._hub.changed(segment)
            self._cursor.answered(200, {SEQ: str(segment.seq)})
            if segment.chunks:
                return segment
        raise StopAsyncIteration
