"""``gpu-byoc usage`` of a ledger and of a worker, in its three forms; ``gpu-byoc config``, and whence its figures."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from gpu_byoc.cli import main
from gpu_byoc.local.ledger import Entry, Ledger
from gpu_byoc.local.usage import read_seconds
from tests.support.processes import free_port, get, post, running

FRAME = bytes(64 * 48 * 3)


def ledger(datadir: Path, *capabilities: str) -> None:
    async def write() -> None:
        book = Ledger(datadir)
        book.open()
        for number, capability in enumerate(capabilities):
            book.add(Entry(f"job{number}", capability, "2026-01-01T00:00:00.000Z", 1.5, 2, 0.25, "ok", 200))
        await book.close()

    asyncio.run(write())


def test_every_job_as_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger(tmp_path, *['a, "b"\nc'] * 30, "=1+1")
    assert main(["usage", "-datadir", str(tmp_path), "--csv", "-last", "-1"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 31
    assert list(rows[0]) == list(Entry.__slots__)
    assert rows[0]["capability"] == 'a, "b"\nc'
    assert (rows[0]["wall_seconds"], rows[0]["billed_seconds"], rows[0]["compute_seconds"]) == ("1.5", "2", "0.25")
    assert rows[30]["capability"] == "'=1+1", "a spreadsheet runs no formula of a client's"
    assert main(["usage", "-datadir", str(tmp_path), "--csv", "-last", "2"]) == 0
    assert [row["job_id"] for row in csv.DictReader(io.StringIO(capsys.readouterr().out))] == ["job29", "job30"]
    assert main(["usage", "-datadir", str(tmp_path), "--csv", "--json"]) == 2


def test_a_real_workers_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    """They add up to what the worker says in total."""
    port = free_port()
    command = f"serve --processor green_tint --backend numpy --host 127.0.0.1 --port {port}"
    with running(*command.split()) as worker:
        worker.wait_for("listening")
        url = f"http://127.0.0.1:{port}"
        assert main(["usage", "-worker", url]) == 0
        assert capsys.readouterr().out == "no work in the last minute\n"
        for _ in range(5):
            assert post(port, "/", FRAME)[0] == 200
        assert main(["usage", "-worker", url, "--json"]) == 0
        seconds = json.loads(capsys.readouterr().out)["seconds"]
        total = get(port, "/compute")[1]["totals"]["jobs"]
        assert {row["name"] for row in seconds} == {"jobs"}
        assert sum(row["frames"] for row in seconds) == 5
        assert abs(sum(row["compute_seconds"] for row in seconds) - total["compute_seconds"]) < 1e-8
        assert main(["usage", "-worker", url, "--csv"]) == 0
        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        assert sum(int(row["frames"]) for row in rows) == 5
        assert main(["usage", "-worker", url]) == 0
        assert "jobs" in capsys.readouterr().out


@pytest.fixture
def stranger() -> Iterator[tuple[str, list[bytes]]]:
    """A server that says whatever it is told to."""
    says: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(says[0])

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", says
        server.shutdown()
        thread.join()


ROW = {"second": 1_700_000_000, "name": "s", "frames": 1, "batches": 1} | dict.fromkeys(
    ("compute_seconds", "copy_seconds", "queue_seconds"), 0.5
)
WRONG = (
    *({"second": "x"}, {"second": 10**400}, {"second": -1}, {"name": 3}, {"name": "\x1b[2J"}, {"name": "\ud800"}),
    *({"frames": None}, {"frames": True}, {"batches": 1.5}),
    *({"copy_seconds": [1]}, {"copy_seconds": 10**400}, {"copy_seconds": float("inf")}, {"copy_seconds": float("nan")}),
)


@pytest.mark.parametrize("kind", ["--csv", "--json", "-last=1"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_worker_whose_rows_have_other_types(
    stranger: tuple[str, list[bytes]], wrong: dict[str, Any], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url, says = stranger
    says.append(json.dumps({"rows": [ROW]}).encode())
    assert main(["usage", "-worker", url, kind]) == 0
    says[0] = json.dumps({"rows": [ROW, ROW | wrong]}).encode()
    assert main(["usage", "-worker", url, kind]) == 2
    assert "GET /compute" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", [b"", b"[]", b'{"rows": [{}]}', b'{"rows": 3}', b'{"other": 1}', b"\xff", b"[" * 100_000]
)
def test_a_worker_that_is_none(
    stranger: tuple[str, list[bytes]], text: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    url, says = stranger
    says.append(text)
    assert main(["usage", "-worker", url]) == 2
    assert "GET /compute" in capsys.readouterr().err


def test_a_stream_has_its_own_rows(stranger: tuple[str, list[bytes]], capsys: pytest.CaptureFixture[str]) -> None:
    url, says = stranger
    numbers = {"frames": 25, "batches": 20, "compute_seconds": 0.5, "copy_seconds": 0.25, "queue_seconds": 0.0}
    rows = [{"second": 1_700_000_000 + at, "name": name, **numbers} for at in (0, 1) for name in ("s1", "[bold]")]
    says.append(json.dumps({"rows": rows}).encode())
    assert [(each.second, each.name) for each in read_seconds(url)] == [(row["second"], row["name"]) for row in rows]
    assert main(["usage", "-worker", url]) == 0
    told = capsys.readouterr().out
    assert "2023-11-14 22:13:20" in told
    assert "[bold]" in told


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("http://127.0.0.1:1", "127.0.0.1", "file:///etc/passwd"):
        assert main(["usage", "-worker", url]) == 2
        told = capsys.readouterr().err
        assert url in told
        assert "urlopen" not in told


# --- gpu-byoc config


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CAPABILITY_NAME", "MODEL_ID", "CAPABILITY_URL", "CAPABILITY_PRICE_PER_UNIT"):
        monkeypatch.delenv(name, raising=False)


def written(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[Any, str]:
    """The file's JSON, and what was said of the capacity."""
    assert main(["config", *flags]) == 0
    told = capsys.readouterr()
    return json.loads(told.out), told.err


def test_a_models_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--capability", "green-tint", "--url", "http://worker:8000/", "--price-per-unit", "5")
    models, told = written(capsys, "ai-models", *flags)
    assert models == [
        {
            "pipeline": "live-video-to-video",
            "model_id": "green-tint",
            "url": "http://worker:8000",
            "warm": True,
            "capacity": 10,
            "price_per_unit": 5,
        }
    ]
    assert told.startswith("capacity 10: configured, --slots 32")
    monkeypatch.setenv("CAPABILITY_NAME", "from-env")
    monkeypatch.setenv("CAPABILITY_PRICE_PER_UNIT", "7")
    (model,), _ = written(capsys, "ai-models")
    assert (model["model_id"], model["price_per_unit"]) == ("from-env", 7)


def test_a_runners_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """As an orchestrator demands it: required keys, no slash in a label that routes, a price only where it is paid."""
    file = tmp_path / "runners.json"
    assert main(["config", "runners", "--capability", "me/tint", "--output", str(file), "--max-streams", "3"]) == 0
    assert capsys.readouterr().out == ""
    (runner,) = json.loads(file.read_text())["runners"]
    assert runner == {
        "label": "me-tint",
        "routing": "label",
        "runner_url": "http://localhost:8000",
        "health_url": "/health",
        "healthy_status_code": 200,
        "app": "live-video-to-video/me/tint",
        "version": runner["version"],
        "mode": "single-shot",
        "capacity": 3,
    }
    runners, _ = written(capsys, "runners", "--capability", "x", "--usd-per-hour", "0.5")
    assert runners["runners"][0]["price_info"] == {"price": 0.5, "currency": "usd", "unit": "hour"}


def test_a_measured_capacity(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def how_many(what: str, streams: int) -> dict[str, Any]:
        answer = f"{streams} streams at p95 <= 100 ms"
        return {"name": f"{what}, how many", "answer": answer, "streams": streams, "budget_ms": 100.0}

    rows = [
        {"name": "numpy, 640x480, paced, 9 streams", "streams": 9, "passed": "no"},
        how_many("numpy, 640x480", 6),
        how_many("numpy, 1280x720", 2),
        {"name": "numpy, 1920x1080, how many", "answer": "none", "why": "p95 300 ms", "budget_ms": 100.0},
        how_many("torch, 640x480", 20),
        {"name": "cupy: capacity", "skipped": "cupy is not installed"},
    ]
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"schema": 2, "groups": {"capacity": {"rows": rows}}}))
    measured = ("ai-models", "--capability", "x", "--measured", str(file))
    for flags, capacity in (((), 2), (("--size", "640x480"), 6), (("--backend", "torch"), 20)):
        (model,), told = written(capsys, *measured, *flags)
        assert model["capacity"] == capacity
        assert f"capacity {capacity}: measured" in told
        assert f"{capacity} streams at p95 <= 100 ms" in told
    for wrong in (("--size", "1920x1080"), ("--backend", "cupy")):
        assert main(["config", *measured, *wrong]) == 2
        assert "no such figure" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", '{"groups": {}}', '{"groups": {"capacity": {"rows": [1]}}}'])
def test_what_is_no_result_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    file = tmp_path / "result.json"
    file.write_text(text)
    assert main(["config", "runners", "--capability", "x", "--measured", str(file)]) == 2
    assert str(file) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("runners",), "--capability"),
        (("runners", "--capability", "x", "--url", "worker:8000"), "--url"),
        (("runners", "--capability", "x", "--usd-per-hour", "0"), "--usd-per-hour"),
        (("runners", "--capability", "x", "--slots", "0"), "--slots"),
        (("ai-models", "--capability", "x", "--price-per-unit", "-1"), "--price-per-unit"),
        (("ai-models", "--capability", "x", "--output", "/nowhere/at/all"), "--output"),
        (("ai-models", "--capability", "x", "--measured", "/nowhere/at/all"), "--measured"),
    ],
)
def test_mistakes_name_the_flag(capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], told: str) -> None:
    assert main(["config", *flags]) == 2
    assert told in capsys.readouterr().err
