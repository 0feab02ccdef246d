"""What a picture of H.264 or HEVC in Annex B form says about itself, read from NAL unit headers alone.

NAL unit types are from ITU-T H.264 table 7-1 and H.265 table 7-1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gpu_byoc.media.mpegts import VideoCodec

_START: Final = b"\x00\x00\x01"

_H264_SLICES: Final = frozenset((1, 2, 5))
_H264_IDR: Final = 5
_H264_SPS: Final = 7
H264_AUD: Final = 9
_HEVC_FIRST_NON_VCL: Final = 32
_HEVC_IRAP: Final = range(16, 24)
_HEVC_SPS: Final = 33
HEVC_AUD: Final = 35


@dataclass(frozen=True, slots=True)
class Kind:
    """``key``: decoding can start here. ``sps``: the sequence parameter set in front of the picture, or empty."""

    key: bool
    sps: bytes = b""


def kind(codec: VideoCodec, data: bytes | bytearray, start: int = 0) -> Kind:
    """Looks at what comes from ``start`` to the first slice, and at that slice's type; no further.

    An H.264 picture is a key if it is IDR, or has a parameter set in front of it: with open GOPs and intra refresh the
    recovery point is not IDR, and encoders repeat parameter sets only where a decoder may start.
    """
    sps, at = b"", data.find(_START, start)
    while 0 <= at < len(data) - 3:
        head = data[at + 3]
        number = head & 0x1F if codec == "h264" else head >> 1 & 0x3F
        if codec == "h264" and number in _H264_SLICES:
            return Kind(number == _H264_IDR or bool(sps), sps)
        if codec == "hevc" and number < _HEVC_FIRST_NON_VCL:
            return Kind(number in _HEVC_IRAP, sps)
        after = data.find(_START, at + 3)
        if number == (_H264_SPS if codec == "h264" else _HEVC_SPS):
            sps = bytes(data[at + 3 : after if after > 0 else len(data)])
        at = after
    return Kind(False, sps)


def starts_with_aud(codec: VideoCodec, data: bytes | bytearray | memoryview) -> bool:
    """Whether an access unit delimiter comes first, as 13818-1 2.14.1 wants it of pictures in a transport stream."""
    head = bytes(data[:5])
    at = head.find(_START) + 3
    if not 3 <= at < len(head):
        return False
    return head[at] & 0x1F == H264_AUD if codec == "h264" else head[at] >> 1 & 0x3F == HEVC_AUD
