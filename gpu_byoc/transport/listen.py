"""Listening sockets, and who has the port when ours is taken."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import itertools
import logging
import socket
from pathlib import Path

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from gpu_byoc.errors import ConfigError, PortInUse
from gpu_byoc.transport import doorman

READ_BUFFER = 1 << 20
"""Bytes of a body that may wait to be read. One 640x480 RGB frame fits (921,600 bytes), so that reading is not paused
and resumed several times within it."""

RECV_SIZE = 1 << 20
"""Bytes asked for at a time. asyncio asks for 256 KiB; a 640x480 frame in one piece instead of four took a sixth off
the latency of gateway -> orchestrator -> worker."""

BACKLOG = 1024
"""Connections that may wait to be accepted: clients that come all at once are queued, not refused."""


KEEP_SECONDS = 75.0
"""How long a connection may be idle between two requests: nginx's default, and that of aiohttp's ``run_app``. What
``AppRunner`` takes by itself is an hour, in which each keeps a place from others."""


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


def make_runner(app: web.Application, shutdown: float, keep: float) -> web.AppRunner:
    """How we serve: a handler is cancelled when its client goes away, a connection that is idle for ``keep`` seconds is
    closed, and ``cleanup()`` waits up to ``shutdown`` seconds for handlers. Bodies are not decompressed: one that is
    longer than its Content-Length says is how requests are smuggled through a relay."""
    return web.AppRunner(
        app,
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=shutdown,
        keepalive_timeout=keep,
        read_bufsize=READ_BUFFER,
        auto_decompress=False,
        logger=_log,
    )


class _Malformed(logging.Filter):
    """What is no HTTP is answered with 400 and is its sender's affair. aiohttp logs each as an error, with a traceback:
    anybody could fill the log, and set off alarms."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        # An Expect header that is no UTF-8 breaks aiohttp's own refusal of it, before any of our code is asked.
        expect = isinstance(error, UnicodeEncodeError) and error.object.startswith("Unknown Expect: ")
        if not expect and not isinstance(error, HttpProcessingError):
            return True
        _log.debug("not HTTP: %s", " ".join(str(error).split())[:200])
        return False


_log = logging.getLogger("gpu_byoc.http")
_log.addFilter(_Malformed())


async def serve(app: web.Application, sock: socket.socket, shutdown: float) -> web.AppRunner:
    """Serve ``app`` on ``sock``. The caller ends it with ``runner.cleanup()``."""
    runner = make_runner(app, shutdown, KEEP_SECONDS)
    await runner.setup()
    try:
        await web.SockSite(runner, sock, backlog=BACKLOG).start()
    except BaseException:  # also a cancel: what was set up is taken down
        await runner.cleanup()
        raise
    return runner


def keep_freed_memory() -> None:
    """Tell glibc not to give the memory of each frame back to the kernel, only to fault it in again for the next.

    That was half of the system time of a gateway and of a worker. At most 8 MiB stay with each of four arenas: without
    that bound every few threads of a worker with live streams would get one of their own. Other C libraries: no change.
    For a process's main only: it concerns the whole process.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    m_trim_threshold, m_top_pad, m_mmap_threshold, m_arena_max = -1, -2, -3, -8  # malloc.h
    mallopt(m_arena_max, 4)
    mallopt(m_mmap_threshold, 4 << 20)
    mallopt(m_trim_threshold, 8 << 20)
    mallopt(m_top_pad, 1 << 20)


def widen(transport: asyncio.BaseTransport | None) -> None:
    """Receive RECV_SIZE at a time from now on, where the event loop lets one choose (asyncio's selector loop does)."""
    if transport is not None and hasattr(transport, "max_size"):
        transport.max_size = RECV_SIZE


def port_of(sock: socket.socket) -> int:
    port: int = sock.getsockname()[1]
    return port


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _by(port: int) -> str:
    """`` by pid 12 (python processor.py)``, or nothing where that cannot be seen. Of a worker its own process, never
    its doorman, who has the port too: a worker starts another one when that is stopped."""
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                holder = psutil.Process(connection.pid)
                if doorman.__file__ in holder.cmdline():
                    holder = holder.parent() or holder
                return f" by pid {holder.pid} ({_short(holder.cmdline())})"
    except (psutil.Error, OSError):
        return ""
    return ""


def _short(command: list[str]) -> str:
    """Up to the first long option: ``python gpu-byoc serve``. What follows may be long, or a secret."""
    words = itertools.takewhile(lambda word: not word.startswith("--"), command)
    return " ".join(Path(word).name if word.startswith("/") else word for word in words)[:60]
