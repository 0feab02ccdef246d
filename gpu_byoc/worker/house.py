"""The frames of one live stream that are in the house, and the line in which all of it goes out. One lock over both.

The line has frames and sound as they came in: sound never overtakes a picture that is being computed. Three threads
meet here: the one that brings frames in, the device's, which says that they are computed, and the one that takes them
out. None of them polls: whoever changes something wakes who waits for it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from gpu_byoc.bridge import Closed
from gpu_byoc.engine.device import Outcome
from gpu_byoc.engine.engine import Lease
from gpu_byoc.media.audio import AudioPacket
from gpu_byoc.media.decode import VideoInfo

AUDIO_AT_ONCE: Final = 8
"""Audio packets that go out without a picture, a sixth of a second of them. Fewer wait for the next picture and share
its way: each trip of their own would cost a wake-up of two threads and a write."""

Tell: TypeAlias = Callable[..., None]
"""What happened, as a word and what belongs to it: ``in``, ``out``, ``dropped``, ``problem`` ... Any thread; it must
not block."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A frame in the house. ``arrived`` is when its last byte came (``time.monotonic``); ``key``: it was a keyframe."""

    lease: Lease
    pts: int
    arrived: float
    info: VideoInfo
    key: bool
    outcome: Outcome | None = None


Item: TypeAlias = Ticket | AudioPacket


class House:
    """``share`` is how many frames may be in the house now. ``most_audio`` packets of sound may wait to go out, and
    ``most_audio_bytes`` of them; over either the oldest goes."""

    def __init__(self, share: Callable[[], int], most_audio: int, most_audio_bytes: int) -> None:
        self._share = share
        self._most_audio = most_audio
        self._most_audio_bytes = most_audio_bytes
        self._lock = threading.Condition()
        self._frames: deque[Ticket] = deque()  # submitted and not released, oldest first
        self._line: deque[Item] = deque()  # what came in and was not taken out yet
        self._sounds = 0  # audio packets in the line
        self._sound_bytes = 0
        self._input_over = False
        self._stopped = False
        self._closed = False  # nobody takes anything out any more
        self._waiting: threading.Event | None = None

    def age(self) -> float:
        """Seconds since the oldest frame in the house arrived; 0 if there is none."""
        with self._lock:
            return time.monotonic() - self._frames[0].arrived if self._frames else 0.0

    # --- the end; any thread

    def stop(self) -> None:
        """Wake everybody and send them home: what waits here, or comes from now on, gets Closed."""
        with self._lock:
            self._stopped = True
            if self._waiting is not None:
                self._waiting.set()
            self._lock.notify_all()

    def input_ended(self) -> None:
        """Nothing more comes in."""
        with self._lock:
            self._input_over = True
            self._lock.notify_all()

    def check(self) -> None:
        """Raise Closed if it is all over."""
        if self._stopped:
            raise Closed

    # --- the way in

    def place(self, deadline: float | None) -> bool:
        """Wait until there is a place for one more; False if the deadline (``time.monotonic``) comes first."""
        with self._lock:
            while len(self._frames) >= self._share():
                self.check()
                left = remaining(deadline)
                if left == 0.0:
                    return False
                self._lock.wait(left)
        return True

    def watch(self, event: threading.Event) -> None:
        """``stop`` sets this event, too. Raises Closed if it is too late for that."""
        with self._lock:
            self._waiting = event
        self.check()

    def enter(self, ticket: Ticket) -> None:
        """Raises Closed where nobody is left to release it."""
        with self._lock:
            if self._closed:
                raise Closed
            self._frames.append(ticket)
            self._line.append(ticket)

    def withdraw(self, ticket: Ticket) -> None:
        """It entered last, and could not be submitted."""
        with self._lock:
            if self._frames and self._frames[-1] is ticket:
                self._frames.pop()
                self._line.remove(ticket)

    def landed(self, ticket: Ticket, outcome: Outcome) -> None:
        """It is computed, or failed. On the device thread."""
        with self._lock:
            ticket.outcome = outcome
            self._lock.notify_all()

    def sound(self, packet: AudioPacket) -> bool:
        """Into the line; False if older ones had to go for it."""
        with self._lock:
            self._line.append(packet)
            self._heard(packet, 1)
            if self._sounds >= AUDIO_AT_ONCE:
                self._lock.notify_all()
            fits = True
            while self._sounds > self._most_audio or self._sound_bytes > self._most_audio_bytes:
                oldest = next(item for item in self._line if isinstance(item, AudioPacket))
                self._line.remove(oldest)
                self._heard(oldest, -1)
                fits = False
            return fits

    def _heard(self, packet: AudioPacket, by: int) -> None:
        self._sounds += by
        self._sound_bytes += by * len(packet.data)

    # --- the way out

    def take(self) -> list[Item]:
        """What is to go out now, in order; nothing at the end. ``leave`` with each frame of it."""
        with self._lock:
            while not (ready := self._ready()):
                self.check()
                if self._input_over and not self._line:
                    return []
                self._lock.wait()
            self.check()
            for item in ready:
                self._line.popleft()
                if isinstance(item, AudioPacket):
                    self._heard(item, -1)
            return ready

    def _ready(self) -> list[Item]:
        """What is at the front of the line, up to the first frame that is being computed. Sound behind the last frame
        waits for the next one, unless it is worth a trip."""
        ready: list[Item] = []
        frames = 0  # up to the last of them
        for item in self._line:
            if isinstance(item, Ticket):
                if item.outcome is None:
                    break
                frames = len(ready) + 1
            ready.append(item)
        alone = len(ready) - frames
        return ready if self._input_over or alone >= AUDIO_AT_ONCE else ready[:frames]

    def leave(self, ticket: Ticket) -> None:
        ticket.lease.release()
        with self._lock:
            self._frames.remove(ticket)  # the oldest, as a rule
            self._lock.notify_all()

    def close(self) -> int:
        """Nobody takes anything out any more. Releases what came back and what is still out, which the engine gives
        back when the device is through with it; returns how many frames that were."""
        with self._lock:
            self._closed = True
            rest = list(self._frames)
            self._frames.clear()
            self._line.clear()
            self._sounds = self._sound_bytes = 0
        for ticket in rest:
            ticket.lease.release()
        return len(rest)


def remaining(deadline: float | None) -> float | None:
    """Seconds until then, at least 0; None for no deadline."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())
