"""Worker, orchestrator and gateway as three processes on 127.0.0.1, with the quickstart page's commands."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp

from gpu_byoc.local.children import Child, Children, pick_ports

MODEL_ID: Final = "green-tint-cpu"
READY_SECONDS: Final = 60.0  # a GPU backend may compile and warm up
SETTLE_SECONDS: Final = 5.0  # logs and the ledger are written a moment after the answer they are about
_POLL_SECONDS: Final = 0.05  # between looks at another process, which has no event of ours
_ASK_SECONDS: Final = 5.0
_PROGRAM: Final = (sys.executable, "-m", "gpu_byoc")


@dataclass(frozen=True, slots=True)
class Ports:
    """The defaults are those of the quickstart page."""

    worker: int = 8000
    service: int = 8936
    orchestrator_cli: int = 7936
    gateway: int = 8935
    gateway_cli: int = 5935


@dataclass(frozen=True, slots=True)
class Network:
    """The processes. ``replaced`` are the page's ports that were taken, with the ones used instead."""

    ports: Ports
    replaced: tuple[tuple[int, int], ...]
    worker: Child
    orchestrator: Child
    gateway: Child

    @property
    def url(self) -> str:
        """Where the gateway takes jobs."""
        return f"http://127.0.0.1:{self.ports.gateway}"


def start(children: Children, backend: str, datadir: Path, free_ports: bool) -> Network:
    """Start all three without waiting for them; await ``ready`` next."""
    wanted = astuple(Ports())
    picked = pick_ports([0] * len(wanted) if free_ports else wanted)
    replaced = tuple((old, new) for old, new in zip(wanted, picked, strict=True) if old != new and not free_ports)
    ports = Ports(*picked)
    return Network(
        ports,
        replaced,
        children.start("worker", _worker(ports, backend)),
        children.start("orchestrator", _orchestrator(ports, datadir / "orch")),
        children.start("gateway", _gateway(ports, datadir / "gw")),
    )


def _worker(ports: Ports, backend: str) -> Sequence[str]:
    flags = f"--processor green_tint --backend {backend} --host 127.0.0.1 --port {ports.worker}"
    return (*_PROGRAM, "serve", *flags.split(), "--capability", MODEL_ID)


def _orchestrator(ports: Ports, datadir: Path) -> Sequence[str]:
    flags = (
        f"-orchestrator -network offchain -serviceAddr 127.0.0.1:{ports.service} "
        f"-cliAddr 127.0.0.1:{ports.orchestrator_cli} "
        f"-byoc -byocContainerURL http://127.0.0.1:{ports.worker} -byocModelID {MODEL_ID}"
    )
    return (*_PROGRAM, "livepeer", *flags.split(), "-datadir", str(datadir))


def _gateway(ports: Ports, datadir: Path) -> Sequence[str]:
    flags = (
        f"-gateway -network offchain -orchAddr 127.0.0.1:{ports.service} "
        f"-httpAddr 127.0.0.1:{ports.gateway} -httpIngest -cliAddr 127.0.0.1:{ports.gateway_cli}"
    )
    return (*_PROGRAM, "livepeer", *flags.split(), "-datadir", str(datadir))


# --- looking at them


async def ready(network: Network) -> None:
    """Return when a job can be sent. Raises ChildEnded, with the end of its log, if one ends or takes too long."""
    health = f"http://127.0.0.1:{network.ports.worker}/health"
    await _until(network.worker, health, lambda said: said.get("status") in ("IDLE", "OK"), READY_SECONDS)
    await _until(network.orchestrator, _orchestrator_status(network), _advertises, READY_SECONDS)
    status = f"http://127.0.0.1:{network.ports.gateway_cli}/status"
    await _until(network.gateway, status, lambda said: said.get("role") == "gateway", READY_SECONDS)


async def ledger(network: Network, jobs: int) -> dict[str, Any]:
    """The orchestrator's sums, once they hold ``jobs`` jobs: wall_seconds, billed_seconds, compute_seconds."""
    status = await _until(
        network.orchestrator,
        _orchestrator_status(network),
        lambda said: said.get("ledger", {}).get("jobs", 0) >= jobs,
        SETTLE_SECONDS,
    )
    sums: dict[str, Any] = status["ledger"]
    return sums


async def lines_until(child: Child, start: int, text: str) -> list[str]:
    """The lines of its log from number ``start`` on, up to the one that contains ``text``."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline:
        lines = child.lines()[start:]
        for number, line in enumerate(lines):
            if text in line:
                return lines[: number + 1]
        child.check()
        await asyncio.sleep(_POLL_SECONDS)
    raise child.failure(f"did not log {text!r}")


def _orchestrator_status(network: Network) -> str:
    return f"http://127.0.0.1:{network.ports.orchestrator_cli}/status"


def _advertises(said: dict[str, Any]) -> bool:
    return any(item["name"] == MODEL_ID and item["state"] == "ready" for item in said.get("capabilities", ()))


async def _until(child: Child, url: str, condition: Callable[[dict[str, Any]], bool], seconds: float) -> dict[str, Any]:
    """The first JSON object from ``url`` that meets the condition."""
    deadline = time.monotonic() + seconds
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_ASK_SECONDS)) as session:
        while time.monotonic() < deadline:
            child.check()
            try:
                async with session.get(url) as answer:
                    said = await answer.json()
                if isinstance(said, dict) and condition(said):
                    return said
            except (aiohttp.ClientError, TimeoutError, json.JSONDecodeError):
                pass  # it is not up yet, or busy; the deadline and check() say when to give up
            await asyncio.sleep(_POLL_SECONDS)
    raise child.failure(f"was not as expected within {seconds:g} s ({url})")
