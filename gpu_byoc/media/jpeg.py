"""JPEG files before the decoder sees them: geometry, completeness, and nothing but what carries pixels.

Marker numbers are from ITU-T T.81 table B.1, the Adobe segment (APP14) from T.872 6.5.3.

FFmpeg's decoder answers a picture of which some components never came with a picture and no error, and obeys quirks of
old cameras found in comments and application segments. So the file is walked here marker by marker: every component
must have its scan, the end marker must be there, and of the application segments only APP14, which says how colours
are coded, is handed on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from gpu_byoc.errors import CorruptImage, UnsupportedMedia

SIGNATURE: Final = b"\xff\xd8\xff"

_SOI: Final = 0xD8
_EOI: Final = 0xD9
_SOS: Final = 0xDA
_COM: Final = 0xFE
_APP: Final = range(0xE0, 0xF0)
_APP14: Final = 0xEE
_DECODED: Final = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive; all with Huffman codes
_OTHER_FRAMES: Final = (0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
_MAX_SEGMENTS: Final = 4096
_MAX_SCANS: Final = 64  # libjpeg writes 10; each one is a pass over the whole picture, however small the file

_NOT_FILL = re.compile(rb"[^\xff]")
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # what ends entropy-coded data: a marker that is no restart


@dataclass(frozen=True, slots=True)
class Header:
    """SOF. ``components`` are the ids of the colour components."""

    width: int
    height: int
    components: bytes


@dataclass(frozen=True, slots=True)
class _Segment:
    """``data[start:stop]`` with its marker, a scan's entropy-coded data included; its content begins at ``content``."""

    marker: int
    start: int
    content: int
    stop: int


def header(data: memoryview) -> Header:
    """Geometry from the frame header; reads no further. Raises CorruptImage, UnsupportedMedia."""
    for segment in _segments(data):
        if segment.marker in _DECODED:
            return _frame(data, segment)
    raise CorruptImage("a JPEG without a frame header; send the whole file")


def bare(data: memoryview) -> bytes:
    """The same picture without comments and metadata, up to its end marker. Raises CorruptImage, UnsupportedMedia."""
    head: Header | None = None
    missing: set[int] = set()
    scans = 0
    parts: list[bytes | memoryview] = [b"\xff\xd8"]
    for segment in _segments(data):
        if segment.marker in _DECODED:
            if head is not None:
                raise CorruptImage("a JPEG with two frame headers")
            head = _frame(data, segment)
            missing = set(head.components)
        elif segment.marker == _SOS:
            scans += 1
            if head is None or scans > _MAX_SCANS:
                raise CorruptImage("a JPEG scan before the frame header" if head is None else "too many JPEG scans")
            missing -= _scan_components(data, segment, head)
        if segment.marker == _APP14 or (segment.marker not in _APP and segment.marker != _COM):
            parts.append(data[segment.start : segment.stop])
    if head is None or missing:
        raise CorruptImage(f"a JPEG without image data for {len(missing) or 'its'} components; send the whole file")
    return b"".join(parts)


def _segments(data: memoryview) -> Iterator[_Segment]:
    """Every segment after SOI, up to and with EOI."""
    at = 2
    for _ in range(_MAX_SEGMENTS):
        code = _NOT_FILL.search(data, at)
        if code is None or code.start() == at:
            raise CorruptImage(f"a JPEG marker is missing at byte {at}; send the whole file")
        marker, content = data[code.start()], code.end()
        if marker == _EOI:
            yield _Segment(marker, at, content, content)
            return
        if marker in _OTHER_FRAMES:
            raise UnsupportedMedia(f"JPEG process {marker:#x} (lossless, arithmetic) is not decoded; send baseline")
        stop = content + int.from_bytes(data[content : content + 2])
        if marker < 0xC0 or marker in range(0xD0, _SOS) or stop < content + 2 or stop > len(data):
            raise CorruptImage(f"the JPEG segment at byte {at} is cut off or out of place; send the whole file")
        if marker == _SOS:
            end = _AFTER_SCAN.search(data, stop)
            if end is None:
                raise CorruptImage(f"the JPEG ends after {len(data)} bytes without an end marker; send the whole file")
            stop = end.start()
        yield _Segment(marker, at, content, stop)
        at = stop
    raise CorruptImage(f"a JPEG of more than {_MAX_SEGMENTS} segments")


def _frame(data: memoryview, segment: _Segment) -> Header:
    content = data[segment.content + 2 : segment.stop]
    if len(content) < 6 or len(content) != 6 + 3 * content[5]:
        raise CorruptImage("a JPEG frame header of the wrong length")
    height, width = int.from_bytes(content[1:3]), int.from_bytes(content[3:5])
    components = bytes(content[6::3])
    if content[0] != 8 or len(components) not in (1, 3, 4):
        raise UnsupportedMedia(f"a JPEG of {len(components)} components with {content[0]} bits is not decoded")
    if not width or not height or len(set(components)) != len(components):
        raise CorruptImage(f"a JPEG frame header of {width}x{height} with components {list(components)}")
    return Header(width, height, components)


def _scan_components(data: memoryview, segment: _Segment, head: Header) -> set[int]:
    length = int.from_bytes(data[segment.content : segment.content + 2])
    content = data[segment.content + 2 : segment.content + length]
    ids = bytes(content[1 : 1 + 2 * content[0] : 2]) if len(content) else b""
    if not ids or len(content) != 4 + 2 * content[0] or not set(ids) <= set(head.components):
        raise CorruptImage("a JPEG scan header does not fit the frame header")
    return set(ids)
