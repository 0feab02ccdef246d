"""Coded pictures -> decoded frames, and the whole way from the bytes of a live stream.

One thread. Frame threads hold back one picture each, which is 40 ms at 25 fps; slice threads help only where the sender
cuts pictures into slices, and low-latency encoders do not. With many streams in a process the streams are the
parallelism. ``benchmarks/bench_media.py`` measures the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Protocol, TypeAlias

import av.error
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame

from gpu_byoc.media.audio import AudioPacket, packet_of
from gpu_byoc.media.demux import VIDEO, Demuxer, Limits, Picture, Problem, Tracks
from gpu_byoc.media.mpegts import CLOCK, VideoCodec
from gpu_byoc.media.planes import Colour

TIME_BASE: Final = Fraction(1, CLOCK)


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What frames are like from here on. ``aspect`` is that of a pixel, None if the stream does not say."""

    codec: VideoCodec
    width: int
    height: int
    format: str
    colour: Colour
    aspect: Fraction | None


@dataclass(frozen=True, slots=True)
class Frame:
    """A decoded picture. ``pts`` is in 90 kHz ticks and grows from frame to frame. ``picture`` must not be written to:
    the decoder still predicts from it.
    """

    picture: VideoFrame
    pts: int
    key: bool


DecodeEvent: TypeAlias = VideoInfo | Frame | Problem
StreamEvent: TypeAlias = Tracks | AudioPacket | DecodeEvent


class Reader(Protocol):
    """Bytes of a live MPEG transport stream -> frames, audio packets and problems, in order.

    ``feed``, ``end_segment`` and ``finish`` answer iterators that decode as they are read, so that one frame at a time
    is in memory however much was fed. Read each to its end before the next call; what is not read is lost.
    """

    def open(self) -> None:
        """Get ready, ahead of the first bytes, on the thread that will read."""

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[StreamEvent]: ...

    def end_segment(self) -> Iterator[StreamEvent]:
        """The publisher's segment is over: nothing in it waits for more."""

    def finish(self) -> Iterator[StreamEvent]:
        """The end of input: everything that is still inside comes out."""

    def stop(self) -> None:
        """From any thread: what is being read ends, without the rest of it. May be called twice."""

    def close(self) -> None:
        """Nothing of it is left. May be called twice, and at any time."""


class VideoDecoder:
    """``decode`` each picture in the order of coding; ``lost`` when some are missing; ``flush`` at the end.

    After ``lost``, and after a picture that cannot be decoded as a whole, everything is left out up to the next key:
    what refers to a missing picture decodes without an error, to garbage. Each picture left out is a ``Problem``.
    """

    def __init__(self, codec: VideoCodec, limits: Limits | None = None) -> None:
        self.codec = codec
        self._limits = limits or Limits()
        self._info: VideoInfo | None = None
        self._sps = b""
        self._new = True  # a sequence header has come since ``_info`` was looked up
        self._last: int | None = None
        self._waiting = True
        self._context = self._open()

    def _open(self) -> VideoCodecContext:
        context = VideoCodecContext.create(self.codec, "r")
        context.thread_count = 1
        # The decoder refuses by the sequence header, before it allocates. It counts what is coded, whole macroblocks
        # of 16x16, 16x32 if interlaced; what is shown is checked here.
        most = self._limits.max_pixels + (15 + 31) * self._limits.max_side + 15 * 31
        context.options = {"max_pixels": str(most)}
        return context

    def decode(self, picture: Picture) -> list[DecodeEvent]:
        if self._waiting and not picture.key:
            return [Problem("no_key", "a picture that refers to a missing one", VIDEO)]
        events: list[DecodeEvent] = []
        if picture.key and picture.sps and picture.sps != self._sps:
            if self._sps:
                events += self.flush()
            self._sps, self._new = picture.sps, True
        self._waiting = False
        packet = packet_of(picture.data)
        packet.pts, packet.dts, packet.time_base = picture.pts, picture.dts, TIME_BASE
        try:
            frames = self._context.decode(packet)
        except av.error.MemoryError:
            raise
        except av.error.FFmpegError as error:
            return [*events, self._refused(error)]
        return events + self._checked(frames)

    def lost(self) -> list[DecodeEvent]:
        """Something is missing before the next picture. What was decoded before comes out."""
        if self._waiting:
            return []
        events = self.flush()
        self._waiting = True
        return events

    def flush(self) -> list[DecodeEvent]:
        """The frames that were held back for their order. The next picture has to be a key."""
        if not self._context.is_open:
            return []
        try:
            events = self._checked(self._context.decode(None))
        except av.error.MemoryError:
            raise
        except av.error.FFmpegError as error:
            events = [self._refused(error)]
        self._context.flush_buffers()
        self._waiting = True
        return events

    def _refused(self, error: av.error.FFmpegError) -> Problem:
        self._restart()
        context = self._context
        if self._too_large(context.width, context.height):
            self._context = self._open()
            return Problem("too_large", self._large(context.width, context.height), VIDEO)
        return Problem("corrupt", f"a picture that cannot be decoded: {error.strerror}", VIDEO)

    def _restart(self) -> None:
        self._waiting = True
        self._sps = b""
        self._context.flush_buffers()

    def _too_large(self, width: int, height: int) -> bool:
        limits = self._limits
        return width * height > limits.max_pixels or max(width, height) > limits.max_side

    def _large(self, width: int, height: int) -> str:
        return f"pictures of {width}x{height} are over the limit of {self._limits.max_pixels} pixels"

    def _checked(self, frames: list[VideoFrame]) -> list[DecodeEvent]:
        events: list[DecodeEvent] = []
        for frame in frames:
            if problem := self._problem(frame):
                events.append(problem)
                if problem.reason != "timestamp":
                    self._restart()
                    break
                continue
            assert frame.pts is not None
            info = self._info
            if self._new or info is None or (info.width, info.height) != (frame.width, frame.height):
                info, self._new = self._info_of(frame), False
                if info != self._info:
                    self._info = info
                    events.append(info)
            self._last = frame.pts
            events.append(Frame(frame, frame.pts, bool(frame.key_frame)))
        return events

    def _info_of(self, frame: VideoFrame) -> VideoInfo:
        """All of it is in the sequence header, or follows from it."""
        aspect = self._context.sample_aspect_ratio or None
        return VideoInfo(self.codec, frame.width, frame.height, frame.format.name, Colour.of(frame), aspect)

    def _problem(self, frame: VideoFrame) -> Problem | None:
        if frame.is_corrupt:
            return Problem("corrupt", "a picture that is damaged or refers to one that is", VIDEO)
        if frame.width < 1 or frame.height < 1 or self._too_large(frame.width, frame.height):
            return Problem("too_large", self._large(frame.width, frame.height), VIDEO)
        if frame.pts is None:
            return Problem("timestamp", "a frame without a time stamp")
        if self._last is not None and frame.pts <= self._last:
            return Problem("timestamp", f"a frame with PTS {frame.pts}, not after {self._last}")
        return None


class StreamReader:
    """The ``Reader`` of this process. A call takes as long as a frame takes to decode, so there is nothing to stop."""

    def __init__(self, limits: Limits | None = None, on_picture: Callable[[int], None] | None = None) -> None:
        """``on_picture`` is told the PTS of each picture as it goes into the decoder, which may hold it back."""
        self._limits = limits or Limits()
        self._demuxer = Demuxer(self._limits)
        self._decoder: VideoDecoder | None = None
        self._on_picture = on_picture

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[StreamEvent]:
        return self._decoded(self._demuxer.feed(data))

    def end_segment(self) -> Iterator[StreamEvent]:
        return self._decoded(self._demuxer.end_segment())

    def open(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def close(self) -> None:
        self._decoder = None  # its pictures are the largest thing a stream holds; they do not wait for the collector

    def finish(self) -> Iterator[StreamEvent]:
        yield from self._decoded(self._demuxer.finish())
        if self._decoder is not None:
            yield from self._decoder.flush()

    def _decoded(self, events: list[Tracks | Picture | AudioPacket | Problem]) -> Iterator[StreamEvent]:
        for event in events:
            if isinstance(event, Picture):
                if self._on_picture is not None and event.pts is not None:
                    self._on_picture(event.pts)
                if self._decoder is None or self._decoder.codec != event.codec:
                    if self._decoder is not None:
                        yield from self._decoder.flush()
                    self._decoder = VideoDecoder(event.codec, self._limits)
                yield from self._decoder.decode(event)
                continue
            if isinstance(event, Problem) and event.track == VIDEO and self._decoder is not None:
                yield from self._decoder.lost()
            yield event
