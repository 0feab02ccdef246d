"""Names are resolved once, and nothing but what was checked is connected to."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from ipaddress import ip_address
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from gpu_byoc.core.cursor import Backoff
from gpu_byoc.core.origins import Address, Policy, parse_origin
from gpu_byoc.errors import BadRequest, ChannelFailed, ConfigError, OriginRefused, SegmentFailed
from gpu_byoc.transport.listen import bind, port_of, serve
from gpu_byoc.transport.origins import Gatekeeper, system_addresses
from gpu_byoc.transport.tls import tls
from gpu_byoc.transport.trickle_client import Publisher, Subscriber, open_session
from tests.support.trickle import Wire, reply, scripted
from tests.support.workers import asynchronous

QUICK = Backoff(first=0.01, cap=0.01, attempts=2)


class Names:
    """A resolver whose answers change from one call to the next; the last one stays."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[Address]:
        self.asked.append(host)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return [ip_address(each) for each in answer]


def allowing(*origins: str) -> Policy:
    return Policy(frozenset(parse_origin(each) for each in origins))


@contextlib.asynccontextmanager
async def web_server(context: ssl.SSLContext | None = None) -> AsyncIterator[tuple[int, list[str]]]:
    """On loopback; answers everything like the newest segment. Gives its port and the Host headers it sees."""
    seen: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers["Host"])
        return web.Response(body=b"x", headers={"Lp-Trickle-Seq": "0"})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        sock = bind("127.0.0.1", 0)
        await web.SockSite(runner, sock, ssl_context=context).start()
        yield port_of(sock), seen
    finally:
        await runner.cleanup()


@asynchronous
async def test_a_name_is_resolved_once_and_the_address_stays() -> None:
    """DNS rebinding: the name is fine while it is checked, and points elsewhere afterwards."""
    async with web_server() as (port, seen):
        names = Names(["127.0.0.1"], ["169.254.169.254"])
        gate = Gatekeeper(allowing(f"http://orch.test:{port}"), names)
        fields = {"subscribe_url": f"http://ORCH.test.:{port}/a", "publish_url": f"http://orch.test:{port}/b"}
        urls, pins = await gate.admit(fields, "192.0.2.1")
        assert urls == {"subscribe_url": f"http://orch.test:{port}/a", "publish_url": f"http://orch.test:{port}/b"}
        assert names.asked == ["orch.test"], "once for both"
        async with open_session(resolver=pins) as session:
            for _ in range(3):
                async with session.get(urls["subscribe_url"], headers={"Connection": "close"}) as response:
                    assert response.status == 200
            with pytest.raises(aiohttp.ClientConnectorDNSError):  # a host that nobody has checked
                await session.get(f"http://localhost:{port}/a")
        assert seen == [f"orch.test:{port}"] * 3
        assert names.asked == ["orch.test"]
        with pytest.raises(OriginRefused, match="nobody may"):  # now it is refused
            await gate.admit(fields, "192.0.2.1")


@asynchronous
async def test_of_several_addresses_only_the_good_ones_are_used() -> None:
    gate = Gatekeeper(allowing("http://orch.test"), Names(["169.254.1.1", "fe80::1", "127.0.0.1", "::1"]))
    _, pins = await gate.admit({"control_url": "http://orch.test/c"}, None)
    found = await pins.resolve("orch.test", 80)
    assert [(each["host"], each["family"], each["port"]) for each in found] == [
        ("127.0.0.1", socket.AF_INET, 80),
        ("::1", socket.AF_INET6, 80),
    ]


@pytest.mark.parametrize(
    ("url", "caller", "why"),
    [
        ("http://10.0.0.9/x", "127.0.0.1", r"--allow-origin http://10\.0\.0\.9 \(GPU_BYOC_ALLOW_ORIGIN\)"),
        ("http://127.0.0.1:9/x", "10.0.0.9", r"not where this call came from \(10\.0\.0\.9\)"),
        ("http://169.254.169.254/latest", "127.0.0.1", "nobody may"),
        ("http://[::ffff:169.254.169.254]/latest", "127.0.0.1", "nobody may"),
        ("http://name.test/x", "10.0.0.9", "--allow-origin http://name.test "),
        ("http://name.test/x", None, r"\(unknown\)"),
        ("http://name.test/x", "fe80::1%eth0", "fe80::1"),
    ],
)
@asynchronous
async def test_without_a_list_only_the_caller_itself(url: str, caller: str | None, why: str) -> None:
    gate = Gatekeeper(Policy(), Names(["10.0.0.8"]))
    with pytest.raises(OriginRefused, match=why) as caught:
        await gate.admit({"events_url": url}, caller)
    error = caught.value
    assert (error.status, error.code, error.field) == (403, "origin_refused", "events_url")
    assert error.body()["field"] == "events_url"
    assert "latest" not in str(error)
    assert "/x" not in str(error)


@asynchronous
async def test_the_caller_itself_by_address_and_by_name() -> None:
    gate = Gatekeeper(Policy(), Names(["10.0.0.8", "10.0.0.9"]))
    _, pins = await gate.admit({"a": "http://name.test:1/x", "b": "https://10.0.0.9:2/"}, "::ffff:10.0.0.9")
    assert [each["host"] for each in await pins.resolve("name.test", 1)] == ["10.0.0.9"]
    await Gatekeeper(Policy()).admit({"a": "http://localhost:1/x"}, "127.0.0.1")  # the machine's own resolver


@asynchronous
async def test_a_name_that_is_not_listed_is_not_even_looked_up() -> None:
    names = Names(["127.0.0.1"])
    gate = Gatekeeper(allowing("http://orch.test"), names)
    with pytest.raises(OriginRefused):
        await gate.admit({"a": "http://orch.test/x", "b": "http://secret-1.attacker.test/"}, "127.0.0.1")
    with pytest.raises(BadRequest, match=r"^b is not an http or https URL of a channel"):
        await gate.admit({"a": "http://orch.test/x", "b": "file:///etc/passwd"}, "127.0.0.1")
    assert names.asked == []


@asynchronous
async def test_a_name_without_an_address_is_no_refusal() -> None:
    async def fails(host: str, port: int) -> list[Address]:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    with pytest.raises(ChannelFailed, match=r"subscribe_url: the name orch\.test has no address here: Temporary"):
        await Gatekeeper(allowing("http://orch.test"), fails).admit({"subscribe_url": "http://orch.test/x"}, None)


@asynchronous
async def test_the_systems_own_resolver() -> None:
    assert ip_address("127.0.0.1") in await system_addresses("localhost", 80)
    with pytest.raises(OSError, match=r"."):
        await system_addresses("no-such-name.invalid", 80)


# --- redirects


@asynchronous
async def test_no_request_follows_a_redirect() -> None:
    """Of no method, and to nowhere, not even on the same server: there is nothing in trickle that redirects."""
    asked: list[str] = []

    async def target(method: str, path: str, wire: Wire) -> None:
        asked.append(f"{method} {path}")
        await wire.send(reply(200, b"0", Lp_Trickle_Seq=0, Lp_Trickle_Latest=0))

    async with scripted(target) as elsewhere:

        async def redirect(method: str, path: str, wire: Wire) -> None:
            status = {"POST": 307, "GET": 302, "DELETE": 308}[method]
            await wire.send(reply(status, b"", Location=elsewhere + path))

        async with scripted(redirect) as url, open_session() as session:
            async with Subscriber(session, url, backoff=QUICK) as segments:
                with pytest.raises(ChannelFailed, match="HTTP 302"):
                    await anext(segments)
            with pytest.raises(ChannelFailed, match="HTTP 302"):
                async with Publisher(session, url, "video/MP2T", backoff=QUICK):
                    pass
            async with Publisher(session, url, "video/MP2T", first=0) as publisher:
                segment = await publisher.open()
                with pytest.raises(SegmentFailed, match="segment 0: HTTP 307"):
                    await asyncio.wait_for(segment.close(), 10)
                await publisher.release(0)
            with pytest.raises(ChannelFailed, match=r"DELETE .*HTTP 308"):
                await Publisher(session, url, "video/MP2T", delete=True).aclose()
    assert asked == []


# --- cookies


@asynchronous
async def test_no_cookies_are_kept() -> None:
    cookies: list[str | None] = []

    async def handle(request: web.Request) -> web.Response:
        cookies.append(request.headers.get("Cookie"))
        return web.Response(headers={"Set-Cookie": "a=b"})

    app = web.Application()
    app.router.add_get("/", handle)
    sock = bind("127.0.0.1", 0)
    runner = await serve(app, sock, 0.1)
    try:
        async with open_session() as session:
            for _ in range(2):
                await (await session.get(f"http://127.0.0.1:{port_of(sock)}/")).release()
    finally:
        await runner.cleanup()
    assert cookies == [None, None]


# --- certificates


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate of this test")
@asynchronous
async def test_a_pinned_host_is_verified_by_its_name(tmp_path: Path) -> None:
    """With --ca-file, and through a pinned address; another name on the same address is refused."""
    make = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=orch "
        "-addext subjectAltName=DNS:orch.test -keyout key.pem -out cert.pem"
    )
    await asyncio.to_thread(subprocess.run, make.split(), cwd=tmp_path, check=True, capture_output=True, timeout=30)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    async with web_server(context) as (port, seen):
        origins = f"https://orch.test:{port}", f"https://other.test:{port}"
        gate = Gatekeeper(allowing(*origins), Names(["127.0.0.1"]))
        _, pins = await gate.admit({"a": origins[0], "b": origins[1]}, None)
        async with open_session(tls(), pins) as session:
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await session.get(origins[0])
        async with open_session(tls(ca_file=str(tmp_path / "cert.pem")), pins) as session:
            assert (await session.get(origins[0])).status == 200
            with pytest.raises(aiohttp.ClientConnectorCertificateError, match="Hostname mismatch"):
                await session.get(origins[1])
        async with open_session(tls(insecure=True), pins) as session:
            assert (await session.get(origins[1])).status == 200
    assert len(seen) == 2


def test_a_file_without_certificates(tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match="has no certificate"):
        tls(ca_file=str(tmp_path / "no.pem"))
    with pytest.raises(ConfigError, match="No such file"):
        tls(ca_file=str(tmp_path / "none.pem"))
    assert tls() is True
    assert tls(insecure=True) is False
