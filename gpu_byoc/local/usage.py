"""``gpu-byoc usage``: what an orchestrator's ledger says, job by job, or a worker, stream by stream and by second.

The local orchestrator routes jobs, so its ledger has jobs. Live streams are metered by the worker: it knows how many
seconds of the device each had in each of the last sixty seconds (``GET /compute``).
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gpu_byoc.config import is_plain_url
from gpu_byoc.errors import EXIT_USAGE, ConfigError, OperatorError
from gpu_byoc.local import goflags
from gpu_byoc.local.goflags import Flag
from gpu_byoc.local.ledger import Entry, Usage, read_usage
from gpu_byoc.local.metadata import amount

if TYPE_CHECKING:
    from rich.table import Table

FLAGS: Final = (
    Flag("dataDir", "~/.lpData-orch", "the orchestrator's directory", ("datadir",)),
    Flag("last", 20, "jobs to list, -1 for all; the totals are of all"),
    Flag("worker", "", "URL of a worker: list what each of its streams had in each of the last 60 seconds instead"),
    Flag("json", False, "print JSON instead of a table"),
    Flag("csv", False, "print CSV instead of a table: one line a job, or a stream's second"),
    Flag("help", False, "print this", ("h",)),
)

ANSWER_SECONDS: Final = 10.0

END_OF_TIME: Final = 1 << 32
"""Unix time; beyond it somebody counts something else."""


@dataclass(frozen=True, slots=True)
class Second:
    """What the work under one name had of the device in one second, as the worker says. ``jobs`` is all jobs."""

    second: int  # Unix time
    name: str
    frames: int
    batches: int
    compute_seconds: float
    copy_seconds: float
    queue_seconds: float


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    try:
        values = goflags.parse(FLAGS, argv)
        if values["help"]:
            print(f"gpu-byoc usage [flags]\n\n{goflags.usage(FLAGS)}")
            return 0
        if values["json"] and values["csv"]:
            raise ConfigError("give one of -json and -csv")
        kind = "json" if values["json"] else "csv" if values["csv"] else "text"
        if values["worker"]:
            text = _of_worker(str(values["worker"]), kind)
        else:
            usage = read_usage(Path(str(values["dataDir"])).expanduser(), max(-1, int(values["last"])))
            text = _of_ledger(usage, kind)
    except OperatorError as error:
        print(f"gpu-byoc usage: {error}", file=sys.stderr)
        return EXIT_USAGE
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The reader has what it wanted (``| head``). Python would flush what is left at its end and complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _of_ledger(usage: Usage, kind: str) -> str:
    from gpu_byoc.local.report import usage_tables

    if kind == "json":
        totals = {name: asdict(sums) for name, sums in usage.totals.items()}
        return json.dumps({"jobs": [asdict(entry) for entry in usage.entries], "totals": totals}, indent=2)
    if kind == "csv":
        return _csv([each.name for each in fields(Entry)], [asdict(entry) for entry in usage.entries])
    return _text(usage_tables(usage)) if usage.entries or usage.totals else "no jobs yet"


def _of_worker(url: str, kind: str) -> str:
    from gpu_byoc.local.report import seconds_table

    seconds = read_seconds(url)
    if kind == "json":
        return json.dumps({"seconds": [asdict(second) for second in seconds]}, indent=2)
    if kind == "csv":
        return _csv([each.name for each in fields(Second)], [asdict(second) for second in seconds])
    return _text([seconds_table(seconds)]) if seconds else "no work in the last minute"


def read_seconds(url: str) -> list[Second]:
    """What ``GET /compute`` of a worker says, oldest first. Raises ConfigError."""
    if not is_plain_url(url):
        raise ConfigError(f"-worker {url}: not a URL like http://127.0.0.1:8000")
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/compute", timeout=ANSWER_SECONDS) as answer:
            rows = json.load(answer)["rows"]
            return [_second(row) for row in rows]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        reason = getattr(error, "reason", None)  # urllib wraps the system's error, whose own text is the plainer one
        why = (isinstance(reason, OSError) and reason.strerror) or error
        raise ConfigError(f"-worker {url}: cannot read its GET /compute: {why}") from error


def _second(row: Any) -> Second:
    """Raises TypeError, LookupError."""
    values: dict[str, Any] = {each.name: row[each.name] for each in fields(Second)}
    counts, spent = ("second", "frames", "batches"), ("compute_seconds", "copy_seconds", "queue_seconds")
    if (
        not isinstance(values["name"], str)
        or not values["name"].isprintable()
        or any(type(values[name]) is not int for name in counts)
        or any(amount(values[name]) is None for name in (*counts, *spent))
        or values["second"] >= END_OF_TIME
    ):
        raise TypeError(f"a row with values of other types, or that cannot be: {row!r:.200}")
    return Second(**values)


def _csv(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """With a head. What a spreadsheet would take for a formula gets a quote before it: names are the network's."""
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue().rstrip("\n")


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _text(tables: Sequence[Table]) -> str:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)  # a pipe has no width; nothing is to be cut off
    with console.capture() as captured:
        for table in tables:
            console.print(table)
    return captured.get().rstrip("\n")
