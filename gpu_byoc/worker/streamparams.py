"""A live stream's parameters: size and frame rate of its output, and what goes to the processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpu_byoc.config import ServeConfig
from gpu_byoc.core.origins import Policy, parse, parse_origin
from gpu_byoc.errors import BadParams, BadRequest, ConfigError
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


def given_urls(body: Mapping[str, Any]) -> dict[str, str]:
    """The channels that a call names, by field (``subscribe_url`` ...). Raises BadRequest."""
    found: dict[str, str] = {}
    for name in Urls.__dataclass_fields__:
        url = body.get(f"{name}_url")
        if url is not None and not isinstance(url, str):
            raise BadRequest(f"{name}_url is not an http or https URL: it is no text")
        if url is not None and url.strip():
            found[f"{name}_url"] = url.strip()
    return found


def as_urls(found: Mapping[str, str]) -> Urls:
    return Urls(**{name: found.get(f"{name}_url") for name in Urls.__dataclass_fields__})


def origin_policy(config: ServeConfig) -> Policy:
    """Whose channels streams may use: those of the orchestrator that the worker registers with, and --allow-origin.

    Raises:
        ConfigError: one of them is no origin.
    """
    allowed = set()
    for text in config.security.allow_origins:
        try:
            allowed.add(parse_origin(text))
        except ValueError as error:
            raise ConfigError(f"--allow-origin {text!r} is not like https://host:8935: {error}") from None
    if config.registration is not None:
        try:
            allowed.add(parse(config.registration.orch_url).origin)
        except ValueError as error:
            raise ConfigError(f"--orch-url (ORCH_URL) {config.registration.orch_url!r}: {error}") from None
    return Policy(frozenset(allowed))


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
        if isinstance(value, str) and len(value) > 20:  # blanks around a number are kept with it
            raise ValueError
        number = int(value)
        if isinstance(value, float) and number != value:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise BadParams(name, f"expected a whole number, got {value!r:.80}") from None
    if not 1 <= number <= most:
        raise BadParams(name, f"{number} is not from 1 to {most}")
    return number
