"""Clips: written and read again, and files that are no clips."""

from __future__ import annotations

import collections
from fractions import Fraction
from importlib import resources
from pathlib import Path

import av
import numpy as np
import psutil
import pytest

from gpu_byoc.errors import BadFrame, UnsupportedMedia
from gpu_byoc.frames import FrameSpec
from gpu_byoc.media import clips
from gpu_byoc.media.clips import Pixels

SPEC = FrameSpec(64, 48)
RATE = Fraction(30000, 1001)


def picture(number: int) -> Pixels:
    """A flat colour of its own for each number, so that order can be told after lossy coding."""
    return np.full(SPEC.shape, (40 + 20 * number, 200 - 15 * number, 90), np.uint8)


def write(path: Path, count: int = 8) -> None:
    with clips.ClipWriter(path, SPEC, RATE) as clip:
        for number in range(count):
            clip.write(picture(number))


def open_files() -> set[str]:
    return {entry.path for entry in psutil.Process().open_files()}


def test_what_is_written_is_read_in_order_and_in_colour(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write(path)
    assert clips.probe(path) == clips.ClipInfo(SPEC, RATE, 8)
    read = list(clips.frames(path))
    assert len(read) == 8
    for number, frame in enumerate(read):
        assert np.abs(frame.astype(int) - picture(number)).max() <= 4
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt, codec.color_range) == ("h264", "yuv420p", 1)


def test_frames_are_the_callers_own(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", 3)
    read = clips.frames(tmp_path / "a.mp4")
    first = next(read)
    kept = first.copy()
    list(read)
    assert first.flags.writeable
    assert np.array_equal(first, kept)


def test_closing_the_iterator_closes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write(path)
    read = clips.frames(path)
    next(read)
    assert str(path) in open_files()
    read.close()
    assert str(path) not in open_files()


def test_an_error_closes_the_writer(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with pytest.raises(BadFrame, match="100 bytes"), clips.ClipWriter(path, SPEC, RATE) as clip:
        clip.write(bytes(100))
    assert str(path) not in open_files()


def test_odd_sides_are_refused_before_a_file_is_made(tmp_path: Path) -> None:
    with pytest.raises(BadFrame, match="even"):
        clips.ClipWriter(tmp_path / "a.mp4", FrameSpec(63, 48), RATE)
    assert not (tmp_path / "a.mp4").exists()


def test_what_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        clips.probe(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("no video at all\n" * 100)
    with pytest.raises(UnsupportedMedia, match=r"text\.mp4"):
        clips.probe(tmp_path / "text.mp4")
    write(tmp_path / "a.mp4")
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(UnsupportedMedia, match=r"cut\.mp4"):
        list(clips.frames(tmp_path / "cut.mp4"))


@pytest.mark.parametrize("part", [0.03, 0.5, 0.7, 0.97])
def test_a_cut_off_clip_is_never_taken_for_a_shorter_one(tmp_path: Path, part: float) -> None:
    whole = (resources.files("gpu_byoc.local") / "clip" / "bigbuckbunny.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(UnsupportedMedia, match=r"cut\.mp4"):
        collections.deque(clips.frames(tmp_path / "cut.mp4"), maxlen=0)


def test_a_file_with_sound_only(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.rate = 48000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(UnsupportedMedia, match="no video"):
        clips.probe(path)


def test_the_clip_of_the_demo() -> None:
    source = resources.files("gpu_byoc.local") / "clip" / "bigbuckbunny.mp4"
    with resources.as_file(source) as path:
        assert path.stat().st_size < 1_000_000
        assert clips.probe(path) == clips.ClipInfo(FrameSpec(640, 360), Fraction(25), 132)
        assert sum(1 for _ in clips.frames(path)) == 132
    notice = resources.files("gpu_byoc.local") / "clip" / "ATTRIBUTION.md"
    assert "(c) copyright 2008, Blender Foundation" in notice.read_text()
