"""Transport streams for tests, written by FFmpeg's muxer unless said otherwise, and looks at their packets."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.video.frame import VideoFrame

import gpu_byoc.local

CLOCK = 90_000
TICKS = 3600  # a frame at 25 fps
REAL_CLIP = Path(gpu_byoc.local.__file__).parent / "clip" / "bigbuckbunny.mp4"


@dataclass(frozen=True)
class Packet:
    """What FFmpeg's demuxer says of a packet."""

    video: bool
    data: bytes
    pts: int
    dts: int
    key: bool


def picture(number: int, width: int = 64, height: int = 48) -> VideoFrame:
    """A frame whose mean luma tells its number, and with detail to predict from."""
    frame = VideoFrame(width, height, "yuv420p")
    y, x = np.mgrid[0:height, 0:width]
    luma = (40 + 4 * (number % 40) + ((x + 2 * y + 3 * number) // 8) % 3).astype(np.uint8)
    for plane, values in zip(frame.planes, (luma, luma[::2, ::2] // 2 + 60, 200 - luma[::2, ::2] // 2), strict=True):
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
        rows[: values.shape[0], : values.shape[1]] = values
    return frame


def live_stream(
    count: int = 30,
    size: tuple[int, int] = (64, 48),
    *,
    gop: int = 10,
    audio: str | None = None,
    b_frames: int = 0,
    first: int = 0,
    video: str = "libx264",
) -> bytes:
    """``count`` pictures at 25 fps, a keyframe each ``gop``, from PTS ``first``; ``audio`` names an encoder."""
    file = io.BytesIO()
    with av.open(file, "w", format="mpegts", options={"mpegts_copyts": "1"}) as out:
        stream: Any = out.add_stream(video, 25)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.thread_count = 1
        if video in ("libx264", "libx265"):
            stream.codec_context.time_base = Fraction(1, CLOCK)
            tune = {} if b_frames else {"tune": "zerolatency"}
            quiet = {"x265-params": "log-level=none"} if video == "libx265" else {"sc_threshold": "0"}
            stream.options = {"preset": "superfast", "g": str(gop), "bf": str(b_frames), **quiet, **tune}
        sound: Any = None
        if audio:
            sound = out.add_stream(audio, 48_000)
            sound.layout = "stereo"
        for number in range(count):
            frame = picture(number, *size)
            frame.pts, frame.time_base = first + number * TICKS, Fraction(1, CLOCK)
            out.mux(stream.encode(frame))
            if sound is not None:
                for each in tone(number * TICKS, TICKS, sound, first):
                    out.mux(sound.encode(each))
        out.mux(stream.encode(None))
        if sound is not None:
            out.mux(sound.encode(None))
    return file.getvalue()


def tone(start: int, ticks: int, stream: Any, first: int) -> Iterator[AudioFrame]:
    """A sine of 440 Hz in stereo for ``ticks``, in the stream's own format."""
    count, begin = ticks * 48_000 // CLOCK, start * 48_000 // CLOCK
    wave = (8000 * np.sin(2 * np.pi * 440 * (begin + np.arange(count)) / 48_000)).astype(np.int16)
    frame = AudioFrame.from_ndarray(np.repeat(wave, 2).reshape(1, -1), format="s16", layout="stereo")
    frame.sample_rate, frame.pts, frame.time_base = 48_000, begin + first * 48_000 // CLOCK, Fraction(1, 48_000)
    yield from AudioResampler(stream.codec_context.format, "stereo", 48_000).resample(frame)


def remuxed(path: Path = REAL_CLIP) -> bytes:
    """A file's video and audio in a transport stream, packets untouched."""
    file = io.BytesIO()
    with av.open(str(path)) as source, av.open(file, "w", format="mpegts") as out:
        streams = [each for each in source.streams if each.type in ("video", "audio")]
        targets = {each.index: out.add_stream_from_template(each) for each in streams}
        for packet in source.demux(streams):
            if packet.dts is not None:
                packet.stream = targets[packet.stream.index]
                out.mux(packet)
    return file.getvalue()


def packets(stream: bytes) -> list[Packet]:
    """What FFmpeg finds in it, in order."""
    with av.open(io.BytesIO(stream), "r", format="mpegts") as source:
        return [
            Packet(each.stream.type == "video", bytes(each), each.pts or 0, each.dts or 0, each.is_keyframe)
            for each in source.demux()
            if each.size
        ]


def frames(stream: bytes) -> list[VideoFrame]:
    """What FFmpeg decodes from it."""
    with av.open(io.BytesIO(stream), "r", format="mpegts") as source:
        return list(source.decode(video=0))


def ts_packets(stream: bytes) -> list[bytes]:
    assert len(stream) % 188 == 0
    return [stream[at : at + 188] for at in range(0, len(stream), 188)]


def pid(packet: bytes) -> int:
    return (packet[1] & 0x1F) << 8 | packet[2]


def starts(packet: bytes) -> bool:
    return bool(packet[1] & 0x40)


def counter(packet: bytes) -> int:
    return packet[3] & 15


def video_packets(stream: bytes) -> list[int]:
    """Which of the stream's packets carry video (PID 0x100, FFmpeg's first)."""
    return [number for number, packet in enumerate(ts_packets(stream)) if pid(packet) == 0x100]


def luma(frame: VideoFrame) -> Any:
    """Shape (height, width), float."""
    plane = frame.planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
    return rows[: frame.height, : frame.width].astype(float)


def psnr(one: VideoFrame, other: VideoFrame) -> float:
    """Of luma, in dB."""
    error = float(((luma(one) - luma(other)) ** 2).mean())
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))
