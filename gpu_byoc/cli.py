"""``gpu-byoc``: arguments become a configuration, and the configuration runs. No decisions of its own."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from gpu_byoc import logs
from gpu_byoc._version import VERSION
from gpu_byoc.config import (
    MIB,
    REGISTRATION,
    SECURITY,
    EngineConfig,
    LimitConfig,
    RegistrationConfig,
    SecurityConfig,
    ServeConfig,
    capability_name,
    env,
    otel_endpoint,
    read_registration,
    read_security,
    unknown_variables,
    yes_or_no,
)
from gpu_byoc.errors import EXIT_INTERRUPTED, EXIT_USAGE, ConfigError, OperatorError

USAGE = """\
usage: gpu-byoc COMMAND ...

commands:
  serve       serve a processor: green tint, or your own
  run         run a processor file of the quickstart page, unmodified
  livepeer    local orchestrator or gateway, with the quickstart page's flags
  config      aiModels.json or runners.json, for orchestrators that a worker does not register with
  usage       what the orchestrator's ledger says
  job         send an image, a video or raw frames through a gateway
  stream      play a clip as live streams through a worker
  trickle     a trickle server by itself
  demo        all of it on this machine, on a real clip
  bench       measure this machine: which backend, which batch, how many streams
  backends    which backends open here, and why the others do not
  doctor      can this machine serve, with what, and what to do about the rest
  verify      do the backends here do what numpy does, byte for byte, under load too
  health      is the worker well: for people, and for a container's HEALTHCHECK

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


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "") else super()._get_help_string(action)


def _parser(command: str, about: str, given: str = "[options]") -> argparse.ArgumentParser:
    """With a usage of one line, which every error repeats; and no abbreviations, which the next flag might break."""
    name = f"gpu-byoc {command}"
    return argparse.ArgumentParser(
        prog=name, usage=f"{name} {given}", description=about, formatter_class=_Help, allow_abbrev=False
    )


def _worker_flags() -> list[tuple[str, Callable[[str], object], object, str]]:
    """(flag, type, default, help) of what ``serve`` and ``run`` share; each has a variable GPU_BYOC_<FLAG>, too."""
    default = ServeConfig()
    engine = default.engine
    return [
        ("backend", str, default.backend, "auto, numpy, torch, cupy, or the name of a plug-in"),
        ("device", str, default.device, "device of the backend, such as cuda:1, or several: cuda:0,cuda:1"),
        ("require-gpu", yes_or_no, "no", "yes: do not start on a CPU, neither as a fallback nor as asked for"),
        ("require-pinned", yes_or_no, "no", "yes: host memory that cannot be pinned is an error, not slower"),
        ("capability", str, capability_name(), "name under which jobs are also taken: POST /NAME"),
        ("pipeline", str, env("PIPELINE", default.pipeline), "what /version calls the pipeline"),
        ("app-version", str, default.app_version, "what /app-version says"),
        ("slots", int, engine.slots, "frames in the house at once, per frame size"),
        ("max-batch", int, engine.max_batch, "frames that share a batch, and the most in one job"),
        ("max-wait-ms", float, engine.max_wait_ms, "how long an idle device waits for a fuller batch"),
        ("depth", int, engine.depth, "batches on their way to a device at once; unset: as its backend says"),
        ("memory-mb", int, engine.memory // MIB, "bound on the frame memory of all sizes together"),
        ("max-body-mb", int, default.max_body // MIB, "largest request body"),
        ("slot-wait", float, default.slot_wait, "seconds a job waits in the line for a slot before 503"),
        ("body-timeout", float, default.body_timeout, "seconds over which a body or an answer must make headway"),
        ("job-timeout", float, default.job_timeout, "seconds to wait for the processor before 504"),
        ("processor-timeout", float, None, "seconds until a processor counts as stuck; 0: never, unset: --job-timeout"),
        ("device-timeout", float, engine.device_timeout, "seconds a device may give no sign of life, 0: any time"),
        ("max-pixels", int, default.max_pixels, "pixels of an image in a job"),
        ("max-collected-mb", int, default.max_collected // MIB, "bodies of images and JSON, all jobs together"),
        ("max-connections", int, default.max_connections, "open connections, half of them from one address"),
        ("drain-seconds", float, default.drain_seconds, "what a shutdown may take, from SIGTERM to the exit"),
        ("admin-port", int, None, "port on 127.0.0.1 for POST /drain and GET /debug; unset: none, 0: a free one"),
        ("max-streams", int, None, "live streams at once; a third of the slots unless said"),
        (
            "latency-budget-ms",
            float,
            default.latency_budget * 1e3,
            "age at which a live frame that has no slot is dropped",
        ),
        (
            "error-budget",
            float,
            default.error_budget,
            "share of its frames that may fail until a stream is ended; 1: all",
        ),
        ("lossless", yes_or_no, "no", "yes: a live frame waits for a slot instead of being dropped"),
        ("encoder", str, default.encoder, "auto, libx264 or h264_nvenc"),
        ("insecure", yes_or_no, "no", "yes: take any TLS certificate of a trickle server or an orchestrator"),
        ("log-level", str, "info", "debug, info, warning or error"),
        ("log-format", str, "text", "text, or json: one object a line"),
        ("otel-endpoint", str, otel_endpoint(), "OTLP/HTTP collector that gets traces, such as http://otel:4318"),
    ]


def _limit_flags() -> list[tuple[str, Callable[[str], object], object, str]]:
    """As ``_worker_flags``: bounds that few need to set."""
    sizes = "frame sizes that have memory at once"
    return [("max-frame-sizes", int, EngineConfig().max_frame_sizes, sizes)] + [
        (each.name.replace("_", "-"), type(each.default), each.default, each.metadata["help"])
        for each in fields(LimitConfig)
    ]


def _add_flag(
    parser: argparse._ActionsContainer, name: str, kind: Callable[[str], object], default: object, text: str
) -> None:
    """A flag whose default is its environment variable's value, checked like the flag's own."""
    variable = _variable(name)
    parser.add_argument(f"--{name}", type=kind, default=env(variable, "") or default, help=f"{text} [{variable}]")


def _variable(name: str) -> str:
    return "GPU_BYOC_" + name.upper().replace("-", "_")


def _warn_of_unknown_variables() -> None:
    """A slip of the pen in a variable's name is not to be a setting that has no effect."""
    flags = ["processor", "host", "port", *(flag[0] for flag in (*_worker_flags(), *_limit_flags()))]
    known = {*map(_variable, flags), *(setting.variable for setting in (*REGISTRATION.values(), *SECURITY.values()))}
    if unknown := unknown_variables(known):
        logging.getLogger("gpu_byoc").warning("environment variables that nothing reads: %s", ", ".join(unknown))


def _add_limits(parser: argparse.ArgumentParser, defaults: bool = True) -> None:
    group = parser.add_argument_group("limits that few need to set (docs/operations.md)")
    for name, kind, default, text in _limit_flags():
        _add_flag(group, name, kind, default if defaults else None, text)


def _add_registration(parser: argparse.ArgumentParser) -> None:
    """Flags without defaults: the help shows those, and a secret is not to be shown."""
    group = parser.add_argument_group("registration with an orchestrator")
    for flag, setting in REGISTRATION.items():
        group.add_argument(f"--{flag}", default=argparse.SUPPRESS, help=f"{setting.help} [{setting.variable}]")


def _registration(given: argparse.Namespace) -> RegistrationConfig | None:
    said = vars(given)
    if said.get("orch_secret"):
        logging.getLogger("gpu_byoc").warning(
            "--orch-secret: every user of this machine can read it in the list of processes; use ORCH_SECRET_FILE"
        )
    return read_registration({flag: said.get(flag.replace("-", "_")) for flag in REGISTRATION})


def _add_security(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("security (docs/security.md)")
    for flag, setting in SECURITY.items():
        text = f"{setting.help} [{setting.variable}]"
        group.add_argument(f"--{flag}", action="append", default=argparse.SUPPRESS, help=text)


def _security(given: argparse.Namespace) -> dict[str, SecurityConfig]:
    """As a change of ServeConfig; none where nothing was said."""
    said = vars(given)
    texts = {flag: said.get(flag.replace("-", "_")) for flag in SECURITY}
    security = read_security({flag: ",".join(text) if text else None for flag, text in texts.items()})
    return {} if security is None else {"security": security}


def _config(given: argparse.Namespace, **changes: object) -> ServeConfig:
    """All flags as a configuration."""
    engine = EngineConfig(
        slots=given.slots,
        max_batch=given.max_batch,
        max_wait_ms=given.max_wait_ms,
        depth=given.depth,
        memory=given.memory_mb * MIB,
        processor_timeout=given.processor_timeout,
        device_timeout=given.device_timeout,
        require_pinned=given.require_pinned,
        max_frame_sizes=given.max_frame_sizes,
    )
    values = {name: getattr(given, name) for name in _PLAIN} | changes
    values["latency_budget"] = given.latency_budget_ms / 1e3
    values["limits"] = LimitConfig(**{name: getattr(given, name) for name in _LIMITS})
    return ServeConfig(
        engine=engine, max_body=given.max_body_mb * MIB, max_collected=given.max_collected_mb * MIB, **values
    )


_PLAIN = (
    *("backend", "device", "capability", "pipeline", "app_version", "slot_wait", "body_timeout", "job_timeout"),
    *("max_pixels", "max_connections", "drain_seconds", "admin_port"),
    *("max_streams", "error_budget", "lossless", "encoder", "insecure", "require_gpu", "otel_endpoint"),
)
_ENGINE = (
    *("slots", "max_batch", "max_wait_ms", "depth", "processor_timeout", "device_timeout", "require_pinned"),
    "max_frame_sizes",
)
_LIMITS = tuple(each.name for each in fields(LimitConfig))


def _changes(given: argparse.Namespace) -> dict[str, object]:
    """Only what was given, by field of ServeConfig; ``engine`` and ``limits`` are dicts of their fields."""
    said = {name: value for name, value in vars(given).items() if value is not None}
    changes: dict[str, object] = {name: said[name] for name in ("host", "port", *_PLAIN) if name in said}
    if "max_body_mb" in said:
        changes["max_body"] = said["max_body_mb"] * MIB
    if "max_collected_mb" in said:
        changes["max_collected"] = said["max_collected_mb"] * MIB
    if "latency_budget_ms" in said:
        changes["latency_budget"] = said["latency_budget_ms"] / 1e3
    engine = {name: said[name] for name in _ENGINE if name in said}
    if "memory_mb" in said:
        engine["memory"] = said["memory_mb"] * MIB
    limits = {name: said[name] for name in _LIMITS if name in said}
    return changes | ({"engine": engine} if engine else {}) | ({"limits": limits} if limits else {})


def _logging(level: str, kind: str) -> None:
    shape = logs.formatter(kind)
    if level.upper() not in logging.getLevelNamesMapping():
        raise ConfigError(f"--log-level {level!r} is not one of debug, info, warning, error")
    logging.basicConfig(level=level.upper())
    for handler in logging.getLogger().handlers:
        handler.setFormatter(shape)


def _serve(argv: Sequence[str]) -> int:
    parser = _parser("serve", "Serve a processor over HTTP.")
    default = ServeConfig()
    names = "green_tint, grayscale, passthrough, module:Class or file.py:Class"
    _add_flag(parser, "processor", str, default.processor, names)
    _add_flag(parser, "host", str, default.host, "address to listen on")
    _add_flag(parser, "port", int, default.port, "port to listen on; 0 takes a free one")
    for flag in _worker_flags():
        _add_flag(parser, *flag)
    _add_registration(parser)
    _add_security(parser)
    _add_limits(parser)
    given = parser.parse_args(argv)
    import asyncio

    from gpu_byoc.plugins import load_processor
    from gpu_byoc.worker.serve import leave, run

    _logging(given.log_level, given.log_format)
    _warn_of_unknown_variables()
    plain = {"host": given.host, "port": given.port, "processor": given.processor}
    config = _config(given, **plain, **_security(given), registration=_registration(given))
    if code := asyncio.run(run(config, load_processor(given.processor))):
        leave(code)
    return 0


def _run(argv: Sequence[str]) -> int:
    about = "Run a file that ends in asyncio.run(run_processor(...)), as on the quickstart page."
    parser = _parser("run", about, "FILE [options]")
    parser.formatter_class = argparse.HelpFormatter
    parser.add_argument("file", type=Path, help="the Python file; a flag wins over what it says")
    _add_flag(parser, "host", str, None, "address to listen on")
    _add_flag(parser, "port", int, None, "port to listen on; 0 takes a free one")
    for name, kind, _, text in _worker_flags():
        _add_flag(parser, name, kind, None, text)
    _add_registration(parser)
    _add_security(parser)
    _add_limits(parser, defaults=False)
    given = parser.parse_args(argv)
    from gpu_byoc.worker import pagerun, serve

    _logging(given.log_level or "info", given.log_format or "text")
    _warn_of_unknown_variables()
    serve.override(**_changes(given), **_security(given), registration=_registration(given))
    return pagerun.run_file(given.file)


def _livepeer(argv: Sequence[str]) -> int:
    from gpu_byoc.local import network

    return network.main(argv)


def _attach(argv: Sequence[str]) -> int:
    from gpu_byoc.local import attach

    return attach.main(argv)


def _usage(argv: Sequence[str]) -> int:
    from gpu_byoc.local import usage

    return usage.main(argv)


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


def _bench(argv: Sequence[str]) -> int:
    from gpu_byoc_benchmarks.__main__ import main as measure

    return int(measure(argv))


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


def _verify(argv: Sequence[str]) -> int:
    from gpu_byoc.checks import verify

    return verify.main(argv)


def _doctor(argv: Sequence[str]) -> int:
    from gpu_byoc.checks import doctor

    return doctor.main(argv)


def _health(argv: Sequence[str]) -> int:
    from gpu_byoc.checks import health

    return health.main(argv)


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": _serve,
    "run": _run,
    "livepeer": _livepeer,
    "config": _attach,
    "usage": _usage,
    "job": _job,
    "stream": _stream,
    "trickle": _trickle,
    "demo": _demo,
    "bench": _bench,
    "backends": _backends,
    "doctor": _doctor,
    "verify": _verify,
    "health": _health,
}
