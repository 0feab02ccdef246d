"""The one road of a job's bytes, shared by gateway and orchestrator: request in, next hop, answer back.

Both ways at once and piece by piece: a frame is never held as a whole, except by the gateway, which keeps what it has
sent on until it knows that it will not have to send it to another orchestrator.
"""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Final

from aiohttp import web

from gpu_byoc.errors import BadRequest, GpuByocError, TooLarge
from gpu_byoc.local.http1 import AnswerHead, Malformed
from gpu_byoc.local.upstream import Connection, Origin, Pool
from gpu_byoc.transport.listen import widen

ROUTE: Final = "/live/video-to-video"

RELAYED: Final = ("Content-Type", "Content-Encoding", "X-Metadata", "Server-Timing", "Retry-After", "X-Job-Id")
"""Headers of an answer that travel back to the client, beside Content-Length. Content-Type keeps its parameters:
width, height and format of a frame are in there."""


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


class BrokenOff(Exception):
    """The next hop failed after the head of its answer had been sent on to the client."""


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

    ``async with``; whoever moves bytes calls ``moved``. Raises Stalled out of the block. One timer that is armed again
    only when it fires, because a timer a piece would cost as much as the piece.
    """

    __slots__ = ("_handle", "_last", "_loop", "_seconds", "_timeout", "answering", "phase")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._timeout = asyncio.timeout(None)
        self._handle: asyncio.TimerHandle | None = None
        self._last = 0.0
        self.phase = "answer"
        self.answering = False

    def moved(self) -> None:
        self._last = self._loop.time()

    async def __aenter__(self) -> Progress:
        await self._timeout.__aenter__()
        self._last = self._loop.time()
        self._handle = self._loop.call_later(self._seconds, self._check)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.cancel()
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError as stalled:
            raise Stalled(self.phase, self.answering, self._seconds) from stalled

    def _check(self) -> None:
        now = self._loop.time()
        if now - self._last >= self._seconds:
            self._handle = None
            self._timeout.reschedule(now)
        else:
            self._handle = self._loop.call_at(self._last + self._seconds, self._check)


class Body:
    """A request's body. ``piece(0)``, ``piece(1)`` ... b"" at its end.

    With ``keep`` pieces can be asked for again, for another attempt; without it each is asked for once, in order.
    Raises what ended it: TooLarge, BadRequest (broken encoding), ClientGone.
    """

    __slots__ = ("_content", "_ended", "_keep", "_kept", "_limit", "_size", "error", "length")

    def __init__(self, request: web.BaseRequest, limit: int, keep: bool = False) -> None:
        widen(request.transport)
        self._content = request.content
        self._limit = limit
        self._keep = keep
        self._kept: list[bytes] = []
        self._size = 0
        self._ended = False
        self.error: GpuByocError | ClientGone | None = None
        self.length = request.content_length  # None for a chunked body
        if self.length is not None and self.length > limit:
            raise too_large(limit)

    async def piece(self, index: int) -> bytes:
        if index < len(self._kept):
            return self._kept[index]
        if self._ended:
            return b""
        try:
            data, _ = await self._content.readchunk()
            while not data and not self._content.at_eof():  # the end of an HTTP chunk comes as an empty piece
                data, _ = await self._content.readchunk()
        except web.RequestPayloadError as error:
            self.error = BadRequest(f"the request's body cannot be read: {error}")
            raise self.error from error
        except (OSError, asyncio.IncompleteReadError) as error:
            self.error = ClientGone("the client went away in the middle of its request")
            raise self.error from error
        self._size += len(data)
        if self._size > self._limit:
            self.error = too_large(self._limit)
            raise self.error
        if not data:
            self._ended = True
        elif self._keep:
            self._kept.append(data)
        return data


def too_large(limit: int) -> TooLarge:
    return TooLarge(f"the request's body is larger than the limit of {limit} bytes; send fewer frames at a time")


class Exchange:
    """One request to the next hop: ``start``, ``head``, ``send_back`` or ``read`` to the end; ``finish`` in any case.

    The body is sent while it arrives and while the answer is read; ``finish`` joins that, gives the connection back if
    the exchange is complete and drops it if not. Failures of the next hop are OSError or Malformed; those of the
    request's body are the body's own.
    """

    __slots__ = ("_body", "_connection", "_origin", "_pool", "_progress", "_upload", "ended")

    def __init__(self, pool: Pool, origin: Origin, body: Body, progress: Progress) -> None:
        self.ended: float | None = None  # time.perf_counter() when the answer had been read to its end
        self._pool = pool
        self._origin = origin
        self._body = body
        self._progress = progress
        self._connection: Connection | None = None
        self._upload: asyncio.Task[None] | None = None

    async def start(self, headers: list[tuple[str, str]]) -> None:
        """Connect and begin to send. OSError here means that the next hop has seen nothing of the job."""
        self._connection = await self._pool.acquire(self._origin)
        self._connection.begin(self._request_head(headers))
        self._upload = asyncio.create_task(self._send(self._connection))

    async def head(self) -> AnswerHead:
        assert self._connection is not None
        try:
            head = await self._connection.head()
        except (OSError, Malformed):
            if self._body.error is not None:
                raise self._body.error from None
            raise
        self._progress.moved()
        return head

    async def read(self) -> bytes:
        """The next piece of the answer, b"" at its end."""
        assert self._connection is not None
        self._progress.phase = "answer"
        piece = await self._connection.read()
        self._progress.moved()
        if not piece:
            self.ended = time.perf_counter()
        return piece

    async def send_back(
        self, request: web.BaseRequest, head: AnswerHead, extra: dict[str, str] | None = None
    ) -> web.StreamResponse:
        """Stream the answer to the client. Raises BrokenOff or ClientGone; the caller must then ``hang_up``."""
        response = web.StreamResponse(status=head.status, headers=extra)
        headers = response.headers
        for name in RELAYED:
            if (value := head.headers.get(name.lower())) is not None:
                headers[name] = value
        if head.length is not None and head.status != 204:
            response.content_length = head.length
        self._progress.answering = True
        try:
            await response.prepare(request)
            while piece := await self._rest():
                self._progress.phase = "reader"
                await response.write(piece)
        except OSError as error:
            raise ClientGone("the client went away in the middle of its answer") from error
        return response

    async def _rest(self) -> bytes:
        try:
            return await self.read()
        except (OSError, Malformed) as error:
            raise BrokenOff(f"the answer broke off: {error}") from error

    async def finish(self) -> None:
        if self._connection is None:
            return
        connection, self._connection = self._connection, None
        upload = self._upload
        if upload is not None and not upload.done():
            # The answer came before the body was sent, or this attempt is over. What is on its way cannot be called
            # back, so the connection cannot be used again either.
            upload.cancel()
            connection.close()
            await asyncio.wait([upload])
        self._pool.release(self._origin, connection)
        if upload is not None and not upload.cancelled() and (bug := upload.exception()) is not None:
            raise bug

    def _request_head(self, headers: list[tuple[str, str]]) -> bytes:
        length = self._body.length
        framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
        lines = [f"POST {self._origin.prefix}{ROUTE} HTTP/1.1", f"Host: {self._origin.netloc}", framing]
        lines += [f"{name}: {value}" for name, value in headers]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8")

    async def _send(self, connection: Connection) -> None:
        body, progress = self._body, self._progress
        chunked = body.length is None
        index = 0
        try:
            progress.phase = "body"
            while piece := await body.piece(index):
                index += 1
                progress.phase = "answer"
                await connection.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
                progress.moved()
                progress.phase = "body"
            if chunked:
                await connection.write(b"0\r\n\r\n")
            progress.phase = "answer"
            progress.moved()
        except (GpuByocError, ClientGone, OSError):
            # Wakes ``head`` or ``read``, which raise what happened: the body's error if it has one.
            connection.close()
        except Exception:
            connection.close()  # a bug of ours: do not leave ``head`` waiting; ``finish`` raises it
            raise


def hang_up(request: web.BaseRequest) -> web.StreamResponse:
    """Reset the client's connection, because the answer on it cannot be completed.

    It must not end like a complete one. Returns what a handler has to return; none of it is sent.
    """
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def refusal(error: GpuByocError, extra: dict[str, str] | None = None) -> web.Response:
    """The JSON answer for one of our own errors."""
    headers = dict(extra or {})
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    return web.json_response(error.body(), status=error.status, headers=headers)


def capability_of(request: web.BaseRequest) -> str:
    """The capability that a job asks for. Raises BadRequest."""
    name = request.headers.get("X-Model-Id", "").strip()
    if not name:
        raise BadRequest("the header X-Model-Id is missing: it names the capability, for example green-tint-cpu")
    if not name.isprintable():
        raise BadRequest("the header X-Model-Id has characters that cannot be printed")
    return name


def content_type(request: web.BaseRequest) -> tuple[str, str]:
    """The request's Content-Type as it came, parameters included."""
    value = request.headers.get("Content-Type", "application/octet-stream")
    return "Content-Type", value if value.isprintable() else "application/octet-stream"
