"""``gpu-byoc health`` against a real worker, and against everything that is none."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_byoc.checks import health
from gpu_byoc.checks.health import Health, ask, default_url, read
from gpu_byoc.errors import ConfigError
from gpu_byoc.processors.passthrough import Passthrough
from tests.support.processes import free_port
from tests.support.workers import asynchronous, running


def http(body: bytes, status: str = "200 OK", headers: str = "Content-Type: application/json\r\n") -> bytes:
    return f"HTTP/1.0 {status}\r\n{headers}\r\n".encode() + body


def says(state: object, status: str = "200 OK") -> bytes:
    return http(json.dumps({"status": state}).encode(), status)


@contextlib.contextmanager
def server(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """``serve`` gets the first connection once its request was read; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def run() -> None:
            with contextlib.suppress(OSError):  # the client may have had enough
                connection, _ = listening.accept()
                with connection:
                    while connection.recv(1024)[-4:] != b"\r\n\r\n":
                        pass
                    serve(connection)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)  # wakes an accept that nobody came to
            thread.join(10)
            assert not thread.is_alive()


@asynchronous
async def test_a_worker_is_well_idle_and_at_work_and_not_once_its_device_is_gone() -> None:
    async with running(Passthrough()) as worker:
        assert await asyncio.to_thread(ask, worker.url, 5.0) == Health("IDLE")
        worker.worker.active += 1
        assert await asyncio.to_thread(ask, worker.url + "/health", 5.0) == Health("OK")
        worker.worker.active -= 1
        engine, worker.worker.engine = worker.worker.engine, None
        loading = await asyncio.to_thread(ask, worker.url + "/", 5.0)
        worker.worker.engine = engine
        assert loading.state == "LOADING"
        assert not loading.well
        assert "initialising" in loading.reason
        assert engine is not None
        await asyncio.to_thread(engine.close)
        error = await asyncio.to_thread(ask, worker.url, 5.0)
        assert (error.state, error.well) == ("ERROR", False)


@pytest.mark.parametrize("state", ["IDLE", "OK", "ok"])
def test_well_is_200_and_idle_or_ok(state: str) -> None:
    assert read(says(state)) == Health(state.upper())
    assert not read(says(state, "503 Service Unavailable")).well


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1\r\n\r\n",
        says("IDLE").replace(b"\r\n\r\n", b"\r\n"),
        http(b"<html>nginx</html>"),
        http(b'{"state": "IDLE"}'),
        http(b'["IDLE"]'),
        http(b'"status"'),
        http(b"[" * 60_000),
        says(None),
        says(["IDLE"]),
        says("IDLE\nOK"),
    ],
)
def test_what_is_no_workers_answer_is_malformed(answer: bytes) -> None:
    found = read(answer)
    assert (found.state, found.well) == ("MALFORMED", False)
    assert found.reason


@given(st.one_of(st.binary(), st.binary().map(http), st.text().map(says)))
def test_any_answer_is_read_and_only_two_states_are_well(answer: bytes) -> None:
    found = read(answer)
    assert found.well == (found.state in ("IDLE", "OK"))
    if found.well:
        assert answer.lower().startswith(b"http/1.0 200")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["status"].upper() == found.state
    else:
        assert found.reason


def test_nobody_there() -> None:
    found = ask(f"http://127.0.0.1:{free_port()}", 5.0)
    assert (found.state, found.well) == ("UNREACHABLE", False)
    assert "refused" in found.reason


def test_a_server_that_never_answers_is_given_up_after_the_timeout() -> None:
    over = threading.Event()

    def wait(connection: socket.socket) -> None:
        over.wait(20)

    with server(wait) as url:
        began = time.monotonic()
        found = ask(url, 0.2)
        spent = time.monotonic() - began
        over.set()
    assert found == Health("UNREACHABLE", f"{url.removeprefix('http://')}: no answer within 0.2 s")
    assert spent < 5


def test_a_server_that_drips_is_given_up_after_the_timeout_too() -> None:
    """Each byte comes in time; the whole does not."""
    over = threading.Event()

    def drip(connection: socket.socket) -> None:
        for byte in says("IDLE"):
            connection.sendall(bytes([byte]))
            if over.wait(0.02):
                return

    with server(drip) as url:
        found = ask(url, 0.3)
        over.set()
    assert found.state == "UNREACHABLE"
    assert "within 0.3 s" in found.reason


def test_an_endless_answer_is_not_read_to_its_end() -> None:
    def pour(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection.sendall(b"x" * 65536)

    with server(pour) as url:
        assert ask(url, 20.0).state == "MALFORMED"


@pytest.mark.parametrize(
    "url",
    [
        *("", "127.0.0.1:8000", "https://127.0.0.1", "http://", "http://a b", "http://127.0.0.1:0x1"),
        *("http://h:70000", "http://127.0.0.1/\r\nX: y", "http://a..b", "http://[::1"),
    ],
)
def test_what_is_no_url_is_said(url: str) -> None:
    with pytest.raises(ConfigError, match="--url"):
        ask(url, 0.5)


@pytest.mark.parametrize("port", ["", "0", "-1", "65536", "http", "1e3"])
def test_a_port_that_is_none(port: str) -> None:
    with pytest.raises(ConfigError, match="GPU_BYOC_PORT"):
        default_url(port)


def test_the_command_takes_the_port_from_the_environment_and_answers_by_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(lambda connection: connection.sendall(says("IDLE"))) as url:
        monkeypatch.setenv("GPU_BYOC_PORT", url.rpartition(":")[2])
        assert health.main([]) == 0
    assert capsys.readouterr().out == "IDLE\n"
    with server(lambda connection: connection.sendall(says("LOADING", "503 Service Unavailable"))) as url:
        assert health.main(["--url", url, "--timeout", "5"]) == 1
    assert capsys.readouterr().out.startswith("LOADING: ")
    monkeypatch.setenv("GPU_BYOC_PORT", "0")
    assert health.main([]) == 1
    assert "GPU_BYOC_PORT" in capsys.readouterr().out


def test_asking_imports_the_standard_library_alone_and_little_of_it() -> None:
    """A container runs it every few seconds."""
    code = """
import sys
from gpu_byoc import cli
assert cli.main(["health", "--url", "http://127.0.0.1:1", "--timeout", "1"]) == 1
heavy = ["numpy", "aiohttp", "av", "rich", "psutil", "asyncio", "ssl", "http.client", "urllib.request"]
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
