"""An engine in blocking words, and processors and backends that wait where a test wants them to."""

from __future__ import annotations

import queue
import threading
from typing import Any

import numpy as np
from gpu_byoc_backends.numpy_cpu import NumpyBackend

from gpu_byoc.backend import Batch, BatchTimes
from gpu_byoc.config import EngineConfig
from gpu_byoc.engine.device import Outcome
from gpu_byoc.engine.engine import Engine, Lease
from gpu_byoc.engine.fleet import Fleet
from gpu_byoc.errors import DeviceLost, GpuByocError
from gpu_byoc.frames import FrameSpec
from gpu_byoc.processor import ArrayProcessor, Processor, parse_params

SPEC = FrameSpec(4, 2)
WAIT = 20.0


class Gated(ArrayProcessor):
    """Adds 1 to every byte, waits at a gate if there is one, and cannot stand the byte 13."""

    def __init__(self) -> None:
        self.gate: threading.Event | None = None
        self.entered: queue.Queue[int] = queue.Queue()
        self.sizes: list[int] = []

    def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
        self.sizes.append(len(frames))
        self.entered.put(len(frames))
        if self.gate is not None:
            assert self.gate.wait(WAIT)
        if (frames == 13).any():
            raise ValueError("thirteen")
        return frames + np.uint8(1)


class Door:
    """What callers of an engine or a fleet do, in blocking words."""

    def __init__(self, engine: Engine | Fleet, processor: Processor) -> None:
        self.door = engine
        self.params = parse_params(processor, {})

    def lease(self, frames: int = 1, spec: FrameSpec = SPEC) -> Lease:
        answer: queue.Queue[GpuByocError | None] = queue.Queue()
        lease = self.door.lease(spec, frames, answer.put)
        if not lease.granted:
            error = answer.get(timeout=WAIT)
            if error is not None:
                lease.release()
                raise error
        return lease

    def submit(
        self, value: int, stream: str = "s", frames: int = 1, spec: FrameSpec = SPEC
    ) -> tuple[Lease, queue.Queue[Outcome]]:
        lease = self.lease(frames, spec)
        for view in lease.views:
            view[:] = bytes([value]) * view.nbytes
        outcome: queue.Queue[Outcome] = queue.Queue()
        lease.submit(stream, self.params, outcome.put)
        return lease, outcome

    def free(self) -> int:
        return sum(room["free"] for room in self.door.rooms())


class House(Door):
    """An engine of its own."""

    def __init__(self, processor: Processor, backend: Any = None, **config: Any) -> None:
        self.processor = processor
        self.engine = Engine(backend or NumpyBackend(), processor, EngineConfig(**config))
        super().__init__(self.engine, processor)
        self.engine.start().result(WAIT)


class Staged(NumpyBackend):  # type: ignore[misc]
    """numpy's work, landing only when ``gates[number of the batch]`` opens: a device with several on their way."""

    depth = 3

    def __init__(self, lost: int = 0) -> None:
        super().__init__()
        self.count = 0
        self.lost = lost
        self.gates = [threading.Event() for _ in range(20)]
        self.submitted: queue.Queue[int] = queue.Queue()

    def submit(self, batch: Batch) -> Any:
        self.count += 1
        number = self.count
        try:
            done = super().submit(batch)
        finally:
            self.submitted.put(number)
        gate, lost = self.gates[number], number == self.lost

        class Later:
            def wait(self) -> BatchTimes:
                assert gate.wait(WAIT)
                if lost:
                    raise DeviceLost("an illegal address was met")
                times: BatchTimes = done.wait()
                return times

        return Later()


def value(lease: Lease) -> set[int]:
    return {byte for view in lease.views for byte in view}
