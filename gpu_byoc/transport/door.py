"""The way in: whoever comes is looked at by a small process of its own, the doorman; a thread takes from it those who
have work for the worker, gives them a seat, and hands them to the event loop.

An event loop that moves frames for many connections comes around late: a new connection's ``GET /health`` would wait
for a third of a second beside 64 busy ones, and for a tenth beside 8 live streams where a thread of this process
answered it. Where there can be no such process, the thread does its work.

Everything is bounded: how long a head may take, how many connections wait here, how many are let in, and how many of
these from one address. One too many is told so with 503.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from aiohttp import web

from gpu_byoc.core.origins import peer
from gpu_byoc.transport import doorman
from gpu_byoc.transport.doorman import BEAT, TARGETS, Bounds, Guest, Lobby, error
from gpu_byoc.transport.listen import make_runner

log = logging.getLogger("gpu_byoc.http")

Answer: TypeAlias = Callable[[str], tuple[int, bytes]]
"""One of TARGETS -> (status, JSON). Called on the door's thread; must not wait."""

DEATHS: Final = 3
"""Of the doorman within DEATHS_SECONDS: then it is done without."""

DEATHS_SECONDS: Final = 10.0

END_SECONDS: Final = 1.0
"""For the doorman to end when it is told to."""

GRAIN: Final = 20
"""Milliseconds by which the kernel's clock of a connection may be behind ours."""

_PASSED_ON: Final = ("LD_LIBRARY_PATH", "PATH", "SYSTEMROOT")
"""Of the environment: what an interpreter may need to start, and nobody's secret."""


class Door:
    """``start`` and ``close`` on the event loop. ``most`` connections are inside at once, ``share`` of them from one
    address: half, so that it cannot keep others out. ``bounds`` are those of the connections at the door; ``keep`` of
    them goes for those inside, too.

    Without ``alone`` there is no doorman; otherwise it is called on the door's thread where there can be none, or none
    any more, and is told why. ``lost`` is called on the event loop if nobody can come in any more: a defect, and only a
    restart helps."""

    def __init__(
        self,
        app: web.Application,
        sock: socket.socket,
        answer: Answer,
        most: int,
        shutdown: float,
        lost: Callable[[], None],
        bounds: Bounds,
        alone: Callable[[str], None] | None = None,
    ) -> None:
        self.most = most
        self.share = (most + 1) // 2
        self.refused = 0
        self.deaths = 0
        self._sock = sock
        self._answer = answer
        self._lost = lost
        self._alone = alone
        self._bounds = bounds
        self._runner = make_runner(app, shutdown, bounds.keep)
        self._inside: Counter[str] = Counter()  # by client
        self._idle = 0  # connections inside that were idle for too long
        self._lock = threading.Lock()  # over these: seats are taken here and given back on the loop
        self._lobby = Lobby(self._bounds, self._asked, self._let_in)
        self._ear, self._bell = socket.socketpair()
        self._over = False
        self._doorman: _Doorman | None = None
        self._died: deque[float] = deque(maxlen=DEATHS)
        self._untold: deque[threading.Event] = deque()  # set when the doorman has been told how we are by then
        self._entering: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="door", daemon=True)

    @property
    def inside(self) -> int:
        """Connections that were let in and are open."""
        with self._lock:
            return self._inside.total()

    @property
    def waiting(self) -> int:
        """Connections at the door; the doorman's, as it last said."""
        doorman = self._doorman  # which the door's thread may take away at any time
        return len(self._lobby.guests) + (doorman.waiting if doorman else 0)

    @property
    def dropped(self) -> int:
        """Connections that had to go from the door without having been let in; the doorman's, as it last said."""
        doorman = self._doorman
        return self._lobby.dropped + (doorman.dropped if doorman else 0)

    @property
    def idle(self) -> int:
        """Connections that were closed because nothing had moved on them for so long, here and inside."""
        doorman = self._doorman
        return self._idle + self._lobby.idle + (doorman.idle if doorman else 0)

    @property
    def doorman(self) -> int | None:
        """Its process id."""
        doorman = self._doorman
        return doorman.process.pid if doorman else None

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._runner.setup()
        self._sock.setblocking(False)
        self._lobby.selector.register(self._ear, selectors.EVENT_READ, lambda: self._ear.recv(1))
        self._thread.start()

    async def tell(self) -> None:
        """What has just changed is known at the door when this returns, in a beat at the latest."""
        told = threading.Event()
        self._untold.append(told)
        with contextlib.suppress(OSError):  # the thread is gone already
            self._bell.send(b"x")
        await asyncio.to_thread(told.wait, BEAT)

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
            if self._alone is None:
                self._lobby.listen(self._sock)
            else:
                self._employ(self._alone)
            while not self._over:
                self._lobby.turn(self._patience())
                self._spread()
            if self._doorman is not None:
                self._dismiss(self._doorman)
        except Exception as bug:  # of ours; a worker that cannot be reached must not go on as if it could
            log.critical("the thread that lets connections in has failed", exc_info=bug)
            self._loop.call_soon_threadsafe(self._lost)
        finally:
            if self._doorman is not None:
                self._part(self._doorman)
            self._lobby.close()
            self._ear.close()

    def _spread(self) -> None:
        """Say how we are, where it is time or something has changed."""
        news = [self._untold.popleft() for _ in range(len(self._untold))]
        if self._doorman is not None:
            self._doorman.beat(at_once=bool(news))
        for told in news:
            told.set()

    def _patience(self) -> float | None:
        if self._doorman is not None:
            return min(BEAT, self._bounds.sweep)
        return self._bounds.sweep if self._lobby.guests else None

    def _employ(self, alone: Callable[[str], None]) -> None:
        """Start a doorman; where that is no use, this thread listens itself."""
        why = ""
        if len(self._died) == DEATHS and self._died[-1] - self._died[0] < DEATHS_SECONDS:
            why = f"its process has ended {DEATHS} times within {DEATHS_SECONDS:g} s"
        else:
            try:
                self._doorman = _Doorman(self._sock, self._answer, self._bounds)
            except OSError as error:  # no process, no descriptors, another system
                why = f"it cannot be started: {error}"
        if self._doorman is not None:
            self._lobby.selector.register(self._doorman.pair, selectors.EVENT_READ, self._meet)
            return
        log.warning("no doorman: %s; /health will be slower under full load", why)
        alone(f"no doorman: {why}; /health will be slower under full load")
        self._lobby.listen(self._sock)

    def _meet(self) -> None:
        """Let in whom the doorman sends. Where it is gone, whoever was with it is, too; the others wait to be accepted,
        for the listening socket is ours."""
        assert self._doorman is not None
        assert self._alone is not None
        for sock in self._doorman.meet():
            if sock is None:
                self.refused += 1
            elif (guest := self._newcomer(sock)) is not None:
                self._let_in(guest)
        if self._doorman.gone and not self._over:
            self._lobby.selector.unregister(self._doorman.pair)
            status = self._part(self._doorman)
            self.deaths += 1
            self._died.append(time.monotonic())
            log.warning("the doorman's process has ended with status %d; another one is started", status)
            self._employ(self._alone)

    def _part(self, doorman: _Doorman) -> int:
        """It has ended, or does now: what it counted is kept, and nobody waits with it. Answers its exit status."""
        status = doorman.end()
        self._doorman = None
        self._lobby.dropped += doorman.dropped
        self._lobby.idle += doorman.idle
        return status

    def _dismiss(self, doorman: _Doorman) -> None:
        """Tell it to end. Whom it has passed on by then comes in."""
        doorman.hang_up()
        deadline = time.monotonic() + END_SECONDS
        while not doorman.gone and (left := deadline - time.monotonic()) > 0:
            self._lobby.turn(left)

    def _newcomer(self, sock: socket.socket) -> Guest | None:
        try:
            address = sock.getpeername()[0]
        except OSError:  # a reset meanwhile
            sock.close()
            return None
        sock.setblocking(False)
        guest = Guest(sock, address, 0.0)
        guest.held = True
        self._lobby.guests[guest] = None
        return guest

    def _asked(self, guest: Guest, target: str, keep: bool) -> None:
        self._lobby.say(guest, *self._answer(target), keep=keep)

    def _let_in(self, guest: Guest) -> None:
        name = client((guest.address,))
        with self._lock:
            why = self._full(name)
            if not why:
                self._inside[name] += 1
        if why:
            self.refused += 1
            self._lobby.say(guest, 503, error("overloaded", why), keep=False, more="Retry-After: 1\r\n")
            return
        self._lobby.release(guest)
        seat = _Seat(guest.sock, lambda quiet: self._left(name, quiet))
        try:
            self._loop.call_soon_threadsafe(self._enter, seat)
        except RuntimeError:  # the loop is closed
            seat.close()

    def _full(self, client: str) -> str:
        """Why nobody, or not this client, can come in; empty where it can. Under the lock."""
        if self._inside.total() >= self.most:
            return f"{self.most} connections are open, --max-connections allows no more; try again"
        if self._inside[client] >= self.share:
            return f"{self.share} connections of your address are open, half of --max-connections; try again"
        return ""

    def _left(self, client: str, quiet: float) -> None:
        with self._lock:
            self._idle += quiet >= self._bounds.keep
            self._inside[client] -= 1
            if not self._inside[client]:
                del self._inside[client]

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


def client(address: Any) -> str:
    """Who that is, as far as a socket's address tells: an IPv4 address, or the first half of an IPv6 one, for whoever
    has one of those has all of its other half. What is no IP address is itself."""
    found = peer(address[0])
    if found is None:
        return str(address[0])
    return str(found) if found.version == 4 or found.is_loopback else found.packed[:8].hex()


class _Doorman:
    """The worker's end of it, all on the door's thread. ``gone``: it sends nobody any more.

    Raises, when it is made: OSError."""

    def __init__(self, listener: socket.socket, answer: Answer, bounds: Bounds) -> None:
        self.waiting = self.dropped = self.idle = 0
        self.gone = False
        self._answer = answer
        self._family, self._type = listener.family, listener.type
        self._number = 0
        self._said_at = 0.0
        self.pair, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self.pair.setblocking(False)
                self._say()  # is there when it starts
                self.process = _spawn(listener.fileno(), theirs.fileno(), bounds)
            except BaseException:  # whatever it is: this end of the pair is not left behind
                self.pair.close()
                raise

    def meet(self) -> list[socket.socket | None]:
        """Whom it has sent by now; None is one for whom there was no descriptor left, and who was cut off. Its last
        question is answered."""
        found: list[socket.socket | None] = []
        number = self._number
        while True:
            try:
                # As accept() has it: Python does not ask for that here, and a child in C would keep them open.
                message, ancillary, flags, _ = self.pair.recvmsg(doorman.REPORT.size, _ROOM, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                break
            except OSError:
                message, ancillary, flags = b"", [], 0
            if not message:
                self.gone = True
                break
            number, self.waiting, self.dropped, self.idle = doorman.REPORT.unpack(message)
            if flags & socket.MSG_CTRUNC:
                found.append(None)
            for _, _, data in ancillary:
                found += [socket.socket(self._family, self._type, fileno=fd) for fd in memoryview(data).cast("i")]
        if number != self._number:
            self._number = number
            self._say()
        return found

    def beat(self, at_once: bool = False) -> None:
        if at_once or time.monotonic() - self._said_at >= BEAT:
            self._say()

    def hang_up(self) -> None:
        with contextlib.suppress(OSError):  # it is gone already
            self.pair.shutdown(socket.SHUT_WR)

    def end(self) -> int:
        """Its exit status. What it has sent and nobody took is closed."""
        self.pair.close()
        try:
            return self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _say(self) -> None:
        self._said_at = time.monotonic()
        answers = [self._answer(target) for target in TARGETS]
        with contextlib.suppress(OSError):  # it does not read, or is gone; the next look at the pair tells
            self.pair.send(doorman.packed(self._number, answers))


_ROOM: Final = socket.CMSG_SPACE(4)
"""For one descriptor."""


def _spawn(listener: int, pair: int, bounds: Bounds) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            *(sys.executable, "-I", "-S", "-B", doorman.__file__),
            *(str(listener), str(pair), str(os.getpid()), *bounds.arguments()),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=(listener, pair),
        cwd="/",
        start_new_session=True,  # Ctrl-C is for us
        env={name: os.environ[name] for name in _PASSED_ON if name in os.environ},
    )


class _Seat(socket.socket):
    """A connection inside. Says when it is closed, once, by whomever; and for how many seconds nothing had moved on it,
    0 where the other side has left."""

    def __init__(self, sock: socket.socket, left: Callable[[float], None]) -> None:
        super().__init__(sock.family, sock.type, sock.proto, fileno=sock.detach())
        self.setblocking(False)
        self._left = left

    def close(self) -> None:
        if self.fileno() != -1:
            quiet = _quiet(self)
            with contextlib.suppress(OSError):  # a reset by the other side, told at the close
                super().close()
            self._left(quiet)


_TCP_INFO: Final = struct.Struct("=B43xI4xI")
"""linux/tcp.h: ``tcpi_state``, ``tcpi_last_data_sent`` and ``tcpi_last_data_recv``, both milliseconds ago."""

_ESTABLISHED: Final = 1


def _quiet(sock: socket.socket) -> float:
    """For how many seconds nothing has been sent or received; 0 where the other side has left, or the system does not
    tell."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        state, sent, received = _TCP_INFO.unpack(info)
    except (AttributeError, OSError, struct.error):
        return 0.0
    return (min(sent, received) + GRAIN) / 1e3 if state == _ESTABLISHED else 0.0
