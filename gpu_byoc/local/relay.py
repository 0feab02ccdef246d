"""The one road of a job's bytes, shared by gateway and orchestrator: request in, next hop, answer back.

Both ways at once and piece by piece: a frame is never held as a whole, except by the gateway, which keeps what it has
sent on until it knows that it will not have to send it to another orchestrator.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import web

from gpu_byoc.errors import BodyTimeout, GpuByocError, NetworkError
from gpu_byoc.local.http1 import AnswerHead, Malformed
from gpu_byoc.local.intake import Body, ClientGone
from gpu_byoc.local.progress import Progress, Stalled
from gpu_byoc.local.upstream import Connection, Origin, Pool

log = logging.getLogger(__name__)

ROUTE: Final = "/live/video-to-video"

RELAYED: Final = ("Content-Type", "Content-Encoding", "X-Metadata", "Server-Timing", "Retry-After", "X-Job-Id")
"""Headers of an answer that travel back to the client, beside Content-Length. Content-Type keeps its parameters:
width, height and format of a frame are in there."""

CLIENT_GONE: Final = "client_gone"
CLIENT_GONE_STATUS: Final = 499  # what nginx writes for a client that closed


class BrokenOff(Exception):
    """The answer cannot be completed, and its head has gone out to the client. ``because`` says whose fault it is."""

    def __init__(self, because: GpuByocError) -> None:
        super().__init__(str(because))
        self.because = because


class Exchange:
    """One request to the next hop: ``start``, ``head``, ``send_back`` or ``read`` to the end; ``finish`` in any case.

    The body is sent while it arrives and while the answer is read; ``finish`` joins that, gives the connection back if
    the exchange is complete and drops it if not. Failures of the next hop are OSError or Malformed, in ``send_back``
    BrokenOff because of ``gone``; those of the request's body are the body's own, and come first: a body that fails
    closes the connection, and the next hop is not to be blamed for that.
    """

    __slots__ = ("_body", "_connection", "_gone", "_origin", "_pool", "_progress", "_upload")

    def __init__(self, pool: Pool, origin: Origin, body: Body, progress: Progress, gone: type[NetworkError]) -> None:
        self._pool = pool
        self._origin = origin
        self._body = body
        self._progress = progress
        self._gone = gone
        self._connection: Connection | None = None
        self._upload: asyncio.Task[None] | None = None

    @property
    def ended(self) -> float | None:
        """time.perf_counter() when the whole answer had come in, read or not; None before that and after finish."""
        return self._connection.answered if self._connection is not None else None

    async def start(self, headers: list[tuple[str, str]]) -> None:
        """Connect and begin to send. OSError here means that the next hop has seen nothing of the job."""
        self._connection = await self._pool.acquire(self._origin)
        self._connection.begin(self._request_head(headers))
        self._upload = asyncio.create_task(self._send(self._connection))

    async def head(self) -> AnswerHead:
        assert self._connection is not None
        try:
            head = await self._connection.head()
        except (OSError, Malformed) as error:
            raise self._body.error or error from None
        self._progress.moved()
        return head

    async def read(self) -> bytes:
        """The next piece of the answer, b"" at its end."""
        assert self._connection is not None
        try:
            piece = await self._connection.read()
        except (OSError, Malformed) as error:
            raise self._body.error or error from None
        self._progress.moved()
        return piece

    async def send_back(
        self,
        request: web.BaseRequest,
        head: AnswerHead,
        extra: dict[str, str] | None = None,
        whole: Callable[[], Awaitable[None]] | None = None,
    ) -> web.StreamResponse:
        """Stream the answer to the client. Raises BrokenOff or ClientGone; the caller must then ``hang_up``.

        ``whole`` is awaited once, when all of it has come in and before the client has the end of it.
        """
        response = web.StreamResponse(status=head.status, headers=extra)
        headers = response.headers
        for name in RELAYED:
            if (value := head.headers.get(name.lower())) is not None:
                headers[name] = value
        if head.length is not None and head.status != 204:
            response.content_length = head.length
        progress = self._progress
        progress.answering = True
        try:
            await response.prepare(request)
            while piece := await self._rest():
                assert self._connection is not None
                if whole is not None and self._connection.drained:
                    await whole()
                    whole = None
                progress.to_client = True
                await response.write(piece)
                progress.to_client = False
                progress.moved()
            if whole is not None:
                await whole()
        except OSError as error:
            raise ClientGone("the client went away in the middle of its answer") from error
        return response

    async def _rest(self) -> bytes:
        try:
            return await self.read()
        except GpuByocError as error:
            raise BrokenOff(error) from error
        except (OSError, Malformed) as error:
            raise BrokenOff(self._gone(f"{self._origin.url} broke its answer off: {error}")) from error

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
        """Send the body; it sees to it that it is as long as was announced."""
        body, progress = self._body, self._progress
        chunked = body.length is None
        index = 0
        try:
            progress.from_client = True
            while piece := await body.piece(index):
                index += 1
                progress.from_client = False
                await connection.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
                progress.moved()
                progress.from_client = True
            progress.from_client = False
            progress.moved()
            if chunked:
                await connection.write(b"0\r\n\r\n")
                progress.moved()
        except (GpuByocError, ClientGone, OSError):
            # Wakes ``head`` or ``read``, which raise what happened: the body's error if it has one.
            connection.close()
        except Exception:  # a bug of ours: do not leave ``head`` waiting; ``finish`` raises it
            connection.close()
            raise


class Road:
    """The way to the next hop: connections, patience (see Progress), and what it is called when it fails there.

    ``silent`` is raised when the next hop lets nothing be heard of it, ``gone`` when it breaks off.
    """

    def __init__(
        self, pool: Pool, stall: float, answer: float, silent: type[NetworkError], gone: type[NetworkError]
    ) -> None:
        self._pool = pool
        self._stall = stall
        self._answer = answer
        self._silent = silent
        self._gone = gone

    @asynccontextmanager
    async def exchange(self, origin: Origin, body: Body) -> AsyncIterator[Exchange]:
        """An exchange that is finished when the block ends.

        Raises, beside what the exchange does: BodyTimeout, ``silent``, or BrokenOff because of one of them; ClientGone
        for a client that stopped reading.
        """
        try:
            async with Progress(self._stall, self._answer) as progress:
                exchange = Exchange(self._pool, origin, body, progress, self._gone)
                try:
                    yield exchange
                finally:
                    await exchange.finish()
        except Stalled as stalled:
            if stalled.phase == "reader":
                raise ClientGone(f"the client stopped reading its answer: {stalled}") from stalled
            error: GpuByocError
            if stalled.phase == "body":
                error = BodyTimeout(f"the request's body stopped: {stalled}")
            else:
                error = self._silent(f"{origin.url} does not answer: {stalled}")
            raise BrokenOff(error) if stalled.answering else error from stalled


class Ending:
    """How a job ended: its ``outcome`` in a word, and the ``status`` that the client got, or would have got."""

    __slots__ = ("outcome", "status")

    def __init__(self) -> None:
        self.outcome = "internal"
        self.status = 500


async def conclude(
    request: web.BaseRequest, work: Awaitable[web.StreamResponse], ending: Ending, extra: dict[str, str] | None = None
) -> web.StreamResponse:
    """Await a job's work. Each way in which it can fail becomes an answer or a hang-up, and is told to ``ending``;
    for a success the work does that itself."""
    try:
        return await work
    except GpuByocError as error:
        ending.outcome, ending.status = error.code, error.status
        return refusal(error, extra)
    except BrokenOff as error:
        log.warning("an answer could not be completed: %s", error)
        ending.outcome, ending.status = error.because.code, error.because.status
        return hang_up(request)
    except ClientGone:
        ending.outcome, ending.status = CLIENT_GONE, CLIENT_GONE_STATUS
        return hang_up(request)
    except asyncio.CancelledError:  # the server's way to say that the client has closed its connection
        ending.outcome, ending.status = CLIENT_GONE, CLIENT_GONE_STATUS
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
