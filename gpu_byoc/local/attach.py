"""``gpu-byoc config ai-models|runners``: files with which an orchestrator finds a worker that does not register.

``aiModels.json`` is go-livepeer's list of models (``-aiModels``); its keys are pipeline, model_id, url, warm, capacity
and price_per_unit. ``runners.json`` lists static live runners (``-liveRunnerConfig``): the orchestrator polls their
health and relays single calls to them, ``/apps/{label}/app/live/video-to-video``. An orchestrator reads either when it
starts. A worker that registers with another orchestrator takes calls only from that one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from gpu_byoc._version import VERSION
from gpu_byoc.config import EngineConfig, ServeConfig, capability_name, env, is_plain_url
from gpu_byoc.errors import ConfigError

PIPELINE: Final = "live-video-to-video"
MEASURED: Final = "capacity"
"""The group of a result file of ``gpu-byoc bench`` that says how many live streams fit."""


def main(argv: Sequence[str]) -> int:
    given = _parser().parse_args(argv)
    if not given.capability.strip() or not given.capability.isprintable():
        raise ConfigError("--capability (or CAPABILITY_NAME): the name under which jobs find the worker")
    if not is_plain_url(given.url):
        raise ConfigError(f"--url {given.url}: not a URL like http://worker:8000, as seen from the orchestrator")
    capacity, source = _capacity(given)
    text = json.dumps(_KINDS[given.kind](given, capacity), indent=2) + "\n"
    print(f"capacity {capacity}: {source}", file=sys.stderr)
    if given.output is None:
        print(text, end="")
        return 0
    try:
        given.output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {given.output}: {error.strerror}") from error
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "Write the file with which an orchestrator finds a worker that does not register with it."
    parser = argparse.ArgumentParser(prog="gpu-byoc config", allow_abbrev=False, description=about)
    slots, streams = EngineConfig().slots, env("GPU_BYOC_MAX_STREAMS", "") or None
    add = parser.add_argument
    add("kind", choices=tuple(_KINDS), help="ai-models: aiModels.json; runners: runners.json")
    add("--capability", default=capability_name(), help="name under which jobs find the worker [CAPABILITY_NAME]")
    add("--url", default=env("CAPABILITY_URL", "http://localhost:8000"), help="of the worker [CAPABILITY_URL]")
    add("--measured", type=Path, help="result file of gpu-byoc bench: take its figure of how many streams fit")
    add("--backend", help="of the measured figures, only those of this backend")
    add("--size", help="of the measured figures, only those of this frame size, such as 1280x720")
    add("--slots", type=int, default=env("GPU_BYOC_SLOTS", str(slots)), help="as the worker's [GPU_BYOC_SLOTS]")
    add("--max-streams", type=int, default=streams, help="as the worker's [GPU_BYOC_MAX_STREAMS]")
    price = "ai-models: price in wei per unit [CAPABILITY_PRICE_PER_UNIT]"
    add("--price-per-unit", type=int, default=env("CAPABILITY_PRICE_PER_UNIT", "0"), help=price)
    add("--usd-per-hour", type=float, help="runners: price; none is needed off-chain")
    add("--output", type=Path, help="file to write; without it the text is printed")
    return parser


def _ai_models(given: argparse.Namespace, capacity: int) -> list[dict[str, Any]]:
    if given.price_per_unit < 0:
        raise ConfigError("--price-per-unit must not be negative")
    model = {"pipeline": PIPELINE, "model_id": given.capability, "url": given.url.rstrip("/"), "warm": True}
    return [model | {"capacity": capacity, "price_per_unit": given.price_per_unit}]


def _runners(given: argparse.Namespace, capacity: int) -> dict[str, list[dict[str, Any]]]:
    runner: dict[str, Any] = {
        "label": given.capability.strip().replace("/", "-"),
        "routing": "label",
        "runner_url": given.url.rstrip("/"),
        "health_url": "/health",
        "healthy_status_code": 200,
        "app": f"{PIPELINE}/{given.capability.strip()}",
        "version": VERSION,
        "mode": "single-shot",
        "capacity": capacity,
    }
    if given.usd_per_hour is not None:
        if not 0 < given.usd_per_hour < float("inf"):
            raise ConfigError("--usd-per-hour must be above 0; leave it out off-chain")
        runner["price_info"] = {"price": given.usd_per_hour, "currency": "usd", "unit": "hour"}
    return {"runners": [runner]}


_KINDS: Final = {"ai-models": _ai_models, "runners": _runners}


def _capacity(given: argparse.Namespace) -> tuple[int, str]:
    """How many at once, and where that is from."""
    if given.measured is not None:
        return _measured(given.measured, given.backend, given.size)
    batch = min(EngineConfig().max_batch, max(1, given.slots))
    config = ServeConfig(engine=EngineConfig(slots=given.slots, max_batch=batch), max_streams=given.max_streams)
    streams = f"--max-streams {given.max_streams}" if given.max_streams is not None else "a third of them"
    why = f"{streams}: live streams" if config.most_streams else "no live streams, one job a slot"
    return config.capacity, f"configured, --slots {given.slots} and {why}; --measured takes a measured figure"


def _measured(path: Path, backend: str | None, size: str | None) -> tuple[int, str]:
    """The fewest streams of the figures that are meant. Raises ConfigError."""
    try:
        report = json.loads(path.read_text("utf-8"))
        rows = [row for row in report["groups"][MEASURED]["rows"] if "answer" in row and "streams" in row]
        found = [(row["streams"], row["name"], row["answer"]) for row in rows if _meant(row["name"], backend, size)]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"--measured {path}: no result file with the group {MEASURED!r} ({type(error).__name__}: {error}); "
            "gpu-byoc bench writes one"
        ) from error
    counts = [each for each in found if isinstance(each[0], int) and each[0] > 0]
    if not counts:
        raise ConfigError(f"--measured {path}: it has no such figure; see --backend and --size")
    streams, name, answer = min(counts)
    return streams, f"measured, {name!r} of {path}: {answer}"


def _meant(name: str, backend: str | None, size: str | None) -> bool:
    """Names are ``backend, size, how many``."""
    parts = [part.strip() for part in name.split(",")]
    return (backend is None or parts[0] == backend) and (size is None or size in parts)
