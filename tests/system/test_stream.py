"""Live streams through a real trickle server and a real worker: green, in order, with audio, and independent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from gpu_byoc.config import EngineConfig
from gpu_byoc.processor import ArrayProcessor
from gpu_byoc.processors.green_tint import GreenTint
from gpu_byoc.processors.passthrough import Passthrough
from gpu_byoc.transport.trickle_client import Publisher, Subscriber, open_session
from tests.support.clips import frames, live_stream, packets, remuxed
from tests.support.streams import Gate, Rig, beats, clip, publish, rig, taken, watching
from tests.support.workers import asynchronous


@asynchronous
async def test_a_stream_comes_out_green_in_order_with_its_audio() -> None:
    async with rig() as r:
        r.create("s")
        async with watching(r, "s") as viewer:
            status, answer = await r.call("stream/start", r.urls("s") | {"params": {"boost": 60}})
            assert status == 200
            assert answer["status"] == "success"
            assert answer["request_id"] == "s"
            source = [remuxed()]
            await publish(r, "s", source)
            await r.until_over()
        before, after = packets(b"".join(source)), packets(viewer.media)
        shown = [p.pts for p in after if p.video]
        assert shown == sorted(p.pts for p in before if p.video), "each picture once, in the order of showing"
        sound_in = [(p.pts, p.data) for p in before if not p.video]
        sound_out = [(p.pts, p.data) for p in after if not p.video]
        assert sound_out == sound_in
        for old, new in zip(frames(b"".join(source)), frames(viewer.media), strict=True):
            a, b = (f.to_ndarray(format="rgb24").astype(int) for f in (old, new))
            expected = np.minimum(a[..., 1], 255 - 60) + 60
            assert abs(b[..., 1] - expected).mean() < 6
            assert abs(b[..., 0] - a[..., 0]).mean() < 6
        for segment in viewer.segments:
            assert packets(segment)[0].key, "each segment starts with a keyframe and stands alone"
        kinds = viewer.kinds()
        assert kinds.count("heartbeat") >= 1
        for kind in ("stream_started", "receive_first_ingest_segment", "send_first_processed_segment"):
            assert kinds.count(kind) == 1, kind
        last = viewer.events[-1]
        assert last["queue_event_type"] == "stream_heartbeat"
        assert last["event"]["state"] == "ended"
        assert viewer.lines
        assert {"type", "second", "compute_seconds"} <= set(viewer.lines[0])
        assert r.worker.worker.engine is not None
        totals = r.worker.worker.engine.usage()[1]
        assert "s" not in totals, "its totals left the table with it"
        for rows in (viewer.lines, [beat["compute"] for beat in beats(viewer)]):
            assert sum(row["frames"] for row in rows) == 132
        spent = sum(row["compute_seconds"] for row in viewer.lines)
        assert abs(spent - totals["(ended)"].compute_ns / 1e9) < 1e-6, "the seconds add up to the total"


@asynchronous
async def test_streams_share_batches_and_one_does_not_disturb_another() -> None:
    async with rig(Passthrough(), EngineConfig(slots=24, max_batch=8)) as r:
        names = [f"s{i}" for i in range(4)]
        for name in names:
            r.create(name)
        async with contextlib.AsyncExitStack() as stack:
            viewers = [await stack.enter_async_context(watching(r, name)) for name in names]
            for name in names:
                assert (await r.call("stream/start", r.urls(name)))[0] == 200
            status = await r.worker.get("/stream/status")
            assert status["active_streams"] == 4
            assert (await r.call("stream/start", {"gateway_request_id": 5}))[0] == 400
            assert (await r.call("stream/start", r.urls("bad") | {"params": {"width": 3}}))[0] == 400
            assert (await r.call("stream/start", r.urls("s0")))[0] == 400, "exists already"
            segments = clip(20, 3)
            others = [publish(r, name, segments) for name in names[1:]]
            broken = [segments[0], b"\x47" + b"\xff" * 187 * 50, bytes(5000), segments[2]]
            await asyncio.gather(publish(r, names[0], broken), *others)
            await r.until_over()
        for viewer in viewers[1:]:
            assert [p.pts for p in packets(viewer.media)] == [p.pts for p in packets(b"".join(segments))]
        assert [p.pts for p in packets(viewers[0].media)] == [p.pts for p in packets(segments[0] + segments[2])]
        assert viewers[0].events[-1]["event"]["problems"], "what was wrong is counted"


@asynchronous
async def test_parameters_change_between_frames_and_bad_ones_are_refused() -> None:
    async with rig() as r:
        r.create("s")
        async with watching(r, "s") as viewer:
            await r.call("stream/start", r.urls("s") | {"params": {"boost": 0}})
            source = clip(10, 3)
            await publish(r, "s", source[:1], close=False)
            stream = r.stream("s")
            await r.worker.until(lambda: stream.session.frames_out == 10)
            status, answer = await r.call("stream/params", {"boost": 999})
            assert status == 422
            assert answer["field"] == "boost"
            assert (await r.call("api/stream/update", {"boost": 100}, X_Stream_Id="s"))[0] == 200
            status, answer = await r.call("stream/params", {"width": "640".rjust(40_000)}, X_Stream_Id="s")
            assert (status, answer["error"]) == (413, "too_large"), "updates are kept for a while, so they are small"
            async with open_session() as session, Publisher(session, r.base + "s", "video/MP2T") as publisher:
                await publisher.send(source[1])
                await r.worker.until(lambda: stream.session.frames_out == 20)
                for message in ({"keep": "alive"}, {"boost": -1}, {"boost": 0}):
                    r.server.hub.write("s-control", json.dumps(message).encode())
                await r.worker.until(lambda: stream.params.processor.boost == 0)
                await publisher.send(source[2])
                await r.worker.until(lambda: stream.session.frames_out == 30)
            assert (await r.call("stream/stop"))[0] == 200
            await r.until_over()
        old, new = frames(b"".join(source)), frames(viewer.media)
        green = [f.to_ndarray(format="rgb24")[..., 1].astype(int).mean() for f in new]
        plain = [f.to_ndarray(format="rgb24")[..., 1].astype(int).mean() for f in old]
        raised = [b - a > 40 for a, b in zip(plain, green, strict=True)]
        assert raised == [False] * 10 + [True] * 10 + [False] * 10
        errors = [e["event"] for e in viewer.events if e["event"]["type"] == "error"]
        assert [e["field"] for e in errors] == ["boost"]
        assert viewer.kinds().count("params_updated") == 2
        assert viewer.kinds().count("stream_stopped") == 1


@asynchronous
async def test_addressing_limits_and_the_end_of_control() -> None:
    async with rig(max_streams=2) as r:
        status, answer = await r.call("stream/stop")
        assert status == 400
        assert "No active stream to stop" in answer["message"]
        assert (await r.call("stream/params", {"boost": 1}))[0] == 400
        for name in ("a", "b"):
            r.create(name)
            assert (await r.call("live-video-to-video", r.urls(name)))[0] == 200
        status, answer = await r.call("stream/start", r.urls("c"))
        assert status == 503
        assert answer["error"] == "all_busy"
        status, answer = await r.call("stream/stop")
        assert status == 400
        assert "one of: a, b" in answer["message"]
        assert (await r.call("stream/stop", {"gateway_request_id": "a"}))[0] == 200
        r.server.hub.delete("b-control")
        await r.until_over()
        assert (await r.worker.get("/health")) == {"status": "IDLE"}


@asynchronous
async def test_a_stream_whose_channels_are_not_there_ends_with_a_reason() -> None:
    async with rig() as r:
        r.server.hub.create("s-events", "application/json")
        async with watching_events(r, "s") as events:
            assert (await r.call("stream/start", r.urls("s")))[0] == 200
            await r.until_over()
        assert [e["event"]["type"] for e in events][-1] == "heartbeat"
        assert events[-1]["event"]["state"] in ("failed", "ended")


@contextlib.asynccontextmanager
async def watching_events(r: Rig, name: str) -> AsyncIterator[list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []

    async def read() -> None:
        async with Subscriber(session, f"{r.base}{name}-events", start=0, every=True) as segments:
            async for segment in segments:
                events.append(json.loads(await segment.read()))

    async with open_session() as session:
        task = asyncio.create_task(read())
        try:
            yield events
        finally:
            r.server.hub.delete(f"{name}-events")
            await task


@pytest.mark.parametrize("poison", [True, False])
def test_a_processor_that_fails_for_one_stream_fails_those_frames_only(poison: bool) -> None:
    class Picky(ArrayProcessor):
        def process_batch(self, batch: Any, params: Any, xp: Any) -> Any:
            if poison and (batch.shape[2] == 32):
                raise ValueError("too small")
            return batch

    @asynchronous
    async def go() -> None:
        async with rig(Picky()) as r:
            for name in ("small", "large"):
                r.create(name)
            async with watching(r, "small") as small, watching(r, "large") as large:
                for name in ("small", "large"):
                    assert (await r.call("stream/start", r.urls(name)))[0] == 200
                await asyncio.gather(publish(r, "small", clip(10, 2, size=(32, 32))), publish(r, "large", clip(10, 2)))
                await r.until_over()
            assert len(frames(large.media)) == 20
            if poison:
                assert small.media == b""
                assert small.events[-1]["event"]["dropped"] == {"processor_failed": 20}
            else:
                assert len(frames(small.media)) == 20

    go()


@asynchronous
async def test_size_and_frame_rate_on_request_and_a_change_of_size_in_the_middle() -> None:
    async with rig(Passthrough()) as r:
        r.create("s")
        async with watching(r, "s") as viewer:
            params = {"width": 32, "height": "32", "max_framerate": 13}
            assert (await r.call("stream/start", r.urls("s") | {"params": params}))[0] == 200
            later = live_stream(20, (96, 64), first=90_000 + 20 * 3600, gop=20)
            await publish(r, "s", [*clip(20, 1), later])
            await r.until_over()
        shown = frames(viewer.media)
        assert {(f.width, f.height) for f in shown} == {(32, 32)}
        assert len(shown) == 21, "40 frames at 25 fps last 1.6 s, in which 13 fps has 21 beats"
        assert beats(viewer)[-1]["dropped"] == {"framerate": 19}

    async with rig(Passthrough()) as r:
        r.create("s")
        async with watching(r, "s") as viewer:
            await r.call("stream/start", r.urls("s"))
            await publish(r, "s", [*clip(20, 1), later])
            await r.until_over()
        sizes = [(f.width, f.height) for segment in viewer.segments for f in frames(segment)]
        assert sizes == [(64, 48)] * 20 + [(96, 64)] * 20


@asynchronous
async def test_frames_that_cannot_make_it_are_dropped_after_decoding_and_counted() -> None:
    gate = Gate()
    async with rig(gate, EngineConfig(slots=3, max_batch=2), lossless=False, latency_budget=0.15) as r:
        r.create("s")
        async with watching(r, "s") as viewer:
            await r.call("stream/start", r.urls("s"))
            stream = r.stream("s")
            await publish(r, "s", clip(20, 2), close=False)
            await r.worker.until(lambda: stream.session.frames_in == 40 and stream.segments_in == 2)
            await r.worker.until(lambda: sum(stream.session.dropped.values()) == 37)
            gate.gate.set()
            assert (await r.call("stream/stop"))[0] == 200
            await r.until_over()
        last = viewer.events[-1]["event"]
        assert last["dropped"] == {"backlog": 37}, "its own share is full: it does not even ask for a slot"
        assert len(frames(viewer.media)) == 3
        assert last["latency_seconds"]["p50"] > 0


@asynchronous
async def test_a_worker_that_ends_flushes_its_streams() -> None:
    async with rig(Passthrough()) as r:
        for name in ("a", "b"):
            r.create(name)
        async with watching(r, "a") as one, watching(r, "b") as two:
            for name in ("a", "b"):
                await r.call("stream/start", r.urls(name))
                await publish(r, name, clip(20, 2), close=False)
            await r.worker.until(lambda: taken(r, "a") == taken(r, "b") == 2)
            await r.worker.worker.streams.close(10)
            assert len(r.worker.worker.streams) == 0
        for viewer in (one, two):
            assert len(frames(viewer.media)) == 40
            assert "the worker is shutting down" in [e["event"].get("reason") for e in viewer.events]


@asynchronous
async def test_a_stream_that_is_cut_off_leaves_nothing_behind() -> None:
    gate = Gate()
    async with rig(gate, EngineConfig(slots=3, max_batch=2)) as r:
        r.create("s")
        await r.call("stream/start", r.urls("s"))
        await publish(r, "s", clip(20, 1), close=False)
        await asyncio.to_thread(gate.entered.wait, 20)
        threads = threading.active_count()
        stream = r.stream("s")
        await r.worker.worker.streams.close(0)
        assert len(r.worker.worker.streams) == 0
        assert stream.session.state.value == "failed"
        assert stream.session.frames_in == sum(stream.session.dropped.values()), "each frame is accounted for"
        await r.worker.until(lambda: threading.active_count() <= threads - 2)
        gate.gate.set()
        await r.worker.until(lambda: r.worker.free() == 0)
        assert r.worker.worker.engine is not None
        await r.worker.until(lambda: r.worker.worker.engine is not None and not r.worker.worker.engine.busy)
        assert set(r.worker.worker.engine.usage()[1]) == {"jobs", "(ended)"}, "late frames do not bring its name back"


@asynchronous
async def test_without_a_publisher_frames_are_computed_and_nothing_piles_up() -> None:
    async with rig(Passthrough()) as r:
        r.create("s")
        urls = {
            key: value for key, value in r.urls("s").items() if key not in ("publish_url", "events_url", "data_url")
        }
        assert (await r.call("stream/start", urls))[0] == 200
        stream = r.stream("s")
        await publish(r, "s", clip(20, 2))
        await r.until_over()
        assert stream.session.frames_out == 40
        assert stream.session.state.value == "ended"


@asynchronous
async def test_an_output_that_is_deleted_ends_its_stream_only() -> None:
    async with rig(Passthrough()) as r:
        for name in ("a", "b"):
            r.create(name)
        async with watching(r, "b") as viewer:
            for name in ("a", "b"):
                await r.call("stream/start", r.urls(name))
            first = r.stream("a")
            await asyncio.gather(*(publish(r, name, clip(20, 1), close=False) for name in ("a", "b")))
            await r.worker.until(lambda: first.session.frames_out == 20)
            r.server.hub.delete("a-out")
            await publish(r, "a", clip(60, 2)[1:], close=False)  # long enough for another segment
            await r.worker.until(lambda: len(r.worker.worker.streams) == 1)
            assert first.session.over
            await r.call("stream/stop")
            await r.until_over()
        assert len(frames(viewer.media)) == 20


@asynchronous
async def test_a_stream_whose_output_is_stuck_does_not_starve_another() -> None:
    """A server that takes connections and never answers."""
    waiting: list[asyncio.StreamWriter] = []

    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        waiting.append(writer)

    stuck = await asyncio.start_server(never, "127.0.0.1", 0)
    port = stuck.sockets[0].getsockname()[1]
    async with rig(Passthrough(), EngineConfig(slots=8, max_batch=4), lossless=False) as r:
        for name in ("a", "b"):
            r.create(name)
        async with watching(r, "b") as viewer:
            urls = r.urls("a") | {"publish_url": f"http://127.0.0.1:{port}/out"}
            assert (await r.call("stream/start", urls))[0] == 200
            r.stream("a")._sink._limit = 1  # type: ignore[union-attr]
            assert (await r.call("stream/start", r.urls("b")))[0] == 200
            await publish(r, "a", clip(20, 3), close=False)
            await publish(r, "b", clip(20, 3))
            await r.worker.until(lambda: len(r.worker.worker.streams) == 1)
            stream = r.stream("a")
            await r.worker.until(lambda: sum(stream.session.dropped.values()) > 0)
            await r.worker.worker.streams.close(0)
        assert len(frames(viewer.media)) == 60
        assert beats(viewer)[-1]["dropped"] == {}
    stuck.close()
    for writer in waiting:
        writer.close()


@asynchronous
async def test_a_failure_nobody_foresaw_ends_its_stream_with_an_event() -> None:
    async with rig(Passthrough()) as r:
        r.create("s")
        async with watching(r, "s") as viewer:
            await r.call("stream/start", r.urls("s"))
            stream = r.stream("s")
            stream.pump._intake._tell = lambda *a: (
                (_ for _ in ()).throw(RuntimeError("a bug")) if a[0] == "in" else stream._told(*a)
            )
            await publish(r, "s", clip(20, 1), close=False)
            await r.until_over()
        assert beats(viewer)[-1]["state"] == "failed"
        errors = [e["event"] for e in viewer.events if e["event"]["type"] == "error"]
        assert errors[0]["error"] == "internal"
        assert "a bug" not in json.dumps(viewer.events), "internals stay in the log"


@pytest.mark.parametrize("url", ["http://" + "a" * 70 + "/x", "ftp://x/y", "http:///x", "http://x:99999/", "x"])
def test_urls_that_cannot_be_are_refused(url: str) -> None:
    @asynchronous
    async def go() -> None:
        async with rig() as r:
            status, answer = await r.call("stream/start", {"gateway_request_id": "s", "publish_url": url})
            assert status == 400
            assert "publish_url" in answer["message"]

    go()


@asynchronous
async def test_an_update_that_would_need_too_much_memory_is_refused() -> None:
    async with rig(Passthrough(), EngineConfig(memory=1 << 20)) as r:
        r.create("s")
        body = r.urls("s") | {"params": {"width": 4000, "height": 4000}}
        status, answer = await r.call("stream/start", body)
        assert (status, answer["field"]) == (400, "width")
        assert (await r.call("stream/start", r.urls("s")))[0] == 200
        status, answer = await r.call("stream/params", {"width": 4000, "height": 4000})
        assert (status, answer["field"]) == (422, "width")
        async with r.worker.session.get(r.worker.url + "/stream/status", headers={"X-Stream-Id": "s"}) as answered:
            assert (await answered.json())["stream"]["stream_id"] == "s"
        async with r.worker.session.get(r.worker.url + "/stream/status", headers={"X-Stream-Id": "t"}) as answered:
            assert answered.status == 400


@asynchronous
async def test_streams_on_two_devices_stay_where_they_were_placed_and_add_up() -> None:
    async with rig(GreenTint(), EngineConfig(slots=12, max_batch=4), device="cpu,cpu") as r:
        names = [f"s{i}" for i in range(4)]
        for name in names:
            r.create(name)
            assert (await r.call("stream/start", r.urls(name)))[0] == 200
        fleet = r.worker.worker.engine
        assert fleet is not None
        assert [fleet.streams_on(engine) for engine in fleet.engines] == [2, 2]
        async with contextlib.AsyncExitStack() as stack:
            viewers = [await stack.enter_async_context(watching(r, name)) for name in names]
            await asyncio.gather(*(publish(r, name, clip()) for name in names))
            await r.until_over()
        assert [len(frames(viewer.media)) for viewer in viewers] == [40] * 4
        assert [engine.spent().frames for engine in fleet.engines] == [80, 80]
        assert fleet.usage()[1]["(ended)"].frames == 160
        assert [fleet.streams_on(engine) for engine in fleet.engines] == [0, 0]
