"""The crossover: from which frame size on a GPU is faster than the best CPU backend, by batch, from slots to slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from gpu_byoc.frames import FrameSpec
from gpu_byoc.processors.green_tint import GreenTint

from .bench_kernels import Case
from .bus import Plain
from .harness import Sheet, Size, calls, settle
from .sides import Side, batches, columns, guarded, named, specs, too_long_on_a_cpu

SMALL: Final = (FrameSpec(32, 24), FrameSpec(64, 48), FrameSpec(160, 120), FrameSpec(320, 240))
"""Frames below those of ``SPECS``, for the crossover."""


@dataclass(frozen=True, slots=True)
class Point:
    """Seconds of one batch of ``nbytes`` bytes: on the best CPU backend, through a GPU and back, and on the device."""

    spec: FrameSpec
    batch: int
    cpu: float
    gpu: float
    resident: float


def crossover(points: Sequence[Point], *, resident: bool) -> str:
    """From which frame size on the GPU wins, of points of one batch size: ``640x480``, ``always`` or ``never``.

    It wins from a size on when it wins there and at every larger one.
    """
    ordered = sorted(points, key=lambda point: point.spec.nbytes)
    wins = [(point.resident if resident else point.gpu) < point.cpu for point in ordered]
    first = next((at for at in range(len(wins)) if all(wins[at:])), None)
    if first is None:
        return "never"
    return "always" if first == 0 else f"{ordered[first].spec.width}x{ordered[first].spec.height}"


def measure(sheet: Sheet, cpus: Sequence[Side], gpus: Sequence[Side]) -> None:
    if not gpus:
        sheet.skip("crossover: from which frame size and batch on a GPU wins", "no backend opens on a GPU here")
        return
    small = SMALL if sheet.size is not Size.TINY else ()
    cases = [(spec, batch) for batch in batches(sheet.size) for spec in (*small, *specs(sheet.size))]
    cpu: dict[tuple[FrameSpec, int], float] = {}
    for side in cpus:
        with guarded(sheet, f"crossover, {side.label}"):
            for case, seconds in _direct(sheet, side, cases):
                cpu[case] = min(seconds, cpu.get(case, seconds))
    for side in gpus:
        with guarded(sheet, f"crossover, {side.label}, from here on"):
            points = [
                Point(*case, cpu[case], seconds, _resident(sheet.size, side, *case))
                for case, seconds in _direct(sheet, side, [case for case in cases if case in cpu])
            ]
            _table(sheet, side, points)


def _direct(
    sheet: Sheet, side: Side, cases: Sequence[tuple[FrameSpec, int]]
) -> Iterator[tuple[tuple[FrameSpec, int], float]]:
    """Seconds of a batch from slots to slots, without the engine's threads on either side; not of what is too long."""
    backend = side.make()
    try:
        backend.open(side.device, GreenTint())
        for spec, batch in cases:
            if too_long_on_a_cpu(spec.nbytes * batch):
                continue
            sheet.doing(f"crossover, {side.label}, {named(spec, batch)}")
            case = Case(backend, GreenTint(), spec, batch)
            try:
                if wrong := case.wrong():
                    raise AssertionError(f"{named(spec, batch)}: {wrong}")
                yield (spec, batch), settle(case.window(sheet.size.window / 3), sheet.size).p50
            finally:
                case.close()
    finally:
        backend.close()


def _resident(size: Size, side: Side, spec: FrameSpec, batch: int) -> float:
    assert side.bus is not None
    return settle(calls(Plain(side.bus(), spec, batch).resident(), size.window / 3), size).p50


def _table(sheet: Sheet, side: Side, points: Sequence[Point]) -> None:
    for point in points:
        sheet.row(
            f"crossover, {side.label}, {named(point.spec, point.batch)}",
            backend=side.label,
            what="crossover",
            **columns(point.spec, point.batch),
            cpu_us=point.cpu * 1e6,
            gpu_us=point.gpu * 1e6,
            on_device_us=point.resident * 1e6,
            faster="GPU" if point.gpu < point.cpu else "CPU",
            faster_on_device="GPU" if point.resident < point.cpu else "CPU",
        )
    for batch in dict.fromkeys(point.batch for point in points):
        those = [point for point in points if point.batch == batch]
        sheet.row(
            f"crossover, {side.label}, batches of {batch}: the GPU wins from",
            backend=side.label,
            what="crossover",
            batch=batch,
            from_size=crossover(those, resident=False),
            from_size_on_device=crossover(those, resident=True),
        )
