"""A live stream in a worker that is a process of its own, and is told to end."""

from __future__ import annotations

import asyncio
import socket
import time

import aiohttp

from gpu_byoc.transport.trickle_client import Publisher, Subscriber, open_session
from tests.support.clips import frames, live_stream
from tests.support.processes import free_port, get, running
from tests.support.workers import asynchronous


@asynchronous
async def test_sigterm_flushes_a_stream_and_the_process_ends_well() -> None:
    """Nothing that was taken in is lost, the log says so, and the exit status is 0."""
    port, trickle = free_port(), free_port()
    base = f"http://127.0.0.1:{trickle}/"
    serve = ("serve", "--backend", "numpy", "--host", "127.0.0.1", "--port", str(port), "--lossless", "yes")
    with running("trickle", "--port", str(trickle), "--autocreate") as server, running(*serve) as worker:
        await asyncio.to_thread(worker.wait_for, "listening")
        await asyncio.to_thread(_answers, trickle)
        async with open_session() as session:
            for name in ("s", "s-out"):
                async with session.post(base + name, headers={"Expect-Content": "video/MP2T"}) as made:
                    assert made.status == 200
            body = {"gateway_request_id": "s", "subscribe_url": base + "s", "publish_url": base + "s-out"}
            async with session.post(f"http://127.0.0.1:{port}/stream/start", json=body) as started:
                assert started.status == 200
            shown = asyncio.create_task(_watch(session, base + "s-out"))
            async with Publisher(session, base + "s", "video/MP2T") as publisher:
                await publisher.send(live_stream(50, first=90_000, gop=25))
                await asyncio.to_thread(_until_in, port, 50)
                assert await asyncio.to_thread(worker.end) == 0
            async with session.delete(base + "s-out"):
                pass
            async with asyncio.timeout(20):
                assert len(frames(await shown)) == 50
        assert any("0 jobs and 1 streams in the house" in line for line in worker.log)
        assert any("0 streams cut off" in line for line in worker.log)
        assert any("stream s: ended" in line and "50 frames in, 50 out, 0 dropped" in line for line in worker.log)
        assert not any("Traceback" in line for line in worker.log)
        assert await asyncio.to_thread(server.end) == 0


def _answers(port: int) -> None:
    """The server has no route for a GET of its root, but it answers."""
    until = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except ConnectionRefusedError:
            assert time.monotonic() < until, "it never listened"
            time.sleep(0.01)
        else:
            return


def _until_in(port: int, count: int) -> None:
    """Ask the worker until so many frames came in."""
    until = time.monotonic() + 30
    while get(port, "/stream/status")[1]["streams"][0]["frames_in"] < count:
        assert time.monotonic() < until, "frames are missing"
        time.sleep(0.01)


async def _watch(session: aiohttp.ClientSession, url: str) -> bytes:
    data = b""
    async with Subscriber(session, url, start=0, every=True) as segments:
        async for segment in segments:
            data += await segment.read()
    return data
