"""The backend of a FrameProcessor: the user's coroutines on an event loop and a thread of their own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from typing import Any

from gpu_byoc.backend import Batch, BatchTimes, HostArena
from gpu_byoc.errors import BackendUnavailable, ProcessorOutput, ProcessorTimeout
from gpu_byoc.processor import FrameProcessor, Processor, processor_name


class _Running:
    def __init__(self, future: Future[BatchTimes]) -> None:
        self._future = future

    def wait(self) -> BatchTimes:
        return self._future.result()


class HostBackend:
    """Calls ``process`` frame by frame. ``compute_ns`` is the time those calls took by the clock, ``copy_ns`` the rest.

    The loop runs from ``open`` to ``close``, so tasks and connections that ``initialize`` starts stay alive. What
    ``process`` awaits for longer than ``limit`` seconds (0: no limit) is cancelled and fails its job alone; code that
    holds the loop up cannot be cancelled, and is the engine's to notice.
    """

    name = "host"
    device = "cpu"
    depth = 1
    batches = False

    def __init__(self, limit: float = 0.0) -> None:
        self._limit = limit
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
        return _Running(self._call(_limited(self._processor, batch, self._limit)))

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


async def _limited(processor: FrameProcessor, batch: Batch, limit: float) -> BatchTimes:
    timeout = asyncio.timeout(limit or None)
    try:
        async with timeout:
            return await _process(processor, batch)
    except TimeoutError as error:
        if not timeout.expired():
            raise  # the processor's own
        raise ProcessorTimeout(
            f"{processor_name(processor)} took longer than {limit:g} s (--processor-timeout); the call was cancelled"
        ) from error


async def _process(processor: FrameProcessor, batch: Batch) -> BatchTimes:
    clock, copying, computing = time.perf_counter_ns, 0, 0
    size = batch.arena.nbytes
    results: list[memoryview] = []
    for slot in batch.slots:
        began = clock()
        frame = bytes(batch.arena.view(slot))
        copied = clock()
        result: Any = await processor.process(frame)
        copying, computing = copying + copied - began, computing + clock() - copied
        if not isinstance(result, bytes | bytearray | memoryview):
            raise ProcessorOutput(f"{processor_name(processor)} returned {type(result).__name__} instead of bytes")
        view = memoryview(result).cast("B")
        if view.nbytes != size:
            raise ProcessorOutput(
                f"{processor_name(processor)} returned {view.nbytes} bytes for a frame of {size} bytes"
            )
        results.append(view)
    began = clock()
    for slot, view in zip(batch.slots, results, strict=True):
        batch.arena.view(slot)[:] = view
    return BatchTimes(compute_ns=computing, copy_ns=copying + clock() - began)


async def _cancel_others() -> None:
    """End what the processor left running, as ``asyncio.run`` would."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
