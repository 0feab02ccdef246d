"""Live streams for long, beyond what fits, and through a server that loses things."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.audio.resampler import AudioResampler

from gpu_byoc.config import EngineConfig
from gpu_byoc.core.trickle import Limits
from gpu_byoc.local import streamclip
from gpu_byoc.media.demux import Demuxer, Picture
from gpu_byoc.media.encode import CodedPicture
from gpu_byoc.media.mpegts import CLOCK
from gpu_byoc.media.mux import Segmenter
from gpu_byoc.processors.passthrough import Passthrough
from gpu_byoc.transport.trickle_client import Publisher, open_session
from gpu_byoc.worker.stream import SEGMENT_COST
from tests.support.clips import frames, luma, packets, picture
from tests.support.streams import Gate, Rig, Viewer, beats, clip, publish, rig, taken, watching
from tests.support.workers import asynchronous

MINUTES = 10
RATE = Fraction(5, 2)  # frames a second: what is measured is time
BEEP = 1.0  # seconds into a round of the clip
# Seconds of a round: whole frames of video, and whole frames of audio (1,024 samples at 48 kHz, 1,152 at 44.1 kHz).
ROUNDS = {"aac": (48_000, 6.4), "mp2": (44_100, 6.4)}


def marked_clip(path: Path, codec: str) -> None:
    """A round: each frame's luma tells its number, and a beep of 50 ms is at BEEP."""
    rate, seconds = ROUNDS[codec]
    with av.open(str(path), "w", format="mpegts") as out:
        video: Any = out.add_stream("libx264", RATE)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        video.options = {"preset": "superfast", "tune": "zerolatency", "g": "5", "sc_threshold": "0"}
        sound: Any = out.add_stream(codec, rate)
        sound.layout = "mono"
        at = np.arange(round(seconds * rate))
        wave = np.where((at >= BEEP * rate) & (at < (BEEP + 0.05) * rate), 12_000 * np.sin(at * 0.3), 0)
        samples = av.AudioFrame.from_ndarray(wave.astype(np.int16).reshape(1, -1), format="s16", layout="mono")
        samples.sample_rate = rate
        samples.pts = 0
        for part in AudioResampler(sound.codec_context.format, "mono", rate).resample(samples):
            out.mux(sound.encode(part))
        out.mux(sound.encode(None))
        for number in range(round(seconds * RATE)):
            frame = picture(number, 32, 32)
            frame.pts = number
            out.mux(video.encode(frame))
        out.mux(video.encode(None))


def segments(played: streamclip.Clip, seconds: float) -> Iterator[bytes]:
    """A segment for each keyframe, time running on from round to round."""
    segmenter, data = Segmenter(played.audio), b""
    for unit in played.play(seconds):
        pieces = segmenter.video(unit) if isinstance(unit, CodedPicture) else segmenter.audio(unit)
        for piece in pieces:
            if piece.starts and data:
                yield data
                data = b""
            data += piece.data
    yield data + b"".join(piece.data for piece in segmenter.finish())


def beeps(stream: bytes) -> list[float]:
    """Seconds of PTS at which beeps begin, to a millisecond."""
    found, quiet = list[float](), 0.0
    with av.open(io.BytesIO(stream), "r", format="mpegts") as source:
        resampler = AudioResampler("s16", "mono", 48_000)
        for frame in source.decode(audio=0):
            assert frame.time is not None
            began = frame.time
            for part in resampler.resample(frame):
                wave = np.abs(part.to_ndarray()[0][: part.samples // 48 * 48].astype(int))
                for number, loud in enumerate(wave.reshape(-1, 48).max(axis=1) > 3000):
                    now = began + number / 1000
                    if loud and now - quiet > 1:
                        found.append(now)
                    if loud:
                        quiet = now
    return found


async def play(r: Rig, viewer: Viewer, source: list[bytes]) -> None:
    """As fast as it comes out and is seen, so that the ring of neither channel is overrun."""
    out, stream = r.server.hub.channel("s-out"), r.stream("s")
    assert out is not None
    demuxer, sent = Demuxer(), 0
    async with open_session() as session, Publisher(session, r.base + "s", "video/MP2T", delete=True) as publisher:
        for data in source:
            await publisher.send(data)
            events = [*demuxer.feed(data), *demuxer.end_segment()]
            sent += sum(isinstance(event, Picture) for event in events)
            await r.worker.until(lambda sent=sent: stream.session.frames_out >= sent)  # type: ignore[misc]
            await r.worker.until(lambda: viewer.read >= out.next_seq - 1)
        await r.worker.until(lambda: taken(r, "s") >= len(source))


@pytest.mark.timeout(240)  # encoding ten minutes of Opus alone takes eight seconds of an idle core
@pytest.mark.parametrize("codec", ["aac", "mp2"])
def test_sound_and_picture_stay_within_an_audio_frame_for_ten_minutes(codec: str, tmp_path: Path) -> None:
    """AAC is copied, MPEG audio becomes Opus; of the beeps and the frames' numbers it is told what is shown when."""
    marked_clip(tmp_path / "round.ts", codec)
    played = streamclip.load(tmp_path / "round.ts")
    assert played.seconds == ROUNDS[codec][1]
    source = list(segments(played, MINUTES * 60))
    whole = b"".join(source)
    viewer = Viewer()

    @asynchronous
    async def go() -> None:
        nonlocal viewer
        async with rig(Passthrough()) as r:
            r.create("s")
            async with watching(r, "s") as viewer:
                assert (await r.call("stream/start", r.urls("s")))[0] == 200
                await play(r, viewer, source)
                await r.until_over()

    go()
    assert beats(viewer)[-1]["dropped"] == {}
    shown, sent = ([packet.pts for packet in packets(each) if packet.video] for each in (viewer.media, whole))
    assert len(shown) == len(sent) == MINUTES * 60 * RATE
    assert max(abs(one - other) for one, other in zip(shown, sent, strict=True)) == 0
    assert (shown[-1] - shown[0]) / CLOCK > MINUTES * 60 - 1
    lumas = [float(luma(frame).mean()) for frame in frames(viewer.media)]
    a_round = lumas[: played.pictures]
    assert np.diff(a_round).min() > 2, "each frame is brighter than the one before"
    for number, mean in enumerate(lumas):
        assert abs(mean - a_round[number % played.pictures]) < 1, f"another picture than number {number}"
    heard, expected = beeps(viewer.media), beeps(whole)
    assert len(heard) == len(expected) == int(MINUTES * 60 / played.seconds) + 1
    skew = np.array(heard) - np.array(expected)
    frame_seconds = 0.020 if codec == "mp2" else 1024 / 48_000
    assert np.abs(skew).max() <= frame_seconds, f"{skew.min() * 1e3:.1f} to {skew.max() * 1e3:.1f} ms"


@asynchronous
async def test_frames_of_a_segment_that_is_lost_after_they_were_written_are_not_out() -> None:
    """The server takes small segments and refuses the output's longer ones in the middle."""
    source = clip(10, 10)  # 4 s: two segments of the output
    limit = max(map(len, source)) + 2000
    async with rig(Passthrough(), limits=Limits(segment=limit)) as r:
        r.create("s")
        assert (await r.call("stream/start", r.urls("s")))[0] == 200
        stream = r.stream("s")
        await publish(r, "s", source)
        await r.until_over()
        session = stream.session
        assert session.frames_in == 100
        assert session.frames_out == 0, "no segment arrived as a whole"
        assert session.dropped["segment_lost"] > 0
        assert session.dropped["segment_lost"] + session.dropped["unpublished"] == 100
        assert session.problems["segment_lost"] >= 2


@pytest.mark.parametrize(("lossless", "expected"), [(True, 60), (False, 20)])
def test_a_lossless_stream_begins_with_the_oldest_segment_there_is(lossless: bool, expected: int) -> None:
    @asynchronous
    async def go() -> None:
        async with rig(Passthrough(), lossless=lossless) as r:
            r.create("s")
            source = clip(20, 3)
            async with open_session() as session, Publisher(session, r.base + "s", "video/MP2T") as publisher:
                for data in source:
                    await publisher.send(data)
                assert (await r.call("stream/start", r.urls("s")))[0] == 200
                stream = r.stream("s")
                await r.worker.until(lambda: stream.session.frames_out >= expected)
                assert (await r.call("stream/stop"))[0] == 200
                await r.until_over()
            assert stream.session.frames_in == stream.session.frames_out == expected

    go()


@asynchronous
async def test_more_than_the_device_can_do_is_dropped_and_counted_and_nothing_grows() -> None:
    gate = Gate()
    names = ("a", "b", "c", "d")
    async with rig(gate, EngineConfig(slots=6, max_batch=2), lossless=False, latency_budget=0.1, max_streams=4) as r:
        for name in names:
            r.create(name)
            assert (await r.call("stream/start", r.urls(name)))[0] == 200
        r.create("e")
        assert (await r.call("stream/start", r.urls("e")))[0] == 503, "one more is refused"
        streams = [r.stream(name) for name in names]
        await asyncio.gather(*(publish(r, name, clip(25, 4), close=False) for name in names))
        await r.worker.until(lambda: all(stream.session.frames_in == 100 for stream in streams))
        await r.worker.until(lambda: sum(sum(stream.session.dropped.values()) for stream in streams) == 400 - 6)
        assert r.worker.free() == -6, "the slots are all that is held"
        assert all(stream._source.weight == 0 for stream in streams)
        assert all(stream.session.dropped.keys() <= {"backlog", "late"} for stream in streams)
        gate.gate.set()
        await r.worker.until(lambda: sum(stream.session.frames_out for stream in streams) == 6)
        await r.worker.worker.streams.close(10)
        for stream in streams:
            assert stream.session.frames_out + sum(stream.session.dropped.values()) == 100


@asynchronous
async def test_a_lossless_stream_that_cannot_keep_up_stops_reading() -> None:
    """What the worker does not read stays with the server, whose ring is bounded; what that let go of is counted."""
    gate = Gate()
    async with rig(gate, EngineConfig(slots=3, max_batch=2)) as r:
        r.create("s")
        assert (await r.call("stream/start", r.urls("s")))[0] == 200
        stream = r.stream("s")
        stream._source._limit = 4000
        largest = 0
        source = clip(25, 24)
        async with open_session() as session, Publisher(session, r.base + "s", "video/MP2T", delete=True) as publisher:
            for data in source:
                await publisher.send(data)
                largest = max(largest, stream._source.weight)
            await asyncio.to_thread(gate.entered.wait, 20)
            assert 0 < largest < 4000 + max(SEGMENT_COST, *map(len, source)), "bounded by its limit and one chunk"
            assert stream.session.frames_out == 0
            gate.gate.set()
            await r.worker.until(lambda: stream.session.frames_out > 3)
            while not stream.session.problems["segments_skipped"]:  # seen with the first one that is there again
                before = stream.segments_in
                await publisher.send(source[-1])
                await r.worker.until(lambda before=before: stream.segments_in > before)  # type: ignore[misc]
        await r.until_over()
        assert stream.session.dropped == {}
        assert stream.session.frames_out == stream.session.frames_in
