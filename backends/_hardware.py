"""What a library has to say of its device, for ``DeviceBackend`` to run the road. Each method with a stream enqueues on
it and does not wait."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from ._lanes import Event, Slab, Stream
from ._library import Library


class Hardware(ABC):
    """Memory, streams and the clock of one device."""

    device: str = ""

    @classmethod
    @abstractmethod
    def available(cls, device: str | None) -> str | None: ...

    @abstractmethod
    def _take(self, device: str | None) -> Library:
        """Import the library, choose the device, set ``self.device``."""

    @abstractmethod
    def _facts(self) -> Mapping[str, Any]:
        """Device name and library versions for status."""

    @abstractmethod
    def _gpu(self) -> Mapping[str, Any] | None:
        """The GPU's ``index``, ``name`` and compute capability, ``major`` and ``minor``; None for a CPU."""

    @abstractmethod
    def _memory(self) -> tuple[int, int]:
        """(free, all) bytes of the GPU's memory, whoever uses it. Its device is the thread's current one."""

    @abstractmethod
    def _slab(self, nbytes: int) -> Slab:
        """Host memory, pinned if it can be."""

    @abstractmethod
    def _empty(self, nbytes: int) -> Any:
        """Flat uint8 device array, aligned to at least 16 bytes."""

    @abstractmethod
    def _stream(self, urgent: bool = False) -> Stream:
        """``urgent``: its work goes before that of others where both could run."""

    @abstractmethod
    def _handle(self, stream: Any) -> int:
        """The stream's CUDA handle, which any library understands."""

    @abstractmethod
    def _event(self) -> Event: ...

    @abstractmethod
    def _upload(self, array: Any, at: int, slab: Slab, start: int, nbytes: int, stream: Any) -> None:
        """Enqueue ``array[at:at + nbytes] = slab[start:start + nbytes]``."""

    @abstractmethod
    def _download(self, slab: Slab, start: int, array: Any, at: int, nbytes: int, stream: Any) -> None:
        """Enqueue ``slab[start:start + nbytes] = array[at:at + nbytes]``."""

    @abstractmethod
    def _assign(self, target: Any, value: Any) -> None:
        """``target[...] = value`` for arrays of one shape, on the current stream."""

    @abstractmethod
    def _clear(self, array: Any, stream: Any) -> None:
        """Enqueue ``array[:] = 0``."""

    @abstractmethod
    def _elapsed_ns(self, begin: Any, end: Any) -> float:
        """Time between two marks that have passed."""
