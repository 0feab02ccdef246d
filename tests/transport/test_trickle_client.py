"""The trickle client against our own server, and against scripted ones that do what other servers do."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from gpu_byoc.core.cursor import Backoff, End
from gpu_byoc.core.trickle import NEXT, Ended, Limits, Segment
from gpu_byoc.errors import ChannelClosed, ChannelFailed, ChannelMissing, SegmentFailed
from gpu_byoc.transport.trickle_client import Publisher, Subscriber, open_session
from tests.support.trickle import Running, Wire, reply, running, scripted
from tests.support.workers import asynchronous

QUICK = Backoff(first=0.01, cap=0.01, attempts=3)


def published(at: Running, index: int) -> Segment:
    channel = at.hub.channel("a")
    assert channel is not None
    segment = channel.find(index)
    assert segment is not None
    return segment


async def settled(publisher: Publisher) -> None:
    """The segment that is open ahead has been answered, or given up."""
    assert publisher._ahead is not None
    await asyncio.wait([publisher._ahead.task])


async def only_us_left() -> None:
    """Everything that was started is awaited: after a turn of the loop for aiohttp's own tasks, only the test runs."""
    async with asyncio.timeout(20):
        while len(asyncio.all_tasks()) > 1:  # noqa: ASYNC110 - waits for tasks of which nobody tells
            await asyncio.sleep(0)


# --- a subscriber


@asynchronous
async def test_segments_come_in_order_while_they_are_written() -> None:
    async with (
        running("a") as at,
        Publisher(at.session, at.url + "a", "video/MP2T") as publisher,
        Subscriber(at.session, at.url + "a") as segments,
    ):
        for index in range(8):
            async with publisher.segment() as segment:
                await segment.write(b"first")
                got = await anext(segments)
                assert (got.seq, got.content_type, await anext(got)) == (index, "video/MP2T", b"first")
                await segment.write(b"second")
                assert await anext(got) == b"second"
            assert await got.read() == b""
            assert got.received == 11
        at.hub.delete("a")
        assert await anext(segments, None) is None
        assert segments.ended == End("closed")
        assert await anext(segments, None) is None
        assert segments.skipped == 0


@asynchronous
async def test_the_next_request_is_under_way_while_a_segment_is_read() -> None:
    async with running("a") as at, Subscriber(at.session, at.url + "a") as segments:
        publisher = await at.start("POST", "a/0")
        await publisher.chunk(b"x")
        got = await anext(segments)
        await at.waiting(2)  # this segment's silent reader, once it has caught up, and the next one's
        assert await anext(got) == b"x"
        await at.post("a/1", b"y")
        await publisher.end()
        assert await (await anext(segments)).read() == b"y"


@asynchronous
async def test_a_waiting_request_is_made_anew_without_loss() -> None:
    asked: list[str] = []

    async def script(method: str, path: str, wire: Wire) -> None:
        asked.append(path)
        if len(asked) < 5:
            assert await wire.over(), "dropped, not answered"
        else:
            await wire.send(reply(200, b"x", Lp_Trickle_Seq=7))

    async with (
        scripted(script) as url,
        open_session() as session,
        Subscriber(session, url, NEXT, reissue=0.05, backoff=QUICK) as segments,
    ):
        got = await anext(segments)
        assert (got.seq, await got.read()) == (7, b"x")
        assert asked[:5] == ["/c/-1"] * 5


@asynchronous
async def test_closed_on_a_200_with_a_text_is_the_end_and_no_segment() -> None:
    async def script(method: str, path: str, wire: Wire) -> None:
        if path == "/c/0":
            await wire.send(reply(200, b"x", Lp_Trickle_Seq=0))
        else:
            await wire.send(reply(200, b"Entry not found\n", Lp_Trickle_Seq=1, Lp_Trickle_Closed="terminated"))

    async with scripted(script) as url, open_session() as session, Subscriber(session, url, 0) as segments:
        assert [await segment.read() async for segment in segments] == [b"x"]
        assert segments.ended == End("closed")


@asynchronous
@pytest.mark.parametrize("reason", ["", " ", " status code 470"])
async def test_470_with_and_without_a_reason_phrase(reason: str) -> None:
    async def script(method: str, path: str, wire: Wire) -> None:
        if path == "/c/3":
            head = f"HTTP/1.1 470{reason}\r\nLp-Trickle-Latest: 7\r\nLp-Trickle-Seq: 3\r\nContent-Length: 16\r\n\r\n"
            await wire.send(head.encode() + b"Entry not found\n")
        else:
            await wire.send(reply(200, b"x", Lp_Trickle_Seq=7))

    async with scripted(script) as url, open_session() as session, Subscriber(session, url, 3) as segments:
        got = await anext(segments)
        assert (got.seq, got.skipped, await got.read()) == (7, 4, b"x")


@asynchronous
async def test_who_is_too_slow_jumps_and_counts() -> None:
    async with running("a") as at, Subscriber(at.session, at.url + "a", 0) as segments:
        await at.post("a/0", b"0")
        assert await (await anext(segments)).read() == b"0"
        await at.waiting(1)  # the request for 1
        at.hub.write("a", b"1")
        for index in range(2, 12):
            at.hub.write("a", b"%d" % index)
        assert await (await anext(segments)).read() == b"1", "it was being read before its slot was taken"
        late = asyncio.create_task(anext(segments))
        await at.waiting(1)
        at.hub.write("a", b"12")
        got = await late
        assert (got.seq, await got.read()) == (12, b"12")
        assert segments.skipped == 10


@asynchronous
async def test_holes_and_empty_segments() -> None:
    async with running("a") as at, Subscriber(at.session, at.url + "a", 0) as segments:
        await at.post("a/0")
        hole = await at.start("POST", "a/1")
        assert await (await anext(segments)).read() == b""
        await at.waiting(2)  # the hole's publisher and reader
        hole.drop()
        await at.waiting(1)
        await at.post("a/2", b"2")
        got = [await anext(segments) for _ in range(2)]
        assert [segment.seq for segment in got] == [1, 2]
        assert await got[1].read() == b"2"


@asynchronous
async def test_a_segment_that_is_cut_off_fails_and_the_next_one_comes() -> None:
    seen = asyncio.Event()

    async def script(method: str, path: str, wire: Wire) -> None:
        if path == "/c/0":
            await wire.send(reply(200, Lp_Trickle_Seq=0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
            await wire.chunk(b"half")
            await seen.wait()
        elif path == "/c/1":
            await wire.send(reply(200, b"whole", Lp_Trickle_Seq=1))
        else:
            await wire.send(reply(404))

    async with scripted(script) as url, open_session() as session, Subscriber(session, url, 0) as segments:
        segment = await anext(segments)
        assert await anext(segment) == b"half"
        seen.set()
        with pytest.raises(SegmentFailed, match="segment 0: cut off after 4 bytes") as caught:
            await segment.read()
        assert caught.value.seq == 0
        assert [await segment.read() async for segment in segments] == [b"whole"]
        assert segments.ended == End("gone")


@asynchronous
async def test_a_segment_that_brings_nothing_more_fails_and_the_next_one_comes() -> None:
    async with running("a") as at, Subscriber(at.session, at.url + "a", 0, stall=0.1) as segments:
        publisher = await at.start("POST", "a/0")
        await publisher.chunk(b"x")
        with pytest.raises(SegmentFailed, match=r"no byte for 0\.1 s after 1"):
            await (await anext(segments)).read()
        await at.post("a/1", b"y")
        assert await (await anext(segments)).read() == b"y"


@asynchronous
async def test_a_reader_that_takes_its_time_is_no_stall_of_the_sender() -> None:
    async with running("a") as at, Subscriber(at.session, at.url + "a", 0, stall=0.1) as segments:
        publisher = await at.start("POST", "a/0")
        await publisher.chunk(b"x")
        segment = await anext(segments)
        assert await anext(segment) == b"x"
        await asyncio.sleep(0.25)  # twice the time that the sender has
        more = asyncio.create_task(anext(segment))
        await asyncio.sleep(0)
        await publisher.chunk(b"y")
        assert await more == b"y"


@asynchronous
async def test_a_segment_over_the_readers_own_bound() -> None:
    async with running("a") as at, Subscriber(at.session, at.url + "a", 0) as segments:
        await at.post("a/0", b"x" * 1001)
        with pytest.raises(SegmentFailed, match="longer than the 1000 bytes"):
            await (await anext(segments)).read(limit=1000)
        await at.post("a/1", b"y" * 1000)
        assert await (await anext(segments)).read(limit=1000) == b"y" * 1000


@asynchronous
async def test_no_channel_and_no_server() -> None:
    async with running() as at:
        async with Subscriber(at.session, at.url + "a") as segments:
            with pytest.raises(ChannelMissing, match=r"^http://127\.0\.0\.1:\d+/\*\*\*: 404"):
                await anext(segments)
        gone = at.url
    async with open_session() as session, Subscriber(session, gone + "a", backoff=QUICK) as segments:
        with pytest.raises(ChannelFailed, match=r"/\*\*\*: no luck 3 times .*: ClientConnectorError"):
            await anext(segments)


@asynchronous
async def test_a_server_that_comes_back_is_met_again() -> None:
    asked = 0

    async def script(method: str, path: str, wire: Wire) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            await wire.send(reply(503, b"starting"))
        elif asked > 2:
            await wire.send(reply(200, b"x", Lp_Trickle_Seq=0) if path == "/c/-2" else reply(404))

    async with scripted(script) as url, open_session() as session, Subscriber(session, url, backoff=QUICK) as segments:
        assert [await segment.read() async for segment in segments] == [b"x"]


@asynchronous
async def test_cancelled_while_it_waits_a_subscriber_goes_on_or_leaves_nothing() -> None:
    async with running("a") as at:
        async with Subscriber(at.session, at.url + "a") as segments:
            for _ in range(3):
                waiting = asyncio.create_task(anext(segments))
                await at.waiting(1)
                waiting.cancel()
                await asyncio.wait([waiting])
                assert at.hub.waiting == 1, "the request is not lost with the call"
            await at.post("a/0", b"x")
            got = await anext(segments)
            await at.waiting(1)
        await at.waiting(0)
        with pytest.raises(SegmentFailed):
            await got.read()


# --- a publisher


@asynchronous
async def test_the_next_segment_is_open_before_it_is_needed() -> None:
    async with running("a") as at, Publisher(at.session, at.url + "a", "video/MP2T") as publisher:
        await at.waiting(1)
        assert await at.next_is("a") == 0
        async with publisher.segment() as segment:
            await at.waiting(2)
            await segment.write(b"x")
            await at.waiting(1)
        assert published(at, 0).ended is Ended.COMPLETE
        assert published(at, 1).publishers == 1


@asynchronous
async def test_a_publisher_goes_on_where_the_one_before_left_and_releases_its_readers() -> None:
    async with running("a") as at:
        old = await at.start("POST", "a/6")
        await old.chunk(b"half")
        reader = await at.start("GET", "a/6")
        await reader.head()
        async with Publisher(at.session, at.url + "a", "video/MP2T") as publisher:
            assert await reader.body({}) == b"half"
            assert await publisher.send(b"x") == 7
        await at.waiting(0)


@asynchronous
@pytest.mark.parametrize("cut", [True, False])
async def test_readers_follow_a_publisher_that_starts_over_without_waiting_for_the_ring_to_turn(cut: bool) -> None:
    read: asyncio.Queue[bytes] = asyncio.Queue()

    async def follow() -> None:
        async with Subscriber(at.session, at.url + "a", 0) as segments:
            async for segment in segments:
                async for chunk in segment:
                    read.put_nowait(chunk)

    async with running("a") as at, asyncio.timeout(20):
        reading = asyncio.create_task(follow())
        async with Publisher(at.session, at.url + "a", "video/MP2T", first=0) as publisher:
            for _ in range(2):
                await publisher.send(b"old")
                assert await read.get() == b"old"
            if cut:
                await (await publisher.open()).write(b"half")
                assert await read.get() == b"half"
        async with Publisher(at.session, at.url + "a", "video/MP2T", first=0) as publisher:
            await publisher.send(b"new")
            await at.waiting(2)  # for 1: the publisher, which has opened it, and the reader
            for index in range(1, 4):
                assert await publisher.send(b"new%d" % index) == index
                assert await read.get() == b"new%d" % index
        at.hub.delete("a")
        await reading


@asynchronous
async def test_interim_answers_are_waited_through() -> None:
    """As go-livepeer's server sends them while a body brings nothing."""
    bodies: list[bytes] = []

    async def script(method: str, path: str, wire: Wire) -> None:
        for _ in range(3):
            await wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        bodies.append(await wire.body({}))
        await wire.send(reply(200, Lp_Trickle_Seq=path[-1]))

    async with (
        scripted(script) as url,
        open_session() as session,
        Publisher(session, url, "video/MP2T", first=0) as publisher,
    ):
        assert [await publisher.send(data) for data in (b"x", b"y")] == [0, 1]
    assert bodies == [b"x", b"y"]


@asynchronous
async def test_large_writes_wait_for_the_connection() -> None:
    """Nothing is queued: what ``sent`` says has been taken, and the rest waits for a reader that is slow."""
    held = asyncio.Event()

    async def script(method: str, path: str, wire: Wire) -> None:
        await held.wait()
        assert await _whole_body(wire) == 32 << 20
        await wire.send(reply(200, Lp_Trickle_Seq=path[3:]))

    async with (
        scripted(script) as url,
        open_session() as session,
        Publisher(session, url, "video/MP2T", first=0) as publisher,
    ):
        segment = await publisher.open()
        writing = asyncio.create_task(segment.write(bytes(32 << 20)))
        before = -1
        while segment.sent != before:
            before = segment.sent
            await asyncio.sleep(0.1)
        assert segment.sent < 32 << 20
        assert not writing.done()
        held.set()
        await writing
        await segment.close()


async def _whole_body(wire: Wire) -> int:
    size = 0
    while part := await wire.part():
        size += len(part)
    return size


@asynchronous
async def test_a_write_without_progress_fails_its_segment() -> None:
    async def script(method: str, path: str, wire: Wire) -> None:
        await asyncio.sleep(30)

    async with (
        scripted(script) as url,
        open_session() as session,
        Publisher(session, url, "video/MP2T", first=0, progress=0.2) as publisher,
    ):
        with pytest.raises(SegmentFailed, match=r"segment 0: the server takes no more, 0\.2 s after"):
            async with publisher.segment() as segment:
                await segment.write(bytes(64 << 20))
        with pytest.raises(SegmentFailed, match="has not confirmed it"):
            await publisher.send(b"x")
    await only_us_left()


@pytest.mark.parametrize("how", ["error", "cancel", "abort", "leave"])
@asynchronous
async def test_an_aborted_segment_never_looks_whole(how: str) -> None:
    bodies: dict[str, bytes] = {}
    seen = asyncio.Event()

    async def script(method: str, path: str, wire: Wire) -> None:
        if method == "POST":
            try:
                while data := await wire.reader.read(65536):
                    bodies[path] = bodies.get(path, b"") + data
                    seen.set()
            finally:
                bodies[path] = bodies.get(path, b"") + b" and the connection ended"
        else:
            bodies["DELETE"] = path.encode()
            await wire.send(reply(200))

    async with scripted(script) as url, open_session() as session:
        async with Publisher(session, url, "video/MP2T", first=0) as publisher:

            async def write() -> None:
                async with publisher.segment() as segment:
                    await segment.write(b"half")
                    await seen.wait()
                    if how == "error":
                        raise ValueError("ours")
                    if how == "abort":
                        await segment.abort()
                        with pytest.raises(RuntimeError, match="after close or abort"):
                            await segment.write(b"more")
                        raise ValueError("ours")
                    await asyncio.sleep(30)

            writing = asyncio.create_task(write())
            await seen.wait()
            if how == "cancel":
                writing.cancel()
            if how != "leave":
                await asyncio.wait([writing])
        writing.cancel()
        await asyncio.wait([writing])
        await only_us_left()
    assert bodies["/c/0"] == b"4\r\nhalf\r\n and the connection ended"
    assert bodies["/c/1"] == b" and the connection ended", "nor does the one that was open ahead"
    assert bodies.get("DELETE") == (b"/c/0" if how in ("error", "abort") else None), "readers are released"


@asynchronous
async def test_a_write_that_was_cancelled_spoils_its_segment() -> None:
    async def script(method: str, path: str, wire: Wire) -> None:
        await asyncio.sleep(30)

    async with (
        scripted(script) as url,
        open_session() as session,
        Publisher(session, url, "video/MP2T", first=0) as publisher,
    ):
        segment = await publisher.open()
        writing = asyncio.create_task(segment.write(bytes(64 << 20)))
        while not segment.sent:  # noqa: ASYNC110 - counted, not announced
            await asyncio.sleep(0)
        writing.cancel()
        await asyncio.wait([writing])
        for call in (segment.write(b"more"), segment.close()):
            with pytest.raises(SegmentFailed, match="cut off after"):
                await call


@asynchronous
async def test_before_its_first_byte_a_broken_post_is_repeated() -> None:
    posts: list[str] = []
    third = asyncio.Event()

    async def script(method: str, path: str, wire: Wire) -> None:
        posts.append(path)
        if posts.count(path) == 1 and path == "/c/0":
            return  # closed without an answer
        if posts.count(path) == 2 and path == "/c/0":
            await wire.send(reply(503, b"not yet"))
            return
        third.set()
        assert await wire.part() == b"x"
        assert await wire.part() == b""
        await wire.send(reply(200, Lp_Trickle_Seq=path[3:]))

    async with (
        scripted(script) as url,
        open_session() as session,
        Publisher(session, url, "video/MP2T", first=0, backoff=QUICK) as publisher,
    ):
        await third.wait()
        assert await publisher.send(b"x") == 0
        assert posts.count("/c/0") == 3


@asynchronous
async def test_after_its_first_byte_a_broken_post_fails_and_the_next_segment_works() -> None:
    async def script(method: str, path: str, wire: Wire) -> None:
        if method == "DELETE":
            await wire.send(reply(200))
            return
        assert await wire.part()
        if path != "/c/0":
            assert await wire.part() == b""
            await wire.send(reply(200, Lp_Trickle_Seq=path[3:]))

    async with (
        scripted(script) as url,
        open_session() as session,
        Publisher(session, url, "video/MP2T", first=0) as publisher,
    ):
        with pytest.raises(SegmentFailed, match="segment 0"):
            await publisher.send(b"x")
        assert await publisher.send(b"y") == 1


@asynchronous
async def test_refused_by_the_server_with_its_words() -> None:
    async with (
        running("a", limits=Limits(segment=1000)) as at,
        Publisher(at.session, at.url + "a", "video/MP2T") as publisher,
    ):
        with pytest.raises(SegmentFailed, match=r"segment 0: HTTP 413: .*a segment may have 1000 bytes"):
            await publisher.send(b"x" * 2000)
        assert await publisher.send(b"y") == 1
        assert published(at, 1).chunks == [b"y"]


@asynchronous
async def test_an_index_that_somebody_released_is_left_out() -> None:
    async with running("a") as at, Publisher(at.session, at.url + "a", "video/MP2T") as publisher:
        await at.waiting(1)
        await at.call("DELETE", "a/0")
        await settled(publisher)
        assert await publisher.send(b"x") == 1


@asynchronous
async def test_a_channel_that_is_closed_takes_nothing_more() -> None:
    async with running("a") as at, Publisher(at.session, at.url + "a", "video/MP2T") as publisher:
        await publisher.send(b"x")
        at.hub.delete("a")
        await settled(publisher)
        assert publisher.ended == End("closed"), "told without being asked"
        for _ in range(2):
            with pytest.raises(ChannelClosed, match=r"/\*\*\* is closed \(closed\)"):
                await publisher.send(b"y")


@asynchronous
async def test_a_channel_that_is_closed_amid_a_segment() -> None:
    async with running("a") as at, Publisher(at.session, at.url + "a", "video/MP2T") as publisher:
        first, second = await publisher.open(), await publisher.open()
        await first.write(b"x")
        await (await at.start("GET", "a/0")).head()
        at.hub.delete("a")
        with pytest.raises(ChannelClosed):
            await second.close()
        await first.write(b"late")
        await first.close()  # as the wire has it, who is writing is told with the next segment
        with pytest.raises(ChannelClosed):
            await publisher.open()


@asynchronous
async def test_publishing_where_no_channel_is() -> None:
    async with running() as at:
        with pytest.raises(ChannelMissing, match="nobody has created the channel"):
            async with Publisher(at.session, at.url + "a", "video/MP2T"):
                pass
        async with Publisher(at.session, at.url + "a", "video/MP2T", first=0) as publisher:
            with pytest.raises(ChannelMissing):
                await publisher.send(b"x")
    await only_us_left()


@asynchronous
async def test_a_server_that_stays_away() -> None:
    async def script(method: str, path: str, wire: Wire) -> None:
        await wire.send(reply(502, b"bad gateway"))

    async with scripted(script) as url, open_session() as session:
        with pytest.raises(ChannelFailed, match=r"/\*\*\*: no luck 3 times in a row, the last time: HTTP 502"):
            await Publisher(session, url, "video/MP2T", backoff=QUICK).__aenter__()
        async with Publisher(session, url, "video/MP2T", first=0, backoff=QUICK) as publisher:
            await settled(publisher)
            with pytest.raises(ChannelFailed, match="HTTP 502: bad gateway"):
                await publisher.send(b"x")
    await only_us_left()


@pytest.mark.parametrize("there", [True, False])
@asynchronous
async def test_delete_on_close(there: bool) -> None:
    async with running("a") as at:
        reader = await at.start("GET", "a/1")
        async with Publisher(at.session, at.url + "a", "video/MP2T", delete=True) as publisher:
            await publisher.send(b"x")
            if not there:
                at.hub.delete("a")
        assert at.hub.names == []
        assert (await reader.answer())[1]["lp-trickle-closed"] == "terminated"
        await publisher.aclose()
        with pytest.raises(RuntimeError, match="inside"):
            await publisher.open()


@pytest.mark.parametrize("moment", ["entering", "opening", "writing", "closing"])
@asynchronous
async def test_cancelled_at_any_await_nothing_is_left(moment: str) -> None:
    async def script(method: str, path: str, wire: Wire) -> None:
        if path == "/c/next" and moment != "entering":
            await wire.send(reply(200, b"0", Lp_Trickle_Latest=0))
        else:
            await asyncio.sleep(30)

    arrived = asyncio.Event()

    async def work(url: str) -> None:
        async with open_session() as session:
            if moment == "entering":
                arrived.set()
            async with Publisher(session, url, "video/MP2T") as publisher:
                if moment == "opening":
                    arrived.set()
                    await asyncio.sleep(30)
                segment = await publisher.open()
                arrived.set()
                if moment == "writing":
                    await segment.write(bytes(64 << 20))
                await segment.close()

    async with scripted(script) as url:
        working = asyncio.create_task(work(url))
        await arrived.wait()
        await asyncio.sleep(0.05)
        assert not working.done()
        working.cancel()
        await asyncio.wait([working])
        assert working.cancelled()
        ours = [task for task in asyncio.all_tasks() if "trickle_" in repr(task.get_coro()) or "Publ" in repr(task)]
        assert ours == []


# --- both ways, and with accidents


@asynchronous
async def test_a_stream_with_a_lossy_publisher_arrives_but_for_what_was_cut() -> None:
    async with running("a") as at:
        got: dict[int, bytes] = {}

        async def collect() -> None:
            async with Subscriber(at.session, at.url + "a", 0) as segments:
                async for segment in segments:
                    got[segment.seq] = await segment.read()

        collecting = asyncio.create_task(collect())
        async with Publisher(at.session, at.url + "a", "video/MP2T", delete=True) as publisher:
            for index in range(30):
                if index % 7 == 3:
                    segment = await publisher.open()
                    await segment.write(b"half")
                    await segment.abort()
                else:
                    assert await publisher.send(b"%d" % index * 1000) == index
                async with asyncio.timeout(20):
                    while index not in got:  # noqa: ASYNC110 - a dictionary has no event
                        await asyncio.sleep(0.001)
        await collecting
        whole = {index: b"%d" % index * 1000 for index in range(30) if index % 7 != 3}
        assert {index: data for index, data in got.items() if index in whole} == whole
        assert all(b"half".startswith(data) for index, data in got.items() if index not in whole)


# --- TLS


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A self-signed certificate and its key, as an orchestrator makes itself one."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command to make a certificate with")
    path = tmp_path / "both.pem"
    make = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost "
        "-addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out cert.pem"
    )
    subprocess.run(make.split(), cwd=tmp_path, check=True, capture_output=True, timeout=30)
    path.write_bytes((tmp_path / "key.pem").read_bytes() + (tmp_path / "cert.pem").read_bytes())
    return path


@asynchronous
async def test_certificates_are_verified_unless_asked_not_to(certificate: Path) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply(200, b"x", Lp_Trickle_Seq=0))
        await writer.drain()
        writer.close()

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    async with await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context) as listener:
        url = f"https://127.0.0.1:{listener.sockets[0].getsockname()[1]}/c"
        async with open_session() as session, Subscriber(session, url, backoff=QUICK) as segments:
            with pytest.raises(ChannelFailed, match=r"self-signed certificate.*--insecure"):
                await anext(segments)
        async with open_session(tls=False) as session, Subscriber(session, url, backoff=QUICK) as segments:
            assert await (await anext(segments)).read() == b"x"
