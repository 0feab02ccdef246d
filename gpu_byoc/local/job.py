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

from gpu_byoc.errors import EXIT_INTERRUPTED, BadFrame, ConfigError, GpuByocError, OperatorError
from gpu_byoc.frames import FrameSpec
from gpu_byoc.local.jobclient import Answer, JobClient, Tally, in_order, in_thread, raw_type, with_params

if TYPE_CHECKING:
    from collections.abc import Generator

    from rich.progress import Progress

IMAGES: Final = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png"}
VIDEOS: Final = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm"})
RAW: Final = frozenset({".rgb", ".raw", ".bin"})
CONCURRENCY: Final = 4  # jobs on their way; half of what an orchestrator gives a container at once by default

KINDS: Final = (
    "jpg, jpeg or png: an image; mp4, m4v, mov, mkv or webm: a video; rgb, raw or bin, or any name with --width and "
    "--height: raw frames one after another"
)

Sink = Callable[[bytes], object]


@dataclass(frozen=True, slots=True)
class Work:
    """What to send, with its Content-Type; where answers go; how many jobs there are, if that is known."""

    bodies: Generator[bytes, None, None]
    content_type: str
    total: int | None
    output: Callable[[Path], AbstractContextManager[Sink]]
    frame_bytes: int | None  # length that each answer must have; None for images
    note: str = ""  # what the user should know about the output


def main(argv: Sequence[str]) -> int:
    """Run the command; 0 if every job succeeded. Raises OperatorError for arguments that cannot work."""
    given = _arguments(argv)
    params = _params(given.param)
    client = JobClient(given.gateway, given.model_id, given.concurrency)
    try:
        work = _plan(given, params)
        with closing(work.bodies):
            asyncio.run(_run(given, work, client))
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
    parser = argparse.ArgumentParser(
        prog="gpu-byoc job", allow_abbrev=False, description="Send jobs through a gateway."
    )
    parser.add_argument("--gateway", default="http://localhost:8935", help="its URL (default: %(default)s)")
    parser.add_argument("--model-id", required=True, help="capability, as the orchestrator's -byocModelID")
    parser.add_argument("--input", type=Path, required=True, help=f"{KINDS}; of a video only the pictures are sent")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="same kind as the input; a video becomes an mp4 without sound, at a constant frame rate",
    )
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
    """Raises ConfigError for names that do not fit one another, then for files that are not there."""
    suffix, target = given.input.suffix.lower(), given.output.suffix.lower()
    kind = IMAGES.get(suffix)
    if given.width is not None and (kind or suffix in VIDEOS):
        raise ConfigError(f"--width and --height are for raw frames; {given.input} says its own")
    if kind:
        if IMAGES.get(target) != kind:
            raise ConfigError(f"--output {given.output}: a job on {suffix} comes back as {kind}; name it so")
        _check_files(given)
        return Work(_whole(given.input), with_params(kind, params), 1, _file, None)
    if suffix in VIDEOS:
        if target != ".mp4":
            raise ConfigError(f"--output {given.output}: a video is written as mp4; name it so")
        _check_files(given)
        return _video(given.input, params)
    if given.width is None and suffix not in RAW:
        raise ConfigError(f"--input {given.input}: of what kind is it? {KINDS}")
    if target in IMAGES or target in VIDEOS:
        raise ConfigError(f"--output {given.output}: raw frames come back as raw frames; name it .rgb")
    _check_files(given)
    return _raw(given, params)


def _check_files(given: argparse.Namespace) -> None:
    """Before anything is read or sent."""
    if not given.input.is_file():
        what = "is not a file" if given.input.exists() else "there is no such file"
        raise ConfigError(f"--input {given.input}: {what}")
    if not given.output.parent.is_dir():
        raise ConfigError(f"--output {given.output}: there is no directory {given.output.parent}; make it first")
    if given.output.is_dir():
        raise ConfigError(f"--output {given.output}: that is a directory; name a file")


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

    note = f"{float(info.rate):g} frames/s throughout, and no sound: a job carries pictures only"
    return Work(bodies(), raw_type(info.spec, params), info.frames or None, output, info.spec.nbytes, note)


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


async def _run(given: argparse.Namespace, work: Work, client: JobClient) -> None:
    tally = Tally()
    began = time.perf_counter()
    jobs = ((None, body, work.content_type) for body in work.bodies)
    async with client:
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
    if work.note:
        print(f"{given.output}: {work.note}")


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
