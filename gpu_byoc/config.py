"""Configuration: frozen dataclasses, one per part, and the only reader of the environment.

Precedence, everywhere: flag > environment > default.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gpu_byoc.errors import ConfigError

GIB = 1 << 30
MIB = 1 << 20

MAX_TIMEOUT = 86_400
"""Seconds, a day; what is to be longer is to be off. Timers of the platform take no infinite times."""


def env(name: str, default: str, environ: Mapping[str, str] = os.environ) -> str:
    """The environment variable ``name``, or ``default`` when it is unset or empty."""
    return environ.get(name) or default


def unknown_variables(known: Collection[str], environ: Mapping[str, str] = os.environ) -> list[str]:
    """Each variable ``GPU_BYOC_...`` that is not ``known``, for people: with the name that may have been meant.

    Not those of the tests, of docker/compose.yaml, and of a Kubernetes Service named gpu-byoc.
    """
    told, prefix = [], "GPU_BYOC_"  # which all names share: left out where they are compared
    rests = [name.removeprefix(prefix) for name in sorted(known) if name.startswith(prefix)]
    for name in sorted(environ):
        if name.startswith(prefix) and name not in known and not name.startswith(_OTHERS):
            near = difflib.get_close_matches(name.removeprefix(prefix), rests, n=1)
            told.append(name + (f" (did you mean {prefix}{near[0]}?)" if near else ""))
    return told


_OTHERS = (
    *("GPU_BYOC_REQUIRE_CUDA", "GPU_BYOC_REQUIRE_TORCH", "GPU_BYOC_TEST_"),
    *("GPU_BYOC_CPUS", "GPU_BYOC_MEMORY", "GPU_BYOC_PUBLISH"),
    *("GPU_BYOC_PORT_", "GPU_BYOC_SERVICE_"),
)


def capability_name() -> str:
    """The worker's name in the network, from the variables that the network's own workers read; "" without one."""
    return env("CAPABILITY_NAME", "") or env("MODEL_ID", "")


def log_format() -> str:
    """What a log line looks like where no flag says it: ``text`` or ``json``."""
    return env("GPU_BYOC_LOG_FORMAT", "text")


def otel_endpoint() -> str:
    """The OTLP/HTTP collector, from the variable that OpenTelemetry itself reads; "" without one."""
    return env("OTEL_EXPORTER_OTLP_ENDPOINT", "")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Bounds of the engine.

    ``slots`` frames are in the house at once, per frame size; ``max_batch`` of them share a batch. 32 and 8: a batch
    on the device, one on its way in and one on its way out, and as much again waiting. ``memory`` bounds the arenas
    of all frame sizes together, in bytes. ``max_wait_ms`` lets an idle device wait for company, counted from the
    first frame; 0, because batches grow by themselves while the device is busy. ``depth`` batches at most are on their
    way at once on a device with a stream of its own; None: as many as its backend can have.

    ``processor_timeout`` seconds a batch may be on its way; 0: any time. None: as long as a job may take, so that the
    default ends nothing that somebody still waits for. ``device_timeout`` seconds a device may give no sign of life, 0:
    it is not asked for one. 10: what holds all streams of a device up for longer (the driver loading code, pinning
    memory) belongs into the processor's setup. ``require_pinned`` makes host memory that is not pinned an error.

    ``max_frame_sizes`` have memory at once: each costs a mapping, jobs of one worker rarely have more than a handful of
    sizes, and the least recently used one goes when another comes.
    """

    slots: int = 32
    max_batch: int = 8
    max_wait_ms: float = 0.0
    depth: int | None = None
    memory: int = GIB
    processor_timeout: float | None = None
    device_timeout: float = 10.0
    require_pinned: bool = False
    max_frame_sizes: int = 16

    def __post_init__(self) -> None:
        for name in ("slots", "max_batch", "depth", "memory", "max_frame_sizes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1")
        if self.max_wait_ms < 0:
            raise ConfigError("--max-wait-ms must not be negative")
        for name, seconds in (("processor", self.processor_timeout or 0.0), ("device", self.device_timeout)):
            if not 0 <= seconds <= MAX_TIMEOUT:
                raise ConfigError(f"--{name}-timeout is 0 (none) to {MAX_TIMEOUT} seconds")
        if self.max_batch > self.slots:
            raise ConfigError(f"--max-batch {self.max_batch} is more than --slots {self.slots}: it could never fill")


@dataclass(frozen=True, slots=True)
class RegistrationConfig:
    """How the worker makes itself known to an orchestrator. Its name there is the worker's ``capability``.

    ``url`` is the worker's own as seen from the orchestrator, ``capacity`` how many jobs and streams it may get at
    once; without them the worker says where it listens and what its slots allow. The price is ``price_per_unit`` /
    ``price_scaling`` wei a second. ``seconds`` is how often it registers again, and so how long it is missing after one
    refused connection; 30, which is how long the network's gateways wait for a stream that has gone quiet.
    """

    orch_url: str
    secret: str = field(repr=False)
    description: str = "gpu-byoc"
    url: str = ""
    capacity: int | None = None
    price_per_unit: int = 0
    price_scaling: int = 1
    seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, url in (("--orch-url", self.orch_url), ("--capability-url", self.url)):
            if url and not is_plain_url(url):
                raise ConfigError(f"{name} is not a URL like https://host:8935, without user, query or fragment")
        if not self.secret or not (self.secret.isascii() and self.secret.isprintable()):
            raise ConfigError(
                "registering needs the orchestrator's secret, printable ASCII: ORCH_SECRET_FILE names a file with it"
            )
        if self.capacity is not None and self.capacity < 1:
            raise ConfigError("--capability-capacity must be at least 1: with 0 no gateway ever chooses this worker")
        if self.price_per_unit < 0 or self.price_scaling < 1:
            raise ConfigError("--capability-price-per-unit must not be negative, --capability-price-scaling at least 1")
        if not 0 < self.seconds < float("inf"):
            raise ConfigError("--register-seconds must be above 0")


@dataclass(frozen=True, slots=True)
class Setting:
    """One of RegistrationConfig's: its variable, its field there, its type, and what it is for people."""

    variable: str
    field: str
    kind: Callable[[str], object]
    help: str


# By flag. The variables are those that the network's own workers read.
REGISTRATION = {
    "orch-url": Setting("ORCH_URL", "orch_url", str, "orchestrator to register with; nowhere unless given"),
    "orch-secret-file": Setting("ORCH_SECRET_FILE", "secret", str, "file with the orchestrator's secret (-orchSecret)"),
    "orch-secret": Setting("ORCH_SECRET", "secret", str, "the secret; in a command line everybody here can read it"),
    "capability-description": Setting("CAPABILITY_DESCRIPTION", "description", str, "free text"),
    "capability-url": Setting("CAPABILITY_URL", "url", str, "this worker as seen from there; where it listens"),
    "capability-capacity": Setting("CAPABILITY_CAPACITY", "capacity", int, "jobs and streams at once; what fits"),
    "capability-price-per-unit": Setting("CAPABILITY_PRICE_PER_UNIT", "price_per_unit", int, "wei per second; 0"),
    "capability-price-scaling": Setting("CAPABILITY_PRICE_SCALING", "price_scaling", int, "divides the price; 1"),
    "register-seconds": Setting("GPU_BYOC_REGISTER_SECONDS", "seconds", float, "how often it registers again; 30"),
}


def read_registration(
    given: Mapping[str, str | None], environ: MutableMapping[str, str] = os.environ
) -> RegistrationConfig | None:
    """From flags (as in REGISTRATION, None: not given), then the environment. None without an orchestrator.

    Takes ORCH_SECRET out of the environment: it is nobody's business in a child process. Raises ConfigError.
    """
    texts = {flag: given.get(flag) or env(setting.variable, "", environ) for flag, setting in REGISTRATION.items()}
    environ.pop("ORCH_SECRET", None)
    if not texts["orch-url"]:
        return None
    file = texts.pop("orch-secret-file")
    if file and not given.get("orch-secret"):
        texts["orch-secret"] = read_secret(file, "ORCH_SECRET_FILE")
    values: dict[str, Any] = {"secret": ""}
    for flag, text in texts.items():
        setting = REGISTRATION[flag]
        try:
            values |= {setting.field: setting.kind(text)} if text else {}
        except ValueError as error:
            raise ConfigError(f"--{flag} {text!r} (or {setting.variable}) is not a number") from error
    return RegistrationConfig(**values)


def read_orch_secret(given: str, environ: MutableMapping[str, str] = os.environ) -> str:
    """An orchestrator's own: a file or, as in go-livepeer, the secret itself; then ORCH_SECRET_FILE, then ORCH_SECRET.

    "" without any. Takes ORCH_SECRET out of the environment. Raises ConfigError.
    """
    plain = environ.pop("ORCH_SECRET", "")
    if given:
        return read_secret(given, "-orchSecret") if Path(given).is_file() else given
    file = env("ORCH_SECRET_FILE", "", environ)
    return read_secret(file, "ORCH_SECRET_FILE") if file else plain


def read_secret(path: str, name: str) -> str:
    """The text of a file without the space around it. Raises ConfigError, naming ``name`` and the file."""
    try:
        return Path(path).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: cannot read {path}: {getattr(error, 'strerror', None) or 'not text'}") from error


def is_plain_url(text: str) -> bool:
    """http(s)://host[:port][/path] and nothing else."""
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        (parts.hostname or "").encode("idna")  # as getaddrinfo does, whose UnicodeError (a..b) is no OSError
    except ValueError:
        return False
    plain = text.isascii() and text.isprintable() and " " not in text
    return usable and plain and not (parts.query or parts.fragment or "@" in parts.netloc)


@dataclass(frozen=True, slots=True)
class SecurityConfig:
    """What callers may make the worker do, beyond computing.

    ``allow_origins`` (``https://host:8935``) are those whose channels it opens, beside the origin of the orchestrator
    that it registers with; without any of them a caller may only name itself. ``ca_file`` has certificates (PEM) that
    are believed beside the system's. ``cors_origins`` are the sites whose scripts may read answers, ``*`` is all.
    With ``sandbox_decode`` each stream is decoded in a process of its own.

    Of one live stream: pictures of ``max_stream_pixels`` at most, ``max_pixel_rate`` pixels and ``max_input_mbit``
    million bits a second, ``max_stream_seconds`` long (0: as long as it likes). The first three are what level 5.2 of
    H.264 allows (table A-1: frames of 36,864 macroblocks, 2,073,600 of them a second, 300 Mbit/s in High profile).
    ``max_update_rate`` updates of its parameters a second: each is parsed on the event loop, which is everybody's. 20,
    because people do not turn a knob faster; chosen, not measured.
    """

    allow_origins: tuple[str, ...] = ()
    ca_file: str = ""
    cors_origins: tuple[str, ...] = ()
    sandbox_decode: bool = False
    max_stream_pixels: int = 36_864 * 256
    max_pixel_rate: int = 2_073_600 * 256
    max_input_mbit: float = 300.0
    max_stream_seconds: float = 0.0
    max_update_rate: float = 20.0

    def __post_init__(self) -> None:
        if self.max_stream_pixels < 1 or self.max_pixel_rate < 1 or not 0 < self.max_input_mbit < float("inf"):
            raise ConfigError("--max-stream-pixels, --max-pixel-rate and --max-input-mbit must be above 0")
        if not 0 <= self.max_stream_seconds < float("inf"):
            raise ConfigError("--max-stream-seconds is a number of seconds, or 0 for as long as a stream likes")
        if not 1 <= self.max_update_rate < float("inf"):
            raise ConfigError("--max-update-rate is at least 1 a second")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def yes_or_no(text: str) -> bool:
    if text.lower() not in ("yes", "no", "true", "false", "1", "0"):
        raise ValueError(text)
    return text.lower() in ("yes", "true", "1")


# By flag, as REGISTRATION.
SECURITY = {
    flag: Setting("GPU_BYOC_" + flag.upper().replace("-", "_"), field, kind, help)
    for flag, field, kind, help in (
        ("allow-origin", "allow_origins", _words, "https://host:8935 whose channels streams may use; repeat it"),
        ("ca-file", "ca_file", str, "PEM file of certificates to believe beside the system's"),
        ("cors-origin", "cors_origins", _words, "site whose scripts may read answers; none unless given"),
        ("sandbox-decode", "sandbox_decode", yes_or_no, "yes: each stream is decoded in a process of its own; no"),
        ("max-stream-pixels", "max_stream_pixels", int, "largest picture of a stream, width x height; 9437184"),
        ("max-pixel-rate", "max_pixel_rate", int, "pixels a second of one stream; 530841600"),
        ("max-input-mbit", "max_input_mbit", float, "million bits a second of one stream's input; 300"),
        ("max-stream-seconds", "max_stream_seconds", float, "how long a stream may last; 0: as long as it likes"),
        ("max-update-rate", "max_update_rate", float, "updates of one stream's parameters a second; 20"),
    )
}


def read_security(given: Mapping[str, str | None], environ: Mapping[str, str] = os.environ) -> SecurityConfig | None:
    """From flags (as in SECURITY, None: not given), then the environment; None where neither says anything.

    Raises ConfigError.
    """
    values: dict[str, Any] = {}
    for flag, setting in SECURITY.items():
        text = given.get(flag) or env(setting.variable, "", environ)
        try:
            values |= {setting.field: setting.kind(text)} if text else {}
        except ValueError as error:
            raise ConfigError(f"--{flag} (or {setting.variable}): {text!r} makes no sense there") from error
    return SecurityConfig(**values) if values else None


def _bound(default: float, least: float, most: float, help: str) -> Any:
    return field(default=default, metadata={"least": least, "most": most, "help": help})


@dataclass(frozen=True, slots=True)
class LimitConfig:
    """Bounds that few need to set, each named as its flag and in its flag's unit: ``kb`` is KiB, ``mb`` MiB, a timeout
    seconds. docs/operations.md says why each is as it is, and what happens over it.

    The least values leave a worker that serves, the most are what its other parts can do with. A head waits in its
    socket's buffer, which was full with one of 60 KiB in pieces of 100 bytes. Sound goes out eight packets at a time.
    The sandbox takes 1 MiB of input at a time, and passes no more than 8 MiB of sound for it.
    """

    head_timeout: float = _bound(10.0, 1, MAX_TIMEOUT, "seconds within which a request's head must have come")
    max_head_kb: int = _bound(32, 1, 48, "KiB of a request's head")
    idle_timeout: float = _bound(75.0, 1, MAX_TIMEOUT, "seconds a connection may be idle between two requests")
    max_at_door: int = _bound(256, 8, 65536, "connections that have not said what they want, or only ask for health")
    max_message_kb: int = _bound(1024, 4, 65536, "KiB of a message to /stream/...")
    max_update_kb: int = _bound(32, 1, 1024, "KiB of a stream's new parameters, by HTTP or its control channel")
    max_update_lines: int = _bound(40, 1, 10_000, "lines of a message on a stream's control channel")
    input_buffer_mb: int = _bound(8, 1, 1024, "MiB of a stream's input that wait to be decoded")
    output_buffer_mb: int = _bound(8, 1, 1024, "MiB of a stream's output that wait to be sent")
    max_packet_mb: int = _bound(4, 1, 6, "MiB of one coded picture or audio packet of a stream's input")
    max_audio_packets: int = _bound(2048, 64, 1 << 20, "audio packets of a stream that wait for pictures")
    max_audio_mb: int = _bound(8, 1, 1024, "MiB of these")
    max_news: int = _bound(256, 16, 65536, "events, and lines of data, of a stream that wait to be sent")
    max_failing_clients: int = _bound(256, 1, 1 << 20, "clients whose jobs failed that are remembered")

    def __post_init__(self) -> None:
        for each in fields(self):
            least, most = each.metadata["least"], each.metadata["most"]
            if not least <= getattr(self, each.name) <= most:
                raise ConfigError(f"--{each.name.replace('_', '-')} is {least} to {most}: {each.metadata['help']}")


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
    arrival is dropped; with ``lossless`` it waits, and input begins with the oldest segment there is.
    A stream is ended where more than ``error_budget`` of its frames (a share: 0.5 is half of them) failed in the
    processor over ten seconds. ``insecure`` takes any TLS certificate of a trickle server or an orchestrator.

    ``max_connections`` are open at once, half of them from one address, beside those that only ask for ``/health`` and
    ``/ready``; 512 is far more than the slots serve. ``drain_seconds`` is what a shutdown may take; container runtimes
    kill ten seconds after SIGTERM by default. ``admin_port`` is for ``/drain`` and ``/debug``, on 127.0.0.1; None:
    there is none.

    ``otel_endpoint`` is the base URL of a collector of traces (OTLP over HTTP); none are made without one.

    ``device`` is one, or several with commas between them: an engine each, with ``engine.slots`` slots of its own and
    an equal part of ``engine.memory``. With ``require_gpu`` it is an error if any of them is the CPU.
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
    max_connections: int = 512
    drain_seconds: float = 8.0
    admin_port: int | None = None
    max_streams: int | None = None
    latency_budget: float = 1.0
    error_budget: float = 0.5
    lossless: bool = False
    encoder: str = "auto"
    insecure: bool = False
    require_gpu: bool = False
    registration: RegistrationConfig | None = None
    security: SecurityConfig = SecurityConfig()
    limits: LimitConfig = LimitConfig()
    otel_endpoint: str = ""
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port} is not a port; 1 to 65535, or 0 for a free one")
        if self.max_body < 1 or self.max_pixels < 1 or self.max_collected < 1 or self.max_connections < 1:
            raise ConfigError(
                "--max-body-mb, --max-pixels, --max-collected-mb and --max-connections must be at least 1"
            )
        if not 3 <= self.drain_seconds <= MAX_TIMEOUT:
            raise ConfigError(f"--drain-seconds is 3 to {MAX_TIMEOUT}: closing the device and the door take that long")
        if self.admin_port is not None and not 0 <= self.admin_port <= 65535:
            raise ConfigError(f"--admin-port {self.admin_port} is not a port; 1 to 65535, or 0 for a free one")
        if (self.max_streams is not None and self.max_streams < 0) or self.latency_budget <= 0:
            raise ConfigError("--max-streams must not be negative, --latency-budget-ms must be above 0")
        if not 0 <= self.error_budget <= 1:
            raise ConfigError("--error-budget is a share from 0 to 1; with 1 no stream is ended for frames that failed")
        if not all(name is None or name for name in self.devices):
            raise ConfigError(f"--device {self.device!r} is not a list of devices like cuda:0,cuda:1")
        if self.slot_wait < 0 or self.body_timeout <= 0 or self.job_timeout <= 0:
            raise ConfigError("--slot-wait must not be negative, --body-timeout and --job-timeout must be above 0")
        if self.registration and (not self.capability.strip() or not self.capability.isprintable()):
            raise ConfigError("registering needs a name that can be printed: --capability, or CAPABILITY_NAME")

    @property
    def most_streams(self) -> int:
        """Live streams at once."""
        return len(self.devices) * self.engine.slots // 3 if self.max_streams is None else self.max_streams

    @property
    def devices(self) -> tuple[str | None, ...]:
        """One for each engine, in order; None is the backend's own choice."""
        return (None,) if self.device is None else tuple(name.strip() for name in self.device.split(","))

    @property
    def capacity(self) -> int:
        """Jobs and streams at once, as told to an orchestrator, which makes no difference between them."""
        if self.registration is not None and self.registration.capacity is not None:
            return self.registration.capacity
        return self.most_streams or self.engine.slots


@dataclass(frozen=True, slots=True)
class OrchestratorConfig:
    """The local orchestrator; names follow the flags of the quickstart page.

    ``capacity`` jobs run at once. ``max_body`` bytes bound a job's body. ``job_timeout`` bounds, in seconds, the time
    in which nothing is heard of the container (a processor's whole thinking time); 10 more than a worker's own limit,
    so that the one that knows what is stuck says so first. ``stall`` bounds the time in which a client neither sends
    nor takes anything; 5 more than a gateway's, for the same reason. Neither bounds the job as a whole. Workers
    register with ``secret``; without one nobody does.
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
    secret: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if self.secret and not (self.secret.isascii() and self.secret.isprintable()):
            raise ConfigError("-orchSecret must be printable ASCII: it travels in a header")
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
