"""Request bodies into slots and answers out of slots, with a bound on how long nothing may move."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from aiohttp import web
from aiohttp.client_exceptions import ClientError, ClientPayloadError

from gpu_byoc.errors import BadFrame, BodyTimeout, GpuByocError, TooLarge


class Watch:
    """Calls ``stalled`` once if ``progress()`` has stayed the same for ``seconds``; ends with the ``with`` block.

    One timer for a whole body instead of one for each chunk.
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
        if now == self._before:
            self._stalled()
            return
        self._before = now
        self._timer = self._loop.call_later(self._seconds, self._look)


async def read_into(request: web.Request, views: Sequence[memoryview], seconds: float) -> None:
    """Fill ``views`` one after the other with exactly the request's body.

    Raises:
        BadFrame: the body ended early, or has more bytes than the views.
        BodyTimeout: nothing came for ``seconds``.
    """
    at, size, content = 0, sum(view.nbytes for view in views), request.content
    place = iter(views)
    view, used = next(place), 0

    def stalled() -> None:
        content.set_exception(BodyTimeout(f"no more of the body for {seconds:g} s, after {at} of {size} bytes"))

    try:
        with Watch(seconds, lambda: at, stalled):
            while chunk := await content.readany():
                at += len(chunk)
                if at > size:
                    raise BadFrame(f"the body is longer than the {size} bytes it announced")
                rest = memoryview(chunk)
                while rest:
                    step = min(len(rest), view.nbytes - used)
                    view[used : used + step] = rest[:step]
                    rest, used = rest[step:], used + step
                    if (used == view.nbytes and at < size) or rest:
                        view, used = next(place), 0
    except ClientPayloadError as error:
        raise BadFrame(f"the body ended after {at} of {size} bytes: {error}") from error
    if at < size:
        raise BadFrame(f"the body ended after {at} of {size} bytes")


async def read_all(request: web.Request, limit: int, seconds: float) -> bytearray:
    """The whole body, at most ``limit`` bytes: for what must be parsed before its size in slots is known.

    Raises:
        TooLarge: more than ``limit``; the rest is not read.
        BodyTimeout: nothing came for ``seconds``.
    """
    body, content = bytearray(), request.content

    def stalled() -> None:
        content.set_exception(BodyTimeout(f"no more of the body for {seconds:g} s, after {len(body)} bytes"))

    try:
        with Watch(seconds, lambda: len(body), stalled):
            while chunk := await content.readany():
                body += chunk
                if len(body) > limit:
                    raise TooLarge(f"the body is larger than the limit of {limit} bytes")
    except ClientPayloadError as error:
        raise BadFrame(f"the body ended after {len(body)} bytes: {error}") from error
    return body


async def write_from(
    request: web.Request, response: web.StreamResponse, views: Sequence[memoryview], seconds: float
) -> None:
    """Answer with ``views``, and return only when the transport no longer refers to any of them.

    asyncio keeps what the socket did not take yet, without copying it since Python 3.12, so the end of ``write`` does
    not mean that a slot may be used again. With the high-water mark at zero, ``drain`` waits for an empty buffer.

    Raises:
        ConnectionError: the client is gone, or took nothing for ``seconds`` and was cut off.
    """
    response.content_length = sum(view.nbytes for view in views)
    writer, transport = await response.prepare(request), request.transport
    if writer is None or transport is None:
        raise ConnectionResetError("the client is gone")
    transport.set_write_buffer_limits(high=0)
    try:
        with Watch(seconds, transport.get_write_buffer_size, transport.abort):
            for view in views:
                await response.write(view)
            await writer.drain()
            await response.write_eof()
    except (ClientError, OSError) as error:
        raise ConnectionResetError("the client is gone") from error
    except asyncio.CancelledError:
        transport.abort()  # half an answer must not look whole, and nothing may refer to the views any more
        raise


def http_error(error: GpuByocError) -> web.Response:
    """The answer for a typed error."""
    response = web.json_response(error.body(), status=error.status)
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(error.retry_after)
    return response
