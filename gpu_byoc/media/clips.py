"""Video files on disk as packed RGB frames, and back: what the client side needs, one frame in memory at a time."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Final

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from gpu_byoc.errors import BadFrame, UnsupportedMedia
from gpu_byoc.frames import FrameSpec

Pixels = NDArray[np.uint8]
"""A frame, shape (height, width, 3), R G B."""

_SCALING: Final = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
_FALLBACK_RATE: Final = Fraction(25)
_MAX_DENOMINATOR: Final = 65535  # of a rate; MP4 and H.264 keep both halves in 32 bits, and real rates have 1 or 1001
_CRF: Final = "20"  # x264's constant quality: 23 is its default, 18 hardly told from the original


@dataclass(frozen=True, slots=True)
class ClipInfo:
    """``frames`` as the container says, 0 if it does not; ``rate`` in frames per second."""

    spec: FrameSpec
    rate: Fraction
    frames: int


def probe(path: Path) -> ClipInfo:
    """What the file's first video stream is. Raises UnsupportedMedia, OSError."""
    with _opened(path) as (_, stream):
        rate = (stream.average_rate or _FALLBACK_RATE).limit_denominator(_MAX_DENOMINATOR)
        return ClipInfo(FrameSpec(stream.width, stream.height), rate, stream.frames)


def frames(path: Path) -> Generator[Pixels, None, None]:
    """Every frame of the first video stream, in order of presentation; each array is the caller's own.

    The file is closed at the end, or when the iterator is closed. Raises UnsupportedMedia (also for a file that breaks
    off or changes its size on the way), OSError.
    """
    converter = VideoReformatter()
    with _opened(path) as (container, stream):
        stream.thread_type = "SLICE"  # frame threads would hold a frame each
        packets = number = 0
        for packet in container.demux(stream):
            packets += packet.size > 0
            for frame in packet.decode():
                if (frame.width, frame.height) != (stream.width, stream.height) or frame.is_corrupt:
                    raise UnsupportedMedia(f"{path}: frame {number} is broken or of another size")
                number += 1
                yield _pixels(
                    converter.reformat(
                        frame, format="rgb24", interpolation=_SCALING, dst_color_range=ColorRange.JPEG, threads=1
                    )
                )
        # The demuxer takes a cut in the middle of sound for the end; the file's own index knows better.
        if packets < len(stream.index_entries):
            raise UnsupportedMedia(f"{path} breaks off after {number} frames")


class ClipWriter:
    """An H.264 MP4 (yuv420p, BT.601, limited range) from frames of one spec with even sides.

    ``with ClipWriter(path, spec, rate) as clip: clip.write(frame)``. Without an error the file is complete when the
    block ends; after one it is closed as far as it got. Raises BadFrame for odd sides, OSError.
    """

    def __init__(self, path: Path, spec: FrameSpec, rate: Fraction) -> None:
        if spec.width % 2 or spec.height % 2 or spec.format != "rgb24":
            raise BadFrame(f"an MP4 of {spec} frames cannot be written: it takes rgb24 with even width and height")
        self.spec = spec
        self._converter = VideoReformatter()
        self._frames = 0
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})
        try:
            self._stream = self._container.add_stream("libx264", rate, options={"crf": _CRF, "preset": "veryfast"})
            self._stream.width, self._stream.height = spec.width, spec.height
            self._stream.pix_fmt = "yuv420p"
            codec = self._stream.codec_context
            codec.thread_count = 1
            codec.colorspace, codec.color_range = Colorspace.SMPTE170M, ColorRange.MPEG
            codec.time_base = 1 / rate
        except BaseException:  # whatever it was, the file must not stay open
            self._container.close()
            raise

    def write(self, frame: Pixels | bytes | memoryview) -> None:
        """Append one frame of ``spec``; it is not kept. Raises BadFrame for another length."""
        pixels = np.frombuffer(frame, np.uint8)
        if pixels.size != self.spec.nbytes:
            raise BadFrame(f"a frame of {pixels.size} bytes does not fit a clip of {self.spec}")
        picture = self._converter.reformat(
            VideoFrame.from_numpy_buffer(pixels.reshape(self.spec.shape), "rgb24"),
            format="yuv420p",
            dst_colorspace=Colorspace.ITU601,
            interpolation=_SCALING,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            threads=1,
        )
        picture.pts = self._frames
        picture.time_base = self._stream.codec_context.time_base
        self._frames += 1
        self._container.mux(self._stream.encode(picture))

    def __enter__(self) -> ClipWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.video or not container.streams.video[0].width:
                raise UnsupportedMedia(f"{path} has no video that can be decoded")
            yield container, container.streams.video[0]
    except av.error.FFmpegError as error:
        if isinstance(error, OSError):
            raise  # not found, not permitted, a directory: says itself what it is
        raise UnsupportedMedia(f"{path} cannot be read as a video: {error.strerror}") from error


def _pixels(frame: VideoFrame) -> Pixels:
    plane = frame.planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
    return rows[: frame.height, : frame.width * 3].reshape(frame.height, frame.width, 3).copy()
