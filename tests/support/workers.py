"""A real worker on loopback, inside the test's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import aiohttp

from gpu_byoc.config import EngineConfig, ServeConfig
from gpu_byoc.processor import Processor
from gpu_byoc.transport.listen import bind, port_of, serve
from gpu_byoc.worker.app import Worker
from gpu_byoc.worker.devices import open_engine


@dataclass(frozen=True)
class Running:
    worker: Worker
    session: aiohttp.ClientSession
    url: str
    port: int
    listener: socket.socket

    async def post(self, data: Any, path: str = "/live/video-to-video", **headers: str) -> tuple[int, Any, bytes]:
        """(status, headers, body) of a job. Header names are written with underscores: ``Content_Type``."""
        named = {"Content-Type": "application/octet-stream"} | {k.replace("_", "-"): v for k, v in headers.items()}
        body = io.BytesIO(data) if isinstance(data, bytes) and len(data) > 1 << 20 else data
        async with self.session.post(self.url + path, data=body, headers=named) as answer:
            return answer.status, answer.headers, await answer.read()

    async def get(self, path: str) -> Any:
        async with self.session.get(self.url + path) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.json()

    def free(self) -> int:
        """Free slots over all frame sizes, as missing ones: 0 when every slot is back."""
        assert self.worker.engine is not None
        return sum(room["free"] - room["slots"] for room in self.worker.engine.rooms())

    async def idle(self) -> None:
        """Wait until /health says IDLE and every slot is back. An answer is out a moment before its slot is back, and
        before the device's thread is through with its batch."""
        await self.until(lambda: self.worker.state == "IDLE" and self.free() == 0)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Poll a condition of the worker's, which has no event of its own, for at most 20 seconds."""
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110 - slots and jobs are counted, not announced
                await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def running(processor: Processor, engine: EngineConfig | None = None, **config: Any) -> AsyncIterator[Running]:
    fixed: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "backend": "numpy", "capability": "green-tint-cpu"}
    settings = ServeConfig(**fixed | config, engine=engine or EngineConfig())
    worker = Worker(settings, processor)
    sock = bind("127.0.0.1", 0)
    port = port_of(sock)
    runner = await serve(worker.app(), sock, shutdown=1.0)
    opened = None
    try:
        opened = worker.engine = await open_engine(settings, processor, worker.degraded)
        async with aiohttp.ClientSession() as session:
            yield Running(worker, session, f"http://127.0.0.1:{port}", port, sock)
    finally:
        await runner.cleanup()
        if opened is not None:
            await asyncio.to_thread(opened.close)


@contextlib.asynccontextmanager
async def another(r: Running, address: str = "127.0.0.2") -> AsyncIterator[Running]:
    """The same worker, called from another address."""
    connector = aiohttp.TCPConnector(local_addr=(address, 0))
    async with aiohttp.ClientSession(connector=connector) as session:
        yield Running(r.worker, session, r.url, r.port, r.listener)


def asynchronous(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """An async test on a fresh event loop in debug mode, where a forgotten await is a warning and so an error."""
    import functools
    import inspect

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    return run
