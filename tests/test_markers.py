"""needs_cuda and needs_torch: a missing thing skips on a laptop and fails where it was promised."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONFTEST = ROOT / "tests" / "conftest.py"

# No GPU is visible to the driver's probe, and torch cannot be found, whatever this machine has.
WITHOUT = """
import conftest_of_ours as ours
ours.cuda_devices = lambda: 0
ours.has_torch = lambda: False
from conftest_of_ours import *
"""
TESTS = """
import pytest

@pytest.mark.needs_cuda
def test_gpu(): pass

@pytest.mark.needs_torch
@pytest.mark.parametrize("n", [1, 2])
def test_torch(n): pass

def test_plain(): pass
"""
INI = "[pytest]\nmarkers =\n needs_cuda\n needs_torch\n"


def outcome(folder: Path, **variables: str) -> str:
    (folder / "conftest_of_ours.py").write_text(CONFTEST.read_text(encoding="utf-8"), encoding="utf-8")
    for name, text in (("conftest.py", WITHOUT), ("test_it.py", TESTS), ("pytest.ini", INI)):
        (folder / name).write_text(text, encoding="utf-8")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("GPU_BYOC", "PYTEST"))}
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "--strict-markers", "-p", "no:cacheprovider"]
    return subprocess.run(
        command, cwd=folder, env=clean | variables, capture_output=True, text=True, timeout=150, check=False
    ).stdout


def test_what_is_missing_skips_and_says_where(tmp_path: Path) -> None:
    said = outcome(tmp_path)
    assert "1 passed, 3 skipped" in said
    assert re.search(r"SKIPPED \[1\] test_it\.py:\d+: no NVIDIA GPU here", said)
    assert re.search(r"SKIPPED \[2\] test_it\.py:\d+: torch is not installed \(make test TORCH=1 installs it\)", said)


@pytest.mark.parametrize(("variable", "counts"), [("CUDA", "1 passed, 2 skipped"), ("TORCH", "1 passed, 1 skipped")])
def test_what_was_promised_and_is_missing_fails(tmp_path: Path, variable: str, counts: str) -> None:
    said = outcome(tmp_path, **{f"GPU_BYOC_REQUIRE_{variable}": "1"})
    assert f"GPU_BYOC_REQUIRE_{variable}=1 says it must be there" in said
    assert counts in said
    assert " failed" in said or " error" in said
