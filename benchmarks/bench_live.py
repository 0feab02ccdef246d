"""Live streams through a real trickle server and a real worker, against the floor of decoding and encoding.

The packaged clip, three rounds of it, at 704x384 and 1280x720: H.264 without B-frames, 25 fps, a keyframe every 2 s,
its AAC kept. Published in real time, then as fast as it comes out (lossless, three segments ahead), then N streams at
once. Publisher and viewer are one process, so latency by PTS has one clock; it begins right before a picture's bytes
are handed to the connection and ends with the last byte of the output's picture.

CPU is the worker process's alone, from the first picture out to the last. The floor is decode + yuv420p to rgb24 + back
+ encode over the same pictures at the same settings in one thread, measured right before and right after.
Rows of real time also have the same work picture by picture at the stream's rate, in the same thread and between the
same two measurements: what waiting between pictures costs by itself, since caches grow cold, and how much longer its
keyframes take. A row also says how many cores something else kept busy.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import av
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import VideoReformatter

from gpu_byoc.frames import FrameSpec
from gpu_byoc.local import streamclip, streamrig
from gpu_byoc.local.children import Children
from gpu_byoc.local.streamclient import Plan, quantile
from gpu_byoc.media.decode import Frame, StreamReader
from gpu_byoc.media.demux import Demuxer, Picture
from gpu_byoc.media.encode import CodedPicture
from gpu_byoc.media.mux import Segmenter

from .bench_media import CLIP, RATE, SIZES, WORKS, Material, chain
from .harness import Sheet
from .load import rss
from .machine import Others

ROUNDS: Final = 3  # of the clip in the file: 396 frames, so that a run of ten seconds is not one scene twice
GOP: Final = 2 * RATE
STREAMS: Final = (1, 2, 4, 8)
FLOOR_FRAMES: Final = 100
NOT_RUN: Final = (("streams on a GPU", "these rows are of numpy and libx264; capacity plays them on every backend"),)


def make_clip(target: Path, width: int, height: int, rounds: int = ROUNDS) -> None:
    """The packaged clip scaled, as a camera's encoder would send it: no B-frames, no keyframe at cuts."""
    with av.open(str(target), "w") as out, av.open(str(CLIP)) as first:
        video: Any = out.add_stream("libx264", RATE)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        video.options = {"preset": "veryfast", "tune": "zerolatency", "g": str(GOP), "sc_threshold": "0"}
        video.codec_context.thread_count = 1
        sound: Any = out.add_stream_from_template(first.streams.audio[0])
        count = first.streams.video[0].frames
        for turn in range(rounds):
            for packet in _sound(Fraction(count, RATE), turn):
                packet.stream = sound
                out.mux(packet)
            for number, frame in enumerate(_scaled(width, height)):
                frame.pts, frame.time_base = turn * count + number, Fraction(1, RATE)
                frame.pict_type = PictureType.NONE
                out.mux(video.encode(frame))
        out.mux(video.encode(None))


def _scaled(width: int, height: int) -> Iterator[VideoFrame]:
    scaler = VideoReformatter()
    with av.open(str(CLIP)) as source:
        for frame in source.decode(video=0):
            yield scaler.reformat(frame, width, height, "yuv420p", threads=1)


def _sound(length: Fraction, turn: int) -> Iterator[Any]:
    """The clip's AAC packets, ``turn`` times its length later."""
    with av.open(str(CLIP)) as source:
        for packet in source.demux(audio=0):
            if packet.pts is None or packet.dts is None or not 0 <= packet.pts * packet.time_base < length:
                continue
            shift = int(turn * length / packet.time_base)
            packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
            yield packet


class Floor:
    """``measure()`` answers CPU milliseconds a frame, the sum of its four parts."""

    def __init__(self, clip: streamclip.Clip, spec: FrameSpec) -> None:
        segmenter = Segmenter()
        coded = [unit for unit in clip.units if isinstance(unit, CodedPicture)][:FLOOR_FRAMES]
        stream = b"".join(piece.data for unit in coded for piece in segmenter.video(unit))
        demuxer = Demuxer()
        pictures = [each for each in [*demuxer.feed(stream), *demuxer.finish()] if isinstance(each, Picture)]
        reader = StreamReader()
        events = [*reader.feed(stream), *reader.finish()]
        frames = [each.picture for each in events if isinstance(each, Frame)]
        self._material = Material(spec, stream, pictures, frames, memoryview(bytearray(spec.nbytes)), coded)
        self._parts = [work for name, work in WORKS.items() if name.startswith("floor")]

    def paced(self) -> dict[str, float]:
        """The same work picture by picture, at the stream's rate: CPU milliseconds a frame, and the clock's. It is what
        one stream in real time costs, and how far its keyframes lie above its median, without any worker."""
        began = time.process_time()
        took = chain(self._material, RATE)
        spent = time.process_time() - began
        return {
            "floor_paced_ms": spent / len(took) * 1e3,
            "paced_p50_ms": quantile(took, 0.5) * 1e3,
            "paced_p99_ms": quantile(took, 0.99) * 1e3,
        }

    def measure(self) -> float:
        began = time.process_time()
        for work in self._parts:
            work(self._material)
        return (time.process_time() - began) / len(self._material.frames) * 1e3


@contextmanager
def _rig(streams: int, lossless: bool) -> Iterator[streamrig.Rig]:
    with tempfile.TemporaryDirectory() as logs, Children(Path(logs)) as children:
        rig = streamrig.start(children, backend="numpy", streams=streams, lossless=lossless)
        asyncio.run(streamrig.ready(rig))
        yield rig


def _play(plan: Plan, streams: int) -> tuple[streamrig.Play, int]:
    """The run, and the worker's resident bytes at its end."""
    with _rig(streams, not plan.real_time) as rig:
        play = streamrig.Play(rig, plan, streams)
        asyncio.run(play.run())
        if errors := [client.error for client in play.clients if client.error]:
            raise RuntimeError("; ".join(errors))
        assert rig.worker_child is not None
        return play, rss(rig.worker_child.process.pid)


def _row(what: str, size: str, floor: Floor, plan: Plan, streams: int) -> dict[str, Any]:
    before = floor.measure()
    others = Others()
    play, resident = _play(plan, streams)
    busy = others.cores()
    base = (before + floor.measure()) / 2
    assert play.cpu_seconds is not None
    assert play.cpu_per_frame is not None
    p50, p95, p99 = (quantile(play.latencies, part) * 1e3 for part in (0.5, 0.95, 0.99))
    return {
        "size": size,
        "what": what,
        "streams": streams,
        "frames_in": sum(len(each.published) for each in play.figures),
        "frames_out": play.frames_out,
        "dropped": sum(each.dropped_frames for each in play.figures),
        "lost": sum(each.lost for each in play.figures),
        "frames_per_second": play.rate,
        "floor_ms": base,
        "cpu_ms": play.cpu_per_frame * 1e3,
        "cpu_seconds_per_million_frames": play.cpu_per_frame * 1e6,
        "compute_seconds_per_million_frames": sum(each.compute_seconds for each in play.figures)
        / play.frames_out
        * 1e6,
        "times_floor": play.cpu_per_frame * 1e3 / base,
        "cores": play.cpu_seconds / play.seconds,
        "others_cores": busy,
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "rss_mb": resident / 1e6,
    }


def _between(before: dict[str, float], after: dict[str, float], cpu_ms: float) -> dict[str, float]:
    """The paced floor of a row that was measured between these two."""
    paced = {name: (before[name] + after[name]) / 2 for name in before}
    return paced | {"times_floor_paced": cpu_ms / paced["floor_paced_ms"]}


def run(sheet: Sheet) -> None:
    """A row for each run; after them one for each thing that was not run, with the reason."""
    streams, sizes = sheet.size.pick((1,), (1,), STREAMS), sheet.size.pick(SIZES[:1], SIZES[:1], SIZES)
    seconds = sheet.size.pick(1.0, 3.0, 10.0)
    sheet.expect(len(streams) + 2 * len(sizes) - 1 + len(NOT_RUN))
    with tempfile.TemporaryDirectory() as directory:
        for width, height in sizes:
            size = f"{width}x{height}"
            path = Path(directory) / f"{size}.mp4"
            make_clip(path, width, height, sheet.size.pick(1, 1, ROUNDS))
            clip = streamclip.load(path)
            floor = Floor(clip, FrameSpec(width, height))
            floor.measure()  # once for the caches
            paced = floor.paced()
            for count in streams if (width, height) == SIZES[0] else (1,):
                name = f"{size}, real time, {count} stream" + "s" * (count > 1)
                sheet.doing(name)
                row = _row("real time", size, floor, Plan(clip, True, seconds), count)
                before, paced = paced, floor.paced()
                sheet.row(name, **(row | _between(before, paced, row["cpu_ms"])))
            sheet.doing(f"{size}, flood")
            sheet.row(f"{size}, flood", **_row("flood", size, floor, Plan(clip, False, 2 * seconds), 1))
    for what, reason in NOT_RUN:
        sheet.skip(what, reason)
