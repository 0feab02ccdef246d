"""A trickle server beside a worker, on loopback inside the test's own event loop, with a publisher and a viewer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from gpu_byoc.config import EngineConfig
from gpu_byoc.core.trickle import Limits
from gpu_byoc.processor import ArrayProcessor, Processor
from gpu_byoc.processors.green_tint import GreenTint
from gpu_byoc.transport.listen import bind, port_of, serve
from gpu_byoc.transport.trickle_client import Publisher, Subscriber, open_session
from gpu_byoc.transport.trickle_server import TrickleServer
from gpu_byoc.worker.stream import LiveStream
from tests.support.clips import live_stream
from tests.support.workers import Running, running

CHANNELS = {"": "video/MP2T", "-out": "video/MP2T", "-control": "application/json", "-events": "application/json"}


@dataclass
class Rig:
    """A trickle server beside a worker."""

    worker: Running
    server: TrickleServer
    base: str

    def urls(self, name: str) -> dict[str, str]:
        url = self.base + name
        return {
            "gateway_request_id": name,
            "subscribe_url": url,
            "publish_url": url + "-out",
            "control_url": url + "-control",
            "events_url": url + "-events",
            "data_url": url + "-data",
        }

    def create(self, name: str) -> None:
        for suffix, mime in (CHANNELS | {"-data": "application/jsonl"}).items():
            self.server.hub.create(name + suffix, mime)

    def delete(self, name: str) -> None:
        self.server.hub.delete(name)

    async def call(self, what: str, body: Any = None, **headers: str) -> tuple[int, dict[str, Any]]:
        named = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        url = f"{self.worker.url}/{what}"
        async with self.worker.session.post(url, data=json.dumps(body or {}), headers=named) as answer:
            return answer.status, await answer.json()

    def stream(self, name: str) -> LiveStream:
        return self.worker.worker.streams._streams[name]

    async def until_over(self) -> None:
        await self.worker.until(lambda: len(self.worker.worker.streams) == 0)


@dataclass
class Viewer:
    """What comes out of one stream."""

    media: bytes = b""
    read: int = 0  # the index after the last segment that was read
    segments: list[bytes] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)

    def kinds(self) -> list[str]:
        return [event["event"]["type"] for event in self.events]


def beats(viewer: Viewer) -> list[dict[str, Any]]:
    """Heartbeats, which come last when a stream ends."""
    return [event["event"] for event in viewer.events if event["event"]["type"] == "heartbeat"]


@contextlib.asynccontextmanager
async def rig(
    processor: Processor | None = None,
    engine: EngineConfig | None = None,
    limits: Limits | None = None,
    **config: Any,
) -> AsyncIterator[Rig]:
    server = TrickleServer(limits or Limits())
    app = web.Application(client_max_size=1 << 30)
    server.mount(app, "/ai/trickle/")
    sock = bind("127.0.0.1", 0)
    runner = await serve(app, sock, shutdown=1.0)
    try:
        async with running(processor or GreenTint(), engine, **({"lossless": True} | config)) as worker:
            yield Rig(worker, server, f"http://127.0.0.1:{port_of(sock)}/ai/trickle/")
            await worker.worker.streams.close(5)
            assert worker.free() == 0, "every slot came back"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def watching(r: Rig, name: str) -> AsyncIterator[Viewer]:
    """Read a stream's output, events and data until their channels are closed."""
    viewer = Viewer()

    async def media() -> None:
        async with Subscriber(session, r.base + name + "-out", start=0, every=True) as segments:
            async for segment in segments:
                data = await segment.read()
                viewer.media += data
                viewer.segments.append(data)
                viewer.read = segment.seq + 1

    async def news(suffix: str, into: list[dict[str, Any]]) -> None:
        async with Subscriber(session, r.base + name + suffix, start=0, every=True) as segments:
            async for segment in segments:
                into += [json.loads(line) for line in (await segment.read()).splitlines() if line]

    async with open_session() as session:
        tasks = [
            asyncio.create_task(each) for each in (media(), news("-events", viewer.events), news("-data", viewer.lines))
        ]
        try:
            yield viewer
        finally:
            for suffix in ("-out", "-events", "-data", "-control"):
                r.server.hub.delete(name + suffix)
            async with asyncio.timeout(20):
                await asyncio.gather(*tasks)


async def publish(r: Rig, name: str, segments: list[bytes], close: bool = True) -> None:
    async with open_session() as session, Publisher(session, r.base + name, "video/MP2T", delete=close) as publisher:
        for data in segments:
            await publisher.send(data)
        if close:  # what was sent last must be read before the channel goes
            await r.worker.until(lambda: taken(r, name) >= len(segments))


def taken(r: Rig, name: str) -> int:
    stream = r.worker.worker.streams._streams.get(name)
    return 10**9 if stream is None else stream.segments_in


def clip(count: int = 20, parts: int = 2, **options: Any) -> list[bytes]:
    """Segments of ``count`` pictures each, timestamps continuing."""
    return [live_stream(count, first=90_000 + part * count * 3600, gop=count, **options) for part in range(parts)]


class Gate(ArrayProcessor):
    """Holds the device until it is opened."""

    def __init__(self) -> None:
        self.entered, self.gate = threading.Event(), threading.Event()

    def process_batch(self, batch: Any, params: Any, xp: Any) -> Any:
        self.entered.set()
        assert self.gate.wait(20)
        return batch
