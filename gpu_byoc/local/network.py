"""``gpu-byoc livepeer ...``: the quickstart page's two ``livepeer`` commands.

Argument lists become an OrchestratorConfig or a GatewayConfig, and that runs until SIGTERM or SIGINT.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from gpu_byoc._version import VERSION
from gpu_byoc.config import GatewayConfig, OrchestratorConfig, is_plain_url, read_orch_secret
from gpu_byoc.errors import EXIT_USAGE, ConfigError, OperatorError
from gpu_byoc.local import goflags
from gpu_byoc.local.goflags import Flag, Value

log = logging.getLogger(__name__)

# Addresses and directories are those of the quickstart page. An empty address means "the role's own".
FLAGS: Final = (
    Flag("orchestrator", False, "run an orchestrator"),
    Flag("gateway", False, "run a gateway", ("broadcaster",)),
    Flag("network", "offchain", "only offchain: jobs are routed and metered, nothing is paid"),
    Flag("serviceAddr", "127.0.0.1:8936", "orchestrator: where gateways reach it"),
    Flag("byoc", False, "orchestrator: advertise a BYOC container"),
    Flag("byocContainerURL", "", "orchestrator: URL of the running container"),
    Flag("byocModelID", "", "orchestrator: the capability's name, as in X-Model-Id"),
    Flag("byocCapacity", 8, "orchestrator: jobs that the container may get at once"),
    Flag("orchSecret", "", "orchestrator: file with the secret that workers register with; or ORCH_SECRET_FILE"),
    Flag("orchAddr", "127.0.0.1:8936", "gateway: orchestrators, separated by commas"),
    Flag("httpAddr", "127.0.0.1:8935", "gateway: where it takes jobs"),
    Flag("httpIngest", False, "gateway: take jobs over HTTP"),
    Flag("maxBody", 64 << 20, "bytes that the body of a job may have"),
    Flag("jobTimeout", 0, "seconds without a word about a job; 0: 310 for an orchestrator, 320 for a gateway"),
    Flag("cliAddr", "", "where GET /status answers; 127.0.0.1:7936 for an orchestrator, 127.0.0.1:5935 for a gateway"),
    Flag(
        "dataDir",
        "",
        "orchestrator: directory for the ledger, ~/.lpData-orch if none is given; gateway: accepted, nothing is kept",
        ("datadir",),
    ),
    Flag("v", 3, "log level; 6 and more for debugging"),
    Flag("logFormat", "text", "text, or json: one object a line"),
    Flag("version", False, "print the version"),
    Flag("help", False, "print this", ("h",)),
)

_ONLY: Final = {
    "orchestrator": ("serviceAddr", "byoc", "byocContainerURL", "byocModelID", "byocCapacity", "orchSecret"),
    "gateway": ("orchAddr", "httpAddr", "httpIngest"),
}


def main(argv: Sequence[str]) -> int:
    """Run what the flags say; returns the exit status: 0 after SIGTERM or SIGINT, 2 for a mistake in the flags."""
    try:
        values = goflags.parse(FLAGS, argv)
        if values["help"]:
            print(f"gpu-byoc livepeer -orchestrator ... | -gateway ...\n\n{goflags.usage(FLAGS)}")
            return 0
        if values["version"]:
            print(f"gpu-byoc livepeer {VERSION} (the local BYOC network, off-chain)")
            return 0
        from gpu_byoc.local.glog import to_stderr
        from gpu_byoc.transport.listen import keep_freed_memory

        config = read_config(values)
        to_stderr(_int(values, "v"), _text(values, "logFormat"))
        _warn_unused(values)
        _warn_of_secret(_text(values, "orchSecret"))
        keep_freed_memory()
        asyncio.run(_serve(config))
    except OperatorError as error:
        print(f"gpu-byoc livepeer: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


def read_config(values: dict[str, Value]) -> OrchestratorConfig | GatewayConfig:
    """Raises ConfigError, naming the flag, for what cannot be run."""
    if values["orchestrator"] == values["gateway"]:
        raise ConfigError("give one of -orchestrator and -gateway; -help lists the flags")
    if values["network"] != "offchain":
        raise ConfigError(
            f"-network {values['network']}: this is a local network without a chain; use -network offchain"
        )
    if _int(values, "maxBody") < 1:
        raise ConfigError("-maxBody must be at least 1")
    if _int(values, "jobTimeout") < 0:
        raise ConfigError("-jobTimeout must not be negative")
    config = _orchestrator(values) if values["orchestrator"] else _gateway(values)
    seconds = _int(values, "jobTimeout")
    return replace(config, job_timeout=float(seconds)) if seconds else config


def _orchestrator(values: dict[str, Value]) -> OrchestratorConfig:
    host, port = address(_text(values, "serviceAddr"), "-serviceAddr")
    cli_host, cli_port = address(_text(values, "cliAddr") or "127.0.0.1:7936", "-cliAddr")
    url, model = _text(values, "byocContainerURL"), _text(values, "byocModelID")
    if values["byoc"]:
        for flag, value in (("-byocContainerURL", url), ("-byocModelID", model)):
            if not value:
                raise ConfigError(f"-byoc needs {flag} too")
        url = http_url(url, "-byocContainerURL")
        if not model.isprintable() or model != model.strip():
            raise ConfigError(
                f"-byocModelID {model!r}: it travels in a header; no spaces around it, only what can be printed"
            )
    elif url or model:
        raise ConfigError("-byocContainerURL and -byocModelID do nothing without -byoc; add -byoc")
    return OrchestratorConfig(
        host=host,
        port=port,
        cli_host=cli_host,
        cli_port=cli_port,
        datadir=_directory(_text(values, "dataDir") or "~/.lpData-orch"),
        byoc=bool(values["byoc"]),
        container_url=url,
        model_id=model,
        capacity=_int(values, "byocCapacity"),
        secret=read_orch_secret(_text(values, "orchSecret")),
        max_body=_int(values, "maxBody"),
    )


def _gateway(values: dict[str, Value]) -> GatewayConfig:
    host, port = address(_text(values, "httpAddr"), "-httpAddr")
    cli_host, cli_port = address(_text(values, "cliAddr") or "127.0.0.1:5935", "-cliAddr")
    urls = [part.strip() for part in _text(values, "orchAddr").split(",") if part.strip()]
    if not urls:
        raise ConfigError("-orchAddr names no orchestrator")
    urls = [http_url(url if "://" in url else f"http://{url}", "-orchAddr") for url in urls]
    return GatewayConfig(
        orchestrators=tuple(dict.fromkeys(urls)),
        host=host,
        port=port,
        cli_host=cli_host,
        cli_port=cli_port,
        http_ingest=bool(values["httpIngest"]),
        max_body=_int(values, "maxBody"),
    )


def address(text: str, flag: str) -> tuple[str, int]:
    """``127.0.0.1:8936``, ``[::1]:8936`` or ``:8936`` (every interface), http:// before it or not, as host and port."""
    if text.startswith("https://"):
        raise ConfigError(f"{flag} {text}: this network is plain HTTP; put a TLS proxy in front of it")
    host, colon, port = text.removeprefix("http://").rstrip("/").rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ConfigError(f"{flag} {text}: not HOST:PORT")
    host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    return host or "0.0.0.0", int(port)


def http_url(text: str, flag: str) -> str:
    """A URL that connections can be opened to, without a slash at its end."""
    if not is_plain_url(text):
        raise ConfigError(f"{flag} {text}: not a URL like http://127.0.0.1:8000")
    return text.rstrip("/")


async def _serve(config: OrchestratorConfig | GatewayConfig) -> None:
    from gpu_byoc.local.gateway import Gateway
    from gpu_byoc.local.orchestrator import Orchestrator

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    node = Orchestrator(config) if isinstance(config, OrchestratorConfig) else Gateway(config)
    async with node:
        await stop.wait()
        log.info("shutting down")


def _warn_unused(values: dict[str, Value]) -> None:
    other = "gateway" if values["orchestrator"] else "orchestrator"
    defaults = {flag.name: flag.default for flag in FLAGS}
    unused = [f"-{name}" for name in _ONLY[other] if values[name] != defaults[name]]
    if unused:
        log.warning("without effect, because they are for the %s: %s", other, ", ".join(unused))


def _warn_of_secret(given: str) -> None:
    if given and not Path(given).is_file():
        log.warning("-orchSecret: every user of this machine can read it in the list of processes; name a file")


def _directory(text: str) -> Path:
    return Path(text).expanduser()


def _text(values: dict[str, Value], name: str) -> str:
    return str(values[name])


def _int(values: dict[str, Value], name: str) -> int:
    return int(values[name])
