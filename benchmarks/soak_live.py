"""Live streams that start, stop and fail at random for minutes: is anything left over?

``python -m benchmarks.soak_live [--minutes M] [--output FILE]``. A trickle server and a worker, each a process of its
own; up to six streams at once, of which each comes to one of several ends. Watched: the worker's resident memory, its
threads, its tasks, its slots, its streams. Exit status 1 if any of them has not come back to where it was.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp

from gpu_byoc.errors import GpuByocError
from gpu_byoc.local import streamclip
from gpu_byoc.local.children import pick_ports
from gpu_byoc.media.encode import CodedPicture
from gpu_byoc.media.mux import Segmenter
from gpu_byoc.transport.trickle_client import Publisher

from .bench_media import CLIP
from .load import process, rss, wait_until_ready
from .machine import machine
from .soak import growth

AT_ONCE = 6
POOL = min(32, (os.cpu_count() or 1) + 4)
"""Threads of asyncio's default executor in the worker: they come when they are first needed, and stay. A thread left
behind by each stream would soon be many more."""

ENDS = ("plain", "stop", "cut publisher", "delete input", "delete control", "delete output", "garbage", "no channels")
SUFFIXES = {"": "video/MP2T", "-out": "video/MP2T", "-control": "application/json", "-events": "application/json"}


class Soak:
    def __init__(self, http: aiohttp.ClientSession, trickle: str, worker: str, seed: int) -> None:
        self._http = http
        self._trickle = trickle
        self._worker = worker
        self._random = random.Random(seed)
        self._segments = segments()
        self._number = 0
        self.ends: dict[str, int] = dict.fromkeys(ENDS, 0)
        self.refused = 0

    async def one(self) -> None:
        """A stream's life, from its channels to its end."""
        self._number += 1
        name, end = f"s{self._number}", self._random.choice(ENDS)
        if end != "no channels":
            for suffix, mime in SUFFIXES.items():
                async with self._http.post(f"{self._trickle}{name}{suffix}", headers={"Expect-Content": mime}):
                    pass
        url = self._trickle + name
        urls = {"subscribe_url": url, "publish_url": f"{url}-out", "control_url": f"{url}-control"}
        body = {"gateway_request_id": name, "events_url": f"{url}-events", **urls}
        async with self._http.post(f"{self._worker}/stream/start", json=body) as answer:
            if answer.status != 200:
                self.refused += 1
                return
        with contextlib.suppress(GpuByocError, aiohttp.ClientError):
            await self._play(name, end)
        if end in ("stop", "cut publisher"):
            async with self._http.post(f"{self._worker}/stream/stop", headers={"X-Stream-Id": name}):
                pass
        for suffix in SUFFIXES:
            async with self._http.delete(f"{self._trickle}{name}{suffix}"):
                pass
        self.ends[end] += 1

    async def _play(self, name: str, end: str) -> None:
        if end == "no channels":
            return
        async with Publisher(self._http, self._trickle + name, "video/MP2T") as publisher:
            for data in self._random.sample(self._segments, k=min(2, len(self._segments))):
                if end == "garbage":
                    data = self._random.randbytes(2000) + data[: len(data) // 2] + self._random.randbytes(188 * 20)
                await publisher.send(data)
                await asyncio.sleep(self._random.random())
            if end == "cut publisher":
                segment = await publisher.open()
                await segment.write(self._segments[0][:50_000])
                await segment.abort()
        if end.startswith("delete"):
            suffix = {"delete input": "", "delete control": "-control", "delete output": "-out"}[end]
            async with self._http.delete(f"{self._trickle}{name}{suffix}"):
                pass
        await asyncio.sleep(self._random.random())

    async def status(self) -> dict[str, Any]:
        async with self._http.get(f"{self._worker}/stream/status") as answer:
            found: dict[str, Any] = await answer.json()
            return found


def segments() -> list[bytes]:
    """The packaged clip as transport stream, about two seconds each."""
    clip, found = streamclip.load(CLIP), list[bytes]()
    segmenter = Segmenter(clip.audio)
    for unit in clip.play():
        for piece in segmenter.video(unit) if isinstance(unit, CodedPicture) else segmenter.audio(unit):
            if piece.starts:
                found.append(b"")
            if found:
                found[-1] += piece.data
    return found


def threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


async def tasks(http: aiohttp.ClientSession, admin: str) -> Counter[str]:
    """The worker's asyncio tasks by where each waits, outermost: ``module.function``. A connection's task is no
    stream's: it stays for as long as its client keeps it open."""
    async with http.get(f"{admin}/debug") as answer:
        places = [task["waits_at"][0].split() for task in (await answer.json())["tasks"] if task["waits_at"]]
    names = (f"{Path(place.partition(':')[0]).stem}.{function}" for place, function in places)
    return Counter(name for name in names if name != "web_protocol.start")


async def soak(pid: int, trickle: str, worker: str, admin: str, seconds: float) -> dict[str, Any]:
    async with aiohttp.ClientSession() as http:
        run = Soak(http, trickle, worker, seed=1)
        await asyncio.gather(*(run.one() for _ in range(AT_ONCE)))  # warm: codecs loaded, pools filled
        await settled(run)
        before, tasks_before, samples = threads(pid), await tasks(http, admin), [rss(pid)]
        began = time.monotonic()

        async def keep_going() -> None:
            while time.monotonic() - began < seconds:
                await run.one()

        async def sample() -> None:
            while time.monotonic() - began < seconds:
                await asyncio.sleep(1)
                samples.append(rss(pid))

        await asyncio.gather(sample(), *(keep_going() for _ in range(AT_ONCE)))
        status = await settled(run)
        after, tasks_left = threads(pid), await tasks(http, admin) - tasks_before
    slots = sum(room["slots"] - room["free"] for room in status["slots"])
    memory = growth(samples)
    nothing_left = not tasks_left and slots == 0 and status["active_streams"] == 0
    clean = memory["flat"] and after <= before + POOL and nothing_left
    return {
        "seconds": time.monotonic() - began,
        "streams": sum(run.ends.values()),
        "ends": run.ends,
        "refused": run.refused,
        "memory": memory,
        "threads": {"before": before, "after": after},
        "tasks": {"before": tasks_before.total(), "left": dict(tasks_left)},
        "slots_held": slots,
        "streams_left": status["active_streams"],
        "totals_left": sorted(status["compute"]["totals"]),
        "clean": clean,
    }


async def settled(run: Soak) -> dict[str, Any]:
    """The worker's status when its last stream is over; a stuck one has half a minute."""
    status = await run.status()
    for _ in range(300):
        if not status["active_streams"] and all(room["free"] == room["slots"] for room in status["slots"]):
            break
        await asyncio.sleep(0.1)
        status = await run.status()
    return status


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak_live", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    trickle, worker, admin = pick_ports([0, 0, 0])
    base = ("--host", "127.0.0.1", "--port")
    with (
        process("-m", "gpu_byoc", "trickle", *base, str(trickle), "--base-path", "/ai/trickle/", "--autocreate") as _,
        process(
            *("-m", "gpu_byoc", "serve", *base, str(worker), "--admin-port", str(admin)),
            *("--backend", "numpy", "--log-level", "error"),
        ) as child,
    ):
        wait_until_ready(f"http://127.0.0.1:{worker}/health", child)
        urls = f"http://127.0.0.1:{trickle}/ai/trickle/", f"http://127.0.0.1:{worker}", f"http://127.0.0.1:{admin}"
        result = asyncio.run(soak(child.pid, *urls, given.minutes * 60))
    report = {"machine": machine(), "unix_time": int(time.time()), "soak_live": result}
    print(json.dumps(result, indent=1))
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(report, indent=1) + "\n")
    return int(not result["clean"])


if __name__ == "__main__":
    raise SystemExit(main())
