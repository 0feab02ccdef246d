"""``gpu-byoc job``: send an image, a video or raw frames through a gateway, and write what comes back.

The output appears when everything went well, and not before: it is written beside its place and renamed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, aclosing, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gpu_byoc.errors import BadFrame, ConfigError, GpuByocError, OperatorError
from gpu_byoc.frames import FrameSpec
from gpu_byoc.local.jobclient import Answer, JobClient, Tally, in_order, in_thread, raw_type, with_params

if TYPE_CHECKING:
    from collections.abc import Generator

    from rich.progress import Progress

IMAGES: Final = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png"}
VIDEOS: Final = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm"})
CONCURRENCY: Final = 4  # jobs on their way; half of what an orchestrator gives a container at once by default
EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, as shells have it

Sink = Callable[[bytes], object]


@dataclass(frozen=True, slots=True)
class Work:
    """What to send, with its Content-Type; where answers go; how many jobs there are, if that is known."""

    bodies: Generator[bytes, None, None]
    content_type: str
    total: int | None
    output: Callable[[Path], AbstractContextManager[Sink]]
    frame_bytes: int | None  # length that each answer must have; None for images


def main(argv: Sequence[str]) -> int:
    """Run the command; 0 if every job succeeded. Raises OperatorError for arguments that cannot work."""
    given = _arguments(argv)
    params = _params(given.param)
    try:
        work = _plan(given, params)
        with closing(work.bodies):
            asyncio.run(_run(given, work))
    except KeyboardInterrupt:
        print(f"gpu-byoc job: interrupted; {given.output} was not written", file=sys.stderr)
        return EXIT_INTERRUPTED
    except OperatorError:
        raise
    except (GpuByocError, OSError) as error:
        print(f"gpu-byoc job: {error}", file=sys.stderr)
        return 1
    return 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu-byoc job", description="Send jobs through a gateway.")
    parser.add_argument("--gateway", default="http://localhost:8935", help="its URL (default: %(default)s)")
    parser.add_argument("--model-id", required=True, help="capability, as the orchestrator's -byocModelID")
    parser.add_argument("--input", type=Path, required=True, help="jpg, png, mp4, or raw frames one after another")
    parser.add_argument("--output", type=Path, required=True, help="same kind as the input; a video becomes mp4")
    parser.add_argument("--width", type=int, help="of raw frames; without it the file is one job")
    parser.add_argument("--height", type=int, help="of raw frames")
    parser.add_argument("--format", default="rgb24", help="of raw frames (default: %(default)s)")
    parser.add_argument("--param", action="append", default=[], metavar="K=V", help="processor parameter; repeatable")
    parser.add_argument("--concurrency", type=int, default=CONCURRENCY, help="jobs at once (default: %(default)s)")
    given = parser.parse_args(argv)
    if not 1 <= given.concurrency <= 256:
        raise ConfigError("--concurrency must be from 1 to 256")
    if (given.width is None) != (given.height is None):
        raise ConfigError("give --width and --height, or neither")
    return given


def _params(given: Sequence[str]) -> dict[str, str]:
    params = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise ConfigError(f"--param {text!r} must be NAME=VALUE")
        if name in ("width", "height", "format"):
            raise ConfigError(f"--param {name}: use --{name}")
        params[name] = value
    return params


# --- what to send, by the input's suffix


def _plan(given: argparse.Namespace, params: Mapping[str, str]) -> Work:
    suffix, target = given.input.suffix.lower(), given.output.suffix.lower()
    kind = IMAGES.get(suffix)
    if given.width is not None and (kind or suffix in VIDEOS):
        raise ConfigError(f"--width and --height are for raw frames; {given.input} says its own")
    if kind:
        if IMAGES.get(target) != kind:
            raise ConfigError(f"--output {given.output}: a job on {suffix} comes back as {kind}; name it so")
        return Work(_whole(given.input), with_params(kind, params), 1, _file, None)
    if suffix in VIDEOS:
        if target != ".mp4":
            raise ConfigError(f"--output {given.output}: a video is written as mp4; name it so")
        return _video(given.input, params)
    return _raw(given, params)


def _raw(given: argparse.Namespace, params: Mapping[str, str]) -> Work:
    size = given.input.stat().st_size
    if not size:
        raise BadFrame(f"{given.input} is empty")
    if given.width is None:
        return Work(_whole(given.input), raw_type(None, params), 1, _file, size)
    spec = FrameSpec(given.width, given.height, given.format)
    if size % spec.nbytes:
        raise BadFrame(f"{given.input} has {size} bytes, no whole number of {spec} frames of {spec.nbytes} bytes")
    bodies = _pieces(given.input, spec.nbytes)
    return Work(bodies, raw_type(spec, params), size // spec.nbytes, _file, spec.nbytes)


def _video(path: Path, params: Mapping[str, str]) -> Work:
    from gpu_byoc.media import clips

    info = clips.probe(path)

    @contextmanager
    def output(target: Path) -> Iterator[Sink]:
        with clips.ClipWriter(target, info.spec, info.rate) as clip:
            yield clip.write

    def bodies() -> Generator[bytes, None, None]:
        for frame in clips.frames(path):
            yield frame.tobytes()

    return Work(bodies(), raw_type(info.spec, params), info.frames or None, output, info.spec.nbytes)


def _whole(path: Path) -> Generator[bytes, None, None]:
    yield path.read_bytes()


def _pieces(path: Path, size: int) -> Generator[bytes, None, None]:
    with path.open("rb") as file:
        while piece := file.read(size):
            yield piece


@contextmanager
def _file(target: Path) -> Iterator[Sink]:
    with target.open("wb") as file:
        yield file.write


# --- sending


async def _run(given: argparse.Namespace, work: Work) -> None:
    tally = Tally()
    began = time.perf_counter()
    jobs = ((None, body, work.content_type) for body in work.bodies)
    async with JobClient(given.gateway, given.model_id, given.concurrency) as client:
        with ExitStack() as stack:
            part = stack.enter_context(beside(given.output))
            write = stack.enter_context(work.output(part))
            progress = stack.enter_context(bar())
            task = progress.add_task(given.input.name, total=work.total)
            async with aclosing(in_order(client, jobs, given.concurrency)) as answers:
                async for _, answer in answers:
                    _check(answer, work)
                    await in_thread(write, answer.body)
                    tally.add(answer)
                    progress.advance(task)
            if not tally.latencies:
                raise BadFrame(f"{given.input} has no frames")
    for line in summary(tally, time.perf_counter() - began):
        print(line)


def _check(answer: Answer, work: Work) -> None:
    if work.frame_bytes is not None and len(answer.body) != work.frame_bytes:
        raise BadFrame(f"the answer has {len(answer.body)} bytes, the frame {work.frame_bytes}")
    kind = answer.headers.get("Content-Type", "").partition(";")[0]
    if work.frame_bytes is None and kind != work.content_type.partition(";")[0]:
        raise BadFrame(f"the answer is {kind or 'of no type'}, not {work.content_type}")


@contextmanager
def beside(output: Path) -> Iterator[Path]:
    """A file name in the same directory; it becomes ``output`` when the block ends well, and goes away otherwise."""
    part = output.with_name(output.name + ".part")
    try:
        yield part
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)


def bar() -> Progress:
    """A progress bar for frames; in a pipe it prints its last state only."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


def summary(tally: Tally, seconds: float) -> list[str]:
    """What a run came to, in lines for people."""
    p50, p99 = (f"{tally.percentile(part) * 1e3:.1f} ms" for part in (0.5, 0.99))
    rate = tally.frames / seconds
    lines = [f"{_count(tally.frames, 'frame')} in {seconds:.2f} s: {rate:.1f} frames/s, p50 {p50}, p99 {p99}"]
    if tally.retries:
        lines.append(f"{_count(tally.retries, 'job')} sent again after a busy answer")
    spent = ", ".join(f"{name.removesuffix('_seconds')} {getattr(tally, name):.4f} s" for name in Tally.SUMS)
    lines.append(f"{tally.where or 'the worker does not say what it ran on'}: {spent}")
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
