"""The worker as a real process: the quickstart's file, signals, ports, and a backend that cannot open."""

from __future__ import annotations

import importlib.util
import signal
import socket
import sys
import threading
from pathlib import Path

import pytest

from gpu_byoc.worker.serve import SWITCH_SECONDS
from tests.support.processes import example, free_port, get, post, running, until_health

FRAME = bytes(640 * 480 * 3)

PAGE = example("processor.py")

BUSY = """
import asyncio, pathlib
from gpu_byoc import FrameProcessor, run_processor

class Busy(FrameProcessor):
    async def process(self, frame):
        over = pathlib.Path(__file__).with_name("over")
        while not over.exists():
            for _ in range(100_000):
                pass
        return frame

    async def shutdown(self):
        print("Busy: shut down", flush=True)

asyncio.run(run_processor(Busy(), port={port}, host="127.0.0.1"))
"""
"""Burns CPU until there is a file ``over`` beside it."""


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
        "sys.exit(7)\n"
    )
    with running("run", str(file)) as worker:
        worker.wait_for("ours: gpu_byoc.processor child: True")
        assert worker.popen.wait(30) == 7, "how a file ends itself is its own affair"


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
    file.write_text(BUSY.format(port=port))
    with running(program=(str(file),)) as worker:
        worker.wait_for("listening")
        job = threading.Thread(target=post, args=(port, "/", FRAME))
        job.start()
        try:
            until_health(port, "OK")
            for _ in range(4):
                assert get(port, "/health") == (200, {"status": "OK"})
        finally:
            (tmp_path / "over").touch()
            job.join(30)
        assert worker.end() == 0


def test_sigterm_lets_the_job_in_the_house_finish(tmp_path: Path) -> None:
    port = free_port()
    file = tmp_path / "busy.py"
    file.write_text(BUSY.format(port=port))
    with running(program=(str(file),)) as worker:
        worker.wait_for("listening")
        answers: list[tuple[int, bytes]] = []
        job = threading.Thread(target=lambda: answers.append(post(port, "/", b"abc")))
        job.start()
        try:
            _until_busy(port)
            worker.popen.send_signal(signal.SIGTERM)
            worker.wait_for("stopping: 1 jobs and 0 streams in the house")
            assert post(port, "/", b"abc")[0] == 503
        finally:
            (tmp_path / "over").touch()
            job.join(30)
        assert answers == [(200, b"abc")]
        assert worker.popen.wait(30) == 0
        worker.wait_for("Busy: shut down")


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    port = free_port()
    file = tmp_path / "busy.py"
    file.write_text(BUSY.format(port=port))
    with running(program=(str(file),)) as worker:
        worker.wait_for("listening")
        job = threading.Thread(target=_ignore_errors, args=(port,))
        job.start()
        _until_busy(port)
        worker.popen.send_signal(signal.SIGINT)
        worker.wait_for("stopping")
        worker.popen.send_signal(signal.SIGINT)
        worker.wait_for("stopped: 1 jobs unfinished, 0 streams cut off")
        worker.popen.wait(30)  # though the job would never end
        job.join(30)


def _until_busy(port: int) -> None:
    while not get(port, "/api/stream/status")[1]["active_jobs"]:
        pass


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


SAME = """
import asyncio
from gpu_byoc import FrameProcessor, run_processor

class Same(FrameProcessor):
    async def process(self, frame):
        return frame

if __name__ == "__main__":
    asyncio.run(run_processor(Same(), host="127.0.0.1", {rest}))
"""


def test_where_a_worker_has_the_port_it_is_named_and_not_its_doorman(tmp_path: Path) -> None:
    port, file = free_port(), tmp_path / "same.py"
    file.write_text(SAME.format(rest=f"port={port}"))
    with running("serve", "--host", "127.0.0.1", "--port", str(port), "--log-level", "info") as first:
        first.wait_for("listening")
        told = f"port {port} is in use by pid {first.popen.pid} ({Path(sys.executable).name} -u -m gpu_byoc serve); "
        for program in ((str(file),), ("-m", "gpu_byoc", "run", str(file))):
            with running(program=program) as second:
                second.wait_for("gpu-byoc: " + told)
                assert second.popen.wait(30) == 2
                assert not any("Traceback" in line for line in second.log)
        assert first.end() == 0


@pytest.mark.parametrize(
    ("rest", "says"),
    [("port=0, require_gpu=True", "--require-gpu"), ("port=0, slot_wait=-1", "--slot-wait must not be")],
)
def test_a_file_that_cannot_start_ends_with_one_sentence(tmp_path: Path, rest: str, says: str) -> None:
    file = tmp_path / "same.py"
    file.write_text(SAME.format(rest=rest))
    with running(program=(str(file),)) as worker:
        worker.wait_for(f"gpu-byoc: {says}")
        assert worker.popen.wait(30) == 2
        assert not any("Traceback" in line for line in worker.log)


@pytest.mark.parametrize("last", ["", "run_processor(Same())"], ids=["nothing", "not awaited"])
def test_a_file_that_runs_no_processor_is_a_mistake(tmp_path: Path, last: str) -> None:
    file = tmp_path / "same.py"
    file.write_text(SAME.partition("if __name__")[0] + last)
    with running("run", str(file)) as worker:
        line = worker.wait_for("gpu-byoc run: no processor was run")
        assert "asyncio.run(run_processor(" in line
        assert f"gpu-byoc serve --processor {file}" in line
        assert worker.popen.wait(30) == 2


@pytest.mark.parametrize(
    ("text", "last"),
    [("def f(:\n", "SyntaxError: invalid syntax"), ("import inner\n", "ValueError: from far inside")],
)
@pytest.mark.parametrize("command", [("run",), ("serve", "--processor")], ids=["run", "serve"])
def test_a_file_that_raises_is_shown_without_our_frames(
    tmp_path: Path, command: tuple[str, ...], text: str, last: str
) -> None:
    (tmp_path / "inner.py").write_text("raise ValueError('from far inside')\n")
    file = tmp_path / "mine.py"
    file.write_text(text)
    with running(*command, str(file), env={"PYTHONPATH": str(tmp_path)}) as worker:
        worker.wait_for(f"gpu-byoc {command[0]}: {file} cannot be used: the mistake is in its code")
        worker.wait_for(f'File "{file}", line 1')
        worker.wait_for(last)
        assert worker.popen.wait(30) == 2
    frames = [line for line in worker.log if line.startswith("  File ")]
    assert all(str(tmp_path) in line for line in frames), frames
    assert worker.log[-1] == last


@pytest.mark.parametrize("command", [("serve",), ("run", "processor.py")], ids=["serve", "run"])
def test_a_wrong_flag_is_two_lines_and_none_is_abbreviated(command: tuple[str, ...]) -> None:
    with running(*command, "--back", "numpy") as worker:
        assert worker.popen.wait(30) == 2
    usage = {"serve": "gpu-byoc serve [options]", "run": "gpu-byoc run FILE [options]"}[command[0]]
    assert worker.log == [f"usage: {usage}", f"gpu-byoc {command[0]}: error: unrecognized arguments: --back numpy"]


@pytest.mark.parametrize(
    "command", ["bench", "config", "demo", "doctor", "health", "job", "stream", "trickle", "verify"]
)
def test_no_command_takes_half_a_flag(command: str) -> None:
    with running(command, "--hel") as process:
        assert process.popen.wait(30) == 2
    assert "error: " in process.log[-1]


def test_help_says_a_default_where_there_is_one() -> None:
    with running("serve", "--help") as worker:
        assert worker.popen.wait(30) == 0
    text = " ".join(" ".join(worker.log).split())
    assert "[GPU_BYOC_PORT] (default: 8000)" in text
    assert "[GPU_BYOC_MAX_STREAMS]" in text
    assert "(default: None)" not in text
    assert "(default: )" not in text


def test_a_variable_that_nothing_reads_is_named_at_the_start() -> None:
    env = {"GPU_BYOC_SLOT": "4", "GPU_BYOC_ZZZZ": "1", "GPU_BYOC_SLOTS": "0", "GPU_BYOC_REGISTER_SECONDS": "9"}
    with running("serve", "--host", "127.0.0.1", "--port", "0", env=env) as worker:
        worker.wait_for("--slots must be at least 1")
        assert worker.popen.wait(30) == 2
    named = "GPU_BYOC_SLOT (did you mean GPU_BYOC_SLOTS?), GPU_BYOC_ZZZZ"
    assert worker.log[0] == f"WARNING: environment variables that nothing reads: {named}"


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
        "import asyncio, pathlib, time\n"
        "from gpu_byoc import FrameProcessor, run_processor\n"
        "class Loads(FrameProcessor):\n"
        "    async def initialize(self):\n"
        "        print('loading', flush=True)\n"
        "        while not pathlib.Path(__file__).with_name('over').exists():\n"
        "            time.sleep(0.01)\n"
        f"asyncio.run(run_processor(Loads(), port={port}, host='127.0.0.1'))\n"
    )
    with running(program=(str(file),)) as worker:
        worker.wait_for("loading")
        assert get(port, "/health") == (503, {"status": "LOADING"})
        assert post(port, "/", b"abc")[0] == 503
        worker.popen.send_signal(signal.SIGTERM)
        worker.wait_for("stopping: 0 jobs")
        (tmp_path / "over").touch()
        assert worker.popen.wait(30) == 0
        worker._reader.join(30)
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
