"""The end of a worker that is a process of its own, under load: nothing taken in is lost, and it ends in time."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import re
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest

from gpu_byoc.errors import EXIT_STUCK
from gpu_byoc.transport.trickle_client import Publisher, Subscriber, open_session
from tests.support.clips import frames, live_stream
from tests.support.processes import Process, free_port, get, post, running
from tests.support.workers import asynchronous

BUDGET = 8.0

STUCK = """
import asyncio, threading, sys
from gpu_byoc import FrameProcessor, run_processor

class Stuck(FrameProcessor):
    async def {method}(self, *frame):
        print("Stuck: here", flush=True)
        threading.Event().wait()

asyncio.run(run_processor(Stuck(), port={port}, host="127.0.0.1", drain_seconds=3.0))
"""

SAVES = """
import asyncio
from gpu_byoc import FrameProcessor, run_processor

class Saves(FrameProcessor):
    async def process(self, frame):
        return frame

    async def shutdown(self):
        print("Saves: began", flush=True)
        await asyncio.sleep({seconds})
        print("Saves: saved", flush=True)

asyncio.run(run_processor(Saves(), port={port}, host="127.0.0.1", drain_seconds={budget}))
"""

FULL = """
import asyncio, threading
from gpu_byoc import FrameProcessor, run_processor

class Full(FrameProcessor):
    async def process(self, frame):
        for _ in range(64):
            loop.call_soon_threadsafe(loop.run_in_executor, None, threading.Event().wait)
        return frame

async def main():
    global loop
    loop = asyncio.get_running_loop()
    await run_processor(Full(), port={port}, host="127.0.0.1", drain_seconds=3.0)

asyncio.run(main())
"""


@dataclass
class Setup:
    worker: Process
    port: int
    base: str
    session: aiohttp.ClientSession

    async def start(self, name: str, **urls: str) -> None:
        """A stream whose channels are ``name``, ``name-out`` and so on, unless ``urls`` say otherwise."""
        for suffix, mime in (("", "video/MP2T"), ("-out", "video/MP2T"), ("-events", "application/json")):
            async with self.session.post(self.base + name + suffix, headers={"Expect-Content": mime}) as made:
                assert made.status == 200
        body = {
            "gateway_request_id": name,
            "subscribe_url": self.base + name,
            "publish_url": self.base + name + "-out",
            "events_url": self.base + name + "-events",
            **urls,
        }
        async with self.session.post(f"http://127.0.0.1:{self.port}/stream/start", json=body) as started:
            assert started.status == 200, await started.text()

    async def until_in(self, count: int) -> None:
        """Ask the worker until so many frames of its streams came in."""
        async with asyncio.timeout(30):
            while sum(s["frames_in"] for s in (await asyncio.to_thread(self.status))["streams"]) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def status(self) -> dict[str, list[dict[str, int]]]:
        found: dict[str, list[dict[str, int]]] = get(self.port, "/stream/status")[1]
        return found

    async def watch(self, channel: str) -> bytes:
        """Everything on a channel, until the server says that it is closed."""
        data = b""
        async with Subscriber(self.session, self.base + channel, start=0, every=True) as segments:
            async for segment in segments:
                data += await segment.read()
        return data


@contextlib.asynccontextmanager
async def setup(*flags: str) -> AsyncIterator[Setup]:
    port, trickle = free_port(), free_port()
    serve = ("serve", "--backend", "numpy", "--host", "127.0.0.1", "--port", str(port), *flags)
    with running("trickle", "--port", str(trickle), "--autocreate"), running(*serve) as worker:
        await asyncio.to_thread(worker.wait_for, "listening")
        await asyncio.to_thread(_answers, trickle)
        async with open_session() as session:
            yield Setup(worker, port, f"http://127.0.0.1:{trickle}/", session)
        assert not any("Traceback" in line for line in worker.log), "\n".join(worker.log)


def _answers(port: int) -> None:
    until = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except ConnectionRefusedError:
            assert time.monotonic() < until, "it never listened"
            time.sleep(0.01)
        else:
            return


async def exit_of(worker: Process) -> tuple[int, float]:
    """(status, seconds) of a process that was told to end."""
    began = time.monotonic()
    code = await asyncio.to_thread(worker.popen.wait, 30)
    await asyncio.to_thread(worker._reader.join, 30)
    return code, time.monotonic() - began


def last_line(worker: Process) -> str:
    return next(line for line in reversed(worker.log) if line.strip())


@dataclass
class Load:
    """Jobs on a few connections, without a pause, until the worker wants no more."""

    port: int
    answers: list[int] = field(default_factory=list)
    retry_after: list[str | None] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    going: threading.Event = field(default_factory=threading.Event)

    def drive(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            while True:
                try:
                    connection.connect()
                except ConnectionRefusedError:
                    return  # it has ended, or does not listen any more
                try:
                    while connection.sock is not None:
                        connection.request(
                            "POST", "/", bytes(64 * 48 * 3), {"Content-Type": "application/octet-stream"}
                        )
                        answer = connection.getresponse()
                        body = answer.read()
                        self.answers.append(answer.status)
                        self.going.set()
                        if answer.status == 503:
                            self.retry_after.append(answer.headers["Retry-After"])
                            return
                        assert len(body) == 64 * 48 * 3
                except (http.client.BadStatusLine, OSError) as error:
                    # Closed while it was idle (nothing was sent back): that is no job lost. Half an answer would be.
                    if not isinstance(error, http.client.RemoteDisconnected | ConnectionResetError | BrokenPipeError):
                        self.cut.append(repr(error))
                    return
                except http.client.IncompleteRead as error:
                    self.cut.append(repr(error))
                    return
        finally:
            connection.close()


@contextlib.contextmanager
def load(port: int, connections: int) -> Iterator[Load]:
    made = Load(port)
    threads = [threading.Thread(target=made.drive) for _ in range(connections)]
    for thread in threads:
        thread.start()
    try:
        yield made
    finally:
        for thread in threads:
            thread.join(30)


@pytest.mark.parametrize("way", ["SIGTERM", "POST /drain"])
def test_under_load_everything_taken_in_comes_out(way: str) -> None:
    @asynchronous
    async def go() -> None:
        async with setup("--lossless", "yes", "--admin-port", "0") as s:
            (admin,) = [int(m[1]) for line in s.worker.log if (m := re.search(r"admin port (\d+)", line))]
            await s.start("a")
            await s.start("b")
            shown = [asyncio.create_task(s.watch(name)) for name in ("a-out", "b-out", "a-events")]
            async with (
                Publisher(s.session, s.base + "a", "video/MP2T") as a,
                Publisher(s.session, s.base + "b", "video/MP2T") as b,
            ):
                with load(s.port, 4) as jobs:
                    await asyncio.to_thread(jobs.going.wait, 30)
                    for publisher in (a, b):
                        await publisher.send(live_stream(50, first=90_000, gop=25))
                    await s.until_in(100)
                    if way == "SIGTERM":
                        s.worker.popen.send_signal(signal.SIGTERM)
                    else:
                        assert (await asyncio.to_thread(post, admin, "/drain", b""))[0] == 202
                    code, seconds = await exit_of(s.worker)
            assert code == 0
            assert seconds < BUDGET
            assert jobs.cut == []
            assert set(jobs.answers) <= {200, 503}
            assert all(after and int(after) > 0 for after in jobs.retry_after)
            async with asyncio.timeout(20):  # the worker has closed the channels: nobody else did
                media_a, media_b, events = [await each for each in shown]
            assert (len(frames(media_a)), len(frames(media_b))) == (50, 50)
            assert b'"stream_stopped"' in events
            assert "stopped: 0 jobs unfinished, 0 streams cut off" in last_line(s.worker)
            for name in ("a", "b"):
                assert re.search(rf"stream {name}: \d+ frames flushed, 0 dropped", last_line(s.worker))

    go()


@asynchronous
async def test_a_silent_input_does_not_hold_it_up() -> None:
    async with setup() as s:
        await s.start("s")
        s.worker.popen.send_signal(signal.SIGTERM)
        code, seconds = await exit_of(s.worker)
        assert code == 0
        assert seconds < 4, "nothing to flush, nothing to wait for"
        assert last_line(s.worker).endswith(
            "stopped: 0 jobs unfinished, 0 streams cut off; stream s: 0 frames flushed, 0 dropped"
        )


@contextlib.asynccontextmanager
async def deaf_output() -> AsyncIterator[str]:
    """The URL of a channel on a server that takes connections and never reads."""
    waiting: list[asyncio.StreamWriter] = []

    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        waiting.append(writer)

    deaf = await asyncio.start_server(never, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{deaf.sockets[0].getsockname()[1]}/out"
    finally:
        deaf.close()
        for writer in waiting:
            writer.transport.abort()


@pytest.mark.parametrize("signals", [1, 2])
def test_an_output_that_nobody_takes_is_given_up(signals: int) -> None:
    """What is lost is said; a second signal does not wait."""

    @asynchronous
    async def go() -> None:
        async with deaf_output() as url, setup("--lossless", "yes") as s:
            await s.start("s", publish_url=url)
            heard = asyncio.create_task(s.watch("s-events"))
            async with Publisher(s.session, s.base + "s", "video/MP2T") as publisher:
                await publisher.send(live_stream(20, first=90_000, gop=20))
                await s.until_in(20)
                s.worker.popen.send_signal(signal.SIGTERM)
                if signals == 2:
                    await asyncio.to_thread(s.worker.wait_for, "stopping:")
                    s.worker.popen.send_signal(signal.SIGTERM)
                code, seconds = await exit_of(s.worker)
            assert code == 0
            assert seconds < (BUDGET if signals == 1 else 4)
            assert "1 streams cut off; stream s: 0 frames flushed, 20 dropped" in last_line(s.worker)
            if signals == 1:
                async with asyncio.timeout(20):
                    assert b'"channel_failed"' in await heard, "it still said why"
            heard.cancel()
            await asyncio.wait([heard])

    go()


@asynchronous
async def test_a_deaf_output_holds_up_neither_jobs_nor_another_stream() -> None:
    """All at once, with jobs on four connections: exit 0 in time, and the last line says it of each stream."""
    async with deaf_output() as url, setup("--lossless", "yes") as s:
        await s.start("deaf", publish_url=url)
        await s.start("good")
        shown = asyncio.create_task(s.watch("good-out"))
        async with (
            Publisher(s.session, s.base + "deaf", "video/MP2T") as first,
            Publisher(s.session, s.base + "good", "video/MP2T") as second,
        ):
            with load(s.port, 4) as jobs:
                await asyncio.to_thread(jobs.going.wait, 30)
                await first.send(live_stream(20, first=90_000, gop=20))
                await second.send(live_stream(50, first=90_000, gop=25))
                await s.until_in(70)
                s.worker.popen.send_signal(signal.SIGTERM)
                code, seconds = await exit_of(s.worker)
        assert code == 0
        assert seconds < BUDGET
        assert jobs.cut == []
        async with asyncio.timeout(20):
            assert len(frames(await shown)) == 50
        assert "stopped: 0 jobs unfinished, 1 streams cut off" in last_line(s.worker)
        assert "stream deaf: 0 frames flushed, 20 dropped" in last_line(s.worker)
        assert re.search(r"stream good: \d+ frames flushed, 0 dropped", last_line(s.worker))


def test_a_processor_that_is_stuck_ends_the_process_with_a_status_of_its_own(tmp_path: Path) -> None:
    port = free_port()
    file = tmp_path / "stuck.py"
    file.write_text(STUCK.format(method="process", port=port))
    with running(program=(str(file),)) as worker:
        worker.wait_for("listening")
        job = threading.Thread(target=_ignoring_errors, args=(port,))
        job.start()
        worker.wait_for("Stuck: here")
        began = time.monotonic()
        assert worker.end() == EXIT_STUCK
        assert time.monotonic() - began < 3.0 + 2.0, "its own budget, and the machine's"
        assert "stopped: 1 jobs unfinished, 0 streams cut off" in last_line(worker)
        job.join(30)


def saves(tmp_path: Path, seconds: float, budget: float) -> tuple[str]:
    file = tmp_path / "saves.py"
    file.write_text(SAVES.format(seconds=seconds, budget=budget, port=free_port()))
    return (str(file),)


def test_a_processor_has_what_is_left_of_the_time_to_shut_down(tmp_path: Path) -> None:
    with running(program=saves(tmp_path, seconds=2.0, budget=20.0)) as worker:
        worker.wait_for("listening")
        assert worker.end() == 0
        assert "Saves: saved" in worker.log


def test_one_that_takes_all_of_it_ends_with_the_budget(tmp_path: Path) -> None:
    with running(program=saves(tmp_path, seconds=60, budget=3.0)) as worker:
        worker.wait_for("listening")
        began = time.monotonic()
        assert worker.end() == EXIT_STUCK
        assert time.monotonic() - began < 3.0 + 2.0, "its own budget, and the machine's"


def test_a_second_signal_does_not_wait_for_it(tmp_path: Path) -> None:
    with running(program=saves(tmp_path, seconds=60, budget=60.0)) as worker:
        worker.wait_for("listening")
        worker.popen.send_signal(signal.SIGTERM)
        worker.wait_for("Saves: began")
        began = time.monotonic()
        assert worker.end() == EXIT_STUCK
        assert time.monotonic() - began < 10.0


def test_a_drain_while_the_processor_loads_for_ever(tmp_path: Path) -> None:
    port = free_port()
    file = tmp_path / "stuck.py"
    at_exit = "import atexit\natexit.register(print, 'the interpreter cleans up', flush=True)\n"
    file.write_text(at_exit + STUCK.format(method="initialize", port=port))
    with running(program=(str(file),)) as worker:
        worker.wait_for("Stuck: here")
        assert get(port, "/health") == (503, {"status": "LOADING"})
        assert get(port, "/ready")[0] == 503
        began = time.monotonic()
        assert worker.end() == 0, "nothing was in the house"
        assert not any("cleans up" in line for line in worker.log), "that might wait for a device that is being opened"
        assert time.monotonic() - began < BUDGET
        assert not any("Traceback" in line for line in worker.log), worker.log


def test_the_time_is_kept_also_after_the_house_is_empty(tmp_path: Path) -> None:
    """Closing needs threads of the loop's own pool, and what the processor's file does may hold all of them."""
    port = free_port()
    file = tmp_path / "full.py"
    file.write_text(FULL.format(port=port))
    with running(program=(str(file),)) as worker:
        worker.wait_for("listening")
        assert post(port, "/", b"abc") == (200, b"abc")
        began = time.monotonic()
        assert worker.end() == EXIT_STUCK
        assert time.monotonic() - began < 3.0 + 2.0, "its own budget, and the machine's"
        assert "stopped: 0 jobs unfinished, 0 streams cut off" in last_line(worker)


def _ignoring_errors(port: int) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        post(port, "/", b"abc")
