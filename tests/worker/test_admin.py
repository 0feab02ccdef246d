"""The admin port: what it does, for whom, and that the main port knows nothing of it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gpu_byoc.errors import PortInUse
from gpu_byoc.worker.admin import Admin
from tests.support.streams import Gate
from tests.support.workers import Running, asynchronous, running


def ask(port: int, method: str, path: str, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


@contextlib.asynccontextmanager
async def administered(drained: asyncio.Event) -> AsyncIterator[tuple[Running, Gate, int]]:
    gate = Gate()
    async with running(gate) as r:
        admin = Admin(0, r.worker, drained.set)
        try:
            yield r, gate, admin.port
        finally:
            gate.gate.set()
            await asyncio.to_thread(admin.close)


@asynchronous
async def test_debug_shows_where_everything_is() -> None:
    async with administered(asyncio.Event()) as (r, gate, port):
        job = asyncio.create_task(r.post(bytes(300)))
        await asyncio.to_thread(gate.entered.wait, 20)
        status, debug = await asyncio.to_thread(ask, port, "GET", "/debug")
        assert status == 200
        assert debug["worker"]["active_jobs"] == 1
        assert debug["worker"]["devices"][0]["batch_under_way_seconds"] > 0
        (device,) = [thread for thread in debug["threads"] if thread["name"] == "gpu-byoc-numpy"]
        assert any("process_batch" in place for place in device["stack"]), "where the processor is"
        assert any("jobs.py" in place for task in debug["tasks"] for place in task["waits_at"]), "what waits for it"
        gate.gate.set()
        assert (await job)[0] == 200


@asynchronous
async def test_debug_answers_though_the_loop_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_byoc.worker.admin.LOOP_SECONDS", 0.05)
    async with administered(asyncio.Event()) as (_, _, port):
        answers: list[tuple[int, Any]] = []
        asking = threading.Thread(target=lambda: answers.append(ask(port, "GET", "/debug")))
        asking.start()
        asking.join(20)  # on the event loop
        ((status, debug),) = answers
        assert status == 200
        assert "did not answer" in debug["worker"]["event_loop"]
        (main,) = [thread for thread in debug["threads"] if thread["name"] == "MainThread"]
        assert any("test_debug_answers_though" in place for place in main["stack"]), "and this is why"


@asynchronous
async def test_drain_is_said_once_or_twice() -> None:
    drained = asyncio.Event()
    async with administered(drained) as (_, _, port):
        for _ in range(2):
            assert await asyncio.to_thread(ask, port, "POST", "/drain") == (202, {"status": "draining"})
        async with asyncio.timeout(20):
            await drained.wait()


@asynchronous
async def test_it_is_for_this_machine_and_not_for_its_browsers() -> None:
    drained = asyncio.Event()
    async with administered(drained) as (_, _, port):
        for headers in ({"Host": "evil.example"}, {"Host": f"evil.example:{port}"}, {"Origin": "http://127.0.0.1"}):
            status, answer = await asyncio.to_thread(lambda given: ask(port, "POST", "/drain", **given), headers)
            assert status == 403
            assert answer["status"] == "error"
        for method, path in (("GET", "/drain"), ("POST", "/debug"), ("GET", "/health")):
            assert (await asyncio.to_thread(ask, port, method, path))[0] == 404
        assert not drained.is_set()


@asynchronous
async def test_the_main_port_has_none_of_it() -> None:
    async with running(Gate()) as r:
        for method, path in (("POST", "/drain"), ("GET", "/drain"), ("GET", "/debug")):
            async with r.session.request(method, r.url + path) as answer:
                assert answer.status == 404
        assert not r.worker.draining


@asynchronous
async def test_a_taken_port_is_said() -> None:
    async with administered(asyncio.Event()) as (r, _, port):
        with pytest.raises(PortInUse, match=str(port)):
            Admin(port, r.worker, lambda: None)
