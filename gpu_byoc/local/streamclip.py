"""A video file as a live source, and a recording of what came back as an MP4 and a sheet of frames.

FFmpeg's muxer brings whatever file it is into the form of a transport stream, and our demuxer takes the coded pictures
and the sound out of it again. Nothing is decoded or encoded. What is published goes through our own muxer, because that
one gives each picture's bytes at once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import av
import av.error

from gpu_byoc.errors import ConfigError, UnsupportedMedia
from gpu_byoc.frames import FrameSpec
from gpu_byoc.local import sheet
from gpu_byoc.media import clips, images
from gpu_byoc.media.audio import AudioPacket, AudioTrack
from gpu_byoc.media.demux import Demuxer, DemuxEvent, Picture, Problem
from gpu_byoc.media.encode import CodedPicture
from gpu_byoc.media.mpegts import CLOCK

START: Final = CLOCK
"""The first time stamp of what is published; room before it for the clock that a transport stream carries."""

SHOWN: Final = 4  # frames on the before/after sheet
SHEET_SECONDS: Final = 10  # of the beginning, from which they are taken
_AUDIO: Final = frozenset({"aac", "opus", "mp2", "mp3"})  # what a transport stream carries here
_LARGEST: Final = 1 << 30  # bytes of a file; it is held in memory
_PIECES: Final = 64  # packets that the muxer may write before they are read

Unit: TypeAlias = CodedPicture | AudioPacket


@dataclass(frozen=True, slots=True)
class Clip:
    """A file in memory. Time stamps of ``units`` (in order of decoding) begin at 0; 90 kHz.

    ``length`` is from one round to the next. ``reorder`` is how long, on average, a picture waits for those that are
    shown before it and coded behind it; 0 without B-frames. ``left_out`` names a sound that is not played.
    """

    path: Path
    units: tuple[Unit, ...]
    length: int
    pictures: int
    reorder: int
    audio: AudioTrack | None
    left_out: str | None = None

    @property
    def seconds(self) -> float:
        return self.length / CLOCK

    def play(self, seconds: float | None = None) -> Iterator[Unit]:
        """The units from START on, over and over, time stamps running on, for so long; None: once."""
        offset = START
        end = offset + (self.length if seconds is None else round(seconds * CLOCK))
        while True:
            for unit in self.units:
                if due(unit) + offset >= end and seconds is not None:
                    return
                yield _moved(unit, offset)
            offset += self.length
            if offset >= end:
                return


def due(unit: Unit) -> int:
    """When a unit is to be sent: pictures in the order of decoding."""
    return unit.dts if isinstance(unit, CodedPicture) else unit.pts


def _moved(unit: Unit, ticks: int) -> Unit:
    if isinstance(unit, CodedPicture):
        return replace(unit, pts=unit.pts + ticks, dts=unit.dts + ticks)
    return replace(unit, pts=unit.pts + ticks)


def load(path: Path) -> Clip:
    """Read a file with H.264 video.

    Raises:
        UnsupportedMedia: no H.264, or damaged.
        ConfigError: too large to hold.
        OSError: it cannot be read.
    """
    if path.stat().st_size > _LARGEST:
        raise ConfigError(f"--input {path} has more than 1 GiB and would be held in memory; cut a piece out of it")
    try:
        with av.open(str(path), metadata_errors="replace") as source:
            units, left_out = _units(path, source)
    except av.error.FFmpegError as error:
        if isinstance(error, OSError):
            raise  # says itself what it is
        raise UnsupportedMedia(f"{path} cannot be read as a video: {error.strerror}") from error
    stamps = [unit.pts for unit in units if isinstance(unit, CodedPicture)]
    if not stamps or not next(unit.key for unit in units if isinstance(unit, CodedPicture)):
        raise UnsupportedMedia(f"{path} has no video that begins with a keyframe")
    count = len(stamps)
    length = (max(stamps) - min(stamps)) * count // (count - 1) if count > 1 else CLOCK // 25
    begin = min(map(due, units))
    sounds = [unit for unit in units if isinstance(unit, AudioPacket)]
    kept = (u for u in units if isinstance(u, CodedPicture) or u.pts < sounds[0].pts + length)
    waits = sum(unit.pts - unit.dts for unit in units if isinstance(unit, CodedPicture))
    return Clip(
        path,
        tuple(_moved(unit, -begin) for unit in kept),
        length,
        count,
        waits // count,
        sounds[0].track if sounds else None,
        left_out,
    )


def _units(path: Path, source: Any) -> tuple[list[Unit], str | None]:
    """Everything in the file, and the name of an audio codec that was left out."""
    video = next(iter(source.streams.video), None)
    if video is None or video.codec_context.name != "h264":
        found = video.codec_context.name if video else "no video"
        raise UnsupportedMedia(f"{path} has {found}; a live stream here is H.264. Convert it first: -c:v libx264")
    sound = next(iter(source.streams.audio), None)
    kind = sound.codec_context.name.removesuffix("float") if sound is not None else None  # FFmpeg's mp3float is mp3
    chosen = [video, sound] if kind in _AUDIO else [video]
    demuxer = Demuxer()
    units: list[Unit] = []
    for data in _transport_stream(source, chosen):
        units += _checked(path, demuxer.feed(data))
    units += _checked(path, demuxer.finish())
    return units, kind if kind not in _AUDIO else None


def _checked(path: Path, events: Sequence[DemuxEvent]) -> Iterator[Unit]:
    for event in events:
        if isinstance(event, Problem):
            raise UnsupportedMedia(f"{path}: {event.detail}")
        if isinstance(event, AudioPacket):
            yield event
        elif isinstance(event, Picture):
            assert event.pts is not None  # a Problem otherwise
            assert event.dts is not None
            yield CodedPicture(bytes(event.data), event.pts, event.dts, event.key)


class _Writer:
    """What FFmpeg writes, until it is taken."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self.parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        data = b"".join(self.parts)
        self.parts.clear()
        return data


def _transport_stream(source: Any, chosen: list[Any]) -> Iterator[bytes]:
    """The chosen streams remuxed, packet by packet. One sound in one PES each: FFmpeg would gather several."""
    writer = _Writer()
    with av.open(writer, "w", format="mpegts", options={"pes_payload_size": "0"}) as out:
        targets = {each.index: out.add_stream_from_template(template=each) for each in chosen}
        for number, packet in enumerate(source.demux(chosen)):
            if packet.dts is None:
                continue
            packet.stream = targets[packet.stream.index]
            out.mux(packet)
            if number % _PIECES == 0:
                yield writer.take()
    yield writer.take()


# --- what came back


def write_mp4(recording: Path, target: Path) -> None:
    """A transport stream as MP4, nothing encoded anew, its time beginning at 0. Raises UnsupportedMedia, OSError."""
    try:
        with (
            av.open(str(recording), format="mpegts") as source,
            av.open(str(target), "w", format="mp4", options={"movflags": "+faststart"}) as out,
        ):
            chosen = [each for each in source.streams if each.type in ("video", "audio")]
            targets = {each.index: out.add_stream_from_template(template=each) for each in chosen}
            for packet in source.demux(chosen):
                if packet.dts is None or packet.pts is None:
                    continue
                packet.dts, packet.pts = packet.dts - START, packet.pts - START
                packet.stream = targets[packet.stream.index]
                out.mux(packet)
    except av.error.FFmpegError as error:
        if isinstance(error, OSError):
            raise
        raise UnsupportedMedia(f"what came back cannot be read: {error.strerror}") from error


def write_sheet(
    before: Path, after: Path, published: Sequence[int], received: Sequence[int], length: int, target: Path
) -> None:
    """Frames of the beginning, as PNG. ``published`` and ``received`` are the pictures' time stamps, sorted; of the
    first only one round of the clip (``length``) has its counterpart in the file ``before``."""
    came = set(received)
    end = START + min(length, SHEET_SECONDS * CLOCK)
    both = [pts for pts in published if pts in came and pts < end]
    if not both:
        raise UnsupportedMedia("nothing came back of the first seconds; there is nothing to show")
    shown = [both[int((number + 0.5) * len(both) / SHOWN)] for number in range(SHOWN)]
    befores = _frames(before, [bisect_left(published, pts) for pts in shown])
    afters = _frames(after, [bisect_left(received, pts) for pts in shown])
    pairs = [(b[: a.shape[0], : a.shape[1]], a) for b, a in zip(befores, afters, strict=True)]  # even sides
    pixels = sheet.before_after(pairs)
    height, width, _ = pixels.shape
    target.write_bytes(images.encode(memoryview(pixels.data), FrameSpec(width, height), images.PNG))


def _frames(path: Path, numbers: Sequence[int]) -> list[clips.Pixels]:
    """The frames with these numbers, counted in order of showing."""
    found: dict[int, clips.Pixels] = {}
    source: Generator[clips.Pixels, None, None] = clips.frames(path)
    with closing(source) as frames:
        for number, frame in enumerate(frames):
            if number in numbers:
                found[number] = frame
            if number >= max(numbers):
                break
    if len(found) < len(set(numbers)):
        raise UnsupportedMedia(f"{path} has fewer frames than it should: {len(found)} of {len(set(numbers))} found")
    return [found[number] for number in numbers]
