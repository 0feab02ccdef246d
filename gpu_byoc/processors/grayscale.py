"""Grayscale: the luma of BT.601 in all three channels."""

from __future__ import annotations

from typing import Any, ClassVar

from gpu_byoc.processor import ArrayProcessor


class Grayscale(ArrayProcessor):
    """``(77 R + 150 G + 29 B + 128) >> 8`` in red, green and blue.

    The weights are those of ITU-R BT.601 (0.299, 0.587, 0.114) in 256ths; their sum is 256, so gray stays as it is.
    Integers only: every backend returns the same bytes.
    """

    name: ClassVar[str] = "grayscale"

    def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
        red, green, blue = (xp.astype(frames[..., channel], xp.int32) for channel in range(3))
        luma = (77 * red + 150 * green + 29 * blue + 128) >> 8
        return xp.broadcast_to(xp.astype(luma, xp.uint8)[..., None], frames.shape)
