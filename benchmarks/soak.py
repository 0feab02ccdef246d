"""Jobs through the whole local chain for minutes: does the memory of any process grow?"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from .bench_jobs import FRAME, MODEL, targets
from .load import Connection, measure, rss
from .machine import machine

GROWTH = 1.05
"""Flat: the last quarter's mean is at most 5 % and 4 MB over the second quarter's. The first warms caches up."""

SLACK = 4e6


def run(seconds: float) -> dict[str, Any]:
    """Four connections on the chain, frames of several sizes, resident bytes sampled after each round."""
    rng = random.Random(1)
    sizes = [FRAME, FRAME // 4, 3 * 1000, FRAME * 3]
    with targets() as found:
        chain = found[-1]
        watched = dict(zip(("gateway", "orchestrator", "worker"), chain.pids, strict=True))
        headers = {"Content-Type": "application/octet-stream", "X-Model-Id": MODEL}
        connections = [Connection(chain.port, chain.path, headers, rng.randbytes(size)) for size in sizes]
        samples: dict[str, list[int]] = {name: [] for name in watched}
        jobs, began = 0, time.monotonic()
        while time.monotonic() - began < seconds:
            measure(connections, 25)
            jobs += 25 * len(connections)
            for name, pid in watched.items():
                samples[name].append(rss(pid))
        for connection in connections:
            connection.close()
    verdict = {name: growth(values) for name, values in samples.items()}
    return {
        "seconds": time.monotonic() - began,
        "jobs": jobs,
        "processes": verdict,
        "flat": all(each["flat"] for each in verdict.values()),
    }


def growth(values: list[int]) -> dict[str, Any]:
    quarter = max(1, len(values) // 4)
    second = values[quarter : 2 * quarter] or values
    last = values[-quarter:]
    before, after = sum(second) / len(second), sum(last) / len(last)
    return {
        "second_quarter_mb": before / 1e6,
        "last_quarter_mb": after / 1e6,
        "peak_mb": max(values) / 1e6,
        "flat": after <= before * GROWTH + SLACK,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    given = parser.parse_args()
    result = run(given.minutes * 60)
    print(json.dumps(result, indent=1))
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": machine(), "unix_time": int(time.time()), "soak": result}
        given.output.write_text(json.dumps(report, indent=1) + "\n")
    return int(not result["flat"])


if __name__ == "__main__":
    raise SystemExit(main())
