"""What the network expects of a worker's streams, by the numbers of its conformance list (25 to 38)."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest

from gpu_byoc.core.trickle import NEXT
from gpu_byoc.processors.passthrough import Passthrough
from gpu_byoc.transport.trickle_client import Subscriber, open_session
from tests.support.clips import CLOCK, frames, live_stream, packets
from tests.support.streams import Rig, beats, clip, publish, rig, watching
from tests.support.workers import asynchronous, running

PREFIXES = ["stream", "api/stream"]
JSON = "application/json"


async def said(r: Rig, path: str, body: bytes = b"", kind: str | None = JSON, **named: str) -> tuple[int, Any, Any]:
    headers = {name.replace("_", "-"): value for name, value in named.items()} | (
        {"Content-Type": kind} if kind else {}
    )
    async with r.worker.session.post(f"{r.worker.url}/{path}", data=body, headers=headers) as answer:
        return answer.status, await answer.json(), answer.headers


@asynchronous
async def test_line_25_a_start_is_answered_and_all_five_channels_are_used() -> None:
    async with rig(Passthrough()) as r:
        r.create("s")
        status, answer = await r.call("stream/start", r.urls("s") | {"params": {}})
        assert (status, answer) == (
            200,
            {
                "status": "success",
                "message": "Stream started successfully",
                "request_id": "s",
                "current_state": "OK",
            },
        )
        hub = r.server.hub
        channels = {suffix: hub.channel("s" + suffix) for suffix in ("", "-out", "-control", "-events", "-data")}

        def used() -> bool:
            written = [channels[suffix] for suffix in ("-out", "-events", "-data")]
            read = [channels[suffix] for suffix in ("", "-control")]
            return all(each and any(s.publishers for s in each.segments) for each in written) and all(
                each and each.find(NEXT) in hub._waiting for each in read
            )

        await r.worker.until(used)


@asynchronous
async def test_line_26_both_prefixes_behave_the_same() -> None:
    async with rig(max_streams=1) as r:
        r.create("s")
        answers = []
        for prefix in PREFIXES:
            calls: list[tuple[str, bytes, str]] = [
                ("params", b'{"boost": 1}', JSON),
                ("stop", b"", JSON),
                ("start", b"{", JSON),
                ("start", b"{}", "text/plain"),
                ("start", json.dumps(r.urls("s") | {"params": {"boost": 5}}).encode(), JSON),
                ("start", json.dumps(r.urls("t")).encode(), JSON),
                ("params", b'{"boost": 7}', JSON),
                ("update", b'{"boost": 8}', JSON),
                ("params", b'{"boost": -1}', JSON),
                ("stop", b"", JSON),
            ]
            answers.append([(await said(r, f"{prefix}/{what}", body, kind))[:2] for what, body, kind in calls])
            await r.until_over()
        assert answers[0] == answers[1]
        assert [status for status, _ in answers[0]] == [400, 400, 400, 400, 200, 503, 200, 200, 422, 200]
        assert all("current_state" in answer for _, answer in answers[0])
        assert (await r.call("live-video-to-video", r.urls("s")))[0] == 200
        for path in ("/stream/status", "/api/stream/status"):
            status = await r.worker.get(path)
            assert (status["state"], status["client_active"], status["client_running"]) == ("OK", True, True)
            assert status["current_params"] == {"gateway_request_id": "s"}
            assert set(status["fps"]) == {"ingress_video_fps", "egress_video_fps"}


@asynchronous
async def test_streams_are_addressed_by_header_by_body_or_as_the_only_one() -> None:
    async with rig(max_streams=3) as r:
        for name in "abc":
            r.create(name)
            assert (await said(r, "stream/start", json.dumps(r.urls("x") | r.urls(name)).encode()))[0] == 200
        which = "which stream? X-Stream-Id or gateway_request_id is one of: a, b, c"
        for path, body in (("stream/stop", b""), ("api/stream/params", b'{"boost": 3}')):
            status, answer, _ = await said(r, path, body)
            assert (status, answer["message"]) == (400, which)
        assert (await said(r, "stream/params", b'{"boost": 1}', X_Stream_Id="a"))[0] == 200
        assert (await said(r, "stream/params", b'{"boost": 2, "gateway_request_id": "b"}'))[0] == 200
        assert (await said(r, "stream/params", b'{"boost": 3}', X_Stream_Id="d"))[0] == 400
        assert [r.stream(name).params.processor.boost for name in "abc"][:2] == [1, 2]
        assert (await r.worker.get("/stream/status?gateway_request_id=b"))["stream"]["stream_id"] == "b"
        assert "stream" not in await r.worker.get("/stream/status")
        assert (await said(r, "stream/stop", b'{"gateway_request_id": "b"}', X_Stream_Id="a"))[0] == 200
        assert (await said(r, "stream/stop", b'{"gateway_request_id": "c"}'))[0] == 200
        assert (await said(r, "stream/stop"))[0] == 200
        await r.until_over()


@asynchronous
async def test_line_27_a_start_beyond_the_limit_is_503_and_disturbs_nobody() -> None:
    async with rig(Passthrough(), max_streams=1) as r:
        r.create("s")
        async with watching(r, "s") as viewer:
            await r.call("stream/start", r.urls("s"))
            for body in (r.urls("t"), r.urls("s"), {"gateway_request_id": 5}, r.urls("t") | {"params": {"width": 1}}):
                status, answer, headers = await said(r, "stream/start", json.dumps(body).encode())
                if body == r.urls("t"):
                    assert (status, answer["error"], int(headers["Retry-After"]) > 0) == (503, "all_busy", True)
                else:
                    assert status == 400
            await publish(r, "s", clip(10, 2))
            await r.until_over()
        assert len(frames(viewer.media)) == 20


@asynchronous
async def test_line_28_parameters_of_a_start() -> None:
    async with rig() as r:
        bad = [{"width": 64}, {"height": 64}, {"width": 0, "height": 4}, {"width": "x", "height": 4}]
        bad += [{"max_framerate": 61}, {"max_framerate": 0}, {"detect_out_resolution": "maybe"}]
        for params in [*bad, [], "x"]:
            status, answer = await r.call("stream/start", {"gateway_request_id": "s", "params": params})
            assert (status, answer["error"]) == (400, "bad_params"), params
        good = [None, {}, {"width": "64", "height": 48}, {"max_framerate": "60"}, {"detect_out_resolution": "NO"}]
        for params in good:
            status, _ = await r.call("stream/start", {"gateway_request_id": "s", "params": params, "more": {"a": 1}})
            assert status == 200, params
            assert (await r.call("stream/stop"))[0] == 200
            await r.until_over()


@asynchronous
async def test_line_30_a_stop_takes_any_body_and_happens_once() -> None:
    async with rig() as r:
        bodies: list[tuple[bytes, str | None]] = [
            (b"", None),
            (b"a reason", "text/plain"),
            (b"[1]", JSON),
            (b"{", JSON),
        ]
        for body, kind in bodies:
            assert (await said(r, "stream/start", b'{"gateway_request_id": "s"}'))[0] == 200
            status, answer, _ = await said(r, "stream/stop", body, kind)
            assert (status, answer["message"]) == (200, "Stream stopped successfully")
            status, answer, _ = await said(r, "stream/stop", body, kind)
            assert (status, answer["message"]) == (400, "No active stream to stop")


@asynchronous
async def test_line_31_health_follows_a_stream() -> None:
    async with rig(Passthrough()) as r:
        r.create("s")
        assert await r.worker.get("/health") == {"status": "IDLE"}
        await r.call("stream/start", r.urls("s"))
        assert await r.worker.get("/health") == {"status": "OK"}
        await publish(r, "s", clip(10, 1))
        await r.until_over()
        await r.worker.idle()
        assert await r.worker.get("/health") == {"status": "IDLE"}


@asynchronous
async def test_line_33_and_38_heartbeats_and_lines_come_each_second_also_while_nothing_else_does() -> None:
    async with rig(Passthrough()) as r, open_session() as session:
        r.create("s")
        loop, began = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        await r.call("stream/start", r.urls("s"))
        async with (
            Subscriber(session, r.base + "s-events", start=0, every=True) as events,
            Subscriber(session, r.base + "s-data", start=0, every=True) as data,
        ):
            first = json.loads(await (await anext(events)).read())
            took = loop.time() - began
            second = json.loads(await (await anext(events)).read())
            lines = [await (await anext(data)).read() for _ in range(2)]
        assert first["queue_event_type"] == second["queue_event_type"] == "stream_heartbeat"
        assert first["event"]["type"] == "heartbeat"
        assert took < 1
        assert 500 < second["event"]["timestamp"] - first["event"]["timestamp"] < 10_000
        for line in lines:
            assert line.endswith(b"\n")
            assert json.loads(line)["stream_id"] == "s"


@pytest.mark.parametrize("gone", ["-control", ""])
@asynchronous
async def test_line_35_without_its_control_channel_or_input_a_stream_ends(gone: str) -> None:
    async with rig(Passthrough()) as r:
        r.create("s")
        r.delete("s" + gone)
        async with watching(r, "s") as viewer:
            await r.call("stream/start", r.urls("s"))
            await r.until_over()
        assert await r.worker.get("/health") == {"status": "IDLE"}
        assert viewer.kinds()[-2:] == ["stream_stopped", "heartbeat"]
        assert (beats(viewer)[-1]["state"] == "ended") is bool(gone)


@asynchronous
async def test_line_36_the_form_of_the_output() -> None:
    async with rig(Passthrough()) as r:
        r.create("s")
        async with watching(r, "s") as viewer:
            await r.call("stream/start", r.urls("s"))
            await publish(r, "s", [live_stream(150, gop=25, b_frames=2, audio="mp2", first=CLOCK)])
            await r.until_over()
        pictures = [[each for each in packets(segment) if each.video] for segment in viewer.segments]
        assert all(each.pts == each.dts for each in itertools.chain(*pictures)), "no B-frames"
        assert all(segment[0].key for segment in pictures)
        starts = [segment[0].pts for segment in pictures]
        assert [round((b - a) / CLOCK) for a, b in itertools.pairwise(starts)] == [2, 2]
        assert sum(len(frames(segment)) for segment in viewer.segments) == 150, "each segment plays alone"
        assert b"Opus" in viewer.segments[-1], "the registration of Opus in the PMT"
        assert any(not each.video for each in packets(viewer.segments[-1]))


@asynchronous
async def test_line_37_the_size_and_rate_of_other_workers_on_request() -> None:
    params = {"width": 512, "height": 512, "max_framerate": 24}
    async with rig(Passthrough()) as r:
        r.create("s")
        async with watching(r, "s") as viewer:
            await r.call("stream/start", r.urls("s") | {"params": params})
            await publish(r, "s", clip(25, 1, size=(1280, 720)))
            await r.until_over()
        shown = frames(viewer.media)
        assert {(each.width, each.height) for each in shown} == {(512, 512)}
        assert len(shown) == 24


@asynchronous
@pytest.mark.parametrize("source", [{"video": "mpeg2video"}, {"video": "mpeg2video", "audio": "aac"}])
async def test_an_input_without_a_video_that_is_known_is_told(source: dict[str, str]) -> None:
    async with rig(Passthrough()) as r:
        r.create("s")
        async with watching(r, "s") as viewer:
            await r.call("stream/start", r.urls("s"))
            await publish(r, "s", [live_stream(10, **source)])  # type: ignore[arg-type]
            await r.until_over()
        errors = [each["event"] for each in viewer.events if each["event"]["type"] == "error"]
        assert [each["error"] for each in errors] == ["unsupported_media_type"]
        assert "no H.264 or HEVC video" in errors[0]["message"]
        assert beats(viewer)[-1]["problems"]["no_video"] > 0


@asynchronous
async def test_line_32_versions_and_hardware() -> None:
    async with running(Passthrough(), app_version="1.2") as r:
        assert set(await r.get("/version")) == {"pipeline", "model_id", "version"}
        assert await r.get("/app-version") == {"version": "1.2"}
        for path, key in (("/hardware/info", "gpu_info"), ("/hardware/stats", "gpu_stats")):
            found = await r.get(path)
            assert {"pipeline", "model_id", key} <= set(found)
            assert found[key] == {}
