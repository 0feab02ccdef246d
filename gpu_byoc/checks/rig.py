"""An engine as ``verify`` drives it: jobs of random frames in, and every byte that comes out held against numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from gpu_byoc.backend import Backend
from gpu_byoc.config import MIB, EngineConfig
from gpu_byoc.engine.device import Outcome
from gpu_byoc.engine.engine import Engine, Lease
from gpu_byoc.engine.proof import CheckFailed, Frames
from gpu_byoc.errors import GpuByocError
from gpu_byoc.frames import FrameSpec
from gpu_byoc.processor import ArrayProcessor

START: Final = 120.0
"""Seconds a backend may take to open, whatever the patience: it compiles, and a library comes off a cold disk."""

POISON: Final = 0xA5  # what a slot is filled with before it goes back, so that what is left over shows


@dataclass(frozen=True, slots=True)
class Subject:
    """A backend to be checked. ``patience`` is how many seconds any one answer may take before it counts as a hang."""

    name: str
    make: Callable[[], Backend]
    device: str | None
    patience: float = 60.0


def without_kernels(processor: type[ArrayProcessor]) -> type[ArrayProcessor]:
    return type(processor.__name__, (processor,), {"kernels": {}})


class Job:
    """Frames on their way through an engine. What comes out is copied in the callback itself, at the first moment at
    which the slots may be read."""

    def __init__(self, lease: Lease, frames: Frames, params: Any, stream: str, patience: float) -> None:
        self.frames, self.params, self.stream = frames, params, stream
        self.lease = lease
        self._patience = patience
        self.landed: Future[tuple[Outcome, bytes]] = Future()

    def submit(self) -> None:
        at, data = 0, memoryview(self.frames.tobytes())
        for view in self.lease.views:
            view[:] = data[at : at + view.nbytes]
            at += view.nbytes
        self.lease.submit(self.stream, self.params, self._done)

    def _done(self, outcome: Outcome) -> None:
        self.landed.set_result((outcome, self._held()))

    def _held(self) -> bytes:
        return b"".join(bytes(view) for view in self.lease.views)

    def outcome(self) -> Outcome:
        try:
            return self.landed.result(self._patience)[0]
        except TimeoutError:
            raise CheckFailed(f"nothing came back for {self._patience:g} seconds") from None

    def take(self, what: str) -> Frames:
        """What came out. The slots are poisoned and given back, if nobody wrote to them meanwhile.

        Raises:
            CheckFailed: the job failed, hung, or its slots changed after its end.
        """
        outcome = self.outcome()
        if outcome.error is not None:
            raise CheckFailed(f"{what}: {outcome.error}")
        return self.leftover(what)

    def leftover(self, what: str) -> Frames:
        """What the slots held at the job's end, well or not; then as ``take``."""
        self.outcome()
        came = self.landed.result()[1]
        changed = self._held() != came
        for view in self.lease.views:
            view[:] = bytes([POISON]) * view.nbytes
        self.lease.release()
        if changed:
            raise CheckFailed(f"{what}: slots were written to after their batch had ended")
        return np.frombuffer(came, np.uint8).reshape(self.frames.shape)


class Rig:
    """One engine, open."""

    def __init__(self, engine: Engine, patience: float) -> None:
        self.engine = engine
        self.patience = patience

    def lease(self, spec: FrameSpec, count: int) -> Lease:
        """``count`` slots, waited for."""
        ready: Future[None] = Future()

        def tell(error: GpuByocError | None) -> None:
            if error is None:
                ready.set_result(None)
            else:
                ready.set_exception(error)

        lease = self.engine.lease(spec, count, tell, patient=True)
        try:
            if not lease.granted:
                ready.result(self.patience)
        except BaseException as error:
            lease.release()
            if isinstance(error, TimeoutError):
                raise CheckFailed(f"no slot became free for {self.patience:g} seconds") from None
            raise
        return lease

    def job(self, frames: Frames, params: Any, stream: str = "verify") -> Job:
        """Submitted."""
        count, height, width, _ = frames.shape
        lease = self.lease(FrameSpec(width, height), count)
        job = Job(lease, frames, params, stream, self.patience)
        job.submit()
        return job


@contextmanager
def rig(subject: Subject, processor: ArrayProcessor, slots: int = 8, max_batch: int = 4) -> Iterator[Rig]:
    """An engine with ``subject``'s backend, closed at the end whatever is still on its way. But for ``START``, the
    subject's patience is the only deadline."""
    config = EngineConfig(slots, max_batch, depth=3, memory=max(1024, slots * 32) * MIB, device_timeout=0)
    engine = Engine(subject.make(), processor, config, subject.device)
    try:
        engine.start().result(max(START, subject.patience))
        yield Rig(engine, subject.patience)
    except Exception as error:
        if engine.fatal is None:
            raise
        raise engine.fatal from error  # why it is closing, rather than that it is
    finally:
        engine.close(flush=False, timeout=min(10.0, subject.patience))
