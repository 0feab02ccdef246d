"""What the runtime adds to a frame, and how batches form: the engine in this process, without HTTP and without media.

First with a processor that does nothing, which leaves the runtime's own cost, then with green tint. Closed: each stream
has two frames under way, so the rate is the peak. Open: frames come when they are due, as live video does, at 25 and 30
frames a second in turn, with jitter; a frame has until the next one of its stream is due, else it counts as missed.

The device with nothing to wait for takes what is there, so batches grow only with the load; ``max_wait_ms`` shows what
waiting for company would cost and bring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from gpu_byoc.config import EngineConfig
from gpu_byoc.frames import FrameSpec
from gpu_byoc.processor import ArrayProcessor, Kernel
from gpu_byoc.processors.green_tint import GreenTint
from gpu_byoc.processors.passthrough import Passthrough

from .bench_kernels import expect
from .bus import pixels
from .engine_load import IN_FLIGHT, JITTER, loader, summed
from .harness import Sheet, Stable, percentile, settle
from .sides import Side, sides

SPEC: Final = FrameSpec(640, 480)
RATES: Final = (25.0, 30.0)
MEAN_RATE: Final = sum(RATES) / len(RATES)
STREAMS: Final = ((2,), (1, 16), (1, 4, 16, 64))
KNOBS: Final = (((1, 0.0),), ((8, 5.0),), ((1, 0.0), (32, 0.0), (8, 2.0), (8, 10.0)))
"""(max_batch, max_wait_ms) beside the default of 8 and 0."""
LOADS: Final = ((), (), (0.3, 0.6, 0.9))
"""Parts of the closed loop's peak at which frames arrive. Handing each over when it is due costs this thread more than
answering one with the next, so somewhere below 1 frames are handed over late, which a column says, and then refused."""
KNOB_STREAMS: Final = 16
SLOTS: Final = 128
BAND: Final = 0.2
"""For the open loop, where a window is some dozen to some thousand waits of a fraction of a millisecond each."""


class Nothing(Passthrough):
    """Returns its input; on numpy without looking at it. On a GPU the frames still travel there and back."""

    name: ClassVar[str] = "no-op"
    kernels: ClassVar[Mapping[str, Kernel]] = {"numpy": lambda src, dst, params: None}


PROCESSORS: Final[tuple[Callable[[], ArrayProcessor], ...]] = (Nothing, GreenTint)


@dataclass(frozen=True, slots=True)
class Case:
    """``load`` is the part of the peak at which frames arrive; None: as many streams as it says, at their own rate."""

    closed: bool
    streams: int
    max_batch: int = 8
    max_wait_ms: float = 0.0
    load: float | None = None

    @property
    def name(self) -> str:
        knobs = "" if (self.max_batch, self.max_wait_ms) == (8, 0.0) else self._knobs()
        many = f"{self.streams} stream{'s' * (self.streams > 1)}"
        if self.load is not None:
            return f"open, {self.load:.0%} of the closed peak"
        return f"{'closed' if self.closed else 'open'}, {many}{knobs}"

    def _knobs(self) -> str:
        return f", batch {self.max_batch}, wait {self.max_wait_ms:g} ms"

    @property
    def config(self) -> EngineConfig:
        slots = max(SLOTS, self.max_batch, self.streams * IN_FLIGHT if self.closed else 0)
        return EngineConfig(slots=slots, max_batch=self.max_batch, max_wait_ms=self.max_wait_ms)

    @property
    def rates(self) -> tuple[float, ...]:
        return tuple(RATES[stream % len(RATES)] for stream in range(self.streams))


def cases(sheet: Sheet) -> list[Case]:
    streams, knobs = sheet.size.pick(*STREAMS), sheet.size.pick(*KNOBS)
    found = []
    for closed in (True, False):
        found += [Case(closed, count) for count in streams]
        found += [Case(closed, KNOB_STREAMS, batch, wait) for batch, wait in knobs]
    return found


def run(sheet: Sheet) -> None:
    measure(sheet, sides())


def measure(sheet: Sheet, found: list[Side]) -> None:
    planned, loads = cases(sheet), sheet.size.pick(*LOADS)
    measurable = sum(not side.why_not for side in found)
    sheet.expect(len(found) - measurable + measurable * len(PROCESSORS) * (len(planned) + len(loads)))
    sheet.settings(
        frame=f"{SPEC}, {SPEC.nbytes} bytes, random; not copied in or out, which is a caller's work",
        closed=f"{IN_FLIGHT} frames of each stream under way",
        open=f"streams of {RATES[0]:g} and {RATES[1]:g} frames/s in turn, up to {JITTER:.0%} of an interval off beat",
        missed="refused for want of a slot, or out after the stream's next frame was due",
        engine=f"slots {SLOTS} or more; max_batch 8 and max_wait_ms 0, the defaults, unless the row says otherwise",
        batches="their three most frequent sizes; why they left: full; waited (the oldest frame for max_wait_ms); "
        "free (the device had room)",
        cpu="of this whole process: the engine, and the one thread that hands frames over and takes them back",
    )
    for side in found:
        if side.why_not:
            sheet.skip(f"{side.label}: batching", side.why_not)
            continue
        for make in PROCESSORS:
            peak = 0.0
            for case in planned:
                rate = _case(sheet, side, make(), case)
                peak = max(peak, rate) if case.closed else peak
            for load in loads:
                streams = max(1, round(load * peak / MEAN_RATE))
                _case(sheet, side, make(), Case(False, streams, load=load))


def _case(sheet: Sheet, side: Side, processor: ArrayProcessor, case: Case) -> float:
    """Measure and write the row; returns frames a second, 0 where the output is wrong."""
    name = f"{side.label}, {processor.name}, {case.name}"
    sheet.doing(name)
    with loader(side, processor, SPEC, case.config) as driver:
        frame = pixels(SPEC.nbytes)
        wanted = expect(processor, frame.reshape(1, *SPEC.shape)).tobytes()
        if driver.once(frame.tobytes()) != wanted:
            sheet.fail(name, "what came out differs from numpy's")
            return 0.0
        if case.closed:
            measured = settle(driver.closed(case.streams, sheet.size.pick(0.02, 0.06, 0.4)), sheet.size)
        else:
            seconds = sheet.size.pick(0.1, 0.25, 2.0 if case.streams == 1 else 1.0)  # of one stream few frames come
            window = driver.open(case.rates, seconds)
            measured = settle(window, sheet.size, band=BAND, most=sheet.size.pick(3, 3, 6))
    sheet.row(name, measured, **_values(side, processor, case, measured))
    return measured.rate


def _values(side: Side, processor: ArrayProcessor, case: Case, measured: Stable) -> dict[str, Any]:
    total = summed([window.tally for window in measured.windows])
    seconds = sum(window.wall for window in measured.windows)
    batches, frames = sum(total.batches.values()), len(total.queued)
    figures: dict[str, Any] = {
        "backend": side.label,
        "processor": processor.name,
        "loop": "closed" if case.closed else "open",
        "streams": case.streams,
        "max_batch": case.max_batch,
        "max_wait_ms": case.max_wait_ms,
        "frames_per_second": measured.rate,
        "queue_p50_us": percentile(total.queued, 0.5) / 1e3,
        "queue_p99_us": percentile(total.queued, 0.99) / 1e3,
        "frames_a_batch": frames / batches,
        "batch_sizes": _shares({str(size): count for size, count in total.batches.items()}),
        "batches_left": _shares(total.left),
        "compute_seconds_per_million_frames": total.compute / 1e9 / frames * 1e6,
    }
    if not case.closed:
        figures |= {
            "offered_per_second": total.offered / seconds,
            "missed": total.refused + total.overdue,
            "handed_over_late_p99_us": percentile(total.late, 0.99) / 1e3,
        }
    return figures


def _shares(counts: Mapping[str, int]) -> str:
    """The three most frequent, down to one in a hundred: ``1: 80%, 2: 15%, 8: 5%``."""
    total = sum(counts.values())
    most = sorted(counts.items(), key=lambda each: -each[1])[:3]
    return ", ".join(f"{name}: {count / total:.0%}" for name, count in most if count >= 0.01 * total)
