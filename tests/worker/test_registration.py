"""Registration as an orchestrator sees it, and what the worker lets in: on loopback, without a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from gpu_byoc.cli import main
from gpu_byoc.config import EngineConfig, RegistrationConfig, SecurityConfig, ServeConfig, read_registration
from gpu_byoc.core.registration import OVERLAP
from gpu_byoc.errors import ConfigError, NotReady, Unauthorized
from gpu_byoc.processors.green_tint import GreenTint
from gpu_byoc.transport.listen import bind, port_of, serve
from gpu_byoc.worker import registration as registrations
from gpu_byoc.worker.drain import Drain
from gpu_byoc.worker.registration import TOLD, Registration
from tests.support.processes import Process, free_port, post
from tests.support.workers import Running, asynchronous, running

SECRET = "s3cret-of-the-orchestrator"
NAME = "green-tint-cpu"


class Orchestrator:
    """Records every call. ``status`` and ``text`` are its answers, ``gate`` holds registrations back."""

    def __init__(self) -> None:
        self.status, self.text = 200, "ok"
        self.headers: dict[str, str] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.calls: list[tuple[str, dict[str, str], bytes]] = []
        self.look = ""  # asked before a registration is answered
        self.seen: list[int] = []
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def tokens(self) -> list[str]:
        return [json.loads(body)["token"] for what, _, body in self.calls if what == "register"]

    async def call(self, request: web.Request) -> web.Response:
        self.calls.append((request.match_info["what"], dict(request.headers), await request.read()))
        await self.gate.wait()
        if self.look and request.match_info["what"] == "register":
            async with aiohttp.ClientSession() as session:
                while len(self.seen) < 20 and 200 not in self.seen:  # at the door, an answer may be a beat old
                    async with session.get(self.look) as answer:
                        self.seen.append(answer.status)
                    await asyncio.sleep(0.05)
        return web.Response(
            text=self.text.replace("TOKEN", (self.tokens or [""])[-1]), status=self.status, headers=self.headers
        )


@contextlib.asynccontextmanager
async def orchestrator() -> AsyncIterator[Orchestrator]:
    made = Orchestrator()
    app = web.Application()
    app.router.add_post("/capability/{what}", made.call)
    sock = bind("127.0.0.1", 0)
    made.port = port_of(sock)
    runner = await serve(app, sock, 0.1)
    try:
        yield made
    finally:
        await runner.cleanup()


def config(url: str, **named: Any) -> ServeConfig:
    insecure, security = named.pop("insecure", False), SecurityConfig(ca_file=named.pop("ca_file", ""))
    settings = {"seconds": 1000.0, "url": "http://worker:8000", **named}
    registration = RegistrationConfig(orch_url=url, secret=SECRET, **settings)
    return ServeConfig(
        host="127.0.0.1", capability=NAME, insecure=insecure, security=security, registration=registration
    )


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - any condition, so there is no event to wait for
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def registering(url: str, **named: Any) -> AsyncIterator[Registration]:
    registration = Registration(config(url, **named), 8000)
    task = asyncio.create_task(registration.run())
    try:
        yield registration
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or task.exception() is None


@asynchronous
async def test_what_an_orchestrator_gets() -> None:
    async with orchestrator() as orch:
        price = {"price_per_unit": 7, "price_scaling": 3, "capacity": 5, "description": "tints"}
        async with registering(orch.url + "/", **price) as registration:
            await until(lambda: registration.registered)
            what, headers, body = orch.calls[0]
            assert (what, headers["Authorization"]) == ("register", SECRET), "bare, without a scheme"
            sent = json.loads(body)
            token = sent.pop("token")
            assert len(token) >= 32
            assert sent == {"name": NAME, "url": "http://worker:8000", "currency": "wei", **price}
            report = registration.report()
            assert 0 <= report.pop("seconds_since_success") < 20
            assert report == {
                "state": "registered",
                "orchestrator": orch.url + "/",
                "capability": NAME,
                "url": "http://worker:8000",
                "capacity": 5,
                "error": None,
            }
            await registration.leave()
            what, headers, body = orch.calls[1]
            assert (what, body) == ("unregister", NAME.encode())
            assert headers["Authorization"] == SECRET
            assert headers["X-Capability-Url"] == "http://worker:8000"
            assert registration.report()["state"] == "left"


@asynchronous
async def test_it_is_repeated_with_a_new_token() -> None:
    async with orchestrator() as orch, registering(orch.url, seconds=0.05) as registration:
        await until(lambda: len(orch.calls) >= 4)
        assert len(set(orch.tokens)) == len(orch.tokens)
        await registration.leave()
        count = len(orch.calls)
        assert orch.calls[-1][0] == "unregister"
        await asyncio.sleep(0.2)
        assert len(orch.calls) == count, "nothing after that"


def later(registration: Registration) -> None:
    """As if the first registration had been accepted OVERLAP seconds earlier."""
    assert registration._core._first_success is not None
    registration._core._first_success -= OVERLAP


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@asynchronous
async def test_whose_calls_are_taken() -> None:
    async with orchestrator() as orch, registering(orch.url) as registration:
        with pytest.raises(NotReady):
            registration.check(bearer("any"))
        await until(lambda: registration.registered)
        (token,) = orch.tokens
        registration.check(bearer(token))
        with pytest.raises(NotReady):
            registration.check(bearer("of-the-worker-before"))  # sent just before the orchestrator took us
        later(registration)
        registration.check(bearer(token))
        registration.check({"Authorization": f"bearer  {token} "})
        for headers in ({}, bearer(""), bearer(token[:-1]), bearer(token + "x"), {"Authorization": token}):
            with pytest.raises(Unauthorized):
                registration.check(headers)


@asynchronous
async def test_leaving_waits_for_an_attempt_and_gives_up_on_a_silent_orchestrator(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with orchestrator() as orch, registering(orch.url) as registration:
        orch.gate.clear()
        await until(lambda: orch.calls)
        leaving = asyncio.create_task(registration.leave())
        await asyncio.sleep(0.2)  # time enough for what is not to happen
        assert len(orch.calls) == 1, "the other one comes first"
        orch.gate.set()
        await leaving
        assert [what for what, _, _ in orch.calls] == ["register", "unregister"]
    async with orchestrator() as orch, registering(orch.url) as registration:
        await until(lambda: registration.registered)
        orch.gate.clear()
        async with asyncio.timeout(20):
            await registration.leave()
        assert "will find out by itself" in caplog.text
        orch.gate.set()


@asynchronous
async def test_a_connection_that_is_still_being_made_does_not_arrive_after_the_end() -> None:
    """The orchestrator's queue is full for a moment, so the kernel tries again a second later: a registration, after
    the other call has long been answered."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as sock, contextlib.ExitStack() as held:
        filling = [held.enter_context(socket.socket()) for _ in range(4)]
        for each in filling:
            each.setblocking(False)
            each.connect_ex(sock.getsockname())
        fake = Orchestrator()
        async with registering(f"http://127.0.0.1:{port_of(sock)}") as registration:
            await until(lambda: registration._sockets)
            began = time.monotonic()
            app = web.Application()
            app.router.add_post("/capability/{what}", fake.call)
            runner = await serve(app, sock, 0.1)  # with a longer queue
            try:
                await registration.leave()
                assert [what for what, _, _ in fake.calls] == ["unregister"]
                await asyncio.sleep(began + 1.5 - time.monotonic())
                assert [what for what, _, _ in fake.calls] == ["unregister"], "and the second try does not come"
            finally:
                await runner.cleanup()


async def to_the_end(sock: socket.socket) -> None:
    while await asyncio.get_running_loop().sock_recv(sock, 1 << 16):
        pass


@asynchronous
async def test_what_the_kernel_has_not_delivered_does_not_arrive_after_the_end() -> None:
    """The orchestrator takes calls and reads none, so most of a registration is still on our side when we leave."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as sock, contextlib.ExitStack() as held:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        async with registering(f"http://127.0.0.1:{port_of(sock)}", description="x" * 50_000) as registration:
            async with asyncio.timeout(20):
                register, _ = await loop.sock_accept(sock)
                held.callback(register.close)
                leaving = asyncio.create_task(registration.leave())
                unregister, _ = await loop.sock_accept(sock)
                with unregister:
                    assert (await loop.sock_recv(unregister, 1000)).startswith(b"POST /capability/unregister ")
                    await loop.sock_sendall(unregister, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                    await leaving
                with pytest.raises(ConnectionResetError):
                    await to_the_end(register)


@asynchronous
async def test_a_slow_orchestrator_does_not_know_us_in_the_end() -> None:
    known, slow, over, forgotten = set(), asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def register(request: web.Request) -> web.Response:
        name = json.loads(await request.read())["name"]
        slow.set()
        try:
            await asyncio.sleep(1.2)
            known.add(name)
            return web.Response(text="ok")
        finally:
            over.set()

    async def unregister(request: web.Request) -> web.Response:
        known.discard((await request.read()).decode())
        forgotten.set()
        return web.Response(text="ok")

    app = web.Application()
    app.router.add_post("/capability/register", register)
    app.router.add_post("/capability/unregister", unregister)
    sock = bind("127.0.0.1", 0)
    runner = await serve(app, sock, 0.1)
    try:
        async with registering(f"http://127.0.0.1:{port_of(sock)}") as registration:
            async with asyncio.timeout(20):
                await slow.wait()
            await registration.leave()
            assert forgotten.is_set()
            async with asyncio.timeout(20):
                await over.wait()
    finally:
        await runner.cleanup()
    assert known == set()


@asynchronous
async def test_a_bug_that_ends_it_is_no_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    async with orchestrator() as o:
        registration = Registration(config(o.url, seconds=0.01), 8000)
        task = asyncio.create_task(registration.run())
        await until(lambda: registration.registered)

        def broken(token: str) -> bytes:
            raise AttributeError("a bug")

        monkeypatch.setattr(registration, "_body", broken)
        await asyncio.wait([task])
        assert isinstance(task.exception(), AttributeError), "serve.py logs it"
        assert not registration.registered
        assert registration.report()["state"] == "broken"
        assert "internal error" in registration.report()["error"]


@asynchronous
async def test_leaving_one_that_was_never_reached_or_never_tried(caplog: pytest.LogCaptureFixture) -> None:
    never = Registration(config("http://127.0.0.1:1"), 8000)
    await never.leave()
    assert not caplog.records
    async with registering("http://127.0.0.1:1") as registration:
        await until(lambda: registration.report()["error"])
        await registration.leave()
    assert "connect" in caplog.text.lower()


@asynchronous
async def test_leaving_when_the_first_attempt_is_just_due() -> None:
    """As when SIGTERM comes while the model loads: nothing is sent, because nobody would undo it."""
    async with orchestrator() as orch:
        registration = Registration(config(orch.url), 8000)
        looping, leaving = asyncio.create_task(registration.run()), asyncio.create_task(registration.leave())
        async with asyncio.timeout(20):
            await asyncio.gather(looping, leaving)
        assert not orch.calls


@asynchronous
async def test_failures_are_told_once_and_never_with_a_secret(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with orchestrator() as orch, registering(orch.url, seconds=0.02) as registration:
        orch.status, orch.text = 400, f"invalid authorization {SECRET} TOKEN\n\x1b[2J"
        await until(lambda: len(orch.calls) >= 4)
        assert len(set(orch.tokens)) == 1, "the orchestrator may have taken it"
        (line,) = [line for line in caplog.messages if "not registered" in line]
        assert "answered 400: invalid authorization *** ***" in line
        assert "ORCH_SECRET" in line
        assert "\x1b" not in line
        assert registration.report()["state"] == "failing"
        assert "***" in registration.report()["error"]
        never = registration.age
        orch.status, orch.text = 200, "ok"
        await until(lambda: registration.registered)
        assert registration.report()["error"] is None
        orch.status = 500
        await until(lambda: not registration.registered)
        assert (never, registration.age is None) == (None, False), "there was a success meanwhile"
        await until(lambda: len([line for line in caplog.messages if "not registered" in line]) == 2)
        everything = caplog.text + repr(registration.report()) + repr(registration._settings)
        for secret in (SECRET, *orch.tokens):
            assert secret not in everything
        orch.status = 200


@asynchronous
async def test_a_secret_at_the_end_of_what_is_shown_is_not_cut_but_hidden(caplog: pytest.LogCaptureFixture) -> None:
    async with orchestrator() as orch, registering(orch.url, seconds=0.02) as registration:
        orch.status, orch.text = 400, "x" * (TOLD - 20) + "TOKEN"
        await until(lambda: registration.report()["error"])
        assert orch.tokens[0][:10] not in caplog.text + registration.report()["error"]
        assert "x***" in registration.report()["error"]
        orch.status = 200


@asynchronous
async def test_the_secret_goes_to_no_other_place() -> None:
    async with orchestrator() as orch, orchestrator() as other, registering(orch.url, seconds=0.05) as registration:
        orch.status, orch.headers = 307, {"Location": other.url + "/capability/register"}
        await until(lambda: len(orch.calls) >= 2)
        assert "307" in registration.report()["error"]
        assert not other.calls
        orch.status, orch.headers = 200, {}


# --- the worker's routes


@contextlib.asynccontextmanager
async def registered(orch: Orchestrator) -> AsyncIterator[Running]:
    """A worker whose registration has been made, but not yet been sent: that is the test's to start."""
    async with running(GreenTint(), EngineConfig(slots=4, max_batch=2)) as worker:
        worker.worker.registration = Registration(config(orch.url), 8000)
        yield worker


NETWORKS = ["/", "/live/video-to-video", f"/{NAME}", "/live-video-to-video"]
NETWORKS += [f"{prefix}/stream/{what}" for prefix in ("", "/api") for what in ("start", "stop", "params", "update")]


@asynchronous
async def test_every_call_of_the_network_needs_the_token_and_reading_does_not() -> None:
    async with orchestrator() as orch, registered(orch) as worker:
        registration = worker.worker.registration
        assert registration is not None
        assert (await worker.post(bytes(3)))[0] == 503, "no 401 that would make the orchestrator drop us"
        await registration._attempt()
        assert (await worker.post(bytes(3)))[0] == 503, "what was on its way to the worker before"
        later(registration)
        for path in NETWORKS:
            status, headers, body = await worker.post(bytes(3), path)
            assert (status, json.loads(body)["error"], headers["WWW-Authenticate"]) == (401, "unauthorized", "Bearer")
            status, _, body = await worker.post(bytes(3), path, Authorization=f"Bearer {orch.tokens[0]}")
            assert status != 401, body
        assert (await worker.post(bytes(3), Authorization=f"Bearer {orch.tokens[0]}"))[0] == 200
        for path in ("/health", "/stream/status", "/version", "/compute", "/hardware/info"):
            await worker.get(path)
        status = await worker.get("/stream/status")
        assert status["registration"]["state"] == "registered"
        async with worker.session.get(worker.url + "/metrics") as answer:
            metrics = await answer.text()
        assert "byoc_registered 1.0" in metrics
        assert "byoc_registration_age_seconds " in metrics
        for secret in (SECRET, *orch.tokens):
            assert secret not in metrics + repr(status)


@asynchronous
async def test_a_second_signal_does_not_wait_for_an_orchestrator(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LEAVE_SECONDS", "ATTEMPT_SECONDS"):
        monkeypatch.setattr(registrations, name, 1000.0)
    async with orchestrator() as orch, registered(orch) as worker:
        assert worker.worker.registration is not None
        await worker.worker.registration._attempt()
        orch.gate.clear()
        hurry = asyncio.Event()
        draining = asyncio.create_task(Drain(worker.worker, 60.0).run(hurry))
        await until(lambda: orch.calls[-1][0] == "unregister")
        assert not worker.worker.draining, "calls that are on their way are taken until it has answered"
        hurry.set()
        async with asyncio.timeout(20):
            await draining
        orch.gate.set()


@asynchronous
async def test_a_body_without_a_token_is_not_asked_for() -> None:
    async with orchestrator() as orch, registered(orch) as worker:
        assert worker.worker.registration is not None
        await worker.worker.registration._attempt()
        later(worker.worker.registration)
        reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
        head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\nExpect: 100-continue\r\n\r\n"
        writer.write(head)
        async with asyncio.timeout(20):
            assert (await reader.readline()).startswith(b"HTTP/1.1 401")
        writer.close()
        await writer.wait_closed()


@asynchronous
async def test_without_a_registration_there_is_no_token() -> None:
    async with running(GreenTint()) as worker:
        assert (await worker.post(bytes(3)))[0] == 200
        assert (await worker.get("/stream/status"))["registration"] is None
        async with worker.session.get(worker.url + "/metrics") as answer:
            assert "byoc_registered" not in await answer.text()


@asynchronous
async def test_what_was_on_its_way_when_we_unregistered_is_taken_and_then_nothing_more(tmp_path: Path) -> None:
    """A real process registers once it can do something, and gets SIGTERM; its orchestrator had picked it for a job
    just before it was told to forget it."""
    async with orchestrator() as orch:
        secret, port = tmp_path / "secret", free_port()
        orch.look = f"http://127.0.0.1:{port}/ready"
        secret.write_text(SECRET)
        flags = f"--processor passthrough --backend numpy --host 127.0.0.1 --port {port} --capability {NAME}"
        env = {"ORCH_URL": orch.url, "ORCH_SECRET_FILE": str(secret)}
        process = await asyncio.to_thread(Process, "serve", *flags.split(), env=env)
        try:
            await asyncio.to_thread(process.wait_for, "registered with")
            assert orch.seen[-1] == 200, "it listens, and is warm"
            process.popen.terminate()
            await asyncio.to_thread(process.wait_for, "unregistered from")
            headers = bearer(orch.tokens[-1])
            assert await asyncio.to_thread(post, port, "/", b"abc", **headers) == (200, b"abc")
            assert await asyncio.to_thread(process.end) == 0
        finally:
            await asyncio.to_thread(process.end, signal.SIGKILL)
            assert process.popen.stdout is not None
            process.popen.stdout.close()


# --- configuration


def test_flag_over_environment_over_default(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("from-file\n")
    environ = {"ORCH_URL": "http://o:1", "ORCH_SECRET": "from-env", "CAPABILITY_CAPACITY": "4", "CAPABILITY_URL": ""}
    got = read_registration({"capability-capacity": "9", "orch-url": None}, environ)
    assert got is not None
    assert (got.orch_url, got.secret, got.capacity, got.price_per_unit, got.url) == ("http://o:1", "from-env", 9, 0, "")
    assert "ORCH_SECRET" not in environ, "not for child processes"
    assert "from-env" not in repr(got)
    environ |= {"ORCH_SECRET_FILE": str(file), "ORCH_SECRET": "from-env", "CAPABILITY_PRICE_PER_UNIT": "0"}
    got = read_registration({}, dict(environ))
    assert got is not None
    assert (got.secret, got.price_per_unit) == ("from-file", 0), "a file over a variable"
    got = read_registration({"orch-secret": "from-flag"}, dict(environ))
    assert got is not None
    assert got.secret == "from-flag"
    assert read_registration({}, {"ORCH_SECRET": "x"}) is None, "no orchestrator, no registration"


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"ORCH_SECRET": ""}, "ORCH_SECRET_FILE"),
        ({"ORCH_SECRET": "two\nlines"}, "printable ASCII"),
        ({"ORCH_SECRET_FILE": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"CAPABILITY_CAPACITY": "many"}, "CAPABILITY_CAPACITY"),
        ({"CAPABILITY_CAPACITY": "0"}, "--capability-capacity"),
        ({"CAPABILITY_PRICE_PER_UNIT": "-1"}, "--capability-price-per-unit"),
        ({"CAPABILITY_URL": "worker:8000"}, "--capability-url"),
        ({"ORCH_URL": "http://user:word@o"}, "--orch-url"),
        ({"GPU_BYOC_REGISTER_SECONDS": "0"}, "--register-seconds"),
        ({"GPU_BYOC_REGISTER_SECONDS": "nan"}, "--register-seconds"),
    ],
)
def test_mistakes_name_the_setting_and_no_secret(environ: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_registration({}, {"ORCH_URL": "http://o:1", "ORCH_SECRET": SECRET, **environ})
    assert told in str(caught.value)
    for secret in (SECRET, "user:word", "two"):
        assert secret not in str(caught.value)


def test_a_name_is_needed() -> None:
    with pytest.raises(ConfigError, match="CAPABILITY_NAME"):
        ServeConfig(registration=RegistrationConfig("http://o:1", SECRET))


@pytest.mark.parametrize(
    ("named", "capacity"),
    [({}, 10), ({"max_streams": 4}, 4), ({"max_streams": 0}, 32), ({"registration": 7}, 7)],
)
def test_the_capacity_is_what_fits_unless_told(named: dict[str, Any], capacity: int) -> None:
    told = named.pop("registration", None)
    settings = RegistrationConfig("http://o:1", SECRET, capacity=told)
    assert ServeConfig(capability="x", registration=settings, **named).capacity == capacity


def test_the_help_shows_no_secret(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCH_SECRET", SECRET)
    for command in ("serve", "run"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        told = capsys.readouterr().out
        assert "--orch-secret-file" in told
        assert SECRET not in told


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://localhost:81"),
        ("::", "http://localhost:81"),
        ("127.0.0.1", "http://127.0.0.1:81"),
        ("::1", "http://[::1]:81"),
    ],
)
def test_where_we_listen_is_said_unless_told(host: str, url: str) -> None:
    settings = ServeConfig(host=host, capability="x", registration=RegistrationConfig("http://o:1", SECRET))
    assert Registration(settings, 81).report()["url"] == url


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate of this test")
@asynchronous
async def test_a_certificate_is_verified(tmp_path: Path) -> None:
    """One of the orchestrator's own is refused before anything is sent, and taken from --ca-file or with --insecure."""
    key, cert = await asyncio.to_thread(certificate, tmp_path)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(cert, key)
    calls = []

    async def call(request: web.Request) -> web.Response:
        calls.append(request.path)
        return web.Response(text="ok")

    app = web.Application()
    app.router.add_post("/capability/{what}", call)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        url = f"https://127.0.0.1:{runner.addresses[0][1]}"
        async with registering(url) as registration:
            await until(lambda: registration.report()["error"])
            assert "--ca-file" in registration.report()["error"]
            assert not calls
        async with registering(url, insecure=True) as registration:
            await until(lambda: registration.registered)
        async with registering(url, ca_file=cert) as registration:
            await until(lambda: registration.registered)
        assert len(calls) == 2
    finally:
        await runner.cleanup()


def certificate(folder: Path) -> tuple[str, str]:
    key, cert = str(folder / "key.pem"), str(folder / "cert.pem")
    name = ("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1")
    command = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", *name)
    subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return key, cert
