"""The engine as the worker has it: leases, batches, the device thread. Against what the bus allows, and against less.

Throughput is a closed loop: four leases of one batch each, submitted again as soon as they come back; nothing touches
the pixels in between, as where a decoder writes straight into the slots. On a GPU the ceiling is a pinned copy of the
same frames up and down at once, on a CPU one thread's memcpy of them, both in turn with the loop.

For a GPU also: one frame through an idle engine; the same work from pageable memory, and in sequence (copy up, kernel,
copy down, wait); batches on their way at once; and the crossover, where the best CPU backend is as fast.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import numpy as np

from gpu_byoc.config import EngineConfig
from gpu_byoc.engine.device import Outcome
from gpu_byoc.engine.engine import Engine, Lease
from gpu_byoc.errors import GpuByocError
from gpu_byoc.frames import FrameSpec
from gpu_byoc.processors.green_tint import GreenTint

from . import crossover
from .bench_kernels import expect, memcpy
from .bus import BUSES, Plain, pixels
from .harness import Sheet, Stable, Window, calls, marks, percentile, settle, together
from .sides import (
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

IN_HOUSE: Final = 4
"""Leases of the closed loop: three on their way at the most, and one that waits."""

MANY: Final = 8
"""Frames of a batch from which on a GPU's throughput is judged."""

START: Final = 120.0
"""Seconds a backend may take to open."""


def run(sheet: Sheet) -> None:
    measure(sheet, sides())


def measure(sheet: Sheet, found: Sequence[Side]) -> None:
    there = [side for side in found if not side.why_not]
    gpus = [side for side in there if side.bus]
    cases = len(specs(sheet.size)) * len(batches(sheet.size))
    sheet.expect(len(there) * cases + len(gpus) * (5 + 3 * len(specs(sheet.size))) + cases)
    sheet.settings(
        processor=GreenTint.name, leases=IN_HOUSE, depth="the backend's own", ceiling="GPU: pinned, both ways"
    )
    for side in found:
        if side.why_not:
            sheet.skip(f"{side.label}: engine", side.why_not)
            continue
        for batch in batches(sheet.size):
            with guarded(sheet, f"{side.label}, batches of {batch}, from here on"):
                _throughput(sheet, side, batch)
        with guarded(sheet, f"{side.label}, one frame through an idle engine"):
            _idle(sheet, side)
        if side.bus:
            with guarded(sheet, f"{side.label}, batches on their way at once, from here on"):
                _depths(sheet, side)
    _targets(sheet, found)
    crossover.measure(sheet, [side for side in there if not side.bus], gpus)


# --- the engine in a closed loop


@contextmanager
def started(side: Side, batch: int, largest: int, depth: int | None = None) -> Iterator[Engine]:
    """An engine for batches of exactly ``batch`` frames, the largest frame of ``largest`` bytes."""
    backend = side.make()
    if depth is not None:
        backend.depth = depth
    config = EngineConfig(
        slots=batch * IN_HOUSE,
        max_batch=batch,
        depth=depth,
        memory=2 * batch * IN_HOUSE * largest,
    )
    engine = Engine(backend, GreenTint(), config, side.device)
    try:
        engine.start().result(START)
        yield engine
    finally:
        engine.close(flush=False, timeout=START)


class Loop:
    """Leases of ``batch`` frames that go round. Raises what goes wrong in them."""

    def __init__(self, engine: Engine, spec: FrameSpec, batch: int) -> None:
        self.engine, self.spec, self.batch = engine, spec, batch
        self._came: queue.SimpleQueue[tuple[Lease, Outcome]] = queue.SimpleQueue()

    def fill(self) -> str:
        """Random frames into every slot. Returns what of one batch's output differs from numpy's, "" for nothing."""
        frames = pixels(self.spec.nbytes * self.batch)
        leases = [self._lease() for _ in range(IN_HOUSE)]
        for lease in leases:
            at = 0
            for view in lease.views:
                view[:] = frames[at : at + view.nbytes].data
                at += view.nbytes
        for lease in leases[1:]:
            lease.release()
        self._submit(leases[0])
        lease, _ = self._landed()
        shaped = frames.reshape(self.batch, *self.spec.shape)
        held = np.concatenate([np.frombuffer(view, np.uint8) for view in lease.views]).reshape(shaped.shape)
        chosen = sorted({0, self.batch - 1})
        wrong = int(np.count_nonzero(held[chosen] != expect(GreenTint(), shaped[chosen])))
        lease.release()
        return f"{wrong} bytes differ from numpy's" if wrong else ""

    def window(self, seconds: float) -> Callable[[], Window]:
        """Windows of batches in flight together; a batch's seconds are the window's over all of them. Tally: the
        nanoseconds that each computed."""

        def window() -> Window:
            for _ in range(IN_HOUSE):
                self._submit(self._lease())
            for _ in range(IN_HOUSE):  # until it is in its stride
                self._again()
            used, began, computed = time.process_time(), time.perf_counter(), list[int]()
            while len(computed) < 3 or time.perf_counter() - began < seconds:
                computed.append(self._again())
            wall, cpu = time.perf_counter() - began, time.process_time() - used
            for _ in range(IN_HOUSE):
                self._landed()[0].release()
            count = len(computed)
            return Window((wall / count,) * count, wall, cpu, tally=computed)

        return window

    def once(self) -> int:
        """One batch through an engine that has nothing else to do; what it computed, in nanoseconds."""
        self._submit(self._lease())
        lease, outcome = self._landed()
        lease.release()
        return outcome.compute_ns

    def alone(self, seconds: float) -> Callable[[], Window]:
        """Windows of ``once``, with what each computed as their tally."""

        def window() -> Window:
            computed: list[int] = []
            return replace(calls(lambda: computed.append(self.once()), seconds)(), tally=computed)

        return window

    def _again(self) -> int:
        lease, outcome = self._landed()
        lease.release()
        self._submit(self._lease())
        return outcome.compute_ns

    def _lease(self) -> Lease:
        ready: queue.SimpleQueue[GpuByocError | None] = queue.SimpleQueue()
        lease = self.engine.lease(self.spec, self.batch, ready.put)
        if not lease.granted and (error := ready.get(timeout=START)) is not None:
            raise error
        return lease

    def _submit(self, lease: Lease) -> None:
        lease.submit("bench", GreenTint.Params(), lambda outcome: self._came.put((lease, outcome)))

    def _landed(self) -> tuple[Lease, Outcome]:
        lease, outcome = self._came.get(timeout=START)
        if outcome.error is not None:
            raise outcome.error
        return lease, outcome


def _throughput(sheet: Sheet, side: Side, batch: int) -> None:
    wanted = specs(sheet.size)
    with started(side, batch, wanted[-1].nbytes) as engine:
        for spec in wanted:
            name, nbytes = f"{side.label}, {named(spec, batch)}", spec.nbytes * batch
            sheet.doing(name)
            on_cpu = None if side.bus else too_long_on_a_cpu(nbytes)
            if reason := on_cpu or too_much((IN_HOUSE + 4) * nbytes):
                sheet.skip(name, reason)
                continue
            loop = Loop(engine, spec, batch)
            if wrong := loop.fill():
                sheet.fail(name, wrong)
                continue
            seconds = sheet.size.window / 3
            works = {"engine": loop.window(seconds), **_against(side, spec, batch, seconds)}
            _row(sheet, name, side, spec, batch, together(works, sheet.size))


def _against(side: Side, spec: FrameSpec, batch: int, seconds: float) -> dict[str, Callable[[], Window]]:
    """Windows of what the engine is compared with; only the ceiling for a batch that is not ``MANY`` frames."""
    if side.bus is None:
        return {"ceiling": calls(memcpy(spec.nbytes * batch), seconds)}
    plain = Plain(side.bus(), spec, batch)
    works = {"ceiling": plain.both_ways(seconds)}
    if batch == MANY:
        works["in sequence"] = calls(plain.in_sequence(pinned=True), seconds)
        works["pageable"] = calls(plain.in_sequence(pinned=False), seconds)
    return works


def _row(sheet: Sheet, name: str, side: Side, spec: FrameSpec, batch: int, measured: dict[str, Stable]) -> None:
    engine, ceiling = measured["engine"], measured["ceiling"]
    sheet.row(
        name,
        engine,
        frames=batch,
        backend=side.label,
        what="engine",
        **columns(spec, batch),
        frames_per_second=batch / engine.p50,
        gb_per_s=batch * spec.nbytes / engine.p50 / 1e9,
        ceiling_gb_per_s=batch * spec.nbytes / ceiling.p50 / 1e9,
        of_ceiling=1 / engine.ratio(ceiling),
        compute_seconds_per_million_frames=_computed(engine) / batch * 1e6,
        p99_us=None,  # batches overlap: a window has one figure
    )
    for what in ("in sequence", "pageable"):
        if other := measured.get(what):
            sheet.row(
                f"{side.label}, {what}, {named(spec, batch)}",
                other,
                frames=batch,
                backend=side.label,
                what=what,
                **columns(spec, batch),
                frames_per_second=batch / other.p50,
                gb_per_s=batch * spec.nbytes / other.p50 / 1e9,
                engine_gain=other.ratio(engine),
            )


# --- one frame, and how many batches at once


def _computed(measured: Stable) -> float:
    """Seconds that a batch computed, at the median."""
    return percentile([each for window in measured.windows for each in window.tally], 0.5) / 1e9


def _idle(sheet: Sheet, side: Side) -> None:
    """One frame of the smallest size through an engine that waits for it, against its copies and its kernel alone."""
    spec = specs(sheet.size)[0]
    name = f"{side.label}, one frame through an idle engine, {named(spec)}"
    sheet.doing(name)
    with started(side, 1, spec.nbytes) as engine:
        loop = Loop(engine, spec, 1)
        if wrong := loop.fill():
            sheet.fail(name, wrong)
            return
        works = {"idle": loop.alone(sheet.size.window)}
        if side.bus:
            plain = Plain(side.bus(), spec, 1)
            works |= {way: plain.one_way(sheet.size.window / 3, up=way == "up") for way in ("up", "down")}
        measured = together(works, sheet.size)
    idle = measured.pop("idle")
    compute = _computed(idle)
    floor = compute + sum(copy.p50 for copy in measured.values())
    sheet.row(
        name,
        idle,
        backend=side.label,
        what="idle",
        **columns(spec, 1),
        floor_us=floor * 1e6,
        times_floor=idle.p50 / floor,
        compute_seconds_per_million_frames=compute * 1e6,
        **marks(idle, *measured.values()),
    )


def _depths(sheet: Sheet, side: Side) -> None:
    """Throughput with so many batches on their way at once, of the middle size."""
    spec, batch = specs(sheet.size)[len(specs(sheet.size)) // 2], MANY
    for depth in range(1, IN_HOUSE + 1):
        name = f"{side.label}, {depth} on their way at once, {named(spec, batch)}"
        sheet.doing(name)
        with started(side, batch, spec.nbytes, depth) as engine:
            if engine.backend.depth != depth:
                sheet.skip(name, f"{side.label} has {engine.backend.depth} on its way at once, whatever it is told")
                continue
            loop = Loop(engine, spec, batch)
            loop.fill()
            measured = settle(loop.window(sheet.size.window), sheet.size)
        sheet.row(
            name,
            measured,
            frames=batch,
            backend=side.label,
            what="depth",
            depth=depth,
            **columns(spec, batch),
            frames_per_second=batch / measured.p50,
            p99_us=None,
        )


def _targets(sheet: Sheet, found: Sequence[Side]) -> None:
    """The worst row of each kind against what it should reach."""
    for side in found:
        if side.label not in BUSES and not side.bus:
            continue
        rows = [row for row in sheet.rows if row.get("backend") == side.label]
        many = [row["of_ceiling"] for row in rows if row["what"] == "engine" and row["batch"] >= MANY]
        idle = [row["times_floor"] for row in rows if row["what"] == "idle"]
        faster = {
            what: [row["engine_gain"] for row in rows if row["what"] == what] for what in ("pageable", "in sequence")
        }
        for name, reached, at_least in (
            (f"engine, {MANY} frames and more, of the ceiling", many, 0.85),
            ("engine, against the pageable path", faster["pageable"], 1.7),
            ("engine, against the same in sequence", faster["in sequence"], 1.5),
        ):
            target(sheet, f"{side.label}, {name}", min(reached, default=None), side.why_not, at_least=at_least)
        name = f"{side.label}, one frame through an idle engine, against its copies and kernel alone"
        target(sheet, name, max(idle, default=None), side.why_not, at_most=3)
