"""What every backend must do, ours or a stranger's. numpy is the oracle; numpy itself is held to plain formulas."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpu_byoc.errors import BackendUnavailable, ProcessorOutput
from gpu_byoc.frames import FrameSpec
from gpu_byoc.processor import ArrayProcessor, FrameProcessor, NoParams
from gpu_byoc.processors.grayscale import Grayscale
from gpu_byoc.processors.green_tint import GreenTint
from gpu_byoc.processors.passthrough import Passthrough
from tests.backends.kit import House, noise, opened, oracle

BOOSTS = (0, 1, 80, 254, 255)
SHIPPED = (GreenTint, Grayscale, Passthrough)
# (width, height): one pixel, every rest of 16-byte vectors, odd sides, one row, one column, an ordinary frame
SHAPES = [(1, 1), *((w, 1) for w in range(2, 18)), (5, 7), (33, 19), (4099, 1), (1, 4099), (65535, 1), (320, 240)]
SMALL = FrameSpec(5, 3)


def without_kernels(cls: type[ArrayProcessor]) -> ArrayProcessor:
    return type(cls.__name__, (cls,), {"kernels": {}})()  # type: ignore[no-any-return]


def every_byte() -> np.ndarray[Any, Any]:
    """(3, 3, 256, 3): each byte value in each channel beside other values in its neighbours."""
    ramp = np.arange(256, dtype=np.uint8)
    rows = [np.stack([np.roll(ramp, 85 * channel + shift) for channel in range(3)], -1) for shift in range(9)]
    return np.stack(rows).reshape(3, 3, 256, 3)


# --- the oracle itself


@pytest.mark.parametrize("boost", BOOSTS)
@pytest.mark.parametrize("make", [GreenTint, lambda: without_kernels(GreenTint)], ids=["kernel", "generic"])
def test_numpy_tints_by_the_formula(make: Any, boost: int) -> None:
    frames = every_byte()
    tinted = frames.astype(int)
    tinted[..., 1] = np.minimum(tinted[..., 1] + boost, 255)
    np.testing.assert_array_equal(oracle(make(), frames, GreenTint.Params(boost)), tinted)


def test_numpy_grays_by_the_formula() -> None:
    frames = every_byte()
    luma = [(77 * r + 150 * g + 29 * b + 128) // 256 for r, g, b in frames.reshape(-1, 3).tolist()]
    want = np.repeat(np.array(luma), 3).reshape(frames.shape)
    np.testing.assert_array_equal(oracle(Grayscale(), frames, NoParams()), want)


# --- the same bytes


@pytest.mark.parametrize("boost", BOOSTS)
@pytest.mark.parametrize("kernels", [True, False], ids=["kernel", "generic"])
def test_every_byte_value_in_every_channel(case: Any, kernels: bool, boost: int) -> None:
    frames, params = every_byte(), GreenTint.Params(boost)
    with opened(case, GreenTint() if kernels else without_kernels(GreenTint)) as backend:
        house = House.of(backend, FrameSpec(256, 3), 3)
        backend.submit(house.put((0, 1, 2), frames, params)).wait()
        house.expect((0, 1, 2), oracle(GreenTint(), frames, params))
        house.check()


@pytest.mark.parametrize("cls", SHIPPED)
def test_every_shape(case: Any, cls: type[ArrayProcessor]) -> None:
    processor, params = cls(), cls.Params()
    with opened(case, processor) as backend:
        for seed, (width, height) in enumerate(SHAPES):
            spec = FrameSpec(width, height)
            frames = noise(seed, 3, spec)
            house = House.of(backend, spec, 4)
            backend.submit(house.put((3, 0, 1), frames, params)).wait()
            house.expect((3, 0, 1), oracle(cls(), frames, params))
            house.check()
            house.arena.close()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_slots_and_boost(case: Any, data: st.DataObject) -> None:
    spec = FrameSpec(data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40)))
    slots = tuple(data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=10, unique=True)))
    params = GreenTint.Params(data.draw(st.integers(0, 255)))
    frames = noise(data.draw(st.integers(0, 1 << 16)), len(slots), spec)
    with opened(case, GreenTint()) as backend:
        house = House.of(backend, spec, 10)
        backend.submit(house.put(slots, frames, params)).wait()
        house.expect(slots, oracle(GreenTint(), frames, params))
        house.check()


# --- batches in flight


@pytest.mark.parametrize("cls", SHIPPED)
def test_batches_in_flight_do_not_mix(case: Any, cls: type[ArrayProcessor]) -> None:
    """More batches than ``depth`` are on their way, slots scattered, waited for in order; three times over."""
    spec, processor = FrameSpec(64, 48), cls()
    with opened(case, processor) as backend:
        groups = [(7, 2, 3), (0,), (5, 6, 11, 8), (4, 1), (9, 10)]
        house = House.of(backend, spec, 12)
        for seed in range(3):
            flying = []
            for number, slots in enumerate(groups):
                frames = noise(100 * seed + number, len(slots), spec)
                params = cls.Params(10 * number + seed) if cls is GreenTint else cls.Params()
                flying.append((backend.submit(house.put(slots, frames, params)), slots, frames, params))
            for submission, slots, frames, params in flying:
                submission.wait()
                house.expect(slots, oracle(cls(), frames, params))
            house.check()


def test_arenas_of_many_sizes_come_and_go(case: Any) -> None:
    with opened(case, GreenTint()) as backend:
        for seed in range(6):
            spec = FrameSpec(16 + seed % 3, 9)
            house, frames = House.of(backend, spec, 2 + seed), noise(seed, 2, spec)
            backend.submit(house.put((1, 0), frames, GreenTint.Params())).wait()
            house.expect((1, 0), oracle(GreenTint(), frames, GreenTint.Params()))
            house.check()
            house.arena.close()


def test_times_are_plausible(case: Any) -> None:
    """Never negative, and together at most what the clock says; a batch of work costs something."""
    spec = FrameSpec(640, 480)
    with opened(case, GreenTint()) as backend:
        house = House.of(backend, spec, 4)
        for seed in range(3):
            batch = house.put((0, 1, 2, 3), noise(seed, 4, spec), GreenTint.Params())
            began = time.perf_counter_ns()
            times = backend.submit(batch).wait()
            wall_ns = time.perf_counter_ns() - began
            assert isinstance(times.compute_ns, int)
            assert isinstance(times.copy_ns, int)
            assert times.compute_ns > 0
            assert times.copy_ns >= 0
            assert times.compute_ns + times.copy_ns <= wall_ns


# --- processors that misbehave


class Moody(ArrayProcessor):
    """Adds one, or does what ``mood`` says."""

    @dataclasses.dataclass(frozen=True, slots=True)
    class Params:
        mood: str = ""

    moods: ClassVar[dict[str, Any]] = {
        "narrow": lambda frames, xp: frames[:, :, 1:],
        "fewer": lambda frames, xp: frames[1:],
        "flat": lambda frames, xp: xp.reshape(frames, (-1,)),
        "wide": lambda frames, xp: xp.astype(frames, xp.int16),
        "float": lambda frames, xp: xp.astype(frames, xp.float32),
        "list": lambda frames, xp: [frames],
        "bytes": lambda frames, xp: b"frames",
        "none": lambda frames, xp: None,
    }

    def process_batch(self, frames: Any, params: Params, xp: Any) -> Any:
        if params.mood == "raise":
            raise ZeroDivisionError("as asked")
        if params.mood == "scribble":
            frames[...] = 0
            raise ZeroDivisionError("after writing to the input")
        if params.mood:
            return self.moods[params.mood](frames, xp)
        return frames + 1


@pytest.mark.parametrize("mood", Moody.moods)
def test_a_result_of_another_kind_is_refused_and_the_input_stays(case: Any, mood: str) -> None:
    frames = noise(1, 3, SMALL)
    with opened(case, Moody()) as backend:
        house = House.of(backend, SMALL, 5)
        with pytest.raises(ProcessorOutput, match=r"Moody returned .*\(3, 3, 5, 3\)"):
            backend.submit(house.put((4, 0, 1), frames, Moody.Params(mood))).wait()
        house.check()
        backend.submit(house.put((4, 0, 1), frames, Moody.Params())).wait()
        house.expect((4, 0, 1), frames + np.uint8(1))
        house.check()


def test_a_failure_goes_through_as_it_is_and_halves_can_be_tried_again(case: Any) -> None:
    frames = noise(2, 4, SMALL)
    with opened(case, Moody()) as backend:
        house = House.of(backend, SMALL, 6)
        other = noise(3, 2, SMALL)
        before = backend.submit(house.put((5, 4), other, Moody.Params()))
        with pytest.raises(ZeroDivisionError, match="as asked"):
            backend.submit(house.put((0, 1, 2, 3), frames, Moody.Params("raise"))).wait()
        before.wait()
        house.expect((5, 4), other + np.uint8(1))
        house.check()
        backend.submit(house.put((0, 1), frames[:2], Moody.Params())).wait()
        house.expect((0, 1), frames[:2] + np.uint8(1))
        house.check()


def test_writing_to_the_frames_never_reaches_the_slots(case: Any) -> None:
    """numpy refuses the write itself; a device array has no such lock, but the slots keep the input all the same."""
    refused = ValueError if case[0] == "numpy" else (ValueError, ZeroDivisionError)
    with opened(case, Moody()) as backend:
        house = House.of(backend, SMALL, 3)
        for slots in [(0, 1), (2, 0)]:  # one run, and two
            with pytest.raises(refused):
                backend.submit(house.put(slots, noise(4, 2, SMALL), Moody.Params("scribble"))).wait()
            house.check()


class Views(ArrayProcessor):
    """Returns a view of its input in another order."""

    def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
        return xp.permute_dims(frames, (0, 2, 1, 3))


class Keeper(ArrayProcessor):
    """Returns the same array each time, as code with a preallocated output does."""

    def setup(self, xp: Any, device: Any) -> None:
        self.kept = xp.zeros((2, 8, 8, 3), dtype=xp.uint8, device=device)

    def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
        self.kept[...] = frames ^ 0xFF
        return self.kept


@pytest.mark.parametrize(
    ("processor", "change"),
    [(Views(), lambda frames: frames.transpose(0, 2, 1, 3)), (Keeper(), lambda frames: frames ^ 0xFF)],
    ids=["views", "keeper"],
)
def test_results_that_share_memory_come_out_right(case: Any, processor: ArrayProcessor, change: Any) -> None:
    spec = FrameSpec(8, 8)
    with opened(case, processor) as backend:
        house = House.of(backend, spec, 6)
        flying = []
        for number, slots in enumerate([(0, 1), (5, 3), (4, 2)]):
            frames = noise(number, 2, spec)
            flying.append((backend.submit(house.put(slots, frames, NoParams())), slots, frames))
        for submission, slots, frames in flying:
            submission.wait()
            house.expect(slots, change(frames))
        house.check()


# --- opening and closing


class Diary(Passthrough):
    def __init__(self) -> None:
        self.entries: list[str] = []

    def setup(self, xp: Any, device: Any) -> None:
        assert int(xp.sum(xp.ones(3, dtype=xp.int32, device=device))) == 3
        self.entries.append("setup")

    def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
        self.entries.append("batch")
        return frames

    def teardown(self) -> None:
        self.entries.append("teardown")


def test_setup_comes_first_and_teardown_last(case: Any) -> None:
    diary = Diary()
    with opened(case, diary) as backend:
        house = House.of(backend, SMALL, 1)
        backend.submit(house.put((0,), noise(5, 1, SMALL), NoParams())).wait()
    assert diary.entries == ["setup", "batch", "teardown"]


class Broken(Diary):
    def setup(self, xp: Any, device: Any) -> None:
        raise LookupError("no weights")


def test_a_setup_that_fails_goes_through_and_closing_works(case: Any) -> None:
    broken = Broken()
    with pytest.raises(LookupError, match="no weights"), opened(case, broken):
        pass
    assert broken.entries == []


def test_a_frame_processor_is_refused(case: Any) -> None:
    with pytest.raises(BackendUnavailable, match="ArrayProcessor"), opened(case, FrameProcessor()):  # type: ignore[arg-type]
        pass


def test_it_says_what_it_is(case: Any) -> None:
    with opened(case, GreenTint()) as backend:
        assert backend.name == case[0]
        assert backend.device.startswith(case[1] or "")
        assert backend.depth >= 1
        assert isinstance(backend.info()["degraded"], list)
        assert type(backend).available("abacus") is not None or case[0] == "stand-in"
