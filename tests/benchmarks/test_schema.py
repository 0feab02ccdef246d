"""Result files: what is one, what is none, and old ones."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.schema import SCHEMA, load, problems
from gpu_byoc.errors import ConfigError
from tests.support.reports import report

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
TABLES = [path for path in sorted(RESULTS.glob("*.json")) if "soak" not in path.name]  # a soak has no rows


def test_a_report_is_one() -> None:
    assert problems(report()) == []


def spoil(place: str, value: Any) -> dict[str, Any]:
    """A good report with one thing changed; ``place`` is a path of keys, ``value`` ... takes it away."""
    spoiled = copy.deepcopy(report())
    inner: Any = spoiled
    *path, last = place.split("/")
    for key in path:
        inner = inner[int(key) if isinstance(inner, list) else key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return spoiled


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("schema", 3, "schema is 3, and this is version 2"),
        ("schema", ..., "file: schema is missing"),
        ("size", "huge", "size is 'huge'"),
        ("machine/cores", "two", "machine: cores is str"),
        ("machine/cores", True, "machine: cores is bool"),
        ("machine/commit", ..., "machine: commit is missing"),
        ("noise/too_noisy", ..., "noise: too_noisy is missing"),
        ("groups/jobs/rows", {}, "jobs: rows is dict"),
        ("groups/jobs/rows/0/name", ..., "jobs: row 0 has no name"),
        ("groups/jobs/rows/0/name", "worker, 4 connections", "a second row of this name"),
        ("groups/jobs/rows/0/p50_us", float("nan"), "p50_us is nan"),
        ("groups/jobs/rows/0/p50_us", float("inf"), "p50_us is inf"),
        ("groups/jobs/rows/0/p50_us", [1], "p50_us is [1]"),
        ("groups/jobs/rows/0/unstable", False, "unstable is true, or not there"),
        ("groups/jobs/rows/2/spread", ..., "not by how much"),
        ("groups/jobs/rows/3/p50_us", 1.0, "a name and the reason, nothing else"),
        ("groups/jobs/rows/3/skipped", 7, "a name and the reason, nothing else"),
    ],
)
def test_what_is_wrong_is_named(place: str, value: Any, words: str) -> None:
    (found,) = problems(spoil(place, value))
    assert words in found


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_what_is_committed_can_be_read(path: Path) -> None:
    assert load(path)["groups"]


def test_version_1_is_brought_to_todays_form(tmp_path: Path) -> None:
    old = {
        "schema": 1,
        "machine": {
            "cpu": "x",
            "cores": 2,
            "memory_gib": 4.0,
            "gpu": None,
            "python": "3.11.7",
            "versions": {},
            "commit": "abc",
            "command": "python",
        },
        "unix_time": 1,
        "quick": True,
        "jobs": [{"target": "worker", "connections": 4, "p50_us": 1.0, "p50_ratio": 2.0}],
        "live": [{"what": "a GPU", "not_run": "there is none"}],
    }
    (tmp_path / "old.json").write_text(json.dumps(old))
    new = load(tmp_path / "old.json")
    assert (new["schema"], new["upgraded_from"], new["size"]) == (SCHEMA, 1, "quick")
    (job,) = new["groups"]["jobs"]["rows"]
    assert job["name"] == "worker, 4 connections"
    assert job["p50_times_echo"] == 2.0
    assert new["groups"]["live"]["rows"] == [{"name": "a GPU", "skipped": "there is none"}]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"schema": 9, "machine": {}}', '{"machine": {}}', '{"machine": 3}'])
def test_other_files_are_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"other\.json"):
        load(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.json"):
        load(tmp_path / "gone.json")
