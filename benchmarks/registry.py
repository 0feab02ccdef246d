"""The groups, in the order they run and are reported. A group of yours is one line here.

``Group(name, title, question, module)``: ``module.run(sheet)`` is called with a ``harness.Sheet``; see ``harness.py``.
Modules are imported when their group runs, so what one of them lacks does not keep the others from running.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Final, cast

from .harness import Sheet


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture of a group's rows: ``y`` over ``x``, a line for each value of ``series``; bars where ``x`` is words.

    ``where`` picks the rows. ``floor`` names the series (or the bars) that are no contestants but what the machine
    itself can do; ``limit`` is a key of the rows that holds such a figure, or the figure. ``log`` is for lines that are
    far apart; bars begin at zero.
    """

    name: str
    title: str
    y: str
    x: str = "name"
    series: tuple[str, ...] = ()
    where: Mapping[str, Any] = field(default_factory=dict)
    floor: tuple[str, ...] = ()
    limit: str | float = ""
    log: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    name: str
    title: str
    question: str
    module: str
    plots: tuple[Plot, ...] = ()
    asked: bool = False
    """Runs only when it is asked for by name."""

    def load(self) -> Callable[[Sheet], None]:
        return cast("Callable[[Sheet], None]", import_module(f".{self.module}", __package__).run)


ECHOES: Final = ("bare aiohttp echo", "the same, tuned as the worker is")
TARGET: Final = ("target",)
BACKEND: Final = ("backend",)
WHO: Final = ("backend", "processor")
VGA: Final = {"size": "640x480"}
FULL_HD: Final = {"size": "1920x1080"}
TINT: Final = {"processor": "green_tint"}
ENGINE: Final = {"what": "engine"}
DEFAULTS: Final = {"max_batch": 8, "max_wait_ms": 0.0}
SMALL: Final = {"size": "704x384"}
REAL_TIME: Final = {**SMALL, "what": "real time"}
PACED: Final = {**SMALL, "what": "paced"}

GROUPS: Final = (
    Group(
        "copies",
        "Copies",
        "How fast do frames move, in this machine's memory and to a GPU and back?",
        "bench_copies",
        (Plot("copies", "Copies of 1920x1080 frames", "gb_per_s", "batch", ("place", "what"), FULL_HD, log=True),),
    ),
    Group(
        "kernels",
        "Kernels",
        "What does a kernel cost, against a copy of the same frames?",
        "bench_kernels",
        (
            Plot(
                "kernels-rate",
                "Green tint alone, 1920x1080",
                "frames_per_second",
                "batch",
                BACKEND,
                FULL_HD | TINT,
                log=True,
            ),
            Plot(
                "kernels-ceiling",
                "Green tint alone, of a plain copy's rate",
                "of_ceiling",
                "batch",
                BACKEND,
                FULL_HD | TINT,
                limit=1.0,
            ),
        ),
    ),
    Group(
        "engine",
        "Engine",
        "What is left of it with leases, batches and the device thread around?",
        "bench_engine",
        (
            Plot(
                "engine-small", "Engine, 640x480", "gb_per_s", "batch", BACKEND, VGA | ENGINE, limit="ceiling_gb_per_s"
            ),
            Plot(
                "engine-large",
                "Engine, 1920x1080",
                "gb_per_s",
                "batch",
                BACKEND,
                FULL_HD | ENGINE,
                limit="ceiling_gb_per_s",
            ),
        ),
    ),
    Group(
        "batching",
        "Batching",
        "How do batches form, and what does waiting for them add?",
        "bench_batching",
        (
            Plot("batching-peak", "Peak, 640x480", "frames_per_second", "streams", WHO, DEFAULTS | {"loop": "closed"}),
            Plot(
                "batching-delay",
                "99 live frames in 100 wait",
                "queue_p99_us",
                "streams",
                WHO,
                DEFAULTS | {"loop": "open"},
            ),
        ),
    ),
    Group(
        "jobs",
        "Jobs",
        "What does the worker add to a job, and what does the network?",
        "bench_jobs",
        (
            Plot("jobs-rate", "Jobs a second", "jobs_per_second", "connections", TARGET, floor=ECHOES),
            Plot("jobs-p99", "99 jobs in 100 are done within", "p99_us", "connections", TARGET, floor=ECHOES, log=True),
        ),
    ),
    Group(
        "media",
        "Media",
        "What do demuxing, slots and muxing add to a live picture?",
        "bench_media",
        (Plot("media", "A picture of 704x384", "cpu_ms", "what", where=SMALL, floor=("floor: sum",)),),
    ),
    Group(
        "sandbox",
        "Sandboxed decoding",
        "What does a process of its own add to decoding a stream?",
        "bench_sandbox",
        (Plot("sandbox", "A picture of 704x384", "cpu_ms", "what", where=SMALL),),
    ),
    Group(
        "live",
        "Live streams",
        "At what latency and CPU do live streams run?",
        "bench_live",
        (
            Plot("live-latency", "95 pictures in 100 are late by", "p95_ms", "streams", where=REAL_TIME),
            Plot("live-cpu", "CPU of the worker a picture", "cpu_ms", "streams", where=REAL_TIME, limit="floor_ms"),
        ),
    ),
    Group(
        "capacity",
        "Capacity",
        "How many live streams fit in real time, and what binds?",
        "bench_capacity",
        (
            Plot(
                "capacity",
                "Worst stream: 95 pictures in 100 are late by",
                "worst_p95_ms",
                "streams",
                BACKEND,
                PACED,
                limit="budget_ms",
                log=True,
            ),
        ),
    ),
    Group(
        "trickle",
        "Trickle",
        "How fast does one publisher reach many readers?",
        "bench_trickle",
        (Plot("trickle", "All readers together get", "trickle_mb_per_s", "readers", limit="floor_mb_per_s"),),
    ),
    Group(
        "health",
        "Health",
        "How long does /health take while everything is busy?",
        "bench_health",
        (Plot("health", "99 in 100 are answered within", "p99_us", "target", limit="floor_p99_us"),),
    ),
    Group(
        "peers-live",
        "Peers: a live stream",
        "How does pytrickle carry the same stream on this machine?",
        "bench_peers_live",
        (
            Plot("peers-cpu", "CPU of a live frame", "cpu_ms", "case", ("server",)),
            Plot("peers-late", "99 live frames in 100 are late by", "p99_ms", "case", ("server",)),
        ),
        asked=True,
    ),
    Group(
        "peers-jobs",
        "Peers: raw frames",
        "How do NVIDIA Triton and LitServe serve the same frames on this machine?",
        "bench_peers_jobs",
        (Plot("peers-rate", "640x480 frames as jobs", "jobs_per_second", "clients", ("server",), log=True),),
        asked=True,
    ),
)


def group(name: str) -> Group | None:
    return next((each for each in GROUPS if each.name == name), None)
