"""Copies of frames: in the host's memory, to and from a GPU, on it. The ceilings of everything else.

Each byte that is copied counts once; ``both ways`` says the bytes in each direction. A memcpy is one thread's. What a
GPU does is timed by its own events; pinning for each frame is timed by the clock, because the host does it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpu_byoc.frames import FrameSpec

from .bus import BUSES, Bus, pixels
from .harness import Sheet, Stable, Window, calls, settle
from .sides import Side, batches, columns, guarded, named, sides, specs, too_much

KINDS = (
    *("pageable up", "pageable down", "pageable both ways"),
    *("pinned up", "pinned down", "pinned both ways"),
    *("on the device", "pinned for each frame, up"),
)


def run(sheet: Sheet) -> None:
    measure(sheet, [side for side in sides() if side.label in BUSES])


def measure(sheet: Sheet, gpus: Sequence[Side]) -> None:
    """memcpy here and every kind of copy on each of ``gpus``, sizes x batches."""
    cases = [(spec, batch) for spec in specs(sheet.size) for batch in batches(sheet.size)]
    sheet.expect(len(cases) * (1 + len(KINDS) * sum(not side.why_not for side in gpus)))
    sheet.settings(counted="each byte once; both ways: in each direction")
    _memcpy(sheet, cases)
    for side in gpus:
        if side.why_not or side.bus is None:
            sheet.skip(f"{side.label}: copies", side.why_not or "no plain copies are written for it")
        else:
            with guarded(sheet, f"{side.label}: copies, from here on"):
                _gpu(sheet, side.label, side.bus(), cases)


def _memcpy(sheet: Sheet, cases: Sequence[tuple[FrameSpec, int]]) -> None:
    for spec, batch in cases:
        name, nbytes = f"memcpy, {named(spec, batch)}", spec.nbytes * batch
        if reason := too_much(2 * nbytes):
            sheet.skip(name, reason)
            continue
        source, target = pixels(nbytes), np.empty(nbytes, np.uint8)
        window = calls(lambda: np.copyto(target, source), sheet.size.window)  # noqa: B023 - done in this round
        _row(sheet, name, settle(window, sheet.size), "memcpy", "host", spec, batch)
        if not np.array_equal(source, target):
            raise AssertionError("np.copyto does not copy")


def _gpu(sheet: Sheet, label: str, bus: Bus, cases: Sequence[tuple[FrameSpec, int]]) -> None:
    largest = max(spec.nbytes * batch for spec, batch in cases)
    if reason := too_much(4 * largest):
        sheet.skip(f"{label}: copies", reason)
        return
    road = Road(bus, largest)
    for spec, batch in cases:
        for kind in KINDS:
            name = f"{label}: {kind}, {named(spec, batch)}"
            sheet.doing(name)
            road.erase(spec.nbytes * batch)
            measured = settle(road.window(kind, spec.nbytes, batch, sheet.size.window / 3), sheet.size)
            if wrong := road.wrong(kind, spec.nbytes * batch):
                sheet.fail(name, wrong)
            else:
                _row(sheet, name, measured, kind, label, spec, batch)


def _row(sheet: Sheet, name: str, measured: Stable, kind: str, place: str, spec: FrameSpec, batch: int) -> None:
    seconds = measured.p50
    sheet.row(
        name,
        measured,
        frames=batch,
        what=kind,
        place=place,
        **columns(spec, batch),
        gb_per_s=spec.nbytes * batch / seconds / 1e9,
        frames_per_second=batch / seconds,
        p99_us=None,  # a span is many copies: the slowest one cannot be told
    )


class Road:
    """Memory on both sides of a bus, made once: pinned and pageable, a source and a target of each."""

    def __init__(self, bus: Bus, nbytes: int) -> None:
        self.bus = bus
        self.pinned = (bus.host(nbytes, pinned=True), bus.host(nbytes, pinned=True))
        self.pageable = (bus.host(nbytes, pinned=False), bus.host(nbytes, pinned=False))
        self.device = (bus.empty(nbytes), bus.empty(nbytes))
        self.up, self.down = bus.stream(), bus.stream()
        self._noise = pixels(nbytes)
        for source, _ in (self.pinned, self.pageable):
            bus.numpy(source)[:] = self._noise
        bus.copy(self.device[1], self.pinned[0], self.up)()
        self.up.synchronize()

    def jobs(self, kind: str, nbytes: int) -> list[tuple[Any, Callable[[], object]]]:
        """(stream, what enqueues the copy) of each direction of ``kind``."""
        source, target = self.pageable if kind.startswith("pageable") else self.pinned
        there, here = self.device
        copy, jobs = self.bus.copy, []
        if kind == "on the device":
            return [(self.up, copy(there[:nbytes], here[:nbytes], self.up))]
        if kind.endswith(("up", "both ways")):
            jobs.append((self.up, copy(there[:nbytes], source[:nbytes], self.up)))
        if kind.endswith(("down", "both ways")):
            jobs.append((self.down, copy(target[:nbytes], here[:nbytes], self.down)))
        return jobs

    def window(self, kind: str, frame: int, batch: int, seconds: float) -> Callable[[], Window]:
        """Windows of one copy of ``batch`` frames of ``frame`` bytes."""
        if kind.startswith("pinned for each frame"):
            return calls(lambda: self._pin_each(frame, batch), seconds)
        return self.bus.windows(self.jobs(kind, frame * batch), seconds)

    def _pin_each(self, frame: int, batch: int) -> None:
        """What is done where frames come in memory that is not pinned, and somebody has read that copies want it."""
        for at in range(0, frame * batch, frame):
            source = self.pageable[0][at : at + frame]
            with self.bus.registered(source):
                self.bus.copy(self.device[0][at : at + frame], source, self.up)()
                self.up.synchronize()

    def erase(self, nbytes: int) -> None:
        """Zeros wherever a copy arrives."""
        for _, target in (self.pinned, self.pageable):
            self.bus.numpy(target)[:nbytes] = 0
        self.bus.copy(self.device[0][:nbytes], self.pinned[1][:nbytes], self.up)()
        self.up.synchronize()

    def wrong(self, kind: str, nbytes: int) -> str:
        """Which way the noise did not arrive since ``erase``; empty if it did."""
        target = (self.pageable if kind.startswith("pageable") else self.pinned)[1]
        if kind.endswith(("down", "both ways")) and not self._is_noise(target, nbytes):
            return "other bytes came down than were there"
        if kind.endswith("down"):
            return ""
        self.bus.copy(target[:nbytes], self.device[0][:nbytes], self.up)()
        self.up.synchronize()
        return "" if self._is_noise(target, nbytes) else "other bytes arrived on the device than were sent"

    def _is_noise(self, host: Any, nbytes: int) -> bool:
        return np.array_equal(self.bus.numpy(host)[:nbytes], self._noise[:nbytes])
