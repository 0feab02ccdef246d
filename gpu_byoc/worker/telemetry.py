"""What the worker says about itself: state, status, compute rows, hardware, metrics."""

from __future__ import annotations

import platform
import resource
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import prometheus_client as prometheus
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gpu_byoc._version import VERSION
from gpu_byoc.core.meter import SECOND, Usage
from gpu_byoc.processor import processor_name
from gpu_byoc.worker.hardware import backend_report, device_metrics, gpu_metrics
from gpu_byoc.worker.jobs import STREAM
from gpu_byoc.worker.limits import limit_metrics

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


def status(worker: Worker, stream: str | None = None) -> dict[str, Any]:
    """The status object: the keys the network's own workers answer with, then ours. ``stream``, ``fps`` and
    ``current_params`` are of that stream, or of the only one there is.

    Raises:
        BadRequest: no such stream is running.
    """
    found = worker.streams.one(stream)
    one = (
        {}
        if found is None
        else {"stream": found, "fps": found["fps"], "current_params": {"gateway_request_id": found["stream_id"]}}
    )
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
        "backend": backend_report(worker.engine, worker.degraded),
        "streams": worker.streams.numbers(),
        **one,
        "encoder": asdict(worker.streams.encoder) if worker.streams.encoder else None,
        "insecure": worker.config.insecure,
        "sandbox": worker.sandbox,
        "registration": worker.registration.report() if worker.registration else None,
        "slots": worker.engine.rooms() if worker.engine else [],
        "waiting_frames": worker.engine.waiting if worker.engine else 0,
        "compute": {"totals": {name: usage_row(usage) for name, usage in totals.items()}, "device": usage_row(device)},
        "last_second": [usage_row(usage) | {"name": name} for second, name, usage in rows if second == last],
    }


def hardware(worker: Worker, key: str) -> dict[str, Any]:
    """``/hardware/info`` (key ``gpu_info``) and ``/hardware/stats`` (key ``gpu_stats``).

    GPUs are keyed by index as a string; the map is empty on a CPU host. ``backend`` tells what is really in use.
    """
    backend = backend_report(worker.engine, worker.degraded)
    gpus: Mapping[str, Any] = backend.get(key, {})
    return {
        "pipeline": worker.config.pipeline,
        "model_id": worker.config.capability,
        key: gpus,
        "backend": {name: backend[name] for name in ("name", "device", "degraded", "devices")},
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
        self.streams = StreamSums()
        self.errors = prometheus.Counter("byoc_errors_total", "Errors by type", ["type"], registry=self.registry)
        self.quarantined = prometheus.Counter(
            "byoc_streams_quarantined_total",
            "Live streams that were ended because too many of their frames had failed, by the last failure",
            ["reason"],
            registry=self.registry,
        )
        sessions = Gauge("byoc_sessions_active", "Jobs and streams in the house", registry=self.registry)
        sessions.set_function(lambda: worker.active + len(worker.streams))
        build = Gauge("byoc_build_info", "Always 1", ["version", "python"], registry=self.registry)
        build.labels(VERSION, platform.python_version()).set(1)
        self.registry.register(_Scrape(worker))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Scrape(Collector):
    """Numbers that the engine keeps anyway."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        worker, engine = self._worker, self._worker.engine
        backend = backend_report(worker.engine, worker.degraded)
        yield from gpu_metrics(backend)
        info = GaugeMetricFamily("byoc_backend_info", "1: the backend in use", labels=["backend", "device"])
        for device in backend["devices"]:
            info.add_metric([backend["name"], device["device"]], 1)
        yield info
        yield GaugeMetricFamily(
            "byoc_degraded", "Reasons for which it runs worse than it could", len(backend["degraded"])
        )
        yield from limit_metrics(worker)
        if (registration := worker.registration) is not None:
            text = "1: the last registration with the orchestrator was accepted"
            yield GaugeMetricFamily("byoc_registered", text, registration.registered)
            if (age := registration.age) is not None:
                yield GaugeMetricFamily("byoc_registration_age_seconds", "Since a registration was last accepted", age)
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        yield GaugeMetricFamily("byoc_memory_peak_bytes", "Largest resident memory so far", rss)
        if engine is None:
            return
        yield CounterMetricFamily("byoc_refused_total", "Jobs refused for want of a slot", engine.refused)
        yield GaugeMetricFamily("byoc_waiting_frames", "Frames that wait for a device", engine.waiting)
        yield from device_metrics(engine)
        yield from _usage_metrics(engine.usage()[1])
        yield from worker.metrics.streams.metrics(worker.streams.numbers())


def _usage_metrics(totals: Mapping[str, Usage]) -> Iterator[Metric]:
    """Jobs and streams; the streams together, running or over. A stream's own name is no label: it would be a time
    series for ever, and its total moves to another name when it ends, which no counter may do."""
    kinds = {"jobs": Usage(), "streams": Usage()}
    for name, usage in totals.items():
        kinds["jobs" if name == STREAM else "streams"].add(usage)
    for name, text, read in (
        ("byoc_frames_total", "Frames processed", lambda u: u.frames),
        ("byoc_compute_seconds_total", "Device time in the processor", lambda u: seconds(u.compute_ns)),
        ("byoc_copy_seconds_total", "Device time in copies", lambda u: seconds(u.copy_ns)),
        ("byoc_queue_seconds_total", "Frames' waits for the device, added up", lambda u: seconds(u.queue_ns)),
    ):
        family = CounterMetricFamily(name, text, labels=["kind"])
        for kind, usage in kinds.items():
            family.add_metric([kind], read(usage))
        yield family


class StreamSums:
    """What became of the frames of all live streams, running or over. Nothing is counted per frame: the streams do
    that for themselves, and are added up when they end and when somebody asks."""

    def __init__(self) -> None:
        self._ended: dict[str, Counter[str]] = {
            "streams": Counter(ended=0, failed=0),
            "frames": Counter({"in": 0, "out": 0}),  # a rate needs to see them rise from 0
            "dropped": Counter(),
            "problems": Counter(),
        }

    def end(self, numbers: Mapping[str, Any]) -> None:
        """A stream is over; in the same step it leaves the table of those that run. ``LiveStream.numbers``."""
        self._ended["streams"][numbers["state"]] += 1
        _add(self._ended, numbers)

    def metrics(self, running: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
        sums = {key: Counter(counts) for key, counts in self._ended.items()}
        for numbers in running:
            _add(sums, numbers)
        yield GaugeMetricFamily("byoc_streams_active", "Live streams", len(running))
        for name, key, label, text in (
            ("byoc_streams_ended_total", "streams", "state", "Live streams that are over"),
            ("byoc_stream_frames_total", "frames", "way", "Frames of live streams that came in, and that went out"),
            ("byoc_frames_dropped_total", "dropped", "reason", "Frames of live streams that did not arrive"),
            ("byoc_stream_problems_total", "problems", "reason", "Faults of input and channels, lost audio, waits"),
        ):
            family = CounterMetricFamily(name, text, labels=[label])
            for value, count in sorted(sums[key].items()):
                family.add_metric([value], count)
            yield family


def _add(sums: Mapping[str, Counter[str]], numbers: Mapping[str, Any]) -> None:
    # A frame whose segment is lost afterwards is taken back from frames_out; a counter only goes up.
    out = numbers["frames_out"] + numbers["dropped"].get("segment_lost", 0)
    sums["frames"].update({"in": numbers["frames_in"], "out": out})
    sums["dropped"].update(numbers["dropped"])
    sums["problems"].update(numbers["problems"])
