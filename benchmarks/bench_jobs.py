"""A 640x480 RGB frame as a job: bare aiohttp echo, our worker on each backend, the page's processor, the local chain.

All targets are up at once, and windows go through them in turn; a ratio is the median of the rounds' ratios to the
bare echo of the same round, so that a slow moment of the machine hits both sides. The client is in this process, one
thread a connection, on the same cores as the servers.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .harness import Sheet, Size, Stable, Window, together
from .load import REFUSALS, Connection, cpu_of, device_mb, free_port, measure, memory_of, process, wait_until_ready
from .machine import backends

FRAME: Final = 640 * 480 * 3
PAGE: Final = Path(__file__).resolve().parent.parent / "examples" / "processor.py"
MODEL: Final = "green-tint-cpu"
ROUTE: Final = "/live/video-to-video"
ECHO: Final = "bare aiohttp echo"
SLOTS: Final = 64
"""As many as connections at the most, so that none is refused for want of one."""


@dataclass(frozen=True)
class Target:
    name: str
    port: int
    path: str
    start_seconds: float
    pids: tuple[int, ...]  # its processes, the one that is spoken to first
    slow: bool = False  # a few jobs say enough
    worker: int | None = None  # port of the worker that computes

    def used(self) -> tuple[int, float]:
        """Frames and compute seconds that the worker has booked so far."""
        if self.worker is None:
            return 0, 0.0
        with urllib.request.urlopen(f"http://127.0.0.1:{self.worker}/compute", timeout=30) as answer:
            booked = json.load(answer)["device"]
        return booked["frames"], booked["compute_seconds"]


@contextlib.contextmanager
def targets(slots: int = SLOTS) -> Iterator[list[Target]]:
    with contextlib.ExitStack() as stack:
        found: list[Target] = []

        def start(name: str, *arguments: str, path: str = ROUTE, slow: bool = False) -> Target:
            port = free_port()
            child = stack.enter_context(process(*(a.replace("PORT", str(port)) for a in arguments)))
            began = wait_until_ready(f"http://127.0.0.1:{port}/health", child, 120)
            target = Target(name, port, path, began, (child.pid,), slow, port if path == ROUTE else None)
            found.append(target)
            return target

        echo = ("-m", f"{__package__}.echo_server", "PORT")
        start(ECHO, *echo, path="/")
        start("the same, tuned as the worker is", *echo, "tuned", path="/")
        serve = ("-m", "gpu_byoc", "serve", "--host", "127.0.0.1", "--port", "PORT", "--slots", str(slots), "--backend")
        worker = start("worker, numpy green tint", *serve, "numpy", "--capability", MODEL)
        for name, reason in backends().items():
            if name != "numpy" and not reason:
                start(f"worker, {name} green tint", *serve, name)
        if PAGE.exists():
            run = ("-m", "gpu_byoc", "run", str(PAGE), "--host", "127.0.0.1", "--port", "PORT")
            start("worker, the page's processor", *run, slow=True)
        found.append(_chain(stack, worker, slots))
        yield found


def _chain(stack: contextlib.ExitStack, worker: Target, slots: int) -> Target:
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    orchestrator, gateway, cli = free_port(), free_port(), (free_port(), free_port())
    common = ("-m", "gpu_byoc", "livepeer", "-network", "offchain")
    middle = stack.enter_context(
        process(
            *(*common, "-orchestrator", "-serviceAddr", f"127.0.0.1:{orchestrator}", "-cliAddr", f"127.0.0.1:{cli[0]}"),
            *("-datadir", str(directory / "orchestrator"), "-byoc", "-byocModelID", MODEL),
            *("-byocContainerURL", f"http://127.0.0.1:{worker.port}", "-byocCapacity", str(slots)),
        )
    )
    wait_until_ready(f"http://127.0.0.1:{orchestrator}/health", middle)
    child = stack.enter_context(
        process(
            *(*common, "-gateway", "-orchAddr", f"127.0.0.1:{orchestrator}", "-httpAddr", f"127.0.0.1:{gateway}"),
            *("-httpIngest", "-cliAddr", f"127.0.0.1:{cli[1]}", "-datadir", str(directory / "gateway")),
        )
    )
    began = wait_until_ready(f"http://127.0.0.1:{gateway}/health", child)
    pids = (child.pid, middle.pid, *worker.pids)
    return Target("gateway, orchestrator, worker", gateway, ROUTE, began, pids, worker=worker.port)


def run(sheet: Sheet) -> None:
    counts = sheet.size.pick((1,), (1, 4), (1, 4, 16, 64))
    payload = random.Random(1).randbytes(FRAME)
    sheet.doing("starting the servers")
    with targets() as found:
        absent = {name: reason for name, reason in backends().items() if reason}
        sheet.expect(len(found) * len(counts) + len(absent) + (not PAGE.exists()))
        sheet.settings(
            frame=f"640x480 rgb24, {FRAME} bytes each way, random",
            client="this process, blocking sockets, keep-alive, one thread a connection, on the servers' cores",
            echo="aiohttp, chunks copied into one preallocated buffer and answered from it, no access log",
            worker=f"gpu-byoc serve --slots {SLOTS}",
            chain=f"gateway, orchestrator (-byocCapacity {SLOTS}) and the numpy worker, a process each",
        )
        for name, reason in absent.items():
            sheet.skip(f"worker, {name} green tint", reason)
        if not PAGE.exists():
            sheet.skip("worker, the page's processor", "examples/processor.py is not installed; run this in a checkout")
        for count in counts:
            sheet.doing(f"{count} connections")
            _compare(sheet, found, count, payload)


def _compare(sheet: Sheet, found: list[Target], count: int, payload: bytes) -> None:
    size = sheet.size
    with contextlib.ExitStack() as stack:
        windows: dict[str, Callable[[], Window]] = {}
        before = {}
        for target in found:
            if target.slow and count > 1:
                continue
            connections = [stack.enter_context(_connection(target, payload)) for _ in range(count)]
            measure(connections[:1], 2 if target.slow else size.pick(2, 10, 30))
            _check(target, connections[0], payload)
            windows[target.name] = functools.partial(
                measure, connections, _jobs(size, count, target.slow), cpu_of(*target.pids), REFUSALS
            )
            before[target.name] = target.used()
        slow = {target.name for target in found if target.slow}
        measured = together({name: each for name, each in windows.items() if name not in slow}, size)
        ratios = {name: each.ratio(measured[ECHO]) for name, each in measured.items()}
        for name in slow & set(windows):
            pair = together({ECHO: windows[ECHO], name: windows[name]}, size, most=3)
            measured[name], ratios[name] = pair[name], pair[name].ratio(pair[ECHO])
    for target in found:
        name = f"{target.name}, {_said(count)}"
        if target.name in measured:
            frames, seconds = (now - then for now, then in zip(target.used(), before[target.name], strict=True))
            compute = seconds / frames * 1e6 if frames else None
            ours = measured[target.name]
            sheet.row(name, ours, **_values(target, count, ours, ratios[target.name], compute))
        else:
            sheet.skip(name, "a Python loop on one thread: more connections would only wait in line")


def _said(count: int) -> str:
    return f"{count} connection" + "s" * (count > 1)


def _jobs(size: Size, count: int, slow: bool) -> int:
    """Jobs a connection in one window."""
    return size.pick(1, 2, 3) if slow else max(2, size.pick(4, 40, 240) // count)


@contextlib.contextmanager
def _connection(target: Target, payload: bytes) -> Iterator[Connection]:
    headers = {"Content-Type": "application/octet-stream", "X-Model-Id": MODEL}
    connection = Connection(target.port, target.path, headers, payload)
    try:
        yield connection
    finally:
        connection.close()


def _check(target: Target, connection: Connection, payload: bytes) -> None:
    """Outside the measured part: the right bytes came back."""
    expected = payload if target.path == "/" else _tinted(payload)
    if connection.body != expected:
        raise AssertionError(f"{target.name} answered other bytes than it should")


@functools.cache
def _tinted(payload: bytes) -> bytes:
    """What the page's processor makes of a frame: its own loop."""
    data = bytearray(payload)
    for i in range(1, len(data), 3):
        data[i] = min(255, data[i] + 80)
    return bytes(data)


def _values(target: Target, count: int, ours: Stable, ratio: float, compute: float | None) -> dict[str, Any]:
    return {
        "target": target.name,
        "connections": count,
        "jobs_per_second": ours.rate,
        "p50_times_echo": ratio,
        "jobs": ours.operations,
        "refused": ours.refused,
        "compute_seconds_per_million_frames": compute,
        "start_seconds": target.start_seconds,
        "rss_mb": memory_of(*target.pids) / 1e6,
        "device_mb": device_mb(*target.pids),
    }
