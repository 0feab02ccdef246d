"""The wheel holds what the tree holds: a file that is missing from it would be found only by those who install it."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "gpu_byoc": "gpu_byoc",
    "backends": "gpu_byoc_backends",
    "benchmarks": "gpu_byoc_benchmarks",
}  # folder, name
MADE = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because setuptools leaves folders behind; without isolation, so without a package index."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=MADE)
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (made,) = (copy / "dist").glob("*.whl")
    return made


def test_the_wheel_holds_every_module_and_the_clip(wheel: Path) -> None:
    wanted = {
        f"{PACKAGES[top]}/{path.relative_to(ROOT / top).as_posix()}"
        for top in PACKAGES
        for pattern in ("*.py", "py.typed", "*.mp4", "*.md", "*.css")
        for path in (ROOT / top).rglob(pattern)
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert wanted - held == set()
    assert {name.split("/")[0] for name in held} == set(PACKAGES.values())


def test_the_wheel_registers_command_and_backends(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (listed,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        points = configparser.ConfigParser(delimiters="=")
        points.read_string(archive.read(listed).decode())
    assert set(points["gpu_byoc.backends"]) == {"numpy", "torch", "cupy"}
    assert points["console_scripts"]["gpu-byoc"] == "gpu_byoc.cli:main"


def test_the_wheel_needs_neither_torch_nor_cuda(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (listed,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        headers = archive.read(listed).decode().partition("\n\n")[0].splitlines()
    needs = [
        line.split(": ", 1)[1] for line in headers if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    assert needs
    assert not [line for line in needs if line.startswith(("torch", "cupy", "nvidia"))]
