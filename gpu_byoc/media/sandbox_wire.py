"""What a decoding process and the worker say to each other, over a socket; pixels are in memory that both map.

The worker says a letter, a length and so many bytes; the process answers with JSON objects, each with a length before
it, and bytes of sound behind it. The worker takes nothing that it is told on trust: a word of this list with values of
the right kind within bounds, or the process counts as broken.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Final, cast, get_args

import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from gpu_byoc.media.audio import AudioPacket, AudioTrack
from gpu_byoc.media.decode import VideoInfo
from gpu_byoc.media.demux import AUDIO, VIDEO, Limits, Problem, Tracks
from gpu_byoc.media.mpegts import AudioCodec, VideoCodec
from gpu_byoc.media.planes import Colour

FEED, SEGMENT, FINISH, TAKEN = b"F", b"S", b"E", b"T"
"""Bytes of the input; its segment is over; it is over; the pixels of the last frame are read."""

PIECE: Final = 1 << 20
"""Most bytes in one FEED."""

MOST_PLANES: Final = 6
"""Bytes a pixel of the largest format: three planes of two."""

_TO_CHILD: Final = struct.Struct("<cI")
_TO_WORKER: Final = struct.Struct("<II")
_MAX_TEXT: Final = 64 << 10
_MAX_SOUND: Final = 8 << 20
_MAX_RATIO: Final = (1 << 31) - 1  # what FFmpeg's fractions hold

FAR: Final = 1 << 48
"""Ticks, a century of them: no time stamp is farther from 0, and none that follows from some overflows."""

SAMPLE: Final = {
    **dict.fromkeys(("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "gray", "gbrp"), 1),
    **{f"{name}{bits}le": 2 for name in ("yuv420p", "yuv422p", "yuv444p", "gray", "gbrp") for bits in (9, 10, 12)},
}
"""Bytes a sample of the formats that decoders of H.264 and HEVC give out. All of them have planes."""

REASONS: Final = frozenset(
    (
        *("audio", "continuity", "corrupt", "format", "ignored", "no_key", "packet", "padding", "pes", "sync"),
        *("table", "tables", "timestamp", "too_large", "too_long", "truncated"),
    )
)
"""Words of ``Problem``: they are names of counters, so there must not be any number of them."""


class Broken(Exception):
    """The other side is gone, or speaks nonsense."""


# --- bytes


def say(sock: socket.socket, letter: bytes, data: bytes | memoryview = b"") -> None:
    """To the process. Raises OSError."""
    sock.sendall(_TO_CHILD.pack(letter, len(data)) + bytes(data))


def hear(sock: socket.socket) -> tuple[bytes, bytearray]:
    """In the process. Raises EOFError when the worker is gone."""
    letter, size = _TO_CHILD.unpack(_exactly(sock, _TO_CHILD.size))
    return letter, _exactly(sock, size)


def tell(sock: socket.socket, message: dict[str, Any], sound: bytes = b"") -> None:
    """To the worker."""
    text = json.dumps(message).encode()
    sock.sendall(_TO_WORKER.pack(len(text), len(sound)) + text + sound)


def listen(sock: socket.socket) -> tuple[dict[str, Any], bytes]:
    """In the worker.

    Raises:
        EOFError: the process is gone. TimeoutError: the socket's timeout is over. OSError. Broken: nonsense.
    """
    size, more = _TO_WORKER.unpack(_exactly(sock, _TO_WORKER.size))
    if size > _MAX_TEXT or more > _MAX_SOUND:
        raise Broken("it says too much")
    try:
        message = json.loads(_exactly(sock, size))
    except (ValueError, RecursionError):
        raise Broken("it does not speak JSON") from None
    if not isinstance(message, dict):
        raise Broken("it does not speak in objects")
    return message, bytes(_exactly(sock, more))


def _exactly(sock: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        count = sock.recv_into(view[got:])
        if not count:
            raise EOFError
        got += count
    return data


# --- pixels


def room(limits: Limits) -> int:
    """Bytes of the memory that both map: one frame."""
    return limits.max_pixels * MOST_PLANES


def write_pixels(frame: VideoFrame, memory: NDArray[np.uint8]) -> None:
    """The planes one after the other, without padding. The format is one of SAMPLE."""
    _copy(frame, memory, lambda plane, shared: np.copyto(shared, plane))


def read_pixels(info: VideoInfo, memory: NDArray[np.uint8]) -> VideoFrame:
    frame = VideoFrame(info.width, info.height, info.format)
    _copy(frame, memory, lambda plane, shared: np.copyto(plane, shared))
    frame.colorspace, frame.color_range = info.colour.matrix, 2 if info.colour.full_range else 1
    frame.color_primaries, frame.color_trc = info.colour.primaries, info.colour.transfer
    return frame


def _copy(
    frame: VideoFrame, memory: NDArray[np.uint8], copy: Callable[[NDArray[np.uint8], NDArray[np.uint8]], None]
) -> None:
    at, sample = 0, SAMPLE[frame.format.name]
    for plane in frame.planes:
        row, rows = plane.width * sample, plane.height
        pixels = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[:rows, :row]
        copy(pixels, memory[at : at + row * rows].reshape(rows, row))
        at += row * rows


# --- events, as JSON and back


def tracks_out(event: Tracks) -> dict[str, Any]:
    return {"tracks": [event.video, None if event.audio is None else _track_out(event.audio)]}


def sound_out(event: AudioPacket) -> dict[str, Any]:
    return {"sound": [event.pts, _track_out(event.track)]}


def info_out(event: VideoInfo) -> dict[str, Any]:
    colour, aspect = event.colour, event.aspect
    return {
        "info": [event.codec, event.width, event.height, event.format]
        + [colour.matrix, colour.full_range, colour.primaries, colour.transfer]
        + ([aspect.numerator, aspect.denominator] if aspect else [0, 0])
    }


def problem_out(event: Problem) -> dict[str, Any]:
    return {"problem": [event.reason, event.detail, event.track]}


def _track_out(track: AudioTrack) -> list[Any]:
    return [track.codec, track.sample_rate, track.channels]


def tracks_in(value: Any) -> Tracks:
    video, audio = _list(value, 2)
    return Tracks(None if video is None else _video(video), None if audio is None else _track_in(audio))


def sound_in(value: Any, data: bytes) -> AudioPacket:
    """Sound that goes out as it came: what is still to be decoded has no business here."""
    pts, track = _list(value, 2)
    found = _track_in(track)
    if not found.copies:
        raise Broken("it passes on sound that it was to decode")
    return AudioPacket(data, whole(pts, -FAR, FAR), found)


def info_in(value: Any, limits: Limits) -> VideoInfo:
    codec, width, height, name, matrix, full, primaries, transfer, up, down = _list(value, 10)
    width, height = (whole(side, 1, limits.max_side) for side in (width, height))
    if not isinstance(name, str) or name not in SAMPLE or width * height > limits.max_pixels:
        raise Broken("it decodes what it may not")
    colour = Colour(whole(matrix, 0, 255), full is True, whole(primaries, 0, 255), whole(transfer, 0, 255))
    up, down = whole(up, 0, _MAX_RATIO), whole(down, 0, _MAX_RATIO)
    return VideoInfo(_video(codec), width, height, name, colour, Fraction(up, down) if up and down else None)


def problem_in(value: Any) -> Problem:
    reason, detail, track = _list(value, 3)
    if not isinstance(reason, str) or reason not in REASONS or track not in (None, VIDEO, AUDIO):
        raise Broken("it has a problem that there is not")
    return Problem(reason, text_in(detail), track)


def text_in(value: Any) -> str:
    """Fit for one line of a log."""
    if not isinstance(value, str):
        raise Broken("what it says of something is no text")
    return "".join(letter if letter.isprintable() else " " for letter in value[:200])


def whole(value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise Broken("it says a number that it cannot be")
    return value


def _list(value: Any, length: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != length:
        raise Broken("it says a thing that has other parts")
    return value


def _video(value: Any) -> VideoCodec:
    if value == "h264" or value == "hevc":
        return cast(VideoCodec, value)
    raise Broken("it decodes what it may not")


def _track_in(value: Any) -> AudioTrack:
    codec, rate, channels = _list(value, 3)
    if codec not in get_args(AudioCodec):
        raise Broken("it hears what it may not")
    return AudioTrack(cast(AudioCodec, codec), whole(rate, 0, 192_000), whole(channels, 0, 8))
