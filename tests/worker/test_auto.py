"""``--backend auto`` takes what does as numpy does, and jobs come only after a first batch."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any, ClassVar

import pytest

from gpu_byoc.backend import Backend
from gpu_byoc.config import ServeConfig
from gpu_byoc.engine.fleet import Fleet
from gpu_byoc.errors import BackendUnavailable, DeviceLost
from gpu_byoc.plugins import load_backend
from gpu_byoc.processor import ArrayProcessor, Processor
from gpu_byoc.processors.grayscale import Grayscale
from gpu_byoc.processors.green_tint import GreenTint
from gpu_byoc.worker import devices
from gpu_byoc.worker.devices import open_engine
from tests.backends.fake_cupy import StandInBackend
from tests.checks import flawed
from tests.support.workers import asynchronous, running


class Recording(ArrayProcessor):
    """Somebody's own: what it was given, in order. ``trouble`` is raised instead of an answer."""

    trouble: ClassVar[type[Exception] | None] = None

    def __init__(self) -> None:
        self.calls: list[str | tuple[int, ...]] = []

    def setup(self, xp: Any, device: Any) -> None:
        self.calls.append("setup")

    def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
        self.calls.append(tuple(frames.shape))
        if self.trouble is not None:
            raise self.trouble("no such frames, please")
        return xp.flip(frames, axis=3)

    def teardown(self) -> None:
        self.calls.append("teardown")


class Fussy(Recording):
    trouble = ArithmeticError


class Opens(flawed.Faithful):
    """What the library raises when it is opened is none of ours."""

    def open(self, device: str | None, processor: Processor) -> None:
        raise OSError("libcuda.so.1: wrong ELF class\nand pages more")


WARM = [(1, 480, 640, 3), (2, 480, 640, 3)]


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have ``auto`` try these, and numpy after them."""

    def use(*kinds: type[Any]) -> None:
        named = {kind.name + str(number): kind for number, kind in enumerate(kinds)}
        monkeypatch.setattr(devices, "AUTO", (*named, "numpy"))
        monkeypatch.setattr(devices, "load_backend", lambda name: named.get(name) or load_backend(name))

    return use


async def opened(processor: Processor, degraded: list[str], **config: Any) -> tuple[Backend, Fleet]:
    fleet = await open_engine(ServeConfig(**config), processor, degraded)
    return fleet.engines[0].backend, fleet


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("gpu-byoc-")]


@pytest.mark.parametrize("processor", [GreenTint, Grayscale, Recording])
@pytest.mark.parametrize("right", [flawed.Faithful, StandInBackend])
@asynchronous
async def test_one_that_does_as_numpy_does_is_taken(
    right: type[Any], processor: type[ArrayProcessor], candidates: Any, caplog: pytest.LogCaptureFixture
) -> None:
    candidates(right)
    degraded: list[str] = []
    backend, fleet = await opened(processor(), degraded)
    await asyncio.to_thread(fleet.close)
    assert type(backend) is right
    assert (degraded, caplog.messages) == ([], [])


@pytest.mark.needs_cuda
@pytest.mark.parametrize("processor", [GreenTint, Grayscale, Recording])
@asynchronous
async def test_on_a_gpu_the_gpu_is_taken(processor: type[ArrayProcessor], caplog: pytest.LogCaptureFixture) -> None:
    backend, fleet = await opened(processor(), [])
    await asyncio.to_thread(fleet.close)
    assert backend.device == "cuda:0", caplog.messages
    assert not any("passed over" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("wrong", "processor", "says"),
    [
        (
            flawed.LastByteWrong,
            GreenTint,
            "CheckFailed: shapes: green_tint GreenTint.Params(boost=0): 1 of 9",
        ),
        (flawed.LastByteWrong, Grayscale, "CheckFailed: shapes: grayscale NoParams(): 1 of 9"),
        (
            flawed.LastByteWrong,
            Recording,
            "CheckFailed: shapes: green_tint GreenTint.Params(boost=0): 1 of 9",
        ),
        (flawed.Wraps, GreenTint, "boost=254"),
        (flawed.ForgetsFrames, GreenTint, "in frame 2 of 3"),
        (flawed.Dies, GreenTint, "DeviceLost: cpu failed for good"),
        (Opens, Recording, "OSError: libcuda.so.1: wrong ELF class): "),
    ],
)
@asynchronous
async def test_one_that_does_not_is_passed_over_with_a_warning(
    wrong: type[Any],
    processor: type[ArrayProcessor],
    says: str,
    candidates: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    candidates(wrong, flawed.Faithful)
    degraded: list[str] = []
    served = processor()
    backend, fleet = await opened(served, degraded)
    await asyncio.to_thread(fleet.close)
    assert type(backend) is flawed.Faithful
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith("backend faithful0 is passed over: it fails the check at start (")
    assert says in warning
    assert warning.endswith("gpu-byoc verify --backend faithful0 says more")
    assert degraded[0].startswith("backend faithful1 instead of a better one: faithful0: it fails the check at start")
    if isinstance(served, Recording):
        assert served.calls == WARM, "it has met the one that was taken, and no other"
    assert threads() == []


@asynchronous
async def test_status_and_metric_say_so_too(candidates: Any) -> None:
    candidates(flawed.LastByteWrong)
    async with running(GreenTint(), backend="auto") as r:
        status = await r.get("/stream/status")
        assert status["backend"]["name"] == "numpy"
        assert "faithful0: it fails the check at start" in status["backend"]["degraded"][0]
        async with r.session.get(r.url + "/metrics") as answer:
            assert "byoc_degraded 1.0" in await answer.text()


def test_where_a_gpu_is_required_a_wrong_one_is_no_choice(candidates: Any) -> None:
    candidates(flawed.LastByteWrong)
    with pytest.raises(BackendUnavailable) as caught:
        asyncio.run(opened(GreenTint(), [], require_gpu=True))
    assert "faithful0: it fails the check at start" in str(caught.value)
    assert "numpy: it runs on cpu, and --require-gpu asks for a GPU" in str(caught.value)
    assert threads() == []


@asynchronous
async def test_one_that_was_asked_for_is_not_second_guessed(candidates: Any, caplog: pytest.LogCaptureFixture) -> None:
    candidates(flawed.LastByteWrong)
    backend, fleet = await opened(GreenTint(), [], backend="faithful0")
    await asyncio.to_thread(fleet.close)
    assert type(backend) is flawed.LastByteWrong
    assert caplog.messages == []


# --- the first batch


async def first_calls(processor: Recording, **config: Any) -> tuple[list[Any], Any]:
    """What it had been given when the worker was ready, and what the books say then."""
    async with running(processor, **config) as r:
        calls = list(processor.calls)
        status = await r.get("/stream/status")
        answer = await r.post(bytes(range(6)))
        assert answer[0] == (500 if processor.trouble else 200)
        if not processor.trouble:
            assert answer[2] == bytes([2, 1, 0, 5, 4, 3])
        return calls, status["compute"]["device"]


@pytest.mark.parametrize("backend", ["auto", "stand-in0"])
@asynchronous
async def test_a_processor_of_ones_own_has_run_on_the_device_before_the_first_job(
    backend: str, candidates: Any
) -> None:
    """On the cupy backend's own code: whatever it compiles when it is first used, it has compiled then."""
    candidates(StandInBackend)
    calls, booked = await first_calls(Recording(), backend=backend)
    assert calls == ["setup", *WARM]
    assert booked["frames"] == 0, "nobody's work is booked nowhere"


@pytest.mark.needs_torch
@pytest.mark.parametrize("backend", ["auto", "torch"])
@asynchronous
async def test_on_torch_too(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "AUTO", ("torch", "numpy"))
    calls, booked = await first_calls(Recording(), backend=backend, device="cpu")
    assert calls == ["setup", *WARM]
    assert booked["frames"] == 0


@asynchronous
async def test_numpy_compiles_nothing(candidates: Any) -> None:
    calls, _ = await first_calls(Recording(), backend="numpy")
    assert calls == ["setup"]


@asynchronous
async def test_a_processor_that_refuses_the_first_batch_is_served_all_the_same(
    candidates: Any, caplog: pytest.LogCaptureFixture
) -> None:
    candidates(StandInBackend)
    calls, _ = await first_calls(Fussy(), backend="stand-in0")
    assert calls == ["setup", WARM[0]]
    assert "Fussy cannot be warmed up with 640x480 frames" in caplog.messages[0]
    assert "ArithmeticError: no such frames, please" in caplog.messages[0]


def test_a_device_that_does_not_survive_the_first_batch_ends_the_start(candidates: Any) -> None:
    candidates(flawed.Dies)
    with pytest.raises(DeviceLost, match="an illegal address"):
        asyncio.run(opened(Recording(), [], backend="faithful0"))
    assert threads() == []
