"""numpy on the CPU: the fallback, and the oracle that says what every other backend must return."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from gpu_byoc.backend import Batch, BatchTimes, HostArena, runs
from gpu_byoc.errors import BackendUnavailable, ProcessorOutput, ProcessorSpoiled, said_by
from gpu_byoc.processor import ArrayProcessor, Kernel, Processor, kernel_forms, processor_name


class _Done:
    """The work was done inside ``submit``."""

    def __init__(self, times: BatchTimes) -> None:
        self._times = times

    def wait(self) -> BatchTimes:
        return self._times


class NumpyBackend:
    """Works in place, on the thread that submits. ``compute_ns`` is what the processor took by the clock."""

    name = "numpy"
    device = "cpu"
    depth = 1
    batches = True

    def __init__(self) -> None:
        self._processor: ArrayProcessor | None = None
        self._kernel: Kernel | None = None
        self._xp: Any = None

    @classmethod
    def available(cls, device: str | None) -> str | None:
        if device not in (None, "cpu"):
            return f"numpy runs on cpu, not on {device}; choose --backend torch or cupy, or leave --device out"
        return None

    def open(self, device: str | None, processor: Processor) -> None:
        if reason := self.available(device):
            raise BackendUnavailable(reason)
        if not isinstance(processor, ArrayProcessor):
            raise BackendUnavailable(f"numpy runs ArrayProcessors; {processor_name(processor)} is none")
        if processor.arrays:
            raise BackendUnavailable(
                f"{processor_name(processor)} takes {processor.arrays} arrays, numpy has its own only: "
                "use --backend torch (on the CPU with --device cpu) or --backend cupy"
            )
        kernel = next(iter(kernel_forms(processor, "numpy")), None)
        if kernel is None or type(processor).setup is not ArrayProcessor.setup:
            # Only now: it imports all of numpy, which takes longer than the rest of the worker's start.
            self._xp = importlib.import_module("array_api_compat.numpy")
            processor.setup(self._xp, "cpu")
        self._processor, self._kernel = processor, kernel

    def arena(self, nbytes: int, slots: int) -> HostArena:
        return HostArena(nbytes, slots)

    def submit(self, batch: Batch) -> _Done:
        assert self._processor is not None, "open comes first"
        kernel = self._kernel
        started = time.perf_counter_ns()
        if kernel is not None:
            try:
                for first, count in runs(batch.slots):
                    frames = np.frombuffer(batch.arena.view(first, count), np.uint8)
                    kernel(frames, frames, batch.params)
            except BaseException as error:  # the processor's own, whatever it is
                name = processor_name(self._processor)
                kind = type(error).__name__
                raise ProcessorSpoiled(f"the numpy kernel of {name} raised {kind}: {said_by(error)}") from error
        else:
            self._generic(batch, self._processor)
        return _Done(BatchTimes(compute_ns=time.perf_counter_ns() - started))

    def _generic(self, batch: Batch, processor: ArrayProcessor) -> None:
        spec = batch.spec
        parts = [
            np.frombuffer(batch.arena.view(first, count), np.uint8).reshape(count, *spec.shape)
            for first, count in runs(batch.slots)
        ]
        frames = parts[0][:] if len(parts) == 1 else np.concatenate(parts)
        frames.flags.writeable = False
        result = processor.process_batch(frames, batch.params, self._xp)
        check_result(result, frames.shape, processor)
        at = 0
        for part in parts:
            part[:] = result[at : at + len(part)]
            at += len(part)

    def info(self) -> Mapping[str, Any]:
        return {"numpy": np.__version__, "degraded": []}

    def close(self) -> None:
        if self._processor is not None:
            self._processor.teardown()
            self._processor = None


def check_result(result: Any, shape: tuple[int, ...], processor: ArrayProcessor) -> None:
    """The seam: what a processor returned has the shape and dtype of what it was given.

    Raises:
        ProcessorOutput: with both shapes and dtypes in the message.
    """
    if not isinstance(result, np.ndarray) or result.shape != shape or result.dtype != np.uint8:
        got = f"{getattr(result, 'shape', '')} {getattr(result, 'dtype', type(result).__name__)}".strip()
        raise ProcessorOutput(f"{processor_name(processor)} returned {got} for frames of {shape} uint8")
