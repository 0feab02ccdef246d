"""The canary: a sign of life from the device, on a thread of its own, whatever the batches do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from gpu_byoc_backends import _device

from gpu_byoc.errors import DeviceLost
from gpu_byoc.frames import FrameSpec
from gpu_byoc.processor import NoParams
from gpu_byoc.processors.green_tint import GreenTint
from gpu_byoc.processors.passthrough import Passthrough
from tests.backends.fake_cupy import StandInBackend
from tests.backends.kit import CASES, House, noise, opened, oracle

SPEC = FrameSpec(8, 4)


@pytest.fixture
def backend() -> Iterator[StandInBackend]:
    backend = StandInBackend()
    try:
        backend.open("cuda:1", Passthrough())
        yield backend
    finally:
        backend.fake.lost = ""
        backend.close()


def on_a_thread(work: Any) -> Any:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result(timeout=20)


def test_it_comes_back_from_any_thread_and_touches_no_lane(backend: StandInBackend) -> None:
    house, frames = House.of(backend, SPEC, 2), noise(0, 2, SPEC)
    backend.submit(house.put((0, 1), frames, NoParams())).wait()
    before = backend.fake.used, backend.fake.allocations, backend.fake.copies
    on_a_thread(backend.probe)
    backend.probe()
    assert (backend.fake.used, backend.fake.allocations, backend.fake.copies) == before
    assert not backend._canary.memory.any(), "it did write"
    house.check()


@pytest.mark.parametrize("name", ["_up", "_compute", "_down"])
def test_it_comes_back_while_a_batch_is_stuck(backend: StandInBackend, name: str) -> None:
    """A stream that stands still is no reason for the canary to stand still; the engine has other means for that."""
    stream = getattr(backend, name)
    stream.open.clear()
    try:
        on_a_thread(backend.probe)
        assert not stream.open.is_set()
    finally:
        stream.open.set()


def test_it_goes_first_and_has_been_tried_when_the_backend_opens(backend: StandInBackend) -> None:
    assert backend._canary is not None
    assert not backend._canary.memory.any(), "what CUDA loads at the first time is loaded"
    streams: Any = (backend._up, backend._compute, backend._down, backend._canary.stream)
    assert [stream.priority for stream in streams] == [0, 0, 0, -1]


def test_each_thread_says_once_that_captures_are_none_of_its_business(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[int] = []
    monkeypatch.setattr(_device, "ignore_captures", lambda: said.append(threading.get_ident()))
    backend = StandInBackend()
    try:
        backend.open("cuda:1", Passthrough())
        assert said == [threading.get_ident()]
        house = House.of(backend, SPEC, 2)

        flying = [backend.submit(house.put((n,), noise(0, 1, SPEC), NoParams())) for n in (0, 1)]

        def on_another_one() -> int:
            for submission in flying:
                submission.wait()
                backend.probe()
            return threading.get_ident()

        assert said.count(on_a_thread(on_another_one)) == 1
        assert said.count(threading.get_ident()) == 1
        house.check()
    finally:
        backend.close()


def test_it_stays_away_where_the_device_hangs(backend: StandInBackend) -> None:
    assert backend._canary is not None
    stream: Any = backend._canary.stream
    stream.open.clear()
    probing = threading.Thread(target=backend.probe)
    probing.start()
    probing.join(0.1)
    assert probing.is_alive()
    stream.open.set()
    probing.join(20)
    assert not probing.is_alive()


def test_a_device_that_is_gone_is_said_and_stays_gone(backend: StandInBackend) -> None:
    house = House.of(backend, SPEC, 1)
    backend.fake.lost = "cudaErrorECCUncorrectable"
    with pytest.raises(DeviceLost, match=r"cuda:1 failed for good \(cudaErrorECCUncorrectable.*restart"):
        on_a_thread(backend.probe)
    backend.fake.lost = ""
    for work in (backend.probe, lambda: backend.submit(house.put((0,), noise(0, 1, SPEC), NoParams()))):
        with pytest.raises(DeviceLost, match="cudaErrorECCUncorrectable"):
            work()


def test_before_open_and_after_close_there_is_nothing_to_ask() -> None:
    backend = StandInBackend()
    backend.probe()
    backend.open(None, Passthrough())
    backend.close()
    backend.probe()


def test_a_batch_may_be_awaited_on_a_thread_of_its_own(backend: StandInBackend) -> None:
    """Current devices are a thread's own: on the first one, a thread that waits would make a context there."""
    house, frames = House.of(backend, SPEC, 2), noise(0, 2, SPEC)
    on_a_thread(backend.submit(house.put((0, 1), frames, NoParams())).wait)
    house.check()


@pytest.mark.parametrize("case", [case for case in CASES if case.values[0] != ("numpy", "cpu")])
def test_probes_under_load_change_nothing(case: Any) -> None:
    """On each backend that has one: probes as fast as they go, beside batches in flight."""
    spec, over, params = FrameSpec(64, 48), threading.Event(), GreenTint.Params()
    with opened(case, GreenTint()) as backend, ThreadPoolExecutor(1) as thread:
        if not hasattr(backend, "probe"):
            pytest.skip(f"{case[0]} has no probe")

        def probe() -> int:
            count = 0
            while not over.is_set() or count < 3:
                backend.probe()
                count += 1
            return count

        probing = thread.submit(probe)
        house = House.of(backend, spec, 6)
        try:
            for seed in range(20):
                frames = noise(seed, 6, spec)
                groups = [(0, 1, 2), (5, 3)]
                flying = [backend.submit(house.put(slots, frames[list(slots)], params)) for slots in groups]
                for submission, slots in zip(flying, groups, strict=True):
                    submission.wait()
                    house.expect(slots, oracle(GreenTint(), frames[list(slots)], params))
                house.check()
        finally:
            over.set()
        assert probing.result(timeout=20) >= 3
