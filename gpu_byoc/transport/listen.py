"""Listening sockets, and who has the port when ours is taken."""

from __future__ import annotations

import errno
import socket

from aiohttp import web

from gpu_byoc.errors import ConfigError, PortInUse

READ_BUFFER = 1 << 20
"""Bytes of a body that may wait to be read. One 640x480 RGB frame fits (921,600 bytes), so that reading is not paused
and resumed several times within it."""

BACKLOG = 1024
"""Connections that may wait to be accepted: clients that come all at once are queued, not refused."""


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes a free one.

    Raises:
        PortInUse: names the port, and the process that has it where the system tells.
        ConfigError: the address is not one of this machine's.
    """
    try:
        return socket.create_server((host, port), family=_family(host), backlog=BACKLOG)
    except socket.gaierror as error:
        raise ConfigError(f"cannot listen on {host!r}: {error.strerror}") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"port {port} is in use{_by(port)}; stop it, or choose another port") from error
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error


async def serve(app: web.Application, sock: socket.socket, shutdown: float) -> web.AppRunner:
    """Serve ``app`` on ``sock``. The caller ends it with ``runner.cleanup()``, which waits up to ``shutdown`` seconds
    for handlers. A handler is cancelled when its client goes away."""
    runner = web.AppRunner(
        app, access_log=None, handler_cancellation=True, shutdown_timeout=shutdown, read_bufsize=READ_BUFFER
    )
    await runner.setup()
    try:
        await web.SockSite(runner, sock, backlog=BACKLOG).start()
    except BaseException:
        await runner.cleanup()
        raise
    return runner


def port_of(sock: socket.socket) -> int:
    port: int = sock.getsockname()[1]
    return port


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _by(port: int) -> str:
    """`` by pid 12 (python processor.py)``, or nothing where that cannot be seen."""
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                command = " ".join(psutil.Process(connection.pid).cmdline())
                return f" by pid {connection.pid} ({command[:120]})"
    except (psutil.Error, OSError):
        return ""
    return ""
