"""Two runs side by side: ratios, machines, the gate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.compare import compare, different, main
from benchmarks.metrics import metric
from gpu_byoc.errors import ConfigError
from tests.support.reports import report, row

Change = Callable[[dict[str, Any]], object]


def pair(before: dict[str, Any], after: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return report(jobs=[row("a", **before)]), report(jobs=[row("a", **after)])


@pytest.mark.parametrize(
    ("figure", "before", "after", "ratio"),
    [
        ("p50_us", 100.0, 50.0, 2.0),
        ("p50_us", 100.0, 200.0, 0.5),
        ("jobs_per_second", 100.0, 50.0, 0.5),
        ("jobs_per_second", 100.0, 200.0, 2.0),
        ("gb_per_s", 5.0, 10.0, 2.0),
        ("times_memcpy", 2.0, 1.0, 2.0),
        ("p50_times_echo", 2.0, 1.0, 2.0),
        ("of_ceiling", 0.5, 0.25, 0.5),
        ("cpu_seconds_per_million_frames", 100.0, 50.0, 2.0),
        ("streams_that_fit", 8, 4, 0.5),
        ("streams_that_fit", 3, 0, 0.0),
        ("lost", 0, 5, 0.0),
        ("lost", 0, 0, 1.0),
    ],
)
def test_a_ratio_above_one_is_an_advantage(figure: str, before: float, after: float, ratio: float) -> None:
    (line,) = compare(*pair({figure: before}, {figure: after})).lines
    assert (line.figure, line.ratio) == (figure, ratio)


def test_from_something_lost_to_nothing_no_ratio_can_be_said() -> None:
    (line,) = compare(*pair({"lost": 5}, {"lost": 0})).lines
    assert line.ratio is None
    assert compare(*pair({"lost": 5}, {"lost": 0})).under(0.9) == []


@pytest.mark.parametrize("name", ["connections", "batch", "streams", "windows", "spread", "floor_ms", "floor_mb_per_s"])
def test_what_is_no_achievement_is_not_compared(name: str) -> None:
    assert compare(*pair({name: 1.0}, {name: 2.0})).lines == []


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.sampled_from(["p50_us", "jobs_per_second"]))
def test_there_and_back_is_one(a: float, b: float, figure: str) -> None:
    (there,), (back,) = (compare(*pair({figure: x}, {figure: y})).lines for x, y in ((a, b), (b, a)))
    assert there.ratio is not None
    assert back.ratio is not None
    assert there.ratio * back.ratio == pytest.approx(1)


def test_tails_are_shown_and_judged_only_when_asked_for() -> None:
    slower = pair({"p50_us": 1.0, "p99_us": 1.0}, {"p50_us": 1.0, "p99_us": 9.0})
    assert [line.judged for line in compare(*slower).lines] == [True, False]
    assert compare(*slower).under(0.9) == []
    assert [line.figure for line in compare(*slower, asked=["p99_us"]).under(0.9)] == ["p99_us"]


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (row("a", p50_us=1.0), row("a", p50_us=9.0, unstable=True, spread=0.4), "jobs: a: unstable in B (±40%)"),
        (row("a", p50_us=1.0, unstable=True), row("a", p50_us=9.0), "jobs: a: unstable in A (±4%)"),
        (row("a", p50_us=1.0), {"name": "a", "skipped": "no GPU"}, "jobs: a: skipped in B (no GPU)"),
        (row("a", p50_us=1.0), {"name": "a", "failed": "wrong bytes"}, "jobs: a: failed in B (wrong bytes)"),
        (row("a", p50_us=1.0), row("b", p50_us=1.0), "jobs: a: only in A"),
    ],
)
def test_what_cannot_be_judged_is_listed(before: dict[str, Any], after: dict[str, Any], words: str) -> None:
    found = compare(report(jobs=[before]), report(jobs=[after]))
    assert words in found.unjudged
    assert found.under(0.9) == []


def test_a_figure_that_only_one_row_has_is_listed() -> None:
    found = compare(*pair({"p50_us": 1.0, "batch": 1}, {"gb_per_s": 1.0}))
    assert found.unjudged == ["jobs: a: p50 µs only in A", "jobs: a: GB/s only in B"]


def test_a_group_that_only_one_run_has() -> None:
    found = compare(report(jobs=[]), report(jobs=[], media=[row("a", cpu_ms=1.0)]))
    assert found.unjudged == ["media: a: only in B"]


def change(key: str, value: Any) -> Change:
    return lambda machine: machine.update({key: value})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (change("cpu", "other"), ["cpu: Intel(R) Xeon(R) Processor against other"]),
        (change("cores", 4), ["cores: 2 against 4"]),
        (change("memory_gib", 23.4), ["memory_gib: 24 against 23"]),
        (change("memory_gib", 23.6), []),
        (change("gpus", [{"name": "H100", "driver": "580", "memory_mib": 1}]), ["gpus: [] against ['H100']"]),
        (change("commit", "def"), []),
        (change("python", "3.12"), []),
    ],
)
def test_what_makes_another_machine(edit: Change, words: list[str]) -> None:
    other = report()["machine"]
    edit(other)
    assert different(report()["machine"], other) == words


def saved(tmp_path: Path, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    paths = []
    for name, each in (("a.json", before), ("b.json", after)):
        (tmp_path / name).write_text(json.dumps(each))
        paths.append(str(tmp_path / name))
    return paths


def test_two_machines_are_refused_unless_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = report()
    other["machine"]["cores"] = 64
    files = saved(tmp_path, report(), other)
    with pytest.raises(ConfigError, match=r"cores: 2 against 64.*--different-machines"):
        main(files)
    assert main([*files, "--different-machines"]) == 0
    assert "64 cores" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "after", "least", "status", "words"),
    [
        (row("a", p50_us=100.0), row("a", p50_us=100.0), "0.9", 0, "none of 1 figures is under 0.9"),
        (row("a", p50_us=100.0), row("a", p50_us=109.0), "0.9", 0, "none of 1 figures is under 0.9"),
        (row("a", p50_us=100.0), row("a", p50_us=150.0), "0.9", 1, "FAILED: jobs: a: p50 µs: 100 -> 150, 0.67 of A"),
        (row("a", p50_us=100.0), row("a", p50_us=999.0, unstable=True), "0.9", 1, "no stable row"),
        (row("a", p50_us=100.0), row("b", p50_us=100.0), "0.9", 1, "no stable row"),
        (row("a", p50_us=100.0), {"name": "a", "failed": "wrong bytes"}, "0.9", 1, "FAILED: jobs: a: wrong bytes"),
        ({"name": "a", "failed": "x"}, {"name": "a", "failed": "wrong bytes"}, "0.9", 1, "no stable row"),
    ],
)
def test_the_gate(
    before: dict[str, Any],
    after: dict[str, Any],
    least: str,
    status: int,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = saved(tmp_path, report(jobs=[before]), report(jobs=[after]))
    assert main([*files, "--fail-under", least]) == status
    assert words in capsys.readouterr().out


def test_the_gate_does_not_decide_on_a_noisy_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noisy = report(jobs=[row("a", p50_us=900.0)])
    noisy["noise"]["too_noisy"] = ["something else kept 1.5 cores busy"]
    files = saved(tmp_path, report(jobs=[row("a", p50_us=100.0)]), noisy)
    assert main([*files, "--fail-under", "0.9"]) == 3
    assert "UNDECIDED: B was measured on a machine that was too noisy" in capsys.readouterr().out
    assert main(files) == 0  # shown all the same


def test_the_gate_does_not_decide_between_a_look_and_a_full_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full, quick = (report(jobs=[row("a", p50_us=100.0)]) for _ in range(2))
    quick["size"] = "quick"
    assert main([*saved(tmp_path, full, quick), "--fail-under", "0.9"]) == 3
    assert "UNDECIDED: A is a full run and B a quick one" in capsys.readouterr().out


def test_an_old_file_is_read_and_says_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = report(jobs=[row("worker, 4 connections", p50_us=100.0, connections=4)])
    machine = {**new["machine"], "gpu": None}
    del machine["gpus"], machine["system"]
    old = {"schema": 1, "machine": machine, "jobs": [{"target": "worker", "connections": 4, "p50_us": 200.0}]}
    assert main(saved(tmp_path, old, new)) == 0
    out = capsys.readouterr().out
    assert "written as version 1: it does not say which rows were stable" in out
    assert "2.00" in out


@pytest.mark.parametrize(
    ("name", "head", "better"),
    [
        ("p50_us", "p50 µs", "lower"),
        ("trickle_p99_ms", "trickle p99 ms", "lower"),
        ("frames_per_second", "frames/s", "higher"),
        ("gb_per_s", "GB/s", "higher"),
        ("floor_mb_per_s", "floor MB/s", ""),
        ("times_memcpy", "x memcpy", "lower"),
        ("p50_times_echo", "p50 x echo", "lower"),
        ("something_new", "something new", ""),
    ],
)
def test_names_say_what_they_are(name: str, head: str, better: str) -> None:
    found = metric(name)
    assert (found.head, found.better) == (head, better)
