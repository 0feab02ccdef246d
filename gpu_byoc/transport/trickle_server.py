"""The trickle server: segmented publish and subscribe over HTTP, mountable in any aiohttp application.

============================  ==============================================================================
``POST   {base}{name}``       create a channel; its type is in ``Expect-Content``
``DELETE {base}{name}``       close and forget it
``GET    {base}{name}/next``  the index that is expected next
``POST   {base}{name}/{i}``   publish a segment; -1: the next
``GET    {base}{name}/{i}``   read a segment, from its first byte, as it comes; -1: the next, -2: the newest
``DELETE {base}{name}/{i}``   end a segment
============================  ==============================================================================

Where this differs from go-livepeer's server, and why:

* A publisher that vanishes amid a segment ends it; its readers are not left hanging until the slot is reused.
* While a publisher sends nothing, the server stays silent, too. Interim 100s every 10 s would make Go clients built
  before 1.24 give up after five; nobody needs them. Dead peers are found by TCP keep-alive instead.
* Indices out of range are 400; there they take the connection or the channel down.
* A channel that still gets bytes is not idle, however long its segment.
* ``on_create`` is asked for channels that publishing creates, too: a rule that one can walk around is no rule.
* Segments and channels are bounded; over a bound the publisher gets 413 and the readers are released.
* HEAD is 405 instead of a wait without end.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import web

from gpu_byoc.config import MIB
from gpu_byoc.core.cursor import ABSENT, CLOSED, LATEST, RESET, SEQ
from gpu_byoc.core.trickle import CHANGES, Channel, Limits, Segment, parse_index
from gpu_byoc.errors import BadRequest, ClientError, ConfigError, Unavailable
from gpu_byoc.transport.listen import bind, port_of, serve
from gpu_byoc.transport.trickle_hub import Hub

Hook = Callable[[str, web.Request], Awaitable[None]]
"""Asked before a channel is created or deleted, with its name. A ClientError refuses with its status."""

SWEEP_SECONDS: Final = 60.0
STALL_SECONDS: Final = 30.0
"""A reader that takes nothing for so long is dropped: with it goes the memory of what it has not read."""

_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))
"""A peer that has lost its power is found within two minutes."""

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class TrickleServer:
    """Serve it with ``listen.serve``, or any runner with ``handler_cancellation=True``: that is how a reader that
    disconnects while it waits is noticed at once."""

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        autocreate: bool = False,
        changefeed: bool = False,
        on_create: Hook | None = None,
        on_delete: Hook | None = None,
        sweep: float = SWEEP_SECONDS,
        stall: float = STALL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.hub = Hub(limits, changefeed, clock)
        self._autocreate = autocreate
        self._changefeed = changefeed
        self._on_create = on_create
        self._on_delete = on_delete
        self._sweep = sweep
        self._stall = stall

    def mount(self, app: web.Application, base: str = "/") -> None:
        """Add the routes under ``base``, and the sweep and the shutdown to the application's life."""
        base = "/" + base.strip("/") + "/" if base.strip("/") else "/"
        name, segment = base + "{name}", base + "{name}/{index}"
        app.router.add_routes(
            [
                web.post(name, _answering(self._create)),
                web.delete(name, _answering(self._delete)),
                web.get(name + "/next", _answering(self._next), allow_head=False),
                web.post(segment, _answering(self._publish, close=True)),
                web.get(segment, _answering(self._read), allow_head=False),
                web.delete(segment, _answering(self._release)),
            ]
        )
        app.cleanup_ctx.append(self._life)
        app.on_shutdown.append(self._shut)

    # --- channels

    async def _create(self, request: web.Request) -> web.StreamResponse:
        if self.hub.channel(request.match_info["name"]) is None:
            await self._made(request, request.headers.get("Expect-Content", ""))
        return _empty()

    async def _made(self, request: web.Request, mime: str) -> Channel:
        """A channel that somebody asks for by using it."""
        name = request.match_info["name"]
        if not self._autocreate:
            raise _NotFound("Stream not found")
        if self._on_create:
            await self._on_create(name, request)
        return self.hub.create(name, mime or "application/octet-stream")

    async def _delete(self, request: web.Request) -> web.StreamResponse:
        name = self._writable(request)
        if self.hub.channel(name) is None:
            raise BadRequest("Invalid stream")
        if self._on_delete:
            await self._on_delete(name, request)
        if not self.hub.delete(name):
            raise BadRequest("Invalid stream")
        return _empty()

    async def _next(self, request: web.Request) -> web.StreamResponse:
        latest = str(self._channel(request).next_seq)
        return web.Response(text=latest, headers={LATEST: latest})

    # --- publishing

    async def _publish(self, request: web.Request) -> web.StreamResponse:
        channel = self.hub.channel(self._writable(request))
        if channel is None:
            channel = await self._made(request, request.headers.get("Content-Type", ""))
        segment = channel.publish(parse_index(request.match_info["index"]), bool(request.headers.get(RESET)))
        self.hub.wake()
        _probe(request)
        try:
            wrote = await self._take(request, channel, segment)
        except BaseException:  # a broken body, one over a bound, or cancelled with its connection or the server
            channel.leave(segment)
            self.hub.wake()
            raise
        channel.finish(segment)
        self.hub.wake()
        headers = {SEQ: str(segment.seq)}
        if not wrote and channel.closed:
            headers[CLOSED] = "terminated"
        return _empty(headers, close=not wrote)

    async def _take(self, request: web.Request, channel: Channel, segment: Segment) -> bool:
        """The body into the segment. False if there was none, or the segment ended before it began."""
        data = await self._first(request, segment)
        if not data:
            return False
        while data:
            self.hub.append(channel, segment, data)
            data = await request.content.readany()
        return True

    async def _first(self, request: web.Request, segment: Segment) -> bytes:
        """The first bytes; none if the body ends without, or the segment does. Waits for as long as it takes."""
        first = asyncio.ensure_future(request.content.readany())
        ended = asyncio.ensure_future(self.hub.ended(segment))
        try:
            await asyncio.wait([first, ended], return_when=asyncio.FIRST_COMPLETED)
            return first.result() if first.done() and not segment.ended else b""
        finally:
            for task in (first, ended):
                task.cancel()
            await asyncio.wait([first, ended])
            if not first.cancelled():
                first.exception()  # seen; a body that nobody wants may break

    # --- reading

    async def _read(self, request: web.Request) -> web.StreamResponse:
        channel = self._channel(request)
        raw = request.match_info["index"]
        latest = channel.next_seq
        segment = channel.find(parse_index(raw))
        self.hub.wake()  # a segment that was waited for may have lost its slot to this one
        if segment is None:
            return _text(ABSENT, "Entry not found", headers={LATEST: str(latest), SEQ: raw})
        _probe(request)
        while not segment.chunks and segment.ended is None:
            await self.hub.changed(segment)
        headers = {SEQ: str(segment.seq)}
        if not segment.chunks:
            headers[LATEST] = str(channel.next_seq)
            if channel.closed:
                headers[CLOSED] = "terminated"
            return _empty(headers)
        if segment.seq != latest:
            headers[LATEST] = str(latest)
        response = web.StreamResponse(headers=headers | {"Content-Type": channel.mime})
        await response.prepare(request)
        seen = 0
        try:
            while fresh := await self.hub.fresh(segment, seen):
                seen += len(fresh)
                async with asyncio.timeout(self._stall):
                    await response.write(fresh[0] if len(fresh) == 1 else b"".join(fresh))
        except (ConnectionError, TimeoutError):
            if request.transport is not None:
                request.transport.abort()
        return response

    async def _release(self, request: web.Request) -> web.StreamResponse:
        self._writable(request)
        channel = self._channel(request)
        channel.release(parse_index(request.match_info["index"]))
        self.hub.wake()
        return _empty()

    # --- the rest

    def _channel(self, request: web.Request) -> Channel:
        channel = self.hub.channel(request.match_info["name"])
        if channel is None:
            raise _NotFound("Stream not found")
        return channel

    def _writable(self, request: web.Request) -> str:
        name = request.match_info["name"]
        if self._changefeed and name == CHANGES:
            raise BadRequest(f"{CHANGES} is written by the server alone")
        return name

    async def _life(self, app: web.Application) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(self.hub.sweep(self._sweep))
        yield
        sweeping.cancel()
        await asyncio.wait([sweeping])

    async def _shut(self, app: web.Application) -> None:
        self.hub.close()  # those who wait are answered, so that stopping need not wait for them


def _probe(request: web.Request) -> None:
    """Have the system probe a connection that may stay silent for long."""
    sock = request.transport.get_extra_info("socket") if request.transport else None
    if sock is not None:
        for option, seconds in _KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, seconds)


class _NotFound(ClientError):
    code = "not_found"
    status = 404


def _answering(handler: _Handler, close: bool = False) -> _Handler:
    """Errors as text, as the other servers send them. ``close`` the connection after one: a client that still sends
    its body may not look at the answer before."""

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except (ClientError, Unavailable) as error:
            after = {"Retry-After": str(error.retry_after)} if error.retry_after else None
            return _text(error.status, str(error), close=close, headers=after)
        except (web.RequestPayloadError, ConnectionError):
            return _text(500, "Server error", close=close)

    return answer


def _text(status: int, text: str, close: bool = False, headers: dict[str, str] | None = None) -> web.Response:
    response = web.Response(status=status, text=text.rstrip("\n") + "\n", headers=headers)
    if close:
        response.force_close()
    return response


def _empty(headers: dict[str, str] | None = None, close: bool = False) -> web.Response:
    response = web.Response(headers=headers)
    if close:
        response.force_close()
    return response


@asynccontextmanager
async def serving(
    server: TrickleServer, host: str = "127.0.0.1", port: int = 0, base: str = "/"
) -> AsyncIterator[tuple[str, int]]:
    """A trickle server alone on a port (0: a free one), for the time of the block; gives its URL, which ends in ``/``,
    and its port. Raises PortInUse or ConfigError."""
    app = web.Application()
    server.mount(app, base)
    sock = bind(host, port)
    try:
        runner = await serve(app, sock, shutdown=1.0)
    except BaseException:  # also a cancel: nobody else closes it
        sock.close()
        raise
    try:
        shown = f"[{host}]" if ":" in host else host
        path = base.strip("/") + "/" if base.strip("/") else ""
        yield f"http://{shown}:{port_of(sock)}/{path}", port_of(sock)
    finally:
        await runner.cleanup()


def main(argv: Sequence[str]) -> int:
    """``gpu-byoc trickle``: serve until SIGTERM or SIGINT."""
    limits = Limits()
    parser = argparse.ArgumentParser(
        prog="gpu-byoc trickle",
        allow_abbrev=False,
        description="A trickle server: segmented publish and subscribe over HTTP. There is no authentication: who "
        "knows a channel's name may read, write and delete it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=3389, help="port, 0 takes a free one")
    parser.add_argument("--base-path", default="/", help="path under which the channels are")
    parser.add_argument("--autocreate", action="store_true", help="create channels for who posts to them")
    parser.add_argument("--changefeed", action="store_true", help=f"say on {CHANGES} which channels come and go")
    parser.add_argument("--max-segment-mb", type=int, default=limits.segment // MIB, help="largest segment")
    parser.add_argument(
        "--max-channel-mb", type=int, default=limits.channel // MIB, help="largest sum of a channel's five segments"
    )
    given = parser.parse_args(argv)
    if not 1 <= given.max_segment_mb <= given.max_channel_mb:
        raise ConfigError("--max-segment-mb must be at least 1, and --max-channel-mb at least as much")
    if not 0 <= given.port <= 65535:
        raise ConfigError(f"--port {given.port} is not a port; 1 to 65535, or 0 for a free one")
    limits = Limits(segment=given.max_segment_mb * MIB, channel=given.max_channel_mb * MIB)
    server = TrickleServer(limits, autocreate=given.autocreate, changefeed=given.changefeed)
    asyncio.run(_until_told(server, given.host, given.port, given.base_path))
    return 0


async def _until_told(server: TrickleServer, host: str, port: int, base: str) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with serving(server, host, port, base) as (url, _):
        print(f"trickle server on {url}", flush=True)
        await stop.wait()
