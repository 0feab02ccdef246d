"""The door on loopback: who is answered there, who is let in, who is turned away, and what a busy loop changes."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import http.client
import itertools
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

from gpu_byoc.transport import door as the_door
from gpu_byoc.transport import doorman
from gpu_byoc.transport.door import Door
from gpu_byoc.transport.doorman import Bounds
from gpu_byoc.transport.listen import bind, port_of
from tests.support.workers import asynchronous

both = pytest.mark.parametrize("process", [False, True], ids=["thread", "doorman"])

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


def bounded(head: float = 10.0, size: int = 32768, keep: float = 75.0, most: int = 256, **others: float) -> Bounds:
    return Bounds(head, size, keep, most, **others)


BOUNDED = bounded()


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
    alone: list[str] = field(default_factory=list)
    status: bytes = b"IDLE"

    async def say(self, data: bytes) -> bytes:
        """Everything that comes back until the other side closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer


@contextlib.asynccontextmanager
async def house(most: int = 8, process: bool = False, bounds: Bounds = BOUNDED) -> AsyncIterator[House]:
    """``process``: with a doorman."""

    async def echo(request: web.Request) -> web.Response:
        here.inside.set()
        body = await request.read()
        if request.path == "/hold":
            await here.hold.wait()
        return web.Response(text=f"{request.path_qs} {len(body)}")

    def answer(target: str) -> tuple[int, bytes]:
        here.asked.append(target)
        here.asking.set()
        if here.slow is not None:
            assert here.slow.wait(20)
        return (200, b'{"status": "%s"}' % here.status)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", echo)
    sock = bind("127.0.0.1", 0)
    lost = asyncio.Event()
    told: list[str] = []
    door = Door(app, sock, answer, most, 1.0, lost.set, bounds, told.append if process else None)
    here = House(door, port_of(sock), lost, alone=told)
    before = descriptors()
    await door.start()
    try:
        yield here
    finally:
        here.hold.set()
        await door.close()
        sock.close()
    assert door.inside == 0
    assert door.waiting == 0
    assert descriptors() <= before
    assert not any(thread.name == "door" for thread in threading.enumerate())


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def until(h: House, waiting: int) -> None:
    async with asyncio.timeout(20):
        while h.door.waiting != waiting:  # noqa: ASYNC110 - counted, not announced
            await asyncio.sleep(0.002)


async def until_counted(h: House, dropped: int = 0, idle: int = 0) -> None:
    async with asyncio.timeout(20):
        while h.door.dropped < dropped or h.door.idle < idle:  # noqa: ASYNC110 - counted, not announced
            await asyncio.sleep(0.002)
    assert (h.door.dropped, h.door.idle) == (dropped, idle)


@both
@asynchronous
async def test_health_is_answered_while_the_event_loop_does_something_else(process: bool) -> None:
    async with house(process=process) as h:
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


@both
@asynchronous
async def test_everything_else_comes_in_untouched(process: bool) -> None:
    async with house(process=process) as h:
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


@both
@asynchronous
async def test_a_head_in_pieces_a_question_after_an_answer_and_http_1_0(process: bool) -> None:
    async with house(process=process) as h:
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


@pytest.mark.parametrize("line", [b"Connection:close", b"connection: TE, Close", b"Connection:\tclose"])
@asynchronous
async def test_who_wants_the_connection_closed_may_write_it_in_any_way(line: bytes) -> None:
    async with house() as h, asyncio.timeout(20):
        assert b"Connection: close\r\n" in await h.say(HEALTH.replace(b"Host: x", line))


@both
@asynchronous
async def test_no_program_that_is_started_gets_a_connection(process: bool) -> None:
    async with house(process=process) as h:
        before = inherited()
        writer = await come_in(h, "127.0.0.1")
        assert inherited() == before
        writer.close()
        await writer.wait_closed()


def inherited() -> set[int]:
    """Descriptors of this process that a program in C passes on."""
    found = set()
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # what listed them
            if os.get_inheritable(int(each.name)):
                found.add(int(each.name))
    return found


@both
@asynchronous
async def test_one_connection_too_many_is_told_so_and_health_is_not_counted(process: bool) -> None:
    async with house(process=process, most=1) as h:
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


async def come_in(h: House, address: str) -> asyncio.StreamWriter:
    """A connection from ``address`` that is inside when this returns, and stays."""
    _, writer = await asyncio.open_connection("127.0.0.1", h.port, local_addr=(address, 0))
    h.inside.clear()
    writer.write(b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\n")
    async with asyncio.timeout(20):
        await h.inside.wait()
    return writer


@both
@asynchronous
async def test_one_address_cannot_take_all_places(process: bool) -> None:
    async with house(process=process, most=5) as h:
        writers = [await come_in(h, "127.0.0.1") for _ in range(3)]
        answer = await h.say(b"GET /more HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"3 connections of your address" in answer
        assert b"Retry-After: 1\r\n" in answer
        writers += [await come_in(h, "127.0.0.2") for _ in range(2)]
        assert (h.door.inside, h.door.refused) == (5, 1)
        assert b"5 connections are open" in await h.say(b"GET /more HTTP/1.1\r\nHost: x\r\n\r\n")
        for writer in writers[:1]:
            writer.close()
            await writer.wait_closed()
        async with asyncio.timeout(20):
            while h.door.inside == 5:  # noqa: ASYNC110 - counted, not announced
                await asyncio.sleep(0.002)
        answer = await h.say(b"GET /next HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert answer.endswith(b"/next 0"), "its place is its own again"
        for writer in writers[1:]:
            writer.close()
            await writer.wait_closed()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("10.0.0.1", "::ffff:10.0.0.1", True),
        ("127.0.0.1", "::1", False),
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::", True),  # a household, or one machine
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("fe80::1%eth0", "fe80::1", True),
    ],
)
def test_whose_connections_are_counted_together(one: str, other: str, same: bool) -> None:
    assert (the_door.client((one, 1)) == the_door.client((other, 2, 0, 0))) == same


@both
@asynchronous
async def test_who_says_nothing_is_shown_out(process: bool) -> None:
    async with house(process=process, bounds=bounded(head=1.0, sweep=0.02)) as h:
        asked = len(h.asked)
        assert await h.say(b"") == b""
        assert (await h.say(b"GET /heal")).startswith(b"HTTP/1.1 408")
        assert process or len(h.asked) == asked
        await until_counted(h, dropped=1, idle=1)


@both
@asynchronous
async def test_only_so_many_wait_at_the_door(process: bool) -> None:
    async with house(process=process, bounds=bounded(most=3)) as h:
        waiting = [await asyncio.open_connection("127.0.0.1", h.port) for _ in range(4)]
        async with asyncio.timeout(20):
            assert await waiting[0][0].read() == b"", "the oldest made room"
        await until(h, 3)
        await until_counted(h, dropped=1)
        waiting[3][1].write(HEALTH)
        assert (await waiting[3][0].readuntil(b"}")).startswith(b"HTTP/1.1 200")
        for _, writer in waiting:
            writer.close()
            await writer.wait_closed()


@both
@asynchronous
async def test_who_leaves_in_the_middle_of_a_head_costs_nothing(process: bool) -> None:
    async with house(process=process) as h:
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
async def test_who_made_room_a_moment_ago_may_have_said_something() -> None:
    """One round of the door's has both: a newcomer for whom the oldest has to go, and the oldest's own words."""
    async with house(bounds=bounded(most=2)) as h:
        h.slow = threading.Event()
        oldest, other = [socket.create_connection(("127.0.0.1", h.port), timeout=20) for _ in range(2)]
        await until(h, 2)
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


@both
@pytest.mark.parametrize("size", [1024, 32768, 48 << 10])
@asynchronous
async def test_a_head_without_end_takes_no_seat(size: int, process: bool) -> None:
    """Inside, nobody would wait for its end with a clock in the hand."""
    async with house(process=process, bounds=bounded(size=size)) as h:
        lines = b"".join(b"X-%d: %s\r\n" % (i, b"x" * 8000) for i in range(size // 8000 + 1))
        answer = await h.say(b"POST /job HTTP/1.1\r\nHost: x\r\n" + lines)
        assert answer.startswith(b"HTTP/1.1 431 "), answer[:100]
        assert b"more than %d bytes" % size in answer
        assert not h.inside.is_set()
        await until_counted(h, dropped=1)


@both
@asynchronous
async def test_a_long_head_comes_in_where_it_may(process: bool) -> None:
    async with house(process=process, bounds=bounded(size=48 << 10)) as h:
        lines = b"".join(b"X-%d: %s\r\n" % (i, b"x" * 8000) for i in range(6))
        assert len(lines) > 46 << 10
        head = b"GET /long HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + lines + b"\r\n"
        assert (await h.say(head)).endswith(b"/long 0")


@both
@asynchronous
async def test_the_second_head_on_a_connection_has_no_more_time_than_the_first(process: bool) -> None:
    async with house(process=process, bounds=bounded(head=1.0, sweep=0.02)) as h:
        assert b"HTTP/1.1 408" in await h.say(HEALTH + b"GET /heal")


@both
@pytest.mark.parametrize("target", [b"/idle", b"/health"])
@asynchronous
async def test_an_idle_connection_is_not_kept_for_ever(target: bytes, process: bool) -> None:
    """Inside, and at the door, where who asks for health stays."""
    async with house(process=process, bounds=bounded(keep=0.5, sweep=0.02)) as h:
        answer = await h.say(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % target)
        assert answer.startswith(b"HTTP/1.1 200")
        await until_counted(h, idle=1)


@both
@asynchronous
async def test_who_leaves_or_is_told_to_was_not_idle(process: bool) -> None:
    async with house(process=process, bounds=bounded(keep=0.5, sweep=0.02)) as h:
        for word in (b"/inside", b"/health"):
            last = b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % word
            assert (await h.say(last)).startswith(b"HTTP/1.1 200")
        slow = asyncio.create_task(h.say(b"GET /hold HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
        with socket.create_connection(("127.0.0.1", h.port)) as leaving:
            leaving.sendall(b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\n")
            async with asyncio.timeout(20):
                while h.door.inside < 2:  # noqa: ASYNC110 - counted, not announced
                    await asyncio.sleep(0.002)
            await asyncio.sleep(0.7)  # longer than one may be idle: these have something to wait for
        h.hold.set()
        assert (await slow).endswith(b"/hold 0")
        async with asyncio.timeout(20):
            while h.door.inside or h.door.waiting:  # noqa: ASYNC110 - counted, not announced
                await asyncio.sleep(0.002)
        assert (h.door.dropped, h.door.idle) == (0, 0)


@pytest.mark.parametrize(
    ("address", "name"), [("", ""), ("/run/proxy.sock", "/run/proxy.sock"), ("fe80::1%eth0", "fe80" + "0" * 12)]
)
def test_a_client_without_an_ip_address_is_one(address: str, name: str) -> None:
    assert the_door.client((address,)) == name


@asynchronous
async def test_a_door_that_fell_in_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async with house() as h:
        monkeypatch.setattr(h.door._lobby, "_heard", lambda *_: 1 / 0)
        with contextlib.suppress(OSError):  # it ends without a word
            await h.say(HEALTH)
        async with asyncio.timeout(20):
            await h.lost.wait()
    assert "ZeroDivisionError" in caplog.text


# --- with a doorman

ASKER = """
import socket, sys, time
for _ in range(int(sys.argv[2])):
    time.sleep(0.05)
    with socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=20) as client:
        client.sendall(b"GET /health HTTP/1.0\\r\\n\\r\\n")
        answer = b""
        while part := client.recv(4096):
            answer += part
    print(answer.split()[1].decode(), flush=True)
"""


async def asked_elsewhere(h: House, times: int, keep: float) -> list[str]:
    """The status of each answer to one who asks 20 times a second, while C code keeps the interpreter's lock for
    ``keep`` seconds, from the first answer on."""
    command = [sys.executable, "-I", "-S", "-c", ASKER, str(h.port), str(times)]
    asker = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert asker.stdout is not None
    first = await asker.stdout.readline()
    ctypes.PyDLL(None).usleep(int(keep * 1e6))
    async with asyncio.timeout(20):
        rest = await asker.stdout.read()
        await asker.wait()
    return [first.decode().strip(), *rest.decode().split()]


async def successor(h: House, pid: int | None) -> int:
    async with asyncio.timeout(20):
        while h.door.doorman in (pid, None):  # noqa: ASYNC110 - it starts on another thread
            await asyncio.sleep(0.002)
    assert h.door.doorman is not None
    return h.door.doorman


async def doorman_of(h: House) -> int:
    """Its process, once it has answered."""
    assert (await h.say(HEALTH.replace(b"1.1", b"1.0"))).startswith(b"HTTP/1.1 200")
    return await successor(h, None)  # it may answer before the thread that starts it is told that it has begun


@asynchronous
async def test_health_is_answered_while_c_code_keeps_the_interpreter() -> None:
    async with house(process=True) as h:
        began = time.monotonic()
        assert await asked_elsewhere(h, 20, keep=2.0) == ["200"] * 20
        assert time.monotonic() - began >= 2.0


@asynchronous
async def test_a_worker_that_is_silent_for_too_long_is_an_error_until_it_is_heard_of() -> None:
    async with house(process=True, bounds=bounded(silence=1.2)) as h:
        answers = await asked_elsewhere(h, 45, keep=3.0)
        turns = [status for status, _ in itertools.groupby(answers)]
        assert turns[:2] == ["200", "503"]
        assert (await h.say(HEALTH.replace(b"1.1", b"1.0"))).startswith(b"HTTP/1.1 200")


@asynchronous
async def test_an_answer_is_never_older_than_the_question() -> None:
    async with house(process=True, bounds=bounded(fresh=20.0)) as h:
        for number in range(200):
            h.status = b"%d" % number
            answer = await h.say(HEALTH.replace(b"1.1", b"1.0"))
            assert answer.endswith(b'{"status": "%d"}' % number)


@asynchronous
async def test_a_change_that_was_told_is_known_at_once() -> None:
    """Though for no answer is waited."""
    async with house(process=True, bounds=bounded(fresh=0.0)) as h:
        await doorman_of(h)
        for number in range(20):
            h.status = b"%d" % number
            await h.door.tell()
            answer = await h.say(HEALTH.replace(b"1.1", b"1.0"))
            assert answer.endswith(b'{"status": "%d"}' % number)


@asynchronous
async def test_a_doorman_that_is_killed_has_a_successor_and_who_waits_outside_is_let_in() -> None:
    async with house(most=100, process=True) as h:
        pid = await doorman_of(h)
        reader, writer = await asyncio.open_connection("127.0.0.1", h.port)
        await until(h, 1)
        os.kill(pid, signal.SIGSTOP)
        outside = [asyncio.create_task(h.say(b"GET /%d HTTP/1.0\r\n\r\n" % number)) for number in range(20)]
        health = asyncio.create_task(h.say(HEALTH.replace(b"1.1", b"1.0")))
        await asyncio.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b"", "it was with the one that died"
        writer.close()
        async with asyncio.timeout(20):
            for number, each in enumerate(outside):
                assert (await each).endswith(b"/%d 0" % number)
            assert (await health).startswith(b"HTTP/1.1 200")
        assert h.door.doorman != pid
        assert h.door.deaths == 1
        assert h.alone == []


@asynchronous
async def test_a_doorman_that_dies_and_dies_is_done_without(caplog: pytest.LogCaptureFixture) -> None:
    async with house(process=True) as h:
        pid = await doorman_of(h)
        for _ in range(2):
            os.kill(pid, signal.SIGKILL)
            pid = await successor(h, pid)
        os.kill(pid, signal.SIGKILL)
        assert (await h.say(b"GET /after HTTP/1.0\r\n\r\n")).endswith(b"/after 0")
        assert (await h.say(HEALTH.replace(b"1.1", b"1.0"))).startswith(b"HTTP/1.1 200")
        assert h.door.doorman is None
        (why,) = h.alone
        assert "3 times" in why
        assert caplog.text.count("no doorman") == 1


@asynchronous
async def test_without_a_process_the_thread_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    async with house(process=True) as h:
        assert (await h.say(HEALTH.replace(b"1.1", b"1.0"))).startswith(b"HTTP/1.1 200")
        assert h.door.doorman is None
        (why,) = h.alone
        assert "/nowhere/python" in why


@asynchronous
async def test_signals_to_the_whole_group_do_not_end_the_doorman() -> None:
    async with house(process=True) as h:
        pid = await doorman_of(h)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
            assert await doorman_of(h) == pid


@asynchronous
async def test_more_than_the_pair_takes_waits_for_the_worker() -> None:
    async with house(most=2000, process=True, bounds=bounded(most=1000)) as h:
        await doorman_of(h)
        h.slow = threading.Event()
        h.asking.clear()
        assert await asyncio.to_thread(h.asking.wait, 20)  # the next beat: from here on nobody takes them
        clients = [socket.create_connection(("127.0.0.1", h.port), timeout=20) for _ in range(600)]
        for client in clients:
            client.sendall(b"GET /one HTTP/1.0\r\n\r\n")
        await asyncio.sleep(0.2)
        h.slow.set()
        for client in clients:
            assert (await asyncio.to_thread(client.recv, 4096)).startswith(b"HTTP/1.0 200")
            client.close()


@asynchronous
async def test_a_worker_out_of_descriptors_cuts_one_off_and_goes_on() -> None:
    async with house(process=True) as h:
        await doorman_of(h)
        client = socket.create_connection(("127.0.0.1", h.port), timeout=20)
        await until(h, 1)
        await asyncio.to_thread(int)  # what a thread takes is there
        free = os.dup(0)
        os.close(free)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            client.sendall(b"GET /job HTTP/1.1\r\nHost: x\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                assert await asyncio.get_running_loop().run_in_executor(None, client.recv, 100) == b""
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            client.close()
        async with asyncio.timeout(20):
            while not h.door.refused:  # noqa: ASYNC110 - counted, not announced
                await asyncio.sleep(0.002)
        assert h.door.refused == 1
        assert (await h.say(b"GET /next HTTP/1.0\r\n\r\n")).endswith(b"/next 0")


def test_a_doorman_remembers_nobody_who_had_to_go_while_its_worker_stood_still() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # room for a few
    with bind("127.0.0.1", 0) as listener, ours, theirs:
        ours.send(doorman.packed(0, [(200, b"{}")] * 2))
        the_doorman = doorman.Doorman(listener, theirs, bounded(most=3))
        for _ in range(30):
            with socket.create_connection(("127.0.0.1", port_of(listener)), timeout=20) as client:
                client.sendall(b"GET /job HTTP/1.1\r\n\r\n")
                the_doorman._lobby.turn(20)
        assert 1 <= len(the_doorman._entering) <= 4
        the_doorman._lobby.close()


def test_a_doorman_whose_worker_is_gone_ends_even_where_a_fork_of_it_has_the_pair(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with bind("127.0.0.1", 0) as listener, ours, theirs:
        monkeypatch.setattr(os, "getpid", lambda: 1 << 30)  # which is not who starts it
        process = the_door._spawn(listener.fileno(), theirs.fileno(), bounded())
        assert process.wait(20) == 0
