"""The end of a worker, from the first word to the last: unregister, refuse new work, finish or flush what is in the
house, and say what became of it. All within a budget: a container runtime kills ten seconds after SIGTERM by default.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final

from gpu_byoc.core.session import State

if TYPE_CHECKING:
    from gpu_byoc.worker.app import Worker
    from gpu_byoc.worker.stream import LiveStream

log = logging.getLogger("gpu_byoc.worker")

TO_CLOSE: Final = 2.5
"""Seconds of the budget for what comes after the flush: the door has one, the engine one and whatever else is left."""

TO_SAY: Final = 1.5
"""Seconds before that at which a stream whose output takes nothing is given up, so that it can still say so."""


class Drain:
    """``run`` once; ``summary`` then, and at any time for whoever has to end the process in the middle of it."""

    def __init__(self, worker: Worker, seconds: float) -> None:
        self._worker = worker
        self._seconds = seconds
        self._unfinished: int | None = None  # jobs, when their time was up
        self._streams: dict[LiveStream, tuple[int, int]] = {}  # frames out and dropped when it began

    async def run(self, hurry: asyncio.Event) -> None:
        """Ends when the house is empty or the time is up; at once when ``hurry`` is set."""
        worker, loop = self._worker, asyncio.get_running_loop()
        cut = loop.time() + max(self._seconds - TO_CLOSE, 0.0)
        hurried = asyncio.create_task(hurry.wait())
        if worker.registration is not None:
            leaving = asyncio.create_task(worker.registration.leave())
            await asyncio.wait([leaving, hurried], return_when=asyncio.FIRST_COMPLETED)
            await ended(leaving)
        worker.draining = True
        self._streams = {stream: _counts(stream) for stream in worker.streams.running()}
        log.info("stopping: %d jobs and %d streams in the house", worker.active, len(self._streams))
        if not worker.active:
            worker.quiet.set()
        flushing = asyncio.create_task(self._flushed(max(cut - TO_SAY - loop.time(), 0.0)))
        await asyncio.wait([flushing, hurried], timeout=cut - loop.time(), return_when=asyncio.FIRST_COMPLETED)
        self._unfinished = worker.active
        await ended(flushing)
        await ended(hurried)
        cutting = asyncio.create_task(worker.streams.close(0))
        await asyncio.wait([cutting], timeout=TO_CLOSE / 5)
        await ended(cutting)

    def summary(self) -> str:
        """``stopped: 0 jobs unfinished, 1 streams cut off; stream a: 12 frames flushed, 3 dropped``."""
        cut = sum(stream.session.state is not State.ENDED for stream in self._streams)
        jobs = self._worker.active if self._unfinished is None else self._unfinished
        parts = [f"stopped: {jobs} jobs unfinished, {cut} streams cut off"]
        for stream, (out, dropped) in self._streams.items():
            now_out, now_dropped = _counts(stream)
            parts.append(f"stream {stream.name}: {now_out - out} frames flushed, {now_dropped - dropped} dropped")
        return "; ".join(parts)

    async def _flushed(self, seconds: float) -> None:
        await asyncio.gather(self._worker.quiet.wait(), self._worker.streams.close(None, seconds))


async def ended(task: asyncio.Task[Any]) -> None:
    """Cancel it, and wait until it is over."""
    task.cancel()
    await asyncio.wait([task])


def _counts(stream: LiveStream) -> tuple[int, int]:
    return stream.session.frames_out, stream.session.dropped.total()
