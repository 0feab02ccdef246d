"""The trickle client: subscribe to a channel, publish to one. Works with any server that speaks trickle.

::

    async with open_session() as session:
        async with Subscriber(session, url) as segments:
            async for segment in segments:
                async for chunk in segment: ...

        async with Publisher(session, url, "video/MP2T") as publisher:
            async with publisher.segment() as segment:
                await segment.write(chunk)

What is asked next and what an answer means is decided in ``core/cursor.py``.
"""

from __future__ import annotations

import asyncio
import ssl
from types import TracebackType
from typing import Final, Self

import aiohttp
from aiohttp.abc import AbstractResolver

from gpu_byoc.core.cursor import OLDEST, Ask, Backoff, End, Read, Subscription
from gpu_byoc.core.trickle import NEWEST
from gpu_byoc.errors import SegmentFailed
from gpu_byoc.redact import redacted
from gpu_byoc.transport.trickle_publish import OutgoingSegment, Publisher, words

__all__ = ["OLDEST", "IncomingSegment", "OutgoingSegment", "Publisher", "Subscriber", "open_session"]

CONNECT_SECONDS: Final = 10.0
REISSUE_SECONDS: Final = 20.0
"""How long a GET waits before it is made anew, as in go-livepeer: routers forget connections that carry nothing."""

STALL_SECONDS: Final = 60.0
"""How long a segment that has begun may bring nothing. Message writers hold one open for ten seconds at a time."""

READ_LIMIT: Final = 16 << 20


def open_session(tls: ssl.SSLContext | bool = True, resolver: AbstractResolver | None = None) -> aiohttp.ClientSession:
    """A session for any number of channels; the caller closes it. There is no limit on connections, since most of them
    only wait, and none on the time of a request as a whole. ``tls`` is what ``tls.tls`` answers, False takes any
    certificate. ``resolver`` is asked for each connection to a host that is a name."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=tls, resolver=resolver, use_dns_cache=resolver is None),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,  # media is not compressed again; what unpacks to gigabytes is not unpacked
        headers={"Accept-Encoding": "identity"},
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
    )


class Subscriber:
    """An async iterator over a channel's segments, as an async context manager that leaves nothing running.

    A segment is given when its first byte is here, or when it turns out to be empty. The request for the next one is
    under way while it is read; asking for the next one ends the reading of the one before. The iteration ends with the
    channel (``ended`` says how). ``skipped`` counts segments that were gone before they could be asked for.

    Raises, from the iteration:
        ChannelMissing: there is no such channel.
        ChannelFailed: the server stays away, or speaks something else. Iterating again tries again.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        start: int = NEWEST,
        *,
        reissue: float = REISSUE_SECONDS,
        stall: float = STALL_SECONDS,
        backoff: Backoff | None = None,
        label: str = "",
        every: bool = False,
    ) -> None:
        """``start`` is an index, NEWEST, NEXT or OLDEST. ``every``: one that falls behind goes on with the oldest that
        is still there, as long as it is; without it with what comes next, as is right for pictures that nobody waits
        for, and wrong where the last message is the one that counts. ``label`` is what errors call the channel; its URL
        is a secret and is not in their texts."""
        self.ended: End | None = None
        self._session = session
        self._url = url.rstrip("/")
        self._reissue = reissue
        self._stall = stall
        self._cursor = Subscription(start, backoff, label or redacted(self._url), every=every)
        self._ahead: asyncio.Task[IncomingSegment | End] | None = None
        self._current: IncomingSegment | None = None

    @property
    def skipped(self) -> int:
        return self._cursor.skipped

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop at once. May be called twice."""
        if self._current is not None:
            self._current.close()
        task, self._ahead = self._ahead, None
        if task is None:
            return
        if task.done() and not task.cancelled() and task.exception() is None:
            got = task.result()
            if isinstance(got, IncomingSegment):
                got.close()
        task.cancel()
        await asyncio.wait([task])

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> IncomingSegment:
        if self._current is not None:
            self._current.close()
            self._current = None
        if self.ended:
            raise StopAsyncIteration
        if self._ahead is None:
            self._ahead = asyncio.create_task(self._fetch())
        await asyncio.wait([self._ahead])  # a cancel of ours is not one of the request: it stays for the next call
        task, self._ahead = self._ahead, None
        got = task.result()
        if isinstance(got, End):
            self.ended = got
            raise StopAsyncIteration
        self._current = got
        self._ahead = asyncio.create_task(self._fetch())
        return got

    async def _fetch(self) -> IncomingSegment | End:
        """The next segment, with its first byte, or the end."""
        ask = self._cursor.ask()
        while True:
            await asyncio.sleep(ask.after)
            try:
                async with asyncio.timeout(self._reissue) as patience:
                    response = await self._session.get(f"{self._url}/{ask.seq}", allow_redirects=False)
            except TimeoutError as error:
                ask = self._cursor.quiet() if patience.expired() else self._cursor.failed(words(error, self._url))
                continue
            except (aiohttp.ClientError, OSError) as error:
                ask = self._cursor.failed(words(error, self._url))
                continue
            got: IncomingSegment | End | None = None
            try:
                decision = self._cursor.answered(response.status, response.headers)
                if isinstance(decision, Ask):
                    ask = decision
                    continue
                got = decision if isinstance(decision, End) else IncomingSegment(response, decision, self._stall)
                return got
            finally:
                if not isinstance(got, IncomingSegment):
                    response.release()


class IncomingSegment:
    """One segment of a channel: an async iterator over its chunks, as they come.

    ``skipped`` segments before this one were missed. ``read`` and the iteration raise SegmentFailed where the segment
    is cut off or brings nothing for too long; the channel goes on.
    """

    def __init__(self, response: aiohttp.ClientResponse, found: Read, stall: float) -> None:
        self.seq = found.seq
        self.skipped = found.skipped
        self.content_type = response.headers.get("Content-Type", "")
        self.received = 0
        self._response = response
        self._url = str(response.url).rpartition("/")[0]
        self._stall = stall
        self._loop = asyncio.get_running_loop()
        self._asked: float | None = None  # since when somebody waits for more
        self._watch = self._loop.call_later(stall, self._look)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        self._asked = self._loop.time()
        try:
            data = await self._response.content.readany()
        except TimeoutError:
            self.close()
            raise SegmentFailed(self.seq, f"no byte for {self._stall:g} s after {self.received}") from None
        except (aiohttp.ClientError, OSError) as error:
            self.close()
            raise SegmentFailed(self.seq, f"cut off after {self.received} bytes: {words(error, self._url)}") from error
        finally:
            self._asked = None
        if not data:
            self._watch.cancel()
            raise StopAsyncIteration
        self.received += len(data)
        return data

    async def read(self, limit: int = READ_LIMIT) -> bytes:
        """What is left of the segment. Raises SegmentFailed if that is more than ``limit`` bytes."""
        chunks, size = [], 0
        async for chunk in self:
            chunks.append(chunk)
            size += len(chunk)
            if size > limit:
                self.close()
                raise SegmentFailed(self.seq, f"longer than the {limit} bytes that are allowed here")
        return b"".join(chunks)

    def _look(self) -> None:
        """One timer for the segment rather than one for each chunk."""
        now = self._loop.time()
        over = (now if self._asked is None else self._asked) + self._stall
        if over <= now:
            self._response.content.set_exception(TimeoutError())
        else:
            self._watch = self._loop.call_at(over, self._look)

    def close(self) -> None:
        """Read no more of it."""
        self._watch.cancel()
        self._response.release()  # closes the connection unless all of it was read
