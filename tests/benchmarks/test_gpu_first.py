"""``benchmarks/gpu_first.sh`` with a Python that fails, hangs and is well in turn: no step costs another its turn."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_first.sh"

PYTHON = """#!/bin/sh
case "$*" in
*doctor*) echo "all is well" ;;
*cupy*) echo "cupy has no GPU"; exit 3 ;;
*torch*) exec sleep 50 ;;
esac
"""


def first(folder: Path, *steps: str, seconds: int) -> tuple[int, list[str]]:
    """Exit status and the lines of summary.txt."""
    python = folder / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    done = subprocess.run(
        ["sh", SCRIPT, "out", *steps],
        cwd=folder,
        env={**os.environ, "PYTHON": str(python), "SECONDS_IN_ALL": str(seconds)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    return done.returncode, (folder / "out" / "summary.txt").read_text().splitlines()


def test_a_step_that_fails_is_named_and_the_next_one_begins(tmp_path: Path) -> None:
    status, told = first(tmp_path, "verify-cupy", "nonsense", "doctor", seconds=100)
    assert status == 1
    assert [line.partition(",")[0] for line in told] == [
        "verify-cupy: exit status 3",
        "nonsense: there is no such step",
        "doctor: well",
    ]
    assert told[0].endswith("cupy has no GPU")
    assert (tmp_path / "out" / "doctor.log").read_text() == "all is well\n"


def test_a_step_that_hangs_is_stopped_when_the_time_is_over(tmp_path: Path) -> None:
    status, told = first(tmp_path, "verify-torch", "doctor", seconds=4)
    assert status == 1
    assert told[0].startswith("verify-torch: stopped after")
    assert told[1] == "doctor: not begun, the time is over"


def test_steps_that_are_well(tmp_path: Path) -> None:
    status, told = first(tmp_path, "doctor", "tests", "quick", "figures", "kernels", "whole-verify", seconds=100)
    assert status == 0
    assert len(told) == 6
