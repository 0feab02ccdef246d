"""The job command against a gateway that does what each test says, and against a real worker."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager
from email.message import Message
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from gpu_byoc.errors import ConfigError
from gpu_byoc.frames import FrameSpec
from gpu_byoc.local import job
from gpu_byoc.local.jobclient import (
    RETRIES,
    Answer,
    GatewayUnreachable,
    JobClient,
    JobRefused,
    Tally,
    in_order,
    raw_type,
    with_params,
)
from gpu_byoc.media import clips, images
from tests.support.processes import free_port
from tests.support.processes import running as running_process

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

METADATA = {"backend": "numpy", "device": "cpu", "frames": 1, "batch": 1}
SPENT = {"queue_seconds": 0.25, "copy_seconds": 0.5, "compute_seconds": 2.0}


async def echo(request: web.Request) -> web.Response:
    answer = web.Response(body=await request.read(), headers={"X-Metadata": json.dumps(METADATA | SPENT)})
    answer.headers["Content-Type"] = request.headers["Content-Type"].partition(";")[0]
    return answer


@asynccontextmanager
async def gateway(handler: Handler) -> AsyncIterator[str]:
    """Its URL. A client that goes away cancels its handler."""
    app = web.Application(client_max_size=1 << 24)
    app.router.add_post("/live/video-to-video", handler)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def command(handler: Handler, *arguments: object) -> int:
    """``gpu-byoc job`` in a thread of its own, while ``handler`` is the gateway."""

    async def run() -> int:
        async with gateway(handler) as url:
            given = ["--gateway", url, "--model-id", "m", *map(str, arguments)]
            return await asyncio.to_thread(job.main, given)

    return asyncio.run(run())


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test; it takes no fixtures."""

    def run() -> None:
        asyncio.run(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


# --- what is sent and what is written


def test_raw_frames_are_jobs_at_once_and_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = [bytes([number]) * 24 for number in range(10)]
    (tmp_path / "in.rgb").write_bytes(b"".join(frames))
    now = most = 0
    types: set[str] = set()
    full = asyncio.Event()

    async def invert(request: web.Request) -> web.Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        if now == 3:
            full.set()
        types.add(f"{request.headers['X-Model-Id']} {request.headers['Content-Type']}")
        body = await request.read()
        await full.wait()  # so the first three are there together
        if body[0] % 3 == 0:  # the first of three answers after the two that follow it
            await asyncio.sleep(0.01)
        now -= 1
        return web.Response(body=bytes(255 - value for value in body), headers={"X-Metadata": json.dumps(SPENT)})

    sizes = ("--width", 4, "--height", 2, "--param", "boost=40", "--param", "note=a b")
    code = command(invert, "--input", tmp_path / "in.rgb", "--output", tmp_path / "out.rgb", *sizes, "--concurrency", 3)
    assert code == 0
    assert (tmp_path / "out.rgb").read_bytes() == bytes(255 - value for value in b"".join(frames))
    assert most == 3
    assert types == {'m application/octet-stream; width=4; height=2; format=rgb24; boost=40; note="a b"'}
    said = capsys.readouterr().out
    assert "10 frames in" in said
    assert "queue 2.5000 s, copy 5.0000 s, compute 20.0000 s" in said


def test_raw_bytes_without_geometry_are_one_job(tmp_path: Path) -> None:
    (tmp_path / "in.bin").write_bytes(bytes(range(9)))
    types: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        types.append(request.headers["Content-Type"])
        return await echo(request)

    assert command(handler, "--input", tmp_path / "in.bin", "--output", tmp_path / "out.bin") == 0
    assert types == ["application/octet-stream"]
    assert (tmp_path / "out.bin").read_bytes() == bytes(range(9))


@pytest.mark.parametrize(("suffix", "kind"), [("png", "image/png"), ("jpg", "image/jpeg"), ("JPEG", "image/jpeg")])
def test_an_image_is_one_job_of_its_type(tmp_path: Path, suffix: str, kind: str) -> None:
    source, target = tmp_path / f"in.{suffix}", tmp_path / f"out.{suffix}"
    source.write_bytes(b"the bytes are the worker's to judge")
    types: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        types.append(request.headers["Content-Type"])
        return await echo(request)

    assert command(handler, "--input", source, "--output", target, "--param", "boost=40") == 0
    assert types == [f"{kind}; boost=40"]
    assert target.read_bytes() == source.read_bytes()


def test_a_video_becomes_a_video_frame_by_frame(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec, rate = FrameSpec(64, 48), Fraction(30)
    with clips.ClipWriter(tmp_path / "in.mp4", spec, rate) as clip:
        for number in range(9):
            clip.write(np.full(spec.shape, 20 * number, np.uint8))

    async def invert(request: web.Request) -> web.Response:
        body = np.frombuffer(await request.read(), np.uint8)
        return web.Response(body=(255 - body).tobytes())

    assert command(invert, "--input", tmp_path / "in.mp4", "--output", tmp_path / "out.mp4") == 0
    assert clips.probe(tmp_path / "out.mp4") == clips.ClipInfo(spec, rate, 9)
    assert "out.mp4: 30 frames/s throughout, and no sound" in capsys.readouterr().out
    for number, frame in enumerate(clips.frames(tmp_path / "out.mp4")):
        assert np.abs(frame.astype(int) - (255 - 20 * number)).max() <= 4


# --- what goes wrong


def test_busy_is_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.bin").write_bytes(b"abc")
    answers = [503, 503, 200]

    async def handler(request: web.Request) -> web.Response:
        body = await request.read()
        status = answers.pop(0)
        return web.Response(status=status, body=body, headers={"Retry-After": "0"} if status == 503 else {})

    assert command(handler, "--input", tmp_path / "in.bin", "--output", tmp_path / "out") == 0
    assert (tmp_path / "out").read_bytes() == b"abc"
    captured = capsys.readouterr()
    assert "2 jobs sent again" in captured.out
    assert captured.err == f"HTTP 503: abc; sending jobs again, each up to {RETRIES} times\n", "said once"


def test_busy_for_ever_is_given_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.bin").write_bytes(b"abc")
    asked = 0

    async def handler(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return web.json_response({"message": "no slot"}, status=503, headers={"Retry-After": "0"})

    assert command(handler, "--input", tmp_path / "in.bin", "--output", tmp_path / "out") == 1
    assert asked == RETRIES + 1
    assert "gpu-byoc job: HTTP 503: no slot" in capsys.readouterr().err


def test_a_refusal_ends_it_and_leaves_an_earlier_output_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.bin").write_bytes(bytes(3 * 12))
    (tmp_path / "out").write_bytes(b"earlier")
    answers = [200, 422, 200]

    async def handler(request: web.Request) -> web.Response:
        body = await request.read()
        if (status := answers.pop(0)) == 200:
            return web.Response(body=body)
        return web.json_response({"message": "parameter 'boost': too much"}, status=status)

    size = ("--width", 2, "--height", 2, "--concurrency", 1)
    code = command(handler, "--input", tmp_path / "in.bin", "--output", tmp_path / "out", *size)
    assert code == 1
    assert "HTTP 422: parameter 'boost': too much" in capsys.readouterr().err
    assert answers == [200], "the third frame was sent after the second was refused"
    assert (tmp_path / "out").read_bytes() == b"earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.bin", "out"]


def test_an_answer_of_another_length_or_type_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.bin").write_bytes(b"abcdef")
    (tmp_path / "in.png").write_bytes(b"abcdef")

    async def short(request: web.Request) -> web.Response:
        return web.Response(body=(await request.read())[:-1], content_type="text/plain")

    assert command(short, "--input", tmp_path / "in.bin", "--output", tmp_path / "out") == 1
    assert "5 bytes, the frame 6" in capsys.readouterr().err
    assert command(short, "--input", tmp_path / "in.png", "--output", tmp_path / "out.png") == 1
    assert "text/plain" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.png").exists()


def test_no_gateway(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.bin").write_bytes(b"abc")
    url = f"http://127.0.0.1:{free_port()}"
    arguments = ["--model-id", "m", "--input", str(tmp_path / "in.bin"), "--output", str(tmp_path / "out")]
    assert job.main(["--gateway", url, *arguments]) == 1
    assert capsys.readouterr().err == (
        f"gpu-byoc job: no gateway at {url}: connection refused. Start one with 'gpu-byoc livepeer -gateway "
        "-httpIngest', or say with --gateway where it is\n"
    )


@pytest.mark.parametrize("kind", ["bin", "png", "mp4"])
def test_what_is_missing_is_said_before_anything_is_sent(tmp_path: Path, kind: str) -> None:
    """In the same order for every kind: the input, the place of the output, the gateway."""
    source, target = tmp_path / f"in.{kind}", tmp_path / f"out.{kind}"
    url = f"http://127.0.0.1:{free_port()}"

    def run(output: Path) -> int:
        return job.main(["--gateway", url, "--model-id", "m", "--input", str(source), "--output", str(output)])

    with pytest.raises(ConfigError, match=rf"--input .*in\.{kind}: there is no such file"):
        run(tmp_path / "no" / "out" / target.name)
    if kind == "mp4":
        with clips.ClipWriter(source, FrameSpec(64, 48), Fraction(30)) as clip:
            clip.write(bytes(64 * 48 * 3))
    else:
        source.write_bytes(b"abc")
    with pytest.raises(ConfigError, match=rf"--output .*out\.{kind}: there is no directory .*no.out; make it first"):
        run(tmp_path / "no" / "out" / target.name)
    target.mkdir()
    with pytest.raises(ConfigError, match="that is a directory"):
        run(target)
    target.rmdir()
    assert run(target) == 1
    assert not list(tmp_path.glob("out*"))
    source.unlink()
    source.mkdir()
    with pytest.raises(ConfigError, match="is not a file"):
        run(target)


def test_files_that_cannot_be_worked_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.bin").write_bytes(b"")
    assert command(echo, "--input", tmp_path / "empty.bin", "--output", tmp_path / "out") == 1
    assert "is empty" in capsys.readouterr().err
    (tmp_path / "text.mp4").write_text("no video")
    assert command(echo, "--input", tmp_path / "text.mp4", "--output", tmp_path / "out.mp4") == 1
    assert "text.mp4" in capsys.readouterr().err
    (tmp_path / "in").write_bytes(b"abc")
    size = ("--width", 2, "--height", 2)
    assert command(echo, "--input", tmp_path / "in", "--output", tmp_path / "out", *size) == 1
    assert "no whole number of 2x2 rgb24 frames of 12 bytes" in capsys.readouterr().err


RAW_SIZE = ("--width", "1", "--height", "1", "--format", "gray")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "a.png", "--output", "a.jpg"], "image/png"),
        (["--input", "a.mp4", "--output", "a.avi"], "mp4"),
        (["--input", "a.png", "--output", "b.png", "--width", "2", "--height", "2"], "raw frames"),
        (["--input", "a", "--output", "b", "--width", "2"], "or neither"),
        (["--input", "a.gif", "--output", "b.gif"], "jpg, jpeg or png"),
        (["--input", "a", "--output", "b"], "of what kind"),
        (["--input", "a.rgb", "--output", "b.png"], "name it .rgb"),
        (["--input", "a.rgb", "--output", "b.mp4", "--width", "2", "--height", "2"], "name it .rgb"),
        (["--input", "a.bin", "--output", "b", "--model-id", "a\nb"], "--model-id"),
        (["--input", "a.bin", "--output", "b", "--model-id", " "], "--model-id"),
        (["--input", "a", "--output", "b", "--param", "boost"], "NAME=VALUE"),
        (["--input", "a", "--output", "b", "--param", "width=3"], "use --width"),
        (["--input", "a", "--output", "b", "--concurrency", "0"], "1 to 256"),
        (["--input", __file__, "--output", "b", "--gateway", "localhost:8935"], "URL like"),
        (["--input", __file__, "--output", "b", *RAW_SIZE, "--param", "a b=1"], "letters"),
    ],
)
def test_arguments_that_cannot_work(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job.main(["--model-id", "m", *arguments])


def test_ctrl_c_ends_the_job_on_its_way_and_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "in.bin").write_bytes(b"abc")
    arrived, dropped = asyncio.Event(), asyncio.Event()

    async def never(request: web.Request) -> web.Response:
        await request.read()
        arrived.set()
        try:
            await asyncio.Event().wait()
        finally:
            dropped.set()
        raise AssertionError("an event that nobody sets")

    async def run() -> tuple[int, str]:
        async with gateway(never) as url:
            arguments = ["--gateway", url, "--model-id", "m", "--input", "in.bin", "--output", "out"]
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", INTERRUPTIBLE, *arguments, cwd=tmp_path, stderr=asyncio.subprocess.PIPE
            )
            try:
                async with asyncio.timeout(30):
                    await arrived.wait()
                    process.send_signal(signal.SIGINT)
                    _, errors = await process.communicate()
                    await dropped.wait()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            assert process.returncode is not None
            return process.returncode, errors.decode()

    code, errors = asyncio.run(run())
    assert (code, errors) == (130, "gpu-byoc job: interrupted; out was not written\n")
    assert [path.name for path in tmp_path.iterdir()] == ["in.bin"]


# A shell gives a command with "&" an ignored SIGINT, and whoever runs these tests may be such a command.
INTERRUPTIBLE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from gpu_byoc.local import job
sys.exit(job.main(sys.argv[1:]))
"""


# --- the client


@in_loop
async def test_leaving_early_cancels_what_is_on_its_way() -> None:
    cancelled = 0
    started = asyncio.Semaphore(0)

    async def handler(request: web.Request) -> web.Response:
        nonlocal cancelled
        if await request.read() == b"0":
            return web.Response(body=b"0")
        started.release()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled += 1
        raise AssertionError("an event that nobody sets")

    def bodies() -> Iterator[tuple[int, bytes, str]]:
        for number in range(100):
            yield number, str(number).encode(), "text/plain"

    jobs = bodies()
    async with gateway(handler) as url, JobClient(url, "m", 4) as client:
        async with aclosing(in_order(client, jobs, 4)) as answers:
            async for number, answer in answers:
                assert (number, answer.body) == (0, b"0")
                for _ in range(3):
                    await asyncio.wait_for(started.acquire(), 10)
                break
        assert next(jobs)[0] == 4, "more than four jobs were taken"
        await client.send(b"0", "text/plain")  # the connections are usable
    assert cancelled == 3


@in_loop
async def test_a_gateway_that_breaks_off() -> None:
    async def handler(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with gateway(handler) as url, JobClient(url, "m", 1) as client:
        with pytest.raises(GatewayUnreachable, match="broke the job off"):
            await client.send(b"abc", "text/plain")


@in_loop
async def test_a_refusal_that_is_no_json_shows_its_text() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=404, text="what?")

    async with gateway(handler) as url, JobClient(url, "m", 1) as client:
        with pytest.raises(JobRefused, match=r"^HTTP 404: what\?$") as caught:
            await client.send(b"abc", "text/plain")
        assert caught.value.http_status == 404


VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters='"\\'), min_size=1)


@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9_-]*", fullmatch=True), VALUES, max_size=4))
def test_parameters_survive_the_content_type(params: dict[str, str]) -> None:
    message = Message()
    message["Content-Type"] = raw_type(FrameSpec(4, 2), params)
    geometry = {"width": "4", "height": "2", "format": "rgb24"}
    found = message.get_params(failobj=[])
    assert dict(found[1:]) == geometry | params


@pytest.mark.parametrize("params", [{"a;b": "1"}, {"a": "é"}, {"a": "\\"}, {"a": '"'}, {"a": "1\r\nX: 2"}, {"": "1"}])
def test_parameters_that_cannot_travel(params: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        with_params("image/png", params)


def test_tally() -> None:
    tally = Tally()
    assert tally.percentile(0.5) == 0
    for milliseconds in range(1, 101):
        metadata = METADATA | {"frames": 2, "compute_seconds": 0.5, "copy_seconds": "much", "queue_seconds": True}
        tally.add(Answer(b"", metadata, {}, milliseconds / 1e3, 1))
    assert (tally.percentile(0.5), tally.percentile(0.99)) == (0.050, 0.099)
    assert (tally.frames, tally.retries, tally.compute_seconds, tally.copy_seconds) == (200, 100, 50.0, 0.0)
    assert tally.where == "numpy on cpu"


def test_absurd_numbers_count_as_nothing() -> None:
    tally = Tally()
    for number in (10**400, -1, float("nan"), True, "1"):
        tally.add(Answer(b"", dict.fromkeys((*Tally.SUMS, "frames"), number), {}, 0.1, 0))
    assert (tally.frames, tally.compute_seconds, len(tally.latencies)) == (0, 0.0, 5)


# --- a real worker


def test_images_and_parameters_with_a_real_worker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (20, 30, 3), np.uint8)
    spec = FrameSpec(30, 20)
    (tmp_path / "in.png").write_bytes(images.encode(memoryview(pixels.data), spec, images.PNG))
    (tmp_path / "in.rgb").write_bytes(pixels.tobytes() * 3)
    tinted = pixels.copy()
    tinted[..., 1] = np.minimum(pixels[..., 1], 255 - 40) + 40
    port = free_port()
    with running_process("serve", "--backend", "numpy", "--host", "127.0.0.1", "--port", str(port)) as worker:
        worker.wait_for("listening")
        common = ["--gateway", f"http://127.0.0.1:{port}", "--model-id", "any", "--param", "boost=40"]
        files = ["--input", str(tmp_path / "in.png"), "--output", str(tmp_path / "out.png")]
        assert job.main([*common, *files]) == 0
        files = ["--input", str(tmp_path / "in.rgb"), "--output", str(tmp_path / "out.rgb")]
        assert job.main([*common, *files, "--width", "30", "--height", "20"]) == 0
        assert "3 frames in" in capsys.readouterr().out
        assert job.main([*common[:-1], "boost=400", *files]) == 1
        assert "boost" in capsys.readouterr().err
    out = np.zeros(spec.nbytes, np.uint8)
    images.decode_into((tmp_path / "out.png").read_bytes(), spec, memoryview(out.data), images.PNG)
    assert np.array_equal(out.reshape(spec.shape), tinted)
    assert (tmp_path / "out.rgb").read_bytes() == tinted.tobytes() * 3
