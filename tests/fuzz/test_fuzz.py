"""The hunt in short: what was ever found is replayed, and a few inputs more, the same ones in each run. What is new is
for ``make fuzz`` to find, so that what this says is about the code that changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import seeds
from tests.fuzz.hunt import CORPUS, PEAK, Died, Finding, corpus, hunt

SECONDS, CHANGED = 1.0, 12


@pytest.mark.parametrize("name", seeds.NAMES)
def test_no_crash_no_hang_no_growth(name: str) -> None:
    inputs, packets = corpus(name) | seeds.made(name), name in ("ts", "stream")
    report = hunt(name, SECONDS, seeds=inputs, packets=packets, seed=1, rounds=1, changed=CHANGED)
    print(report)
    assert not report.findings, "\n".join(f"{each.kind}: {each.detail}" for each in report.findings)
    assert report.runs >= len(inputs)
    assert report.kinds >= 5, "the inputs reach more than the first check"


def test_the_corpus_is_small_and_of_these_targets() -> None:
    assert {folder.name for folder in CORPUS.iterdir()} <= {*seeds.NAMES}
    assert sum(path.stat().st_size for path in CORPUS.rglob("*.bin")) < 250_000


@pytest.mark.parametrize(
    ("word", "kind", "says"),
    [
        ("crash", "crash", "SIGSEGV"),
        ("hang", "hang", "no answer within 2 s"),
        ("raise", "wrong", "asked for"),
        ("peak", "growth", "MiB at this input"),
    ],
)
def test_the_hunt_sees_what_is_wrong(word: str, kind: str, says: str) -> None:
    inputs = {"fine": b"fine", "bad": word.encode()}
    report = hunt("crashing", 0, seeds=inputs, deadline=2.0, peak=90 << 20 if kind == "growth" else PEAK, rounds=1)
    (finding,) = report.findings
    assert (finding.kind, finding.data) == (kind, word.encode())
    assert says in finding.detail


def test_the_hunt_sees_growth() -> None:
    report = hunt("crashing", 10, seeds={"fine": b"fine", "bad": b"grow"}, most=1)
    (finding,) = report.findings
    assert finding.kind == "growth"
    assert "more than when it was warm" in finding.detail


def test_a_child_that_cannot_start_says_why() -> None:
    with pytest.raises(Died, match="KeyError"):
        hunt("none", 0, seeds={"a": b"a"})


def test_a_finding_is_saved_under_its_kind_once(tmp_path: Path) -> None:
    paths = {Finding("ts", "hang", "x", b"data").save(tmp_path) for _ in range(2)}
    assert [path.read_bytes() for path in paths] == [b"data"]
