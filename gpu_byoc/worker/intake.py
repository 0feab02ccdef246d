"""The way in of a live stream: transport stream -> frames -> slots -> the engine. On a thread of its own.

The slot is the only place where a frame waits: when none comes free before the frame's time is up, the frame is dropped
here (or, lossless, waited for), and nowhere else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

from gpu_byoc.bridge import ToThread
from gpu_byoc.core.pace import Pace
from gpu_byoc.engine.engine import Engine, Lease
from gpu_byoc.errors import BadFrame, GpuByocError, Overloaded, TooLarge
from gpu_byoc.frames import FrameSpec
from gpu_byoc.media.audio import AudioPacket
from gpu_byoc.media.decode import Frame, Reader, StreamEvent, VideoInfo
from gpu_byoc.media.demux import VIDEO, Problem
from gpu_byoc.media.mpegts import CLOCK
from gpu_byoc.media.planes import ToSlot
from gpu_byoc.worker.house import House, Tell, Ticket, remaining
from gpu_byoc.worker.streamparams import StreamParams

MAX_REORDER: Final = 64
"""Pictures whose arrival is remembered while the decoder holds them; H.264 holds back 16 at most."""

NO_MEMORY_WAIT: Final = 0.05

LOOK: Final = 0.1
"""Seconds between two looks of a frame in the line at who holds the slots, and how long already."""


OpenReader: TypeAlias = Callable[[Callable[[int], None]], Reader]
"""Makes a reader that tells the PTS of each picture as it goes into the decoder."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """Bytes of the input and when they came (``time.monotonic``); ``data`` None where a segment ends."""

    data: bytes | None
    at: float


class Intake:
    """``params`` may be replaced at any time, as a whole: the next frame goes by the new ones. ``budget`` is within how
    many seconds of its arrival a frame must have a slot; None waits as long as it takes. Frames beyond ``pixel_rate``
    pixels a second, of the input or of the output, whichever are more, are dropped; None takes any number."""

    def __init__(
        self,
        engine: Engine,
        house: House,
        name: str,
        params: StreamParams,
        tell: Tell,
        *,
        budget: float | None,
        pixel_format: str,
        open_reader: OpenReader,
        pixel_rate: float | None,
    ) -> None:
        self.params = params
        self._engine = engine
        self._house = house
        self._name = name
        self._tell = tell
        self._budget = budget
        self._format = pixel_format
        self._reader = open_reader(self._picture)
        self._pace = None if pixel_rate is None else Pace(pixel_rate, time.monotonic())
        self._now = 0.0  # when the bytes that are being read arrived
        self._info: VideoInfo | None = None
        self._arrivals: dict[int, float] = {}
        self._writer: ToSlot | None = None
        self._due: float | None = None

    def run(self, source: ToThread[Arrival]) -> None:
        """To the end of the input. Raises Closed after ``House.stop`` or when the source is abandoned, what the source
        was ended with, what ends the engine, and DecoderFailed."""
        reader = self._reader
        reader.open()
        try:
            while True:
                try:
                    arrival = source.get()
                except EOFError:
                    break
                self._now = arrival.at
                self._take(reader.end_segment() if arrival.data is None else reader.feed(arrival.data))
            self._take(reader.finish())
        finally:
            reader.close()
            self._writer = None

    def stop(self) -> None:
        """Wake ``run`` where it waits for the decoder. Any thread."""
        self._reader.stop()

    def _picture(self, pts: int) -> None:
        """It goes into the decoder now, and comes out when its turn to be shown has come."""
        self._arrivals[pts] = self._now
        while len(self._arrivals) > MAX_REORDER:
            del self._arrivals[next(iter(self._arrivals))]

    def _take(self, events: Iterable[StreamEvent]) -> None:
        for event in events:
            if isinstance(event, Frame):
                self._tell("in")
                self._admit(event, self._arrivals.pop(event.pts, self._now))
            elif isinstance(event, AudioPacket):
                if not self._house.sound(event):
                    self._tell("trouble", "audio_full")
            elif isinstance(event, VideoInfo):
                self._info = event
                self._tell("format", event)
            elif isinstance(event, Problem):
                self._tell("problem", event)
            elif event.video is None:
                why = "the input has no H.264 or HEVC video, and without one nothing comes out"
                self._tell("problem", Problem("no_video", why, VIDEO))

    def _admit(self, frame: Frame, arrived: float) -> None:
        """A slot for the frame, its pixels into it, and off to the engine."""
        params = self.params
        if not self._wanted(frame.pts, params.max_framerate):
            self._tell("dropped", "framerate")
            return
        spec = self._spec(frame, params)
        pixels = max(spec.pixels, frame.picture.width * frame.picture.height)
        if self._pace is not None and not self._pace.affords(pixels, self._now):
            self._tell("dropped", "pixel_rate")
            return
        try:
            lease = self._lease(spec, arrived)
        except BaseException:  # the stream or the engine ends: the frame is counted all the same
            self._tell("dropped", "stopped")
            raise
        if lease is None:
            return
        assert self._info is not None
        ticket = Ticket(lease, frame.pts, arrived, self._info, frame.key)
        try:
            self._writer_for(spec).write(frame.picture, lease.views[0], self._info.colour)
            self._house.enter(ticket)
            lease.submit(self._name, params.processor, lambda outcome: self._house.landed(ticket, outcome))
        except (BadFrame, TooLarge) as error:
            lease.release()
            self._tell("dropped", error.code)
        except BaseException:  # the stream or the engine ends, or a bug: the slot goes back, the frame is counted
            self._house.withdraw(ticket)
            lease.release()
            self._tell("dropped", "stopped")
            raise

    def _lease(self, spec: FrameSpec, arrived: float) -> Lease | None:
        """The one place where a frame waits, or is dropped (None)."""
        deadline = None if self._budget is None else arrived + self._budget
        if not self._house.place(deadline):
            self._tell("dropped", "backlog")
            return None
        while True:
            wait = _Wait()
            self._house.watch(wait.over)
            if remaining(deadline) == 0.0:
                self._tell("dropped", "late")
                return None
            try:
                lease = self._engine.lease(spec, 1, wait.told, patient=True, client=self)
            except Overloaded:  # there is no memory for this size now
                wait.over.wait(NO_MEMORY_WAIT)
                continue
            if lease.granted:
                return lease
            self._stand(lease, wait, None if lease.held else deadline)
            if wait.granted:
                return lease
            lease.release()
            self._house.check()
            if wait.error is not None:
                if not isinstance(wait.error, Overloaded):
                    raise wait.error
                wait.over.clear()
                wait.over.wait(NO_MEMORY_WAIT)

    def _stand(self, lease: Lease, wait: _Wait, deadline: float | None) -> None:
        """In the line, until it is over or the deadline has come."""
        while (left := remaining(deadline)) != 0.0:
            lease.reclaim()
            if wait.over.wait(LOOK if left is None else min(left, LOOK)):
                return

    def _wanted(self, pts: int, max_framerate: int | None) -> bool:
        """By PTS, against a steady beat: 30 fps under a limit of 24 keep four frames of five. A tenth of an interval of
        grace, so that jitter costs nothing."""
        if max_framerate is None:
            self._due = None
            return True
        interval = CLOCK / max_framerate
        if self._due is None or not -2 * interval < self._due - pts < 2 * interval:
            self._due = float(pts)
        if pts < self._due - 0.1 * interval:
            return False
        self._due += interval
        return True

    def _spec(self, frame: Frame, params: StreamParams) -> FrameSpec:
        """The input's own size unless the params say another; even, as 4:2:0 demands."""
        width, height = params.width or frame.picture.width, params.height or frame.picture.height
        width, height = max(2, width & ~1), max(2, height & ~1)
        last = self._writer.spec if self._writer is not None else None
        if last is not None and (last.width, last.height) == (width, height):
            return last
        return FrameSpec(width, height, self._format)

    def _writer_for(self, spec: FrameSpec) -> ToSlot:
        if self._writer is None or self._writer.spec != spec:
            self._writer = ToSlot(spec)
        return self._writer


class _Wait:
    """The engine's answer about one lease, or the end of the stream, whichever comes first."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.granted = False
        self.error: GpuByocError | None = None

    def told(self, error: GpuByocError | None) -> None:
        """On whichever thread."""
        self.granted, self.error = error is None, error
        self.over.set()
