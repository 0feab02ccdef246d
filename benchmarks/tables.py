"""A group's rows as a table: which columns, in which order, what a cell says. Markdown of the whole report."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from .machine import short
from .metrics import COST, COUNTS, FILE_ONLY, MARKS, TROUBLE, metric, written
from .verdict import Statement, verdict

Row = dict[str, Any]

LONG: Final = 24
"""Letters from which on a word is no cell of a table but a line below it."""

FEW_US, MANY_US = 100, 10_000
"""A column of microseconds is in milliseconds where none is below the one and some are above the other."""

NOISY: Final = "This machine was too noisy to decide anything"


@dataclass(frozen=True, slots=True)
class Table:
    """``heads`` and ``cells`` are text; ``numbers`` says which columns are figures. ``weak`` rows are unstable.
    ``notes`` are what a row says that is too long for a cell: ``(head, text)`` for each."""

    heads: list[str]
    numbers: list[bool]
    cells: list[list[str]]
    weak: list[bool]
    notes: list[list[tuple[str, str]]]


def measured(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if "skipped" not in row and "failed" not in row]


def left_out(report: dict[str, Any], mark: str) -> list[tuple[str, str, str]]:
    """(group, row, reason) of every row that was ``skipped`` or ``failed``."""
    groups = report["groups"].values()
    return [(group["title"], row["name"], row[mark]) for group in groups for row in group["rows"] if mark in row]


def by_reason(report: dict[str, Any], mark: str) -> dict[str, list[str]]:
    """``Group: row`` of the same, by the reason: what one machine lacks keeps many rows from running."""
    found: dict[str, list[str]] = {}
    for group, row, reason in left_out(report, mark):
        found.setdefault(reason, []).append(f"{group}: {row}")
    return found


def figures_of(rows: Sequence[Row]) -> list[Table]:
    """The group's own tables: rows that share fewer than half of their columns stand in different ones.

    Words and counts that most rows' names say anyway, words that are the same in all rows, and what ``metrics`` keeps
    out have no column.
    """
    kinds: list[list[Row]] = []
    for row in measured(rows):
        kind = next((each for each in kinds if _alike(each[0], row)), None)
        if kind is None:
            kinds.append([row])
        else:
            kind.append(row)
    return [_figures(kind) for kind in kinds]


def _told(row: Row) -> set[str]:
    return {key for key in row if key not in MARKS and key not in COST}


def _alike(one: Row, other: Row) -> bool:
    a, b = _told(one), _told(other)
    return 2 * len(a & b) >= len(a | b)


def _figures(shown: Sequence[Row]) -> Table:
    keys = dict.fromkeys(key for row in shown for key in row if key in _told(row) and key not in FILE_ONLY)
    told = [key for key in keys if not _in_names(shown, key) and not _no_trouble(shown, key)]
    shown, told = _in_milliseconds(shown, told)
    return _table(shown, told, spreads=any("spread" in row for row in shown))


def _in_milliseconds(rows: Sequence[Row], keys: Sequence[str]) -> tuple[list[Row], list[str]]:
    """Columns of microseconds that have many digits, as milliseconds."""
    new = {}
    for key in (each for each in keys if each.endswith("_us")):
        there = [row[key] for row in rows if key in row]
        if min(there) >= FEW_US and max(there) >= MANY_US:
            new[key] = key.removesuffix("us") + "ms"
    scaled = [{new.get(key, key): value / 1e3 if key in new else value for key, value in row.items()} for row in rows]
    return scaled, [new.get(key, key) for key in keys]


def _in_names(rows: Sequence[Row], key: str) -> bool:
    if len(rows) > 1 and isinstance(rows[0].get(key), str) and len({row.get(key) for row in rows}) == 1:
        return True  # the same in all of them
    there = [row for row in rows if isinstance(row.get(key), str) or (key in COUNTS and key in row)]
    return 2 * sum(bool(re.search(rf"\b{re.escape(str(row[key]))}\b", row["name"])) for row in there) >= len(there) > 0


def _no_trouble(rows: Sequence[Row], key: str) -> bool:
    return key in TROUBLE and not any(row.get(key) for row in rows)


def cost_of(report: dict[str, Any]) -> Table:
    """CPU and compute seconds per million frames, start and memory, of each row that has one of them."""
    rows = [
        {**row, "name": f"{group['title']}: {row['name']}"}
        for group in report["groups"].values()
        for row in measured(group["rows"])
        if any(key in row for key in COST)
    ]
    return _table(rows, [key for key in COST if any(key in row for row in rows)], spreads=False)


def _table(rows: Sequence[Row], keys: Sequence[str], *, spreads: bool) -> Table:
    long = [key for key in keys if any(isinstance(row.get(key), str) and len(row[key]) > LONG for row in rows)]
    notes = [[(metric(key).head, str(row[key])) for key in long if row.get(key)] for row in rows]
    keys = [key for key in keys if key not in long]
    heads = ["", *(metric(key).head for key in keys), *(["spread"] if spreads else [])]
    cells = [[row["name"], *(_cell(row, key) for key in keys), *([_spread(row)] if spreads else [])] for row in rows]
    numbers = [
        False,
        *(all(not isinstance(row.get(key), str) for row in rows) for key in keys),
        *([True] if spreads else []),
    ]
    return Table(heads, numbers, cells, [bool(row.get("unstable")) for row in rows], notes)


def _cell(row: Row, key: str) -> str:
    value = row.get(key)
    counts = isinstance(value, float) and key.endswith("_per_million_frames")
    return f"{value:,.0f}" if counts and abs(value) >= 10 else written(value)  # type: ignore[arg-type]


def _spread(row: Row) -> str:
    if "spread" not in row:
        return ""
    return f"{row['spread']:.0%}" + (" unstable" if row.get("unstable") else "")


def doubts(report: dict[str, Any]) -> list[str]:
    """Why the figures should be believed less than they look; the reader gets this before any figure."""
    found = []
    if reasons := report["noise"]["too_noisy"]:
        found.append(f"{NOISY}: {'; '.join(reasons)}. Run it again when nothing else runs.")
    if report["size"] != "full":
        found.append(f"This was a {report['size']} run, with few and short windows: a look, not figures to keep.")
    rows = [row for group in report["groups"].values() for row in measured(group["rows"])]
    if weak := sum("unstable" in row for row in rows):
        found.append(f"{weak} of {len(rows)} rows never settled; they are marked unstable, with how far they moved.")
    if failed := left_out(report, "failed"):
        found.append(f"{len(failed)} failed: " + "; ".join(f"{group}: {name}" for group, name, _ in failed) + ".")
    return found


def markdown(report: dict[str, Any], pictures: dict[str, list[str]]) -> str:
    """``pictures`` maps a group to the names of its PNG files."""
    machine = report["machine"]
    day = time.strftime("%Y-%m-%d", time.gmtime(report["unix_time"]))
    parts = [f"# gpu-byoc on {short(machine)}", f"{day}, commit {machine['commit']}: `{machine['command']}`"]
    parts += [f"> {doubt}" for doubt in doubts(report)]
    parts += ["## In short", _statements(verdict(report))]
    for name, group in report["groups"].items():
        parts += [f"## {group['title']}", group["question"]]
        parts += [f"![{name}]({picture})" for picture in pictures.get(name, [])]
        parts += [as_markdown(table) for table in figures_of(group["rows"])]
        parts += [_settings(group["settings"])] if group["settings"] else []
    if (costs := cost_of(report)).cells:
        parts += ["## Cost", as_markdown(costs)]
    for title, mark in (("Not run", "skipped"), ("Failed", "failed")):
        if missing := by_reason(report, mark):
            parts += [f"## {title}", "\n".join(f"* {reason}: {'; '.join(rows)}" for reason, rows in missing.items())]
    return "\n\n".join(part for part in parts if part) + "\n"


def noted(table: Table) -> list[str]:
    """The notes, a line for each row that has some."""
    told = zip(table.cells, table.notes, strict=True)
    return [f"{line[0]}: {'; '.join(f'{head}: {text}' for head, text in notes)}" for line, notes in told if notes]


def as_markdown(table: Table) -> str:
    lines = [table.heads, ["---:" if number else "---" for number in table.numbers], *table.cells]
    grid = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return "\n\n".join([grid, *(f"* {note}" for note in noted(table))])


def _statements(statements: Sequence[Statement]) -> str:
    return "\n".join(f"* **{each.question}** {each.answer} {each.why}".rstrip() for each in statements)


def _settings(settings: dict[str, Any]) -> str:
    return "\n".join(f"* {name}: {written(value)}" for name, value in settings.items())
