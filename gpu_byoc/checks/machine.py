"""What the doctor sees without asking a library: Python, cores, memory, descriptors, ports."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import psutil

from gpu_byoc.checks import health
from gpu_byoc.config import GIB, MIB, EngineConfig
from gpu_byoc.errors import ConfigError

Level = Literal["OK", "WARN", "FAIL"]

RESIDENT: Final = 320 * MIB
"""What a worker takes beside its frames, generously: live streams that came and went peaked at 309 MB with them."""

DESCRIPTORS: Final = 1024
"""The usual limit, and enough: a job holds one descriptor, a live stream a handful."""

PORTS: Final = {
    8935: ("gateway, where jobs come in", "gpu-byoc livepeer -gateway -httpAddr HOST:PORT"),
    8936: ("orchestrator, where gateways reach it", "gpu-byoc livepeer -orchestrator -serviceAddr HOST:PORT"),
    7936: ("orchestrator, its status", "gpu-byoc livepeer -orchestrator -cliAddr HOST:PORT"),
    5935: ("gateway, its status", "gpu-byoc livepeer -gateway -cliAddr HOST:PORT"),
    3389: ("trickle server", "gpu-byoc trickle --port PORT"),
}
"""Defaults of the other commands: whose, and how another one is chosen. The worker's own comes first, see ``ports``."""


@dataclass(frozen=True, slots=True)
class Finding:
    """OK: as it should be. WARN: something is not to be had or worse than it could be. FAIL: no worker can serve."""

    level: Level
    name: str
    fact: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the control groups allow: bytes and CPUs, None where they set no limit."""

    memory: int | None
    cpus: float | None


def system() -> Finding:
    fact = f"Python {platform.python_version()} on {platform.system()} {platform.release()}, {platform.machine()}"
    if platform.system() != "Linux":
        return Finding("WARN", "system", fact, "use Linux, or a container: nothing else has been tried")
    return Finding("OK", "system", fact)


def cores(limits: Limits) -> Finding:
    count = len(os.sched_getaffinity(0))
    fact = f"{count} of {os.cpu_count()} can be used"
    if limits.cpus is None:
        return Finding("OK", "cores", fact)
    fact += f", and a control group allows the time of {limits.cpus:g}"
    if limits.cpus < min(1, count):
        return Finding("WARN", "cores", fact, "allow one at least (docker run --cpus 1): all of Python shares it")
    return Finding("OK", "cores", fact)


def memory(limits: Limits) -> Finding:
    there = psutil.virtual_memory()
    room = min(there.available, limits.memory or there.available)
    fact = f"{there.available / GIB:.1f} of {there.total / GIB:.1f} GiB available"
    if limits.memory is not None and limits.memory < there.total:
        fact += f", and a control group allows {limits.memory / GIB:.1f} GiB"
    wanted = EngineConfig().memory
    if room < wanted + RESIDENT:
        fits = max(64, (room - RESIDENT) // MIB)
        return Finding("WARN", "memory", fact, f"serve with --memory-mb {fits}: frames may take {wanted // MIB} MiB")
    return Finding("OK", "memory", fact)


def descriptors() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fact = f"{_limit(soft)} open at once (at most {_limit(hard)})"
    if soft != resource.RLIM_INFINITY and soft < DESCRIPTORS:
        return Finding("WARN", "descriptors", fact, f"ulimit -n {DESCRIPTORS * 4}, or docker run --ulimit nofile=4096")
    return Finding("OK", "descriptors", fact)


def memlock() -> str:
    """RLIMIT_MEMLOCK in words."""
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / MIB:g} MiB"


def _limit(value: int) -> str:
    return "any number" if value == resource.RLIM_INFINITY else str(value)


def ports(worker: int, others: Mapping[int, tuple[str, str]] = PORTS) -> Iterator[Finding]:
    """A line for each port that somebody listens on, and one for the free ones. Nothing is bound to find out."""
    wanted = {worker: ("worker, where jobs come in", "gpu-byoc serve --port PORT")} | dict(others)
    try:
        listening = {
            each.laddr.port: each.pid for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN
        }
    except (psutil.Error, OSError) as error:
        yield Finding("WARN", "ports", f"it cannot be seen who listens here: {error}", "run it with more privileges")
        return
    for port, (use, flag) in wanted.items():
        if port not in listening:
            continue
        state = health.ask(f"http://127.0.0.1:{port}", 1.0).state if port == worker else "MALFORMED"
        if state in ("LOADING", "ERROR", *health.WELL):
            yield Finding("OK", f"port {port}", f"a worker listens and says {state}{_who(listening[port])}")
        else:
            yield Finding("WARN", f"port {port}", f"taken{_who(listening[port])} ({use})", f"stop it, or {flag}")
    if free := [str(port) for port in wanted if port not in listening]:
        yield Finding("OK", "ports", f"{', '.join(free)} free")


def _who(pid: int | None) -> str:
    """Nothing where the system does not tell."""
    try:
        return f", pid {pid}: {' '.join(psutil.Process(pid).cmdline())[:100]}" if pid else ""
    except psutil.Error:
        return f", pid {pid}"


def worker_port(text: str) -> int:
    """What GPU_BYOC_PORT says, the default where that is no port."""
    try:
        return int(health.default_url(text).rpartition(":")[2])
    except ConfigError:
        return 8000


# --- control groups


def limits(groups: Path = Path("/sys/fs/cgroup"), mine: Path = Path("/proc/self/cgroup")) -> Limits:
    """The tightest limits on this process, of version 1 and 2 (Linux, Documentation/admin-guide/cgroup-v1, -v2)."""
    memory: list[int] = []
    cpus: list[float] = []
    for base, inside in _places(groups, mine):
        for folder in _upwards(base, inside):
            top = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
            if top and top[0] != "max" and int(top[0]) < 1 << 60:  # version 1 says "none" by a number near 2**63
                memory.append(int(top[0]))
            share = _words(folder / "cpu.max") or [
                *_words(folder / "cpu.cfs_quota_us"),
                *_words(folder / "cpu.cfs_period_us"),
            ]
            if len(share) == 2 and share[0] not in ("max", "-1"):
                cpus.append(int(share[0]) / int(share[1]))
    return Limits(min(memory, default=None), min(cpus, default=None))


def _places(groups: Path, mine: Path) -> Iterator[tuple[Path, str]]:
    """(where a hierarchy is mounted, our path in it)."""
    try:
        lines = mine.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, inside = line.split(":", 2)
        if number == "0":
            yield (groups / "unified" if (groups / "unified").is_dir() else groups), inside
        for controller in {"cpu", "memory"} & set(controllers.split(",")):
            yield groups / controller, inside


def _upwards(base: Path, inside: str) -> Iterator[Path]:
    """Our folder and those above it. In a container our path may not be visible, then the mount itself is ours."""
    folder = base / inside.lstrip("/")
    while folder != base:
        yield folder
        folder = folder.parent
    yield base


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
