"""How long ``GET /health`` takes while everything is busy: a new connection each time, as container runtimes and
orchestrators ask.

The load is a process of its own and keeps every core and the worker busy with jobs, in one row beside live streams in
real time, which another process plays; the one who asks is this process.
Asked in turn: the worker; the floor, a process that waits in ``accept`` and does nothing else, and so shows what the
machine's scheduler adds; and, under the same load of its own, a bare aiohttp server whose event loop answers
``/health`` between frames, as most servers do.
"""

from __future__ import annotations

import contextlib
import functools
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from .bench_jobs import PAGE
from .harness import Sheet, Stable, Window, together
from .load import Child, cpu_of, free_port, process, wait_until_ready

BUDGET_MS: Final = 20.0
PAUSE: Final = 0.01
"""Seconds between two questions: a hundred a second, more than anybody asks."""

FLOOR: Final = """
import socket, sys
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as server:
    while True:
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.send(b'HTTP/1.1 200 OK\\r\\nContent-Length: 18\\r\\n\\r\\n{"status": "IDLE"}')
"""

STREAM_SECONDS: Final = 300
"""Of video for the streams: longer than the measurement, which ends them."""

START_SECONDS: Final = 60.0

TRICKLE: Final = ("-m", "gpu_byoc", "trickle", "--base-path", "/ai/trickle/", "--autocreate")

STREAM: Final = ("-m", "gpu_byoc", "stream")

REQUEST: Final = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True)
class Case:
    name: str
    arguments: tuple[str, ...]
    connections: int
    streams: int = 0

    @property
    def load(self) -> str:
        return f"{self.connections} connections" + (f" and {self.streams} live streams" if self.streams else "")


def cases(sheet: Sheet) -> list[Case]:
    serve = ("-m", "gpu_byoc", "serve", "--host", "127.0.0.1", "--port", "PORT", "--slots", "64")
    count = sheet.size.pick(4, 64, 64)
    found = [
        Case("worker, numpy green tint", (*serve, "--backend", "numpy"), count),
        Case("worker with live streams", (*serve, "--backend", "numpy"), count, sheet.size.pick(1, 8, 8)),
        Case("bare aiohttp, health on its loop", ("-m", f"{__package__}.echo_server", "PORT"), count),
    ]
    if PAGE.exists():
        run = ("-m", "gpu_byoc", "run", str(PAGE), "--host", "127.0.0.1", "--port", "PORT")
        found.append(Case("worker, the page's processor: a Python loop", run, 4))
    return found


def run(sheet: Sheet) -> None:
    found = cases(sheet)
    sheet.expect(len(found))
    sheet.settings(
        load="640x480 rgb24 jobs without a pause, a process of its own",
        asked=f"GET /health, a new connection every {PAUSE * 1e3:g} ms",
        floor="a Python process that only accepts and answers, asked in turn",
        budget=f"99 in 100 within {BUDGET_MS:g} ms",
    )
    for case in found:
        sheet.doing(case.name)
        _measure(sheet, case)


def _measure(sheet: Sheet, case: Case) -> None:
    port, floor = free_port(), free_port()
    arguments = [each.replace("PORT", str(port)) for each in case.arguments]
    with process(*arguments) as server, process("-c", FLOOR, str(floor)) as bare:
        wait_until_ready(f"http://127.0.0.1:{port}/health", server, 60)
        wait_until_ready(f"http://127.0.0.1:{floor}/", bare)
        with _streams(port, case.streams) if case.streams else contextlib.nullcontext(), _load(port, case.connections):
            times = sheet.size.pick(5, 20, 150)
            measured = together(
                {
                    "ours": functools.partial(_ask, port, times, cpu_of(server.pid)),
                    "floor": functools.partial(_ask, floor, times, cpu_of(bare.pid)),
                },
                sheet.size,
                most=sheet.size.pick(3, 3, 8),
            )
    sheet.row(f"{case.name}, {case.load}", **_values(case, measured))


def _values(case: Case, measured: dict[str, Stable]) -> dict[str, Any]:
    """The floor's 99th percentile belongs beside ours: on a machine that others use, both are theirs."""
    ours, floor = measured["ours"], measured["floor"]
    return {
        "target": case.name,
        "connections": case.connections,
        "streams": case.streams,
        "p50_us": ours.p50 * 1e6,
        "p99_us": ours.p99 * 1e6,
        "floor_p50_us": floor.p50 * 1e6,
        "floor_p99_us": floor.p99 * 1e6,
        "budget_ms": BUDGET_MS,
        "asked": ours.operations,
        "windows": len(ours.rounds),
        "spread": ours.spread,
        **({} if ours.stable else {"unstable": True}),
    }


def _ask(port: int, times: int, cpu: Callable[[], float]) -> Window:
    taken: list[float] = []
    used, start = cpu(), time.perf_counter()
    for _ in range(times):
        time.sleep(PAUSE)
        began = time.perf_counter()
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(REQUEST)
            answer = b""
            while b"}" not in answer:
                if not (part := connection.recv(4096)):
                    raise ConnectionError(f"/health broke off after {answer!r}")
                answer += part
        taken.append(time.perf_counter() - began)
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"/health under load: {answer!r}")
    return Window(tuple(taken), time.perf_counter() - start, cpu() - used)


@contextlib.contextmanager
def _streams(port: int, count: int) -> Iterator[None]:
    """So many play for the time of the block, from when a frame of each has come out. Jobs then take from them what
    they take: frames may be dropped, and none of the streams may end.

    Raises:
        RuntimeError: one of them ended.
    """
    trickle = free_port()
    with tempfile.TemporaryDirectory() as made, process(*TRICKLE, "--port", str(trickle)) as channels:
        _until(channels, lambda: _listens(trickle))
        url = f"http://127.0.0.1:{trickle}/ai/trickle/"
        play = ("--streams", str(count), "--seconds", str(STREAM_SECONDS), "--output", f"{made}/out.mp4")
        with process(*STREAM, *play, "--trickle", url, "--worker", f"http://127.0.0.1:{port}") as player:
            _until(player, lambda: sum(each["frames_out"] > 0 for each in _status(port)) == count)
            yield
            if (left := len(_status(port))) != count:
                raise RuntimeError(f"{count - left} of {count} live streams ended under the load")


def _until(child: Child, done: Callable[[], bool]) -> None:
    began = time.perf_counter()
    while not done():
        if child.poll() is not None:
            raise RuntimeError(f"{child.args!r} ended: {child.last_words()}")
        if time.perf_counter() - began > START_SECONDS:
            raise TimeoutError(f"{child.args!r} was not as expected within {START_SECONDS:g} s")
        time.sleep(0.05)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def _status(port: int) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/stream/status", timeout=60) as answer:
        streams: list[dict[str, Any]] = json.load(answer)["streams"]
    return streams


@contextlib.contextmanager
def _load(port: int, connections: int) -> Iterator[None]:
    """Busy for the time of the block."""
    command = [sys.executable, "-m", f"{__package__}.load", str(port), str(connections)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as load:
        try:
            assert load.stdout is not None
            if load.stdout.readline() != "busy\n":
                raise RuntimeError("the load did not start")
            yield
            out, _ = load.communicate(timeout=60)
            done, failed = map(int, out.split())
            if failed or not done:
                raise RuntimeError(f"the load: {done} jobs done, {failed} refused or failed")
        finally:
            load.kill()
