"""What the names of figures mean: how they are printed, and which way is better.

A name ends in its unit, so that most need no line here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

Better = Literal["lower", "higher", ""]

COST: Final = (
    "cpu_seconds_per_million_frames",
    "compute_seconds_per_million_frames",
    "start_seconds",
    "rss_mb",
    "device_mb",
)
"""Columns of the cost table; left out of the group's own."""

FILE_ONLY: Final = (
    *("frames_in", "frames_out", "jobs", "asked", "budget_ms", "max_batch", "max_wait_ms", "cores", "others_cores"),
    *("batch_sizes", "batches_left", "handed_over_late_p99_us", "paced_p50_ms", "paced_p99_ms", "cores_of"),
)
"""What no table shows, so that it fits a terminal: how much was counted, what the row's name or the group's settings
say, and breakdowns for whoever looks for a cause."""

COUNTS: Final = ("batch", "connections", "streams", "readers", "clients")
"""Have no column where the rows' names say them."""

TROUBLE: Final = ("refused", "dropped", "lost")
"""Have a column where one of the rows has some."""

MARKS: Final = ("name", "spread", "windows", "unstable", "skipped", "failed")
"""Keys of a row that are about the row."""


@dataclass(frozen=True, slots=True)
class Metric:
    """``better`` is empty where neither way is: such a figure is shown and never judged.

    ``tail``: a figure of the slowest few, or of a process's start and memory, which moves more from run to run than
    medians do. ``compare --fail-under`` judges it only when it is asked for by name.
    """

    head: str
    better: Better = ""
    tail: bool = False


NAMED: Final = {
    "cpu_seconds_per_million_frames": Metric("CPU s / million frames", "lower"),
    "compute_seconds_per_million_frames": Metric("compute s / million frames", "lower"),
    "start_seconds": Metric("start s", "lower", tail=True),
    "rss_mb": Metric("RSS MB", "lower", tail=True),
    "device_mb": Metric("device MB", "lower", tail=True),
    "jobs_per_second": Metric("jobs/s", "higher"),
    "frames_per_second": Metric("frames/s", "higher"),
    "of_floor": Metric("of the floor", "higher"),
    "of_ceiling": Metric("of the ceiling", "higher"),
    "rate_ratio": Metric("jobs/s x echo", "higher"),
    "cpu_ms": Metric("CPU ms", "lower"),
    "cpu_ms_per_mb": Metric("CPU ms/MB", "lower"),
    "streams_that_fit": Metric("streams that fit", "higher"),
    "engine_gain": Metric("engine's gain", "higher"),
    "max_wait_ms": Metric("max wait ms"),
    "budget_ms": Metric("budget ms"),
    "offered_per_second": Metric("offered/s"),
    "frames_a_batch": Metric("frames a batch"),
    "refused": Metric("refused", "lower", tail=True),
    "connections": Metric("connections"),
    "batch": Metric("batch"),
    "streams": Metric("streams"),
    "readers": Metric("readers"),
    "dropped": Metric("dropped", "lower", tail=True),
    "lost": Metric("lost", "lower"),
    "missed": Metric("missed", "lower", tail=True),
    "cores": Metric("cores busy"),
    "others_cores": Metric("others' cores"),
}

# Floors are of the machine, not of us: no way is better.
ENDINGS: Final[tuple[tuple[str, str, Better], ...]] = (
    ("_gb_per_s", " GB/s", "higher"),
    ("_mb_per_s", " MB/s", "higher"),
    ("_per_second", "/s", "higher"),
    ("_fps", " frames/s", "higher"),
    ("_us", " µs", "lower"),
    ("_ms", " ms", "lower"),
    ("_seconds", " s", "lower"),
    ("_mb", " MB", "lower"),
    ("_ratio", " ratio", "lower"),
    ("_over_peer", " over peer", "higher"),
)

ALONE: Final[dict[str, tuple[str, Better]]] = {
    "us": ("µs", "lower"),
    "ms": ("ms", "lower"),
    "gb_per_s": ("GB/s", "higher"),
    "mb_per_s": ("MB/s", "higher"),
    "fps": ("frames/s", "higher"),
}

TAILS: Final = ("p90", "p95", "p99", "max", "jitter", "first_frame")
NOBODYS: Final = ("floor", "echo_", "ceiling", "others")


def metric(name: str) -> Metric:
    """What the figure called ``name`` is."""
    if known := NAMED.get(name):
        return known
    if name in ALONE:
        return Metric(*ALONE[name])
    tail = any(part in name for part in TAILS)
    if name.startswith("times_") or "_times_" in name:
        return Metric(name.replace("_times_", " x ").replace("times_", "x ").replace("_", " "), "lower", tail)
    for ending, unit, better in ENDINGS:
        if name.endswith(ending):
            head = name.removesuffix(ending).replace("_", " ") + unit
            return Metric(head, "" if name.startswith(NOBODYS) else better, tail)
    return Metric(name.replace("_", " "))


def figures(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row, without what only says how it was measured."""
    return {
        key: float(value)
        for key, value in row.items()
        if key not in MARKS and isinstance(value, int | float) and not isinstance(value, bool)
    }


def written(value: Any) -> str:
    """A cell: three digits and thousands apart; words as they are."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return "" if value is None else str(value)
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 0.01 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
