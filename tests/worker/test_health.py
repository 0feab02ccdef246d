"""Health for whoever restarts, readiness for whoever routes, and the reasons for either."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from typing import Any

import psutil
import pytest

from gpu_byoc.config import EngineConfig, RegistrationConfig
from gpu_byoc.errors import DeviceLost
from gpu_byoc.processors.green_tint import GreenTint
from gpu_byoc.worker.health import BEAT, LOOP_SECONDS
from gpu_byoc.worker.registration import Registration
from tests.support.processes import free_port, get
from tests.support.processes import running as process
from tests.support.streams import Gate
from tests.support.workers import Running, asynchronous, running


async def ask(r: Running, path: str) -> tuple[int, Any]:
    async with r.session.get(r.url + path) as answer:
        return answer.status, await answer.json()


@asynchronous
async def test_each_state_and_what_it_says_to_either() -> None:
    async with running(GreenTint()) as r:
        worker = r.worker
        assert await ask(r, "/health") == (200, {"status": "IDLE"})
        assert await ask(r, "/ready") == (200, {"ready": True})

        worker.draining = True
        assert (await ask(r, "/health"))[0] == 200, "a restart does not help one that is about to end"
        assert await ask(r, "/ready") == (503, {"ready": False, "reason": "the worker is shutting down"})
        worker.draining = False

        engine, worker.engine = worker.engine, None
        assert await ask(r, "/health") == (503, {"status": "LOADING"})
        assert await ask(r, "/ready") == (503, {"ready": False, "reason": "the processor is still initialising"})
        worker.engine = engine

        assert engine is not None
        engine.engines[0]._device.give_up(DeviceLost("the device fell off the bus"))
        assert await ask(r, "/health") == (503, {"status": "ERROR"})
        assert await ask(r, "/ready") == (503, {"ready": False, "reason": "the device fell off the bus"})


@asynchronous
async def test_a_worker_that_is_not_registered_yet_is_ready() -> None:
    """An orchestrator may ask before it registers one; without the answer it never would."""
    async with running(GreenTint()) as r:
        settings = RegistrationConfig(orch_url="http://127.0.0.1:1", secret="s")
        config = r.worker.config
        r.worker.registration = Registration(type(config)(capability="c", registration=settings), 1)
        assert not r.worker.registration.registered
        assert await ask(r, "/ready") == (200, {"ready": True})


@asynchronous
async def test_an_event_loop_that_stands_still_is_an_error_and_who_is_late_is_not() -> None:
    async with running(GreenTint()) as r:
        health = r.worker.health
        beating = asyncio.create_task(health.beat())
        await asyncio.sleep(0)
        assert health.answer("/health") == (200, b'{"status": "IDLE"}')
        assert health._seen is not None
        health._seen = time.monotonic() - LOOP_SECONDS / 2
        assert health.answer("/health") == (200, b'{"status": "IDLE"}')
        health._seen = time.monotonic() - LOOP_SECONDS - 1
        for _ in range(3):  # asked by several before its loop has had its turn: the process may have been stopped
            assert health.answer("/health") == (200, b'{"status": "IDLE"}')
        health._doubt = (health._seen, time.monotonic() - BEAT)
        assert health.answer("/health") == (503, b'{"status": "ERROR"}')
        assert b"the event loop has not moved" in health.answer("/ready")[1]
        health._seen = time.monotonic() - LOOP_SECONDS - 1
        assert health.answer("/health") == (200, b'{"status": "IDLE"}'), "it has moved in between"
        beating.cancel()
        await asyncio.wait([beating])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_ends_takes_its_doorman_with_it(number: signal.Signals) -> None:
    """A port that is kept by what is left of a worker would keep its successor from starting."""
    port = free_port()
    with process("serve", "--backend", "numpy", "--port", str(port), "--host", "127.0.0.1") as worker:
        worker.wait_for("Trickle server listening")
        status, body = get(port, "/health?deep=1")
        assert status == 200
        pid = body["doorman"]["pid"]
        doorman = psutil.Process(pid)
        assert doorman.ppid() == worker.popen.pid
        assert worker.end(number) == (-number if number == signal.SIGKILL else 0)
        gone, _ = psutil.wait_procs([doorman], timeout=20)
        assert gone or doorman.status() == psutil.STATUS_ZOMBIE
        socket.create_server(("127.0.0.1", port)).close()


@asynchronous
async def test_the_deep_answer_says_what_it_rests_on() -> None:
    gate = Gate()
    async with running(gate, EngineConfig(slots=4, max_batch=1)) as r:
        status, deep = await ask(r, "/health?deep=1")
        assert (status, deep["status"], deep["ready"], deep["reason"]) == (200, "IDLE", True, None)
        (device,) = deep["devices"]
        assert device["last_batch_age_seconds"] is None
        assert device["canary_age_seconds"] is None, "numpy has no device to probe"

        jobs = [asyncio.create_task(r.post(bytes(300))) for _ in range(2)]
        await asyncio.to_thread(gate.entered.wait, 20)
        engine = r.worker.engine
        assert engine is not None
        await r.until(lambda: engine.waiting == 1)
        deep = (await ask(r, "/health?deep=1"))[1]
        assert deep["status"] == "OK"
        assert deep["active_jobs"] == 2
        assert deep["waiting_frames"] == 1
        assert [(room["slots"], room["free"]) for room in deep["slots"]] == [(4, 2)]
        assert deep["devices"][0]["batch_under_way_seconds"] > 0
        gate.gate.set()
        assert [(await job)[0] for job in jobs] == [200, 200]
        deep = (await ask(r, "/health?deep=1"))[1]
        assert deep["devices"][0]["last_batch_age_seconds"] >= 0
        assert deep["devices"][0]["frames"] == 2
        await r.idle()
        assert await ask(r, "/health?deep=0") == (200, {"status": "IDLE"})
        assert json.dumps(deep)
