"""A CUDA image as containers. Without a GPU: what it holds, what it says, and that its compiler works.

``GPU_BYOC_TEST_CUDA_IMAGE`` names the image; without it nothing here runs, and that is said once. With
``GPU_BYOC_TEST_GPU=1`` (``make images-test-gpu``) the backends are verified and measured inside it, on the GPUs.
"""

from __future__ import annotations

import json
import os

import pytest

from tests.support.containers import HARDENED, Engine, find_engine
from tests.support.processes import free_port, get, post

IMAGE = os.environ.get("GPU_BYOC_TEST_CUDA_IMAGE", "")
if not IMAGE:
    pytest.skip(
        "no CUDA image: .ci/run builds the small one and runs these, make images-test-gpu the full one",
        allow_module_level=True,
    )

GPU = os.environ.get("GPU_BYOC_TEST_GPU") == "1"
LIBRARIES = ("cupy",) if IMAGE.endswith("-cupy") else ("torch",) if IMAGE.endswith("-torch") else ("cupy", "torch")
PYTHON = ("--entrypoint", "python", *HARDENED)

COMPILE = """
from cupy.cuda import nvrtc
from gpu_byoc.processors._green_tint_cuda import SOURCE
program = nvrtc.createProgram(SOURCE, "green_tint.cu", (), ())
nvrtc.compileProgram(program, ("-arch=sm_90", "--std=c++17"))
print(len(nvrtc.getCUBIN(program)))
"""

CUBINS = """
from gpu_byoc.processors import _cubins, _green_tint_cuda
for capability in _cubins.CAPABILITIES:
    path = _cubins.file_of("green_tint", _green_tint_cuda.SOURCE, capability)
    print(capability, path.read_bytes()[:4] == b"\\x7fELF")
"""


@pytest.fixture(scope="module")
def engine() -> Engine:
    return find_engine()


def test_it_asks_for_the_driver(engine: Engine) -> None:
    config = engine.config(IMAGE)
    said = dict(each.split("=", 1) for each in config["Env"])
    assert said["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert said["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility,video"
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["gpu-byoc"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_its_libraries_import_without_a_driver(engine: Engine, library: str) -> None:
    done = engine.run(IMAGE, "-c", f"import {library}; print({library}.__version__)", options=PYTHON)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif("cupy" not in LIBRARIES, reason="this image has no cupy")
def test_its_compiler_works_where_nothing_can_be_written(engine: Engine) -> None:
    done = engine.run(IMAGE, "-c", COMPILE, options=PYTHON)
    assert int(done.stdout) > 1000, done.stderr


@pytest.mark.skipif("cupy" not in LIBRARIES, reason="this image has no cupy")
def test_its_kernels_are_compiled_for_the_common_gpus(engine: Engine) -> None:
    done = engine.run(IMAGE, "-c", CUBINS, options=PYTHON)
    assert done.stdout.splitlines() == ["80 True", "86 True", "89 True", "90 True"], done.stderr


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_without_a_driver_it_says_so_in_one_line_and_runs_on_numpy(engine: Engine) -> None:
    port = free_port()
    with engine.start(IMAGE, "serve", "--host", "127.0.0.1", "--port", str(port), options=HARDENED) as worker:
        line = worker.wait_for("backend numpy on cpu")
        assert "no NVIDIA driver here (libcuda.so.1 is missing): start the container with --gpus all" in line
        worker.wait_for("Trickle server listening")
        assert post(port, "/", bytes(640 * 480 * 3))[0] == 200
        assert get(port, "/api/stream/status")[1]["backend"]["degraded"]
        assert worker.stop()[0] == 0


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_without_a_driver_require_gpu_is_an_error(engine: Engine) -> None:
    done = engine.run(IMAGE, "serve", "--require-gpu", "yes", options=HARDENED)
    assert done.returncode == 2
    assert "no NVIDIA driver here" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_doctor_looks_at_it(engine: Engine) -> None:
    options = (*HARDENED, *(engine.gpus if GPU else ()))
    done = engine.run(IMAGE, "doctor", options=options)
    assert "driver" in done.stdout
    assert "Traceback" not in done.stderr
    print(done.stdout)


@pytest.mark.skipif(not GPU, reason="GPU_BYOC_TEST_GPU=1 says that there is one: make images-test-gpu")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("command", [("verify",), ("bench", "--quick")])
def test_on_a_gpu_the_backends_are_verified_and_measured(engine: Engine, command: tuple[str, ...]) -> None:
    done = engine.call("run", "--rm", *engine.run_options, *engine.gpus, IMAGE, *command, seconds=1150)
    print(done.stdout)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not GPU, reason="GPU_BYOC_TEST_GPU=1 says that there is one: make images-test-gpu")
@pytest.mark.parametrize("processor", ["green_tint", "grayscale"])  # with kernels of ours, and without
def test_on_a_gpu_the_first_frame_waits_for_no_compiler(engine: Engine, processor: str) -> None:
    port = free_port()
    run = ("serve", "--host", "127.0.0.1", "--port", str(port), "--require-gpu", "yes", "--processor", processor)
    with engine.start(IMAGE, *run, options=(*HARDENED, *engine.gpus)) as worker:
        worker.wait_for("Trickle server listening")
        status, _ = post(port, "/", bytes(640 * 480 * 3))
        assert status == 200
        totals = get(port, "/compute")[1]["device"]
        print(json.dumps(totals))
        assert totals["compute_seconds"] < 0.01, "a compiler takes 40 ms and more"
        assert worker.stop()[0] == 0
