"""Many batches at once: what copies that overtake a kernel, mix lanes or come late would change, and whether the meter
adds up. Each check of ``verify`` returns how many things it compared, or raises what is wrong."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Final

import numpy as np

from gpu_byoc.checks.rig import POISON, Job, Rig, Subject, rig
from gpu_byoc.engine.proof import SHIPPED, CheckFailed, all_params, noise, oracle, same
from gpu_byoc.frames import FrameSpec
from gpu_byoc.processor import ArrayProcessor
from gpu_byoc.processors.green_tint import GreenTint

MEASURES_ITSELF: Final = 1.01
"""How far computing may exceed the clock on the wall: two clocks, each read twice."""


def in_flight(subject: Subject, quick: bool) -> int:
    """Jobs of 1 to 8 frames of several streams and parameters, all slots busy; out in each stream's order."""
    rng, count = np.random.default_rng(3), 0
    for cls in SHIPPED:
        processor, over = cls(), _Order()
        with rig(subject, processor, slots=24, max_batch=8) as engine:
            for _ in range(3 if quick else 15):
                jobs: list[Job] = []
                while sum(job.frames.shape[0] for job in jobs) <= 16:
                    params = rng.choice(np.array(all_params(processor, (0, 1, 80, 255)), object))
                    frames = noise(rng, int(rng.integers(1, 9)), 160, 90)
                    jobs.append(over.watch(engine.job(frames, params, stream=f"stream {rng.integers(0, 3)}")))
                for job in jobs:
                    what = f"{cls.name}, several batches on their way"
                    count += same(job.take(what), oracle(processor, job.frames, job.params), what)
        over.check()
    return count


class _Order:
    """Whether jobs of one stream end in the order they were submitted in."""

    def __init__(self) -> None:
        self._submitted: dict[str, list[Job]] = {}
        self._ended: dict[str, list[Job]] = {}

    def watch(self, job: Job) -> Job:
        self._submitted.setdefault(job.stream, []).append(job)
        job.landed.add_done_callback(lambda _: self._ended.setdefault(job.stream, []).append(job))
        return job

    def check(self) -> None:
        for stream, submitted in self._submitted.items():
            if self._ended.get(stream) != submitted:
                raise CheckFailed(f"jobs of {stream} ended in another order than they were submitted in")


def reuse(subject: Subject, quick: bool) -> int:
    """Three slots and four callers: each slot gets its next frame the moment it has given the last one up, and nobody
    has written to it in between."""
    processor, params, spec = GreenTint(), GreenTint.Params(), FrameSpec(320, 240)
    used: set[int] = set()
    what = "slots in use again and again"

    def caller(engine: Rig, seed: int) -> int:
        rng, count = np.random.default_rng(seed), 0
        for _ in range(25 if quick else 250):
            lease = engine.lease(spec, 1)
            assert lease.hold is not None
            (slot,), (view,) = lease.hold.slots, lease.views
            left_alone = slot not in used or view.tobytes() == bytes([POISON]) * spec.nbytes
            used.add(slot)
            job = Job(lease, noise(rng, 1, spec.width, spec.height), params, f"caller {seed}", engine.patience)
            job.submit()
            count += same(job.take(what), oracle(processor, job.frames, params), what)
            if not left_alone:
                raise CheckFailed(f"{what}: a free slot was written to")
        return count

    with rig(subject, processor, slots=3, max_batch=2) as engine, ThreadPoolExecutor(4) as threads:
        return sum(threads.map(lambda seed: caller(engine, seed), range(4)))


def cancels(subject: Subject, quick: bool) -> int:
    """Half the jobs are given up at any moment and their slots taken again at once; the others come out right, and in
    the end every slot is free."""
    rng, processor, params, count = np.random.default_rng(5), GreenTint(), GreenTint.Params(), 0
    with rig(subject, processor, slots=12, max_batch=4) as engine:
        for _ in range(20 if quick else 150):
            jobs = [engine.job(noise(rng, 2, 160, 90), params, stream=f"stream {i % 3}") for i in range(5)]
            for job in [job for job in jobs if rng.random() < 0.5]:
                jobs.remove(job)
                job.lease.release()
            for job in jobs:
                what = "a job beside others that were cancelled"
                count += same(job.take(what), oracle(processor, job.frames, params), what)
        for lease in [engine.lease(FrameSpec(160, 90), 4) for _ in range(3)]:  # all twelve, or it waits in vain
            lease.release()
    return count


class Long(ArrayProcessor):
    """Green tint after work that takes a device long enough for its copies to overtake it, if they can."""

    name: ClassVar[str] = "long"
    Params: ClassVar[type] = GreenTint.Params
    rounds = 24

    def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
        for key in range(self.rounds):
            frames = (frames ^ key) ^ key
        return GreenTint.process_batch(self, frames, params, xp)  # type: ignore[arg-type]


def overtaking(subject: Subject, quick: bool) -> int:
    """Large frames through a slow processor, three batches on their way: copies have every chance to come too early."""
    rng, processor, params, count = np.random.default_rng(6), Long(), GreenTint.Params(), 0
    with rig(subject, processor, slots=6, max_batch=2) as engine:
        for _ in range(2 if quick else 10):
            jobs = [engine.job(noise(rng, 2, 1280, 720), params, stream=f"stream {i}") for i in range(3)]
            for job in jobs:
                what = "a copy that overtakes"
                count += same(job.take(what), oracle(GreenTint(), job.frames, params), what)
    return count


def meter(subject: Subject, quick: bool) -> int:
    """Every batch costs something, shares add up to the batch, streams add up to the device, and computing takes no
    longer than the clock on the wall."""
    rng, params, shares, frames = np.random.default_rng(7), GreenTint.Params(), [0, 0], 0
    with rig(subject, GreenTint(), slots=12, max_batch=4) as engine:
        began = time.perf_counter_ns()
        for _ in range(5 if quick else 30):
            jobs = [engine.job(noise(rng, count, 320, 240), params, stream=f"stream {count}") for count in (1, 2, 3, 4)]
            for job in jobs:
                outcome = job.outcome()
                job.take("a metered job")
                frames += len(job.frames)
                shares[0] += outcome.compute_ns
                shares[1] += outcome.copy_ns
                if outcome.compute_ns <= 0 or outcome.copy_ns < 0:
                    raise CheckFailed(f"a job cost {outcome.compute_ns} ns of computing, {outcome.copy_ns} of copying")
        wall = time.perf_counter_ns() - began
        _, totals, device = engine.engine.usage()
    booked = [sum(getattr(usage, name) for usage in totals.values()) for name in ("compute_ns", "copy_ns", "frames")]
    if not [*shares, frames] == booked == [device.compute_ns, device.copy_ns, device.frames]:
        raise CheckFailed(
            f"jobs say {[*shares, frames]}, streams {booked}, the device {device} (compute, copy, frames)"
        )
    if device.compute_ns > wall * MEASURES_ITSELF:
        raise CheckFailed(f"{device.compute_ns} ns of computing in {wall} ns")
    return frames


def probes(subject: Subject, quick: bool) -> int:
    """Signs of life on a thread of their own, a thousand a second at most, beside batches whose bytes stay right."""
    rng, processor, params, over = np.random.default_rng(8), GreenTint(), GreenTint.Params(), threading.Event()
    with rig(subject, processor) as engine:
        probe = getattr(engine.engine.backend, "probe", None)
        if probe is None:
            return 0
        count, failed = 0, []

        def ask() -> None:
            nonlocal count
            try:
                while not over.wait(0.001):
                    began = time.monotonic()
                    probe()
                    if time.monotonic() - began > subject.patience:
                        raise CheckFailed(f"it did not come back within {subject.patience:g} seconds")
                    count += 1
            except Exception as error:  # whatever it is, it is what the check found
                failed.append(error)

        asking = threading.Thread(target=ask, name="verify-probe", daemon=True)
        asking.start()
        try:
            for _ in range(10 if quick else 60):
                job = engine.job(noise(rng, 4, 320, 240), params)
                same(job.take("a job beside probes"), oracle(processor, job.frames, params), "a job beside probes")
        finally:
            over.set()
            asking.join(subject.patience)
        if failed:
            raise CheckFailed(f"a probe failed: {failed[0]}")
        if asking.is_alive() or not count:
            raise CheckFailed(f"a probe did not come back within {subject.patience:g} seconds")
    return count
