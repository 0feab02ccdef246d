"""torch as an array library, and whether it can use a device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from ._driver import device_index, driver_problem, import_problem
from ._library import says_full


class TorchLibrary:
    """``device`` is ``cpu`` or ``cuda:N``."""

    name = "torch"

    def __init__(self, device: str) -> None:
        import array_api_compat.torch as xp
        import torch

        self.torch: Any = torch
        self.xp: Any = xp
        self.device = torch.device(device)
        self.cuda = device != "cpu"

    def use(self) -> None:
        if self.cuda:
            self.torch.cuda.set_device(self.device)

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        with self.torch.no_grad(), self.torch.cuda.stream(stream) if self.cuda else nullcontext():
            yield

    def external(self, handle: int) -> Any:
        return self.torch.cuda.ExternalStream(handle, device=self.device) if self.cuda else None

    def borrow(self, array: Any) -> Any:
        return self.torch.from_dlpack(array)

    def is_array(self, value: Any) -> bool:
        return isinstance(value, self.torch.Tensor)

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, self.torch.OutOfMemoryError) or says_full(error)

    def free_cached(self) -> None:
        if self.cuda:
            self.torch.cuda.empty_cache()


def problem(device: str | None) -> str | None:
    """Why torch cannot use ``device``, or None."""
    index = device_index(device)
    if device != "cpu" and index is None:
        return f"torch runs on cuda, cuda:N or cpu, not on {device!r}"
    if reason := import_problem("torch"):
        return reason
    return None if device == "cpu" else _cuda_problem(index or 0)


def _cuda_problem(index: int) -> str | None:
    import torch

    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA: install a build with CUDA "
            "(https://pytorch.org/get-started/locally), or run torch on the CPU with --device cpu"
        )
    if reason := driver_problem("torch", int(torch.version.cuda.partition(".")[0]), index):
        return reason
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns where it could answer; the answer is what counts here
        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= seen:
        return (
            f"the driver offers cuda:{index}, but torch {torch.__version__} sees {seen} GPUs: is this a CUDA build for "
            "this GPU (https://pytorch.org/get-started/locally), and what is in CUDA_VISIBLE_DEVICES?"
        )
    return None
