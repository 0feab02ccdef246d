"""torch: CUDA devices, and torch's own CPU device, which runs the same road without streams."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

from ._device import DeviceBackend
from ._driver import device_index, driver_problem, import_problem
from ._lanes import Event, Slab, SlabArena, Stream


class _CpuStream:
    """Torch on the CPU has done a call's work when the call returns."""

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _CpuEvent:
    """The clock, read when the mark is set."""

    at_ns = 0

    def record(self, stream: Any) -> None:
        self.at_ns = time.perf_counter_ns()

    def synchronize(self) -> None:
        pass


class TorchBackend(DeviceBackend):
    """``cuda`` (the first GPU, and the default), ``cuda:N``, or ``cpu``."""

    name = "torch"

    @classmethod
    def available(cls, device: str | None) -> str | None:
        index = device_index(device)
        if device != "cpu" and index is None:
            return f"torch runs on cuda, cuda:N or cpu, not on {device!r}"
        if problem := import_problem("torch", "torch"):
            return problem
        return None if device == "cpu" else _cuda_problem(index or 0)

    def _take(self, device: str | None) -> tuple[Any, Any]:
        import array_api_compat.torch as xp
        import torch

        self._torch: Any = torch
        self._cuda = device != "cpu"
        self.device = f"cuda:{device_index(device)}" if self._cuda else "cpu"
        self._torch_device = torch.device(self.device)
        if self._cuda:
            torch.cuda.set_device(self._torch_device)
        else:
            self.depth = 1
        return xp, self._torch_device

    def _facts(self) -> Mapping[str, Any]:
        if not self.device:
            return {}
        facts = {"torch": self._torch.__version__}
        if self._cuda:
            facts["cuda"] = self._torch.version.cuda
            facts["device_name"] = self._torch.cuda.get_device_name(self._torch_device)
        return facts

    def _slab(self, nbytes: int) -> Slab:
        torch, why_not = self._torch, ""
        if self._cuda:
            try:
                pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
                return Slab(pinned.numpy(), pinned, pinned=True)
            except RuntimeError as error:
                why_not = str(error).partition("\n")[0] or "no reason given"
        pageable = np.empty(nbytes, np.uint8)  # numpy's, because it says MemoryError where torch says RuntimeError
        return Slab(pageable, torch.from_numpy(pageable), pinned=False, why_not=why_not)

    def _empty(self, nbytes: int) -> Any:
        return self._torch.empty(nbytes, dtype=self._torch.uint8, device=self._torch_device)

    def _stream(self) -> Stream:
        return self._torch.cuda.Stream(self._torch_device) if self._cuda else _CpuStream()

    def _event(self) -> Event:
        # blocking: the device thread sleeps while it waits; the cores belong to decoders and encoders.
        return self._torch.cuda.Event(enable_timing=True, blocking=True) if self._cuda else _CpuEvent()

    def _on(self, stream: Stream) -> AbstractContextManager[Any]:
        return self._current(stream)

    @contextmanager
    def _current(self, stream: Stream) -> Iterator[None]:
        with self._torch.no_grad(), self._torch.cuda.stream(stream) if self._cuda else nullcontext():
            yield

    def _upload(self, array: Any, at: int, slab: Slab, start: int, nbytes: int, stream: Stream) -> None:
        with self._current(stream):
            array[at : at + nbytes].copy_(slab.handle[start : start + nbytes], non_blocking=True)

    def _download(self, slab: Slab, start: int, array: Any, at: int, nbytes: int, stream: Stream) -> None:
        with self._current(stream):
            slab.handle[start : start + nbytes].copy_(array[at : at + nbytes], non_blocking=True)

    def _assign(self, target: Any, value: Any) -> None:
        target.copy_(value)

    def _elapsed_ns(self, begin: Any, end: Any) -> float:
        if self._cuda:
            return float(begin.elapsed_time(end)) * 1e6
        return float(end.at_ns - begin.at_ns)

    def _is_array(self, value: Any) -> bool:
        return isinstance(value, self._torch.Tensor)

    def _is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, self._torch.OutOfMemoryError)

    def _free_cached(self) -> None:
        if self._cuda:
            self._torch.cuda.empty_cache()

    def _arena_closed(self, arena: SlabArena) -> None:
        super()._arena_closed(arena)
        # torch keeps pinned memory that comes back, in sizes of powers of two; old ones have no public way to free it.
        if arena.pinned and (free := getattr(self._torch.accelerator, "empty_host_cache", None)) is not None:
            free()


def _cuda_problem(index: int) -> str | None:
    import torch

    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA: install a build with CUDA "
            "(https://pytorch.org/get-started/locally), or run torch on the CPU with --device cpu"
        )
    if problem := driver_problem("torch", int(torch.version.cuda.partition(".")[0]), index):
        return problem
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns where it could answer; the answer is what counts here
        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= seen:
        return (
            f"the driver offers cuda:{index}, but torch {torch.__version__} sees {seen} GPUs: is this a CUDA build for "
            "this GPU (https://pytorch.org/get-started/locally), and what is in CUDA_VISIBLE_DEVICES?"
        )
    return None
