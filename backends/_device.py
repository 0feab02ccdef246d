"""What the device backends share: the road of a batch over three streams, and who is to blame when it fails.

The road of a batch, each stream working on another batch at the same time::

    upload     in0  slots -> lane.frames  in1
    compute                 wait in1   c0  processor  c1
    download                                 wait c1   out0  lane -> slots  out1

``submit`` enqueues all of that and returns; ``wait`` waits for ``out1`` alone. The download is enqueued only after
the processor's call returned, so a batch that failed leaves its slots as they were. A lane is in flight from
``submit`` until its ``wait`` returned, and no other batch touches it; idle lanes are kept for the next batch of the
same frame size and bucket.

A library plugs in by the abstract methods of ``DeviceBackend``; every method with a stream enqueues on it.
"""

from __future__ import annotations

import logging
import traceback
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from array_api_compat import device as device_of

from gpu_byoc.backend import Batch, BatchTimes, runs
from gpu_byoc.errors import BackendUnavailable, DeviceError, DeviceLost, DeviceOutOfMemory, ProcessorOutput
from gpu_byoc.frames import BYTES_PER_PIXEL
from gpu_byoc.processor import ArrayProcessor, Kernel, Processor, processor_name

from ._lanes import Event, Lane, LanePool, Slab, SlabArena, Stream, slab_of

log = logging.getLogger(__name__)


class DeviceBackend(ABC):
    """A backend whose device has memory of its own.

    ``require_pinned``  set it before ``arena`` is called to make unpinned host memory an error, not a warning.
    """

    name: str = ""
    depth: int = 2  # one batch on the device while the next one is copied in
    batches: bool = True
    require_pinned: bool = False

    def __init__(self) -> None:
        self.device = ""
        self._degraded: list[str] = []
        self._lost = ""
        self._processor: ArrayProcessor | None = None
        self._kernel: Kernel | None = None
        self._lanes = LanePool(self._make_lane)

    # --- what a library has to say

    @classmethod
    @abstractmethod
    def available(cls, device: str | None) -> str | None: ...

    @abstractmethod
    def _take(self, device: str | None) -> tuple[Any, Any]:
        """Import the library, choose the device, set ``self.device``. Returns ``xp`` and its device object."""

    @abstractmethod
    def _facts(self) -> Mapping[str, Any]:
        """Device name and library versions for status."""

    @abstractmethod
    def _slab(self, nbytes: int) -> Slab:
        """Host memory, pinned if it can be."""

    @abstractmethod
    def _empty(self, nbytes: int) -> Any:
        """Flat uint8 device array, aligned to at least 16 bytes."""

    @abstractmethod
    def _stream(self) -> Stream: ...

    @abstractmethod
    def _event(self) -> Event: ...

    @abstractmethod
    def _on(self, stream: Stream) -> AbstractContextManager[Any]:
        """Makes ``stream`` the library's current one, for the code of a processor."""

    @abstractmethod
    def _upload(self, array: Any, at: int, slab: Slab, start: int, nbytes: int, stream: Stream) -> None:
        """Enqueue ``array[at:at + nbytes] = slab[start:start + nbytes]``."""

    @abstractmethod
    def _download(self, slab: Slab, start: int, array: Any, at: int, nbytes: int, stream: Stream) -> None:
        """Enqueue ``slab[start:start + nbytes] = array[at:at + nbytes]``."""

    @abstractmethod
    def _assign(self, target: Any, value: Any) -> None:
        """``target[...] = value`` for arrays of one shape, on the current stream."""

    @abstractmethod
    def _elapsed_ns(self, begin: Event, end: Event) -> float:
        """Time between two marks that have passed."""

    @abstractmethod
    def _is_array(self, value: Any) -> bool: ...

    @abstractmethod
    def _is_out_of_memory(self, error: BaseException) -> bool:
        """Whether the library says by ``error`` that device memory ran out."""

    @abstractmethod
    def _free_cached(self) -> None:
        """Give memory that the library keeps for itself back to the device."""

    # --- the contract

    def open(self, device: str | None, processor: Processor) -> None:
        if reason := self.available(device):
            raise BackendUnavailable(reason)
        if not isinstance(processor, ArrayProcessor):
            raise BackendUnavailable(
                f"{self.name} runs ArrayProcessors; {processor_name(processor)} is a FrameProcessor, which takes bytes"
            )
        try:
            self._xp, xp_device = self._take(device)
            self._up, self._compute, self._down = self._stream(), self._stream(), self._stream()
        except RuntimeError as error:  # what both libraries raise for the driver's refusals
            raise BackendUnavailable(
                f"{self.name} cannot open {device or 'cuda'} ({error}): look with nvidia-smi whether another process "
                "holds it or its compute mode is exclusive"
            ) from error
        with self._on(self._compute):
            processor.setup(self._xp, xp_device)
            self._processor = processor
        self._kernel = self._warm_kernel(processor)
        try:
            self._compute.synchronize()
        except Exception as error:  # nothing but the device itself fails here
            raise self._lose(error) from error

    def arena(self, nbytes: int, slots: int) -> SlabArena:
        slab = self._slab(nbytes * slots)
        if slab.why_not:
            text = (
                f"host memory is not pinned ({slab.why_not}): copies are slow and nothing overlaps; "
                "lower --slots or free host memory"
            )
            if self.require_pinned:
                raise BackendUnavailable(text)
            self._degrade(text)
        return SlabArena(nbytes, slots, slab, self._arena_closed)

    def submit(self, batch: Batch) -> Flight:
        if self._lost:
            raise DeviceLost(self._lost)
        assert self._processor is not None, "open comes first"
        assert batch.spec.nbytes == batch.arena.nbytes, "a slot holds one frame of the batch's spec"
        lane = self._take_lane(batch)
        try:
            self._copy_in(batch, lane)
            output = self._process(batch, lane, self._processor)
        except BaseException as error:  # the processor's, whatever it is: the engine decides what it means
            failure = self._after_failure(error, lane)
            if failure is None:
                raise
            raise failure from error
        try:
            self._copy_out(batch, lane, output)
        except Exception as error:  # some slots may hold output by now: the batch can neither finish nor be retried
            raise self._lose(error) from error
        return Flight(self, lane)

    def info(self) -> Mapping[str, Any]:
        return {**self._facts(), "degraded": list(self._degraded)}

    def close(self) -> None:
        try:
            if self._processor is not None:
                with self._on(self._compute):
                    self._processor.teardown()
        finally:
            self._processor = None
            self._lanes.drop()

    # --- inside

    def _copy_in(self, batch: Batch, lane: Lane) -> None:
        slab, at = slab_of(batch.arena), 0
        lane.marks[0].record(self._up)
        for first, count in runs(batch.slots):
            nbytes = count * lane.nbytes
            self._upload(lane.frames, at, slab, first * lane.nbytes, nbytes, self._up)
            at += nbytes
        lane.marks[1].record(self._up)
        self._compute.wait_event(lane.marks[1])

    def _process(self, batch: Batch, lane: Lane, processor: ArrayProcessor) -> Any:
        """Enqueue the processor's work; returns the lane's array that will hold the result."""
        count = len(batch.slots)
        with self._on(self._compute):
            lane.marks[2].record(self._compute)
            frames = self._frames(lane.frames, count, batch.spec.shape)
            if self._kernel is not None:
                result = self._kernel(frames, batch.params)
            else:
                result = processor.process_batch(frames, batch.params, self._xp)
            output = lane.frames
            if result is not frames:
                # An array of the processor's own is copied, on the device: it may be a view in any order, or one
                # that the processor writes again while this batch still waits for its download.
                self._check(result, frames, processor)
                if lane.result is None:
                    lane.result = self._allocate(lane.bucket * lane.nbytes)
                output = lane.result
                self._assign(self._frames(output, count, batch.spec.shape), result)
            lane.marks[3].record(self._compute)
        return output

    def _copy_out(self, batch: Batch, lane: Lane, output: Any) -> None:
        slab, at = slab_of(batch.arena), 0
        self._down.wait_event(lane.marks[3])
        lane.marks[4].record(self._down)
        for first, count in runs(batch.slots):
            nbytes = count * lane.nbytes
            self._download(slab, first * lane.nbytes, output, at, nbytes, self._down)
            at += nbytes
        lane.marks[5].record(self._down)

    @staticmethod
    def _frames(array: Any, count: int, shape: tuple[int, int, int]) -> Any:
        height, width, channels = shape
        return array[: count * height * width * channels].reshape(count, height, width, channels)

    def _check(self, result: Any, frames: Any, processor: ArrayProcessor) -> None:
        if not self._is_array(result):
            raise ProcessorOutput(
                f"{processor_name(processor)} returned {type(result).__module__}.{type(result).__qualname__}; "
                f"{self.name} needs an array of its own kind, {tuple(frames.shape)} {frames.dtype} on {self.device}"
            )
        got = (tuple(result.shape), result.dtype, device_of(result))
        want = (tuple(frames.shape), frames.dtype, device_of(frames))
        if got != want:
            raise ProcessorOutput(
                f"{processor_name(processor)} returned {got[0]} {got[1]} on {got[2]} for frames of "
                f"{want[0]} {want[1]} on {want[2]}"
            )

    def _allocate(self, nbytes: int) -> Any:
        """Device memory, at the cost of idle lanes if there is no other."""
        try:
            return self._empty(nbytes)
        except Exception as error:  # each library has an out-of-memory error of its own; others go on
            if not self._is_out_of_memory(error):
                raise
        self._free_idle()
        return self._empty(nbytes)

    def _make_lane(self, nbytes: int, bucket: int) -> Lane:
        return Lane(nbytes, bucket, self._allocate(nbytes * bucket), tuple(self._event() for _ in range(6)))

    def _take_lane(self, batch: Batch) -> Lane:
        try:
            return self._lanes.take(batch.arena.nbytes, len(batch.slots))
        except Exception as error:  # the library's: memory, or the device itself
            raise (self._out_of_memory if self._is_out_of_memory(error) else self._lose)(error) from error

    def _after_failure(self, error: BaseException, lane: Lane) -> DeviceError | None:
        """Bring a failed batch to rest; returns what to raise in place of ``error``, None for ``error`` itself.

        Waiting here is right, although ``submit`` never waits: failures are rare, the lane and the slots are at rest
        afterwards, and a device that is gone for good says so in these calls, whatever ``error`` looks like.
        """
        try:
            self._up.synchronize()
            self._compute.synchronize()
        except Exception as fault:  # nothing but the device itself fails here
            return self._lose(fault)
        if self._is_out_of_memory(error):
            _forget_arrays(error)
            lane.frames = lane.result = None
            self._free_idle()
            return self._out_of_memory(error)
        self._lanes.give(lane)
        return None

    def _out_of_memory(self, error: BaseException) -> DeviceOutOfMemory:
        return DeviceOutOfMemory(f"{self.device} has no memory for this batch ({error}): lower --max-batch")

    def _lose(self, error: BaseException) -> DeviceLost:
        self._lost = (
            f"{self.device} failed for good ({error}): restart the worker; if it happens again, look for NVRM Xid "
            "lines in the host's kernel log"
        )
        return DeviceLost(self._lost)

    def _free_idle(self) -> None:
        self._lanes.drop()
        self._free_cached()

    def _arena_closed(self, arena: SlabArena) -> None:
        self._lanes.drop(arena.nbytes)

    def _warm_kernel(self, processor: ArrayProcessor) -> Kernel | None:
        """The processor's kernel for this backend, after one call on a frame of 4x4, so that it is compiled."""
        kernel = processor.kernels.get(self.name)
        if kernel is None:
            return None
        shape = (4, 4, BYTES_PER_PIXEL[processor.pixel_format])
        frames = self._frames(self._empty(16 * shape[2]), 1, shape)
        try:
            with self._on(self._compute):
                kernel(frames, processor.Params())
        except Exception as error:  # a compiler that is missing, a source that does not build: all have one cure
            self._degrade(
                f"the {self.name} kernel of {processor_name(processor)} does not run here "
                f"({type(error).__name__}: {error}); its slower process_batch is used"
            )
            return None
        return kernel

    def _degrade(self, text: str) -> None:
        if text not in self._degraded:
            self._degraded.append(text)
            log.warning("%s: %s", self.name, text)


class Flight:
    """A batch on its way."""

    def __init__(self, backend: DeviceBackend, lane: Lane) -> None:
        self._backend = backend
        self._lane = lane

    def wait(self) -> BatchTimes:
        backend, marks = self._backend, self._lane.marks
        try:
            marks[5].synchronize()
            copied_in, computed, copied_out = (
                max(0, round(backend._elapsed_ns(marks[i], marks[i + 1]))) for i in (0, 2, 4)
            )
        except Exception as error:  # what a device reports after the fact leaves it unusable
            raise backend._lose(error) from error
        backend._lanes.give(self._lane)
        return BatchTimes(compute_ns=computed, copy_ns=copied_in + copied_out)


def _forget_arrays(error: BaseException | None) -> None:
    """Clear the local variables that ``error``'s tracebacks hold: a processor's arrays, which fill the device."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
