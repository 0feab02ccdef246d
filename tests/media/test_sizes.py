"""What a sequence header promises is checked before there is memory for it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
from pathlib import Path
from gpu_byoc.media.decode import VideoDecoder
from gpu_byoc.media.demux import Limits, Picture, Problem

def bits(*fields):
    text = ""
    for each in fields:
        if isinstance(each, tuple):
            text += format(each[0], f"0{each[1]}b")
        else:
            code = format(each + 1, "b")
            text += "0" * (len(code) - 1) + code
    text += "1"
    text += "0" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\\0\\0\\0", b"\\0\\0\\3\\0")

wide, high, crop, limit = json.loads(sys.argv[1])
cropping = [(1, 1), 0, crop, 0, crop] if crop else [(0, 1)]
start = b"\\0\\0\\1"
# Fields of 7.3.2.1.1, 7.3.2.2, and 7.3.3 of ITU-T H.264, Baseline profile, level 6.2
sps = start + b"\\x67\\x42\\0\\x3e" + bits(0, 0, 2, 1, (0, 1), wide - 1, high - 1, (1, 1), (1, 1), *cropping, (0, 1))
pps = start + b"\\x68" + bits(0, 0, (0, 1), (0, 1), 0, 0, 0, (0, 1), (0, 2), 0, 0, 0, (0, 1), (0, 1), (0, 1))
data = sps + pps + start + b"\\x65" + bits(0, 7, 0, (0, 4), 0, (0, 1), (0, 1), 0) + b"\\x88" * 200
decoder = VideoDecoder("h264", Limits(max_pixels=limit))
def peak():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmPeak" in line)
before = peak()
events = decoder.decode(Picture("h264", memoryview(data + bytes(64))[: len(data)], 0, 0, True, sps))
events += decoder.flush()
said = [each.reason if isinstance(each, Problem) else type(each).__name__ for each in events]
print(json.dumps([said, (peak() - before) / 1024]))
"""


def said(wide: int, high: int, *, crop: int = 0, limit: int) -> tuple[list[str], float]:
    """By macroblocks of 16x16, ``crop`` pairs of pixels off both sides. Also how many MiB were asked for at most."""
    arguments = json.dumps([wide, high, crop, limit])
    done = subprocess.run([sys.executable, "-c", PROGRAM, arguments], capture_output=True, check=True, timeout=150)
    words, grown = json.loads(done.stdout)
    return words, grown


@pytest.mark.parametrize(
    ("wide", "high", "limit"),
    [
        (4096, 4096, 1920 * 1080),  # 65536 x 65536
        (4096, 1, 65536 * 8),  # within the pixels, over the side
        (512, 512, 8192 * 8192 - 1_000_000),  # 100 MB a picture, 1.5 % over the limit
        (256, 256, 4096 * 4096 - 800_000),
    ],
)
def test_too_large_without_memory_for_it(wide: int, high: int, limit: int) -> None:
    words, grown = said(wide, high, limit=limit)
    assert words in (["too_large"], ["corrupt"])
    picture = wide * high * 384 / (1 << 20)  # MiB, 4:2:0
    assert grown < min(40, 8 + picture / 3), "tables of macroblocks come first, and are small"


def test_this_test_would_notice() -> None:
    """Were such a picture within the limit, it would get its 24 MiB, and more."""
    words, grown = said(256, 256, limit=4096 * 4096)
    assert "too_large" not in words
    assert grown > 24


def test_cropped_to_nothing() -> None:
    assert said(4, 4, crop=32, limit=1920 * 1080)[0] == ["corrupt"]
