"""A live stream's parameters: size and frame rate of its output, and what goes to the processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpu_byoc.errors import BadParams
from gpu_byoc.frames import MAX_SIDE
from gpu_byoc.processor import Processor, parse_params

MAX_FRAMERATE = 60

OURS = ("width", "height", "max_framerate", "detect_out_resolution", "show_loading")
"""Keys that are not the processor's. The last two are what other workers understand: output here has its input's size
unless it is given one, and there is no overlay, so they are checked and have no effect."""

_BOOLS = frozenset({"true", "1", "yes", "false", "0", "no"})


@dataclass(frozen=True, slots=True)
class Urls:
    """The five channels; None is unused."""

    subscribe: str | None = None
    publish: str | None = None
    control: str | None = None
    events: str | None = None
    data: str | None = None


@dataclass(frozen=True, slots=True)
class StreamParams:
    """``width``, ``height``, ``max_framerate`` None: as the input is. ``given`` is everything as it was given."""

    given: Mapping[str, Any]
    width: int | None
    height: int | None
    max_framerate: int | None
    processor: Any


def parse_stream_params(processor: Processor, given: Any, before: Mapping[str, Any] | None = None) -> StreamParams:
    """Check ``given`` on top of ``before``, the parameters that held until now.

    Raises:
        BadParams: names the field; nothing has changed.
    """
    if given is None:
        given = {}
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise BadParams("params", "expected an object")
    both = {**(before or {}), **given}
    if ("width" in both) != ("height" in both):
        raise BadParams("height" if "width" in both else "width", "width and height come together")
    width, height = (_whole(both, name, MAX_SIDE) for name in ("width", "height"))
    rate = _whole(both, "max_framerate", MAX_FRAMERATE)
    for name in ("detect_out_resolution", "show_loading"):
        value = both.get(name, True)
        if not (isinstance(value, bool | int) or (isinstance(value, str) and value.lower() in _BOOLS)):
            raise BadParams(name, f"expected true or false, got {value!r:.80}")
    rest = {name: value for name, value in both.items() if name not in OURS}
    return StreamParams(both, width, height, rate, parse_params(processor, rest))


def _whole(given: Mapping[str, Any], name: str, most: int) -> int | None:
    if name not in given:
        return None
    value = given[name]
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise TypeError
        number = int(value)
        if isinstance(value, float) and number != value:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise BadParams(name, f"expected a whole number, got {value!r:.80}") from None
    if not 1 <= number <= most:
        raise BadParams(name, f"{number} is not from 1 to {most}")
    return number
