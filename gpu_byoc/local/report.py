"""The ledger as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from gpu_byoc.local.ledger import Totals, Usage

if TYPE_CHECKING:
    from gpu_byoc.local.usage import Second


def usage_tables(usage: Usage) -> list[Table]:
    """The latest jobs, and the totals of all by capability."""
    return [_jobs(usage), _totals(usage)]


def seconds_table(seconds: Sequence[Second]) -> Table:
    """What each stream had of the device, second by second."""
    table = Table(title="the last minute, by second and stream", box=box.SIMPLE)
    table.add_column("second (UTC)", no_wrap=True)
    table.add_column("stream", overflow="fold")
    for name in ("frames", "batches", "compute s", "copy s", "queue s"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in seconds:
        spent = (each.compute_seconds, each.copy_seconds, each.queue_seconds)
        at = datetime.fromtimestamp(each.second, UTC).strftime("%Y-%m-%d %H:%M:%S")
        counts = (str(each.frames), str(each.batches))
        table.add_row(at, Text(each.name), *counts, *(f"{number:.6f}" for number in spent))
    return table


def _jobs(usage: Usage) -> Table:
    table = Table(title=f"latest jobs ({len(usage.entries)})", box=box.SIMPLE)
    for name in ("started (UTC)", "job", "capability", "outcome"):
        table.add_column(name, overflow="fold")
    for name in ("HTTP", "wall s", "billed s", "compute s"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in usage.entries:
        # Text: what a name has in brackets is not markup
        table.add_row(
            Text(entry.started[:19].replace("T", " ")),
            Text(entry.job_id[:8]),
            Text(entry.capability),
            Text(entry.outcome),
            str(entry.http_status or "-"),
            f"{entry.wall_seconds:.4f}",
            str(entry.billed_seconds),
            "-" if entry.compute_seconds is None else f"{entry.compute_seconds:.6f}",
        )
    return table


def _totals(usage: Usage) -> Table:
    table = Table(title="totals of all jobs that have ended", box=box.SIMPLE)
    table.add_column("capability", overflow="fold")
    for name in ("jobs", "wall s", "billed s", "compute s"):
        table.add_column(name, justify="right", no_wrap=True)
    every = Totals()
    for name, sums in usage.totals.items():
        _add(table, Text(name), sums)
        every.jobs += sums.jobs
        every.wall_seconds += sums.wall_seconds
        every.billed_seconds += sums.billed_seconds
        every.compute_seconds += sums.compute_seconds
    if len(usage.totals) != 1:
        table.add_section()
        _add(table, Text("all"), every)
    return table


def _add(table: Table, name: Text, sums: Totals) -> None:
    table.add_row(
        name, str(sums.jobs), f"{sums.wall_seconds:.4f}", str(sums.billed_seconds), f"{sums.compute_seconds:.6f}"
    )
