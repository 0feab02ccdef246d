"""The device thread: the one thread that calls the backend.

Its loop: whenever the device has room, take the next batch and put it on its way; otherwise wait for the oldest one
that is. Batches finish in the order they started, so every stream's frames leave in order. What fails is tried again
in halves, down to the item that causes it, before anything later is delivered.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpu_byoc.backend import Submission
from gpu_byoc.core.batching import Item
from gpu_byoc.errors import DeviceError, DeviceLost, GpuByocError, ProcessorFailed
from gpu_byoc.processor import processor_name

if TYPE_CHECKING:
    from gpu_byoc.engine.engine import Engine, Lease

log = logging.getLogger("gpu_byoc.engine")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a submitted lease ended. ``error`` None: its views hold the result.

    ``queue_ns`` is the wait for the device, ``compute_ns`` and ``copy_ns`` this lease's share of the batch's device
    time, ``batch`` the number of frames that shared it.
    """

    error: GpuByocError | None
    queue_ns: int = 0
    compute_ns: int = 0
    copy_ns: int = 0
    batch: int = 0


class Device:
    """Owned by one engine, which it calls back under the engine's lock or without it as each method there says."""

    def __init__(self, engine: Engine, device: str | None) -> None:
        self._engine = engine
        self._wanted = device
        self._thread = threading.Thread(target=self._run, name=f"gpu-byoc-{engine.backend.name}", daemon=True)
        self._ready: Future[None] = Future()
        self._flying: deque[tuple[list[Item[Lease]], int, Submission | BaseException]] = deque()
        self._logged: set[str] = set()
        self.depth = 1
        self.todo: deque[Callable[[], None]] = deque()  # under the engine's lock; run on this thread, in order
        self.fatal: GpuByocError | None = None

    def begin(self) -> Future[None]:
        self._thread.start()
        return self._ready

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout: float | None) -> bool:
        """True when the thread has ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        backend = self._engine.backend
        try:
            try:
                backend.open(self._wanted, self._engine.processor)
            except BaseException as error:  # whoever waits for the start gets it, whatever it is
                self._ready.set_exception(error)
                return
            self.depth = min(backend.depth, self._engine.config.depth)
            self._ready.set_result(None)
            try:
                self._work()
            except DeviceLost as error:
                self._give_up(error)
            except BaseException as error:
                # A bug of ours or of the backend: nobody may be left waiting for a thread that is gone.
                log.critical("the device thread failed", exc_info=error)
                self._give_up(DeviceLost(f"the device thread failed: {error!r}"))
        finally:
            self._close()

    def _close(self) -> None:
        try:
            self._engine.backend.close()
        except Exception:  # the processor's shutdown is user code; the rest of ours goes on
            log.exception("%s failed to shut down", processor_name(self._engine.processor))

    def _work(self) -> None:
        engine = self._engine
        while True:
            items: list[Item[Lease]] = []
            job: Callable[[], None] | None = None
            with engine.lock:
                while not job and not items:
                    if self.todo:
                        job = self.todo.popleft()
                        break
                    if len(self._flying) < self.depth:
                        now = time.monotonic_ns()
                        # A closing engine waits for nobody: due or not, everything leaves now.
                        items = engine.batcher.take(now + engine.batcher.max_wait if engine.closing else now)
                        if items:
                            engine.started(items)
                            break
                    if self._flying:
                        break
                    if engine.closing and not engine.batcher.waiting:
                        return
                    due = engine.batcher.due(now)
                    engine.lock.wait(None if due is None else max(0, due - now) / 1e9)
            if job:
                job()
            elif items:
                self._flying.append((items, time.monotonic_ns(), self._submit(items)))
            if self._flying and (len(self._flying) >= self.depth or not items):
                self._land(*self._flying.popleft())

    def _submit(self, items: list[Item[Lease]]) -> Submission | BaseException:
        """A failure to submit is delivered in its turn, like a failure of the work itself."""
        try:
            return self._engine.backend.submit(self._engine.batch_of([item.value for item in items]))
        except DeviceLost:
            self._flying.append((items, 0, DeviceLost("")))  # so that giving up finds them
            raise
        except Exception as error:  # the processor's own exception, whatever it is
            return error

    def _land(self, items: list[Item[Lease]], began: int, submission: Submission | BaseException) -> None:
        engine = self._engine
        try:
            if isinstance(submission, BaseException):
                raise submission
            times = submission.wait()
        except DeviceLost:
            self._flying.appendleft((items, began, submission))
            raise
        except Exception as cause:  # the processor's own exception, whatever it is
            if len(items) > 1:
                middle = len(items) // 2
                for half in (items[:middle], items[middle:]):
                    self._land(half, time.monotonic_ns(), self._submit(half))
            else:
                engine.finish(items[0].value, Outcome(self._typed(cause)))
            return
        for item, outcome in zip(items, engine.book(items, began, times.compute_ns, times.copy_ns), strict=True):
            engine.finish(item.value, outcome)

    def _typed(self, cause: Exception) -> GpuByocError:
        if isinstance(cause, GpuByocError):
            return cause
        name, kind = processor_name(self._engine.processor), type(cause).__name__
        if kind not in self._logged:  # the first of its kind with its traceback; the rest are counted
            self._logged.add(kind)
            log.error("%s raised %s; later ones are counted only", name, kind, exc_info=cause)
        error = ProcessorFailed(f"{name} raised {kind}: {cause}")
        error.__cause__ = cause
        return error

    def _give_up(self, error: DeviceError) -> None:
        """The device is gone: fail everything with the same typed error and say so once."""
        engine = self._engine
        log.critical("device lost, the process must be restarted: %s", error)
        self.fatal = error
        engine.expel(error, queued=True)
        while self._flying:
            for item in self._flying.popleft()[0]:
                engine.finish(item.value, Outcome(error))
        if engine.on_fatal is not None:
            engine.on_fatal(error)
