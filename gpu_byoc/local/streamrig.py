"""What live streams need around them, a trickle server and a worker as processes, and playing several at once."""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO, Final

import aiohttp
import psutil

from gpu_byoc.errors import ConfigError
from gpu_byoc.local.children import Child, Children, pick_ports
from gpu_byoc.local.container import reason_of
from gpu_byoc.local.streamclient import Figures, LiveClient, Plan
from gpu_byoc.media.mux import SEGMENT_SECONDS
from gpu_byoc.transport.trickle_client import open_session

BASE: Final = "/ai/trickle/"
"""Where go-livepeer has its channels."""

SLOTS: Final = 3  # that a stream holds when its worker keeps up
READY_SECONDS: Final = 60.0  # a GPU backend may compile and warm up
_POLL_SECONDS: Final = 0.05  # between looks at another process, which has no event of ours
_GUARD_SECONDS: Final = 0.5
_PROGRAM: Final = (sys.executable, "-m", "gpu_byoc")


@dataclass(frozen=True, slots=True)
class Rig:
    """URLs, and the processes that are ours (None: somebody else's)."""

    trickle: str
    worker: str
    trickle_child: Child | None
    worker_child: Child | None

    @property
    def children(self) -> list[Child]:
        return [child for child in (self.trickle_child, self.worker_child) if child is not None]


def start(
    children: Children,
    *,
    backend: str = "auto",
    streams: int = 1,
    lossless: bool = False,
    trickle: str | None = None,
    worker: str | None = None,
) -> Rig:
    """Start what is not given by its URL, without waiting for it; await ``ready`` next."""
    ports = pick_ports([0, 0])
    trickle_child = worker_child = None
    if trickle is None:
        trickle = f"http://127.0.0.1:{ports[0]}{BASE}"
        flags = f"--port {ports[0]} --base-path {BASE} --autocreate"
        trickle_child = children.start("trickle", (*_PROGRAM, "trickle", *flags.split()))
    if worker is None:
        worker = f"http://127.0.0.1:{ports[1]}"
        flags = (
            f"--processor green_tint --backend {backend} --host 127.0.0.1 --port {ports[1]} "
            f"--lossless {'yes' if lossless else 'no'}"
        )
        more = ("--slots", str(SLOTS * streams)) if streams > 10 else ()  # 10 is what its 32 slots allow
        worker_child = children.start("worker", (*_PROGRAM, "serve", *flags.split(), *more))
    return Rig(trickle.rstrip("/") + "/", worker.rstrip("/"), trickle_child, worker_child)


async def ready(rig: Rig) -> None:
    """Return when a stream can be started.

    Raises:
        ChildEnded: one of ours ended or takes too long; with the end of its log.
        ConfigError: nobody is there at a URL that was given.
    """
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as http:
        # Any answer will do for a trickle server: that channel does not exist.
        await _answers(http, rig.trickle_child, "--trickle", f"{rig.trickle}none/next", lambda status: True)
        await _answers(http, rig.worker_child, "--worker", f"{rig.worker}/health", lambda status: status == 200)


async def _answers(
    http: aiohttp.ClientSession, child: Child | None, flag: str, url: str, accept: Callable[[int], bool]
) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if child is not None:
            child.check()
        try:
            async with http.get(url) as answer:
                if accept(answer.status):
                    return
        except (aiohttp.ClientError, OSError) as error:
            if child is None:
                cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
                raise ConfigError(f"{flag}: nobody answers at {url} ({reason_of(cause)})") from error
        await asyncio.sleep(_POLL_SECONDS)
    if child is None:
        raise ConfigError(f"{flag}: {url} was not as expected within {READY_SECONDS:g} s")
    raise child.failure(f"was not as expected within {READY_SECONDS:g} s ({url})")


class Play:
    """Several streams of one plan at once, evenly spread over a segment's time as those of strangers would be.

    ``await play.run()``, then ask. CPU is the worker process's from the first picture that the last stream to begin
    brings to the last picture of the last to end: without starting up, loading code and ending.
    """

    def __init__(self, rig: Rig, plan: Plan, streams: int, record: BinaryIO | None = None) -> None:
        """``record`` gets the first stream's output."""
        self.plan = plan
        self.clients: list[LiveClient] = []
        self.cpu_seconds: float | None = None
        self.cpu_frames = 0
        self.seconds = 0.0  # that cpu_seconds were spent in
        self.encoder = ""
        self._rig = rig
        self._streams = streams
        self._record = record
        self._process = psutil.Process(rig.worker_child.process.pid) if rig.worker_child is not None else None
        self._begun = self._done = 0
        self._mark: tuple[float, float, int] | None = None

    @property
    def figures(self) -> list[Figures]:
        return [client.figures for client in self.clients]

    @property
    def frames_out(self) -> int:
        return sum(len(each.received) for each in self.figures)

    @property
    def latencies(self) -> list[float]:
        """Of all streams together, seconds."""
        return [latency for each in self.figures for latency in each.latencies()]

    @property
    def cpu_per_frame(self) -> float | None:
        return self.cpu_seconds / self.cpu_frames if self.cpu_seconds is not None and self.cpu_frames else None

    @property
    def rate(self) -> float:
        """Frames a second of all streams together; NaN where it was too short to say."""
        return self.cpu_frames / self.seconds if self.seconds else float("nan")

    async def run(self) -> None:
        """Play to the end. A stream's failure is in its ``error``. Raises ChildEnded if a process of ours ends."""
        label = secrets.token_hex(4)
        async with open_session() as http:
            for number in range(1, self._streams + 1):
                client = LiveClient(
                    http,
                    f"live-{label}-{number}",
                    self._rig.trickle,
                    self._rig.worker,
                    self.plan,
                    record=self._record if number == 1 else None,
                    on_first=self._first,
                    on_last=self._last,
                )
                self.clients.append(client)
            async with asyncio.TaskGroup() as group:
                guard = group.create_task(self._guard())
                await self._all(http)
                guard.cancel()

    async def _all(self, http: aiohttp.ClientSession) -> None:
        step = SEGMENT_SECONDS / self._streams if self.plan.real_time else 0.0
        async with asyncio.TaskGroup() as group:
            for number, client in enumerate(self.clients):
                group.create_task(self._one(client, number * step))

    async def _one(self, client: LiveClient, wait: float) -> None:
        await asyncio.sleep(wait)
        await client.run()

    async def _guard(self) -> None:
        while True:
            for child in self._rig.children:
                child.check()
            await asyncio.sleep(_GUARD_SECONDS)

    # --- CPU

    def _first(self) -> None:
        self._begun += 1
        if self._begun == self._streams and self._process is not None:
            self._mark = time.monotonic(), self._cpu(), self.frames_out

    def _last(self) -> None:
        """The last call counts; each moves the end."""
        if self._mark is not None:
            at, cpu, frames = self._mark
            with suppress(psutil.NoSuchProcess):  # the guard says so
                self.seconds = time.monotonic() - at
                self.cpu_seconds, self.cpu_frames = self._cpu() - cpu, self.frames_out - frames

    def _cpu(self) -> float:
        assert self._process is not None
        times = self._process.cpu_times()
        return float(times.user + times.system)
