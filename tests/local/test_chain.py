"""Client -> gateway -> orchestrator -> container and back: the page's frame, every row of its error table, failover."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from gpu_byoc.local import ports
from gpu_byoc.local.ledger import read_usage
from gpu_byoc.local.relay import ROUTE
from tests.local.kit import (
    FRAME,
    MODEL,
    box,
    client,
    echo,
    gateway,
    get,
    in_loop,
    orchestrator,
    post,
    says,
    soon,
)
from tests.support.processes import free_port


@in_loop
async def test_a_frame_travels_there_and_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The page's four lines, verbatim and in order; headers that must survive do, others do not."""
    caplog.set_level(logging.INFO, "gpu_byoc.local")
    kind = "application/octet-stream; width=640; height=480; format=rgb24"
    async with box() as container, orchestrator(tmp_path, container) as orch, gateway(orch) as gate:
        answer = await post(gate, Content_Type=kind)
        assert (answer.status, answer.body) == (200, FRAME)
        assert answer.headers["Content-Type"] == kind
        assert answer.headers["Content-Length"] == str(len(FRAME))
        assert json.loads(answer.headers["X-Metadata"])["backend"] == "echo"
        assert answer.headers["Server-Timing"] == "compute;dur=250"
        assert answer.headers["X-Orchestrator-Url"] == f"http://127.0.0.1:{orch.port}"
        assert "X-Secret" not in answer.headers
        page = [
            f"BYOC capability registered: {MODEL} -> {container.url}",
            f"Job received from gateway: {MODEL}",
            "Forwarded to BYOC container",
            "Container response received, returning to gateway",
        ]
        lines = [line for line in caplog.messages if "listening" not in line]
        assert lines == page
        await post(gate)
        assert [line for line in caplog.messages if "listening" not in line] == page + page[1:]


@in_loop
async def test_a_body_of_unknown_length_and_one_of_none(tmp_path: Path) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(FRAME), 100_000):
            yield FRAME[start : start + 100_000]

    async with box() as container, orchestrator(tmp_path, container) as orch, gateway(orch) as gate:
        assert (await post(gate, pieces())).body == FRAME
        empty = await post(gate, b"")
        assert (empty.status, empty.body) == (200, b"")


@in_loop
async def test_an_answer_streams_while_it_is_made(tmp_path: Path) -> None:
    """The client has the first bytes before the container has made the last: nothing is held back on the way."""
    more = asyncio.Event()

    async def slowly(request: web.Request) -> web.StreamResponse:
        await request.read()
        answer = web.StreamResponse()  # no length: chunked
        await answer.prepare(request)
        await answer.write(b"first")
        await more.wait()
        await answer.write(b"last")
        return answer

    async with (
        box(slowly) as container,
        orchestrator(tmp_path, container) as orch,
        gateway(orch) as gate,
        client() as session,
        session.post(f"http://127.0.0.1:{gate.port}{ROUTE}", data=b"abc", headers={"X-Model-Id": MODEL}) as answer,
    ):
        assert await answer.content.readany() == b"first"
        more.set()
        assert await answer.content.read() == b"last"


@in_loop
async def test_a_body_streams_while_it_arrives(tmp_path: Path) -> None:
    """The container has the first bytes before the client has sent the last."""
    arrived, more = asyncio.Event(), asyncio.Event()

    async def take(request: web.Request) -> web.StreamResponse:
        first = await request.content.readany()
        arrived.set()
        return web.Response(body=first + await request.content.read())

    async def pieces() -> AsyncIterator[bytes]:
        yield b"first"
        await more.wait()
        yield b"last"

    async with box(take) as container, orchestrator(tmp_path, container) as orch, gateway(orch) as gate:
        job = asyncio.create_task(post(gate, pieces()))
        await arrived.wait()
        more.set()
        assert (await job).body == b"firstlast"


@in_loop
async def test_both_ways_at_once_with_more_than_fits_in_between(tmp_path: Path) -> None:
    """A container that answers while it reads, and a body far larger than all the buffers on the way."""
    size = 24 << 20

    async def mirror(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        async for piece in request.content.iter_any():
            await answer.write(piece)
        return answer

    async with box(mirror) as container, orchestrator(tmp_path, container) as orch, gateway(orch) as gate:
        answer = await post(gate, bytes(size))
        assert (answer.status, len(answer.body)) == (200, size)


# --- the page's error table


@in_loop
async def test_no_capability(tmp_path: Path) -> None:
    """Without -byoc; and the page's text."""
    async with orchestrator(tmp_path, None) as orch, gateway(orch) as gate:
        answer = await post(gate)
        assert answer.error == (400, "no_capability")
        assert f"No orchestrator advertising capability {MODEL}" in answer.message
        direct = await post(orch)
        assert direct.error == (503, "no_capacity")


@in_loop
async def test_names_are_case_sensitive(tmp_path: Path) -> None:
    async with box() as container, orchestrator(tmp_path, container) as orch, gateway(orch) as gate:
        answer = await post(gate, model="Green-Tint-CPU")
        assert answer.error == (400, "no_capability")
        assert "No orchestrator advertising capability Green-Tint-CPU" in answer.message
        assert container.jobs == 0
        missing = await post(gate, model=None)
        assert missing.error == (400, "bad_request")
        assert "X-Model-Id" in missing.message


@in_loop
async def test_the_container_is_not_there(tmp_path: Path) -> None:
    async with orchestrator(tmp_path, f"http://127.0.0.1:{free_port()}") as orch, gateway(orch) as gate:
        answer = await post(gate)
        assert answer.error == (502, "container_unreachable")
        assert f"No orchestrator advertising capability {MODEL}" in answer.message
        assert "connection refused" in answer.message
        direct = await post(orch)
        assert direct.error == (502, "container_unreachable")
        assert orch.ledger.totals.jobs == 0, "refused before it was started: not in the ledger"


@in_loop
async def test_the_container_stops_and_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with box() as container, orchestrator(tmp_path, container) as orch, gateway(orch) as gate:
        assert (await post(gate)).status == 200
        await container.stop()
        answer = await post(gate)  # the gateway's token still says that there is room
        assert answer.error == (502, "container_unreachable")
        assert "connection refused" in answer.message
        assert [line for line in caplog.messages if line.startswith("BYOC capability unregistered")]
        assert (await post(gate)).error == (502, "container_unreachable"), "and now the token says it"
        await container.start()
        assert orch.container is not None
        await soon(lambda: orch.container and orch.container.state == "ready")
        assert (await post(gate)).body == FRAME
    jobs = read_usage(tmp_path, 9).entries
    assert [(job.outcome, job.billed_seconds, job.http_status) for job in jobs] == [
        ("ok", 1, 200),
        ("container_unreachable", 0, 502),  # it never reached the container
        ("ok", 1, 200),
    ]


@in_loop
async def test_the_container_is_loading(tmp_path: Path) -> None:
    async with box() as container:
        container.health = {"status": "LOADING"}
        async with orchestrator(tmp_path, container) as orch, gateway(orch) as gate:
            for node in (gate, orch):
                answer = await post(node)
                assert answer.error == (503, "not_ready")
                assert int(answer.headers["Retry-After"]) > 0


@in_loop
async def test_all_busy(tmp_path: Path) -> None:
    """The (n+1)th job gets 503 with Retry-After, from either; a place is free again when a job ends."""
    busy, free = asyncio.Semaphore(0), asyncio.Event()

    async def hold(request: web.Request) -> web.StreamResponse:
        await request.read()
        busy.release()
        await free.wait()
        return web.Response(body=b"done")

    async with (
        box(hold) as container,
        orchestrator(tmp_path, container, capacity=2) as orch,
        gateway(orch) as gate,
    ):
        jobs = [asyncio.create_task(post(gate, b"abc")) for _ in range(2)]
        for _ in jobs:
            await busy.acquire()
        for node in (orch, gate):
            answer = await post(node, b"abc")
            assert answer.error == (503, "all_busy")
            assert int(answer.headers["Retry-After"]) > 0
        free.set()
        assert [(await job).body for job in jobs] == [b"done", b"done"]
        assert orch.running == 0
        assert (await post(gate, b"abc")).body == b"done"
        assert container.jobs == 3


@in_loop
async def test_no_orchestrator_at_all(caplog: pytest.LogCaptureFixture) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    async with gateway(url) as gate:
        assert sum("no orchestrator can be reached yet" in line for line in caplog.messages) == 1
        answer = await post(gate)
        assert answer.error == (502, "orchestrator_unreachable")
        assert f"No orchestrator advertising capability {MODEL}" in answer.message
        assert f"{url} (connection refused)" in answer.message


@in_loop
async def test_the_gateway_may_be_started_first(tmp_path: Path) -> None:
    port = free_port()
    async with box() as container, gateway(f"http://127.0.0.1:{port}") as gate:
        assert (await post(gate)).status == 502
        async with orchestrator(tmp_path, container, port=port):
            assert (await post(gate)).body == FRAME


@in_loop
async def test_no_http_ingest(tmp_path: Path) -> None:
    async with gateway("http://127.0.0.1:9", http_ingest=False) as gate:
        answer = await post(gate)
        assert answer.status == 404
        assert "-httpIngest" in answer.message


@in_loop
async def test_a_body_over_the_limit(tmp_path: Path) -> None:
    """With a length it is refused before it is read or reaches the container; without one as soon as it shows."""

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(65536)

    async with (
        box() as container,
        orchestrator(tmp_path, container, max_body=len(FRAME)) as orch,
        gateway(orch, max_body=len(FRAME)) as gate,
    ):
        assert (await post(gate)).status == 200
        for node in (gate, orch):
            answer = await post(node, FRAME + b"x")
            assert answer.error == (413, "too_large")
        assert container.jobs == 1
        for node in (gate, orch):
            url, headers = f"http://127.0.0.1:{node.port}{ROUTE}", {"X-Model-Id": MODEL}
            async with client() as session, session.post(url, data=endless(), headers=headers) as got:
                assert got.status == 413
        assert (await post(gate)).body == FRAME, "and the next job works"


# --- what the worker says is relayed


@in_loop
async def test_answers_of_the_worker_are_relayed(tmp_path: Path) -> None:
    async with box() as container, orchestrator(tmp_path, container) as orch, gateway(orch) as gate:
        for status in (400, 413, 415, 422, 500, 503):
            container.job = says(status, status="error", error="mine", message="told")
            answer = await post(gate)
            assert (answer.status, answer.json) == (status, {"status": "error", "error": "mine", "message": "told"})
            assert answer.headers["X-Orchestrator-Url"] == f"http://127.0.0.1:{orch.port}"
        assert answer.headers["Retry-After"] == "7"
        container.job = echo
        assert (await post(gate)).body == FRAME
    outcomes = [(job.outcome, job.http_status, job.billed_seconds) for job in read_usage(tmp_path, 9).entries]
    assert outcomes[0] == ("worker_error", 400, 1), "a job that reached the worker is paid for"
    assert outcomes[-1] == ("ok", 200, 1)


@in_loop
async def test_an_early_answer_ends_the_upload(tmp_path: Path) -> None:
    """A container that refuses without reading: its answer arrives although the body never does."""

    async def refuse(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": "no"}, status=415)

    never = asyncio.Event()

    async def stuck() -> AsyncIterator[bytes]:
        yield b"a little"
        await never.wait()

    async with box(refuse) as container, orchestrator(tmp_path, container) as orch, gateway(orch) as gate:
        url, headers = f"http://127.0.0.1:{gate.port}{ROUTE}", {"X-Model-Id": MODEL}
        async with client() as session, session.post(url, data=stuck(), headers=headers) as got:
            assert got.status == 415
        await soon(lambda: orch.running == 0)
        container.job = echo
        assert (await post(gate)).body == FRAME


@in_loop
async def test_a_container_that_breaks_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without an answer: 502. In the middle of one: the client's connection is reset, never a short success."""

    async def hang_up(request: web.Request) -> web.StreamResponse:
        await request.read()
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def half(request: web.Request) -> web.StreamResponse:
        await request.read()
        answer = web.StreamResponse()
        answer.content_length = len(FRAME)
        await answer.prepare(request)
        await answer.write(FRAME[:300_000])
        assert request.transport is not None
        request.transport.close()
        return answer

    async with box(hang_up) as container, orchestrator(tmp_path, container) as orch, gateway(orch) as gate:
        assert (await post(gate)).error == (502, "container_unreachable")
        container.job = half
        with pytest.raises(aiohttp.ClientError):
            await post(gate)
        container.job = echo
        assert (await post(gate)).body == FRAME
        assert orch.running == 0
    outcomes = [(job.outcome, job.billed_seconds) for job in read_usage(tmp_path, 9).entries]
    assert outcomes == [("container_unreachable", 1), ("container_unreachable", 1), ("ok", 1)]


@in_loop
async def test_a_container_that_never_answers(tmp_path: Path) -> None:
    async def sleep(request: web.Request) -> web.StreamResponse:
        await request.read()
        await asyncio.Event().wait()
        raise AssertionError

    async with (
        box(sleep) as container,
        orchestrator(tmp_path, container, job_timeout=1.0) as orch,
        gateway(orch) as gate,
    ):
        answer = await post(gate)
        assert answer.error == (504, "container_timeout")
        await soon(lambda: container.cancelled == 1)
        assert orch.running == 0


@in_loop
async def test_a_client_that_goes_away(tmp_path: Path) -> None:
    """Its job is called off all the way down, and its place is free again."""
    busy = asyncio.Event()

    async def hold(request: web.Request) -> web.StreamResponse:
        await request.read()
        busy.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with (
        box(hold) as container,
        orchestrator(tmp_path, container, capacity=1) as orch,
        gateway(orch) as gate,
    ):
        job = asyncio.create_task(post(gate))
        await busy.wait()
        assert (await post(gate)).error == (503, "all_busy")
        job.cancel()
        await asyncio.wait([job])
        await soon(lambda: container.cancelled == 1)
        await soon(lambda: orch.running == 0 and gate.running == 0)
        container.job = echo
        assert (await post(gate)).body == FRAME
        assert gate.outcomes == {"all_busy": 1, "client_gone": 1, "ok": 1}
    assert [job.outcome for job in read_usage(tmp_path, 9).entries] == ["client_gone", "ok"]


# --- several orchestrators


@in_loop
async def test_jobs_are_spread_over_those_with_room(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        boxes = [await stack.enter_async_context(box()) for _ in range(2)]
        orchs = [await stack.enter_async_context(orchestrator(tmp_path / str(i), b)) for i, b in enumerate(boxes)]
        gate = await stack.enter_async_context(gateway(*orchs))
        for _ in range(8):
            assert (await post(gate)).body == FRAME
        assert [b.jobs for b in boxes] == [4, 4]


@in_loop
async def test_failover_past_one_dead_one_broken_and_one_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every one of them has told the gateway that it has room, and then cannot; the last one takes the job."""
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        good, broken = await enter(box()), await enter(box(says(500, error="processor_failed")))
        entered, free = asyncio.Event(), asyncio.Event()

        async def hold(request: web.Request) -> web.StreamResponse:
            await request.read()
            entered.set()
            await free.wait()
            return web.Response()

        full = await enter(box(hold))
        dead = AsyncExitStack()
        orch_dead = await dead.enter_async_context(orchestrator(tmp_path / "dead", good, capacity=9))
        orch_broken = await enter(orchestrator(tmp_path / "broken", broken, capacity=8))
        orch_full = await enter(orchestrator(tmp_path / "full", full, capacity=1))
        orch_good = await enter(orchestrator(tmp_path / "good", good, capacity=1))
        gate = await enter(gateway(orch_dead, orch_broken, orch_full, orch_good, token_ttl=60.0))
        # the gateway learns of room everywhere, then it goes
        container_jobs = good.jobs
        assert (await post(gate)).body == FRAME  # most room: the one that will be dead
        assert good.jobs == container_jobs + 1
        await dead.aclose()
        blocker = asyncio.create_task(post(orch_full))
        await entered.wait()

        answer = await post(gate)
        assert (answer.status, answer.body) == (200, FRAME)
        assert answer.headers["X-Orchestrator-Url"] == f"http://127.0.0.1:{orch_good.port}"
        failed = [line.split(" failed: ")[1] for line in caplog.messages if " failed: " in line]
        assert failed[:2] == ["connection refused", "it answered 500"]
        assert failed[2:] in ([], ["it answered 503"]), "equals take turns: the full one may not have been asked"
        free.set()
        await blocker


@in_loop
async def test_when_all_fail_the_most_telling_answer_is_relayed(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        broken = await enter(box(says(500, error="processor_failed", message="told")))
        busy = await enter(box(says(503, error="overloaded", message="later")))
        first = await enter(orchestrator(tmp_path / "a", broken, capacity=9))
        second = await enter(orchestrator(tmp_path / "b", busy, capacity=8))
        gate = await enter(gateway(first, second))
        assert (await post(gate)).error == (500, "processor_failed")
        assert (broken.jobs, busy.jobs) == (1, 1)
        broken.job = says(503, error="overloaded", message="later")
        assert (await post(gate)).error == (503, "overloaded")


@in_loop
async def test_a_client_error_is_not_tried_elsewhere(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        boxes = [await enter(box(says(400, error="bad_frame", message="length"))) for _ in range(2)]
        orchs = [await enter(orchestrator(tmp_path / str(i), b)) for i, b in enumerate(boxes)]
        gate = await enter(gateway(*orchs))
        assert (await post(gate)).error == (400, "bad_frame")
        assert sum(b.jobs for b in boxes) == 1


# --- tokens, status, end


@in_loop
async def test_a_burst_asks_for_tokens_once(tmp_path: Path) -> None:
    asked = 0

    async def token(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return await orch._get_token(request)

    async with box() as container, orchestrator(tmp_path, container) as orch:
        from gpu_byoc.local.ports import listen

        front = await listen([web.get("/process/token", token)], "127.0.0.1", 0, "-x")
        async with gateway(front.url) as gate:
            asked = 0
            answers = await asyncio.gather(*(post(gate, b"abc") for _ in range(8)))
            assert [answer.body for answer in answers] == [b"abc"] * 8, "jobs go to the token's service_addr"
            assert asked == 1
        await front.close()


@in_loop
async def test_the_token_is_go_livepeers(tmp_path: Path) -> None:
    """Off-chain any signature will do, or none; an unknown capability is 200 with no room."""
    import base64

    def head(value: bytes) -> str:
        return base64.b64encode(value).decode()

    async with box() as container, orchestrator(tmp_path, container, capacity=3) as orch:
        for signed in (b'{"addr": "0x1"}', b'{"addr": "0x1", "sig": ""}', b'{"addr": "0x1", "sig": "0x"}'):
            got = await get(orch.port, "/process/token", Livepeer_Eth_Address=head(signed), Livepeer_Capability=MODEL)
            assert got.status == 200
            assert got.json["available_capacity"] == 3
            assert got.json["service_addr"] == f"http://127.0.0.1:{orch.port}"
            assert got.json["price"] == {"pixelsPerUnit": 1}
        other = await get(orch.port, "/process/token", Livepeer_Eth_Address=head(b"{}"), Livepeer_Capability="other")
        assert (other.status, other.json["available_capacity"]) == (200, 0)
        for headers in (
            {"Livepeer_Capability": MODEL},
            {"Livepeer_Eth_Address": head(b"{}")},
            {"Livepeer_Eth_Address": "%%", "Livepeer_Capability": MODEL},
            {"Livepeer_Eth_Address": head(b"[]"), "Livepeer_Capability": MODEL},
        ):
            assert (await get(orch.port, "/process/token", **headers)).error == (400, "bad_request")


@in_loop
async def test_status_on_both_ports(tmp_path: Path) -> None:
    async with box() as container, orchestrator(tmp_path, container) as orch, gateway(orch) as gate:
        await post(gate)
        for port in (orch.port, orch.cli_port):
            status = (await get(port, "/status")).json
            assert status["capabilities"][0]["state"] == "ready"
            assert status["ledger"]["jobs"] == 1
            assert status["ledger"]["compute_seconds"] == 0.25
            assert status["outcomes"] == {"ok": 1}
        for port in (gate.port, gate.cli_port):
            status = (await get(port, "/status")).json
            assert status["outcomes"] == {"ok": 1}
            assert status["orchestrators"][0]["error"] is None
        assert (await get(gate.port, "/health")).json == {"status": "OK"}


@in_loop
async def test_a_job_that_does_not_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "SHUTDOWN_SECONDS", 0.05)
    busy = asyncio.Event()

    async def hold(request: web.Request) -> web.StreamResponse:
        await request.read()
        busy.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with box(hold) as container:
        async with orchestrator(tmp_path, container) as orch:
            job = asyncio.create_task(post(orch, b"abc"))
            await busy.wait()
        with pytest.raises(aiohttp.ClientError):
            await job
        await soon(lambda: container.cancelled == 1)
    assert [(job.outcome, job.http_status) for job in read_usage(tmp_path, 9).entries] == [("draining", 503)]


@in_loop
async def test_jobs_under_way_end_before_the_orchestrator_does(tmp_path: Path) -> None:
    busy, free = asyncio.Event(), asyncio.Event()

    async def hold(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        busy.set()
        await free.wait()
        return web.Response(body=body)

    async with box(hold) as container, AsyncExitStack() as stack:
        orch = await stack.enter_async_context(orchestrator(tmp_path, container))
        job = asyncio.create_task(post(orch, b"abc"))
        await busy.wait()
        closing = asyncio.create_task(stack.aclose())
        await soon(lambda: orch._draining)
        free.set()
        assert (await job).body == b"abc"
        await closing
    assert [job.outcome for job in read_usage(tmp_path, 9).entries] == ["ok"]
