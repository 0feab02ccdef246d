"""A 640x480 RGB frame as a job: bare aiohttp echo, our worker, the page's processor, and the whole local chain.

All targets are up at once; short rounds go through them in turn, and a figure is the median of the rounds' ratios to
the bare echo of the same round, so that a slow moment of the machine hits both sides.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Connection, Load, free_port, measure, percentile, process, rss, wait_until_ready

FRAME = 640 * 480 * 3
PAGE = Path(__file__).parent.parent / "examples" / "processor.py"
MODEL = "green-tint-cpu"
ROUTE = "/live/video-to-video"


@dataclass(frozen=True)
class Target:
    name: str
    port: int
    path: str
    start_seconds: float
    pid: int
    slow: bool = False  # a few jobs say enough
    behind: int | None = None  # another process of the target


@contextlib.contextmanager
def targets() -> Iterator[list[Target]]:
    with contextlib.ExitStack() as stack:
        found = []

        def start(name: str, *arguments: str, path: str = ROUTE, slow: bool = False) -> Target:
            port = free_port()
            child = stack.enter_context(process(*(a.replace("PORT", str(port)) for a in arguments)))
            began = wait_until_ready(f"http://127.0.0.1:{port}/health", child)
            target = Target(name, port, path, began, child.pid, slow)
            found.append(target)
            return target

        start("bare aiohttp echo", "-m", "benchmarks.echo_server", "PORT", path="/")
        start("the same, tuned as the worker is", "-m", "benchmarks.echo_server", "PORT", "tuned", path="/")
        serve = ("-m", "gpu_byoc", "serve", "--host", "127.0.0.1", "--port", "PORT", "--backend", "numpy")
        worker = start("worker, numpy green tint", *serve, "--capability", MODEL)
        run = ("-m", "gpu_byoc", "run", str(PAGE), "--host", "127.0.0.1", "--port", "PORT")
        start("worker, the page's processor", *run, slow=True)
        found.append(_chain(stack, worker))
        yield found


def _chain(stack: contextlib.ExitStack, worker: Target) -> Target:
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    orchestrator, gateway, cli = free_port(), free_port(), (free_port(), free_port())
    common = ("-m", "gpu_byoc", "livepeer", "-network", "offchain")
    middle = stack.enter_context(
        process(
            *(*common, "-orchestrator", "-serviceAddr", f"127.0.0.1:{orchestrator}", "-cliAddr", f"127.0.0.1:{cli[0]}"),
            *("-datadir", str(directory / "orchestrator"), "-byoc", "-byocModelID", MODEL),
            *("-byocContainerURL", f"http://127.0.0.1:{worker.port}"),
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
    return Target("gateway -> orchestrator -> worker", gateway, ROUTE, began, child.pid, behind=middle.pid)


def run(quick: bool) -> list[dict[str, Any]]:
    payload = random.Random(1).randbytes(FRAME)
    rows = []
    with targets() as found:
        for count in (1, 4):
            rows += _compare(found, count, payload, rounds=4 if quick else 16, jobs=60 if quick else 200)
        memory = {target.name: rss(target.pid) / 1e6 for target in found}
    for row in rows:
        row["rss_mb"] = memory[row["target"]]
    return rows


def _compare(found: list[Target], count: int, payload: bytes, rounds: int, jobs: int) -> list[dict[str, Any]]:
    headers = {"Content-Type": "application/octet-stream", "X-Model-Id": MODEL}
    connections = {t.name: [Connection(t.port, t.path, headers, payload) for _ in range(count)] for t in found}
    loads: dict[str, list[Load]] = {target.name: [] for target in found}
    for target in found:
        measure(connections[target.name], 2 if target.slow else 30)
        _check(target, connections[target.name][0], payload)
    for number in range(rounds):
        for target in found:
            if not target.slow or number < 3:
                loads[target.name].append(
                    measure(connections[target.name], 2 if target.slow else max(10, jobs // count))
                )
    for group in connections.values():
        for connection in group:
            connection.close()
    floor = loads[found[0].name]
    return [_row(target, count, loads[target.name], floor) for target in found]


def _check(target: Target, connection: Connection, payload: bytes) -> None:
    """Outside the measured part: the right bytes came back."""
    from benchmarks.bench_kernels import page_loop

    expected = payload if target.path == "/" else page_loop(payload)
    if connection.body != expected:
        raise AssertionError(f"{target.name} answered other bytes than it should")


def _row(target: Target, count: int, loads: list[Load], floor: list[Load]) -> dict[str, Any]:
    times = [t for load in loads for t in load.seconds]
    pairs = list(zip(loads, floor, strict=False))
    return {
        "target": target.name,
        "connections": count,
        "jobs": len(times),
        "p50_us": percentile(times, 0.5) * 1e6,
        "p99_us": percentile(times, 0.99) * 1e6,
        "jobs_per_second": percentile([load.rate for load in loads], 0.5),
        "p50_ratio": percentile([percentile(a.seconds, 0.5) / percentile(b.seconds, 0.5) for a, b in pairs], 0.5),
        "p99_ratio": percentile([percentile(a.seconds, 0.99) / percentile(b.seconds, 0.99) for a, b in pairs], 0.5),
        "rate_ratio": percentile([a.rate / b.rate for a, b in pairs], 0.5),
        "start_seconds": target.start_seconds,
    }
