"""The processor contract: the code a user writes.

Two kinds, chosen by base class:

``FrameProcessor``
    One frame of bytes in, one of the same length out. Runs on an event loop and a thread of its own, so it may burn
    CPU without stalling the server. The contract of the BYOC quickstart.

``ArrayProcessor``
    Batches of uint8 arrays in, batches of the same shape out, on whatever device the backend owns. Written once
    against the array API standard; ``xp`` is the namespace to use (``array_api_compat``'s for numpy, torch or cupy).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeAlias

from gpu_byoc.errors import BadParams


class FrameProcessor:
    """Subclass and implement ``process``; the other two are optional.

    The engine calls one method at a time, all on one event loop, in the order initialize, process..., shutdown.
    """

    async def initialize(self) -> None:
        """Called once, before the worker says it is ready. Load models here."""

    async def process(self, frame: bytes) -> bytes:
        """Turn one frame into another of the same length.

        Raising fails this frame alone, with HTTP 500 and code ``processor_failed``; the next one is processed as
        usual. Returning another length, or no bytes, fails it with ``processor_output``.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement process(frame: bytes) -> bytes")

    async def shutdown(self) -> None:
        """Called once when the worker stops, also if ``initialize`` raised; not where the process has to end at once,
        because the device is lost or ``process`` does not come back.

        It has what is left of ``--drain-seconds`` (8) when the jobs and streams in the house have ended, less one
        second: seven in an idle worker, one where they took all their time, and one after a second signal. Then the
        process ends without it, with status 75.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class NoParams:
    """Parameters of a processor that has none."""


Kernel: TypeAlias = Callable[..., Any]


class ArrayProcessor:
    """Subclass and implement ``process_batch``.

    ``name``           how it is called in status and metrics; the lower-cased class name unless set
    ``pixel_format``   the one packed 8-bit format it takes, e.g. ``rgb24``
    ``Params``         a frozen dataclass of its parameters with defaults. Field metadata ``min``, ``max`` and
                       ``choices`` are enforced. Frames share a batch only if their parameters are equal.
    ``arrays``         the library whose arrays ``process_batch`` takes, ``torch`` or ``cupy``, whichever of these two
                       backends runs it: the frames are handed over without a copy. Unset: the backend's own arrays
    ``kernels``        optional faster forms for one backend, by backend name; of several the backend takes the fastest
                       that runs. Each must equal ``process_batch`` byte for byte (``tests/backends/test_contract.py``
                       compares them). Their call forms are in ``docs/backends.md``; for numpy it is
                       ``kernel(src, dst, params)`` on flat uint8 arrays of whole frames, where ``dst`` may be ``src``.
                       It must not raise: its batch would fail as a whole.
    """

    name: ClassVar[str] = ""
    pixel_format: ClassVar[str] = "rgb24"
    Params: ClassVar[type] = NoParams
    arrays: ClassVar[str] = ""
    kernels: ClassVar[Mapping[str, Kernel | tuple[Kernel, ...]]] = {}

    def setup(self, xp: Any, device: Any) -> None:
        """Called once per device before the first batch. Load weights, build tables."""

    def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
        """Turn (N, H, W, C) uint8 into the same shape and dtype, on the same device.

        ``frames`` must not be written to (on numpy it is read-only): if a batch fails, its frames are tried again in
        smaller batches. An exception therefore fails only the frame that causes it.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement process_batch(frames, params, xp)")

    def teardown(self) -> None:
        """Called once per device when the worker stops."""


Processor: TypeAlias = FrameProcessor | ArrayProcessor


def processor_name(processor: Processor) -> str:
    """``name`` if the class sets one, else the class name."""
    return getattr(processor, "name", "") or type(processor).__name__


def kernel_forms(processor: ArrayProcessor, backend: str) -> tuple[Kernel, ...]:
    """The processor's kernels for one backend, the likely best first."""
    found = processor.kernels.get(backend, ())
    return found if isinstance(found, tuple) else (found,)


def pixel_format(processor: Processor) -> str | None:
    """The format an ArrayProcessor insists on; None for a FrameProcessor, which takes any bytes."""
    return processor.pixel_format if isinstance(processor, ArrayProcessor) else None


def parse_params(processor: Processor, given: Mapping[str, Any]) -> Any:
    """Check ``given`` against the processor's ``Params`` and return an instance: frozen, hashable, complete.

    Numbers and booleans may also come as strings, as they do in headers and from pytrickle's clients.

    Raises:
        BadParams: names the first field that is unknown, of the wrong type or out of range.
    """
    cls = processor.Params if isinstance(processor, ArrayProcessor) else NoParams
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in given.items():
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise BadParams(str(key), f"unknown; {processor_name(processor)} knows: {known}")
        values[key] = _checked(fields[key], value)
    return cls(**values)


_TRUE = frozenset({"true", "1", "yes"})
_FALSE = frozenset({"false", "0", "no"})


def _checked(field: dataclasses.Field[Any], value: Any) -> Any:
    kind = field.type if isinstance(field.type, str) else field.type.__name__
    try:
        value = _CONVERT[kind](value)
    except KeyError:
        raise TypeError(f"Params field {field.name!r}: type {kind!r} is not one of {', '.join(_CONVERT)}") from None
    except (TypeError, ValueError, OverflowError):
        raise BadParams(field.name, f"expected {kind}, got {value!r:.80}") from None
    meta = field.metadata
    if "min" in meta and not value >= meta["min"]:
        raise BadParams(field.name, f"{value!r} is below the minimum {meta['min']!r}")
    if "max" in meta and not value <= meta["max"]:
        raise BadParams(field.name, f"{value!r} is above the maximum {meta['max']!r}")
    if "choices" in meta and value not in meta["choices"]:
        raise BadParams(field.name, f"{value!r:.80} is not one of {', '.join(map(repr, meta['choices']))}")
    return value


def _int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    number = int(value)
    if isinstance(value, float) and number != value:
        raise ValueError
    return number


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    number = float(value)
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError
    return number


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


_CONVERT: Mapping[str, Callable[[Any], Any]] = {"int": _int, "float": _float, "bool": _bool, "str": _str}
