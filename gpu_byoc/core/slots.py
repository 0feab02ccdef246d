"""Who holds which slot: the one place on a frame's road that waits or refuses.

A slot is host memory for one frame. Its life::

    FREE --take--> HELD --submit--> QUEUED --start--> RUNNING --finish--> DONE --release--> FREE
                    |                 |                  |
                    +----release------+                  +--release--> ABANDONED --finish--> FREE

``release`` is the only way out and may come at any moment: a slot that the device is using goes back when the device
is through with it. Slots of one lease move together. No clock, no thread, no wait in here.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from dataclasses import dataclass


class State(enum.Enum):
    HELD = "held"
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    ABANDONED = "abandoned"
    FREE = "free"


_NEXT = {
    ("submit", State.HELD): State.QUEUED,
    ("start", State.QUEUED): State.RUNNING,
    ("finish", State.RUNNING): State.DONE,
    ("finish", State.ABANDONED): State.FREE,
    ("release", State.HELD): State.FREE,
    ("release", State.QUEUED): State.FREE,
    ("release", State.RUNNING): State.ABANDONED,
    ("release", State.DONE): State.FREE,
    # Said twice, or after the end: nothing changes.
    ("release", State.ABANDONED): State.ABANDONED,
    ("release", State.FREE): State.FREE,
}


@dataclass(slots=True, eq=False)
class Hold:
    """Slots taken together, by index in submission order; ``state`` is theirs."""

    slots: tuple[int, ...]
    state: State = State.HELD


@dataclass(slots=True, eq=False)
class Want:
    """A place in the line of those who wait. Filled (``hold``) or taken out of the line by ``cancel``."""

    count: int
    hold: Hold | None = None


class SlotPool:
    """The slots of one arena. Every method returns at once and says whom to wake.

    Free slots are handed out last in, first out, so that the memory is still in the cache; several at a time come
    from neighbouring slots where there are enough of them, so that a batch is one copy.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._line: OrderedDict[int, Want] = OrderedDict()

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def waiting(self) -> int:
        return len(self._line)

    def want(self, count: int) -> Want:
        """Ask for ``count`` slots. If ``hold`` of the answer is set they are yours; else wait to be named by
        ``move`` or ``cancel``, or ``cancel`` it. First come, first served: a small want never overtakes a large one.
        """
        if not 1 <= count <= self.count:
            raise ValueError(f"{count} of {self.count} slots")
        want = Want(count)
        if not self._line and count <= len(self._free):
            want.hold = Hold(self._take(count))
        else:
            self._line[id(want)] = want
        return want

    def cancel(self, want: Want) -> list[Want]:
        """Leave the line. Returns the wants that got their slots because of it: tell them. If ``want`` was filled
        already, its slots are still held: ``move`` them to ``release``."""
        self._line.pop(id(want), None)
        return self._serve()

    def move(self, hold: Hold, event: str) -> list[Want]:
        """``submit``, ``start``, ``finish`` or ``release`` a hold. Returns the wants that got slots: tell them.

        Raises:
            ValueError: the event cannot happen in the state the hold is in; nothing has changed.
        """
        state = _NEXT.get((event, hold.state))
        if state is None:
            raise ValueError(f"cannot {event} slots that are {hold.state.value}")
        freed = state is State.FREE and hold.state is not State.FREE
        hold.state = state
        if not freed:
            return []
        self._free.extend(reversed(hold.slots))
        return self._serve()

    def _serve(self) -> list[Want]:
        served = []
        while self._line:
            want = next(iter(self._line.values()))
            if want.count > len(self._free):
                break
            del self._line[id(want)]
            want.hold = Hold(self._take(want.count))
            served.append(want)
        return served

    def _take(self, count: int) -> tuple[int, ...]:
        if count == 1:
            return (self._free.pop(),)
        chosen = _neighbours(sorted(self._free), count)
        taken = set(chosen)
        self._free = [slot for slot in self._free if slot not in taken]
        return chosen


def _neighbours(free: list[int], count: int) -> tuple[int, ...]:
    """The first run of ``count`` consecutive slots, or the lowest ``count`` where there is none."""
    start = 0
    for i, slot in enumerate(free):
        if i and slot != free[i - 1] + 1:
            start = i
        if i - start + 1 == count:
            return tuple(free[start : i + 1])
    return tuple(free[:count])
