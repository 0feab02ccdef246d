"""The operator's port: ``POST /drain`` and ``GET /debug``, on loopback, and never on the port that the network calls.

It is off unless ``--admin-port`` is given: SIGTERM drains as well, several workers on a machine would fight over any
fixed port, and what does not listen cannot be attacked. It has a thread of its own, so that it can say what the event
loop is doing when that one is stuck. In a container it is reached with ``docker exec``.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import CancelledError
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from gpu_byoc._version import VERSION
from gpu_byoc.transport.listen import bind, port_of

if TYPE_CHECKING:
    from gpu_byoc.worker.app import Worker

HOST: Final = "127.0.0.1"
NAMES: Final = ("127.0.0.1", "localhost")

CLIENT_SECONDS: Final = 5.0
LOOP_SECONDS: Final = 2.0
"""How long the event loop may take for its part of ``/debug``; then that is what is told."""


class Admin:
    """Listens from the start on. ``drain`` is called on the event loop, any number of times.

    Raises, when it is made: PortInUse.
    """

    def __init__(self, port: int, worker: Worker, drain: Callable[[], None]) -> None:
        self._worker = worker
        self._drain = drain
        self._loop = asyncio.get_running_loop()
        sock = bind(HOST, port)
        self.port = port_of(sock)
        admin = self

        class Handler(_Handler):
            owner = admin

        self._server = ThreadingHTTPServer((HOST, self.port), Handler, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = sock
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="admin", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Blocks for a tenth of a second. Requests under way are left to their daemon threads."""
        self._server.shutdown()
        self._thread.join()
        self._server.socket.close()

    # --- on the requests' threads

    def post(self, path: str) -> tuple[int, dict[str, Any]]:
        if path != "/drain":
            return 404, _error("POST /drain and GET /debug are what there is")
        self._loop.call_soon_threadsafe(self._drain)
        return 202, {"status": "draining"}

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        if path != "/debug":
            return 404, _error("POST /drain and GET /debug are what there is")
        return 200, {
            "version": VERSION,
            "worker": self._asked(),
            "threads": _threads(),
            "tasks": [{"name": task.get_name(), "waits_at": _chain(task)} for task in asyncio.all_tasks(self._loop)],
        }

    def _asked(self) -> dict[str, Any]:
        """What ``/health?deep=1`` says, or that the loop does not answer."""

        async def ask() -> dict[str, Any]:
            found: dict[str, Any] = json.loads(self._worker.health.deep()[1])
            return found

        future = asyncio.run_coroutine_threadsafe(ask(), self._loop)
        try:
            return future.result(LOOP_SECONDS)
        except (TimeoutError, CancelledError):
            future.cancel()
            return {"event_loop": f"did not answer within {LOOP_SECONDS:g} s; its thread is MainThread, as a rule"}


class _Handler(BaseHTTPRequestHandler):
    owner: Admin
    timeout = CLIENT_SECONDS
    server_version = "gpu-byoc"
    sys_version = ""

    def do_GET(self) -> None:
        self._answer(self.owner.get)

    def do_POST(self) -> None:
        self._answer(self.owner.post)

    def _answer(self, ask: Callable[[str], tuple[int, dict[str, Any]]]) -> None:
        """A page in a browser on this machine must not reach it: neither by script nor by a name of its own."""
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if host not in NAMES or "Origin" in self.headers:
            status, body = 403, _error("only for this machine, by 127.0.0.1 or localhost, and not for browsers")
        else:
            status, body = ask(urlsplit(self.path).path)
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """No line for each request."""


def _error(message: str) -> dict[str, str]:
    return {"status": "error", "error": "bad_request", "message": message}


def _threads() -> list[dict[str, Any]]:
    """Every thread and where it is, innermost last. No values of variables: they may be secrets."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return [
        {"name": names.get(ident, "?"), "stack": [_place(*line[:3]) for line in traceback.extract_stack(frame)]}
        for ident, frame in sys._current_frames().items()
    ]


def _chain(task: asyncio.Task[Any]) -> list[str]:
    """The places at which a task waits, innermost last."""
    places: list[str] = []
    waiting: Any = task.get_coro()
    while waiting is not None:
        frame = getattr(waiting, "cr_frame", None) or getattr(waiting, "gi_frame", None)
        if frame is not None:
            places.append(_place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        waiting = getattr(waiting, "cr_await", None) or getattr(waiting, "gi_yieldfrom", None)
    return places


def _place(file: str, line: int | None, function: str) -> str:
    return f"{file}:{line} {function}"
