"""The door on loopback: who is answered there, who is let in, who is turned away, and what a busy loop changes."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from gpu_byoc.transport import door as the_door
from gpu_byoc.transport import listen
from gpu_byoc.transport.door import Door
from gpu_byoc.transport.listen import bind, port_of
from tests.support.workers import asynchronous

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass
class House:
    door: Door
    port: int
    lost: asyncio.Event
    asked: list[str] = field(default_factory=list)
    hold: asyncio.Event = field(default_factory=asyncio.Event)
    slow: threading.Event | None = None  # the next answer waits for it
    asking: threading.Event = field(default_factory=threading.Event)
    inside: asyncio.Event = field(default_factory=asyncio.Event)

    async def say(self, data: bytes) -> bytes:
        """Everything that comes back until the other side closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer


@contextlib.asynccontextmanager
async def house(most: int = 8) -> AsyncIterator[House]:
    async def echo(request: web.Request) -> web.Response:
        here.inside.set()
        body = await request.read()
        if request.path == "/hold":
            await here.hold.wait()
        return web.Response(text=f"{request.path_qs} {len(body)}")

    def answer(target: str) -> tuple[int, bytes] | None:
        here.asked.append(target)
        here.asking.set()
        if here.slow is not None:
            assert here.slow.wait(20)
        return (200, b'{"status": "IDLE"}') if target == "/health" else None

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", echo)
    sock = bind("127.0.0.1", 0)
    lost = asyncio.Event()
    door = Door(app, sock, answer, most, shutdown=1.0, lost=lost.set)
    here = House(door, port_of(sock), lost)
    await door.start()
    try:
        yield here
    finally:
        here.hold.set()
        await door.close()
        sock.close()
    assert door.inside == 0
    assert door.waiting == 0


@asynchronous
async def test_health_is_answered_while_the_event_loop_does_something_else() -> None:
    async with house() as h:
        answers: list[bytes] = []

        def ask() -> None:
            with socket.create_connection(("127.0.0.1", h.port), timeout=20) as client:
                for _ in range(3):  # one connection, three questions
                    client.sendall(HEALTH)
                    answers.append(client.recv(4096))

        asking = threading.Thread(target=ask)
        asking.start()
        asking.join(20)  # the loop stands still all the while
        assert len(answers) == 3
        assert all(
            answer.startswith(b"HTTP/1.1 200 OK") and answer.endswith(b'{"status": "IDLE"}') for answer in answers
        )


@asynchronous
async def test_everything_else_comes_in_untouched() -> None:
    async with house() as h:
        close = b"Connection: close\r\n"
        for head, body, expected in (
            (b"POST /job HTTP/1.1\r\nHost: x\r\nContent-Length: 70000\r\n", bytes(70000), b"/job 70000"),
            (b"GET /health?deep=1 HTTP/1.1\r\nHost: x\r\n", b"", b"/health?deep=1 0"),
            (b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n", b"abc", b"/health 3"),
            (b"GET /long HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 8000 + b"\r\n", b"", b"/long 0"),
        ):
            answer = await h.say(head + close + b"\r\n" + body)
            assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
            assert answer.endswith(expected)
        assert (await h.say(b"nonsense\r\n\r\n")).startswith(b"HTTP/1.0 400")


@asynchronous
async def test_a_head_in_pieces_a_question_after_an_answer_and_http_1_0() -> None:
    async with house() as h:
        reader, writer = await asyncio.open_connection("127.0.0.1", h.port)
        for piece in (HEALTH[:7], HEALTH[7:20], HEALTH[20:]):
            writer.write(piece)
            await writer.drain()
            await asyncio.to_thread(time.sleep, 0.02)  # so that they arrive as pieces
        assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
        writer.write(b"POST /after HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi")
        assert (await reader.read()).endswith(b"/after 2")
        writer.close()
        await writer.wait_closed()
        answer = await h.say(b"GET /health HTTP/1.0\r\n\r\n")
        assert b"Connection: close" in answer
        assert answer.endswith(b"}")


@asynchronous
async def test_one_connection_too_many_is_told_so_and_health_is_not_counted() -> None:
    async with house(most=1) as h:
        _, writer = await asyncio.open_connection("127.0.0.1", h.port)
        writer.write(b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\n")
        await h.inside.wait()
        answer = await h.say(b"POST /job HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc")
        assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert b"Retry-After: 1\r\n" in answer
        assert b"--max-connections" in answer
        assert h.door.refused == 1
        assert (await h.say(HEALTH.replace(b"1.1", b"1.0"))).startswith(b"HTTP/1.1 200")
        writer.close()
        await writer.wait_closed()
        async with asyncio.timeout(20):
            while h.door.inside:  # noqa: ASYNC110 - counted, not announced
                await asyncio.sleep(0.002)
        answer = await h.say(b"GET /next HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert answer.endswith(b"/next 0")


@asynchronous
async def test_who_says_nothing_is_shown_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(the_door, "HEAD_SECONDS", 0.05)
    monkeypatch.setattr(the_door, "SWEEP", 0.02)
    async with house() as h:
        assert await h.say(b"") == b""
        assert (await h.say(b"GET /heal")).startswith(b"HTTP/1.1 408")
        assert h.asked == []


@asynchronous
async def test_only_so_many_wait_at_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(the_door, "AT_THE_DOOR", 3)
    async with house() as h:
        waiting = [await asyncio.open_connection("127.0.0.1", h.port) for _ in range(4)]
        async with asyncio.timeout(20):
            assert await waiting[0][0].read() == b"", "the oldest made room"
        assert h.door.waiting == 3
        waiting[3][1].write(HEALTH)
        assert (await waiting[3][0].readuntil(b"}")).startswith(b"HTTP/1.1 200")
        for _, writer in waiting:
            writer.close()
            await writer.wait_closed()


@asynchronous
async def test_who_leaves_in_the_middle_of_a_head_costs_nothing() -> None:
    async with house() as h:
        client = socket.create_connection(("127.0.0.1", h.port))
        client.sendall(b"POST /jo")
        client.shutdown(socket.SHUT_WR)
        assert await asyncio.to_thread(client.recv, 100) == b""
        client.close()
        connection = http.client.HTTPConnection("127.0.0.1", h.port, timeout=20)
        await asyncio.to_thread(connection.request, "GET", "/still")
        assert (await asyncio.to_thread(lambda: connection.getresponse().read())) == b"/still 0"
        connection.close()


@asynchronous
async def test_who_made_room_a_moment_ago_may_have_said_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round of the door's has both: a newcomer for whom the oldest has to go, and the oldest's own words."""
    monkeypatch.setattr(the_door, "AT_THE_DOOR", 2)
    async with house() as h:
        h.slow = threading.Event()
        oldest, other = [socket.create_connection(("127.0.0.1", h.port), timeout=20) for _ in range(2)]
        async with asyncio.timeout(20):
            while h.door.waiting < 2:  # noqa: ASYNC110 - counted, not announced
                await asyncio.sleep(0.002)
        other.sendall(HEALTH)
        assert await asyncio.to_thread(h.asking.wait, 20)
        newcomer = socket.create_connection(("127.0.0.1", h.port), timeout=20)
        oldest.sendall(b"GET /heal")
        h.slow.set()
        newcomer.sendall(HEALTH)
        assert (await asyncio.to_thread(newcomer.recv, 100)).startswith(b"HTTP/1.1 200")
        for client in (oldest, other, newcomer):
            client.close()


@asynchronous
async def test_who_hangs_up_while_the_answer_is_found_costs_nothing() -> None:
    async with house() as h:
        h.slow = threading.Event()
        client = socket.create_connection(("127.0.0.1", h.port), timeout=20)
        client.sendall(HEALTH)
        assert await asyncio.to_thread(h.asking.wait, 20)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() is a reset
        client.close()
        h.slow.set()
        assert (await h.say(HEALTH.replace(b"1.1", b"1.0"))).startswith(b"HTTP/1.1 200")


@asynchronous
async def test_a_head_without_end_takes_no_seat() -> None:
    """Inside, nobody would wait for its end with a clock in the hand."""
    async with house() as h:
        lines = b"".join(b"X-%d: %s\r\n" % (i, b"x" * 8000) for i in range(the_door.PEEK // 8000 + 1))
        answer = await h.say(b"POST /job HTTP/1.1\r\nHost: x\r\n" + lines)
        assert answer.startswith(b"HTTP/1.1 431 "), answer[:100]
        assert not h.inside.is_set()


@asynchronous
async def test_the_second_head_on_a_connection_has_no_more_time_than_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(the_door, "HEAD_SECONDS", 0.1)
    monkeypatch.setattr(the_door, "SWEEP", 0.02)
    async with house() as h:
        assert b"HTTP/1.1 408" in await h.say(HEALTH + b"GET /heal")


@asynchronous
async def test_a_connection_inside_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "KEEP_SECONDS", 0.1)
    async with house() as h:
        answer = await h.say(b"GET /idle HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.endswith(b"/idle 0")


@asynchronous
async def test_a_door_that_fell_in_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async with house() as h:
        monkeypatch.setattr(h.door, "_sweep", lambda: 1 / 0)
        with contextlib.suppress(OSError):  # it ends without a word
            await h.say(HEALTH)
        async with asyncio.timeout(20):
            await h.lost.wait()
    assert "ZeroDivisionError" in caplog.text
