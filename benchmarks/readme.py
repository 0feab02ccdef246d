"""The README's table and picture, made from a result file that lies in the repository.

What stands between ``<!-- bench: FILE -->`` and ``<!-- bench: end -->`` is replaced; FILE is the result, as a path from
the README's folder, and a test compares what stands there with what comes out here.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any, Final

from gpu_byoc.errors import ConfigError

from . import plots
from .machine import short
from .metrics import metric, written
from .report import pictures
from .tables import Table, as_markdown, doubts, measured
from .verdict import verdict

PLACE: Final = re.compile(r"<!-- bench: (?P<file>\S+\.json) -->\n.*?<!-- bench: end -->", re.S)
PICTURE: Final = "jobs-rate"
COUNTS: Final = (1, 4)
COLUMNS: Final = ("p50_us", "p99_us", "jobs_per_second", "p50_times_echo", "cpu_seconds_per_million_frames")


def block(report: dict[str, Any], file: str, picture: str) -> str:
    """The text, comments included. ``file`` and ``picture`` are paths from the README's folder."""
    machine = report["machine"]
    day = time.strftime("%Y-%m-%d", time.gmtime(report["unix_time"]))
    guide = "[how to read them](benchmarks/README.md)"
    parts = [
        f"<!-- bench: {file} -->",
        f"On {short(machine)}, Python {machine['python']}; {day}, commit {machine['commit']}. Clients, floors "
        f"and servers share the machine. One run of `gpu-byoc bench`: [figures]({file}), {guide}.",
        *(f"> {doubt}" for doubt in doubts(report)),
        "\n".join(f"* **{each.question}** {each.answer}. {each.why}" for each in verdict(report) if each.known),
        _jobs(report),
        f"![Jobs a second over connections]({picture})" if picture else "",
        "<!-- bench: end -->",
    ]
    return "\n\n".join(part for part in parts if part)


def _jobs(report: dict[str, Any]) -> str:
    """A 640x480 frame as a job, at one and at four connections."""
    rows = [
        row for row in measured(report["groups"].get("jobs", {"rows": []})["rows"]) if row.get("connections") in COUNTS
    ]
    if not rows:
        return ""
    shown = [key for key in COLUMNS if any(key in row for row in rows)]
    cells = [
        [row["name"] + (f" (unstable, {row['spread']:.0%})" if "unstable" in row else "")]
        + [written(row.get(key)) for key in shown]
        for row in rows
    ]
    heads = ["a 640x480 RGB frame as a job, 921,600 bytes each way", *(metric(key).head for key in shown)]
    return as_markdown(Table(heads, [False] + [True] * len(shown), cells, [False] * len(cells), [[]] * len(cells)))


def update(readme: Path, report: dict[str, Any], file: Path) -> list[Path]:
    """Write the picture beside ``file`` and the text into ``readme``; what was written.

    Raises:
        ConfigError: the README has no place for it, or matplotlib is missing.
    """
    if not plots.available():
        raise ConfigError(f"{plots.MISSING} Nothing was written")
    text = readme.read_text(encoding="utf-8")
    if not PLACE.search(text):
        raise ConfigError(f"{readme} has no place for it: <!-- bench: {file} --> and, below, <!-- bench: end -->")
    drawn = [plots.png(plot, rows) for _, plot, rows in pictures(report) if plot.name == PICTURE]
    picture = file.with_suffix(".png")
    if drawn:
        picture.write_bytes(drawn[0])
    made = block(report, _from(readme, file), _from(readme, picture) if drawn else "")
    readme.write_text(PLACE.sub(lambda _: made, text), encoding="utf-8")
    return [readme, *([picture] if drawn else [])]


def _from(readme: Path, file: Path) -> str:
    return Path(os.path.relpath(file, readme.parent)).as_posix()
