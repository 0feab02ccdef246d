"""One live stream through our worker and through pytrickle: same clip, same trickle server, same client, in turn.

pytrickle runs in an environment of its own under ``.venv-peers``, is set up as its documentation recommends for the
purpose, and is left out by name where it cannot be installed.
"""

from __future__ import annotations

import functools
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from gpu_byoc.local import streamclip
from gpu_byoc.local.children import ChildEnded
from gpu_byoc.local.streamclient import Plan
from gpu_byoc.media.encode import CodedPicture

from .bench_live import make_clip
from .bench_media import SIZES
from .harness import Sheet, percentile
from .peer_environment import OURS, PEERS, SERVE, Peer, PeerUnavailable, install
from .peer_live import NoStart, Run, Subject, play
from .sides import target

USUAL, ROOM = 15, 1000
"""pytrickle's queue, in frames, above which it skips some: its default, and enough that it loses none in a flood."""


@dataclass(frozen=True, slots=True)
class Case:
    """A stream to be played; ``seconds`` of it for a look and in full."""

    size: tuple[int, int]
    real_time: bool
    sound: bool = False

    @property
    def name(self) -> str:
        width, height = self.size
        pace = "real time" if self.real_time else "flood"
        return f"{pace}, {width}x{height}" + (", with sound" if self.sound else "")


LIVE: Final = (
    *(Case(size, real_time) for size in SIZES for real_time in (True, False)),
    Case(SIZES[0], real_time=True, sound=True),
)


def run(sheet: Sheet) -> None:
    peer = PEERS["pytrickle"]
    sheet.expect(2 * len(LIVE) + len(TARGETS))
    sheet.doing(f"{peer.name}: its environment")
    try:
        python, found = install(peer)
    except PeerUnavailable as reason:
        for case in LIVE:
            sheet.skip(f"{case.name}, {peer.name}", str(reason))
        _targets(sheet)
        return
    sheet.settings(
        turns="ours, theirs, ours, ...; figures are medians over the turns, ratios over neighbouring turns",
        cpu="of the server and every process it has started, from the kernel; rss: their proportional set size",
        stream="real clip, 25 fps, H.264 without B-frames in MPEG-TS, 2 s segments; without its sound unless "
        "the row says so: ours copies it, pytrickle decodes it and encodes Opus",
        flood="as fast as it comes out, the publisher at most three segments ahead",
        versions=found,
        pytrickle=f"StreamServer, FrameProcessor that adds in place; width and height as the input's, max_framerate 60 "
        f"(its highest); FrameSkipConfig(max_queue_size={USUAL}), its default; {ROOM} in floods: it skips none",
        gpu_byoc="serve --backend numpy, --lossless yes in floods",
    )
    with tempfile.TemporaryDirectory() as directory:
        for case in LIVE:
            sheet.doing(case.name)
            plan = _plan(case, Path(directory), sheet.size.pick(3.0, 6.0, 12.0))
            theirs = Subject(peer.name, functools.partial(_pytrickle, peer, python, case), _params(case))
            try:
                compare(sheet, case, Subject(OURS, functools.partial(_worker, case), {}), theirs, plan)
            except NoStart as reason:
                say = sheet.fail if reason.name == OURS else sheet.skip
                say(f"{case.name}, {reason.name}", str(reason))
            except (ChildEnded, RuntimeError) as reason:
                sheet.fail(case.name, str(reason))
    _targets(sheet)


TARGETS: Final = tuple(
    (case, *(("cpu_times_peer", "at_most", 0.45) if case.real_time else ("rate_over_peer", "at_least", 2.3)))
    for case in LIVE
    if not case.sound
)
"""What our worker is built to reach beside pytrickle: CPU a frame in real time, frames a second in a flood."""


def _targets(sheet: Sheet) -> None:
    rows = {row["name"]: row for row in sheet.rows}
    for case, figure, side, limit in TARGETS:
        ours = rows.get(f"{case.name}, {OURS}", {})
        theirs = rows.get(f"{case.name}, pytrickle", {})
        bound: dict[str, Any] = {side: limit}
        target(sheet, f"{case.name}, {figure}", ours.get(figure), theirs.get("skipped", ""), **bound)


def _plan(case: Case, directory: Path, seconds: float) -> Plan:
    width, height = case.size
    path = directory / f"{width}x{height}.mp4"
    if not path.exists():
        make_clip(path, width, height)
    clip = streamclip.load(path)
    if not case.sound:
        clip = replace(clip, units=tuple(u for u in clip.units if isinstance(u, CodedPicture)), audio=None)
    return Plan(clip, case.real_time, seconds if case.real_time else 3 * seconds)


def _params(case: Case) -> dict[str, Any]:
    return {"width": case.size[0], "height": case.size[1], "max_framerate": 60}


def _pytrickle(peer: Peer, python: Path, case: Case, port: int) -> Sequence[str]:
    return peer.command(python, port, USUAL if case.real_time else ROOM)


def _worker(case: Case, port: int) -> Sequence[str]:
    return (sys.executable, *SERVE, "--port", str(port), "--lossless", "no" if case.real_time else "yes")


def compare(sheet: Sheet, case: Case, ours: Subject, theirs: Subject, plan: Plan) -> None:
    """Ours, theirs, ours, theirs, ..., ours; a row for each. Each of theirs is compared with its two neighbours."""
    a, b = [play(ours, plan)], []
    for _ in range(sheet.size.pick(1, 1, 3)):
        b.append(play(theirs, plan))
        a.append(play(ours, plan))
    ratios = [_ratios((a[turn], a[turn + 1]), each) for turn, each in enumerate(b)]
    middle = {key: statistics.median(each[key] for each in ratios) for key in ratios[0]}
    if case.real_time:
        del middle["rate_over_peer"]  # both are the clip's own
    for subject, runs, more in ((ours, a, middle), (theirs, b, {})):
        values = {"case": case.name, "server": subject.name, "turns": len(runs), **_figures(runs), **more}
        sheet.row(f"{case.name}, {subject.name}", **values)


def _ratios(ours: Sequence[Run], theirs: Run) -> dict[str, float]:
    def mean(key: str) -> float:
        return statistics.fmean(getattr(each, key) for each in ours)

    tails = {q: statistics.fmean(percentile(each.latencies, q) for each in ours) for q in (0.5, 0.99)}
    return {
        "cpu_times_peer": mean("cpu") / theirs.cpu,
        "rate_over_peer": mean("rate") / theirs.rate,
        "p50_times_peer": tails[0.5] / percentile(theirs.latencies, 0.5),
        "p99_times_peer": tails[0.99] / percentile(theirs.latencies, 0.99),
    }


def _figures(runs: Sequence[Run]) -> dict[str, Any]:
    def middle(read: Any) -> float:
        return float(statistics.median(map(read, runs)))

    return {
        "frames_in": sum(each.published for each in runs),
        "frames_out": sum(each.received for each in runs),
        "lost": sum(each.lost for each in runs),
        "frames_per_second": middle(lambda r: r.rate),
        "cpu_ms": middle(lambda r: r.cpu) * 1e3,
        "p50_ms": middle(lambda r: percentile(r.latencies, 0.5)) * 1e3,
        "p95_ms": middle(lambda r: percentile(r.latencies, 0.95)) * 1e3,
        "p99_ms": middle(lambda r: percentile(r.latencies, 0.99)) * 1e3,
        "cpu_seconds_per_million_frames": middle(lambda r: r.cpu) * 1e6,
        "start_seconds": middle(lambda r: r.start),
        "rss_mb": middle(lambda r: r.rss) / 1e6,
    }
