"""Green tint on one core against memcpy of the same frame, and against the quickstart page's Python loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.harness import percentile
from gpu_byoc.processors.green_tint import GreenTint, numpy_kernel

SIZES = ((640, 480), (1920, 1080))
ROUNDS = 15


def page_loop(frame: bytes) -> bytes:
    """What the page's processor does to a frame."""
    data = bytearray(frame)
    for i in range(1, len(data), 3):
        data[i] = min(255, data[i] + 80)
    return bytes(data)


def median_of(work: Callable[[], object], seconds: float) -> float:
    """Median seconds of one call, over calls for about ``seconds``."""
    times: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 5:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return percentile(times, 0.5)


def run(quick: bool) -> list[dict[str, Any]]:
    """Rounds of memcpy and kernel in turn; the ratio is the median over the rounds."""
    rows = []
    params = GreenTint.Params()
    window = 0.02 if quick else 0.1
    for width, height in SIZES:
        rng = np.random.default_rng(1)
        frame = rng.integers(0, 256, width * height * 3, dtype=np.uint8)
        expected = frame.copy()
        numpy_kernel(frame, expected, params)
        if width == 640 and expected.tobytes() != page_loop(frame.tobytes()):
            raise AssertionError("the kernel does not equal the page's loop")
        other, slot = np.empty_like(frame), frame.copy()
        works: dict[str, Callable[[], object]] = {
            "memcpy": lambda a=other, b=frame: np.copyto(a, b),  # type: ignore[misc]
            "in place, as the worker does": lambda a=slot: numpy_kernel(a, a, params),  # type: ignore[misc]
            "from one buffer to another": lambda a=frame, b=other: numpy_kernel(a, b, params),  # type: ignore[misc]
        }
        if width == 640 and not quick:
            works["the page's loop"] = lambda a=frame: page_loop(a.tobytes())  # type: ignore[misc]
        times: dict[str, list[float]] = {name: [] for name in works}
        for number in range(5 if quick else ROUNDS):
            for name, work in works.items():
                if name != "the page's loop" or number < 2:
                    times[name].append(median_of(work, window))
        floor = times["memcpy"]
        for name, each in times.items():
            rows.append(
                {
                    "size": f"{width}x{height}",
                    "what": name,
                    "us": percentile(each, 0.5) * 1e6,
                    "times_memcpy": percentile([t / f for t, f in zip(each, floor, strict=False)], 0.5),
                }
            )
    return rows
