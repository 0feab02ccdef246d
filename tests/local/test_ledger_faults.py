"""What was answered is booked: kill -9 at any moment, a full disk, a disk that hangs, a clock that jumps."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import random
import resource
import signal
import sqlite3
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
from aiohttp import web

from gpu_byoc.local import ledger as ledgers
from gpu_byoc.local.ledger import FILE, Entry, Ledger, read_usage
from gpu_byoc.local.relay import ROUTE
from tests.local.kit import FRAME, MODEL, box, echo, gateway, get, in_loop, orchestrator, post, says, soon
from tests.support.processes import WAIT, Process, free_port, running

BOOKING = """
import asyncio, itertools, sys
from pathlib import Path
from gpu_byoc.local.ledger import RUNNING_SECONDS, Entry, Ledger

async def main():
    ledger = Ledger(Path(sys.argv[1]))
    ledger.open()
    numbers = itertools.count()

    async def client(name):
        for number in numbers:
            job = f"{name}-{number}"
            listing = ledger.begin(job, "a", "2026-01-01T00:00:00.000Z")
            await asyncio.sleep(RUNNING_SECONDS * (number % 2))
            listing.cancel()
            row = Entry(job, "a", "2026-01-01T00:00:00.000Z", 0.5, 1, 0.25, "ok", 200)
            await ledger.book(row)
            print("answered", job, flush=True)
            ledger.add(row, row)

    await asyncio.gather(*(client(f"{sys.argv[2]}-{each}") for each in range(3)))

asyncio.run(main())
"""


def rows(datadir: Path) -> list[Entry]:
    return read_usage(datadir, -1).entries


def test_kill_9_at_any_moment_loses_no_row_that_was_acknowledged_and_doubles_none(tmp_path: Path) -> None:
    dice = random.Random(7)
    answered: list[str] = []
    for round_ in range(8):
        with running(str(tmp_path), str(round_), program=("-c", BOOKING)) as process:
            process.wait_for("answered")
            threading.Event().wait(dice.uniform(0.0, 0.12))  # the moment is the point
            process.end(signal.SIGKILL)
            answered += [line.split()[1] for line in process.log if line.startswith("answered") and len(line) > 12]
    with sqlite3.connect(tmp_path / FILE) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    database.close()
    names = [row.job_id for row in rows(tmp_path)]
    assert len(names) == len(set(names))
    outcomes = {row.job_id: row.outcome for row in rows(tmp_path)}
    assert len(answered) > 8
    assert {job: outcomes.get(job) for job in answered} == dict.fromkeys(answered, "ok")
    assert set(outcomes.values()) <= {"ok", "running", "unfinished"}
    for row in rows(tmp_path):
        assert (row.wall_seconds, row.billed_seconds) == ((0.5, 1) if row.outcome == "ok" else (0.0, 0)), "torn"


@pytest.mark.parametrize("kind", ["length", "chunked", "error"])
@in_loop
async def test_the_row_is_in_the_file_when_the_client_has_its_answer(tmp_path: Path, kind: str) -> None:
    async def chunked(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        await answer.write(await request.read())
        return answer

    work = {"length": echo, "chunked": chunked, "error": says(500, error="processor_failed")}[kind]
    async with box(work) as container, orchestrator(tmp_path, container) as orch, gateway(orch) as gate:
        for count in range(1, 21):
            answer = await post(gate)
            found = {row.job_id: row for row in rows(tmp_path)}
            row = found[answer.headers["X-Job-Id"]]
            assert (len(found), row.http_status, row.billed_seconds) == (count, answer.status, 1)
            assert row.outcome == ("worker_error" if kind == "error" else "ok")
        assert orch.ledger.totals.jobs == 20, "each once"


@in_loop
async def test_a_failure_is_booked_before_it_is_answered(tmp_path: Path) -> None:
    async def die(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with box(die) as container, orchestrator(tmp_path, container) as orch:
        for count in range(1, 6):
            assert (await post(orch)).status == 502
            assert [(row.outcome, row.billed_seconds) for row in rows(tmp_path)] == [
                ("container_unreachable", 1)
            ] * count


@in_loop
async def test_a_client_that_leaves_at_the_very_end_has_one_row(tmp_path: Path) -> None:
    """The answer is booked as whole; then it turns out that nobody took it, and the same row says so."""
    size = 64 << 20

    async def large(request: web.Request) -> web.StreamResponse:
        await request.read()
        return web.Response(body=bytes(size))

    async with box(large) as container, orchestrator(tmp_path, container, max_body=size) as orch:
        reader, writer = await asyncio.open_connection("127.0.0.1", orch.port)
        writer.write(f"POST {ROUTE} HTTP/1.1\r\nHost: x\r\nX-Model-Id: {MODEL}\r\nContent-Length: 1\r\n\r\nx".encode())
        await reader.readline()
        writer.transport.abort()
        await soon(lambda: orch.running == 0)
        await soon(lambda: [row.outcome for row in rows(tmp_path)] == ["client_gone"])
        assert orch.ledger.totals.jobs == 1


# --- a whole orchestrator


def serve(datadir: Path, container: str, port: int) -> Process:
    flags = f"-orchestrator -serviceAddr 127.0.0.1:{port} -cliAddr 127.0.0.1:0 -datadir {datadir} -byoc"
    return Process("livepeer", *flags.split(), "-byocContainerURL", container, "-byocModelID", MODEL)


def answered_jobs(port: int, stop: threading.Event) -> list[str]:
    """Ids of the jobs whose answers came in whole, until the orchestrator is gone; 5,000 at most."""
    found: list[str] = []
    for _ in range(5000):
        request = urllib.request.Request(f"http://127.0.0.1:{port}{ROUTE}", data=FRAME, headers={"X-Model-Id": MODEL})
        try:
            with urllib.request.urlopen(request, timeout=WAIT) as answer:
                if len(answer.read()) == len(FRAME):
                    found.append(answer.headers["X-Job-Id"])
        except (OSError, http.client.HTTPException):
            if stop.is_set():
                break
    return found


@in_loop
async def test_kill_9_of_an_orchestrator_loses_no_answered_job(tmp_path: Path) -> None:
    dice = random.Random(3)
    answered: list[str] = []
    async with box() as container:
        for _ in range(3):
            port, stop = free_port(), threading.Event()
            node = serve(tmp_path, container.url, port)
            try:
                await asyncio.to_thread(node.wait_for, "BYOC capability registered")
                clients = [asyncio.create_task(asyncio.to_thread(answered_jobs, port, stop)) for _ in range(3)]
                await soon(lambda: container.jobs > 10)
                await asyncio.sleep(dice.uniform(0.1, 0.4))  # the moment is the point
            finally:
                stop.set()
                await asyncio.to_thread(node.end, signal.SIGKILL)
                assert node.popen.stdout is not None
                node.popen.stdout.close()
            for client in clients:
                answered += await client
            container.jobs = 0
    outcomes = {row.job_id: row.outcome for row in rows(tmp_path)}
    assert len(answered) > 10
    assert {job: outcomes.get(job) for job in answered} == dict.fromkeys(answered, "ok")
    assert len(rows(tmp_path)) == len(outcomes)


def fill(process: Process) -> None:
    """As if the disk were full: no file of that process grows or is written any more."""
    resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def make_room(process: Process) -> None:
    resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@in_loop
async def test_a_full_disk(tmp_path: Path) -> None:
    """The job under way is answered, the next ones are refused; with room again nothing is missing."""
    port = free_port()
    async with box() as container:
        node = serve(tmp_path, container.url, port)
        try:
            await asyncio.to_thread(node.wait_for, "BYOC capability registered")
            ids = [(await post(port)).headers["X-Job-Id"]]
            await asyncio.to_thread(fill, node)
            answer = await post(port)
            assert (answer.status, answer.body) == (200, FRAME), "it was computed, and its row is kept"
            ids.append(answer.headers["X-Job-Id"])
            refused = await post(port)
            assert refused.error == (503, "ledger_unavailable")
            assert int(refused.headers["Retry-After"]) > 0
            async with gateway(f"http://127.0.0.1:{port}") as gate:
                told = await post(gate)
                assert told.error == (503, "not_ready")
                assert "its ledger cannot be written" in told.message
            status = (await get(port, "/status")).json["ledger"]
            assert (status["jobs"], status["waiting"]) == (2, 1)
            assert status["error"]
            assert container.jobs == 2, "nothing was computed that could not be booked"
            assert [row.job_id for row in rows(tmp_path)] == ids[:1]
            await asyncio.to_thread(make_room, node)
            await asyncio.to_thread(node.wait_for, "written again")
            ids.append((await post(port)).headers["X-Job-Id"])
            assert [(row.job_id, row.outcome) for row in rows(tmp_path)] == [(job, "ok") for job in ids]
            assert await asyncio.to_thread(node.end) == 0
        finally:
            await asyncio.to_thread(node.end, signal.SIGKILL)
            assert node.popen.stdout is not None
            node.popen.stdout.close()


@in_loop
async def test_a_disk_that_stays_full_to_the_end_has_the_rows_in_the_log(tmp_path: Path) -> None:
    port = free_port()
    async with box() as container:
        node = serve(tmp_path, container.url, port)
        try:
            await asyncio.to_thread(node.wait_for, "BYOC capability registered")
            await asyncio.to_thread(fill, node)
            answer = await post(port)
            assert await asyncio.to_thread(node.end) == 0
            line = await asyncio.to_thread(node.wait_for, "not written: ")
            row = Entry(**json.loads(line.partition("not written: ")[2]))
            assert (row.job_id, row.outcome, row.billed_seconds) == (answer.headers["X-Job-Id"], "ok", 1)
        finally:
            await asyncio.to_thread(node.end, signal.SIGKILL)
            assert node.popen.stdout is not None
            node.popen.stdout.close()


@pytest.mark.parametrize("another", [False, True])
@in_loop
async def test_a_file_that_is_moved_away_takes_no_rows_for_written(tmp_path: Path, another: bool) -> None:
    """Nor one that is there in its stead. Put back, it has all of them."""
    (elsewhere := tmp_path / "elsewhere").mkdir()
    async with box() as container, orchestrator(tmp_path, container) as orch:
        ids = [(await post(orch)).headers["X-Job-Id"]]
        (tmp_path / FILE).rename(elsewhere / FILE)
        if another:
            (tmp_path / FILE).write_bytes(b"")
        ids.append((await post(orch)).headers["X-Job-Id"])
        assert (await post(orch)).error == (503, "ledger_unavailable")
        assert (orch.ledger.waiting, container.jobs) == (1, 2)
        (elsewhere / FILE).replace(tmp_path / FILE)
        await soon(lambda: not orch.ledger.error)
        assert (await post(orch)).status == 200
    assert [row.job_id for row in rows(tmp_path)][:2] == ids
    assert len(rows(tmp_path)) == 3


@in_loop
async def test_a_disk_that_hangs_holds_an_answer_up_for_a_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As long as another process has the file locked, which SQLite waits five seconds for."""
    monkeypatch.setattr(ledgers, "BOOK_SECONDS", 0.2)
    async with box() as container, orchestrator(tmp_path, container) as orch:
        with sqlite3.connect(tmp_path / FILE, isolation_level=None) as other:
            other.execute("BEGIN IMMEDIATE")
            assert (await post(orch)).body == FRAME
            assert "more than 0.2 s for a row" in caplog.text
            assert (await post(orch)).error == (503, "ledger_unavailable"), "no more of what cannot be booked"
            assert container.jobs == 1
            other.execute("ROLLBACK")
        other.close()
        await soon(lambda: [row.outcome for row in rows(tmp_path)] == ["ok"])
        await soon(lambda: not orch.ledger.error)
        assert (await post(orch)).status == 200
        assert [row.outcome for row in rows(tmp_path)] == ["ok", "ok"]


@in_loop
async def test_whoever_reads_the_ledger_holds_no_job_up_and_sees_one_moment(tmp_path: Path) -> None:
    """As long as its reading takes. Of the ways in which SQLite keeps its files only WAL has that."""
    async with box() as container, orchestrator(tmp_path, container) as orch:
        await post(orch)
        with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as other:
            other.execute("BEGIN")
            assert other.execute("SELECT count(*) FROM jobs").fetchone() == (1,)
            assert (await post(orch)).status == 200
            assert not orch.ledger.error
            assert other.execute("SELECT count(*) FROM jobs").fetchone() == (1,)
            assert len(rows(tmp_path)) == 2


@in_loop
async def test_a_row_that_came_just_too_late_does_not_stop_the_jobs_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written all the same; only the news of it is lost."""
    monkeypatch.setattr(ledgers, "BOOK_SECONDS", 0.5)
    monkeypatch.setattr(ledgers, "_settle", lambda done: None)
    ledger = Ledger(tmp_path)
    ledger.open()
    try:
        await ledger.book(Entry("job1", "a", "2026-01-01T00:00:00.000Z", 0.5, 1, None, "ok", 200))
        await soon(lambda: (ledger.error, ledger.waiting) == ("", 0))
    finally:
        await ledger.close()
    assert [row.job_id for row in rows(tmp_path)] == ["job1"]


@in_loop
async def test_a_clock_that_jumps_changes_no_bill_and_no_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The wall clock goes back an hour during a job, and forward a day after it: only ``started`` shows it."""
    caplog.set_level(logging.ERROR)
    shift = [0.0]
    real = time.time

    async def jump(request: web.Request) -> web.StreamResponse:
        shift[0] = -3600.0
        return await echo(request)

    monkeypatch.setattr(time, "time", lambda: real() + shift[0])
    async with box(jump) as container, orchestrator(tmp_path, container) as orch:
        await post(orch)
        container.job = echo
        await post(orch)
        shift[0] = 86400.0
        await post(orch)
    found = rows(tmp_path)
    assert [row.billed_seconds for row in found] == [1, 1, 1]
    assert all(0 < row.wall_seconds < 1 for row in found)
    assert found[1].started < found[0].started < found[2].started, "in the order of their ends all the same"
    assert not caplog.records
