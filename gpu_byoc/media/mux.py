"""Coded pictures and audio packets -> an MPEG transport stream in segments, each picture's bytes at once.

FFmpeg's muxer costs the same CPU (``benchmarks/bench_media.py``), but with audio beside it holds each picture until
sound of its time has come, gathers sound into larger PES packets, starts its counters anew with each file, and leaves
every 184th picture without the stuffing by which a reader knows its end. One program with two streams is written
sooner than all that is worked around.

Each segment begins with PAT and PMT and then a keyframe, so it plays alone; played after one another, counters and time
stamps run on. Audio waits until video of its time is written, so that segments hold the sound of their pictures.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from gpu_byoc.media import mpegts, nal
from gpu_byoc.media.audio import AudioPacket, AudioTrack
from gpu_byoc.media.encode import CodedPicture
from gpu_byoc.media.mpegts import CLOCK, PACKET, SYNC, Stream

SEGMENT_SECONDS: Final = 2.0
"""As the network's other workers and its ingest have it."""

_PMT_PID: Final = 0x1000
_VIDEO_PID: Final = 0x100
_AUDIO_PID: Final = 0x101
_BODY: Final = PACKET - 4
_PCR_LEAD: Final = CLOCK // 5
"""The clock is this far behind DTS: the time a player has to get what belongs together. Covers audio's interleaving."""
_EARLY: Final = CLOCK // 2
"""A keyframe that comes this much too early starts the next segment, rather than another one soon after."""
_MAX_AUDIO_SPAN: Final = 2 * CLOCK
"""Audio that has waited for pictures while this much more of it came is written without them."""

_MOST_WAITING: Final = 4 << 20
"""Bytes of audio that wait for pictures: over 100 s of AAC at 320 kbit/s. Time stamps that stand still must not keep
any amount of it."""
_AUD: Final = b"\x00\x00\x00\x01\x09\xf0"


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes to send now. ``starts`` a segment: what came before is complete."""

    data: bytes
    starts: bool = False


class _Counter:
    """Packets of one PID: headers with a continuity counter that never jumps."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._next = 0
        self._plain = [bytes((SYNC, pid >> 8, pid & 255, 0x10 | cc)) for cc in range(16)]

    def section(self, section: bytes) -> bytes:
        """One packet with a whole section; the ones written here are short."""
        head = bytes((SYNC, 0x40 | self.pid >> 8, self.pid & 255, 0x10 | self._next, 0))
        self._next = (self._next + 1) & 15
        return (head + section).ljust(PACKET, b"\xff")

    def pes(self, pes: bytes, flags: int = 0, pcr: int | None = None) -> bytes:
        """The packets of a PES: the first with ``flags`` and ``pcr`` in its adaptation field, the last one padded.

        The caller sees to it that the last one has room (``padding``).
        """
        body = memoryview(pes)
        extra = b"" if pcr is None else bytes((7, flags | 0x10)) + mpegts.pcr_bytes(pcr)
        parts: list[bytes | memoryview] = []
        at, first = 0, 0x40
        while at < len(body):
            room = _BODY - len(extra)
            left = len(body) - at
            cc, self._next = self._next, (self._next + 1) & 15
            if left < room:
                extra = _stuffed(extra, room - left)
                room = left
            head = bytes((SYNC, first | self.pid >> 8, self.pid & 255, (0x30 if extra else 0x10) | cc))
            parts += head, extra, body[at : at + room]
            at, first, extra = at + room, 0, b""
            while len(body) - at >= _BODY:  # those in the middle are plain
                parts += self._plain[self._next], body[at : at + _BODY]
                self._next = (self._next + 1) & 15
                at += _BODY
        return b"".join(parts)


def _stuffed(field: bytes, more: int) -> bytes:
    """The adaptation field ``field``, its length byte included and perhaps empty, longer by ``more`` bytes."""
    size = len(field) + more
    if not field:
        field = b"\x00" if more == 1 else b"\x00\x00"
    return (bytes((size - 1,)) + field[1:]).ljust(size, b"\xff")


def _pes(stream_id: int, pts: int, dts: int, payload: bytes, bounded: bool, before: int) -> bytes:
    """A PES packet; ``before`` bytes go before it in its first transport packet.

    One stuffing byte in its header where the last transport packet would have been exactly full.
    """
    stamps = mpegts.stamp_bytes(2, pts)
    if dts != pts:
        stamps = mpegts.stamp_bytes(3, pts) + mpegts.stamp_bytes(1, dts)
    if (before + 9 + len(stamps) + len(payload)) % _BODY == 0:
        stamps += b"\xff"
    size = 3 + len(stamps) + len(payload)
    flags = 0xC0 if dts != pts else 0x80
    length = size.to_bytes(2, "big") if bounded and size <= 0xFFFF else b"\x00\x00"
    return b"\x00\x00\x01" + bytes((stream_id,)) + length + bytes((0x84, flags, len(stamps))) + stamps + payload


class Segmenter:
    """``video`` and ``audio`` as they come, ``finish`` at the end; send each piece at once.

    Ask ``wants_key(pts)`` before encoding a frame. Nothing comes out before the first keyframe.
    """

    def __init__(self, audio: AudioTrack | None = None, seconds: float = SEGMENT_SECONDS) -> None:
        self._seconds = round(seconds * CLOCK)
        self._track = audio
        self._version = 0
        self._pat = _Counter(mpegts.PAT_PID)
        self._pmt = _Counter(_PMT_PID)
        self._video = _Counter(_VIDEO_PID)
        self._sound = _Counter(_AUDIO_PID)
        self._start: int | None = None
        self._passed = False  # a heavy frame was let off in this segment
        self._shown = 0
        self._waiting: deque[AudioPacket] = deque()
        self._weight = 0  # bytes in it
        self.unheard = 0  # audio packets that were dropped, as no picture came in time

    def wants_key(self, pts: int, heavy: bool = False) -> bool:
        """Whether the frame shown at ``pts`` should be a keyframe: a segment's time is over, or there is none yet.

        ``heavy``: the frame was a keyframe of the input, several times the work of another one. Then the next will do,
        once a segment: a keyframe is decoded and another one encoded in different frames' time, and as both come at the
        same intervals as a rule, this moves them apart for good.
        """
        if self._start is None:
            return True
        due = pts - self._start >= self._seconds
        if due and heavy and not self._passed:
            self._passed = True
            return False
        return due

    def video(self, picture: CodedPicture) -> list[Piece]:
        """The picture's bytes; a keyframe starts a segment when it is time. Pictures before the first one are lost."""
        starts = picture.key and (self._start is None or picture.pts - self._start >= self._seconds - _EARLY)
        if self._start is None and not starts:
            return []
        parts, before = [], b""
        if starts:
            before = self._due(picture.pts) if self._start is not None else b""
            parts, self._start, self._passed = [self._tables()], picture.pts, False
        data = picture.data if nal.starts_with_aud("h264", picture.data) else _AUD + picture.data
        pes = _pes(0xE0, picture.pts, picture.dts, data, False, 8)
        parts.append(self._video.pes(pes, 0x40 if picture.key else 0, max(0, picture.dts - _PCR_LEAD)))
        self._shown = picture.pts
        parts.append(self._due(self._shown))
        pieces = [Piece(before)] if before else []
        return [*pieces, Piece(b"".join(parts), starts)]

    def audio(self, packet: AudioPacket) -> list[Piece]:
        """Takes the packet; answers what no longer has to wait. Its payload is copied as it is."""
        pieces = []
        if packet.track != self._track:
            if self._start is not None:  # what waits belongs to the old tables
                pieces.append(self._due(None))
            self._clear()
            self._track = packet.track
            self._version = (self._version + 1) & 31
            if self._start is not None:
                pieces.append(self._tables())
        self._waiting.append(packet)
        self._weight += len(packet.data)
        limit, heavy = packet.pts - _MAX_AUDIO_SPAN, self._weight > _MOST_WAITING
        if self._start is not None:
            pieces.append(self._due(None if heavy else max(self._shown, limit)))
        while self._waiting and (self._waiting[0].pts < limit or self._weight > _MOST_WAITING):
            self._weight -= len(self._waiting.popleft().data)
            self.unheard += 1
        data = b"".join(pieces)
        return [Piece(data)] if data else []

    def finish(self) -> list[Piece]:
        """The audio that was still waiting. Nothing comes after it."""
        data = self._due(None) if self._start is not None else b""
        self._clear()
        return [Piece(data)] if data else []

    def _clear(self) -> None:
        self.unheard += len(self._waiting)
        self._waiting.clear()
        self._weight = 0

    def _tables(self) -> bytes:
        streams = [Stream(_VIDEO_PID, 0x1B, "h264")]
        if self._track is not None:
            streams.append(Stream(_AUDIO_PID, 0, self._track.codec, self._track.channels))
        pmt = mpegts.pmt(_VIDEO_PID, self._version, tuple(streams))
        return self._pat.section(mpegts.pat(_PMT_PID)) + self._pmt.section(pmt)

    def _due(self, until: int | None) -> bytes:
        """The audio packets that waited, up to those shown at ``until``; all for None."""
        parts = []
        while self._waiting and (until is None or self._waiting[0].pts <= until):
            packet = self._waiting.popleft()
            self._weight -= len(packet.data)
            stream_id = 0xBD if packet.track.codec == "opus" else 0xC0
            parts.append(self._sound.pes(_pes(stream_id, packet.pts, packet.pts, packet.data, True, 0)))
        return b"".join(parts)
