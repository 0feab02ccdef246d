"""What a backend says where it cannot open: what is missing, and what to do about it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gpu_byoc_backends._driver import device_index, driver_problem, import_problem, nvrtc_package

# Asks in a process of its own, so that nothing this one has imported counts. None in sys.modules blocks a module.
_ASK = """
import json, sys
for name in {blocked!r}:
    sys.modules[name] = None
from importlib.metadata import entry_points
asked = {{}}
for entry in entry_points(group="gpu_byoc.backends"):
    cls = entry.load()
    asked[entry.name] = {{str(device): cls.available(device) for device in (None, "cpu", "cuda", "cuda:99", "abacus")}}
heavy = sorted(name for name in ("torch", "cupy") if sys.modules.get(name) is not None)
print(json.dumps([asked, heavy]))
"""


def ask(blocked: tuple[str, ...] = (), path: Path | None = None) -> tuple[dict[str, dict[str, str | None]], list[str]]:
    """``available`` of every backend for some devices, and which heavy modules that loaded."""
    head = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", head + _ASK.format(blocked=blocked)],
        capture_output=True,
        text=True,
        timeout=150,
        check=True,
    )
    assert run.stderr == "", "asking is silent"
    asked, heavy = json.loads(run.stdout)
    return asked, heavy


def test_without_torch_and_cupy_each_names_its_extra_and_imports_nothing() -> None:
    asked, heavy = ask(blocked=("torch", "cupy"))
    assert heavy == []
    for name in ("torch", "cupy"):
        for device in ("None", "cuda", "cuda:99"):
            assert f"{name} is not installed: pip install {name}" in (asked[name][device] or "")
    assert asked["numpy"]["None"] is asked["numpy"]["cpu"] is None


def test_every_backend_says_yes_or_names_a_cure() -> None:
    asked, _ = ask()
    cures = (
        "pip install",
        "--gpus all",
        "--device cpu",
        "--backend",
        "driver",
        "reboot",
        "nvidia-smi",
        "choose",
        "runs on",
    )
    for name, answers in asked.items():
        for device, answer in answers.items():
            assert answer is None or any(cure in answer for cure in cures), (name, device, answer)
        assert answers["abacus"] is not None


@pytest.mark.parametrize("name", ["torch", "cupy"])
def test_a_broken_installation_is_not_a_missing_one(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    asked, _ = ask(path=tmp_path)
    answer = asked[name]["cuda"]
    assert answer is not None
    assert f"{name} is installed but does not import (OSError: libcudart.so.12: cannot open" in answer
    assert "--force-reinstall" in answer


@pytest.mark.parametrize(
    ("device", "index"),
    [(None, 0), ("cuda", 0), ("cuda:0", 0), ("cuda:7", 7), ("cpu", None), ("cuda:", None), ("cuda:x", None), ("", 0)],
)
def test_device_names(device: str | None, index: int | None) -> None:
    assert device_index(device) == index


@pytest.mark.parametrize(
    ("cuda", "package"),
    [(12, "nvidia-cuda-nvrtc-cu12"), (13, "nvidia-cuda-nvrtc~=13.0"), (14, "nvidia-cuda-nvrtc~=14.0")],
)
def test_each_cuda_has_its_nvrtc(cuda: int, package: str) -> None:
    assert nvrtc_package(cuda) == package


def test_a_broken_installation_is_named_as_it_was_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """cupy is installed as cupy-cuda12x, cupy-cuda13x or cupy; another one beside it would break both."""
    (tmp_path / "broken_cupy").mkdir()
    (tmp_path / "broken_cupy" / "__init__.py").write_text("raise ImportError('libnvrtc.so.13')")
    info = tmp_path / "cupy_cuda13x-14.2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cupy-cuda13x\nVersion: 14.2.0\n")
    (info / "top_level.txt").write_text("broken_cupy\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert (import_problem("broken_cupy") or "").endswith("pip install --force-reinstall cupy-cuda13x")


# --- the driver, whose library a stand-in plays


def driver(version: int = 12080, init: int = 0, devices: int = 1) -> Callable[[str], Any]:
    def answer(value: int) -> Callable[[Any], int]:
        def fill(reference: Any) -> int:
            reference._obj.value = value
            return 0

        return fill

    library = SimpleNamespace(
        cuDriverGetVersion=answer(version), cuInit=lambda flags: init, cuDeviceGetCount=answer(devices)
    )
    return lambda name: library


def missing(name: str) -> Any:
    raise OSError(name)


@pytest.mark.parametrize(
    ("load", "built_for", "index", "says"),
    [
        (missing, 12, 0, ["libcuda.so.1 is missing", "--gpus all", "Container Toolkit"]),
        (driver(12020), 13, 0, ["too old", "up to CUDA 12.2", "CUDA 13", "580.65 or later", "built for CUDA 12"]),
        (driver(12020), 99, 0, ["too old", "to one made for it"]),
        (driver(init=100), 12, 0, ["CUDA error 100", "--gpus all"]),
        (driver(init=803), 12, 0, ["CUDA error 803", "reboot"]),
        (driver(init=7), 12, 0, ["CUDA error 7", "nvidia-smi"]),
        (driver(devices=0), 12, 0, ["sees no GPU", "CUDA_VISIBLE_DEVICES"]),
        (driver(devices=2), 12, 2, ["cuda:2", "2 can be seen"]),
    ],
)
def test_what_is_wrong_with_the_driver(load: Any, built_for: int, index: int, says: list[str]) -> None:
    problem = driver_problem("torch", built_for, index, load)
    assert problem is not None
    for words in says:
        assert words in problem


@pytest.mark.parametrize(("version", "index"), [(12000, 0), (12080, 1), (13000, 0)])
def test_a_driver_that_is_new_enough(version: int, index: int) -> None:
    """Minor versions need not agree: a driver runs programs of its own CUDA major version and of older ones."""
    assert driver_problem("torch", 12, index, driver(version, devices=2)) is None
