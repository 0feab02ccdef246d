"""Processors that return garbage, raise now and then, or keep all they are given. See docs/chaos.md; one that hangs is
in tests/engine/test_watch.py and tests/worker/."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest

from gpu_byoc.config import EngineConfig
from gpu_byoc.frames import FrameSpec
from gpu_byoc.processor import ArrayProcessor
from tests.support.clips import frames
from tests.support.streams import clip, publish, rig, watching
from tests.support.workers import asynchronous, running

GARBAGE: dict[str, Callable[[Any], Any]] = {
    "none": lambda batch: None,
    "one frame less": lambda batch: batch[:-1],
    "another shape": lambda batch: batch[:, :, ::2],
    "floats": lambda batch: batch.astype(np.float64) * np.nan,
    "text": lambda batch: "frames",
    "objects": lambda batch: np.full(batch.shape, None),
    "nothing": lambda batch: np.empty(0, np.uint8),
    "an object": lambda batch: object(),
}


class Liar(ArrayProcessor):
    """Returns garbage for frames that are bright, and the frame for others."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make

    def process_batch(self, batch: Any, params: Any, xp: Any) -> Any:
        return self._make(batch) if (batch > 250).any() else batch


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_fails_its_own_frames_and_is_never_sent_on(kind: str) -> None:
    """Jobs at the same time, good and bad ones: each gets what is its own."""

    @asynchronous
    async def go() -> None:
        async with running(Liar(GARBAGE[kind]), EngineConfig(slots=16, max_batch=8)) as worker:
            good, bad = bytes(range(24)), b"\xff" * 24
            jobs = [worker.post(bad if number % 3 == 0 else good) for number in range(24)]
            for number, (status, _, body) in enumerate(await asyncio.gather(*jobs)):
                if number % 3:
                    assert (status, body) == (200, good)
                else:
                    assert status == 500
                    assert b'"processor_output"' in body
            await worker.idle()
            assert await worker.get("/health") == {"status": "IDLE"}

    go()


class Keeper(ArrayProcessor):
    """A leak: every batch it is given and every result stays."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def process_batch(self, batch: Any, params: Any, xp: Any) -> Any:
        result = batch + np.uint8(1)
        self.kept += [batch, result]
        return result


@asynchronous
async def test_a_processor_that_leaks_costs_its_own_leak_and_no_slot() -> None:
    """What it keeps is its own memory: slots go round as ever, results stay right, and only what it keeps grows."""
    processor, spec = Keeper(), FrameSpec(160, 120)
    count, process = 400, psutil.Process()
    async with running(processor, EngineConfig(slots=4, max_batch=2)) as worker:
        frame = bytes([7]) * spec.nbytes

        async def send(jobs: int) -> None:
            for _ in range(jobs // 4):
                for status, _, body in await asyncio.gather(*(worker.post(frame) for _ in range(4))):
                    assert status == 200
                    assert body == bytes([8]) * spec.nbytes

        await send(40)
        before = process.memory_info().rss
        await send(count)
        grown = process.memory_info().rss - before
        assert grown < 2 * count * spec.nbytes * 1.5 + (16 << 20), "its batches and its results, and nothing of ours"
        await worker.idle()
        async with worker.session.get(worker.url + "/metrics") as answer:
            lines = (await answer.text()).splitlines()
        (peak,) = [line.split()[1] for line in lines if line.startswith("byoc_memory_peak_bytes ")]
        assert float(peak) >= before, "an operator can see it grow"
        kept = len(processor.kept)
        processor.kept.clear()
        gc.collect()
        assert kept > count
        await send(8)


class Moody(ArrayProcessor):
    """Raises for every seventh batch."""

    def __init__(self) -> None:
        self.calls = 0

    def process_batch(self, batch: Any, params: Any, xp: Any) -> Any:
        self.calls += 1
        if self.calls % 7 == 0:
            raise RuntimeError("one of those days")
        return batch


@asynchronous
async def test_a_processor_that_raises_now_and_then() -> None:
    """Tried again in halves, most frames get through; what fails is counted, and the stream is not ended for it."""
    async with rig(Moody(), EngineConfig(slots=12, max_batch=4)) as r:
        r.create("s")
        async with watching(r, "s") as viewer:
            assert (await r.call("stream/start", r.urls("s")))[0] == 200
            stream = r.stream("s")
            await publish(r, "s", clip(20, 4))
            await r.until_over()
        session = stream.session
        assert session.state.value == "ended"
        assert session.frames_in == 80 == session.frames_out + sum(session.dropped.values())
        assert set(session.dropped) <= {"processor_failed"}
        assert len(frames(viewer.media)) == session.frames_out >= 60
