"""Load and processes: a client that costs little, servers as processes of their own, and what they use.

``python -m benchmarks.load PORT CONNECTIONS`` sends jobs without a pause until stdin ends: a process of its own, so
that whoever measures beside it does not share an interpreter with it. It prints a line once every connection has had
its first answer, and at the end how many answers were 200 and how many were not.
"""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Final

import psutil

from gpu_byoc.local.children import pick_ports

from .harness import Window
from .machine import smi


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


REFUSALS: Final = (502, 503, 504)
"""What a server or a gateway answers that is asked for more than it can take."""


def measure(
    connections: Sequence[Connection],
    jobs: int,
    cpu: Callable[[], float] = time.process_time,
    refusals: Collection[int] = (),
) -> Window:
    """``jobs`` jobs on each connection at once, one thread each. ``cpu`` says what CPU time is counted, see ``cpu_of``.

    Any status but 200 is an error, unless it is one of ``refusals``; those are counted. One job has to succeed.
    """
    times: list[list[float]] = [[] for _ in connections]
    refused: list[int] = []
    failures: list[BaseException] = []
    gate = threading.Barrier(len(connections) + 1)

    def drive(connection: Connection, into: list[float]) -> None:
        try:
            gate.wait()
            for _ in range(jobs):
                began = time.perf_counter()
                status = connection.job()
                ended = time.perf_counter()
                if status == 200:
                    into.append(ended - began)
                elif status in refusals:
                    refused.append(status)
                else:
                    raise RuntimeError(f"HTTP {status}: {bytes(connection.body)[:200]!r}")
        except BaseException as error:  # raised again by the caller, who joins this thread
            failures.append(error)

    threads = [threading.Thread(target=drive, args=pair) for pair in zip(connections, times, strict=True)]
    for thread in threads:
        thread.start()
    used, _ = cpu(), gate.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    spent = time.perf_counter() - began
    if failures:
        raise failures[0]
    if not any(times):
        raise RuntimeError(f"all {len(refused)} jobs were refused with HTTP {refused[0]}")
    return Window(tuple(t for each in times for t in each), spent, cpu() - used, len(refused))


def family(*pids: int) -> list[psutil.Process]:
    """These processes, their children, theirs, and so on, as of now."""
    heads = [psutil.Process(pid) for pid in pids]
    return [*heads, *(child for head in heads for child in head.children(recursive=True))]


def cpu_of(*pids: int) -> Callable[[], float]:
    """A clock of the CPU seconds that these processes and all that they started have used so far, in steps of the
    kernel's 10 ms; of those who have ended too, once their parent has waited for them."""

    def clock() -> float:
        total = 0.0
        for each in family(*pids):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += sum(each.cpu_times()[:4])
        return total

    return clock


def rss(pid: int) -> int:
    """Resident bytes of one process now, whoever shares them."""
    return int(psutil.Process(pid).memory_info().rss)


def memory_of(*pids: int) -> int:
    """Resident bytes of these processes and all that they started. What several of them share counts once: libraries,
    and memory that they hand frames through (the kernel's proportional set size)."""
    total = 0
    for each in family(*pids):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += each.memory_full_info().pss
    return total


def device_mb(*pids: int) -> float | None:
    """GPU memory that the driver books to these processes and all that they started; None where it books none, as
    without a GPU and in a container whose process numbers the driver does not know."""
    ours = {each.pid for each in family(*pids)}
    rows = smi("--query-compute-apps=pid,used_memory")
    booked = [int(used) for pid, used in rows if int(pid) in ours and used.isdigit()]
    return sum(booked) * 2**20 / 1e6 if booked else None


class Child(subprocess.Popen[bytes]):
    """A Python process; what it prints goes to a file of its own, which is read when it ends before it should."""

    def __init__(self, *arguments: str) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in end()
        super().__init__([sys.executable, *arguments], stdout=self._log, stderr=subprocess.STDOUT)

    def end(self) -> None:
        """SIGTERM and then, after ten seconds, SIGKILL."""
        self.terminate()
        try:
            self.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
            self.wait()
        self._log.close()

    def last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[Child]:
    """A Python process for the time of the block."""
    child = Child(*arguments)
    try:
        yield child
    finally:
        child.end()


def wait_until_ready(url: str, child: subprocess.Popen[bytes], seconds: float = 30) -> float:
    """Seconds until ``url`` answers 200.

    Raises:
        RuntimeError: ``child`` ended.
        TimeoutError: it took longer than ``seconds``.
    """
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        if child.poll() is not None:
            words = f": {child.last_words()}" if isinstance(child, Child) else ""
            raise RuntimeError(f"{child.args!r} ended with {child.returncode}{words}")
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return time.perf_counter() - began
        except OSError:
            time.sleep(0.005)
    raise TimeoutError(f"{url} did not answer within {seconds} s")


def free_port() -> int:
    (port,) = pick_ports([0])
    return port


def main() -> None:
    port, count = int(sys.argv[1]), int(sys.argv[2])
    frame = random.Random(1).randbytes(640 * 480 * 3)
    over, gate = threading.Event(), threading.Barrier(count + 1)
    counts = [0, 0]

    def drive() -> None:
        connection = Connection(port, "/", {"Content-Type": "application/octet-stream"}, frame)
        counts[connection.job() != 200] += 1
        gate.wait()
        while not over.is_set():
            counts[connection.job() != 200] += 1
        connection.close()

    threads = [threading.Thread(target=drive, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    gate.wait()
    print("busy", flush=True)
    sys.stdin.read()
    over.set()
    for thread in threads:
        thread.join(60)
    print(*counts, flush=True)


if __name__ == "__main__":
    main()
