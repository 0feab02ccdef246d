"""One live stream through our worker and through another that speaks trickle: same clip, same server, same client.

Nothing of what a worker says about itself is used: frames are counted where they come out, CPU is the kernel's. A frame
is lost when it never came out though a later one did; the last few, which a demuxer holds until more comes, are not.
"""

from __future__ import annotations

import asyncio
import io
import json
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import av
import numpy as np

from gpu_byoc.local import streamrig
from gpu_byoc.local.children import Child, Children, pick_ports
from gpu_byoc.local.streamclient import LiveClient, Plan, StreamRefused
from gpu_byoc.transport.trickle_client import open_session

from .load import cpu_of, memory_of

READY_SECONDS: Final = 120.0  # importing torch takes a while on a busy machine
QUIET_SECONDS: Final = 2.0  # without a picture, after which nothing more is expected
TINT: Final = 80
FIRST: Final = 50  # frames of the clip among which the first one that came out has to be
NEAR: Final = 12.0
"""Mean difference of a channel's values, of 255, that two lossy encodings of a green frame may have."""


@dataclass(frozen=True, slots=True)
class Subject:
    """Who is measured. ``command`` starts its server on a port; ``params`` go into the start of its stream."""

    name: str
    command: Callable[[int], Sequence[str]]
    params: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """What one stream came to: latencies in seconds, CPU seconds a frame, frames a second, bytes, seconds to start."""

    published: int
    received: int
    lost: int
    latencies: tuple[float, ...]
    cpu: float
    rate: float
    rss: int
    start: float


class NoStart(Exception):
    """A server does not start here; with the end of its log."""

    def __init__(self, child: Child) -> None:
        super().__init__(str(child.failure("does not start here")))
        self.name = child.name


class AnyWorkersClient(LiveClient):
    """The publisher and the viewer of ``LiveClient`` for a worker whose events nobody reads."""

    def __init__(self, *given: Any, params: dict[str, Any], **named: Any) -> None:
        super().__init__(*given, **named)
        self._params = params

    async def _start(self) -> None:
        urls = {f"{role}_url": url for role, url in self._urls.items()}
        body = {"gateway_request_id": self.name, **urls, "params": self._params}
        status, text = await self._ask("POST", f"{self._worker}/stream/start", json=body)
        if status != 200:
            raise StreamRefused(f"the worker did not start {self.name}: HTTP {status}: {text}")

    async def _listen(self) -> None:
        """The channel keeps the last few events by itself."""

    async def _tail(self, begins: Sequence[int]) -> None:
        """All of it has been sent. A worker may drop what is inside when its input ends, so wait for that first."""
        while len(self.figures.received) < len(self.figures.published):
            if not await self._another(QUIET_SECONDS):
                return

    async def _ended(self) -> None:
        """Deleting the channels ends the stream."""


def play(subject: Subject, plan: Plan) -> Run:
    """One stream from start to end, on a trickle server and a worker of its own. Outputs are checked afterwards.

    Raises:
        NoStart: the server does not become ready.
        ChildEnded: it, or the trickle server, ended in the middle; with the end of its log.
        RuntimeError: the stream failed, or what came out is not green.
    """
    with tempfile.TemporaryDirectory() as logs, Children(Path(logs)) as children:
        (port,) = pick_ports([0])
        rig = streamrig.start(children, worker=f"http://127.0.0.1:{port}")
        _until_answer(rig)
        began = time.monotonic()
        child = children.start(subject.name, subject.command(port))
        _until_ready(child, rig.worker)
        start = time.monotonic() - began
        return asyncio.run(_play(subject, plan, rig, child, start))


def _until_answer(rig: streamrig.Rig) -> None:
    """Any answer of the trickle server will do: that channel does not exist."""
    assert rig.trickle_child is not None
    while True:
        rig.trickle_child.check()
        try:
            with urllib.request.urlopen(f"{rig.trickle}none/next", timeout=5):
                return
        except urllib.error.HTTPError as answer:
            answer.close()
            return
        except OSError:
            time.sleep(0.02)


def _until_ready(child: Child, url: str) -> None:
    """Ready is an answer of 200 that does not say LOADING, in the network's own words."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if child.process.poll() is not None:
            break
        with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            if json.load(answer).get("status") != "LOADING":
                return
        time.sleep(0.02)
    raise NoStart(child)


async def _play(subject: Subject, plan: Plan, rig: streamrig.Rig, child: Child, start: float) -> Run:
    record = io.BytesIO()
    cpu = cpu_of(child.process.pid)
    marks: list[tuple[float, float, int]] = []
    resident: list[int] = []

    def first() -> None:
        marks.append((time.monotonic(), cpu(), len(client.figures.received)))

    def last() -> None:
        first()
        resident.append(memory_of(child.process.pid))  # takes a while: not before the stream is over

    async with open_session() as http:
        client = AnyWorkersClient(
            *(http, "peer", rig.trickle, rig.worker, plan),
            params=subject.params,
            record=record,
            on_first=first,
            on_last=last,
        )
        running = asyncio.create_task(client.run())
        try:
            while not running.done():
                child.check()
                await asyncio.wait([running], timeout=0.5)
        finally:
            running.cancel()
            await asyncio.wait([running])
        running.result()
    figures = client.figures
    if client.error or len(marks) < 2 or not figures.received:
        said = "\n".join(child.lines()[-5:])
        raise RuntimeError(f"{subject.name}: {client.error or 'nothing came out'}; its log ends with:\n{said}")
    _check(subject, plan, record)
    (then, before, begun), (_, after, done) = marks
    furthest = max(figures.received)
    return Run(
        published=len(figures.published),
        received=len(figures.received),
        lost=sum(pts < furthest and pts not in figures.received for pts in figures.published),
        latencies=tuple(figures.latencies()),
        cpu=(after - before) / (done - begun),
        rate=(done - begun) / (max(figures.received.values()) - then),
        rss=resident[0],
        start=start,
    )


def _check(subject: Subject, plan: Plan, record: io.BytesIO) -> None:
    """The first picture that came out is green and of the same size."""
    record.seek(0)
    with av.open(record, "r", format="mpegts") as came, av.open(str(plan.clip.path), "r") as went:
        after = next(came.decode(video=0)).to_ndarray(format="rgb24").astype(np.int16)
        for frame in islice(went.decode(video=0), FIRST):
            before = frame.to_ndarray(format="rgb24").astype(np.int16)
            if after.shape != before.shape:
                raise RuntimeError(f"{subject.name}: {after.shape} came out of {before.shape}")
            before[..., 1] = np.minimum(before[..., 1] + TINT, 255)
            if np.abs(after - before).mean() < NEAR:
                return
    raise RuntimeError(f"{subject.name}: what came out is not the green tint of what went in")
