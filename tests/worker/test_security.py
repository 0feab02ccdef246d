"""Security's settings, CORS, and that the network's token guards every spelling of its routes."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path

import pytest

import gpu_byoc
from gpu_byoc.cli import main
from gpu_byoc.config import RegistrationConfig, SecurityConfig, ServeConfig, read_security
from gpu_byoc.errors import ConfigError
from gpu_byoc.media.audio import DECODERS
from gpu_byoc.media.mpegts import VIDEO_TYPES
from gpu_byoc.processors.green_tint import GreenTint
from gpu_byoc.processors.passthrough import Passthrough
from gpu_byoc.worker.app import Worker
from gpu_byoc.worker.registration import Registration
from tests.support import processes
from tests.support.processes import free_port
from tests.support.workers import Running, asynchronous, running

# --- settings


def test_flag_over_environment_over_default() -> None:
    assert read_security({}, {}) is None
    environ = {"GPU_BYOC_ALLOW_ORIGIN": " https://a:1 ,http://b,", "GPU_BYOC_SANDBOX_DECODE": "yes"}
    assert read_security({}, environ) == SecurityConfig(allow_origins=("https://a:1", "http://b"), sandbox_decode=True)
    given = {"allow-origin": "http://c", "max-input-mbit": "2.5", "max-stream-seconds": "7", "sandbox-decode": "no"}
    assert read_security(given, environ) == SecurityConfig(("http://c",), max_input_mbit=2.5, max_stream_seconds=7.0)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"max-pixel-rate": "many"}, r"--max-pixel-rate \(or GPU_BYOC_MAX_PIXEL_RATE\): 'many'"),
        ({"sandbox-decode": "maybe"}, "--sandbox-decode"),
        ({"max-pixel-rate": "0"}, "above 0"),
        ({"max-stream-pixels": "-5"}, "above 0"),
        ({"max-input-mbit": "nan"}, "above 0"),
        ({"max-input-mbit": "inf"}, "above 0"),
        ({"max-stream-seconds": "-1"}, "--max-stream-seconds"),
        ({"max-stream-seconds": "nan"}, "--max-stream-seconds"),
        ({"max-update-rate": "0.5"}, "--max-update-rate"),
    ],
)
def test_mistakes_name_the_setting(given: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_security(given, {})


@pytest.mark.parametrize(
    ("security", "told"),
    [
        (SecurityConfig(allow_origins=("orch:8935",)), "--allow-origin 'orch:8935' is not like"),
        (SecurityConfig(allow_origins=("*",)), "--allow-origin"),
        (SecurityConfig(allow_origins=("http://169.254.169.254",)), "nobody may"),
        (SecurityConfig(cors_origins=("example.com",)), "--cors-origin"),
        (SecurityConfig(ca_file="/no/such.pem"), "--ca-file: cannot read"),
    ],
)
@asynchronous
async def test_a_worker_does_not_start_with_what_makes_no_sense(security: SecurityConfig, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Worker(ServeConfig(security=security), Passthrough()).app()


@asynchronous
async def test_an_orchestrator_that_is_no_origin() -> None:
    registration = RegistrationConfig(orch_url="http://0x7f.1:8935", secret="hush")
    with pytest.raises(ConfigError, match="ORCH_URL"):
        Worker(ServeConfig(capability="c", registration=registration), Passthrough())


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--allow-origin", "http://a", "--allow-origin", "nonsense", "--port", str(free_port())]) == 2
    assert "--allow-origin 'nonsense'" in capsys.readouterr().err


# --- the network's token

SPELLINGS = (
    *("/stream/start", "/api/stream/start", "/stream/start/", "//stream/start", "/stream//start", "/stream/%73tart"),
    *("/STREAM/start", "/stream/start?x=1", "/stream/../stream/start", "/./stream/stop", "/stream/params", "/stream/x"),
    *("/live-video-to-video", "/live/video-to-video/", "/live%2Fvideo-to-video", "/%2e/", "/c", "/C", "/", "/drain"),
)


@pytest.mark.parametrize("token", [None, "", "Bearer", "Bearer ", "Bearer x", "Basic x", "x", "Bearer é", "bearer\tx"])
@asynchronous
async def test_no_spelling_of_a_route_gets_around_the_token(token: str | None) -> None:
    registration = RegistrationConfig(orch_url="http://127.0.0.1:1", secret="hush")
    async with running(GreenTint(), capability="c", registration=registration) as at:
        guard = at.worker.registration = Registration(at.worker.config, at.port)
        guard._core.attempt()
        guard._core.accepted(0.0)
        for path in SPELLINGS:
            headers = {"Content-Type": "application/json"} | ({} if token is None else {"Authorization": token})
            assert await _status(at, "POST", path, headers) == 401
        good = {"Authorization": f"Bearer {guard._core.tokens[0]}", "Content-Type": "application/json"}
        assert await _status(at, "POST", "/stream/stop", good) == 400
        for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"):
            assert await _status(at, method, "/stream/start", {}) in (404, 405), "nothing is done by another method"


async def _status(at: Running, method: str, path: str, headers: dict[str, str]) -> int:
    """By hand: a client library would tidy the path up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", at.port)
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", "Content-Length: 2"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    writer.write("\r\n".join([*lines, "", "{}"]).encode())
    async with asyncio.timeout(20):
        answer = await reader.read()
    writer.close()
    return int(answer.split(b" ", 2)[1])


# --- what is opened


def test_a_worker_opens_no_container_and_only_codecs_of_a_short_list() -> None:
    """FFmpeg's demuxers and protocols (``concat:``, playlists that name other files) are not in the worker at all: what
    reads a transport stream is ours, and codecs are opened by name."""
    folder, opened, codecs = Path(gpu_byoc.__file__).parent, set(), set()
    for path in [
        *(folder / "worker").glob("*.py"),
        *(folder / "media").glob("*.py"),
        *(folder / "engine").glob("*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = ast.unparse(node.func)
                if called == "av.open":
                    opened.add(path.name)
                if called.endswith("Context.create") and ast.unparse(node.args[1]) == "'r'":
                    codecs.add(f"{path.name}: {ast.unparse(node.args[0])}")
    assert opened == {"clips.py"}, "that is the clients' own"
    sound = "audio.py: DECODERS[self._codec]"
    assert codecs == {"decode.py: self.codec", sound, "images.py: 'png'", "images.py: 'mjpeg'"}
    assert set(VIDEO_TYPES.values()) == {"h264", "hevc"}
    assert sorted(DECODERS.values()) == ["aac_latm", "ac3", "dca", "eac3", "mp3", "pcm_bluray", "s302m", "truehd"]


# --- CORS


async def _cors(at: Running, method: str, path: str, **headers: str) -> tuple[int, dict[str, str]]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    data = bytes(640 * 480 * 3) if method == "POST" else None
    async with at.session.request(method, at.url + path, data=data, headers=named) as answer:
        await answer.read()
        found = {name.lower(): value for name, value in answer.headers.items()}
        return answer.status, {name: value for name, value in found.items() if name.startswith(("access-", "vary"))}


PREFLIGHT = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "x-stream-id, content-type"}


@asynchronous
async def test_no_site_may_read_unless_it_is_named() -> None:
    async with running(Passthrough()) as at:
        for method, path in (("GET", "/version"), ("POST", "/live/video-to-video"), ("GET", "/nothing")):
            assert (await _cors(at, method, path, Origin="https://a.example"))[1] == {}
        status, headers = await _cors(at, "OPTIONS", "/stream/start", Origin="https://a.example", **PREFLIGHT)
        assert (status, headers) == (405, {})


@asynchronous
async def test_a_site_that_is_named() -> None:
    async with running(Passthrough(), security=SecurityConfig(cors_origins=("https://A.example/",))) as at:
        read = {"access-control-allow-origin": "https://a.example", "access-control-expose-headers": "*"}
        for method, path in (("GET", "/version"), ("POST", "/live/video-to-video"), ("GET", "/nothing")):
            _, headers = await _cors(at, method, path, Origin="https://a.example")
            assert headers == read | {"vary": "Origin"}
            for other in ("https://b.example", "http://a.example", "null", "https://a.example.evil"):
                assert (await _cors(at, method, path, Origin=other))[1] == {"vary": "Origin"}
        status, headers = await _cors(at, "OPTIONS", "/stream/start", Origin="https://a.example", **PREFLIGHT)
        assert status == 204
        assert headers["access-control-allow-methods"] == "GET, POST"
        assert headers["access-control-allow-headers"] == "x-stream-id, content-type"
        assert headers["access-control-allow-origin"] == "https://a.example"
        assert "access-control-allow-credentials" not in headers
        status, headers = await _cors(at, "OPTIONS", "/stream/start", Origin="https://b.example", **PREFLIGHT)
        assert (status, headers) == (403, {"vary": "Origin"})


@asynchronous
async def test_all_sites() -> None:
    async with running(Passthrough(), security=SecurityConfig(cors_origins=("*",))) as at:
        _, headers = await _cors(at, "GET", "/version", Origin="https://b.example")
        assert headers["access-control-allow-origin"] == "https://b.example"


# --- the sandbox, in a real process


def test_a_worker_says_what_its_sandbox_is_worth() -> None:
    port = free_port()
    flags = ("--backend", "numpy", "--processor", "passthrough", "--sandbox-decode", "yes", "--insecure", "yes")
    with processes.running("serve", "--host", "127.0.0.1", "--port", str(port), *flags) as process:
        process.wait_for("listening")
        status = processes.get(port, "/stream/status")[1]
        assert process.end() == 0
    walls: dict[str, str] = status["sandbox"]
    assert list(walls) == ["limits", "privileges", "system calls", "namespaces"]
    assert not walls["limits"]
    assert not walls["system calls"]
    missing = [each for each in status["backend"]["degraded"] if "confined" in each]
    assert len(missing) == sum(map(bool, walls.values()))
    assert status["insecure"] is True
