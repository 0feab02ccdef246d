"""Workers that register: what an orchestrator answers them, who gets the jobs, and when it forgets them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from gpu_byoc.config import OrchestratorConfig, read_orch_secret
from gpu_byoc.errors import BadRequest, ConfigError
from gpu_byoc.local import container as containers
from gpu_byoc.local import upstream
from gpu_byoc.local.ledger import read_usage
from gpu_byoc.local.offer import Offer, read_offer
from gpu_byoc.local.orchestrator import Orchestrator
from tests.local.kit import (
    FRAME,
    MODEL,
    Answer,
    Box,
    box,
    client,
    echo,
    gateway,
    get,
    in_loop,
    orchestrator,
    post,
    soon,
)
from tests.support.processes import free_port

SECRET = "shared-s3cret"


async def call(node: Orchestrator, what: str, data: bytes, secret: str | None = SECRET, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if secret is not None:
        named["Authorization"] = secret
    url = f"http://127.0.0.1:{node.port}/capability/{what}"
    async with client() as session, session.post(url, data=data, headers=named) as got:
        return Answer(got.status, got.headers, await got.read())


async def register(node: Orchestrator, url: str, **fields: Any) -> Answer:
    offer = {"name": MODEL, "url": url, "capacity": 4, **fields}
    return await call(node, "register", json.dumps(offer).encode())


def listed(node: Orchestrator) -> list[tuple[str, str]]:
    return [(each["container_url"], each["state"]) for each in node.status()["capabilities"]]


class Guarded(Box):
    """A container that takes only calls with its token, and counts those that had none or another."""

    def __init__(self, token: str) -> None:
        super().__init__(self._guard)
        self.token = token
        self.strangers = 0

    async def _guard(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            self.strangers += 1
            return web.json_response({"error": "unauthorized"}, status=401)
        return await echo(request)


@contextlib.asynccontextmanager
async def guarded(token: str) -> AsyncIterator[Guarded]:
    made = Guarded(token)
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


@in_loop
async def test_a_connection_that_took_too_long_makes_nobody_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that was suspended for a moment has such connections to all its workers."""
    async with box() as container, orchestrator(tmp_path, None, secret=SECRET) as orch:
        await register(orch, container.url)
        with monkeypatch.context() as changed:
            changed.setattr(upstream, "CONNECT_SECONDS", 0.0)
            assert (await post(orch)).error == (503, "not_ready")
        await soon(lambda: listed(orch) == [(container.url, "ready")])
        assert (await post(orch)).body == FRAME


# --- the routes


@in_loop
async def test_a_worker_registers_gets_jobs_with_its_token_and_unregisters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with (
        guarded("t0ken") as container,
        orchestrator(tmp_path, None, secret=SECRET) as orch,
        gateway(orch) as gate,
    ):
        assert (await post(gate)).status == 400
        answer = await register(orch, container.url + "/", token="t0ken", price_per_unit=3, price_scaling=2)
        assert (answer.status, answer.body, answer.headers["Content-Type"].split(";")[0]) == (
            *(200, b"ok", "application/json"),
        )
        assert (await post(gate)).body == FRAME, "no waiting: it is ready when its registration is answered"
        (entry,) = orch.status()["capabilities"]
        assert (entry["registered"], entry["capacity"], entry["running"]) == (True, 4, 0)
        assert (entry["price_per_unit"], entry["price_scaling"], entry["currency"]) == (3, 2, "wei")
        assert (await call(orch, "unregister", b"another")).body == b"ok"
        assert listed(orch) == [(container.url, "ready")]
        answer = await call(orch, "unregister", MODEL.encode() + b"\n")
        assert (answer.status, answer.body) == (200, b"ok")
        assert listed(orch) == []
        assert (await post(orch)).error == (503, "no_capacity")
        for secret in (SECRET, "t0ken"):
            assert secret not in caplog.text + json.dumps(orch.status()) + repr(orch.config)


@pytest.mark.parametrize("own", [SECRET, ""])
@pytest.mark.parametrize("shown", [None, "", "wrong", f"Bearer {SECRET}", SECRET + "x", "\udcff"])
@pytest.mark.parametrize("what", ["register", "unregister"])
@in_loop
async def test_a_wrong_secret(tmp_path: Path, own: str, shown: str | None, what: str) -> None:
    async with box() as container, orchestrator(tmp_path, container, secret=own) as orch:
        body = json.dumps({"name": "other", "url": container.url}).encode() if what == "register" else MODEL.encode()
        answer = await call(orch, what, body, shown)
        assert (answer.status, answer.body) == (400, b"invalid authorization\n")
        assert [name["name"] for name in orch.status()["capabilities"]] == [MODEL]


@in_loop
async def test_only_post(tmp_path: Path) -> None:
    async with orchestrator(tmp_path, None, secret=SECRET) as orch:
        for what in ("register", "unregister"):
            assert (await get(orch.port, f"/capability/{what}", Authorization=SECRET)).status == 405


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"\xff", "not JSON"),
        (b"[" * 50_000, "not JSON"),
        (b"x" * 70_000, "larger than"),
        (b'{"url": "http://a"}', "name"),
        (b'{"name": " x", "url": "http://a"}', "name"),
        (b'{"name": "x\\ny", "url": "http://a"}', "name"),
        (b'{"name": 1, "url": "http://a"}', "name"),
        (b'{"name": "x"}', "url"),
        (b'{"name": "x", "url": "a:80"}', "url"),
        (b'{"name": "x", "url": "http://a:b"}', "url"),
        (b'{"name": "x", "url": "http://a..b:8000"}', "url"),
        (b'{"name": "x", "url": "http://' + b"a" * 64 + b':8000"}', "url"),
        (b'{"name": "x", "url": "http://a", "capacity": -1}', "capacity"),
        (b'{"name": "x", "url": "http://a", "capacity": true}', "capacity"),
        (b'{"name": "x", "url": "http://a", "price_per_unit": 1.5}', "price_per_unit"),
        (b'{"name": "x", "url": "http://a", "price_per_unit": 9223372036854775808}', "price_per_unit"),
        (b'{"name": "x", "url": "http://a", "currency": "usd"}', "currency"),
        (b'{"name": "x", "url": "http://a", "token": "a\\r\\nX-Evil: 1"}', "token"),
    ],
)
@in_loop
async def test_what_cannot_be_registered(tmp_path: Path, body: bytes, told: str) -> None:
    async with orchestrator(tmp_path, None, secret=SECRET) as orch:
        answer = await call(orch, "register", body)
        assert answer.status == 400
        assert answer.body.startswith(b"Error registering capability: ")
        assert told in answer.body.decode()
        assert listed(orch) == []


def test_the_defaults_are_go_livepeers() -> None:
    assert read_offer(b'{"name": "x", "url": "http://a/", "other": 1}') == Offer("x", "http://a")
    given = b'{"name": "x", "url": "http://a", "price_scaling": 0, "currency": "ETH", "token": null, "capacity": 0}'
    assert read_offer(given) == Offer("x", "http://a", currency="eth")


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*Offer.__slots__, "x"]), inner),
    )
)
def test_no_body_breaks_the_reader(value: Any) -> None:
    try:
        offer = read_offer(json.dumps(value).encode())
    except BadRequest:
        return
    assert offer.name.isprintable()
    assert offer.capacity >= 0
    assert offer.price_scaling >= 1


# --- who gets the jobs


@in_loop
async def test_workers_share_jobs_by_what_they_have_free(tmp_path: Path) -> None:
    release = asyncio.Event()

    async def hold(request: web.Request) -> web.StreamResponse:
        await request.read()
        await release.wait()
        return web.Response(body=b"done")

    async with box(hold) as large, box(hold) as small, orchestrator(tmp_path, None, secret=SECRET) as orch:
        await register(orch, large.url, capacity=4)
        await register(orch, small.url, capacity=2)
        token = await get(orch.port, "/process/token", Livepeer_Eth_Address="e30=", Livepeer_Capability=MODEL)
        assert token.json["available_capacity"] == 6
        jobs: list[asyncio.Task[Answer]] = []
        for _ in range(6):
            jobs.append(asyncio.create_task(post(orch, b"x")))
            await soon(lambda: large.jobs + small.jobs == len(jobs))
            if len(jobs) == 2:
                assert (large.jobs, small.jobs) == (2, 0), "the one with more room first"
        assert (large.jobs, small.jobs) == (4, 2)
        assert (await post(orch, b"x")).error == (503, "all_busy")
        await register(orch, small.url, capacity=2)
        assert (await post(orch, b"x")).error == (503, "all_busy"), "registering again forgets no job"
        release.set()
        assert [(await job).body for job in jobs] == [b"done"] * 6
        for _ in range(4):
            await post(orch, b"x")
        assert large.jobs == 8
        await register(orch, large.url, capacity=2)
        for _ in range(4):
            await post(orch, b"x")
        assert (large.jobs, small.jobs) == (10, 4), "equals take turns"


@in_loop
async def test_a_dead_worker_is_forgotten_and_the_job_goes_to_the_next(tmp_path: Path) -> None:
    """Nothing of the job was sent, so nobody has to notice."""
    async with box() as first, box() as second, orchestrator(tmp_path, None, secret=SECRET) as orch:
        await register(orch, first.url, capacity=9)
        await register(orch, second.url, capacity=1)
        await first.stop()
        answer = await post(orch)
        assert (answer.status, answer.body) == (200, FRAME)
        assert listed(orch) == [(second.url, "ready")]
        await second.stop()
        assert (await post(orch)).error == (502, "container_unreachable")
        assert listed(orch) == []
        assert (await post(orch)).error == (503, "no_capacity")
        await first.start()
        await register(orch, first.url)
        assert (await post(orch)).status == 200
    rows = read_usage(tmp_path, 9).entries
    assert [(row.outcome, row.billed_seconds) for row in rows] == [("ok", 1), ("container_unreachable", 0), ("ok", 1)]


@in_loop
async def test_one_that_breaks_off_and_is_gone_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, not when it would have been asked anyway."""
    monkeypatch.setattr(containers, "LAST_RETRY", 1000.0)
    async with box() as container, orchestrator(tmp_path, None, secret=SECRET) as orch:

        async def die(request: web.Request) -> web.StreamResponse:
            assert request.transport is not None
            stopping.append(asyncio.create_task(container.stop()))
            request.transport.abort()
            return web.Response()

        stopping: list[asyncio.Task[None]] = []
        container.job = die
        await register(orch, container.url)
        assert (await post(orch)).error == (502, "container_unreachable")
        await soon(lambda: listed(orch) == [])
        await stopping[0]


@in_loop
async def test_one_that_breaks_off_and_lives_stays(tmp_path: Path) -> None:
    async def abort(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with box(abort) as container, orchestrator(tmp_path, None, secret=SECRET) as orch:
        await register(orch, container.url)
        assert (await post(orch)).error == (502, "container_unreachable")
        container.job = echo
        assert (await post(orch)).status == 200


@in_loop
async def test_a_worker_that_answers_401_has_to_register_again(tmp_path: Path) -> None:
    async with guarded("new") as container, orchestrator(tmp_path, None, secret=SECRET) as orch, gateway(orch) as gate:
        await register(orch, container.url, token="old")
        answer = await post(gate)
        assert answer.error == (502, "container_unauthorized")
        assert "old" not in answer.message
        assert listed(orch) == []
        await register(orch, container.url, token="new")
        assert (await post(gate)).body == FRAME


@in_loop
async def test_a_401_for_a_token_that_was_replaced_meanwhile_changes_nothing(tmp_path: Path) -> None:
    arrived, go = asyncio.Event(), asyncio.Event()

    async def late(request: web.Request) -> web.StreamResponse:
        await request.read()
        arrived.set()
        await go.wait()
        return web.json_response({}, status=401)

    async with box(late) as container, orchestrator(tmp_path, None, secret=SECRET) as orch:
        await register(orch, container.url, token="old")
        job = asyncio.create_task(post(orch))
        await arrived.wait()
        await register(orch, container.url, token="new")
        go.set()
        assert (await job).error == (502, "container_unauthorized")
        assert listed(orch) == [(container.url, "ready")]


@in_loop
async def test_one_that_registers_before_it_listens_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with orchestrator(tmp_path, None, secret=SECRET) as orch:
        late = Box(echo)
        late.port = free_port()
        assert (await register(orch, late.url)).status == 200
        assert listed(orch) == [(late.url, "down")]
        await late.start()
        await soon(lambda: listed(orch) == [(late.url, "ready")])
        await late.stop()
        await soon(lambda: listed(orch) == [])
        monkeypatch.setattr(containers, "PATIENCE", 0.3)
        await register(orch, late.url)
        assert listed(orch) == [(late.url, "down")]
        await soon(lambda: listed(orch) == [])
        assert "not up within 0.3 s" in caplog.text


@in_loop
async def test_a_loading_worker_is_kept_and_gets_no_jobs(tmp_path: Path) -> None:
    async with box() as container, orchestrator(tmp_path, None, secret=SECRET) as orch:
        container.health, container.status = {"status": "LOADING"}, 503
        await register(orch, container.url)
        assert listed(orch) == [(container.url, "loading")]
        assert (await post(orch)).error == (503, "not_ready")
        container.health, container.status = {"status": "OK"}, 200
        await soon(lambda: listed(orch) == [(container.url, "ready")])


@in_loop
async def test_a_capacity_of_zero_gets_nothing(tmp_path: Path) -> None:
    async with box() as container, orchestrator(tmp_path, None, secret=SECRET) as orch:
        await register(orch, container.url, capacity=None)
        assert (await post(orch)).error == (503, "all_busy")
        assert container.jobs == 0


@in_loop
async def test_unregistering_one_of_two(tmp_path: Path) -> None:
    async with box() as one, box() as two, orchestrator(tmp_path, None, secret=SECRET) as orch:
        for each in (one, two):
            await register(orch, each.url)
        await call(orch, "unregister", MODEL.encode(), X_Capability_Url=one.url + "/")
        assert listed(orch) == [(two.url, "ready")]
        await register(orch, one.url)
        await call(orch, "unregister", MODEL.encode())
        assert listed(orch) == [], "as in go-livepeer, which knows one container a name"


@in_loop
async def test_together_with_the_container_of_the_command_line(tmp_path: Path) -> None:
    """The same one: its token is used. Another one: both get jobs. The first is never forgotten."""
    async with (
        guarded("t0ken") as fixed,
        box() as other,
        orchestrator(tmp_path, fixed, secret=SECRET, capacity=3) as orch,
    ):
        assert (await post(orch)).error == (502, "container_unauthorized")
        await register(orch, fixed.url, token="t0ken", capacity=2)
        assert listed(orch) == [(fixed.url, "ready")]
        assert (await post(orch)).status == 200
        assert orch.status()["capabilities"][0]["capacity"] == 2
        await register(orch, other.url, capacity=2)
        for _ in range(4):
            assert (await post(orch)).status == 200
        assert (fixed.jobs, other.jobs) == (4, 2)
        await call(orch, "unregister", MODEL.encode())
        assert listed(orch) == [(fixed.url, "ready")]
        assert orch.status()["capabilities"][0]["capacity"] == 3
        await fixed.stop()
        assert (await post(orch)).error == (502, "container_unreachable")
        assert listed(orch) == [(fixed.url, "down")]
        await fixed.start()
        await soon(lambda: listed(orch) == [(fixed.url, "ready")])


# --- the secret's configuration


def test_where_the_secret_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("in-file\n")
    environ = {"ORCH_SECRET": "in-env"}
    assert read_orch_secret(str(file), environ) == "in-file"
    assert environ == {}, "not for child processes"
    assert read_orch_secret("plain", {"ORCH_SECRET_FILE": str(file)}) == "plain"
    assert read_orch_secret("", {"ORCH_SECRET_FILE": str(file), "ORCH_SECRET": "x"}) == "in-file"
    assert read_orch_secret("", {"ORCH_SECRET": "in-env"}) == "in-env"
    assert read_orch_secret("", {}) == ""
    with pytest.raises(ConfigError, match="ORCH_SECRET_FILE"):
        read_orch_secret("", {"ORCH_SECRET_FILE": str(tmp_path / "none")})


def test_a_secret_that_no_header_can_carry(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="orchSecret"):
        OrchestratorConfig("127.0.0.1", 0, "127.0.0.1", 0, tmp_path, secret="two\nlines")
