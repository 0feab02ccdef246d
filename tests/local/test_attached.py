"""Real workers that register with a real orchestrator: restarts, kill -9, wrong secrets, new tokens under load."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.support.processes import WAIT, Process, free_port, get, post, running, until_health

SECRET = "a-secret-of-tests"
MODEL = "green-tint-cpu"
FRAME = bytes(64 * 48 * 3)
TINTED = bytes([0, 80, 0]) * (64 * 48)

SLOW = """
from gpu_byoc import ArrayProcessor
import time

class Slow(ArrayProcessor):
    def process_batch(self, frames, params, xp):
        print("at work", flush=True)
        time.sleep(30)
        return frames
"""


@contextlib.contextmanager
def orchestrator(datadir: Path, port: int, **env: str) -> Iterator[Process]:
    flags = f"-orchestrator -serviceAddr 127.0.0.1:{port} -cliAddr 127.0.0.1:0 -datadir {datadir}"
    with running("livepeer", *flags.split(), env={"ORCH_SECRET": SECRET, **env}) as process:
        process.wait_for("Orchestrator listening")
        yield process


@contextlib.contextmanager
def worker(
    orch_port: int, secret: Path | None, *flags: str, processor: str = "green_tint", **env: str
) -> Iterator[Any]:
    """(process, port). It listens; whether it is registered is for the test to wait for."""
    port = free_port()
    command = f"serve --processor {processor} --backend numpy --host 127.0.0.1 --port {port} --capability {MODEL}"
    env |= {"ORCH_URL": f"http://127.0.0.1:{orch_port}", "GPU_BYOC_REGISTER_SECONDS": "0.3"} | env
    env |= {"ORCH_SECRET_FILE": str(secret)} if secret else {}
    with running(*command.split(), *flags, env=env) as process:
        process.wait_for("listening on port")
        yield process, port


def secret_file(folder: Path, text: str = SECRET) -> Path:
    file = folder / "secret"
    file.write_text(text + "\n")
    return file


def until(condition: Callable[[], object]) -> None:
    """Another process has no event of ours."""
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def capabilities(port: int) -> list[str]:
    """URLs of those that are ready."""
    found = get(port, "/status")[1]["capabilities"]
    return [each["container_url"] for each in found if each["state"] == "ready"]


def job(port: int) -> tuple[int, bytes]:
    return post(port, "/live/video-to-video", FRAME, X_Model_Id=MODEL)


def test_a_job_goes_through_and_does_so_again_after_the_orchestrator_has_forgotten_everything(tmp_path: Path) -> None:
    port = free_port()
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(orchestrator(tmp_path, port))
        process, worker_port = stack.enter_context(worker(port, secret_file(tmp_path)))
        process.wait_for("registered with")
        assert job(port) == (200, TINTED)
        assert post(worker_port, "/", FRAME)[0] in (401, 503), "only the orchestrator has the token"
        assert first.end(signal.SIGKILL) == -signal.SIGKILL
        process.wait_for("not registered: cannot reach the orchestrator")
        until_health(worker_port, "IDLE")
        assert get(worker_port, "/stream/status")[1]["registration"]["state"] == "failing"
        stack.enter_context(orchestrator(tmp_path, port))
        process.wait_for("registered with")
        assert job(port) == (200, TINTED)
        log = "\n".join(process.log)
        assert log.count("not registered: ") == 1, "once, however often it was tried"
        assert SECRET not in log


def test_kill_9_fails_the_job_under_way_and_the_next_worker_takes_over(tmp_path: Path) -> None:
    port, secret = free_port(), secret_file(tmp_path)
    slow = tmp_path / "slow.py"
    slow.write_text(SLOW)
    with (
        orchestrator(tmp_path, port),
        worker(port, secret) as (other, other_port),
        worker(port, secret, "--capability-capacity", "20", processor=f"{slow}:Slow") as (victim, _),
        ThreadPoolExecutor() as pool,
    ):
        other.wait_for("registered with")
        victim.wait_for("registered with")
        assert len(capabilities(port)) == 2
        under_way = pool.submit(job, port)
        victim.wait_for("at work")  # it has more room than the other
        victim.popen.kill()
        status, body = under_way.result(WAIT)
        assert (status, b"container_unreachable" in body) == (502, True)
        until(lambda: capabilities(port) == [f"http://127.0.0.1:{other_port}"])
        assert [job(port) for _ in range(3)] == [(200, TINTED)] * 3


def test_a_wrong_secret(tmp_path: Path) -> None:
    """The worker lives, says why once, and takes no job: neither from that orchestrator nor from anybody."""
    port = free_port()
    with orchestrator(tmp_path, port) as orch:
        with worker(port, secret_file(tmp_path, "wrong-secret")) as (process, worker_port):
            process.wait_for("not registered: ")
            until(lambda: sum("refused: the secret is wrong" in line for line in orch.log) >= 3)
            assert capabilities(port) == []
            assert post(worker_port, "/", FRAME)[0] == 503
            until_health(worker_port, "IDLE")
            assert process.end() == 0
            told = [line for line in process.log if "not registered: " in line]
            assert len(told) == 1
            assert "answered 400: invalid authorization" in told[0]
            assert "wrong-secret" not in "\n".join(process.log + orch.log)
        with worker(port, None, "--orch-secret", SECRET) as (process, _):
            process.wait_for("registered with")
            assert any("--orch-secret: every user of this machine can read it" in line for line in process.log)


def test_the_secret_is_not_in_the_environment_of_children(tmp_path: Path) -> None:
    file = tmp_path / "tell.py"
    file.write_text(
        "import os\nfrom gpu_byoc import ArrayProcessor\n\n\nclass Tell(ArrayProcessor):\n"
        "    def setup(self, xp, device):\n        print('ORCH_SECRET' in os.environ, flush=True)\n\n"
        "    def process_batch(self, frames, params, xp):\n        return frames\n"
    )
    port = free_port()
    with worker(port, None, processor=f"{file}:Tell", ORCH_SECRET=SECRET) as (process, _):
        assert "False" in process.log


class Load:
    """Jobs from four threads until it is stopped, 5,000 at most. ``statuses`` counts the answers."""

    def __init__(self, port: int) -> None:
        self.statuses: Counter[int] = Counter()
        self._port = port
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(4)
        self._threads: list[Future[None]] = [self._pool.submit(self._send) for _ in range(4)]

    def _send(self) -> None:
        for _ in range(1250):
            if self._stop.is_set():
                return
            status, body = job(self._port)
            self.statuses[status] += 1
            assert status != 200 or body == TINTED

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.result(WAIT)
        self._pool.shutdown()


def registrations(port: int) -> set[float]:
    return {round(time.monotonic() - get(port, "/stream/status")[1]["registration"]["seconds_since_success"], 2)}


def test_no_job_fails_while_tokens_are_replaced(tmp_path: Path) -> None:
    port = free_port()
    fast = {"GPU_BYOC_REGISTER_SECONDS": "0.02"}
    with orchestrator(tmp_path, port), worker(port, secret_file(tmp_path), **fast) as (process, worker_port):
        process.wait_for("registered with")
        load = Load(port)
        try:
            seen: set[float] = set()
            while len(seen) < 20:
                seen |= registrations(worker_port)
            until(lambda: load.statuses[200] >= 200)
        finally:
            load.stop()
        assert set(load.statuses) == {200}
        assert not [line for line in process.log if "not registered" in line]


def test_sigterm_under_load_loses_no_job_while_another_worker_is_there(tmp_path: Path) -> None:
    port, secret = free_port(), secret_file(tmp_path)
    with (
        orchestrator(tmp_path, port) as orch,
        worker(port, secret) as (stays, _),
        worker(port, secret) as (leaves, url),
    ):
        stays.wait_for("registered with")
        leaves.wait_for("registered with")
        load = Load(port)
        try:
            until(lambda: load.statuses[200] >= 40)
            assert leaves.end() == 0
            told = [line for line in leaves.log if "unregistered from" in line or "stopping" in line]
            assert ["unregistered from" in line for line in told] == [True, False], "first of all"
            done = load.statuses[200]
            until(lambda: load.statuses[200] >= done + 40)
        finally:
            load.stop()
        assert set(load.statuses) == {200}
        assert any(f"container http://127.0.0.1:{url}: it has unregistered" in line for line in orch.log)


def test_the_process_list_shows_no_secret(tmp_path: Path) -> None:
    port = free_port()
    with orchestrator(tmp_path, port) as orch, worker(port, secret_file(tmp_path)) as (process, _):
        process.wait_for("registered with")
        for each in (orch, process):
            command = Path(f"/proc/{each.popen.pid}/cmdline").read_bytes()
            assert SECRET.encode() not in command


def test_a_worker_that_is_stopped_while_its_orchestrator_hangs_ends_in_time(tmp_path: Path) -> None:
    """SIGSTOP: connections are accepted by the kernel and nobody ever answers."""
    port = free_port()
    with orchestrator(tmp_path, port) as orch, worker(port, secret_file(tmp_path)) as (process, _):
        process.wait_for("registered with")
        orch.popen.send_signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            assert process.end() == 0
            assert time.monotonic() - began < 8
        finally:
            orch.popen.send_signal(signal.SIGCONT)
        assert any("will find out by itself" in line for line in process.log)
