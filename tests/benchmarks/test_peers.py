"""Peers: their environments, how they are spoken to, and what is compared. No peer is installed here; in their place
stands a server of our own that speaks the same protocol."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import bench_peers_jobs, bench_peers_live, peer_environment
from benchmarks.__main__ import _chosen, _parser
from benchmarks.bench_peers_jobs import FRAME, Recipe, row_of
from benchmarks.bench_peers_live import LIVE, TARGETS, Case
from benchmarks.harness import Sheet, Size
from benchmarks.load import cpu_of, family, memory_of
from benchmarks.peer_environment import OURS, PEERS, SERVE, Peer, PeerUnavailable, install, python_of, versions
from benchmarks.peer_live import NoStart, Run, Subject, play
from benchmarks.schema import _rows
from gpu_byoc.frames import FrameSpec
from gpu_byoc.local.children import ChildEnded

NOBODY = Peer("nobody", ("no-such-distribution-of-ours==0.0.1",), "serve_nobody.py")


# --- environments


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Peer]:
    """An environment without anything in it, which needs no network."""
    root, peer = tmp_path_factory.mktemp("peers"), Peer("empty", ("pip",), "serve_nobody.py")
    return python_of(peer, root), peer


def test_an_environment_is_made_and_kept(empty: tuple[Path, Peer], monkeypatch: pytest.MonkeyPatch) -> None:
    python, peer = empty
    assert "pip" in versions(python)

    def never(*given: object) -> None:
        raise AssertionError("it is there already")

    monkeypatch.setattr(peer_environment, "_run", never)
    assert python_of(peer, python.parents[2]) == python


def test_another_pin_makes_it_again(empty: tuple[Path, Peer], monkeypatch: pytest.MonkeyPatch) -> None:
    python, peer = empty
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr(peer_environment, "_run", lambda peer, seconds, *command: ran.append(command))
    python_of(dataclasses.replace(peer, requirements=("pip", "wheel==0.1")), python.parents[2])
    assert ran[0][1:4] == ("-m", "venv", "--clear")
    assert ran[1][-3:] == (":all:", "pip", "wheel==0.1")


def test_what_cannot_be_installed_says_why(
    empty: tuple[Path, Peer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real pip, without an index, in the environment that is there already."""
    python, _ = empty
    run = peer_environment._run

    def without_venv(peer: Peer, seconds: float, *command: str) -> None:
        if "venv" not in command:
            run(peer, seconds, *command)

    monkeypatch.setattr(peer_environment, "_run", without_venv)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    lacking = dataclasses.replace(NOBODY, name="empty")
    with pytest.raises(PeerUnavailable, match=r"empty could not be installed: .*no-such-distribution-of-ours"):
        python_of(lacking, python.parents[2])
    assert not (python.parents[1] / f"made-{peer_environment._digest(lacking)}").exists()


def test_an_installation_is_bounded_in_time(tmp_path: Path) -> None:
    with pytest.raises(PeerUnavailable, match=r"could not be installed within 0\.001 s"):
        python_of(NOBODY, tmp_path, seconds=0.001)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("WARNING: x\nERROR: no wheel\nnote: y\n", "ERROR: no wheel"),
        ("Traceback\n  File\nOSError: disk full\n", "OSError: disk full"),
        ("\n", "no reason was given"),
    ],
)
def test_the_reason_among_pips_words(said: str, reason: str) -> None:
    assert peer_environment._reason(said) == reason


def test_every_peer_is_pinned_and_has_its_server() -> None:
    assert set(PEERS) == {"pytrickle", "pytriton", "litserve"}
    for peer in PEERS.values():
        assert all("==" in each for each in peer.requirements)
        env, libraries, python, script, port = peer.command(Path("/venv/bin/python"), 8000)
        assert (env, python, port) == ("/usr/bin/env", "/venv/bin/python", "8000")
        assert libraries.startswith("LD_LIBRARY_PATH=")
        assert Path(script).is_file()


def test_the_servers_import_nothing_of_ours() -> None:
    """They are run by other environments, where it is not installed."""
    for peer in PEERS.values():
        source = Path(peer.command(Path("python"))[3]).read_text()
        assert "gpu_byoc" not in source
        assert "from ." not in source


# --- processes


def test_a_family_is_counted_together() -> None:
    burn = "import time\nwhile time.process_time() < 0.2: pass\nprint('burnt', flush=True)\ntime.sleep(60)"
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, start_new_session=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"burnt\n"
            assert len(family(child.pid)) == 2
            assert cpu_of(child.pid)() >= 0.2
            assert memory_of(child.pid) > 1 << 20
        finally:
            os.killpg(child.pid, 9)


# --- raw frames


STAND_IN = """
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Server(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(b"")

    def do_POST(self):
        body = bytearray(self.rfile.read(int(self.headers["Content-Length"])))
        assert body[:4] == b"head", bytes(body[:9])
        assert self.headers["X-Stand-In"] == "yes"
        frame = body[4:]
        frame[1::3] = bytes(min(255, value + int(sys.argv[2])) for value in frame[1::3])
        self.answer(b"ahead" + bytes(frame))

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *given):
        pass

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Server).serve_forever()
"""


def stand_in(boost: int = 80, name: str = "stand-in") -> Recipe:
    return Recipe(
        name,
        lambda port: (sys.executable, "-c", STAND_IN, str(port), str(boost)),
        "/up",
        "/tint",
        "our own",
        {"X-Stand-In": "yes"},
        b"head",
    )


SMALL = FrameSpec(16, 8)


def measured(*recipes: Recipe) -> Sheet:
    sheet = Sheet(Size.TINY)
    with bench_peers_jobs.serving(sheet, recipes) as servers:
        bench_peers_jobs.compare(sheet, servers, 2, os.urandom(SMALL.nbytes))
    return sheet


def test_ours_and_another_get_the_same_frames() -> None:
    sheet = measured(bench_peers_jobs.ours(), stand_in())
    assert not _rows("peers", sheet.rows)
    ours, other = sheet.rows
    assert [each["name"] for each in sheet.rows] == [row_of(OURS, 2), row_of("stand-in", 2)]
    assert other["jobs_per_second"] > 0
    assert other["p50_times_ours"] > 0
    assert "p50_times_ours" not in ours
    assert ours["clients"] == other["clients"] == 2
    assert min(ours["rss_mb"], other["rss_mb"], ours["start_seconds"], other["start_seconds"]) > 0


def test_other_bytes_than_green_tints_are_a_failure() -> None:
    (row,) = measured(stand_in(boost=79)).rows
    assert row == {"name": row_of("stand-in", 2), "failed": "it answered other bytes than green tint gives"}


def test_a_peer_that_does_not_start_is_skipped_and_ours_fails() -> None:
    broken = dataclasses.replace(
        stand_in(), command=lambda port: (sys.executable, "-c", "raise SystemExit('no libpython')")
    )
    rows = measured(broken, dataclasses.replace(broken, name=OURS)).rows
    assert [("skipped" in row, "failed" in row) for row in rows] == [(True, False)] * 2 + [(False, True)] * 2
    assert all("no libpython" in str(row) for row in rows)


def test_tritons_tensor_is_binary_and_as_long_as_the_frame() -> None:
    recipe = bench_peers_jobs.triton(Path("python"))
    head = json.loads(recipe.head)
    (tensor,) = head["inputs"]
    assert tensor["shape"] == [1, 480, 640, 3]
    assert tensor["parameters"] == {"binary_data_size": FRAME.nbytes}
    assert head["outputs"][0]["parameters"] == {"binary_data": True}
    assert recipe.headers == {"Inference-Header-Content-Length": str(len(recipe.head))}
    assert list(recipe.command(9))[-4:] == ["9", "16", "640", "480"]


# --- live streams


def worker(*more: str) -> Subject:
    def command(port: int) -> Sequence[str]:
        return (sys.executable, *SERVE, "--port", str(port), *more)

    return Subject("worker", command, {})


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clips")


TINY = Case((64, 48), real_time=True)


def test_a_stream_through_any_worker(plans: Path) -> None:
    """Ours stands in for a peer: nothing of its events is read."""
    run = play(worker(), bench_peers_live._plan(TINY, plans, 1.0))
    assert run.published == run.received == len(run.latencies) > 20
    assert run.lost == 0
    assert min(run.latencies) > 0
    assert run.cpu > 0
    assert run.rate == pytest.approx(25, rel=0.3)
    assert run.rss > 1 << 20
    assert run.start > 0


def test_what_comes_out_untinted_is_an_error(plans: Path) -> None:
    with pytest.raises(RuntimeError, match="not the green tint"):
        play(worker("--processor", "passthrough"), bench_peers_live._plan(TINY, plans, 1.0))


def test_a_server_that_does_not_start(plans: Path) -> None:
    broken = Subject("broken", lambda port: (sys.executable, "-c", "raise SystemExit('no codec')"), {})
    with pytest.raises(NoStart, match="no codec") as error:
        play(broken, bench_peers_live._plan(TINY, plans, 1.0))
    assert error.value.name == "broken"


DYING = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Server(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"status": "IDLE"}')

    def do_POST(self):
        raise SystemExit("out of memory")

HTTPServer(("127.0.0.1", int(sys.argv[1])), Server).serve_forever()
"""


def test_a_server_that_dies_in_the_middle(plans: Path) -> None:
    dying = Subject("dying", lambda port: (sys.executable, "-c", DYING, str(port)), {})
    with pytest.raises((ChildEnded, RuntimeError), match="out of memory"):
        play(dying, bench_peers_live._plan(TINY, plans, 1.0))


def run_of(cpu: float, rate: float, latency: float) -> Run:
    return Run(100, 98, 1, (latency, 3 * latency), cpu, rate, 1_000_000, 0.5)


def test_ratios_are_against_the_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = iter([run_of(2, 400, 0.1), run_of(8, 100, 0.4), run_of(4, 200, 0.1)])
    monkeypatch.setattr(bench_peers_live, "play", lambda subject, plan: next(turns))
    sheet, flood = Sheet(Size.QUICK), Case((64, 48), real_time=False)
    ours, theirs = worker(), worker()
    ours, theirs = dataclasses.replace(ours, name=OURS), dataclasses.replace(theirs, name="other")
    bench_peers_live.compare(sheet, flood, ours, theirs, None)  # type: ignore[arg-type]
    assert not _rows("peers", sheet.rows)
    first, second = sheet.rows
    assert first["cpu_times_peer"] == pytest.approx(3 / 8)
    assert first["rate_over_peer"] == pytest.approx(3.0)
    assert first["p50_times_peer"] == pytest.approx(0.25)
    assert (first["turns"], second["turns"]) == (2, 1)
    assert first["cpu_ms"] == pytest.approx(3000)
    assert (second["frames_in"], second["frames_out"], second["lost"]) == (100, 98, 1)
    assert "cpu_times_peer" not in second


def test_real_time_is_everybodys_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_peers_live, "play", lambda subject, plan: run_of(2, 25, 0.1))
    sheet = Sheet(Size.QUICK)
    bench_peers_live.compare(sheet, TINY, worker(), dataclasses.replace(worker(), name="other"), None)  # type: ignore[arg-type]
    assert "rate_over_peer" not in sheet.rows[0]


def test_targets() -> None:
    sheet = Sheet(Size.QUICK)
    names = [case.name for case, *_ in TARGETS]
    assert len(names) == 4
    paced, flood = names[0], names[1]
    sheet.row(f"{paced}, {OURS}", cpu_times_peer=0.4)
    sheet.row(f"{flood}, {OURS}", rate_over_peer=2.0)
    sheet.skip(f"{names[2]}, pytrickle", "no wheel")
    bench_peers_live._targets(sheet)
    rows = {row["name"]: row for row in sheet.rows}
    assert rows[f"target: {paced}, cpu_times_peer"]["met"] == "yes"
    assert rows[f"target: {flood}, rate_over_peer"]["met"] == "no"
    assert rows[f"target: {names[2]}, cpu_times_peer"]["skipped"] == "no wheel"


@pytest.fixture
def unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(peer: Peer) -> Path:
        raise PeerUnavailable(f"{peer.name} has no wheel for this Python")

    monkeypatch.setattr(peer_environment, "python_of", refuse)


@pytest.mark.usefixtures("unavailable")
def test_a_live_peer_that_cannot_be_installed_is_skipped_by_name() -> None:
    sheet = Sheet(Size.TINY)
    bench_peers_live.run(sheet)
    rows = {row["name"]: row for row in sheet.rows}
    assert len(rows) == len(LIVE) + len(TARGETS)
    for case in LIVE:
        assert rows[f"{case.name}, pytrickle"]["skipped"] == "pytrickle has no wheel for this Python"
    assert all("skipped" in row for row in sheet.rows)


@pytest.mark.usefixtures("unavailable")
def test_job_peers_that_cannot_be_installed_are_skipped_and_ours_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_peers_jobs, "FRAME", SMALL)
    sheet = Sheet(Size.TINY)
    bench_peers_jobs.run(sheet)
    rows = {row["name"]: row for row in sheet.rows}
    for name in ("pytriton", "litserve"):
        for count in bench_peers_jobs.CLIENTS:
            assert rows[row_of(name, count)]["skipped"] == f"{name} has no wheel for this Python"
    assert rows[row_of(OURS, 1)]["jobs_per_second"] > 0
    assert not any("failed" in row for row in sheet.rows)
    assert len(rows) == sheet.expected
    assert "serve --backend numpy" in sheet.notes["gpu_byoc"]


def test_what_is_installed_is_told(empty: tuple[Path, Peer], monkeypatch: pytest.MonkeyPatch) -> None:
    python, peer = empty
    monkeypatch.setattr(peer_environment, "python_of", lambda peer: python)
    found = install(dataclasses.replace(peer, requirements=("pip==1",)))
    assert found == (python, f"pip {versions(python)['pip']}; Python {sys.version.split()[0]}")


@pytest.mark.parametrize(("given", "also"), [(["--peers"], True), ([], False), (["--only", "jobs", "--peers"], True)])
def test_peers_run_only_when_they_are_asked_for(given: list[str], also: bool) -> None:
    groups, left_out = _chosen(_parser().parse_args(given))
    running = {each.name for each in groups} - set(left_out)
    assert ({"peers-live", "peers-jobs"} <= running) is also
    assert "jobs" in running
    assert not left_out or all("gpu-byoc bench --peers" in reason for reason in left_out.values())
