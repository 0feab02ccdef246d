"""Request bodies into slots and answers out of slots, with a bound on how long nothing may move."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import TracebackType
from typing import Self

from aiohttp import web
from aiohttp.client_exceptions import ClientError, ClientPayloadError
from aiohttp.web_protocol import RequestPayloadError

from gpu_byoc.errors import BadFrame, BodyTimeout, GpuByocError, Overloaded, TooLarge
from gpu_byoc.transport import door
from gpu_byoc.transport.listen import widen

MIN_RATE = 16 * 1024
"""Bytes a second below which a body or an answer counts as stalled: it holds slots that others could use. A 640x480
frame then holds its slot for a minute at most; the slowest links in use today carry more."""


class Watch:
    """Calls ``stalled`` once when ``progress()`` (in bytes) grew by less than ``MIN_RATE`` over ``seconds``.

    One timer for a whole body instead of one for each chunk; it ends with the ``with`` block.
    """

    def __init__(self, seconds: float, progress: Callable[[], int], stalled: Callable[[], None]) -> None:
        self._seconds = seconds
        self._progress = progress
        self._stalled = stalled

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._before = self._progress()
        self._timer = self._loop.call_later(self._seconds, self._look)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        now = self._progress()
        if now - self._before < MIN_RATE * self._seconds:
            self._stalled()
            return
        self._before = now
        self._timer = self._loop.call_later(self._seconds, self._look)


@lru_cache(maxsize=256)
def _client(address: str) -> str:
    return door.client((address,))


def caller(request: web.Request) -> str:
    """Whose it is, by the door's rule: a header could be made up. So whoever comes through one orchestrator is one
    client, and who gets how much among them is the orchestrator's to say."""
    return _client(request.remote) if request.remote else ""


@contextlib.asynccontextmanager
async def giving_way() -> AsyncIterator[Callable[[], None]]:
    """While a caller sends or reads. Yields what ends that, with Overloaded, for others who need the room; it is to be
    called on the event loop, and does nothing after the end."""
    inside = True

    def cut() -> None:
        if inside and not limit.expired():
            limit.reschedule(0)

    try:
        async with asyncio.timeout(None) as limit:
            try:
                yield cut
            finally:
                inside = False
    except TimeoutError:
        if not limit.expired():
            raise
        raise Overloaded("others wait for room, this client has more of it than they, and is slow; try again") from None


@dataclass(slots=True, eq=False)
class Body:
    """A body that is collected, later the answer that takes its place: ``size`` bytes of the budget. ``cut`` ends it
    where its caller is waited for, and is None elsewhere."""

    client: Hashable
    data: bytearray = field(default_factory=bytearray)
    size: int = 0
    cut: Callable[[], None] | None = None

    @contextlib.asynccontextmanager
    async def lent(self) -> AsyncIterator[None]:
        """While the caller sends or reads. Raises Overloaded where others need the room."""
        async with giving_way() as self.cut:
            try:
                yield
            finally:
                self.cut = None


class Budget:
    """Bytes of bodies that are collected outside slots, all requests together.

    When it is full, whoever has most of it makes way for one who would have less: its oldest body that waits for its
    caller is cut off. So bodies that never end, of one client or of many, keep nobody out.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.reclaimed = 0  # bodies that were cut off
        self._bodies: dict[Body, None] = {}  # oldest first

    def take(self, body: Body, count: int) -> None:
        """Raises Overloaded; then nothing was taken, and nobody was cut off."""
        for victim in self._in_the_way(body, count):
            self.give(victim)
            self.reclaimed += 1
            cut, victim.cut = victim.cut, None
            assert cut is not None
            cut()
        self._bodies[body] = None
        body.size += count
        self.used += count

    def replace(self, body: Body, size: int) -> None:
        """What was collected is done with, and ``size`` bytes made of it are kept instead: they are there already, so
        there is nothing to refuse."""
        self.used += size - body.size
        body.size, body.data = size, bytearray()

    def give(self, body: Body) -> None:
        """All that it has. May be called twice."""
        self.used -= body.size
        body.size = 0
        self._bodies.pop(body, None)

    def _in_the_way(self, body: Body, count: int) -> list[Body]:
        """Whom to cut off for ``count`` bytes: always the client that has most, while that is more than the one of
        ``body`` would have. Raises Overloaded where that does not suffice."""
        missing = self.used + count - self.limit
        if missing <= 0:
            return []
        sizes: Counter[Hashable] = Counter()
        for each in self._bodies:
            sizes[each.client] += each.size
        chosen = []
        slow = [each for each in self._bodies if each.cut is not None and each.size and each.client != body.client]
        while missing > 0:
            client = max((each.client for each in slow), key=sizes.__getitem__, default=None)
            if sizes[client] <= sizes[body.client] + count:
                raise Overloaded(f"{self.used} bytes of other jobs' bodies are being collected; try again")
            victim = next(each for each in slow if each.client == client)
            slow.remove(victim)
            chosen.append(victim)
            sizes[client] -= victim.size
            missing -= victim.size
        return chosen


async def _chunks(request: web.Request, seconds: float, progress: Callable[[], int]) -> AsyncGenerator[bytes, None]:
    """The body as it comes, none joined with another. Raises BodyTimeout and BadFrame."""
    content = request.content
    widen(request.transport)
    try:
        async with asyncio.timeout(None) as limit:
            with Watch(seconds, progress, lambda: limit.reschedule(0)):
                while True:
                    chunk, _ = await content.readchunk()
                    if chunk:
                        yield chunk
                    elif content.at_eof():
                        return
    except TimeoutError as error:
        raise BodyTimeout(f"less than {MIN_RATE} bytes/s of the body for {seconds:g} s, after {progress()}") from error
    except (ClientPayloadError, RequestPayloadError) as error:
        raise BadFrame(f"the body broke off after {progress()} bytes: {error}") from error


async def read_into(request: web.Request, views: Sequence[memoryview], seconds: float) -> None:
    """Fill ``views`` one after the other with exactly the request's body.

    Raises:
        BadFrame: the body ended early, or has more bytes than the views.
        BodyTimeout: too little came in ``seconds``.
    """
    at, size = 0, sum(view.nbytes for view in views)
    place = iter(views)
    view, used = next(place), 0
    async with contextlib.aclosing(_chunks(request, seconds, lambda: at)) as chunks:
        async for chunk in chunks:
            at += len(chunk)
            if at > size:
                raise BadFrame(f"the body is longer than the {size} bytes it announced")
            rest = memoryview(chunk)
            while rest:
                if used == view.nbytes:
                    view, used = next(place), 0
                step = min(len(rest), view.nbytes - used)
                view[used : used + step] = rest[:step]
                rest, used = rest[step:], used + step
    if at < size:
        raise BadFrame(f"the body ended after {at} of {size} bytes")


@contextlib.asynccontextmanager
async def collected(request: web.Request, limit: int, seconds: float, budget: Budget) -> AsyncIterator[Body]:
    """The whole body, at most ``limit`` bytes: for what must be parsed before its size in slots is known. What has come
    of it is in the budget to the end of the block; what it announces is not, for anybody can announce much.

    Raises:
        TooLarge: more than ``limit``; the rest is not read.
        Overloaded: the budget is used up, or others need the room.
        BodyTimeout: too little came in ``seconds``.
    """
    body = Body(caller(request))
    too_large = TooLarge(f"the body is larger than the limit of {limit} bytes")
    if (request.content_length or 0) > limit:
        raise too_large
    try:
        async with body.lent(), contextlib.aclosing(_chunks(request, seconds, lambda: len(body.data))) as chunks:
            async for chunk in chunks:
                if len(body.data) + len(chunk) > limit:
                    raise too_large
                budget.take(body, len(chunk))
                body.data += chunk
        budget.take(body, len(body.data) - body.size)  # 0, unless its room went to others as its last byte came
        yield body
    finally:
        budget.give(body)


async def write_from(
    request: web.Request, response: web.StreamResponse, views: Sequence[memoryview], seconds: float
) -> None:
    """Answer with ``views``, and return only when the transport no longer refers to any of them.

    asyncio keeps what the socket did not take yet, without copying it since Python 3.12, so the end of ``write`` does
    not mean that a slot may be used again. With the high-water mark at zero, ``drain`` waits for an empty buffer.

    Raises:
        ConnectionError: the client is gone, or took too little in ``seconds`` and was cut off.
    """
    response.content_length = sum(view.nbytes for view in views)
    writer, transport = await response.prepare(request), request.transport
    if writer is None or transport is None:
        raise ConnectionResetError("the client is gone")
    transport.set_write_buffer_limits(high=0)
    try:
        with Watch(seconds, lambda: -transport.get_write_buffer_size(), transport.abort):
            for view in views:
                await response.write(view)
            await writer.drain()
            await response.write_eof()
    except (ClientError, OSError) as error:
        raise ConnectionResetError("the client is gone") from error
    except asyncio.CancelledError:
        transport.abort()  # half an answer must not look whole, and nothing may refer to the views any more
        raise


def http_error(error: GpuByocError, state: str, headers: Mapping[str, str] | None = None) -> web.Response:
    """The answer for a typed error; ``state`` is the worker's."""
    response = web.json_response(error.body() | {"current_state": state}, status=error.status, headers=headers)
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, BodyTimeout):
        response.force_close()  # the rest of that body is not waited for
    return response
