"""Which streams run, and with what parameters: for whom that is, where the worker is one of a network.

A stream's id is most of its channels' names, and what its user asked for is the user's business. A registered worker
tells both to its orchestrator, which has the token, and to this machine; to everybody else that may read its status it
tells how many there are, and how they do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from gpu_byoc.core import origins
from gpu_byoc.worker.jobs import STREAM as JOBS

STREAMS: Final = "streams"
_HIDDEN: Final = ("stream_id", "params")
_RELAYED: Final = ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via", "Origin")


def is_here(headers: Mapping[str, str], peer: str | None) -> bool:
    """Whether a call comes from this machine, and from no browser on it. A proxy on this machine that does not say
    that it is one cannot be told from its operator. What has no IP address (a Unix socket) is a proxy."""
    if peer is None or any(name in headers for name in _RELAYED):
        return False
    host = headers.get("Host", "")
    name = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
    address = origins.peer(peer)
    return address is not None and address.is_loopback and name in ("localhost", "127.0.0.1", "[::1]")


def unnamed(report: Mapping[str, Any]) -> dict[str, Any]:
    """A status, a deep health or a report of compute, without what tells one stream from another by name."""
    found = {key: value for key, value in report.items() if key != "current_params"}
    if "streams" in found:
        found["streams"] = [_masked(each) for each in found["streams"]]
    if "stream" in found:
        found["stream"] = _masked(found["stream"])
    if "compute" in found:
        found["compute"] = unnamed(found["compute"])
    if "totals" in found:
        rows = _together({"name": name, **row} for name, row in found["totals"].items())
        found["totals"] = {row.pop("name"): row for row in rows}
    for key in ("rows", "last_second"):
        if key in found:
            found[key] = _together(found[key])
    return found


def _masked(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in numbers.items() if key not in _HIDDEN}


def _together(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of usage, all streams of a second in one."""
    sums: dict[tuple[Any, str], dict[str, Any]] = {}
    for row in rows:
        second, name = row.get("second"), JOBS if row["name"] == JOBS else STREAMS
        if (held := sums.get((second, name))) is None:
            sums[second, name] = {**row, "name": name}
            continue
        for key in row.keys() - {"second", "name"}:
            held[key] += row[key]
    return list(sums.values())
