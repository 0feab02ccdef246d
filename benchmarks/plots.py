"""The pictures, drawn with matplotlib: PNG files on white, and SVG whose colors are the page's own.

matplotlib is an extra (``pip install 'gpu-byoc[bench]'``); without it there are no pictures, and the report says so.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import cycle
from typing import Any, Final

from .metrics import metric, written
from .registry import Plot

Row = dict[str, Any]

LABEL, LINE = 24, 12
"""Letters of a line's name from which on it is broken, for room that the name takes is the picture's; its line's
height in points."""

MISSING: Final = "No pictures: matplotlib is not installed (pip install 'gpu-byoc[bench]')."


@dataclass(frozen=True, slots=True)
class Colors:
    """``ink`` for words, ``faint`` for the grid, ``limit`` for floors and ceilings, ``series`` for the rest."""

    ink: str
    faint: str
    limit: str
    series: tuple[str, ...]


# Okabe and Ito's colors, told apart by the color-blind, too; the page has lighter ones for a dark background.
LIGHT: Final = Colors(
    "#1d2329", "#d9dee3", "#6a737d", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9")
)
# Stand-ins that the page's CSS variables replace.
_SIGNS: Final = Colors("#010101", "#020202", "#030303", tuple(f"#04040{n}" for n in range(1, 7)))
_VARIABLES: Final = {
    _SIGNS.ink: "--ink",
    _SIGNS.faint: "--faint",
    _SIGNS.limit: "--limit",
    **{sign: f"--series-{number}" for number, sign in enumerate(_SIGNS.series, 1)},
}

_STYLE: Final = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "svg.fonttype": "none",  # words stay words: they can be found, copied and read out
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "figure.dpi": 100,
}


def available() -> bool:
    return find_spec("matplotlib") is not None


def wanted(plot: Plot, rows: Sequence[Row]) -> list[Row]:
    """The rows that a plot shows."""
    return [
        row
        for row in rows
        if plot.y in row and plot.x in row and all(row.get(key) == value for key, value in plot.where.items())
    ]


def _readable(plot: Plot, rows: Sequence[Row]) -> tuple[Plot, Sequence[Row]]:
    """Milliseconds where microseconds would have too many digits."""
    if not plot.y.endswith("_us") or max(row[plot.y] for row in rows) < 2000:
        return plot, rows
    keys = [key for key in (plot.y, plot.limit) if isinstance(key, str) and key.endswith("_us")]
    names = {key: key.removesuffix("us") + "ms" for key in keys}
    scaled = [{**row, **{names[key]: row[key] / 1e3 for key in keys if key in row}} for row in rows]
    limit = names.get(plot.limit, plot.limit) if isinstance(plot.limit, str) else plot.limit
    return replace(plot, y=names[plot.y], limit=limit), scaled


def png(plot: Plot, rows: Sequence[Row]) -> bytes:
    out = io.BytesIO()
    _drawn(plot, rows, LIGHT, f"gpu-byoc-{plot.name}", out, "png")
    return out.getvalue()


def svg(plot: Plot, rows: Sequence[Row]) -> str:
    """An ``<svg>`` element for a page that defines the colors as CSS variables."""
    out = io.BytesIO()
    _drawn(plot, rows, _SIGNS, f"gpu-byoc-{plot.name}", out, "svg")
    text = out.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\s(xmlns:\w+|xmlns|width|height)="[^"]*"', "", text.split(">", 1)[0]) + ">" + text.split(">", 1)[1]
    for sign, variable in _VARIABLES.items():
        text = text.replace(sign, f"var({variable})")
    return text.replace("xlink:href", "href").replace("<svg", f'<svg role="img" aria-label="{plot.title}"', 1)


def _drawn(plot: Plot, rows: Sequence[Row], colors: Colors, salt: str, out: io.BytesIO, kind: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    plot, rows = _readable(plot, rows)
    numeric = all(isinstance(row[plot.x], int | float) for row in rows)
    with plt.rc_context({**_STYLE, "svg.hashsalt": salt}):
        height = 3.6 if numeric else 1.1 + 0.34 * len(rows)
        figure, axes = plt.subplots(figsize=(7.2, height), layout="constrained")
        try:
            (_lines if numeric else _bars)(axes, plot, rows, colors)
            _dress(axes, plot, colors, numeric)
            background = "white" if kind == "png" else "none"
            figure.savefig(
                out, format=kind, facecolor=background, dpi=160, metadata={"Date": None} if kind == "svg" else None
            )
        finally:
            plt.close(figure)


def _lines(axes: Any, plot: Plot, rows: Sequence[Row], colors: Colors) -> None:
    """A line for each value of ``series``, named at its right end. Unstable points are hollow."""
    ends = []
    palette = cycle(colors.series)
    for name, those in _series(plot, rows).items():
        points = sorted((row[plot.x], row[plot.y], bool(row.get("unstable"))) for row in those)
        xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
        floor = name in plot.floor
        color = colors.limit if floor else next(palette)
        axes.plot(xs, ys, color=color, linewidth=1.6 if floor else 2, linestyle=(0, (5, 3)) if floor else "-", zorder=3)
        for x, y, weak in points:
            face = {"facecolor": "none"} if weak else {"facecolor": color}
            axes.scatter([x], [y], s=22, edgecolor=color, linewidth=1.4, zorder=4, **face)
        ends.append((ys[-1], xs[-1], name + (" (floor)" if floor else ""), color))
    for name, limits in _limits(plot, rows).items():
        axes.plot(*zip(*limits, strict=True), color=colors.limit, linewidth=1.4, linestyle=(0, (2, 2)), zorder=2)
        ends.append((limits[-1][1], limits[-1][0], name, colors.limit))
    if isinstance(plot.limit, float):
        axes.axhline(plot.limit, color=colors.limit, linewidth=1.4, linestyle=(0, (2, 2)), zorder=2)
    ticks = sorted({row[plot.x] for row in rows})
    if len(ticks) > 1 and ticks[0] > 0 and ticks[-1] / ticks[0] >= 8:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [written(tick) for tick in ticks], minor=False)
    if plot.log:
        axes.set_yscale("log")
        _decades(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_xlabel(metric(plot.x).head, color=colors.ink)
    _name_ends(axes, ends)


def _decades(axis: Any) -> None:
    """1, 2, 5, 10, ... in plain figures."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:,g}")


def _series(plot: Plot, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by the words of the plot's series."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(", ".join(str(row.get(key, "")) for key in plot.series), []).append(row)
    return found


def _limits(plot: Plot, rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """What the rows hold as their limit, by series; once and without a series' name where it is one for all."""
    if not isinstance(plot.limit, str) or not plot.limit:
        return {}
    word, key = _limit_name(plot.limit), plot.limit
    if len({row[key] for row in rows if key in row}) == 1:
        shared = [row for row in rows if key in row]
        return {word: sorted((row[plot.x], row[key]) for row in shared)}
    found = {
        f"{name} {word}".strip(): sorted((row[plot.x], row[key]) for row in those if key in row)
        for name, those in _series(plot, rows).items()
    }
    return {name: limits for name, limits in found.items() if limits}


def _limit_name(key: str) -> str:
    return next(word for word in ("ceiling", "budget", "floor", "limit") if word in key or word == "limit")


def _name_ends(axes: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Names beside the lines' ends, long ones on two lines, moved apart where they would lie on one another."""
    axes.figure.canvas.draw()
    points = 72 / axes.figure.dpi
    for x in {x for _, x, _, _ in ends}:
        named = [(y, textwrap.fill(name, LABEL), color) for y, at, name, color in sorted(ends) if at == x]
        wanted = [float(axes.transData.transform((x, y))[1]) * points for y, _, _ in named]
        heights = [LINE * (1 + text.count("\n")) for _, text, _ in named]
        put = _apart(wanted, heights, axes.bbox.y1 * points)
        for (y, text, color), at, to in zip(named, wanted, put, strict=True):
            axes.annotate(
                text,
                (x, y),
                xytext=(9, to - at),
                textcoords="offset points",
                color=color,
                va="center",
                annotation_clip=False,
            )


def _apart(wanted: Sequence[float], heights: Sequence[float], top: float) -> list[float]:
    """Where the middles of labels go that want to be at ``wanted``, lowest first: none on another, and none above
    ``top`` unless what lies below it is full."""
    put: list[float] = []
    for at, height in zip(wanted, heights, strict=True):
        below = put[-1] + (heights[len(put) - 1] + height) / 2 if put else at
        put.append(max(at, below))
    limit = top
    for number in reversed(range(len(put))):
        put[number] = min(put[number], limit - heights[number] / 2)
        limit = put[number] - heights[number] / 2
    return put


def _bars(axes: Any, plot: Plot, rows: Sequence[Row], colors: Colors) -> None:
    """A bar for each row, its figure beside it; a floor is a dashed line through all, a row's own limit a dotted one
    across its bar. Unstable ones are pale."""
    names = [str(row[plot.x]) for row in rows]
    series = plot.series if plot.x != "name" else ()  # a row's name says all of it
    labels = [", ".join([name, *(str(row[key]) for key in series)]) for name, row in zip(names, rows, strict=True)]
    chosen = {
        id(row): color for color, those in zip(cycle(colors.series), _series(plot, rows).values()) for row in those
    }
    for at, row in enumerate(rows):
        floor = names[at] in plot.floor
        color = colors.limit if floor else chosen[id(row)]
        axes.barh(at, row[plot.y], color=color, height=0.66, alpha=0.45 if row.get("unstable") else 1, zorder=3)
        said = written(float(row[plot.y])) + (" unstable" if row.get("unstable") else "")
        axes.annotate(said, (row[plot.y], at), xytext=(4, 0), textcoords="offset points", va="center", color=colors.ink)
        if isinstance(plot.limit, str) and plot.limit in row:
            style = (0, (1, 1))
            axes.vlines(row[plot.limit], at - 0.42, at + 0.42, color=colors.limit, lw=1.8, ls=style, zorder=4)
        if floor:
            axes.axvline(row[plot.y], color=colors.limit, linewidth=1.2, linestyle=(0, (5, 3)), zorder=2)
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.margins(x=0.14)


def _dress(axes: Any, plot: Plot, colors: Colors, numeric: bool) -> None:
    known = metric(plot.y)
    better = f", {known.better} is better" if known.better else ""
    axes.set_title(plot.title, color=colors.ink)
    scale = ", log scale" if plot.log and numeric else ""
    (axes.set_ylabel if numeric else axes.set_xlabel)(known.head + better + scale, color=colors.ink)
    axes.set_facecolor("none")
    axes.tick_params(colors=colors.ink, which="both")
    axes.grid(axis="y" if numeric else "x", color=colors.faint, linewidth=0.8)
    for spine in axes.spines.values():
        spine.set_color(colors.faint)
