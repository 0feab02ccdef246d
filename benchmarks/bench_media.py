"""CPU of one live frame: what PyAV alone needs (the floor), and our blocks from TS bytes to TS bytes.

Floor: decode, yuv420p -> rgb24, rgb24 -> yuv420p, encode, each over the same frames with our settings and one thread,
converters used again, nothing copied and nothing muxed. The blocks do all of that, and read the transport stream, put
every frame into a slot, take it from there, and write segments. Then what was weighed: threads, copies, FFmpeg's muxer.

CPU is ``time.process_time``, so threads that a library starts count; rounds alternate, medians over rounds.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

import gpu_byoc.local
from gpu_byoc.frames import FrameSpec
from gpu_byoc.media.decode import Frame, StreamReader, VideoDecoder
from gpu_byoc.media.demux import Demuxer, Picture
from gpu_byoc.media.encode import CodedPicture, Encoder
from gpu_byoc.media.mux import Segmenter
from gpu_byoc.media.planes import FromSlot, ToSlot

from .harness import Sheet, agreed, percentile, spread

CLIP: Final = Path(gpu_byoc.local.__file__).parent / "clip" / "bigbuckbunny.mp4"
SIZES: Final = ((704, 384), (1280, 720))
RATE: Final = 25
TICKS: Final = 90_000 // RATE
ROUNDS: Final = 5
CHUNK: Final = 16_384
EXACT: Final = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


@dataclass(frozen=True, slots=True)
class Material:
    """The clip at one size: as a live stream (2 s GOP, no B-frames), its pictures, decoded frames, and one slot."""

    spec: FrameSpec
    stream: bytes
    pictures: list[Picture]
    frames: list[VideoFrame]
    slot: memoryview
    coded: list[CodedPicture]


def material(width: int, height: int, count: int) -> Material:
    spec = FrameSpec(width, height)
    encoder, segmenter = Encoder(spec, rate=Fraction(RATE)), Segmenter()
    parts, coded, scaler = [], [], VideoReformatter()
    with av.open(str(CLIP)) as clip:
        for number, frame in enumerate(clip.decode(video=0)):
            if number == count:
                break
            scaled = scaler.reformat(frame, width, height, "yuv420p", threads=1)
            for picture in encoder.encode_frame(scaled, number * TICKS, segmenter.wants_key(number * TICKS)):
                coded.append(picture)
                parts += [piece.data for piece in segmenter.video(picture)]
    stream = b"".join(parts)
    demuxer = Demuxer()
    pictures = [each for each in demuxer.feed(stream) + demuxer.finish() if isinstance(each, Picture)]
    frames = [each.picture for each in StreamReader().feed(stream) if isinstance(each, Frame)]
    if not len(frames) == len(pictures) == len(coded):
        raise AssertionError(f"{len(coded)} pictures written, {len(pictures)} found, {len(frames)} decoded")
    return Material(spec, stream, pictures, frames, memoryview(bytearray(spec.nbytes)), coded)


def decode_floor(m: Material) -> None:
    context = VideoCodecContext.create("h264", "r")
    context.thread_count = 1
    for picture in m.pictures:
        packet: av.Packet[Any] = av.Packet(picture.data)  # type: ignore[arg-type]
        context.decode(packet)
    context.decode(None)


def to_rgb_floor(m: Material) -> None:
    converter = VideoReformatter()
    for frame in m.frames:
        converter.reformat(frame, format="rgb24", threads=1)


def to_yuv_floor(m: Material, interpolation: Interpolation = Interpolation.POINT) -> None:
    converter = VideoReformatter()
    pixels = np.frombuffer(m.slot, np.uint8).reshape(m.spec.shape)
    for _ in m.frames:
        frame = VideoFrame.from_numpy_buffer(pixels, "rgb24")
        converter.reformat(frame, format="yuv420p", interpolation=interpolation, threads=1)


def _encoder(m: Material) -> Any:
    context: Any = av.CodecContext.create("libx264", "w")
    context.width, context.height, context.pix_fmt = m.spec.width, m.spec.height, "yuv420p"
    context.time_base, context.framerate, context.thread_count = Fraction(1, RATE), Fraction(RATE), 1
    context.gop_size, context.options = 2 * RATE, {"preset": "superfast", "tune": "zerolatency"}
    return context


def encode_floor(m: Material) -> None:
    context = _encoder(m)
    for number, frame in enumerate(m.frames):
        frame.pts, frame.time_base = number, Fraction(1, RATE)
        context.encode(frame)
    context.encode(None)


def chain(m: Material, rate: int | None = None) -> list[float]:
    """The floor's four parts picture by picture in one thread, as a stream needs them; ``rate`` pictures a second, or
    one after the other. Answers the seconds that each picture took by the clock."""
    decoder, encoder = VideoCodecContext.create("h264", "r"), _encoder(m)
    decoder.thread_count = 1
    to_rgb, to_yuv = VideoReformatter(), VideoReformatter()
    began, took = time.monotonic(), []
    for number, picture in enumerate(m.pictures):
        if rate is not None:
            time.sleep(max(0.0, began + number / rate - time.monotonic()))
        start = time.monotonic()
        packet: av.Packet[Any] = av.Packet(picture.data)  # type: ignore[arg-type]
        for frame in decoder.decode(packet):
            packed = to_rgb.reformat(frame, format="rgb24", threads=1)
            planes = to_yuv.reformat(packed, format="yuv420p", interpolation=Interpolation.POINT, threads=1)
            planes.pts, planes.time_base = number, Fraction(1, RATE)
            encoder.encode(planes)
        took.append(time.monotonic() - start)
    return took


def blocks(m: Material) -> None:
    """TS bytes in, TS bytes out, in chunks as a network delivers them."""
    reader, into, encoder, segmenter = StreamReader(), ToSlot(m.spec), Encoder(m.spec), Segmenter()
    for at in range(0, len(m.stream), CHUNK):
        for event in reader.feed(m.stream[at : at + CHUNK]):
            if isinstance(event, Frame):
                into.write(event.picture, m.slot)
                for picture in encoder.encode(m.slot, event.pts, segmenter.wants_key(event.pts)):
                    segmenter.video(picture)


def our_demux(m: Material) -> None:
    demuxer = Demuxer()
    for at in range(0, len(m.stream), CHUNK):
        demuxer.feed(m.stream[at : at + CHUNK])


def our_decode(m: Material) -> None:
    decoder = VideoDecoder("h264")
    for picture in m.pictures:
        decoder.decode(picture)


def our_to_slot(m: Material) -> None:
    into = ToSlot(m.spec)
    for frame in m.frames:
        into.write(frame, m.slot)


def our_from_slot(m: Material) -> None:
    source = FromSlot(m.spec)
    for _ in m.frames:
        source.frame(m.slot)


def our_encode(m: Material) -> None:
    encoder = Encoder(m.spec)
    for number, frame in enumerate(m.frames):
        encoder.encode_frame(frame, number * TICKS, number % (2 * RATE) == 0)


def our_mux(m: Material) -> None:
    segmenter = Segmenter()
    for picture in m.coded:
        segmenter.video(picture)


def ndarray_copy(m: Material) -> None:
    target = np.frombuffer(m.slot, np.uint8).reshape(m.spec.shape)
    for frame in m.frames:
        np.copyto(target, frame.to_ndarray(format="rgb24"))


def exact_rgb(m: Material) -> None:
    converter = VideoReformatter()
    for frame in m.frames:
        converter.reformat(frame, format="rgb24", interpolation=EXACT, threads=1)


def ffmpeg_mux(m: Material) -> None:
    with av.open(io.BytesIO(), "w", format="mpegts", options={"flush_packets": "1"}) as out:
        stream: Any = out.add_stream("libx264", RATE)
        stream.width, stream.height, stream.pix_fmt = m.spec.width, m.spec.height, "yuv420p"
        for picture in m.coded:
            packet: av.Packet[Any] = av.Packet(picture.data)
            packet.pts, packet.dts, packet.time_base = picture.pts, picture.dts, Fraction(1, 90_000)
            packet.is_keyframe, packet.stream = picture.key, stream
            out.mux(packet)


WORKS: Final[dict[str, Callable[[Material], object]]] = {
    "floor: decode": decode_floor,
    "floor: to rgb24": to_rgb_floor,
    "floor: to yuv420p": to_yuv_floor,
    "floor: encode": encode_floor,
    "blocks: all, TS to TS": blocks,
    "blocks: demux": our_demux,
    "blocks: decode": our_decode,
    "blocks: into a slot": our_to_slot,
    "blocks: from a slot": our_from_slot,
    "blocks: encode": our_encode,
    "blocks: mux": our_mux,
    "weighed: the floor, picture by picture": chain,
    "weighed: to_ndarray, then a copy": ndarray_copy,
    "weighed: exact rgb24": exact_rgb,
    "weighed: bilinear yuv420p": lambda m: to_yuv_floor(m, Interpolation.BILINEAR),
    "weighed: FFmpeg's muxer": ffmpeg_mux,
}


def held_back(m: Material, threads: str, count: int) -> int:
    """How many pictures a decoder keeps inside before the first frame comes out."""
    context: Any = VideoCodecContext.create("h264", "r")
    context.thread_type, context.thread_count = threads, count
    for number, picture in enumerate(m.pictures):
        packet: av.Packet[Any] = av.Packet(picture.data)  # type: ignore[arg-type]
        if context.decode(packet):
            return number
    return len(m.pictures)


def run(sheet: Sheet) -> None:
    """Milliseconds of CPU a frame, and for our blocks their ratio to the floor's sum in the same round."""
    sizes = sheet.size.pick(SIZES[:1], SIZES[:1], SIZES)
    sheet.expect(len(sizes) * (len(WORKS) + 3))
    sheet.settings(threads="one", encoder="libx264 superfast zerolatency, 2 s GOP", clip=CLIP.name)
    for width, height in sizes:
        _one_size(sheet, width, height)


def _one_size(sheet: Sheet, width: int, height: int) -> None:
    size = f"{width}x{height}"
    m = material(width, height, sheet.size.pick(5, 30, 125))
    our_to_slot(m)
    times: dict[str, list[float]] = {name: [] for name in WORKS}
    for _ in range(sheet.size.pick(1, 3, ROUNDS)):
        for name, work in WORKS.items():
            sheet.doing(f"{size}, {name}")
            began = time.process_time()
            work(m)
            times[name].append((time.process_time() - began) / len(m.frames) * 1e3)
    floor = [sum(each) for each in zip(*(times[n] for n in WORKS if n.startswith("floor")), strict=True)]
    for name, each in {"floor: sum": floor, **times}.items():
        sheet.row(
            f"{size}, {name}",
            size=size,
            what=name,
            cpu_ms=percentile(each, 0.5),
            cpu_seconds_per_million_frames=percentile(each, 0.5) * 1e3,
            times_floor=percentile([a / b for a, b in zip(each, floor, strict=True)], 0.5),
            spread=spread(each),
            unstable=True if agreed(each) is None else None,
        )
    for threads in ("SLICE", "FRAME"):
        what = f"2 {threads} threads: held"
        sheet.row(f"{size}, {what}", size=size, what=what, pictures=held_back(m, threads, 2))
