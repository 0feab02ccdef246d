"""What a backend says of its GPU: memory, and how busy it is."""

from __future__ import annotations

import ctypes
import threading
import time
import uuid
from typing import Any

import pytest
from gpu_byoc_backends._nvml import Meter, gpu_uuid
from gpu_byoc_backends.numpy_cpu import NumpyBackend

from gpu_byoc.frames import FrameSpec
from gpu_byoc.processor import NoParams
from gpu_byoc.processors.passthrough import Passthrough
from tests.backends.fake_cupy import StandInBackend
from tests.backends.kit import House, noise

SPEC = FrameSpec(8, 4)
NAME = uuid.UUID("12345678-9abc-def0-0011-223344556677")


class Driver:
    """libcuda and libnvidia-ml of a machine with two GPUs, of which CUDA sees the second as its first."""

    def __init__(self, prefix: bytes = b"GPU-", uuid_status: int = 0) -> None:
        self.prefix = prefix
        self.uuid_status = uuid_status

    def __call__(self, library: str) -> Driver:
        assert library in ("libcuda.so.1", "libnvidia-ml.so.1")
        return self

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = index + 40
        return 0

    def cuDeviceGetUuid_v2(self, raw: Any, device: ctypes.c_int) -> int:  # noqa: N802
        assert device.value == 40
        ctypes.memmove(raw._obj, NAME.bytes, 16)
        return self.uuid_status

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:  # noqa: N802
        handle._obj.value = 7
        return 0 if name == self.prefix + str(NAME).encode() else 6

    def nvmlDeviceGetUtilizationRates(self, handle: ctypes.c_void_p, into: Any) -> int:  # noqa: N802
        assert handle.value == 7
        into._obj.gpu, into._obj.memory = 63, 12
        return 3 if self.prefix == b"MIG-" else 0  # NVML_ERROR_NOT_SUPPORTED


def nothing(library: str) -> Any:
    raise OSError(library)


@pytest.mark.parametrize(("prefix", "expected"), [(b"GPU-", (63, 12)), (b"MIG-", (None, None)), (b"?", (None, None))])
def test_a_gpu_is_found_by_its_uuid(prefix: bytes, expected: Any) -> None:
    driver = Driver(prefix)
    name = gpu_uuid(0, driver)
    assert name == str(NAME)
    assert Meter(name, driver).read() == expected


def test_where_a_library_is_missing_there_are_no_figures() -> None:
    assert gpu_uuid(0, nothing) is None
    assert gpu_uuid(0, Driver(uuid_status=101)) is None
    assert Meter(None, Driver()).read() == (None, None)
    assert Meter(str(NAME), nothing).read() == (None, None)


def until(true: Any) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_memory_is_read_again_and_again() -> None:
    backend = StandInBackend()
    try:
        backend.open("cuda:1", Passthrough())
        opened = backend.info()
        entry = opened["gpu_info"]["1"]
        assert set(entry) == {"id", "name", "memory_total", "memory_free", "major", "minor"}
        assert (entry["name"], entry["major"], entry["memory_total"]) == ("stand-in", 9, 1 << 30)
        assert entry["memory_free"] == (1 << 30) - backend.fake.used
        extra = {"utilization_compute", "utilization_memory"}
        assert set(opened["gpu_stats"]["1"]) == (set(entry) - {"major", "minor"}) | extra

        house = House.of(backend, SPEC, 2)
        backend.submit(house.put((0, 1), noise(0, 2, SPEC), NoParams())).wait()
        free = (1 << 30) - backend.fake.used
        assert free < entry["memory_free"], "a lane was made"
        until(lambda: backend.info()["gpu_stats"]["1"]["memory_free"] == free)
        house.check()
    finally:
        backend.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "gpu-byoc-figures"]


def test_figures_that_hang_hold_up_neither_the_canary_nor_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, let_go = threading.Event(), threading.Event()

    def hangs(self: Meter) -> tuple[int, int]:
        if threading.current_thread().name == "gpu-byoc-figures":
            reading.set()
            let_go.wait(20)
        return 63, 12

    monkeypatch.setattr(Meter, "read", hangs)
    backend = StandInBackend()
    try:
        backend.open("cuda:1", Passthrough())
        assert reading.wait(20)
        backend.probe()
        house = House.of(backend, SPEC, 2)
        backend.submit(house.put((0, 1), noise(0, 2, SPEC), NoParams())).wait()
        assert backend.info()["gpu_stats"]["1"]["utilization_compute"] == 63, "what was read last"
        house.check()
    finally:
        let_go.set()
        backend.close()


def test_info_never_asks_the_device() -> None:
    backend = StandInBackend()
    try:
        backend.open("cuda:1", Passthrough())
        backend.fake.lost = "gone"  # every call to the device fails from here on
        assert backend.info()["gpu_info"]["1"]["memory_total"] == 1 << 30
    finally:
        backend.fake.lost = ""
        backend.close()


def test_a_cpu_has_none() -> None:
    backend = NumpyBackend()
    backend.open(None, Passthrough())
    try:
        assert "gpu_info" not in backend.info()
    finally:
        backend.close()
