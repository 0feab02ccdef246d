"""The trickle server, over raw sockets on loopback. ``test_line_NN`` is line NN of the wire contract's checklist."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
import zlib
from typing import Any

import pytest
from aiohttp import web

from gpu_byoc.core.trickle import CHANGES, NEXT, Limits
from gpu_byoc.errors import ChannelMissing, ConfigError, UnsupportedMedia
from gpu_byoc.transport import trickle_server
from gpu_byoc.transport.trickle_client import open_session
from tests.support.trickle import Clock, Running, Wire, running
from tests.support.workers import asynchronous

CLOSED, LATEST, SEQ = "lp-trickle-closed", "lp-trickle-latest", "lp-trickle-seq"


async def begun(at: Running, path: str, data: bytes, **headers: str) -> Wire:
    """A POST that has sent something and goes on."""
    wire = await at.start("POST", path, **headers)
    await wire.chunk(data)
    return wire


async def preconnected(at: Running, path: str, count: int = 1, **headers: str) -> Wire:
    """A POST without a byte; ``count`` wait for segments then."""
    wire = await at.start("POST", path, **headers)
    await at.waiting(count)
    return wire


async def reading(at: Running, path: str) -> tuple[Wire, dict[str, str]]:
    """A GET whose answer has begun."""
    wire = await at.start("GET", path)
    status, headers = await wire.head()
    assert status == 200
    return wire, headers


@asynchronous
async def test_line_01_a_reader_gets_what_is_there_then_each_chunk_at_once_then_the_end() -> None:
    async with running("a") as at:
        publisher = await begun(at, "a/0", b"one")
        reader, _ = await reading(at, "a/0")
        assert await reader.part() == b"one"
        delays = []
        for _ in range(10):
            sent = time.perf_counter()
            await publisher.chunk(b"more")
            assert await reader.part() == b"more"
            delays.append(time.perf_counter() - sent)
        assert sorted(delays)[5] < 0.02, "milliseconds, on a busy machine in debug mode"
        assert await reader.silent()
        await publisher.end()
        assert await reader.part() == b""
        assert (await publisher.answer())[0] == 200


@asynchronous
async def test_line_02_every_200_names_its_index() -> None:
    async with running("a") as at:
        for path, index in (("a/0", "0"), ("a/-1", "1"), ("a/007", "7")):
            status, headers, _ = await at.post(path, b"x")
            assert (status, headers[SEQ]) == (200, index)
        for path, index in (("a/1", "1"), ("a/-2", "7"), ("a/+7", "7")):
            status, headers, _ = await at.call("GET", path)
            assert (status, headers[SEQ]) == (200, index)


@asynchronous
async def test_line_03_an_absent_index_is_470_and_says_what_comes_next() -> None:
    async with running("a") as at:
        await at.post("a/3", b"x")
        for path in ("a/0", "a/5", "a/+05"):
            status, headers, body = await at.call("GET", path)
            assert (status, headers[LATEST], headers[SEQ]) == (470, "4", path[2:])
            assert body == b"Entry not found\n"
            assert CLOSED not in headers


@asynchronous
async def test_line_04_an_unknown_channel_is_404_and_a_posts_connection_closes_while_its_body_is_open() -> None:
    async with running() as at:
        assert (await at.call("GET", "a/0"))[::2] == (404, b"Stream not found\n")
        publisher = await begun(at, "a/0", b"x")
        status, headers, body = await publisher.answer()
        assert (status, body, headers["connection"]) == (404, b"Stream not found\n", "close")
        await publisher.end()
        assert await publisher.over()
        silent = await at.start("POST", "a/0")
        assert (await silent.head())[0] == 404


@asynchronous
async def test_line_05_next() -> None:
    async with running("a") as at:
        assert (await at.call("GET", "a/next"))[1][LATEST] == "0"
        await at.post("a/41", b"x")
        status, headers, body = await at.call("GET", "a/next")
        assert (status, headers[LATEST], body) == (200, "42", b"42")
        assert headers["content-type"].startswith("text/plain")
        assert (await at.call("GET", "b/next"))[0] == 404
        assert (await at.post("a/next", b"x"))[0] == 400


@asynchronous
async def test_line_06_minus_one_waits_for_the_next_and_minus_two_gets_the_newest() -> None:
    async with running("a") as at:
        empty = [await at.start("GET", path) for path in ("a/-1", "a/-2")]
        await at.waiting(2)
        publisher = await begun(at, "a/0", b"0")
        for reader in empty:
            assert (await reader.head())[1][SEQ] == "0"
            assert await reader.part() == b"0"
        newest, headers = await reading(at, "a/-2")
        assert (headers[SEQ], headers[LATEST]) == ("0", "1")
        assert await newest.part() == b"0"
        upcoming = await at.start("GET", "a/-1")
        assert await upcoming.silent()
        await publisher.end()
        assert await upcoming.silent()
        await at.post("a/1", b"1")
        status, headers, body = await upcoming.answer()
        assert (status, headers[SEQ], body) == (200, "1", b"1")
        assert LATEST not in headers, "it was the next one when it was asked for"


@asynchronous
async def test_line_07_the_next_index_waits_without_a_status_line() -> None:
    async with running("a") as at:
        readers = [await at.start("GET", path) for path in ("a/0", "a/1")]
        await at.waiting(2)
        assert [await reader.silent() for reader in readers] == [True, True]
        await at.post("a/0", b"0")
        assert (await readers[0].answer())[2] == b"0"
        assert await readers[1].silent()
        at.hub.delete("a")
        assert (await readers[1].answer())[0] == 200


@asynchronous
async def test_line_08_a_post_may_stay_silent_for_ten_minutes() -> None:
    async with running("_kept", "a") as at:
        kept = await preconnected(at, "_kept/0")
        idle = await preconnected(at, "a/0", 2)
        at.clock.now += 601
        assert await kept.silent(), "no interim answers either"
        assert await idle.silent()
        assert at.hub.sweep_now() == ["a"]
        status, headers, _ = await idle.answer()
        assert (status, headers[CLOSED]) == (200, "terminated")
        await kept.chunk(b"x")
        await kept.end()
        assert (await kept.answer())[0] == 200


@asynchronous
async def test_line_09_the_first_byte_moves_next_and_the_opening_does_not() -> None:
    async with running("a") as at:
        publisher = await preconnected(at, "a/6")
        assert await at.next_is("a") == 0
        reader = await at.start("GET", "a/6")
        await publisher.chunk(b"x")
        await reader.head()
        assert await at.next_is("a") == 7


@asynchronous
async def test_line_10_an_empty_post() -> None:
    async with running("a") as at:
        reader = await at.start("GET", "a/0")
        await at.waiting(1)
        status, headers, body = await at.post("a/0")
        assert (status, headers[SEQ], headers["connection"], body) == (200, "0", "close", b"")
        status, headers, body = await reader.answer()
        assert (status, headers[SEQ], headers[LATEST], body) == (200, "0", "1", b"")
        assert "content-type" not in headers
        assert CLOSED not in headers
        assert await at.next_is("a") == 1


@asynchronous
async def test_line_11_deleting_a_channel_ends_all_who_wait() -> None:
    async with running("a") as at:
        waiting = [await at.start("GET", "a/1"), await preconnected(at, "a/1", 2)]
        writing = await begun(at, "a/0", b"x")
        amid, _ = await reading(at, "a/0")
        status, _, body = await at.call("DELETE", "a")
        assert (status, body) == (200, b"")
        for wire in waiting:
            status, headers, body = await wire.answer()
            assert (status, headers[CLOSED], headers[SEQ], body) == (200, "terminated", "1", b"")
        assert await amid.body({}) == b"x", "what is being read ends cleanly"
        await writing.chunk(b"late")
        await writing.end()
        status, headers, _ = await writing.answer()
        assert status == 200, "who is writing is not told until the next segment"
        assert CLOSED not in headers
        for method, path in (("GET", "a/0"), ("GET", "a/next"), ("DELETE", "a/0")):
            assert (await at.call(method, path))[0] == 404
        assert (await at.post("a/1", b"x"))[0] == 404


@asynchronous
async def test_line_12_the_ring_holds_five() -> None:
    async with running("a") as at:
        ahead = await preconnected(at, "a/0")
        for index in range(6):
            wire, ahead = ahead, await at.start("POST", f"a/{index + 1}")
            await wire.chunk(b"%d" % index)
            await wire.end()
            assert (await wire.answer())[0] == 200
        channel = at.hub.channel("a")
        assert channel is not None
        assert len(channel.segments) <= 5
        status, headers, _ = await at.call("GET", "a/0")
        assert (status, headers[LATEST]) == (470, "6")
        assert (await at.call("GET", "a/5"))[2] == b"5"


@asynchronous
async def test_line_13_all_readers_get_the_same_bytes() -> None:
    async with running("a") as at:
        early = [await at.start("GET", "a/0") for _ in range(8)]
        publisher = await at.start("POST", "a/0")
        chunks = [bytes([number]) * (1 + 997 * number) for number in range(60)]
        late = []
        for number, chunk in enumerate(chunks):
            await publisher.chunk(chunk)
            if number % 10 == 5:
                late.append(await at.start("GET", "a/0"))
        await publisher.end()
        for reader in early + late:
            assert (await reader.answer())[2] == b"".join(chunks)


@asynchronous
async def test_line_14_post_minus_one() -> None:
    async with running("a") as at:
        await at.post("a/5", b"x")
        status, headers, _ = await at.post("a/-1", b"y")
        assert (status, headers[SEQ]) == (200, "6")
        assert (await at.call("GET", "a/6"))[2] == b"y"


@asynchronous
async def test_line_15_reset_releases_the_readers_of_lower_segments_and_keeps_their_bytes() -> None:
    async with running("a") as at:
        writing = await begun(at, "a/0", b"half")
        amid, _ = await reading(at, "a/0")
        assert await amid.part() == b"half"
        waiting = await at.start("GET", "a/1")
        await at.waiting(2)
        newer = await begun(at, "a/2", b"new", Lp_Trickle_Reset="1")
        assert await amid.part() == b""
        assert (await waiting.answer())[::2] == (200, b"")
        assert (await at.call("GET", "a/0"))[2] == b"half"
        await writing.end()
        assert (await writing.answer())[0] == 200
        await newer.end()


@asynchronous
async def test_line_16_a_publisher_that_is_dropped_leaves_a_gap_and_nothing_more() -> None:
    async with running("a") as at:
        hole = await preconnected(at, "a/0")
        reader = await at.start("GET", "a/0")
        await at.waiting(2)
        hole.drop()
        await at.waiting(1)
        assert await reader.silent(), "the same index may still come on a new connection"
        cut = await begun(at, "a/1", b"half")
        status, _, body = await reader.answer()
        assert (status, body) == (200, b""), "a later segment has started: this one will not come"
        amid, _ = await reading(at, "a/1")
        assert await amid.part() == b"half"
        cut.drop()
        assert await amid.part() == b"", "readers are not left hanging"
        await at.post("a/2", b"whole")
        assert (await at.call("GET", "a/2"))[2] == b"whole"


@asynchronous
async def test_line_17_a_waiting_get_dropped_and_repeated_for_an_hour() -> None:
    async with running("a") as at:
        for _ in range(180):  # every 20 s
            reader = await at.start("GET", "a/0")
            await at.waiting(1)
            reader.drop()
            await at.waiting(0)
        reader = await at.start("GET", "a/0")
        await at.post("a/0", b"x")
        assert (await reader.answer())[2] == b"x"
        assert at.hub.waiting == 0


@asynchronous
async def test_line_18_data_carries_the_channels_type() -> None:
    async with running("a", mime="video/MP2T", autocreate=True) as at:
        await at.post("a/0", b"x", Content_Type="application/json")
        assert (await at.call("GET", "a/0"))[1]["content-type"].lower() == "video/mp2t"
        await at.post("b/0", b"x", Content_Type="application/jsonl")
        assert (await at.call("GET", "b/0"))[1]["content-type"] == "application/jsonl"


@asynchronous
async def test_line_19_creating() -> None:
    async with running("there", autocreate=True) as at:
        for name in ("a", "a", "there"):
            status, _, body = await at.post(name, b"ignored", Expect_Content="application/json")
            assert (status, body) == (200, b"")
        await at.post("a/0", b"x")
        await at.post("there/0", b"x")
        assert (await at.call("GET", "a/0"))[1]["content-type"] == "application/json"
        assert (await at.call("GET", "there/0"))[1]["content-type"] == "video/MP2T"
    async with running("there") as at:
        assert (await at.post("there"))[0] == 200
        assert (await at.post("a", Expect_Content="text/plain"))[::2] == (404, b"Stream not found\n")


@asynchronous
async def test_line_20_deleting_a_segment() -> None:
    async with running("a") as at:
        reader, publisher = await at.start("GET", "a/0"), await preconnected(at, "a/0", 2)
        assert (await at.call("DELETE", "a/0"))[0] == 200
        status, headers, body = await reader.answer()
        assert (status, headers[LATEST], body) == (200, "1", b"")
        assert CLOSED not in headers
        status, headers, _ = await publisher.answer()
        assert (status, headers[SEQ], headers["connection"]) == (200, "0", "close")
        assert CLOSED not in headers
        assert (await at.call("DELETE", "a/9"))[::2] == (400, b"Nonexistent segment\n")
        assert (await at.call("DELETE", "b/0"))[0] == 404


@asynchronous
async def test_line_21_deleting_an_unknown_channel() -> None:
    async with running("a") as at:
        assert [(await at.call("DELETE", "a"))[0] for _ in range(2)] == [200, 400]
        assert (await at.call("DELETE", "b"))[2] == b"Invalid stream\n"


@pytest.mark.parametrize("written", [2, 3, 5, 6, 8])
@asynchronous
async def test_line_22_readers_follow_a_publisher_that_starts_over(written: int) -> None:
    async with running("a") as at:
        for index in range(written):
            await at.post(f"a/{index}", b"old")
        waiting = await at.start("GET", "a/-1")
        await at.waiting(1)
        assert (await at.post("a/0", b"new"))[0] == 200
        assert await at.next_is("a") == 1
        assert (await at.call("GET", "a/-2"))[2] == b"new"
        assert (await waiting.answer())[::2] == (200, b""), "the index it waited for will not come soon"
        upcoming = await at.start("GET", "a/-1")
        await at.waiting(1)
        await at.post("a/1", b"newer")
        assert (await upcoming.answer())[2] == b"newer"


@asynchronous
async def test_line_23_idle_channels_vanish() -> None:
    async with running("a", "_kept", sweep=0.01) as at:
        reader, kept = await at.start("GET", "a/0"), await at.start("GET", "_kept/0")
        await at.waiting(2)
        at.clock.now += 299
        assert await reader.silent()
        at.clock.now += 2
        status, headers, _ = await reader.answer()
        assert (status, headers[CLOSED]) == (200, "terminated")
        assert await kept.silent()
        assert at.hub.names == ["_kept"]


@pytest.mark.parametrize("index", ["-3", "-5", "-10", "x", "1.5", "%20", "1e3", "99999999999999999999"])
@asynchronous
async def test_line_24_bad_indices_are_400_and_hurt_nobody(index: str) -> None:
    async with running("a") as at:
        for method in ("GET", "DELETE"):
            assert (await at.call(method, f"a/{index}"))[::2] == (400, b"Invalid idx\n")
        status, headers, body = await at.post(f"a/{index}", b"x")
        assert (status, headers["connection"], body) == (400, "close", b"Invalid idx\n")
        assert (await at.call("DELETE", "a/-1"))[0] == 400
        assert (await at.post("a/-2", b"x"))[0] == 400
        assert (await at.post("a/0", b"good"))[0] == 200
        assert (await at.call("GET", "a/0"))[2] == b"good"


# --- what else the wire contract says


@asynchronous
async def test_an_open_index_posted_again_is_the_same_segment() -> None:
    async with running("a") as at:
        first = await begun(at, "a/0", b"1")
        reader, _ = await reading(at, "a/0")
        assert await reader.part() == b"1"
        second = await begun(at, "a/0", b"2")
        assert await reader.part() == b"2"
        first.drop()  # the connection that was replaced breaks: no harm
        await second.chunk(b"3")
        assert await reader.part() == b"3"
        await second.end()
        assert await reader.part() == b""


@asynchronous
async def test_a_finished_index_posted_again_is_ignored() -> None:
    async with running("a") as at:
        await at.post("a/0", b"once")
        again = await at.start("POST", "a/0")
        status, headers, _ = await again.answer()
        assert (status, headers[SEQ], headers["connection"]) == (200, "0", "close")
        assert (await at.call("GET", "a/0"))[2] == b"once"
        assert await at.next_is("a") == 1


@asynchronous
async def test_a_jump_ahead() -> None:
    async with running("a") as at:
        await at.post("a/100", b"x")
        assert await at.next_is("a") == 101
        assert (await at.call("GET", "a/0"))[1][LATEST] == "101"


@asynchronous
async def test_two_posts_to_minus_one_share_a_segment_until_one_has_a_byte() -> None:
    async with running("a") as at:
        first, second = await preconnected(at, "a/-1"), await preconnected(at, "a/-1", 2)
        reader = await at.start("GET", "a/0")
        await first.chunk(b"1")
        await reader.head()
        await second.chunk(b"2")
        assert [await reader.part(), await reader.part()] == [b"1", b"2"]


@asynchronous
async def test_a_preconnected_index_can_be_read_before_its_time() -> None:
    async with running("a") as at:
        publisher = await preconnected(at, "a/7")
        reader = await at.start("GET", "a/7")
        await publisher.chunk(b"x")
        assert (await reader.head())[1][LATEST] == "0", "as it was when the request came"


@asynchronous
async def test_a_slow_reader_drains_the_segment_that_has_left_the_ring() -> None:
    async with running("a") as at:
        big = bytes(3 << 20)
        reader = await at.start("GET", "a/0")
        publisher = await begun(at, "a/0", big)
        await publisher.end()
        assert (await publisher.answer())[0] == 200
        await reader.head()
        for index in range(1, 7):
            await at.post(f"a/{index}", b"x")
        assert (await at.call("GET", "a/0"))[0] == 470
        assert len(await reader.body({})) == len(big)


@asynchronous
async def test_a_reader_that_takes_nothing_is_dropped() -> None:
    async with running("a", stall=0.1) as at:
        publisher = await begun(at, "a/0", bytes(24 << 20))
        reader = await at.start("GET", "a/0")
        await publisher.end()
        assert (await publisher.answer())[0] == 200
        await asyncio.sleep(0.3)
        assert (await reader.head())[0] == 200
        with pytest.raises(asyncio.IncompleteReadError):
            await reader.body({})


@pytest.mark.parametrize("headers", [{"Connection": "close"}, {"X-Unknown": "1", "Expect": "100-continue"}])
@asynchronous
async def test_posts_as_others_send_them(headers: dict[str, str]) -> None:
    async with running("a") as at:
        wire = await begun(at, "a/0", b"x", **headers)
        await wire.end()
        status, answer, _ = await wire.answer() if "Expect" not in headers else await _after_continue(wire)
        assert (status, answer[SEQ]) == (200, "0")
        if "Connection" in headers:
            assert await wire.over()


async def _after_continue(wire: Wire) -> tuple[int, dict[str, str], bytes]:
    assert (await wire.head())[0] == 100
    return await wire.answer()


@asynchronous
async def test_a_connection_is_used_again() -> None:
    async with running("a") as at:
        wire = await begun(at, "a/0", b"x")
        await wire.end()
        assert (await wire.answer())[0] == 200
        await wire.send(f"GET {at.base}a/0 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert (await wire.answer())[2] == b"x"


@asynchronous
async def test_mounted_in_another_application_a_body_that_cannot_be_decoded_is_500() -> None:
    """Our own listener takes bodies as they are; a runner with aiohttp's defaults inflates them."""
    server, app = trickle_server.TrickleServer(autocreate=True), web.Application()
    server.mount(app, "/ai/trickle")
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with open_session() as session:
            at = Running(server, "", runner.addresses[0][1], "/ai/trickle/", session, Clock())
            publisher = await begun(at, "a/0", zlib.compress(b"good" * 100)[:-4], Content_Encoding="deflate")
            reader = await at.start("GET", "a/-2")
            assert (await reader.head())[0] == 200
            assert await reader.part()
            await publisher.chunk(b"garbage instead of a checksum")
            status, headers, body = await publisher.answer()
            assert (status, headers["connection"], body) == (500, "close", b"Server error\n")
            await reader.body({})
            for wire in at.wires:
                await wire.close()
    finally:
        await runner.cleanup()


@asynchronous
async def test_broken_chunks_end_the_segment_with_their_connection() -> None:
    """aiohttp's C parser tells nobody about them but the next request on the connection."""
    async with running("a") as at:
        publisher = await begun(at, "a/0", b"good")
        reader, _ = await reading(at, "a/0")
        assert await reader.part() == b"good"
        await publisher.send(b"no chunk\r\n")
        publisher.drop()
        assert await reader.part() == b""
        assert (await at.post("a/1", b"x"))[0] == 200


@asynchronous
async def test_over_a_bound_the_publisher_is_refused_and_readers_are_released() -> None:
    async with running("a", limits=Limits(segment=1000)) as at:
        publisher = await begun(at, "a/0", b"x" * 800)
        reader, _ = await reading(at, "a/0")
        assert await reader.part() == b"x" * 800
        await publisher.chunk(b"x" * 800)
        status, headers, body = await publisher.answer()
        assert (status, headers["connection"]) == (413, "close")
        assert b"a segment may have 1000 bytes" in body
        assert await reader.part() == b""
        assert (await at.post("a/1", b"x"))[0] == 200


@asynchronous
async def test_over_the_bound_on_channels() -> None:
    async with running("a", autocreate=True, limits=Limits(channels=1)) as at:
        status, headers, _ = await at.post("b/0", b"x")
        assert (status, headers["retry-after"]) == (503, "1")
        assert (await at.post("a/0", b"x"))[0] == 200


@asynchronous
async def test_other_methods_are_405() -> None:
    async with running("a") as at:
        for method in ("HEAD", "PUT", "PATCH"):
            assert (await (await at.start(method, "a/0")).head())[0] == 405


@pytest.mark.parametrize("base", ["/", "/ai/trickle/", "ai/trickle"])
@asynchronous
async def test_base_paths(base: str) -> None:
    async with running("a", base=base) as at:
        assert at.url == f"http://127.0.0.1:{at.port}{at.base}"
        assert (await at.post("a/0", b"x"))[0] == 200
        assert (await at.call("GET", "a/0"))[2] == b"x"


@asynchronous
async def test_the_changefeed_over_the_wire() -> None:
    async with running(changefeed=True, autocreate=True) as at:
        assert (await at.call("GET", f"{CHANGES}/0"))[2] == b'{"added":["_changes"]}'
        waiting = await at.start("GET", f"{CHANGES}/-1")
        await at.post("a/0", b"x")
        status, headers, body = await waiting.answer()
        assert (status, json.loads(body)) == (200, {"added": ["a"]})
        assert headers["content-type"] == "application/json"
        await at.call("DELETE", "a")
        assert (await at.call("GET", f"{CHANGES}/-2"))[2] == b'{"removed":["a"]}'
        assert (await at.post(f"{CHANGES}/-1", b"forged"))[0] == 400
        assert (await at.call("DELETE", CHANGES))[0] == 400


@asynchronous
async def test_hooks_may_refuse() -> None:
    asked: list[tuple[str, str]] = []

    def hook(what: str) -> Any:
        async def ask(name: str, request: web.Request) -> None:
            asked.append((what, name))
            if request.headers.get("Pass") != "please":
                raise UnsupportedMedia("say please")
            if name == "broken":
                raise ValueError("a bug in the hook")

        return ask

    async with running(autocreate=True, on_create=hook("create"), on_delete=hook("delete")) as at:
        assert (await at.post("a"))[::2] == (415, b"say please\n")
        assert (await at.post("a/0", b"x"))[0] == 415
        assert at.hub.names == []
        assert (await at.post("a/0", b"x", Pass="please"))[0] == 200
        assert (await at.post("a"))[0] == 200, "it exists; nothing is created"
        assert (await at.call("DELETE", "a"))[0] == 415
        assert (await at.call("DELETE", "a", Pass="please"))[0] == 200
        assert (await at.call("DELETE", "a"))[0] == 400
        assert (await at.post("broken", Pass="please"))[0] == 500
        assert at.hub.names == []
    assert [what for what, _ in asked] == ["create", "create", "create", "delete", "delete", "create"]


@asynchronous
async def test_stopping_answers_those_who_wait() -> None:
    async with running("a") as at:
        await at.start("GET", "a/0")
        await preconnected(at, "a/0", 2)
        wires, at.wires = at.wires, []
    for wire in wires:
        status, headers, _ = await wire.answer()
        assert (status, headers[CLOSED]) == (200, "terminated")
        await wire.close()


# --- in the same process


@asynchronous
async def test_local_publisher_and_subscriber() -> None:
    async with running("a") as at:
        hub = at.hub
        hub.write("a", b"0")
        subscriber = hub.subscribe("a")
        assert await hub.read(await anext(subscriber)) == b"0"
        waiting = asyncio.create_task(anext(subscriber))
        await at.waiting(1)
        publisher = await begun(at, "a/1", b"half")
        segment = await waiting
        assert await hub.fresh(segment, 0) == [b"half"]
        await publisher.chunk(b"whole")
        assert await hub.fresh(segment, 1) == [b"whole"]
        await publisher.end()
        assert await hub.fresh(segment, 2) == []
        assert (await at.call("GET", "a/1"))[2] == b"halfwhole"
        for index in range(2, 12):
            hub.write("a", b"%d" % index)
        waiting = asyncio.create_task(anext(subscriber))
        await at.waiting(1)
        hub.write("a", b"12")
        assert await hub.read(await waiting) == b"12"
        assert subscriber.skipped == 10
        last = asyncio.create_task(anext(subscriber, None))
        await at.waiting(1)
        hub.delete("a")
        assert await last is None
        with pytest.raises(ChannelMissing, match="no channel 'a'"):
            hub.write("a", b"x")
        with pytest.raises(ChannelMissing):
            hub.subscribe("a", NEXT)


@asynchronous
async def test_a_local_subscriber_that_is_cancelled_leaves_no_trace() -> None:
    async with running("a") as at:
        waiting = asyncio.create_task(anext(at.hub.subscribe("a")))
        await at.waiting(1)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert at.hub.waiting == 0


# --- as a command


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_and_ends_cleanly(number: signal.Signals) -> None:
    code = "import sys; from gpu_byoc.transport.trickle_server import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--port", "0", "--base-path", "/ai/trickle", "--autocreate"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            line = child.stdout.readline()
            assert line.startswith("trickle server on http://127.0.0.1:")
            assert line.endswith("/ai/trickle/\n")
            url = line.split()[-1]
            asyncio.run(_once(url))
            child.send_signal(number)
            assert child.wait(20) == 0
        finally:
            child.kill()


async def _once(url: str) -> None:
    import aiohttp

    async with aiohttp.ClientSession() as session:
        async with session.post(f"{url}a/0", data=b"hello") as answer:
            assert answer.status == 200
        async with session.get(f"{url}a/0") as answer:
            assert await answer.read() == b"hello"


@pytest.mark.parametrize("arguments", ["--max-segment-mb 20 --max-channel-mb 10", "--port 65536", "--port -1"])
def test_the_command_refuses_numbers_that_cannot_be(arguments: str) -> None:
    with pytest.raises(ConfigError, match=arguments.split()[0]):
        trickle_server.main(arguments.split())
