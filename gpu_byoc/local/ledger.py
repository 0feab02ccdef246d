"""The orchestrator's ledger of wall seconds: one row a job, in an SQLite file in ``-datadir``.

One thread writes, in transactions of whatever came within GATHER_SECONDS, so that the event loop never waits for a
disk. In WAL mode a transaction is in the file as a whole or not at all, whatever kills the process; kill -9 loses the
rows of the last GATHER_SECONDS, an ordinary shutdown none.

What a job costs (the rule of go-livepeer's batch jobs): the seconds from just before the call of the worker to just
after its answer was read, rounded up. A job that failed after it was sent to the worker costs the same; a job that was
refused, or that never reached a worker, costs nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import queue
import sqlite3
import threading
from contextlib import closing
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from gpu_byoc.errors import ConfigError

log = logging.getLogger(__name__)

FILE: Final = "ledger.sqlite3"
GATHER_SECONDS: Final = 0.1
MAX_PENDING: Final = 100_000  # rows kept in memory while the disk refuses them; some 30 MB

_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    job_id          TEXT PRIMARY KEY,
    capability      TEXT NOT NULL,
    started         TEXT NOT NULL,     -- UTC, ISO 8601
    wall_seconds    REAL NOT NULL,
    billed_seconds  INTEGER NOT NULL,
    compute_seconds REAL,              -- what the worker says in X-Metadata; NULL if it does not
    outcome         TEXT NOT NULL,     -- ok, client_gone, or the code of an error
    http_status     INTEGER NOT NULL
)
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One job, as the table has it. ``started`` is UTC in ISO 8601, everything else in seconds."""

    job_id: str
    capability: str
    started: str
    wall_seconds: float
    billed_seconds: int
    compute_seconds: float | None
    outcome: str
    http_status: int


@dataclass(slots=True)
class Totals:
    """Sums over jobs."""

    jobs: int = 0
    wall_seconds: float = 0.0
    billed_seconds: int = 0
    compute_seconds: float = 0.0

    def add(self, entry: Entry) -> None:
        self.jobs += 1
        self.wall_seconds += entry.wall_seconds
        self.billed_seconds += entry.billed_seconds
        self.compute_seconds += entry.compute_seconds or 0.0


_COLUMNS = ", ".join(field.name for field in fields(Entry))
_INSERT = f"INSERT INTO jobs ({_COLUMNS}) VALUES ({', '.join('?' * len(fields(Entry)))})"
_SUMS = "count(*), total(wall_seconds), coalesce(sum(billed_seconds), 0), total(compute_seconds)"


def billed(wall_seconds: float, dispatched: bool) -> int:
    """Whole seconds to pay for; a job that reached the worker costs at least one."""
    return max(1, math.ceil(wall_seconds)) if dispatched else 0


def utc(timestamp: float) -> str:
    """Seconds since 1970 as ISO 8601 with milliseconds and Z."""
    return datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def compute_seconds(metadata: str | None) -> float | None:
    """``compute_seconds`` of an X-Metadata header, None if it is not there or not a number of seconds."""
    if not metadata:
        return None
    try:
        value = json.loads(metadata)
    except (ValueError, RecursionError):
        return None
    seconds = value.get("compute_seconds") if isinstance(value, dict) else None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        return None
    seconds = float(seconds)
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


class Ledger:
    """Append-only. ``open`` before the first ``add``, ``close`` after the last one; both block, briefly."""

    def __init__(self, datadir: Path) -> None:
        self.path = datadir / FILE
        self.totals = Totals()  # of the file, earlier runs included, and of what is still to be written
        self.error = ""  # what the disk said last; "" while it takes the rows
        self.lost = 0  # rows given up because more than MAX_PENDING were waiting
        self._rows: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._write, name="ledger")
        self._database: sqlite3.Connection | None = None

    def open(self) -> None:
        """Raises ConfigError, naming -datadir, when the file cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=5.0, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute(_TABLE)
            self._database.commit()
            self.totals = Totals(*self._database.execute(f"SELECT {_SUMS} FROM jobs").fetchone())
        except (OSError, sqlite3.Error) as error:
            if self._database is not None:
                self._database.close()
            raise ConfigError(f"-datadir: cannot keep a ledger in {self.path}: {error}") from error
        self._thread.start()

    def add(self, entry: Entry) -> None:
        """Take a row to be written; does not wait."""
        self.totals.add(entry)
        self._rows.put(entry)

    async def close(self) -> None:
        """Write what is left and end the thread. May be called twice."""
        self._closing.set()
        self._rows.put(None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        if self._database is not None:
            self._database.close()
            self._database = None

    # --- the thread

    def _write(self) -> None:
        pending: list[Entry] = []
        while True:
            last = self._gather(pending)
            if pending and self._store(pending):
                pending.clear()
            if last:
                break
            if len(pending) > MAX_PENDING:
                self.lost += len(pending)
                pending.clear()
        if pending:
            log.error("ledger %s: %d rows could not be written: %s", self.path, len(pending), self.error)

    def _gather(self, pending: list[Entry]) -> bool:
        """Wait for a row, then take all that come within GATHER_SECONDS. True when the ledger is being closed."""
        row = self._rows.get()
        self._closing.wait(GATHER_SECONDS)
        while row is not None:
            pending.append(row)
            try:
                row = self._rows.get_nowait()
            except queue.Empty:
                return False
        return True

    def _store(self, rows: list[Entry]) -> bool:
        assert self._database is not None
        try:
            with self._database:
                self._database.executemany(_INSERT, map(astuple, rows))
        except sqlite3.Error as error:
            if str(error) != self.error:
                log.error("ledger %s: %s; keeping the rows in memory", self.path, error)
            self.error = str(error)
            return False
        self.error = ""
        return True


# --- reading, for ``gpu-byoc usage``


@dataclass(frozen=True, slots=True)
class Usage:
    """``entries`` are the latest, oldest first; ``totals`` are of all jobs, by capability."""

    entries: list[Entry]
    totals: dict[str, Totals]


def read_usage(datadir: Path, last: int) -> Usage:
    """The ledger in ``datadir``, also while an orchestrator is writing it. Raises ConfigError."""
    path = datadir / FILE
    if not path.is_file():
        raise ConfigError(f"there is no ledger in {datadir}; give the -datadir that the orchestrator was started with")
    try:
        with closing(sqlite3.connect(path, timeout=5.0)) as database:
            rows = database.execute(f"SELECT {_COLUMNS} FROM jobs ORDER BY rowid DESC LIMIT ?", (last,)).fetchall()
            sums = database.execute(
                f"SELECT capability, {_SUMS} FROM jobs GROUP BY capability ORDER BY capability"
            ).fetchall()
    except sqlite3.Error as error:
        raise ConfigError(f"cannot read the ledger {path}: {error}") from error
    return Usage([Entry(*row) for row in reversed(rows)], {name: Totals(*values) for name, *values in sums})
