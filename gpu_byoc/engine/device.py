"""The device thread: the one thread that calls the backend.

Its loop: whenever the device has room, take the next batch and put it on its way. Batches land in the order they
started, so every stream's frames leave in order; where a backend has several on their way, a second thread waits for
the oldest, so that this one stays free to start the next. What fails is tried again in halves, down to the item that
causes it, before anything later lands; out of memory it is tried once more even then.

Giving up may be done by any thread, above all by those of ``watch`` while this one is stuck: then nothing that comes
back from the device later is delivered to anybody.
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

from gpu_byoc.backend import Backend, BatchTimes, Pinning, Probing, Submission
from gpu_byoc.core.batching import Item
from gpu_byoc.core.vigil import Stuck
from gpu_byoc.engine.watch import Watch
from gpu_byoc.errors import (
    BackendUnavailable,
    DeviceLost,
    DeviceOutOfMemory,
    GpuByocError,
    ProcessorFailed,
    ProcessorSpoiled,
    ProcessorTimeout,
    said_by,
)
from gpu_byoc.processor import processor_name

if TYPE_CHECKING:
    from gpu_byoc.engine.engine import Engine, Lease

log = logging.getLogger("gpu_byoc.engine")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a submitted lease ended. ``error`` None: its views hold the result.

    ``queue_ns`` is the wait until the attempt that succeeded, ``compute_ns`` and ``copy_ns`` this lease's share of
    the batch's device time, ``batch`` the number of frames that shared it, ``device`` where.
    """

    error: GpuByocError | None
    queue_ns: int = 0
    compute_ns: int = 0
    copy_ns: int = 0
    batch: int = 0
    device: str = ""


@dataclass(frozen=True, slots=True)
class Vitals:
    """Signs of life of one device, as ages in seconds. ``canary``: since it last answered a probe; None where there is
    none, or none yet. ``batch``: since a batch last ended, well or not; None before the first. ``under_way``: since the
    oldest batch on the device was started; 0 where there is none."""

    canary: float | None
    batch: float | None
    under_way: float


@dataclass(slots=True, eq=False)
class _Flight:
    """A batch on its way. Without ``result`` it is still to be submitted; an exception there lands in its turn.
    ``number`` counts submissions, 0 before; ``landing``: it is being delivered, and no longer to be given up."""

    items: list[Item[Lease]]
    repeated: bool = False  # tried a second time as it is
    number: int = 0
    began: int = 0
    result: Submission | BaseException | None = None
    landing: bool = False


class Device:
    """Owned by one engine; shares its lock."""

    def __init__(self, engine: Engine, device: str | None) -> None:
        backend, config = engine.backend, engine.config
        self._engine = engine
        self._lock = engine.lock
        self._wanted = device
        name = f"gpu-byoc-{backend.name}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._lander = threading.Thread(
            target=self._guarded, args=(self._landing,), name=f"{name}-landing", daemon=True
        )
        self._ready: Future[None] = Future()
        self._flying: deque[_Flight] = deque()  # under the lock, oldest first; out of it only when it has landed
        self._over = False
        self._logged: set[str] = set()
        self._submitted = self._landed = self._called = 0
        self._calling: int | None = None  # a job of ``todo`` that this thread is in: below 0, unlike a batch's number
        self._landed_at: int | None = None
        self._watch = Watch(
            name,
            backend.probe if isinstance(backend, Probing) else None,
            config.device_timeout,
            config.processor_timeout or 0.0,
            self._look,
            self._stuck,
            self.give_up,
        )
        self.depth = 1
        self.todo: deque[Callable[[], None]] = deque()  # under the lock; run on this thread, in order
        self.fatal: GpuByocError | None = None  # once set, nothing is started or delivered any more

    def begin(self) -> Future[None]:
        self._ready.set_running_or_notify_cancel()  # whoever stops waiting for it does not stop the start
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads, in a container with a low limit
            self._ready.set_exception(error)
        return self._ready

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def busy(self) -> bool:
        return bool(self._flying)

    def join(self, timeout: float | None) -> bool:
        """True when the thread has ended, False where it is one of ours that asks."""
        ours = (self._thread, self._lander, *self._watch.threads)
        if self._thread.ident is not None and threading.current_thread() not in ours:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def vitals(self) -> Vitals:
        with self._lock:
            oldest = self._flying[0].began if self._flying else 0
            landed, answered, now = self._landed_at, self._watch.answered, time.monotonic_ns()
        return Vitals(
            canary=None if answered is None else time.monotonic() - answered,
            batch=None if landed is None else (now - landed) / 1e9,
            under_way=(now - oldest) / 1e9 if oldest else 0.0,
        )

    # --- the device thread

    def _run(self) -> None:
        try:
            try:
                self._open(self._engine.backend)
            except BaseException as error:  # whoever waits for the start gets it, whatever it is
                self._ready.set_exception(error)
            else:
                self._ready.set_result(None)
                self._guarded(self._work)
        finally:
            self._close()

    def _open(self, backend: Backend) -> None:
        config = self._engine.config
        backend.open(self._wanted, self._engine.processor)
        if config.require_pinned:
            _require_pinned(backend)
        if self._engine.first is not None:
            self._engine.first(backend, self._engine.processor)
        self.depth = backend.depth if config.depth is None else min(backend.depth, config.depth)
        if self.depth > 1:
            self._lander.start()
        self._watch.start()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except DeviceLost as error:
            self.give_up(error)
        except BaseException as error:
            # A bug of ours or of the backend: nobody may be left waiting for a thread that is gone.
            log.critical("the device thread failed", exc_info=error)
            self.give_up(DeviceLost(f"the device thread failed: {type(error).__name__}: {said_by(error)}"))

    def _work(self) -> None:
        while (task := self._next()) is not None:
            if isinstance(task, _Flight):
                self._submit(task)
                if self.depth == 1:
                    self._land(task)
            else:
                self._called += 1
                self._calling = -self._called
                task()
                self._calling = None

    def _next(self) -> _Flight | Callable[[], None] | None:
        """What to do now: a job of ``todo``, half a failed batch, or the next batch; None when all is done."""
        engine, batcher = self._engine, self._engine.batcher
        with self._lock:
            while self.fatal is None:
                if self.todo:
                    return self.todo.popleft()
                for flight in self._flying:
                    if flight.result is None:
                        return flight
                now = time.monotonic_ns()
                if len(self._flying) < self.depth:
                    # A closing engine waits for nobody: due or not, everything leaves now.
                    items = batcher.take(now, drain=engine.closing)
                    if items:
                        engine.started(items)
                        flight = _Flight(items)
                        self._flying.append(flight)
                        return flight
                    if engine.closing and not self._flying:
                        return None
                due = batcher.due(now) if len(self._flying) < self.depth else None
                self._lock.wait(None if due is None else max(0, due - now) / 1e9)
        return None

    def _submit(self, flight: _Flight) -> None:
        """A failure to submit lands in its turn, like a failure of the work itself."""
        batch = self._engine.batch_of([item.value for item in flight.items])
        self._submitted += 1
        flight.began, flight.number = time.monotonic_ns(), self._submitted
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
                    if self._over or self.fatal is not None:
                        return
                    self._lock.wait()
                flight = self._flying[0]
            self._land(flight)

    def _land(self, flight: _Flight) -> None:
        """Wait for the oldest batch and deliver it. It leaves ``_flying`` only then, so that giving up finds it."""
        assert flight.result is not None
        cause: BaseException | None = None
        try:
            if isinstance(flight.result, BaseException):
                raise flight.result
            times = flight.result.wait()
        except DeviceLost:
            raise
        except BaseException as error:  # the processor's own exception, whatever it is
            cause, times = error, BatchTimes(0)
        if not self._claim(flight):
            return
        try:
            again = self._deliver(flight, times) if cause is None else self._failed(flight, cause)
        except BaseException as bug:  # of ours: those who have not been told yet are told that
            self._fail_all([flight], DeviceLost(f"the device thread failed: {type(bug).__name__}: {said_by(bug)}"))
            raise
        self._make_way(again)

    def _claim(self, flight: _Flight) -> bool:
        """It is to be delivered. False: it was given up meanwhile, and its owners have been told."""
        with self._lock:
            flight.landing = self.fatal is None
            return flight.landing

    def _make_way(self, again: list[_Flight]) -> None:
        """The oldest batch has landed; what of it is tried again comes next."""
        with self._lock:
            self._engine.settle()
            self._landed += 1
            self._landed_at = time.monotonic_ns()
            fatal = self.fatal
            if fatal is None:
                self._flying.popleft()
                self._flying.extendleft(reversed(again))
                self._engine.batcher.left["retry"] += len(again)
            if self.depth > 1:
                self._lock.notify_all()
        if fatal is not None:
            self._fail_all(again, fatal)

    def _deliver(self, flight: _Flight, times: BatchTimes) -> list[_Flight]:
        engine = self._engine
        outcomes = engine.book(flight.items, flight.began, times.compute_ns, times.copy_ns)
        for item, outcome in zip(flight.items, outcomes, strict=True):
            engine.finish(item.value, outcome)
        return []

    def _failed(self, flight: _Flight, cause: BaseException) -> list[_Flight]:
        """What is to be tried again; who is not in it has been told."""
        items, middle = flight.items, len(flight.items) // 2
        memory = isinstance(cause, DeviceOutOfMemory)
        if memory:
            self._engine.overran(items)
        if not isinstance(cause, ProcessorSpoiled):
            if middle:
                return [_Flight(items[:middle]), _Flight(items[middle:])]
            if memory and not flight.repeated:  # the backend has freed what it could
                return [_Flight(items, repeated=True)]
        for item in items:
            error = item.value.context.run(self._typed, cause)  # what is logged says whose frame it was
            self._engine.finish(item.value, Outcome(error))
        return []

    # --- failure

    def _typed(self, cause: BaseException) -> GpuByocError:
        if isinstance(cause, GpuByocError):
            return cause.again()
        name, kind = processor_name(self._engine.processor), type(cause).__name__
        if kind not in self._logged:  # the first of its kind with its traceback; the rest are counted
            self._logged.add(kind)
            log.error("%s raised %s; later ones are counted only", name, kind, exc_info=cause)
        error = ProcessorFailed(f"{name} raised {kind}: {said_by(cause)}")
        error.__cause__ = cause
        return error

    def _look(self) -> tuple[int | None, int]:
        with self._lock:
            oldest = self._flying[0].number if self._flying else 0
            return oldest or self._calling, self._landed

    def _stuck(self, what: Stuck) -> None:
        config, device = self._engine.config, self._engine.backend.device
        if what is Stuck.DEVICE:
            self.give_up(
                DeviceLost(
                    f"{device} has given no sign of life for {config.device_timeout:g} s (--device-timeout): "
                    "restart the worker; look for NVRM Xid lines in the host's kernel log"
                )
            )
        elif (self._look()[0] or 0) < 0:
            self.give_up(
                DeviceLost(
                    f"host memory for {device} has neither been made nor given back for {config.processor_timeout:g} s "
                    "(--processor-timeout): restart the worker, with fewer --slots if it happens again"
                )
            )
        else:
            self.give_up(
                ProcessorTimeout(
                    f"{processor_name(self._engine.processor)} has not come back for {config.processor_timeout:g} s "
                    "(--processor-timeout) and cannot be stopped: the worker has to be restarted"
                )
            )

    def give_up(self, error: GpuByocError) -> None:
        """Only a restart helps: fail everything and say so once. Callable from any thread."""
        engine = self._engine
        with self._lock:
            if self.fatal is not None:
                return
            self.fatal = error
            lost = [flight for flight in self._flying if not flight.landing]
            self._flying.clear()
        log.critical("the process must be restarted: %s", error)
        engine.expel(error, queued=True)
        self._fail_all(lost, error)
        if engine.on_fatal is not None:
            engine.on_fatal(error)

    def _fail_all(self, flights: list[_Flight], error: GpuByocError) -> None:
        for flight in flights:
            for item in flight.items:
                self._engine.finish(item.value, Outcome(error.again()))

    def _close(self) -> None:
        with self._lock:
            self._over = True
            self._lock.notify_all()
        if self._lander.ident is not None:
            self._lander.join()
        if not self._watch.stop():
            log.error("%s is not closed: its canary has not come back", self._engine.backend.name)
            return
        try:
            try:
                self._engine.close_arenas()
            finally:
                self._engine.backend.close()
        except Exception:  # the processor's shutdown is user code; the rest of ours goes on
            log.exception("%s failed to shut down", processor_name(self._engine.processor))


def _require_pinned(backend: Backend) -> None:
    """Try it once, so that a host that cannot pin at all is found out at the start. Raises BackendUnavailable."""
    if isinstance(backend, Pinning):
        backend.require_pinned = True
        backend.arena(4096, 1).close()
    elif backend.device != "cpu":
        raise BackendUnavailable(f"--require-pinned: backend {backend.name} does not say whether it can pin memory")
