"""One poisonous stream among three good ones: its frames fail alone, it is ended, and the others notice nothing.
Likewise one that floods its control channel, and jobs that are poison and whose caller hangs up."""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame

from gpu_byoc.config import EngineConfig, LimitConfig, SecurityConfig, ServeConfig
from gpu_byoc.core.errorbudget import LEAST
from gpu_byoc.core.pace import BURST
from gpu_byoc.errors import ConfigError
from gpu_byoc.processor import ArrayProcessor
from tests.support.clips import frames, packets
from tests.support.streams import Rig, Viewer, beats, clip, publish, rig, watching
from tests.support.workers import another, asynchronous, running

LINES = LimitConfig().max_update_lines
GOOD = ("a", "b", "c")
BRIGHT = 240
BATCH = 8
HALVES = 3
"""How often a full batch is halved until a frame stands alone."""


class Picky(ArrayProcessor):
    """Cannot stand bright frames, nor being told to fail. ``met``: sizes of batches with a bright one in them;
    ``failed``: batches that failed."""

    @dataclass(frozen=True)
    class Params:
        fail: bool = field(default=False)

    def __init__(self) -> None:
        self.met: list[int] = []
        self.failed = 0

    def process_batch(self, batch: Any, params: Any, xp: Any) -> Any:
        if params.fail:
            self.failed += 1
            raise ValueError("told to")
        if (batch.mean(axis=(1, 2, 3)) > BRIGHT).any():
            self.met.append(len(batch))
            self.failed += 1
            raise ValueError("too bright")
        return batch


def shining(count: int, first: int, bright: range) -> bytes:
    """Pictures of 64x48 at 25 fps from frame ``first``; those whose number modulo 10 is in ``bright`` are white."""
    file = io.BytesIO()
    with av.open(file, "w", format="mpegts", options={"mpegts_copyts": "1"}) as out:
        stream: Any = out.add_stream("libx264", 25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 90_000)
        stream.options = {"preset": "superfast", "tune": "zerolatency", "g": str(count), "sc_threshold": "0"}
        for number in range(first, first + count):
            white = number % 10 in bright
            frame = VideoFrame.from_ndarray(np.full((48, 64, 3), 255 if white else 90, np.uint8), format="rgb24")
            frame.pts, frame.time_base = 90_000 + number * 3600, Fraction(1, 90_000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


async def start(r: Rig, name: str, **params: Any) -> None:
    status, answer = await r.call("stream/start", r.urls(name) | {"params": params})
    assert status == 200, answer


@pytest.mark.parametrize("poison", ["pixels", "params"])
def test_three_streams_notice_nothing_of_the_fourth(poison: str) -> None:
    """Every byte of theirs is as it is without the fourth, and how often they are computed once more is bounded."""
    processor = Picky()
    source = clip(25, 3)
    alone = without_poison(source)

    @asynchronous
    async def go() -> None:
        async with rig(processor, EngineConfig(slots=32, max_batch=BATCH), lossless=False, latency_budget=5.0) as r:
            for name in (*GOOD, "bad"):
                r.create(name)
            async with contextlib.AsyncExitStack() as stack:
                viewers = [await stack.enter_async_context(watching(r, name)) for name in GOOD]
                bad = await stack.enter_async_context(watching(r, "bad"))
                for name in GOOD:
                    await start(r, name)
                await start(r, "bad", **({"fail": True} if poison == "params" else {}))
                streams = [r.stream(name) for name in GOOD]
                poisoned = [shining(25, part * 25, range(10)) for part in range(3)] if poison == "pixels" else source
                await asyncio.gather(
                    *(publish(r, name, source) for name in GOOD), publish(r, "bad", poisoned, close=False)
                )
                await r.until_over()
            for viewer, stream in zip(viewers, streams, strict=True):
                assert [p.pts for p in packets(viewer.media)] == [p.pts for p in packets(b"".join(source))]
                last = beats(viewer)[-1]
                assert (last["state"], last["dropped"], last["problems"]) == ("ended", {}, {})
                assert viewer.media == alone, "as without poison, byte for byte"
                worst = stream.session.latency(1.0)
                assert worst is not None
                assert worst < 5.0, "within the latency budget to the last frame"
            failed = quarantined(bad)
            assert retries(r) <= 2 * HALVES * failed
            assert processor.failed <= (1 + HALVES) * failed, "what a frame costs those that share its batch"
            assert 'byoc_streams_quarantined_total{reason="processor_failed"} 1.0' in await metrics(r)
            await works_again(r)

    go()
    if poison == "pixels":
        assert 1 in processor.met, "the culprit was isolated from its batch"


def without_poison(source: list[bytes]) -> bytes:
    """What comes out of a good stream that is alone."""
    media = b""

    @asynchronous
    async def go() -> None:
        nonlocal media
        async with rig(Picky()) as r:
            r.create("a")
            async with watching(r, "a") as viewer:
                await start(r, "a")
                await publish(r, "a", source)
                await r.until_over()
            media = viewer.media

    go()
    return media


def retries(r: Rig) -> int:
    """Parts of batches that were computed once more."""
    assert r.worker.worker.engine is not None
    return sum(engine.left()["retry"] for engine in r.worker.worker.engine.engines)


def quarantined(bad: Viewer) -> int:
    """How many of its frames the processor failed at."""
    last = beats(bad)[-1]
    assert last["state"] == "failed"
    assert last["dropped"]["processor_failed"] == 50, "no frame more than it takes to know"
    assert bad.media == b""
    (event,) = [each["event"] for each in bad.events if each["event"]["type"] == "stream_quarantined"]
    assert event["reason"] == "processor_failed"
    assert "50 of the last 50 frames failed" in event["message"]
    errors = [each["event"]["error"] for each in bad.events if each["event"]["type"] == "error"]
    assert errors == ["processor_failed", "stream_quarantined"]
    return sum(last["dropped"].values())  # those that were inside at the end may have failed as well


async def metrics(r: Rig) -> str:
    async with r.worker.session.get(r.worker.url + "/metrics") as answer:
        return await answer.text()


async def works_again(r: Rig) -> None:
    """A stream of the same name may be started anew."""
    r.delete("bad")
    r.create("bad")
    async with watching(r, "bad") as viewer:
        await start(r, "bad")
        await publish(r, "bad", clip(10, 1))
        await r.until_over()
    assert len(frames(viewer.media)) == 10


@asynchronous
async def test_a_stream_within_its_budget_goes_on_without_the_frames_that_fail() -> None:
    """Three frames of ten are too bright; with a budget of a fifth that ends the stream, with a half it does not."""
    source = [shining(50, part * 50, range(3, 6)) for part in range(2)]
    for budget, state in ((0.5, "ended"), (0.2, "failed")):
        async with rig(Picky(), error_budget=budget) as r:
            r.create("s")
            async with watching(r, "s") as viewer:
                await start(r, "s")
                stream = r.stream("s")
                await publish(r, "s", source, close=state == "ended")
                await r.until_over()
            assert stream.session.state.value == state
            if state == "ended":
                assert len(frames(viewer.media)) == 70
                assert stream.session.dropped == {"processor_failed": 30}
            else:
                assert "stream_quarantined" in viewer.kinds()
                assert stream.session.frames_in == stream.session.frames_out + stream.session.dropped.total()


@pytest.mark.parametrize("lines", [1, 1000])
@asynchronous
async def test_a_flood_of_control_messages_is_heard_slowly_and_others_lose_nothing(
    lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another message as soon as there is room for it, of one line or of as many as fit."""
    heard = 0
    async with rig(Picky(), EngineConfig(slots=32, max_batch=BATCH), lossless=False, latency_budget=5.0) as r:
        for name in ("loud", "good"):
            r.create(name)
        await start(r, "loud")
        loud, began = r.stream("loud"), time.monotonic()
        update = loud.update

        def counting(given: Mapping[str, Any]) -> Any:
            nonlocal heard
            heard += 1
            return update(given)

        monkeypatch.setattr(loud, "update", counting)

        async def flood() -> None:
            while True:
                r.server.hub.write("loud-control", b'{"fail": false}\n' * lines)
                await asyncio.sleep(0.02)

        flooding = asyncio.create_task(flood())
        source = clip(25, 3)
        async with watching(r, "good") as viewer:
            await start(r, "good")
            good = r.stream("good")
            await publish(r, "good", source)
            await r.worker.until(lambda: good.ended.is_set() and loud.session.problems["control_rate"] > 0)
        assert [p.pts for p in packets(viewer.media)] == [p.pts for p in packets(b"".join(source))]
        assert not good.session.dropped
        most = SecurityConfig().max_update_rate * (time.monotonic() - began + BURST) + LINES
        assert 0 < heard <= most
        assert (loud.session.problems["params"] > 0) == (lines > LINES), "what is not read is said"
        flooding.cancel()
        await asyncio.wait([flooding])
        async with asyncio.timeout(20):
            while not loud.params.processor.fail:  # what came while it was behind is gone, as with any slow reader
                r.server.hub.write("loud-control", b'{"fail": true}')
                await asyncio.sleep(0.5)
        assert not loud.ended.is_set(), "it goes on"


class Trap(ArrayProcessor):
    """Holds each batch until ``gate`` is open, and then cannot stand bytes of 255. ``met``: batch sizes."""

    def __init__(self) -> None:
        self.met: list[int] = []
        self.gate = threading.Event()

    def process_batch(self, batch: Any, params: Any, xp: Any) -> Any:
        self.met.append(len(batch))
        assert self.gate.wait(20)
        if (batch == 255).any():
            raise ValueError("poison")
        return batch


@pytest.mark.parametrize("late", [False, True])
@asynchronous
async def test_poison_counts_also_where_its_caller_has_hung_up(late: bool) -> None:
    """All at once while the device has them, or their time was up (``late``): they still fail, and their client's next
    ones run alone. Another one's job in the same batch is well, and every slot comes back."""
    trap, size, wait = Trap(), LEAST + 1, {"job_timeout": 3.0} if late else {}
    async with running(trap, EngineConfig(slots=2 * size, max_batch=size), **wait) as bad, another(bad) as good:
        assert bad.worker.engine is not None
        (engine,) = bad.worker.engine.engines
        plug = asyncio.create_task(good.post(bytes(3)))
        await good.until(lambda: trap.met == [1])
        fine = asyncio.create_task(good.post(bytes(3)))
        head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n\xff\xff\xff"
        callers = [socket.create_connection(("127.0.0.1", bad.port)) for _ in range(LEAST)]
        for caller in callers:
            caller.sendall(head)
        await bad.until(lambda: engine.batcher.waiting == size)
        trap.gate.set()
        trap.gate.clear()
        await bad.until(lambda: trap.met == [1, size])
        if not late:
            for caller in callers:
                caller.close()
        await bad.until(lambda: bad.worker.active == (0 if late else 1))
        assert bad.worker.suspects.found == 0, "the processor has not said anything yet"
        trap.gate.set()
        await bad.until(lambda: bad.free() == 0)
        assert bad.worker.suspects.found == 1
        assert bad.worker.suspects.alone("127.0.0.1", time.monotonic())
        assert [(await job)[0] for job in (plug, fine)] == [200, 504 if late else 200]
        for caller in callers:
            caller.close()


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_budget_that_is_no_share_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="--error-budget"):
        ServeConfig(error_budget=share)
