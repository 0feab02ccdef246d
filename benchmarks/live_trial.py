"""So many live streams at once through a worker of our own, and what they came to; looked at from outside.

Figures are of all streams together but where they say that they are of the worst.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_byoc.local import streamrig
from gpu_byoc.local.children import Children, pick_ports
from gpu_byoc.local.streamclient import Figures, Plan, quantile

from .binding import Spent, Watch, spent
from .load import device_mb, memory_of


@dataclass(frozen=True, slots=True)
class Trial:
    """So many streams at once. Latencies in seconds, of all streams together but for ``worst``, a stream's p95."""

    streams: int
    worst: float
    missed: int
    errors: tuple[str, ...]
    figures: dict[str, Any]
    spent: Spent | None
    device: tuple[float, float]
    rate: float

    def passes(self, budget: float) -> bool:
        return not self.errors and not self.missed and self.worst <= budget


@dataclass(frozen=True, slots=True)
class House:
    """A rig and what is needed to look into it."""

    rig: streamrig.Rig
    backend: str
    pid: int
    trickle: int
    start_seconds: float

    @property
    def on_gpu(self) -> bool:
        return self.backend != "numpy"

    def device_seconds(self) -> tuple[float, float]:
        """Compute and copy seconds that the worker has booked so far."""
        with urllib.request.urlopen(f"{self.rig.worker}/compute", timeout=30) as answer:
            booked = json.load(answer)["device"]
        return booked["compute_seconds"], booked["copy_seconds"]


@contextmanager
def house(backend: str, streams: int, *, lossless: bool = False) -> Iterator[House]:
    """A trickle server and a worker whose slots are enough for so many streams."""
    with tempfile.TemporaryDirectory() as logs, Children(Path(logs)) as children:
        (port,) = pick_ports([0])
        flags = f"--processor green_tint --backend {backend} --host 127.0.0.1 --port {port}"
        flags += f" --slots {max(32, streamrig.SLOTS * streams)} --lossless {'yes' if lossless else 'no'}"
        began = time.monotonic()
        command = (sys.executable, "-m", f"{__package__}.named_threads", "serve", *flags.split())
        worker = children.start("worker", command)
        rig = streamrig.start(children, worker=f"http://127.0.0.1:{port}")
        rig = streamrig.Rig(rig.trickle, rig.worker, rig.trickle_child, worker)
        asyncio.run(streamrig.ready(rig))
        assert rig.trickle_child is not None
        yield House(rig, backend, worker.process.pid, rig.trickle_child.process.pid, time.monotonic() - began)


def trial(home: House, plan: Plan, streams: int) -> Trial:
    """Play it. A stream that failed is in ``errors``, and the trial has not passed."""
    before, began = home.device_seconds(), time.monotonic()
    watch = Watch(home.pid, home.backend, {"client": os.getpid(), "trickle": home.trickle})
    play = streamrig.Play(home.rig, plan, streams)
    asyncio.run(_watched(play, watch))
    wall = time.monotonic() - began
    compute, copies = (now - then for now, then in zip(home.device_seconds(), before, strict=True))
    errors = tuple(client.error for client in play.clients if client.error)
    used = spent(watch.samples, *_all_at_once(play.figures))
    return Trial(
        streams,
        max((quantile(each.latencies(), 0.95) for each in play.figures if each.received), default=float("inf")),
        sum(each.dropped_frames + max(0, each.lost) for each in play.figures),
        errors,
        {} if errors else _figures(play, used, home),
        used,
        (compute / wall, copies / wall),
        play.rate,
    )


async def _watched(play: streamrig.Play, watch: Watch) -> None:
    watching = asyncio.create_task(watch.run())
    try:
        await play.run()
    finally:
        watching.cancel()
        await asyncio.wait([watching])


def _all_at_once(figures: Sequence[Figures]) -> tuple[float, float]:
    """From when the last stream's first picture is out until the first stream's last one is in."""
    if not all(each.received and each.published for each in figures):
        return 0.0, 0.0
    return (
        max(min(each.received.values()) for each in figures),
        min(max(each.published.values()) for each in figures),
    )


def in_words(cores: Mapping[str, float]) -> str:
    """``encode 0.92, decode 0.51``: the most first, down to a hundredth of a core."""
    most = sorted(cores.items(), key=lambda each: -each[1])
    return ", ".join(f"{name} {each:.2f}" for name, each in most if each >= 0.005)


def jitter(figures: Figures) -> float:
    """Seconds by which the latencies of neighbouring pictures differ on average (the difference D of RFC 3550, 6.4.1,
    taken plainly)."""
    times = [figures.received[pts] - figures.published[pts] for pts in sorted(figures.received)]
    steps = [abs(after - before) for before, after in itertools.pairwise(times)]
    return statistics.fmean(steps) if steps else 0.0


def first_frame(figures: Figures) -> float:
    """Seconds from the first picture that went in until anything came out."""
    return min(figures.received.values()) - min(figures.published.values())


def _figures(play: streamrig.Play, used: Spent | None, home: House) -> dict[str, Any]:
    found: dict[str, Any] = {
        "frames_in": sum(len(each.published) for each in play.figures),
        "frames_out": play.frames_out,
        "frames_per_second": play.rate,
        **{f"p{part}_ms": quantile(play.latencies, part / 100) * 1e3 for part in (50, 95, 99)},
        "first_frame_ms": max(first_frame(each) for each in play.figures) * 1e3,
        "jitter_ms": max(jitter(each) for each in play.figures) * 1e3,
        "rss_mb": memory_of(home.pid) / 1e6,
        "device_mb": device_mb(home.pid),
        "start_seconds": home.start_seconds,
    }
    if play.cpu_per_frame is not None:
        found["cpu_ms"] = play.cpu_per_frame * 1e3
        found["cpu_seconds_per_million_frames"] = play.cpu_per_frame * 1e6
    if play.frames_out:
        total = sum(each.compute_seconds for each in play.figures)
        found["compute_seconds_per_million_frames"] = total / play.frames_out * 1e6
    if used is not None:
        found["cores_of"] = in_words({**used.roles, **used.beside, "other programs": used.others})
        found["busy_cores"] = used.machine
    return {key: value for key, value in found.items() if value == value}  # a rate is NaN where it was too short
