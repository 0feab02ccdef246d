"""``gpu-byoc demo``: the whole way of a job on one machine, first the quickstart page's, then every frame of a clip.

Worker, orchestrator and gateway are separate processes, started as a user would start them; this process is their
client. It checks each answer against numpy and ends with what the parts say they spent.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gpu_byoc.errors import EXIT_INTERRUPTED, ConfigError, GpuByocError, OperatorError
from gpu_byoc.frames import FrameSpec
from gpu_byoc.local import demo_network
from gpu_byoc.local.children import Children, interruptible
from gpu_byoc.local.demo_network import MODEL_ID, Network
from gpu_byoc.local.job import CONCURRENCY, bar, beside, summary
from gpu_byoc.local.jobclient import RAW, Answer, JobClient, Tally, in_order, in_thread, raw_type
from gpu_byoc.local.metadata import amount
from gpu_byoc.local.relay import ROUTE

if TYPE_CHECKING:
    from rich.console import Console

    from gpu_byoc.media.clips import ClipInfo, ClipWriter, Pixels

PAGE_FRAME: Final = FrameSpec(640, 480)
BOOST: Final = 80
COLUMNS: Final = 100
SHOWN: Final = 4  # frames on the before/after sheet


class Mismatch(GpuByocError):
    """Something came out otherwise than it must."""

    code = "mismatch"


@dataclass(slots=True)
class Result:
    """What the clip came to. ``wrong`` are the numbers of the frames that are not as numpy has them."""

    tally: Tally = field(default_factory=Tally)
    seconds: float = 0.0
    wrong: list[int] = field(default_factory=list)
    shown: list[tuple[Pixels, Pixels]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


def main(argv: Sequence[str]) -> int:
    """Run the demo: 0 if everything matched, 1 if not, 130 or 143 after SIGINT or SIGTERM. Main thread only."""
    parser = argparse.ArgumentParser(
        prog="gpu-byoc demo", allow_abbrev=False, description="The whole way of a job, on this machine."
    )
    parser.add_argument("--output", type=Path, default=Path("demo-out"), help="directory (default: ./demo-out)")
    parser.add_argument("--backend", default="auto", help="of the worker (default: auto)")
    parser.add_argument("--free-ports", action="store_true", help="take free ports, not the quickstart page's")
    given = parser.parse_args(argv)
    received: list[int] = []
    try:
        with (
            interruptible(received),
            tempfile.TemporaryDirectory(prefix="gpu-byoc-demo-") as scratch,
            Children(Path(scratch)) as children,
        ):
            asyncio.run(_demo(given, Path(scratch), children))
    except KeyboardInterrupt:
        print("gpu-byoc demo: interrupted; every process it started has ended", file=sys.stderr)
        return 128 + received[0] if received else EXIT_INTERRUPTED
    except OperatorError:
        raise
    except (GpuByocError, OSError) as error:
        print(f"gpu-byoc demo: {error}", file=sys.stderr)
        return 1
    return 0


async def _demo(given: argparse.Namespace, scratch: Path, children: Children) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, markup=False)
    began = time.perf_counter()
    try:
        given.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {given.output}: {error.strerror}") from error
    _title(console, "1. A worker, an orchestrator and a gateway, each a process of its own")
    network = demo_network.start(children, given.backend, scratch, given.free_ports)
    await demo_network.ready(network)
    _show_network(console, network, time.perf_counter() - began)
    async with JobClient(network.url, MODEL_ID, CONCURRENCY) as client:
        _title(console, "2. The quickstart page's job: one black frame")
        await _page_job(console, client, network)
        _title(console, "3. Every frame of a clip: Big Buck Bunny, (c) Blender Foundation, CC BY 3.0")
        result = await _clip(console, client, given.output)
    _title(console, "4. What it cost")
    _report(console, result, await demo_network.ledger(network, 1 + len(result.tally.latencies)))
    console.print(f"\nAll done in {time.perf_counter() - began:.1f} s. Look at:")
    for path in result.files:
        console.print(f"  {path}")


def _title(console: Console, text: str) -> None:
    console.print(f"\n{text}", style="bold")


def _show_network(console: Console, network: Network, seconds: float) -> None:
    for old, new in network.replaced:
        console.print(f"  port {old} of the quickstart page is taken here; using {new}")
    said = {
        "worker": (network.ports.worker, _line(network.worker.lines(), "backend")),
        "orchestrator": (network.ports.service, _line(network.orchestrator.lines(), "capability registered")),
        "gateway": (network.ports.gateway, _line(network.gateway.lines(), "listening")),
    }
    for name, (port, line) in said.items():
        text = f"  {name:<13}http://127.0.0.1:{port:<6} {line}"
        console.print(_cut(text) if name == "worker" else text)
    console.print(f"  ready after {seconds:.1f} s")


def _cut(text: str) -> str:
    """At most COLUMNS of it: a worker's line names its whole processor and backend."""
    return text if len(text) <= COLUMNS else text[: COLUMNS - 1] + "\u2026"


def _line(lines: Sequence[str], word: str) -> str:
    return next((line for line in lines if word in line), "")


# --- one black frame


async def _page_job(console: Console, client: JobClient, network: Network) -> None:
    start = len(network.orchestrator.lines())
    answer = await client.send(bytes(PAGE_FRAME.nbytes), RAW)
    green = sum(answer.body[1::3])
    console.print(f"Status: {answer.status}")
    console.print(f"Response size: {len(answer.body)} bytes")
    console.print(f"Green channel sum: {green} (input was 0)")
    console.print(f"({PAGE_FRAME.width} x {PAGE_FRAME.height} pixels, each raised by {BOOST})\n")
    log = await demo_network.lines_until(network.orchestrator, start, "returning to gateway")
    _show_path(console, network, answer, log)
    if answer.body != bytes((0, BOOST, 0)) * PAGE_FRAME.pixels:
        raise Mismatch(f"the black frame came back with other bytes than 0, {BOOST}, 0 for each pixel")


def _show_path(console: Console, network: Network, answer: Answer, log: Sequence[str]) -> None:
    """The way of the job; the quoted lines are the orchestrator's own."""
    said = answer.metadata
    *before, after = log
    console.print(f"  client        POST {ROUTE}, X-Model-Id: {MODEL_ID}, {PAGE_FRAME.nbytes} bytes")
    console.print(f"  -> gateway :{network.ports.gateway}")
    console.print(f"     -> orchestrator :{network.ports.service}")
    for line in before:
        console.print(f"        | {line}")
    console.print(f"        -> worker :{network.ports.worker}, {said.get('backend')} on {said.get('device')}")
    console.print(f"           -> green_tint: {_seconds(said, 'compute')} (waited {_seconds(said, 'queue')} for it)")
    console.print(f"        | {after}")
    console.print(f"  <- client     {len(answer.body)} bytes after {answer.seconds * 1e3:.1f} ms")


def _seconds(metadata: Any, name: str) -> str:
    return f"{(amount(metadata.get(f'{name}_seconds')) or 0.0) * 1e3:.2f} ms"


# --- a clip


async def _clip(console: Console, client: JobClient, output: Path) -> Result:
    from gpu_byoc.local import sheet
    from gpu_byoc.media import clips, images

    result = Result(files=[output / "before-after.png", output / "green-tint.mp4"])
    picture, video = result.files
    with resources.as_file(resources.files("gpu_byoc.local") / "clip" / "bigbuckbunny.mp4") as path:
        info = clips.probe(path)
        console.print(f"  {info.frames} frames of {info.spec.width}x{info.spec.height}, {CONCURRENCY} jobs at once")
        with beside(video) as part, clips.ClipWriter(part, info.spec, info.rate) as clip:
            await _send_frames(client, path, info, clip, result)
            _check(result, info)
    pixels = sheet.before_after(result.shown)
    height, width, _ = pixels.shape
    picture.write_bytes(images.encode(memoryview(pixels.data), FrameSpec(width, height), images.PNG))
    console.print(f"  every byte of {info.frames} frames equals numpy's min(green, {255 - BOOST}) + {BOOST}")
    return result


async def _send_frames(client: JobClient, path: Path, info: ClipInfo, clip: ClipWriter, result: Result) -> None:
    import numpy as np

    from gpu_byoc.media import clips

    content_type = raw_type(info.spec, {})
    shown = {int((number + 0.5) * info.frames / SHOWN) for number in range(SHOWN)}
    began = time.perf_counter()
    with closing(clips.frames(path)) as frames, bar() as progress:
        task = progress.add_task("  frames", total=info.frames)
        jobs = ((frame, frame.tobytes(), content_type) for frame in frames)
        async with aclosing(in_order(client, jobs, CONCURRENCY)) as answers:
            async for frame, answer in answers:
                number = len(result.tally.latencies)
                result.tally.add(answer)
                if answer.body != tint(frame).tobytes():
                    result.wrong.append(number)
                else:
                    await in_thread(clip.write, answer.body)
                    if number in shown:
                        result.shown.append((frame, np.frombuffer(answer.body, np.uint8).reshape(frame.shape)))
                progress.advance(task)
    result.seconds = time.perf_counter() - began


def _check(result: Result, info: ClipInfo) -> None:
    came = len(result.tally.latencies)
    if came != info.frames:
        raise Mismatch(f"{came} frames came back of {info.frames}")
    if result.wrong:
        raise Mismatch(f"{len(result.wrong)} frames are not what numpy says, the first is number {result.wrong[0]}")


def tint(frame: Pixels) -> Pixels:
    """What green tint must give, said in numpy alone: min(green, 175) + 80, red and blue as they are."""
    import numpy as np

    tinted = frame.copy()
    tinted[..., 1] = np.minimum(frame[..., 1], 255 - BOOST) + BOOST
    return tinted


# --- the bill


def _report(console: Console, result: Result, ledger: dict[str, Any]) -> None:
    tally = result.tally
    for line in summary(tally, result.seconds):
        console.print(f"  {line}")
    console.print("  (that is with reading the clip, comparing with numpy and writing the MP4, in this one process)")
    each = tally.compute_seconds / max(1, tally.frames)
    console.print(f"  compute is {each * 1e6:.0f} us a frame, {tally.compute_seconds / result.seconds:.1%} of the time")
    console.print(
        f"  the orchestrator's ledger: {ledger['jobs']} jobs, {ledger['wall_seconds']:.2f} s of wall time, "
        f"{ledger['billed_seconds']} s billed: each job's wall seconds rounded up, so a frame that is a job costs 1 s"
    )
