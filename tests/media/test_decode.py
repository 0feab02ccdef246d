from __future__ import annotations

import functools
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_byoc.media import mpegts
from gpu_byoc.media.decode import Frame, StreamEvent, StreamReader, VideoDecoder, VideoInfo
from gpu_byoc.media.demux import Limits, Picture, Problem
from tests.support import clips

Stream = functools.cache(clips.live_stream)


def read(data: bytes, step: int = 10**9, limits: Limits | None = None) -> list[StreamEvent]:
    reader = StreamReader(limits)
    events: list[StreamEvent] = []
    for at in range(0, len(data), step):
        events += reader.feed(data[at : at + step])
    return [*events, *reader.finish()]


def frames(events: list[StreamEvent]) -> list[Frame]:
    return [each for each in events if isinstance(each, Frame)]


def reasons(events: list[StreamEvent]) -> list[str]:
    return [each.reason for each in events if isinstance(each, Problem)]


@pytest.mark.parametrize("step", [1316, 10**9])
def test_the_real_clip_decodes_as_ffmpeg_decodes_it(step: int) -> None:
    """It has B-frames: frames come out in the order of showing, with their own times."""
    stream = clips.remuxed()
    found, expected = frames(read(stream, step)), clips.frames(stream)
    assert [each.pts for each in found] == [each.pts for each in expected]
    assert len(found) == 132
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(clips.luma(one.picture), clips.luma(other))


def test_hevc() -> None:
    stream = Stream(8, gop=4, video="libx265")
    assert [each.pts for each in frames(read(stream))] == [each.pts for each in clips.frames(stream)]


def test_a_live_stream_gives_each_frame_with_the_last_byte_of_its_picture() -> None:
    stream = Stream(10)
    parts, reader, done = clips.ts_packets(stream), StreamReader(), 0
    begun = 0
    for part in parts:
        if clips.pid(part) == 0x100 and clips.starts(part):
            assert done == begun, "the frame before is out before the next picture begins"
            begun += 1
        done += len(frames(list(reader.feed(part))))
    assert done == begun == 10


def test_what_frames_are_like_comes_before_the_first_and_only_when_it_changes() -> None:
    events = read(Stream(10, (96, 64)) + clips.live_stream(10, (64, 48), first=10 * clips.TICKS))
    shapes = [(each.width, each.height) for each in events if isinstance(each, VideoInfo)]
    assert shapes == [(96, 64), (64, 48)]
    assert [(each.picture.width, each.pts) for each in frames(events)] == [
        (96 if n < 10 else 64, n * clips.TICKS) for n in range(20)
    ]
    assert isinstance(next(each for each in events if isinstance(each, VideoInfo | Frame)), VideoInfo)
    assert reasons(events) == []


def test_a_change_of_size_with_frames_held_back_loses_none() -> None:
    other = clips.live_stream(10, (64, 48), first=20 * clips.TICKS, b_frames=2)
    events = read(Stream(10, (96, 64), b_frames=2) + other)
    assert [each.picture.width for each in frames(events)] == [96] * 10 + [64] * 10
    assert reasons(events) == []


def damaged(stream: bytes, picture: int) -> bytes:
    """One bit of slice data is turned in the middle of a picture."""
    parts = [bytearray(part) for part in clips.ts_packets(stream)]
    begins = [n for n, part in enumerate(parts) if clips.pid(bytes(part)) == 0x100 and clips.starts(bytes(part))]
    parts[(begins[picture] + begins[picture + 1]) // 2][100:140] = bytes(range(40))
    return b"".join(bytes(part) for part in parts)


def test_after_a_damaged_picture_decoding_goes_on_at_the_next_keyframe() -> None:
    stream = Stream(30, (320, 240))
    events = read(damaged(stream, 13))
    assert [each.pts // clips.TICKS for each in frames(events)] == [*range(13), *range(20, 30)]
    assert reasons(events) == ["corrupt", *["no_key"] * 6]
    clean = {each.pts: each for each in frames(read(stream))}
    for each in frames(events):
        assert np.array_equal(clips.luma(each.picture), clips.luma(clean[each.pts].picture)), "nothing is concealed"


@pytest.mark.parametrize("b_frames", [0, 2])
def test_after_a_lost_packet_too_and_what_was_held_back_before_still_comes(b_frames: int) -> None:
    stream = Stream(30, (320, 240), b_frames=b_frames)
    parts = clips.ts_packets(stream)
    begins = [n for n in clips.video_packets(stream) if clips.starts(parts[n])]
    del parts[begins[13] : begins[14]]
    events = read(b"".join(parts))
    shown = [each.pts // clips.TICKS for each in frames(events)]
    offset = shown[0]
    assert len([n for n in shown if n - offset < 13]) >= 12
    assert [n - offset for n in shown if n - offset >= 14] == list(range(20, 30))
    assert reasons(events)[0] == "continuity"


def test_joining_in_the_middle_waits_for_a_keyframe() -> None:
    parts = clips.ts_packets(Stream(30))
    keys = [n for n, part in enumerate(parts) if clips.pid(part) == 0x100 and clips.starts(part)]
    tables = next(n for n, part in enumerate(parts) if clips.pid(part) == 0 and n > keys[3])
    events = read(b"".join(parts[tables:]))
    assert frames(events)[0].key
    assert frames(events)[0].pts % (10 * clips.TICKS) == 0
    assert set(reasons(events)) == {"no_key"}


def test_pictures_over_the_limit_are_refused_and_smaller_ones_after_them_are_not() -> None:
    limits = Limits(max_pixels=64 * 48)
    events = read(Stream(10, (96, 64)) + clips.live_stream(10, first=10 * clips.TICKS), limits=limits)
    assert reasons(events) == ["too_large", *["no_key"] * 9]
    assert [each.picture.width for each in frames(events)] == [64] * 10
    tall = read(Stream(10, (32, 96)), limits=Limits(max_side=95))
    assert reasons(tall) == ["too_large", *["no_key"] * 9]


def bits(*fields: tuple[int, int] | int) -> bytes:
    """(value, width) as it is, a plain integer as unsigned Exp-Golomb; then the stop bit."""
    text = ""
    for each in fields:
        if isinstance(each, tuple):
            text += format(each[0], f"0{each[1]}b")
        else:
            code = format(each + 1, "b")
            text += "0" * (len(code) - 1) + code
    text += "1"
    text += "0" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big")


@pytest.mark.parametrize("blocks", [4095, 511])
def test_a_header_that_promises_a_giant_picture_allocates_nothing(blocks: int) -> None:
    """65,520 x 65,520 and 8,192 x 8,192 pixels, by a parameter set of 16 bytes."""
    sps = b"\x00\x00\x01\x67\x42\x00\x3e" + bits(0, 0, 2, 1, (0, 1), blocks, blocks, (1, 1), (1, 1), (0, 1), (0, 1))
    pps = b"\x00\x00\x01\x68" + bits(0, 0, (0, 1), (0, 1), 0, 0, 0, (0, 1), (0, 2), 0, 0, 0, (0, 1), (0, 1), (0, 1))
    slice_ = b"\x00\x00\x01\x65" + bits(0, 7, 0, (0, 4), 0, (0, 1), (0, 1), 0) + b"\x88" * 200
    data = sps + pps + slice_
    decoder = VideoDecoder("h264", Limits(max_pixels=1280 * 720))
    picture = Picture("h264", memoryview(data + bytes(64))[: len(data)], 0, 0, True, sps)
    events = decoder.decode(picture) + decoder.flush()
    assert len(events) == 1
    assert isinstance(events[0], Problem)
    assert events[0].reason in ("too_large", "corrupt")
    assert not frames(list(events))


def test_a_picture_without_a_time_is_decoded_but_not_shown() -> None:
    stream = bytearray(Stream(10))
    parts = clips.ts_packets(bytes(stream))
    begins = [n for n in clips.video_packets(bytes(stream)) if clips.starts(parts[n])]
    at = bytes(stream).index(b"\x00\x00\x01\xe0", begins[4] * mpegts.PACKET)
    stream[at + 9] &= 0xFE  # a marker bit of its PTS
    events = read(bytes(stream))
    assert [each.pts // clips.TICKS for each in frames(events)] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert reasons(events) == ["timestamp", "timestamp"]


def test_decoding_goes_as_far_as_it_is_read() -> None:
    """One frame at a time is in memory, however much was fed."""
    reader = StreamReader()
    events = iter(reader.feed(Stream(30)))
    first = next(each for each in events if isinstance(each, Frame))
    assert first.pts == 0
    assert len(frames(list(events))) == 29


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_damage_never_raises_and_times_only_grow(data: st.DataObject) -> None:
    stream = bytearray(Stream(25, gop=5, audio="aac", b_frames=data.draw(st.sampled_from([0, 2]))))
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(stream) - 1))
        if data.draw(st.booleans()):
            stream[at] ^= data.draw(st.integers(1, 255))
        else:
            del stream[at : at + data.draw(st.integers(1, 300))]
    events = read(bytes(stream), data.draw(st.integers(50, 5000)), Limits(max_pixels=1 << 16))
    times = [each.pts for each in frames(events)]
    assert all(later > earlier for earlier, later in pairwise(times))
    assert len(times) <= 25
    again = read(bytes(stream) + clips.live_stream(5, first=60 * clips.TICKS))
    assert len(frames(again)) >= 5, "a clean segment is decoded after whatever came before"
