"""``gpu-byoc``: arguments become a configuration, and the configuration runs. No decisions of its own."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gpu_byoc._version import VERSION
from gpu_byoc.config import MIB, EngineConfig, ServeConfig, env
from gpu_byoc.errors import EXIT_INTERRUPTED, EXIT_USAGE, ConfigError, OperatorError

USAGE = """\
usage: gpu-byoc COMMAND ...

commands:
  serve       serve a processor: green tint, or your own
  run         run a processor file of the quickstart page, unmodified
  livepeer    local orchestrator or gateway, with the quickstart page's flags
  usage       what the orchestrator's ledger says
  job         send an image, a video or raw frames through a gateway
  stream      play a clip as live streams through a worker
  trickle     a trickle server by itself
  demo        all of it on this machine, on a real clip
  backends    which backends open here, and why the others do not

gpu-byoc COMMAND --help says more. gpu-byoc --version prints the version.
"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if arguments[0] in ("--version", "-version"):
        print(f"gpu-byoc {VERSION}")
        return 0
    command = _COMMANDS.get(arguments[0])
    if command is None:
        print(f"gpu-byoc: no command {arguments[0]!r}\n\n{USAGE}", end="", file=sys.stderr)
        return EXIT_USAGE
    try:
        return command(arguments[1:])
    except OperatorError as error:
        print(f"gpu-byoc {arguments[0]}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _parser(command: str, about: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"gpu-byoc {command}", description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )


def _worker_flags() -> list[tuple[str, Callable[[str], object], object, str]]:
    """(flag, type, default, help) of what ``serve`` and ``run`` share; each has a variable GPU_BYOC_<FLAG>, too."""
    default = ServeConfig()
    engine = default.engine
    capability = env("CAPABILITY_NAME", "") or env("MODEL_ID", "")  # what the network's own workers read
    return [
        ("backend", str, default.backend, "auto, numpy, torch, cupy, or the name of a plug-in"),
        ("device", str, default.device, "device of the backend, such as cuda:1"),
        ("capability", str, capability, "name under which jobs are also taken: POST /NAME"),
        ("pipeline", str, env("PIPELINE", default.pipeline), "what /version calls the pipeline"),
        ("app-version", str, default.app_version, "what /app-version says"),
        ("slots", int, engine.slots, "frames in the house at once, per frame size"),
        ("max-batch", int, engine.max_batch, "frames that share a batch, and the most in one job"),
        ("max-wait-ms", float, engine.max_wait_ms, "how long an idle device waits for a fuller batch"),
        ("depth", int, engine.depth, "batches on their way to the device at once"),
        ("memory-mb", int, engine.memory // MIB, "bound on the frame memory of all sizes together"),
        ("max-body-mb", int, default.max_body // MIB, "largest request body"),
        ("slot-wait", float, default.slot_wait, "seconds a job waits in the line for a slot before 503"),
        ("body-timeout", float, default.body_timeout, "seconds over which a body or an answer must make headway"),
        ("job-timeout", float, default.job_timeout, "seconds to wait for the processor before 504"),
        ("max-streams", int, None, "live streams at once; a third of the slots unless said"),
        (
            "latency-budget-ms",
            float,
            default.latency_budget * 1e3,
            "age at which a live frame that has no slot is dropped",
        ),
        ("lossless", _flag, "no", "yes: a live frame waits for a slot instead of being dropped"),
        ("encoder", str, default.encoder, "auto, libx264 or h264_nvenc"),
        ("insecure", _flag, "no", "yes: take any TLS certificate of a trickle server"),
        ("log-level", str, "info", "debug, info, warning or error"),
    ]


def _flag(text: str) -> bool:
    if text.lower() not in ("yes", "no", "true", "false", "1", "0"):
        raise ValueError(text)
    return text.lower() in ("yes", "true", "1")


def _add_flag(
    parser: argparse.ArgumentParser, name: str, kind: Callable[[str], object], default: object, text: str
) -> None:
    """A flag whose default is its environment variable's value, checked like the flag's own."""
    variable = "GPU_BYOC_" + name.upper().replace("-", "_")
    parser.add_argument(f"--{name}", type=kind, default=env(variable, "") or default, help=f"{text} [{variable}]")


def _config(given: argparse.Namespace, **changes: object) -> ServeConfig:
    """All flags as a configuration."""
    engine = EngineConfig(
        slots=given.slots,
        max_batch=given.max_batch,
        max_wait_ms=given.max_wait_ms,
        depth=given.depth,
        memory=given.memory_mb * MIB,
    )
    values = {name: getattr(given, name) for name in _PLAIN} | changes
    values["latency_budget"] = given.latency_budget_ms / 1e3
    return ServeConfig(engine=engine, max_body=given.max_body_mb * MIB, **values)


_PLAIN = (
    *("backend", "device", "capability", "pipeline", "app_version", "slot_wait", "body_timeout", "job_timeout"),
    *("max_streams", "lossless", "encoder", "insecure"),
)
_ENGINE = {"slots": 1, "max_batch": 1, "max_wait_ms": 1, "depth": 1, "memory_mb": MIB}


def _changes(given: argparse.Namespace) -> dict[str, object]:
    """Only what was given, by field of ServeConfig; ``engine`` is a dict of EngineConfig's fields."""
    said = {name: value for name, value in vars(given).items() if value is not None}
    changes: dict[str, object] = {name: said[name] for name in ("host", "port", *_PLAIN) if name in said}
    if "max_body_mb" in said:
        changes["max_body"] = said["max_body_mb"] * MIB
    if "latency_budget_ms" in said:
        changes["latency_budget"] = said["latency_budget_ms"] / 1e3
    engine = {name.removesuffix("_mb"): said[name] * unit for name, unit in _ENGINE.items() if name in said}
    return changes | ({"engine": engine} if engine else {})


def _logging(level: str) -> None:
    from gpu_byoc.worker.serve import PAGE_FORMAT

    if level.upper() not in logging.getLevelNamesMapping():
        raise ConfigError(f"--log-level {level!r} is not one of debug, info, warning, error")
    logging.basicConfig(level=level.upper(), format=PAGE_FORMAT)


def _serve(argv: Sequence[str]) -> int:
    parser = _parser("serve", "Serve a processor over HTTP.")
    default = ServeConfig()
    names = "green_tint, grayscale, passthrough, module:Class or file.py:Class"
    _add_flag(parser, "processor", str, default.processor, names)
    _add_flag(parser, "host", str, default.host, "address to listen on")
    _add_flag(parser, "port", int, default.port, "port to listen on; 0 takes a free one")
    for flag in _worker_flags():
        _add_flag(parser, *flag)
    given = parser.parse_args(argv)
    import asyncio

    from gpu_byoc.plugins import load_processor
    from gpu_byoc.worker.serve import run

    _logging(given.log_level)
    config = _config(given, host=given.host, port=given.port, processor=given.processor)
    return asyncio.run(run(config, load_processor(given.processor)))


def _run(argv: Sequence[str]) -> int:
    parser = _parser("run", "Run a file that ends in asyncio.run(run_processor(...)), as on the quickstart page.")
    parser.formatter_class = argparse.HelpFormatter
    parser.add_argument("file", type=Path, help="the Python file; a flag wins over what it says")
    _add_flag(parser, "host", str, None, "address to listen on")
    _add_flag(parser, "port", int, None, "port to listen on; 0 takes a free one")
    for name, kind, _, text in _worker_flags():
        _add_flag(parser, name, kind, None, text)
    given = parser.parse_args(argv)
    from gpu_byoc.worker import pagerun, serve

    _logging(given.log_level or "info")
    serve.override(**_changes(given))
    return pagerun.run_file(given.file)


def _livepeer(argv: Sequence[str]) -> int:
    from gpu_byoc.local import network

    return network.main(argv)


def _usage(argv: Sequence[str]) -> int:
    from gpu_byoc.local import network

    return network.usage_main(argv)


def _job(argv: Sequence[str]) -> int:
    from gpu_byoc.local import job

    return job.main(argv)


def _stream(argv: Sequence[str]) -> int:
    from gpu_byoc.local import stream

    return stream.main(argv)


def _trickle(argv: Sequence[str]) -> int:
    from gpu_byoc.transport import trickle_server

    return trickle_server.main(argv)


def _demo(argv: Sequence[str]) -> int:
    from gpu_byoc.local import demo

    return demo.main(argv)


def _backends(argv: Sequence[str]) -> int:
    _parser("backends", "Say which backends open here, and why the others do not.").parse_args(argv)
    from gpu_byoc.errors import BackendUnavailable
    from gpu_byoc.plugins import backend_names, load_backend

    for name in sorted(backend_names()):
        try:
            reason = load_backend(name).available(None)
        except BackendUnavailable as error:
            reason = str(error)
        print(f"{name:12} {reason or 'opens'}")
    return 0


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": _serve,
    "run": _run,
    "livepeer": _livepeer,
    "usage": _usage,
    "job": _job,
    "stream": _stream,
    "trickle": _trickle,
    "demo": _demo,
    "backends": _backends,
}
