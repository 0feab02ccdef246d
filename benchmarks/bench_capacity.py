"""How many live streams fit: N at p95 <= X ms, in real time, with no frame missed.

The number is searched for: one stream first, then as many as its CPU lets one expect, then by halves. Latency is taken
by PTS, from right before a picture's bytes are handed over until the output's picture is here, as in ``bench_live``; a
trial passes when 95 pictures in 100 of each of its streams are within the budget. Which resource binds is told from the
failed trial with the fewest streams (``binding``). Last comes the peak, as many streams as fast as they come out. The
publishers, the viewers and the trickle server share the cores.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gpu_byoc.local import streamclip
from gpu_byoc.local.streamclient import Plan

from .bench_live import ROUNDS, make_clip
from .bench_media import SIZES, material, to_rgb_floor, to_yuv_floor
from .binding import Evidence, binding
from .harness import Sheet, Size
from .live_trial import House, Trial, house, in_words, trial
from .machine import backends

BUDGET_MS: Final = 100.0
"""ITU-T G.114 holds that up to 150 ms one way most conversations are not disturbed; this leaves a third of it for the
network. It is two and a half frame intervals at 25 frames a second."""

MOST: Final = 64
SETTLE: Final = 0.9
"""Of the cores that one stream lets one expect to be enough: where the search goes after the first trial."""


class Search:
    """The largest number that passes. Told of each trial, it says what to try next: None when it is found."""

    def __init__(self, most: int) -> None:
        self.best = 0
        self.failed: int | None = None
        self._most = most

    def told(self, streams: int, passed: bool) -> None:
        if passed:
            self.best = max(self.best, streams)
        elif self.failed is None or streams < self.failed:
            self.failed = streams

    def next(self, guess: int) -> int | None:
        """``guess`` where it is still open; else the middle, or half as many again while nothing has failed."""
        top = self._most if self.failed is None else self.failed - 1
        if self.best >= top:
            return None
        if self.best < guess <= top and self.best <= 1:
            return guess
        return min(top, max(self.best + 1, self.best * 3 // 2 if self.failed is None else (self.best + top + 1) // 2))


@dataclass(frozen=True, slots=True)
class Copies:
    """CPU seconds that converting one picture takes: into RGB, and back."""

    there: float
    back: float


def copies(width: int, height: int, count: int) -> Copies:
    """The floor of ``bench_media``: the conversion alone, its converter used again."""
    pictures = material(width, height, count)
    times = []
    for work in (to_rgb_floor, to_yuv_floor):
        work(pictures)  # once for the caches
        began = time.process_time()
        work(pictures)
        times.append((time.process_time() - began) / len(pictures.frames))
    return Copies(*times)


def evidence(home: House, seen: Trial, each: Copies) -> Evidence | None:
    if seen.spent is None:
        return None
    cores = len(os.sched_getaffinity(0))
    compute, moved = seen.device
    return Evidence(cores, seen.spent, seen.rate * each.there, seen.rate * each.back, home.on_gpu, compute, moved)


def run(sheet: Sheet, budget_ms: float = BUDGET_MS) -> None:
    sizes = sheet.size.pick(SIZES[:1], SIZES[:1], SIZES)
    trials = sheet.size.pick(2, 3, 8)
    found = backends()
    sheet.expect(sum(len(sizes) * (trials + 2) if not reason else 1 for reason in found.values()))
    sheet.settings(
        budget=f"{budget_ms:g} ms: 95 pictures in 100 of every stream, and no frame missed (dropped or lost)",
        trials=f"{trials} at the most, a failed one twice in full runs; {_seconds(sheet.size):g} s of real video each, "
        "25 frames/s, streams begin over 2 s",
        here="publishers, viewers and the trickle server share the cores; client is this process",
        cpu="of the worker process; cores_of: of each kind of its threads, and of the rest, while all streams run",
        stages="cores at the failed trial; copy: the conversions' floor times the rate, taken out of decode and encode",
    )
    for backend, reason in found.items():
        if reason:
            sheet.skip(f"{backend}: capacity", reason)
            continue
        for size in sizes:
            with tempfile.TemporaryDirectory() as directory:
                _capacity(sheet, backend, size, budget_ms / 1e3, trials, Path(directory))


def _seconds(size: Size) -> float:
    return size.pick(2.0, 3.0, 10.0)


def _capacity(sheet: Sheet, backend: str, size: tuple[int, int], budget: float, trials: int, directory: Path) -> None:
    width, height = size
    label = f"{backend}, {width}x{height}"
    make_clip(directory / "clip.mp4", width, height, sheet.size.pick(1, 1, ROUNDS))
    plan = Plan(streamclip.load(directory / "clip.mp4"), True, _seconds(sheet.size))
    search, seen = Search(MOST), dict[int, Trial]()
    with house(backend, MOST) as home:
        conversions = copies(width, height, 25)
        guess = 1
        for _ in range(trials):
            streams = search.next(guess)
            if streams is None:
                break
            sheet.doing(f"{label}, {_said(streams)}")
            seen[streams] = _tried(home, plan, streams, budget, again=sheet.size is Size.FULL)
            search.told(streams, seen[streams].passes(budget))
            guess = _guess(seen[streams]) if streams == 1 else guess
        for streams in sorted(seen):
            _row(sheet, label, home, seen[streams], budget)
        unfinished = search.next(guess) is not None
        _answer(sheet, label, home, search, seen, conversions, budget, unfinished=unfinished)
    peak = Plan(plan.clip, False, sheet.size.pick(2.0, 3.0, 20.0))
    _peak(sheet, label, backend, peak, max(1, search.best))


def _tried(home: House, plan: Plan, streams: int, budget: float, *, again: bool) -> Trial:
    """One bad moment of the machine is not its capacity: what fails is tried ``again``, and the better one counts."""
    first = trial(home, plan, streams)
    if first.passes(budget) or not again:
        return first
    second = trial(home, plan, streams)
    return second if (second.missed, second.worst) < (first.missed, first.worst) and not second.errors else first


def _guess(one: Trial) -> int:
    """How many streams the machine's cores let one expect, from what everything together took for one."""
    if one.spent is None:
        return 2
    ours = sum(one.spent.roles.values()) + sum(one.spent.beside.values())
    return max(2, min(MOST, int(SETTLE * len(os.sched_getaffinity(0)) / max(ours, 1e-3))))


def _said(streams: int) -> str:
    return f"{streams} stream" + "s" * (streams > 1)


def _row(sheet: Sheet, label: str, home: House, seen: Trial, budget: float) -> None:
    values = {
        "backend": home.backend,
        "what": "paced",
        "size": label.rpartition(", ")[2],
        "streams": seen.streams,
        "passed": "yes" if seen.passes(budget) else "no",
        "missed": seen.missed,
        "budget_ms": budget * 1e3,
        **seen.figures,
    }
    if seen.worst != float("inf"):
        values["worst_p95_ms"] = seen.worst * 1e3
    if seen.errors:
        values["error"] = seen.errors[0]
    sheet.row(f"{label}, paced, {_said(seen.streams)}", **values)


def _answer(
    sheet: Sheet,
    label: str,
    home: House,
    search: Search,
    seen: dict[int, Trial],
    conversions: Copies,
    budget: float,
    *,
    unfinished: bool = False,
) -> None:
    """``unfinished``: the trials were used up before the number was found."""
    at = seen[search.failed if search.failed is not None else search.best]
    proof = evidence(home, at, conversions)
    found: dict[str, Any] = {
        "backend": home.backend,
        "budget_ms": budget * 1e3,
        "failed_at": search.failed,
        "binding": _binding(search, proof),
        "stages": in_words(proof.stages) if proof else None,
    }
    name = f"{label}, how many"
    if search.best == 0:
        why = "; ".join(at.errors) or f"one stream: {at.missed} frames missed, p95 {at.worst * 1e3:.0f} ms"
        sheet.row(name, answer="none", why=why, streams_that_fit=0, **found)
        return
    answer = f"{'at least ' * unfinished}{_said(search.best)} at p95 <= {budget * 1e3:g} ms"
    best = seen[search.best]
    sheet.row(name, answer=answer, streams_that_fit=search.best, worst_p95_ms=best.worst * 1e3, **found)


def _binding(search: Search, proof: Evidence | None) -> str:
    if search.failed is None:
        return f"nothing yet: no trial failed, of {_said(search.best)} at the most"
    return binding(proof) if proof else "not known: too short to tell"


def _peak(sheet: Sheet, label: str, backend: str, plan: Plan, streams: int) -> None:
    name = f"{label}, peak"
    sheet.doing(name)
    with house(backend, streams, lossless=True) as home:
        seen = trial(home, plan, streams)
        if seen.errors:
            sheet.fail(name, "; ".join(seen.errors))
            return
        values = {"backend": backend, "what": "peak", "streams": streams, "missed": seen.missed, **seen.figures}
        sheet.row(name, **values)
