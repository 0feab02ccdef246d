"""The load client, against a real server that refuses some."""

from __future__ import annotations

import contextlib
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.load import REFUSALS, Connection, cpu_of, device_mb, free_port, measure, process, rss, wait_until_ready

STATUSES = {"/": (200,), "/good": (200,), "/busy": (200, 503), "/full": (503,), "/broken": (500,)}


class Echo(http.server.BaseHTTPRequestHandler):
    """Answers each path with its statuses in turn, and echoes the body."""

    protocol_version = "HTTP/1.1"
    turn = 0

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        statuses = STATUSES[self.path]
        self.send_response(statuses[self.turn % len(statuses)])
        self.turn += 1
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def connections(port: int, path: str, count: int) -> Iterator[list[Connection]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(contextlib.closing(Connection(port, path, {"X-A": "b"}, bytes([number]) * 200_000)))
            for number in range(count)
        ]


def test_every_job_of_every_connection_is_timed(port: int) -> None:
    with connections(port, "/good", 3) as found:
        window = measure(found, 4)
        assert [bytes(each.body) for each in found] == [bytes([number]) * 200_000 for number in range(3)]
    assert len(window.seconds) == 12
    assert window.refused == 0
    assert max(window.seconds) <= window.wall
    assert window.rate == pytest.approx(12 / window.wall)


def test_refusals_are_counted_and_not_timed(port: int) -> None:
    with connections(port, "/busy", 2) as found:
        window = measure(found, 4, refusals=REFUSALS)
    assert (len(window.seconds), window.refused) == (4, 4)


@pytest.mark.parametrize(
    ("path", "refusals", "words"),
    [
        ("/busy", (), "HTTP 503"),
        ("/full", REFUSALS, "all 2 jobs were refused with HTTP 503"),
        ("/broken", REFUSALS, "HTTP 500"),
    ],
)
def test_anything_else_is_an_error(port: int, path: str, refusals: tuple[int, ...], words: str) -> None:
    with connections(port, path, 1) as found, pytest.raises(RuntimeError, match=words):
        measure(found, 2, refusals=refusals)


def test_a_process_is_ended_and_its_use_is_known() -> None:
    port = free_port()
    with process("-m", "http.server", "--bind", "127.0.0.1", str(port)) as child:
        assert wait_until_ready(f"http://127.0.0.1:{port}/", child) > 0
        assert cpu_of(child.pid)() > 0
        assert rss(child.pid) > 1 << 20
    assert child.poll() is not None


def test_device_memory_is_what_the_driver_books_to_a_process_and_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for nvidia-smi, which answers with this process, another, and one whose memory it cannot tell."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{os.getpid()}, 512\\n1, 4096\\n{os.getpid()}, [N/A]\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert device_mb(os.getpid()) == pytest.approx(512 * 1.048576)
    tool.write_text("#!/bin/sh\necho 1, 4096\n")
    assert device_mb(os.getpid()) is None


def test_a_load_runs_until_it_is_told_to_end(port: int) -> None:
    command = [sys.executable, "-m", "benchmarks.load", str(port), "2"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as load:
        assert load.stdout is not None
        assert load.stdout.readline() == "busy\n"
        out, _ = load.communicate(timeout=150)
    done, failed = map(int, out.split())
    assert done >= 2
    assert failed == 0


def test_a_process_that_ends_is_not_waited_for() -> None:
    code = "print('first'); raise SystemExit('no such device')"
    with process("-c", code) as child, pytest.raises(RuntimeError, match="ended with 1: no such device"):
        wait_until_ready("http://127.0.0.1:9/", child)
