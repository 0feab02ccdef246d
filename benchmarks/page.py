"""The report as one HTML page: nothing is fetched from anywhere, light and dark, and it prints."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from .machine import short
from .metrics import written
from .plots import MISSING
from .tables import Table, by_reason, cost_of, doubts, figures_of, measured
from .verdict import Statement, verdict

MANY: Final = 14
"""Columns from which on a table is printed smaller."""

LONG: Final = 20
"""Rows above which a table is folded up, pictures and verdict having said what matters."""

READING: Final = """
<p>A measurement is repeated in windows until three in a row agree within 10 %; the figures are those of these windows.
<em>Spread</em> is how far their medians lay apart. What never agreed is marked <em>unstable</em>: all its windows are
in the figure, it decides nothing, and in the pictures its points are hollow and its bars pale. Floor and target are
measured in turn, and a ratio is the median of the rounds' own ratios. Dashed and dotted gray lines are floors and
ceilings, what the machine does with none of our work in it, or a budget. Live streams are played once for some seconds:
their rows have no spread.</p>
"""


def html(report: dict[str, Any], pictures: dict[str, list[str]] | None) -> str:
    """The page. ``pictures`` are SVG elements by group; None where matplotlib is missing."""
    machine = report["machine"]
    parts = [
        f"<h1>gpu-byoc on {escape(short(machine))}</h1>",
        f'<p class="soft">Measured {_day(report)}, commit {escape(machine["commit"])}, {_time(report["seconds"])}</p>',
        _verdict(verdict(report)),
        _doubts([*doubts(report), *([MISSING] if pictures is None else [])]),
        _contents(report),
        *(_group(name, group, (pictures or {}).get(name, [])) for name, group in report["groups"].items()),
        _section("Cost", "What does a row take, besides time?", _table(cost_of(report))),
        _section("Not run here", "By reason, and what that leaves out.", _reasons(by_reason(report, "skipped"))),
        _section("Failed", "What should have run and did not.", _reasons(by_reason(report, "failed"))),
        _section("The machine", "", _facts(report)),
        _section("How to read this", "", READING),
        _section("Run it again", "", f"<pre>{escape(machine['command'])}</pre>"),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>gpu-byoc on {escape(short(machine))}</title><style>{_style()}</style></head>\n"
        f"<body><main>\n{chr(10).join(part for part in parts if part)}\n</main></body></html>\n"
    )


def _style() -> str:
    return Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def _day(report: dict[str, Any]) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(report["unix_time"]))


def _time(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _verdict(statements: Sequence[Statement]) -> str:
    """A card for each answer; what has none is a line below them."""
    cards = "".join(
        f'<li><div class="asked">{escape(each.question)}</div>'
        f'<div class="answer">{"<br>".join(map(escape, each.answer.split("; ")))}</div>'
        f'<p class="why">{escape(each.why)}</p></li>'
        for each in statements
        if each.known
    )
    open_ = _list({each.question: each.answer for each in statements if not each.known})
    return (f'<ul class="verdict">{cards}</ul>' if cards else "") + f'<div class="open">{open_}</div>'


def _doubts(reasons: Sequence[str]) -> str:
    return (
        '<ul class="doubts">' + "".join(f"<li>{escape(reason)}</li>" for reason in reasons) + "</ul>" if reasons else ""
    )


def _contents(report: dict[str, Any]) -> str:
    """Links to the groups that measured something."""
    there = {name: group for name, group in report["groups"].items() if measured(group["rows"])}
    links = "".join(f'<a href="#{escape(name)}">{escape(group["title"])}</a>' for name, group in there.items())
    return f"<nav>{links}</nav>" if len(there) > 1 else ""


def _group(name: str, group: dict[str, Any], pictures: Sequence[str]) -> str:
    drawn = "".join(f"<figure>{picture}</figure>" for picture in pictures)
    busy = f", something else keeping {group['others_cores']:.1f} cores busy" if group["others_cores"] > 0.1 else ""
    content = (
        (f'<div class="pictures">{drawn}</div>' if drawn else "")
        + "".join(map(_table, figures_of(group["rows"])))
        + (_folded("Settings", _list(group["settings"])) if group["settings"] else "")
        + f'<p class="soft">{group["seconds"]:.0f} s{busy}; <code>gpu-byoc bench --only {escape(name)}</code></p>'
    )
    if not measured(group["rows"]):
        return ""  # what was skipped or failed has its own section
    return _section(group["title"], group["question"], content, name)


def _folded(said: str, content: str) -> str:
    return f"<details><summary>{said}</summary>{content}</details>"


def _section(title: str, question: str, content: str, name: str = "") -> str:
    if not content:
        return ""
    asked = f'<p class="question">{escape(question)}</p>' if question else ""
    anchor = f' id="{escape(name)}"' if name else ""
    return f"<section{anchor}><h2>{escape(title)}</h2>{asked}{content}</section>"


def _table(table: Table) -> str:
    if not table.cells:
        return ""
    kinds = [_kind(table, column) for column in range(len(table.heads))]
    head = "".join(f"<th {kind}>{escape(each)}</th>" for each, kind in zip(table.heads, kinds, strict=True))
    body = "".join(
        f"<tr{' class=weak' if weak else ''}>"
        + "".join(f"<td {kind}>{escape(cell)}</td>" for cell, kind in zip(line, kinds, strict=True))
        + "</tr>"
        + (f'<tr class="note"><td colspan="{len(line)}">{_notes(notes)}</td></tr>' if notes else "")
        for line, weak, notes in zip(table.cells, table.weak, table.notes, strict=True)
    )
    many = ' class="many"' if len(table.heads) > MANY else ""
    whole = f'<div class="wide"><table{many}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return _folded(f"{len(table.cells)} rows", whole) if len(table.cells) > LONG else whole


def _notes(notes: Sequence[tuple[str, str]]) -> str:
    return "<br>".join(f"<b>{escape(head)}</b> {escape(text)}" for head, text in notes)


def _kind(table: Table, column: int) -> str:
    if table.numbers[column]:
        return 'class="number"'
    return 'class="word"'


def _reasons(missing: dict[str, list[str]]) -> str:
    lines = "".join(
        f"<tr><td>{escape(reason)}</td><td>{'<br>'.join(map(escape, rows))}</td></tr>"
        for reason, rows in missing.items()
    )
    return f'<div class="wide"><table><tbody>{lines}</tbody></table></div>' if lines else ""


def _facts(report: dict[str, Any]) -> str:
    machine, noise = report["machine"], report["noise"]
    gpus = [f"{each['name']}, driver {each['driver']}, {each['memory_mib']} MiB" for each in machine["gpus"]]
    facts = {
        "CPU": f"{machine['cpu']}, {machine['cores']} cores",
        "Memory": f"{machine['memory_gib']:g} GiB",
        "GPU": "; ".join(gpus) or "none that nvidia-smi lists",
        "System": machine["system"],
        "Python": machine["python"],
        "Versions": ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        "Commit": machine["commit"],
        "Noise": "; ".join(
            _probe(when, noise[key]) for when, key in (("at the start", "before"), ("at the end", "after"))
        )
        + f"; one core {abs(noise['drift']):.0%} {'slower' if noise['drift'] > 0 else 'faster'} at the end",
    }
    return _list(facts)


def _probe(when: str, probe: dict[str, float]) -> str:
    return f"{when}, the slowest twentieth {probe['tail']:+.0%}, others' cores {probe['others_cores']:.2f}"


def _list(values: dict[str, Any]) -> str:
    return "<dl>" + "".join(_pairs(values.items())) + "</dl>"


def _pairs(values: Iterable[tuple[str, Any]]) -> Iterable[str]:
    return (f"<dt>{escape(name)}</dt><dd>{escape(written(value))}</dd>" for name, value in values)
