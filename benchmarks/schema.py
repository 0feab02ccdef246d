"""The result file: its version, what has to be in it, and reading old ones. README.md describes it key by key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from gpu_byoc.errors import ConfigError

SCHEMA: Final = 2

_TOP: Final[dict[str, type | tuple[type, ...]]] = {
    "schema": int,
    "size": str,
    "machine": dict,
    "unix_time": int,
    "seconds": (int, float),
    "noise": dict,
    "groups": dict,
}
_MACHINE: Final[dict[str, type | tuple[type, ...]]] = {
    "cpu": str,
    "cores": int,
    "memory_gib": (int, float),
    "gpus": list,
    "system": str,
    "python": str,
    "versions": dict,
    "commit": str,
    "command": str,
}
_GROUP: Final[dict[str, type | tuple[type, ...]]] = {
    "title": str,
    "question": str,
    "seconds": (int, float),
    "others_cores": (int, float),
    "settings": dict,
    "rows": list,
}
_NOISE: Final[dict[str, type | tuple[type, ...]]] = {
    "before": dict,
    "after": dict,
    "drift": (int, float),
    "too_noisy": list,
}


def problems(report: Any) -> list[str]:
    """What keeps ``report`` from being a result file of this version, each with its place; empty when nothing does."""
    found = _keys("file", report, _TOP)
    if found:
        return found
    if report["schema"] != SCHEMA:
        return [f"schema is {report['schema']}, and this is version {SCHEMA}"]
    if report["size"] not in ("full", "quick", "tiny"):
        found.append(f"size is {report['size']!r}: full, quick or tiny")
    found += _keys("machine", report["machine"], _MACHINE) + _keys("noise", report["noise"], _NOISE)
    for name, group in report["groups"].items():
        wrong = _keys(name, group, _GROUP)
        found += wrong or _rows(name, group["rows"])
    return found


def _keys(where: str, value: Any, wanted: dict[str, type | tuple[type, ...]]) -> list[str]:
    if not isinstance(value, dict):
        return [f"{where} is no object"]
    missing = [f"{where}: {key} is missing" for key in wanted if key not in value]
    wrong = [
        f"{where}: {key} is {type(value[key]).__name__}, not {kind}"
        for key, kind in wanted.items()
        if key in value and (not isinstance(value[key], kind) or isinstance(value[key], bool))
    ]
    return missing + wrong


def _rows(group: str, rows: list[Any]) -> list[str]:
    found, seen = [], set()
    for number, row in enumerate(rows):
        where = f"{group}: row {number}"
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            found.append(f"{where} has no name")
            continue
        where = f"{group}: {row['name']}"
        if row["name"] in seen:
            found.append(f"{where}: a second row of this name")
        seen.add(row["name"])
        found += [f"{where}: {wrong}" for wrong in row_problems(row)]
    return found


def row_problems(row: dict[str, Any]) -> list[str]:
    """What keeps a row that has a name out of a result file."""
    found = [f"{key} is {value!r}" for key, value in row.items() if not _plain(value)]
    if "skipped" in row or "failed" in row:
        if len(row) != 2 or not isinstance(row.get("skipped", row.get("failed")), str):
            found.append("a row that was skipped or failed has a name and the reason, nothing else")
    elif row.get("unstable", True) is not True:
        found.append("unstable is true, or not there")
    elif row.get("unstable") and "spread" not in row:
        found.append("unstable, but not by how much (spread)")
    return found


def _plain(value: Any) -> bool:
    """A word, or a number that is one."""
    return isinstance(value, str | bool | int) or (isinstance(value, float) and value - value == 0)


def load(path: Path) -> dict[str, Any]:
    """A result file, an old one brought to today's form; ``upgraded_from`` then says which version it was.

    Raises:
        ConfigError: it cannot be read, or is no result file of a version that is known.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if isinstance(report, dict) and isinstance(report.get("machine"), dict) and report.get("schema", 1) == 1:
        report = _upgraded(report)
    if found := problems(report):
        raise ConfigError(f"{path} is no result file of this program: {'; '.join(found[:5])}")
    upgraded: dict[str, Any] = report
    return upgraded


def _upgraded(old: dict[str, Any]) -> dict[str, Any]:
    """Version 1: groups lay at the top, rows had no names, nothing was said about noise or stability."""
    machine = dict(old["machine"])
    gpu = machine.pop("gpu", None)
    machine |= {"gpus": [{"name": gpu, "driver": "unknown", "memory_mib": None}] if gpu else [], "system": "unknown"}
    groups = {
        name: {
            "title": name,
            "question": "",
            "seconds": 0,
            "others_cores": 0.0,
            "settings": {},
            "rows": [_named(row) if isinstance(row, dict) else row for row in rows],
        }
        for name, rows in old.items()
        if isinstance(rows, list)
    }
    quiet = {"median_ms": 0.0, "tail": 0.0, "others_cores": 0.0}
    return {
        "schema": SCHEMA,
        "upgraded_from": 1,
        "size": "quick" if old.get("quick") else "full",
        "machine": machine,
        "unix_time": old.get("unix_time", 0),
        "seconds": old.get("seconds", 0),
        "noise": {"before": quiet, "after": quiet, "drift": 0.0, "too_noisy": []},
        "groups": groups,
    }


_RENAMED: Final = {"p50_ratio": "p50_times_echo", "p99_ratio": "p99_times_echo"}


def _named(row: dict[str, Any]) -> dict[str, Any]:
    words = [str(value) for value in row.values() if isinstance(value, str)]
    counted = [(row[key], key) for key in ("connections", "streams", "readers") if key in row]
    counts = [f"{count} {what if count > 1 else what[:-1]}" for count, what in counted]
    if "not_run" in row:
        return {"name": row.get("what", ""), "skipped": row["not_run"]}
    renamed = {_RENAMED.get(key, key): value for key, value in row.items()}
    return {"name": ", ".join(words + counts), **renamed}
