"""The way of a live frame through all blocks, on the real clip: decode, slot, encode, segments, decode."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from gpu_byoc.frames import FrameSpec
from gpu_byoc.media.audio import AudioPacket, OpusTranscoder
from gpu_byoc.media.decode import Frame, StreamReader, VideoInfo
from gpu_byoc.media.demux import Problem
from gpu_byoc.media.encode import Encoder
from gpu_byoc.media.mpegts import CLOCK
from gpu_byoc.media.mux import Segmenter
from gpu_byoc.media.planes import Colour, ToSlot
from tests.support import clips


@dataclass
class Result:
    shown: list[Frame] = field(default_factory=list)
    heard: list[AudioPacket] = field(default_factory=list)
    infos: list[VideoInfo] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @classmethod
    def of(cls, stream: bytes, step: int = 10**9) -> Result:
        result, reader = cls(), StreamReader()
        for at in range(0, len(stream), step):
            for event in reader.feed(stream[at : at + step]):
                result.add(event)
        for event in reader.finish():
            result.add(event)
        return result

    def add(self, event: object) -> None:
        match event:
            case Frame():
                self.shown.append(event)
            case AudioPacket():
                self.heard.append(event)
            case VideoInfo():
                self.infos.append(event)
            case Problem():
                self.problems.append(event)


def through(stream: bytes, step: int = 1316) -> list[bytes]:
    """What a worker without a processor does: segments out of bytes."""
    reader, segmenter, made = StreamReader(), Segmenter(), list[bytes]()
    into = encoder = slot = transcoder = None
    for at in range(0, len(stream) + step, step):
        for event in reader.feed(stream[at : at + step]) if at < len(stream) else reader.finish():
            pieces = []
            if isinstance(event, VideoInfo):
                spec = FrameSpec(event.width, event.height)
                into, encoder = ToSlot(spec), Encoder(spec, colour=event.colour, aspect=event.aspect)
                slot = memoryview(bytearray(spec.nbytes))
            elif isinstance(event, Frame):
                assert into is not None
                assert encoder is not None
                assert slot is not None
                into.write(event.picture, slot)
                (picture,) = encoder.encode(slot, event.pts, segmenter.wants_key(event.pts))
                pieces = segmenter.video(picture)
            elif isinstance(event, AudioPacket):
                packets = [event]
                if not event.track.copies:
                    transcoder = transcoder or OpusTranscoder(event.track)
                    packets = transcoder.convert(event)
                pieces = [piece for packet in packets for piece in segmenter.audio(packet)]
            for piece in pieces:
                if piece.starts:
                    made.append(b"")
                made[-1] += piece.data
    made[-1] += b"".join(piece.data for piece in segmenter.finish())
    return made


@functools.cache
def real() -> tuple[bytes, tuple[bytes, ...]]:
    stream = clips.remuxed()
    return stream, tuple(through(stream))


def test_every_frame_arrives_in_order_at_its_time_and_looks_the_same() -> None:
    stream, segments = real()
    before, after = Result.of(stream), Result.of(b"".join(segments))
    assert after.problems == []
    assert len(after.shown) == 132
    assert [each.pts for each in after.shown] == [each.pts for each in before.shown]
    quality = [clips.psnr(a.picture, b.picture) for a, b in zip(before.shown, after.shown, strict=True)]
    assert min(quality) > 34
    assert sum(quality) / len(quality) > 38
    pairs = [(clips.luma(a.picture), clips.luma(b.picture)) for a, b in zip(before.shown, after.shown, strict=True)]
    shift = [(b - a).mean() for a, b in pairs]
    assert abs(sum(shift) / len(shift)) < 1.2, "of 255"
    assert after.infos == before.infos


def test_audio_is_the_same_to_the_byte_and_tick() -> None:
    stream, segments = real()
    before, after = Result.of(stream), Result.of(b"".join(segments))
    assert len(after.heard) == 249
    assert after.heard == before.heard


def test_sound_is_in_the_segment_of_its_pictures() -> None:
    for each in real()[1][:-1]:
        result = Result.of(each)
        frame = 1024 * CLOCK // 48_000
        assert result.heard[0].pts <= result.shown[0].pts + frame
        assert abs(result.heard[-1].pts - (result.shown[-1].pts + 3600)) <= 3600 + frame


def test_ffmpeg_plays_each_segment_alone_and_finds_everything_in_order() -> None:
    stream, segments = real()
    assert len(segments) == 3
    expected = [frame.pts for frame in clips.frames(stream)]
    assert [frame.pts for each in segments for frame in clips.frames(each)] == expected
    for each in segments:
        packets = clips.packets(each)
        assert clips.pid(clips.ts_packets(each)[2]) == 0x100
        video = [packet for packet in packets if packet.video]
        assert [packet.key for packet in video].index(True) == 0
        assert all(packet.dts == packet.pts for packet in video), "no B-frames"
        assert all(later.dts > earlier.dts for earlier, later in pairwise(video))
        assert 1 < (video[-1].pts - video[0].pts) / CLOCK < 2.01
    sound = [[p.data for p in clips.packets(each) if not p.video] for each in (b"".join(segments), stream)]
    assert b"".join(sound[0]) == b"".join(sound[1])


@pytest.mark.parametrize(("encoder", "codec"), [("aac", "aac"), ("libopus", "opus"), ("mp2", "opus")])
def test_audio_that_players_do_not_know_becomes_opus(encoder: str, codec: str) -> None:
    stream = clips.live_stream(60, audio=encoder)
    result = Result.of(b"".join(through(stream)))
    assert result.problems == []
    assert {each.track.codec for each in result.heard} == {codec}
    before = Result.of(stream).heard
    assert abs(result.heard[0].pts - before[0].pts) < CLOCK // 50
    assert abs(result.heard[-1].pts - before[-1].pts) < 2 * CLOCK // 25
    if encoder != "mp2":
        assert result.heard == before


def test_colours_named_by_the_stream_are_named_by_its_output() -> None:
    colour = Colour(1, False, 1, 1)
    encoder, segmenter, stream = Encoder(FrameSpec(64, 48), colour=colour), Segmenter(), b""
    for number in range(10):
        for picture in encoder.encode_frame(clips.picture(number), number * 3600, number == 0):
            stream += b"".join(piece.data for piece in segmenter.video(picture))
    result = Result.of(b"".join(through(stream)))
    assert [each.colour for each in result.infos] == [colour]
    assert len(result.shown) == 10
