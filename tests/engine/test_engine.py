"""The engine with real threads and real backends: order, failure, cancel, shutdown."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
from gpu_byoc_backends.numpy_cpu import NumpyBackend

from gpu_byoc.config import EngineConfig
from gpu_byoc.engine.device import Outcome
from gpu_byoc.engine.engine import STALE, Engine
from gpu_byoc.errors import (
    BadParams,
    DeviceLost,
    Draining,
    GpuByocError,
    Overloaded,
    ProcessorFailed,
    ProcessorOutput,
    ProcessorSpoiled,
    TooLarge,
)
from gpu_byoc.frames import FrameSpec
from gpu_byoc.processor import ArrayProcessor
from gpu_byoc.processors.green_tint import GreenTint
from tests.support.engines import SPEC, WAIT, Gated, House, Staged, value


@pytest.fixture
def processor() -> Gated:
    return Gated()


@pytest.fixture
def house(processor: Gated) -> Iterator[House]:
    house = House(processor, slots=8, max_batch=4)
    yield house
    if processor.gate is not None:
        processor.gate.set()
    house.engine.close()


def _put(into: queue.Queue[int], number: int, _: object) -> None:
    into.put(number)


def test_a_frame_goes_in_and_comes_out(house: House) -> None:
    lease, outcome = house.submit(5)
    result = outcome.get(timeout=WAIT)
    assert result.error is None
    assert result.batch == 1
    assert value(lease) == {6}
    assert house.free() == 7
    lease.release()
    lease.release()
    assert house.free() == 8


def test_batches_grow_while_the_device_is_busy(house: House, processor: Gated) -> None:
    processor.gate = threading.Event()
    first = house.submit(0, "first")
    assert processor.entered.get(timeout=WAIT) == 1
    others = [house.submit(i, f"stream {i}") for i in range(1, 7)]
    processor.gate.set()
    for number, (lease, outcome) in enumerate([first, *others]):
        assert outcome.get(timeout=WAIT).error is None
        assert value(lease) == {number + 1}
        lease.release()
    assert processor.sizes == [1, 4, 2]


def test_a_streams_frames_come_back_in_order(house: House) -> None:
    order: queue.Queue[int] = queue.Queue()
    leases = []
    for i in range(8):
        lease = house.lease()
        lease.views[0][:] = bytes([i]) * SPEC.nbytes
        leases.append(lease)
        lease.submit("one", house.params, partial(_put, order, i))
    assert [order.get(timeout=WAIT) for _ in range(8)] == list(range(8))
    for lease in leases:
        lease.release()


def test_a_poison_frame_fails_alone(house: House, processor: Gated) -> None:
    processor.gate = threading.Event()
    blocker = house.submit(0)
    processor.entered.get(timeout=WAIT)
    jobs = [house.submit(v, f"s{v}") for v in (1, 2, 13, 4)]
    processor.gate.set()
    blocker[0].release()
    for number, (lease, outcome) in zip((1, 2, 13, 4), jobs, strict=True):
        result = outcome.get(timeout=WAIT)
        if number == 13:
            assert isinstance(result.error, ProcessorFailed)
            assert "thirteen" in str(result.error)
            assert isinstance(result.error.__cause__, ValueError)
            assert value(lease) == {13}, "a failed frame is not touched"
        else:
            assert result.error is None
            assert value(lease) == {number + 1}
        lease.release()
    assert house.free() == 8
    after, outcome = house.submit(7)
    assert outcome.get(timeout=WAIT).error is None
    after.release()


def test_several_frames_are_one_batch_in_order(house: House, processor: Gated) -> None:
    lease = house.lease(3)
    frames = np.repeat(np.array([1, 2, 3], np.uint8), SPEC.nbytes).tobytes()
    at = 0
    for view in lease.views:
        view[:] = frames[at : at + view.nbytes]
        at += view.nbytes
    outcome: queue.Queue[Outcome] = queue.Queue()
    lease.submit("s", house.params, outcome.put)
    assert outcome.get(timeout=WAIT).batch == 3
    assert processor.sizes == [3]
    assert b"".join(lease.views) == np.repeat(np.array([2, 3, 4], np.uint8), SPEC.nbytes).tobytes()
    lease.release()


def test_cancelled_while_waiting_it_is_never_computed(house: House, processor: Gated) -> None:
    processor.gate = threading.Event()
    running, running_outcome = house.submit(1)
    processor.entered.get(timeout=WAIT)
    waiting, waiting_outcome = house.submit(2)
    waiting.release()
    assert house.free() == 7, "the slot is back at once"
    running.release()
    assert house.free() == 7, "the device still uses this one"
    processor.gate.set()
    last, outcome = house.submit(3)
    assert outcome.get(timeout=WAIT).error is None
    last.release()
    assert house.free() == 8
    assert running_outcome.empty()
    assert waiting_outcome.empty()
    assert sum(processor.sizes) == 2


def test_the_line_for_slots_is_first_come_first_served_and_bounded(house: House) -> None:
    held = [house.lease() for _ in range(8)]
    told: queue.Queue[int] = queue.Queue()
    waiting = [house.engine.lease(SPEC, 1, partial(_put, told, i)) for i in range(8)]
    assert not any(lease.granted for lease in waiting)
    with pytest.raises(Overloaded, match="already waiting"):
        house.engine.lease(SPEC, 1, lambda error: None)
    waiting[0].release()
    held[0].release()
    assert told.get(timeout=WAIT) == 1
    assert waiting[1].granted
    for lease in held + waiting:
        lease.release()
    assert house.free() == 8


def test_too_many_frames_are_refused(house: House) -> None:
    with pytest.raises(TooLarge, match="max-batch"):
        house.lease(5)


def test_memory_is_bounded_and_idle_sizes_make_room() -> None:
    small, large = FrameSpec(50, 1), FrameSpec(100, 1)
    house = House(Gated(), slots=4, max_batch=2, memory=4 * small.nbytes + large.nbytes - 1)
    lease = house.lease(spec=small)
    with pytest.raises(Overloaded, match="other sizes"):
        house.lease(spec=large)
    lease.release()
    other = house.lease(spec=large)
    assert [(room["frame_bytes"], room["slots"]) for room in house.engine.rooms()] == [(300, 2)]
    other.release()
    with pytest.raises(TooLarge, match="--memory-mb"):
        house.lease(spec=FrameSpec(1000, 1))
    house.engine.close()


def test_what_memory_is_left_is_enough_for_fewer_slots() -> None:
    small, large = FrameSpec(50, 1), FrameSpec(100, 1)
    house = House(Gated(), slots=4, max_batch=1, memory=4 * small.nbytes + 2 * large.nbytes)
    leases = [house.lease(spec=small), house.lease(spec=large), house.lease(spec=large)]
    assert [room["slots"] for room in house.engine.rooms()] == [4, 2]
    for lease in leases:
        lease.release()
    house.engine.close()


def sizes(house: House) -> dict[int, int]:
    return {room["frame_bytes"]: room["slots"] for room in house.engine.rooms()}


def aged(house: House) -> None:
    """As if nobody had asked for anything for longer than it takes."""
    for room in house.engine._rooms.values():
        room.used -= STALE + 1


def test_sizes_that_come_in_turn_keep_their_memory() -> None:
    class Counting(NumpyBackend):  # type: ignore[misc]
        made = 0

        def arena(self, nbytes: int, slots: int) -> Any:
            self.made += 1
            return super().arena(nbytes, slots)

    backend = Counting()
    large, middle, small = FrameSpec(100, 8), FrameSpec(50, 4), FrameSpec(20, 4)
    memory = 32 * (large.nbytes + middle.nbytes) + 10 * small.nbytes
    house = House(Gated(), backend, slots=32, max_batch=8, memory=memory)
    for _ in range(5):
        for spec in (large, middle, small):
            house.lease(spec=spec).release()
    assert backend.made == 3
    assert sizes(house) == {large.nbytes: 32, middle.nbytes: 32, small.nbytes: 10}
    aged(house)
    house.lease(spec=small).release()
    assert sizes(house) == {middle.nbytes: 32, small.nbytes: 32}, "what nobody has used for long makes way for it"
    house.lease(spec=large).release()
    assert sizes(house)[large.nbytes] >= 8, "a batch of it, at once, whoever has been here"
    house.engine.close()


def test_memory_that_was_made_small_is_made_anew_for_a_job_that_needs_more() -> None:
    small, large = FrameSpec(50, 1), FrameSpec(100, 1)
    house = House(Gated(), slots=10, max_batch=4, memory=10 * large.nbytes + 2 * small.nbytes)
    held = house.lease(spec=large)
    house.lease(spec=small).release()
    assert sizes(house) == {large.nbytes: 10, small.nbytes: 2}
    with pytest.raises(Overloaded, match="other sizes"):
        house.lease(4, spec=small)
    held.release()
    busy = house.lease(spec=small)
    with pytest.raises(Overloaded, match="other sizes"):
        house.lease(4, spec=small)
    busy.release()
    house.lease(4, spec=small).release()
    assert sizes(house)[small.nbytes] == 10
    house.engine.close()


def test_frame_sizes_are_bounded() -> None:
    house = House(Gated(), slots=2, max_batch=1, max_frame_sizes=3)
    for width in range(1, 6):
        house.lease(spec=FrameSpec(width, 1)).release()
    assert len(house.engine.rooms()) == 3
    held = [house.lease(spec=FrameSpec(width, 2)) for width in range(100, 103)]
    with pytest.raises(Overloaded):
        house.lease(spec=FrameSpec(99, 2))
    assert house.engine.crowded == 1
    for lease in held:
        lease.release()
    house.engine.close()


def test_wrong_output_is_typed_and_leaves_the_input() -> None:
    class Half(ArrayProcessor):
        def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
            return frames[:, ::2]

    house = House(Half())
    lease, outcome = house.submit(9)
    error = outcome.get(timeout=WAIT).error
    assert isinstance(error, ProcessorOutput)
    assert "(1, 1, 4, 3)" in str(error)
    assert "(1, 2, 4, 3)" in str(error)
    assert value(lease) == {9}
    house.engine.close()


def test_closing_finishes_what_was_submitted_and_refuses_the_rest(house: House, processor: Gated) -> None:
    processor.gate = threading.Event()
    jobs = [house.submit(i) for i in range(3)]
    held = house.lease()
    closing = threading.Thread(target=house.engine.close)
    closing.start()
    processor.gate.set()
    closing.join(WAIT)
    assert not closing.is_alive()
    assert [outcome.get(timeout=WAIT).error for _, outcome in jobs] == [None] * 3
    with pytest.raises(Draining):
        held.submit("s", house.params, lambda outcome: None)
    with pytest.raises(Draining):
        house.lease()
    held.release()
    for lease, _ in jobs:
        lease.release()
    assert house.free() == 8


def test_closing_without_flush_fails_what_waits(house: House, processor: Gated) -> None:
    processor.gate = threading.Event()
    running = house.submit(1)
    processor.entered.get(timeout=WAIT)
    waiting = [house.submit(i) for i in range(6)]
    blocked: queue.Queue[GpuByocError | None] = queue.Queue()
    lease = house.lease()
    in_line = house.engine.lease(SPEC, 1, blocked.put)
    closing = threading.Thread(target=house.engine.close, args=(False,))
    closing.start()
    for _, outcome in waiting:
        assert isinstance(outcome.get(timeout=WAIT).error, Draining)
    assert isinstance(blocked.get(timeout=WAIT), Draining)
    processor.gate.set()
    closing.join(WAIT)
    assert running[1].get(timeout=WAIT).error is None
    for each in [lease, in_line, running[0], *(w[0] for w in waiting)]:
        each.release()
    assert house.free() == 8


@pytest.mark.parametrize("lost", [1, 2, 3, 4])
def test_a_lost_device_fails_everything_with_one_error(lost: int) -> None:
    backend = Staged(lost)
    house = House(GreenTint(), backend, slots=8, max_batch=1, depth=3)
    fatal: queue.Queue[GpuByocError] = queue.Queue()
    house.engine.on_fatal = fatal.put
    jobs = [house.submit(i, f"s{i}") for i in range(6)]
    in_line = [house.lease(), house.lease()]
    told: queue.Queue[GpuByocError | None] = queue.Queue()
    waiting = house.engine.lease(SPEC, 1, told.put)
    for gate in backend.gates:
        gate.set()
    errors = [outcome.get(timeout=WAIT).error for _, outcome in jobs]
    assert errors[: lost - 1] == [None] * (lost - 1)
    assert all(isinstance(error, DeviceLost) for error in errors[lost - 1 :])
    assert isinstance(fatal.get(timeout=WAIT), DeviceLost)
    assert isinstance(told.get(timeout=WAIT), DeviceLost)
    for lease in [*in_line, waiting, *(lease for lease, _ in jobs)]:
        lease.release()
    assert house.free() == 8
    house.engine.close()
    assert isinstance(house.engine.fatal, DeviceLost)


def test_a_device_lost_while_trying_halves_again_forgets_nobody() -> None:
    processor = Gated()
    processor.gate = threading.Event()
    backend = Staged(lost=3)  # 1: the blocker, 2: fails to submit, 3: the first half
    for gate in backend.gates:
        gate.set()
    house = House(processor, backend, slots=8, max_batch=4, depth=1)
    blocker, first = house.submit(0)
    processor.entered.get(timeout=WAIT)
    jobs = [house.submit(v, f"s{v}") for v in (1, 2, 13, 4)]
    processor.gate.set()
    assert first.get(timeout=WAIT).error is None
    assert all(isinstance(outcome.get(timeout=WAIT).error, DeviceLost) for _, outcome in jobs)
    for lease in [blocker, *(lease for lease, _ in jobs)]:
        lease.release()
    assert house.free() == 8
    house.engine.close()


def test_the_next_batch_starts_while_another_is_on_its_way() -> None:
    backend = Staged()
    house = House(GreenTint(), backend, slots=8, max_batch=4, depth=3)
    jobs = [house.submit(1)]
    assert backend.submitted.get(timeout=WAIT) == 1
    jobs.append(house.submit(2))
    assert backend.submitted.get(timeout=WAIT) == 2, "it did not wait for the first to land"
    backend.gates[2].set()
    assert jobs[1][1].empty(), "nothing lands before its turn"
    backend.gates[1].set()
    for lease, outcome in jobs:
        assert outcome.get(timeout=WAIT).error is None
        lease.release()
    house.engine.close()


def test_retried_halves_land_before_what_came_after() -> None:
    processor = Gated()
    processor.gate = threading.Event()
    backend = Staged()
    house = House(processor, backend, slots=8, max_batch=2, depth=2)
    order: queue.Queue[int] = queue.Queue()
    leases = []
    for number, byte in enumerate((0, 1, 13, 3, 4)):
        lease = house.lease()
        lease.views[0][:] = bytes([byte]) * SPEC.nbytes
        lease.submit("one", house.params, partial(_put, order, number))
        leases.append(lease)
        if not number:
            processor.entered.get(timeout=WAIT)
    processor.gate.set()
    for gate in backend.gates:
        gate.set()
    assert [order.get(timeout=WAIT) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert [value(lease) for lease in leases] == [{1}, {2}, {13}, {4}, {5}]
    for lease in leases:
        lease.release()
    house.engine.close()


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_whatever_a_processor_raises_fails_its_frame_only(kind: type[BaseException]) -> None:
    class Quits(ArrayProcessor):
        def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
            if (frames == 13).any():
                raise kind
            return frames

    house = House(Quits())
    bad, outcome = house.submit(13)
    assert isinstance(outcome.get(timeout=WAIT).error, ProcessorFailed)
    good, outcome = house.submit(1)
    assert outcome.get(timeout=WAIT).error is None
    bad.release()
    good.release()
    house.engine.close()


class Unreadable(Exception):
    def __str__(self) -> str:
        raise ValueError("its own __str__")


@pytest.mark.parametrize(
    ("raised", "told", "says"),
    [
        (Unreadable(), ProcessorFailed, "Raises raised Unreadable: (its text cannot be read)"),
        (BadParams("boost", "too much"), BadParams, "parameter 'boost': too much"),
    ],
)
def test_whatever_it_says_each_job_gets_an_error_of_its_own(raised: Exception, told: Any, says: str) -> None:
    class Raises(ArrayProcessor):
        def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
            raise raised

    house = House(Raises())
    jobs = [house.submit(1, f"s{n}") for n in range(3)]
    errors = [outcome.get(timeout=WAIT).error for _, outcome in jobs]
    assert [(type(error), str(error)) for error in errors] == [(told, says)] * 3
    assert len({id(error) for error in [raised, *errors]}) == 4
    assert house.engine.fatal is None
    for lease, _ in jobs:
        lease.release()
    house.engine.close()


@pytest.mark.parametrize("which", ["", "-landing", "-canary", "-watch"])
def test_a_thread_that_cannot_be_started_is_said_and_leaves_none_behind(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Probed(Staged):
        def probe(self) -> None:
            pass

    def start(self: threading.Thread) -> None:
        if self.name == f"gpu-byoc-numpy{which}":
            raise RuntimeError("can't start new thread")
        real(self)

    real = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", start)
    engine = Engine(Probed(), Gated(), EngineConfig())
    with pytest.raises(RuntimeError, match="can't start new thread"):
        engine.start().result(WAIT)
    engine.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gpu-byoc-numpy")]


def test_a_kernel_that_fails_in_place_fails_its_batch_and_nothing_is_computed_twice() -> None:
    gate, entered = threading.Event(), threading.Event()

    def kernel(src: Any, dst: Any, params: Any) -> None:
        entered.set()
        assert gate.wait(WAIT)
        for frame in dst.reshape(-1, SPEC.nbytes):
            if frame[0] == 13:
                raise ValueError("thirteen")
            frame += 1

    class InPlace(ArrayProcessor):
        kernels: ClassVar[dict[str, Any]] = {"numpy": kernel}

    house = House(InPlace(), slots=8, max_batch=4)
    jobs = [house.submit(0, "first")]
    assert entered.wait(WAIT)
    jobs += [house.submit(v, f"s{v}") for v in (1, 2, 13, 4)]
    gate.set()
    outcomes = [outcome.get(timeout=WAIT) for _, outcome in jobs]
    assert outcomes[0].error is None
    assert all(isinstance(outcome.error, ProcessorSpoiled) for outcome in outcomes[1:])
    for lease, _ in jobs:
        lease.release()
    house.engine.close()


def test_a_device_lost_while_memory_is_made() -> None:
    class Hollow(NumpyBackend):  # type: ignore[misc]
        def arena(self, nbytes: int, slots: int) -> Any:
            raise DeviceLost("gone") if nbytes > 100 else MemoryError("full")

    house = House(GreenTint(), Hollow())
    with pytest.raises(Overloaded, match="full"):
        house.lease(spec=FrameSpec(1, 1))
    with pytest.raises(DeviceLost, match="gone"):
        house.lease(spec=FrameSpec(100, 1))
    house.engine.close()
    assert isinstance(house.engine.fatal, DeviceLost)


def test_a_start_that_fails_says_why() -> None:
    class Broken(GreenTint):
        def setup(self, xp: Any, device: Any) -> None:
            raise RuntimeError("no weights")

    engine = Engine(NumpyBackend(), Broken(), EngineConfig())
    with pytest.raises(RuntimeError, match="no weights"):
        engine.start().result(WAIT)
    engine.close()


def test_shares_of_a_batch_add_up(house: House, processor: Gated) -> None:
    processor.gate = threading.Event()
    blocker = house.submit(0, "blocker")
    processor.entered.get(timeout=WAIT)
    jobs = [house.submit(i, f"s{i}") for i in range(4)]
    processor.gate.set()
    outcomes = [outcome.get(timeout=WAIT) for _, outcome in [blocker, *jobs]]
    rows, totals, device = house.engine.usage()
    assert device.compute_ns == sum(o.compute_ns for o in outcomes) == sum(u.compute_ns for u in totals.values())
    assert device.compute_ns == sum(usage.compute_ns for _, _, usage in rows)
    assert device.frames == 5
    assert device.batches == 2
    assert all(outcome.queue_ns > 0 for outcome in outcomes)
    for lease, _ in [blocker, *jobs]:
        lease.release()


def test_many_threads_lose_nothing(house: House) -> None:
    """Eight callers hammer eight slots, a third of them giving up at a random moment."""
    errors: list[BaseException] = []
    finished = threading.Semaphore(0)

    def caller(number: int) -> None:
        rng = np.random.default_rng(number)
        try:
            for _ in range(60):
                lease, outcome = house.submit(int(rng.integers(0, 12)), f"s{number}")
                before = None
                if rng.random() < 0.3:
                    lease.release()
                    continue
                result = outcome.get(timeout=WAIT)
                assert result.error is None
                before = value(lease)
                assert len(before) == 1
                lease.release()
        except BaseException as error:
            errors.append(error)
        finally:
            finished.release()

    threads = [threading.Thread(target=caller, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not errors
    house.engine.close()
    assert house.free() == 8
