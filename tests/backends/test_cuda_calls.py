"""Calls of the CUDA driver, made to one that remembers them: graph captures, and memory that is pinned as it is."""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gpu_byoc_backends import _cuda
from gpu_byoc_backends._cuda import ignore_captures, pin, unpin

from gpu_byoc.errors import DeviceLost
from gpu_byoc.frames import FrameSpec
from gpu_byoc.processor import NoParams
from gpu_byoc.processors.passthrough import Passthrough
from tests.backends.kit import House, noise


class Driver:
    """libcuda. ``status`` is what each call returns."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.modes: list[int] = []
        self.pinned: dict[int, int] = {}

    def __call__(self, library: str) -> Driver:
        assert library == "libcuda.so.1"
        return self

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> int:  # noqa: N802
        self.modes.append(mode._obj.value)
        return self.status

    def cuMemHostRegister_v2(self, address: ctypes.c_void_p, nbytes: ctypes.c_size_t, flags: ctypes.c_uint) -> int:  # noqa: N802
        assert flags.value == 1, "pinned for every device"
        if not self.status:
            assert address.value is not None
            self.pinned[address.value] = nbytes.value
        return self.status

    def cuMemHostUnregister(self, address: ctypes.c_void_p) -> int:  # noqa: N802
        if not self.status:
            assert address.value is not None
            del self.pinned[address.value]
        return self.status

    def cuGetErrorName(self, status: int, name: Any) -> int:  # noqa: N802
        name._obj.value = b"CUDA_ERROR_OUT_OF_MEMORY" if status == 2 else None
        return 0


def missing(library: str) -> Any:
    raise OSError(library)


def test_captures_are_a_threads_own() -> None:
    driver = Driver()
    ignore_captures(driver)
    assert driver.modes == [1]


@pytest.mark.parametrize("load", [missing, Driver(status=1), lambda library: object()])
def test_a_driver_that_cannot_be_told_is_no_failure(load: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        ignore_captures(load)
    assert "graph captures in a processor may fail" in caplog.text


def test_memory_is_pinned_as_it_is_and_kept_until_it_is_not() -> None:
    driver, memory = Driver(), np.zeros(1000, np.uint8)
    address = memory.ctypes.data
    assert pin(memory, driver) == ""
    assert driver.pinned == {address: 1000}
    assert _cuda._registered[address] is memory
    driver.status = 2
    assert unpin(memory, driver) == "CUDA error 2, CUDA_ERROR_OUT_OF_MEMORY"
    assert address in _cuda._registered
    driver.status = 0
    assert unpin(memory, driver) == ""
    assert driver.pinned == {}
    assert address not in _cuda._registered


def test_a_refusal_says_which() -> None:
    memory = np.zeros(8, np.uint8)
    assert pin(memory, Driver(status=7)) == "CUDA error 7, unknown"
    assert memory.ctypes.data not in _cuda._registered


@pytest.fixture
def torch_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Driver]]:
    """The torch backend on the CPU, with memory as it has it on a GPU."""
    from gpu_byoc_backends import torch_cuda

    driver = Driver()
    monkeypatch.setattr(torch_cuda, "pin", lambda memory: pin(memory, driver))
    monkeypatch.setattr(torch_cuda, "unpin", lambda memory: unpin(memory, driver))
    backend = torch_cuda.TorchBackend()
    backend.open("cpu", Passthrough())
    slab = backend._slab

    def on_a_gpu(nbytes: int) -> Any:
        monkeypatch.setattr(backend, "_cuda", True)
        try:
            return slab(nbytes)
        finally:
            monkeypatch.setattr(backend, "_cuda", False)

    monkeypatch.setattr(backend, "_slab", on_a_gpu)
    yield backend, driver
    driver.status = 0
    backend.close()


@pytest.mark.needs_torch
def test_torch_pins_exactly_what_there_is(torch_backend: tuple[Any, Driver]) -> None:
    backend, driver = torch_backend
    spec = FrameSpec(50, 7)
    house, frames = House.of(backend, spec, 3), noise(0, 2, spec)
    assert house.arena.pinned
    assert list(driver.pinned.values()) == [3 * spec.nbytes], "not a power of two"
    backend.submit(house.put((2, 0), frames, NoParams())).wait()
    house.expect((2, 0), frames)
    house.check()
    house.arena.close()
    house.arena.close()
    assert driver.pinned == {}


@pytest.mark.needs_torch
def test_torch_memory_that_is_not_pinned_is_said_and_used(torch_backend: tuple[Any, Driver]) -> None:
    backend, driver = torch_backend
    driver.status = 2
    arena = backend.arena(96, 2)
    assert not arena.pinned
    assert "not pinned (CUDA error 2, CUDA_ERROR_OUT_OF_MEMORY)" in backend.info()["degraded"][0]
    arena.close()


@pytest.mark.needs_torch
def test_torch_memory_that_stays_pinned_ends_the_process(torch_backend: tuple[Any, Driver]) -> None:
    backend, driver = torch_backend
    arena = backend.arena(96, 2)
    driver.status = 700
    with pytest.raises(DeviceLost, match=r"host memory does not come back: CUDA error 700.*restart"):
        arena.close()
    driver.status = 0
    for memory in list(_cuda._registered.values()):
        unpin(memory, driver)


# --- calls that only a GPU answers: they are there, and take what they are given


@pytest.mark.needs_torch
def test_this_torch_has_what_the_backend_calls_on_a_gpu() -> None:
    import torch

    cuda, cls = torch.cuda, object()
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (cuda.Stream.__new__, (cls, torch.device("cuda:0")), {"priority": -1}),
        (cuda.Stream.wait_event, (cls, "event"), {}),
        (cuda.Event.__new__, (cls,), {"enable_timing": True, "blocking": True}),
        (cuda.Event.record, (cls, "stream"), {}),
        (cuda.Event.elapsed_time, (cls, "event"), {}),
        (cuda.ExternalStream.__new__, (cls, 1), {"device": torch.device("cuda:0")}),
        (cuda.mem_get_info, (torch.device("cuda:0"),), {}),
        (cuda.get_device_properties, (torch.device("cuda:0"),), {}),
        (cuda.get_device_name, (torch.device("cuda:0"),), {}),
        (cuda.set_device, (torch.device("cuda:0"),), {}),
        (cuda.stream, ("stream",), {}),
        (cuda.empty_cache, (), {}),
    ]
    for call, args, named in calls:
        inspect.signature(call).bind(*args, **named)
    assert issubclass(torch.OutOfMemoryError, RuntimeError)


def test_this_cupy_has_what_the_backend_calls_on_a_gpu() -> None:
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("cupy is not installed (pip install cupy-cuda12x)")
    import cupy

    runtime = cupy.cuda.runtime
    inspect.signature(cupy.cuda.Stream).bind(non_blocking=True, priority=-1)
    inspect.signature(cupy.cuda.Event).bind(block=True)
    inspect.signature(cupy.cuda.PinnedMemory).bind(4096)
    for call, count in [(runtime.memcpyAsync, 5), (runtime.memsetAsync, 4), (runtime.memGetInfo, 0)]:
        arguments = call.__doc__.partition("(")[2].partition(")")[0]  # Cython writes the signature there
        assert len([each for each in arguments.split(",") if each]) == count, call.__doc__
    assert {runtime.memcpyHostToDevice, runtime.memcpyDeviceToHost} == {1, 2}
    assert issubclass(cupy.cuda.memory.OutOfMemoryError, MemoryError)
    assert callable(cupy.get_default_memory_pool().free_all_blocks)
