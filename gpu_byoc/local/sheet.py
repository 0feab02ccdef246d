"""A sheet of frames: inputs in the upper row, outputs below them, each row with a word at its left end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

_GAP: Final = 8  # pixels between pictures and around them
_INK: Final = 235
_PAPER: Final = 24
_DOT: Final = 2  # pixels a side of a letter's dot
# Capital letters of 5x7 dots, a row of dots to a number, the leftmost dot its highest bit.
_LETTERS: Final = {
    "A": (0x0E, 0x11, 0x11, 0x1F, 0x11, 0x11, 0x11),
    "B": (0x1E, 0x11, 0x11, 0x1E, 0x11, 0x11, 0x1E),
    "E": (0x1F, 0x10, 0x10, 0x1E, 0x10, 0x10, 0x1F),
    "F": (0x1F, 0x10, 0x10, 0x1E, 0x10, 0x10, 0x10),
    "O": (0x0E, 0x11, 0x11, 0x11, 0x11, 0x11, 0x0E),
    "R": (0x1E, 0x11, 0x11, 0x1E, 0x14, 0x12, 0x11),
    "T": (0x1F, 0x04, 0x04, 0x04, 0x04, 0x04, 0x04),
}


def before_after(pairs: Sequence[tuple[Pixels, Pixels]]) -> Pixels:
    """(before, after) frames of one size as one picture, at half their size: shape (height, width, 3)."""
    befores, afters = (_row([_halved(pair[side]) for pair in pairs]) for side in (0, 1))
    words = [_word("BEFORE"), _word("AFTER")]
    margin = max(word.shape[1] for word in words) + 2 * _GAP
    height = befores.shape[0]
    sheet = np.full((2 * height + 3 * _GAP, margin + befores.shape[1] + _GAP, 3), _PAPER, np.uint8)
    for number, (row, word) in enumerate(zip((befores, afters), words, strict=True)):
        top = _GAP + number * (height + _GAP)
        sheet[top : top + height, margin : margin + row.shape[1]] = row
        middle = top + (height - word.shape[0]) // 2
        sheet[middle : middle + word.shape[0], _GAP : _GAP + word.shape[1]] = word[..., None]
    return sheet


def _halved(frame: Pixels) -> Pixels:
    """The mean of each 2x2 block; an odd last row or column is left out."""
    height, width = (side // 2 * 2 for side in frame.shape[:2])
    blocks = frame[:height, :width].reshape(height // 2, 2, width // 2, 2, 3)
    mean: Pixels = blocks.mean(axis=(1, 3)).round().astype(np.uint8)
    return mean


def _row(pictures: Sequence[Pixels]) -> Pixels:
    gap = np.full((pictures[0].shape[0], _GAP, 3), _PAPER, np.uint8)
    parts = [part for picture in pictures for part in (picture, gap)]
    return np.concatenate(parts[:-1], axis=1)


def _word(text: str) -> Pixels:
    """Grey levels, shape (height, width)."""
    rows = np.concatenate([np.array(_LETTERS[letter], np.uint8)[:, None] for letter in text], axis=1)
    dots = np.unpackbits(rows[..., None], axis=2)[..., 2:]  # five bits of a byte and one empty one before them
    flat = dots.reshape(rows.shape[0], -1)[:, 1:]
    return np.where(flat.repeat(_DOT, 0).repeat(_DOT, 1), _INK, _PAPER).astype(np.uint8)
