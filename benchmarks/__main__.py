"""``python -m benchmarks [--quick] [--soak MINUTES] [--output FILE]``: run, print, and keep the figures as JSON."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import bench_jobs, bench_kernels, soak
from benchmarks.harness import machine

SCHEMA = 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds, for a look")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="jobs for so long, and whether memory stays flat")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    given = parser.parse_args()
    console = Console()
    began = time.time()
    report: dict[str, Any] = {"schema": SCHEMA, "machine": machine(), "unix_time": int(began), "quick": given.quick}
    failed = False
    if given.soak:
        with console.status(f"soak, {given.soak:g} minutes"):
            report["soak"] = soak.run(given.soak * 60)
        console.print(report["soak"])
        failed = not report["soak"]["flat"]
    else:
        with console.status("kernels"):
            report["kernels"] = bench_kernels.run(given.quick)
        _print(console, "green tint, one core, one frame", report["kernels"])
        with console.status("jobs: echo, worker, page's processor, chain"):
            report["jobs"] = bench_jobs.run(given.quick)
        _print(console, "a 640x480 frame as a job", report["jobs"])
    report["seconds"] = round(time.time() - began, 1)
    console.print(f"{report['machine']['cpu']}, {report['machine']['cores']} cores, no GPU used; {report['seconds']} s")
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(report, indent=1) + "\n")
        console.print(f"written to {given.output}")
    return int(failed)


def _print(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
    return str(value)


if __name__ == "__main__":
    raise SystemExit(main())
