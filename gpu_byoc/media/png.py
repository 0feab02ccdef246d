"""PNG files before the decoder sees them: geometry, integrity, and nothing but what carries pixels.

Numbers are from the PNG specification (W3C, third edition): chunk layout 5.3, IHDR 11.2.1, Adam7 8.1, filters 9.2.

FFmpeg's decoder answers an image whose data ends early, or whose rows name an unknown filter, with a picture and no
error, and inflates compressed text and colour profiles without a limit. So the image data is inflated here, to the
exact length that the header promises, and handed on in stored form: no slower (the decoder then copies where it would
have inflated), and complete or refused. Ancillary chunks are left out.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from gpu_byoc.errors import CorruptImage

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
HEADER_BYTES: Final = 33  # the signature and the IHDR chunk

_CHANNELS: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_DEPTHS: Final = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PALETTE: Final = 3
_ADAM7: Final = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_LAST_FILTER: Final = 4
_MAX_CHUNKS: Final = 65536  # 512 MiB in the 8 KiB chunks that libpng writes


@dataclass(frozen=True, slots=True)
class Header:
    """IHDR. ``depth`` is bits per sample."""

    width: int
    height: int
    depth: int
    color: int
    interlaced: bool

    def passes(self) -> Iterator[tuple[int, int]]:
        """(bytes per row with its filter byte, rows) of each pass; one pass if not interlaced."""
        bits = self.depth * _CHANNELS[self.color]
        for left, top, across, down in _ADAM7 if self.interlaced else ((0, 0, 1, 1),):
            columns = -(-(self.width - left) // across)
            rows = -(-(self.height - top) // down)
            if columns > 0 and rows > 0:
                yield 1 + (columns * bits + 7) // 8, rows


def header(data: memoryview) -> Header:
    """Read IHDR, which must come first. Raises CorruptImage."""
    if len(data) < HEADER_BYTES:
        raise CorruptImage(f"a PNG of {len(data)} bytes ends within its header; send the whole file")
    length, kind = struct.unpack_from(">I4s", data, 8)
    if kind != b"IHDR" or length != 13:
        raise CorruptImage("a PNG must begin with an IHDR chunk of 13 bytes")
    _check_crc(data, 8, 13, b"IHDR")
    width, height, depth, color, compression, filtering, interlace = struct.unpack_from(">IIBBBBB", data, 16)
    if not width or not height:
        raise CorruptImage(f"a PNG of {width}x{height} has no pixels")
    if depth not in _DEPTHS.get(color, ()):
        raise CorruptImage(f"PNG has no {depth} bits per sample for colour type {color}")
    if compression or filtering or interlace > 1:
        raise CorruptImage(f"PNG has no compression {compression}, filter method {filtering}, interlace {interlace}")
    return Header(width, height, depth, color, bool(interlace))


def stored(data: memoryview) -> bytes:
    """The same picture as a PNG of IHDR, palette and uncompressed image data. Raises CorruptImage."""
    head = header(data)
    parts = [bytes(data[:HEADER_BYTES])]
    packed: list[memoryview] = []
    for kind, start, length in _chunks(data):
        if kind == b"IDAT":
            _check_crc(data, start - 8, length, kind)
            packed.append(data[start : start + length])
        elif kind == b"PLTE" and head.color == _PALETTE:
            _check_crc(data, start - 8, length, kind)
            parts.append(bytes(data[start - 8 : start + length + 4]))
        elif kind[0] < ord("a") and kind not in (b"PLTE", b"IEND"):
            raise CorruptImage(f"PNG has no critical chunk {kind!r} in this place")
    if head.color == _PALETTE and len(parts) != 2:
        raise CorruptImage(f"a PNG of colour type 3 has one palette, this one has {len(parts) - 1}")
    image = _inflate(packed, sum(stride * rows for stride, rows in head.passes()))
    _check_filters(image, head)
    parts += (_chunk(b"IDAT", zlib.compress(image, 0)), _chunk(b"IEND", b""))
    return b"".join(parts)


def _chunks(data: memoryview) -> Iterator[tuple[bytes, int, int]]:
    """(type, offset of the content, length of the content) of every chunk after IHDR, up to IEND."""
    at = HEADER_BYTES
    for _ in range(_MAX_CHUNKS):
        if at + 12 > len(data):
            raise CorruptImage(f"the PNG ends after {len(data)} bytes without an IEND chunk; send the whole file")
        length, kind = struct.unpack_from(">I4s", data, at)
        if at + 12 + length > len(data):
            raise CorruptImage(f"the PNG ends within its {kind!r} chunk; send the whole file")
        yield kind, at + 8, length
        if kind == b"IEND":
            return
        at += 12 + length
    raise CorruptImage(f"a PNG of more than {_MAX_CHUNKS} chunks; write it with larger ones")


def _inflate(packed: list[memoryview], expected: int) -> bytes:
    """Exactly ``expected`` bytes, with the checksum at their end verified."""
    inflater = zlib.decompressobj()
    parts: list[bytes] = []
    room = expected + 1  # one more than there should be, and 0 would mean no limit
    try:
        for piece in packed:
            part = inflater.decompress(piece, room)
            parts.append(part)
            room -= len(part)
            if room < 1 or inflater.eof:
                break
    except zlib.error as error:
        raise CorruptImage(f"the PNG's image data cannot be inflated: {error}") from None
    if room != 1 or not inflater.eof:
        got = f"more than {expected}" if room < 1 else str(expected + 1 - room)
        raise CorruptImage(f"the PNG's image data is {got} bytes where its header needs exactly {expected}")
    return b"".join(parts)


def _check_filters(image: bytes, head: Header) -> None:
    start = 0
    for stride, rows in head.passes():
        stop = start + stride * rows
        if max(image[start:stop:stride]) > _LAST_FILTER:
            raise CorruptImage("a row of the PNG names a filter that does not exist")
        start = stop


def _check_crc(data: memoryview, at: int, length: int, kind: bytes) -> None:
    (written,) = struct.unpack_from(">I", data, at + 8 + length)
    if zlib.crc32(data[at + 4 : at + 8 + length]) != written:
        raise CorruptImage(f"the checksum of the PNG's {kind.decode('latin-1')} chunk is wrong")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", len(content), kind) + content + struct.pack(">I", zlib.crc32(content, zlib.crc32(kind)))
