"""The network's side of a live stream: against a real worker, against one that cheats, and as a command."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gpu_byoc.errors import ConfigError, UnsupportedMedia
from gpu_byoc.local import stream, streamclient, streamclip, streamrig
from gpu_byoc.local.children import pick_ports
from gpu_byoc.local.streamclient import CHANNELS, Figures, LiveClient, Plan, quantile
from gpu_byoc.local.streamclip import START, Clip, due
from gpu_byoc.media import clips, images
from gpu_byoc.media.audio import AudioPacket
from gpu_byoc.media.demux import Demuxer, Picture
from gpu_byoc.media.encode import CodedPicture
from gpu_byoc.media.mux import Segmenter
from gpu_byoc.processors.green_tint import GreenTint
from gpu_byoc.transport.listen import bind, port_of, serve
from gpu_byoc.transport.trickle_client import Publisher, Subscriber, open_session
from gpu_byoc.transport.trickle_server import TrickleServer, serving
from tests.support.clips import REAL_CLIP, live_stream, packets, remuxed
from tests.support.workers import asynchronous, running

FRAME = 3600  # ticks at 25 fps


def small(tmp_path: Path, count: int = 40, **options: Any) -> Clip:
    path = tmp_path / "small.ts"
    path.write_bytes(live_stream(count, **options))
    return streamclip.load(path)


def pictures(clip: Clip, seconds: float | None = None) -> list[CodedPicture]:
    return [unit for unit in clip.play(seconds) if isinstance(unit, CodedPicture)]


# --- a file as a source


def test_a_clip_has_every_picture_and_sound_of_its_file() -> None:
    clip = streamclip.load(REAL_CLIP)
    theirs = packets(remuxed())
    assert [unit.data for unit in clip.units if isinstance(unit, CodedPicture)] == [p.data for p in theirs if p.video]
    sound = b"".join(unit.data for unit in clip.units if isinstance(unit, AudioPacket))
    assert b"".join(p.data for p in theirs if not p.video).startswith(sound)
    assert (clip.pictures, clip.seconds, clip.left_out) == (132, 132 / 25, None)
    assert clip.audio is not None
    assert (clip.audio.codec, clip.audio.sample_rate) == ("aac", 48_000)
    assert clip.reorder == 2 * FRAME, "it has B-frames"
    assert min(map(due, clip.units)) == 0


@pytest.mark.parametrize("b_frames", [0, 2])
def test_time_stamps_run_on_from_round_to_round(tmp_path: Path, b_frames: int) -> None:
    clip = small(tmp_path, 20, audio="aac", b_frames=b_frames, gop=20)
    units = list(clip.play(2.0))
    shown = [unit for unit in units if isinstance(unit, CodedPicture)]
    assert len(shown) == 50
    assert [b.dts - a.dts for a, b in pairwise(shown)] == [FRAME] * 49
    assert sorted(unit.pts for unit in shown)[:40] == [min(u.pts for u in shown) + n * FRAME for n in range(40)]
    sound = [unit.pts for unit in units if isinstance(unit, AudioPacket)]
    assert sound == sorted(set(sound))
    assert max(b - a for a, b in pairwise(sound)) <= 2 * 1920, "no gap where a round begins"
    assert min(map(due, units)) == START
    assert max(map(due, units)) < START + 180_000
    once = list(clip.play())
    assert len(once) == len(clip.units)
    assert (clip.reorder > 0) == bool(b_frames)


def test_what_cannot_be_a_live_stream(tmp_path: Path) -> None:
    other = tmp_path / "other.mkv"
    with av.open(str(other), "w") as out:
        video: Any = out.add_stream("mpeg4", 25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        out.mux(video.encode(av.VideoFrame(64, 48, "yuv420p")))
        out.mux(video.encode(None))
    with pytest.raises(UnsupportedMedia, match="has mpeg4"):
        streamclip.load(other)
    (tmp_path / "text.mp4").write_text("not a video" * 100)
    with pytest.raises(UnsupportedMedia, match="cannot be read as a video"):
        streamclip.load(tmp_path / "text.mp4")
    with pytest.raises(OSError, match="No such file"):
        streamclip.load(tmp_path / "none.mp4")


def test_sound_that_is_not_carried_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pcm.mov"
    with av.open(str(REAL_CLIP)) as source, av.open(str(path), "w") as out:
        video = out.add_stream_from_template(source.streams.video[0])
        sound: Any = out.add_stream("pcm_s16le", 48_000)
        sound.layout = "stereo"
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = video
                out.mux(packet)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 9600), np.int16), "s16", "stereo")
        silence.sample_rate, silence.pts, silence.time_base = 48_000, 0, Fraction(1, 48_000)
        out.mux(sound.encode(silence))
    clip = streamclip.load(path)
    assert (clip.pictures, clip.audio, clip.left_out) == (132, None, "pcm_s16le")


@given(st.lists(st.floats(0, 1e3), min_size=1), st.floats(0.01, 1))
def test_quantile(values: list[float], part: float) -> None:
    found = quantile(values, part)
    assert sum(value <= found for value in values) >= part * len(values)
    assert sum(value < found for value in values) < part * len(values)


def test_figures() -> None:
    figures = Figures(published=dict.fromkeys(range(10), 1.0), received=dict.fromkeys(range(7), 1.5))
    figures.dropped = Counter(late=2)
    assert (figures.lost, figures.dropped_frames) == (1, 2)
    assert figures.latencies() == [0.5] * 7


@pytest.mark.parametrize(("seconds", "words"), [(0.002, "too short to say"), (2.0, "4.00 ms of CPU a frame, at 25.0")])
def test_cpu_is_only_told_where_there_was_time_to_measure_it(tmp_path: Path, seconds: float, words: str) -> None:
    play = streamrig.Play(streamrig.Rig("", "", None, None), Plan(small(tmp_path)), 1)
    play.seconds, play.cpu_frames, play.cpu_seconds = seconds, 50, 0.2
    console = Console(file=io.StringIO(), width=200)
    assert stream._report(console, play) == []
    assert words in console.file.getvalue()  # type: ignore[attr-defined]


# --- one stream


@asynchronous
async def test_every_picture_of_a_real_worker_is_accounted_for(tmp_path: Path) -> None:
    clip = small(tmp_path, 20, gop=10, audio="aac")
    server = TrickleServer(autocreate=True)
    calls: list[str] = []
    async with (
        serving(server, base="/ai/trickle/") as (url, _),
        running(GreenTint(), lossless=True) as worker,
        open_session() as http,
    ):
        record = (tmp_path / "out.ts").open("w+b")
        with record:
            client = LiveClient(
                http,
                "s",
                url,
                worker.url,
                Plan(clip, real_time=False, seconds=12.0),
                record=record,
                on_first=lambda: calls.append("first"),
                on_last=lambda: calls.append("last"),
            )
            await client.run()
            await worker.until(lambda: len(worker.worker.streams) == 0)
        assert worker.free() == 0, "every slot came back"
        assert not server.hub.channel("s")
        assert not server.hub.channel("s-out")
    figures = client.figures
    assert client.error is None
    assert len(figures.published) == 300
    assert sorted(figures.received) == sorted(figures.published)
    assert (figures.lost, figures.unknown, figures.state) == (0, 0, "ended")
    assert figures.compute_seconds > 0
    assert all(0 < latency < 30 for latency in figures.latencies())
    assert calls == ["first", "last"]
    seen = packets((tmp_path / "out.ts").read_bytes())
    assert [p.pts for p in seen if p.video] == sorted(figures.published)
    assert [p.pts for p in seen if not p.video] == [u.pts for u in clip.play(12.0) if isinstance(u, AudioPacket)]


@asynchronous
async def test_pictures_are_published_when_they_are_due(tmp_path: Path) -> None:
    clip = small(tmp_path, 20, gop=20)
    server = TrickleServer(autocreate=True)
    async with (
        serving(server) as (url, _),
        running(GreenTint(), lossless=True) as worker,
        open_session() as http,
    ):
        client = LiveClient(http, "s", url, worker.url, Plan(clip))
        await client.run()
    assert client.error is None
    figures = client.figures
    began = min(figures.published.values())
    for pts, at in figures.published.items():
        assert at - began >= (pts - START) / 90_000 - 0.03, "never early, but for what the first one was late"
    assert len(figures.received) == 20


@asynchronous
async def test_leaving_early_ends_the_stream_and_its_channels(tmp_path: Path) -> None:
    clip = small(tmp_path, 20, gop=20)
    server = TrickleServer(autocreate=True)
    first = asyncio.Event()
    async with serving(server) as (url, _), running(GreenTint()) as worker, open_session() as http:
        client = LiveClient(http, "s", url, worker.url, Plan(clip, seconds=60.0), on_first=first.set)
        task = asyncio.create_task(client.run())
        await asyncio.wait_for(first.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await worker.until(lambda: len(worker.worker.streams) == 0)
        for suffix, _ in CHANNELS.values():
            assert not server.hub.channel("s" + suffix)
        assert worker.free() == 0


# --- a worker that cheats

Change = Callable[[int], int | None]
"""From a picture's number to how often it is handed on; None breaks the stream off."""


@dataclass
class Stub:
    """Hands coded pictures on as they are, and says what it is told to say."""

    change: Change = lambda number: 1
    last: dict[str, Any] = field(default_factory=lambda: {"state": "ended"})
    dropped: dict[str, int] = field(default_factory=dict)
    refuses: bool = False
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self, request: web.Request) -> web.Response:
        if self.refuses:
            return web.json_response({"message": "nobody is at home"}, status=503)
        self.tasks.append(asyncio.create_task(self._stream(await request.json())))
        return web.json_response({"status": "success"})

    async def _stream(self, urls: dict[str, str]) -> None:
        demuxer, segmenter, number, segment = Demuxer(), Segmenter(), 0, None
        async with (
            open_session() as http,
            Subscriber(http, urls["subscribe_url"]) as segments,
            Publisher(http, urls["publish_url"], "video/MP2T") as publisher,
            Publisher(http, urls["events_url"], "application/json") as events,
        ):
            await events.send(self._beat({"state": "running"}))
            async for incoming in segments:
                data = await incoming.read()
                for each in [*demuxer.feed(data), *demuxer.end_segment()]:
                    if not isinstance(each, Picture):
                        continue
                    count = self.change(number)
                    number += 1
                    if count is None:
                        await events.send(self._beat(self.last))
                        return
                    assert each.pts is not None
                    for _ in range(count):
                        coded = CodedPicture(bytes(each.data), each.pts, each.pts, each.key)
                        for piece in segmenter.video(coded):
                            if piece.starts:
                                if segment is not None:
                                    await segment.close()
                                segment = await publisher.open()
                            assert segment is not None
                            await segment.write(piece.data)
            if segment is not None:
                await segment.close()
            await events.send(self._beat(self.last))

    def _beat(self, more: dict[str, Any]) -> bytes:
        said = {"type": "heartbeat", "dropped": self.dropped, "problems": {}}
        row = {"second": 1, "compute_seconds": 0.5, "total_compute_seconds": 1.5}
        error = {"event": {"type": "error", "message": "it broke"}, "queue_event_type": "ai_stream_events"}
        lines = [error] if more["state"] == "failed" else []
        return b"\n".join(json.dumps(line).encode() for line in [*lines, {"event": said | more | {"compute": row}}])


@asynccontextmanager
async def cheated(stub: Stub, clip: Clip, autocreate: bool = True) -> AsyncIterator[LiveClient]:
    """A stream with that worker, over."""
    app = web.Application()
    app.router.add_post("/stream/start", stub.start)
    sock = bind("127.0.0.1", 0)
    runner = await serve(app, sock, shutdown=1.0)
    server = TrickleServer(autocreate=autocreate)
    try:
        async with serving(server) as (url, _), open_session() as http:
            worker = f"http://127.0.0.1:{port_of(sock)}"
            client = LiveClient(http, "s", url, worker, Plan(clip, real_time=False, seconds=8.0))
            await client.run()
            assert not server.hub.channel("s-events"), "its channels are left"
            await asyncio.gather(*stub.tasks)
        yield client
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("stub", "words"),
    [
        (Stub(), []),
        (Stub(lambda n: n % 10 != 3), ["20 frames lost, and not counted as dropped"]),
        (Stub(lambda n: n % 10 != 3, dropped={"late": 20}), []),
        (Stub(dropped={"late": 3}), ["3 frames came out and are counted as dropped"]),
        (Stub(lambda n: 1 + (n == 70)), ["1 frame came out that never went in, or twice"]),
        (
            Stub(lambda n: None if n == 70 else 1, {"state": "failed"}),
            ["s failed: it broke", "130 frames published that the worker never took"],
        ),
        (
            Stub(lambda n: None if n == 70 else 1),
            ["before the end of its input", "that the worker never took: it had ended"],
        ),
        (Stub(refuses=True), ["did not start s: HTTP 503: nobody is at home"]),
    ],
    ids=["honest", "loses", "drops", "counts too much", "doubles", "fails", "ends early", "refuses"],
)
def test_what_goes_wrong_is_told(tmp_path: Path, stub: Stub, words: list[str]) -> None:
    @asynchronous
    async def go() -> None:
        async with cheated(stub, small(tmp_path, 50, gop=50)) as client:
            lines = stream._wrong(1, client)
            assert len(lines) == len(words), lines
            for line, word in zip(lines, words, strict=True):
                assert word in line

    go()


def test_only_the_end_of_what_was_published_was_never_taken() -> None:
    """Published in the order of decoding: with B-frames the last by time is not the last to be taken."""
    figures = streamclient.Figures(published=dict.fromkeys((0, 3, 1, 2), 0.0), received={0: 1.0, 3: 1.0})
    assert (figures.lost, figures.untaken) == (2, 0), "it is still running"
    figures.state = "ended"
    assert (figures.lost, figures.untaken) == (2, 2)
    figures.received = {0: 1.0, 1: 1.0}
    assert (figures.lost, figures.untaken) == (2, 1)
    figures.dropped["stopped"] = 2
    assert (figures.lost, figures.untaken) == (0, 0)


def test_a_worker_that_brings_nothing_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamclient, "STALL_SECONDS", 0.3)

    @asynchronous
    async def go() -> None:
        async with cheated(Stub(lambda n: 0), small(tmp_path, 50, gop=50)) as client:
            assert client.error == "nothing of s came out for 0.3 s"

    go()


def test_a_trickle_server_that_creates_no_channels(tmp_path: Path) -> None:
    @asynchronous
    async def go() -> None:
        async with cheated(Stub(), small(tmp_path), autocreate=False) as client:
            assert client.error is not None
            assert "start it with --autocreate" in client.error

    go()


# --- the command


@contextmanager
def started(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command with ``directory`` as its working directory, and a folder of its own for temporary files."""
    (directory / "tmp").mkdir()
    process = subprocess.Popen(
        (sys.executable, "-u", "-m", "gpu_byoc", "stream", "--backend", "numpy", *arguments),
        cwd=directory,
        env={**os.environ, "TMPDIR": str(directory / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_the_whole_of_it(tmp_path: Path) -> None:
    with started(tmp_path, "--speed", "max", "--streams", "2") as process:
        said, _ = process.communicate(timeout=55)
    assert process.returncode == 0, said
    rows = [line.split() for line in said.splitlines() if line.split()[:2] in (["1", "ended"], ["2", "ended"])]
    assert [row[:5] for row in rows] == [[number, "ended", "132", "132", "0"] for number in ("1", "2")]
    assert "ms of CPU a frame" in said
    assert "\x1b" not in said, "colours in a pipe"
    assert not list((tmp_path / "tmp").iterdir()), "temporary files are left"
    assert sorted(path.name for path in (tmp_path / "live-out").iterdir()) == ["green-tint.mp4", "green-tint.png"]
    video = tmp_path / "live-out" / "green-tint.mp4"
    assert clips.probe(video).frames == 132
    with av.open(str(video)) as came, av.open(str(REAL_CLIP)) as went:
        assert [each.codec_context.name for each in came.streams] == ["h264", "aac"]
        sounds = [[bytes(p) for p in each.demux(audio=0) if p.size] for each in (came, went)]
        assert len(sounds[0]) >= 247
        assert set(sounds[0]) <= set(sounds[1]), "the sound is not the clip's"
    data = (tmp_path / "live-out" / "green-tint.png").read_bytes()
    spec = images.probe(data, images.PNG, 1 << 24)
    out = np.zeros(spec.nbytes, np.uint8)
    images.decode_into(data, spec, out.data, images.PNG)
    picture = out.reshape(spec.shape).astype(int)
    before, after = picture[8:188], picture[196:376]  # half of 360 rows each
    assert after[..., 1].mean() - before[..., 1].mean() > 30
    assert abs(after[..., 0] - before[..., 0]).mean() < 8, "these are not the same frames"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, number: int, code: int) -> None:
    with started(tmp_path, "--seconds", "60") as process:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if "1 stream of 60.0 s, in real time" in line:
                break
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) == 3, said  # a trickle server, a worker, and what answers for the worker
        worker = next(child for child in family if "serve" in child.cmdline())
        until = time.monotonic() + 20
        while worker.num_threads() < 5 and time.monotonic() < until:  # a stream's threads: it is being played
            time.sleep(0.01)
        process.send_signal(number)
        said, _ = process.communicate(timeout=30)
        assert process.returncode == code, said
        assert "interrupted" in said
        assert "Traceback" not in said
        assert not [child for child in family if child.is_running()]
    assert not list((tmp_path / "tmp").iterdir()), "temporary files are left"
    assert not list((tmp_path / "live-out").iterdir()), "half a result is left"


def test_a_worker_that_cannot_start_is_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stream.main(["--backend", "abacus", "--output", str(tmp_path / "o.mp4")]) == 1
    said = capsys.readouterr().err
    assert "the worker ended with exit status 2" in said
    assert "abacus" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--streams", "0"], "--streams must be from 1"),
        (["--seconds", "-1"], "--seconds must be above 0"),
        (["--seconds", "nan"], "--seconds must be above 0"),
        (["--output", "x.png"], "written as mp4"),
        (["--input", "nothere.mp4"], "there is no such file"),
        (["--worker", "localhost:8000"], "must be a URL"),
    ],
)
def test_arguments_that_cannot_work(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        stream.main(arguments)


def test_nobody_at_a_given_url(tmp_path: Path) -> None:
    (port,) = pick_ports([0])
    with pytest.raises(ConfigError, match=f"--trickle: nobody answers at http://127.0.0.1:{port}"):
        stream.main(["--trickle", f"http://127.0.0.1:{port}", "--output", str(tmp_path / "o.mp4")])
