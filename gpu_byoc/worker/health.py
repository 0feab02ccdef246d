"""Is the worker well, and may work be sent to it? ``GET /health`` and ``GET /ready``, answered from any thread.

``/health`` is for whoever restarts the worker: 503 only while waiting (LOADING) or a restart (ERROR) is the right
reaction. A worker that drains is well. ``/ready`` is for whoever routes work to it: 200 when what comes now is taken.
Whether an orchestrator has registered the worker is no part of it: an orchestrator may ask ``/ready`` before it
registers one, and who routes past it does not care. A full house is no part of it either: it changes with every job,
and each call that finds no room is answered with 503 and ``Retry-After``.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, urlsplit

from gpu_byoc.worker.hardware import backend_report

if TYPE_CHECKING:
    from gpu_byoc.worker.app import Worker

BEAT: Final = 0.25
"""Seconds between two signs of life of the event loop."""

LOOP_SECONDS: Final = 10.0
"""An event loop that was not seen for so long serves nobody any more; as long as a device may be silent."""


class Health:
    """``beat`` runs on the event loop; the rest is for any thread, and takes no lock that something else may hold."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._seen: float | None = None
        self._doubt: tuple[float | None, float] = (None, 0.0)  # a sign of life that was too old, and when that was seen

    async def beat(self) -> None:
        """Runs until it is cancelled. Without it the loop counts as well."""
        while True:
            self._seen = time.monotonic()
            await asyncio.sleep(BEAT)

    @property
    def lag(self) -> float:
        """Seconds by which the event loop is late."""
        seen = self._seen
        return 0.0 if seen is None else max(0.0, time.monotonic() - seen - BEAT)

    @property
    def stalled(self) -> bool:
        """Late, and still at a look a beat or more after the first one that found it so: a process that was stopped as
        a whole may be asked before its loop has had its turn."""
        seen, now = self._seen, time.monotonic()
        if self.lag <= LOOP_SECONDS:
            return False
        if self._doubt[0] != seen:
            self._doubt = (seen, now)
        return now - self._doubt[1] >= BEAT

    @property
    def state(self) -> str:
        return "ERROR" if self.stalled else self._worker.state

    @property
    def ready(self) -> bool:
        return self.state in ("IDLE", "OK") and not self._worker.draining

    def answer(self, target: str) -> tuple[int, bytes]:
        """For ``/health`` and ``/ready``, which the door asks."""
        return self.health() if target == "/health" else self.routing()

    def health(self) -> tuple[int, bytes]:
        """Exactly ``{"status": ...}``, as the network's own workers answer."""
        state = self.state
        return 503 if state in ("LOADING", "ERROR") else 200, json.dumps({"status": state}).encode()

    def routing(self) -> tuple[int, bytes]:
        reason = self.reason()
        body = {"ready": self.ready} | ({"reason": reason} if reason else {})
        return 200 if self.ready else 503, json.dumps(body).encode()

    def reason(self) -> str:
        """Why nothing is taken now; empty where it is."""
        worker, state = self._worker, self.state
        if state == "LOADING":
            return "the processor is still initialising"
        if self.stalled:
            return f"the event loop has not moved for {self.lag:.1f} s; a restart helps, the log may say why"
        if state == "ERROR":
            return str(worker.engine.fatal) if worker.engine and worker.engine.fatal else "the device thread has ended"
        return "the worker is shutting down" if worker.draining else ""

    def deep(self) -> tuple[int, bytes]:
        """``/health?deep=1``: the same status, and what it rests on. On the event loop; it looks into the engine."""
        worker, engine = self._worker, self._worker.engine
        report = backend_report(engine, worker.degraded)
        status, _ = self.health()
        found: dict[str, Any] = {
            "status": self.state,
            "ready": self.ready,
            "reason": self.reason() or None,
            "event_loop_late_seconds": self.lag,
            "draining": worker.draining,
            "connections": worker.door.inside if worker.door else None,
            "doorman": {"pid": worker.door.doorman, "deaths": worker.door.deaths} if worker.door else None,
            "active_jobs": worker.active,
            "collected_bytes": worker.budget.used,
            "waiting_frames": engine.waiting if engine else 0,
            "slots": engine.rooms() if engine else [],
            "streams": worker.streams.numbers(),
            "devices": report["devices"],
            "degraded": report["degraded"],
            "registration": worker.registration.report() if worker.registration else None,
        }
        return status, json.dumps(found).encode()


def is_deep(target: str) -> bool:
    """Whether ``?deep=`` asks for more, with anything but 0 and no."""
    value = parse_qs(urlsplit(target).query, keep_blank_values=True).get("deep", ["0"])[-1]
    return value.lower() not in ("0", "no", "false")
