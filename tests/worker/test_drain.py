"""A worker on its way out, seen from a client. The whole end, in processes of their own: tests/system/test_drain.py."""

from __future__ import annotations

import asyncio
import threading

import pytest

from gpu_byoc.media.encode import EncoderChoice
from gpu_byoc.processors.green_tint import GreenTint
from gpu_byoc.worker import streams
from gpu_byoc.worker.drain import Drain
from tests.support.streams import Gate, rig
from tests.support.workers import asynchronous, running


@asynchronous
async def test_new_work_is_sent_elsewhere_on_another_connection() -> None:
    async with running(GreenTint()) as r:
        r.worker.draining = True
        status, headers, _ = await r.post(bytes(300))
        assert status == 503
        assert int(headers["Retry-After"]) > 0
        assert headers["Connection"] == "close"
        reader, writer = await asyncio.open_connection("127.0.0.1", r.port)
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 300\r\nExpect: 100-continue\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 503"), "before the body is sent"
        writer.close()
        await writer.wait_closed()


@asynchronous
async def test_jobs_in_the_house_and_in_the_line_are_finished() -> None:
    gate = Gate()
    async with running(gate, slot_wait=20) as r:
        jobs = [asyncio.create_task(r.post(bytes(300))) for _ in range(40)]  # slots are 32
        await r.until(lambda: r.worker.active == 40 and r.free() == -32)
        drain = Drain(r.worker, 20.0)
        draining = asyncio.create_task(drain.run(asyncio.Event()))
        await r.until(lambda: r.worker.draining)
        gate.gate.set()
        await draining
        assert [(await job)[0] for job in jobs] == [200] * 40
        assert drain.summary() == "stopped: 0 jobs unfinished, 0 streams cut off"


@asynchronous
async def test_a_hurry_ends_it_at_once_and_says_what_was_left() -> None:
    gate = Gate()
    async with running(gate) as r:
        job = asyncio.create_task(r.post(bytes(300)))
        await asyncio.to_thread(gate.entered.wait, 20)
        hurry = asyncio.Event()
        drain = Drain(r.worker, 60.0)
        draining = asyncio.create_task(drain.run(hurry))
        await r.until(lambda: r.worker.draining)
        assert not draining.done()
        hurry.set()
        async with asyncio.timeout(20):
            await draining
        assert drain.summary() == "stopped: 1 jobs unfinished, 0 streams cut off"
        gate.gate.set()
        assert (await job)[0] == 200


@asynchronous
async def test_a_stream_whose_start_was_under_way_is_sent_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first start loads media code, and the worker is through with its end meanwhile: nobody would stop a stream
    that came to be after that."""
    loading, loaded, choose = threading.Event(), threading.Event(), streams._choose_encoder

    def slowly(wanted: str) -> EncoderChoice:
        loading.set()
        loaded.wait(20)
        return choose(wanted)

    monkeypatch.setattr(streams, "_choose_encoder", slowly)
    async with rig() as r:
        r.create("s")
        starting = asyncio.create_task(r.call("stream/start", r.urls("s")))
        assert await asyncio.to_thread(loading.wait, 20)
        async with asyncio.timeout(20):
            await Drain(r.worker.worker, 20.0).run(asyncio.Event())
        loaded.set()
        status, answer = await starting
        assert (status, answer.get("error"), len(r.worker.worker.streams)) == (503, "draining", 0)
