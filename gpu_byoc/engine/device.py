"""The device thread: the one thread that calls the backend.

Its loop: whenever the device has room, take the next batch and put it on its way. Batches land in the order they
started, so every stream's frames leave in order; where a backend has several on their way, a second thread waits for
the oldest, so that this one stays free to start the next. What fails is tried again in halves, down to the item that
causes it, before anything later lands.
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

from gpu_byoc.backend import BatchTimes, Submission
from gpu_byoc.core.batching import Item
from gpu_byoc.errors import DeviceLost, GpuByocError, ProcessorFailed, ProcessorSpoiled
from gpu_byoc.processor import processor_name

if TYPE_CHECKING:
    from gpu_byoc.engine.engine import Engine, Lease

log = logging.getLogger("gpu_byoc.engine")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a submitted lease ended. ``error`` None: its views hold the result.

    ``queue_ns`` is the wait until the attempt that succeeded, ``compute_ns`` and ``copy_ns`` this lease's share of
    the batch's device time, ``batch`` the number of frames that shared it.
    """

    error: GpuByocError | None
    queue_ns: int = 0
    compute_ns: int = 0
    copy_ns: int = 0
    batch: int = 0


@dataclass(slots=True, eq=False)
class _Flight:
    """A batch on its way. Without ``result`` it is still to be submitted; an exception there lands in its turn."""

    items: list[Item[Lease]]
    began: int = 0
    result: Submission | BaseException | None = None


class Device:
    """Owned by one engine; shares its lock."""

    def __init__(self, engine: Engine, device: str | None) -> None:
        self._engine = engine
        self._lock = engine.lock
        self._wanted = device
        self._thread = threading.Thread(target=self._run, name=f"gpu-byoc-{engine.backend.name}", daemon=True)
        self._ready: Future[None] = Future()
        self._flying: deque[_Flight] = deque()  # under the lock, oldest first; out of it only when it has landed
        self._over = False
        self._lost: BaseException | None = None  # found by the landing thread, raised by the device thread
        self._logged: set[str] = set()
        self.depth = 1
        self.todo: deque[Callable[[], None]] = deque()  # under the lock; run on this thread, in order
        self.fatal: GpuByocError | None = None

    def begin(self) -> Future[None]:
        self._ready.set_running_or_notify_cancel()  # whoever stops waiting for it does not stop the start
        self._thread.start()
        return self._ready

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def busy(self) -> bool:
        return bool(self._flying)

    def join(self, timeout: float | None) -> bool:
        """True when the thread has ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    # --- the device thread

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
            self._serve()
        finally:
            self._close()

    def _serve(self) -> None:
        landing = threading.Thread(target=self._landing, name=f"{self._thread.name}-landing", daemon=True)
        if self.depth > 1:
            landing.start()
        try:
            self._work()
        except DeviceLost as error:
            self._give_up(error)
        except BaseException as error:
            # A bug of ours or of the backend: nobody may be left waiting for a thread that is gone.
            log.critical("the device thread failed", exc_info=error)
            self._give_up(DeviceLost(f"the device thread failed: {error!r}"))
        finally:
            with self._lock:
                self._over = True
                self._lock.notify_all()
            if self.depth > 1:
                landing.join()

    def _work(self) -> None:
        while (task := self._next()) is not None:
            if isinstance(task, _Flight):
                self._submit(task)
                if self.depth == 1:
                    self._land()
            else:
                task()

    def _next(self) -> _Flight | Callable[[], None] | None:
        """What to do now: a job of ``todo``, half a failed batch, or the next batch; None when all is done."""
        engine, batcher = self._engine, self._engine.batcher
        with self._lock:
            while True:
                if self._lost is not None:
                    raise self._lost
                if self.todo:
                    return self.todo.popleft()
                for flight in self._flying:
                    if flight.result is None:
                        return flight
                now = time.monotonic_ns()
                if len(self._flying) < self.depth:
                    # A closing engine waits for nobody: due or not, everything leaves now.
                    items = batcher.take(now + batcher.max_wait if engine.closing else now)
                    if items:
                        engine.started(items)
                        flight = _Flight(items)
                        self._flying.append(flight)
                        return flight
                    if engine.closing and not self._flying:
                        return None
                due = batcher.due(now) if len(self._flying) < self.depth else None
                self._lock.wait(None if due is None else max(0, due - now) / 1e9)

    def _submit(self, flight: _Flight) -> None:
        """A failure to submit lands in its turn, like a failure of the work itself."""
        batch = self._engine.batch_of([item.value for item in flight.items])
        flight.began = time.monotonic_ns()
        try:
            result: Submission | BaseException = self._engine.backend.submit(batch)
        except DeviceLost:
            raise
        except BaseException as error:  # the processor's own exception, whatever it is
            result = error
        with self._lock:
            flight.result = result
            if self.depth > 1:
                self._lock.notify_all()

    # --- landing: on the device thread, or on the landing thread where the backend goes on meanwhile

    def _landing(self) -> None:
        while True:
            with self._lock:
                while not (self._flying and self._flying[0].result is not None):
                    if self._over:
                        return
                    self._lock.wait()
            try:
                self._land()
            except BaseException as error:  # the device thread raises it, and gives up
                with self._lock:
                    self._lost = error
                    self._lock.notify_all()
                return

    def _land(self) -> None:
        """Wait for the oldest batch and deliver it. It leaves ``_flying`` only then, so that giving up finds it."""
        flight, engine = self._flying[0], self._engine
        halves: list[_Flight] = []
        assert flight.result is not None
        try:
            if isinstance(flight.result, BaseException):
                raise flight.result
            times: BatchTimes = flight.result.wait()
        except DeviceLost:
            raise
        except BaseException as cause:  # the processor's own exception, whatever it is
            items, middle = flight.items, len(flight.items) // 2
            if middle and not isinstance(cause, ProcessorSpoiled):
                halves = [_Flight(items[:middle]), _Flight(items[middle:])]
            else:
                for item in items:
                    engine.finish(item.value, Outcome(self._typed(cause)))
        else:
            outcomes = engine.book(flight.items, flight.began, times.compute_ns, times.copy_ns)
            for item, outcome in zip(flight.items, outcomes, strict=True):
                engine.finish(item.value, outcome)
        with self._lock:
            self._flying.popleft()
            self._flying.extendleft(reversed(halves))
            if self.depth > 1:
                self._lock.notify_all()

    # --- failure

    def _typed(self, cause: BaseException) -> GpuByocError:
        if isinstance(cause, GpuByocError):
            return cause
        name, kind = processor_name(self._engine.processor), type(cause).__name__
        if kind not in self._logged:  # the first of its kind with its traceback; the rest are counted
            self._logged.add(kind)
            log.error("%s raised %s; later ones are counted only", name, kind, exc_info=cause)
        error = ProcessorFailed(f"{name} raised {kind}: {cause}")
        error.__cause__ = cause
        return error

    def _give_up(self, error: DeviceLost) -> None:
        """The device is gone: fail everything and say so once."""
        engine = self._engine
        log.critical("device lost, the process must be restarted: %s", error)
        self.fatal = error
        engine.expel(error, queued=True)
        with self._lock:
            items = [item for flight in self._flying for item in flight.items]
            self._flying.clear()
        for item in items:
            engine.finish(item.value, Outcome(error.again()))
        if engine.on_fatal is not None:
            engine.on_fatal(error)

    def _close(self) -> None:
        self._engine.close_arenas()
        try:
            self._engine.backend.close()
        except Exception:  # the processor's shutdown is user code; the rest of ours goes on
            log.exception("%s failed to shut down", processor_name(self._engine.processor))
