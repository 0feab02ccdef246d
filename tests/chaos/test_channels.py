"""Channels that break, stall, jump and lie, with a stream beside them that must not notice. See docs/chaos.md."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from gpu_byoc.core.cursor import Backoff
from gpu_byoc.errors import SegmentFailed
from gpu_byoc.media.mpegts import PACKET
from gpu_byoc.processors.passthrough import Passthrough
from gpu_byoc.transport.listen import bind, port_of, serve
from gpu_byoc.transport.trickle_client import IncomingSegment, Publisher, Subscriber, open_session
from gpu_byoc.worker import stream as streams
from gpu_byoc.worker.stream import LiveStream
from tests.support.clips import frames, packets
from tests.support.proxy import Proxy, proxy
from tests.support.streams import Rig, Viewer, beats, clip, publish, rig, taken, watching
from tests.support.workers import asynchronous

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "1"))


@dataclass
class Pair:
    """Two streams: ``s`` goes through the proxy, ``calm`` does not."""

    rig: Rig
    proxy: Proxy
    viewer: Viewer
    calm: Viewer

    @property
    def stream(self) -> LiveStream:
        return self.rig.stream("s")

    async def until(self, condition: Callable[[], bool]) -> None:
        await self.rig.worker.until(condition)


@contextlib.asynccontextmanager
async def pair(way: str) -> AsyncIterator[Pair]:
    """``way`` is the channel that goes through the proxy: ``subscribe`` or ``publish``. Afterwards nothing is left."""
    async with rig(Passthrough()) as r, proxy(urlsplit(r.base).port or 0) as between:
        threads = threading.active_count()
        for name in ("s", "calm"):
            r.create(name)
        async with watching(r, "s") as viewer, watching(r, "calm") as calm:
            urls = r.urls("s")
            url = urlsplit(urls[f"{way}_url"])
            urls[f"{way}_url"] = url._replace(netloc=f"127.0.0.1:{between.port}").geturl()
            assert (await r.call("stream/start", urls))[0] == 200
            assert (await r.call("stream/start", r.urls("calm")))[0] == 200
            yield Pair(r, between, viewer, calm)
            await r.until_over()
        await r.worker.until(lambda: threading.active_count() <= threads + 8)  # the pool's, at most
        assert r.worker.free() == 0


def untouched(viewer: Viewer, source: list[bytes]) -> None:
    assert [p.pts for p in packets(viewer.media)] == [p.pts for p in packets(b"".join(source))]
    last = beats(viewer)[-1]
    assert (last["state"], last["dropped"], last["problems"]) == ("ended", {}, {})


def accounted(stream: LiveStream) -> None:
    session = stream.session
    assert session.frames_in == session.frames_out + sum(session.dropped.values()), session.numbers()


async def paced(r: Rig, name: str, source: list[bytes]) -> None:
    """Each segment when the one before has been read, so that the ring is not overrun; then the end of the channel."""
    async with open_session() as session, Publisher(session, r.base + name, "video/MP2T", delete=True) as publisher:
        for number, data in enumerate(source, 1):
            await publisher.send(data)
            await r.worker.until(lambda number=number: taken(r, name) >= number)  # type: ignore[misc]


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_input_that_is_cut_in_the_middle_of_a_segment(seed: int) -> None:
    """The segment is lost from there on; every frame of the others arrives."""

    @asynchronous
    async def go() -> None:
        source = clip(20, 4)
        async with pair("subscribe") as p:
            stream = p.stream
            p.proxy.cut_in = random.Random(seed).randrange(800, len(source[0]) - 400)
            await asyncio.gather(paced(p.rig, "s", source), publish(p.rig, "calm", source))
        assert p.proxy.cuts == 1
        assert stream.session.problems["segment_failed"] == 1
        assert stream.session.state.value == "ended"
        shown = [each.pts for each in packets(p.viewer.media)]
        whole = [each.pts for each in packets(b"".join(source))]
        assert set(shown) <= set(whole)
        assert shown == sorted(shown)
        lost = [number // 20 for number, pts in enumerate(whole) if pts not in shown]
        assert len(set(lost)) <= 1, "of one segment only"
        accounted(stream)
        untouched(p.calm, source)

    go()


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_output_that_is_cut_in_the_middle_of_a_segment(seed: int) -> None:
    """What is not confirmed is not counted as out; the stream goes on, and what was confirmed is there."""

    @asynchronous
    async def go() -> None:
        source = clip(30, 4)
        async with pair("publish") as p:
            stream = p.stream
            p.proxy.cut_out = random.Random(seed).randrange(1500, 6000)
            await asyncio.gather(paced(p.rig, "s", source), publish(p.rig, "calm", source))
        assert p.proxy.cuts == 1
        session = stream.session
        assert session.state.value == "ended"
        assert session.problems["segment_lost"] >= 1
        accounted(stream)
        assert 0 < session.frames_out < 120
        whole = [segment for segment in p.viewer.segments if segment and not len(segment) % PACKET]
        assert len(packets(b"".join(whole))) >= session.frames_out, "confirmed, so it is there"
        untouched(p.calm, source)

    go()


@asynchronous
async def test_input_that_is_cut_again_and_again_with_nobody_there_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """The subscriber asks until somebody answers, each time anew: no outage counts for the next one. Of the segments
    that were cut some frames are lost, of the others none; none comes twice."""
    monkeypatch.setattr(streams, "PATIENCE", Backoff(first=0.1, attempts=8))
    source = clip(20, 2 * 4 + 1)  # every second one is cut; two refusals each time
    async with pair("subscribe") as p:
        stream, served, segment_in = p.stream, p.proxy.target, p.stream._segment_in
        current: list[IncomingSegment] = []  # the one that is being read

        async def noted(segment: IncomingSegment) -> None:
            current[:] = [segment]
            await segment_in(segment)

        monkeypatch.setattr(stream, "_segment_in", noted)
        other = asyncio.create_task(publish(p.rig, "calm", source))
        async with open_session() as session, Publisher(session, p.rig.base + "s", "video/MP2T", delete=True) as out:
            for number, data in enumerate(source, 1):
                half = number - 1, len(data) // 2
                async with out.segment() as segment:
                    if number % 2 == 0:
                        await segment.write(data[: len(data) // 2])
                        await p.until(lambda half=half: [(each.seq, each.received) for each in current] == [half])  # type: ignore[misc]
                        await p.until(lambda: len(p.proxy._writers) >= 4)  # both ends of it, and of the next one's
                        p.proxy.target, asked = 1, p.proxy.accepted
                        p.proxy.drop()
                        # Twice by aiohttp for each time that the subscriber asks.
                        await p.until(lambda asked=asked: p.proxy.accepted >= asked + 4)  # type: ignore[misc]
                        p.proxy.target = served
                        await segment.write(data[len(data) // 2 :])
                    else:
                        await segment.write(data)
                await p.until(lambda number=number: stream.segments_in >= number)  # type: ignore[misc]
        await other
    assert stream.session.state.value == "ended"
    assert stream.session.problems["segment_failed"] == 4
    assert "segments_skipped" not in stream.session.problems
    shown = [each.pts for each in packets(p.viewer.media)]
    assert shown == sorted(set(shown)), "nothing twice"
    for sound in source[::2]:
        assert {each.pts for each in packets(sound)} <= set(shown)
    accounted(stream)
    untouched(p.calm, source)


@contextlib.asynccontextmanager
async def late_refusals(index: int, status: int) -> AsyncIterator[tuple[str, dict[int, bytes]]]:
    """The URL of a channel whose server takes each segment to its end, and then refuses one; and all their bodies."""
    bodies: dict[int, bytes] = {}

    async def first(request: web.Request) -> web.Response:
        return web.Response(text="0", headers={"Lp-Trickle-Latest": "0"})

    async def segment(request: web.Request) -> web.Response:
        seq = int(request.match_info["seq"])
        bodies[seq] = await request.read()
        return web.Response(status=status, text="not this one") if seq == index else web.Response()

    app = web.Application(client_max_size=1 << 30)
    app.add_routes([web.get("/out/next", first), web.post("/out/{seq}", segment)])
    sock = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{port_of(sock)}/out"
    runner = await serve(app, sock, shutdown=1.0)
    try:
        yield url, bodies
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("status", [400, 500])
def test_output_that_is_refused_when_all_of_it_was_sent(status: int, caplog: pytest.LogCaptureFixture) -> None:
    """Its frames had gone out: they are taken back and count as lost, which is said once; the next segment goes on."""

    @asynchronous
    async def go() -> None:
        source = clip(30, 4)
        async with late_refusals(1, status) as (url, bodies), rig(Passthrough()) as r:
            for name in ("s", "calm"):
                r.create(name)
            async with watching(r, "s") as viewer, watching(r, "calm") as calm:
                stream_urls = r.urls("s") | {"publish_url": url}
                assert (await r.call("stream/start", stream_urls))[0] == 200
                assert (await r.call("stream/start", r.urls("calm")))[0] == 200
                stream = r.stream("s")
                await asyncio.gather(paced(r, "s", source), publish(r, "calm", source))
                await r.until_over()
        session = stream.session
        refused = len(packets(bodies.pop(1)))
        assert refused > 0
        assert sum(len(packets(body)) for body in bodies.values()) == 120 - refused == session.frames_out
        assert (session.frames_in, session.dropped) == (120, {"segment_lost": refused})
        last = beats(viewer)[-1]
        assert (last["state"], last["problems"]) == ("ended", {"segment_lost": 1})
        assert len([each for each in caplog.messages if f"output segment 1: HTTP {status}: not this one" in each]) == 1
        untouched(calm, source)

    go()


@asynchronous
async def test_connections_that_are_all_reset_while_nothing_is_sent() -> None:
    """Waiting requests are made anew; nothing is lost."""
    source = clip(20, 4)
    async with pair("subscribe") as p:
        stream = p.stream
        other = asyncio.create_task(publish(p.rig, "calm", source))
        async with open_session() as session, Publisher(session, p.rig.base + "s", "video/MP2T", delete=True) as out:
            for number, data in enumerate(source, 1):
                await out.send(data)
                await p.until(lambda number=number: stream.session.frames_out >= 20 * number)  # type: ignore[misc]
                await p.until(lambda number=number: stream.segments_in >= number)  # type: ignore[misc]
                p.proxy.drop()
        await other
    assert stream.session.frames_out == 80
    assert [each.pts for each in packets(p.viewer.media)] == [each.pts for each in packets(b"".join(source))]
    accounted(stream)
    untouched(p.calm, source)


@pytest.mark.parametrize("way", ["subscribe", "publish"])
def test_a_connection_that_only_drips(way: str) -> None:
    """200 bytes at a time: a slow publisher's input, a slow server's output. Late, and whole."""

    @asynchronous
    async def go() -> None:
        source = clip(20, 2)
        async with pair(way) as p:
            stream = p.stream
            p.proxy.piece, p.proxy.pause = 200, 0.002
            await asyncio.gather(paced(p.rig, "s", source), publish(p.rig, "calm", source))
        assert stream.session.dropped == {}
        assert stream.session.problems == {}
        assert [each.pts for each in packets(p.viewer.media)] == [each.pts for each in packets(b"".join(source))]
        untouched(p.calm, source)

    go()


@asynchronous
async def test_a_slow_viewer_holds_nobody_up() -> None:
    """It falls out of the ring, jumps (470), and sees what comes then; the stream does not wait for it."""
    source = clip(30, 16)
    async with rig(Passthrough()) as r, proxy(urlsplit(r.base).port or 0) as between:
        r.create("s")
        between.piece, between.pause = 500, 0.03
        async with watching(r, "s") as viewer, open_session() as session:
            slow = Subscriber(session, f"http://127.0.0.1:{between.port}/ai/trickle/s-out", 0)
            assert (await r.call("stream/start", r.urls("s")))[0] == 200
            stream = r.stream("s")
            seen: list[int] = []

            async def watch() -> None:
                async with slow:
                    async for segment in slow:
                        seen.append(segment.seq)
                        with contextlib.suppress(SegmentFailed):  # the ring has let go of it
                            await segment.read()

            task = asyncio.create_task(watch())
            await r.worker.until(lambda: between._writers != set())
            async with Publisher(session, r.base + "s", "video/MP2T", delete=True) as publisher:
                for number, data in enumerate(source, 1):
                    if number == 12:
                        await r.worker.until(lambda: slow.skipped > 0)
                    await publisher.send(data)
                    await r.worker.until(lambda number=number: taken(r, "s") >= number)  # type: ignore[misc]
            await r.until_over()
            assert stream.session.frames_out == 480
            assert stream.session.problems == {}
            await r.worker.until(lambda: seen[-1] >= len(seen) + slow.skipped - 1)
            task.cancel()
            await asyncio.wait([task])
        assert len(frames(viewer.media)) == 480


@contextlib.contextmanager
def impatient(**seconds: float) -> Iterator[None]:
    """A subscriber's ``reissue`` and ``stall``, scaled."""
    kept = Subscriber.__init__.__kwdefaults__
    assert kept is not None
    assert kept.keys() >= seconds.keys()
    before = dict(kept)
    kept |= seconds
    try:
        yield
    finally:
        kept |= before


@asynchronous
async def test_indices_that_jump_ahead_and_back() -> None:
    """A publisher that leaves indices out, and one that starts over: after a few segments its frames are seen again."""
    source = clip(20, 20)
    with impatient(reissue=0.1):
        async with pair("subscribe") as p:
            stream, parts = p.stream, iter(source)
            other = asyncio.create_task(publish(p.rig, "calm", source[:4]))
            async with open_session() as session:
                for start in (0, 40, 0):
                    seen, index = stream.session.frames_in, start
                    while stream.session.frames_in < seen + 20:
                        assert index < start + 6, f"nothing is read after {start}"
                        async with session.post(f"{p.rig.base}s/{index}", data=next(parts)) as answer:
                            assert answer.status == 200
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(1):
                                await p.until(lambda seen=seen: stream.session.frames_in >= seen + 20)  # type: ignore[misc]
                        index += 1
            await p.until(lambda: stream.session.frames_out == stream.session.frames_in >= 60)
            p.rig.delete("s")
            await other
    assert stream.session.state.value == "ended"
    assert stream.session.problems["segments_skipped"] >= 39
    assert stream.session.frames_in % 20 == 0, "segments come as a whole"
    shown = [each.pts for each in packets(p.viewer.media)]
    assert shown == sorted(set(shown))
    accounted(stream)
    untouched(p.calm, source[:4])


@asynchronous
async def test_silence() -> None:
    """Thirty seconds of it and more, at a hundredth: requests that wait are made anew, more often than a channel may
    fail, the heart beats, and nothing is lost."""
    source, often = clip(20, 3), streams.PATIENCE.attempts + 2
    with impatient(reissue=0.1):
        async with pair("subscribe") as p:
            stream, base = p.stream, p.rig.base
            other = asyncio.create_task(publish(p.rig, "calm", source))
            async with open_session() as session, Publisher(session, base + "s", "video/MP2T", delete=True) as out:
                for number, data in enumerate(source, 1):
                    await out.send(data)
                    await p.until(lambda number=number: stream.segments_in >= number)  # type: ignore[misc]
                    asked, said = p.proxy.accepted, len(beats(p.viewer))
                    await p.until(lambda asked=asked: p.proxy.accepted >= asked + often)  # type: ignore[misc]
                    assert stream.session.state.value == "running"
                    await p.until(lambda said=said: len(beats(p.viewer)) > said)  # type: ignore[misc]
            await other
    assert stream.session.frames_out == 60
    assert stream.session.problems == {}
    untouched(p.calm, source)


def spoiled(source: list[bytes], dice: random.Random) -> list[bytes]:
    """The second and third of five segments, in one way or another not what they were."""

    def flipped(data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(40):
            changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
        return bytes(changed)

    ways: list[Callable[[bytes], bytes]] = [
        flipped,
        lambda data: data[: dice.randrange(len(data))],
        lambda data: dice.randbytes(len(data)),
    ]
    return [source[0], dice.choice(ways)(source[1]), dice.choice(ways)(source[2]), *source[3:]]


@pytest.mark.parametrize("seed", range(2 * ROUNDS))
def test_segments_that_are_corrupt_or_truncated(seed: int) -> None:
    """The segments before and behind them arrive whole, at their own times."""

    @asynchronous
    async def go() -> None:
        source = clip(20, 5)
        async with pair("subscribe") as p:
            stream = p.stream
            bad = spoiled(source, random.Random(seed))
            await asyncio.gather(paced(p.rig, "s", bad), publish(p.rig, "calm", source))
        assert stream.session.state.value == "ended"
        shown = {each.pts for each in packets(p.viewer.media)}
        for sound in (source[0], *source[3:]):
            assert {each.pts for each in packets(sound)} <= shown
        accounted(stream)
        untouched(p.calm, source)

    go()


@asynchronous
async def test_a_server_that_dies_ends_its_streams_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its patience is scaled; that of the other stream is as it is."""
    monkeypatch.setattr(streams, "PATIENCE", Backoff(first=0.01, cap=0.05, attempts=8))
    source = clip(20, 3)
    async with pair("subscribe") as p:
        stream = p.stream
        async with open_session() as session, Publisher(session, p.rig.base + "s", "video/MP2T") as out:
            await out.send(source[0])
            await p.until(lambda: stream.session.frames_out == 20)
            p.proxy.target = 1  # nobody is there any more
            p.proxy.drop()
            await p.until(lambda: stream.session.over)
        await publish(p.rig, "calm", source)
    assert stream.session.state.value == "failed"
    accounted(stream)
    assert len(frames(p.viewer.media)) == 20
    untouched(p.calm, source)


@asynchronous
async def test_a_wall_clock_that_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A day ahead, then two back, while a stream runs: no frame is late, no second is charged twice."""
    offset = 0.0
    wall, wall_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: wall() + offset)
    monkeypatch.setattr(time, "time_ns", lambda: wall_ns() + int(offset * 1e9))
    source = clip(20, 6)
    async with rig(Passthrough(), lossless=False, latency_budget=5.0) as r:
        r.create("s")
        async with watching(r, "s") as viewer:
            assert (await r.call("stream/start", r.urls("s")))[0] == 200
            stream = r.stream("s")
            async with open_session() as session, Publisher(session, r.base + "s", "video/MP2T", delete=True) as out:
                for number, data in enumerate(source, 1):
                    offset = (0.0, 86_400.0, -86_400.0)[number % 3]
                    await out.send(data)
                    await r.worker.until(lambda number=number: stream.session.frames_out >= 20 * number)  # type: ignore[misc]
            await r.until_over()
        assert stream.session.dropped == {}
        worst = stream.session.latency(1.0)
        assert worst is not None
        assert 0 < worst < 5
        spent = sum(row["compute_seconds"] for row in viewer.lines)
        assert r.worker.worker.engine is not None
        rows, totals, _ = r.worker.worker.engine.usage()
        assert abs(spent - totals["(ended)"].compute_ns / 1e9) < 1e-6
        assert totals["(ended)"].frames == 120
        assert 0 < spent < 20
        assert sum(row.compute_ns for _, _, row in rows) == totals["(ended)"].compute_ns, "no second is lost or doubled"
        seconds = [second for second, _, _ in rows]
        assert max(seconds) - min(seconds) < 60
