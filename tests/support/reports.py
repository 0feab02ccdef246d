"""A result file as ``gpu-byoc bench`` writes it, small and made up: every kind of row is in it."""

from __future__ import annotations

from typing import Any


def row(name: str, **values: Any) -> dict[str, Any]:
    return {"name": name, "spread": 0.04, "windows": 5, **values}


def jobs() -> list[dict[str, Any]]:
    return [
        row(
            "bare aiohttp echo, 1 connection",
            target="bare aiohttp echo",
            connections=1,
            p50_us=1000.0,
            p50_times_echo=1.0,
        ),
        row("worker, 4 connections", target="worker", connections=4, p50_us=1500.0, p99_us=3000.0, rss_mb=60.5),
        row("chain, 4 connections", target="chain", connections=4, p50_us=9000.0, spread=0.41, unstable=True),
        {"name": "worker, cupy", "skipped": "cupy is not installed: pip install cupy-cuda12x"},
    ]


def report(**groups: list[dict[str, Any]]) -> dict[str, Any]:
    """With the rows of ``groups``, or of one group of jobs."""
    probe = {"median_ms": 2.0, "tail": 0.05, "others_cores": 0.01}
    return {
        "schema": 2,
        "size": "full",
        "machine": {
            "cpu": "Intel(R) Xeon(R) Processor",
            "cores": 2,
            "memory_gib": 23.5,
            "gpus": [],
            "system": "Debian GNU/Linux 12 (bookworm), Linux 6.1",
            "python": "3.11.7",
            "versions": {"gpu-byoc": "0.1.0", "numpy": "2.4.6"},
            "commit": "abc1234",
            "command": "gpu-byoc bench",
        },
        "unix_time": 1_790_000_000,
        "seconds": 321.5,
        "noise": {"before": probe, "after": probe, "drift": 0.01, "too_noisy": []},
        "groups": {
            name: {
                "title": name.capitalize(),
                "question": f"What about {name} & <others>?",
                "seconds": 12.5,
                "others_cores": 0.02,
                "settings": {"slots": 64, "client": "this process"},
                "rows": rows,
            }
            for name, rows in (groups or {"jobs": jobs()}).items()
        },
    }
