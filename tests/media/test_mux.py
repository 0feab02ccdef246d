from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_byoc.frames import FrameSpec
from gpu_byoc.media.audio import AudioPacket, AudioTrack
from gpu_byoc.media.demux import Demuxer, DemuxEvent, Picture, Problem, Tracks
from gpu_byoc.media.encode import CodedPicture, Encoder
from gpu_byoc.media.mpegts import CLOCK, WRAP
from gpu_byoc.media.mux import Piece, Segmenter
from tests.support import clips

AAC = AudioTrack("aac", 48_000, 2)
OPUS = AudioTrack("opus", 48_000, 2)
HEAD = b"\x00\x00\x00\x01\x09\xf0"
ADTS = b"\xff\xf1\x4c\x80"  # 48 kHz, stereo
AUDIO_TICKS = 1920  # an AAC frame at 48 kHz


def coded(pts: int, size: int = 300, key: bool = False) -> CodedPicture:
    """Not decodable, but an access unit as far as a transport stream is concerned."""
    head = HEAD + (b"\x00\x00\x00\x01\x67\x42\x00\x1e" if key else b"") + bytes((0, 0, 1, 0x65 if key else 0x41))
    return CodedPicture(head + b"\x9a" * size, pts, pts, key)


def sound(pts: int, size: int = 200, track: AudioTrack = AAC) -> AudioPacket:
    return AudioPacket(ADTS + bytes(size), pts, track)


def segments(pieces: list[Piece]) -> list[bytes]:
    made: list[bytes] = []
    for each in pieces:
        if each.starts:
            made.append(b"")
        made[-1] += each.data
    return made


def live(count: int, *, audio: bool = True, first: int = 0, seconds: float = 2.0) -> list[Piece]:
    segmenter, pieces, heard = Segmenter(AAC if audio else None, seconds), [], first
    for number in range(count):
        pts = first + number * clips.TICKS
        while audio and heard <= pts:
            pieces += segmenter.audio(sound(heard))
            heard += AUDIO_TICKS
        pieces += segmenter.video(coded(pts, 300 + 37 * number % 900, segmenter.wants_key(pts)))
    return pieces + segmenter.finish()


def read(data: bytes) -> list[DemuxEvent]:
    demuxer = Demuxer()
    return demuxer.feed(data) + demuxer.finish()


def test_a_segment_starts_with_tables_and_a_keyframe_each_two_seconds() -> None:
    made = segments(live(130))
    assert len(made) == 3
    for number, each in enumerate(made):
        parts = clips.ts_packets(each)
        assert [clips.pid(part) for part in parts[:3]] == [0, 0x1000, 0x100]
        found = clips.packets(each)
        assert found[0].key
        assert (found[0].pts, found[0].video) == (number * 2 * CLOCK, True)
        assert Tracks("h264", AAC) in read(each)
        assert not [event for event in read(each) if isinstance(event, Problem)]


def test_each_segment_alone_and_all_together_hold_the_same() -> None:
    made = segments(live(130))
    alone = [event for each in made for event in read(each)]
    pictures = [each for each in alone if isinstance(each, Picture)]
    heard = [each for each in alone if isinstance(each, AudioPacket)]
    together = read(b"".join(made))
    assert pictures == [each for each in together if isinstance(each, Picture)]
    assert heard == [each for each in together if isinstance(each, AudioPacket)]
    assert [p.pts for p in pictures] == [n * clips.TICKS for n in range(130)]
    shown = [packet.pts for each in made for packet in clips.packets(each) if packet.video]
    assert shown == [n * clips.TICKS for n in range(130)], "FFmpeg sees it so too"
    assert [p.pts for p in heard] == [n * AUDIO_TICKS for n in range(len(heard))]
    assert heard[-1].pts > 128 * clips.TICKS


def test_counters_run_on_over_all_segments() -> None:
    counters: dict[int, list[int]] = defaultdict(list)
    for part in clips.ts_packets(b"".join(segments(live(200)))):
        assert part[3] & 0x10, "every packet has payload, so every one counts"
        counters[clips.pid(part)].append(clips.counter(part))
    assert set(counters) == {0, 0x1000, 0x100, 0x101}
    for each in counters.values():
        assert all(later == (earlier + 1) % 16 for earlier, later in pairwise(each))


def test_the_clock_goes_with_every_picture_and_never_passes_what_it_times() -> None:
    clock = -1
    for part in clips.ts_packets(b"".join(segments(live(130, first=CLOCK)))):
        field = part[5 : 5 + part[4]] if part[3] & 0x20 else b""
        if field and field[0] & 0x10:
            value = int.from_bytes(field[1:7], "big") >> 15
            assert clock < value
            clock = value
        elif clips.pid(part) == 0x100:
            assert not clips.starts(part), "a picture without a clock"
        if clips.starts(part) and clips.pid(part) in (0x100, 0x101):
            at = part.index(b"\x00\x00\x01")
            raw = part[at + 9 : at + 14]
            pts = (raw[0] >> 1 & 7) << 30 | raw[1] << 22 | raw[2] >> 1 << 15 | raw[3] << 7 | raw[4] >> 1
            assert pts >= clock


@given(st.lists(st.integers(1, 1200), min_size=1, max_size=12), st.integers(0, WRAP * 2))
@settings(deadline=None)
def test_a_reader_has_each_picture_with_its_last_byte_whatever_its_size(sizes: list[int], first: int) -> None:
    segmenter, demuxer = Segmenter(), Demuxer()
    for number, size in enumerate(sizes):
        picture = coded(first + number * clips.TICKS, size, number == 0)
        events = [e for piece in segmenter.video(picture) for e in demuxer.feed(piece.data)]
        found = [each for each in events if isinstance(each, Picture)]
        assert [bytes(each.data) for each in found] == [picture.data]
        assert not [each for each in events if isinstance(each, Problem)]
        assert (found[0].pts or 0) % WRAP == picture.pts % WRAP


@given(st.lists(st.integers(1, 1200), min_size=1, max_size=12))
@settings(deadline=None)
def test_audio_of_any_size_too(sizes: list[int]) -> None:
    segmenter, demuxer = Segmenter(AAC), Demuxer()
    start = b"".join(piece.data for piece in segmenter.video(coded(CLOCK, key=True)))
    demuxer.feed(start)
    for number, size in enumerate(sizes):
        packet = sound(number * AUDIO_TICKS, size)
        found = [e for piece in segmenter.audio(packet) for e in demuxer.feed(piece.data)]
        assert [each for each in found if isinstance(each, AudioPacket)] == [packet]


def test_pictures_with_another_order_of_decoding_keep_both_times() -> None:
    segmenter = Segmenter()
    one = CodedPicture(coded(0, key=True).data, 3600, 0, True)
    found = read(b"".join(piece.data for piece in segmenter.video(one)))
    assert [(each.pts, each.dts) for each in found if isinstance(each, Picture)] == [(3600, 0)]


def test_a_picture_gets_its_delimiter_if_it_has_none() -> None:
    bare = coded(0, key=True)
    picture = CodedPicture(bare.data[len(HEAD) :], 0, 0, True)
    found = read(b"".join(piece.data for piece in Segmenter().video(picture)))
    assert [bytes(each.data) for each in found if isinstance(each, Picture)] == [bare.data]


def test_nothing_comes_out_before_the_first_keyframe() -> None:
    segmenter = Segmenter(AAC)
    assert segmenter.video(coded(0)) == []
    assert segmenter.audio(sound(0)) == []
    assert segmenter.audio(sound(3 * CLOCK)) == []
    assert segmenter.wants_key(3600)
    pieces = segmenter.video(coded(3 * CLOCK, key=True))
    assert [each.starts for each in pieces] == [True]
    heard = [each.pts for each in read(pieces[0].data) if isinstance(each, AudioPacket)]
    assert heard == [3 * CLOCK], "what had waited for more than two seconds is too old"


def test_audio_waits_for_its_pictures_but_not_for_ever() -> None:
    segmenter = Segmenter(AAC)
    segmenter.video(coded(0, key=True))
    assert segmenter.audio(sound(3600)) == []
    shown = b"".join(piece.data for piece in segmenter.video(coded(3600)))
    assert 0x101 in map(clips.pid, clips.ts_packets(shown))
    late = [n for n in range(200) if segmenter.audio(sound(3600 + (n + 1) * AUDIO_TICKS))]
    assert late[0] * AUDIO_TICKS >= 2 * CLOCK - AUDIO_TICKS * 2, "pictures have stopped, sound goes on"
    assert len(late) == 200 - late[0]


def test_audio_that_begins_later_or_changes_gets_new_tables_at_once() -> None:
    segmenter = Segmenter()
    data = b"".join(piece.data for piece in segmenter.video(coded(0, key=True)))
    for packet in (sound(0), sound(AUDIO_TICKS), sound(2 * AUDIO_TICKS, track=OPUS)):
        data += b"".join(piece.data for piece in segmenter.audio(packet))
    data += b"".join(piece.data for piece in [*segmenter.video(coded(7200)), *segmenter.finish()])
    told = [each for each in read(data) if isinstance(each, Tracks)]
    assert told == [
        Tracks("h264", None),
        Tracks("h264", None),
        Tracks("h264", AAC),
        *[Tracks("h264", None)],
        Tracks("h264", OPUS),
    ]
    assert [each.pts for each in read(data) if isinstance(each, AudioPacket)] == [0, AUDIO_TICKS, 2 * AUDIO_TICKS]


def test_a_keyframe_shortly_before_its_time_starts_the_segment() -> None:
    segmenter = Segmenter()
    starts = [
        pts
        for pts in (n * clips.TICKS for n in range(60))
        if any(piece.starts for piece in segmenter.video(coded(pts, key=pts in (0, 10 * 3600, 45 * 3600))))
    ]
    assert starts == [0, 45 * 3600]
    assert not segmenter.wants_key(50 * 3600)


def test_a_keyframe_of_the_input_is_let_off_once_so_that_heavy_frames_are_apart_for_good() -> None:
    segmenter = Segmenter()
    keys = []
    for number in range(251):
        pts = CLOCK + number * 3600
        key = segmenter.wants_key(pts, heavy=number % 50 == 0)
        segmenter.video(coded(pts, key=key))
        keys += [number] if key else []
    assert keys == [0, 51, 101, 151, 201], "the first starts the stream; the others avoid the input's"


def test_where_all_frames_are_keyframes_segments_are_one_frame_longer() -> None:
    segmenter = Segmenter()
    keys = []
    for number in range(160):
        pts = CLOCK + number * 3600
        if segmenter.wants_key(pts, heavy=True):
            keys.append(number)
        segmenter.video(coded(pts, key=number in keys))
    assert keys == [0, 51, 102, 153]


def test_ffmpeg_decodes_each_segment_on_its_own() -> None:
    segmenter, encoder, pieces = Segmenter(seconds=0.4), Encoder(FrameSpec(64, 48)), []
    for number in range(30):
        pts = number * clips.TICKS
        for picture in encoder.encode_frame(clips.picture(number), pts, segmenter.wants_key(pts)):
            pieces += segmenter.video(picture)
    made = segments(pieces)
    assert len(made) == 3
    for number, each in enumerate(made):
        frames = clips.frames(each)
        assert [frame.pts for frame in frames] == [(number * 10 + n) * clips.TICKS for n in range(10)]
        assert all(clips.psnr(f, clips.picture(number * 10 + n)) > 30 for n, f in enumerate(frames))


@pytest.mark.parametrize("begun", [False, True])
def test_audio_whose_time_stands_still_is_not_kept_without_bound(begun: bool) -> None:
    segmenter = Segmenter(AAC)
    if begun:
        segmenter.video(coded(0, key=True))
    for _ in range(100):
        segmenter.audio(sound(CLOCK, size=100_000))
        assert sum(len(packet.data) for packet in segmenter._waiting) <= 4 << 20
    assert segmenter._weight == sum(len(packet.data) for packet in segmenter._waiting)
