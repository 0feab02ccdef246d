"""A trickle server on loopback, and a client that speaks HTTP byte by byte, for what proper clients would not do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from gpu_byoc.transport.trickle_client import open_session
from gpu_byoc.transport.trickle_hub import Hub
from gpu_byoc.transport.trickle_server import TrickleServer, serving

SILENCE = 0.05
"""How long nothing must come for "nothing comes"."""


@dataclass
class Wire:
    """One connection. Every wait ends after ten seconds at the latest."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%s\r\n" % (len(data), data))

    async def end(self) -> None:
        await self.send(b"0\r\n\r\n")

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers (lower case) of an answer."""
        async with asyncio.timeout(10):
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        fields = (line.partition(":") for line in lines[1:] if line)
        return int(lines[0].split()[1]), {name.lower(): value.strip() for name, _, value in fields}

    async def part(self) -> bytes:
        """One chunk of a chunked body, the last one empty."""
        async with asyncio.timeout(10):
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            return (await self.reader.readexactly(size + 2))[:-2]

    async def body(self, headers: dict[str, str]) -> bytes:
        if "content-length" in headers:
            async with asyncio.timeout(10):
                return await self.reader.readexactly(int(headers["content-length"]))
        parts = []
        while part := await self.part():
            parts.append(part)
        return b"".join(parts)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        status, headers = await self.head()
        return status, headers, await self.body(headers)

    async def silent(self) -> bool:
        """Whether nothing comes for a while, and the connection stays open."""
        try:
            async with asyncio.timeout(SILENCE):
                return await self.reader.read(1) is None
        except TimeoutError:
            return True

    async def over(self) -> bool:
        """Whether the other side closes; bytes before that do not count."""
        try:
            async with asyncio.timeout(10):
                while await self.reader.read(65536):
                    pass
        except ConnectionError:
            pass
        except TimeoutError:
            return False
        return True

    def drop(self) -> None:
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Running:
    server: TrickleServer
    url: str
    port: int
    base: str
    session: aiohttp.ClientSession
    clock: Clock
    wires: list[Wire] = field(default_factory=list)

    @property
    def hub(self) -> Hub:
        return self.server.hub

    async def connect(self) -> Wire:
        wire = Wire(*await asyncio.open_connection("127.0.0.1", self.port))
        self.wires.append(wire)
        return wire

    async def start(self, method: str, path: str, **headers: str) -> Wire:
        """A request on a connection of its own; a POST has a chunked body, which is to be sent."""
        wire = await self.connect()
        lines = [f"{method} {self.base}{path} HTTP/1.1", "Host: trickle"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        lines += ["Transfer-Encoding: chunked"] if method == "POST" else []
        await wire.send(("\r\n".join(lines) + "\r\n\r\n").encode())
        return wire

    async def post(self, path: str, *chunks: bytes, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """A whole POST."""
        wire = await self.start("POST", path, **headers)
        for chunk in chunks:
            await wire.chunk(chunk)
        await wire.end()
        return await wire.answer()

    async def call(self, method: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """A whole GET or DELETE."""
        return await (await self.start(method, path, **headers)).answer()

    async def next_is(self, name: str) -> int:
        status, headers, body = await self.call("GET", f"{name}/next")
        assert (status, headers["lp-trickle-latest"]) == (200, body.decode())
        return int(body)

    async def waiting(self, count: int) -> None:
        """Return when so many wait for segments."""
        async with asyncio.timeout(10):
            while self.hub.waiting != count:  # noqa: ASYNC110 - waiters are counted, not announced
                await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def running(*channels: str, base: str = "/", mime: str = "video/MP2T", **options: Any) -> AsyncIterator[Running]:
    """A server with these channels. It is on its way out when the block ends, without an open connection of ours."""
    clock = Clock()
    server = TrickleServer(clock=clock, **options)
    for name in channels:
        server.hub.create(name, mime)
    async with serving(server, base=base) as (url, port), open_session() as session:
        at = Running(server, url, port, "/" + url.split("/", 3)[3], session, clock)
        try:
            yield at
        finally:
            for wire in at.wires:
                await wire.close()


@contextlib.asynccontextmanager
async def scripted(script: Callable[[str, str, Wire], Awaitable[None]]) -> AsyncIterator[str]:
    """A server that answers each request as ``script(method, path, wire)`` writes it, and closes the connection.
    Gives its URL. An error in the script fails the test."""
    failures: list[BaseException] = []
    running: set[asyncio.Task[None]] = set()

    async def handle(wire: Wire) -> None:
        try:
            head = await wire.reader.readuntil(b"\r\n\r\n")
            method, path, _ = head.decode().split("\r\n")[0].split(" ")
            await script(method, path, wire)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went away
        except Exception as error:
            failures.append(error)
        finally:
            await wire.close()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        running.add(asyncio.create_task(handle(Wire(reader, writer))))

    listener = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/c"
    finally:
        listener.close()
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
        await listener.wait_closed()
    if failures:
        raise failures[0]


def reply(status: int, body: bytes = b"", **headers: str | int) -> bytes:
    """A whole answer. ``Lp_Trickle_Seq=3`` is a header."""
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body
