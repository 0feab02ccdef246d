"""Raw frames over HTTP: our worker's job route, NVIDIA Triton through pytriton, and LitServe; same frames, same client.

All are up at once and measured in windows by turns. The others run in environments of their own under ``.venv-peers``,
each set up as its documentation recommends for the purpose, and are left out by name where they cannot be installed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from gpu_byoc.frames import FrameSpec
from gpu_byoc.local.children import Child, Children, pick_ports

from .harness import Sheet, Stable, together
from .load import Connection, cpu_of, device_mb, measure, memory_of, wait_until_ready
from .peer_environment import OURS, PEERS, SERVE, PeerUnavailable, install

CLIENTS: Final = (1, 16)
FRAME: Final = FrameSpec(640, 480)
BATCH: Final = 16  # as many as clients at the most
READY_SECONDS: Final = 120.0
RAW: Final = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A server: what starts it on a port, where it says that it is ready, how a frame is sent to it, its settings.

    ``head`` stands before the frame in a request's body; an answer's body ends with the frame.
    """

    name: str
    command: Callable[[int], Sequence[str]]
    ready: str
    path: str
    settings: str
    headers: dict[str, str] = field(default_factory=dict)
    head: bytes = b""


@dataclass(frozen=True, slots=True)
class Server:
    """One that is up; how long it took to be, in seconds."""

    recipe: Recipe
    child: Child
    port: int
    started: float

    @property
    def name(self) -> str:
        return self.recipe.name

    def connect(self, frame: bytes) -> Connection:
        headers = {"Content-Type": RAW, **self.recipe.headers}
        return Connection(self.port, self.recipe.path, headers, self.recipe.head + frame)


def row_of(name: str, count: int) -> str:
    return f"{count} client{'s' * (count > 1)}, {name}"


def ours() -> Recipe:
    return Recipe(
        OURS,
        lambda port: (sys.executable, *SERVE, "--port", str(port)),
        "/health",
        "/live/video-to-video",
        "serve --backend numpy, all else as it comes",
    )


def triton(python: Path) -> Recipe:
    tensor = {"name": "frames", "shape": [1, *FRAME.shape], "datatype": "UINT8"}
    wanted = {"name": "tinted", "parameters": {"binary_data": True}}
    size = {"parameters": {"binary_data_size": FRAME.nbytes}}
    head = json.dumps({"inputs": [tensor | size], "outputs": [wanted]}).encode()
    return Recipe(
        "pytriton",
        lambda port: PEERS["pytriton"].command(python, port, BATCH, FRAME.width, FRAME.height),
        "/v2/models/green_tint/ready",
        "/v2/models/green_tint/infer",
        f"python backend, DynamicBatcher() with max_batch_size={BATCH}, binary tensors over HTTP, gRPC and metrics off",
        {"Inference-Header-Content-Length": str(len(head))},
        head,
    )


def litserve(python: Path) -> Recipe:
    return Recipe(
        "litserve",
        lambda port: PEERS["litserve"].command(python, port, BATCH, 0.001),
        "/health",
        "/predict",
        f"max_batch_size={BATCH}, batch_timeout=0.001, workers_per_device=1, fast_queue=True, the body as raw bytes",
    )


BUILD: Final[dict[str, Callable[[Path], Recipe]]] = {"pytriton": triton, "litserve": litserve}


def run(sheet: Sheet) -> None:
    sheet.expect((1 + len(BUILD)) * len(CLIENTS))
    recipes, told = [ours()], []
    for name, build in BUILD.items():
        sheet.doing(f"{name}: its environment")
        try:
            python, found = install(PEERS[name])
        except PeerUnavailable as reason:
            for count in CLIENTS:
                sheet.skip(row_of(name, count), str(reason))
            continue
        recipes.append(build(python))
        told.append(found)
    sheet.settings(
        frames=f"{FRAME}, {FRAME.nbytes} bytes each way, random; a keep-alive connection and a thread a client",
        cpu="of the server and every process it has started, from the kernel; rss: their proportional set size",
        versions="; ".join(told) or "none of them is installed",
        **{recipe.name.replace("-", "_"): recipe.settings for recipe in recipes},
    )
    with serving(sheet, recipes) as servers:
        for count in CLIENTS:
            sheet.doing(f"{count} at once")
            compare(sheet, servers, count, random.Random(2).randbytes(FRAME.nbytes))


@contextlib.contextmanager
def serving(sheet: Sheet, recipes: Sequence[Recipe]) -> Iterator[list[Server]]:
    """All of them up at once. A peer that does not come up is skipped; ours failed."""
    with tempfile.TemporaryDirectory() as logs, Children(Path(logs)) as children:
        servers = []
        for recipe, port in zip(recipes, pick_ports([0] * len(recipes)), strict=True):
            sheet.doing(f"starting {recipe.name}")
            began = time.monotonic()
            child = children.start(recipe.name, recipe.command(port))
            try:
                wait_until_ready(f"http://127.0.0.1:{port}{recipe.ready}", child.process, READY_SECONDS)
            except (RuntimeError, TimeoutError):
                _absent(sheet, recipe, str(child.failure("does not start here")))
                continue
            servers.append(Server(recipe, child, port, time.monotonic() - began))
        yield servers


def _absent(sheet: Sheet, recipe: Recipe, reason: str) -> None:
    say = sheet.fail if recipe.name == OURS else sheet.skip
    for count in CLIENTS:
        say(row_of(recipe.name, count), reason)


def compare(sheet: Sheet, servers: Sequence[Server], count: int, frame: bytes) -> None:
    """Windows of each server in turn; the same number of jobs at the same number of connections."""
    with contextlib.ExitStack() as stack:
        windows = {}
        for server in servers:
            connections = [stack.enter_context(contextlib.closing(server.connect(frame))) for _ in range(count)]
            measure(connections, sheet.size.pick(1, 3, 10))
            if any(each.body[-len(frame) :] != tinted(frame) for each in connections):
                sheet.fail(row_of(server.name, count), "it answered other bytes than green tint gives")
                continue
            jobs = max(1, sheet.size.pick(2, 30, 160) // count)
            windows[server.name] = functools.partial(measure, connections, jobs, cpu_of(server.child.process.pid))
        measured = together(windows, sheet.size)
    for server in servers:
        if server.name in measured:
            values = _values(server, count, measured)
            sheet.row(row_of(server.name, count), measured[server.name], **values)


def _values(server: Server, count: int, measured: dict[str, Stable]) -> dict[str, Any]:
    mine, own = measured[server.name], measured.get(OURS)
    return {
        "server": server.name,
        "clients": count,
        "jobs_per_second": mine.rate,
        "p50_times_ours": mine.ratio(own) if own is not None and server.name != OURS else None,
        "start_seconds": server.started,
        "rss_mb": memory_of(server.child.process.pid) / 1e6,
        "device_mb": device_mb(server.child.process.pid),
    }


@functools.cache
def tinted(frame: bytes) -> bytes:
    pixels = np.frombuffer(frame, np.uint8).reshape(-1, 3).astype(np.int16)
    pixels[:, 1] = np.minimum(pixels[:, 1] + 80, 255)
    return pixels.astype(np.uint8).tobytes()
