"""A vignette for any backend: the corners get darker, the middle stays as it is.

    gpu-byoc serve --processor examples/vignette.py --backend auto
    gpu-byoc job --gateway http://127.0.0.1:8000 --model-id vignette --input in.jpg --output out.jpg --param strength=80

Written once against the array API standard: ``xp`` is numpy's, torch's or cupy's namespace, and ``frames`` an array of
that library on the worker's device. Integers only, so every backend returns the same bytes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from array_api_compat import device

from gpu_byoc import ArrayProcessor


class Vignette(ArrayProcessor):
    """Every channel times ``1 - strength/100 * d``, d being 0 in the middle of the frame and 1 in its corners."""

    name: ClassVar[str] = "vignette"

    @dataclasses.dataclass(frozen=True, slots=True)
    class Params:
        strength: int = dataclasses.field(default=60, metadata={"min": 0, "max": 100})

    def process_batch(self, frames: Any, params: Params, xp: Any) -> Any:
        _, height, width, _ = frames.shape
        across = _squares(width, frames, xp)[None, :]
        down = _squares(height, frames, xp)[:, None]
        gain = 256 - (across + down) * params.strength // 100  # in 256ths, shape (height, width)
        dimmed = (xp.astype(frames, xp.int32) * gain[None, :, :, None] + 128) >> 8
        return xp.astype(dimmed, xp.uint8)


def _squares(length: int, frames: Any, xp: Any) -> Any:
    """0 in the middle, 128 at both ends, growing with the square of the distance: shape (length,), int32."""
    ends = max(length - 1, 1)
    place = xp.arange(length, dtype=xp.int64, device=device(frames)) * 2 - (length - 1)  # -ends ... +ends
    return xp.astype(place * place * 128 // (ends * ends), xp.int32)
