"""What every benchmark needs: a load client that costs little, percentiles, processes, facts about the machine."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def percentile(values: Sequence[float], q: float) -> float:
    """The ``q``-quantile (0..1) of ``values`` by the nearest-rank rule."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(q * len(ordered) + 0.5) - 1))]


@dataclass(frozen=True, slots=True)
class Load:
    """What one target did: seconds per job, and jobs per second over all connections."""

    seconds: tuple[float, ...]
    rate: float


class Connection:
    """One keep-alive HTTP/1.1 connection on a blocking socket: the cheapest client Python allows.

    Answers need a Content-Length. The answer's body stays in ``body`` until the next job.
    """

    def __init__(self, port: int, path: str, headers: dict[str, str], payload: bytes) -> None:
        lines = [f"POST {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", f"Content-Length: {len(payload)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._request = ("\r\n".join(lines) + "\r\n\r\n").encode() + payload
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray(len(payload) + 65536)
        self.body = memoryview(b"")

    def job(self) -> int:
        """Send the request, receive the whole answer; returns the HTTP status."""
        self._socket.sendall(self._request)
        view, got = memoryview(self._buffer), 0
        while (end := self._buffer.find(b"\r\n\r\n", 0, got)) < 0:
            got += self._receive(view[got:])
        head = bytes(view[:end]).decode("latin-1").split("\r\n")
        length = next(int(line.split(":")[1]) for line in head if line.lower().startswith("content-length:"))
        start = end + 4
        while got < start + length:
            got += self._receive(view[got:])
        self.body = view[start : start + length]
        return int(head[0].split()[1])

    def _receive(self, room: memoryview) -> int:
        count = self._socket.recv_into(room)
        if not count:
            raise ConnectionError("the server closed the connection in the middle of an answer")
        return count

    def close(self) -> None:
        self._socket.close()


def measure(connections: Sequence[Connection], jobs: int) -> Load:
    """``jobs`` jobs on each connection at once, one thread each. Any status but 200 is an error."""
    times: list[list[float]] = [[] for _ in connections]
    failures: list[BaseException] = []
    gate = threading.Barrier(len(connections) + 1)

    def drive(connection: Connection, into: list[float]) -> None:
        try:
            gate.wait()
            for _ in range(jobs):
                began = time.perf_counter()
                status = connection.job()
                into.append(time.perf_counter() - began)
                if status != 200:
                    raise RuntimeError(f"HTTP {status}: {bytes(connection.body)[:200]!r}")
        except BaseException as error:  # raised again by the caller, who joins this thread
            failures.append(error)

    threads = [threading.Thread(target=drive, args=pair) for pair in zip(connections, times, strict=True)]
    for thread in threads:
        thread.start()
    gate.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    spent = time.perf_counter() - began
    if failures:
        raise failures[0]
    return Load(tuple(t for each in times for t in each), len(connections) * jobs / spent)


@contextlib.contextmanager
def process(*arguments: str, log: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process for the time of the block, ended with SIGTERM and then, after ten seconds, SIGKILL."""
    out = log.open("wb") if log else subprocess.DEVNULL
    child = subprocess.Popen([sys.executable, *arguments], stdout=out, stderr=subprocess.STDOUT)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        if log:
            out.close()  # type: ignore[union-attr]


def wait_until_ready(url: str, child: subprocess.Popen[bytes], seconds: float = 30) -> float:
    """Seconds until ``url`` answers 200."""
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        if child.poll() is not None:
            raise RuntimeError(f"{child.args!r} ended with {child.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return time.perf_counter() - began
        except OSError:
            time.sleep(0.005)
    raise TimeoutError(f"{url} did not answer within {seconds} s")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def rss(pid: int) -> int:
    """Resident bytes of a process now."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(pid)


def machine() -> dict[str, Any]:
    """What a figure was measured on."""
    from importlib.metadata import version

    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("gpu-byoc", "numpy", "aiohttp")},
        "commit": _commit(),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }


def _commit() -> str:
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()
