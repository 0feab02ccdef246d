"""What a device is given before anybody is told that it is ready: its first batches, and whether they are right.

``warm_up`` and ``prove`` are for ``Engine(first=...)``, which calls them on the device thread. ``gpu-byoc verify``
compares with the same ``oracle``, at length.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gpu_byoc.backend import Backend, Batch
from gpu_byoc.errors import DeviceLost, said_by
from gpu_byoc.frames import FrameSpec
from gpu_byoc.processor import ArrayProcessor, Processor, processor_name
from gpu_byoc.processors.grayscale import Grayscale
from gpu_byoc.processors.green_tint import GreenTint
from gpu_byoc.processors.passthrough import Passthrough

log = logging.getLogger("gpu_byoc.engine")

Frames = NDArray[np.uint8]  # (frames, height, width, channels)

ORACLE: Final = "numpy"
"""The backend that the others are held against."""

SHIPPED: Final = (GreenTint, Grayscale, Passthrough)
"""Processors whose bytes are numpy's on every backend. Of anybody else's that is not known: it may compute in floating
point, and what its ``setup`` loaded is on one device."""

WARM: Final = (640, 480)
"""The frame size of Livepeer's quickstart page, width first. What is compiled for one size mostly serves all."""

SHAPES: Final = ((1, 1), (5, 7), (17, 1), (33, 19), (641, 481))
BOOSTS: Final = (0, 1, 80, 254, 255)


class CheckFailed(Exception):
    """What a check found wrong, in words."""


def oracle(processor: ArrayProcessor, frames: Frames, params: Any) -> Frames:
    """What ``process_batch`` makes of ``frames`` in plain numpy, without any backend."""
    import array_api_compat.numpy as xp

    given = frames.copy()
    given.flags.writeable = False
    return np.array(processor.process_batch(given, params, xp), np.uint8)


def same(got: Frames, want: Frames, what: str) -> int:
    """The number of frames, if all their bytes are equal.

    Raises:
        CheckFailed: with the place of the first byte that differs, and how many do.
    """
    wrong = np.flatnonzero(got.reshape(-1) != want.reshape(-1))
    if wrong.size:
        frame, row, column, channel = (int(i) for i in np.unravel_index(wrong[0], want.shape))
        raise CheckFailed(
            f"{what}: {wrong.size} of {want.size} bytes differ, the first in frame {frame} of {len(want)} "
            f"({want.shape[2]}x{want.shape[1]}), row {row}, column {column}, channel {channel}: "
            f"{got.reshape(-1)[wrong[0]]} instead of {want.reshape(-1)[wrong[0]]}"
        )
    return len(want)


def noise(rng: np.random.Generator, count: int, width: int, height: int, channels: int = 3) -> Frames:
    return rng.integers(0, 256, (count, height, width, channels), np.uint8)


def every_byte() -> Frames:
    """Three frames with each byte value in each channel, beside other values in its neighbours."""
    ramp = np.arange(256, dtype=np.uint8)
    rows = [np.stack([np.roll(ramp, 85 * channel + shift) for channel in range(3)], -1) for shift in range(9)]
    return np.stack(rows).reshape(3, 3, 256, 3)


def all_params(processor: ArrayProcessor, boosts: Iterable[int]) -> list[Any]:
    """For green tint one for each boost, for any other processor its defaults."""
    if isinstance(processor, GreenTint):
        return [GreenTint.Params(boost) for boost in boosts]
    return [processor.Params()]


def warm_up(backend: Backend, processor: Processor) -> None:
    """A batch of one frame and one of two, with the processor's defaults: what is compiled, loaded or allocated when it
    is first used is there before the first job. A processor that does not take such frames is served all the same.

    Raises:
        DeviceLost: the device did not survive it.
    """
    if backend.name == ORACLE or not isinstance(processor, ArrayProcessor):
        return  # numpy compiles nothing; a FrameProcessor has its own initialize
    rng = np.random.default_rng(1)
    try:
        channels = FrameSpec(*WARM, processor.pixel_format).channels
        for count in (1, 2):
            _through(backend, processor, noise(rng, count, *WARM, channels), processor.Params())
    except DeviceLost:
        raise
    except Exception as error:  # the processor's own, whatever it is: jobs find out what becomes of theirs
        log.warning(
            "%s cannot be warmed up with %dx%d frames: %s: %s",
            *(processor_name(processor), *WARM, type(error).__name__, said_by(error)),
        )


def prove(backend: Backend, processor: Processor) -> None:
    """A short form of verify's "shapes" and "byte values", with one of ``SHIPPED``.

    Raises:
        CheckFailed: not numpy's bytes.
        Exception: whatever the backend fails with.
    """
    assert isinstance(processor, SHIPPED), "of others the right bytes are not known"
    rng = np.random.default_rng(1)
    given = [("shapes", noise(rng, 3, *shape)) for shape in SHAPES]
    for check, frames in [*given, ("shapes", noise(rng, 1, *WARM)), ("byte values", every_byte())]:
        for params in all_params(processor, BOOSTS):
            got = _through(backend, processor, frames, params)
            same(got, oracle(processor, frames, params), f"{check}: {processor_name(processor)} {params}")


def _through(backend: Backend, processor: ArrayProcessor, frames: Frames, params: Any) -> Frames:
    """One batch, past the engine: it is nobody's work, and is booked nowhere."""
    count, height, width, _ = frames.shape
    spec = FrameSpec(width, height, processor.pixel_format)
    arena = backend.arena(spec.nbytes, count)
    try:
        arena.view(0, count)[:] = frames.tobytes()
        backend.submit(Batch(spec, arena, tuple(range(count)), params)).wait()
        return np.frombuffer(bytes(arena.view(0, count)), np.uint8).reshape(frames.shape)
    finally:
        arena.close()
