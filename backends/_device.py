"""What the device backends share: the road of a batch over three streams, and who is to blame when it fails.

The road of a batch, each stream working on another batch at the same time::

    upload     in0  slots -> lane.frames  in1
    compute                 wait in1   c0  processor  c1
    download                                 wait c1   out0  lane -> slots  out1

``submit`` enqueues all of that and returns; ``wait`` waits for ``out1`` alone. The download is enqueued only after
the processor's call returned, so a batch that failed leaves its slots as they were. A lane is in flight from
``submit`` until its ``wait`` returned, and no other batch touches it; idle lanes are kept for the next batch of the
same frame size and bucket.

Frames lie in the lane in the order of their slots, not of their submission: neighbouring slots are one copy then,
whichever way they were handed out.

A library plugs in by the abstract methods of ``Hardware``; the processor's side is ``Stage``.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Mapping
from typing import Any

from gpu_byoc.backend import Batch, BatchTimes, runs
from gpu_byoc.errors import BackendUnavailable, DeviceError, DeviceLost, DeviceOutOfMemory
from gpu_byoc.processor import ArrayProcessor, Processor, processor_name

from ._cuda import ignore_captures
from ._lanes import Canary, Lane, LanePool, SlabArena, slab_of
from ._nvml import Figures, Meter, gpu_uuid
from ._stage import Stage


class DeviceBackend(Stage):
    """A backend whose device has memory of its own.

    ``require_pinned``  set it before ``arena`` is called to make unpinned host memory an error, not a warning.
    """

    depth: int = 3  # as many as there are streams: one batch copied in, one computed, one copied out
    batches: bool = True
    require_pinned: bool = False

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[str, Any] = {}
        self._lost = ""
        self._canary: Canary | None = None
        self._gpu_facts: Mapping[str, Any] | None = None
        self._figures: Figures | None = None
        self._threads = threading.local()
        self._lanes = LanePool(self._make_lane)

    # --- the contract

    def open(self, device: str | None, processor: Processor) -> None:
        if reason := self.available(device):
            raise BackendUnavailable(reason)
        if not isinstance(processor, ArrayProcessor):
            raise BackendUnavailable(
                f"{self.name} runs ArrayProcessors; {processor_name(processor)} is a FrameProcessor, which takes bytes"
            )
        try:
            self._library = self._take(device)
            self._library.use()
            self._up, self._compute, self._down = self._stream(), self._stream(), self._stream()
            self._canary = Canary(self._stream(urgent=True), self._empty(16), self._event())
        except (RuntimeError, MemoryError) as error:  # what the libraries raise for the driver's refusals
            raise BackendUnavailable(
                f"{self.name} cannot open {device or 'cuda'} ({error}): look with nvidia-smi whether another process "
                "holds it or all of its memory, or its compute mode is exclusive"
            ) from error
        self._gpu_facts = self._gpu()
        if self._gpu_facts is not None:
            self._nvml_name = gpu_uuid(self._gpu_facts["index"])
            self._nvml = Meter(self._nvml_name)
        self._enter()
        kernel_facts = self._welcome(processor)
        self._known = {**self._facts(), **kernel_facts}
        try:
            self._compute.synchronize()
            self._beat(self._canary)  # CUDA loads code when it is first used, and may wait for batches then
            figures = self._look()
        except Exception as error:  # nothing but the device itself fails here
            raise self._lose(error) from error
        if figures:
            self._figures = Figures(self._look, figures)

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

    def probe(self) -> None:
        """A small write on a stream of its own, and the wait for it: the caller's deadline says whether the device is
        still there. Any thread, one at a time; no lane and no other stream is touched."""
        if self._lost:
            raise DeviceLost(self._lost)
        canary = self._canary
        if canary is None:  # not open yet, or closed
            return
        try:
            self._enter()
            self._beat(canary)
        except Exception as error:  # nothing but the device itself fails here
            raise self._lose(error) from error

    def info(self) -> Mapping[str, Any]:
        figures = self._figures.latest if self._figures else {}
        return {**self._known, **figures, "degraded": list(self._degraded)}

    def close(self) -> None:
        try:
            if self._canary is not None:  # it was open
                self._rest()
            if self._processor is not None:
                with self._on_compute():
                    self._processor.teardown()
        finally:
            self._processor = self._canary = None
            if self._figures is not None:
                self._figures.close()
            self._lanes.drop()

    # --- inside

    def _enter(self) -> None:
        """First thing on whichever thread calls the device: it is the thread's current one, and a graph that a
        processor captures on another thread is none of this one's business."""
        self._library.use()
        if self._gpu_facts is not None and not getattr(self._threads, "entered", False):
            self._threads.entered = True
            ignore_captures()

    def _beat(self, canary: Canary) -> None:
        self._clear(canary.memory, canary.stream)
        canary.done.record(canary.stream)
        canary.done.synchronize()

    def _copy_in(self, batch: Batch, lane: Lane) -> None:
        slab, at = slab_of(batch.arena), 0
        lane.marks[0].record(self._up)
        for first, count in _pieces(batch):
            nbytes = count * lane.nbytes
            self._upload(lane.frames, at, slab, first * lane.nbytes, nbytes, self._up)
            at += nbytes
        lane.marks[1].record(self._up)
        self._compute.wait_event(lane.marks[1])

    def _process(self, batch: Batch, lane: Lane, processor: ArrayProcessor) -> Any:
        """Enqueue the processor's work; returns the lane's array that will hold the result."""
        with self._on_compute():
            lane.marks[2].record(self._compute)
            frames = self._frames(lane.frames, len(batch.slots), batch.spec.shape)
            result = self._result(processor, frames, batch.params)
            output = lane.frames
            if result is not frames:
                # An array of the processor's own is copied, on the device: it may be a view in any order, or one
                # that the processor writes again while this batch still waits for its download.
                if lane.result is None:
                    lane.result = self._allocate(lane.bucket * lane.nbytes)
                output = lane.result
                self._assign(self._frames(output, len(frames), batch.spec.shape), result)
            lane.marks[3].record(self._compute)
        return output

    def _copy_out(self, batch: Batch, lane: Lane, output: Any) -> None:
        slab, at = slab_of(batch.arena), 0
        self._down.wait_event(lane.marks[3])
        lane.marks[4].record(self._down)
        for first, count in _pieces(batch):
            nbytes = count * lane.nbytes
            self._download(slab, first * lane.nbytes, output, at, nbytes, self._down)
            at += nbytes
        lane.marks[5].record(self._down)

    def _look(self) -> Mapping[str, Any]:
        """``gpu_info`` and ``gpu_stats`` by index, nothing on a CPU. Whoever asks for ``info`` gets what was read last,
        and never waits for a device that hangs."""
        if self._gpu_facts is None:
            return {}
        self._enter()
        index, name, major, minor = (self._gpu_facts[key] for key in ("index", "name", "major", "minor"))
        free, total = self._memory()
        compute, memory = self._nvml.read()
        both = {"id": self._nvml_name, "name": name, "memory_total": total, "memory_free": free}
        return {
            "gpu_info": {str(index): {**both, "major": major, "minor": minor}},
            "gpu_stats": {str(index): {**both, "utilization_compute": compute, "utilization_memory": memory}},
        }

    def _allocate(self, nbytes: int) -> Any:
        """Device memory, at the cost of idle lanes if there is no other."""
        try:
            return self._empty(nbytes)
        except Exception as error:  # each library has an out-of-memory error of its own; others go on
            if not self._ran_out(error):
                raise
        self._free_idle()
        return self._empty(nbytes)

    def _make_lane(self, nbytes: int, bucket: int) -> Lane:
        return Lane(nbytes, bucket, self._allocate(nbytes * bucket), tuple(self._event() for _ in range(6)))

    def _take_lane(self, batch: Batch) -> Lane:
        try:
            return self._lanes.take(batch.arena.nbytes, len(batch.slots))
        except Exception as error:  # the library's: memory, or the device itself
            raise (self._out_of_memory if self._ran_out(error) else self._lose)(error) from error

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
        if self._ran_out(error):
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
        for library in self._libraries():
            library.free_cached()

    def _rest(self) -> None:
        """Wait for copies that nobody waits for any more: memory that they still use does not go back. A device that
        cannot be waited for is lost, and writes nowhere."""
        try:
            self._enter()
            self._up.synchronize()
            self._down.synchronize()  # which waits for the processor
        except Exception as error:  # nothing but the device itself fails here
            if not self._lost:
                self._lose(error)

    def _arena_closed(self, arena: SlabArena) -> None:
        self._rest()
        self._lanes.drop(arena.nbytes)


class Flight:
    """A batch on its way."""

    def __init__(self, backend: DeviceBackend, lane: Lane) -> None:
        self._backend = backend
        self._lane = lane

    def wait(self) -> BatchTimes:
        backend, marks = self._backend, self._lane.marks
        try:
            backend._enter()  # this may be a thread of its own
            marks[5].synchronize()
            copied_in, computed, copied_out = (
                max(0, round(backend._elapsed_ns(marks[i], marks[i + 1]))) for i in (0, 2, 4)
            )
        except Exception as error:  # what a device reports after the fact leaves it unusable
            raise backend._lose(error) from error
        backend._lanes.give(self._lane)
        return BatchTimes(compute_ns=computed, copy_ns=copied_in + copied_out)


def _pieces(batch: Batch) -> list[tuple[int, int]]:
    """(first slot, how many) of each copy, in the order of the slots."""
    return runs(tuple(sorted(batch.slots)))


def _forget_arrays(error: BaseException | None) -> None:
    """Clear the local variables that ``error``'s tracebacks hold: a processor's arrays, which fill the device."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
