"""Request bodies into slots and answers out of slots, with a bound on how long nothing may move."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from aiohttp import web
from aiohttp.client_exceptions import ClientError, ClientPayloadError
from aiohttp.web_protocol import RequestPayloadError

from gpu_byoc.errors import BadFrame, BodyTimeout, GpuByocError, Overloaded, TooLarge
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


class Budget:
    """Bytes of bodies that are collected outside slots, all requests together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def take(self, count: int) -> None:
        """Raises Overloaded; then nothing was taken."""
        if self.used + count > self.limit:
            raise Overloaded(f"{self.used} bytes of other jobs' bodies are being collected; try again")
        self.used += count

    def give(self, count: int) -> None:
        self.used -= count


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


async def read_all(request: web.Request, limit: int, seconds: float, budget: Budget) -> bytearray:
    """The whole body, at most ``limit`` bytes: for what must be parsed before its size in slots is known.

    The caller gives ``len`` of the result back to the budget.

    Raises:
        TooLarge: more than ``limit``; the rest is not read.
        Overloaded: the budget is used up.
        BodyTimeout: too little came in ``seconds``.
    """
    body = bytearray()
    try:
        async with contextlib.aclosing(_chunks(request, seconds, lambda: len(body))) as chunks:
            async for chunk in chunks:
                if len(body) + len(chunk) > limit:
                    raise TooLarge(f"the body is larger than the limit of {limit} bytes (--max-body-mb)")
                budget.take(len(chunk))
                body += chunk
    except BaseException:  # a cancel above all: the caller gets no body to give back
        budget.give(len(body))
        raise
    return body


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


def http_error(error: GpuByocError, headers: Mapping[str, str] | None = None) -> web.Response:
    """The answer for a typed error."""
    response = web.json_response(error.body(), status=error.status, headers=headers)
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, BodyTimeout):
        response.force_close()  # the rest of that body is not waited for
    return response
