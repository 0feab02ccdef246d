"""kill -9, as real processes meet it: a network under load, and a worker with live streams. See docs/chaos.md."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import random
import signal
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gpu_byoc.errors import SegmentFailed
from gpu_byoc.local.ledger import read_usage
from gpu_byoc.transport.trickle_client import Publisher, Subscriber, open_session
from tests.support.clips import frames, live_stream
from tests.support.processes import WAIT, Process, free_port, get, running
from tests.support.workers import asynchronous

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "1"))
MODEL = "green-tint-cpu"
FRAME = bytes(64 * 48 * 3)
TINTED = bytes([0, 80, 0]) * (64 * 48)
HEADERS = {"X-Model-Id": MODEL, "Content-Type": "application/octet-stream"}
CLIENTS = 3
MOST_JOBS = 20_000


class Network:
    """Worker, orchestrator and gateway on fixed ports; each may be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        worker, orch, gate = (free_port() for _ in range(3))
        self.ports = {"worker": worker, "orchestrator": orch, "gateway": gate}
        self.commands = {
            "worker": f"serve --backend numpy --host 127.0.0.1 --port {worker} --capability {MODEL}",
            "orchestrator": (
                f"livepeer -orchestrator -serviceAddr 127.0.0.1:{orch} -cliAddr 127.0.0.1:0 -datadir {folder} -byoc "
                f"-byocContainerURL http://127.0.0.1:{worker} -byocModelID {MODEL}"
            ),
            "gateway": (
                f"livepeer -gateway -orchAddr 127.0.0.1:{orch} -httpAddr 127.0.0.1:{gate} -httpIngest "
                f"-cliAddr 127.0.0.1:0 -datadir {folder}"
            ),
        }
        self._stack = contextlib.ExitStack()
        self._running: dict[str, Process] = {}

    def __enter__(self) -> Network:
        for name in self.commands:
            self.start(name)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, name: str) -> None:
        self._running[name] = self._stack.enter_context(running(*self.commands[name].split()))
        until(lambda: self._answers(name))

    def kill(self, name: str) -> None:
        assert self._running[name].end(signal.SIGKILL) == -signal.SIGKILL

    def logs(self) -> str:
        return "\n".join(line for process in self._running.values() for line in process.log)

    def _answers(self, name: str) -> bool:
        try:
            status, body = get(self.ports[name], "/health")
        except OSError:
            return False
        return status == 200 and body["status"] != "LOADING"


def until(condition: Callable[[], object]) -> None:
    """Another process has no event of ours."""
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


class Clients:
    """Threads that send jobs to the gateway until told to stop, and remember what came of each."""

    def __init__(self, port: int) -> None:
        self.answered: list[str] = []  # ids of the jobs whose answers came in whole
        self.others: Counter[str] = Counter()
        self._port = port
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(CLIENTS)
        self._tasks = [self._pool.submit(self._send) for _ in range(CLIENTS)]

    def _send(self) -> None:
        for _ in range(MOST_JOBS):
            if self._stop.is_set():
                return
            url = f"http://127.0.0.1:{self._port}/live/video-to-video"
            request = urllib.request.Request(url, data=FRAME, headers=HEADERS)
            try:
                with urllib.request.urlopen(request, timeout=WAIT) as answer:
                    body, name = answer.read(), answer.headers["X-Job-Id"]
                assert body == TINTED, "an answer that came in whole is the right one"
                self.answered.append(name)
            except urllib.error.HTTPError as error:
                with error:
                    error.read()
                self.others[str(error.code)] += 1
                time.sleep(0.005)
            except (OSError, http.client.HTTPException):
                self.others["connection"] += 1
                time.sleep(0.005)

    def flowing(self) -> None:
        """Return when jobs that began after this call are answered."""
        seen = len(self.answered)
        until(lambda: len(self.answered) > seen + CLIENTS or any(task.done() for task in self._tasks))
        for task in self._tasks:
            assert not task.done(), task.exception()

    def stop(self) -> None:
        self._stop.set()
        for task in self._tasks:
            task.result(WAIT)
        self._pool.shutdown()


@contextlib.contextmanager
def clients(port: int) -> Iterator[Clients]:
    made = Clients(port)
    try:
        yield made
    finally:
        made.stop()


@pytest.mark.timeout(60 * ROUNDS)
def test_kill_9_of_each_part_under_load(tmp_path: Path) -> None:
    """What was answered is right and booked once; what was not is refused in words or cut off; then jobs flow again."""
    dice = random.Random(5)
    with Network(tmp_path) as network:
        with clients(network.ports["gateway"]) as load:
            load.flowing()
            for name in [*network.commands] * ROUNDS:
                time.sleep(dice.uniform(0.05, 0.2))  # the moment is the point
                network.kill(name)
                time.sleep(dice.uniform(0.05, 0.2))
                network.start(name)
                load.flowing()
        assert load.others.keys() <= {"400", "502", "503", "504", "connection"}, load.others
        entries = read_usage(tmp_path, -1).entries
        outcomes = {row.job_id: row.outcome for row in entries}
        assert len(entries) == len(outcomes), "no row twice"
        assert {job: outcomes.get(job) for job in load.answered} == dict.fromkeys(load.answered, "ok")
        status = get(network.ports["worker"], "/stream/status")[1]
        assert all(room["free"] == room["slots"] for room in status["slots"])
        assert (status["active_jobs"], status["waiting_frames"]) == (0, 0)
        assert get(network.ports["orchestrator"], "/status")[1]["ledger"]["error"] is None
        assert "Traceback" not in network.logs()


# --- a worker with live streams


NAMES = ("a", "b")


async def start(session: aiohttp.ClientSession, port: int, trickle: int, name: str) -> None:
    base = f"http://127.0.0.1:{trickle}/{name}"
    for suffix in ("", "-out"):
        async with session.post(base + suffix, headers={"Expect-Content": "video/MP2T"}) as made:
            assert made.status == 200
    body = {"gateway_request_id": name, "subscribe_url": base, "publish_url": base + "-out"}
    async with session.post(f"http://127.0.0.1:{port}/stream/start", json=body) as started:
        assert started.status == 200, await started.text()


def numbers(port: int, name: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = get(port, "/stream/status")[1]["streams"]
    return next((each for each in found if each["stream_id"] == name), {"frames_out": 0, "frames_in": 0})


async def seen(what: Callable[[], bool]) -> None:
    await asyncio.to_thread(until, what)


async def watch(session: aiohttp.ClientSession, url: str, into: list[bytes]) -> None:
    async with Subscriber(session, url, start=0, every=True) as segments:
        async for segment in segments:
            with contextlib.suppress(SegmentFailed):  # it was being written when its writer died
                into.append(await segment.read())


def listening(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)
    try:
        connection.request("GET", "/none/next")
        return connection.getresponse().status == 404
    except OSError:
        return False
    finally:
        connection.close()


SERVE = ("serve", "--backend", "numpy", "--host", "127.0.0.1", "--lossless", "yes", "--port")


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_kill_9_of_a_worker_with_live_streams(seed: int) -> None:
    """Its successor goes on with the same channels; viewers see every frame that came after it was started."""

    @asynchronous
    async def go() -> None:
        port, trickle = free_port(), free_port()
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(running("trickle", "--port", str(trickle), "--autocreate"))
            await seen(lambda: listening(trickle))
            async with open_session() as session:
                shown: dict[str, list[bytes]] = {name: [] for name in NAMES}
                tasks: list[asyncio.Task[None]] = []
                for life in range(2):
                    worker = stack.enter_context(running(*SERVE, str(port)))
                    await asyncio.to_thread(worker.wait_for, "listening on port")
                    for name in NAMES:
                        await start(session, port, trickle, name)
                        if not life:
                            url = f"http://127.0.0.1:{trickle}/{name}-out"
                            tasks.append(asyncio.create_task(watch(session, url, shown[name])))
                    await asyncio.gather(*(play(session, port, trickle, name, life) for name in NAMES))
                    if not life:
                        await asyncio.sleep(random.Random(seed).uniform(0, 0.05))  # the moment is the point
                        assert await asyncio.to_thread(worker.end, signal.SIGKILL) == -signal.SIGKILL
                assert await asyncio.to_thread(worker.end) == 0
                for name in NAMES:
                    async with session.delete(f"http://127.0.0.1:{trickle}/{name}-out"):
                        pass
                await asyncio.gather(*tasks)
            for name in NAMES:
                pts = [frame.pts for data in shown[name] if data for frame in frames(data)]
                second = [each for each in pts if each is not None and each >= 10 * 90_000]
                assert len(second) == len(set(second)) == 50, f"{name}: everything of the second life"
            assert not any("Traceback" in line for process in (server, worker) for line in process.log)

    go()


async def play(session: aiohttp.ClientSession, port: int, trickle: int, name: str, life: int) -> None:
    """Two segments of 25 frames, read and out; a third is on its way where the worker is to die."""
    async with Publisher(session, f"http://127.0.0.1:{trickle}/{name}", "video/MP2T") as publisher:
        begin = (1 + 10 * life) * 90_000
        for part in range(2):
            await publisher.send(live_stream(25, first=begin + part * 25 * 3600, gop=25))
            await seen(lambda part=part: numbers(port, name)["frames_out"] >= 25 * (part + 1))  # type: ignore[misc]
        if not life:
            await publisher.send(live_stream(25, first=begin + 50 * 3600, gop=25))


@asynchronous
async def test_kill_9_of_a_trickle_server_ends_its_stream_and_no_other() -> None:
    """The other server's stream goes on without a loss; the worker takes the next one of the server that came back."""
    port, victim, other = (free_port() for _ in range(3))
    with contextlib.ExitStack() as stack:
        servers = {each: stack.enter_context(trickle_server(each)) for each in (victim, other)}
        worker = stack.enter_context(running(*SERVE, str(port)))
        await asyncio.to_thread(worker.wait_for, "listening on port")
        for each in servers:
            await seen(lambda each=each: listening(each))  # type: ignore[misc]
        async with open_session() as session:
            await start(session, port, victim, "a")
            await start(session, port, other, "b")
            shown: list[bytes] = []
            task = asyncio.create_task(watch(session, f"http://127.0.0.1:{other}/b-out", shown))
            async with Publisher(session, f"http://127.0.0.1:{victim}/a", "video/MP2T") as publisher:
                await publisher.send(live_stream(25, first=90_000, gop=25))
                await seen(lambda: numbers(port, "a")["frames_out"] == 25)
                await asyncio.to_thread(servers[victim].end, signal.SIGKILL)
            stack.enter_context(trickle_server(victim))  # it has forgotten every channel
            await play(session, port, other, "b", 1)
            await seen(lambda: get(port, "/stream/status")[1]["active_streams"] == 1)
            await start(session, port, victim, "a")
            await play(session, port, victim, "a", 1)
            assert await asyncio.to_thread(worker.end) == 0
            async with session.delete(f"http://127.0.0.1:{other}/b-out"):
                pass
            await task
        assert len(frames(b"".join(shown))) == 50
        assert any("stream b: ended" in line and "50 frames in, 50 out, 0 dropped" in line for line in worker.log)
        assert not any("Traceback" in line for line in worker.log)


def trickle_server(port: int) -> contextlib.AbstractContextManager[Process]:
    return running("trickle", "--port", str(port), "--autocreate")
