"""The smallest backend that keeps the contract: ordinary memory, and a batch copied in and out of it, on the CPU."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from gpu_byoc.backend import Batch, BatchTimes
from gpu_byoc.errors import BackendUnavailable, ProcessorOutput
from gpu_byoc.processor import ArrayProcessor, Processor, processor_name


class PlainArena:
    """``slots`` frames of ``nbytes`` bytes, side by side in one bytearray."""

    pinned = False

    def __init__(self, nbytes: int, slots: int) -> None:
        self.nbytes = nbytes
        self.slots = slots
        self._bytes = memoryview(bytearray(nbytes * slots))

    def view(self, first: int, count: int = 1) -> memoryview:
        return self._bytes[first * self.nbytes : (first + count) * self.nbytes]

    def close(self) -> None:
        self._bytes.release()


class Done:
    """There is nothing to wait for: ``submit`` did the work."""

    def __init__(self, times: BatchTimes) -> None:
        self._times = times

    def wait(self) -> BatchTimes:
        return self._times


class PlainBackend:
    """Found by the entry point ``plain``; made without arguments, used from the engine's device thread."""

    name = "plain"
    device = "cpu"
    depth = 1  # submit does the work itself, so there is never a second batch on its way
    batches = True  # a batch costs less than its frames one by one

    def __init__(self) -> None:
        self._processor: ArrayProcessor | None = None

    @classmethod
    def available(cls, device: str | None) -> str | None:
        return None if device in (None, "cpu") else f"plain runs on cpu, not on {device}; leave --device out"

    def open(self, device: str | None, processor: Processor) -> None:
        if reason := self.available(device):
            raise BackendUnavailable(reason)
        if not isinstance(processor, ArrayProcessor):
            raise BackendUnavailable(f"plain runs ArrayProcessors; {processor_name(processor)} is none")
        processor.setup(xp, "cpu")
        self._processor = processor

    def arena(self, nbytes: int, slots: int) -> PlainArena:
        return PlainArena(nbytes, slots)

    def submit(self, batch: Batch) -> Done:
        assert self._processor is not None, "open comes first"
        began = time.perf_counter_ns()
        # A copy: the slots keep what came in until the whole batch has succeeded.
        packed = b"".join(batch.arena.view(slot) for slot in batch.slots)
        frames = np.frombuffer(packed, np.uint8).reshape(len(batch.slots), *batch.spec.shape)
        ready = time.perf_counter_ns()
        result = self._processor.process_batch(frames, batch.params, xp)
        done = time.perf_counter_ns()
        check(result, frames.shape, self._processor)
        for slot, frame in zip(batch.slots, result, strict=True):
            batch.arena.view(slot)[:] = frame.tobytes()
        ended = time.perf_counter_ns()
        return Done(BatchTimes(compute_ns=done - ready, copy_ns=ready - began + ended - done))

    def info(self) -> Mapping[str, Any]:
        return {"degraded": []}

    def close(self) -> None:
        if self._processor is not None:
            self._processor.teardown()
            self._processor = None


def check(result: Any, shape: tuple[int, ...], processor: ArrayProcessor) -> None:
    """A processor's mistake is said before anything is written. Raises ProcessorOutput."""
    got = (getattr(result, "shape", None), str(getattr(result, "dtype", type(result).__name__)))
    if got != (shape, "uint8"):
        raise ProcessorOutput(f"{processor_name(processor)} returned {got[0]} {got[1]} for frames of {shape} uint8")
