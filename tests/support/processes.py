"""Real processes for tests: started, watched by their log, always ended."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpu_byoc.local.children import pick_ports

WAIT = 60.0


class Process:
    """A ``gpu_byoc`` command whose log lines arrive in ``lines``."""

    def __init__(
        self, *arguments: str, program: tuple[str, ...] = ("-m", "gpu_byoc"), env: Mapping[str, str] | None = None
    ) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-u", *program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self.log: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.log.append(line.rstrip("\n"))
            self._lines.put(line)
        self._lines.put(None)

    def wait_for(self, text: str) -> str:
        """The first log line that contains ``text``; an early end or WAIT seconds without a line is a failure."""
        while True:
            line = self._lines.get(timeout=WAIT)
            assert line is not None, f"ended with {self.popen.wait(WAIT)} before it said {text!r}:\n" + "\n".join(
                self.log
            )
            if text in line:
                return line.rstrip("\n")

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; the exit status."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        code = self.popen.wait(WAIT)
        self._reader.join(WAIT)
        return code


@contextlib.contextmanager
def running(
    *arguments: str, program: tuple[str, ...] = ("-m", "gpu_byoc"), env: Mapping[str, str] | None = None
) -> Iterator[Process]:
    process = Process(*arguments, program=program, env=env)
    try:
        yield process
    finally:
        if process.popen.poll() is None:
            process.popen.kill()
        process.popen.wait(WAIT)
        process._reader.join(WAIT)
        assert process.popen.stdout is not None
        process.popen.stdout.close()


def free_port() -> int:
    (port,) = pick_ports([0])
    return port


def get(port: int, path: str) -> tuple[int, Any]:
    """(status, JSON body) of a GET."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=WAIT) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def until_health(port: int, state: str) -> None:
    """Ask until /health says so: a doorman's answer may be a beat older than what the worker has just logged."""
    expected, end = (200 if state in ("IDLE", "OK") else 503, {"status": state}), time.monotonic() + WAIT
    while (found := get(port, "/health")) != expected:
        assert time.monotonic() < end, f"/health says {found}, not {state}"
        time.sleep(0.01)


def post(port: int, path: str, data: bytes, **headers: str) -> tuple[int, bytes]:
    named = {"Content-Type": "application/octet-stream"} | {k.replace("_", "-"): v for k, v in headers.items()}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=data, headers=named)
    try:
        with urllib.request.urlopen(request, timeout=WAIT) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def example(name: str) -> Path:
    return Path(__file__).parents[2] / "examples" / name
