"""Every backend x processor x frame size x batch: what a kernel costs, device and host apart.

A batch goes through the backend's own contract: ``device_us`` is what the backend says that its device spent in the
processor, by events where it has them, ``copy_us`` the copies there and back, ``host_us`` how long ``submit`` kept its
caller; the whole, until the slots hold the output, is ``p50_us``. A frame is read and written once, as a copy does it,
and bytes are counted once: 1.0 of the ceiling is a copy of the frames in the memory they lie in, measured in turn with
them. The ceiling of a CPU is one thread's memcpy, so several threads can pass it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import array_api_compat.numpy as numpy_xp
import numpy as np

from gpu_byoc.backend import Arena, Backend, Batch
from gpu_byoc.frames import FrameSpec
from gpu_byoc.processor import ArrayProcessor
from gpu_byoc.processors.grayscale import Grayscale
from gpu_byoc.processors.green_tint import GreenTint
from gpu_byoc.processors.passthrough import Passthrough

from .bus import Bytes, pixels
from .harness import Sheet, Stable, Window, calls, marks, percentile, settle, together
from .sides import (
    SPECS,
    Side,
    batches,
    columns,
    guarded,
    named,
    sides,
    specs,
    target,
    too_long_on_a_cpu,
    too_much,
)

PROCESSORS = (GreenTint, Grayscale, Passthrough)
TARGET_CASE = (SPECS[-1], 64)
CHECKED = 4
"""Frames of a batch whose output is compared with numpy's: the first and the last ones."""

SLOW = 0.05
SLOW_WINDOWS = (3, 3, 5)
"""A batch that takes so many seconds gets so many windows at the most, or a noisy machine would measure for minutes."""


def page_loop(frame: bytes) -> bytes:
    """What the page's processor does to a frame."""
    data = bytearray(frame)
    for i in range(1, len(data), 3):
        data[i] = min(255, data[i] + 80)
    return bytes(data)


def run(sheet: Sheet) -> None:
    measure(sheet, sides())


def measure(sheet: Sheet, found: Sequence[Side]) -> None:
    cases = [(spec, batch) for spec in specs(sheet.size) for batch in batches(sheet.size)]
    sheet.expect(1 + len(PROCESSORS) * len(cases) * sum(not side.why_not for side in found))
    sheet.settings(ceiling="CPU: memcpy of the same frames by one thread; GPU: a copy of them on the device")
    _page(sheet)
    for side in found:
        if side.why_not:
            sheet.skip(f"{side.label}: kernels", side.why_not)
            continue
        for processor in PROCESSORS:
            with guarded(sheet, f"{side.label}, {processor.name}, from here on"):
                _processor(sheet, side, processor(), cases, _on_device(side) if side.bus else _in_memory)
    _targets(sheet, found)


def _page(sheet: Sheet) -> None:
    """The zero line: the quickstart page's loop, on one frame of its size."""
    spec = specs(sheet.size)[0]
    frame = pixels(spec.nbytes)
    data = frame.tobytes()
    expected = expect(GreenTint(), frame.reshape(1, *spec.shape)).tobytes()
    if page_loop(data) != expected:
        raise AssertionError("the page's loop does not equal green_tint")
    most = sheet.size.pick(*SLOW_WINDOWS)
    measured = settle(calls(lambda: page_loop(data), sheet.size.window), sheet.size, most=most)
    sheet.row(
        f"the page's Python loop, {named(spec)}",
        measured,
        backend="the page's loop",
        processor=GreenTint.name,
        **columns(spec, 1),
        frames_per_second=1 / measured.p50,
        gb_per_s=spec.nbytes / measured.p50 / 1e9,
    )


def expect(processor: ArrayProcessor, frames: Any) -> Bytes:
    """What numpy makes of (N, H, W, C) frames."""
    result: Bytes = np.ascontiguousarray(processor.process_batch(frames, processor.Params(), numpy_xp))
    return result


Ceiling: TypeAlias = Callable[[int, float], Callable[[], Window]]
"""Windows of about so many seconds of the plainest copy of so many bytes."""


def memcpy(nbytes: int) -> Callable[[], object]:
    """A copy of so many random bytes in the host's memory."""
    source, target = pixels(nbytes), np.zeros(nbytes, np.uint8)
    return lambda: np.copyto(target, source)


def _in_memory(nbytes: int, seconds: float) -> Callable[[], Window]:
    return calls(memcpy(nbytes), seconds)


def _on_device(side: Side) -> Ceiling:
    assert side.bus is not None
    bus = side.bus()
    stream = bus.stream()

    def windows(nbytes: int, seconds: float) -> Callable[[], Window]:
        # Not filled: on the device, what is copied makes no difference to how long it takes.
        return bus.windows([(stream, bus.copy(bus.empty(nbytes), bus.empty(nbytes), stream))], seconds)

    return windows


def _processor(
    sheet: Sheet, side: Side, processor: ArrayProcessor, cases: Iterable[tuple[FrameSpec, int]], ceiling: Ceiling
) -> None:
    backend = side.make()
    try:
        backend.open(side.device, processor)
        for spec, batch in cases:
            name = f"{side.label}, {processor.name}, {named(spec, batch)}"
            sheet.doing(name)
            on_cpu = None if side.bus else too_long_on_a_cpu(spec.nbytes * batch)
            if reason := on_cpu or too_much(2 * spec.nbytes * batch):
                sheet.skip(name, reason)
            else:
                _case(sheet, name, Case(backend, processor, spec, batch), side, ceiling)
    finally:
        backend.close()


def _case(sheet: Sheet, name: str, case: Case, side: Side, ceiling: Ceiling) -> None:
    try:
        if wrong := case.wrong():
            sheet.fail(name, wrong)
            return
        seconds = sheet.size.window / 3
        works = {"whole": case.window(seconds)}
        if not isinstance(case.processor, Passthrough):  # which takes no time, on a device
            works["device"] = case.alone
            works["ceiling"] = ceiling(case.nbytes, seconds)
        measured = together(works, sheet.size, most=sheet.size.pick(*SLOW_WINDOWS) if case.slow else None)
        sheet.row(name, measured["whole"], frames=case.batch, **_values(side, case, measured))
    finally:
        case.close()


def _values(side: Side, case: Case, measured: dict[str, Stable]) -> dict[str, Any]:
    """Device, host and copies of the windows that count; the ceiling's ratio round by round."""
    taken = [each for window in measured["whole"].windows for each in window.tally]
    device, host, copies = (percentile(each, 0.5) / 1e9 for each in zip(*taken, strict=True))
    figures: dict[str, Any] = {"backend": side.label, "processor": case.processor.name}
    figures |= columns(case.spec, case.batch)
    figures |= {"device_us": device * 1e6, "host_us": host * 1e6, "copy_us": copies * 1e6}
    if alone := measured.get("device"):
        device = alone.p50
        figures["device_us"] = device * 1e6
        figures["frames_per_second"] = case.batch / device
        figures["gb_per_s"] = case.nbytes / device / 1e9
        figures["of_ceiling"] = 1 / alone.ratio(measured["ceiling"])
        figures["compute_seconds_per_million_frames"] = device / case.batch * 1e6
        figures |= marks(measured["whole"], alone)
    return figures


class Case:
    """A batch that is submitted again and again. A window's tally: device, host and copy nanoseconds of each time."""

    def __init__(self, backend: Backend, processor: ArrayProcessor, spec: FrameSpec, batch: int) -> None:
        self.processor, self.spec, self.batch, self.nbytes = processor, spec, batch, spec.nbytes * batch
        self.slow = False
        self._last: Window
        self._backend = backend
        self._arena: Arena = backend.arena(spec.nbytes, batch)
        self._slots = Batch(spec, self._arena, tuple(range(batch)), processor.Params())

    def close(self) -> None:
        self._arena.close()

    def _once(self) -> tuple[float, tuple[int, int, int]]:
        """Seconds of one batch, and (device, host, copy) nanoseconds of it."""
        began = time.perf_counter_ns()
        flight = self._backend.submit(self._slots)
        enqueued = time.perf_counter_ns()
        times = flight.wait()
        ended = time.perf_counter_ns()
        return (ended - began) / 1e9, (times.compute_ns, enqueued - began, times.copy_ns)

    def wrong(self) -> str:
        """Random frames in, and what of the output differs from numpy's; empty if nothing does."""
        frames = pixels(self.nbytes)
        self._arena.view(0, self.batch)[:] = frames.data
        self.slow = self._once()[0] > SLOW
        shaped = frames.reshape(self.batch, *self.spec.shape)
        chosen = sorted({*range(self.batch)[: CHECKED // 2], *range(self.batch)[-CHECKED // 2 :]})
        expected = expect(self.processor, shaped[chosen])
        held = np.frombuffer(self._arena.view(0, self.batch), np.uint8).reshape(shaped.shape)[chosen]
        differ = int(np.count_nonzero(held != expected))
        return f"{differ} of {expected.size} bytes differ from numpy's" if differ else ""

    def window(self, seconds: float) -> Callable[[], Window]:
        """Windows of single batches, one at least: some of them take a second."""

        def window() -> Window:
            used, began, taken = time.process_time(), time.perf_counter(), list[tuple[float, tuple[int, int, int]]]()
            while not taken or time.perf_counter() - began < seconds:
                taken.append(self._once())
            wall, cpu = time.perf_counter() - began, time.process_time() - used
            wholes, parts = zip(*taken, strict=True)
            self._last = Window(wholes, wall, cpu, tally=parts)
            return self._last

        return window

    def alone(self) -> Window:
        """The last window again, of what its batches took on the device."""
        return Window(tuple(device / 1e9 for device, _, _ in self._last.tally), self._last.wall, self._last.cpu)


def _targets(sheet: Sheet, found: Sequence[Side]) -> None:
    """A kernel by itself on a GPU, where launching it no longer counts."""
    rows = {row["name"]: row for row in sheet.rows}
    spec, batch = TARGET_CASE
    for side in found:
        if side.bus:
            row = rows.get(f"{side.label}, {GreenTint.name}, {named(spec, batch)}", {})
            name = f"{side.label}, green_tint alone, {named(spec, batch)}, of a copy on the device"
            target(sheet, name, row.get("of_ceiling"), side.why_not, at_least=0.7)
