"""The score card says yes to backends that keep the contract, and finds each way to break it that it is there for."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gpu_byoc import cli
from gpu_byoc.backend import Backend
from gpu_byoc.checks import verify as module
from gpu_byoc.checks.rig import Subject
from gpu_byoc.checks.verify import CHECKS, FAILED, LOST, PASSED, SKIPPED, Row, card, verify
from gpu_byoc.errors import DeviceLost
from gpu_byoc.plugins import load_backend
from tests.backends.fake_cupy import StandInBackend
from tests.checks import flawed


def subject(make: Callable[[], Any], device: str | None = None, patience: float = 20.0) -> Subject:
    return Subject(getattr(make, "name", "subject"), make, device, patience)


def one(make: Callable[[], Any], check: str, patience: float = 20.0) -> Row:
    (row,) = verify(subject(make, patience=patience), True, [check])
    return row


@pytest.mark.parametrize("check", CHECKS)
def test_a_backend_that_keeps_the_contract_passes(check: str) -> None:
    row = one(flawed.Faithful, check)
    assert (row.result, row.detail) == (PASSED, "")
    assert row.count > 0


def test_numpy_passes_and_has_nothing_to_probe() -> None:
    rows = list(verify(subject(load_backend("numpy")), True))
    assert [row.result for row in rows] == [PASSED] * 8 + [SKIPPED]
    assert [row.check for row in rows] == list(CHECKS)


def test_the_cupy_backend_s_own_code_passes_on_streams_that_are_threads() -> None:
    """All but the shapes: the stand-in waits for each kernel, and there are hundreds of them."""
    assert [
        (row.check, row.result, row.detail)
        for row in verify(subject(StandInBackend), True, [name for name in CHECKS if name != "shapes"])
        if row.result != PASSED
    ] == []


@pytest.mark.needs_torch
def test_torch_passes_on_the_cpu() -> None:
    """All but what takes long: torch's threads and the machine's other ones are in one another's way."""
    checks = [name for name in CHECKS if name not in ("shapes", "overtaking")]
    rows = list(verify(subject(load_backend("torch"), "cpu"), True, checks))
    assert [(row.check, row.detail) for row in rows if row.result != PASSED] == []


@pytest.mark.needs_cuda
@pytest.mark.parametrize("name", ["torch", "cupy"])
def test_a_gpu_passes(name: str) -> None:
    backend = load_backend(name)
    if reason := backend.available("cuda"):
        pytest.fail(reason)
    rows = list(verify(subject(backend, "cuda"), True))
    assert [(row.check, row.detail) for row in rows if row.result != PASSED] == []


FLAWS: list[tuple[type[Backend], str, str]] = [
    (flawed.LastByteWrong, "shapes", "(1x1), row 0, column 0, channel 2"),
    (flawed.Wraps, "byte values", "254 instead of 255"),
    (flawed.Mixes, "in flight", "bytes differ"),
    (flawed.TooEarly, "in flight", "several batches on their way"),
    (flawed.ForgetsFrames, "in flight", "bytes differ"),
    (flawed.TooLate, "slot reuse", "slot"),
    (flawed.TooEarly, "slot reuse", "again and again"),
    (flawed.TooEarly, "overtaking", "a copy that overtakes"),
    (flawed.Spoils, "failures", "differ"),
    (flawed.Swallows, "failures", "makes the processor raise"),
    (flawed.TooLate, "cancels", ""),  # whichever of its jobs it hits
    (flawed.LosesTime, "meter", "a job cost 0 ns of computing"),
    (flawed.InventsTime, "meter", "ns of computing in"),
    (flawed.ProbeFails, "probes", "no answer"),
    (flawed.Dies, "cancels", "illegal address"),
    (flawed.DoesNotOpen, "shapes", "wake it"),
]


@pytest.mark.parametrize(("make", "check", "says"), FLAWS, ids=[f"{make.__name__}-{check}" for make, check, _ in FLAWS])
def test_a_flaw_is_found(make: type[Backend], check: str, says: str) -> None:
    row = one(make, check)
    assert row.result == (LOST if make is flawed.Dies else FAILED)
    assert says in row.detail
    assert row.detail


@pytest.mark.parametrize(("make", "check"), [(flawed.Hangs, "cancels"), (flawed.ProbeHangs, "probes")])
def test_what_hangs_has_failed(make: type[Backend], check: str) -> None:
    before = set(threading.enumerate())
    row = one(make, check, patience=0.3)
    assert (row.result, "0.3 seconds" in row.detail) == (FAILED, True), row
    assert row.seconds < 20, row
    for thread in set(threading.enumerate()) - before:  # what hangs here does so for seconds, not for ever
        thread.join(30)


def test_every_check_has_a_flaw_that_it_finds() -> None:
    assert {check for _, check, _ in FLAWS} == set(CHECKS)


# --- the command


@pytest.fixture
def two_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real command with the two quickest checks."""
    monkeypatch.setattr(module.verify, "__defaults__", (("byte values", "meter"),))


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is installed, as far as the command can see."""
    known: dict[str, Any] = {"numpy": load_backend("numpy"), "torch": flawed.Faithful, "cupy": Missing}

    def load(name: str) -> Any:
        return known[name] if name in known else load_backend(name)

    monkeypatch.setattr(module, "load_backend", load)
    return known


class Missing(flawed.Faithful):
    @classmethod
    def available(cls, device: str | None) -> str | None:
        return "no NVIDIA driver here: start the container with --gpus all [not markup]"


@pytest.mark.usefixtures("two_checks")
def test_what_cannot_open_is_skipped_by_name_and_reason(
    backends: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["verify", "--quick", "--json", str(tmp_path / "card.json")]) == 0
    said = capsys.readouterr().out
    assert "numpy, torch: " in said
    assert "frames equal numpy's, byte for byte." in said
    report = json.loads((tmp_path / "card.json").read_text())
    assert (report["passed"], report["quick"]) == (True, True)
    assert report["backends"]["torch"] == {"device": "cpu", "degraded": []}
    rows = [(row["backend"], row["check"], row["result"]) for row in report["rows"]]
    assert rows == [
        *[("numpy", "byte values", PASSED), ("numpy", "meter", PASSED)],
        *[("torch", "byte values", PASSED), ("torch", "meter", PASSED)],
        ("cupy", "", SKIPPED),
    ]
    assert "--gpus all [not markup]" in report["rows"][-1]["detail"]
    assert all(row["seconds"] > 0 and row["count"] > 0 for row in report["rows"][:-1])


@pytest.mark.usefixtures("two_checks")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--backend", "cupy"], "failed: cupy"),
        (["--backend", "numpy", "cupy"], "failed: cupy"),
        (["--backend", "nobody"], "failed: nobody"),
        (["--backend", "numpy", "--device", "cuda:0"], "failed: numpy"),
    ],
)
def test_a_backend_asked_for_by_name_has_to_open(
    backends: dict[str, Any], arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", "--quick", *arguments]) == 1
    assert says in capsys.readouterr().out


@pytest.mark.usefixtures("two_checks")
def test_a_failed_check_is_named_and_the_others_go_on(
    backends: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    backends["torch"] = flawed.LosesTime
    assert cli.main(["verify", "--quick"]) == 1
    said = capsys.readouterr().out
    assert "failed: torch meter" in said
    assert "torch: byte values: passed" in said


def test_after_a_lost_device_nothing_is_checked() -> None:
    rows = list(verify(subject(flawed.Dies), True, ["cancels", "meter", "probes"]))
    assert [(row.check, row.result) for row in rows] == [("cancels", LOST)]


def not_opening(error: Exception) -> type[flawed.Faithful]:
    class DoesNotOpen(flawed.Faithful):
        def open(self, device: str | None, processor: Any) -> None:
            raise error

    return DoesNotOpen


@pytest.mark.usefixtures("two_checks")
@pytest.mark.parametrize(
    ("error", "result", "after", "says"),
    [
        (MemoryError("full"), FAILED, True, "failed: numpy\n"),
        (DeviceLost("an illegal address"), LOST, False, "failed: numpy; the device is lost, and nothing was checked"),
    ],
)
def test_a_backend_that_fails_to_open_has_failed_and_the_card_is_written(
    error: Exception,
    result: str,
    after: bool,
    says: str,
    backends: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    backends["numpy"] = not_opening(error)  # the first one
    assert cli.main(["verify", "--quick", "--json", str(tmp_path / "card.json")]) == 1
    assert says in capsys.readouterr().out
    first, *others = json.loads((tmp_path / "card.json").read_text())["rows"]
    assert (first["backend"], first["result"], first["detail"]) == ("numpy", result, f"{type(error).__name__}: {error}")
    assert bool(others) is after


@pytest.mark.usefixtures("two_checks")
def test_with_no_backend_at_all_nothing_is_proven(backends: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    backends.update(numpy=Missing, torch=Missing)
    assert cli.main(["verify"]) == 1
    assert "no backend could be checked" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_said_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--json", "/nowhere/card.json"]) == 2
    assert "/nowhere" in capsys.readouterr().err


def test_the_card_shows_what_is_degraded() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    for part in card([Row("cupy", "meter", PASSED, 5, 0.1)], {"cupy": {"degraded": ["host memory is not pinned"]}}):
        console.print(part)
    assert "cupy is degraded: host memory is not pinned" in console.export_text()
