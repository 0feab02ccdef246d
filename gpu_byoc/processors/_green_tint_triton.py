"""Green tint as one Triton kernel. Imported when it is first called: it needs triton at import."""

from __future__ import annotations

from typing import Any, Final

import triton
import triton.language as tl

WORDS: Final = 1024
"""Words of four bytes that a program changes: four for each thread of four warps, twice. 1024 % 3 == 1, see below."""


@triton.jit(do_not_specialize=["vectors", "boost"])  # type: ignore[untyped-decorator]  # one variant, built at the start
def _tint(bytes_, vectors, boost, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Saturating ``+ boost`` on every third byte from byte 1 on, of ``vectors`` * 16 bytes from ``bytes_`` on.

    A word is four bytes, the first of them the lowest. Because 4 % 3 == 1, word w starts at channel w % 3, and because
    WORDS % 3 == 1, that is (program + word of the program) % 3.
    """
    program = tl.program_id(0)
    word = tl.arange(0, WORDS)
    at = program.to(tl.int64) * WORDS + word
    inside = at // 4 < vectors  # alike for the four words of a vector, so that they are one access of 16 bytes
    place = bytes_.to(tl.pointer_type(tl.uint32)) + at
    x = tl.load(place, mask=inside, other=0)

    phase = (program % 3 + word) % 3
    green = tl.where(phase == 0, 0x0000FF00, tl.where(phase == 1, 0xFF0000FF, 0x00FF0000)).to(tl.uint32)
    step = (boost.to(tl.uint32) * 0x01010101) & green
    # Four bytes added at once: the lower seven bits of each without a carry between bytes, then the eighth.
    high = tl.full((WORDS,), 0x80808080, tl.uint32)
    low = tl.full((WORDS,), 0x7F7F7F7F, tl.uint32)
    wrapped = ((x & low) + (step & low)) ^ ((x ^ step) & high)
    carry = ((x & step) | ((x | step) & (wrapped ^ high))) & high
    tl.store(place, wrapped | ((carry >> 7) * 255), mask=inside)


def tint(frames: Any, boost: int) -> None:
    """In place on contiguous uint8 (N, H, W, 3) from a multiple of 16 bytes on, on the current stream."""
    flat = frames.view(-1)
    vectors = flat.numel() // 16
    if vectors:
        _tint[(triton.cdiv(vectors * 4, WORDS),)](flat, vectors, boost, WORDS, num_warps=4)
    rest = flat[vectors * 16 :]  # at most 15 bytes; byte 16 * vectors is of channel vectors % 3
    if rest.numel():
        rest[(1 - vectors) % 3 :: 3].clamp_(max=255 - boost).add_(boost)
