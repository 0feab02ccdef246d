"""The hunt: inputs go to a child process one by one; a crash, a hang or growth of the child is told from outside.

What the child itself finds (an exception that must not be, a slot that did not come back) it answers in words.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.fuzz.mutate import Mutator

HERE: Final = Path(__file__).parent
CORPUS: Final = HERE / "corpus"
ROOT: Final = HERE.parents[1]

DEADLINE: Final = 20.0
"""Seconds an input may take; the slowest of them takes under one on an idle machine."""

START: Final = 30.0
GROWTH: Final = 192 << 20
"""Bytes that a child may have grown since it was warm. Allocators keep some of what the largest pictures needed."""

PEAK: Final = 1 << 30
"""Bytes that it may take while it is at an input: a decoder of H.264 keeps 17 pictures of 14 MB, and a slot has 28."""

POOL: Final = 400
"""Inputs that behaved as none before, kept to be changed further."""


@dataclass(frozen=True)
class Finding:
    """``kind``: crash, hang, growth, or wrong."""

    target: str
    kind: str
    detail: str
    data: bytes

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.kind}-{hashlib.sha256(self.data).hexdigest()[:12]}.bin"
        path.write_bytes(self.data)
        return path


@dataclass
class Report:
    target: str
    runs: int = 0
    seconds: float = 0.0
    kinds: int = 0  # of behaviour
    slowest: float = 0.0
    peak: int = 0  # bytes, the most that one input took
    grown: int = 0  # bytes at the end, against the warm child
    findings: list[Finding] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.target:15} {self.runs:7} inputs in {self.seconds:5.1f} s, {self.kinds:4} kinds of behaviour, "
            f"slowest {self.slowest * 1e3:6.0f} ms, peak {self.peak >> 20:4} MiB, grown {self.grown >> 20:4} MiB, "
            f"{len(self.findings)} findings"
        )


class Died(Exception):
    """``kind`` and ``detail`` of what ended the child."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


@dataclass(frozen=True)
class Answer:
    said: str  # a summary of how it behaved
    wrong: str  # "" if nothing was
    rss: int
    peak: int


class Child:
    """A process that runs one target."""

    def __init__(self, target: str, deadline: float = DEADLINE) -> None:
        self._deadline = deadline
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - close() closes it
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.child", target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=ROOT,
            env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        )
        self._buffer = b""
        try:
            self._line(START)
        except Died:
            self.close()
            raise

    def run(self, data: bytes) -> Answer:
        """Raises Died."""
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.write(len(data).to_bytes(4, "big") + data)
            self._popen.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        return Answer(**json.loads(self._line(self._deadline)))

    def _line(self, seconds: float) -> bytes:
        assert self._popen.stdout is not None
        until = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._popen.stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                self._popen.send_signal(signal.SIGABRT)  # faulthandler says where it hangs
                self._popen.wait(10)
                raise Died("hang", f"no answer within {seconds:g} s\n{self._told()}")
            chunk = os.read(self._popen.stdout.fileno(), 65536)
            if not chunk:
                raise self._died()
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _died(self) -> Died:
        code = self._popen.wait(10)
        name = signal.Signals(-code).name if code < 0 else f"status {code}"
        return Died("crash", f"the child ended with {name}\n{self._told()}")

    def _told(self) -> str:
        self._log.seek(0)
        return self._log.read()[-4000:].decode(errors="replace")

    def close(self) -> None:
        self._popen.kill()
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass
        self._log.close()


def corpus(target: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((CORPUS / target).glob("*.bin"))}


def hunt(
    target: str,
    seconds: float,
    *,
    seeds: dict[str, bytes],
    packets: bool = False,
    seed: int = 0,
    most: int = 5,
    deadline: float = DEADLINE,
    peak: int = PEAK,
    rounds: int = 2,
    changed: float = math.inf,
) -> Report:
    """All seeds as they are, ``rounds`` times, so that growth is counted from a child that is warm; then changed ones,
    for ``seconds`` and no more than ``changed`` of them. Up to ``most`` findings, each in a fresh child."""
    report = Report(target)
    mutator = Mutator(random.Random(seed), list(seeds.values()), packets=packets)
    queue = [*seeds.values()] * rounds
    child: Child | None = None
    base, kinds, began = 0, set[str](), time.monotonic()
    until: float | None = None
    try:
        while queue or (changed > 0 and time.monotonic() < (until := until or time.monotonic() + seconds)):
            if child is None:
                child, base = Child(target, deadline), 0
            if queue:
                data = queue.pop(0)
            else:
                data, changed = mutator.next(), changed - 1
            started = time.monotonic()
            try:
                answer = child.run(data)
                found = _judge(answer, base, peak)
            except Died as died:
                answer, found = None, (died.kind, died.detail)
            report.runs += 1
            if found is not None:
                if all(data != each.data for each in report.findings):
                    report.findings.append(Finding(target, *found, data))
                child.close()
                child = None
                if len(report.findings) >= most:
                    break
                continue
            assert answer is not None
            report.slowest = max(report.slowest, time.monotonic() - started)
            report.peak = max(report.peak, answer.peak)
            if not queue:
                base = base or answer.rss
                report.grown = answer.rss - base
            if answer.said not in kinds and len(data) <= 1 << 16:
                kinds.add(answer.said)
                if len(mutator.pool) < POOL:
                    mutator.pool.append(data)
    finally:
        if child is not None:
            child.close()
    report.seconds, report.kinds = time.monotonic() - began, len(kinds)
    return report


def _judge(answer: Answer, base: int, peak: int) -> tuple[str, str] | None:
    if answer.wrong:
        return "wrong", answer.wrong
    if base and answer.rss - base > GROWTH:
        return "growth", f"{(answer.rss - base) >> 20} MiB more than when it was warm"
    if answer.peak > peak:
        return "growth", f"{answer.peak >> 20} MiB at this input"
    return None
