"""One live stream's frames: transport stream in, batches through the engine, transport stream out.

Two threads of its own. The *inner* one decodes, takes a slot for each frame and submits it; the *outer* one encodes
what comes back and muxes it with the audio. The slot is the only place where a frame waits: when none comes free before
the frame's time is up, the frame is dropped there (or, lossless, waited for), and nowhere else.

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
from gpu_byoc.errors import BadFrame, GpuByocError, TooLarge, Unavailable
from gpu_byoc.frames import FrameSpec
from gpu_byoc.media.audio import AudioPacket, OpusTranscoder
from gpu_byoc.media.decode import Frame, StreamReader, VideoInfo
from gpu_byoc.media.demux import Limits, Problem, Tracks
from gpu_byoc.media.encode import Encoder, EncoderSettings
from gpu_byoc.media.mpegts import CLOCK
from gpu_byoc.media.mux import Piece, Segmenter
from gpu_byoc.media.planes import ToSlot
from gpu_byoc.worker.streamparams import StreamParams


@dataclass(frozen=True, slots=True)
class Arrival:
    """Bytes of the input and when they came (``time.monotonic``); ``data`` None where a segment ends."""

    data: bytes | None
    at: float


MAX_AUDIO = 2048
"""Audio packets that wait for the outer thread: forty seconds. Over it the oldest goes, counted as ``audio``."""

Tell: TypeAlias = Callable[..., None]


@dataclass(slots=True)
class _Ticket:
    """A frame in the house."""

    lease: Lease
    pts: int
    arrived: float
    info: VideoInfo
    outcome: Outcome | None = None


class Pump:
    """Made on the event loop, started once; ``join`` when the output has ended.

    ``source`` carries what arrives; its end is the end of input. Pieces of the output go to ``sink``, which
    is ended when all is out, or with the error that stopped it. ``sink`` None: frames are computed and not encoded.
    ``budget`` is within how many seconds of its arrival a frame must have a slot; None waits as long as it takes.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        params: StreamParams,
        source: ToThread[Arrival],
        sink: ToLoop[Piece] | None,
        tell: Tell,
        *,
        encoder: str,
        budget: float | None,
        pixel_format: str,
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
        self._lock = threading.Condition()
        self._done: deque[_Ticket | AudioPacket] = deque()  # in the order in which it goes out
        self._flying = 0
        self._input_over = False
        self._stopped = False
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
        reader = StreamReader(Limits())
        desk = _Desk(self)
        while True:
            try:
                arrival = self._source.get()
            except EOFError:
                break
            for event in reader.end_segment() if arrival.data is None else reader.feed(arrival.data):
                desk.take(event, arrival.at)
        for event in reader.finish():
            desk.take(event, time.monotonic())

    def _admit(self, frame: Frame, arrived: float, desk: _Desk) -> None:
        """A slot for the frame, its pixels into it, and off to the engine."""
        params = self.params
        if not desk.due(frame.pts, params.max_framerate):
            self._tell("dropped", "framerate")
            return
        spec = desk.spec(frame, params, self._format)
        lease = self._lease(spec, arrived)
        if lease is None:
            return
        try:
            desk.writer(spec).write(frame.picture, lease.views[0])
        except (BadFrame, TooLarge) as error:
            lease.release()
            self._tell("dropped", error.code)
            return
        except BaseException:
            lease.release()
            raise
        assert desk.info is not None
        ticket = _Ticket(lease, frame.pts, arrived, desk.info)
        with self._lock:
            self._flying += 1
        try:
            lease.submit(self._name, params.processor, lambda outcome: self._landed(ticket, outcome))
        except BaseException:
            with self._lock:
                self._flying -= 1
            lease.release()
            raise

    def _lease(self, spec: FrameSpec, arrived: float) -> Lease | None:
        """The one place where a frame waits, or is dropped."""
        answer: list[GpuByocError | None] = []
        ready = threading.Event()

        def told(error: GpuByocError | None) -> None:
            answer.append(error)
            ready.set()

        deadline = None if self._budget is None else arrived + self._budget
        with self._lock:
            self._waiting = ready
        lease = None
        while lease is None:
            self._check_stopped()
            if deadline is not None and time.monotonic() >= deadline:
                self._tell("dropped", "late")
                return None
            try:
                lease = self._engine.lease(spec, 1, told)
            except Unavailable:  # the line is full, or there is no memory for this size now
                if self._engine.closing:
                    raise
                ready.wait(0.005)
        if lease.granted:
            return lease
        ready.wait(None if deadline is None or lease.held else max(0.0, deadline - time.monotonic()))
        try:
            self._check_stopped()
            if answer and answer[0] is not None:
                raise answer[0]
        except BaseException:
            lease.release()
            raise
        if answer:
            return lease
        lease.release()
        self._tell("dropped", "late")
        return None

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
        press = _Press(self._encoder_name, self._sink)
        while (item := self._next()) is not None:
            if isinstance(item, AudioPacket):
                press.audio(item)
                continue
            assert item.outcome is not None
            try:
                if item.outcome.error is not None:
                    self._tell("failed_frame", item.outcome.error)
                    continue
                press.video(item)
            finally:
                item.lease.release()
            self._tell("out", time.monotonic() - item.arrived)
        press.finish()

    def _next(self) -> _Ticket | AudioPacket | None:
        with self._lock:
            while not self._done:
                if self._stopped:
                    raise Closed
                if self._input_over and not self._flying:
                    return None
                self._lock.wait()
            if self._stopped:
                raise Closed
            item = self._done.popleft()
            if isinstance(item, _Ticket):
                self._flying -= 1
            return item

    def _release_rest(self) -> None:
        """Slots of frames that came back and nobody encodes; those still out are released as they land."""
        with self._lock:
            rest, self._done = self._done, _Drain()
        for item in rest:
            if isinstance(item, _Ticket):
                item.lease.release()


class _Drain(deque[_Ticket | AudioPacket]):
    """Where results go once nobody encodes any more: their slots go back at once."""

    def append(self, item: _Ticket | AudioPacket) -> None:
        if isinstance(item, _Ticket):
            item.lease.release()


class _Desk:
    """What the inner thread knows of its input: the format now, and the frame rate kept."""

    def __init__(self, pump: Pump) -> None:
        self._pump = pump
        self.info: VideoInfo | None = None
        self._writer: ToSlot | None = None
        self._last: int | None = None

    def take(self, event: object, arrived: float) -> None:
        pump = self._pump
        if isinstance(event, Frame):
            pump._tell("in")
            pump._admit(event, arrived, self)
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
        """By PTS; a tenth of an interval of grace, so that 25 fps with jitter is not taken for more than 25."""
        if max_framerate is not None and self._last is not None:
            interval = CLOCK / max_framerate
            if 0 <= pts - self._last < 0.9 * interval:
                return False
        self._last = pts
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

    def __init__(self, encoder: str, sink: ToLoop[Piece] | None) -> None:
        self._settings = EncoderSettings(encoder)
        self._sink = sink
        self._segmenter = Segmenter()
        self._encoder: Encoder | None = None
        self._aspect: Fraction | None = None
        self._opus: OpusTranscoder | None = None

    def video(self, ticket: _Ticket) -> None:
        if self._sink is None:
            return
        spec, info = ticket.lease.spec, ticket.info
        encoder = self._encoder
        if encoder is None or (encoder.spec, encoder.colour, self._aspect) != (spec, info.colour, info.aspect):
            self._flush_video()
            encoder = Encoder(spec, colour=info.colour, aspect=info.aspect, settings=self._settings)
            self._encoder, self._aspect = encoder, info.aspect
        key = self._segmenter.wants_key(ticket.pts)
        for picture in encoder.encode(ticket.lease.views[0], ticket.pts, key):
            self._send(self._segmenter.video(picture))

    def audio(self, packet: AudioPacket) -> None:
        if self._sink is None:
            return
        if packet.track.copies:
            self._send(self._segmenter.audio(packet))
            return
        if self._opus is None or self._opus.source != packet.track:
            self._opus = OpusTranscoder(packet.track)
        for converted in self._opus.convert(packet):
            self._send(self._segmenter.audio(converted))

    def finish(self) -> None:
        if self._sink is None:
            return
        if self._opus is not None:
            for converted in self._opus.flush():
                self._send(self._segmenter.audio(converted))
        self._flush_video()
        self._send(self._segmenter.finish())

    def _flush_video(self) -> None:
        if self._encoder is not None:
            for picture in self._encoder.flush():
                self._send(self._segmenter.video(picture))
            self._encoder = None

    def _send(self, pieces: list[Piece]) -> None:
        assert self._sink is not None
        for piece in pieces:
            self._sink.put(piece, len(piece.data))
