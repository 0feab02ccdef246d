"""The orchestrator's ledger of wall seconds: one row a job, in an SQLite file in ``-datadir``.

A row is written when a job is sent to the worker (outcome ``running``) and completed before the client has the end of
its answer: what was answered is booked. One thread writes, in transactions of whatever has come meanwhile, so that the
event loop never waits for a disk. In WAL mode a transaction is in the file as a whole or not at all, whatever kills the
process; a cut of the power may lose the last of them. A job that was running then is ``unfinished`` from the next start
on, and billed nothing.

While the disk takes no rows (full, read-only, locked, hanging, the file gone) ``error`` says why, and the orchestrator
refuses new jobs: they could not be booked. Those under way end and are answered; their rows stay in memory, are tried
again every second, and go to the log as JSON if the process has to end before that. So one fault loses nothing; only
kill -9 while the disk is full or hangs loses the ends of the jobs that were under way when that began.

What a job costs (the rule of go-livepeer's batch jobs): its wall seconds, rounded up. Wall seconds count from the call
of the worker until its whole answer has arrived at the orchestrator. The wait for a client that is slow to send is in
them, because the body streams through to the worker; the wait for a client that is slow to read is not, as long as
what it has not read fits the orchestrator's buffer of 1 MiB. A job that failed after it was sent to the worker costs
the same; a job that was refused, or that never reached a worker, costs nothing.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import math
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, astuple, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TextIO

from gpu_byoc.errors import ConfigError
from gpu_byoc.local.metadata import amount, read_object

log = logging.getLogger(__name__)

FILE: Final = "ledger.sqlite3"
LOCK: Final = "ledger.lock"  # beside it; whoever has it locked is the one who writes
GATHER_SECONDS: Final = 0.1  # how long a row may wait for company when nobody waits for it
RUNNING_SECONDS: Final = 0.1  # a job that takes longer than that is listed while it runs
RETRY_SECONDS: Final = 1.0
BOOK_SECONDS: Final = 5.0  # for a disk that hangs; the answer then goes out unbooked
RUNNING: Final = "running"
UNFINISHED: Final = "unfinished"

_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    job_id          TEXT PRIMARY KEY,
    capability      TEXT NOT NULL,
    started         TEXT NOT NULL,     -- UTC, ISO 8601
    wall_seconds    REAL NOT NULL,
    billed_seconds  INTEGER NOT NULL,
    compute_seconds REAL,              -- what the worker says in X-Metadata; NULL if it does not
    outcome         TEXT NOT NULL,     -- running, unfinished, ok, client_gone, or the code of an error
    http_status     INTEGER NOT NULL   -- 0 while it is running, or if it was never finished
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


_Row = tuple[Entry | None, Callable[[], None] | None]
"""A row, or None for the end, and who is told when it has been tried."""

_COLUMNS = ", ".join(field.name for field in fields(Entry))
_CHANGES = ", ".join(f"{field.name} = excluded.{field.name}" for field in fields(Entry) if field.name != "job_id")
_INSERT = (
    f"INSERT INTO jobs ({_COLUMNS}) VALUES ({', '.join('?' * len(fields(Entry)))}) "
    f"ON CONFLICT (job_id) DO UPDATE SET {_CHANGES}"
)
_ENDED = f"FROM jobs WHERE outcome != '{RUNNING}'"
_SUMS = "count(*), total(wall_seconds), coalesce(sum(billed_seconds), 0), total(compute_seconds)"


def billed(wall_seconds: float, dispatched: bool) -> int:
    """Whole seconds to pay for; a job that reached the worker costs at least one."""
    return max(1, math.ceil(wall_seconds)) if dispatched else 0


def utc(timestamp: float) -> str:
    """Seconds since 1970 as ISO 8601 with milliseconds and Z."""
    return datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def compute_seconds(metadata: str | None) -> float | None:
    """``compute_seconds`` of an X-Metadata header, None if it is not there or not a number of seconds."""
    return amount(read_object(metadata).get("compute_seconds")) if metadata else None


class Ledger:
    """``open``, then ``begin``, ``book`` and ``add`` as jobs do, ``close``. The first and the last block, briefly."""

    def __init__(self, datadir: Path) -> None:
        self.path = datadir / FILE
        self.totals = Totals()  # of the jobs that have ended: those in the file, earlier runs included, and later ones
        self.error = ""  # what the disk said last; "" while it takes the rows
        self.waiting = 0  # rows that it has not taken yet
        self._rows: queue.SimpleQueue[_Row] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="ledger")
        self._database: sqlite3.Connection | None = None
        self._lock: TextIO | None = None
        self._place = (0, 0)  # of the file, as the disk has it

    def open(self) -> None:
        """Raises ConfigError, naming -datadir, when the file cannot be written, or another orchestrator writes it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path.with_name(LOCK))
            self._database = sqlite3.connect(self.path, timeout=5.0, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute(_TABLE)
            # Whoever was to complete these was killed.
            self._database.execute("UPDATE jobs SET outcome = ? WHERE outcome = ?", (UNFINISHED, RUNNING))
            self._database.commit()
            self.totals = Totals(*self._database.execute(f"SELECT {_SUMS} {_ENDED}").fetchone())
            self._place = _place(self.path)
        except (OSError, sqlite3.Error) as error:
            self._let_go()
            why = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(
                f"-datadir: cannot keep a ledger in {self.path}: {why}; name a directory that this user can write to"
            ) from error
        self._thread.start()

    def begin(self, job_id: str, capability: str, started: str) -> asyncio.TimerHandle:
        """A job has been sent to the worker; ``book`` it when it ends. Cancel what is returned then: most jobs end
        before it is worth while to say that they run."""
        row = Entry(job_id, capability, started, 0.0, 0, None, RUNNING, 0)
        return asyncio.get_running_loop().call_later(RUNNING_SECONDS, self._rows.put, (row, None))

    async def book(self, entry: Entry) -> None:
        """Return when the row of a job that has ended is in the file, or the disk has refused it (see ``error``)."""
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def tell() -> None:
            loop.call_soon_threadsafe(_settle, done)

        self._rows.put((entry, tell))
        try:
            async with asyncio.timeout(BOOK_SECONDS):
                await done
        except TimeoutError:
            self.error = self.error or f"the disk has taken more than {BOOK_SECONDS:g} s for a row"
            log.error("ledger %s: %s; no new jobs until it takes rows again", self.path, self.error)
            self._rows.put((entry, None))  # once more: whenever that is written, the error is over

    def add(self, entry: Entry, booked: Entry | None = None) -> None:
        """A job has ended; count it. Its row is written unless it was ``booked`` just so."""
        self.totals.add(entry)
        if entry != booked:
            self._rows.put((entry, None))

    async def close(self) -> None:
        """Write what is left and end the thread. May be called twice."""
        self._rows.put((None, None))
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        self._let_go()

    def _let_go(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # --- the thread

    def _write(self) -> None:
        pending: dict[str, Entry] = {}  # by job; a job that begins and ends within one interval is written once
        last = False
        while not last:
            last, tell = self._gather(pending)
            if pending and self._store(list(pending.values())):
                pending.clear()
            self.waiting = len(pending)
            for each in tell:
                each()
        for row in pending.values():
            log.error("ledger %s: not written: %s", self.path, json.dumps(asdict(row)))

    def _gather(self, pending: dict[str, Entry]) -> tuple[bool, list[Callable[[], None]]]:
        """Wait for rows, until somebody waits for one or for GATHER_SECONDS. Whether it is the end, and who waits."""
        wait: float | None = RETRY_SECONDS if pending else None
        end: float | None = None
        tell: list[Callable[[], None]] = []
        while True:
            try:
                row, teller = self._rows.get(timeout=wait)
            except queue.Empty:
                return False, tell
            if row is None:
                return True, tell
            pending[row.job_id] = row
            if teller is not None:
                tell.append(teller)
            now = time.monotonic()
            end = now + GATHER_SECONDS if end is None else end
            wait = 0.0 if tell else max(0.0, end - now)

    def _store(self, rows: list[Entry]) -> bool:
        assert self._database is not None
        try:
            if _place(self.path) != self._place:  # SQLite would go on writing to what nobody can find any more
                raise FileNotFoundError("another file has taken its place; put it back, or start again")
            with self._database:
                self._database.executemany(_INSERT, map(astuple, rows))
        except (OSError, sqlite3.Error) as error:
            if str(error) != self.error:
                log.error("ledger %s: %s; no new jobs until it takes rows again", self.path, error)
            self.error = str(error)
            return False
        was_refused, self.error = bool(self.error), ""
        if was_refused:
            log.info("ledger %s: written again", self.path)
        return True


def _locked(path: Path) -> TextIO:
    """Opened, and locked until it is closed or its process ends, however that ends. Raises ConfigError, OSError."""
    file = path.open("a", encoding="ascii")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ConfigError(
            f"-datadir: another orchestrator keeps its ledger in {path.parent}; stop it, or give each a directory of "
            "its own"
        ) from error
    except OSError:
        file.close()
        raise
    return file


def _place(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _settle(done: asyncio.Future[None]) -> None:
    if not done.done():  # whoever waited may have given up
        done.set_result(None)


# --- reading, for ``gpu-byoc usage``


@dataclass(frozen=True, slots=True)
class Usage:
    """``entries`` are the latest, oldest first; ``totals`` are of all jobs that have ended, by capability."""

    entries: list[Entry]
    totals: dict[str, Totals]


def read_usage(datadir: Path, last: int) -> Usage:
    """The ledger in ``datadir``, also while an orchestrator is writing it. Raises ConfigError."""
    path = datadir / FILE
    if not path.is_file():
        raise ConfigError(f"there is no ledger in {datadir}; give the -datadir that the orchestrator was started with")
    try:
        with closing(sqlite3.connect(path, timeout=5.0, isolation_level=None)) as database:
            database.execute("BEGIN")  # rows and sums of one moment
            rows = database.execute(f"SELECT {_COLUMNS} FROM jobs ORDER BY rowid DESC LIMIT ?", (last,)).fetchall()
            sums = database.execute(
                f"SELECT capability, {_SUMS} {_ENDED} GROUP BY capability ORDER BY capability"
            ).fetchall()
    except sqlite3.Error as error:
        raise ConfigError(f"cannot read the ledger {path}: {error}") from error
    return Usage([Entry(*row) for row in reversed(rows)], {name: Totals(*values) for name, *values in sums})
