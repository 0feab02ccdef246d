"""Child processes that never outlive their parent, and free ports for them.

Each child has a session of its own, so a Ctrl-C in the terminal reaches the parent alone, which then ends them in
order. Should the parent be killed outright, the kernel kills them (PR_SET_PDEATHSIG of prctl(2), Linux).
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final

from gpu_byoc.errors import GpuByocError

STOP_SECONDS: Final = 9.0  # a worker or an orchestrator takes at most 8 to flush what is under way
_TAIL: Final = 15  # lines of a log that a failure shows
_PORTS: Final = range(12_000, 32_000)  # below those that Linux hands out by itself
_turn = itertools.count(random.SystemRandom().randrange(len(_PORTS)))

# A program of its own and not a preexec_fn, which may deadlock in a process with threads. The parent's id is compared
# because it may be gone before prctl is called; then there is no death left to be told of.
_LAUNCH: Final = """
import ctypes, os, signal, sys
if ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0) != 0:
    sys.exit("prctl(PR_SET_PDEATHSIG) failed")
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class ChildEnded(GpuByocError):
    """A child ended, or did not become ready; the message has the end of its log."""

    code = "child_ended"


@dataclass(frozen=True, slots=True)
class Child:
    """A running command whose output, errors included, goes to the file ``log``."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def lines(self) -> list[str]:
        """What it has said so far."""
        return self.log.read_text("utf-8", "replace").splitlines()

    def check(self) -> None:
        """Raise ChildEnded if it is not running any more."""
        if (code := self.process.poll()) is not None:
            raise self.failure(f"ended with exit status {code}")

    def failure(self, what: str) -> ChildEnded:
        said = "\n".join(f"    {line}" for line in self.lines()[-_TAIL:]) or "    (nothing)"
        return ChildEnded(f"the {self.name} {what}; the last it said:\n{said}")


class Children:
    """``with Children(directory) as children: children.start(...)``; leaving the block ends them all.

    Use it in the main thread: the kernel counts the end of the thread that started a child as its parent's death.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._children: list[Child] = []

    def start(self, name: str, command: Sequence[str]) -> Child:
        """Run a command; ``command[0]`` is a program's path."""
        log = self._logs / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        child = Child(name, process, log)
        self._children.append(child)
        return child

    def close(self) -> None:
        """Terminate them, the latest first; kill what is left after STOP_SECONDS, or at a KeyboardInterrupt."""
        try:
            for child in reversed(self._children):
                _signal(child.process, signal.SIGTERM)
            deadline = time.monotonic() + STOP_SECONDS
            for child in self._children:
                child.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for child in self._children:
                _signal(child.process, signal.SIGKILL)
                child.process.wait()
            self._children.clear()

    def __enter__(self) -> Children:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """To its whole session. It is not reaped before poll() says so, thus the id is still its own."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:  # between fork and setsid; the parent's end will take it along
            process.send_signal(number)


def pick_ports(wanted: Sequence[int]) -> list[int]:
    """The wanted TCP ports of 127.0.0.1, each replaced by a free one if it is taken; 0 wants any."""
    with ExitStack() as held:  # all of them at once, so that none is picked twice
        return [_bind(held, port) or _any(held) for port in wanted]


def _any(held: ExitStack) -> int:
    """One of the kernel's own might be some client's by the time that the server it is for has started."""
    for _ in _PORTS:
        if port := _bind(held, _PORTS[next(_turn) % len(_PORTS)]):
            return port
    return _bind(held, 0)


def _bind(held: ExitStack, port: int) -> int:
    """The port that was bound, 0 if ``port`` is taken."""
    probe = held.enter_context(socket.socket())
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a port in TIME_WAIT is free
    try:
        probe.bind(("127.0.0.1", port))
        probe.listen(1)  # two sockets may be bound with SO_REUSEADDR; only one may listen
    except OSError:
        return 0
    bound: int = probe.getsockname()[1]
    return bound


@contextmanager
def interruptible(received: list[int]) -> Iterator[None]:
    """SIGTERM becomes a SIGINT, and SIGINT a KeyboardInterrupt (or, under asyncio, a cancel) even where it was ignored,
    as a shell does for a command with "&"."""

    def terminate(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.raise_signal(signal.SIGINT)

    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: terminate}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
