"""The composition root: a processor becomes a serving process, and ends in the reverse order of its start."""

from __future__ import annotations

import asyncio
import logging
import signal
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from gpu_byoc.backend import Backend
from gpu_byoc.config import ServeConfig
from gpu_byoc.engine.engine import Engine
from gpu_byoc.engine.host import HostBackend
from gpu_byoc.errors import EXIT_DEVICE_LOST, BackendUnavailable, GpuByocError
from gpu_byoc.plugins import AUTO, load_backend
from gpu_byoc.processor import FrameProcessor, Processor
from gpu_byoc.transport.listen import bind, keep_freed_memory, port_of, serve
from gpu_byoc.worker.app import Worker
from gpu_byoc.worker.jobs import STREAM

log = logging.getLogger("gpu_byoc.worker")

DRAIN_SECONDS = 8.0
"""What a shutdown may take. Container runtimes kill ten seconds after SIGTERM by default."""

PAGE_FORMAT = "%(levelname)s: %(message)s"
"""How the quickstart page shows a worker's log."""

_overrides: dict[str, Any] = {}


def override(**changes: Any) -> None:
    """What ``gpu-byoc run`` was told on its command line, over what the file says in ``run_processor``."""
    _overrides.update(changes)


async def run_processor(processor: Processor, port: int = 8000, host: str = "0.0.0.0", **options: Any) -> None:
    """Serve ``processor`` until SIGTERM or SIGINT; the quickstart's entry point.

    ``options`` are fields of ``ServeConfig`` (``backend``, ``capability``, ``engine`` ...).

    Raises:
        OperatorError: it could not start; says what to do.
        SystemExit: the device was lost and only a restart helps.
    """
    _page_format()
    config = ServeConfig(host=host, port=port, **options)
    changes = dict(_overrides)
    if engine := changes.pop("engine", None):
        changes["engine"] = replace(config.engine, **engine)
    code = await run(replace(config, **changes), processor)
    if code:
        raise SystemExit(code)


async def run(config: ServeConfig, processor: Processor) -> int:
    """Serve until told to stop. Returns the exit status of the process."""
    keep_freed_memory()
    worker = Worker(config, processor)
    async with AsyncExitStack() as stack:
        stop = _Stop(stack)
        sock = bind(config.host, config.port)
        stack.callback(sock.close)
        runner = await serve(worker.app(), sock, shutdown=1.0)
        stack.push_async_callback(runner.cleanup)
        loading = asyncio.create_task(_load(worker, stack, stop))
        stack.push_async_callback(_ended, loading)
        await asyncio.wait([loading, stop.task], return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            log.info("Trickle server listening on port %d", port_of(sock))
            await stop.task
        await _drain(worker, stop)
    return stop.code


async def _load(worker: Worker, stack: AsyncExitStack, stop: _Stop) -> None:
    """Open the backend; the worker is ready when this returns."""
    engine = await open_engine(worker.config, worker.processor, worker.degraded)
    stack.push_async_callback(asyncio.to_thread, engine.close, timeout=1.0)
    loop = asyncio.get_running_loop()

    def fatal(error: GpuByocError) -> None:
        loop.call_soon_threadsafe(stop.now, EXIT_DEVICE_LOST)

    engine.on_fatal = fatal
    engine.open_stream(STREAM)
    worker.engine = engine


async def open_engine(config: ServeConfig, processor: Processor, degraded: list[str]) -> Engine:
    """An engine with the backend that ``config.backend`` names, started. ``degraded`` gets why it is not a better one.

    Raises:
        BackendUnavailable: the one that was asked for cannot open; with ``auto``, none can.
    """
    if isinstance(processor, FrameProcessor):
        return await _open(HostBackend(), config, processor)
    if config.backend != "auto":
        engine = await _open(load_backend(config.backend)(), config, processor)
        log.info("backend %s on %s, as asked for", engine.backend.name, engine.backend.device)
        return engine
    tried = []
    for name in AUTO:
        try:
            engine = await _open(load_backend(name)(), config, processor)
        except BackendUnavailable as error:
            tried.append(f"{name}: {error}")
            continue
        log.info("backend %s on %s%s", name, engine.backend.device, "".join(f"; not {reason}" for reason in tried))
        if tried:
            degraded.append(f"backend {name} instead of a better one: " + "; ".join(tried))
        return engine
    raise BackendUnavailable("no backend opens here: " + "; ".join(tried))


async def _open(backend: Backend, config: ServeConfig, processor: Processor) -> Engine:
    if reason := backend.available(config.device):
        raise BackendUnavailable(reason)
    engine = Engine(backend, processor, config.engine, config.device)
    try:
        await asyncio.wrap_future(engine.start())
    except BaseException:  # also a cancel: the thread is not left behind
        await asyncio.to_thread(engine.close, timeout=1.0)
        raise
    return engine


async def _drain(worker: Worker, stop: _Stop) -> None:
    """Refuse new work; jobs finish and live streams flush side by side, within the budget or until a second signal.
    What is left of the streams then is dropped."""
    worker.draining = True
    jobs, streams = worker.active, len(worker.streams)
    log.info("stopping: %d jobs and %d streams in the house", jobs, streams)
    if not worker.active:
        worker.quiet.set()
    flushing = asyncio.create_task(_flushed(worker))
    hurry = asyncio.create_task(stop.hurry.wait())
    await asyncio.wait([flushing, hurry], timeout=DRAIN_SECONDS - 2.5, return_when=asyncio.FIRST_COMPLETED)
    for task in (flushing, hurry):
        task.cancel()
    await asyncio.wait([flushing, hurry])
    left = len(worker.streams)
    await worker.streams.close(0)
    log.info("stopped: %d jobs unfinished, %d streams cut off", worker.active, left)


async def _flushed(worker: Worker) -> None:
    await asyncio.gather(worker.quiet.wait(), worker.streams.close(None))


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


class _Stop:
    """SIGTERM, SIGINT or a lost device. ``task`` ends with the first; a second signal sets ``hurry``."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.code = 0
        self.hurry = asyncio.Event()
        self._asked = asyncio.Event()
        self.task = asyncio.create_task(self._asked.wait())
        stack.callback(self.task.cancel)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.now)
            stack.callback(loop.remove_signal_handler, number)

    def now(self, code: int = 0) -> None:
        if self._asked.is_set():
            self.hurry.set()
        self.code = self.code or code
        self._asked.set()


def _page_format() -> None:
    """Show the log as the page does, where nobody has said how: no handler yet, or basicConfig's own default."""
    root = logging.getLogger()
    if not root.handlers:
        logging.basicConfig(level=logging.INFO, format=PAGE_FORMAT)
    for handler in root.handlers:
        formatter = handler.formatter
        if formatter is None or formatter._fmt == logging.BASIC_FORMAT:
            handler.setFormatter(logging.Formatter(PAGE_FORMAT))
