"""What one live stream says about itself: its events and data channels.

Both have queues of their own that drop their oldest entry rather than wait: a slow reader of news never holds up the
picture.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final

import aiohttp

from gpu_byoc.core.cursor import Backoff
from gpu_byoc.errors import ChannelClosed, ChannelFailed, ChannelMissing, GpuByocError, SegmentFailed
from gpu_byoc.transport.trickle_client import Publisher
from gpu_byoc.worker.drain import ended
from gpu_byoc.worker.streamparams import Urls

log = logging.getLogger("gpu_byoc.stream")

PAUSE: Final = 1.0
"""Seconds before a broken channel is tried again."""

MOMENT: Final = 0.25
"""Seconds that an event which is on its way has when the stream ends: a round trip to far away. Chosen."""

LAST_SECONDS: Final = 2.0
"""How long the last words may take."""


class News:
    """``tell``, ``pulse`` and ``line`` queue and return at once; ``events`` and ``data`` send, until they are cancelled
    or nobody is there to hear it. ``most`` events, and as many lines, wait for that. All on the event loop."""

    def __init__(self, name: str, urls: Urls, problem: Callable[[str], None], backoff: Backoff, most: int) -> None:
        self._name = name
        self._urls = urls
        self._problem = problem
        self._backoff = backoff
        self._most = most
        self._events: deque[dict[str, Any]] = deque()
        self._pulse: dict[str, Any] | None = None  # the newest heartbeat; older ones are of no interest
        self._has_events = asyncio.Event()
        self._lines: deque[bytes] = deque()
        self._has_lines = asyncio.Event()

    def tell(self, kind: str, **fields: Any) -> None:
        """An event."""
        event = {"type": kind, "timestamp": int(time.time() * 1000), **fields}
        self._events.append({"event": event, "queue_event_type": "ai_stream_events"})
        self._bound("events", self._events, self._urls.events)
        self._has_events.set()

    def pulse(self, **fields: Any) -> None:
        """A heartbeat; it takes the place of one that is not sent yet."""
        event = {"type": "heartbeat", "timestamp": int(time.time() * 1000), "stream_id": self._name, **fields}
        self._pulse = {"event": event, "queue_event_type": "stream_heartbeat"}
        self._has_events.set()

    def line(self, kind: str, **fields: Any) -> None:
        """A line of data."""
        self._lines.append(json.dumps({"type": kind, "stream_id": self._name, **fields}).encode() + b"\n")
        self._bound("data", self._lines, self._urls.data)
        self._has_lines.set()

    def _bound(self, what: str, queue: deque[Any], url: str | None) -> None:
        """The newest. Where there is no such channel nobody misses the others."""
        while len(queue) > self._most:
            queue.popleft()
            if url is not None:
                self._problem(what + "_dropped")

    async def events(self, http: aiohttp.ClientSession) -> None:
        await self._channel(http, "events", self._urls.events, "application/json", self._has_events, self._send_events)

    async def data(self, http: aiohttp.ClientSession) -> None:
        await self._channel(http, "data", self._urls.data, "application/jsonl", self._has_lines, self._send_lines)

    async def last_words(self, http: aiohttp.ClientSession) -> None:
        """What is queued, on publishers of their own, when ``events`` and ``data`` have ended."""
        try:
            async with asyncio.timeout(LAST_SECONDS):
                if self._urls.events is not None:
                    async with Publisher(http, self._urls.events, "application/json") as publisher:
                        await self._send_events(publisher)
                if self._urls.data is not None:
                    async with Publisher(http, self._urls.data, "application/jsonl") as publisher:
                        await self._send_lines(publisher)
        except (TimeoutError, GpuByocError) as error:
            log.debug("stream %s: nobody takes the last events: %s", self._name, error)

    async def _channel(
        self,
        http: aiohttp.ClientSession,
        what: str,
        url: str | None,
        mime: str,
        there: asyncio.Event,
        send: Callable[[Publisher], Awaitable[None]],
    ) -> None:
        while url is not None:
            try:
                async with Publisher(http, url, mime, backoff=self._backoff) as publisher:
                    while True:
                        await there.wait()
                        await send(publisher)
            except ChannelMissing:
                log.warning("stream %s: there is no %s channel; nobody hears of it", self._name, what)
                return
            except ChannelClosed:
                return
            except (ChannelFailed, SegmentFailed) as error:
                self._problem(what)
                log.warning("stream %s: %s: %s", self._name, what, error)
                await asyncio.sleep(PAUSE)

    async def _send_events(self, publisher: Publisher) -> None:
        """What happened first, then how it goes. What could not be sent is kept."""
        self._has_events.clear()
        while self._events:
            await self._send_event(publisher, self._events.popleft())
        pulse, self._pulse = self._pulse, None
        if pulse is not None:
            await publisher.send(json.dumps(pulse).encode())

    async def _send_event(self, publisher: Publisher, event: dict[str, Any]) -> None:
        def keep() -> None:
            self._events.appendleft(event)
            self._bound("events", self._events, self._urls.events)
            self._has_events.set()

        await _send(publisher, json.dumps(event).encode(), keep)

    async def _send_lines(self, publisher: Publisher) -> None:
        """All in one segment. What could not be sent is kept, as far as there is room beside what came since."""
        self._has_lines.clear()
        lines = list(self._lines)
        self._lines.clear()

        def keep() -> None:
            self._lines.extendleft(reversed(lines))
            self._bound("data", self._lines, self._urls.data)
            self._has_lines.set()

        if lines:
            await _send(publisher, b"".join(lines), keep)


async def _send(publisher: Publisher, data: bytes, keep: Callable[[], None]) -> None:
    """A segment; ``keep`` is called where it has not got through. What is kept is sent again, so that a cancel gives
    what is on its way a moment: where it has got through, that is known then."""
    sending = asyncio.create_task(publisher.send(data))
    try:
        await asyncio.wait([sending])
    except asyncio.CancelledError:
        await asyncio.wait([sending], timeout=MOMENT)
        raise
    finally:
        try:
            await ended(sending)
        finally:
            if not sending.done() or sending.cancelled() or sending.exception() is not None:
                keep()
    sending.result()
