"""Frames of many streams through one engine, from one thread: as fast as they come back, or each when it is due.

The callers of an engine are a worker's threads; here it is one, so that what is measured is the engine and not how
threads take turns. Both share one interpreter with the engine's own thread, as a worker's do.
"""

from __future__ import annotations

import contextlib
import heapq
import queue
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from gpu_byoc.config import EngineConfig
from gpu_byoc.engine.device import Outcome
from gpu_byoc.engine.engine import Engine, Lease
from gpu_byoc.errors import GpuByocError, Overloaded
from gpu_byoc.frames import FrameSpec
from gpu_byoc.processor import ArrayProcessor, parse_params

from .bus import pixels
from .harness import Window
from .sides import Side

IN_FLIGHT: Final = 2
"""Frames of a stream in a closed loop: one on the device, one right behind it."""

JITTER: Final = 0.2
"""How far from its beat a frame may come, either way, as a part of its interval: what a network does to a source."""

WAIT_SECONDS: Final = 60.0
"""For a frame that is on its way; a backend may have to compile for a new size first."""


@dataclass(slots=True)
class Tally:
    """What one window's frames came to. Times in nanoseconds; ``batches`` counts batches by their frames."""

    queued: list[int] = field(default_factory=list)
    late: list[int] = field(default_factory=list)  # how far behind its time this program handed a frame over
    batches: Counter[int] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    compute: int = 0
    offered: int = 0
    refused: int = 0
    overdue: int = 0


@dataclass(frozen=True, slots=True)
class Landed:
    stream: int
    lease: Lease
    due: int
    at: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Arrival:
    """When a frame of a stream is due, and until when it has to be out: before the stream's next one. Nanoseconds."""

    due: int
    stream: int
    deadline: int


def arrivals(rates: Sequence[float], seconds: float, seed: int = 1) -> list[Arrival]:
    """Frames of one stream for each of ``rates`` (frames a second) over ``seconds``, from 0 on, in order.

    Streams begin at random phases; each frame comes up to JITTER of its interval before or after its beat.
    """
    dice = random.Random(seed)
    streams = []
    for stream, rate in enumerate(rates):
        interval = 1e9 / rate
        beat, frames = dice.random() * interval, []
        while beat < seconds * 1e9:
            due = max(0, round(beat + dice.uniform(-JITTER, JITTER) * interval))
            frames.append(Arrival(due, stream, due + round(interval)))
            beat += interval
        streams.append(frames)
    return list(heapq.merge(*streams, key=lambda each: each.due))


class Reasons:
    """Why each batch left, told from what came back by the rules of ``core/batching.py``: ``full``, ``waited`` (its
    oldest frame for ``max_wait``), or ``free`` (the device had room)."""

    def __init__(self, config: EngineConfig) -> None:
        self._most = config.max_batch
        self._wait = int(config.max_wait_ms * 1e6)
        self._batch: list[int] = []

    def add(self, outcome: Outcome, tally: Tally) -> None:
        """Frames of one batch come back side by side."""
        self._batch.append(outcome.queue_ns)
        if len(self._batch) < outcome.batch:
            return
        tally.batches[outcome.batch] += 1
        if outcome.batch >= self._most:
            tally.left["full"] += 1
        elif self._wait and max(self._batch) >= self._wait:
            tally.left["waited"] += 1
        else:
            tally.left["free"] += 1
        self._batch.clear()


class Loader:
    """One engine with slots full of random bytes. Each of its windows has its ``Tally``."""

    def __init__(self, engine: Engine, spec: FrameSpec) -> None:
        self._engine = engine
        self._spec = spec
        self._params = parse_params(engine.processor, {})
        self._landed: queue.SimpleQueue[Landed] = queue.SimpleQueue()
        self._reasons = Reasons(engine.config)

    def fill(self) -> None:
        """Random bytes into every slot."""
        leases = [self._wait_for_slots() for _ in range(self._engine.config.slots)]
        for number, lease in enumerate(leases):
            lease.views[0][:] = pixels(self._spec.nbytes, number).data
        for lease in leases:
            lease.release()

    def once(self, frame: bytes) -> bytes:
        """What comes out for one frame."""
        lease = self._wait_for_slots()
        lease.views[0][:] = frame
        self._submit(lease, 0, 0)
        landed = self._take(Tally())
        result = bytes(lease.views[0])
        landed.lease.release()
        return result

    def closed(self, streams: int, seconds: float) -> Callable[[], Window]:
        """Windows in which each stream has IN_FLIGHT frames under way, and sends another when one comes back."""

        def window() -> Window:
            tally, times = Tally(), list[float]()
            used, began = time.process_time(), time.monotonic_ns()
            end, flying = began + round(seconds * 1e9), streams * IN_FLIGHT
            for number in range(flying):
                self._submit(self._wait_for_slots(), number % streams, time.monotonic_ns())
            while flying:
                landed = self._take(tally)
                landed.lease.release()
                times.append((landed.at - landed.due) / 1e9)
                now = time.monotonic_ns()
                if now < end:
                    self._submit(self._wait_for_slots(), landed.stream, now)
                else:
                    flying -= 1
            return self._done(times, began, used, tally)

        return window

    def open(self, rates: Sequence[float], seconds: float) -> Callable[[], Window]:
        """Windows in which frames come when they are due, whether or not the engine keeps up. A time begins when its
        frame is due, so that a late start counts too."""
        plan = arrivals(rates, seconds)

        def window() -> Window:
            tally, times = Tally(offered=len(plan)), list[float]()
            used, began = time.process_time(), time.monotonic_ns()
            deadlines: dict[int, int] = {}
            waiting = iter(plan)
            coming = next(waiting, None)
            flying = 0
            while coming is not None or flying:
                wait = None if coming is None else (began + coming.due - time.monotonic_ns()) / 1e9
                if wait is not None and wait <= 0 and coming is not None:
                    flying += self._arrive(coming, began, tally, deadlines)
                    coming = next(waiting, None)
                    continue
                with contextlib.suppress(queue.Empty):
                    landed = self._take(tally, WAIT_SECONDS if wait is None else wait)
                    flying -= 1
                    tally.overdue += landed.at > deadlines.pop(id(landed.lease))
                    landed.lease.release()
                    times.append((landed.at - landed.due) / 1e9)
            return self._done(times, began, used, tally)

        return window

    def _arrive(self, frame: Arrival, began: int, tally: Tally, deadlines: dict[int, int]) -> int:
        """How many frames are on their way because of it: 1, or 0 where there is no slot."""
        tally.late.append(time.monotonic_ns() - began - frame.due)
        try:
            lease = self._engine.lease(self._spec, 1, lambda error: None)
        except Overloaded:
            tally.refused += 1
            return 0
        if not lease.granted:
            lease.release()
            tally.refused += 1
            return 0
        deadlines[id(lease)] = began + frame.deadline
        self._submit(lease, frame.stream, began + frame.due)
        return 1

    def _submit(self, lease: Lease, stream: int, due: int) -> None:
        def done(outcome: Outcome) -> None:
            self._landed.put(Landed(stream, lease, due, time.monotonic_ns(), outcome))

        lease.submit(f"stream-{stream}", self._params, done)

    def _take(self, tally: Tally, seconds: float = WAIT_SECONDS) -> Landed:
        """Raises queue.Empty, and what went wrong with the frame."""
        landed = self._landed.get(timeout=seconds)
        if landed.outcome.error is not None:
            landed.lease.release()
            raise landed.outcome.error
        tally.queued.append(landed.outcome.queue_ns)
        tally.compute += landed.outcome.compute_ns
        self._reasons.add(landed.outcome, tally)
        return landed

    def _wait_for_slots(self) -> Lease:
        answer: queue.SimpleQueue[GpuByocError | None] = queue.SimpleQueue()
        lease = self._engine.lease(self._spec, 1, answer.put)
        if not lease.granted and (error := answer.get(timeout=WAIT_SECONDS)) is not None:
            lease.release()
            raise error
        return lease

    def _done(self, times: Sequence[float], began: int, used: float, tally: Tally) -> Window:
        wall = (time.monotonic_ns() - began) / 1e9
        return Window(tuple(times), wall, time.process_time() - used, tally.refused, tally)


@contextlib.contextmanager
def loader(side: Side, processor: ArrayProcessor, spec: FrameSpec, config: EngineConfig) -> Iterator[Loader]:
    """An engine that runs for the time of the block, its slots filled."""
    engine = Engine(side.make(), processor, config, side.device)
    try:
        engine.start().result(WAIT_SECONDS)
        driver = Loader(engine, spec)
        driver.fill()
        yield driver
    finally:
        engine.close(timeout=WAIT_SECONDS)


def summed(tallies: Sequence[Tally]) -> Tally:
    total = Tally()
    for each in tallies:
        total.queued += each.queued
        total.late += each.late
        total.batches += each.batches
        total.left += each.left
        for name in ("compute", "offered", "refused", "overdue"):
            setattr(total, name, getattr(total, name) + getattr(each, name))
    return total
