"""What bounds the worker, as metrics; and a container's memory limit: the worker stays within it and refuses with words
what does not fit, where it would otherwise be killed in the middle of everybody's jobs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from gpu_byoc.config import MIB, ServeConfig
from gpu_byoc.errors import ConfigError

if TYPE_CHECKING:
    from gpu_byoc.worker.app import Worker

FILES: Final = (
    Path("/sys/fs/cgroup/memory.max"),  # control groups of version 2, as a container sees them
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),  # version 1
)

RESIDENT: Final = 96 * MIB
"""What a worker takes with nothing to do (51 MiB measured in the CPU image), and sockets' buffers."""

LEAST: Final = RESIDENT + 64 * MIB
"""Half of what is left then holds the 32 slots of 640x480 frames, 29.5 MB."""


def memory_limit(files: Sequence[Path] = FILES) -> int | None:
    """The limit in bytes, None where there is none or the system does not say."""
    for file in files:
        try:
            text = file.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdecimal() and int(text) < 1 << 60:  # version 1 says "none" by a number near 2**63
            return int(text)
    return None


def fitted(config: ServeConfig, limit: int | None) -> tuple[ServeConfig, str]:
    """``config`` within ``limit``, and what was changed, in words; empty where nothing was.

    Of what the limit leaves beside the worker itself, frames may have half and collected bodies a quarter; the last
    quarter is for decoders, encoders and what a processor needs.

    Raises:
        ConfigError: the limit is too low to serve anything.
    """
    if limit is None:
        return config, ""
    if limit < LEAST:
        raise ConfigError(
            f"this container's memory limit is {limit // MIB} MiB, and a worker needs at least {LEAST // MIB}: "
            "raise it (docker run --memory)"
        )
    frames, bodies = (limit - RESIDENT) // 2, (limit - RESIDENT) // 4
    if config.engine.memory <= frames and config.max_collected <= bodies:
        return config, ""
    within = replace(
        config,
        engine=replace(config.engine, memory=min(config.engine.memory, frames)),
        max_collected=min(config.max_collected, bodies),
    )
    return within, (
        f"this container's memory limit is {limit // MIB} MiB: frames may take {within.engine.memory // MIB} MiB of it "
        f"(--memory-mb asked for {config.engine.memory // MIB}), bodies of images and JSON "
        f"{within.max_collected // MIB} MiB; what does not fit is refused"
    )


def bounds(config: ServeConfig) -> dict[str, float]:
    """Every bound, by its flag and in its flag's unit; docs/operations.md says what each is for."""
    engine, security = config.engine, config.security
    processor = config.job_timeout if engine.processor_timeout is None else engine.processor_timeout
    return {
        "max-connections": config.max_connections,
        "max-body-mb": config.max_body / MIB,
        "max-collected-mb": config.max_collected / MIB,
        "max-pixels": config.max_pixels,
        "slots": engine.slots,
        "max-batch": engine.max_batch,
        "depth": engine.depth or 0,  # as the backend says
        "memory-mb": engine.memory / MIB,
        "slot-wait": config.slot_wait,
        "body-timeout": config.body_timeout,
        "job-timeout": config.job_timeout,
        "processor-timeout": processor,
        "device-timeout": engine.device_timeout,
        "max-streams": config.most_streams,
        "latency-budget-ms": config.latency_budget * 1e3,
        "error-budget": config.error_budget,
        "max-stream-pixels": security.max_stream_pixels,
        "max-pixel-rate": security.max_pixel_rate,
        "max-input-mbit": security.max_input_mbit,
        "max-stream-seconds": security.max_stream_seconds,
        "max-update-rate": security.max_update_rate,
        "drain-seconds": config.drain_seconds,
        "max-frame-sizes": engine.max_frame_sizes,
        **{name.replace("_", "-"): value for name, value in asdict(config.limits).items()},
    }


def limit_metrics(worker: Worker) -> Iterator[Metric]:
    """The bounds, and how much of those is taken that the engine does not count."""
    text = "What bounds this worker, by flag and in the flag's unit"
    limits = GaugeMetricFamily("byoc_limit", text, labels=["limit"])
    for flag, value in bounds(worker.config).items():
        limits.add_metric([flag], value)
    yield limits
    yield GaugeMetricFamily("byoc_ready", "1: what comes now is taken, as /ready says", worker.health.ready)
    yield GaugeMetricFamily("byoc_event_loop_late_seconds", "How late the event loop is", worker.health.lag)
    yield GaugeMetricFamily("byoc_collected_bytes", "Bodies that are read as a whole", worker.budget.used)
    text = "Bodies, and answers in their place, that were slow to come or to go, and made room for others"
    yield CounterMetricFamily("byoc_collected_reclaimed", text, worker.budget.reclaimed)
    text = "Clients at too many of whose jobs the processor failed, so that their jobs run alone for a while"
    yield CounterMetricFamily("byoc_clients_set_apart", text, worker.suspects.found)
    text = "Clients whose jobs failed, and that others took the place of among those that are remembered"
    yield CounterMetricFamily("byoc_clients_forgotten", text, worker.suspects.forgotten)
    if (door := worker.door) is not None:
        connections = GaugeMetricFamily(
            "byoc_connections", "Open connections; at the door: have not said what they want", labels=["where"]
        )
        connections.add_metric(["inside"], door.inside)
        connections.add_metric(["door"], door.waiting)
        yield connections
        text = "Connections over --max-connections, or over half of it from one address"
        yield CounterMetricFamily("byoc_connections_refused", text, door.refused)
        text = "Connections that did not end a request's head in time, sent too long a one, or made room at the door"
        yield CounterMetricFamily("byoc_connections_dropped", text, door.dropped)
        text = "Connections closed because nothing had moved on them for --idle-timeout, or nothing ever came"
        yield CounterMetricFamily("byoc_connections_idle_closed", text, door.idle)
