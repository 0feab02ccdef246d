"""A processor that takes another library's arrays than its backend's: the same memory, the same stream, no copy."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import array_api_compat.numpy as numpy_xp
import numpy as np
import pytest

from gpu_byoc.errors import BackendUnavailable, DeviceOutOfMemory, ProcessorOutput
from gpu_byoc.frames import FrameSpec
from gpu_byoc.processor import ArrayProcessor, NoParams
from tests.backends.fake_cupy import StandInBackend
from tests.backends.kit import House, backend_class, noise, opened
from tests.conftest import skip_or_fail

SPEC = FrameSpec(8, 4)


class Guest(ArrayProcessor):
    """Inverts, in the other library's arrays, and notes what it was given."""

    arrays = "torch"
    how = "new"

    def setup(self, xp: Any, device: Any) -> None:
        self.xp, self.device = xp, device
        self.given: list[Any] = []

    def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
        assert xp is self.xp
        self.given.append((type(frames).__module__.partition(".")[0], pointer(frames)))
        if self.how == "same":
            return frames
        if self.how == "view":
            return xp.permute_dims(xp.permute_dims(frames ^ 0xFF, (0, 2, 1, 3)), (0, 2, 1, 3))
        if self.how == "wide":
            return xp.astype(frames, xp.int16)
        if self.how == "host":
            return [frames]
        return frames ^ 0xFF


def pointer(array: Any) -> int:
    """Where an array of torch, cupy or numpy begins."""
    if hasattr(array, "data_ptr"):
        return int(array.data_ptr())
    return int(array.data.ptr if hasattr(array.data, "ptr") else array.ctypes.data)


class TorchOnStandIn(StandInBackend):
    """The cupy backend's road and arrays of torch's CPU: what is left out is the CUDA stream alone."""

    def _invite(self, processor: ArrayProcessor) -> Any:
        from gpu_byoc_backends._torch import TorchLibrary

        return TorchLibrary("cpu")


class NumpyLibrary:
    """Stands where cupy would, for torch on the CPU."""

    name = "cupy"
    xp = numpy_xp
    device = "cpu"

    def use(self) -> None:
        pass

    def on(self, stream: Any) -> Any:
        return nullcontext()

    def external(self, handle: int) -> None:
        assert handle == 0

    def borrow(self, array: Any) -> Any:
        return np.from_dlpack(array)

    def is_array(self, value: Any) -> bool:
        return isinstance(value, np.ndarray)

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, MemoryError)

    def free_cached(self) -> None:
        pass


class CupyGuest(Guest):
    arrays = "cupy"


def numpy_on_torch() -> Any:
    backend: Any = backend_class("torch")()
    backend._invite = lambda processor: NumpyLibrary()
    return backend


@contextmanager
def open_pair(kind: str, processor: Guest) -> Iterator[Any]:
    backend = TorchOnStandIn() if kind == "torch on cupy" else numpy_on_torch()
    try:
        backend.open(None if kind == "torch on cupy" else "cpu", processor)
        yield backend
    finally:
        backend.close()


PAIRS = [("torch on cupy", Guest, "torch"), ("cupy on torch", CupyGuest, "numpy")]


@pytest.mark.needs_torch
@pytest.mark.parametrize(("kind", "cls", "library"), PAIRS, ids=[pair[0] for pair in PAIRS])
@pytest.mark.parametrize("how", ["new", "view", "same"])
def test_the_frames_are_the_lane_s_memory_and_the_bytes_are_right(kind: str, cls: Any, library: str, how: str) -> None:
    processor = cls()
    processor.how = how
    with open_pair(kind, processor) as backend:
        house = House.of(backend, SPEC, 6)
        for seed, slots in enumerate([(0, 1), (5, 3, 4)]):
            frames = noise(seed, len(slots), SPEC)
            backend.submit(house.put(slots, frames, NoParams())).wait()
            house.expect(slots, frames if how == "same" else frames ^ np.uint8(0xFF))
        house.check()
        lanes = {pointer(lane.frames) for idle in backend._lanes._idle.values() for lane in idle}
        assert [name for name, _ in processor.given] == [library, library]
        assert {at for _, at in processor.given} == lanes, "no copy was made"


@pytest.mark.needs_torch
@pytest.mark.parametrize(("kind", "cls", "library"), PAIRS, ids=[pair[0] for pair in PAIRS])
@pytest.mark.parametrize(("how", "says"), [("wide", "int16"), ("host", "needs an array of")])
def test_what_is_no_frame_of_that_library_is_refused(kind: str, cls: Any, library: str, how: str, says: str) -> None:
    processor = cls()
    processor.how = how
    with open_pair(kind, processor) as backend:
        house = House.of(backend, SPEC, 2)
        with pytest.raises(ProcessorOutput, match=rf"returned .*{says}"):
            backend.submit(house.put((0, 1), noise(0, 2, SPEC), NoParams()))
        house.check()


@pytest.mark.needs_torch
def test_the_other_library_s_memory_that_runs_out_is_the_device_s() -> None:
    import torch

    class Full(Guest):
        def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with open_pair("torch on cupy", Full()) as backend:
        house = House.of(backend, SPEC, 1)
        with pytest.raises(DeviceOutOfMemory, match=r"2.00 GiB.*--max-batch"):
            backend.submit(house.put((0,), noise(0, 1, SPEC), NoParams()))


def test_numpy_says_which_backend_takes_it() -> None:
    with pytest.raises(BackendUnavailable, match=r"Guest takes torch arrays.*--backend torch .*--device cpu"):
        backend_class("numpy")().open(None, Guest())


@pytest.mark.needs_torch
def test_a_library_that_is_not_there_or_unknown_is_said() -> None:
    class Unknown(Guest):
        arrays = "jax"

    for processor, says in [
        (CupyGuest(), r"CupyGuest takes cupy arrays: cupy .*(not installed|not on 'cpu')"),
        (Unknown(), r"Unknown has arrays = 'jax'; it is one of torch, cupy"),
    ]:
        backend: Any = backend_class("torch")()
        with pytest.raises(BackendUnavailable, match=says):
            backend.open("cpu", processor)
        backend.close()


@pytest.mark.needs_torch
def test_its_own_library_by_name_is_no_guest() -> None:
    with opened(("torch", "cpu"), Guest()) as backend:
        house, frames = House.of(backend, SPEC, 1), noise(0, 1, SPEC)
        backend.submit(house.put((0,), frames, NoParams())).wait()
        house.expect((0,), frames ^ np.uint8(0xFF))
        house.check()
        assert getattr(backend, "_guest", 0) is None


class OnTheStream(Guest):
    """Notes the CUDA handle of its own library's current stream, and works long enough for a wrong one to show."""

    def setup(self, xp: Any, device: Any) -> None:
        super().setup(xp, device)
        self.handles: list[int] = []

    def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
        if self.arrays == "torch":
            import torch

            self.handles.append(torch.cuda.current_stream().cuda_stream)
        else:
            import cupy

            self.handles.append(cupy.cuda.get_current_stream().ptr)
        for _ in range(10):
            frames = (frames ^ 0x55) ^ 0x55
        return super().process_batch(frames, params, xp)


@pytest.mark.needs_torch
@pytest.mark.needs_cuda
@pytest.mark.parametrize(("name", "arrays"), [("cupy", "torch"), ("torch", "cupy")])
def test_on_a_gpu_both_libraries_share_memory_and_stream(name: str, arrays: str) -> None:
    if importlib.util.find_spec("cupy") is None:
        skip_or_fail("GPU_BYOC_REQUIRE_CUDA", "cupy is not installed")
    processor = type("OnTheStream", (OnTheStream,), {"arrays": arrays})()
    spec = FrameSpec(640, 480)
    with opened((name, "cuda"), processor) as backend:
        house = House.of(backend, spec, 8)
        for seed in range(20):
            flying = []
            for slots in [(0, 1, 2), (7, 6, 5)]:
                frames = noise(seed, 3, spec)
                flying.append((backend.submit(house.put(slots, frames, NoParams())), slots, frames))
            for submission, slots, frames in flying:
                submission.wait()
                house.expect(slots, frames ^ np.uint8(0xFF))
            house.check()
        inner: Any = backend
        assert set(processor.handles) == {inner._handle(inner._compute)}
        assert {library for library, _ in processor.given} == {arrays}
