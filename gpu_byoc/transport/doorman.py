"""The doorman: a small process that accepts a worker's connections, answers what must be answered at once, and passes
the rest on to the worker.

A thread of the worker would need the interpreter's lock for that, whose holder is often off the CPU where cores are
short, or in C code that keeps it. This process has nothing else to do. It looks at a request's head without taking it
out of the socket (``MSG_PEEK``), and passes the socket itself on (``SCM_RIGHTS``): whoever gets it finds it untouched.

Run as a file, ``python -I -S doorman.py``, with nothing of the package and little of the standard library: it starts
within 30 ms and takes some 10 MB, of which the interpreter's file is shared. Where there can be no such process, the
``Lobby`` is looked after by the worker's own thread: see ``door``.

On the socket to the worker, each message is one: to the worker, the number of its last question, how many wait here,
were dropped and were idle for too long, with a connection or none; from there, the number of the question that is
answered, 0 before the first, and the answers.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable

TARGETS = ("/health", "/ready")
"""What is answered at the door, without a query."""

LINGER_SECONDS = 1.0
"""How long a client that was turned away may go on sending: closed at once, the answer might never reach it."""

AT_ONCE = 64
"""Connections accepted before others are looked at again."""

BEAT = 0.25
"""Seconds between two answers that the worker sends unasked."""

REPORT = struct.Struct("!IIQQ")
ANSWER = struct.Struct("!HH")
NUMBER = struct.Struct("!I")
MESSAGE = 65536

REASONS = {
    200: "OK",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


class Bounds:
    """``head``: seconds within which a request's head must have come. ``size``: bytes that one may have; inside, nobody
    watches how long it takes, so a longer one stays out. ``keep``: seconds for which a connection may be idle between
    two. ``most``: connections that have not said yet what they want, or ask nothing but how we are; the oldest makes
    room.

    ``sweep``: how often is looked at the clock. ``silence``: seconds after which a worker that says nothing serves
    nobody any more. ``fresh``: for which a worker's answer of this moment is waited for; then its last one is given,
    which is at most BEAT older where it is well."""

    def __init__(
        self,
        head: float,
        size: int,
        keep: float,
        most: int,
        sweep: float = 1.0,
        silence: float = 10.0,
        fresh: float = 0.005,
    ) -> None:
        self.head = head
        self.size = size
        self.keep = keep
        self.most = most
        self.sweep = sweep
        self.silence = silence
        self.fresh = fresh

    def arguments(self) -> list[str]:
        numbers = (self.head, self.size, self.keep, self.most, self.sweep, self.silence, self.fresh)
        return [str(each) for each in numbers]


class Guest:
    """A connection at the door, until ``until``. ``seen`` bytes of a head that is not complete; ``leaving``: it was
    told to go; ``held``: not looked at, something is to come first."""

    __slots__ = ("address", "held", "leaving", "seen", "sock", "until")

    def __init__(self, sock: socket.socket, address: str, until: float) -> None:
        self.sock = sock
        self.address = address
        self.until = until
        self.seen = 0
        self.leaving = False
        self.held = False

    def forget_head(self) -> None:
        if self.seen:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
            self.seen = 0


class Lobby:
    """Connections that have not been let in. ``asked(guest, target, keep)`` is to lead to ``say``, ``let_in(guest)`` to
    ``say`` or ``release``; either at once, or later after ``hold``.

    ``dropped`` counts those that had to go without having been let in: a head that did not end in time or is too long,
    others needed the room, or the worker took nobody. ``idle`` counts those that said nothing for too long.

    All in one thread, which calls ``turn``. Its ``selector`` is for whatever else that thread waits for: a key's data
    is what to call."""

    def __init__(
        self, bounds: Bounds, asked: Callable[[Guest, str, bool], None], let_in: Callable[[Guest], None]
    ) -> None:
        self.bounds = bounds
        self.guests: dict[Guest, None] = {}  # the one that was answered last comes last
        self.dropped = 0
        self.idle = 0
        self.selector = selectors.DefaultSelector()
        self._asked = asked
        self._let_in = let_in

    def listen(self, sock: socket.socket) -> None:
        self.selector.register(sock, selectors.EVENT_READ, lambda: self._accept(sock))

    def turn(self, timeout: float | None) -> None:
        for key, _ in self.selector.select(timeout):
            key.data()
        now = time.monotonic()
        for guest in [each for each in self.guests if each.until <= now]:
            if guest.seen:
                text = f"no whole head of a request within {self.bounds.head:g} s"
                self.dropped += 1
                self.say(guest, 408, error("body_timeout", text), keep=False)
            else:
                self.dropped += guest.held
                self.idle += not (guest.held or guest.leaving)
                self.send_away(guest)

    def say(self, guest: Guest, status: int, body: bytes, *, keep: bool, more: str = "") -> None:
        """Answer, and wait for the next request or for the client to go."""
        close = "" if keep else "Connection: close\r\n"
        head = (
            f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Type: application/json; charset=utf-8\r\n"
            f"Content-Length: {len(body)}\r\n{more}{close}\r\n"
        )
        self.guests.pop(guest, None)
        self.guests[guest] = None
        self._watch(guest)
        guest.forget_head()
        guest.leaving = not keep
        guest.until = time.monotonic() + (self.bounds.keep if keep else LINGER_SECONDS)
        try:
            whole = guest.sock.send(head.encode() + body) == len(head) + len(body)
            if not keep:
                guest.sock.shutdown(socket.SHUT_WR)
        except OSError:
            whole = False
        if not whole:  # it reads nothing
            self.send_away(guest)

    def hold(self, guest: Guest) -> None:
        """Look at it no more until ``say``; it still has to go when others need its room, or its time is up."""
        if not guest.held:
            self.selector.unregister(guest.sock)
            guest.held = True

    def release(self, guest: Guest) -> None:
        """It is somebody else's from now on."""
        self.hold(guest)
        del self.guests[guest]

    def send_away(self, guest: Guest) -> None:
        self.release(guest)
        guest.sock.close()

    def close(self) -> None:
        for guest in list(self.guests):
            self.send_away(guest)
        self.selector.close()

    def _watch(self, guest: Guest) -> None:
        if guest.held:
            self.selector.register(guest.sock, selectors.EVENT_READ, lambda: self._wake(guest))
            guest.held = False

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(AT_ONCE):
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError:  # no descriptors or no memory: what waits here goes before what works
                if self.guests:
                    self._make_room()
                else:
                    time.sleep(self.bounds.sweep / 10)
                return
            sock.setblocking(False)
            guest = Guest(sock, address[0], time.monotonic() + self.bounds.head)
            guest.held = True
            self.guests[guest] = None
            if len(self.guests) > self.bounds.most:
                self._make_room()
            self._look(guest)  # its request came with it, as a rule

    def _make_room(self) -> None:
        self.dropped += 1
        self.send_away(next(iter(self.guests)))

    def _wake(self, guest: Guest) -> None:
        if not guest.held and guest in self.guests:  # it may have made room for another one a moment ago
            self._look(guest)

    def _look(self, guest: Guest) -> None:
        try:
            head = guest.sock.recv(self.bounds.size, socket.MSG_PEEK)
            if guest.leaving:
                guest.sock.recv(self.bounds.size)
        except BlockingIOError:
            self._watch(guest)
            return
        except OSError:
            head = b""
        if not head:
            self.send_away(guest)
        elif not guest.leaving:
            self._heard(guest, head)

    def _heard(self, guest: Guest, head: bytes) -> None:
        end = head.find(b"\r\n\r\n")
        if end < 0:
            self._unfinished(guest, len(head))
            return
        guest.forget_head()
        request, _, fields = head[:end].lower().partition(b"\r\n")
        words = head[: len(request)].split(b" ")
        bodiless = b"content-length" not in fields and b"transfer-encoding" not in fields
        target = words[1].decode("latin-1") if len(words) == 3 and words[0] == b"GET" and bodiless else ""
        if target not in TARGETS:
            self._let_in(guest)
            return
        guest.sock.recv(end + 4)
        keep = request.endswith(b" http/1.1") and b"close" not in fields  # however it is written; we may always close
        self._asked(guest, target, keep)

    def _unfinished(self, guest: Guest, seen: int) -> None:
        """So much of a head is there, and not its end."""
        if seen >= self.bounds.size:
            self.dropped += 1
            self.say(guest, 431, error("bad_request", f"a head of more than {self.bounds.size} bytes"), keep=False)
        elif seen == guest.seen:  # woken without more: nothing more comes
            guest.sock.recv(seen)  # what is not read would make a reset of the end
            self.send_away(guest)
        else:
            if not guest.seen:
                guest.until = min(guest.until, time.monotonic() + self.bounds.head)
            self._watch(guest)
            guest.seen = seen
            guest.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, seen + 1)  # woken when more has come


class Doorman:
    """The process. ``told`` is what the worker has said last; ``pair`` is the socket to it.

    At most one question is on its way: who asks after it was sent waits for the answer to the next one, so that what is
    answered in time is never older than the request."""

    def __init__(self, listener: socket.socket, pair: socket.socket, bounds: Bounds) -> None:
        self._pair = pair
        self._lobby = Lobby(bounds, self._ask, self._let_in)
        self._told: dict[str, tuple[int, bytes]] = {}
        self._heard = time.monotonic()
        self._doubt: float | None = None  # when the worker was first found silent for too long
        self._number = self._answered = 0
        self._asking: dict[Guest, tuple[str, bool, int, float]] = {}  # target, keep, number of its question, deadline
        self._entering: dict[Guest, None] = {}
        self._reported = (0, 0, 0)
        self._over = False
        listener.setblocking(False)
        pair.setblocking(False)
        self._lobby.selector.register(pair, selectors.EVENT_READ, self._meet)
        self._lobby.listen(listener)
        self._hear()

    def run(self, parent: int) -> None:
        """Until the worker hangs up, or is gone and only a fork of it has the other end of the pair."""
        while not self._over and os.getppid() == parent:
            self._lobby.turn(self._patience())
            self._answer()
            if self._reported != self._counts() and self._number == self._answered:
                self._report()
        self._lobby.close()

    def _counts(self) -> tuple[int, int, int]:
        return len(self._lobby.guests), self._lobby.dropped, self._lobby.idle

    def _patience(self) -> float:
        first = min((deadline for *_, deadline in self._asking.values()), default=None)
        sweep = self._lobby.bounds.sweep
        return sweep if first is None else min(sweep, max(first - time.monotonic(), 0.0))

    # --- questions

    def _ask(self, guest: Guest, target: str, keep: bool) -> None:
        self._lobby.hold(guest)
        self._asking[guest] = (target, keep, self._number + 1, time.monotonic() + self._lobby.bounds.fresh)
        self._question()

    def _question(self) -> None:
        if self._number == self._answered:
            self._number += 1
            if not self._report():  # no room; the last answer has to do
                self._number -= 1

    def _report(self) -> bool:
        counts = self._counts()
        try:
            self._pair.send(REPORT.pack(self._number, *counts))
        except OSError:  # no room, or nobody there, which the next look at the pair finds
            return False
        self._reported = counts
        return True

    def _hear(self) -> None:
        while True:
            try:
                message = self._pair.recv(MESSAGE)
            except BlockingIOError:
                return
            except OSError:
                message = b""
            if not message:
                self._over = True
                return
            self._answered, self._told = unpacked(message)
            self._heard, self._doubt = time.monotonic(), None

    def _answer(self) -> None:
        now = time.monotonic()
        for guest, (target, keep, number, deadline) in list(self._asking.items()):
            if guest in self._lobby.guests and number > self._answered and deadline > now:
                continue
            del self._asking[guest]
            if guest in self._lobby.guests:
                self._lobby.say(guest, *self._last(target, now), keep=keep)
        if any(number > self._number for _, _, number, _ in self._asking.values()):
            self._question()

    def _last(self, target: str, now: float) -> tuple[int, bytes]:
        """What the worker has said last, unless it has been silent for too long: and still is so a beat later, for both
        may have been stopped, and this process be the first to go on."""
        silent = now - self._heard
        if silent > self._lobby.bounds.silence and self._doubt is None:
            self._doubt = now
        if target in self._told and (self._doubt is None or now - self._doubt < BEAT):
            return self._told[target]
        if target == "/health":
            return 503, b'{"status": "ERROR"}'
        reason = f"the worker's process has not moved for {silent:.1f} s; a restart helps, the log may say why"
        return 503, f'{{"ready": false, "reason": "{reason}"}}'.encode()

    # --- the way in

    def _meet(self) -> None:
        self._hear()
        self._pass_on()

    def _let_in(self, guest: Guest) -> None:
        """Pass it on; where the worker does not come to it, it has as long again as a head has."""
        self._lobby.hold(guest)
        guest.until = time.monotonic() + self._lobby.bounds.head
        # without those who had to go meanwhile: a worker that stands still takes nobody for as long as it likes
        self._entering = {each: None for each in (*self._entering, guest) if each in self._lobby.guests}
        if len(self._entering) == 1:
            self._pass_on()

    def _pass_on(self) -> None:
        for guest in list(self._entering):
            if guest in self._lobby.guests:
                waiting, dropped, idle = self._counts()
                counts = (waiting - 1, dropped, idle)
                try:
                    socket.send_fds(self._pair, [REPORT.pack(self._number, *counts)], [guest.sock.fileno()])
                    self._reported = counts
                except BlockingIOError:
                    self._lobby.selector.modify(self._pair, selectors.EVENT_READ | selectors.EVENT_WRITE, self._meet)
                    return
                except OSError:  # too many on their way, or nobody there, which the next look at the pair finds
                    pass
                self._lobby.send_away(guest)  # the one that is on its way stays open
            del self._entering[guest]
        self._lobby.selector.modify(self._pair, selectors.EVENT_READ, self._meet)


def packed(number: int, answers: list[tuple[int, bytes]]) -> bytes:
    """``answers`` in the order of TARGETS."""
    return NUMBER.pack(number) + b"".join(ANSWER.pack(status, len(body)) + body for status, body in answers)


def unpacked(message: bytes) -> tuple[int, dict[str, tuple[int, bytes]]]:
    (number,) = NUMBER.unpack_from(message)
    at, found = NUMBER.size, {}
    for target in TARGETS:
        status, length = ANSWER.unpack_from(message, at)
        at += ANSWER.size + length
        found[target] = (status, message[at - length : at])
    return number, found


def error(code: str, message: str) -> bytes:
    return f'{{"status": "error", "error": "{code}", "message": "{message}"}}'.encode()


def main(listener: int, pair: int, parent: int, *bounds: str) -> None:
    head, size, keep, most, sweep, silence, fresh = bounds
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the worker's affair; it ends this process
        signal.signal(number, signal.SIG_IGN)
    limits = Bounds(float(head), int(size), float(keep), int(most), float(sweep), float(silence), float(fresh))
    Doorman(socket.socket(fileno=listener), socket.socket(fileno=pair), limits).run(parent)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
