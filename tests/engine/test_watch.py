"""What is stuck is found out: a device that fails or hangs, a processor that never returns. What is busy is not."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from functools import partial
from typing import Any

import pytest
from gpu_byoc_backends.numpy_cpu import NumpyBackend

from gpu_byoc.backend import Batch
from gpu_byoc.engine.device import Outcome
from gpu_byoc.engine.engine import Lease
from gpu_byoc.engine.host import HostBackend
from gpu_byoc.engine.watch import PROBE_SECONDS
from gpu_byoc.errors import (
    DeviceLost,
    DeviceOutOfMemory,
    Draining,
    GpuByocError,
    ProcessorFailed,
    ProcessorOutput,
    ProcessorTimeout,
)
from gpu_byoc.processor import FrameProcessor
from tests.support.engines import SPEC, WAIT, Gated, House, Staged, value

SHORT = 0.2
"""A limit in seconds that is to be reached."""

LONGER = 1.0
"""One that is not, by what moves; what stands still and is well all the same has limits of a minute."""


class Probed(Staged):
    """A device that answers its canary through ``answer``."""

    def __init__(self) -> None:
        super().__init__()
        self.probes: queue.Queue[int] = queue.Queue()
        self.answer: Any = lambda: None
        self.closed = threading.Event()

    def probe(self) -> None:
        assert not self.closed.is_set(), "a canary in a closed backend"
        self.probes.put(1)
        self.answer()

    def close(self) -> None:
        self.closed.set()
        super().close()


def fatal_of(house: House) -> queue.Queue[GpuByocError]:
    told: queue.Queue[GpuByocError] = queue.Queue()
    house.engine.on_fatal = told.put
    return told


def raises(error: BaseException) -> Any:
    def answer() -> None:
        raise error

    return answer


# --- the canary


def test_a_device_that_fails_while_nobody_uses_it_is_noticed_within_a_second() -> None:
    backend = Probed()
    house = House(Gated(), backend)
    fatal = fatal_of(house)
    backend.probes.get(timeout=WAIT)
    asked = queue.SimpleQueue[int]()

    def answer() -> None:
        asked.put(1)
        raise DeviceLost("an illegal address was met")

    backend.answer = answer
    assert "illegal address" in str(fatal.get(timeout=WAIT))
    assert asked.qsize() == 1, "by the first probe"
    assert PROBE_SECONDS < 1.0
    assert isinstance(house.engine.fatal, DeviceLost)
    with pytest.raises(Draining):
        house.lease()
    house.engine.close()
    assert backend.closed.is_set()


def test_a_device_that_hangs_fails_what_is_on_it_and_what_waits() -> None:
    backend = Probed()
    house = House(Gated(), backend, slots=4, max_batch=1, depth=2, device_timeout=SHORT, processor_timeout=60)
    fatal, hung = fatal_of(house), threading.Event()
    backend.answer = lambda: hung.wait(WAIT)
    jobs = [house.submit(n, f"s{n}") for n in range(3)]
    held = house.lease()
    told: queue.Queue[GpuByocError | None] = queue.Queue()
    line = house.engine.lease(SPEC, 1, told.put)
    errors = [outcome.get(timeout=WAIT).error for _, outcome in jobs] + [told.get(timeout=WAIT)]
    assert all(isinstance(error, DeviceLost) for error in errors)
    assert "no sign of life for 0.2 s (--device-timeout)" in str(fatal.get(timeout=WAIT))
    for lease in [held, line, *(lease for lease, _ in jobs)]:
        lease.release()
    assert house.free() == 4
    house.engine.close(timeout=0)
    hung.set()
    for gate in backend.gates:
        gate.set()
    house.engine.close()
    assert not house.engine.alive
    assert all(outcome.empty() for _, outcome in jobs), "what comes back late is delivered to nobody"
    assert house.engine.usage()[2].frames == 0, "nor is it on anybody's bill"


def test_a_canary_that_is_still_out_keeps_the_backend_from_being_closed() -> None:
    backend = Probed()
    house = House(Gated(), backend, device_timeout=SHORT)
    fatal, hung = fatal_of(house), threading.Event()
    backend.answer = lambda: hung.wait(WAIT)
    assert isinstance(fatal.get(timeout=WAIT), DeviceLost)
    house.engine.close()
    assert not backend.closed.is_set()
    hung.set()


def test_a_device_that_is_busy_but_moves_is_well() -> None:
    """Its canary waits behind batches that come and go for several times as long as it may."""
    backend = Probed()
    house = House(Gated(), backend, device_timeout=LONGER)
    answered = threading.Event()
    backend.answer = lambda: answered.wait(WAIT)
    for gate in backend.gates:
        gate.set()
    backend.gates += backend.gates * 1000
    backend.probes.get(timeout=WAIT)
    end = time.monotonic() + 3 * LONGER
    while time.monotonic() < end:
        lease, outcome = house.submit(1)
        assert outcome.get(timeout=WAIT).error is None
        lease.release()
    assert house.engine.fatal is None
    answered.set()
    house.engine.close()
    assert backend.closed.is_set()


def test_a_full_device_is_not_a_lost_one_and_a_broken_canary_is() -> None:
    backend = Probed()
    house = House(Gated(), backend)
    fatal = fatal_of(house)
    backend.answer = raises(DeviceOutOfMemory("full"))
    for _ in range(3):
        backend.probes.get(timeout=WAIT)
    assert house.engine.fatal is None
    backend.answer = raises(RuntimeError("no such stream"))
    assert "no such stream" in str(fatal.get(timeout=WAIT))
    house.engine.close()


def test_without_a_limit_nothing_is_asked() -> None:
    backend = Probed()
    house = House(Gated(), backend, device_timeout=0)
    assert not [t for t in threading.enumerate() if t.name.endswith(("-canary", "-watch"))]
    house.engine.close()
    assert backend.probes.empty()


def test_vitals() -> None:
    backend, processor = Probed(), Gated()
    house = House(processor, backend, depth=1)
    assert house.engine.vitals().batch is None
    backend.probes.get(timeout=WAIT)
    backend.probes.get(timeout=WAIT)
    canary = house.engine.vitals().canary
    assert canary is not None
    assert 0 <= canary < WAIT
    lease, outcome = house.submit(1)
    backend.submitted.get(timeout=WAIT)
    assert house.engine.vitals().under_way > 0
    backend.gates[1].set()
    outcome.get(timeout=WAIT)
    lease.release()
    house.engine.close()
    vitals = house.engine.vitals()
    assert vitals.under_way == 0
    assert vitals.batch is not None
    assert 0 <= vitals.batch < WAIT


# --- the processor


def test_a_processor_that_does_not_come_back_fails_everybody_and_says_who() -> None:
    processor = Gated()
    house = House(processor, slots=4, max_batch=1, processor_timeout=SHORT)
    fatal = fatal_of(house)
    processor.gate = threading.Event()
    jobs = [house.submit(n, f"s{n}") for n in range(3)]
    held = house.lease()
    told: queue.Queue[GpuByocError | None] = queue.Queue()
    line = house.engine.lease(SPEC, 1, told.put)
    errors = [outcome.get(timeout=WAIT).error for _, outcome in jobs] + [told.get(timeout=WAIT)]
    assert all(isinstance(error, ProcessorTimeout) for error in errors)
    assert "Gated has not come back for 0.2 s (--processor-timeout)" in str(fatal.get(timeout=WAIT))
    for lease in [held, line, *(lease for lease, _ in jobs)]:
        lease.release()
    assert house.free() == 4
    house.engine.close(timeout=0)
    processor.gate.set()
    house.engine.close()
    assert not house.engine.alive, "once it does come back, its thread ends"
    assert processor.sizes == [1], "and starts nothing more"
    assert house.engine.usage()[2].frames == 0
    assert fatal.empty(), "said once"


def test_who_is_told_may_close_the_engine() -> None:
    processor = Gated()
    processor.gate = threading.Event()
    house = House(processor, max_batch=1, processor_timeout=SHORT)
    closed = threading.Event()

    def close(error: GpuByocError) -> None:  # on the thread that found it out, which the device thread waits for
        house.engine.close()
        closed.set()

    house.engine.on_fatal = close
    lease, _ = house.submit(1)
    assert closed.wait(WAIT)
    processor.gate.set()
    house.engine.close()
    assert not house.engine.alive
    lease.release()


def test_memory_that_is_never_made_is_found_out_and_is_not_the_processors_fault() -> None:
    class NeverPins(NumpyBackend):  # type: ignore[misc]
        def arena(self, nbytes: int, slots: int) -> Any:
            assert let_go.wait(WAIT)
            return super().arena(nbytes, slots)

    let_go = threading.Event()
    house = House(Gated(), NeverPins(), processor_timeout=SHORT)
    with pytest.raises(DeviceLost, match=r"host memory for cpu .* 0.2 s \(--processor-timeout\)"):
        house.lease()
    let_go.set()
    house.engine.close()
    assert not house.engine.alive


def test_it_gets_its_time_for_each_batch() -> None:
    """Batches that are each shorter, and together longer than one may take."""
    processor = Gated()
    house = House(processor, slots=4, max_batch=1, processor_timeout=LONGER)
    for _ in range(15):
        processor.gate = threading.Event()
        lease, outcome = house.submit(1)
        processor.entered.get(timeout=WAIT)
        threading.Timer(LONGER / 10, processor.gate.set).start()
        assert outcome.get(timeout=WAIT).error is None
        lease.release()
    assert house.engine.fatal is None
    house.engine.close()


def test_a_stuck_processor_is_found_out_while_the_engine_closes() -> None:
    processor = Gated()
    processor.gate = threading.Event()
    house = House(processor, slots=4, max_batch=1, processor_timeout=SHORT)
    fatal = fatal_of(house)
    jobs = [house.submit(n, f"s{n}") for n in range(2)]
    processor.entered.get(timeout=WAIT)
    closing = threading.Thread(target=house.engine.close)
    closing.start()
    assert isinstance(fatal.get(timeout=WAIT), ProcessorTimeout)
    assert all(isinstance(outcome.get(timeout=WAIT).error, ProcessorTimeout) for _, outcome in jobs)
    processor.gate.set()
    closing.join(WAIT)
    assert not closing.is_alive()
    for lease, _ in jobs:
        lease.release()


@pytest.mark.parametrize("released", ["before", "after"])
def test_released_around_the_alarm_its_slots_come_back_once(released: str) -> None:
    processor = Gated()
    processor.gate = threading.Event()
    house = House(processor, slots=2, max_batch=1, processor_timeout=SHORT)
    fatal = fatal_of(house)
    lease, outcome = house.submit(1)
    processor.entered.get(timeout=WAIT)
    if released == "before":
        lease.release()
        assert house.free() == 1, "the device still has it"
    fatal.get(timeout=WAIT)
    lease.release()
    assert house.free() == 2
    processor.gate.set()
    house.engine.close()
    assert house.free() == 2
    assert outcome.empty() is (released == "before")


def test_what_lands_as_the_alarm_goes_off_is_told_one_thing_only() -> None:
    """The alarm while a batch is being delivered: those who got their result keep it, the rest get the error."""
    processor = Gated()
    house = House(processor, slots=8, max_batch=4)
    fatal = fatal_of(house)
    processor.gate = threading.Event()
    blocker = house.submit(0)
    processor.entered.get(timeout=WAIT)
    outcomes: list[tuple[int, Outcome]] = []
    leases: list[Lease] = []
    both = threading.Semaphore(0)

    def done(number: int, outcome: Outcome) -> None:
        if number == 0:  # on the device thread, in the middle of the delivery
            give_up_elsewhere(house)
        outcomes.append((number, outcome))
        both.release()

    for number, byte in enumerate((1, 2, 13)):
        lease = house.lease()
        lease.views[0][:] = bytes([byte]) * SPEC.nbytes
        lease.submit(f"s{number}", house.params, partial(done, number))
        leases.append(lease)
    processor.gate.set()
    for _ in range(3):
        assert both.acquire(timeout=WAIT)
    house.engine.close()
    assert blocker[1].get(timeout=WAIT).error is None
    results = dict(outcomes)
    assert len(outcomes) == 3, "each was told once"
    assert results[0].error is None
    assert value(leases[0]) == {2}
    # The three fail together for the third's sake; the first half was being delivered, the other was still to be tried.
    assert isinstance(results[1].error, DeviceLost)
    assert isinstance(results[2].error, DeviceLost)
    assert house.engine.usage()[2].frames == 2
    assert isinstance(fatal.get(timeout=WAIT), DeviceLost)
    for lease in [blocker[0], *leases]:
        lease.release()
    assert house.free() == 8


def give_up_elsewhere(house: House) -> None:
    """On a thread of its own, as the watch does it, and done when this returns."""
    alarm = threading.Thread(target=house.engine._device.give_up, args=(DeviceLost("gone"),))
    alarm.start()
    alarm.join(WAIT)
    assert house.engine.fatal is not None


def test_a_batch_that_is_being_delivered_is_delivered_as_a_whole() -> None:
    processor = Gated()
    house = House(processor, slots=8, max_batch=4)
    processor.gate = threading.Event()
    blocker = house.submit(0)
    processor.entered.get(timeout=WAIT)
    told: queue.Queue[Outcome] = queue.Queue()

    def first(outcome: Outcome) -> None:
        give_up_elsewhere(house)
        told.put(outcome)

    leases = [house.lease() for _ in range(3)]
    for number, lease in enumerate(leases):
        lease.submit(f"s{number}", house.params, told.put if number else first)
    processor.gate.set()
    assert [told.get(timeout=WAIT).error for _ in leases] == [None] * 3
    house.engine.close()
    assert house.engine.usage()[2].frames == 4, "who has a result is charged for it"
    for lease in [blocker[0], *leases]:
        lease.release()


def test_what_was_to_be_tried_again_as_the_alarm_goes_off_is_told() -> None:
    class Full(NumpyBackend):  # type: ignore[misc]
        def submit(self, batch: Batch) -> Any:
            raise DeviceOutOfMemory("full")

    house = House(Gated(), Full(), slots=8, max_batch=4)
    overran = house.engine.overran

    def and_give_up(items: Any) -> None:  # in the middle of the decision what to try again
        overran(items)
        give_up_elsewhere(house)

    house.engine.overran = and_give_up  # type: ignore[method-assign]
    lease, outcome = house.submit(1)
    assert isinstance(outcome.get(timeout=WAIT).error, DeviceLost)
    lease.release()
    assert house.free() == 8
    house.engine.close()


# --- a FrameProcessor


class Awaits(FrameProcessor):
    """Waits for ever for the frame of ones; ``stubborn``, it is not to be cancelled either."""

    def __init__(self, stubborn: bool = False) -> None:
        self.entered = threading.Event()
        self.cancelled = threading.Event()
        self.let_go = threading.Event()
        self.stubborn = stubborn

    async def process(self, frame: bytes) -> bytes:
        if frame[0] == 1:
            self.entered.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                if self.stubborn:
                    await asyncio.to_thread(self.let_go.wait, WAIT)
                raise
        elif frame[0] == 2:
            self.entered.set()
            self.let_go.wait(WAIT)  # holds the loop up
        elif frame[0] == 3:
            raise TimeoutError("its own")
        return frame


def test_a_call_that_awaits_for_too_long_is_cancelled_and_fails_alone() -> None:
    processor = Awaits()
    house = House(processor, HostBackend(0.5), processor_timeout=60)
    jobs = [house.submit(n) for n in (0, 1, 0, 3, 0)]
    errors = [outcome.get(timeout=WAIT).error for _, outcome in jobs]
    assert isinstance(errors[1], ProcessorTimeout)
    assert "Awaits took longer than 0.5 s" in str(errors[1])
    assert processor.cancelled.is_set()
    assert isinstance(errors[3], ProcessorFailed), "a TimeoutError of its own is a failure like any other"
    assert [errors[n] for n in (0, 2, 4)] == [None] * 3
    for lease, _ in jobs:
        lease.release()
    assert house.engine.fatal is None
    house.engine.close()


@pytest.mark.parametrize(("frame", "stubborn"), [(1, True), (2, False)], ids=["not to be cancelled", "blocks its loop"])
def test_a_call_that_cannot_be_cancelled_is_stuck(frame: int, stubborn: bool) -> None:
    processor = Awaits(stubborn)
    house = House(processor, HostBackend(SHORT), processor_timeout=SHORT)
    fatal = fatal_of(house)
    lease, outcome = house.submit(frame)
    assert processor.entered.wait(WAIT)
    assert isinstance(fatal.get(timeout=WAIT), ProcessorTimeout)
    assert isinstance(outcome.get(timeout=WAIT).error, ProcessorTimeout)
    lease.release()
    processor.let_go.set()
    house.engine.close()
    assert not house.engine.alive


def test_a_wrong_result_within_the_limit_is_still_the_processors() -> None:
    class Short(FrameProcessor):
        async def process(self, frame: bytes) -> bytes:
            return frame[1:]

    house = House(Short(), HostBackend(60.0))
    lease, outcome = house.submit(1)
    assert isinstance(outcome.get(timeout=WAIT).error, ProcessorOutput)
    lease.release()
    house.engine.close()


def test_numpy_needs_no_watch_unless_there_is_a_limit() -> None:
    assert not hasattr(NumpyBackend, "probe")
    house = House(Gated())
    assert not [t for t in threading.enumerate() if t.name.endswith(("-canary", "-watch"))]
    house.engine.close()
    house = House(Gated(), processor_timeout=60)
    assert [t.name for t in threading.enumerate() if t.name.endswith("-watch")] == ["gpu-byoc-numpy-watch"]
    house.engine.close()
    assert not [t for t in threading.enumerate() if t.name.endswith("-watch")]
