"""Which kernel runs where a processor has several: those that fail are left out, the fastest of the others wins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from gpu_byoc_backends import _stage
from gpu_byoc_backends._kernels import Choice, race, that_run

from gpu_byoc.frames import FrameSpec
from gpu_byoc.processor import ArrayProcessor, NoParams
from gpu_byoc.processors.green_tint import GreenTint
from tests.backends.fake_cupy import StandInBackend
from tests.backends.kit import House, noise, opened


def invert(frames: Any) -> Any:
    return np.bitwise_xor(frames, 0xFF, out=frames)


class Several(ArrayProcessor):
    """Kernels of equal results; ``enqueue`` runs what makes one slow on the device."""

    def __init__(self, *forms: str) -> None:
        self.kernels = {"stand-in": tuple(getattr(self, form) for form in forms)}  # type: ignore[misc]
        self.calls: list[str] = []

    def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
        self.calls.append("process_batch")
        return frames ^ 0xFF

    def broken(self, frames: Any, params: Any) -> Any:
        raise ModuleNotFoundError("No module named 'triton'\nand a page of source")

    def quick(self, frames: Any, params: Any) -> Any:
        self.calls.append("quick")
        return invert(frames)

    def slow(self, frames: Any, params: Any) -> Any:
        self.calls.append("slow")
        for _ in range(6):
            invert(frames)
        return invert(frames)


@pytest.fixture(autouse=True)
def _small_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """6 MB instead of 100, whose copies are too slow to be made many times in a test."""
    monkeypatch.setattr(_stage, "FRAMES", 1)


@contextmanager
def stand_in(processor: ArrayProcessor, budget: int = 1 << 30) -> Iterator[StandInBackend]:
    backend = StandInBackend()
    backend.fake.budget = budget
    try:
        backend.open(None, processor)
        yield backend
    finally:
        backend.close()


@pytest.mark.parametrize("forms", [("slow", "quick"), ("quick", "slow")])
def test_the_fastest_is_taken_whatever_its_place(forms: tuple[str, ...]) -> None:
    processor = Several(*forms)
    with stand_in(processor) as backend:
        facts = backend.info()["kernel"]
        assert facts["used"] == "quick"
        assert 0 < facts["microseconds"]["quick"] < facts["microseconds"]["slow"]
        assert "left_out" not in facts
        assert backend.info()["degraded"] == []
        processor.calls.clear()
        house, frames = House.of(backend, FrameSpec(4, 4), 1), noise(0, 1, FrameSpec(4, 4))
        backend.submit(house.put((0,), frames, NoParams())).wait()
        house.expect((0,), frames ^ np.uint8(0xFF))
        house.check()
        assert processor.calls == ["quick"]


def test_one_that_does_not_run_is_left_out_with_its_reason_and_nothing_is_degraded() -> None:
    with stand_in(Several("broken", "quick")) as backend:
        assert backend.info()["kernel"] == {
            "used": "quick",
            "left_out": {"broken": "ModuleNotFoundError: No module named 'triton'"},
        }
        assert backend.info()["degraded"] == []


def test_where_none_runs_the_generic_form_is_used_and_said() -> None:
    processor = Several("broken")
    with stand_in(processor) as backend:
        (reason,) = backend.info()["degraded"]
        assert "no stand-in kernel of Several runs here (broken: ModuleNotFoundError" in reason
        assert backend.info()["kernel"]["used"] is None
        house, frames = House.of(backend, FrameSpec(4, 4), 1), noise(0, 1, FrameSpec(4, 4))
        backend.submit(house.put((0,), frames, NoParams())).wait()
        assert processor.calls == ["process_batch"]


def test_a_device_without_room_for_the_race_takes_the_first() -> None:
    with stand_in(Several("slow", "quick"), budget=1 << 20) as backend:
        assert backend.info()["kernel"] == {"used": "slow"}
        assert backend.fake.used < 1000, "the race's memory is given back"


def test_without_kernels_there_is_nothing_to_say() -> None:
    assert Choice().facts() == {}
    fit, left_out = that_run((), lambda kernel: None)
    assert (fit, left_out) == ([], {})


def test_the_best_round_counts_and_rounds_alternate() -> None:
    """One that was slowed down once is still the faster one."""
    turns: list[str] = []
    times = {"a": iter([90e3, 8e3, 8e3, 8e3, 8e3]), "b": iter([12e3] * 5)}

    def a() -> None: ...

    def b() -> None: ...

    def timed(kernel: Any, calls: int) -> float:
        turns.append(kernel.__name__)
        return next(times[kernel.__name__]) * calls

    choice = race([a, b], timed)
    assert turns == ["a", "b"] * 5
    assert choice.kernel is a
    assert choice.facts() == {"kernel": {"used": "a", "microseconds": {"a": 8.0, "b": 12.0}}}


@pytest.mark.needs_torch
def test_torch_on_the_cpu_says_why_it_has_no_triton_kernel() -> None:
    with opened(("torch", "cpu"), GreenTint()) as backend:
        facts = backend.info()["kernel"]
        assert facts["used"] == "torch_kernel"
        assert "on a GPU" in facts["left_out"]["triton_kernel"]
