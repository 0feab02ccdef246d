"""One live stream's frames: transport stream in, batches through the engine, transport stream out.

Two threads of its own. The *inner* one decodes, takes a slot for each frame and submits it; the *outer* one encodes
what comes back and muxes it with the audio. The slot is the only place where a frame waits: when none comes free before
the frame's time is up, the frame is dropped there (or, lossless, waited for), and nowhere else. A stream holds no more
than its share of the slots, so one whose output is stuck does not starve the others.

What is counted and what ends is told through ``tell``, which is called on these threads and must not block.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from gpu_byoc.bridge import Closed, ToLoop, ToThread
from gpu_byoc.engine.device import Outcome
from gpu_byoc.engine.engine import Engine, Lease
from gpu_byoc.errors import BadFrame, GpuByocError, Overloaded, TooLarge
from gpu_byoc.frames import FrameSpec
from gpu_byoc.media.audio import AudioPacket, OpusTranscoder
from gpu_byoc.media.decode import Frame, StreamReader, VideoInfo
from gpu_byoc.media.demux import Limits, Problem, Tracks
from gpu_byoc.media.encode import Encoder, EncoderSettings
from gpu_byoc.media.mpegts import CLOCK
from gpu_byoc.media.mux import Piece, Segmenter
from gpu_byoc.media.planes import ToSlot
from gpu_byoc.worker.streamparams import StreamParams

MAX_AUDIO = 2048
"""Audio packets that wait for the outer thread: forty seconds. Over it the oldest goes, counted as ``audio``."""

MAX_REORDER = 64
"""Pictures whose arrival is remembered while the decoder holds them; H.264 holds back 16 at most."""

NO_MEMORY_WAIT = 0.05

Tell: TypeAlias = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Arrival:
    """Bytes of the input and when they came (``time.monotonic``); ``data`` None where a segment ends."""

    data: bytes | None
    at: float


@dataclass(frozen=True, slots=True)
class Departure:
    """A piece of the output; ``arrived`` is when the frame that it completes came in, None if it completes none."""

    piece: Piece
    arrived: float | None = None


@dataclass(slots=True, eq=False)
class _Ticket:
    """A frame in the house."""

    lease: Lease
    pts: int
    arrived: float
    info: VideoInfo
    outcome: Outcome | None = None


class Pump:
    """Made on the event loop, started once; ``join`` when the output has ended.

    ``source`` carries what arrives; its end is the end of input. Pieces of the output go to ``sink``, which is ended
    when all is out, or with the error that stopped it. ``sink`` None: frames are computed and not encoded. ``budget``
    is within how many seconds of its arrival a frame must have a slot; None waits as long as it takes. ``share`` is how
    many slots the stream may hold now.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        params: StreamParams,
        source: ToThread[Arrival],
        sink: ToLoop[Departure] | None,
        tell: Tell,
        *,
        encoder: str,
        budget: float | None,
        pixel_format: str,
        share: Callable[[], int],
    ) -> None:
        self.params = params  # replaced as a whole, between two frames
        self._engine = engine
        self._name = name
        self._source = source
        self._sink = sink
        self._tell = tell
        self._encoder_name = encoder
        self._budget = budget
        self._format = pixel_format
        self._share = share
        self._lock = threading.Condition()
        self._done: deque[_Ticket | AudioPacket] = deque()  # in the order in which it goes out
        self._house: deque[_Ticket] = deque()  # submitted and not released, oldest first
        self._input_over = False
        self._stopped = False
        self._closed = False  # the outer thread has ended: frames go nowhere
        self._waiting: threading.Event | None = None
        self._error: BaseException | None = None
        self._inner = threading.Thread(target=self._run_inner, name=f"{name}-decode", daemon=True)
        self._outer = threading.Thread(target=self._run_outer, name=f"{name}-encode", daemon=True)

    def start(self) -> None:
        self._inner.start()
        self._outer.start()

    def stop(self) -> None:
        """Drop what is inside and end at once. Any thread."""
        self._source.abandon()
        if self._sink is not None:
            self._sink.abandon()
        with self._lock:
            self._stopped = True
            if self._waiting is not None:
                self._waiting.set()
            self._lock.notify_all()

    def join(self, timeout: float | None = None) -> bool:
        """Block until both threads have ended; False if they have not in time."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for thread in (self._inner, self._outer):
            if thread.ident is not None:
                thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return not (self._inner.is_alive() or self._outer.is_alive())

    def age(self) -> float:
        """Seconds since the oldest frame in the house arrived; 0 if there is none."""
        with self._lock:
            return time.monotonic() - self._house[0].arrived if self._house else 0.0

    # --- the inner thread: bytes to slots

    def _run_inner(self) -> None:
        try:
            self._decode()
        except Closed:
            pass
        except BaseException as error:  # handed to the outer thread, which ends the stream with it
            self._error = error
        finally:
            with self._lock:
                self._input_over = True
                self._lock.notify_all()

    def _decode(self) -> None:
        desk = _Desk(self)
        reader = StreamReader(Limits(), desk.picture)
        while True:
            try:
                arrival = self._source.get()
            except EOFError:
                break
            desk.now = arrival.at
            for event in reader.end_segment() if arrival.data is None else reader.feed(arrival.data):
                desk.take(event)
        for event in reader.finish():
            desk.take(event)

    def _admit(self, frame: Frame, arrived: float, desk: _Desk) -> None:
        """A slot for the frame, its pixels into it, and off to the engine."""
        params = self.params
        if not desk.due(frame.pts, params.max_framerate):
            self._tell("dropped", "framerate")
            return
        spec = desk.spec(frame, params, self._format)
        try:
            lease = self._lease(spec, arrived)
        except BaseException:  # the stream or the engine ends: the frame is counted all the same
            self._tell("dropped", "stopped")
            raise
        if lease is None:
            return
        try:
            desk.writer(spec).write(frame.picture, lease.views[0])
            assert desk.info is not None
            ticket = _Ticket(lease, frame.pts, arrived, desk.info)
            with self._lock:
                if self._closed:  # nobody is left to release it
                    raise Closed
                self._house.append(ticket)
            lease.submit(self._name, params.processor, lambda outcome: self._landed(ticket, outcome))
        except (BadFrame, TooLarge) as error:
            lease.release()
            self._tell("dropped", error.code)
        except BaseException:  # the stream or the engine ends, or a bug: the slot goes back, the frame is counted
            with self._lock:
                if self._house and self._house[-1].lease is lease:
                    self._house.pop()
            lease.release()
            self._tell("dropped", "stopped")
            raise

    def _lease(self, spec: FrameSpec, arrived: float) -> Lease | None:
        """The one place where a frame waits, or is dropped."""
        deadline = None if self._budget is None else arrived + self._budget
        if not self._place(deadline):
            self._tell("dropped", "backlog")
            return None
        while True:
            answer: list[GpuByocError | None] = []
            ready = threading.Event()
            with self._lock:
                self._waiting = ready
            self._check_stopped()
            if _left(deadline) == 0.0:
                self._tell("dropped", "late")
                return None

            def told(
                error: GpuByocError | None,
                answer: list[GpuByocError | None] = answer,
                ready: threading.Event = ready,
            ) -> None:
                answer.append(error)
                ready.set()

            try:
                lease = self._engine.lease(spec, 1, told, patient=True)
            except Overloaded:  # there is no memory for this size now
                ready.wait(NO_MEMORY_WAIT)
                continue
            if lease.granted:
                return lease
            ready.wait(None if lease.held else _left(deadline))
            if not self._stopped and answer == [None]:
                return lease
            lease.release()
            self._check_stopped()
            if answer and answer[0] is not None and not isinstance(answer[0], Overloaded):
                raise answer[0]
            if answer:
                ready.clear()
                ready.wait(NO_MEMORY_WAIT)

    def _place(self, deadline: float | None) -> bool:
        """Wait until the stream holds less than its share; False if its frame's time is up first."""
        with self._lock:
            while len(self._house) >= self._share():
                self._check_stopped()
                left = _left(deadline)
                if left == 0.0:
                    return False
                self._lock.wait(left)
        return True

    def _check_stopped(self) -> None:
        if self._stopped:
            raise Closed

    def _landed(self, ticket: _Ticket, outcome: Outcome) -> None:
        """On the device thread."""
        ticket.outcome = outcome
        with self._lock:
            self._done.append(ticket)
            self._lock.notify_all()

    def _audio(self, packet: AudioPacket) -> None:
        with self._lock:
            self._done.append(packet)
            crowded = len(self._done) > MAX_AUDIO
            if crowded:
                oldest = next((item for item in self._done if isinstance(item, AudioPacket)), None)
                if oldest is not None:
                    self._done.remove(oldest)
            self._lock.notify_all()
        if crowded:
            self._tell("dropped", "audio")

    # --- the outer thread: slots to bytes

    def _run_outer(self) -> None:
        error: BaseException | None = None
        try:
            self._encode()
        except Closed:
            pass
        except BaseException as failure:  # told to the stream through the sink and ``tell``
            error = failure
        finally:
            self._release_rest()
            error = error or self._error
            if self._sink is not None:
                self._sink.end(error)
            self._tell("finished", error)

    def _encode(self) -> None:
        press = _Press(self._encoder_name, self._sink, self._tell)
        while (item := self._next()) is not None:
            if isinstance(item, AudioPacket):
                press.audio(item)
                continue
            assert item.outcome is not None
            try:
                if item.outcome.error is not None:
                    self._tell("failed_frame", item.outcome.error)
                else:
                    press.video(item)
            except Closed:
                self._tell("dropped", "stopped")
                raise
            finally:
                self._leave(item)
        press.finish()

    def _next(self) -> _Ticket | AudioPacket | None:
        with self._lock:
            while not self._done:
                self._check_stopped()
                if self._input_over and not self._house:
                    return None
                self._lock.wait()
            self._check_stopped()
            return self._done.popleft()

    def _leave(self, ticket: _Ticket) -> None:
        ticket.lease.release()
        with self._lock:
            self._house.remove(ticket)  # the oldest, as a rule
            self._lock.notify_all()

    def _release_rest(self) -> None:
        """Frames that nobody encodes any more: those that came back, and those still out, which the engine gives back
        when the device is through with them."""
        with self._lock:
            self._closed = True
            rest = list(self._house)
            self._house.clear()
            self._done.clear()
        for ticket in rest:
            ticket.lease.release()
            self._tell("dropped", "stopped")


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


class _Desk:
    """What the inner thread knows of its input: the format now, when pictures came, the frame rate kept."""

    def __init__(self, pump: Pump) -> None:
        self._pump = pump
        self.now = 0.0  # when the bytes that are being read arrived
        self.info: VideoInfo | None = None
        self._arrivals: dict[int, float] = {}
        self._writer: ToSlot | None = None
        self._due: float | None = None

    def picture(self, pts: int) -> None:
        """It goes into the decoder now, and comes out when its turn to be shown has come."""
        self._arrivals[pts] = self.now
        while len(self._arrivals) > MAX_REORDER:
            del self._arrivals[next(iter(self._arrivals))]

    def take(self, event: object) -> None:
        pump = self._pump
        if isinstance(event, Frame):
            pump._tell("in")
            pump._admit(event, self._arrivals.pop(event.pts, self.now), self)
        elif isinstance(event, AudioPacket):
            pump._audio(event)
        elif isinstance(event, VideoInfo):
            self.info = event
            pump._tell("format", event)
        elif isinstance(event, Problem):
            pump._tell("problem", event)
        elif isinstance(event, Tracks):
            pump._tell("tracks", event)

    def due(self, pts: int, max_framerate: int | None) -> bool:
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

    def spec(self, frame: Frame, params: StreamParams, pixel_format: str) -> FrameSpec:
        """The input's own size unless the params say another; even, as 4:2:0 demands."""
        width, height = params.width or frame.picture.width, params.height or frame.picture.height
        return FrameSpec(max(2, width & ~1), max(2, height & ~1), pixel_format)

    def writer(self, spec: FrameSpec) -> ToSlot:
        if self._writer is None or self._writer.spec != spec:
            self._writer = ToSlot(spec)
        return self._writer


class _Press:
    """Encoder, audio and muxer of the outer thread; a new encoder where size or colours change."""

    def __init__(self, encoder: str, sink: ToLoop[Departure] | None, tell: Tell) -> None:
        self._settings = EncoderSettings(encoder)
        self._sink = sink
        self._tell = tell
        self._segmenter = Segmenter()
        self._encoder: Encoder | None = None
        self._aspect: Fraction | None = None
        self._opus: OpusTranscoder | None = None

    def video(self, ticket: _Ticket) -> None:
        if self._sink is None:
            self._tell("out", time.monotonic() - ticket.arrived)
            return
        spec, info = ticket.lease.spec, ticket.info
        encoder = self._encoder
        if encoder is None or (encoder.spec, encoder.colour, self._aspect) != (spec, info.colour, info.aspect):
            self._flush_video()
            encoder = Encoder(spec, colour=info.colour, aspect=info.aspect, settings=self._settings)
            self._encoder, self._aspect = encoder, info.aspect
        key = self._segmenter.wants_key(ticket.pts)
        pieces = [
            piece
            for picture in encoder.encode(ticket.lease.views[0], ticket.pts, key)
            for piece in self._segmenter.video(picture)
        ]
        self._send(pieces[:-1])
        self._send(pieces[-1:], ticket.arrived)

    def audio(self, packet: AudioPacket) -> None:
        if self._sink is None:
            return
        if self._opus is not None and self._opus.source != packet.track:
            self._flush_audio()
        if packet.track.copies:
            self._send(self._segmenter.audio(packet))
            return
        if self._opus is None:
            self._opus = OpusTranscoder(packet.track)
        before = self._opus.failures
        for converted in self._opus.convert(packet):
            self._send(self._segmenter.audio(converted))
        if self._opus.failures != before:
            self._tell("problem", Problem("audio", "an audio packet that cannot be decoded"))

    def finish(self) -> None:
        if self._sink is None:
            return
        self._flush_audio()
        self._flush_video()
        self._send(self._segmenter.finish())

    def _flush_audio(self) -> None:
        if self._opus is not None:
            for converted in self._opus.flush():
                self._send(self._segmenter.audio(converted))
            self._opus = None

    def _flush_video(self) -> None:
        if self._encoder is not None:
            for picture in self._encoder.flush():
                self._send(self._segmenter.video(picture))
            self._encoder = None

    def _send(self, pieces: list[Piece], arrived: float | None = None) -> None:
        assert self._sink is not None
        for piece in pieces:
            self._sink.put(Departure(piece, arrived), len(piece.data))
