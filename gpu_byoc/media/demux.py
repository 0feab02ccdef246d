"""MPEG transport stream in pieces of any size -> pictures, audio packets, problems. Bytes in, events out, no I/O.

One program, its first video and first audio stream of a known codec. Nothing that comes in raises: what is wrong
becomes a ``Problem``, and reading goes on behind it.

**When a picture is complete.** A video PES has no length, so the rule book says: when the next one begins, a frame
interval later. But writers put stuffing only into the last packet of a PES, so a padded packet ends the picture here,
at once. If a packet continues a picture after all, the stream's writer pads otherwise: then that shortcut is closed for
this stream, and the picture counts as lost.

**Memory.** A PES is at most ``Limits.max_pes`` bytes, a table 1,024, and less than one packet waits for its rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

from gpu_byoc.media import mpegts, nal
from gpu_byoc.media.audio import PADDING, AudioPacket, AudioTrack, track_of
from gpu_byoc.media.mpegts import PACKET, SYNC, Stream, VideoCodec
from gpu_byoc.media.timeline import JUMP, Timeline, apart

VIDEO: Final = "video"
AUDIO: Final = "audio"

_MAX_SAID: Final = 64  # ignored streams that are reported; a PMT with more is no broadcast but an attack
_TIMES: Final = 0xC0  # of the second flag byte of a PES header: PTS, DTS
_PES_HEAD: Final = 9
_FIRST_PID: Final = 0x10  # lower ones are for tables
_NULL_PID: Final = 0x1FFF
_AC3_SYNC: Final = b"\x0b\x77"
"""Blu-ray has the same sound as AC-3 beside TrueHD, on one PID. No unit of TrueHD begins so: it would say 5,870 bytes,
and at 18 Mbit/s, its most, one has 1,875."""


@dataclass(frozen=True, slots=True)
class Limits:
    """``max_pes``: bytes of one picture or audio packet; 4 MiB is a frame of a 25 fps stream at 800 Mbit/s.
    ``max_pixels``, ``max_side``: of a picture; 4096x2304 is the largest of H.264 level 5.2.
    """

    max_pes: int = 4 << 20
    max_pixels: int = 4096 * 2304
    max_side: int = 8192


@dataclass(frozen=True, slots=True)
class Tracks:
    """What the stream has from here on. ``audio`` appears once its first packet told its parameters."""

    video: VideoCodec | None
    audio: AudioTrack | None


@dataclass(frozen=True, slots=True)
class Picture:
    """One coded picture in Annex B form. ``data`` has zeros behind it that a decoder may read. 90 kHz."""

    codec: VideoCodec
    data: memoryview
    pts: int | None
    dts: int | None
    key: bool
    sps: bytes


@dataclass(frozen=True, slots=True)
class Problem:
    """``reason`` is one of a few words, for counting; ``detail`` is for people; ``track`` is whose data was lost."""

    reason: str
    detail: str
    track: str | None = None


DemuxEvent: TypeAlias = Tracks | Picture | AudioPacket | Problem


class _Lane:
    """One elementary stream: the PES that is coming in, and what was last seen of its packets."""

    __slots__ = (
        "active",
        "announced",
        "broken",
        "cc",
        "channels",
        "codec",
        "data",
        "ended_by_padding",
        "expected",
        "fresh",
        "gap",
        "name",
        "pads_inside",
        "start",
        "tables",
    )

    def __init__(self, name: str, stream: Stream) -> None:
        self.name = name
        self.codec = stream.codec
        self.channels = stream.channels
        self.data = bytearray()
        self.active = False
        self.expected = 0  # bytes of this PES by its own length; 0 if it has none
        self.cc = -1  # continuity counter of the last packet with payload
        self.start = b""  # the last packet that began a PES, to know it again when it is sent twice
        self.gap = False  # something before the PES that is coming in is missing, and nobody was told
        self.broken = False  # the PES that was coming in is lost, and that was told; waiting for the next
        self.tables = False  # a PAT has come since the last PES began
        self.fresh = False  # ... and one came before that
        self.announced = False  # the stream itself announces a discontinuity before this PES
        self.ended_by_padding = False
        self.pads_inside = False

    def clear(self) -> None:
        self.data = bytearray()
        self.active = False
        self.expected = 0


class _Table:
    """Puts sections together. ``latest`` is the last one, so that a repeated one costs no parsing."""

    __slots__ = ("data", "latest", "table_id")

    def __init__(self, table_id: int) -> None:
        self.table_id = table_id
        self.data = bytearray()
        self.latest = b""

    def add(self, payload: memoryview, start: bool) -> bytes | None:
        """The section that this packet completes, if it is new."""
        if start:
            self.data = bytearray(payload[1 + payload[0] :]) if len(payload) > 1 + payload[0] else bytearray()
        elif self.data:
            self.data += payload
        if len(self.data) < 3:
            return None
        size = 3 + ((self.data[1] & 0x0F) << 8 | self.data[2])
        if size > mpegts.MAX_SECTION or self.data[0] != self.table_id:
            self.data = bytearray()
            return None
        if len(self.data) < size:
            return None
        section, self.data = bytes(self.data[:size]), bytearray()
        if section == self.latest:
            return None
        self.latest = section
        return section


class Demuxer:
    """``feed`` what comes, ``end_segment`` where the sender's segments end if that is known, ``finish`` at the end."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._tail = b""
        self._in_sync = True
        self._events: list[DemuxEvent] = []
        self._timeline = Timeline()
        self._pat = _Table(0x00)
        self._pmt = _Table(0x02)
        self._pmt_pid: int | None = None
        self._lanes: dict[int, _Lane] = {}
        self._streams: tuple[Stream, ...] | None = None  # those of the program that are used; None before a PMT
        self._audio: AudioTrack | None = None
        self._said: set[tuple[int, int]] = set()

    def feed(self, data: bytes | bytearray | memoryview) -> list[DemuxEvent]:
        """What became complete, in order. ``data`` may be any part of the stream, and is not kept."""
        buffer = self._tail + bytes(data) if self._tail else bytes(data)
        view = memoryview(buffer)
        lanes, at, last = self._lanes, 0, len(buffer) - PACKET
        while at <= last:
            if buffer[at] != SYNC:
                at = self._resync(buffer, at)
                continue
            first, control = buffer[at + 1], buffer[at + 3]
            pid = (first & 0x1F) << 8 | buffer[at + 2]
            lane = lanes.get(pid)
            if lane is not None:
                if (
                    lane.active
                    and first < 0x40  # no error, not a start
                    and control == 0x10 | (lane.cc + 1) & 15  # payload only, in the clear, the next one
                    and not lane.expected
                    and len(lane.data) < self._limits.max_pes
                ):  # nine of ten packets
                    lane.cc = control & 15
                    lane.data += view[at + 4 : at + PACKET]
                else:
                    self._packet(lane, view[at : at + PACKET])
            elif pid == mpegts.PAT_PID or pid == self._pmt_pid:
                self._tables(pid, view[at : at + PACKET])
                lanes = self._lanes
            at += PACKET
        self._tail = buffer[at:]
        return self._take()

    def end_segment(self) -> list[DemuxEvent]:
        """The sender's segment is over: pictures without a length are complete, everything else unfinished is lost."""
        if self._tail:
            self._problem("truncated", f"a segment ended {len(self._tail)} bytes into a packet")
            self._tail = b""
        for lane in list(self._lanes.values()):
            if lane.active and not lane.expected:
                self._complete(lane)
            elif lane.active:
                self._lose(lane, "truncated", f"a segment ended inside of {lane.name} data")
        return self._take()

    finish = end_segment

    # --- packets

    def _take(self) -> list[DemuxEvent]:
        events, self._events = self._events, []
        return events

    def _problem(self, reason: str, detail: str, track: str | None = None) -> None:
        self._events.append(Problem(reason, detail, track))

    def _resync(self, buffer: bytes, at: int) -> int:
        """Where the next packet may begin: a sync byte with another one packet later, or with no later byte known."""
        if self._in_sync:
            self._in_sync = False
            self._problem("sync", "bytes that are no transport stream packet")
        found = buffer.find(SYNC, at + 1)
        while found >= 0:
            if found + PACKET >= len(buffer) or buffer[found + PACKET] == SYNC:
                break
            found = buffer.find(SYNC, found + 1)
        self._in_sync = found >= 0
        return found if found >= 0 else len(buffer)

    def _packet(self, lane: _Lane, packet: memoryview) -> None:
        """Everything that is not plain: starts, adaptation fields, gaps, errors."""
        start, control = bool(packet[1] & 0x40), packet[3]
        if packet[1] & 0x80 or control & 0xC0:
            self._lose(lane, "packet", "a packet marked as damaged" if packet[1] & 0x80 else "a scrambled packet")
            return
        at, padded, announced = 4, False, False
        if control & 0x20:
            size = packet[4]
            if size > PACKET - 5 - (control >> 4 & 1):
                self._lose(lane, "packet", f"an adaptation field of {size} bytes")
                return
            at = 5 + size
            field = packet[5:at]
            padded = size == 0 or mpegts.used(field) < size
            announced = size > 0 and bool(field[0] & 0x80)
        if not control & 0x10 or self._repeated(lane, packet, start):
            return
        followed = self._continuity(lane, control & 15, start, announced)
        if start:
            self._start(lane, packet, at, announced)
        elif not lane.active:
            self._unexpected(lane, followed)
            return
        else:
            lane.data += packet[at:]
        self._grown(lane, padded)

    def _repeated(self, lane: _Lane, packet: memoryview, start: bool) -> bool:
        """2.4.3.3: a packet may be sent twice, then with the same counter."""
        if packet[3] & 15 != lane.cc:
            return False
        return packet == lane.start if start else not lane.active or lane.data.endswith(packet[-32:])

    def _continuity(self, lane: _Lane, cc: int, start: bool, announced: bool) -> bool:
        """Whether the packet follows the one before."""
        follows = lane.cc < 0 or cc == (lane.cc + 1) & 15
        lane.cc = cc
        if follows or (announced and start):
            return True
        # Each segment may have counters of its own: where tables came first, what was coming in counts as whole.
        if lane.active and not (start and lane.tables):
            self._lose(lane, "continuity", f"packets of {lane.name} are missing")
        elif not lane.broken:
            lane.gap = True
        return False

    def _start(self, lane: _Lane, packet: memoryview, at: int, announced: bool) -> None:
        if lane.active:
            if lane.expected:
                self._lose(lane, "truncated", f"{lane.name} data shorter than it says")
            else:
                self._complete(lane)
        lane.start = bytes(packet)
        lane.active, lane.broken, lane.ended_by_padding = True, False, False
        lane.fresh, lane.tables, lane.announced = lane.tables, False, announced
        lane.data += packet[at:]
        size = lane.data[4] << 8 | lane.data[5] if len(lane.data) >= 6 else 0
        lane.expected = size + 6 if size else 0

    def _unexpected(self, lane: _Lane, followed: bool) -> None:
        """A packet that continues nothing: behind something lost, or behind an end that was none."""
        if lane.broken or not lane.start:
            return
        if lane.ended_by_padding and followed:
            lane.pads_inside = True
            self._lose(lane, "padding", f"{lane.name} data goes on after a padded packet; from now on ends are awaited")
        else:
            self._lose(lane, "continuity", f"the start of {lane.name} data is missing")

    def _grown(self, lane: _Lane, padded: bool) -> None:
        size = len(lane.data)
        if lane.expected:
            if size >= lane.expected:
                del lane.data[lane.expected :]
                self._complete(lane)
        elif padded and not lane.pads_inside:
            lane.ended_by_padding = True
            self._complete(lane)
        if lane.active and max(size, lane.expected) > self._limits.max_pes:
            self._lose(lane, "too_long", f"{lane.name} data of more than {self._limits.max_pes} bytes")

    def _lose(self, lane: _Lane, reason: str, detail: str) -> None:
        lane.clear()
        lane.broken, lane.gap = True, False
        self._problem(reason, detail, lane.name)

    # --- elementary streams

    def _complete(self, lane: _Lane) -> None:
        data = lane.data
        lane.clear()
        gap, lane.gap = lane.gap, False
        if len(data) < _PES_HEAD or data[:3] != b"\x00\x00\x01" or data[6] & 0xC0 != 0x80:
            self._problem("pes", f"{lane.name} data without a PES header", lane.name)
            return
        body = _PES_HEAD + data[8]
        if body >= len(data):
            return
        pts, dts = _times(data, body)
        if lane.name == VIDEO:
            self._picture(lane, data, body, pts, dts, gap)
        else:
            self._sound(lane, data[body:], pts)

    def _picture(self, lane: _Lane, data: bytearray, body: int, pts: int | None, dts: int | None, gap: bool) -> None:
        assert lane.codec == "h264" or lane.codec == "hevc"
        kind = nal.kind(lane.codec, data, body)
        if gap and not (kind.key and lane.fresh):
            self._problem("continuity", "packets between two pictures are missing", VIDEO)
        place = self._place(VIDEO, pts, dts, kind.key or lane.announced)
        if place is None or pts is None:  # still decoded, as others may refer to it
            self._problem("timestamp", f"a picture with PTS {pts}, DTS {dts}, out of line with those before")
        due = None if place is None or pts is None else place + (0 if dts is None else apart(pts, dts))
        size = len(data)
        data += bytes(PADDING)
        self._events.append(Picture(lane.codec, memoryview(data)[body:size], due, place, kind.key, kind.sps))

    def _sound(self, lane: _Lane, payload: bytearray, pts: int | None) -> None:
        assert lane.codec is not None
        assert lane.codec != "h264"
        assert lane.codec != "hevc"
        if lane.codec == "truehd" and payload.startswith(_AC3_SYNC):
            return
        track = track_of(lane.codec, payload, lane.channels)
        if track is None and self._audio is None:
            self._problem("audio", f"{lane.codec} data without a header", AUDIO)
            return
        if track is not None and track != self._audio:
            self._audio = track
            self._tell()
        assert self._audio is not None
        place = self._place(AUDIO, pts, None, lane.announced)
        if place is None:
            self._problem("timestamp", f"an audio packet with PTS {pts}, out of line with those before", AUDIO)
            return
        self._events.append(AudioPacket(bytes(payload), place, self._audio))

    def _place(self, name: str, pts: int | None, dts: int | None, trusted: bool) -> int | None:
        if pts is None or (dts is not None and not 0 <= apart(pts, dts) <= JUMP):
            return None
        return self._timeline.place(name, pts if dts is None else dts, trusted)

    # --- tables

    def _tables(self, pid: int, packet: memoryview) -> None:
        control = packet[3]
        at = 5 + packet[4] if control & 0x20 else 4
        start = bool(packet[1] & 0x40)
        if packet[1] & 0x80 or not control & 0x10 or at >= PACKET:
            return
        table = self._pat if pid == mpegts.PAT_PID else self._pmt
        if pid == mpegts.PAT_PID:
            for lane in self._lanes.values():
                lane.tables = True
        section = table.add(packet[at:], start)
        if section is None:
            return
        if not mpegts.is_section(section, table.table_id):
            table.latest = b""
            self._problem("table", "a PAT or PMT with a wrong checksum")
        elif table is self._pat:
            self._pmt_pid = mpegts.pmt_pid(section)
            self._pmt = _Table(0x02)
        else:
            self._program(tuple(mpegts.pmt_streams(section)))

    def _program(self, streams: tuple[Stream, ...]) -> None:
        streams = tuple(each for each in streams if _FIRST_PID <= each.pid < _NULL_PID and each.pid != self._pmt_pid)
        video = next((each for each in streams if each.is_video), None)
        taken = video.pid if video else None
        audio = next((each for each in streams if each.codec and not each.is_video and each.pid != taken), None)
        chosen = tuple(each for each in (video, audio) if each is not None)
        for each in streams:
            if each not in chosen and (each.pid, each.type) not in self._said and len(self._said) < _MAX_SAID:
                self._said.add((each.pid, each.type))
                self._problem("ignored", f"the stream with PID {each.pid} and type {each.type:#04x} is not used")
        if chosen == self._streams:
            return
        before, self._streams = self._streams or (), chosen
        old, self._lanes = self._lanes, {}
        for each in chosen:  # a stream that stays goes on, in the middle of a picture if need be
            lane = old.pop(each.pid) if each in before else _Lane(VIDEO if each is video else AUDIO, each)
            lane.gap |= bool(before) and each not in before  # does not follow what came last
            self._lanes[each.pid] = lane
        for lane in old.values():
            if lane.active:
                self._lose(lane, "tables", f"the program changed inside of {lane.name} data")
        if audio not in before:
            self._audio = None
        self._tell()

    def _tell(self) -> None:
        video = next((lane.codec for lane in self._lanes.values() if lane.name == VIDEO), None)
        self._events.append(Tracks(video if video == "h264" or video == "hevc" else None, self._audio))


def _times(data: bytearray, body: int) -> tuple[int | None, int | None]:
    """PTS and DTS of a PES header whose payload begins at ``body``; None where there is none, or none that is valid."""
    have = data[7] & _TIMES
    if not have & 0x80 or body < _PES_HEAD + 5 or len(data) < body:
        return None, None
    pts = mpegts.stamp(data, _PES_HEAD)
    if have != _TIMES or body < _PES_HEAD + 10:
        return pts, None
    return pts, mpegts.stamp(data, _PES_HEAD + 5)
