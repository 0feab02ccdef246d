"""What a caller cannot make a worker do with a stream, over real HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import signal
from itertools import pairwise
from typing import Any

import pytest

from gpu_byoc.config import RegistrationConfig, SecurityConfig
from gpu_byoc.core.cursor import Backoff
from gpu_byoc.errors import ChannelClosed
from gpu_byoc.media import sandbox
from gpu_byoc.processors.passthrough import Passthrough
from gpu_byoc.transport.trickle_client import Publisher, open_session
from tests.support.clips import TICKS, frames, live_stream
from tests.support.streams import Rig, beats, clip, publish, rig, watching
from tests.support.trickle import Wire, reply, scripted
from tests.support.workers import asynchronous

FIELDS = ("subscribe_url", "publish_url", "control_url", "events_url", "data_url")
SECRET = "c0ffee-4f2a9b"


def errors(viewer: Any) -> list[str]:
    return [event["event"]["error"] for event in viewer.events if event["event"]["type"] == "error"]


async def metric(r: Rig, line: str) -> bool:
    async with r.worker.session.get(r.worker.url + "/metrics") as answer:
        return line in (await answer.text()).splitlines()


# --- where it may connect to


@pytest.mark.parametrize("field", FIELDS)
@asynchronous
async def test_no_url_of_a_stream_leads_elsewhere(field: str) -> None:
    async with rig() as r:
        r.create("s")
        for url in ("http://169.254.169.254/latest/meta-data", "http://10.0.0.1/x", "http://[fe80::1]/x"):
            status, answer = await r.call("stream/start", r.urls("s") | {field: url})
            assert (status, answer["error"], answer["field"]) == (403, "origin_refused", field)
            assert answer["message"].startswith(f"{field}: http://")
        for url in (
            "file:///etc/passwd",
            "http://user@127.0.0.1/x",
            "concat:http://127.0.0.1/|x",
            "http://2130706433/",
        ):
            status, answer = await r.call("stream/start", r.urls("s") | {field: url})
            assert (status, answer["error"]) == (400, "bad_request")
            assert field in answer["message"]
        assert (await r.worker.get("/stream/status"))["active_streams"] == 0
        assert await metric(r, 'byoc_errors_total{type="origin_refused"} 3.0')


@asynchronous
async def test_only_listed_origins_if_there_is_a_list() -> None:
    """Also for a caller on this machine: what a user's request says about the channels overrides the orchestrator."""
    async with rig(security=SecurityConfig(allow_origins=("https://orch.test:8935",))) as r:
        status, answer = await r.call("stream/start", r.urls("s"))
        assert (status, answer["field"]) == (403, "subscribe_url")
        origin = r.base.removesuffix("/ai/trickle/")
        assert f"--allow-origin {origin}" in answer["message"]
    registration = RegistrationConfig(orch_url="https://orch.test:8935/", secret="hush")
    async with rig(registration=registration) as r:
        assert (await r.call("stream/start", r.urls("s")))[0] == 403


@asynchronous
async def test_a_listed_origin() -> None:
    async with scripted(_nothing) as elsewhere:
        allow = elsewhere.rsplit("/", 1)[0]
        async with rig(security=SecurityConfig(allow_origins=(allow,))) as r:
            status, _ = await r.call("stream/start", {"gateway_request_id": "s", "events_url": elsewhere})
            assert status == 200


async def _nothing(method: str, path: str, wire: Wire) -> None:
    await wire.send(reply(404, b"no"))


# --- how much it may send


@asynchronous
async def test_frames_beyond_the_pixel_rate_are_dropped_and_that_is_told() -> None:
    security = SecurityConfig(max_pixel_rate=64 * 48 * 5)  # ten frames at once, then five a second
    async with rig(Passthrough(), lossless=False, latency_budget=20.0, security=security) as r:
        r.create("s")
        async with watching(r, "s") as viewer:
            await r.call("stream/start", r.urls("s"))
            await publish(r, "s", clip(30, 1))
            await r.until_over()
        beat = beats(viewer)[-1]
        assert beat["dropped"]["pixel_rate"] >= 10
        assert beat["dropped"]["pixel_rate"] + len(frames(viewer.media)) == 30
        assert errors(viewer) == ["too_large"], "told once"
        assert await metric(r, 'byoc_errors_total{type="too_large"} 1.0')


@asynchronous
async def test_an_output_counts_when_it_is_the_larger_one() -> None:
    security = SecurityConfig(max_pixel_rate=64 * 48 * 40)
    async with rig(Passthrough(), lossless=False, latency_budget=20.0, security=security) as r:
        r.create("s")
        async with watching(r, "s") as viewer:
            await r.call("stream/start", r.urls("s") | {"params": {"width": 256, "height": 192}})
            await publish(r, "s", clip(30, 1))
            await r.until_over()
        assert beats(viewer)[-1]["dropped"]["pixel_rate"] >= 8


@asynchronous
async def test_pictures_beyond_the_limit() -> None:
    async with rig(Passthrough(), security=SecurityConfig(max_stream_pixels=64 * 47)) as r:
        r.create("s")
        status, answer = await r.call("stream/start", r.urls("s") | {"params": {"width": 64, "height": 48}})
        assert (status, answer["error"], answer["field"]) == (400, "bad_params", "width")
        assert "--max-stream-pixels" in answer["message"]
        async with watching(r, "s") as viewer:
            await r.call("stream/start", r.urls("s"))
            await publish(r, "s", clip(20, 2))
            await r.until_over()
        assert viewer.media == b""
        assert errors(viewer) == ["too_large"]
        assert beats(viewer)[-1]["problems"]["too_large"] == 2, "each keyframe is looked at"


@asynchronous
async def test_an_input_that_is_too_fast_is_read_more_slowly() -> None:
    source = clip(20, 2)
    mbit = sum(map(len, source)) * 8 / 1e6 / 2.2  # two seconds' worth of it pass at once
    async with rig(Passthrough(), security=SecurityConfig(max_input_mbit=mbit)) as r:
        r.create("s")
        async with watching(r, "s") as viewer:
            await r.call("stream/start", r.urls("s"))
            await publish(r, "s", source)
            await r.until_over()
        assert len(frames(viewer.media)) == 40, "nothing is lost by it"
        assert beats(viewer)[-1]["problems"]["input_rate"] >= 1
        assert errors(viewer) == ["too_large"]


@asynchronous
async def test_a_stream_that_has_lasted_long_enough() -> None:
    async with rig(Passthrough(), security=SecurityConfig(max_stream_seconds=0.3)) as r:
        r.create("s")
        async with watching(r, "s") as viewer:
            await r.call("stream/start", r.urls("s"))
            await publish(r, "s", clip(5, 1), close=False)
            await r.until_over()
        reason = next(e["event"]["reason"] for e in viewer.events if e["event"]["type"] == "stream_stopped")
        assert "--max-stream-seconds" in reason
        assert beats(viewer)[-1]["state"] == "ended"


# --- what is said of it


async def _nonsense(method: str, path: str, wire: Wire) -> None:
    await wire.send(f"HTTP/9 {path}\r\n\r\n".encode())


async def _full(method: str, path: str, wire: Wire) -> None:
    await wire.send(reply(500, f"no room in {path}, that is {SECRET}\n".encode()))


async def _moved(method: str, path: str, wire: Wire) -> None:
    await wire.send(reply(302, path.encode(), Location=f"http://127.0.0.1:1{path}"))


async def _full_later(method: str, path: str, wire: Wire) -> None:
    """One may publish there, but for the publishing."""
    if path.endswith("/next"):
        await wire.send(reply(200, b"0", Lp_Trickle_Latest=0))
    elif method == "GET":
        await wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nLp-Trickle-Seq: 0\r\n\r\n" + path.encode())
    else:
        await _full(method, path, wire)


@asynchronous
async def test_nothing_of_a_channels_url_reaches_a_log_an_event_or_an_answer(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams fail in the ways they know, and all that is logged is looked at, down to the libraries' debugging."""
    monkeypatch.setattr("gpu_byoc.worker.stream.PATIENCE", Backoff(first=0.01, cap=0.01, attempts=3))
    monkeypatch.setattr("gpu_byoc.worker.streamnews.LAST_SECONDS", 0.3)
    caplog.set_level(logging.DEBUG)
    said: list[str] = []
    async with contextlib.AsyncExitStack() as stack:
        r = await stack.enter_async_context(rig(Passthrough()))
        bad = [await stack.enter_async_context(scripted(each)) for each in (_nonsense, _full, _moved, _full_later)]
        for origin in (*bad, "http://127.0.0.1:1", r.base.rstrip("/")):
            for field in FIELDS:
                r.create("s")
                async with watching(r, "s") as viewer:
                    start = r.urls("s") | {field: f"{origin}/{SECRET}/{SECRET}-out"}
                    assert (await r.call("stream/start", start))[0] == 200
                    with contextlib.suppress(ChannelClosed):
                        await publish(r, "s", clip(5, 1))
                    said.append(json.dumps(await r.worker.get("/stream/status")))
                    said.append(json.dumps((await r.call("stream/stop", {"gateway_request_id": "s"}))[1]))
                    await r.until_over()
                said += [json.dumps(viewer.events), json.dumps(viewer.lines)]
        for url in ("10.0.0.1/{}", "169.254.169.254/{}", "127.0.0.1:1/x?{}", "{}@127.0.0.1/", "127.0.0.1/\\{}"):
            start = {"events_url": "http://" + url.format(SECRET)}
            said.append(json.dumps((await r.call("stream/start", start))[1]))
        async with r.worker.session.get(r.worker.url + "/metrics") as metrics:
            said.append(await metrics.text())
    for what in ("subscribe_url at http://127.0.0.1", "publish_url at http://127.0.0.1", "/***: no luck 3 times"):
        assert what in caplog.text, "who it was is said"
    for error in ("channel_failed", "channel_missing"):
        assert any(error in each for each in said)
    logged = caplog.text + "".join(str(record.exc_info) + repr(record.args) for record in caplog.records)
    assert SECRET not in logged
    assert all(SECRET not in each for each in said)


# --- decoding elsewhere


def child_of(r: Rig, name: str) -> int:
    cell = r.stream(name).pump._intake._reader._cell  # type: ignore[attr-defined]
    pid: int = cell.process.pid
    return pid


@asynchronous
async def test_a_stream_whose_decoder_is_killed_goes_on_with_its_next_keyframe() -> None:
    async with rig(Passthrough(), security=SecurityConfig(sandbox_decode=True)) as r:
        for name in ("s", "t"):
            r.create(name)
        async with watching(r, "s") as viewer, watching(r, "t") as other, open_session() as session:
            for name in ("s", "t"):
                await r.call("stream/start", r.urls(name))
            async with Publisher(session, r.base + "s", "video/MP2T", delete=True) as publisher:
                await publisher.send(live_stream(10, gop=10))
                await r.worker.until(lambda: r.stream("s").session.frames_in == 10)
                before = child_of(r, "s")
                os.kill(before, signal.SIGKILL)
                await publisher.send(live_stream(10, gop=10, first=10 * TICKS))
                await r.worker.until(lambda: r.stream("s").session.problems["decoder"] == 1)
                await publisher.send(live_stream(10, gop=10, first=20 * TICKS))
                await r.worker.until(lambda: r.stream("s").segments_in == 3)
            await publish(r, "t", clip(20, 2))
            await r.until_over()
        shown = [frame.pts or 0 for frame in frames(viewer.media)]
        assert len(shown) in (20, 30)
        assert all(early < late for early, late in pairwise(shown))
        assert errors(viewer) == ["decoder_failed"]
        assert beats(viewer)[-1]["state"] == "ended"
        assert len(frames(other.media)) == 40, "the other one did not notice"
        assert errors(other) == []
        assert await metric(r, 'byoc_errors_total{type="decoder_failed"} 1.0')


@asynchronous
async def test_without_a_process_to_decode_it_a_stream_fails_and_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with rig(Passthrough(), security=SecurityConfig(sandbox_decode=True)) as r:
        for name in "ab":
            r.create(name)
        await r.call("stream/start", r.urls("b"))
        await publish(r, "b", clip(5, 1), close=False)
        await r.worker.until(lambda: r.stream("b").session.frames_in == 5)

        def exhausted(*_: object) -> None:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

        monkeypatch.setattr(sandbox, "_spawn", exhausted)
        async with watching(r, "a") as viewer:
            await r.call("stream/start", r.urls("a"))
            await r.worker.until(lambda: len(r.worker.worker.streams) == 1)
            await r.worker.until(lambda: bool(beats(viewer)) and beats(viewer)[-1]["state"] == "failed")
        (reason,) = [each["event"]["reason"] for each in viewer.events if each["event"]["type"] == "stream_stopped"]
        assert reason.endswith("Resource temporarily unavailable")
        assert "internal error" not in caplog.text
        assert "Traceback" not in caplog.text
        await publish(r, "b", clip(5, 2))
        await r.until_over()
        assert await metric(r, 'byoc_streams_ended_total{state="failed"} 1.0')
        assert await metric(r, 'byoc_streams_ended_total{state="ended"} 1.0')


@asynchronous
async def test_a_stream_is_stopped_while_its_decoder_hangs() -> None:
    async with rig(Passthrough(), security=SecurityConfig(sandbox_decode=True)) as r:
        r.create("s")
        await r.call("stream/start", r.urls("s"))
        await publish(r, "s", clip(5, 1), close=False)
        await r.worker.until(lambda: r.stream("s").session.frames_in == 5)
        os.kill(child_of(r, "s"), signal.SIGSTOP)
        await publish(r, "s", clip(5, 1), close=False)
        task = next(iter(r.worker.worker.streams._tasks))
        task.cancel()
        async with asyncio.timeout(20):
            await asyncio.wait([task])


@asynchronous
async def test_a_stream_with_mpeg_audio_in_the_sandbox() -> None:
    async with rig(Passthrough(), security=SecurityConfig(sandbox_decode=True)) as r:
        r.create("s")
        async with watching(r, "s") as viewer:
            await r.call("stream/start", r.urls("s"))
            await publish(r, "s", clip(25, 1, audio="mp2"))
            await r.until_over()
        assert len(frames(viewer.media)) == 25
        assert beats(viewer)[-1]["problems"] == {}
        assert b"Opus" in viewer.media, "in its PMT"
