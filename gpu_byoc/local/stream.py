"""``gpu-byoc stream``: a clip as one or several live streams, through a trickle server and a worker, and back.

Both are separate processes, started as a user would start them unless their URLs are given; this process publishes
and watches. It ends with what went in, what came out and when, and leaves the first stream as an MP4 and, beside it, a
sheet of frames before and after.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gpu_byoc.errors import EXIT_INTERRUPTED, ConfigError, GpuByocError, OperatorError
from gpu_byoc.local.children import Children, interruptible
from gpu_byoc.local.job import beside
from gpu_byoc.local.jobclient import in_thread

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from gpu_byoc.local.streamclient import Figures, LiveClient, Plan
    from gpu_byoc.local.streamrig import Play, Rig

OUTPUT: Final = Path("live-out") / "green-tint.mp4"
MOST_STREAMS: Final = 256
_TELLING_SECONDS: Final = 0.25  # the system counts CPU time in hundredths of a second
_SHOW_SECONDS: Final = 0.5  # between two looks at the progress; drawing it takes some milliseconds of this process


def main(argv: Sequence[str]) -> int:
    """0 if every frame came out or was counted as dropped, 1 if not, 130 or 143 after SIGINT or SIGTERM. Main thread
    only."""
    given = _arguments(argv)
    received: list[int] = []
    try:
        with (
            interruptible(received),
            tempfile.TemporaryDirectory(prefix="gpu-byoc-stream-") as scratch,
            Children(Path(scratch)) as children,
        ):
            return asyncio.run(_run(given, Path(scratch), children))
    except KeyboardInterrupt:
        print("gpu-byoc stream: interrupted; every process it started has ended", file=sys.stderr)
        return 128 + received[0] if received else EXIT_INTERRUPTED
    except OperatorError:
        raise
    except (GpuByocError, OSError) as error:
        print(f"gpu-byoc stream: {error}", file=sys.stderr)
        return 1


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu-byoc stream", description="A clip as live streams, and what comes back.", allow_abbrev=False
    )
    parser.add_argument("--input", type=Path, help="video file with H.264 (default: the demo's clip)")
    parser.add_argument("--streams", type=int, default=1, help="at once (default: %(default)s)")
    parser.add_argument("--speed", choices=("1", "max"), default="1", help="real time, or as fast as frames come out")
    parser.add_argument("--seconds", type=float, help="of video, the clip over and over (default: the clip once)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the first stream as mp4 (default: %(default)s)")
    parser.add_argument("--trickle", metavar="URL", help="where channels are, such as http://host:3389/ai/trickle/")
    parser.add_argument("--worker", metavar="URL", help="such as http://host:8000 (default for both: start our own)")
    parser.add_argument("--backend", default="auto", help="of the worker that is started (default: auto)")
    given = parser.parse_args(argv)
    if not 1 <= given.streams <= MOST_STREAMS:
        raise ConfigError(f"--streams must be from 1 to {MOST_STREAMS}")
    if given.seconds is not None and not (0 < given.seconds < math.inf):
        raise ConfigError("--seconds must be above 0")
    if given.input is not None and not given.input.is_file():
        what = "is not a file" if given.input.exists() else "there is no such file"
        raise ConfigError(f"--input {given.input}: {what}")
    if given.output.suffix.lower() != ".mp4":
        raise ConfigError(f"--output {given.output}: what comes back is written as mp4; name it so")
    for name in ("trickle", "worker"):
        url = getattr(given, name)
        if url is not None and not url.startswith(("http://", "https://")):
            raise ConfigError(f"--{name} {url!r} must be a URL like http://localhost:8000")
    return given


async def _run(given: argparse.Namespace, scratch: Path, children: Children) -> int:
    from rich.console import Console

    from gpu_byoc.local import streamclip, streamrig
    from gpu_byoc.local.streamclient import Plan

    console = Console(highlight=False, soft_wrap=True, markup=False)
    try:
        given.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {given.output}: {error.strerror}") from error
    lossless = given.speed == "max"
    rig = streamrig.start(
        children,
        backend=given.backend,
        streams=given.streams,
        lossless=lossless,
        trickle=given.trickle,
        worker=given.worker,
    )
    with ExitStack() as stack:
        clip = resources.files("gpu_byoc.local") / "clip" / "bigbuckbunny.mp4"
        path = given.input or stack.enter_context(resources.as_file(clip))
        plan = Plan(await in_thread(streamclip.load, path), not lossless, given.seconds)
        await streamrig.ready(rig)
        _introduce(console, given, rig, plan)
        with (scratch / "output.ts").open("w+b") as record:
            play = streamrig.Play(rig, plan, given.streams, record)
            await _play(console, play)
        console.print(_table(play, final=True))
        failures = _report(console, play)
        await in_thread(_write, console, given.output, scratch / "output.ts", play)
    for line in failures:
        print(f"gpu-byoc stream: {line}", file=sys.stderr)
    return 1 if failures else 0


def _introduce(console: Console, given: argparse.Namespace, rig: Rig, plan: Plan) -> None:
    clip, sound = plan.clip, plan.clip.audio
    heard = f"{sound.codec} sound" if sound else "no sound"
    left_out = f" ({clip.left_out} is not carried)" if clip.left_out else ""
    console.print(f"  clip     {clip.path.name}: {clip.pictures} frames in {clip.seconds:.2f} s, {heard}{left_out}")
    console.print(f"  trickle  {rig.trickle}")
    console.print(f"  worker   {rig.worker}{'' if plan.real_time or rig.worker_child is None else ', lossless'}")
    pace = "in real time" if plan.real_time else "as fast as frames come out, three segments ahead at most"
    console.print(f"  {_count(given.streams, 'stream')} of {plan.length:.1f} s, {pace}\n")


async def _play(console: Console, play: Play) -> None:
    """Play to the end; in a terminal, with a table that moves."""
    from rich.live import Live

    if not console.is_terminal:
        await play.run()
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        playing = asyncio.create_task(play.run())
        try:
            while not playing.done():
                live.update(_table(play), refresh=True)
                await asyncio.wait([playing], timeout=_SHOW_SECONDS)
            playing.result()
        finally:
            playing.cancel()
            await asyncio.wait([playing])


# --- for people


def _table(play: Play, final: bool = False) -> RenderableType:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    table.add_column("stream")
    table.add_column("state", no_wrap=True)
    heads = ["in", "out", "dropped", "p50 ms", "p95 ms", "p99 ms", "compute s"]
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for number, client in enumerate(play.clients, 1):
        table.add_row(str(number), *_row(client, final))
    return table


def _row(client: LiveClient, final: bool) -> list[str]:
    from gpu_byoc.local.streamclient import quantile

    figures = client.figures
    latencies = figures.latencies() if final else list(figures.latest)
    return [
        "failed" if client.error else figures.state,
        str(len(figures.published)),
        str(len(figures.received)),
        str(figures.dropped_frames),
        *(f"{quantile(latencies, part) * 1e3:.1f}" if latencies else "-" for part in (0.5, 0.95, 0.99)),
        f"{figures.compute_seconds:.4f}",
    ]


def _report(console: Console, play: Play) -> list[str]:
    """Print what the table has not; returns what went wrong, one line each."""
    plan = play.plan
    if play.cpu_per_frame is not None and play.seconds < _TELLING_SECONDS:
        console.print("  too short to say what CPU a frame takes the worker; --seconds plays the clip over and over")
    elif play.cpu_per_frame is not None:
        console.print(
            f"  the worker took {play.cpu_per_frame * 1e3:.2f} ms of CPU a frame, at {play.rate:.1f} frames/s of "
            f"{_count(len(play.clients), 'stream')}: {play.cpu_seconds:.2f} s of CPU in {play.seconds:.2f} s"
        )
    else:
        console.print("  the worker's CPU is not known: it was not started here (--worker), or no stream came out")
    if plan.clip.reorder and plan.real_time:
        wait = plan.clip.reorder / 90
        console.print(f"  (the clip has B-frames: {wait:.0f} ms of the latency are pictures that wait for their order)")
    if not plan.real_time:
        console.print("  (latencies are waits in line here: three segments are under way at any time)")
    for name, counts in (("dropped", "dropped"), ("problems", "problems")):
        sums: Counter[str] = sum((getattr(each, counts) for each in play.figures), Counter())
        if sums:
            console.print(f"  {name}: " + ", ".join(f"{count} {reason}" for reason, count in sorted(sums.items())))
    return [line for number, client in enumerate(play.clients, 1) for line in _wrong(number, client)]


def _wrong(number: int, client: LiveClient) -> list[str]:
    figures: Figures = client.figures
    lines = [f"stream {number}: {client.error}"] if client.error else []
    untaken = figures.untaken if client.error else 0
    if untaken:
        lines.append(f"stream {number}: {_count(untaken, 'frame')} published that the worker never took: it had ended")
    if figures.lost > untaken:
        lines.append(f"stream {number}: {_count(figures.lost - untaken, 'frame')} lost, and not counted as dropped")
    elif figures.lost < 0 and not client.error:
        lines.append(f"stream {number}: {_count(-figures.lost, 'frame')} came out and are counted as dropped")
    if figures.unknown:
        lines.append(f"stream {number}: {_count(figures.unknown, 'frame')} came out that never went in, or twice")
    return lines


def _write(console: Console, output: Path, recording: Path, play: Play) -> None:
    from gpu_byoc.local import streamclip

    figures = play.figures[0]
    if not figures.received:
        return
    picture, clip = output.with_suffix(".png"), play.plan.clip
    with beside(output) as part:
        streamclip.write_mp4(recording, part)
    with beside(picture) as part:
        streamclip.write_sheet(
            clip.path, output, sorted(figures.published), sorted(figures.received), clip.length, part
        )
    console.print("\nLook at:")
    for path in (output, picture):
        console.print(f"  {path}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
