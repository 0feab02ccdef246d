"""The CPU image as containers, for real. Run by ``make images-test``, which builds the image first.

``GPU_BYOC_TEST_IMAGE`` names the image; without it nothing here runs, and that is said once.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from docker import images
from tests.support.containers import HARDENED, ROOT, Container, Engine, find_engine
from tests.support.processes import example, free_port, get, post

IMAGE = os.environ.get("GPU_BYOC_TEST_IMAGE", "")
if not IMAGE:
    pytest.skip("no image: make images-test builds it and runs these", allow_module_level=True)

DOCKER_PAGE = (ROOT / "docs/docker.md").read_text(encoding="utf-8")
FRAME = bytes(640 * 480 * 3)
TINTED = 640 * 480 * 80

SLOW = """
import asyncio
from gpu_byoc import FrameProcessor, run_processor

class Slow(FrameProcessor):
    async def process(self, frame):
        await asyncio.sleep(0.5)
        return frame

asyncio.run(run_processor(Slow()))
"""


@pytest.fixture(scope="module")
def engine() -> Engine:
    return find_engine()


def serve(port: int) -> tuple[str, ...]:
    return "serve", "--host", "127.0.0.1", "--port", str(port)


def healthy(container: Container, port: int) -> bool:
    return container.run("gpu-byoc", "health", "--url", f"http://127.0.0.1:{port}").returncode == 0


# --- what is in it


def test_it_says_how_it_is_run(engine: Engine) -> None:
    config = engine.config(IMAGE)
    assert config["Entrypoint"] == ["gpu-byoc"]
    assert config["Cmd"] == ["serve"]
    assert config["User"] == "10001:10001"
    assert config["StopSignal"] == "SIGTERM"
    assert list(config["ExposedPorts"]) == ["8000/tcp"]
    assert config["Healthcheck"]["Test"] == ["CMD", "gpu-byoc", "health"]


def test_its_labels_say_what_it_was_made_from(engine: Engine) -> None:
    prefix = "org.opencontainers.image."  # the builder may sign with another
    said = engine.config(IMAGE)["Labels"].items()
    labels = {name.removeprefix(prefix): text for name, text in said if name.startswith(prefix)}
    version = engine.run(IMAGE, "--version").stdout.split()[-1]
    assert labels["version"] == version
    assert labels["licenses"] == "MIT"
    assert labels["base.name"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    if head.returncode == 0:
        assert labels["revision"].removesuffix("-changed") == head.stdout.strip()
    known = {name.removeprefix("org.opencontainers.image.") for name in images.labels()}
    assert labels.keys() == known | {"title", "description", "licenses", "base.name"}
    assert labels.get("source", "https://").startswith(("https://", "http://"))
    assert not {"", "unknown"} & set(labels.values())


def test_it_adds_less_than_300_mb_to_its_base() -> None:
    asked = [sys.executable, str(ROOT / "docker/images.py"), "sizes", "cpu"]
    size = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    assert 50 < size["added_mb"] < 300
    assert size["mb"] == pytest.approx(size["base_mb"] + size["added_mb"])
    if size["base"] == images.STANDIN:  # which docs/docker.md's figures are of
        (said,) = re.findall(r"^\| `gpu-byoc:cpu` .*\| (\d+) MB \|$", DOCKER_PAGE, flags=re.M)
        assert size["added_mb"] == pytest.approx(int(said), abs=15)
        (below, whole) = re.findall(r"stand-in is (\d+) MB, the CPU image on it (\d+) MB", DOCKER_PAGE)[0]
        assert size["base_mb"] == pytest.approx(int(below), abs=15)
        assert size["mb"] == pytest.approx(int(whole), abs=25)


def test_it_holds_no_torch_no_compiler_no_cache(engine: Engine) -> None:
    look = (
        "import importlib.util, json, pathlib, shutil;"
        "print(json.dumps({"
        "'modules': [m for m in ('torch', 'cupy', 'triton', 'cv2', 'pytest', 'gpu_byoc')"
        " if importlib.util.find_spec(m)],"
        "'programs': [p for p in ('gcc', 'cc', 'g++', 'clang', 'make', 'nvcc') if shutil.which(p)],"
        "'caches': [str(p) for p in pathlib.Path('/').glob('*/.cache/pip')],"
        "'pip': importlib.util.find_spec('pip') is not None}))"
    )
    found = engine.run(IMAGE, "-c", look, options=("--entrypoint", "python"))
    assert json.loads(found.stdout) == {"modules": ["gpu_byoc"], "programs": [], "caches": [], "pip": False}


def test_its_versions_are_the_locks(engine: Engine) -> None:
    look = (
        "import importlib.metadata as m;"
        "found = m.distributions(path=['/opt/gpu-byoc/lib/python3.11/site-packages']);"
        "print(*(f'{d.name}=={d.version}' for d in found))"
    )
    said = engine.run(IMAGE, "-c", look, options=("--entrypoint", "python")).stdout.split()
    held = {each.lower().replace("_", "-") for each in said}
    lock = (ROOT / "docker/cpu.lock").read_text(encoding="utf-8")
    locked = {line.split()[0] for line in lock.splitlines() if "==" in line}
    assert {each for each in held if not each.startswith("gpu-byoc==")} == locked


def test_all_of_it_has_bytecode(engine: Engine) -> None:
    """A container that may write nothing compiles at every start what was not compiled before."""
    look = (
        "import sys; from importlib.util import cache_from_source; from pathlib import Path;"
        "import gpu_byoc.worker.serve, gpu_byoc.cli;"
        "print([m.__name__ for m in list(sys.modules.values()) if (getattr(m, '__file__', None) or '').endswith('.py')"
        " and not Path(cache_from_source(m.__file__)).exists()])"
    )
    assert engine.run(IMAGE, "-c", look, options=("--entrypoint", "python")).stdout.strip() == "[]"


def test_a_secret_of_the_build_is_in_no_layer(engine: Engine, tmp_path: Path) -> None:
    """The canary is a comment in the pip.conf that the builder gets; the whole image is searched for it."""
    canary = "canary-5c1f0e7d"
    (tmp_path / "pip.conf").write_text(f"# {canary}\n")
    (tmp_path / "Dockerfile").write_text(
        f"FROM {IMAGE}\nUSER root\n"
        f"RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf grep -q canary /etc/pip.conf && touch /seen\n"
    )
    tag = f"gpu-byoc-test:{os.getpid()}"
    secret = ("--secret", f"id=pip_conf,src={tmp_path / 'pip.conf'}")
    try:
        engine.say("build", *engine.build, *secret, "-t", tag, str(tmp_path))
        assert engine.run(tag, "-c", "test -e /seen", options=("--entrypoint", "sh")).returncode == 0
        look = f"grep -rqs {canary} / --exclude-dir=proc --exclude-dir=sys; test $? -eq 1"
        assert engine.run(tag, "-c", look, options=("--entrypoint", "sh", "--user", "root")).returncode == 0
        assert canary not in engine.say("history", "--no-trunc", tag)
    finally:
        engine.call("image", "rm", "--force", tag)
    ours = (ROOT / "docker/Dockerfile.cpu").read_text(encoding="utf-8")
    assert "--mount=type=secret,id=pip_conf,target=/etc/pip.conf" in ours


# --- what it does


def test_it_serves_green_tint_unless_told_otherwise(engine: Engine) -> None:
    port = free_port()
    options = ("--env", f"GPU_BYOC_PORT={port}", "--env", "GPU_BYOC_HOST=127.0.0.1")
    with engine.start(IMAGE, options=options) as worker:
        worker.wait_for(f"Trickle server listening on port {port}")
        report = get(port, "/api/stream/status")[1]
        assert (report["processor"], report["backend"]["degraded"]) == ("green_tint", [])
        status, body = post(port, "/live/video-to-video", FRAME)
        assert (status, len(body), sum(body[1::3]), sum(body[0::3])) == (200, len(FRAME), TINTED, 0)
        # the check of the image itself, as the engine runs it
        check = engine.config(IMAGE)["Healthcheck"]["Test"][1:]
        assert worker.run(*check).returncode == 0
        assert worker.stop()[0] == 0


def test_its_health_check_fails_without_a_worker(engine: Engine) -> None:
    assert engine.run(IMAGE, "health").returncode == 1


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("--version",), "gpu-byoc "),
        (("livepeer", "-version"), "gpu-byoc livepeer "),
        (("backends",), "numpy        opens"),
        (("usage", "-datadir", "/data"), ""),
        (("serve", "--backend", "cupy"), "pip install cupy-cuda12x"),
    ],
)
def test_any_command_can_follow(engine: Engine, command: tuple[str, ...], says: str) -> None:
    done = engine.run(IMAGE, *command, options=HARDENED)
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_the_pages_processor_is_mounted(engine: Engine) -> None:
    port = free_port()
    mount = ("--volume", f"{example('processor.py')}:/app/processor.py:ro")
    run = ("run", "/app/processor.py", "--host", "127.0.0.1", "--port", str(port))
    with engine.start(IMAGE, *run, options=(*mount, *HARDENED)) as worker:
        worker.wait_for("INFO: GreenTintProcessor: initialised")
        worker.wait_for(f"INFO: Trickle server listening on port {port}")
        status, body = post(port, "/live/video-to-video", FRAME)
        assert (status, sum(body[1::3])) == (200, TINTED)
        assert worker.stop()[0] == 0
        worker.wait_for("GreenTintProcessor: shutdown")


def test_the_pages_processor_is_built_on_top_in_four_lines(engine: Engine, tmp_path: Path) -> None:
    recipe = (ROOT / "examples/docker/Dockerfile").read_text(encoding="utf-8")
    assert len(recipe.splitlines()) == 4
    (tmp_path / "Dockerfile").write_text(recipe.replace("gpu-byoc:cpu", IMAGE))
    (tmp_path / "processor.py").write_bytes(example("processor.py").read_bytes())
    tag, port = f"gpu-byoc-test-page:{os.getpid()}", free_port()
    try:
        engine.say("build", *engine.build, "-t", tag, str(tmp_path))
        options = ("--env", f"GPU_BYOC_PORT={port}", "--env", "GPU_BYOC_HOST=127.0.0.1", *HARDENED)
        with engine.start(tag, options=options) as worker:
            worker.wait_for("Trickle server listening")
            assert sum(post(port, "/green-tint-cpu", FRAME)[1][1::3]) == TINTED
    finally:
        engine.call("image", "rm", "--force", tag)


def test_the_pages_three_containers(engine: Engine) -> None:
    """compose.yaml's services, the page's own client, the ledger on its volume, and an orderly end."""
    done = subprocess.run(
        [sys.executable, ROOT / "docker/smoke.py"], capture_output=True, text=True, timeout=55, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Green channel sum: 24576000 (input was 0)" in done.stdout


# --- as whom, and within what


def test_it_runs_as_nobody_special_and_writes_nowhere(engine: Engine) -> None:
    port = free_port()
    with engine.start(IMAGE, *serve(port), options=HARDENED) as worker:
        worker.wait_for("Trickle server listening")
        status = dict(line.split(":", 1) for line in worker.run("cat", "/proc/1/status").stdout.splitlines())
        assert status["Uid"].split() == status["Gid"].split() == ["10001"] * 4
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
        assert status["NoNewPrivs"].strip() == "1"
        for folder in ("/", "/data", "/opt/gpu-byoc"):
            assert worker.run("touch", f"{folder}/x").returncode != 0
        assert post(port, "/", FRAME)[0] == 200
        assert healthy(worker, port)
        assert worker.stop()[0] == 0
        assert not any("Traceback" in line for line in worker.log)


def test_its_home_can_be_written_to_where_the_root_can(engine: Engine) -> None:
    done = engine.run(IMAGE, "-c", "touch ~/x && echo ~", options=("--entrypoint", "sh"))
    assert done.stdout.strip() == "/data", done.stderr


def test_sigterm_under_load_finishes_what_was_begun(engine: Engine, tmp_path: Path) -> None:
    """Eight callers without a pause: what was taken in is answered, what comes later is told to go elsewhere."""
    port, file = free_port(), tmp_path / "slow.py"
    file.write_text(SLOW)
    mount = ("--volume", f"{file}:/app/processor.py:ro")
    run = ("run", "/app/processor.py", "--host", "127.0.0.1", "--port", str(port))
    answers: Counter[str] = Counter()
    gone = threading.Event()

    def caller() -> None:
        while not gone.is_set():
            try:
                status, body = post(port, "/", b"abc" * 100)
            except OSError as error:
                answers[type(error).__name__] += 1
                gone.set()
            else:
                answers[str(status)] += 1
                assert status == 503 or body == b"abc" * 100

    with engine.start(IMAGE, *run, options=(*mount, *HARDENED)) as worker:
        worker.wait_for("Trickle server listening")
        with ThreadPoolExecutor(8) as pool:
            callers = [pool.submit(caller) for _ in range(8)]
            while answers["200"] < 4:
                assert not any(each.done() for each in callers), answers
                time.sleep(0.01)  # answers are counted, not announced
            code, took = worker.stop()
            gone.set()
            for each in callers:
                each.result(30)
        assert code == 0, worker.log
        assert took < 10, "killed, not drained"
        worker.wait_for("stopping: 8 jobs")
        worker.wait_for("stopped: 0 jobs unfinished")
        assert answers["503"] > 0, answers
        print(f"drained in {took:.1f} s; {dict(answers)}")


def test_a_command_that_is_no_server_ends_on_sigterm_too(engine: Engine) -> None:
    """The first process of a container ignores signals that it does not handle."""
    with engine.start(IMAGE, "stream", "--seconds", "60") as client:
        client.wait_for("")
        _, took = client.stop()
        assert took < 8


def test_a_memory_limit_is_kept_and_what_does_not_fit_is_told_so(engine: Engine) -> None:
    """Sixteen callers with 4K frames, of which one fits at a time. A worker that did not know the limit is killed."""
    port, frame = free_port(), bytes(3840 * 2160 * 3)
    geometry = {"X_Frame_Width": "3840", "X_Frame_Height": "2160"}
    with engine.start(IMAGE, *serve(port), options=("--memory", "176m", *HARDENED)) as worker:
        assert "frames may take 40 MiB" in worker.wait_for("memory limit is 176 MiB")
        worker.wait_for("Trickle server listening")
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: post(port, "/", frame, **geometry), range(48)))
        statuses = Counter(status for status, _ in answers)
        assert set(statuses) == {200, 503}
        assert all(json.loads(body)["error"] == "overloaded" for status, body in answers if status == 503)
        status, body = post(port, "/", frame * 2, **geometry)
        assert (status, json.loads(body)["error"]) == (413, "too_large")
        assert post(port, "/", FRAME)[0] == 200, "it lives on"
        assert worker.ask(".State.OOMKilled") == "false"
        assert worker.stop()[0] == 0
        print(f"{dict(statuses)}, then {status}: {json.loads(body)['message']}")


def test_a_limit_that_is_too_low_is_one_clear_line(engine: Engine) -> None:
    done = engine.run(IMAGE, "serve", options=("--memory", "128m"))
    assert done.returncode == 2
    assert "memory limit is 128 MiB, and a worker needs at least 160: raise it" in done.stderr
    assert "Traceback" not in done.stderr
