"""Clients that send or read slowly, from one address, keep no slot from those who have fewer."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import socket
import threading
from collections.abc import AsyncIterator

import pytest
from aiohttp.test_utils import make_mocked_request

from gpu_byoc.config import EngineConfig
from gpu_byoc.engine.engine import SLOW
from gpu_byoc.errors import Overloaded
from gpu_byoc.frames import FrameSpec
from gpu_byoc.media import images
from gpu_byoc.processors.passthrough import Passthrough
from gpu_byoc.worker.bodies import Body, Budget, caller
from tests.support.streams import clip, publish, rig, watching
from tests.support.workers import Running, another, asynchronous, running

FRAME = 64 * 48 * 3
LARGE = 3 << 18
RAW = "application/octet-stream"
SIZED = RAW + ";width=64;height=48"


def head(size: int, kind: str = RAW) -> bytes:
    return f"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {size}\r\n\r\n".encode()


def reclaimed(r: Running) -> int:
    assert r.worker.engine is not None
    return sum(engine.reclaimed for engine in r.worker.engine.engines)


@contextlib.asynccontextmanager
async def dripping(
    r: Running, count: int, size: int = FRAME, kind: str = RAW, addresses: int = 1, sent: int = 100
) -> AsyncIterator[list[int]]:
    """So many connections, of these addresses in turn, each with a body of which ``sent`` bytes come and no end, and
    another one when it is refused. The statuses that they get are collected."""
    statuses: list[int] = []

    async def drip(number: int) -> None:
        address = "127.0.0.1" if addresses == 1 else f"127.0.1.{number % addresses}"
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", r.port, local_addr=(address, 0))
            try:
                writer.write(head(size, kind) + bytes(sent))
                statuses.append(int((await reader.readuntil(b"\r\n")).split()[1]))
            except (OSError, asyncio.IncompleteReadError):  # cut off before all of it was sent
                pass
            finally:
                writer.close()

    tasks = [asyncio.create_task(drip(number)) for number in range(count)]
    try:
        yield statuses
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def taken(r: Running) -> int:
    """Slots, of all frame sizes."""
    return -r.free()


async def until_full(r: Running) -> None:
    """All slots are taken, and have been for as long as makes a caller slow."""
    assert r.worker.engine is not None
    await r.until(lambda: any(room["free"] == 0 for room in r.worker.engine.rooms()) if r.worker.engine else False)
    await asyncio.sleep(2 * SLOW)


@asynchronous
async def test_bodies_that_never_end_do_not_keep_another_client_out() -> None:
    """More than there are slots, so that the line is theirs as well; the other client's jobs are all done."""
    async with running(Passthrough(), EngineConfig(slots=4, max_batch=4), slot_wait=20) as r, another(r) as good:
        async with dripping(r, 6) as statuses:
            await until_full(r)
            for number in range(4):
                data = bytes([number]) * FRAME
                status, _, body = await good.post(data)
                assert (status, body) == (200, data)
            several = await asyncio.gather(*(good.post(bytes(FRAME)) for _ in range(2)))
            assert [status for status, *_ in several] == [200, 200]
            assert statuses, "who lost its slot was told so"
            assert set(statuses) == {503}
            assert reclaimed(r) >= 4, "one at least for each, and those that came before its turn"
            metrics = await (await good.session.get(r.url + "/metrics")).text()
            assert f'byoc_slots_reclaimed_total{{device="cpu"}} {float(reclaimed(r))}' in metrics
        await r.until(lambda: r.free() == 0)


@asynchronous
async def test_answers_that_nobody_reads_do_not_keep_another_client_out(caplog: pytest.LogCaptureFixture) -> None:
    async with running(Passthrough(), EngineConfig(slots=4, max_batch=4), slot_wait=20) as r, another(r) as good:
        r.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with contextlib.ExitStack() as open_ones:
            deaf = []
            for number in range(1, 5):
                sock = open_ones.enter_context(socket.socket())
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                sock.connect(("127.0.0.1", r.port))
                await asyncio.to_thread(sock.sendall, head(LARGE) + bytes(LARGE))
                deaf.append(sock)
                await asyncio.to_thread(sock.recv, 1)  # its answer has begun, so that the first is the oldest
                assert taken(r) == number
            await until_full(r)
            status, _, body = await good.post(b"x" * LARGE)
            assert (status, body) == (200, b"x" * LARGE)
            assert reclaimed(r) == 1, "no more than had to go"
            got = await asyncio.to_thread(_read, deaf[0])
            assert got < LARGE, "the oldest was cut off, and not with a whole answer"
        await r.until(lambda: r.free() == 0)
    assert not [each for each in caplog.records if each.exc_info], "a client that is cut off is no bug of ours"


@pytest.mark.parametrize("name", ["s", "127.0.0.1"])
def test_a_live_stream_beside_them_loses_no_frame(name: str) -> None:
    """Its frames are as large as theirs, so the slots are the same. That it is called as they are makes it none of
    them."""

    @asynchronous
    async def go() -> None:
        async with rig(Passthrough(), EngineConfig(slots=4, max_batch=4), lossless=False, latency_budget=10.0) as r:
            r.create(name)
            async with dripping(r.worker, 6) as statuses:
                await until_full(r.worker)
                async with watching(r, name):
                    assert (await r.call("stream/start", r.urls(name)))[0] == 200
                    stream = r.stream(name)
                    await publish(r, name, clip(10, 2))
                    await r.until_over()
                assert (stream.session.frames_out, stream.session.dropped.total()) == (20, 0)
                assert set(statuses) == {503}
            await r.worker.until(lambda: r.worker.free() == 0)

    go()


@asynchronous
async def test_one_job_of_many_frames_does_not_keep_all_slots() -> None:
    """It cannot give up a part of them, so all go to a client that would have fewer; and not the other way round."""
    async with running(Passthrough(), EngineConfig(slots=4, max_batch=4), slot_wait=4 * SLOW) as r, another(r) as good:
        reader, writer = await asyncio.open_connection("127.0.0.1", r.port)
        writer.write(head(4 * FRAME, SIZED) + bytes(100))
        await until_full(r)
        status, _, body = await good.post(bytes(FRAME), Content_Type=SIZED)
        assert status == 200, body
        assert (await reader.readuntil(b"\r\n")).split()[1] == b"503"
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", r.port)
        writer.write(head(FRAME, SIZED) + bytes(100))
        await r.until(lambda: r.free() == -1)
        await asyncio.sleep(2 * SLOW)
        assert (await good.post(bytes(4 * FRAME), Content_Type=SIZED))[0] == 503
        assert reclaimed(r) == 1
        writer.close()


@asynchronous
async def test_who_was_told_to_go_is_not_counted_twice() -> None:
    """The one that waits looks again before the event loop has come round to the first that has to leave."""
    async with running(Passthrough(), EngineConfig(slots=3, max_batch=1)) as r:
        assert r.worker.engine is not None
        (engine,) = r.worker.engine.engines
        spec, told = FrameSpec(64, 48, "rgb24"), list[int]()
        slow = [engine.lease(spec, 1, lambda error: None, client="slow") for _ in range(3)]
        await r.until(lambda: all(lease.granted for lease in slow))
        for number, lease in enumerate(slow):
            lease.lend(functools.partial(told.append, number))
        late = engine.lease(spec, 1, lambda error: None, client="late")
        late.reclaim()
        assert told == [], "not slow yet"
        await asyncio.sleep(2 * SLOW)
        late.reclaim()
        late.reclaim()
        assert told == [0]
        slow[0].keep()
        slow[0].release()
        assert late.granted
        for lease in (*slow, late):
            lease.keep()
            lease.release()
        assert r.free() == 0


def test_a_client_is_whom_the_door_takes_for_one() -> None:
    request = make_mocked_request("POST", "/")
    found = [caller(request.clone(remote=address)) for address in ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1")]
    assert found[0] == found[1] != found[2]
    assert caller(request.clone(remote="::ffff:127.0.0.2")) == "127.0.0.2"


# --- bodies that are collected


@pytest.mark.parametrize("addresses", [1, 8])
@pytest.mark.parametrize("kind", ["image/png", "application/json"])
def test_collected_bodies_that_never_end_do_not_keep_another_client_out(kind: str, addresses: int) -> None:
    """They send more than there is room for; a smaller one comes in, of an address that has none of it."""

    @asynchronous
    async def go() -> None:
        async with running(Passthrough(), max_collected=4 * LARGE) as r, another(r) as good:
            png = images.encode(memoryview(bytearray(FRAME)), FrameSpec(64, 48), "image/png")
            async with dripping(r, 8, LARGE, kind, addresses, LARGE - 1) as statuses:
                await r.until(lambda: r.worker.budget.used > 3 * LARGE and bool(statuses))
                for _ in range(4):
                    assert (await good.post(png, Content_Type="image/png"))[0] == 200
                assert r.worker.budget.used <= 4 * LARGE
                assert set(statuses) == {503}
                metrics = await (await good.session.get(r.url + "/metrics")).text()
                assert r.worker.budget.reclaimed > 0
                assert "byoc_collected_reclaimed_total" in metrics
            await r.until(lambda: r.worker.budget.used == 0)

    go()


@asynchronous
async def test_nobody_makes_way_for_more_than_it_has() -> None:
    async with running(Passthrough(), max_collected=4 * LARGE) as r, another(r) as greedy:
        reader, writer = await asyncio.open_connection("127.0.0.1", r.port)
        png = images.encode(memoryview(bytearray(FRAME)), FrameSpec(64, 48), "image/png")
        writer.write(head(len(png), "image/png") + png[:10])
        await r.until(lambda: r.worker.budget.used == 10)
        assert (await greedy.post(bytes(4 * LARGE), Content_Type="image/png"))[0] == 503
        writer.write(png[10:])
        assert (await reader.readuntil(b"\r\n")).split()[1] == b"200"
        assert r.worker.budget.reclaimed == 0
        writer.close()


@asynchronous
async def test_what_is_announced_takes_no_room() -> None:
    """Not even from others of the same address, who never make way for one another."""
    async with running(Passthrough(), max_collected=4 * LARGE) as r:
        png = images.encode(memoryview(bytearray(FRAME)), FrameSpec(64, 48), "image/png")
        async with dripping(r, 8, LARGE, "image/png"):
            await r.until(lambda: r.worker.budget.used == 8 * 100)
            assert (await r.post(png, Content_Type="image/png"))[0] == 200
            assert r.worker.budget.reclaimed == 0


@pytest.mark.parametrize(
    ("bodies", "count", "gone"),
    [
        ([("a", 60), ("a", 60), ("c", 100), ("d", 80)], 110, None),  # without the first it would still not fit
        ([("a", 60), ("a", 60), ("c", 100), ("d", 80)], 50, [("a", 60)]),
        ([("a", 55), ("a", 55), ("a", 55), ("c", 60), ("c", 60)], 90, [("a", 55), ("c", 60)]),
        ([("a", 0), ("a", 200), ("c", 100)], 50, [("a", 200)]),  # what has nothing makes no room
        ([("a", 150), ("b", 150)], 10, None),  # who waits has as much
    ],
)
def test_nobody_is_cut_off_in_vain(
    bodies: list[tuple[str, int]], count: int, gone: list[tuple[str, int]] | None
) -> None:
    budget, found = Budget(300), list[tuple[str, int]]()
    for client, size in bodies:
        slow = Body(client)
        budget.take(slow, size)
        slow.cut = functools.partial(found.append, (client, size))
    if gone is None:
        with pytest.raises(Overloaded):
            budget.take(Body("b"), count)
    else:
        budget.take(Body("b"), count)
    assert found == (gone or [])
    assert budget.reclaimed == len(found)
    left = sum(size for _, size in bodies) - sum(size for _, size in found)
    assert budget.used == left + (0 if gone is None else count)


@asynchronous
async def test_pictures_that_nobody_reads_make_way_too() -> None:
    """The answer takes the body's place in the budget."""
    spec = FrameSpec(512, 512)
    png = images.encode(memoryview(bytearray(random.Random(1).randbytes(spec.nbytes))), spec, "image/png")
    async with running(Passthrough(), max_collected=2 * len(png)) as r, another(r) as good:
        r.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        deaf = []
        for _ in range(2):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", r.port))
            await asyncio.to_thread(sock.sendall, head(len(png), "image/png") + png)
            deaf.append(sock)
        await r.until(lambda: all(body.cut is not None for body in r.worker.budget._bodies) and r.free() == 0)
        await r.until(lambda: len(r.worker.budget._bodies) == 2 and r.free() == 0)
        status, _, body = await good.post(png, Content_Type="image/png")
        assert (status, body) == (200, png)
        assert r.worker.budget.reclaimed == 1
        assert await asyncio.to_thread(_read, deaf[0]) < len(png), "the oldest was cut off"
        for sock in deaf:
            sock.close()
        await r.until(lambda: r.worker.budget.used == 0)


@pytest.mark.parametrize("others", [0, 1, 2])
def test_who_has_no_more_than_its_share_is_left_in_peace(others: int) -> None:
    """Two slots, and one slow body each of as many clients as there are: nobody has two more than who waits."""

    @asynchronous
    async def go() -> None:
        async with running(Passthrough(), EngineConfig(slots=2, max_batch=2), slot_wait=4 * SLOW) as r:
            writers = []
            for number in range(2):
                address = f"127.0.0.{2 + (number if others == 2 else 0)}"
                reader, writer = await asyncio.open_connection("127.0.0.1", r.port, local_addr=(address, 0))
                writer.write(head(FRAME) + bytes(100))
                writers.append((reader, writer))
            await until_full(r)
            address = "127.0.0.2" if others == 0 else "127.0.0.9"
            async with another(r, address) as late:
                status, _, body = await late.post(bytes(FRAME))
            taken = others == 1
            assert status == (200 if taken else 503), body
            assert reclaimed(r) == taken
            answered = []
            for reader, writer in writers:
                writer.write(bytes(FRAME - 100))
                answered.append(int((await reader.readuntil(b"\r\n")).split()[1]))
                writer.close()
            assert answered == ([503, 200] if taken else [200, 200]), "the oldest goes"

    go()


@asynchronous
async def test_who_is_slow_while_nobody_waits_is_waited_for() -> None:
    async with running(Passthrough(), EngineConfig(slots=2, max_batch=2)) as r:
        reader, writer = await asyncio.open_connection("127.0.0.1", r.port)
        writer.write(head(FRAME) + bytes(100))
        await r.until(lambda: r.free() == -1)
        await asyncio.sleep(2 * SLOW)
        assert (await r.post(bytes(FRAME)))[0] == 200, "there is another slot"
        writer.write(bytes(FRAME - 100))
        assert (await reader.readuntil(b"\r\n")).split()[1] == b"200"
        assert reclaimed(r) == 0
        writer.close()


@asynchronous
async def test_jobs_on_the_device_are_not_taken_back() -> None:
    """A noisy client whose frames are being computed is not slow: others have to wait for their turn."""

    class Held(Passthrough):
        gate = threading.Event()

        def process_batch(self, frames: object, params: object, xp: object) -> object:
            assert self.gate.wait(20)
            return frames

    async with running(Held(), EngineConfig(slots=4, max_batch=1), slot_wait=20) as r, another(r) as good:
        jobs = [asyncio.create_task(r.post(bytes(FRAME))) for _ in range(4)]
        await until_full(r)
        late = asyncio.create_task(good.post(bytes(FRAME)))
        await asyncio.wait([late], timeout=2 * SLOW)
        Held.gate.set()
        assert [(await job)[0] for job in (*jobs, late)] == [200] * 5
        assert reclaimed(r) == 0


def _read(sock: socket.socket) -> int:
    """Bytes until its end, a reset included."""
    got = 0
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(1 << 16):
            got += len(part)
    return got
