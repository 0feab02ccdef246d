"""Who is at fault, who pays, and that no client gets what another one asked for."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from gpu_byoc.errors import ContainerTimeout, ContainerUnreachable
from gpu_byoc.local.gateway import Gateway
from gpu_byoc.local.intake import Body
from gpu_byoc.local.ledger import Entry, read_usage
from gpu_byoc.local.orchestrator import Orchestrator
from gpu_byoc.local.relay import ROUTE, Ending, Road, conclude
from gpu_byoc.local.upstream import Origin, Pool
from tests.local.kit import FRAME, MODEL, WAIT, box, client, echo, gateway, in_loop, orchestrator, post, says, soon


async def told(request: web.Request) -> web.StreamResponse:
    """A container that says whom it answers."""
    body = await request.read()
    return web.Response(body=b"answer to " + body[:30])


def head(length: int, *more: str) -> bytes:
    lines = [f"POST {ROUTE} HTTP/1.1", "Host: x", f"X-Model-Id: {MODEL}", f"Content-Length: {length}", *more]
    return "\r\n".join([*lines, "", ""]).encode()


def smuggler() -> bytes:
    """A gzip body of n bytes that unpacks to n bytes and then a whole request of somebody else's making."""
    hidden = head(4) + b"EVIL"
    for length in range(60, 400):
        packed = gzip.compress(b"A" * length + hidden)
        if len(packed) == length:
            return packed
    raise AssertionError("no such length")


@contextlib.asynccontextmanager
async def dialled(port: int, received: int | None = None) -> AsyncIterator[socket.socket]:
    """A connection of one's own, with a small receive buffer if asked for: a reader that can be slow."""
    with socket.socket() as sock:
        if received is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, received)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        yield sock


async def receive(sock: socket.socket, count: int) -> bytes:
    got = bytearray()
    async with asyncio.timeout(WAIT):
        while len(got) < count:
            piece = await asyncio.get_running_loop().sock_recv(sock, 1 << 20)
            if not piece:
                break
            got += piece
    return bytes(got)


async def only_job(datadir: Path, node: Orchestrator) -> Entry:
    await soon(lambda: node.ledger.totals.jobs == 1 and node.running == 0)
    await soon(lambda: [row.outcome for row in read_usage(datadir, 9).entries] not in ([], ["running"]))
    (entry,) = read_usage(datadir, 9).entries
    return entry


# --- requests that hide others


@in_loop
async def test_a_compressed_body_is_refused_and_the_next_client_gets_its_own_answer(tmp_path: Path) -> None:
    packed = smuggler()
    async with box(told) as container, orchestrator(tmp_path, container) as orch, gateway(orch) as gate:
        node: Gateway | Orchestrator
        for node in (gate, orch):
            assert (await post(node, b"warm")).body == b"answer to warm"  # now there is a connection to be poisoned
            for coding in ("gzip", "GZIP", "identity, gzip", "br"):
                answer = await post(node, packed, Content_Encoding=coding)
                assert answer.error == (415, "unsupported_media_type")
            assert (await post(node, b"innocent", Content_Encoding="identity")).body == b"answer to innocent"
        assert container.jobs == 4
        assert gate.outcomes == {"ok": 2, "unsupported_media_type": 4}


@in_loop
async def test_a_body_that_is_longer_than_announced_never_reaches_the_next_request() -> None:
    """The relay by itself, behind a server that does unpack bodies: it sends no byte too many, and hangs up."""
    sent: list[bytes] = []

    async def record(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(65536):
                sent.append(piece)
        writer.close()
        sent.append(b"END")

    async def relay(request: web.Request) -> web.StreamResponse:
        async def work() -> web.StreamResponse:
            async with road.exchange(origin, Body(request, 1 << 20)) as exchange:
                await exchange.start([("X-Model-Id", MODEL)])
                return await exchange.send_back(request, await exchange.head())

        return await conclude(request, work(), Ending())

    app = web.Application()
    app.router.add_post(ROUTE, relay)
    runner = web.AppRunner(app)
    pool = Pool()
    road = Road(pool, WAIT, WAIT, ContainerTimeout, ContainerUnreachable)
    recorder = await asyncio.start_server(record, "127.0.0.1", 0)
    async with recorder, box(told) as container:
        origin = Origin(f"http://127.0.0.1:{recorder.sockets[0].getsockname()[1]}")
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            port = runner.addresses[0][1]
            assert (await post(port, smuggler(), Content_Encoding="gzip")).error == (400, "bad_request")
            await soon(lambda: sent[-1:] == [b"END"])
            assert b"EVIL" not in b"".join(sent)
            origin = Origin(container.url)
            assert (await post(port, b"warm")).body == b"answer to warm"
            assert (await post(port, smuggler(), Content_Encoding="gzip")).error == (400, "bad_request")
            assert (await post(port, gzip.compress(b""), Content_Encoding="gzip")).error[0] == 400, "too few, too"
            assert (await post(port, b"innocent")).body == b"answer to innocent"
        finally:
            await runner.cleanup()
            await pool.close()


# --- a slow job is computed once


@in_loop
@pytest.mark.parametrize("code", ["container_timeout", "processor_timeout", "another"])
async def test_a_job_that_takes_too_long_is_not_computed_again(tmp_path: Path, code: str) -> None:
    """Two orchestrators, either of which would take it. A 504 of any other kind is tried elsewhere."""
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        slow = says(504, status="error", error=code, message="told")
        boxes = [await enter(box(slow)) for _ in range(2)]
        orchs = [await enter(orchestrator(tmp_path / str(i), b)) for i, b in enumerate(boxes)]
        gate = await enter(gateway(*orchs))
        assert (await post(gate)).error == (504, code)
        assert sum(b.jobs for b in boxes) == (2 if code == "another" else 1)


@in_loop
async def test_a_silent_job_is_ended_by_whoever_is_nearest(tmp_path: Path) -> None:
    async def think(request: web.Request) -> web.StreamResponse:
        await request.read()
        await asyncio.Event().wait()
        raise AssertionError("an event that nobody sets")

    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        boxes = [await enter(box(think)) for _ in range(3)]
        orchs = [await enter(orchestrator(tmp_path / str(i), b, job_timeout=0.5)) for i, b in enumerate(boxes)]
        answer = await post(await enter(gateway(*orchs)))
        assert answer.error == (504, "container_timeout")
        assert sum(b.jobs for b in boxes) == 1
        assert sum(orch.ledger.totals.billed_seconds for orch in orchs) == 1

        patient = [await enter(orchestrator(tmp_path / f"p{i}", b)) for i, b in enumerate(boxes)]
        gate = await enter(gateway(*patient, job_timeout=0.5))
        assert (await post(gate)).error == (504, "orchestrator_timeout")
        assert sum(b.jobs for b in boxes) == 2
        await soon(lambda: sum(orch.ledger.totals.jobs for orch in patient) == 1)


@in_loop
async def test_a_processor_may_think_for_longer_than_a_client_may_stall(tmp_path: Path) -> None:
    thought = 0.0

    async def think(request: web.Request) -> web.StreamResponse:
        nonlocal thought
        body = await request.read()
        began = time.perf_counter()
        await asyncio.sleep(0.3)
        thought = time.perf_counter() - began
        return web.Response(body=body)

    limits = {"stall": 0.05, "job_timeout": WAIT}
    async with (
        box(think) as container,
        orchestrator(tmp_path, container, **limits) as orch,
        gateway(orch, **limits) as gate,
    ):
        assert (await post(gate, b"abc")).body == b"abc"
    assert thought > 0.05


# --- the client's faults


@in_loop
async def test_a_body_that_stops(tmp_path: Path) -> None:
    async def stuck() -> AsyncIterator[bytes]:
        yield b"a little"
        await asyncio.Event().wait()

    headers = {"X-Model-Id": MODEL}
    async with (
        box() as container,
        orchestrator(tmp_path, container, stall=0.1) as orch,
        gateway(orch, stall=0.05) as gate,
        client() as session,
    ):
        node: Gateway | Orchestrator
        for node in (gate, orch):
            url = f"http://127.0.0.1:{node.port}{ROUTE}"
            async with session.post(url, data=stuck(), headers=headers) as got:
                assert (got.status, (await got.json())["error"]) == (408, "body_timeout")
            await soon(lambda: orch.running == 0)
        assert gate.outcomes == {"body_timeout": 1}
        assert orch.outcomes["body_timeout"] >= 1


@in_loop
async def test_a_reader_that_never_reads_is_gone_and_the_container_is_not_blamed(tmp_path: Path) -> None:
    async def flood(request: web.Request) -> web.StreamResponse:
        await request.read()
        answer = web.StreamResponse()
        await answer.prepare(request)
        for _ in range(64):
            await answer.write(bytes(1 << 20))
        return answer

    async with (
        box(flood) as container,
        orchestrator(tmp_path, container, stall=0.1) as orch,
        dialled(orch.port, received=4096) as sock,
    ):
        await asyncio.get_running_loop().sock_sendall(sock, head(1) + b"x")
        entry = await only_job(tmp_path, orch)
    assert (entry.outcome, entry.http_status, entry.billed_seconds) == ("client_gone", 499, 1)


@in_loop
async def test_a_body_over_the_limit_while_the_answer_is_on_its_way(tmp_path: Path) -> None:
    """The client's connection is reset, because the head of an answer has gone out; the ledger names the limit."""

    async def eager(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        async for piece in request.content.iter_any():
            await answer.write(piece)
        return answer

    answered = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield b"a little"
        await answered.wait()
        for _ in itertools.count():
            yield bytes(65536)

    async with (
        box(eager) as container,
        orchestrator(tmp_path, container, max_body=1 << 20) as orch,
        client() as session,
    ):

        async def job() -> None:
            url, headers = f"http://127.0.0.1:{orch.port}{ROUTE}", {"X-Model-Id": MODEL}
            async with session.post(url, data=endless(), headers=headers) as got:
                assert got.status == 200
                answered.set()
                await got.read()

        with pytest.raises(aiohttp.ClientError):
            await job()
        entry = await only_job(tmp_path, orch)
        assert (entry.outcome, entry.http_status) == ("too_large", 413)
        assert orch.outcomes == {"too_large": 1}
        container.job = echo
        assert (await post(orch)).body == FRAME


# --- what is billed


@in_loop
async def test_a_slow_reader_does_not_pay_for_its_slowness(tmp_path: Path) -> None:
    """A frame's answer fits the buffers; the job ends for the bill when it has come, not when it has been read."""
    pause = 1.2
    async with box() as container, orchestrator(tmp_path, container) as orch:
        assert orch._listener is not None
        for site in orch._listener.runner.sites:
            server = getattr(site, "_server")  # noqa: B009 - typed as something that has no sockets
            server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        async with dialled(orch.port, received=4096) as sock:
            await asyncio.get_running_loop().sock_sendall(sock, head(len(FRAME)) + FRAME)
            await soon(lambda: container.jobs == 1)
            await asyncio.sleep(pause)
            assert orch.running == 1, "the kernel took all of it, and nothing is tested"
            assert (await receive(sock, len(FRAME))).startswith(b"HTTP/1.1 200")
        entry = await only_job(tmp_path, orch)
    assert (entry.outcome, entry.billed_seconds) == ("ok", 1)
    assert entry.wall_seconds < pause


@in_loop
async def test_a_running_job_is_in_the_ledger(tmp_path: Path) -> None:
    busy, free = asyncio.Event(), asyncio.Event()

    async def hold(request: web.Request) -> web.StreamResponse:
        await request.read()
        busy.set()
        await free.wait()
        return web.Response(body=b"done")

    async with box(hold) as container, orchestrator(tmp_path, container) as orch:
        job = asyncio.create_task(post(orch, b"abc"))
        await busy.wait()
        await soon(lambda: [row.outcome for row in read_usage(tmp_path, 9).entries] == ["running"])
        assert orch.ledger.totals.jobs == 0
        free.set()
        answer = await job
    (entry,) = read_usage(tmp_path, 9).entries
    assert (entry.job_id, entry.outcome, entry.billed_seconds) == (answer.headers["X-Job-Id"], "ok", 1)


@in_loop
async def test_a_worker_that_says_absurd_numbers(tmp_path: Path) -> None:
    async def absurd(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        return web.Response(body=body, headers={"X-Metadata": f'{{"compute_seconds": 1{"0" * 400}}}'})

    async with box(absurd) as container, orchestrator(tmp_path, container) as orch, gateway(orch) as gate:
        assert (await post(gate, b"abc")).body == b"abc"
        entry = await only_job(tmp_path, orch)
    assert (entry.outcome, entry.compute_seconds) == ("ok", None)


# --- headers


@in_loop
async def test_a_content_type_of_odd_characters(tmp_path: Path) -> None:
    types: list[str] = []

    async def note(request: web.Request) -> web.StreamResponse:
        types.append(request.headers["Content-Type"])
        return await echo(request)

    async def send(port: int, kind: bytes) -> bytes:
        async with dialled(port) as sock:
            first, _, rest = head(1).partition(b"\r\n")
            request = first + b"\r\nContent-Type: " + kind + b"\r\nConnection: close\r\n" + rest + b"x"
            await asyncio.get_running_loop().sock_sendall(sock, request)
            return await receive(sock, 1 << 20)

    async with box(note) as container, orchestrator(tmp_path, container) as orch, gateway(orch) as gate:
        for port in (gate.port, orch.port):
            assert (await send(port, b"image/png;\tboost=40")).startswith(b"HTTP/1.1 200")
            for odd in (b"image/png\xc2\x85", b"image/png\xff"):
                refused = await send(port, odd)
                assert refused.startswith(b"HTTP/1.1 400")
                assert b"bad_request" in refused
    assert types == ["image/png; boost=40"] * 2
