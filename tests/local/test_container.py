"""Registration: only a ready container is advertised, and one line says each change."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from gpu_byoc.local.container import STRIKES, Container, State
from tests.local.kit import MODEL, Box, box, in_loop, soon
from tests.support.processes import free_port


@contextlib.asynccontextmanager
async def watched(url: str) -> AsyncIterator[Container]:
    async with aiohttp.ClientSession() as session:
        container = Container(url, MODEL, session)
        watch = asyncio.create_task(container.watch())
        try:
            yield container
        finally:
            watch.cancel()
            await asyncio.wait([watch])


@in_loop
async def test_a_late_start(caplog: pytest.LogCaptureFixture) -> None:
    """Asked for until it is there; one line while it is not, one when it is."""
    caplog.set_level("INFO")
    late = Box(job=_no_job)
    late.port = free_port()
    async with watched(late.url) as container:
        await soon(lambda: container.reason == "connection refused")
        assert container.state is State.DOWN
        for _ in range(5):
            await container.ask()
        assert len(caplog.messages) == 1
        assert f"BYOC container {late.url} is not ready (connection refused)" in caplog.messages[0]
        await late.start()
        await soon(lambda: container.state is State.READY)
        assert caplog.messages[1:] == [f"BYOC capability registered: {MODEL} -> {late.url}"]
        await late.stop()
        container.refused("connection refused")
        assert container.state is State.DOWN
        await late.start()
        await soon(lambda: container.state is State.READY)
        assert len(caplog.messages) == 4
        await late.stop()


@pytest.mark.parametrize(
    ("health", "status", "state"),
    [
        ({"status": "IDLE"}, 200, State.READY),
        ({"status": "OK"}, 200, State.READY),
        ({"status": "ok"}, 200, State.READY),
        ({"other": "x"}, 200, State.READY),
        ({"status": "LOADING"}, 200, State.LOADING),
        ({"status": "ERROR"}, 200, State.LOADING),
        ({"status": "LOADING"}, 503, State.LOADING),
        ({"status": "OK"}, 500, State.LOADING),
        (None, 200, State.READY),  # no /health: the page's own check decides
        (None, 500, State.LOADING),
    ],
)
@in_loop
async def test_what_health_means(health: Any, status: int, state: State) -> None:
    async with box() as made, aiohttp.ClientSession() as session:
        made.health, made.status = health, status
        container = Container(made.url, MODEL, session)
        await container.ask()
        assert container.state is state
        assert bool(container.reason) == (state is not State.READY)


@in_loop
async def test_a_missed_answer_is_forgiven_and_several_are_not() -> None:
    """A listener that hangs up on each question, where a ready container was."""
    async with box() as made, aiohttp.ClientSession() as session:
        container = Container(made.url, MODEL, session)
        await container.ask()
        await made.stop()

        async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.close()

        server = await asyncio.start_server(hang_up, "127.0.0.1", made.port)
        states = []
        for _ in range(STRIKES):
            await container.ask()
            states.append(container.state)
        assert states == [State.READY] * (STRIKES - 1) + [State.DOWN]
        server.close()
        await server.wait_closed()


async def _no_job(request: Any) -> Any:
    raise AssertionError("no job is sent here")
