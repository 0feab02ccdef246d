"""Configuration: frozen dataclasses, one per part, and the only reader of the environment.

Precedence, everywhere: flag > environment > default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gpu_byoc.errors import ConfigError

GIB = 1 << 30
MIB = 1 << 20


def env(name: str, default: str, environ: Mapping[str, str] = os.environ) -> str:
    """The environment variable ``name``, or ``default`` when it is unset or empty."""
    return environ.get(name) or default


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Bounds of the engine.

    ``slots`` frames are in the house at once, per frame size; ``max_batch`` of them share a batch. 32 and 8: a batch
    on the device, one on its way in and one on its way out, and as much again waiting. ``memory`` bounds the arenas
    of all frame sizes together, in bytes. ``max_wait_ms`` lets an idle device wait for company, counted from the
    first frame; 0, because batches grow by themselves while the device is busy. ``depth`` batches are on their way
    at once on a device with a stream of its own.
    """

    slots: int = 32
    max_batch: int = 8
    max_wait_ms: float = 0.0
    depth: int = 2
    memory: int = GIB

    def __post_init__(self) -> None:
        for name in ("slots", "max_batch", "depth", "memory"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1")
        if self.max_wait_ms < 0:
            raise ConfigError("--max-wait-ms must not be negative")
        if self.max_batch > self.slots:
            raise ConfigError(f"--max-batch {self.max_batch} is more than --slots {self.slots}: it could never fill")


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """The worker.

    ``max_body`` bytes bound a request's body (64 MiB: two 4K RGB frames and some), ``max_collected`` bytes all bodies
    together that must be read as a whole (images, JSON) before they get a slot. ``slot_wait`` is how many seconds a job
    waits in the line for a slot before it is refused with 503. ``body_timeout`` is over how many seconds a body must
    come, and an answer be taken, at more than a minimum rate. ``job_timeout`` bounds the wait for the processor, in
    seconds; 300 is the overall limit that the network's own clients use.

    ``max_streams`` live streams run at once; unless said, what the slots allow: each holds three when it keeps up (one
    decoded into, one on the device, one encoded out of). A frame that has no slot ``latency_budget`` seconds after its
    arrival is dropped; with ``lossless`` it waits. ``insecure`` takes any TLS certificate of a trickle server.
    """

    host: str = "0.0.0.0"
    port: int = 8000
    backend: str = "auto"
    device: str | None = None
    processor: str = "green_tint"
    pipeline: str = "byoc"
    capability: str = ""
    app_version: str = "0.0.1"
    max_body: int = 64 * MIB
    max_pixels: int = 64 * 1024 * 1024
    slot_wait: float = 0.5
    max_collected: int = 512 * MIB
    body_timeout: float = 30.0
    job_timeout: float = 300.0
    max_streams: int | None = None
    latency_budget: float = 1.0
    lossless: bool = False
    encoder: str = "auto"
    insecure: bool = False
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port} is not a port; 1 to 65535, or 0 for a free one")
        if self.max_body < 1 or self.max_pixels < 1:
            raise ConfigError("--max-body-mb must be at least 1")
        if (self.max_streams is not None and self.max_streams < 0) or self.latency_budget <= 0:
            raise ConfigError("--max-streams must not be negative, --latency-budget-ms must be above 0")
        if self.slot_wait < 0 or self.body_timeout <= 0 or self.job_timeout <= 0:
            raise ConfigError("--slot-wait must not be negative, --body-timeout and --job-timeout must be above 0")

    @property
    def most_streams(self) -> int:
        """Live streams at once."""
        return self.engine.slots // 3 if self.max_streams is None else self.max_streams


@dataclass(frozen=True, slots=True)
class OrchestratorConfig:
    """The local orchestrator; names follow the flags of the quickstart page.

    ``capacity`` jobs run at once. ``max_body`` bytes bound a job's body. ``job_timeout`` bounds, in seconds, the time
    in which nothing is heard of the container (a processor's whole thinking time); 10 more than a worker's own limit,
    so that the one that knows what is stuck says so first. ``stall`` bounds the time in which a client neither sends
    nor takes anything; 5 more than a gateway's, for the same reason. Neither bounds the job as a whole.
    """

    host: str
    port: int
    cli_host: str
    cli_port: int
    datadir: Path
    byoc: bool = False
    container_url: str = ""
    model_id: str = ""
    capacity: int = 8
    max_body: int = 64 * MIB
    job_timeout: float = 310.0
    stall: float = 65.0

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ConfigError("-byocCapacity must be at least 1")
        if self.job_timeout <= 0:
            raise ConfigError("-jobTimeout must be above 0")


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """The local gateway; names follow the flags of the quickstart page.

    ``job_timeout`` bounds, in seconds, the time in which nothing is heard of an orchestrator, 10 more than that bounds
    its container with; ``stall`` the time in which a client neither sends nor takes anything. ``token_ttl`` is how
    many seconds an orchestrator's word about its capacity is taken for true.
    """

    orchestrators: tuple[str, ...]
    host: str
    port: int
    cli_host: str
    cli_port: int
    http_ingest: bool = False
    max_body: int = 64 * MIB
    job_timeout: float = 320.0
    stall: float = 60.0
    token_ttl: float = 1.0

    def __post_init__(self) -> None:
        if self.job_timeout <= 0:
            raise ConfigError("-jobTimeout must be above 0")
