"""What it costs to decode a live stream in a process of its own.

The same transport stream, in chunks as a network delivers them, through the reader of this process and through the
sandboxed one. CPU is that of all processes that have a part in it. Latency is from a picture's last byte to its frame,
of streams that come one picture at a time with pauses: that is when the processes have to wake each other up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import psutil

from gpu_byoc.media.decode import Frame, Reader, StreamReader
from gpu_byoc.media.demux import Limits
from gpu_byoc.media.sandbox import SandboxedReader

from .bench_media import CHUNK, SIZES, material
from .harness import Sheet, agreed, percentile, spread

PAUSE: Final = 0.005
HERE: Final = "this process"
THERE: Final = "a process of its own"
READERS: Final[dict[str, Callable[[], Reader]]] = {
    HERE: lambda: StreamReader(Limits()),
    THERE: lambda: SandboxedReader(Limits()),
}


def run(sheet: Sheet) -> None:
    sizes = sheet.size.pick(SIZES[:1], SIZES[:1], SIZES)
    sheet.expect(len(sizes) * len(READERS) + 1)
    sheet.settings(chunk=CHUNK, pause=PAUSE)
    for width, height in sizes:
        m = material(width, height, sheet.size.pick(5, 50, 125))
        _one_size(sheet, f"{width}x{height}", m.stream, len(m.frames))
    _start(sheet)


def _one_size(sheet: Sheet, size: str, stream: bytes, count: int) -> None:
    cpu: dict[str, list[float]] = {name: [] for name in READERS}
    late: dict[str, list[float]] = {name: [] for name in READERS}
    for _ in range(sheet.size.pick(1, 3, 5)):
        for name, make in READERS.items():
            sheet.doing(f"{size}, {name}")
            cpu[name].append(_cpu(make, stream, count))
            late[name] += _late(make, stream, sheet.size.pick(3, 20, 60))
    for name in READERS:
        sheet.row(
            f"{size}, {name}",
            size=size,
            what=name,
            cpu_ms=percentile(cpu[name], 0.5),
            cpu_seconds_per_million_frames=percentile(cpu[name], 0.5) * 1e3,
            p50_ms=percentile(late[name], 0.5),
            p99_ms=percentile(late[name], 0.99),
            spread=spread(cpu[name]),
            unstable=True if agreed(cpu[name]) is None else None,
        )


def _cpu(make: Callable[[], Reader], stream: bytes, count: int) -> float:
    """Milliseconds of CPU a frame, of this process and its children, without their start."""
    reader = make()
    try:
        reader.open()
        for _ in reader.feed(b"\xff"):  # it is there and ready when this is answered
            pass
        began = _spent()
        frames = 0
        for at in range(0, len(stream), CHUNK):
            frames += sum(isinstance(event, Frame) for event in reader.feed(stream[at : at + CHUNK]))
        frames += sum(isinstance(event, Frame) for event in reader.finish())
        spent = _spent() - began
    finally:
        reader.close()
    if frames != count:
        raise AssertionError(f"{frames} frames came out of {count} pictures")
    return spent / count * 1e3


def _spent() -> float:
    times = [process.cpu_times() for process in psutil.Process().children()]
    return time.process_time() + sum(float(each.user + each.system) for each in times)


def _late(make: Callable[[], Reader], stream: bytes, most: int) -> list[float]:
    """Milliseconds from the chunk that completes a picture to its frame."""
    reader, late = make(), list[float]()
    try:
        reader.open()
        for at in range(0, len(stream), CHUNK // 8):
            began = time.perf_counter()
            for event in reader.feed(stream[at : at + CHUNK // 8]):
                if isinstance(event, Frame):
                    late.append((time.perf_counter() - began) * 1e3)
                    began = time.perf_counter()
            if len(late) > most:
                break
            time.sleep(PAUSE)
    finally:
        reader.close()
    return late[1:]  # the first one also waits for the process to start


def _start(sheet: Sheet) -> None:
    sheet.doing("start")
    took, memory = [], 0
    for _ in range(sheet.size.pick(1, 3, 10)):
        reader, began = SandboxedReader(Limits()), time.perf_counter()
        try:
            for _ in reader.feed(b"\xff"):
                pass
            took.append(time.perf_counter() - began)
            memory = psutil.Process().children()[-1].memory_info().rss
        finally:
            reader.close()
    sheet.row(f"{THERE}: start and memory", start_seconds=percentile(took, 0.5), rss_mb=memory / 1e6)
