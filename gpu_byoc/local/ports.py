"""Listening: aiohttp sites on one address, and who it is that has the port already."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

from gpu_byoc.errors import ConfigError, OperatorError, PortInUse
from gpu_byoc.local.relay import READ_BUFSIZE

SHUTDOWN_SECONDS: Final = 5.0
"""Jobs that are under way may take this long to end after SIGTERM; the default kill comes after 10 s."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Listener:
    """A server that listens; ``port`` is the real one where 0 was asked for."""

    runner: web.AppRunner
    host: str
    port: int

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    async def close(self) -> None:
        """Stop listening, wait for the jobs under way, then drop what is left."""
        await self.runner.cleanup()


async def listen(routes: list[web.RouteDef], host: str, port: int, flag: str) -> Listener:
    """Serve ``routes`` on host and port. Raises PortInUse or ConfigError, both naming ``flag``."""
    app = web.Application()
    app.router.add_routes(routes)
    runner = web.AppRunner(
        app,
        access_log=None,
        handler_cancellation=True,  # a client that goes away ends its job
        read_bufsize=READ_BUFSIZE,
        shutdown_timeout=SHUTDOWN_SECONDS,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise await _cannot_listen(error, host, port, flag) from error
    return Listener(runner, host, runner.addresses[0][1])


async def _cannot_listen(error: OSError, host: str, port: int, flag: str) -> OperatorError:
    if error.errno == errno.EADDRINUSE:
        owner = await asyncio.to_thread(owner_of, port)
        return PortInUse(
            f"port {port} is in use by {owner}; end that process, or give {flag} another port (address {host}:{port})"
        )
    return ConfigError(f"{flag}: cannot listen on {host}:{port}: {error.strerror or error}")


def owner_of(port: int) -> str:
    """Who listens on a TCP port of this machine, in words: "python -m http.server (pid 4711)"."""
    import psutil

    try:
        found = [c.pid for c in psutil.net_connections("tcp") if _listens(c, port)]
        pid = next((pid for pid in found if pid is not None), None)
        if pid is None:
            return "another process (its owner can be seen by root only)" if found else "another process"
        return f"{_command(psutil.Process(pid))} (pid {pid})"
    except psutil.Error:
        return "another process"


def _listens(connection: Any, port: int) -> bool:
    return connection.status == "LISTEN" and bool(connection.laddr) and connection.laddr.port == port


def _command(process: Any) -> str:
    command = " ".join(process.cmdline()) or process.name()
    return command if len(command) <= 100 else f"{command[:97]}..."
