"""What a figure was measured on, and whether the machine was quiet enough to believe it."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import psutil

from gpu_byoc._version import VERSION

from .harness import percentile

PACKAGES: Final = ("numpy", "torch", "cupy-cuda12x", "cupy-cuda13x", "aiohttp", "av")

PROBE: Final = bytes(4 << 20)
REPEATS: Final = 80

SHAKY: Final = 0.25
"""The probe's 95th percentile may lie so far above its median: on a quiet virtual machine it is under 0.1."""

DRIFT: Final = 0.15
"""The probe may be so much slower or faster at the end than at the start."""

SHORT: Final = 0.2
"""Seconds in which the kernel's ticks of 10 ms say nothing of who was busy."""

OTHERS: Final = 0.30
"""Cores that something else may keep busy during the probe, or on average while a group runs."""


def machine() -> dict[str, Any]:
    """CPU, cores, memory, GPUs with their driver, versions, system, commit and command."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus(),
        "system": f"{_system()}, Linux {platform.release()}",
        "python": platform.python_version(),
        "versions": {"gpu-byoc": VERSION, **_versions()},
        "commit": _commit(),
        "command": _command(),
    }


def short(facts: dict[str, Any]) -> str:
    """One line: ``Intel(R) Xeon(R) Processor, 2 cores, 23.5 GiB, no GPU``."""
    devices = ", ".join(f"{each['name']} (driver {each['driver']})" for each in facts["gpus"]) or "no GPU"
    return f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']:g} GiB, {devices}"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()  # ARM has no such line


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return "unknown distribution"


def gpus() -> list[dict[str, Any]]:
    """What ``nvidia-smi`` lists; empty without a driver."""
    rows = smi("--query-gpu=name,driver_version,memory.total")
    return [{"name": name, "driver": driver, "memory_mib": _number(memory)} for name, driver, memory in rows]


def smi(query: str) -> list[list[str]]:
    """What ``nvidia-smi`` answers, line by line; nothing where there is none."""
    try:
        asked = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [[part.strip() for part in line.split(",")] for line in asked.stdout.splitlines() if line.strip()]


def _number(text: str) -> int | None:
    """``[N/A]`` is what a GPU without memory of its own says."""
    return int(text) if text.isdigit() else None


def _versions() -> dict[str, str]:
    """Of the packages that are installed; none of them is imported."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """``git describe`` of the checkout that this file lies in; of a wheel, the version that was built."""
    here = Path(__file__).resolve().parent
    try:
        known = subprocess.run(
            ["git", "ls-files", "--error-unmatch", "__init__.py"], cwd=here, capture_output=True, check=False
        )
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return f"none: installed as version {VERSION}"
    if known.returncode:  # a virtual environment inside some other repository
        return f"none: installed as version {VERSION}"
    return described.stdout.strip()


def _command() -> str:
    return " ".join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])


@dataclass(frozen=True, slots=True)
class Probe:
    """A fixed computation on one core, repeated for about a second."""

    median_ms: float
    tail: float
    """How far the 95th percentile lies above the median, as a part of it."""
    others_cores: float
    """Cores that other processes kept busy meanwhile."""


def probe(repeats: int = REPEATS) -> Probe:
    others, times = Others(), []
    for _ in range(repeats):
        began = time.perf_counter()
        hashlib.sha256(PROBE)
        times.append(time.perf_counter() - began)
    middle = percentile(times, 0.5)
    return Probe(middle * 1e3, percentile(times, 0.95) / middle - 1, others.cores())


def noise(before: Probe, after: Probe, meanwhile: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Both probes, and in ``too_noisy`` the reasons why figures of this run decide nothing; empty when they may.

    ``meanwhile``: by what was measured, the cores that other processes kept busy.
    """
    reasons = []
    for when, each in (("start", before), ("end", after)):
        if each.tail > SHAKY:
            reasons.append(f"at the {when}, one repetition in twenty took {each.tail:.0%} longer than the median")
        if each.others_cores > OTHERS:
            reasons.append(f"at the {when}, something else kept {each.others_cores:.1f} cores busy")
    if busy := {title: cores for title, cores in (meanwhile or {}).items() if cores > OTHERS}:
        most = f"something else kept {'up to ' * (len(busy) > 1)}{max(busy.values()):.1f} cores busy"
        reasons.append(f"while {', '.join(f'“{title}”' for title in busy)} ran, {most}")
    drift = after.median_ms / before.median_ms - 1
    if abs(drift) > DRIFT:
        reasons.append(
            f"one core was {abs(drift):.0%} {'slower' if drift > 0 else 'faster'} at the end than at the start"
        )
    return {"before": asdict(before), "after": asdict(after), "drift": drift, "too_noisy": reasons}


class Others:
    """How many cores something else kept busy, the host of a virtual machine included. Ask when children have ended.

    Interrupts are nobody's: most of them are packets that we send to ourselves.
    """

    def __init__(self) -> None:
        self._began = self._now()

    def cores(self) -> float:
        began, now = self._began, self._now()
        if now[0] - began[0] < SHORT:
            return 0.0
        return max(0.0, (now[1] - now[2] - began[1] + began[2]) / (now[0] - began[0]))

    def _now(self) -> tuple[float, float, float]:
        """Seconds: time, busy on all cores, used by us and our children."""
        cpu, ours = psutil.cpu_times(), os.times()
        return time.monotonic(), cpu.user + cpu.nice + cpu.system + cpu.steal, sum(ours[:4])


def backends() -> dict[str, str]:
    """Every backend that is installed, and why it does not open here; an empty reason says that it does."""
    from gpu_byoc.errors import BackendUnavailable
    from gpu_byoc.plugins import backend_names, load_backend

    found = {}
    for name in sorted(backend_names()):
        try:
            found[name] = load_backend(name).available(None) or ""
        except BackendUnavailable as error:
            found[name] = str(error)
    return found
