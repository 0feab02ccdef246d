"""What is made of a result file: on the terminal, as Markdown, as pictures, as a page."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from gpu_byoc.errors import ConfigError

from . import page, plots, tables
from .machine import short
from .registry import Plot, group
from .schema import load
from .verdict import verdict


def slug(machine: dict[str, Any]) -> str:
    """A file name for a machine: ``intel-xeon-2-cores``, ``amd-epyc-7763-16-cores-nvidia-h100-80gb-hbm3``."""
    cpu = re.sub(r"\((R|TM)\)|CPU|Processor|\d+-Core|@.*", " ", machine["cpu"], flags=re.I)
    words = " ".join([cpu, f"{machine['cores']} cores", *(each["name"] for each in machine["gpus"])])
    return "-".join(re.findall(r"[a-z0-9.]+", words.lower()))


def check(output: Path) -> None:
    """Make the folder that ``write`` needs; before a run of many minutes, not after it.

    Raises:
        ConfigError: it cannot be written to.
    """
    folder = output.parent if output.suffix == ".json" else output
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror}: {error.filename}") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--output {output}: {folder.resolve()} cannot be written to")


def save(report: dict[str, Any], output: Path) -> Path:
    """The result alone, into the folder ``output`` or the file where that ends in ``.json``: all of it, or the file
    stays as it was."""
    check(output)
    data = output if output.suffix == ".json" else output / f"{slug(report['machine'])}.json"
    half = data.with_name(f"{data.name}.part")
    half.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return half.replace(data)


def write(report: dict[str, Any], output: Path) -> list[Path]:
    """Everything into the folder ``output``, or the result alone where that ends in ``.json``. The files written."""
    data = save(report, output)
    return [data] if data == output else [data, *render(report, output, data.stem)]


def render(report: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Pictures, Markdown and page of a result."""
    files: list[Path] = []
    named: dict[str, list[str]] = {}
    drawn: dict[str, list[str]] = {}
    if plots.available():
        for name, plot, rows in pictures(report):
            picture = folder / f"{stem}-{plot.name}.png"
            picture.write_bytes(plots.png(plot, rows))
            files.append(picture)
            named.setdefault(name, []).append(picture.name)
            drawn.setdefault(name, []).append(plots.svg(plot, rows))
    table, whole = folder / f"{stem}.md", folder / f"{stem}.html"
    table.write_text(tables.markdown(report, named), encoding="utf-8")
    whole.write_text(page.html(report, drawn if plots.available() else None), encoding="utf-8")
    return [*files, table, whole]


def pictures(report: dict[str, Any]) -> Iterator[tuple[str, Plot, list[dict[str, Any]]]]:
    """(group, plot, rows) of every picture that has at least two rows to show."""
    for name, entry in report["groups"].items():
        known = group(name)
        for plot in known.plots if known else ():
            rows = plots.wanted(plot, tables.measured(entry["rows"]))
            if len(rows) > 1:
                yield name, plot, rows


def show(console: Console, report: dict[str, Any]) -> None:
    """The tables and the verdict, for a terminal."""
    for entry in report["groups"].values():
        heading = f"{entry['title']}: {entry['question']}"
        for table in tables.figures_of(entry["rows"]):
            if heading:
                console.print(heading, style="bold", markup=False)
            console.print(_grid(table))
            for note in tables.noted(table):
                console.print(f"  {note}\n", markup=False)
            heading = ""
    for title, mark in (("not run", "skipped"), ("FAILED", "failed")):
        for reason, rows in tables.by_reason(report, mark).items():
            console.print(f"{title}: {reason}", markup=False)
            console.print(*(f"  {row}" for row in rows), sep="\n", markup=False)
    console.print(f"\n{short(report['machine'])}, {report['seconds']:.0f} s", markup=False)
    for statement in verdict(report):
        console.print(f"  {statement.question} {statement.answer}", markup=False)
    for doubt in tables.doubts(report):
        console.print(f"  ! {doubt}", markup=False)


def _grid(table: tables.Table) -> RichTable:
    """Figures are never broken; heads are, at their spaces, and the words of the rows where the terminal is narrow."""
    grid = RichTable(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    lines = [[cell.replace(" unstable", "\nunstable") for cell in line] for line in table.cells]
    for at, (head, number) in enumerate(zip(table.heads, table.numbers, strict=True)):
        if number:
            room = max(len(word) for line in [head, *(line[at] for line in lines)] for word in line.split())
            grid.add_column("\n".join(textwrap.wrap(head, room)), justify="right", no_wrap=True)
        else:
            grid.add_column(head, overflow="fold")
    for cells, weak in zip(lines, table.weak, strict=True):
        grid.add_row(*cells, style="dim" if weak else "")
    return grid


def main(argv: Sequence[str] | None = None) -> int:
    """``gpu-byoc bench report FILE``: the same again from a result that was kept. Raises ConfigError."""
    parser = argparse.ArgumentParser(
        prog="gpu-byoc bench report", allow_abbrev=False, description="Tables, pictures and page of a result."
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--output", type=Path, default=Path("bench-out"), help="folder (default: %(default)s)")
    parser.add_argument("--readme", type=Path, help="instead: this README's table, and its picture beside FILE")
    given = parser.parse_args(argv)
    report = load(given.file)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    if given.readme:
        from .readme import update  # which needs this module

        made = update(given.readme, report, given.file)
    else:
        check(given.output)
        made = render(report, given.output, given.file.stem)
    for path in made:
        console.print(f"written: {path}", soft_wrap=True)
    return 0
