"""Every benchmark once, tiny; what the runner does with those that fail; the command."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import runner
from benchmarks.harness import Sheet, Size, Skip
from benchmarks.registry import GROUPS, Group
from benchmarks.schema import load, problems

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("group", [each for each in GROUPS if not each.asked], ids=lambda group: group.name)
def test_every_benchmark_runs(group: Group) -> None:
    result = runner.measure([group], Size.TINY, runner.Quiet())
    assert problems(result) == []
    rows = result["groups"][group.name]["rows"]
    assert [row for row in rows if "failed" in row] == []
    assert [row for row in rows if "skipped" not in row]


def test_names_of_groups_and_pictures_are_their_own() -> None:
    assert len({group.name for group in GROUPS}) == len(GROUPS)
    plots = [plot.name for group in GROUPS for plot in group.plots]
    assert len(set(plots)) == len(plots)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_every_group_can_be_loaded(group: Group) -> None:
    assert callable(group.load())


class Given(Group):
    """A group that is a function of this test."""

    work: Callable[[Sheet], None]

    def load(self) -> Callable[[Sheet], None]:
        return self.work


def given(name: str, work: Callable[[Sheet], None]) -> Group:
    group = Given(name, name.capitalize(), "Does it?", "none")
    object.__setattr__(group, "work", work)
    return group


def rows_of(*groups: Group) -> dict[str, list[dict[str, Any]]]:
    result = runner.measure(groups, Size.TINY, runner.Quiet())
    assert problems(result) == []
    return {name: entry["rows"] for name, entry in result["groups"].items()}


def test_a_group_that_breaks_keeps_its_rows_and_the_others_run() -> None:
    def breaks(sheet: Sheet) -> None:
        sheet.row("first", p50_us=1.0)
        raise RuntimeError("no such server")

    found = rows_of(given("a", breaks), given("b", lambda sheet: sheet.row("second", p50_us=2.0)))
    assert found["a"][0] == {"name": "first", "p50_us": 1.0}
    assert found["a"][1]["name"] == "a, from here on"
    assert "RuntimeError: no such server (test_run.py:" in found["a"][1]["failed"]
    assert found["b"] == [{"name": "second", "p50_us": 2.0}]


def test_a_group_that_this_machine_cannot_run_says_why() -> None:
    def skips(sheet: Sheet) -> None:
        raise Skip("there is no GPU: run it where there is one")

    assert rows_of(given("a", skips)) == {"a": [{"name": "a", "skipped": "there is no GPU: run it where there is one"}]}


def test_an_interrupt_keeps_what_was_measured() -> None:
    def interrupted(sheet: Sheet) -> None:
        sheet.row("first", p50_us=1.0)
        raise KeyboardInterrupt

    found = rows_of(given("a", interrupted), given("b", lambda sheet: sheet.row("second", p50_us=2.0)))
    assert found == {
        "a": [{"name": "first", "p50_us": 1.0}, {"name": "a, from here on", "failed": "interrupted"}],
        "b": [{"name": "b", "skipped": runner.NOT_BEGUN}],
    }


def test_a_figure_that_is_none_costs_its_row_only() -> None:
    def wrong(sheet: Sheet) -> None:
        sheet.row("first", jitter_ms=float("nan"))
        sheet.row("second", p50_us=2.0)

    first, second = rows_of(given("a", wrong))["a"]
    assert first == {"name": "first", "failed": "measured what no result file may hold: jitter_ms is nan"}
    assert second == {"name": "second", "p50_us": 2.0}


def test_what_there_is_after_each_group_is_handed_out_and_decides_nothing() -> None:
    kept: list[dict[str, Any]] = []
    groups = [given(name, lambda sheet: sheet.row("first", p50_us=1.0)) for name in ("a", "b")]
    runner.measure(groups, Size.TINY, runner.Quiet(), keep=lambda told: kept.append(copy.deepcopy(told)))
    assert [list(told["groups"]) for told in kept] == [["a"], ["a", "b"]]
    assert all(problems(told) == [] for told in kept)
    assert all(told["noise"]["too_noisy"] == [runner.NOT_OVER] for told in kept)


def test_a_group_that_is_left_out_says_why() -> None:
    never = given("a", lambda sheet: sheet.row("first", p50_us=1.0))
    result = runner.measure([never], Size.TINY, runner.Quiet(), {"a": "only when asked for"})
    assert result["groups"]["a"]["rows"] == [{"name": "a", "skipped": "only when asked for"}]


def test_a_quick_run_begins_no_group_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "QUICK_SECONDS", 0.0)
    late = given("a", lambda sheet: sheet.row("first", p50_us=1.0))
    (row,) = runner.measure([late], Size.QUICK, runner.Quiet())["groups"]["a"]["rows"]
    assert "two minutes" in row["skipped"]
    assert "p50_us" in runner.measure([late], Size.TINY, runner.Quiet())["groups"]["a"]["rows"][0]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def test_the_command_writes_a_result_and_says_what_it_skipped(tmp_path: Path) -> None:
    done = bench("--tiny", "--only", "copies,media", "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress where there is no terminal
    (data,) = (tmp_path / "out").glob("*.json")
    assert str(data) in done.stdout
    result = load(data)
    assert list(result["groups"]) == ["copies", "media"]
    assert result["machine"]["command"].endswith(
        f"-m benchmarks --tiny --only copies,media --output {tmp_path / 'out'}"
    )


def test_a_command_that_is_told_to_end_keeps_what_it_measured(tmp_path: Path) -> None:
    """The file is there as soon as the first group is over; SIGTERM comes while the second one runs."""
    command = (sys.executable, "-m", "benchmarks", "--tiny", "--only", "copies,capacity", "--output", str(tmp_path))
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            while not (found := [*tmp_path.glob("*.json")]):
                assert running.poll() is None
                time.sleep(0.02)
            assert list(load(found[0])["groups"]) == ["copies"]
            running.send_signal(signal.SIGTERM)
            out, err = running.communicate(timeout=120)
        finally:
            running.kill()
    assert running.returncode == 1, err
    assert load(found[0])["groups"]["capacity"]["rows"][-1]["failed"] == "interrupted"
    assert "FAILED: interrupted" in out


def test_the_command_refuses_what_is_no_benchmark() -> None:
    done = bench("--only", "copies,kernel")
    assert done.returncode == 2
    assert "no benchmark kernel; there are copies, kernels" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_output_that_cannot_be_written_is_said_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = bench("--tiny", "--only", "copies", "--output", str(tmp_path / "file" / "out"))
    assert done.returncode == 2
    assert f"{tmp_path / 'file'}" in done.stderr
    assert done.stdout == ""


def test_compare_and_report_are_part_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps({"schema": 9}))
    for command in (["compare", "old.json", "old.json"], ["report", "old.json"]):
        done = bench(command[0], *(str(tmp_path / name) for name in command[1:]))
        assert done.returncode == 2
        assert "is no result file of this program" in done.stderr


def test_the_package_is_imported_under_one_name_only(tmp_path: Path) -> None:
    (tmp_path / "gpu_byoc_benchmarks").symlink_to(ROOT / "benchmarks")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import benchmarks.harness; import gpu_byoc_benchmarks"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 1
    assert "ImportError: import benchmarks, not gpu_byoc_benchmarks" in done.stderr
