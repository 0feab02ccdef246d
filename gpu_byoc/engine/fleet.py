"""One engine per device, and what the worker sees of them: one door, one set of books.

A job goes to the least loaded device, each time anew; a live stream is placed on one when it starts and stays there,
because its frames have to leave in order. A device that is lost ends the process, and so all of them: which of its
neighbours is still good is for a restart to find out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any

from gpu_byoc.config import EngineConfig
from gpu_byoc.core.meter import Usage
from gpu_byoc.engine.engine import Engine, Lease, Ready
from gpu_byoc.errors import Draining, GpuByocError, Overloaded
from gpu_byoc.frames import FrameSpec


class Fleet:
    """At least one engine, all of one kind and with the same configuration. Any thread may call it."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = tuple(engines)
        self.refused = 0
        self._lock = threading.Lock()
        self._placed: dict[str, Engine] = {}  # live streams, under the lock

    # --- life

    def start(self) -> list[Future[None]]:
        """Open all devices at once; see ``Engine.start``."""
        return [engine.start() for engine in self.engines]

    def close(self, flush: bool = True, timeout: float | None = None) -> None:
        """As ``Engine.close``, for all side by side; ``timeout`` is for all together."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for engine in self.engines:
            engine.expel(Draining("the worker is shutting down; send the job elsewhere"), queued=not flush)
        for engine in self.engines:
            engine.close(flush, None if deadline is None else max(0.0, deadline - time.monotonic()))

    def on_fatal(self, tell: Callable[[GpuByocError], None]) -> None:
        """Have ``tell`` called when an engine gives up, on any thread; at once if one has already. It may be called
        more than once."""
        for engine in self.engines:
            engine.on_fatal = tell
            if engine.fatal is not None:
                tell(engine.fatal)

    @property
    def alive(self) -> bool:
        return all(engine.alive for engine in self.engines)

    @property
    def busy(self) -> bool:
        return any(engine.busy for engine in self.engines)

    @property
    def fatal(self) -> GpuByocError | None:
        return next((engine.fatal for engine in self.engines if engine.fatal is not None), None)

    @property
    def waiting(self) -> int:
        """Frames that wait for a device."""
        return sum(engine.batcher.waiting for engine in self.engines)

    @property
    def config(self) -> EngineConfig:
        return self.engines[0].config

    def now(self) -> int:
        return self.engines[0].now()

    # --- jobs

    def lease(self, spec: FrameSpec, frames: int, ready: Ready, client: Hashable = None) -> Lease:
        """Slots on the device that has them, or will have them soonest; see ``Engine.lease``."""
        engines: Sequence[Engine] = self.engines
        if len(engines) > 1:
            engines = sorted(engines, key=lambda engine: engine.pressure(spec.nbytes, frames))
        for engine in engines:
            try:
                return engine.lease(spec, frames, ready, client=client)
            except Overloaded as error:
                refusal = error
        self._count_refusal()
        raise refusal

    def refuse(self, message: str) -> Overloaded:
        """Count a lease that was given up in the line; returns the error to raise."""
        self._count_refusal()
        return Overloaded(message)

    def _count_refusal(self) -> None:
        with self._lock:
            self.refused += 1

    # --- live streams

    def open_stream(self, name: str) -> Engine:
        """Place a stream on the device with the fewest, or of those the least loaded. It leases its slots there, and
        ``end_stream`` is to be called when it is over. Names of streams that run at the same time differ."""
        pressures = {engine: engine.pressure(0, 0) for engine in self.engines} if len(self.engines) > 1 else {}
        with self._lock:
            placed = list(self._placed.values())
            engine = min(self.engines, key=lambda each: (placed.count(each), pressures.get(each, ())))
            self._placed[name] = engine
        engine.open_stream(name)
        return engine

    def streams_on(self, engine: Engine) -> int:
        with self._lock:
            return sum(each is engine for each in self._placed.values())

    def total(self, name: str) -> Usage:
        """What a stream that is running has used so far."""
        with self._lock:
            engine = self._placed.get(name)
        return engine.total(name) if engine else Usage()

    def end_stream(self, name: str) -> Usage:
        """A stream is over: its totals, which leave the table."""
        with self._lock:
            engine = self._placed.pop(name)
        return engine.end_stream(name)

    # --- the books

    def open_name(self, name: str) -> None:
        """Book ``name`` by itself from now on, on whichever device."""
        for engine in self.engines:
            engine.open_stream(name)

    def usage(self) -> tuple[list[tuple[int, str, Usage]], dict[str, Usage], Usage]:
        """(rows of the last minute, totals by name, the devices' own totals), of all devices together."""
        rows: dict[tuple[int, str], Usage] = {}
        totals: dict[str, Usage] = {}
        devices = Usage()
        for engine in self.engines:
            its_rows, its_totals, device = engine.usage()
            for second, name, usage in its_rows:
                rows.setdefault((second, name), Usage()).add(usage)
            for name, usage in its_totals.items():
                totals.setdefault(name, Usage()).add(usage)
            devices.add(device)
        return [(second, name, rows[second, name]) for second, name in sorted(rows)], totals, devices

    def named(self) -> list[tuple[str, Engine]]:
        """Every engine with the name of its device, told apart where one is used twice: ``cpu``, ``cpu#2``."""
        seen: dict[str, int] = {}
        named = []
        for engine in self.engines:
            device = engine.backend.device
            seen[device] = seen.get(device, 0) + 1
            named.append((device if seen[device] == 1 else f"{device}#{seen[device]}", engine))
        return named

    def rooms(self) -> list[dict[str, Any]]:
        """Slot use per device and frame size, for status and metrics."""
        return [{"device": device, **room} for device, engine in self.named() for room in engine.rooms()]
