"""The composition root: a processor becomes a serving process, and ends in the reverse order of its start."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

from gpu_byoc import logs
from gpu_byoc.config import (
    SecurityConfig,
    ServeConfig,
    capability_name,
    log_format,
    otel_endpoint,
    read_registration,
    read_security,
)
from gpu_byoc.engine.fleet import Fleet
from gpu_byoc.errors import (
    EXIT_DEVICE_LOST,
    EXIT_STUCK,
    EXIT_USAGE,
    GpuByocError,
    OperatorError,
    ProcessorTimeout,
)
from gpu_byoc.processor import ArrayProcessor, Processor
from gpu_byoc.transport.door import Door
from gpu_byoc.transport.doorman import Bounds
from gpu_byoc.transport.listen import bind, keep_freed_memory, port_of
from gpu_byoc.worker.admin import Admin
from gpu_byoc.worker.app import Worker
from gpu_byoc.worker.devices import open_engine
from gpu_byoc.worker.drain import Drain, ended
from gpu_byoc.worker.limits import fitted, memory_limit
from gpu_byoc.worker.registration import Registration
from gpu_byoc.worker.tracing import Tracing

log = logging.getLogger("gpu_byoc.worker")

SWITCH_SECONDS = 0.001
"""How long a thread may keep the interpreter's lock while others wait for it; Python's own 5 ms. Where the processor is
a Python loop each step of ``/health`` waits that long: measured on two cores, 5.5 ms at the median and 30 ms at the
99th percentile with 5 ms, 1.4 and 5.6 ms with this. An ArrayProcessor's work is done without the lock: ``/health`` is
as fast with 5 ms, and jobs of 640x480 frames cost up to a tenth less CPU time where cores are short."""

_overrides: dict[str, Any] = {}
_has_run = False


def override(**changes: Any) -> None:
    """What ``gpu-byoc run`` was told on its command line, over what the file says in ``run_processor``."""
    _overrides.update(changes)


def has_run() -> bool:
    """Whether this process has come to run a processor, by ``run_processor``."""
    return _has_run


async def run_processor(processor: Processor, port: int = 8000, host: str = "0.0.0.0", **options: Any) -> None:
    """Serve ``processor`` until SIGTERM or SIGINT; the quickstart's entry point.

    ``options`` are fields of ``ServeConfig`` (``backend``, ``capability``, ``engine`` ...).

    Raises:
        SystemExit: EXIT_USAGE, it could not start as told; what to do is on stderr, as after a command.

    A lost device or a stuck processor ends the process, with EXIT_DEVICE_LOST or EXIT_STUCK: see ``leave``.
    """
    global _has_run
    _has_run = True
    try:
        code = await _run_processor(processor, port, host, options)
    except OperatorError as error:
        print(f"gpu-byoc: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE) from error
    if code:
        leave(code)


async def _run_processor(processor: Processor, port: int, host: str, options: dict[str, Any]) -> int:
    _page_format()
    config = ServeConfig(host=host, port=port, **options)
    changes = dict(_overrides)
    if config.registration is None and "registration" not in changes:
        changes["registration"] = read_registration({})
    if config.security == SecurityConfig() and "security" not in changes and (security := read_security({})):
        changes["security"] = security
    if not (config.capability or changes.get("capability")):
        changes["capability"] = capability_name()
    if not (config.otel_endpoint or changes.get("otel_endpoint")):
        changes["otel_endpoint"] = otel_endpoint()
    if engine := changes.pop("engine", None):
        changes["engine"] = replace(config.engine, **engine)
    if limits := changes.pop("limits", None):
        changes["limits"] = replace(config.limits, **limits)
    return await run(replace(config, **changes), processor)


def leave(code: int) -> NoReturn:
    """End the process of a lost device or a stuck thread, now: the interpreter's way out would run a driver's own
    cleaning up, which may wait for the device."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
            stream.flush()
    os._exit(code)


async def run(config: ServeConfig, processor: Processor) -> int:
    """Serve until told to stop. Returns the exit status of the process; what is not 0 is to be handed to ``leave``."""
    keep_freed_memory()
    if not isinstance(processor, ArrayProcessor):
        sys.setswitchinterval(SWITCH_SECONDS)
    config, lowered = fitted(config, memory_limit())
    worker = Worker(config, processor)
    if lowered:
        log.warning("the memory limit: %s", lowered)
    async with AsyncExitStack() as stack:
        stop = _Stop(stack)
        sock = bind(config.host, config.port)
        stack.callback(sock.close)
        if config.otel_endpoint:
            worker.tracing = Tracing(config)
            stack.push_async_callback(asyncio.to_thread, worker.tracing.close)
        if config.registration is not None:
            worker.registration = Registration(config, port_of(sock))
        lost = partial(stop.now, EXIT_DEVICE_LOST)
        limits = config.limits
        bounds = Bounds(limits.head_timeout, limits.max_head_kb << 10, limits.idle_timeout, limits.max_at_door)
        most, alone = config.max_connections, worker.degraded.append
        worker.door = Door(worker.app(), sock, worker.health.answer, most, 1.0, lost, bounds, alone)
        await worker.door.start()
        stack.push_async_callback(worker.door.close)
        if config.admin_port is not None:
            admin = Admin(config.admin_port, worker, stop.once)
            stack.push_async_callback(asyncio.to_thread, admin.close)
            log.info("admin port %d, for this machine only", admin.port)
        beating = asyncio.create_task(worker.health.beat())
        stack.push_async_callback(ended, beating)
        loading = asyncio.create_task(_load(worker, stack, stop))
        stack.push_async_callback(ended, loading)
        await asyncio.wait([loading, stop.task], return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            await worker.door.tell()  # who reads the next line, or takes our registration, may ask /health at once
            log.info("Trickle server listening on port %d", port_of(sock))
            if worker.registration is not None:
                registering = asyncio.create_task(worker.registration.run())
                registering.add_done_callback(_say_if_it_broke)
                stack.push_async_callback(ended, registering)
            await stop.task
        drain = Drain(worker, config.drain_seconds)
        stop.deadline = _deadline(drain, stop, config.drain_seconds)
        await drain.run(stop.hurry)
    code = stop.code or _leftover(worker)
    log.info(drain.summary())
    if worker.engine is None and any(thread.name.startswith("gpu-byoc-") for thread in threading.enumerate()):
        leave(code)  # a device that is still being opened, or a processor that still loads: whatever the status
    return code


async def _load(worker: Worker, stack: AsyncExitStack, stop: _Stop) -> None:
    """Open the backend; the worker is ready when this returns."""
    if worker.config.security.sandbox_decode:
        from gpu_byoc.media import sandbox  # loads media code, which a worker of jobs never needs

        worker.sandbox = await asyncio.to_thread(sandbox.check)
        missing = [f"{wall}: {why}" for wall, why in worker.sandbox.items() if why]
        worker.degraded += [f"decoding is less confined than it could be: {each}" for each in missing]
    engine = await open_engine(worker.config, worker.processor, worker.degraded)
    stack.push_async_callback(_close, engine, stop, worker.config.drain_seconds)
    loop = asyncio.get_running_loop()

    def fatal(error: GpuByocError) -> None:
        code = EXIT_STUCK if isinstance(error, ProcessorTimeout) else EXIT_DEVICE_LOST
        loop.call_soon_threadsafe(stop.now, code)

    worker.engine = engine
    engine.on_fatal(fatal)


async def _close(engine: Fleet, stop: _Stop, seconds: float) -> None:
    """The processor's ``shutdown`` or ``teardown`` has what is left of ``seconds`` less one for the door; one at least,
    and no more after a second signal, or where the device or the processor is what ends the process."""
    left = stop.asked_at + seconds - 1.0 - time.monotonic()
    if stop.code or stop.hurry.is_set() or left < 1.0:
        left = 1.0
    closing = asyncio.create_task(asyncio.to_thread(engine.close, timeout=left))
    hurried = asyncio.create_task(stop.hurry.wait())
    await asyncio.wait([closing, hurried], return_when=asyncio.FIRST_COMPLETED)
    await asyncio.wait([closing], timeout=1.0)
    await ended(hurried)
    if closing.done():
        closing.result()


def _deadline(drain: Drain, stop: _Stop, seconds: float) -> threading.Timer:
    """Ends the process when its time is up, whatever it is that does not end. Started."""

    def over() -> None:
        log.error("not stopped within %g s: something does not come back, most likely the processor", seconds)
        log.info(drain.summary())
        leave(stop.code or EXIT_STUCK)

    timer = threading.Timer(seconds, over)
    timer.daemon = True
    timer.start()
    return timer


def _leftover(worker: Worker) -> int:
    """EXIT_STUCK where a thread is still at work for a job or in the processor: Python's own way out would wait."""
    if worker.active or (worker.engine and any(engine.alive for engine in worker.engine.engines)):
        log.error("the processor, or a codec, is still at work on something; the process ends without it")
        return EXIT_STUCK
    return 0


def _say_if_it_broke(registering: asyncio.Task[None]) -> None:
    if not registering.cancelled() and (bug := registering.exception()) is not None:
        log.critical("this worker registers no more; it goes on serving", exc_info=bug)


class _Stop:
    """SIGTERM, SIGINT or a lost device. ``task`` ends with the first; a second signal sets ``hurry``. Made first, so
    that ``deadline`` holds until all of the stack is undone."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.deadline: threading.Timer | None = None
        stack.callback(self._in_time)
        self.code = 0
        self.hurry = asyncio.Event()
        self.asked_at = time.monotonic()
        self._asked = asyncio.Event()
        self.task = asyncio.create_task(self._asked.wait())
        stack.callback(self.task.cancel)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.now)
            stack.callback(loop.remove_signal_handler, number)

    def _in_time(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()

    def once(self) -> None:
        """As ``now``, and nothing where it has been said already."""
        if not self._asked.is_set():
            self.now()

    def now(self, code: int = 0) -> None:
        if self._asked.is_set() and not code:
            self.hurry.set()
        self.code = self.code or code
        if not self._asked.is_set():
            self.asked_at = time.monotonic()
            self._asked.set()


def _page_format() -> None:
    """Show the log as the page does, where nobody has said how: no handler yet, or basicConfig's own default."""
    shape = logs.formatter(log_format())
    root = logging.getLogger()
    if not root.handlers:
        logging.basicConfig(level=logging.INFO)
    for handler in root.handlers:
        formatter = handler.formatter
        if formatter is None or formatter._fmt == logging.BASIC_FORMAT:
            handler.setFormatter(shape)
