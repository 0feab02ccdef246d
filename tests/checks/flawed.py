"""A backend that keeps the contract, in plain numpy with batches on their way, and one for each way to break it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import array_api_compat.numpy as xp
import numpy as np

from gpu_byoc.backend import Batch, BatchTimes, HostArena
from gpu_byoc.errors import BackendUnavailable, DeviceLost
from gpu_byoc.processor import Processor

LATE = 0.02  # seconds after which a late write comes


class Faithful:
    """Computes in ``submit``, writes in ``wait``; two batches on their way."""

    name = "faithful"
    device = "cpu"
    depth = 2
    batches = True
    degraded: ClassVar[list[str]] = []

    def __init__(self) -> None:
        self.processor: Any = None
        self.late: list[threading.Timer] = []

    @classmethod
    def available(cls, device: str | None) -> str | None:
        return None

    def open(self, device: str | None, processor: Processor) -> None:
        self.processor = processor

    def arena(self, nbytes: int, slots: int) -> HostArena:
        return HostArena(nbytes, slots)

    def submit(self, batch: Batch) -> Any:
        began = time.perf_counter_ns()
        shape = batch.spec.shape
        frames = np.stack([np.array(batch.arena.view(slot)).reshape(shape) for slot in batch.slots])
        result = np.array(self.compute(batch, frames))
        return Landing(self, batch, result, max(1, time.perf_counter_ns() - began))

    def compute(self, batch: Batch, frames: Any) -> Any:
        return self.processor.process_batch(frames, batch.params, xp)

    def land(self, batch: Batch, result: Any) -> None:
        write([batch.arena.view(slot) for slot in batch.slots], result)

    def times(self, taken: int) -> BatchTimes:
        return BatchTimes(taken)

    def land_late(self, batch: Batch, result: Any) -> None:
        views = [batch.arena.view(slot) for slot in batch.slots]  # they outlive the arena
        timer = threading.Timer(LATE, write, (views, result))
        self.late.append(timer)
        timer.start()

    def probe(self) -> None:
        pass

    def info(self) -> Mapping[str, Any]:
        return {"degraded": list(self.degraded)}

    def close(self) -> None:
        for timer in self.late:
            timer.join()


def write(views: list[memoryview], result: Any) -> None:
    for view, frame in zip(views, result, strict=True):
        view[:] = frame.tobytes()


class Landing:
    def __init__(self, backend: Faithful, batch: Batch, result: Any, taken: int) -> None:
        self.backend, self.batch, self.result, self.taken = backend, batch, result, taken

    def wait(self) -> BatchTimes:
        self.backend.land(self.batch, self.result)
        return self.backend.times(self.taken)


class LastByteWrong(Faithful):
    """The rest behind the last 16 bytes is off by one."""

    def compute(self, batch: Batch, frames: Any) -> Any:
        result = np.array(super().compute(batch, frames))
        if result.nbytes % 16:
            result.reshape(-1)[-1] ^= 1
        return result


class Wraps(Faithful):
    """One pair of byte and boost comes out wrong."""

    def compute(self, batch: Batch, frames: Any) -> Any:
        result = np.array(super().compute(batch, frames))
        if getattr(batch.params, "boost", 0) == 254:
            result[..., 1][frames[..., 1] == 1] = 254
        return result


class Mixes(Faithful):
    """A batch gets what the one before it was to get, where both have one shape: their device memory is the same."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[tuple[int, ...], Any] = {}

    def compute(self, batch: Batch, frames: Any) -> Any:
        result = super().compute(batch, frames)
        before = self.before.get(result.shape, result)
        self.before[result.shape] = result
        return before


class TooEarly(Faithful):
    """``wait`` returns before the bytes are there."""

    def land(self, batch: Batch, result: Any) -> None:
        self.land_late(batch, result)


class TooLate(Faithful):
    """Writes once more after ``wait`` has returned, when the slots are somebody else's."""

    def land(self, batch: Batch, result: Any) -> None:
        super().land(batch, result)
        self.land_late(batch, result)


class ForgetsFrames(Faithful):
    """A frame in the middle of a larger batch keeps what came in."""

    def land(self, batch: Batch, result: Any) -> None:
        for number, (slot, frame) in enumerate(zip(batch.slots, result, strict=True)):
            if number != 2:
                batch.arena.view(slot)[:] = frame.tobytes()


class Spoils(Faithful):
    """A batch that fails has written to its slots."""

    def compute(self, batch: Batch, frames: Any) -> Any:
        try:
            return super().compute(batch, frames)
        except ArithmeticError:
            for slot in batch.slots:
                batch.arena.view(slot)[-1] ^= 255
            raise


class Swallows(Faithful):
    """A processor that raises goes unnoticed: the input is the output."""

    def compute(self, batch: Batch, frames: Any) -> Any:
        try:
            return super().compute(batch, frames)
        except ArithmeticError:
            return frames


class LosesTime(Faithful):
    """Every other batch costs nothing."""

    turn = 0

    def times(self, taken: int) -> BatchTimes:
        self.turn += 1
        return BatchTimes(taken if self.turn % 2 else 0)


class InventsTime(Faithful):
    def times(self, taken: int) -> BatchTimes:
        return BatchTimes(10**12)


class Hangs(Faithful):
    """A batch that never ends, until the backend is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.over = threading.Event()

    def land(self, batch: Batch, result: Any) -> None:
        self.over.wait(3)


class Dies(Faithful):
    def compute(self, batch: Batch, frames: Any) -> Any:
        raise DeviceLost("cpu failed for good (an illegal address): restart")


class ProbeFails(Faithful):
    def probe(self) -> None:
        raise DeviceLost("cpu failed for good (no answer)")


class ProbeHangs(Faithful):
    def probe(self) -> None:
        time.sleep(2)


class DoesNotOpen(Faithful):
    def open(self, device: str | None, processor: Processor) -> None:
        raise BackendUnavailable("faithful is asleep: wake it")
