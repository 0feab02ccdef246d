"""What the worker says about itself: state, status, compute rows, hardware, metrics."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gpu_byoc._version import VERSION
from gpu_byoc.core.meter import SECOND, Usage
from gpu_byoc.processor import processor_name

if TYPE_CHECKING:
    from gpu_byoc.worker.app import Worker

LATENCY_MS = (1, 2, 5, 10, 20, 33, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
"""Histogram bounds in milliseconds: around the field's own marks, 33 ms for 30 fps and 100 ms per frame."""


def seconds(nanoseconds: int) -> float:
    return nanoseconds / SECOND


def usage_row(usage: Usage) -> dict[str, Any]:
    return {
        "frames": usage.frames,
        "batches": usage.batches,
        "compute_seconds": seconds(usage.compute_ns),
        "copy_seconds": seconds(usage.copy_ns),
        "queue_seconds": seconds(usage.queue_ns),
    }


def compute_report(worker: Worker) -> dict[str, Any]:
    """``GET /compute``: the last minute second by second, and totals since the start. Seconds are Unix time."""
    rows, totals, device = worker.engine.usage() if worker.engine else ([], {}, Usage())
    return {
        "rows": [{"second": second, "name": name, **usage_row(usage)} for second, name, usage in rows],
        "totals": {name: usage_row(usage) for name, usage in totals.items()},
        "device": usage_row(device),
    }


def backend_report(worker: Worker) -> dict[str, Any]:
    """Which backend runs, on what, and what is not as it should be."""
    engine = worker.engine
    if engine is None:
        return {"name": None, "device": None, "degraded": []}
    info = dict(engine.backend.info())
    degraded = [*worker.degraded, *info.pop("degraded", [])]
    return {"name": engine.backend.name, "device": engine.backend.device, "degraded": degraded, **info}


def status(worker: Worker, stream: str | None = None) -> dict[str, Any]:
    """The status object: the keys the network's own workers answer with, then ours. With ``stream`` also that one's.

    Raises:
        BadRequest: no such stream is running.
    """
    one = {} if stream is None else {"stream": worker.streams.one(stream)}
    state = worker.state
    error = worker.engine.fatal if worker.engine else None
    rows, totals, device = worker.engine.usage() if worker.engine else ([], {}, Usage())
    last = worker.engine.now() // SECOND - 1 if worker.engine else None
    return {
        "status": state,
        "state": state,
        "error_message": str(error) if error else None,
        "pipeline_ready": worker.accepts,
        "active_streams": len(worker.streams),
        "startup_complete": worker.engine is not None,
        "pipeline_state": state,
        "additional_info": {"draining": worker.draining},
        "client_running": len(worker.streams) > 0,
        "client_active": worker.active + len(worker.streams) > 0,
        "active_jobs": worker.active,
        "uptime_seconds": time.monotonic() - worker.began,
        "processor": processor_name(worker.processor),
        "capability": worker.config.capability,
        "backend": backend_report(worker),
        "streams": worker.streams.numbers(),
        **one,
        "encoder": asdict(worker.streams.encoder) if worker.streams.encoder else None,
        "insecure": worker.config.insecure,
        "slots": worker.engine.rooms() if worker.engine else [],
        "waiting_frames": worker.engine.batcher.waiting if worker.engine else 0,
        "compute": {"totals": {name: usage_row(usage) for name, usage in totals.items()}, "device": usage_row(device)},
        "last_second": [usage_row(usage) | {"name": name} for second, name, usage in rows if second == last],
    }


def hardware(worker: Worker, key: str) -> dict[str, Any]:
    """``/hardware/info`` (key ``gpu_info``) and ``/hardware/stats`` (key ``gpu_stats``).

    GPUs are keyed by index as a string; the map is empty on a CPU host. ``backend`` tells what is really in use.
    """
    backend = backend_report(worker)
    gpus: Mapping[str, Any] = backend.get(key, {})
    return {
        "pipeline": worker.config.pipeline,
        "model_id": worker.config.capability,
        key: gpus,
        "backend": {name: backend[name] for name in ("name", "device", "degraded")},
    }


class Metrics:
    """The Prometheus side. Counted where things happen: jobs and errors; read at scrape time: everything else."""

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()
        self.latency = Histogram(
            "byoc_frame_latency_ms",
            "A job from its request's head to its answer's end; a live frame from arrival to departure",
            buckets=LATENCY_MS,
            registry=self.registry,
        )
        self.errors = Counter("byoc_errors_total", "Errors by type", ["type"], registry=self.registry)
        sessions = Gauge("byoc_sessions_active", "Jobs and streams in the house", registry=self.registry)
        sessions.set_function(lambda: worker.active + len(worker.streams))
        Gauge("byoc_build_info", "Always 1", ["version"], registry=self.registry).labels(VERSION).set(1)
        self.registry.register(_Scrape(worker))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Scrape(Collector):
    """Numbers that the engine keeps anyway."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        worker, engine = self._worker, self._worker.engine
        backend = backend_report(worker)
        gpus: Mapping[str, Mapping[str, Any]] = backend.get("gpu_info", {})
        memory = GaugeMetricFamily("byoc_gpu_memory_bytes", "GPU memory in use; no sample on a CPU", labels=["gpu"])
        for index, gpu in gpus.items():
            memory.add_metric([index], gpu["memory_total"] - gpu["memory_free"])
        yield memory
        info = GaugeMetricFamily("byoc_backend_info", "1: the backend in use", labels=["backend", "device"])
        info.add_metric([str(backend["name"]), str(backend["device"])], 1)
        yield info
        yield GaugeMetricFamily(
            "byoc_degraded", "Reasons for which it runs worse than it could", len(backend["degraded"])
        )
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        yield GaugeMetricFamily("byoc_memory_peak_bytes", "Largest resident memory so far", rss)
        if engine is None:
            return
        yield CounterMetricFamily("byoc_refused_total", "Jobs refused for want of a slot", engine.refused)
        yield GaugeMetricFamily("byoc_waiting_frames", "Frames that wait for the device", engine.batcher.waiting)
        for key, text in (("slots", "Slots"), ("free", "Slots nobody holds"), ("waiting", "Jobs that wait for slots")):
            family = GaugeMetricFamily(f"byoc_slots_{key}" if key != "slots" else "byoc_slots", text, labels=["bytes"])
            for room in engine.rooms():
                family.add_metric([str(room["frame_bytes"])], room[key])
            yield family
        yield from _usage_metrics(engine.usage()[1])


def _usage_metrics(totals: Mapping[str, Usage]) -> Iterator[Metric]:
    for name, text, read in (
        ("byoc_frames_total", "Frames processed", lambda u: u.frames),
        ("byoc_batches_total", "Batches with frames of this name", lambda u: u.batches),
        ("byoc_compute_seconds_total", "Device time in the processor", lambda u: seconds(u.compute_ns)),
        ("byoc_copy_seconds_total", "Device time in copies", lambda u: seconds(u.copy_ns)),
        ("byoc_queue_seconds_total", "Frames' waits for the device, added up", lambda u: seconds(u.queue_ns)),
    ):
        family = CounterMetricFamily(name, text, labels=["name"])
        for label, usage in totals.items():
            family.add_metric([label], read(usage))
        yield family
