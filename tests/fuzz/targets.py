"""What is fuzzed: each class takes one input at a time, says in a few words how it behaved, raises what must not be.

Nothing here connects to anything but its own servers on loopback: an address in an input is never dialled.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, cast

import aiohttp
import numpy as np
import psutil

from gpu_byoc.bridge import ToLoop
from gpu_byoc.config import EngineConfig, SecurityConfig
from gpu_byoc.core import cursor, origins
from gpu_byoc.core.cursor import Backoff
from gpu_byoc.core.trickle import Limits
from gpu_byoc.errors import BadFrame, BadParams, BadRequest, DecoderFailed, GpuByocError, TooLarge
from gpu_byoc.frames import FrameSpec
from gpu_byoc.local import offer
from gpu_byoc.local.http1 import AnswerParser, Malformed
from gpu_byoc.local.metadata import amount, read_object
from gpu_byoc.local.tokens import TokenBook
from gpu_byoc.media import demux, sandbox
from gpu_byoc.media import sandbox_wire as wire
from gpu_byoc.media.audio import AudioPacket
from gpu_byoc.media.decode import Frame, Reader, StreamReader, VideoInfo
from gpu_byoc.media.encode import Encoder, EncoderSettings
from gpu_byoc.media.planes import Colour, ToSlot
from gpu_byoc.processors.green_tint import GreenTint
from gpu_byoc.transport.trickle_client import Publisher, Subscriber, open_session
from gpu_byoc.worker.outlet import Departure, Outlet
from gpu_byoc.worker.streamparams import given_urls, parse_stream_params
from tests.local import kit
from tests.support import streams, trickle, workers

REST = 10.0
"""Seconds within which everything that an input began has to be over."""


class Target(Protocol):
    def run(self, data: bytes) -> str: ...

    def close(self) -> None: ...


class Wrong(Exception):
    """Something that must not be, told by the target itself."""


def words(counts: Counter[str]) -> str:
    """Which words, and how many of each by powers of two: a coarse summary, so that few inputs are new."""
    return " ".join(f"{word}{count.bit_length()}" for word, count in sorted(counts.items()))


# --- the transport stream


class _Sink:
    """Where a pump's output would go."""

    def __init__(self) -> None:
        self.nbytes = 0

    def put(self, item: Departure, weight: int) -> None:
        self.nbytes += weight


class TransportStream:
    """Bytes of a live stream on the way in: demultiplexed, decoded, put into slots; and its sound on the way out."""

    def run(self, data: bytes) -> str:
        seen = Counter[str]()
        step = (188, 1316, 4096, 65536)[len(data) % 4]
        parts: list[bytes | None] = [data[at : at + step] for at in range(0, len(data), step)]
        parts.insert(len(parts) * 2 // 3, None)
        limits = demux.Limits()
        self._through(StreamReader(limits), [*parts, b""], limits, 4 * len(data), seen)
        return words(seen)

    def _through(
        self, reader: Reader, parts: list[bytes | None], limits: demux.Limits, most: int, seen: Counter[str]
    ) -> None:
        """``parts`` into the reader, its events on the way out. None ends a segment, b"" is the end; ``most`` bytes of
        sound may come of it, and some."""
        sink, last = _Sink(), -(1 << 70)
        outlet = Outlet("libx264", cast("ToLoop[Departure]", sink), lambda what, *more: seen.update([what]))
        for part in parts:
            events = reader.end_segment() if part is None else reader.feed(part) if part else reader.finish()
            for event in events:
                seen[type(event).__name__] += 1
                if isinstance(event, Frame):
                    if event.pts <= last:
                        raise Wrong(f"PTS {event.pts} after {last}")
                    last = event.pts
                    self._write(event, limits, seen)
                elif isinstance(event, AudioPacket):
                    outlet.audio(event)
                    outlet.send()
                elif isinstance(event, demux.Problem):
                    if event.reason not in wire.REASONS | {"decoder"} or not event.detail.isprintable():
                        raise Wrong(f"a problem of the kind {event.reason!r}: {event.detail!r:.200}")
                    seen[event.reason] += 1
                elif isinstance(event, VideoInfo):
                    seen[f"{event.codec}-{event.format}"] = 1
                    self._info = event
        outlet.finish()
        if sink.nbytes > most + (1 << 20):
            raise Wrong(f"{sink.nbytes} bytes of sound")

    def _write(self, frame: Frame, limits: demux.Limits, seen: Counter[str]) -> None:
        width, height = frame.picture.width, frame.picture.height
        if width * height > limits.max_pixels or max(width, height) > limits.max_side:
            raise Wrong(f"a picture of {width}x{height}")
        spec = FrameSpec(max(2, width & ~1), max(2, height & ~1), "rgb24")
        try:
            ToSlot(spec).write(frame.picture, memoryview(bytearray(spec.nbytes)))
        except (BadFrame, TooLarge) as error:
            seen[error.code] += 1

    def close(self) -> None:
        pass


class Possessed(sandbox.Cell):
    """A process for decoding that says the input, whatever it is asked, and reads nothing until it has said all."""

    def __init__(self, data: bytes) -> None:
        self.sock, self._theirs = socket.socketpair()
        self.memory = np.arange(wire.room(SANDBOXED), dtype=np.uint32).view(np.uint8)[: wire.room(SANDBOXED)]
        self.walls = None
        self._thread = threading.Thread(target=self._speak, args=(data,))
        self._thread.start()

    def _speak(self, data: bytes) -> None:
        with contextlib.suppress(OSError), self._theirs:  # the worker has had enough
            self._theirs.sendall(data)
            self._theirs.shutdown(socket.SHUT_WR)
            while self._theirs.recv(65536):
                pass

    def end(self) -> None:
        self.sock.close()
        self._thread.join(REST)
        if self._thread.is_alive():
            raise Wrong("the worker has not let go of it")

    def _how_it_ended(self) -> str:
        return "it has said all"


SANDBOXED = demux.Limits(max_pixels=96 * 96, max_side=2048)


class Sandbox(TransportStream):
    """What a process that was taken over says to the worker about a stream, again and again; and what it then has for
    pictures and sounds, on their way out."""

    def __init__(self) -> None:
        vars(sandbox)["HANG_SECONDS"] = vars(sandbox)["START_SECONDS"] = 0.2
        self._said, self._process = b"", psutil.Process()
        vars(sandbox)["Cell"] = lambda limits: Possessed(self._said)

    def run(self, data: bytes) -> str:
        seen, self._said = Counter[str](), data
        self._coded: tuple[Colour, Fraction | None] | None = None
        files = self._process.num_fds()
        reader = sandbox.SandboxedReader(SANDBOXED, lambda pts: seen.update(["picture"]))
        try:
            self._through(reader, [b"a", None, b"b", b""], SANDBOXED, 40 * len(data), seen)
        except DecoderFailed as error:
            seen[error.code] += 1
        finally:
            reader.close()
        if self._process.num_fds() != files:
            raise Wrong("files are left open")
        return words(seen)

    def _write(self, frame: Frame, limits: demux.Limits, seen: Counter[str]) -> None:
        """Also coded again, once for each kind of picture."""
        super()._write(frame, limits, seen)
        kind = Colour.of(frame.picture), self._info.aspect
        if kind != self._coded:
            self._coded = kind
            encoder = Encoder(FrameSpec(32, 32), colour=kind[0], aspect=kind[1], settings=EncoderSettings("libx264"))
            seen["coded"] += len([*encoder.encode(memoryview(bytes(32 * 32 * 3)), frame.pts), *encoder.flush()])


# --- what is parsed without a server


class Params:
    """Start requests, parameters, offers, tokens' notes: JSON of any kind into what reads it."""

    def run(self, data: bytes) -> str:
        seen = Counter[str]()
        notes = read_object(data)
        for value in notes.values():
            seen["amount" if amount(value) is not None else "none"] += 1
        try:
            offer.read_offer(data)
        except BadRequest:
            seen["offer-refused"] += 1
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return words(seen + Counter(bad=1))
        given = value.get("params") if isinstance(value, dict) else value
        readers: dict[str, Callable[[], object]] = {
            "params": lambda: parse_stream_params(GreenTint(), given),
            "urls": lambda: self._urls(value),
        }
        for what, parse in readers.items():
            if what == "urls" and not isinstance(value, dict):
                continue
            try:
                seen[what + type(parse()).__name__] += 1
            except (BadParams, BadRequest) as error:
                seen[f"{what}-{getattr(error, 'field', '')[:12]}"] += 1
                json.dumps(error.body())
        return words(seen)

    def _urls(self, body: dict[str, Any]) -> dict[str, str]:
        urls = given_urls(body)
        for field, url in urls.items():
            try:
                origins.parse(url)
            except ValueError as error:
                raise BadParams(field, str(error)) from error
        return urls

    def close(self) -> None:
        pass


class Answers:
    """The relay's reader of answers: the same however an answer is cut into pieces."""

    def run(self, data: bytes) -> str:
        whole = self._read([data])
        if len(data) < 3000:
            pieces = self._read([data[at : at + 1] for at in range(len(data))])
        else:
            pieces = self._read([data[at : at + 509] for at in range(0, len(data), 509)])
        if whole != pieces:
            raise Wrong(f"{whole!r:.300} as a whole, {pieces!r:.300} in pieces")
        return str(whole[0])

    def _read(self, pieces: list[bytes]) -> tuple[str, bytes]:
        parser, body = AnswerParser(), b""
        try:
            for piece in pieces:
                body += b"".join(parser.feed(piece))
            parser.eof()
        except Malformed as error:
            return f"malformed {str(error)[:25]}", b""
        head = parser.head
        assert head is not None
        assert parser.done
        if head.length is not None and len(body) != head.length:
            raise Wrong(f"{len(body)} bytes of a body of {head.length}")
        return f"{head.status // 100} {head.length is None}", body

    def close(self) -> None:
        pass


# --- servers


class _Log(logging.Handler):
    """What is logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(logging.Formatter("%(name)s: %(message)s").format(record))


class _Loop:
    """A target with an event loop, which lives as long as it does. What is logged as an error is wrong."""

    def __init__(self) -> None:
        self._log = _Log()
        logging.getLogger().addHandler(self._log)
        self._runner = asyncio.Runner()
        self._stack = contextlib.AsyncExitStack()
        self._runner.get_loop().set_exception_handler(lambda _, context: self._log.lines.append(str(context)))
        self._runner.run(self.open())

    async def open(self) -> None:
        raise NotImplementedError

    async def check(self, data: bytes) -> str:
        raise NotImplementedError

    def run(self, data: bytes) -> str:
        said = self._runner.run(self.check(data))
        if self._log.lines:
            lines, self._log.lines = self._log.lines, []
            raise Wrong("\n".join(lines)[-2500:])
        return said

    def close(self) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.close()
        logging.getLogger().removeHandler(self._log)


async def exchange(port: int, data: bytes, patience: float) -> bytes:
    """Send, read what comes until nothing does, and drop the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got = b""
    try:
        writer.write(data)
        while len(got) < 1 << 20:
            async with asyncio.timeout(patience):
                chunk = await reader.read(1 << 16)
            if not chunk:
                break
            got += chunk
    except (ConnectionError, TimeoutError):
        pass
    finally:
        writer.transport.abort()
        await asyncio.sleep(0)
    return got


def statuses(got: bytes) -> list[bytes]:
    return re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", got)


AIOHTTP = b"Server got itself in trouble"
"""What aiohttp answers for its own failures and for ours; those that are ours it logs, which is found there."""


def behaviour(got: bytes) -> str:
    codes = re.findall(rb'"error": "([a-z_]+)"', got)
    found = Counter(code.decode() for code in [*statuses(got), *codes])
    return words(found)


async def at_rest(condition: Callable[[], bool], what: Callable[[], object]) -> None:
    until = time.monotonic() + REST
    while not condition():
        if time.monotonic() > until:
            raise Wrong(f"not over after {REST:g} s: {what()}")
        await asyncio.sleep(0.001)


class WorkerRequests(_Loop):
    """Raw requests to a worker: jobs of all kinds, streams' calls, the rest."""

    async def open(self) -> None:
        security = SecurityConfig(allow_origins=("http://127.0.0.1:1",))  # where nobody listens
        engine = EngineConfig(slots=8, max_batch=4, memory=64 << 20)
        fields: dict[str, Any] = {"body_timeout": 2.0, "job_timeout": 5.0, "max_body": 1 << 20, "max_pixels": 1 << 20}
        made = workers.running(GreenTint(), engine, security=security, max_collected=4 << 20, slot_wait=0.1, **fields)
        self.worker = await self._stack.enter_async_context(made)

    async def check(self, data: bytes) -> str:
        got = await exchange(self.worker.port, data, 0.08)
        if b"500" in statuses(got) and AIOHTTP not in got:
            raise Wrong(got[-1500:].decode(errors="replace"))
        worker = self.worker.worker
        await worker.streams.close(0)
        await at_rest(
            lambda: worker.active == 0 and worker.budget.used == 0 and self.worker.free() == 0,
            lambda: (worker.active, worker.budget.used, self.worker.free()),
        )
        status, _, body = await self.worker.post(bytes(range(12)))
        if status != 200 or len(body) != 12:
            raise Wrong(f"the next job is answered with {status}: {body!r}")
        return behaviour(got)


class TrickleRequests(_Loop):
    """Raw requests to a trickle server with a channel ``s`` that has three segments."""

    async def open(self) -> None:
        limits = Limits(segment=1 << 20, channel=2 << 20, channels=16)
        self.server = await self._stack.enter_async_context(trickle.running(limits=limits, autocreate=True))

    async def check(self, data: bytes) -> str:
        hub = self.server.hub
        hub.create("s", "video/MP2T")
        for number in range(3):
            hub.write("s", bytes([number]) * 50)
        got = await exchange(self.server.port, data.replace(b"/BASE/", self.server.base.encode()), 0.03)
        if b"500" in statuses(got) and AIOHTTP not in got:
            raise Wrong(got[-1500:].decode(errors="replace"))
        await at_rest(lambda: hub.waiting == 0, lambda: f"{hub.waiting} wait")
        if len(hub.names) > 16:
            raise Wrong(f"{len(hub.names)} channels")
        for name in hub.names:
            hub.delete(name)
        hub.create("t", "text/plain")
        status, _, _ = await self.server.post("t/0", b"x")
        if status != 200 or (await self.server.call("GET", "t/0"))[2] != b"x":
            raise Wrong(f"the next segment is answered with {status}")
        hub.delete("t")
        for each in self.server.wires:
            await each.close()
        self.server.wires.clear()
        return behaviour(got)


class TrickleClient(_Loop):
    """A subscriber and a publisher whose server answers with the input, one part of it (cut at ``~~``) a request."""

    async def open(self) -> None:
        vars(cursor)["STEP"] = 0.001  # the pause after a 470
        self._parts: list[bytes] = []
        self._asked = 0
        listener = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self._stack.push_async_callback(listener.wait_closed)
        self._stack.callback(listener.close)
        self.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/s"

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            part = self._parts[self._asked] if self._asked < len(self._parts) else b"HTTP/1.1 404 X\r\n\r\n"
            self._asked += 1
            writer.write(part)
            await asyncio.wait_for(writer.drain(), 1)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            pass
        finally:
            writer.close()

    async def check(self, data: bytes) -> str:
        said = []
        for use in (self._subscribe, self._publish):
            self._parts, self._asked = data.split(b"~~")[:12], 0
            said.append(await self._bounded(use))
            if self._asked > 60:
                raise Wrong(f"{self._asked} requests")
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if any("_fetch" in repr(task) or "OutgoingSegment" in repr(task) for task in others):
            raise Wrong(f"left behind: {others}")
        return " ".join(said)

    async def _bounded(self, use: Callable[[aiohttp.ClientSession], Awaitable[str]]) -> str:
        try:
            async with asyncio.timeout(0.1), open_session() as session:
                return await use(session)
        except TimeoutError:
            return "waits"
        except GpuByocError as error:
            return error.code

    async def _subscribe(self, session: aiohttp.ClientSession) -> str:
        backoff = Backoff(first=0.001, cap=0.002, attempts=3)
        count = 0
        async with Subscriber(session, self.url, 0, reissue=0.02, stall=0.02, backoff=backoff) as segments:
            async for segment in segments:
                count += 1
                with contextlib.suppress(GpuByocError):
                    await segment.read(1 << 16)
        return f"read{count.bit_length()}"

    async def _publish(self, session: aiohttp.ClientSession) -> str:
        backoff = Backoff(first=0.001, cap=0.002, attempts=3)
        sent = 0
        async with Publisher(session, self.url, "video/MP2T", progress=0.02, backoff=backoff) as publisher:
            for _ in range(4):
                with contextlib.suppress(GpuByocError):
                    await publisher.send(b"x" * 100)
                    sent += 1
        return f"sent{sent}"


class NetworkRequests(_Loop):
    """Raw requests to a gateway (inputs that begin with ``G``) or to its orchestrator, which has a container."""

    async def open(self) -> None:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self.box = await self._stack.enter_async_context(kit.box())
        enter = self._stack.enter_async_context
        self.orchestrator = await enter(kit.orchestrator(folder, self.box, stall=1.0, max_body=1 << 20))
        self.gateway = await enter(kit.gateway(self.orchestrator, stall=1.0, max_body=1 << 20))

    async def check(self, data: bytes) -> str:
        port = self.gateway.port if data[:1] == b"G" else self.orchestrator.port
        got = await exchange(port, data[1:], 0.05)
        if b"500" in statuses(got) and AIOHTTP not in got:
            raise Wrong(got[-1500:].decode(errors="replace"))
        both = self.gateway, self.orchestrator
        await at_rest(lambda: not any(each.running for each in both), lambda: [each.running for each in both])
        answer = await kit.post(self.gateway, b"a frame")
        if answer.status != 200 or answer.body != b"a frame":
            raise Wrong(f"the next job is answered with {answer.status}: {answer.body!r:.300}")
        if self.orchestrator.ledger.error:
            raise Wrong(self.orchestrator.ledger.error)
        return behaviour(got)


class NextHops(_Loop):
    """An orchestrator's container and a gateway's orchestrator that answer with the input."""

    async def open(self) -> None:
        self._said = b""
        listener = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self._stack.push_async_callback(listener.wait_closed)
        self._stack.callback(listener.close)
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        made = kit.orchestrator(folder, url, stall=0.4, job_timeout=0.3)
        self.orchestrator = await self._stack.enter_async_context(made)
        self.session = await self._stack.enter_async_context(aiohttp.ClientSession())
        self.url = url

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if b"GET /health" in head:
                writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n{"status":"IDLE"}')
            else:
                writer.write(self._said)
            await asyncio.wait_for(writer.drain(), 1)
        except (ConnectionError, asyncio.IncompleteReadError, TimeoutError):
            pass
        finally:
            writer.close()

    async def check(self, data: bytes) -> str:
        self._said = data
        book = TokenBook([self.url], self.session, 1.0)
        tokens = (await book.ask("x")).tokens
        await book.close()
        assert self.orchestrator.container is not None
        await self.orchestrator.container.ask()
        lines = ["POST /live/video-to-video HTTP/1.1", "Host: a", f"X-Model-Id: {kit.MODEL}", "Connection: close"]
        request = "\r\n".join([*lines, "Content-Length: 1", "", "x"])
        got = await exchange(self.orchestrator.port, request.encode(), 0.5)
        if b"500" in statuses(got) and b'"error": "internal"' in got:
            raise Wrong(got[-1500:].decode(errors="replace"))
        await at_rest(lambda: not self.orchestrator.running, lambda: self.orchestrator.running)
        return f"{len(tokens)} {behaviour(got[:4000])}"


class LiveStreams(_Loop):
    """The input as a segment of a live stream, its whole way through a worker and out again."""

    async def open(self) -> None:
        made = streams.rig(GreenTint(), EngineConfig(slots=8, max_batch=4, memory=256 << 20))
        self.rig = await self._stack.enter_async_context(made)

    async def check(self, data: bytes) -> str:
        r = self.rig
        r.create("s")
        status, answer = await r.call("stream/start", r.urls("s"))
        if status != 200:
            raise Wrong(str(answer))
        stream = r.stream("s")
        r.server.hub.write("s", data or b"\0")
        await at_rest(lambda: stream.segments_in > 0 or stream.session.over, stream.numbers)
        stream.stop("that was all")
        await at_rest(lambda: len(r.worker.worker.streams) == 0, stream.numbers)
        out = r.server.hub.channel("s-out")
        for name in r.server.hub.names:
            r.server.hub.delete(name)
        session = stream.session
        if session.state.value != "ended" or out is None:
            raise Wrong(f"{session.state.value}: {session.reason}")
        if session.frames_in != session.frames_out + sum(session.dropped.values()):
            raise Wrong(f"frames are missing: {session.numbers()}")
        await at_rest(lambda: r.worker.free() == 0, r.worker.free)
        return words(session.problems + session.dropped + Counter(frames=session.frames_out, segments=out.next_seq))


TARGETS: dict[str, Callable[[], Target]] = {
    "ts": TransportStream,
    "sandbox": Sandbox,
    "stream": LiveStreams,
    "params": Params,
    "answers": Answers,
    "worker": WorkerRequests,
    "trickle-server": TrickleRequests,
    "trickle-client": TrickleClient,
    "network": NetworkRequests,
    "next-hop": NextHops,
}
