"""A stream's decoder in a process of its own, which can do nothing but decode: the ``Reader`` on the worker's side.

If that process crashes, hangs or runs out of memory, the stream loses pictures up to its next keyframe, and nobody else
notices. What it may still do is in ``confine.py``.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, Final

import numpy as np

from gpu_byoc.errors import ConfigError, DecoderFailed
from gpu_byoc.media import sandbox_wire as wire
from gpu_byoc.media.audio import AudioPacket
from gpu_byoc.media.confine import WALLS
from gpu_byoc.media.decode import Frame, StreamEvent, VideoInfo
from gpu_byoc.media.demux import VIDEO, Limits, Problem
from gpu_byoc.media.mpegts import WRAP
from gpu_byoc.media.sandbox_wire import Broken
from gpu_byoc.media.timeline import JUMP, apart

START_SECONDS: Final = 30.0
"""For a process to come up: a third of a second here, more where many streams start at once."""

HANG_SECONDS: Final = 10.0
"""Without a word, while it has something to do. A picture takes milliseconds."""

FAILURES: Final = 5
WINDOW: Final = 60.0
"""Broken so often within so many seconds, a stream is given up: it costs a new process each time."""

WORDS: Final = 1 << 20
"""Messages of one answer. An honest one has half as many at most: sounds of eight bytes in a PES of 4 MiB."""

STEP: Final = 3600
"""Ticks between the last frame before a break and the first after it, where time stamps tell nothing: 40 ms."""

_PASSED_ON = ("LD_LIBRARY_PATH", "PATH", "TMPDIR")

_standing: dict[str, str] = {}
"""The walls of the process that ``check`` started, with which the worker began to serve: what its status shows."""


class Cell:
    """One process. Start it on the thread that reads: it dies with it."""

    def __init__(self, limits: Limits) -> None:
        size = wire.room(limits)
        with ExitStack() as ours, ExitStack() as theirs:
            self.sock, sock = socket.socketpair()
            ours.callback(self.sock.close)
            theirs.callback(sock.close)
            memory = os.memfd_create("frame", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            theirs.callback(os.close, memory)
            os.ftruncate(memory, size)
            # Were it made shorter, reading it would kill us.
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._map = mmap.mmap(memory, size, prot=mmap.PROT_READ)
            self.memory = np.frombuffer(self._map, np.uint8)
            self.process = _spawn(sock.fileno(), memory, limits)
            ours.pop_all()
        self._hung_up = False
        self.walls: dict[str, str] | None = None  # None: it has not said that it is ready

    def listen(self) -> tuple[dict[str, Any], bytes]:
        """Its next message. Raises Broken."""
        self.sock.settimeout(HANG_SECONDS if self.walls is not None else START_SECONDS)
        try:
            return wire.listen(self.sock)
        except TimeoutError:
            raise Broken(f"it hangs: not a word for {self.sock.gettimeout():g} s") from None
        except (EOFError, OSError):
            raise Broken(self._how_it_ended()) from None

    def get_ready(self) -> None:
        """Wait until it has given up everything. Raises Broken, and DecoderFailed if that is less than was promised."""
        message, _ = self.listen()
        walls = message.get("ready")
        if not isinstance(walls, dict):
            raise Broken(f"it cannot start: {wire.text_in(message.get('broken', 'it does not say why'))}")
        self.walls = {name: wire.text_in(walls.get(name, "it does not say")) for name in WALLS}
        if fallen := [f"{name}: {why}" for name, why in self.walls.items() if why and not _standing.get(name, why)]:
            raise DecoderFailed(
                "the process that decodes this stream is less confined than the one at the worker's start was, and so "
                f"it gets nothing to decode ({'; '.join(fallen)})"
            )

    def say(self, letter: bytes, data: bytes | memoryview = b"") -> None:
        """Raises Broken."""
        try:
            wire.say(self.sock, letter, data)
        except TimeoutError:
            raise Broken(f"it hangs: takes nothing for {self.sock.gettimeout():g} s") from None
        except OSError:
            raise Broken(self._how_it_ended()) from None

    def hang_up(self) -> None:
        """Whoever listens hears no more. Any thread."""
        self._hung_up = True
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is gone already

    def end(self) -> None:
        """Kill it, and wait for that."""
        self.sock.close()
        self.process.kill()
        self.process.wait()

    def _how_it_ended(self) -> str:
        if self._hung_up:
            return "nobody listens to it any more"
        try:
            code = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "it has closed its socket"
        return f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"it has ended with status {code}"


def _spawn(sock: int, memory: int, limits: Limits) -> subprocess.Popen[bytes]:
    """A fresh interpreter: a fork of a process with threads and a GPU would be one with its locks, keys and secrets."""
    paths = os.pathsep.join(path for path in sys.path if path)
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    command = (sys.executable, "-P", "-s", "-B", "-m", "gpu_byoc.media.sandboxed")
    return subprocess.Popen(
        [*command, str(sock), str(memory), json.dumps(asdict(limits))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(sock, memory),
        start_new_session=True,  # Ctrl-C is for us: what is inside is still to come out
        env=passed | {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )


class SandboxedReader:
    """The ``Reader`` whose decoding happens elsewhere."""

    def __init__(self, limits: Limits, on_picture: Callable[[int], None] | None = None) -> None:
        self._limits = limits
        self._on_picture = on_picture or (lambda pts: None)
        self._cell: Cell | None = None
        self._lock = threading.Lock()  # over the cell and the end
        self._stopped = False
        self._failures: deque[float] = deque(maxlen=FAILURES)
        self._info: VideoInfo | None = None
        self._last: dict[str, int] = {}  # PTS of the last frame, and of the last sound
        self._shift: int | None = 0  # what is added to this process's time stamps; None: not known yet

    def open(self) -> None:
        """Get a process on its way, which takes a while, on the thread that will read. Raises DecoderFailed."""
        with self._lock:
            if self._cell is None and not self._stopped:
                try:
                    self._cell = Cell(self._limits)
                except OSError as error:  # no descriptors, no memory, too many processes
                    raise DecoderFailed(f"no process can be started to decode this stream: {error}") from error
                self._info = None
                self._shift = None if self._last else 0

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[StreamEvent]:
        view = memoryview(data)
        for at in range(0, len(view), wire.PIECE):
            yield from self._ask(wire.FEED, view[at : at + wire.PIECE])

    def end_segment(self) -> Iterator[StreamEvent]:
        return self._ask(wire.SEGMENT)

    def finish(self) -> Iterator[StreamEvent]:
        return self._ask(wire.FINISH)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            if self._cell is not None:
                self._cell.hang_up()

    def close(self) -> None:
        with self._lock:
            cell, self._cell = self._cell, None
        if cell is not None:
            cell.end()

    # --- one question and its answers

    def _ask(self, letter: bytes, data: bytes | memoryview = b"") -> Iterator[StreamEvent]:
        """Ends early after ``stop``. Raises DecoderFailed."""
        self.open()
        cell, answered, words = self._cell, False, 0
        if cell is None:
            return
        try:
            if cell.walls is None:
                cell.get_ready()
            cell.say(letter, data)
            while not answered:
                message, sound = cell.listen()
                answered, words = "done" in message, words + 1
                if words > WORDS:
                    raise Broken("it does not come to an end")
                yield from self._events(cell, message, sound)
        except Broken as error:
            if self._stopped:
                return
            answered = True
            yield self._broke(str(error))
        finally:
            if not answered:  # nobody wants the rest, and there is no telling it to stop
                self.close()

    def _events(self, cell: Cell, message: dict[str, Any], sound: bytes) -> Iterator[StreamEvent]:
        pictures = message.get("pictures", [])
        if not isinstance(pictures, list):
            raise Broken("its pictures are no list")
        for pts in pictures:
            self._on_picture(self._placed(wire.whole(pts, -wire.FAR, wire.FAR)))
        if "frame" in message:
            yield from self._frame(cell, message["frame"])
        elif "sound" in message:
            yield from self._sound(wire.sound_in(message["sound"], sound))
        elif "info" in message:
            self._info = wire.info_in(message["info"], self._limits)
            yield self._info
        elif "tracks" in message:
            yield wire.tracks_in(message["tracks"])
        elif "problem" in message:
            yield wire.problem_in(message["problem"])
        elif "broken" in message:
            raise Broken(f"it cannot go on: {wire.text_in(message['broken'])}")

    def _frame(self, cell: Cell, value: Any) -> Iterator[StreamEvent]:
        if self._info is None or not isinstance(value, list) or len(value) != 2:
            raise Broken("it has a frame of nothing")
        pts = self._placed(wire.whole(value[0], -wire.FAR, wire.FAR))
        picture = wire.read_pixels(self._info, cell.memory)
        cell.say(wire.TAKEN)
        if pts <= self._last.get(VIDEO, pts - 1):
            yield Problem("timestamp", f"a frame with PTS {pts}, not after {self._last[VIDEO]}")
            return
        self._last[VIDEO] = pts
        yield Frame(picture, pts, value[1] is True)

    def _sound(self, packet: AudioPacket) -> Iterator[StreamEvent]:
        pts = self._placed(packet.pts)
        if pts >= self._last.get("audio", pts):
            self._last["audio"] = pts
            yield AudioPacket(packet.data, pts, packet.track)

    def _placed(self, pts: int) -> int:
        """In line with what came before a break: a new process knows nothing of the old one's time."""
        if self._shift is None:
            last = max(self._last.values())
            step = apart(pts % WRAP, last % WRAP)
            self._shift = last + (step if abs(step) <= JUMP else STEP) - pts
        return pts + self._shift

    def _broke(self, why: str) -> Problem:
        """Away with it; the next call makes a new one. Raises DecoderFailed."""
        self.close()
        now = time.monotonic()
        self._failures.append(now)
        if len(self._failures) == FAILURES and now - self._failures[0] < WINDOW:
            raise DecoderFailed(
                f"the process that decodes this stream has broken {FAILURES} times within {WINDOW:g} s, now: {why}"
            )
        return Problem("decoder", f"the process that decodes is gone, the next keyframe starts a new one: {why}", VIDEO)


def check() -> dict[str, str]:
    """Start one, and see what walls it has: for each ``confine.WALLS``, "" or why it does not stand. Those that come
    after it have to have as many.

    Raises:
        ConfigError: it does not start.
    """
    try:
        cell = Cell(Limits())
    except OSError as error:
        raise ConfigError(f"--sandbox-decode: no process can be started for decoding: {error}") from error
    _standing.clear()
    try:
        cell.get_ready()
    except Broken as error:
        raise ConfigError(f"--sandbox-decode: the process for decoding does not start: {error}") from error
    finally:
        cell.end()
    assert cell.walls is not None
    _standing.update(cell.walls)
    return cell.walls
