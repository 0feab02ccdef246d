"""The same bytes as numpy: each check of ``verify`` returns how many frames it compared, or raises what is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Final

import numpy as np

from gpu_byoc.checks.rig import Rig, Subject, rig, without_kernels
from gpu_byoc.engine.proof import (
    SHIPPED,
    CheckFailed,
    Frames,
    all_params,
    every_byte,
    noise,
    oracle,
    same,
)
from gpu_byoc.errors import ProcessorFailed
from gpu_byoc.processor import ArrayProcessor
from gpu_byoc.processors.green_tint import GreenTint

# (width, height): one pixel, every rest of 16-byte accesses, odd sides, one row, one column, ordinary and large frames
SHAPES: Final = [
    *[(1, 1), *((width, 1) for width in range(2, 18)), (5, 7), (33, 19), (1, 4099), (65535, 1)],
    *[(320, 240), (641, 481), (1920, 1080)],
]
LARGE: Final = [(3840, 2160), (4095, 2161)]
QUICK_BOOSTS: Final = (0, 1, 80, 254, 255)


def forms() -> Iterator[tuple[str, ArrayProcessor]]:
    """Each shipped processor with its kernel, where it has one, and in its generic form."""
    for processor in SHIPPED:
        if processor.kernels:
            yield f"{processor.name} (kernel)", processor()
        yield f"{processor.name} (generic)", without_kernels(processor)()


def shapes(subject: Subject, quick: bool) -> int:
    """Random frames of every shape, through every processor."""
    rng, count = np.random.default_rng(1), 0
    for name, processor in forms():
        with rig(subject, processor) as engine:
            for width, height in SHAPES if quick else SHAPES + LARGE:
                frames = noise(rng, 3, width, height)
                for params in all_params(processor, QUICK_BOOSTS if width * height < 1000 else (80,)):
                    count += _compare(engine, processor, frames, params, f"{name} {params}")
    return count


def byte_values(subject: Subject, quick: bool) -> int:
    """Each byte value in each channel, beside other values in its neighbours; for green tint with each boost."""
    frames, count = every_byte(), 0
    for name, processor in forms():
        with rig(subject, processor) as engine:
            for params in all_params(processor, QUICK_BOOSTS if quick else range(256)):
                count += _compare(engine, processor, frames, params, f"{name} {params}")
    return count


def _compare(engine: Rig, processor: ArrayProcessor, frames: Frames, params: Any, what: str) -> int:
    job = engine.job(frames, params)
    return same(job.take(what), oracle(processor, frames, params), what)


TRIP: Final = 13


class Tripping(ArrayProcessor):
    """Green tint in its generic form that raises when the first byte of any frame of its batch is TRIP."""

    name: ClassVar[str] = "tripping"

    @dataclasses.dataclass(frozen=True, slots=True)
    class Params(GreenTint.Params):
        pass

    def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
        if bool(xp.any(frames[:, 0, 0, 0] == TRIP)):
            raise ArithmeticError("a frame that trips the processor, as verify means it to")
        return GreenTint.process_batch(self, frames, params, xp)  # type: ignore[arg-type]


def failures(subject: Subject, quick: bool) -> int:
    """Frames that make the processor raise, among others in the same batches: they fail alone and keep their bytes."""
    rng, processor, count = np.random.default_rng(2), Tripping(), 0
    with rig(subject, processor, slots=16, max_batch=8) as engine:
        for _ in range(4 if quick else 20):
            jobs = []
            for number in range(16):
                frames = noise(rng, 1, 33, 19)
                frames[0, 0, 0, 0] = TRIP if rng.random() < 0.2 else TRIP + 1
                jobs.append(engine.job(frames, processor.Params(80), stream=f"stream {number % 3}"))
            for job in jobs:
                count += _tripped(job) if job.frames[0, 0, 0, 0] == TRIP else _untripped(job)
    return count


def _tripped(job: Any) -> int:
    what = "a frame that makes the processor raise"
    error = job.outcome().error
    if not isinstance(error, ProcessorFailed):
        job.lease.release()
        raise CheckFailed(f"{what} ended with {error!r} instead of ProcessorFailed")
    return same(job.leftover(what), job.frames, f"{what} keeps its bytes")


def _untripped(job: Any) -> int:
    what = "a frame beside one that makes the processor raise"
    return same(job.take(what), oracle(GreenTint(), job.frames, job.params), what)
