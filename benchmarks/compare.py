"""``gpu-byoc bench compare A.json B.json``: two runs side by side, B against A, and a gate against regressions.

A ratio above 1 is B's advantage, whichever way the figure itself is better. Rows are paired by group and name. What
cannot be judged (unstable in either run, skipped, failed, there in one run only) is listed, never passed over.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from gpu_byoc.errors import ConfigError

from .machine import short
from .metrics import figures, metric, written
from .schema import load

SAME: Final = ("cpu", "cores", "memory_gib", "gpus")
"""What makes a machine; memory is compared roughly, kernels keep some of it for themselves."""

UNDECIDED: Final = 3
"""Exit status of a gate that cannot say."""


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of one row in both runs. ``ratio`` above 1: B is better. ``judged``: ``--fail-under`` looks at it."""

    group: str
    row: str
    figure: str
    before: float
    after: float
    ratio: float | None
    judged: bool

    @property
    def where(self) -> str:
        return f"{self.group}: {self.row}: {metric(self.figure).head}"


@dataclass(slots=True)
class Comparison:
    lines: list[Line] = field(default_factory=list)
    unjudged: list[str] = field(default_factory=list)
    """What could not be judged, each with the reason."""
    broken: list[str] = field(default_factory=list)
    """Rows that A measured and that failed in B, each with the reason; they are among the unjudged."""

    def under(self, least: float) -> list[Line]:
        return [line for line in self.lines if line.judged and line.ratio is not None and line.ratio < least]


def different(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """In what two machines differ; empty where they are one and the same, as far as a file can tell."""
    found = []
    for key in SAME:
        a, b = _told(before, key), _told(after, key)
        if a != b:
            found.append(f"{key}: {a} against {b}")
    return found


def _told(machine: dict[str, Any], key: str) -> Any:
    if key == "gpus":
        return [each["name"] for each in machine["gpus"]]
    return round(machine[key]) if key == "memory_gib" else machine[key]


def compare(before: dict[str, Any], after: dict[str, Any], asked: Sequence[str] = ()) -> Comparison:
    """``asked`` names the figures to judge; otherwise all that have a better way and are no tails."""
    found = Comparison()
    for name in dict.fromkeys([*before["groups"], *after["groups"]]):
        sides = [{row["name"]: row for row in run["groups"].get(name, {"rows": []})["rows"]} for run in (before, after)]
        for row in dict.fromkeys([*sides[0], *sides[1]]):
            pair = sides[0].get(row), sides[1].get(row)
            reason = _reason(*pair)
            if reason:
                found.unjudged.append(f"{name}: {row}: {reason}")
            if pair[0] and pair[1]:
                found.lines += _lines(name, row, pair[0], pair[1], asked, bool(reason))
                found.unjudged += [] if reason else _alone(f"{name}: {row}", pair[0], pair[1])
                if "failed" in pair[1] and not {"failed", "skipped"} & set(pair[0]):
                    found.broken.append(f"{name}: {row}: {pair[1]['failed']}")
    return found


def _reason(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    """Why a row cannot be judged; empty when it can."""
    if before is None or after is None:
        return f"only in {'B' if before is None else 'A'}"
    said = []
    for side, row in (("A", before), ("B", after)):
        for mark in ("skipped", "failed"):
            if mark in row:
                said.append(f"{mark} in {side} ({row[mark]})")
        if row.get("unstable"):
            said.append(f"unstable in {side} (±{row['spread']:.0%})")
    return "; ".join(said)


def _lines(
    group: str, row: str, before: dict[str, Any], after: dict[str, Any], asked: Sequence[str], doubtful: bool
) -> Iterator[Line]:
    a, b = figures(before), figures(after)
    for name in a:
        known = metric(name)
        if name not in b or not known.better:
            continue
        ratio = _ratio(a[name], b[name], known.better)
        wanted = name in asked if asked else not known.tail
        yield Line(group, row, name, a[name], b[name], ratio, wanted and not doubtful)


def _alone(where: str, before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """Figures that one of two rows lacks."""
    for side, row, other in (("A", before, after), ("B", after, before)):
        for name in figures(row):
            if metric(name).better and name not in other:
                yield f"{where}: {metric(name).head} only in {side}"


def _ratio(before: float, after: float, better: str) -> float | None:
    """B's advantage; None where a zero leaves none to say. From nothing lost to something lost is 0."""
    if before == after:
        return 1.0
    above, below = (after, before) if better == "higher" else (before, after)
    return above / below if below else None


def main(argv: Sequence[str] | None = None) -> int:
    """0. With ``--fail-under`` 1 when a row is under it, failed in B alone, or none could be judged; ``UNDECIDED`` on a
    noisy machine, or when one run is shorter than the other.

    Raises:
        ConfigError: a file cannot be read, or the machines are not one.
    """
    parser = argparse.ArgumentParser(
        prog="gpu-byoc bench compare", allow_abbrev=False, description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument("--different-machines", action="store_true", help="compare them although the machines differ")
    parser.add_argument("--fail-under", type=float, metavar="R", help="status 1 if a stable row's ratio is below R")
    parser.add_argument("--figures", default="", help="comma list of the figures to judge, as p99_us; tails only so")
    given = parser.parse_args(argv)
    runs = load(given.before), load(given.after)
    differences = different(runs[0]["machine"], runs[1]["machine"])
    if differences and not given.different_machines:
        raise ConfigError(
            f"two different machines ({'; '.join(differences)}): their ratio says nothing about the program; "
            "--different-machines compares them all the same"
        )
    asked = [name for name in given.figures.split(",") if name]
    found = compare(*runs, asked)
    console = Console(highlight=False, soft_wrap=True)
    _show(console, runs, found)
    if given.fail_under is None:
        return 0
    return _gate(console, found, given.fail_under, _doubts(runs))


def _doubts(runs: tuple[dict[str, Any], dict[str, Any]]) -> list[str]:
    """Why these two runs decide nothing."""
    found = [
        f"{side} was measured on a machine that was too noisy"
        for side, run in zip("AB", runs, strict=True)
        if run["noise"]["too_noisy"]
    ]
    if runs[0]["size"] != runs[1]["size"]:
        found.append(f"A is a {runs[0]['size']} run and B a {runs[1]['size']} one")
    return found


def _show(console: Console, runs: tuple[dict[str, Any], dict[str, Any]], found: Comparison) -> None:
    for side, run in zip("AB", runs, strict=True):
        console.print(f"{side}: {short(run['machine'])}; commit {run['machine']['commit']}; {run['size']}")
        if "upgraded_from" in run:
            console.print(f"   written as version {run['upgraded_from']}: it does not say which rows were stable")
        for reason in run["noise"]["too_noisy"]:
            console.print(f"   too noisy to decide: {reason}")
    group = ""
    table = Table()
    for line in found.lines:
        if line.group != group:
            if group:
                console.print(table)
            group = line.group
            table = Table(title=group, title_justify="left")
            table.add_column("row")
            table.add_column("figure")
            for head in ("A", "B", "B's advantage"):
                table.add_column(head, justify="right")
        ratio = "-" if line.ratio is None else f"{line.ratio:.2f}"
        cells = (line.row, metric(line.figure).head, written(line.before), written(line.after), ratio)
        table.add_row(*cells, style="" if line.judged else "dim")
    if group:
        console.print(table)
    if found.unjudged:
        console.print("Not judged:")
        for reason in found.unjudged:
            console.print(f"  {reason}", markup=False)


def _gate(console: Console, found: Comparison, least: float, doubts: Sequence[str]) -> int:
    for broken in found.broken:  # however noisy it was
        console.print(f"FAILED: {broken}", markup=False)
    if found.broken:
        return 1
    if doubts:
        console.print(f"UNDECIDED: {'; '.join(doubts)}")
        return UNDECIDED
    judged = [line for line in found.lines if line.judged]
    if not judged:
        console.print("FAILED: there is no stable row in both runs that could be judged")
        return 1
    worse = found.under(least)
    for line in worse:
        console.print(
            f"FAILED: {line.where}: {written(line.before)} -> {written(line.after)}, {line.ratio:.2f} of A",
            markup=False,
        )
    if not worse:
        console.print(
            f"passed: none of {len(judged)} figures is under {least:g} of A; {len(found.unjudged)} rows not judged"
        )
    return int(bool(worse))
