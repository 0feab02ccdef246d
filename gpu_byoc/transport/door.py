"""The way in: a thread of its own accepts connections, answers what must be answered at once, and hands the rest on.

An event loop that moves frames for many connections comes around late: a new connection's ``GET /health`` would wait
for a third of a second beside 64 busy ones. This thread has nothing else to do. It looks at a request's head without
taking it out of the socket (``MSG_PEEK``), so that whoever gets the connection after it finds it untouched.

Everything is bounded: how long a head may take, how many connections wait here, how many are let in. One too many is
told so with 503.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import json
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Final, TypeAlias

from aiohttp import web

from gpu_byoc.transport.listen import BACKLOG, KEEP_SECONDS, make_runner

log = logging.getLogger("gpu_byoc.http")

Answer: TypeAlias = Callable[[str], tuple[int, bytes] | None]
"""A request's target -> (status, JSON), or None: not for the door. Called on its thread; must not wait."""

HEAD_SECONDS: Final = 10.0
"""Within which a request's head must have come."""

LINGER_SECONDS: Final = 1.0
"""How long a client that was turned away may go on sending: closed at once, the answer might never reach it."""

AT_THE_DOOR: Final = 256
"""Connections that have not said yet what they want, or ask nothing but how we are. The oldest makes room."""

PEEK: Final = 32768
"""Bytes that a head may have, as with nginx. Inside, nobody watches how long one takes, so a longer one stays out."""

SWEEP: Final = 1.0


class Door:
    """``start`` and ``close`` on the event loop. ``most`` connections are inside at once. ``lost`` is called on the
    event loop if nobody can come in any more: a defect, and only a restart helps."""

    def __init__(
        self,
        app: web.Application,
        sock: socket.socket,
        answer: Answer,
        most: int,
        shutdown: float,
        lost: Callable[[], None],
    ) -> None:
        self.most = most
        self.refused = 0
        self._sock = sock
        self._answer = answer
        self._lost = lost
        self._runner = make_runner(app, shutdown)
        self._inside = 0
        self._lock = threading.Lock()  # over ``_inside``: seats are taken here and given back on the loop
        self._guests: dict[_Guest, None] = {}  # the one that was answered last comes last
        self._selector = selectors.DefaultSelector()
        self._ear, self._bell = socket.socketpair()
        self._over = False
        self._entering: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="door", daemon=True)

    @property
    def inside(self) -> int:
        """Connections that were let in and are open."""
        return self._inside

    @property
    def waiting(self) -> int:
        """Connections at the door."""
        return len(self._guests)

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._runner.setup()
        self._sock.setblocking(False)
        self._selector.register(self._sock, selectors.EVENT_READ)
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._thread.start()

    async def close(self) -> None:
        """Nobody comes in any more; then those inside are waited for, up to ``shutdown`` seconds, and cut off."""
        self._over = True
        with contextlib.suppress(BrokenPipeError):  # the thread is gone already
            self._bell.send(b"x")
        await asyncio.to_thread(self._thread.join)
        self._bell.close()
        if self._entering:
            await asyncio.wait(self._entering)
        await self._runner.cleanup()

    # --- on the thread

    def _run(self) -> None:
        try:
            while not self._over:
                for key, _ in self._selector.select(SWEEP if self._guests else None):
                    if key.fileobj is self._sock:
                        self._accept()
                    elif key.data in self._guests:  # may have made room for another one a moment ago
                        self._look(key.data)
                self._sweep()
        except Exception as bug:  # of ours; a worker that cannot be reached must not go on as if it could
            log.critical("the thread that accepts connections failed", exc_info=bug)
            self._loop.call_soon_threadsafe(self._lost)
        finally:
            for guest in list(self._guests):
                self._send_away(guest)
            self._selector.close()
            self._ear.close()

    def _accept(self) -> None:
        for _ in range(BACKLOG):
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError:  # no descriptors or no memory: what waits here goes before what works
                if self._guests:
                    self._send_away(next(iter(self._guests)))
                else:
                    time.sleep(SWEEP / 10)
                return
            sock.setblocking(False)
            guest = _Guest(sock, time.monotonic() + HEAD_SECONDS)
            self._guests[guest] = None
            self._selector.register(sock, selectors.EVENT_READ, guest)
            if len(self._guests) > AT_THE_DOOR:
                self._send_away(next(iter(self._guests)))
            self._look(guest)  # its request came with it, as a rule

    def _look(self, guest: _Guest) -> None:
        try:
            head = guest.sock.recv(PEEK, socket.MSG_PEEK)
            if guest.leaving:
                guest.sock.recv(PEEK)
        except BlockingIOError:
            return
        except OSError:
            head = b""
        if not head:
            self._send_away(guest)
        elif not guest.leaving:
            self._heard(guest, head)

    def _heard(self, guest: _Guest, head: bytes) -> None:
        end = head.find(b"\r\n\r\n")
        if end < 0:
            self._unfinished(guest, len(head))
            return
        guest.forget_head()
        request, _, fields = head[:end].lower().partition(b"\r\n")
        target = head[: len(request)].split(b" ")
        bodiless = b"content-length" not in fields and b"transfer-encoding" not in fields
        answer = None
        if len(target) == 3 and target[0] == b"GET" and bodiless:
            answer = self._answer(target[1].decode("latin-1"))
        if answer is None:
            self._let_in(guest)
            return
        guest.sock.recv(end + 4)
        keep = request.endswith(b" http/1.1") and b"connection: close" not in fields
        self._say(guest, *answer, keep=keep)

    def _unfinished(self, guest: _Guest, seen: int) -> None:
        """So much of a head is there, and not its end."""
        if seen >= PEEK:
            self._say(guest, 431, _error("bad_request", f"a head of more than {PEEK} bytes"), keep=False)
        elif seen == guest.seen:  # woken without more: nothing more comes
            guest.sock.recv(seen)  # what is not read would make a reset of the end
            self._send_away(guest)
        else:
            if not guest.seen:
                guest.until = min(guest.until, time.monotonic() + HEAD_SECONDS)
            guest.seen = seen
            guest.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, seen + 1)  # woken when more has come

    def _say(self, guest: _Guest, status: int, body: bytes, *, keep: bool, more: str = "") -> None:
        """Answer, and wait for the next request or for the client to go."""
        head = (
            f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\nContent-Type: application/json; charset=utf-8\r\n"
            f"Content-Length: {len(body)}\r\n{more}{'' if keep else 'Connection: close' + chr(13) + chr(10)}\r\n"
        )
        del self._guests[guest]
        self._guests[guest] = None
        guest.forget_head()
        guest.leaving = not keep
        guest.until = time.monotonic() + (KEEP_SECONDS if keep else LINGER_SECONDS)
        try:
            whole = guest.sock.send(head.encode() + body) == len(head) + len(body)
            if not keep:
                guest.sock.shutdown(socket.SHUT_WR)
        except OSError:
            whole = False
        if not whole:  # it reads nothing
            self._send_away(guest)

    def _let_in(self, guest: _Guest) -> None:
        with self._lock:
            full = self._inside >= self.most
            self._inside += not full
        if full:
            self.refused += 1
            text = f"{self.most} connections are open, --max-connections allows no more; try again"
            self._say(guest, 503, _error("overloaded", text), keep=False, more="Retry-After: 1\r\n")
            return
        self._selector.unregister(guest.sock)
        del self._guests[guest]
        seat = _Seat(guest.sock, self._left)
        try:
            self._loop.call_soon_threadsafe(self._enter, seat)
        except RuntimeError:  # the loop is closed
            seat.close()

    def _left(self) -> None:
        with self._lock:
            self._inside -= 1

    def _sweep(self) -> None:
        now = time.monotonic()
        for guest in [each for each in self._guests if each.until <= now]:
            if guest.seen:
                text = f"no whole head of a request within {HEAD_SECONDS:g} s"
                self._say(guest, 408, _error("body_timeout", text), keep=False)
            else:
                self._send_away(guest)

    def _send_away(self, guest: _Guest) -> None:
        self._selector.unregister(guest.sock)
        del self._guests[guest]
        guest.sock.close()

    # --- on the loop

    def _enter(self, seat: socket.socket) -> None:
        task = asyncio.create_task(self._seated(seat))
        self._entering.add(task)
        task.add_done_callback(self._entering.discard)

    async def _seated(self, seat: socket.socket) -> None:
        server = self._runner.server
        if server is None:  # cleaned up meanwhile
            seat.close()
            return
        try:
            await self._loop.connect_accepted_socket(server, seat)
        except BaseException as error:  # a cancel above all; a client that is gone already
            seat.close()
            if not isinstance(error, OSError):
                raise


class _Guest:
    """A connection at the door, until ``until``. ``seen`` bytes of a head that is not complete; ``leaving``: it was
    told to go."""

    __slots__ = ("leaving", "seen", "sock", "until")

    def __init__(self, sock: socket.socket, until: float) -> None:
        self.sock = sock
        self.until = until
        self.seen = 0
        self.leaving = False

    def forget_head(self) -> None:
        if self.seen:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
            self.seen = 0


def _error(code: str, message: str) -> bytes:
    return json.dumps({"status": "error", "error": code, "message": message}).encode()


class _Seat(socket.socket):
    """A connection inside. Says when it is closed, once, by whomever."""

    def __init__(self, sock: socket.socket, left: Callable[[], None]) -> None:
        super().__init__(sock.family, sock.type, sock.proto, fileno=sock.detach())
        self.setblocking(False)
        self._left = left

    def close(self) -> None:
        if self.fileno() != -1:
            with contextlib.suppress(OSError):  # a reset by the other side, told at the close
                super().close()
            self._left()
