"""Slots -> coded pictures, one out for each one in, and the choice of the encoder.

Settings for live: no B-frames, no look-ahead, one thread (with many streams in a process the streams are the
parallelism), keyframes where they are asked for and IDR, parameter sets in front of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Final

import av
import av.error
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import ColorRange

from gpu_byoc.errors import BackendUnavailable, BadFrame, ConfigError, EncoderFailed
from gpu_byoc.frames import FrameSpec
from gpu_byoc.media.mpegts import CLOCK
from gpu_byoc.media.planes import Colour, FromSlot

TIME_BASE: Final = Fraction(1, CLOCK)
ENCODERS: Final = ("auto", "libx264", "h264_nvenc")

_OPTIONS: Final[Mapping[str, Mapping[str, str]]] = {
    # What every worker of the network uses, so that costs compare; crf 23 is x264's default.
    "libx264": {"preset": "superfast", "tune": "zerolatency", "forced-idr": "1", "bf": "0", "aud": "1"},
    "h264_nvenc": {
        "preset": "p3",
        "tune": "ull",
        "zerolatency": "1",
        "delay": "0",
        "forced-idr": "1",
        "bf": "0",
        "aud": "1",
    },
}
_MAX_KEY_DISTANCE: Final = 600  # frames, should nobody ask for a keyframe: 24 s at 25 fps


@dataclass(frozen=True, slots=True)
class EncoderChoice:
    """``name`` is what is used, ``reason`` why: both belong into status."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """``options`` go to the encoder as they are and win over ours. ``bit_rate`` in bits a second; None is constant
    quality.
    """

    name: str = "libx264"
    bit_rate: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CodedPicture:
    """An access unit of H.264 in Annex B form; 90 kHz. Without B-frames ``dts`` is ``pts``."""

    data: bytes
    pts: int
    dts: int
    key: bool


def choose_encoder(wanted: str) -> EncoderChoice:
    """Open what is wanted, once, and say what will be used. ``auto`` takes h264_nvenc where it opens, else libx264.

    Raises:
        ConfigError: no such encoder.
        BackendUnavailable: it was asked for by name and does not open.
    """
    if wanted not in ENCODERS:
        raise ConfigError(f"unknown encoder {wanted!r}; known: {', '.join(ENCODERS)}")
    if wanted == "libx264":
        return EncoderChoice(wanted, "asked for")
    failure = _try_nvenc()
    if failure is None:
        return EncoderChoice("h264_nvenc", "asked for" if wanted != "auto" else "auto: it opens on this machine")
    if wanted == "auto":
        return EncoderChoice("libx264", f"auto: h264_nvenc does not open here ({failure})")
    raise BackendUnavailable(f"h264_nvenc does not open here ({failure}); use --encoder auto or libx264")


def _try_nvenc() -> str | None:
    """Why h264_nvenc does not work here; None if it does. Only opening tells: it is compiled in everywhere."""
    try:
        context = _context("h264_nvenc", FrameSpec(256, 256), Colour(), Fraction(25), EncoderSettings("h264_nvenc"))
        context.open()
    except (av.error.FFmpegError, ValueError) as error:  # ValueError: not compiled in
        return str(getattr(error, "strerror", None) or error)
    return None


def _context(
    name: str, spec: FrameSpec, colour: Colour, rate: Fraction, settings: EncoderSettings
) -> VideoCodecContext:
    context: Any = av.CodecContext.create(name, "w")
    context.width, context.height, context.pix_fmt = spec.width, spec.height, "yuv420p"
    context.time_base, context.framerate = TIME_BASE, rate
    context.thread_count = 1
    context.gop_size = _MAX_KEY_DISTANCE
    context.colorspace, context.color_primaries, context.color_trc = colour.matrix, colour.primaries, colour.transfer
    context.color_range = ColorRange.JPEG if colour.full_range else ColorRange.MPEG
    if settings.bit_rate is not None:
        context.bit_rate = settings.bit_rate
    context.options = {**_OPTIONS.get(name, {}), **settings.options}
    checked: VideoCodecContext = context
    return checked


class Encoder:
    """``encode`` each slot, ``flush`` at the end. For another size or other colours make a new one.

    ``rate`` (frames a second) is a hint for rate control; time is what ``pts`` says, in 90 kHz ticks, growing.
    """

    def __init__(
        self,
        spec: FrameSpec,
        *,
        rate: Fraction = Fraction(25),
        colour: Colour | None = None,
        aspect: Fraction | None = None,
        settings: EncoderSettings | None = None,
    ) -> None:
        """Raises BadFrame for sizes that cannot be encoded, ConfigError if the encoder refuses its settings."""
        settings = settings or EncoderSettings()
        self.spec = spec
        self.colour = colour or Colour()
        self._source = FromSlot(spec, self.colour)
        self._last: int | None = None
        self._context = _context(settings.name, spec, self.colour, rate, settings)
        if aspect is not None:
            self._context.sample_aspect_ratio = aspect
        try:
            self._context.open()
        except av.error.FFmpegError as error:
            raise ConfigError(f"{settings.name} does not take {spec} at {rate} fps: {error.strerror}") from error
        if unknown := set(settings.options) & set(self._context.options):
            raise ConfigError(f"{settings.name} does not know the options {', '.join(sorted(unknown))}")

    def encode(self, slot: memoryview, pts: int, key: bool = False) -> list[CodedPicture]:
        """Encode the pixels in ``slot``; it is read only while this call lasts.

        ``key`` asks for an IDR picture. Answers one picture (h264_nvenc may hold the first ones back).
        Raises:
            BadFrame: ``pts`` does not grow, or the slot has another size; the encoder goes on.
            EncoderFailed: the encoder is done for; make a new one or end the stream.
        """
        return self.encode_frame(self._source.frame(slot), pts, key)

    def encode_frame(self, frame: VideoFrame, pts: int, key: bool = False) -> list[CodedPicture]:
        """The same for a frame that is yuv420p of the right size already; its time stamps are overwritten."""
        if self._last is not None and pts <= self._last:
            raise BadFrame(f"a frame with PTS {pts} cannot follow one with {self._last}")
        if (frame.width, frame.height, frame.format.name) != (self.spec.width, self.spec.height, "yuv420p"):
            raise BadFrame(f"a {frame.format.name} frame of {frame.width}x{frame.height} does not fit {self.spec}")
        self._last = pts
        frame.pts, frame.time_base = pts, TIME_BASE
        frame.pict_type = PictureType.I if key else PictureType.NONE
        return self._pictures(frame)

    def flush(self) -> list[CodedPicture]:
        """What is still inside. Nothing can be encoded after it."""
        return self._pictures(None)

    def _pictures(self, frame: VideoFrame | None) -> list[CodedPicture]:
        try:
            packets = self._context.encode(frame)
        except av.error.MemoryError:
            raise
        except av.error.FFmpegError as error:
            raise EncoderFailed(f"{self._context.name} failed at {self.spec}: {error.strerror}") from error
        done = []
        for each in packets:
            pts = self._last if each.pts is None else each.pts
            assert pts is not None
            done.append(CodedPicture(bytes(each), pts, pts if each.dts is None else each.dts, each.is_keyframe))
        return done
