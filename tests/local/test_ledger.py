"""The ledger: what a job costs, and that no row is lost or torn."""

from __future__ import annotations

import asyncio
import re
import signal
import sqlite3
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_byoc.errors import ConfigError
from gpu_byoc.local import ledger as ledgers
from gpu_byoc.local.ledger import FILE, Entry, Ledger, Totals, billed, compute_seconds, read_usage, utc
from tests.local.kit import in_loop, soon
from tests.support.processes import running


def entry(number: int, capability: str = "a", compute: float | None = 0.5) -> Entry:
    return Entry(f"job{number}", capability, utc(1_700_000_000.0), 1.25, 2, compute, "ok", 200)


@pytest.mark.parametrize(("wall", "cost"), [(0.0, 1), (0.2, 1), (1.0, 1), (1.0001, 2), (3.01, 4)])
def test_seconds_are_rounded_up(wall: float, cost: int) -> None:
    assert billed(wall, dispatched=True) == cost
    assert billed(wall, dispatched=False) == 0


def test_the_start_is_utc() -> None:
    assert utc(0.25) == "1970-01-01T00:00:00.250Z"


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ('{"compute_seconds": 0.125, "backend": "numpy"}', 0.125),
        ('{"compute_seconds": 2}', 2.0),
        ('{"compute_seconds": -1}', None),
        ('{"compute_seconds": true}', None),
        ('{"compute_seconds": "1"}', None),
        ('{"compute_seconds": NaN}', None),
        ('{"compute_seconds": 1e999}', None),
        (f'{{"compute_seconds": 1{"0" * 400}}}', None),  # an integer beyond any float
        (f'{{"compute_seconds": 1{"0" * 5000}}}', None),  # and one that Python refuses to read
        ("{}", None),
        ("[1]", None),
        ("not JSON", None),
        ("[" * 100_000, None),
        ("", None),
        (None, None),
    ],
)
def test_compute_seconds_of_a_worker(header: str | None, seconds: float | None) -> None:
    assert compute_seconds(header) == seconds


@given(st.text())
def test_no_header_breaks_the_reader(header: str) -> None:
    got = compute_seconds(header)
    assert got is None or got >= 0


@in_loop
async def test_rows_are_there_after_close_and_totals_go_on(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "new" / "dir")
    ledger.open()
    for number in range(500):
        ledger.add(entry(number, "ab"[number % 2], None if number % 5 == 0 else 0.5))
    await ledger.close()
    await ledger.close()
    usage = read_usage(tmp_path / "new" / "dir", 3)
    assert usage.entries == [entry(497, "b"), entry(498, "a"), entry(499, "b")]
    assert usage.totals == {"a": Totals(250, 312.5, 500, 100.0), "b": Totals(250, 312.5, 500, 100.0)}
    again = Ledger(tmp_path / "new" / "dir")
    again.open()
    assert again.totals == Totals(500, 625.0, 1000, 200.0)
    await again.close()


@in_loop
async def test_rows_are_read_while_it_writes(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.open()
    ledger.add(entry(1))
    await soon(lambda: read_usage(tmp_path, 9).entries == [entry(1)])
    await ledger.close()


@in_loop
async def test_rows_wait_while_the_disk_refuses_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger(tmp_path)
    ledger.open()
    try:
        with sqlite3.connect(tmp_path / FILE) as vandal:
            vandal.execute("ALTER TABLE jobs RENAME TO gone")
        vandal.close()
        await ledger.book(entry(1))
        assert "no such table" in ledger.error
        assert (ledger.waiting, ledger.totals.jobs) == (1, 0)
        assert "no new jobs until it takes rows again" in caplog.text
        with sqlite3.connect(tmp_path / FILE) as vandal:
            vandal.execute("ALTER TABLE gone RENAME TO jobs")
        vandal.close()
        await soon(lambda: (ledger.error, ledger.waiting) == ("", 0))  # tried again without anything new
        await ledger.book(entry(2))
    finally:
        await ledger.close()
    assert read_usage(tmp_path, 9).entries == [entry(1), entry(2)]


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="-datadir"):
        Ledger(tmp_path / "file").open()
    with pytest.raises(ConfigError, match="-datadir"):
        read_usage(tmp_path, 1)
    (tmp_path / FILE).write_text("this is no database, and long enough to see that")
    with pytest.raises(ConfigError, match="cannot read"):
        read_usage(tmp_path, 1)
    with pytest.raises(ConfigError, match="-datadir"):
        Ledger(tmp_path).open()


HOLDING = """
import asyncio, sys
from pathlib import Path
from gpu_byoc.local.ledger import Ledger

Ledger(Path(sys.argv[1])).open()
print("open", flush=True)
sys.stdin.read()
"""


@in_loop
async def test_one_directory_has_one_orchestrator(tmp_path: Path) -> None:
    """A second one would take the first one's running jobs for unfinished."""
    first, second = Ledger(tmp_path), Ledger(tmp_path)
    first.open()
    try:
        first.begin("job1", "a", utc(1_700_000_000.0))
        await soon(lambda: [row.outcome for row in read_usage(tmp_path, 9).entries] == ["running"])
        for _ in range(2):
            with pytest.raises(ConfigError, match="-datadir: another orchestrator keeps its ledger in"):
                second.open()
        assert [row.outcome for row in read_usage(tmp_path, 9).entries] == ["running"]
        await first.book(entry(1))
    finally:
        await first.close()
    second.open()
    await second.close()
    assert second.totals == Totals(1, 1.25, 2, 0.5)


def test_a_killed_orchestrator_keeps_nobody_out(tmp_path: Path) -> None:
    with running(str(tmp_path), program=("-c", HOLDING)) as process:
        process.wait_for("open")
        with pytest.raises(ConfigError, match="another orchestrator"):
            Ledger(tmp_path).open()
        process.end(signal.SIGKILL)
    ledger = Ledger(tmp_path)
    ledger.open()
    asyncio.run(ledger.close())


def test_rows_and_sums_are_of_one_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while jobs end: what a bill lists is what it adds up."""
    monkeypatch.setattr(ledgers, "GATHER_SECONDS", 0.0)
    ledger = Ledger(tmp_path)
    ledger.open()
    over = threading.Event()

    def jobs_end() -> None:
        for number in range(20_000):
            if over.is_set():
                return
            ledger.add(entry(number))
            if not number % 20:
                over.wait(0.001)

    thread = threading.Thread(target=jobs_end)
    thread.start()
    try:
        seen: set[int] = set()
        while len(seen) < 30 and thread.is_alive():
            usage = read_usage(tmp_path, -1)
            seen.add(len(usage.entries))
            assert sum(each.jobs for each in usage.totals.values()) == len(usage.entries)
            assert sum(each.billed_seconds for each in usage.totals.values()) == 2 * len(usage.entries)
    finally:
        over.set()
        thread.join()
        asyncio.run(ledger.close())
    assert len(seen) > 5, "it grew meanwhile"


KILLED = """
import sys, itertools
from pathlib import Path
from gpu_byoc.local.ledger import Entry, Ledger
ledger = Ledger(Path(sys.argv[1]))
ledger.open()
for number in itertools.count():
    ledger.add(Entry(f"job{number}", "a", "2026-01-01T00:00:00.000Z", 0.5, 1, 0.25, "ok", 200))
    if number % 1000 == 0:
        print("added", number, flush=True)
    if number > 20_000:
        sys.stdin.read()
"""


BEGUN = """
import asyncio, sys
from pathlib import Path
from gpu_byoc.local.ledger import Entry, Ledger

async def main():
    ledger = Ledger(Path(sys.argv[1]))
    ledger.open()
    ledger.add(Entry("job1", "a", "2026-01-01T00:00:00.000Z", 0.5, 1, 0.25, "ok", 200))
    ledger.begin("job2", "a", "2026-01-01T00:00:01.000Z")
    print("begun", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_a_job_that_was_running_at_a_kill_is_unfinished(tmp_path: Path) -> None:
    def outcomes() -> list[tuple[str, str, int]]:
        rows = read_usage(tmp_path, 9).entries
        return [(row.job_id, row.outcome, row.billed_seconds) for row in rows]

    with running(str(tmp_path), program=("-c", BEGUN)) as process:
        process.wait_for("begun")

        async def both_are_stored() -> None:
            await soon(lambda: len(outcomes()) == 2)

        asyncio.run(both_are_stored())
        assert outcomes() == [("job1", "ok", 1), ("job2", "running", 0)]
        assert read_usage(tmp_path, 9).totals["a"].jobs == 1, "what runs is in no total"
        process.end(signal.SIGKILL)

    async def start_again() -> None:
        ledger = Ledger(tmp_path)
        ledger.open()
        await ledger.close()
        assert ledger.totals == Totals(2, 0.5, 1, 0.25)

    asyncio.run(start_again())
    assert outcomes() == [("job1", "ok", 1), ("job2", "unfinished", 0)]
    assert read_usage(tmp_path, 9).totals == {"a": Totals(2, 0.5, 1, 0.25)}


@in_loop
async def test_a_row_is_completed_whether_or_not_it_was_written_before(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.open()
    try:
        ledger.begin("job1", "a", utc(1_700_000_000.0))
        await soon(lambda: [row.outcome for row in read_usage(tmp_path, 9).entries] == ["running"])
        ledger.begin("job2", "a", utc(1_700_000_000.0)).cancel()
        ledger.add(entry(2))
        await ledger.book(entry(1))
        assert [row.outcome for row in read_usage(tmp_path, 9).entries] == ["ok", "ok"], "also what came before"
        ledger.add(entry(1), entry(1))
        assert ledger.totals.jobs == 2
        ledger.add(replace(entry(3), outcome="client_gone"), entry(3))
    finally:
        await ledger.close()
    found = [(row.job_id, row.outcome) for row in read_usage(tmp_path, 9).entries]
    assert found == [("job1", "ok"), ("job2", "ok"), ("job3", "client_gone")]


@in_loop
async def test_whoever_books_waits_for_nobody_elses_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that may wait for company does not hold up one that may not."""
    monkeypatch.setattr(ledgers, "GATHER_SECONDS", 1000.0)
    ledger = Ledger(tmp_path)
    ledger.open()
    try:
        ledger.add(entry(1))
        async with asyncio.timeout(20):
            await ledger.book(entry(2))
        assert read_usage(tmp_path, 9).entries == [entry(1), entry(2)]
    finally:
        await ledger.close()


def test_kill_9_tears_no_row(tmp_path: Path) -> None:
    with running(str(tmp_path), program=("-c", KILLED)) as process:
        process.wait_for("added 5000")

        async def some_are_stored() -> None:
            await soon(lambda: read_usage(tmp_path, 1).entries)

        asyncio.run(some_are_stored())
        assert process.end(signal.SIGKILL) == -signal.SIGKILL
    usage = read_usage(tmp_path, 100_000)
    assert usage.entries, "rows from before the kill are there"
    assert [row.job_id for row in usage.entries] == [f"job{number}" for number in range(len(usage.entries))]
    assert {(row.wall_seconds, row.billed_seconds, row.compute_seconds) for row in usage.entries} == {(0.5, 1, 0.25)}
    database = sqlite3.connect(tmp_path / FILE)
    assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    database.close()
    assert all(re.fullmatch(r"job\d+", row.job_id) for row in usage.entries)
