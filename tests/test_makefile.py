"""The Makefile sets .venv up when it has to, and only then.

Runs the real Makefile, in a folder whose name has a space, with a Python that writes down what pip was asked for
instead of asking a package index.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {
    "help",
    "demo",
    "live",
    "test",
    "lint",
    "types",
    "format",
    "bench",
    "bench-quick",
    "bench-peers",
    "plot",
    "bench-live",
    "gpu-first",
    "soak",
    "soak-live",
    "fuzz",
    "chaos",
    "images",
    "images-test",
    "images-test-gpu",
    "sbom",
    "lock",
    "clean",
}

# Called as `python3`: answers the Makefile's questions, and `-m venv` makes a .venv whose python is PIP_RECORDER.
PYTHON3 = """#!/bin/sh
case "$*" in
    *-V*) echo "Python 3.11.0" ;;
    *"-m venv"*) rm -rf .venv; mkdir -p .venv/bin; cp recorder .venv/bin/python ;;
esac
"""
PIP_RECORDER = """#!/bin/sh
case "$*" in
    "-m pip "*) echo "$*" >> pip.log; [ ! -e offline ] || { echo "no route to the index"; exit 1; } ;;
    "-m pytest"*) echo "require torch: $GPU_BYOC_REQUIRE_TORCH" >> pytest.log ;;
esac
"""


class Checkout:
    """A folder with the Makefile and what it reads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, folder / name)
        for name, script in (("python3", PYTHON3), ("recorder", PIP_RECORDER)):
            (folder / name).write_text(script)
            (folder / name).chmod(0o755)

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        outer = ("MAKE", "MFLAGS", "GPU_BYOC", "ARGS", "PYTHON", "TORCH")  # what a make around the tests hands down
        clean = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
        return subprocess.run(
            ["make", "PYTHON=./python3", *arguments],
            cwd=self.folder,
            env=clean,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )

    def installs(self) -> list[str]:
        """What pip was asked for since the last call."""
        log = self.folder / "pip.log"
        asked = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [line.split("constraints.txt ", 1)[1] for line in asked]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    return Checkout(tmp_path / "with space")


RUN = ["setuptools", "--no-build-isolation --editable .[page]"]
DEV = ["--no-build-isolation --editable .[dev,bench,page]"]
TORCH = ["torch==2.13.0"]


def test_the_targets(checkout: Checkout) -> None:
    listed = re.findall(r"^ +make ([\w-]+) ", checkout.make().stdout, flags=re.MULTILINE)
    assert set(listed) == TARGETS


def test_installs_once(checkout: Checkout) -> None:
    first = checkout.make("test")
    assert first.returncode == 0, first.stderr
    assert checkout.installs() == RUN + DEV
    os.utime(checkout.folder / "pyproject.toml")  # touched, not changed
    again = checkout.make("test", "lint", "types")
    assert (again.returncode, checkout.installs()) == (0, [])


def test_the_demo_installs_only_what_runs(checkout: Checkout) -> None:
    checkout.make("demo")  # ends with an error: nothing was really installed
    assert checkout.installs() == RUN


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_pin_installs_again(checkout: Checkout, name: str) -> None:
    checkout.make("test")
    checkout.installs()
    with (checkout.folder / name).open("a") as pins:
        pins.write("# another line\n")
    checkout.make("test")
    assert checkout.installs() == RUN[1:] + DEV


def test_torch_only_when_asked(checkout: Checkout) -> None:
    checkout.make("test")
    assert not any("torch" in line for line in checkout.installs())
    checkout.make("test", "TORCH=1")
    assert checkout.installs() == TORCH
    checkout.make("test", "TORCH=1")
    assert checkout.installs() == []
    assert (checkout.folder / "pytest.log").read_text().splitlines() == [
        "require torch: ",
        "require torch: 1",
        "require torch: 1",
    ]


def test_a_moved_checkout_is_set_up_again(checkout: Checkout) -> None:
    checkout.make("test")
    checkout.installs()
    checkout.folder = checkout.folder.rename(checkout.folder.with_name("moved"))
    checkout.make("test")
    assert checkout.installs() == RUN + DEV


def test_a_python_that_is_gone_is_set_up_again(checkout: Checkout) -> None:
    checkout.make("test")
    checkout.installs()
    (checkout.folder / ".venv/bin/python").unlink()
    checkout.make("test")
    assert checkout.installs() == RUN + DEV


def test_a_failed_installation_says_why_and_is_tried_again(checkout: Checkout) -> None:
    (checkout.folder / "offline").touch()
    failed = checkout.make("test")
    assert failed.returncode != 0
    assert "no route to the index" in failed.stderr
    (checkout.folder / "offline").unlink()
    checkout.installs()
    assert checkout.make("test").returncode == 0
    assert checkout.installs() == RUN + DEV


def test_no_python(checkout: Checkout) -> None:
    failed = checkout.make("PYTHON=./python9", "test")
    assert failed.returncode != 0
    assert "there is no ./python9" in failed.stderr


@pytest.mark.parametrize(
    ("question", "words"),
    [("version_info", "3.11 is needed"), ("ensurepip", "apt install python3-venv")],
)
def test_an_unfit_python_is_named(checkout: Checkout, question: str, words: str) -> None:
    unfit = PYTHON3.replace("case", f'case "$*" in *{question}*) exit 1 ;; esac\ncase', 1)
    (checkout.folder / "python3").write_text(unfit)
    failed = checkout.make("test")
    assert failed.returncode != 0
    assert words in failed.stderr
    assert not (checkout.folder / ".venv").exists()


def test_clean_removes_what_make_made(checkout: Checkout) -> None:
    before = {path.name for path in checkout.folder.iterdir()}
    checkout.make("test")
    (checkout.folder / "demo-out").mkdir()
    for log in ("pip.log", "pytest.log"):
        (checkout.folder / log).unlink()
    assert checkout.make("clean").returncode == 0
    assert {path.name for path in checkout.folder.iterdir()} == before
