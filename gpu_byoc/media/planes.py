"""Decoded frames -> packed pixels in a slot, and slots -> frames for an encoder. One converter each, used again.

Colour: pixels in a slot are full-range R'G'B' (or grey). The matrix is the one that the stream names; where it names
none, BT.709 from 720 lines on and BT.601 below, as players assume. The way back uses the same matrix and range, and the
encoder writes the same names: what is not changed looks the same after it.

Conversion at equal size takes swscale's short cuts. To RGB it rounds down: black and white are exact, greys at most 1
too dark, saturated colours at most 3, and a frame that goes through unchanged loses 1 of 255 in luma. The exact form
(``ACCURATE_RND | FULL_CHR_H_INT``) costs ten times as much, half of what decoding does.

Chroma is repeated on the way in, so nearest is its exact inverse on the way out; averaging costs 1.7 times as much.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Final

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray

from gpu_byoc.errors import BadFrame, TooLarge
from gpu_byoc.frames import FrameSpec

# AVColorSpace (ITU-T H.273 MatrixCoefficients) -> what swscale calls it. 0 is RGB, 2 is "not said".
_MATRICES: Final = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
}
_HD_LINES: Final = 720
_NOT_SAID: Final = 2
_MAX_SCALED: Final = 4  # how much more than what is kept a picture may have after scaling, before it is cropped


@dataclass(frozen=True, slots=True)
class Colour:
    """How samples mean colours, in the numbers of ITU-T H.273 that streams carry; 2 is "not said".

    ``full_range``: luma uses 0..255 rather than 16..235.
    """

    matrix: int = _NOT_SAID
    full_range: bool = False
    primaries: int = _NOT_SAID
    transfer: int = _NOT_SAID

    @classmethod
    def of(cls, frame: VideoFrame) -> Colour:
        full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
        return cls(int(frame.colorspace), full, int(frame.color_primaries), int(frame.color_trc))

    def sws_matrix(self, height: int) -> int:
        """swscale's number of the matrix for pictures of ``height`` lines."""
        assumed = Colorspace.ITU709 if height >= _HD_LINES else Colorspace.ITU601
        return int(_MATRICES.get(self.matrix, assumed))

    @property
    def sws_range(self) -> int:
        return int(ColorRange.JPEG if self.full_range else ColorRange.MPEG)


def rows(frame: VideoFrame, row_bytes: int) -> NDArray[np.uint8]:
    """The pixels of a packed frame without its padding, shape (height, row_bytes), not copied."""
    plane = frame.planes[0]
    return np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[: frame.height, :row_bytes]


class ToSlot:
    """Writes frames of any size and format into slots of ``spec``.

    A frame of another size is scaled until it covers the slot, then cropped around its centre. Scaling comes before
    conversion: both in one step take 2.4 times as long, as then there is no short cut to RGB.
    """

    def __init__(self, spec: FrameSpec) -> None:
        self.spec = spec
        self._scaler = VideoReformatter()
        self._converter = VideoReformatter()

    def write(self, frame: VideoFrame, slot: memoryview, colour: Colour | None = None) -> None:
        """``colour`` is the frame's; None looks for it. Raises BadFrame if ``slot`` is not ``spec.nbytes`` long,
        TooLarge if the shapes differ too much to scale."""
        spec = self.spec
        target = np.frombuffer(slot, np.uint8)
        if target.size != spec.nbytes:
            raise BadFrame(f"a slot of {target.size} bytes was given for a frame of {spec} with {spec.nbytes} bytes")
        width, height = covering(frame.width, frame.height, spec)
        colour = colour or Colour.of(frame)
        matrix = colour.sws_matrix(frame.height)
        if (width, height) != (frame.width, frame.height):
            frame = self._scaler.reformat(frame, width, height, threads=1)
        packed = self._converter.reformat(
            frame,
            format=spec.format,
            src_colorspace=matrix,
            dst_colorspace=matrix,
            src_color_range=colour.sws_range,
            dst_color_range=int(ColorRange.JPEG),
            threads=1,
        )
        left, top = (width - spec.width) // 2 * spec.channels, (height - spec.height) // 2
        pixels = rows(packed, width * spec.channels)
        row = spec.width * spec.channels
        np.copyto(target.reshape(spec.height, row), pixels[top : top + spec.height, left : left + row])


def covering(width: int, height: int, spec: FrameSpec) -> tuple[int, int]:
    """The size to which a picture is scaled so that it covers ``spec``, its shape kept. Raises TooLarge."""
    if (width, height) == (spec.width, spec.height):
        return width, height
    scale = max(Fraction(spec.width, width), Fraction(spec.height, height))
    if scale <= 1 and spec.width >= width - 1 and spec.height >= height - 1:
        return width, height  # an odd row or column is cut off, not scaled away
    size = max(spec.width, ceil(width * scale)), max(spec.height, ceil(height * scale))
    if size[0] * size[1] > _MAX_SCALED * spec.pixels:
        raise TooLarge(f"a picture of {width}x{height} has too different a shape to fill {spec}; choose another size")
    return size


class FromSlot:
    """Makes frames for an encoder out of slots of ``spec``: yuv420p, so both sides have to be even."""

    def __init__(self, spec: FrameSpec, colour: Colour | None = None) -> None:
        if spec.width % 2 or spec.height % 2:
            raise BadFrame(f"frames of {spec} cannot be encoded: 4:2:0 takes even sides; choose another size")
        self.spec = spec
        self.colour = colour or Colour()
        self._matrix = self.colour.sws_matrix(spec.height)
        self._shape = spec.shape if spec.channels > 1 else spec.shape[:2]
        self._converter = VideoReformatter()

    def frame(self, slot: memoryview) -> VideoFrame:
        """A frame of its own; ``slot`` is read while this call lasts. Raises BadFrame for another length."""
        pixels = np.frombuffer(slot, np.uint8)
        if pixels.size != self.spec.nbytes:
            raise BadFrame(f"a slot of {pixels.size} bytes was given for a frame of {self.spec}")
        return self._converter.reformat(
            VideoFrame.from_numpy_buffer(pixels.reshape(self._shape), self.spec.format),
            format="yuv420p",
            src_colorspace=self._matrix,
            dst_colorspace=self._matrix,
            interpolation=Interpolation.POINT,
            src_color_range=int(ColorRange.JPEG),
            dst_color_range=self.colour.sws_range,
            threads=1,
        )
