"""The backend of a FrameProcessor: the user's coroutines on an event loop and a thread of their own."""

from __future__ import annotations

import asyncio
import mmap
import threading
import time
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from typing import Any

from gpu_byoc.backend import Batch, BatchTimes
from gpu_byoc.errors import BackendUnavailable, ProcessorOutput
from gpu_byoc.processor import FrameProcessor, Processor, processor_name


class HostArena:
    """Anonymous pages for all slots: nothing is resident before it is used."""

    pinned = False

    def __init__(self, nbytes: int, slots: int) -> None:
        self.nbytes = nbytes
        self.slots = slots
        self._bytes = memoryview(mmap.mmap(-1, nbytes * slots))

    def view(self, first: int, count: int = 1) -> memoryview:
        return self._bytes[first * self.nbytes : (first + count) * self.nbytes]

    def close(self) -> None:
        self._bytes.release()  # the pages go with the last view


class _Running:
    def __init__(self, future: Future[BatchTimes]) -> None:
        self._future = future

    def wait(self) -> BatchTimes:
        return self._future.result()


class HostBackend:
    """Calls ``process`` frame by frame. ``compute_ns`` is the time those calls took by the clock.

    The loop runs from ``open`` to ``close``, so tasks and connections that ``initialize`` starts stay alive.
    """

    name = "host"
    device = "cpu"
    depth = 1
    batches = False

    def __init__(self) -> None:
        self._processor: FrameProcessor | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @classmethod
    def available(cls, device: str | None) -> str | None:
        return None

    def open(self, device: str | None, processor: Processor) -> None:
        if not isinstance(processor, FrameProcessor):
            raise BackendUnavailable(f"{processor_name(processor)} is not a FrameProcessor")
        self._processor = processor
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gpu-byoc-processor", daemon=True)
        self._thread.start()
        self._call(processor.initialize()).result()

    def arena(self, nbytes: int, slots: int) -> HostArena:
        return HostArena(nbytes, slots)

    def submit(self, batch: Batch) -> _Running:
        assert self._processor is not None, "open comes first"
        return _Running(self._call(_process(self._processor, batch)))

    def info(self) -> Mapping[str, Any]:
        return {"degraded": []}

    def close(self) -> None:
        if self._loop is None or self._thread is None or self._processor is None:
            return
        try:
            self._call(self._processor.shutdown()).result()
        finally:
            self._call(_cancel_others()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._loop = self._thread = self._processor = None

    def _call(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        assert self._loop is not None, "open comes first"
        return asyncio.run_coroutine_threadsafe(_no_exit(coroutine), self._loop)


async def _no_exit(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """``sys.exit()`` in a processor fails that call; let through, it would end the loop and leave callers waiting."""
    try:
        return await coroutine
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"the processor raised {error!r}") from error


async def _process(processor: FrameProcessor, batch: Batch) -> BatchTimes:
    started = time.perf_counter_ns()
    size = batch.arena.nbytes
    results = []
    for slot in batch.slots:
        result: Any = await processor.process(bytes(batch.arena.view(slot)))
        if not isinstance(result, bytes | bytearray | memoryview):
            raise ProcessorOutput(f"{processor_name(processor)} returned {type(result).__name__} instead of bytes")
        length = memoryview(result).nbytes
        if length != size:
            raise ProcessorOutput(f"{processor_name(processor)} returned {length} bytes for a frame of {size} bytes")
        results.append(result)
    spent = time.perf_counter_ns() - started
    for slot, result in zip(batch.slots, results, strict=True):
        batch.arena.view(slot)[:] = memoryview(result).cast("B")
    return BatchTimes(compute_ns=spent)


async def _cancel_others() -> None:
    """End what the processor left running, as ``asyncio.run`` would."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
