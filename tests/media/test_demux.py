from __future__ import annotations

import functools
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_byoc.media import mpegts
from gpu_byoc.media.audio import AudioPacket, AudioTrack
from gpu_byoc.media.demux import AUDIO, VIDEO, Demuxer, DemuxEvent, Limits, Picture, Problem, Tracks
from gpu_byoc.media.mpegts import WRAP
from tests.support import clips

Stream = functools.cache(clips.live_stream)


def demuxed(data: bytes, step: int = 10**9, limits: Limits | None = None) -> list[DemuxEvent]:
    demuxer = Demuxer(limits)
    events: list[DemuxEvent] = []
    for at in range(0, len(data), step):
        events += demuxer.feed(data[at : at + step])
    return events + demuxer.finish()


def pictures(events: list[DemuxEvent]) -> list[Picture]:
    return [each for each in events if isinstance(each, Picture)]


def sounds(events: list[DemuxEvent]) -> list[AudioPacket]:
    return [each for each in events if isinstance(each, AudioPacket)]


def reasons(events: list[DemuxEvent]) -> list[str]:
    return [each.reason for each in events if isinstance(each, Problem)]


# --- what is there is found, however it is cut


@pytest.mark.parametrize("step", [1316, 188, 1000, 10**9])
def test_the_real_clip_is_read_as_ffmpeg_reads_it(step: int) -> None:
    stream = clips.remuxed()
    events = demuxed(stream, step)
    found, expected = pictures(events), [each for each in clips.packets(stream) if each.video]
    assert len(found) == 132
    assert [(p.pts, p.dts, p.key) for p in found] == [(p.pts, p.dts, p.key) for p in expected]
    assert [bytes(p.data) for p in found] == [p.data for p in expected]
    assert b"".join(p.data for p in sounds(events)) == b"".join(p.data for p in clips.packets(stream) if not p.video)
    assert reasons(events) == []


@given(st.lists(st.integers(1, 900), min_size=1, max_size=40))
@settings(max_examples=30, deadline=None)
def test_any_cutting_gives_the_same_events(sizes: list[int]) -> None:
    stream, demuxer, at, events = Stream(12, audio="aac"), Demuxer(), 0, []
    while at < len(stream):
        size = sizes[at % len(sizes)]
        events += demuxer.feed(stream[at : at + size])
        at += size
    assert events + demuxer.finish() == demuxed(stream)


@pytest.mark.parametrize(
    ("encoder", "track"),
    [
        ("aac", AudioTrack("aac", 48_000, 2)),
        ("libopus", AudioTrack("opus", 48_000, 2)),
        ("mp2", AudioTrack("mp2", 48_000, 2)),
        ("libmp3lame", AudioTrack("mp2", 48_000, 2)),
    ],
)
def test_audio_is_named_before_its_first_packet(encoder: str, track: AudioTrack) -> None:
    events = demuxed(Stream(20, audio=encoder))
    at = next(number for number, each in enumerate(events) if isinstance(each, AudioPacket))
    told = [each for each in events[:at] if isinstance(each, Tracks)]
    assert told[-1] == Tracks("h264", track)
    assert sounds(events)[0].track == track
    assert reasons(events) == []


def test_hevc_keys_are_seen() -> None:
    events = demuxed(Stream(8, gop=4, video="libx265"))
    assert [each.key for each in pictures(events)] == [True, False, False, False] * 2
    assert pictures(events)[0].codec == "hevc"


def test_zeros_behind_a_picture_for_decoders_that_look_ahead() -> None:
    for each in pictures(demuxed(Stream(3))):
        behind = memoryview(each.data.obj)[-64:]
        assert bytes(behind) == bytes(64)


# --- when a picture is complete


def test_a_padded_packet_ends_the_picture_at_once() -> None:
    stream = Stream(10)
    parts, demuxer, done = clips.ts_packets(stream), Demuxer(), 0
    for part, after in pairwise([*parts, b""]):
        done += len(pictures(demuxer.feed(part)))
        if after and clips.pid(after) == 0x100 and clips.starts(after):
            started = sum(clips.starts(p) for p in parts[: parts.index(after)] if clips.pid(p) == 0x100)
            assert done == started, "the picture was there before the next one began"
    assert done == 10


def unpadded(number: int) -> bytes:
    """A picture in one full packet, without any stuffing."""
    pes = b"\x00\x00\x01\xe0\x00\x00\x84\x80\x05" + mpegts.stamp_bytes(2, number * 3600)
    nal = b"\x00\x00\x01" + (b"\x67\x42" + b"\x00\x00\x01\x65" if number == 0 else b"\x41")
    return bytes((0x47, 0x41, 0x00, 0x10 | number)) + (pes + nal).ljust(184, b"\x9a")


def tables(*streams: mpegts.Stream) -> bytes:
    def packet(pid: int, section: bytes) -> bytes:
        return (bytes((0x47, 0x40 | pid >> 8, pid & 255, 0x10, 0)) + section).ljust(188, b"\xff")

    return packet(0, mpegts.pat(0x1000)) + packet(0x1000, mpegts.pmt(0x100, 0, streams))


H264 = mpegts.Stream(0x100, 0x1B, "h264")


def test_without_padding_the_next_start_or_the_end_of_a_segment_ends_a_picture() -> None:
    demuxer = Demuxer()
    assert pictures(demuxer.feed(tables(H264) + unpadded(0))) == []
    assert [each.pts for each in pictures(demuxer.feed(unpadded(1)))] == [0]
    assert [each.pts for each in pictures(demuxer.end_segment())] == [3600]
    assert pictures(demuxer.finish()) == []


def test_a_writer_that_pads_inside_a_picture_loses_one_and_is_then_waited_for() -> None:
    demuxer = Demuxer()
    padded = bytearray(unpadded(0))
    padded[3] |= 0x20
    padded[4:] = b"\x01\x00" + padded[4:-2]
    more = bytes((0x47, 0x01, 0x00, 0x11)) + b"\x9a" * 184
    early = demuxer.feed(tables(H264) + bytes(padded) + more)
    assert [type(each) for each in early] == [Tracks, Picture, Problem]
    assert reasons(early) == ["padding"]
    again = bytearray(padded)
    again[3] = 0x30 | 2
    assert demuxer.feed(bytes(again)) == []
    assert len(pictures(demuxer.end_segment())) == 1


# --- what is missing or wrong


def without(stream: bytes, *numbers: int) -> bytes:
    return b"".join(part for at, part in enumerate(clips.ts_packets(stream)) if at not in numbers)


def test_a_packet_missing_inside_a_picture_loses_that_picture_only() -> None:
    stream = Stream(10, (320, 240))
    inside = next(n for n in clips.video_packets(stream)[3:] if not clips.starts(clips.ts_packets(stream)[n]))
    events = demuxed(without(stream, inside))
    assert next(each for each in events if isinstance(each, Problem)).track == VIDEO
    assert reasons(events) == ["continuity"]
    assert len(pictures(events)) == 9


def test_a_whole_picture_missing_is_told_before_the_next_one() -> None:
    stream = Stream(10)
    video = clips.video_packets(stream)
    starts = [n for n in video if clips.starts(clips.ts_packets(stream)[n])]
    events = demuxed(without(stream, *(n for n in video if starts[3] <= n < starts[4])))
    at = next(n for n, each in enumerate(events) if isinstance(each, Problem))
    assert reasons(events) == ["continuity"]
    assert len(pictures(events[:at])) == 3
    assert len(pictures(events)) == 9


def test_the_start_of_a_picture_missing() -> None:
    stream = Stream(10, (320, 240))
    starts = [n for n in clips.video_packets(stream) if clips.starts(clips.ts_packets(stream)[n])]
    lost = next(n for n in starts[1:] if not clips.starts(clips.ts_packets(stream)[n + 1]))
    events = demuxed(without(stream, lost))
    assert reasons(events) == ["continuity"]
    assert len(pictures(events)) == 9


def test_segments_with_counters_of_their_own_are_no_problem() -> None:
    one, other = Stream(10), clips.live_stream(10, first=10 * clips.TICKS)
    events = demuxed(one + other)
    assert [each.pts for each in pictures(events)] == [n * clips.TICKS for n in range(20)]
    assert reasons(events) == []


def test_packets_sent_twice_count_once() -> None:
    stream = Stream(10, audio="aac")
    twice = b"".join(part * (2 if clips.pid(part) in (0x100, 0x101) else 1) for part in clips.ts_packets(stream))
    assert demuxed(twice) == demuxed(stream)


def test_marked_packets_are_not_used() -> None:
    stream = bytearray(Stream(10, (320, 240)))
    video = clips.video_packets(bytes(stream))
    stream[188 * video[4] + 1] |= 0x80
    stream[188 * video[-3] + 3] |= 0xC0
    events = demuxed(bytes(stream))
    assert set(reasons(events)) == {"packet"}
    assert 7 <= len(pictures(events)) <= 9


def test_garbage_between_segments_is_skipped_and_told_once() -> None:
    stream = Stream(10)
    events = demuxed(stream + b"\x00no stream\x47" * 50 + clips.live_stream(10, first=10 * clips.TICKS))
    assert reasons(events) == ["sync"]
    assert len(pictures(events)) == 20


def test_a_segment_cut_off_inside_a_packet() -> None:
    demuxer, stream = Demuxer(), Stream(10)
    events = demuxer.feed(stream[: 188 * 20 + 50]) + demuxer.end_segment()
    assert reasons(events)[0] == "truncated"
    events = demuxer.feed(clips.live_stream(10, first=10 * clips.TICKS)) + demuxer.finish()
    assert [each.pts for each in pictures(events)] == [n * clips.TICKS for n in range(10, 20)]
    assert reasons(events) == []


def test_empty_segments_are_nothing() -> None:
    demuxer = Demuxer()
    assert demuxer.feed(b"") + demuxer.end_segment() + demuxer.end_segment() == []


def test_a_table_with_a_wrong_checksum_is_not_believed() -> None:
    stream = bytearray(Stream(5))
    pmt = next(n for n, part in enumerate(clips.ts_packets(bytes(stream))) if clips.pid(part) == 0x1000)
    stream[188 * pmt + 25] ^= 0xFF
    events = demuxed(bytes(stream[: 188 * (pmt + 1)]))
    assert reasons(events) == ["table"]
    assert not any(isinstance(each, Tracks) for each in events)


def test_other_streams_are_ignored_and_that_is_said_once() -> None:
    other = mpegts.Stream(0x102, 0x1B, "h264")
    events = demuxed((tables(H264, other) + unpadded(0)) * 3)
    ignored = [each for each in events if isinstance(each, Problem) and each.reason == "ignored"]
    assert [each.detail for each in ignored] == ["the stream with PID 258 and type 0x1b is not used"]
    assert ignored[0].track is None


def test_a_stream_without_a_known_codec_says_so() -> None:
    events = demuxed(Stream(5, video="mpeg2video"))
    assert events[-1] == Tracks(None, None)
    assert reasons(events) == ["ignored"]


def test_a_program_that_changes_is_told() -> None:
    events = demuxed(Stream(5, audio="aac") + clips.live_stream(5, first=5 * clips.TICKS, video="libx265"))
    told = [each for each in events if isinstance(each, Tracks)]
    assert told == [
        Tracks("h264", None),
        Tracks("h264", AudioTrack("aac", 48_000, 2)),
        Tracks("hevc", None),
    ]
    assert len(pictures(events)) == 10


def test_audio_that_joins_leaves_video_alone_even_inside_of_a_picture() -> None:
    sound = mpegts.Stream(0x101, 0x0F, "aac")
    demuxer = Demuxer()
    events = demuxer.feed(tables(H264) + unpadded(0) + unpadded(1)[:100])
    events += demuxer.feed(unpadded(1)[100:] + tables(H264, sound) + unpadded(2)) + demuxer.finish()
    assert [each.pts for each in pictures(events)] == [0, 3600, 7200]
    assert reasons(events) == []


def test_a_program_that_changes_inside_of_a_group_of_pictures_leaves_a_gap() -> None:
    other = mpegts.Stream(0x102, 0x1B, "h264")
    moved = bytearray(unpadded(2))
    moved[2] = 0x02
    demuxer = Demuxer()
    demuxer.feed(tables(H264) + unpadded(0) + unpadded(1))
    events = demuxer.feed(tables(other) + bytes(moved)) + demuxer.finish()
    assert reasons(events) == ["tables", "continuity"]
    assert [each.key for each in pictures(events)] == [False]


def test_too_long_a_picture_is_given_up() -> None:
    stream = Stream(10, (320, 240))
    sizes = [len(each.data) for each in pictures(demuxed(stream))]
    events = demuxed(stream, limits=Limits(max_pes=max(sizes) // 2))
    assert "too_long" in reasons(events)
    assert 0 < len(pictures(events)) < 10


def test_audio_lost_does_not_touch_video() -> None:
    stream = Stream(20, audio="aac")
    audio = [n for n, part in enumerate(clips.ts_packets(stream)) if clips.pid(part) == 0x101]
    events = demuxed(without(stream, audio[3]))
    assert {each.track for each in events if isinstance(each, Problem)} <= {AUDIO}
    assert len(pictures(events)) == 20


# --- time


def test_time_stamps_go_on_over_the_wrap() -> None:
    first = WRAP - 10 * clips.TICKS
    events = demuxed(clips.live_stream(25, audio="aac", first=first))
    assert [each.pts for each in pictures(events)] == [first + n * clips.TICKS for n in range(25)]
    times = [each.pts for each in sounds(events)]
    assert times == sorted(times)
    assert WRAP < times[-1] < first + 26 * clips.TICKS
    assert reasons(events) == []


def test_a_publisher_that_starts_again_is_followed() -> None:
    stream = Stream(20, audio="aac", first=90_000)
    once, twice = demuxed(stream), demuxed(stream + stream)
    assert len(pictures(twice)) == 40
    times = [each.pts for each in pictures(twice)]
    assert times[:20] == [each.pts for each in pictures(once)]
    assert None not in times
    assert {(later or 0) - (earlier or 0) for earlier, later in pairwise(times[20:])} == {clips.TICKS}
    assert (times[20] or 0) > (times[19] or 0)
    heard = [each.pts for each in sounds(twice)]
    assert heard == sorted(heard)
    assert len(heard) >= 2 * len(sounds(once)) - 2


# --- whatever comes


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    stream = bytearray(Stream(12, audio="aac"))
    for _ in range(draw(st.integers(1, 12))):
        at = draw(st.integers(0, len(stream) - 1))
        match draw(st.sampled_from(["flip", "cut", "copy", "zero"])):
            case "flip":
                stream[at] ^= draw(st.integers(1, 255))
            case "cut":
                del stream[at : at + draw(st.integers(1, 400))]
            case "copy":
                stream[at:at] = stream[: draw(st.integers(1, 400))]
            case "zero":
                stream[at : at + 200] = bytes(len(stream[at : at + 200]))
        if not stream:
            stream = bytearray(b"\x47")
    return bytes(stream)


@given(damaged(), st.integers(1, 2000))
@settings(max_examples=60, deadline=None)
def test_damage_becomes_problems_and_memory_stays_bounded(data: bytes, step: int) -> None:
    demuxer = Demuxer(Limits(max_pes=20_000))
    events: list[DemuxEvent] = []
    for at in range(0, len(data), step):
        events += demuxer.feed(data[at : at + step])
        assert len(demuxer._tail) < 188
        assert all(len(lane.data) <= 20_000 + 188 for lane in demuxer._lanes.values())
    events += demuxer.finish()
    assert len(events) <= len(data) // 188 * 3 + 10
    times = [each.dts for each in pictures(events) if each.dts is not None]
    assert times == sorted(times)


programs = st.lists(
    st.builds(
        lambda pid, codec: mpegts.Stream(pid, 0x1B if codec == "h264" else 0, codec, 2),
        st.sampled_from([0, 0x100, 0x101, 0x1000, 0x1FFF]),
        st.sampled_from(["h264", "aac", "opus"]),
    ),
    max_size=6,
)


@given(st.lists(programs, min_size=1, max_size=6))
@settings(deadline=None)
def test_programs_that_contradict_themselves(series: list[list[mpegts.Stream]]) -> None:
    demuxer = Demuxer()
    for streams in series:
        events = demuxer.feed(tables(*streams) + unpadded(0) + unpadded(1)) + demuxer.end_segment()
        assert sum(isinstance(each, Tracks) for each in events) <= 1 + len(sounds(events))
        assert set(demuxer._lanes) <= {0x100, 0x101}


@given(st.binary(max_size=3000))
@settings(deadline=None)
def test_noise_is_no_stream(data: bytes) -> None:
    events = demuxed(tables(H264) + data)
    assert Counter(type(each) for each in events)[Tracks] == 1
