"""``gpu-byoc health``: is the worker well? For people, and for a container's HEALTHCHECK.

A container runs this every few seconds, so it is the standard library alone, over a bare socket: ``http.client`` takes
as long to import as the rest, and knows no limit on the whole exchange.
"""

from __future__ import annotations

import argparse
import json
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from gpu_byoc.config import env
from gpu_byoc.errors import ConfigError

WELL: Final = ("IDLE", "OK")
_WORDS: Final = {
    "LOADING": "the processor is still initialising; the worker's log says how far it is",
    "ERROR": "only a restart helps; the worker's log says why",
}
_LONGEST: Final = 64 * 1024  # bytes of an answer; ours has fewer than 300


@dataclass(frozen=True, slots=True)
class Health:
    """``state`` is what the worker calls itself, or ``UNREACHABLE`` or ``MALFORMED``; ``reason`` says more."""

    state: str
    reason: str = ""

    @property
    def well(self) -> bool:
        return self.state in WELL

    def __str__(self) -> str:
        return f"{self.state}: {self.reason}" if self.reason else self.state


def default_url(port: str) -> str:
    """Where a worker on this machine answers that listens on ``port``.

    Raises:
        ConfigError: it is not a port, or 0, which the worker replaces with one that cannot be known here.
    """
    if not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ConfigError(f"GPU_BYOC_PORT is {port!r}, which says no port to ask; give --url")
    return f"http://127.0.0.1:{int(port)}"


def ask(url: str, timeout: float) -> Health:
    """One ``GET /health``, done after ``timeout`` seconds at the latest; the look-up of a host's name comes on top, and
    the system bounds that. Proxies are not used.

    Raises:
        ConfigError: ``url`` is no ``http://host[:port]``.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 80
    except ValueError as error:
        raise ConfigError(f"--url {url}: {error}") from error
    if parts.scheme != "http" or not host or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(f"--url {url!r} is not http://HOST:PORT")
    path = parts.path.rstrip("/")
    try:
        answer = _exchange(host, port, path if path.endswith("/health") else path + "/health", timeout)
    except OSError as error:
        why = f"no answer within {timeout:g} s" if isinstance(error, TimeoutError) else error.strerror or str(error)
        return Health("UNREACHABLE", f"{host}:{port}: {why}")
    except UnicodeError as error:  # of the look-up: a name with an empty or an endless part
        raise ConfigError(f"--url {url!r}: {host!r} is no name of a host") from error
    return read(answer)


def _exchange(host: str, port: int, path: str, timeout: float) -> bytes:
    """The whole answer. HTTP/1.0, so that it comes in one piece and ends with the connection."""
    until = time.monotonic() + timeout
    name = f"[{host}]" if ":" in host else host
    request = f"GET {path} HTTP/1.0\r\nHost: {name}:{port}\r\nAccept: application/json\r\nConnection: close\r\n\r\n"
    answer = bytearray()
    with socket.create_connection((host, port), timeout) as connection:
        connection.sendall(request.encode())
        while len(answer) <= _LONGEST:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            connection.settimeout(left)
            piece = connection.recv(_LONGEST)
            if not piece:
                break
            answer += piece
    return bytes(answer)


def read(answer: bytes) -> Health:
    """What an HTTP answer says. Well is 200 and a state of WELL, nothing else."""
    head, blank, body = answer.partition(b"\r\n\r\n")
    status = head.partition(b"\r\n")[0].split(b" ")
    if not blank or len(status) < 2 or not status[0].startswith(b"HTTP/1.") or not status[1].isdigit():
        return Health("MALFORMED", f"no HTTP answer: {answer[:60]!r}")
    code = status[1].decode()
    try:
        said = json.loads(body)
        state = said["status"]
        if not (isinstance(state, str) and state.isidentifier() and state.isascii() and len(state) < 40):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        return Health("MALFORMED", f"HTTP {code} without a status in JSON; is that a worker? {body[:60]!r}")
    state = state.upper()
    if state in WELL:
        return Health(state) if code == "200" else Health("MALFORMED", f"HTTP {code} with the status {state}")
    return Health(state, _WORDS.get(state, f"not a state of a worker that is well ({' or '.join(WELL)})"))


def main(argv: Sequence[str]) -> int:
    """Print the state; 0 when the worker is well, 1 otherwise (a container's runtime knows no other status)."""
    parser = argparse.ArgumentParser(prog="gpu-byoc health", allow_abbrev=False, description="Ask a worker how it is.")
    parser.add_argument("--url", help="of the worker (default: http://127.0.0.1:8000, or the port in GPU_BYOC_PORT)")
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds for everything (default: %(default)s)")
    given = parser.parse_args(argv)
    if not 0 < given.timeout < 3600:
        parser.error("--timeout must be above 0 seconds and below an hour")
    try:
        health = ask(given.url or default_url(env("GPU_BYOC_PORT", "8000")), given.timeout)
    except ConfigError as error:
        health = Health("UNREACHABLE", str(error))
    print(health)
    return 0 if health.well else 1
