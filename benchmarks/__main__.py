"""``python -m benchmarks [--quick] [--soak MINUTES] [--output FILE]``: run, print, and keep the figures as JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import bench_jobs, bench_kernels, bench_live, bench_media, bench_trickle, soak
from benchmarks.harness import machine

SCHEMA = 1

GROUPS: dict[str, tuple[str, Callable[[bool], list[dict[str, Any]]]]] = {
    "kernels": ("green tint, one core, one frame", bench_kernels.run),
    "jobs": ("a 640x480 frame as a job", bench_jobs.run),
    "media": ("a live picture, transport stream to transport stream, CPU", bench_media.run),
    "live": ("live streams, worker and trickle server as processes of their own", bench_live.run),
    "trickle": ("trickle fan-out, against the same bytes over bare sockets", bench_trickle.run),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds, for a look")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="jobs for so long, and whether memory stays flat")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument(
        "--only", default="kernels,jobs", help=f"comma list of {', '.join(GROUPS)}, or all (default: %(default)s)"
    )
    given = parser.parse_args()
    wanted = list(GROUPS) if given.only == "all" else given.only.split(",")
    if unknown := [name for name in wanted if name not in GROUPS]:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    began = time.time()
    report: dict[str, Any] = {"schema": SCHEMA, "machine": machine(), "unix_time": int(began), "quick": given.quick}
    failed = False
    if given.soak:
        with console.status(f"soak, {given.soak:g} minutes"):
            report["soak"] = soak.run(given.soak * 60)
        console.print(report["soak"])
        failed = not report["soak"]["flat"]
    else:
        for name in wanted:
            title, run = GROUPS[name]
            with console.status(title):
                report[name] = run(given.quick)
            _print(console, title, report[name])
    report["seconds"] = round(time.time() - began, 1)
    console.print(f"{report['machine']['cpu']}, {report['machine']['cores']} cores, no GPU used; {report['seconds']} s")
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(report, indent=1) + "\n")
        console.print(f"written to {given.output}")
    return int(failed)


HEADS = {
    "size": "size",
    "what": "what",
    "us": "us",
    "times_memcpy": "x memcpy",
    "target": "target",
    "connections": "conn.",
    "p50_us": "p50 us",
    "p99_us": "p99 us",
    "jobs_per_second": "jobs/s",
    "p50_ratio": "p50 x echo",
    "p99_ratio": "p99 x echo",
    "rate_ratio": "jobs/s x echo",
    "cpu_ms": "CPU ms",
    "times_floor": "x floor",
    "pictures": "pictures",
    "readers": "readers",
    "floor_mb_per_s": "floor MB/s",
    "trickle_mb_per_s": "trickle MB/s",
    "of_floor": "of floor",
    "cpu_ms_per_mb": "CPU ms/MB",
}


def _print(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title)
    keys = {key for row in rows for key in row}
    shown = [name for name in HEADS if name in keys]
    for name in shown:
        table.add_column(HEADS[name], justify="left" if isinstance(rows[0].get(name), str) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(row.get(name, "")) for name in shown))
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
    return str(value)


if __name__ == "__main__":
    raise SystemExit(main())
