"""Command lines in the manner of Go's flag package, which go-livepeer and the quickstart page use.

``-name value``, ``-name=value`` and the same with two dashes; booleans bare or with ``=true`` / ``=false``. Stricter
than Go in one way: what is left over is an error, because ``-byoc true -byocModelID x`` would silently end the flags
at "true".
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gpu_byoc.errors import ConfigError

Value = str | int | bool

_TRUE: Final = frozenset({"1", "t", "T", "true", "TRUE", "True"})  # Go's strconv.ParseBool
_FALSE: Final = frozenset({"0", "f", "F", "false", "FALSE", "False"})


@dataclass(frozen=True, slots=True)
class Flag:
    """``default`` says the type as well: str, int or bool. ``aliases`` are other spellings of the name."""

    name: str
    default: Value
    help: str
    aliases: tuple[str, ...] = ()


def parse(flags: Sequence[Flag], argv: Sequence[str]) -> dict[str, Value]:
    """A value for each flag, by name; the last one wins where a flag is repeated.

    Raises ConfigError: one that names every unknown flag, or the first value that does not fit.
    """
    by_name = {name: flag for flag in flags for name in (flag.name, *flag.aliases)}
    values: dict[str, Value] = {flag.name: flag.default for flag in flags}
    unknown: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, text = word.removeprefix("-").removeprefix("-").partition("=")
        if not word.startswith("-") or not name or name.startswith("-"):
            raise ConfigError(
                f"unexpected argument {word!r}: write flags as -name value, booleans as -name or -name=false"
            )
        flag = by_name.get(name)
        if flag is None:
            unknown.append(name)
            if not equals and rest and not rest[0].startswith("-"):
                rest.pop(0)  # surely its value
        elif equals:
            values[flag.name] = _value(flag, name, text)
        elif isinstance(flag.default, bool):
            values[flag.name] = True
        elif rest:
            values[flag.name] = _value(flag, name, rest.pop(0))
        else:
            raise ConfigError(f"flag -{name} needs a value")
    if unknown:
        raise ConfigError(_unknown(unknown, list(by_name)))
    return values


def usage(flags: Sequence[Flag]) -> str:
    """One paragraph a flag, as Go prints them, with every spelling."""
    lines = []
    for flag in flags:
        kind = "" if isinstance(flag.default, bool) else f" {type(flag.default).__name__}"
        default = f" (default {flag.default})" if flag.default not in (False, "") else ""
        aliases = "".join(f", -{alias}" for alias in flag.aliases)
        lines.append(f"  -{flag.name}{aliases}{kind}\n        {flag.help}{default}")
    return "\n".join(lines)


def _value(flag: Flag, name: str, text: str) -> Value:
    if isinstance(flag.default, bool):
        if text in _TRUE:
            return True
        if text in _FALSE:
            return False
        raise ConfigError(f"invalid value {text!r} for flag -{name}: true or false")
    if isinstance(flag.default, int):
        digits = text.removeprefix("-").removeprefix("+")
        if not (digits.isascii() and digits.isdigit() and len(digits) < 19):
            raise ConfigError(f"invalid value {text!r} for flag -{name}: a whole number")
        return int(text)
    return text


def _unknown(names: Sequence[str], known: Sequence[str]) -> str:
    told = []
    for name in dict.fromkeys(names):
        folded = {candidate.casefold(): candidate for candidate in known}
        near = difflib.get_close_matches(name.casefold(), folded, n=1)
        told.append(f"-{name}" + (f" (did you mean -{folded[near[0]]}?)" if near else ""))
    kind = "unknown flag" if len(told) == 1 else "unknown flags"
    return f"{kind}: {', '.join(told)}; -help lists those that there are"
