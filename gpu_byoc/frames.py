"""What a frame is: plain values, no pixels, standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gpu_byoc.errors import BadFrame

BYTES_PER_PIXEL: Final = {"rgb24": 3, "bgr24": 3, "rgba": 4, "bgra": 4, "gray": 1}
"""Packed 8-bit formats by their FFmpeg names; all have shape (height, width, channels)."""

MAX_SIDE: Final = 65535
"""Largest width or height that H.264, JPEG and PNG decoders in use agree on (JPEG's 16-bit fields set it)."""


@dataclass(frozen=True, slots=True)
class FrameSpec:
    """Geometry and pixel format of a frame; frames of one spec can share a batch.

    A job without geometry is pixels in one row: ``FrameSpec(n, 1)``.
    """

    width: int
    height: int
    format: str = "rgb24"

    def __post_init__(self) -> None:
        if self.format not in BYTES_PER_PIXEL:
            raise BadFrame(f"unknown pixel format {self.format!r}; known: {', '.join(BYTES_PER_PIXEL)}")
        if self.width < 1 or self.height < 1:
            raise BadFrame(f"a frame of {self.width}x{self.height} has no pixels")

    @property
    def channels(self) -> int:
        return BYTES_PER_PIXEL[self.format]

    @property
    def pixels(self) -> int:
        return self.width * self.height

    @property
    def nbytes(self) -> int:
        return self.width * self.height * BYTES_PER_PIXEL[self.format]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the uint8 array."""
        return (self.height, self.width, BYTES_PER_PIXEL[self.format])

    def __str__(self) -> str:
        return f"{self.width}x{self.height} {self.format}"
