"""Runs groups one after the other, between two looks at the machine's noise, and puts the result file together."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Final, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from .harness import Sheet, Size, Skip
from .machine import Others, machine, noise, probe
from .registry import Group
from .schema import SCHEMA, row_problems

INTERRUPTED: Final = "interrupted"

NOT_BEGUN: Final = "the run was interrupted before this began"

NOT_OVER: Final = "the run did not come to its end, and nobody looked at the machine's noise there"

QUICK_SECONDS: Final = 90.0
"""A quick run promises two minutes; none of its groups takes longer than half a minute on two cores."""

LATE: Final = "a quick run has two minutes, and the groups before it took them; --only runs it alone"


class Watch(Protocol):
    """Who is told how far it is."""

    def moved(self, group: Group, sheet: Sheet) -> None: ...

    def over(self, group: Group, entry: dict[str, Any]) -> None: ...


class Quiet:
    """Without a terminal: nothing until the end."""

    def moved(self, group: Group, sheet: Sheet) -> None:
        pass

    def over(self, group: Group, entry: dict[str, Any]) -> None:
        pass


class Bars:
    """A bar for all groups and one for the rows of the group that runs, each with the time left."""

    def __init__(self, progress: Progress, groups: Sequence[Group]) -> None:
        self._progress = progress
        self._all = progress.add_task("all", total=len(groups))
        self._rows = {group.name: progress.add_task(group.title, total=None, visible=False) for group in groups}

    def moved(self, group: Group, sheet: Sheet) -> None:
        known = max(sheet.expected, len(sheet.rows)) or None
        said = f"{group.title}: {sheet.now}" if sheet.now else group.title
        self._progress.update(
            self._rows[group.name], visible=True, total=known, completed=len(sheet.rows), description=said[:60]
        )

    def over(self, group: Group, entry: dict[str, Any]) -> None:
        self._progress.update(self._rows[group.name], visible=False)
        self._progress.advance(self._all)
        self._progress.console.print(f"{group.title}: {_tally(entry)}, {entry['seconds']:.0f} s")


def bars(console: Console, groups: Sequence[Group]) -> AbstractContextManager[Progress | None]:
    """A progress display for the time of the block; None where nobody would see it."""
    if not console.is_terminal:
        return nullcontext(None)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    slow = 3600.0  # a group takes minutes: what is left is told from all of them, not from the last half minute
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, speed_estimate_period=slow)


def _tally(entry: dict[str, Any]) -> str:
    rows = entry["rows"]
    kinds = {
        "skipped": sum("skipped" in row for row in rows),
        "failed": sum("failed" in row for row in rows),
        "unstable": sum("unstable" in row for row in rows),
    }
    measured = len(rows) - kinds["skipped"] - kinds["failed"]
    return ", ".join([f"{measured} measured", *(f"{count} {kind}" for kind, count in kinds.items() if count)])


def measure(
    groups: Sequence[Group],
    size: Size,
    watch: Watch,
    left_out: Mapping[str, str] | None = None,
    keep: Callable[[dict[str, Any]], object] = lambda report: None,
) -> dict[str, Any]:
    """The result file's content. ``left_out``: reasons why a group, by its name, is not run.

    A group that raises becomes a failed row, and the others still run. Ctrl-C ends the run; what was measured is kept.
    ``keep`` is handed what there is after each group, so that a run that is killed leaves that much.
    """
    reasons = dict(left_out or {})
    clock, before = time.monotonic(), probe(size.pick(4, 40, 80))
    entries: dict[str, dict[str, Any]] = {}
    head = {"schema": SCHEMA, "size": size.value, "machine": machine(), "unix_time": int(time.time())}

    def report(noise: dict[str, Any]) -> dict[str, Any]:
        return {**head, "seconds": round(time.monotonic() - clock, 1), "noise": noise, "groups": entries}

    for group in groups:
        late = LATE if size is Size.QUICK and time.monotonic() - clock > QUICK_SECONDS else ""
        entry, interrupted = _one(group, size, partial(watch.moved, group), reasons.get(group.name, late))
        entries[group.name] = entry
        watch.over(group, entry)
        if interrupted:
            reasons = dict.fromkeys((each.name for each in groups), NOT_BEGUN)
        keep(report({**noise(before, before), "too_noisy": [NOT_OVER]}))
    after = probe(size.pick(4, 40, 80))
    return report(noise(before, after, _meanwhile(groups, entries)))


def _meanwhile(groups: Sequence[Group], entries: Mapping[str, dict[str, Any]]) -> dict[str, float]:
    """Cores that something else kept busy, by group; not of peers, some of whose processes nobody waits for."""
    counted = [group for group in groups if group.name in entries and not group.asked]
    return {group.title: entries[group.name]["others_cores"] for group in counted}


def _one(group: Group, size: Size, moved: Callable[[Sheet], None], reason: str) -> tuple[dict[str, Any], bool]:
    """The group's entry, and whether it was interrupted. Skipped for ``reason``, if there is one."""
    sheet, interrupted = Sheet(size, moved), False
    others, began = Others(), time.monotonic()
    try:
        if reason:
            raise Skip(reason)
        group.load()(sheet)
    except Skip as skipped:
        sheet.skip(group.name, str(skipped))
    except Exception as error:  # a benchmark's bug or a broken server: said in the report, and the exit status is 1
        where = traceback.extract_tb(error.__traceback__)[-1]
        told = f"{type(error).__name__}: {error} ({where.filename.rpartition('/')[2]}:{where.lineno})"
        sheet.fail(f"{group.name}, from here on", told)
    except KeyboardInterrupt:
        sheet.fail(f"{group.name}, from here on", INTERRUPTED)
        interrupted = True
    entry = {
        "title": group.title,
        "question": group.question,
        "seconds": round(time.monotonic() - began, 1),
        "others_cores": others.cores(),
        "settings": sheet.notes,
        "rows": [_fit(row) for row in sheet.rows],
    }
    return entry, interrupted


def _fit(row: dict[str, Any]) -> dict[str, Any]:
    """The row, or in its place what is wrong with it: one figure that is none must not cost the others."""
    if wrong := row_problems(row):
        return {"name": row["name"], "failed": f"measured what no result file may hold: {'; '.join(wrong)}"}
    return row
