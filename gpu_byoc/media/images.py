"""JPEG and PNG files <-> packed RGB frames.

What the decoders are held to, beyond FFmpeg's own rules: ``png`` and ``jpeg`` beside this file. Everything here may be
called from several threads at once; each has its own pixel converters. Codec contexts are made anew for each image:
it takes 0.03 ms, and a context that is used again hands out buffers that still hold the picture before.

Colour is what the samples say, full range: JPEG as JFIF has it (ITU-R BT.601), profiles, gamma and EXIF orientation
left aside. Grey becomes R = G = B, CMYK becomes RGB, 16 bits become 8, and alpha is dropped without blending.
PyAV keeps FFmpeg's log off unless a program turns it on, so nothing reaches stderr.
"""

from __future__ import annotations

import threading
from fractions import Fraction
from typing import Final

import av
import av.error
import numpy as np
from av.codec.context import Flags
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from gpu_byoc.errors import BadFrame, CorruptImage, TooLarge, UnsupportedMedia
from gpu_byoc.frames import MAX_SIDE, FrameSpec
from gpu_byoc.media import jpeg, png

JPEG: Final = "image/jpeg"
PNG: Final = "image/png"
_SIGNATURES: Final = {JPEG: jpeg.SIGNATURE, PNG: png.SIGNATURE}

_STRICT: Final = {"err_detect": "crccheck+bitstream+buffer+explode"}
# Chroma is interpolated and rounded as libjpeg does it: at most 3 of 255 away from it, 40 with the faster default.
_SCALING: Final = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
# 4:4:4 with quantiser 2, on a 640x480 film frame: 41.0 dB in 106 KB, as libjpeg at quality 92. 4:2:0 saves 20 % of the
# bytes and loses 2.5 dB, all of it in the colours. Huffman tables made for the image cost 2 ms and save 2 %.
_JPEG_QUANTISER: Final = 2
_JPEG_OPTIONS: Final = {"huffman": "default"}
# 15 ms on the same frame where the default takes 58; 4 % longer.
_PNG_OPTIONS: Final = {"compression_level": "1", "pred": "up"}

_local = threading.local()


def media_type(content_type: str) -> str:
    """``image/jpeg`` or ``image/png``, parameters left aside. Raises UnsupportedMedia."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in _SIGNATURES:
        raise UnsupportedMedia(
            f"{kind or 'no content type'} is not an image that is decoded here; send {JPEG} or {PNG}"
        )
    return kind


def probe(data: bytes | bytearray | memoryview, content_type: str, max_pixels: int) -> FrameSpec:
    """The rgb24 frame that ``decode_into`` will write, from the file's header alone; nothing is decoded.

    Raises:
        UnsupportedMedia: not JPEG or PNG, another type than it says, or a kind of JPEG that is not decoded.
        CorruptImage: no valid header.
        TooLarge: more than ``max_pixels`` pixels, or a side of more than 65535.
    """
    view = memoryview(data)
    kind = media_type(content_type)
    if (found := _kind_of(view)) != kind:
        if found is None:
            raise CorruptImage(f"the body does not begin as {kind} does; send the file's bytes as they are")
        raise UnsupportedMedia(f"the body is {found}, its Content-Type says {kind}")
    head = jpeg.header(view) if kind == JPEG else png.header(view)
    if max(head.width, head.height) > MAX_SIDE or head.width * head.height > max_pixels:
        raise TooLarge(f"an image of {head.width}x{head.height} is over the limit of {max_pixels} pixels")
    return FrameSpec(head.width, head.height)


def decode_into(data: bytes | bytearray | memoryview, spec: FrameSpec, out: memoryview, content_type: str) -> None:
    """Write the image as rgb24 into ``out``, exactly ``spec.nbytes`` writable bytes; ``spec`` is what ``probe`` said.

    Raises:
        CorruptImage: it cannot be decoded as a whole; ``out`` may then hold parts of it.
        UnsupportedMedia: it uses something that the decoder does not know.
    """
    view = memoryview(data)
    target = np.frombuffer(out, np.uint8)
    if target.size != spec.nbytes or spec.format != "rgb24":
        raise BadFrame(f"{target.size} bytes were given for an image of {spec} with {spec.nbytes} bytes")
    kind = media_type(content_type)
    frame = _decode(kind, jpeg.bare(view) if kind == JPEG else png.stored(view))
    if (frame.width, frame.height) != (spec.width, spec.height):
        raise CorruptImage(f"the image decodes to {frame.width}x{frame.height}, its header says {spec}")
    rgb = frame if frame.format.name == "rgb24" else _convert(frame, "rgb24")
    plane = rgb.planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
    np.copyto(target.reshape(spec.height, -1), rows[: spec.height, : spec.width * 3])


def encode(view: memoryview, spec: FrameSpec, content_type: str) -> bytes:
    """An rgb24 frame as a file of the given type: PNG exactly, JPEG 4:4:4 at about libjpeg's quality 92.

    ``view`` is read only while this call lasts.

    Raises:
        UnsupportedMedia: neither JPEG nor PNG.
        BadFrame: not rgb24, not ``spec.nbytes`` long, or a side of more than 65535.
    """
    kind = media_type(content_type)
    pixels = np.frombuffer(view, np.uint8)
    if spec.format != "rgb24" or pixels.size != spec.nbytes or max(spec.width, spec.height) > MAX_SIDE:
        raise BadFrame(f"a frame of {spec} in {pixels.size} bytes cannot be written as {kind}; it takes rgb24")
    frame = VideoFrame.from_numpy_buffer(pixels.reshape(spec.shape), "rgb24")
    codec = _encoder(kind, spec)
    return b"".join(bytes(packet) for packet in codec.encode(frame if kind == PNG else _convert(frame, "yuv444p")))


def _kind_of(data: memoryview) -> str | None:
    return next((kind for kind, start in _SIGNATURES.items() if data[: len(start)] == start), None)


def _decode(kind: str, data: bytes) -> VideoFrame:
    context = VideoCodecContext.create("png", "r") if kind == PNG else VideoCodecContext.create("mjpeg", "r")
    context.thread_count = 1
    context.options = _STRICT
    try:
        frames = context.decode(av.Packet(data))
    except (av.error.PatchWelcomeError, av.error.NotImplementedError) as error:
        raise UnsupportedMedia(f"the image uses what the decoder does not know: {error.strerror}") from error
    except av.error.MemoryError:
        raise  # ours to answer for, not the image's
    except av.error.FFmpegError as error:
        raise CorruptImage(f"the image cannot be decoded: {error.strerror}") from error
    if len(frames) != 1 or frames[0].is_corrupt:
        raise CorruptImage("the image has no complete picture")
    return frames[0]


def _encoder(kind: str, spec: FrameSpec) -> VideoCodecContext:
    context = VideoCodecContext.create("png", "w") if kind == PNG else VideoCodecContext.create("mjpeg", "w")
    context.width, context.height = spec.width, spec.height
    context.time_base = Fraction(1, 25)  # demanded, and not written
    context.thread_count = 1
    context.flags |= Flags.bitexact  # no version of the encoder in the file
    if kind == PNG:
        context.pix_fmt = "rgb24"
        context.options = _PNG_OPTIONS
    else:
        context.pix_fmt = "yuv444p"
        context.color_range = ColorRange.JPEG
        context.sample_aspect_ratio = Fraction(1)  # makes it write the JFIF header
        context.qmin = context.qmax = _JPEG_QUANTISER
        context.options = _JPEG_OPTIONS
    return context


def _convert(frame: VideoFrame, format: str) -> VideoFrame:
    """Full range to full range; YUV is BT.601. The converter of this thread keeps its tables between images."""
    converter: VideoReformatter | None = getattr(_local, "converter", None)
    if converter is None:
        converter = _local.converter = VideoReformatter()
    return converter.reformat(
        frame,
        format=format,
        src_colorspace=Colorspace.ITU601,
        dst_colorspace=Colorspace.ITU601,
        interpolation=_SCALING,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.JPEG,
        threads=1,
    )
