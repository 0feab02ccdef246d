"""What a reader came for, in a few sentences: which backend, which batch, how many streams, when not to use a GPU.

Each answer names the rows it comes from, or says what was not measured. Unstable rows answer nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from .metrics import written

Row = dict[str, Any]

ENOUGH: Final = 0.95
"""A batch is large enough when it brings so much of the best rate; a larger one only adds delay."""


@dataclass(frozen=True, slots=True)
class Statement:
    question: str
    answer: str
    why: str = ""
    known: bool = True


def verdict(report: dict[str, Any]) -> list[Statement]:
    """On a machine that was too noisy, every question and no answer."""
    said = [backend(report), batch(report), streams(report), no_gpu(report), overhead(report)]
    if report["noise"]["too_noisy"]:
        noisy = "Not decided: the machine was too noisy."
        return [Statement(each.question, noisy, known=False) if each.known else each for each in said]
    return said


def sure(report: dict[str, Any], group: str) -> list[Row]:
    """The rows of a group that were measured and settled."""
    rows = report["groups"].get(group, {"rows": []})["rows"]
    return [row for row in rows if not {"skipped", "failed", "unstable"} & set(row)]


def _unknown(question: str, report: dict[str, Any], group: str) -> Statement:
    entry = report["groups"].get(group)
    if entry is None:
        reason = f"not measured in this run (gpu-byoc bench --only {group})"
    elif not entry["rows"] or all("skipped" in row for row in entry["rows"]):
        reason = f"not measured: every row of “{entry['title']}” was skipped, and the reasons are listed"
    else:
        reason = f"not decided: no row of “{entry['title']}” that says it settled"
    return Statement(question, reason[0].upper() + reason[1:] + ".", known=False)


def overhead(report: dict[str, Any]) -> Statement:
    question = "What does the worker add to a job?"
    rows = [row for row in sure(report, "jobs") if row.get("connections") == 1 and "p50_times_echo" in row]
    worker = next((row for row in rows if row["target"] == "worker, numpy green tint"), None)
    if worker is None or not any(row["target"] == "bare aiohttp echo" for row in rows):
        return _unknown(question, report, "jobs")
    chain = next((row for row in rows if row["target"].startswith("gateway")), None)
    network = f" The whole local chain takes {written(chain['p50_times_echo'])} times as long." if chain else ""
    return Statement(
        question,
        f"{written(worker['p50_times_echo'])} times a bare aiohttp echo",
        f"A 640x480 RGB job takes {written(worker['p50_us'])} µs at the median, green tint on numpy included."
        + network,
    )


def _engine(report: dict[str, Any]) -> list[Row]:
    """Green tint through the engine, slots to slots, by backend, frame size and batch."""
    return [row for row in sure(report, "engine") if row.get("what") == "engine"]


def _pixels(row: Row) -> int:
    width, height = row["size"].split("x")
    return int(width) * int(height)


def _best(rows: list[Row]) -> Row:
    return max(rows, key=lambda row: row["frames_per_second"])


def backend(report: dict[str, Any]) -> Statement:
    """The fastest at the largest frame, each at its best batch."""
    question = "Which backend?"
    rows = _engine(report)
    if not rows:
        return _unknown(question, report, "engine")
    largest = max(rows, key=_pixels)["size"]
    names = dict.fromkeys(row["backend"] for row in rows if row["size"] == largest)
    bests = sorted(
        (_best([row for row in rows if row["backend"] == name and row["size"] == largest]) for name in names),
        key=lambda row: -row["frames_per_second"],
    )
    rates = ", ".join(f"{row['backend']} {written(row['frames_per_second'])} frames/s" for row in bests)
    alone = "" if len(bests) > 1 else " No other backend opens here."
    return Statement(question, bests[0]["backend"], f"Green tint on {largest} through the engine: {rates}.{alone}")


def batch(report: dict[str, Any]) -> Statement:
    """For the best backend, the smallest batch that brings nearly all of what any batch brings."""
    question = "Which batch?"
    chosen = backend(report)
    rows = [row for row in _engine(report) if row["backend"] == chosen.answer]
    if not rows:
        return _unknown(question, report, "engine")
    enough = {}
    for size in dict.fromkeys(row["size"] for row in rows):
        those = [row for row in rows if row["size"] == size]
        least = ENOUGH * _best(those)["frames_per_second"]
        enough[size] = min(row["batch"] for row in those if row["frames_per_second"] >= least)
    told = ", ".join(f"{count} at {size}" for size, count in enough.items())
    return Statement(
        question,
        told,
        f"The smallest batch that reaches {ENOUGH:.0%} of {chosen.answer}'s best rate; a larger one only adds delay. "
        "Batches form by themselves while the device is busy: --max-batch is a bound, not a target.",
    )


def streams(report: dict[str, Any]) -> Statement:
    """Every backend's and frame size's number, with what keeps it from being larger."""
    question = "How many live streams?"
    rows = [row for row in sure(report, "capacity") if "answer" in row]
    if not rows:
        return _unknown(question, report, "capacity")
    told = "; ".join(f"{row['name'].removesuffix(', how many')}: {row['answer']}" for row in rows)
    bound = dict.fromkeys(f"{row['why']}; {row['binding']}" if "why" in row else str(row["binding"]) for row in rows)
    return Statement(question, told, f"Bound by: {'; '.join(bound)}. Publishers and viewers share the machine.")


def no_gpu(report: dict[str, Any]) -> Statement:
    """From which frame size on the GPU wins, by batch, frames going there and back."""
    question = "When not to use a GPU?"
    rows = [row for row in sure(report, "engine") if "from_size" in row]
    if not rows and not report["machine"]["gpus"]:
        return Statement(question, "Not measured: there is no GPU here.", known=False)
    if not rows:
        return _unknown(question, report, "engine")
    best = backend(report).answer
    name = best if any(row["backend"] == best for row in rows) else rows[0]["backend"]
    those = [row for row in rows if row["backend"] == name]
    told = ", ".join(f"{_below(row['from_size'])} in batches of {row['batch']}" for row in those)
    home = ", ".join(f"{_below(row['from_size_on_device'])} in batches of {row['batch']}" for row in those)
    why = f"Where a CPU is as fast as {name} for green tint, copies there and back included."
    return Statement(question, told[0].upper() + told[1:], f"{why} For frames that stay on the device: {home}.")


def _below(size: str) -> str:
    return {"always": "never", "never": "always"}.get(size, f"below {size}")
