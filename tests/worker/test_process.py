"""The worker as a real process: the quickstart's file, signals, ports, and a backend that cannot open."""

from __future__ import annotations

import importlib.util
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from gpu_byoc.worker.serve import SWITCH_SECONDS
from tests.support.processes import example, free_port, get, post, running

FRAME = bytes(640 * 480 * 3)

PAGE = example("processor.py")

BUSY = """
import asyncio, time
from gpu_byoc import FrameProcessor, run_processor

class Busy(FrameProcessor):
    async def process(self, frame):
        end = time.monotonic() + {seconds}
        while time.monotonic() < end:
            pass
        return frame

    async def shutdown(self):
        print("Busy: shut down", flush=True)

asyncio.run(run_processor(Busy(), port={port}, host="127.0.0.1"))
"""


def test_the_pages_processor_runs_unmodified() -> None:
    port = free_port()
    with running("run", str(PAGE), "--port", str(port), "--host", "127.0.0.1") as worker:
        worker.wait_for("Trickle server listening")
        page = [line for line in worker.log if "pytrickle" not in line]
        assert page == [
            "INFO: GreenTintProcessor: initialised",
            f"INFO: Trickle server listening on port {port}",
        ]
        assert sum("pytrickle" in line for line in worker.log) == 1, "the stand-in is said once"
        assert get(port, "/api/stream/status")[0] == 200
        assert get(port, "/stream/status")[0] == 200
        status, body = post(port, "/live/video-to-video", FRAME)
        assert (status, len(body), sum(body[1::3]), sum(body[0::3])) == (200, 921600, 24576000, 0)
        assert worker.end() == 0
        assert "INFO: GreenTintProcessor: shutdown" in worker.log


@pytest.mark.skipif(importlib.util.find_spec("pytrickle") is not None, reason="a real pytrickle is installed")
def test_the_stand_in_is_for_that_process_only(tmp_path: Path) -> None:
    """A file that imports pytrickle and is done; afterwards, and in the file's own children, there is none."""
    file = tmp_path / "child.py"
    file.write_text(
        "import subprocess, sys\n"
        "from pytrickle import FrameProcessor, run_processor\n"
        "child = subprocess.run([sys.executable, '-c', 'import pytrickle'], capture_output=True, text=True)\n"
        "print('ours:', FrameProcessor.__module__, 'child:', 'ModuleNotFoundError' in child.stderr)\n"
    )
    with running("run", str(file)) as worker:
        worker.wait_for("ours: gpu_byoc.processor child: True")
        assert worker.popen.wait(30) == 0


def test_a_real_pytrickle_that_has_both_names_wins(tmp_path: Path) -> None:
    (tmp_path / "pytrickle.py").write_text(
        "class FrameProcessor: ...\nasync def run_processor(processor, port): print('the real one', port)\n"
    )
    (tmp_path / "old").mkdir()
    with running("run", str(PAGE), env={"PYTHONPATH": str(tmp_path)}) as worker:
        worker.wait_for("the real one 8000")
        assert worker.popen.wait(30) == 0


def test_health_answers_while_the_processor_burns_cpu(tmp_path: Path) -> None:
    port = free_port()
    file = tmp_path / "busy.py"
    file.write_text(BUSY.format(seconds=0.5, port=port))
    with running(program=(str(file),)) as worker:
        worker.wait_for("listening")
        job = threading.Thread(target=post, args=(port, "/", FRAME))
        job.start()
        times = []
        while job.is_alive():
            began = time.perf_counter()
            state = get(port, "/health")[1]["status"]
            times.append(time.perf_counter() - began)
            assert state in ("OK", "IDLE")
        job.join()
        assert len(times) > 3, "health was asked for during the job"
        assert worker.end() == 0


def test_sigterm_lets_the_job_in_the_house_finish(tmp_path: Path) -> None:
    port = free_port()
    file = tmp_path / "busy.py"
    file.write_text(BUSY.format(seconds=1.0, port=port))
    with running(program=(str(file),)) as worker:
        worker.wait_for("listening")
        answers: list[tuple[int, bytes]] = []
        job = threading.Thread(target=lambda: answers.append(post(port, "/", b"abc")))
        job.start()
        while not get(port, "/api/stream/status")[1]["active_jobs"]:
            pass
        worker.popen.send_signal(signal.SIGTERM)
        worker.wait_for("stopping: 1 jobs and 0 streams in the house")
        assert post(port, "/", b"abc")[0] == 503
        job.join(30)
        assert answers == [(200, b"abc")]
        assert worker.popen.wait(30) == 0
        worker.wait_for("Busy: shut down")


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    port = free_port()
    file = tmp_path / "busy.py"
    file.write_text(BUSY.format(seconds=15, port=port))
    with running(program=(str(file),)) as worker:
        worker.wait_for("listening")
        job = threading.Thread(target=_ignore_errors, args=(port,))
        job.start()
        while not get(port, "/api/stream/status")[1]["active_jobs"]:
            pass
        worker.popen.send_signal(signal.SIGINT)
        worker.wait_for("stopping")
        worker.popen.send_signal(signal.SIGINT)
        worker.wait_for("stopped: 1 jobs unfinished, 0 streams cut off")
        began = time.monotonic()
        worker.popen.wait(30)
        assert time.monotonic() - began < 10
        job.join(30)


def _ignore_errors(port: int) -> None:
    try:
        post(port, "/", b"abc")
    except OSError:
        pass


def test_a_taken_port_names_its_owner() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with running("serve", "--port", str(port), "--host", "127.0.0.1") as worker:
            line = worker.wait_for("in use")
            assert f"port {port}" in line
            assert "by pid" in line
            assert worker.popen.wait(30) == 2
            assert not any("Traceback" in each for each in worker.log)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--backend", "nope"), "no backend named 'nope'"),
        (("--backend", "cupy"), "pip install cupy-cuda12x"),
        (("--backend", "numpy", "--device", "cuda:0"), "numpy runs on cpu"),
        (("--processor", "nope"), "no processor named 'nope'"),
        (("--processor", "json:JSONDecoder"), "not a subclass"),
        (("--processor", "/no/such/file.py"), "no such file"),
        (("--max-batch", "9", "--slots", "3"), "--max-batch 9 is more than --slots 3"),
        (("--host", "256.1.1.1"), "cannot listen"),
        (("--port", "99999"), "--port 99999 is not a port"),
        (("--slot-wait", "-1"), "--slot-wait must not be negative"),
        (("--port", "abc"), "invalid int value"),
        (("--log-level", "loud"), "--log-level 'loud'"),
    ],
)
def test_what_cannot_work_is_one_clear_line(arguments: tuple[str, ...], says: str) -> None:
    if "cupy" in arguments and importlib.util.find_spec("cupy") is not None:
        pytest.skip("cupy is installed")
    with running("serve", "--host", "127.0.0.1", "--port", "0", *arguments) as worker:
        worker.wait_for(says)
        assert worker.popen.wait(30) == 2
        assert not any("Traceback" in line for line in worker.log)


def test_auto_says_what_was_tried() -> None:
    port = free_port()
    with running("serve", "--host", "127.0.0.1", "--port", str(port)) as worker:
        line = worker.wait_for("INFO: backend ")
        worker.wait_for("listening")
        backend = get(port, "/api/stream/status")[1]["backend"]
        assert f"backend {backend['name']} on {backend['device']}" in line
        if backend["name"] == "numpy":
            assert "cupy: " in line
            assert "torch: " in line
            assert backend["degraded"], "no GPU is said in status, too"
        assert worker.end() == 0


def test_the_environment_configures_and_a_flag_wins() -> None:
    port = free_port()
    env = {"GPU_BYOC_PORT": "1", "GPU_BYOC_CAPABILITY": "from-env", "GPU_BYOC_BACKEND": "numpy"}
    with running("serve", "--host", "127.0.0.1", "--port", str(port), env=env) as worker:
        worker.wait_for("listening")
        assert get(port, "/version")[1]["model_id"] == "from-env"
        assert worker.end() == 0


def test_a_variable_is_checked_like_its_flag() -> None:
    with running("serve", "--host", "127.0.0.1", env={"GPU_BYOC_PORT": "abc"}) as worker:
        worker.wait_for("invalid int value: 'abc'")
        assert worker.popen.wait(30) == 2


def test_run_keeps_what_the_file_says_unless_a_flag_says_otherwise(tmp_path: Path) -> None:
    port = free_port()
    file = tmp_path / "mine.py"
    file.write_text(
        "import asyncio\n"
        "from gpu_byoc import FrameProcessor, run_processor\n"
        "from gpu_byoc.config import EngineConfig\n"
        "class Same(FrameProcessor):\n"
        "    async def process(self, frame): return frame\n"
        "asyncio.run(run_processor(Same(), port=1, capability='from-the-file', max_body=1000,\n"
        "                          engine=EngineConfig(slots=3, max_batch=2)))\n"
    )
    with running("run", str(file), "--host", "127.0.0.1", "--port", str(port), "--slots", "5") as worker:
        worker.wait_for("listening")
        assert get(port, "/version")[1]["model_id"] == "from-the-file"
        assert post(port, "/", bytes(2000))[0] == 413
        assert post(port, "/", bytes(10))[0] == 200
        assert get(port, "/stream/status")[1]["slots"][0]["slots"] == 5
        assert worker.end() == 0


def test_sigterm_while_the_processor_loads(tmp_path: Path) -> None:
    port = free_port()
    file = tmp_path / "slow.py"
    file.write_text(
        "import asyncio, time\n"
        "from gpu_byoc import FrameProcessor, run_processor\n"
        "class Loads(FrameProcessor):\n"
        "    async def initialize(self):\n"
        "        print('loading', flush=True)\n"
        "        time.sleep(1.5)\n"
        f"asyncio.run(run_processor(Loads(), port={port}, host='127.0.0.1'))\n"
    )
    with running(program=(str(file),)) as worker:
        worker.wait_for("loading")
        assert get(port, "/health") == (503, {"status": "LOADING"})
        assert post(port, "/", b"abc")[0] == 503
        assert worker.end() == 0
        assert not any("Traceback" in line for line in worker.log), worker.log


def test_a_file_that_needs_more_says_what(tmp_path: Path) -> None:
    file = tmp_path / "json.py"
    file.write_text("import no_such_library\n")
    with running("serve", "--processor", str(file), "--port", "0") as worker:
        worker.wait_for("needs 'no_such_library'")
        assert worker.popen.wait(30) == 2


INTERVAL = """
import asyncio, sys
from gpu_byoc import ArrayProcessor, FrameProcessor, run_processor

class Frames(FrameProcessor):
    async def initialize(self):
        print("interval", sys.getswitchinterval(), flush=True)

    async def process(self, frame):
        return frame

class Arrays(ArrayProcessor):
    def setup(self, xp, device):
        print("interval", sys.getswitchinterval(), flush=True)

    def process_batch(self, frames, params, xp):
        return frames

asyncio.run(run_processor({kind}(), port={port}, host="127.0.0.1", backend="{backend}"))
"""


@pytest.mark.parametrize(
    ("kind", "backend", "seconds"), [("Frames", "auto", SWITCH_SECONDS), ("Arrays", "numpy", sys.getswitchinterval())]
)
def test_only_python_loops_hand_over_the_interpreter_more_often(
    tmp_path: Path, kind: str, backend: str, seconds: float
) -> None:
    file = tmp_path / "interval.py"
    file.write_text(INTERVAL.format(kind=kind, backend=backend, port=free_port()))
    with running(program=(str(file),)) as worker:
        worker.wait_for(f"interval {seconds}")
        worker.wait_for("listening")
        assert worker.end() == 0
