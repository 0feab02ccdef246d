"""Beside a device thread: one thread asks the device for a sign of life, one looks whether anything is stuck.

The one that asks may itself get stuck in the asking; the one that looks never calls anything that waits.
``core/vigil`` decides. A thread that keeps the interpreter's lock for itself stops these two as well: then ``/health``
does not answer either, and that is for whoever asks for it to notice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from gpu_byoc.core.vigil import Stuck, Vigil
from gpu_byoc.errors import DeviceLost, DeviceOutOfMemory, GpuByocError

PROBE_SECONDS = 0.5
"""A device that fails for good is noticed within a second, also when nobody has work for it."""

LOOK_SECONDS = 0.25
"""How often is looked, and so how exact the limits are."""

GRACE = 5.0
"""Seconds that a processor gets on top of its limit, a quarter of it at most: where a call can be cancelled at the
limit, it has ended by then."""

SECOND = 1_000_000_000


class Watch:
    """``start`` and ``stop`` are called on the device thread. What was found is told to ``stuck`` or ``lost``; when
    both threads find something, to both.

    Limits are in seconds; with ``device_limit`` 0 or without ``probe`` there is no canary, with ``batch_limit`` 0 a
    batch may take as long as it likes. ``look`` returns the number of the oldest batch on its way, or of another call
    of the backend (None: there is neither), and how many batches have ended so far.
    """

    def __init__(
        self,
        name: str,
        probe: Callable[[], None] | None,
        device_limit: float,
        batch_limit: float,
        look: Callable[[], tuple[int | None, int]],
        stuck: Callable[[Stuck], None],
        lost: Callable[[GpuByocError], None],
    ) -> None:
        self._probe = probe if device_limit else None
        self._look = look
        self._stuck = stuck
        self._lost = lost
        self._limit = device_limit
        limits = [limit for limit in (device_limit if probe else 0.0, batch_limit) if limit]
        self._every = min([LOOK_SECONDS, *(limit / 4 for limit in limits)])
        self._vigil = Vigil(
            int(device_limit * SECOND),
            int((batch_limit + min(GRACE, batch_limit / 4)) * SECOND),
            longest_step=int(2 * self._every * SECOND),
        )
        self._over = threading.Event()
        self._probing: int | None = None
        self.answered: float | None = None  # when the last probe was, by time.monotonic
        self.threads: list[threading.Thread] = []
        if self._probe is not None:
            self.threads.append(threading.Thread(target=self._ask, name=f"{name}-canary", daemon=True))
        if limits:
            self.threads.append(threading.Thread(target=self._watch, name=f"{name}-watch", daemon=True))

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def stop(self) -> bool:
        """End both. False if a probe has not come back within the device's limit: nothing may be closed under it."""
        self._over.set()
        for thread in self.threads:
            if thread.ident is not None:
                thread.join(self._limit if self._probe else None)
        return not any(thread.is_alive() for thread in self.threads)

    def _ask(self) -> None:
        assert self._probe is not None
        number = 0
        while not self._over.wait(min(PROBE_SECONDS, self._every * 2)):
            number += 1
            self._probing = number
            try:
                self._probe()
            except DeviceOutOfMemory:
                pass  # full, and alive enough to say so
            except DeviceLost as error:
                self._lost(error)
                return
            except BaseException as error:  # of the backend: whatever it is, this device cannot be relied on
                self._lost(DeviceLost(f"the device does not answer its canary: {error!r}"))
                return
            self.answered = time.monotonic()
            self._probing = None

    def _watch(self) -> None:
        while not self._over.wait(self._every):
            batch, landed = self._look()
            stuck = self._vigil.look(time.monotonic_ns(), self._probing, batch, landed)
            if stuck is not None:
                self._stuck(stuck)
                return
