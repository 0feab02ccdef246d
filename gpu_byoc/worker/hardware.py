"""What the worker says about its devices: status, ``/hardware`` and metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from gpu_byoc.core.histogram import Reading
from gpu_byoc.core.meter import SECOND, TOLERANCE
from gpu_byoc.engine.engine import Engine
from gpu_byoc.engine.fleet import Fleet

ROOMS: tuple[tuple[str, str, Callable[[Sequence[int]], int], str], ...] = (
    ("byoc_slots", "slots", sum, "Slots, of all frame sizes that have memory now"),
    ("byoc_slots_free", "free", sum, "Slots nobody holds"),
    ("byoc_slots_waiting", "waiting", sum, "Jobs and streams that wait for slots"),
    ("byoc_frame_sizes", "slots", len, "Frame sizes that have memory now"),
    ("byoc_slot_memory_bytes", "memory", sum, "Host memory of the slots"),
    ("byoc_batch_limit", "max_batch", min, "Frames that share a batch; fewer than --max-batch after memory ran out"),
    ("byoc_pinned", "pinned", min, "1: all slots are pinned host memory, as copies to and from a GPU want it"),
)
"""Metric, key in ``Fleet.rooms``, how the frame sizes of one device become one number, text. The size is no label:
callers choose it, and each would be one more time series for ever. Status has them one by one."""

TALLIES = (
    ("byoc_batch_compute_seconds", "compute", SECOND, "Device time of a batch in the processor"),
    ("byoc_batch_copy_seconds", "copy", SECOND, "Device time of a batch in copies"),
    ("byoc_frame_queue_seconds", "queue", SECOND, "A frame's wait for the device"),
    ("byoc_batch_frames", "frames", 1, "Frames in a batch"),
)
"""Metric, key in ``Engine.tallies``, what one unit of the metric is there, text."""

DEVICES: tuple[tuple[type[CounterMetricFamily | GaugeMetricFamily], str, str, str], ...] = (
    (CounterMetricFamily, "byoc_device_frames_total", "frames", "Frames processed"),
    (CounterMetricFamily, "byoc_device_batches_total", "batches", "Batches that succeeded"),
    (CounterMetricFamily, "byoc_device_compute_seconds_total", "compute_seconds", "Time in the processor"),
    (CounterMetricFamily, "byoc_device_copy_seconds_total", "copy_seconds", "Time in copies"),
    (CounterMetricFamily, "byoc_out_of_memory_total", "out_of_memory", "Batches that did not fit into its memory"),
    (
        CounterMetricFamily,
        "byoc_slots_reclaimed_total",
        "reclaimed",
        "Slow jobs that lost their slots to others",
    ),
    (
        CounterMetricFamily,
        "byoc_frame_sizes_refused_total",
        "crowded",
        "Slots asked for and refused because other frame sizes have the memory",
    ),
    (GaugeMetricFamily, "byoc_device_streams", "streams", "Live streams placed on it"),
    (GaugeMetricFamily, "byoc_canary_age_seconds", "canary_age_seconds", "Since it last answered a probe"),
    (GaugeMetricFamily, "byoc_last_batch_age_seconds", "last_batch_age_seconds", "Since a batch last ended"),
    (GaugeMetricFamily, "byoc_batch_under_way_seconds", "batch_under_way_seconds", "Age of the oldest batch on it"),
    (GaugeMetricFamily, "byoc_metering_error_ratio", "metering_error", "Booked device time that is not shared out"),
)


def backend_report(fleet: Fleet | None, degraded: Sequence[str]) -> dict[str, Any]:
    """Which backend runs, on what, and what is not as it should be: ``degraded`` and what the devices say themselves.

    ``devices`` has a row each. The other keys are those of the first device, with the GPUs of all of them.
    """
    if fleet is None:
        return {"name": None, "device": None, "degraded": [], "devices": []}
    devices = [_device(name, fleet, engine) for name, engine in fleet.named()]
    several = len(devices) > 1
    own = [f"{each['device']}: {text}" if several else text for each in devices for text in each["degraded"]]
    report: dict[str, Any] = dict(fleet.engines[0].backend.info())
    for engine in fleet.engines[1:]:
        for key, value in engine.backend.info().items():
            if isinstance(value, Mapping):  # gpu_info and gpu_stats, by index of the GPU
                report[key] = {**report.get(key, {}), **value}
    return {
        **report,
        "name": fleet.engines[0].backend.name,
        "device": ",".join(each["device"] for each in devices),
        "degraded": [*degraded, *own],
        "devices": devices,
    }


def _device(name: str, fleet: Fleet, engine: Engine) -> dict[str, Any]:
    spent, vitals, error = engine.spent(), engine.vitals(), engine.balance().error
    return {
        "device": name,
        "degraded": [*engine.backend.info().get("degraded", []), *_unbalanced(error)],
        "streams": fleet.streams_on(engine),
        "waiting_frames": engine.batcher.waiting,
        "frames": spent.frames,
        "batches": spent.batches,
        "compute_seconds": spent.compute_ns / SECOND,
        "copy_seconds": spent.copy_ns / SECOND,
        "out_of_memory": engine.out_of_memory,
        "reclaimed": engine.reclaimed,
        "crowded": engine.crowded,
        "canary_age_seconds": vitals.canary,
        "last_batch_age_seconds": vitals.batch,
        "batch_under_way_seconds": vitals.under_way,
        "metering_error": error,
    }


def _unbalanced(error: float) -> list[str]:
    if error <= TOLERANCE:
        return []
    return [f"the books are off by {error:.1%} of the device's time: do not bill by them; please report it"]


def device_metrics(fleet: Fleet) -> Iterator[Metric]:
    yield from _room_metrics(fleet)
    devices = [_device(name, fleet, engine) for name, engine in fleet.named()]
    for kind, metric, key, text in DEVICES:
        rows = kind(metric, text, labels=["device"])
        for device in devices:
            if device[key] is not None:
                rows.add_metric([device["device"]], device[key])
        yield rows
    readings = [(name, engine.tallies()) for name, engine in fleet.named()]
    for metric, key, unit, text in TALLIES:
        histogram = HistogramMetricFamily(metric, text, labels=["device"])
        for name, tallies in readings:
            histogram.add_metric([name], *_buckets(tallies[key], unit))
        yield histogram
    left = CounterMetricFamily("byoc_batches_left_total", "Batches started, by why", labels=["device", "reason"])
    for name, engine in fleet.named():
        for reason, count in engine.left().items():
            left.add_metric([name, reason], count)
    yield left


def _room_metrics(fleet: Fleet) -> Iterator[Metric]:
    rooms: dict[str, list[dict[str, Any]]] = {}
    for room in fleet.rooms():
        rooms.setdefault(room["device"], []).append({**room, "memory": room["slots"] * room["frame_bytes"]})
    for metric, key, together, text in ROOMS:
        family = GaugeMetricFamily(metric, text, labels=["device"])
        for device, its in rooms.items():
            values = [room[key] for room in its if room[key] is not None]
            if values:
                family.add_metric([device], together(values))
        yield family


def _buckets(reading: Reading, unit: int) -> tuple[list[tuple[str, float]], float]:
    """(cumulative buckets, sum), as the exposition format has them."""
    bounds = [str(bound / unit) for bound in reading.bounds] + ["+Inf"]
    return list(zip(bounds, map(float, reading.upto), strict=True)), reading.total / unit


def gpu_metrics(report: Mapping[str, Any]) -> Iterator[Metric]:
    """Of a ``backend_report``. No samples on a CPU."""
    gpus: Mapping[str, Mapping[str, Any]] = report.get("gpu_stats", {})
    used = GaugeMetricFamily("byoc_gpu_memory_bytes", "GPU memory in use, by anybody", labels=["gpu"])
    total = GaugeMetricFamily("byoc_gpu_memory_total_bytes", "GPU memory", labels=["gpu"])
    busy = GaugeMetricFamily("byoc_gpu_utilization_percent", "Part of the time in which a kernel ran", labels=["gpu"])
    for index, gpu in gpus.items():
        used.add_metric([index], gpu["memory_total"] - gpu["memory_free"])
        total.add_metric([index], gpu["memory_total"])
        if gpu["utilization_compute"] is not None:  # a part of a GPU (MIG) has none
            busy.add_metric([index], gpu["utilization_compute"])
    yield from (used, total, busy)
