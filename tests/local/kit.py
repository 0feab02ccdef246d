"""A small real container, and real orchestrators and gateways around it, on loopback in the test's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from gpu_byoc.config import GatewayConfig, OrchestratorConfig
from gpu_byoc.local.gateway import Gateway
from gpu_byoc.local.orchestrator import Orchestrator
from gpu_byoc.local.relay import ROUTE
from gpu_byoc.transport.listen import bind, port_of, serve

MODEL = "green-tint-cpu"
FRAME = bytes(range(256)) * 3600  # 921,600 bytes, like a 640x480 RGB frame
WAIT = 20.0  # seconds; nothing here takes one, so this is only for what would hang

Job = Callable[[web.Request], Awaitable[web.StreamResponse]]


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test, bounded."""

    @functools.wraps(test)
    def run(*args: Any, **named: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **named), 150))

    return run


async def soon(condition: Callable[[], object]) -> None:
    """Give other tasks turns until ``condition`` holds; a failure after WAIT seconds."""
    async with asyncio.timeout(WAIT):
        while not condition():  # noqa: ASYNC110 - any condition, so there is no event to wait for
            await asyncio.sleep(0.001)


async def echo(request: web.Request) -> web.StreamResponse:
    """The body back, with the headers of a worker's answer."""
    body = bytearray()
    async for piece in request.content.iter_any():
        body += piece
    answer = web.StreamResponse(headers={"Content-Type": request.headers["Content-Type"]})
    answer.headers["X-Metadata"] = '{"backend": "echo", "compute_seconds": 0.25}'
    answer.headers["Server-Timing"] = "compute;dur=250"
    answer.headers["X-Secret"] = "not for the client"
    answer.content_length = len(body)
    await answer.prepare(request)
    await answer.write(body)
    return answer


def says(status: int, /, **body: Any) -> Job:
    """A container that answers every job so."""

    async def answer(request: web.Request) -> web.StreamResponse:
        await request.read()
        return web.json_response(body, status=status, headers={"Retry-After": "7"} if status == 503 else {})

    return answer


class Box:
    """The container. ``job`` and ``health`` may be exchanged at any time; ``jobs`` counts those that arrived."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.health: dict[str, str] | None = {"status": "IDLE"}
        self.status = 200
        self.jobs = 0
        self.cancelled = 0
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post(ROUTE, self._post)
        app.router.add_get("/health", self._health)
        app.router.add_get("/api/stream/status", self._stream_status)
        sock = bind("127.0.0.1", self.port)
        self.port = port_of(sock)
        self._runner = await serve(app, sock, 0.1)

    async def stop(self) -> None:
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    async def _post(self, request: web.Request) -> web.StreamResponse:
        self.jobs += 1
        try:
            return await self.job(request)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def _health(self, request: web.Request) -> web.StreamResponse:
        if self.health is None:
            raise web.HTTPNotFound
        return web.json_response(self.health, status=self.status)

    async def _stream_status(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text="any body", status=self.status)


@contextlib.asynccontextmanager
async def box(job: Job = echo) -> AsyncIterator[Box]:
    made = Box(job)
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


@contextlib.asynccontextmanager
async def orchestrator(datadir: Path, container: Box | str | None, **named: Any) -> AsyncIterator[Orchestrator]:
    """One that has asked its container once. ``named`` are fields of its configuration; None: no -byoc."""
    url = container.url if isinstance(container, Box) else container or ""
    fields = {"host": "127.0.0.1", "port": 0, "cli_host": "127.0.0.1", "cli_port": 0, "datadir": datadir}
    fields |= {"byoc": bool(url), "container_url": url, "model_id": MODEL if url else ""}
    async with Orchestrator(OrchestratorConfig(**{**fields, **named})) as made:
        if made.container is not None:
            await made.container.ask()
        yield made


@contextlib.asynccontextmanager
async def gateway(*peers: Orchestrator | str, **named: Any) -> AsyncIterator[Gateway]:
    urls = tuple(peer if isinstance(peer, str) else f"http://127.0.0.1:{peer.port}" for peer in peers)
    fields = {"orchestrators": urls, "host": "127.0.0.1", "port": 0, "cli_host": "127.0.0.1", "cli_port": 0}
    fields["http_ingest"] = True
    async with Gateway(GatewayConfig(**{**fields, **named})) as made:
        yield made


class Answer:
    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def error(self) -> tuple[int, str]:
        return self.status, self.json["error"]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        text: str = self.json["message"]
        return text


@contextlib.asynccontextmanager
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=WAIT)) as session:
        yield session


async def post(
    node: Gateway | Orchestrator | int, data: Any = FRAME, model: str | None = MODEL, **headers: str
) -> Answer:
    """A job on a connection of its own."""
    port = node if isinstance(node, int) else node.port
    named = {"Content-Type": "application/octet-stream"} | {k.replace("_", "-"): v for k, v in headers.items()}
    if model is not None:
        named["X-Model-Id"] = model
    if isinstance(data, bytes):
        data = io.BytesIO(data)  # aiohttp warns of large bytes
    async with client() as session, session.post(f"http://127.0.0.1:{port}{ROUTE}", data=data, headers=named) as got:
        return Answer(got.status, got.headers, await got.read())


async def get(port: int, path: str, **headers: str) -> Answer:
    named = {k.replace("_", "-"): v for k, v in headers.items()}
    async with client() as session, session.get(f"http://127.0.0.1:{port}{path}", headers=named) as got:
        return Answer(got.status, got.headers, await got.read())
