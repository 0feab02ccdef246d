"""What a live stream counts, and tells before it is over: failures by code, sound that nobody hears; sound of AC-3."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from gpu_byoc.config import SecurityConfig
from gpu_byoc.processor import ArrayProcessor
from gpu_byoc.processors.passthrough import Passthrough
from tests.support.clips import CLOCK, frames, live_stream, packets, pid, starts, ts_packets
from tests.support.scrapes import scrape
from tests.support.streams import Rig, beats, clip, publish, rig, watching
from tests.support.workers import asynchronous


class Failing(ArrayProcessor):
    def process_batch(self, batch: Any, params: Any, xp: Any) -> Any:
        raise ValueError("none of them")


async def errors(r: Rig) -> dict[str, float]:
    """byoc_errors_total by type."""
    found = (await scrape(r.worker)).get("byoc_errors_total", {})
    return {dict(labels)["type"]: value for labels, value in found.items()}


@asynchronous
async def test_a_stream_that_fails_at_once_is_told_and_counted() -> None:
    async with rig(Passthrough()) as r:
        for number in range(1, 6):
            r.create(f"s{number}")
            async with watching(r, f"s{number}") as viewer:
                assert (await r.call("stream/start", r.urls(f"s{number}") | {"publish_url": r.base + "nowhere"}))[
                    0
                ] == 200
                await r.until_over()
            said = [each["event"]["error"] for each in viewer.events if each["event"]["type"] == "error"]
            assert said == ["channel_missing"]
            assert await errors(r) == {"channel_missing": number}


@pytest.mark.parametrize(("budget", "counted"), [(1.0, {}), (0.5, {"stream_quarantined": 1})])
@asynchronous
async def test_frames_that_the_processor_fails_at_are_counted(budget: float, counted: dict[str, float]) -> None:
    async with rig(Failing(), error_budget=budget) as r:
        r.create("s")
        async with watching(r, "s") as viewer:
            await r.call("stream/start", r.urls("s"))
            await publish(r, "s", clip(25, 2))
            await r.until_over()
        failed = beats(viewer)[-1]["dropped"]["processor_failed"]
        assert failed == 50 if not counted else 20 <= failed <= 50
        assert await errors(r) == {"processor_failed": failed} | counted


@asynchronous
async def test_sound_before_the_first_picture_is_kept_for_two_seconds_and_then_counted() -> None:
    """The first keyframe comes after four seconds."""
    source, pictures, kept = live_stream(125, gop=25, audio="libopus", first=CLOCK), 0, []
    for packet in ts_packets(source):
        pictures += pid(packet) == 0x100 and starts(packet)
        if pid(packet) != 0x100 or pictures > 100:
            kept.append(packet)
    sent = [each.pts for each in packets(source) if not each.video]
    async with rig(Passthrough()) as r:
        r.create("s")
        async with watching(r, "s") as viewer:
            await r.call("stream/start", r.urls("s"))
            await publish(r, "s", [b"".join(kept)])
            await r.until_over()
        heard = [each.pts for each in packets(viewer.media) if not each.video]
        assert len(frames(viewer.media)) == 25
        assert 2.9 <= (heard[-1] - heard[0]) / CLOCK <= 3.1, "two seconds before the first picture"
        assert 1.8 < (heard[0] - sent[0]) / CLOCK < 2.1
        last = beats(viewer)[-1]
        assert 0 < last["problems"].pop("audio_early") <= 2 * 50
        assert last["dropped"] == {}, "packets of sound are no frames: those that came in came out"


@pytest.mark.parametrize("sandbox", [False, True])
@pytest.mark.parametrize("codec", ["ac3", "eac3"])
@asynchronous
async def test_sound_of_broadcasts_comes_out_as_opus_on_time(codec: str, sandbox: bool) -> None:
    async with rig(Passthrough(), security=SecurityConfig(sandbox_decode=sandbox)) as r:
        r.create("s")
        source = clip(50, 1, audio=codec)
        async with watching(r, "s") as viewer:
            await r.call("stream/start", r.urls("s"))
            await publish(r, "s", source)
            await r.until_over()
        assert len(frames(viewer.media)) == 50
        assert (beats(viewer)[-1]["problems"], beats(viewer)[-1]["dropped"]) == ({}, {})
        assert b"Opus" in viewer.media, "in its PMT"
        before, after = ([each.pts for each in packets(data) if not each.video] for data in (source[0], viewer.media))
        frame = 1536 * CLOCK // 48_000
        assert abs(after[0] - before[0]) < frame
        assert abs(after[-1] + CLOCK // 50 - before[-1] - frame) <= frame
        assert {later - earlier for earlier, later in pairwise(after)} == {CLOCK // 50}
