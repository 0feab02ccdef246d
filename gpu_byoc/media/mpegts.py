"""MPEG transport streams on paper: numbers, time stamps and tables, read and written. No state.

Layout and field names are from ISO/IEC 13818-1 (= ITU-T H.222.0): packets 2.4.3.2, adaptation field 2.4.3.4, PES
2.4.3.6, PAT 2.4.4.3, PMT 2.4.4.8, stream types table 2-34. Opus in a transport stream follows the draft at
wiki.xiph.org/OpusTS, as FFmpeg does: private PES, a registration descriptor ``Opus``, a DVB extension descriptor 0x80.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

CLOCK: Final = 90_000
"""Ticks a second of PTS and DTS."""
WRAP: Final = 1 << 33
"""A time stamp has 33 bits: it starts again after 26.5 hours."""

PACKET: Final = 188
SYNC: Final = 0x47
PAT_PID: Final = 0x0000
MAX_SECTION: Final = 1024  # section_length is at most 1021, after three bytes of header

VideoCodec = Literal["h264", "hevc"]
AudioCodec = Literal["aac", "aac_latm", "ac3", "dts", "eac3", "mp2", "opus", "pcm_bluray", "s302m", "truehd"]

VIDEO_TYPES: Final[dict[int, VideoCodec]] = {0x1B: "h264", 0x24: "hevc"}
AUDIO_TYPES: Final[dict[int, AudioCodec]] = {
    0x03: "mp2",
    0x04: "mp2",  # MPEG audio layers I to III
    0x0F: "aac",
    0x11: "aac_latm",  # in ADTS; in LOAS
    0x81: "ac3",
    0x87: "eac3",
    0x8A: "dts",  # private ones, as ATSC (A/53, A/52) and FFmpeg have them
}
_BARE_TYPES: Final[dict[int, AudioCodec]] = {0x82: "dts", 0x83: "truehd"}
"""Of programs that name no owner of their private types: FFmpeg's muxer writes such."""
_BLURAY_TYPES: Final[dict[int, AudioCodec]] = {
    0x80: "pcm_bluray",
    0x81: "ac3",
    0x82: "dts",
    0x83: "truehd",
    0x84: "eac3",
    0x85: "dts",
    0x86: "dts",
}
"""Of programs that are registered as ``HDMV``; elsewhere they mean other things, such as 0x86 the cues of SCTE 35."""
_REGISTERED: Final[dict[bytes, AudioCodec]] = {
    b"Opus": "opus",
    b"AC-3": "ac3",
    b"EAC3": "eac3",
    b"BSSD": "s302m",
    **dict.fromkeys((b"DTS1", b"DTS2", b"DTS3"), "dts"),
}
"""By the format identifier of a registration descriptor: A/52 annex A, SMPTE 302M, ETSI TS 102 114."""
_DVB: Final[dict[int, AudioCodec]] = {0x6A: "ac3", 0x7A: "eac3", 0x7B: "dts"}
"""By a descriptor of ETSI EN 300 468."""
PRIVATE_TYPE: Final = 0x06
_FIRST_PRIVATE: Final = 0x80  # "user private": the registration descriptor says whose
_TYPE_OF: Final = {"h264": 0x1B, "mp2": 0x03, "aac": 0x0F, "aac_latm": 0x11, "truehd": 0x83}

_REGISTRATION: Final = 0x05
_EXTENSION: Final = 0x7F
_OPUS_EXTENSION: Final = 0x80


@dataclass(frozen=True, slots=True)
class Stream:
    """An entry of the PMT. ``codec`` is None for what is not on the list above; ``channels`` only Opus says here."""

    pid: int
    type: int
    codec: VideoCodec | AudioCodec | None
    channels: int = 0

    @property
    def is_video(self) -> bool:
        return self.type in VIDEO_TYPES


def stamp(data: bytes | bytearray | memoryview, at: int) -> int | None:
    """The PTS or DTS in the five bytes at ``at``; None if a marker bit is missing, so they are no time stamp."""
    a, b, c, d, e = data[at : at + 5]
    if not a & c & e & 1:
        return None
    return (a >> 1 & 7) << 30 | b << 22 | c >> 1 << 15 | d << 7 | e >> 1


def stamp_bytes(prefix: int, ticks: int) -> bytes:
    """``ticks`` modulo 33 bits; ``prefix`` is 2 for a PTS alone, 3 for a PTS before a DTS, 1 for that DTS."""
    t = ticks % WRAP
    return bytes((prefix << 4 | t >> 29 & 14 | 1, t >> 22 & 255, t >> 14 & 254 | 1, t >> 7 & 255, t << 1 & 254 | 1))


def pcr_bytes(ticks: int) -> bytes:
    """Program clock reference: ``ticks`` of 90 kHz modulo 33 bits, extension 0."""
    return ((ticks % WRAP) << 15 | 0x7E00).to_bytes(6, "big")


def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        crc = value << 24
        for _ in range(8):
            crc = (crc << 1 ^ 0x04C11DB7 if crc & 0x80000000 else crc << 1) & 0xFFFFFFFF
        table.append(crc)
    return tuple(table)


_CRC_TABLE: Final = _crc_table()


def crc(data: bytes | memoryview) -> int:
    """CRC-32 of annex A. Over a section with its CRC it is 0."""
    value = 0xFFFFFFFF
    for byte in data:
        value = (value << 8 ^ _CRC_TABLE[value >> 24 ^ byte]) & 0xFFFFFFFF
    return value


def section(table_id: int, number: int, version: int, body: bytes) -> bytes:
    """A table in one section; ``number`` is the transport stream id of a PAT, the program number of a PMT."""
    head = bytes((table_id, 0xB0, len(body) + 9)) + number.to_bytes(2, "big") + bytes((0xC1 | version << 1, 0, 0))
    return head + body + crc(head + body).to_bytes(4, "big")


def is_section(data: bytes, table_id: int) -> bool:
    """A whole section of that table, in force now, with the right CRC."""
    return len(data) >= 12 and data[0] == table_id and bool(data[5] & 1) and crc(data) == 0


def pat(pmt_pid: int) -> bytes:
    return section(0x00, 1, 0, bytes((0, 1, 0xE0 | pmt_pid >> 8, pmt_pid & 255)))


def pmt_pid(data: bytes) -> int | None:
    """The PMT's PID of the first program in a PAT; None if it lists none."""
    for at in range(8, len(data) - 7, 4):
        if data[at] or data[at + 1]:  # program 0 is the network table
            return (data[at + 2] & 0x1F) << 8 | data[at + 3]
    return None


def pmt(pcr_pid: int, version: int, streams: tuple[Stream, ...]) -> bytes:
    """A PMT of program 1. Streams must have a codec, one of those that need no program of Blu-ray's."""
    body = bytes((0xE0 | pcr_pid >> 8, pcr_pid & 255, 0xF0, 0))
    for each in streams:
        name = next((name for name, codec in _REGISTERED.items() if codec == each.codec), b"")
        kind = PRIVATE_TYPE if name else _TYPE_OF[str(each.codec)]
        info = bytes((_REGISTRATION, len(name))) + name if name else b""
        if each.codec == "opus":
            info += bytes((_EXTENSION, 2, _OPUS_EXTENSION, each.channels))
        body += bytes((kind, 0xE0 | each.pid >> 8, each.pid & 255, 0xF0, len(info))) + info
    return section(0x02, 1, version, body)


def pmt_streams(data: bytes) -> Iterator[Stream]:
    """The streams of a PMT in its order. A table that contradicts itself ends early."""
    end = len(data) - 4
    at = 12 + ((data[10] & 0x0F) << 8 | data[11])
    owner = next((body[:4] for tag, body in _descriptors(data[12 : min(at, end)]) if tag == _REGISTRATION), b"")
    types = AUDIO_TYPES | (_BLURAY_TYPES if owner == b"HDMV" else {} if owner else _BARE_TYPES)
    while at + 5 <= end:
        kind, pid = data[at], (data[at + 1] & 0x1F) << 8 | data[at + 2]
        size = (data[at + 3] & 0x0F) << 8 | data[at + 4]
        info = data[at + 5 : min(at + 5 + size, end)]
        at += 5 + size
        codec = VIDEO_TYPES.get(kind) or types.get(kind)
        if codec is None and (kind == PRIVATE_TYPE or kind >= _FIRST_PRIVATE):
            codec = _private(info)
        yield Stream(pid, kind, codec, _opus_channels(info) if codec == "opus" else 0)


def _descriptors(info: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 2 <= len(info):
        yield info[at], info[at + 2 : at + 2 + info[at + 1]]
        at += 2 + info[at + 1]


def _private(info: bytes) -> AudioCodec | None:
    """What a private stream is by its descriptors."""
    for tag, body in _descriptors(info):
        codec = _REGISTERED.get(body[:4]) if tag == _REGISTRATION else _DVB.get(tag)
        if codec is not None:
            return codec
    return None


def _opus_channels(info: bytes) -> int:
    """Channels of Opus by its descriptors. Dual mono (code 0), and those that do not say it, count as two."""
    channels = 2
    for tag, body in _descriptors(info):
        if tag == _EXTENSION and len(body) >= 2 and body[0] == _OPUS_EXTENSION and 1 <= body[1] <= 8:
            channels = body[1]
    return channels


def used(field: bytes | memoryview) -> int:
    """How many bytes of an adaptation field (its length byte left off) mean something; the rest is stuffing.

    A field without a flag means nothing. 2.4.3.4: stuffing follows what the flags announce.
    """
    if not field or not field[0]:
        return 0
    flags, size = field[0], 1 + 6 * (field[0] >> 4 & 1) + 6 * (field[0] >> 3 & 1) + (field[0] >> 2 & 1)
    for bit in (2, 1):  # private data, then extension: each has a length of its own
        if flags & bit and size < len(field):
            size += 1 + field[size]
    return size
