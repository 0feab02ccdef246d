"""Keep-alive connections to the next hop, for bodies of a megabyte at a thousand jobs a second.

aiohttp's client is the right tool for everything else here (tokens, health). On the road of the frames it costs 0.3 ms
of interpreter time a request and one more copy of the answer, for cookies, redirects, proxies and decompression that a
relay must not do.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final, cast
from urllib.parse import urlsplit

from gpu_byoc.local.http1 import AnswerHead, AnswerParser, Malformed
from gpu_byoc.transport.listen import widen

HIGH_WATER: Final = 1 << 20  # bytes of an answer held for a slow reader before we stop reading from its sender
IDLE_SECONDS: Final = 4.0  # uvicorn closes an idle connection after 5 s, aiohttp after 75; be the first to let go
CONNECT_SECONDS: Final = 2.0  # the next hop is on this machine or this network


class Origin:
    """Where connections go: ``http://host:port``. ``prefix`` is the URL's path without a slash at its end."""

    __slots__ = ("host", "netloc", "port", "prefix", "tls", "url")

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.url = url.rstrip("/")
        self.tls = parts.scheme == "https"
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if self.tls else 80)
        self.netloc = parts.netloc.rpartition("@")[2]
        self.prefix = parts.path.rstrip("/")


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time: ``begin``, ``write`` the body while you ``head`` and ``read``.

    Reading and writing may be in different tasks, each in one task at a time. Every failure is an OSError or a
    Malformed; after one the connection is closed. Cancelling any of the waits leaves the connection as it is: the
    owner must ``close`` it if the exchange is not complete.
    """

    def __init__(self, lost: Callable[[Connection], None]) -> None:
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = AnswerParser()
        self._pieces: deque[bytes] = deque()
        self._held = 0  # bytes in _pieces
        self._reading_paused = False
        self._writing_paused = False
        self._busy = False
        self._error: OSError | Malformed | None = None
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self.idle_since = 0.0
        self.answered: float | None = None  # time.perf_counter() when the whole answer had arrived here

    @property
    def usable(self) -> bool:
        """Whether another exchange can begin on it."""
        return self._error is None and not self._busy and self._transport is not None

    @property
    def drained(self) -> bool:
        """Whether the whole answer has come in and been read, but for the ``read`` that says so."""
        return self._parser.done and not self._pieces

    def begin(self, head: bytes) -> None:
        """Send a request's head; the caller must now ``write`` its body and ``read`` the answer to its end."""
        self._parser = AnswerParser()
        self.answered = None
        self._busy = True
        self._send(head)

    async def write(self, piece: bytes) -> None:
        """Send a piece of the body; waits while the peer is not taking it."""
        self._send(piece)
        while self._writing_paused and self._error is None:
            self._writer = self._loop.create_future()
            try:
                await self._writer
            finally:
                self._writer = None

    async def head(self) -> AnswerHead:
        while (head := self._parser.head) is None:
            await self._wait()
        return head

    async def read(self) -> bytes:
        """The next piece of the answer's body, b"" at its end (the connection may then be reused)."""
        while not self._pieces:
            if self._parser.done:
                self._busy = not self._parser.reusable
                return b""
            await self._wait()
        piece = self._pieces.popleft()
        self._held -= len(piece)
        if self._reading_paused and self._held < HIGH_WATER // 2 and self._transport is not None:
            self._reading_paused = False
            self._transport.resume_reading()
        return piece

    def close(self) -> None:
        """Drop it at once, unsent bytes included."""
        self._fail(ConnectionAbortedError("closed from our side"))

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._reader = self._loop.create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def _send(self, data: bytes) -> None:
        if self._error is not None:
            raise self._error
        assert self._transport is not None
        self._transport.write(data)

    def _fail(self, error: OSError | Malformed) -> None:
        if self._error is None:
            self._error = error
        if self._transport is not None:
            self._transport.abort()
        self._wake()

    def _wake(self) -> None:
        for waiter in (self._reader, self._writer):
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    # --- called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        widen(transport)

    def data_received(self, data: bytes) -> None:
        if not self._busy:
            self._fail(Malformed("bytes that nobody asked for"))
            return
        try:
            pieces = self._parser.feed(data)
        except Malformed as error:
            self._fail(error)
            return
        for piece in pieces:
            self._pieces.append(piece)
            self._held += len(piece)
        if self._parser.done and self.answered is None:
            self.answered = time.perf_counter()
        if self._held > HIGH_WATER and not self._reading_paused and self._transport is not None:
            self._reading_paused = True
            self._transport.pause_reading()
        reader = self._reader
        if reader is not None and not reader.done():
            reader.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._lost(self)
        if self._error is None:
            self._error = exc if isinstance(exc, OSError) else ConnectionResetError("closed by the other side")
            if exc is None and self._busy:
                try:
                    self._parser.eof()
                    self.answered = self.answered or time.perf_counter()
                except Malformed as error:
                    self._error = error
        self._wake()

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(None)


class Pool:
    """Idle connections by host and port, last in first out. ``close`` drops every connection, busy ones too."""

    def __init__(self) -> None:
        self._idle: dict[tuple[str, int, bool], deque[Connection]] = {}
        self._live: set[Connection] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False
        self._gone = asyncio.Event()

    async def acquire(self, origin: Origin) -> Connection:
        """A connection ready to ``begin``. Raises OSError (TimeoutError is one) when there is none to be had."""
        idle = self._idle.get((origin.host, origin.port, origin.tls))
        while idle:
            connection = idle.pop()
            if connection.usable:
                return connection
        self._check_open()
        async with asyncio.timeout(CONNECT_SECONDS):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: Connection(self._lose), origin.host, origin.port, ssl=origin.tls or None
            )
        self._live.add(connection)
        self._gone.clear()
        try:
            self._check_open()  # it may have been closed while we were connecting
        except ConnectionAbortedError:
            connection.close()
            raise
        return connection

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionAbortedError("this process is on its way out")

    def release(self, origin: Origin, connection: Connection) -> None:
        """Give it back; it is closed unless its last exchange was complete."""
        if not connection.usable or self._closed:
            connection.close()
            return
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        self._idle.setdefault((origin.host, origin.port, origin.tls), deque()).append(connection)
        if self._sweeper is None:
            self._sweeper = loop.call_later(IDLE_SECONDS, self._sweep)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        oldest = loop.time() - IDLE_SECONDS
        for key, idle in list(self._idle.items()):
            while idle and (idle[0].idle_since <= oldest or not idle[0].usable):
                idle.popleft().close()
            if not idle:
                del self._idle[key]
        self._sweeper = loop.call_later(IDLE_SECONDS / 4, self._sweep) if self._idle else None

    async def close(self) -> None:
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        self._idle.clear()
        for connection in list(self._live):
            connection.close()
        if self._live:
            await self._gone.wait()

    def _lose(self, connection: Connection) -> None:
        self._live.discard(connection)
        if not self._live:
            self._gone.set()
