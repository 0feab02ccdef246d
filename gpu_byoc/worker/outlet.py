"""The way out of a live stream: slots -> pictures -> transport stream. Passive; the pump's outer thread runs it.

A new encoder where size or colours change. Sound goes out with the picture after it, in one write.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from gpu_byoc.bridge import ToLoop
from gpu_byoc.media.audio import AudioPacket, OpusTranscoder
from gpu_byoc.media.demux import Problem
from gpu_byoc.media.encode import CodedPicture, Encoder, EncoderSettings
from gpu_byoc.media.mux import Piece, Segmenter
from gpu_byoc.worker.house import Tell, Ticket


@dataclass(frozen=True, slots=True)
class Departure:
    """A piece of the output; ``arrived`` is when the frame that it completes came in, None if it completes none."""

    piece: Piece
    arrived: float | None = None


class Outlet:
    """``sink`` None: frames are computed, and nothing is encoded."""

    def __init__(self, encoder: str, sink: ToLoop[Departure] | None, tell: Tell) -> None:
        self.departed = 0  # frames whose picture is in the sink, or was
        self._settings = EncoderSettings(encoder)
        self._sink = sink
        self._tell = tell
        self._segmenter = Segmenter()
        self._encoder: Encoder | None = None
        self._aspect: Fraction | None = None
        self._inside: deque[float] = deque()  # when the frames came that are inside
        self._opus: OpusTranscoder | None = None
        self._kept: list[Piece] = []
        self._unheard = 0  # audio packets that the segmenter dropped, and that was told

    @property
    def inside(self) -> int:
        """Frames that the encoder has and gave no picture for yet."""
        return len(self._inside)

    def video(self, ticket: Ticket) -> None:
        """A frame that is computed; its slot is read while this call lasts. Raises Closed where nobody takes the
        output any more, and as Encoder."""
        if self._sink is None:
            self._tell("out", time.monotonic() - ticket.arrived)
            return
        encoder = self._encoder_for(ticket)
        key = self._segmenter.wants_key(ticket.pts, ticket.key)
        pictures = encoder.encode(ticket.lease.views[0], ticket.pts, key)
        self._inside.append(ticket.arrived)
        self._pictures(pictures)

    def audio(self, packet: AudioPacket) -> None:
        """Kept until a picture or ``send``."""
        if self._sink is None:
            return
        if self._opus is not None and self._opus.source != packet.track:
            self._flush_audio(packet.pts)
        if packet.track.copies:
            self._sounds([packet])
            return
        if self._opus is None:
            self._opus = OpusTranscoder(packet.track)
        before = self._opus.failures
        self._sounds(self._opus.convert(packet))
        if self._opus.failures != before:
            self._tell("problem", Problem("audio", "an audio packet that cannot be decoded"))

    def send(self, arrived: float | None = None) -> None:
        """What is kept, in as few writes as can be; ``arrived`` is of the frame whose picture is the last of it."""
        pieces, self._kept = _joined(self._kept), []
        for left, piece in enumerate(pieces, 1 - len(pieces)):
            assert self._sink is not None
            if self._sink.full:
                self._tell("trouble", "output_waits")
            self._sink.put(Departure(piece, None if left else arrived), len(piece.data))
        self.departed += arrived is not None

    def finish(self) -> None:
        """Everything that is still inside. Nothing comes after it."""
        if self._sink is None:
            return
        self._flush_audio()
        self._flush_video()
        self._kept += self._segmenter.finish()
        self._count_unheard()
        self.send()

    def close(self) -> None:
        """Drop what is inside. An encoder holds tens of megabytes, which do not wait for the collector."""
        self._encoder = self._opus = None
        self._kept.clear()

    def _encoder_for(self, ticket: Ticket) -> Encoder:
        encoder, spec, info = self._encoder, ticket.lease.spec, ticket.info
        if encoder is None or (encoder.spec, encoder.colour, self._aspect) != (spec, info.colour, info.aspect):
            self._flush_video()
            encoder = Encoder(spec, colour=info.colour, aspect=info.aspect, settings=self._settings)
            self._encoder, self._aspect = encoder, info.aspect
        return encoder

    def _pictures(self, pictures: Iterable[CodedPicture]) -> None:
        for picture in pictures:
            self._kept += self._segmenter.video(picture)
            self.send(self._inside.popleft())

    def _sounds(self, packets: Iterable[AudioPacket]) -> None:
        for packet in packets:
            self._kept += self._segmenter.audio(packet)
        self._count_unheard()

    def _count_unheard(self) -> None:
        while self._unheard < self._segmenter.unheard:
            self._unheard += 1
            self._tell("trouble", "audio_early")

    def _flush_audio(self, before: int | None = None) -> None:
        if self._opus is not None:
            self._sounds(self._opus.flush(before))
            self._opus = None

    def _flush_video(self) -> None:
        if self._encoder is not None:
            self._pictures(self._encoder.flush())
            self._encoder = None


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Those of one segment in one."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and not piece.starts:
            joined[-1] = Piece(joined[-1].data + piece.data, joined[-1].starts)
        else:
            joined.append(piece)
    return joined
