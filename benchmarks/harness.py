"""How a benchmark measures, and how it hands in what it found.

A group is one function and one line in ``registry.py``::

    def run(sheet: Sheet) -> None:
        sheet.expect(2)                      # rows to come, for the progress bar; more or fewer do no harm
        sheet.settings(slots=32, band=BAND)  # what a reader needs to judge the rows
        measured = stable(lambda: kernel(frame), sheet.size)
        sheet.row("numpy, 640x480", measured, backend="numpy", size="640x480", gb_per_s=2 * SIZE / measured.p50 / 1e9)
        sheet.skip("cupy, 640x480", "cupy is not installed: pip install '.[cupy]'")

A row is flat: strings and whole numbers that say what was measured, and figures whose names are in ``metrics.py``.
Names are unique within a group, and stay: ``compare`` pairs rows by them. Work that runs on a device has to wait for
the device before it returns. Inputs are random, outputs are checked outside the timed part: ``sheet.fail`` says which
were wrong.

Windows are repeated until three in a row agree within a band, as NVIDIA's perf_analyzer does; their number is bounded,
and what never agrees is marked unstable.
"""

from __future__ import annotations

import enum
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

T = TypeVar("T")

AGREE: Final = 3
"""Windows in a row that have to agree; perf_analyzer's number."""

BAND: Final = 0.10
"""How far apart their medians may be, as a part of the largest; perf_analyzer's default stability percentage."""


class Size(enum.Enum):
    """How much is measured: ``FULL`` for figures to keep, ``QUICK`` for a look, ``TINY`` to see that it runs."""

    TINY = "tiny"
    QUICK = "quick"
    FULL = "full"

    @property
    def window(self) -> float:
        """Seconds of a window of calls."""
        return {Size.TINY: 0.001, Size.QUICK: 0.02, Size.FULL: 0.15}[self]

    @property
    def most(self) -> int:
        """Windows after which a measurement counts as unstable."""
        return {Size.TINY: 3, Size.QUICK: 6, Size.FULL: 20}[self]

    def pick(self, tiny: T, quick: T, full: T) -> T:
        return {Size.TINY: tiny, Size.QUICK: quick, Size.FULL: full}[self]


def percentile(values: Sequence[float], q: float) -> float:
    """The ``q``-quantile (0..1) of ``values`` by the nearest-rank rule."""
    if not values:
        raise ValueError("no values, no percentile")
    return sorted(values)[max(0, math.ceil(q * len(values) - 1e-9) - 1)]


def spread(medians: Sequence[float]) -> float:
    """How far apart the figures are, as a part of the largest: 0 where they are equal, never above 1."""
    return (max(medians) - min(medians)) / (max(medians) or 1)


def agreed(medians: Sequence[float], band: float = BAND) -> int | None:
    """Where the first three windows in a row begin that agree within ``band``; None where none do."""
    for first in range(len(medians) - AGREE + 1):
        if spread(medians[first : first + AGREE]) <= band:
            return first
    return None


@dataclass(frozen=True, slots=True)
class Window:
    """One window: seconds of each operation, and the seconds of wall clock and of CPU that all of them took.

    ``refused`` operations were turned away for want of room, and are in none of the others. ``tally`` is what else its
    maker knows of it.
    """

    seconds: tuple[float, ...]
    wall: float
    cpu: float
    refused: int = 0
    tally: Any = None

    @property
    def median(self) -> float:
        return percentile(self.seconds, 0.5)

    @property
    def rate(self) -> float:
        """Operations a second."""
        return len(self.seconds) / self.wall


@dataclass(frozen=True, slots=True)
class Stable:
    """What a measurement came to: the windows that agreed or, where none did, all of them and ``stable`` False."""

    windows: tuple[Window, ...]
    """Those that count."""
    rounds: tuple[float, ...]
    """The medians of all windows, in the order they were taken."""
    stable: bool

    @property
    def p50(self) -> float:
        """Seconds."""
        return self.quantile(0.5)

    @property
    def p99(self) -> float:
        return self.quantile(0.99)

    def quantile(self, q: float) -> float:
        return percentile([each for window in self.windows for each in window.seconds], q)

    @property
    def operations(self) -> int:
        return sum(len(window.seconds) for window in self.windows)

    @property
    def refused(self) -> int:
        return sum(window.refused for window in self.windows)

    @property
    def rate(self) -> float:
        """Operations a second over all windows."""
        return self.operations / sum(window.wall for window in self.windows)

    @property
    def cpu(self) -> float:
        """CPU seconds an operation."""
        return sum(window.cpu for window in self.windows) / self.operations

    @property
    def spread(self) -> float:
        """Of the medians of the windows that count."""
        return spread([window.median for window in self.windows])

    def ratio(self, floor: Stable) -> float:
        """How many times as long as ``floor``: the median over the rounds in which both were measured in turn."""
        pairs = zip(self.rounds, floor.rounds, strict=False)
        return statistics.median([ours / theirs for ours, theirs in pairs])

    def figures(self, frames: int = 1) -> dict[str, Any]:
        """Columns of a row, ``frames`` being those of one operation."""
        return {
            "p50_us": self.p50 * 1e6,
            "p99_us": self.p99 * 1e6,
            "cpu_seconds_per_million_frames": self.cpu / frames * 1e6,
            **marks(self),
        }


def marks(*measured: Stable) -> dict[str, Any]:
    """What a row says about how far to believe it, when its figures come from all of these."""
    sure = all(each.stable for each in measured)
    return {
        "spread": max(each.spread for each in measured),
        "windows": max(len(each.rounds) for each in measured),
        **({} if sure else {"unstable": True}),
    }


def calls(
    work: Callable[[], object], seconds: float, cpu: Callable[[], float] = time.process_time
) -> Callable[[], Window]:
    """Windows in which ``work`` is called again and again for about ``seconds``, each call timed; three at least."""

    def window() -> Window:
        times: list[float] = []
        used, began = cpu(), time.perf_counter()
        now = began
        while now - began < seconds or len(times) < 3:
            work()
            after = time.perf_counter()
            times.append(after - now)
            now = after
        return Window(tuple(times), now - began, cpu() - used)

    return window


def together(
    windows: Mapping[str, Callable[[], Window]], size: Size = Size.FULL, *, band: float = BAND, most: int | None = None
) -> dict[str, Stable]:
    """One window of each in turn, round after round, until each has agreed: a slow moment then hits all of them.

    The first round warms up and does not count. ``most`` rounds at the most.
    """
    taken: dict[str, list[Window]] = {name: [] for name in windows}
    for window in windows.values():
        window()
    for _ in range(max(AGREE, most or size.most)):
        for name, window in windows.items():
            taken[name].append(window())
        if all(agreed([each.median for each in those], band) is not None for those in taken.values()):
            break
    return {name: _verdict(those, band) for name, those in taken.items()}


def _verdict(taken: Sequence[Window], band: float) -> Stable:
    rounds = tuple(each.median for each in taken)
    first = agreed(rounds, band)
    if first is None:
        return Stable(tuple(taken), rounds, stable=False)
    return Stable(tuple(taken[first : first + AGREE]), rounds, stable=True)


def settle(
    window: Callable[[], Window], size: Size = Size.FULL, *, band: float = BAND, most: int | None = None
) -> Stable:
    """``together`` with one: for work that makes its own windows, such as a load on a server."""
    return together({"": window}, size, band=band, most=most)[""]


def stable(
    work: Callable[[], object],
    size: Size = Size.FULL,
    *,
    seconds: float | None = None,
    band: float = BAND,
    cpu: Callable[[], float] = time.process_time,
) -> Stable:
    """Seconds of one call of ``work``, from windows of about ``seconds`` each."""
    return settle(calls(work, seconds or size.window, cpu), size, band=band)


class Skip(Exception):
    """Raised by a group that this machine cannot run at all; the text is the reason and what to do about it."""


class Sheet:
    """What a group writes its rows on. ``moved`` is told of each row, for the progress bar."""

    def __init__(self, size: Size, moved: Callable[[Sheet], None] = lambda sheet: None) -> None:
        self.size = size
        self.rows: list[dict[str, Any]] = []
        self.notes: dict[str, Any] = {}
        self.expected = 0
        self.now = ""
        """What is being measured."""
        self._moved = moved

    def expect(self, rows: int) -> None:
        """``rows`` in all; said again when more turn up."""
        self.expected = rows
        self._moved(self)

    def doing(self, name: str) -> None:
        """For the progress bar: what is measured from now on."""
        self.now = name
        self._moved(self)

    def settings(self, **values: Any) -> None:
        """How the sides were set up; they are printed with the group."""
        self.notes.update(values)

    def row(self, name: str, measured: Stable | None = None, *, frames: int = 1, **values: Any) -> None:
        """A row that was measured. ``values`` win over what ``measured`` says; those that are None are left out."""
        figures = measured.figures(frames) if measured else {}
        self._add(name, {key: value for key, value in {**values, **figures, **values}.items() if value is not None})

    def skip(self, name: str, reason: str) -> None:
        """A row that this machine cannot run."""
        self._add(name, {"skipped": reason})

    def fail(self, name: str, reason: str) -> None:
        """A row that should have run and did not, or gave wrong output; the run ends with status 1."""
        self._add(name, {"failed": reason})

    def _add(self, name: str, values: dict[str, Any]) -> None:
        if any(row["name"] == name for row in self.rows):
            raise ValueError(f"a second row {name!r}: compare pairs rows by their names")
        self.rows.append({"name": name, **values})
        self._moved(self)
