"""``gpu-byoc verify``: does every backend on this machine do what numpy does, under load too?

Through the engine that the worker uses, on the device that it would use. Each check opens its own engine, so that one
that fails leaves nothing behind for the next.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gpu_byoc._version import VERSION
from gpu_byoc.checks import parity, races
from gpu_byoc.checks.rig import Subject, rig
from gpu_byoc.errors import BackendUnavailable, ConfigError, DeviceLost, said_by
from gpu_byoc.plugins import AUTO, load_backend
from gpu_byoc.processors.green_tint import GreenTint

if TYPE_CHECKING:
    from rich.console import RenderableType

CHECKS: Final[dict[str, Callable[[Subject, bool], int]]] = {
    "shapes": parity.shapes,
    "byte values": parity.byte_values,
    "in flight": races.in_flight,
    "slot reuse": races.reuse,
    "overtaking": races.overtaking,
    "failures": parity.failures,
    "cancels": races.cancels,
    "meter": races.meter,
    "probes": races.probes,
}
"""By name, in the order in which they are run. Each returns how many frames (or probes) it looked at."""

PASSED, FAILED, SKIPPED = "passed", "FAILED", "skipped"

LOST = "LOST"
"""Failed, and the device with it: in this process no library can use it any more, so nothing is checked after that."""


@dataclass(frozen=True, slots=True)
class Row:
    """One check of one backend, or (check "") a backend that was not checked at all."""

    backend: str
    check: str
    result: str
    count: int = 0
    seconds: float = 0.0
    detail: str = ""


def verify(subject: Subject, quick: bool, checks: Sequence[str] = tuple(CHECKS)) -> Iterator[Row]:
    """The rows of one backend as they come; after one that is LOST there are none."""
    for name in checks:
        began = time.perf_counter()
        result, count, detail = PASSED, 0, ""
        try:
            count = CHECKS[name](subject, quick)
            if not count:
                result, detail = SKIPPED, f"{subject.name} has none"
        except Exception as error:  # a check that does not end well has failed, whatever the reason
            result, detail = _failed(error)
        yield Row(subject.name, name, result, count, time.perf_counter() - began, detail)
        if result == LOST:
            return


def _failed(error: Exception) -> tuple[str, str]:
    """(result, detail) of what ended with ``error``."""
    return LOST if isinstance(error, DeviceLost) else FAILED, f"{type(error).__name__}: {said_by(error)}"


def facts(subject: Subject) -> dict[str, Any]:
    """What the backend says of itself when it is open."""
    with rig(subject, GreenTint()) as engine:
        backend = engine.engine.backend
        return {"device": backend.device, **backend.info()}


def main(argv: Sequence[str]) -> int:
    """0 if everything that was to be checked passed, else 1."""
    given = _arguments(argv)
    from rich.console import Console

    logging.getLogger("gpu_byoc").addHandler(logging.NullHandler())  # what goes wrong on purpose is not printed
    console = Console(highlight=False, markup=False)
    rows: list[Row] = []
    known: dict[str, dict[str, Any]] = {}
    for name in given.backend or reversed(AUTO):
        for row in _checked(name, given, known):
            rows.append(row)
            if row.check:
                console.print(f"{row.backend}: {row.check}: {row.result} ({row.seconds:.1f} s)", style="dim")
        if rows[-1].result == LOST:
            break
    passed = any(row.result == PASSED for row in rows) and not any(row.result in (FAILED, LOST) for row in rows)
    for part in card(rows, known):
        console.print(part)
    console.print(_verdict(rows, passed))
    if given.json is not None:
        report = {"gpu_byoc": VERSION, "quick": given.quick, "passed": passed, "backends": known}
        given.json.write_text(json.dumps({**report, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    return 0 if passed else 1


def _checked(name: str, given: argparse.Namespace, known: dict[str, dict[str, Any]]) -> Iterator[Row]:
    """Open it once, for what it says of itself, and check it."""
    try:
        backend = load_backend(name)
        if reason := backend.available(given.device):
            raise BackendUnavailable(reason)
        subject = Subject(name, backend, given.device)
        known[name] = facts(subject)
    except BackendUnavailable as error:
        yield Row(name, "", FAILED if given.backend else SKIPPED, detail=str(error))
    except Exception as error:  # whatever it is: one that does not open has failed, and the others go on
        result, detail = _failed(error)
        yield Row(name, "", result, detail=detail)
    else:
        yield from verify(subject, given.quick)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu-byoc verify",
        allow_abbrev=False,
        description="Hold the backends on this machine against numpy, byte for byte, one frame and under load.",
    )
    parser.add_argument(
        "--backend", nargs="+", action="extend", metavar="NAME", help="which ones; one that cannot open has failed then"
    )
    parser.add_argument("--device", help="such as cuda:1; the backend's own choice unless said")
    parser.add_argument("--quick", action="store_true", help="a tenth of the frames")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the score card, for programs")
    given = parser.parse_args(argv)
    if given.json is not None and not given.json.parent.is_dir():
        raise ConfigError(f"--json {given.json}: there is no folder {given.json.parent}")
    return given


def card(rows: Sequence[Row], known: dict[str, dict[str, Any]]) -> Iterator[RenderableType]:
    """The score card, and under it what the backends say of themselves."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title="score card", box=box.SIMPLE)
    for name in ("check", "backend", "result"):
        table.add_column(name, no_wrap=True)
    for name in ("count", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    style = {PASSED: "green", FAILED: "bold red", LOST: "bold red", SKIPPED: "dim"}
    for row in rows:
        # Text: brackets in a message are not markup
        table.add_row(
            row.check or "all",
            Text(row.backend),
            Text(row.result, style[row.result]),
            str(row.count or ""),
            f"{row.seconds:.1f}" if row.seconds else "",
            Text(row.detail),
        )
    yield table
    for name, info in known.items():
        for reason in info.get("degraded", []):
            yield Text(f"{name} is degraded: {reason}", "yellow")


def _verdict(rows: Sequence[Row], passed: bool) -> str:
    count = sum(row.count for row in rows if row.check != "probes")
    names = ", ".join(dict.fromkeys(row.backend for row in rows if row.result == PASSED)) or "nothing"
    if passed:
        return f"{names}: {count:,} frames equal numpy's, byte for byte."
    failed = ", ".join(f"{row.backend} {row.check}".strip() for row in rows if row.result in (FAILED, LOST))
    lost = "; the device is lost, and nothing was checked after that: start again" if rows[-1].result == LOST else ""
    return f"failed: {failed or 'no backend could be checked'}{lost}"
