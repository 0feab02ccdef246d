"""``gpu-byoc livepeer`` and ``gpu-byoc usage``: flags to configuration, and both as real processes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_byoc.config import GatewayConfig, OrchestratorConfig, ServeConfig
from gpu_byoc.errors import ConfigError, PortInUse
from gpu_byoc.local import goflags
from gpu_byoc.local.jobclient import ANSWER_SECONDS
from gpu_byoc.local.ledger import Entry, Ledger
from gpu_byoc.local.network import FLAGS, address, http_url, main, read_config
from gpu_byoc.local.orchestrator import Orchestrator
from gpu_byoc.local.usage import main as usage_main
from tests.local.kit import FRAME, MODEL, box, gateway, get, in_loop, orchestrator, post
from tests.support.processes import free_port, running

# The page's commands, word for word.
ORCHESTRATOR = """-orchestrator -network offchain -serviceAddr 127.0.0.1:8936 -cliAddr 127.0.0.1:7936
 -datadir ~/.lpData-orch -byoc -byocContainerURL http://127.0.0.1:8000 -byocModelID green-tint-cpu"""
GATEWAY = """-gateway -network offchain -orchAddr 127.0.0.1:8936 -httpAddr 0.0.0.0:8935 -httpIngest
 -cliAddr 127.0.0.1:5935 -datadir ~/.lpData-gw"""


def config(line: str) -> OrchestratorConfig | GatewayConfig:
    return read_config(goflags.parse(FLAGS, line.split()))


def test_the_pages_commands() -> None:
    home = Path.home()
    assert config(ORCHESTRATOR) == OrchestratorConfig(
        host="127.0.0.1",
        port=8936,
        cli_host="127.0.0.1",
        cli_port=7936,
        datadir=home / ".lpData-orch",
        byoc=True,
        container_url="http://127.0.0.1:8000",
        model_id="green-tint-cpu",
    )
    assert config(GATEWAY) == GatewayConfig(
        orchestrators=("http://127.0.0.1:8936",),
        host="0.0.0.0",
        port=8935,
        cli_host="127.0.0.1",
        cli_port=5935,
        http_ingest=True,
    )


def test_several_orchestrators() -> None:
    got = config("-gateway -orchAddr 127.0.0.1:1,http://b:2/,,https://c,b:2")
    assert isinstance(got, GatewayConfig)
    assert got.orchestrators == ("http://127.0.0.1:1", "http://b:2", "https://c")
    assert not got.http_ingest


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("", "-orchestrator and -gateway"),
        ("-orchestrator -gateway", "-orchestrator and -gateway"),
        ("-gateway -network arbitrum-one-mainnet", "-network arbitrum-one-mainnet"),
        ("-orchestrator -byoc -byocModelID x", "-byocContainerURL"),
        ("-orchestrator -byoc -byocContainerURL http://a", "-byocModelID"),
        ("-orchestrator -byocModelID x", "without -byoc"),
        ("-orchestrator -byoc -byocModelID x -byocContainerURL 127.0.0.1:8000", "-byocContainerURL 127.0.0.1:8000"),
        ("-orchestrator -byoc -byocModelID x -byocContainerURL http://a?b", "-byocContainerURL"),
        ("-orchestrator -byocCapacity 0", "-byocCapacity"),
        ("-orchestrator -serviceAddr 8936", "-serviceAddr 8936"),
        ("-orchestrator -serviceAddr https://a:1", "-serviceAddr"),
        ("-orchestrator -cliAddr a:99999", "-cliAddr"),
        ("-gateway -orchAddr ,", "-orchAddr"),
        ("-gateway -maxBody 0", "-maxBody"),
        ("-gateway -jobTimeout -1", "-jobTimeout"),
    ],
)
def test_mistakes_name_the_flag(line: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(line)
    assert told in str(caught.value)


def test_patience_grows_towards_the_client() -> None:
    """Whoever is nearest to what is stuck must be the first to say so."""
    orch, gate = config("-orchestrator"), config("-gateway")
    assert ServeConfig().job_timeout < orch.job_timeout < gate.job_timeout < ANSWER_SECONDS
    assert gate.stall < orch.stall
    assert config("-orchestrator -jobTimeout 7").job_timeout == config("-gateway -jobTimeout=7").job_timeout == 7


def test_addresses() -> None:
    assert address("[::1]:80", "-x") == ("::1", 80)
    assert address(":80", "-x") == ("0.0.0.0", 80)
    assert address("http://a:80/", "-x") == ("a", 80)
    assert http_url("http://[::1]:80/path/", "-x") == "http://[::1]:80/path"
    for bad in ("http://", "ftp://a", "http://a:x", "http://a b", "http://u:p@a", "http://a\n"):
        with pytest.raises(ConfigError):
            http_url(bad, "-x")


def test_version_help_and_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-version"]) == 0
    assert re.search(r"\d+\.\d+\.\d+", capsys.readouterr().out)
    assert main(["-help"]) == 0
    told = capsys.readouterr().out
    assert "-byocContainerURL" in told
    assert "-dataDir, -datadir str" in told
    assert "gateway: accepted, nothing is kept" in told
    assert main(["-gatway"]) == 2
    assert "unknown flag: -gatway (did you mean -gateway?)" in capsys.readouterr().err
    assert usage_main(["-h"]) == 0
    assert "-datadir" in capsys.readouterr().out.lower()


@in_loop
async def test_a_port_in_use_names_its_owner(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        fields = {"host": "127.0.0.1", "port": 0, "cli_host": "127.0.0.1", "cli_port": 0, "datadir": tmp_path}
        for flag, name in (("-serviceAddr", "port"), ("-cliAddr", "cli_port")):
            with pytest.raises(PortInUse) as caught:
                async with Orchestrator(OrchestratorConfig(**{**fields, name: port})):
                    pass
            told = str(caught.value)
            assert flag in told
            assert f"port {port}" in told
            assert str(os.getpid()) in told
    async with Orchestrator(OrchestratorConfig(**{**fields, "port": port})):
        pass  # nothing was left behind


@in_loop
async def test_a_wrong_path_or_method_is_answered_with_what_there_is(tmp_path: Path) -> None:
    async with orchestrator(tmp_path, None) as orch, gateway(f"http://127.0.0.1:{orch.port}") as gate:
        for port in (orch.port, gate.port):
            answer = await get(port, "/live/video-to-vide")
            assert (answer.status, json.loads(answer.body)["error"]) == (404, "not_found")
            assert "POST /live/video-to-video" in answer.message
            answer = await get(port, "/live/video-to-video")
            assert (answer.status, json.loads(answer.body)["error"]) == (405, "method_not_allowed")
            assert answer.headers["Allow"] == "POST"
        answer = await get(gate.cli_port, "/")
        assert (answer.status, answer.message) == (404, "GET /: Not Found; here are GET /status")


NETWORK = "import sys; from gpu_byoc.local.network import main; sys.exit(main(sys.argv[1:]))"


def test_a_datadir_that_cannot_be_written() -> None:
    flags = ["-orchestrator", "-datadir", "/proc/x", "-serviceAddr", "127.0.0.1:0", "-cliAddr", "127.0.0.1:0"]
    done = subprocess.run([sys.executable, "-c", NETWORK, *flags], capture_output=True, text=True, timeout=110)
    assert done.returncode == 2
    assert "-datadir: cannot keep a ledger in /proc/x/" in done.stderr
    assert "name a directory that this user can write to" in done.stderr
    assert "Errno" not in done.stderr


def test_both_as_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page's session: log lines verbatim, a job, SIGTERM, exit status 0, and the ledger afterwards."""
    service, http = free_port(), free_port()
    data = tmp_path / "orch"

    async def session() -> None:
        async with box() as container:
            orch_flags = f"""-orchestrator -network offchain -serviceAddr 127.0.0.1:{service} -cliAddr 127.0.0.1:0
                -datadir {data} -byoc -byocContainerURL {container.url} -byocModelID {MODEL}"""
            gate_flags = f"""-gateway -network offchain -orchAddr 127.0.0.1:{service} -httpAddr 127.0.0.1:{http}
                -httpIngest -cliAddr 127.0.0.1:0 -datadir {tmp_path}"""
            with (
                running(*orch_flags.split(), program=("-c", NETWORK)) as orch,
                running(*gate_flags.split(), program=("-c", NETWORK)) as gate,
            ):
                await asyncio.to_thread(orch.wait_for, "BYOC capability registered")
                await asyncio.to_thread(gate.wait_for, "Gateway listening")
                answer = await post(http)
                assert (answer.status, answer.body) == (200, FRAME)
                assert await asyncio.to_thread(gate.end, signal.SIGTERM) == 0
                assert await asyncio.to_thread(orch.end, signal.SIGINT) == 0
                page = [
                    f"I0000 BYOC capability registered: {MODEL} -> {container.url}",
                    f"I0000 Job received from gateway: {MODEL}",
                    "I0000 Forwarded to BYOC container",
                    "I0000 Container response received, returning to gateway",
                ]
                assert [line for line in orch.log if line in page] == page
                assert not [line for line in orch.log + gate.log if not re.match("[IW]0000 ", line)]

    asyncio.run(asyncio.wait_for(session(), 50))

    assert usage_main(["-datadir", str(data)]) == 0
    table = capsys.readouterr().out
    assert re.search(rf"{MODEL} +ok +200 +\d\.\d+ +1 +0\.25", table), table
    assert usage_main(["-datadir", str(data), "-json"]) == 0
    usage = json.loads(capsys.readouterr().out)
    assert [(job["outcome"], job["billed_seconds"], job["compute_seconds"]) for job in usage["jobs"]] == [
        ("ok", 1, 0.25)
    ]
    assert usage["totals"][MODEL]["jobs"] == 1


def test_a_taken_port_ends_the_command(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = f"-gateway -httpAddr 127.0.0.1:{port} -cliAddr 127.0.0.1:0 -datadir {tmp_path}"
        with running(*flags.split(), program=("-c", NETWORK)) as gate:
            gate.wait_for(f"port {port} is in use")
            assert gate.popen.wait(30) == 2
        assert not [line for line in gate.log if "Traceback" in line]


def test_usage_without_a_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert usage_main(["-datadir", str(tmp_path)]) == 2
    assert "-datadir" in capsys.readouterr().err


def test_usage_of_an_empty_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _ledger(tmp_path, 0)
    assert usage_main(["-datadir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "no jobs yet\n"
    assert usage_main(["-datadir", str(tmp_path), "-json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"jobs": [], "totals": {}}


@pytest.mark.parametrize("flags", [(), ("-json",), ("-csv", "-last", "-1")])
def test_usage_into_a_pipe_that_nobody_reads(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """As ``gpu-byoc usage | head`` does when head has its lines: no complaint."""
    _ledger(tmp_path, 50)
    program = "import sys; from gpu_byoc.local.usage import main; sys.exit(main(sys.argv[1:]))"
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = (sys.executable, "-c", program, "-datadir", str(tmp_path), *flags)
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=30, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def _ledger(datadir: Path, jobs: int) -> None:
    async def write() -> None:
        ledger = Ledger(datadir)
        ledger.open()
        for number in range(jobs):
            ledger.add(Entry(f"job{number}", MODEL, "2026-01-01T00:00:00.000Z", 0.5, 1, None, "ok", 200))
        await ledger.close()

    asyncio.run(write())
