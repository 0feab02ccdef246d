"""What the tests of backends share: which ones there are, opening one, frames in and out of slots, the oracle."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import numpy as np
import pytest

from gpu_byoc.backend import Arena, Backend, Batch
from gpu_byoc.frames import FrameSpec
from gpu_byoc.processor import ArrayProcessor
from tests.conftest import skip_or_fail

POISON = 0xA5  # what a slot holds before a frame comes

FOUND = {entry.name: entry for entry in entry_points(group="gpu_byoc.backends")}

CASES = [
    pytest.param(("numpy", "cpu"), id="numpy-cpu"),
    pytest.param(("stand-in", "cuda"), id="cupy-stand-in"),
    pytest.param(("torch", "cpu"), id="torch-cpu", marks=pytest.mark.needs_torch),
    pytest.param(("torch", "cuda"), id="torch-cuda", marks=[pytest.mark.needs_torch, pytest.mark.needs_cuda]),
    pytest.param(("cupy", "cuda"), id="cupy-cuda", marks=pytest.mark.needs_cuda),
    # a stranger's backend is held to the same
    *(pytest.param((name, None), id=name) for name in sorted(FOUND.keys() - {"numpy", "torch", "cupy"})),
]


def backend_class(name: str) -> Any:
    if name == "stand-in":
        from tests.backends.fake_cupy import StandInBackend

        return StandInBackend
    return FOUND[name].load()


@contextmanager
def opened(case: tuple[str, str | None], processor: ArrayProcessor) -> Iterator[Backend]:
    """A backend that is open; one that cannot open although nothing is missing is a failure, not a skip."""
    name, device = case
    if name == "cupy" and importlib.util.find_spec("cupy") is None:
        skip_or_fail("GPU_BYOC_REQUIRE_CUDA", "cupy is not installed")
    backend: Backend = backend_class(name)()
    try:
        backend.open(device, processor)
        assert not backend.info()["degraded"], backend.info()
        yield backend
    finally:
        backend.close()


@dataclass(slots=True)
class House:
    """An arena and what every slot of it should hold."""

    arena: Arena
    spec: FrameSpec
    expected: np.ndarray[Any, Any]  # (slots, height, width, channels)

    @classmethod
    def of(cls, backend: Backend, spec: FrameSpec, slots: int) -> House:
        arena = backend.arena(spec.nbytes, slots)
        arena.view(0, slots)[:] = bytes([POISON]) * (slots * spec.nbytes)
        return cls(arena, spec, np.full((slots, *spec.shape), POISON, np.uint8))

    def put(self, slots: tuple[int, ...], frames: np.ndarray[Any, Any], params: Any) -> Batch:
        """Frames into slots; returns the batch to submit."""
        for slot, frame in zip(slots, frames, strict=True):
            self.arena.view(slot)[:] = frame.tobytes()
            self.expected[slot] = frame
        return Batch(self.spec, self.arena, slots, params)

    def expect(self, slots: tuple[int, ...], frames: np.ndarray[Any, Any]) -> None:
        self.expected[list(slots)] = frames

    def check(self) -> None:
        """Every slot holds what it should, also those that no batch used."""
        held = np.frombuffer(self.arena.view(0, self.arena.slots), np.uint8).reshape(self.expected.shape)
        np.testing.assert_array_equal(held, self.expected)


def oracle(processor: ArrayProcessor, frames: np.ndarray[Any, Any], params: Any) -> np.ndarray[Any, Any]:
    """What the numpy backend makes of ``frames``."""
    count, height, width, _ = frames.shape
    with opened(("numpy", "cpu"), processor) as backend:
        house = House.of(backend, FrameSpec(width, height, processor.pixel_format), count)
        backend.submit(house.put(tuple(range(count)), frames, params)).wait()
        held = bytes(house.arena.view(0, count))
        house.arena.close()
    return np.frombuffer(held, np.uint8).reshape(frames.shape)


def noise(seed: int, count: int, spec: FrameSpec) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (count, *spec.shape), np.uint8)
