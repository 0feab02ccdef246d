"""Which resource binds: CPU time of a worker by what its threads do, and of everything else, sampled from outside.

Threads are known by the names that ``named_threads`` has the kernel keep. A device or a single thread that is busy all
the time binds by itself. Where the whole machine is busy, the CPU binds, and of the worker's stages the one that uses
most of it is named. Otherwise nothing that was measured binds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

SAMPLE_SECONDS: Final = 0.25

LOOP: Final = "event loop"
DECODE: Final = "decode"
ENCODE: Final = "encode"
DEVICE: Final = "device"
OTHER: Final = "other"


@dataclass(frozen=True, slots=True)
class Sample:
    """CPU seconds used so far: by (thread, role) of the worker, by each of ``beside``, by the whole machine."""

    at: float
    threads: Mapping[tuple[int, str], float]
    beside: Mapping[str, float]
    machine: float


@dataclass(frozen=True, slots=True)
class Spent:
    """Cores that were busy between two samples. ``busiest`` is the busiest single thread of each role."""

    seconds: float
    roles: Mapping[str, float]
    busiest: Mapping[str, float]
    beside: Mapping[str, float]
    machine: float

    @property
    def others(self) -> float:
        """What none of ours used."""
        return max(0.0, self.machine - sum(self.roles.values()) - sum(self.beside.values()))


def role(name: str, backend: str, is_main: bool) -> str:
    """What a thread of this name does."""
    if is_main:
        return LOOP
    for end, what in (("-decode", DECODE), ("-encode", ENCODE), ("-landing", DEVICE), (f"byoc-{backend}", DEVICE)):
        if name.endswith(end):
            return what
    return OTHER


class Watch:
    """``await run()`` samples until it is cancelled; ``beside`` are other processes that are ours, by name."""

    def __init__(self, pid: int, backend: str, beside: Mapping[str, int]) -> None:
        self.samples: list[Sample] = []
        self._process = psutil.Process(pid)
        self._backend = backend
        self._beside = {name: psutil.Process(each) for name, each in beside.items()}

    async def run(self) -> None:
        while True:
            with suppress(psutil.NoSuchProcess):  # whoever plays says that it ended
                self.samples.append(self._sample())
            await asyncio.sleep(SAMPLE_SECONDS)

    def _sample(self) -> Sample:
        pid, threads = self._process.pid, {}
        for each in self._process.threads():
            with suppress(OSError):  # it has just ended
                name = Path(f"/proc/{pid}/task/{each.id}/comm").read_text().rstrip("\n")
                threads[each.id, role(name, self._backend, each.id == pid)] = each.user_time + each.system_time
        beside = {name: sum(process.cpu_times()[:2]) for name, process in self._beside.items()}
        cpu = psutil.cpu_times()
        busy = sum(cpu) - cpu.idle - cpu.iowait - cpu.guest - cpu.guest_nice
        return Sample(time.monotonic(), threads, beside, busy)


def spent(samples: Sequence[Sample], begin: float, end: float) -> Spent | None:
    """Between the first sample after ``begin`` and the last before ``end`` (``time.monotonic``); None without two."""
    within = [each for each in samples if begin <= each.at <= end]
    if len(within) < 2:
        return None
    first, last = within[0], within[-1]
    seconds = last.at - first.at
    roles: dict[str, float] = {}
    busiest: dict[str, float] = {}
    for (thread, what), used in last.threads.items():
        cores = (used - first.threads.get((thread, what), 0.0)) / seconds
        roles[what] = roles.get(what, 0.0) + cores
        busiest[what] = max(busiest.get(what, 0.0), cores)
    beside = {name: (used - first.beside[name]) / seconds for name, used in last.beside.items()}
    return Spent(seconds, roles, busiest, beside, (last.machine - first.machine) / seconds)


BUSY: Final = 0.9
"""Of a thread, a device or all cores: above it what comes waits in line (at 0.9 ten times its own time, in a queue of
random arrivals), and samples of a quarter of a second rarely show more."""

NOTABLE: Final = 0.2
"""Cores that other programs take, from which on they are mentioned."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """``copy_in`` and ``copy_out`` are the cores that converting the pictures took: its floor in the same run times
    frames a second. ``compute`` and ``copies`` are the parts of the time that the device was busy with each."""

    cores: int
    spent: Spent
    copy_in: float
    copy_out: float
    on_gpu: bool
    compute: float
    copies: float

    @property
    def stages(self) -> Mapping[str, float]:
        """Cores that each stage of the worker took."""
        roles = self.spent.roles
        decode, encode = roles.get(DECODE, 0.0), roles.get(ENCODE, 0.0)
        copy_in, copy_out = min(self.copy_in, decode), min(self.copy_out, encode)
        return {
            "decode": decode - copy_in,
            "encode": encode - copy_out,
            "copy": copy_in + copy_out,
            "kernel": roles.get(DEVICE, 0.0),
            "event loop": roles.get(LOOP, 0.0),
        }


def binding(seen: Evidence) -> str:
    """In words: the resource and how busy it was."""
    if seen.on_gpu and seen.compute + seen.copies >= BUSY:
        what = "kernel" if seen.compute >= seen.copies else "copy"
        return f"{what}: the GPU was busy {seen.compute + seen.copies:.0%} of the time"
    busiest = seen.spent.busiest
    for thread, what in ((LOOP, "event loop"), (DEVICE, "kernel"), (DECODE, "decode"), (ENCODE, "encode")):
        if busiest.get(thread, 0.0) >= BUSY:
            return f"{what}: one thread was busy {busiest[thread]:.0%} of the time"
    used, ours = seen.spent, sum(seen.spent.roles.values())
    busy = f"{used.machine:.1f} of {seen.cores} cores were busy"
    if used.others >= NOTABLE:
        busy += f" ({used.others:.1f} of them with other programs)"
    if used.machine >= BUSY * seen.cores:
        if used.others > ours + sum(used.beside.values()):
            return f"other programs: {busy}"
        stage, cores = max(seen.stages.items(), key=lambda each: each[1])
        return f"{stage}: {busy}, and it took {cores / (ours or 1.0):.0%} of the worker's {ours:.1f}"
    return f"none of those measured: {busy}, and no thread all the time"
