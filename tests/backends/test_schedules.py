"""The road of a batch on a device that runs its streams in the most awkward order that their events permit, and proof
that this notices each order that is missing: the backend's own source with one wait, mark or rest taken out fails.
"""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
from gpu_byoc_backends import _device
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_byoc.errors import DeviceLost, DeviceOutOfMemory
from gpu_byoc.frames import FrameSpec
from gpu_byoc.processor import ArrayProcessor, NoParams
from tests.backends.kit import POISON, House, noise
from tests.backends.simulator import Schedule, SimulatedBackend, Simulator

SPECS = [FrameSpec(2, 1), FrameSpec(3, 1)]
SLOTS = 8
DEPTH = 3

# --- processors whose work is enqueued, as on a GPU


def inverts(frames: Any, out: Any) -> None:
    np.bitwise_xor(frames, 0xFF, out=out)


class Inverts(ArrayProcessor):
    """Into memory of its own, which is free as soon as the call has returned."""

    device: Simulator
    goes_wrong: Exception | None = None

    def setup(self, xp: Any, device: Any) -> None:
        self.device = device.fake

    def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
        out = self.room(frames)
        self.device.launch(inverts, frames, out)
        self.trip()
        return out

    def room(self, frames: Any) -> Any:
        return self.device.empty(frames.nbytes, np.uint8).reshape(frames.shape)

    def trip(self) -> None:
        if self.goes_wrong is not None:
            error, self.goes_wrong = self.goes_wrong, None
            raise error


class InvertsInPlace(Inverts):
    """A kernel that writes to the lane."""

    def setup(self, xp: Any, device: Any) -> None:
        super().setup(xp, device)
        self.kernels = {"stand-in": self.kernel}  # type: ignore[misc]

    def kernel(self, frames: Any, params: Any) -> Any:
        self.device.launch(inverts, frames, frames)
        self.trip()
        return frames


class InvertsIntoTheSame(Inverts):
    """Into an array that is used again for every batch."""

    kept: Any = None

    def room(self, frames: Any) -> Any:
        if self.kept is None:
            self.kept = self.device.empty(1000, np.uint8)
        return self.kept[: frames.nbytes].reshape(frames.shape)


PROCESSORS = (Inverts, InvertsInPlace, InvertsIntoTheSame)

# --- driving a backend


class Drive:
    """Batches in and out of one backend, up to ``DEPTH`` on their way; each slot is used again at once."""

    def __init__(self, backend: SimulatedBackend, processor: Inverts) -> None:
        self.backend, self.processor = backend, processor
        self.device: Simulator = backend.fake
        backend.open(None, processor)
        self.houses = [House.of(backend, spec, SLOTS) for spec in SPECS]
        self.free = [list(range(SLOTS)) for _ in SPECS]
        self.flying: deque[tuple[Any, int, tuple[int, ...], Any]] = deque()
        self.number = itertools.count()

    def submit(self, size: int, count: int, turn: int, goes_wrong: Exception | None = None) -> None:
        while len(self.flying) == DEPTH or len(self.free[size]) < count:
            self.land()
        free, house = self.free[size], self.houses[size]
        free[:] = free[turn % len(free) :] + free[: turn % len(free)]
        slots = tuple(free.pop() for _ in range(count))
        frames = noise(next(self.number), count, SPECS[size])
        batch = house.put(slots, frames, NoParams())
        self.processor.goes_wrong = goes_wrong
        if goes_wrong is None:
            self.flying.append((self.backend.submit(batch), size, slots, frames))
            return
        with pytest.raises((type(goes_wrong), DeviceOutOfMemory)):
            self.backend.submit(batch)
        self.holds(size, slots, frames)

    def land(self) -> None:
        """The oldest is waited for, and is right at that moment."""
        submission, size, slots, frames = self.flying.popleft()
        times = submission.wait()
        assert times.compute_ns >= 0
        assert times.copy_ns >= 0
        self.holds(size, slots, frames ^ np.uint8(0xFF))

    def holds(self, size: int, slots: tuple[int, ...], frames: Any) -> None:
        house = self.houses[size]
        for slot, frame in zip(slots, frames, strict=True):
            assert house.arena.view(slot).tobytes() == frame.tobytes(), "another frame than this, or too early"
            house.arena.view(slot)[:] = bytes([POISON]) * house.spec.nbytes
            house.expected[slot] = POISON
        self.free[size] += slots

    def end(self) -> None:
        while self.flying:
            self.land()
        for stream in self.device.lanes:
            stream.synchronize()
        for house in self.houses:
            house.check()  # nothing came late
        self.close()

    def close(self) -> None:
        for house in self.houses:
            house.arena.close()
        self.backend.close()
        for stream in self.device.lanes:
            stream.synchronize()
        assert not self.device.faults, self.device.faults


def opened(schedule: Schedule, processor: type[Inverts], backend: type[SimulatedBackend] = SimulatedBackend) -> Drive:
    made = type("Scheduled", (backend,), {"schedule": schedule})()
    return Drive(made, processor())


def mixed(drive: Drive, seed: int) -> None:
    """Batches of two sizes and several lengths, some of which go wrong in the processor."""
    for step in range(14):
        draw = np.random.default_rng((seed, step)).integers(0, 1 << 16, 4)
        wrong = [None, None, None, ArithmeticError("as asked"), MemoryError("as asked")][draw[3] % 5]
        if isinstance(wrong, MemoryError):
            wrong = drive.device.cuda.memory.OutOfMemoryError("as asked")
        drive.submit(int(draw[0] % 3 == 0), 1 + int(draw[1] % 4), int(draw[2]), wrong)
    drive.end()


ORDERS = [
    Schedule(seed, order, eager)
    for seed, (order, eager) in enumerate(
        itertools.product(((), *[(*order, 3) for order in itertools.permutations(range(3))]), (0.0, 0.5, 1.0))
    )
]


@pytest.mark.parametrize("processor", PROCESSORS)
def test_every_stream_first_and_last(processor: type[Inverts]) -> None:
    for schedule in ORDERS:
        mixed(opened(Schedule(schedule.seed, schedule.order, schedule.eager), processor), schedule.seed)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    eager=st.sampled_from([0.0, 0.2, 0.5, 0.8]),
    processor=st.sampled_from(PROCESSORS),
    batches=st.lists(
        st.tuples(st.integers(0, 1), st.integers(1, 6), st.integers(0, 7), st.sampled_from([None, None, ValueError])),
        min_size=1,
        max_size=12,
    ),
)
def test_any_order_and_any_batches(seed: int, eager: float, processor: type[Inverts], batches: list[Any]) -> None:
    drive = opened(Schedule(seed, (), eager), processor)
    for size, count, turn, wrong in batches:
        drive.submit(size, count, turn, None if wrong is None else wrong("as asked"))
    drive.end()


def test_waiting_in_another_order_than_submitted() -> None:
    for schedule in ORDERS:
        drive = opened(Schedule(schedule.seed, schedule.order, schedule.eager), InvertsInPlace)
        for turn in range(9):
            drive.submit(turn % 2, 2, turn)
            drive.flying.rotate(turn)
        drive.end()


# --- what is left on its way


def closed_early(drive: Drive, seed: int) -> None:
    """Nobody waits for what is on its way, and memory is given back."""
    for turn in range(DEPTH):
        drive.submit(turn % 2, 3, 5 * turn + seed)
    drive.close()


def breaks_in_the_third_step(drive: Drive, seed: int) -> None:
    """The second piece of a download cannot be enqueued; the first one is on its way."""
    drive.submit(0, 2, seed)
    free = drive.free[0]
    free[:] = [1, 5]
    drive.device.refuse_copy = 4  # two pieces up, two down
    with pytest.raises(DeviceLost, match="invalid argument"):
        drive.submit(0, 2, 0)
    drive.close()


@pytest.mark.parametrize("what", [closed_early, breaks_in_the_third_step])
def test_memory_goes_back_only_when_the_device_is_through_with_it(what: Callable[[Drive, int], None]) -> None:
    for schedule in ORDERS:
        what(opened(Schedule(schedule.seed, schedule.order, schedule.eager), InvertsInPlace), schedule.seed)


# --- the same source with one thing missing


class Without:
    """What is taken out of ``_device.py``, and what stands there instead."""

    changes: ClassVar[dict[str, tuple[str, str]]] = {
        "compute waits for the upload": ("self._compute.wait_event(lane.marks[1])", "pass"),
        "the download waits for compute": ("self._down.wait_event(lane.marks[3])", "pass"),
        "the caller waits for the download": ("marks[5].synchronize()", "pass"),
        "a mark behind the upload": ("lane.marks[1].record(self._up)", "pass"),
        "a mark behind compute": ("lane.marks[3].record(self._compute)", "pass"),
        "a mark behind the download": ("lane.marks[5].record(self._down)", "pass"),
        "the upload's end, not its beginning": (
            "self._compute.wait_event(lane.marks[1])",
            "self._compute.wait_event(lane.marks[0])",
        ),
        "compute's end, not its beginning": (
            "self._down.wait_event(lane.marks[3])",
            "self._down.wait_event(lane.marks[2])",
        ),
        "the download's end, not its beginning": ("marks[5].synchronize()", "marks[4].synchronize()"),
        "a lane is kept until its batch was waited for": (
            "return Flight(self, lane)",
            "self._lanes.give(lane); return Flight(self, lane)",
        ),
        "a failed batch comes to rest": (
            "self._up.synchronize()\n            self._compute.synchronize()\n        except",
            "pass\n            pass\n        except",
        ),
        "a processor's own array is copied": (
            "self._assign(self._frames(output, len(frames), batch.spec.shape), result)",
            "output = result.reshape(-1)",
        ),
        "an arena's end waits for its copies": ("self._rest()\n        self._lanes.drop(arena.nbytes)", "pass"),
    }


def without(name: str) -> type[SimulatedBackend]:
    """The simulated backend with every method from a changed ``_device.py``."""
    there, instead = Without.changes[name]
    source = Path(_device.__file__).read_text()
    assert source.count(there) == 1, f"not to be found, or not once, in _device.py: {there}"
    module = ModuleType(f"{_device.__package__}._device_without")
    module.__package__ = _device.__package__
    sys.modules[module.__name__] = module  # dataclasses would look there
    try:
        exec(compile(source.replace(there, instead), module.__name__, "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    methods = {name: each for name, each in vars(module.DeviceBackend).items() if isinstance(each, FunctionType)}
    del methods["__init__"]  # it calls super(), which knows its own class
    return type("Without", (SimulatedBackend,), methods)


def attempts(backend: type[SimulatedBackend]) -> Iterator[Callable[[], None]]:
    for schedule, processor in itertools.product(ORDERS, PROCESSORS):
        for what in (mixed, closed_early):

            def attempt(what: Any = what, schedule: Schedule = schedule, processor: Any = processor) -> None:
                what(opened(Schedule(schedule.seed, schedule.order, schedule.eager), processor, backend), schedule.seed)

            yield attempt


@pytest.mark.parametrize("name", Without.changes)
def test_what_is_taken_out_is_noticed(name: str) -> None:
    backend = without(name)
    for attempt in attempts(backend):
        try:
            attempt()
        except AssertionError:
            return
    pytest.fail("nothing came out wrong")


def test_the_source_as_it_is_comes_out_right() -> None:
    """By the same road as the changed ones: what they fail of is the change."""
    Without.changes["nothing"] = ("import threading\n", "import threading\n")
    try:
        backend = without("nothing")
    finally:
        del Without.changes["nothing"]
    for attempt in attempts(backend):
        attempt()
