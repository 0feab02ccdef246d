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
from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from heapq import heappop, heappush


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
    owner: Hashable = None
    state: State = State.HELD


@dataclass(slots=True, eq=False)
class Want:
    """A place in the line of those who wait. Filled (``hold``) or taken out of the line by ``cancel``."""

    count: int
    owner: Hashable
    hold: Hold | None = None


class SlotPool:
    """The slots of one arena. Every method returns at once and says whom to wake.

    The lowest free slots are handed out first: the same few serve a low load, so that their memory is still in the
    cache, and what is in the house together lies side by side, so that a batch is few copies. Several at a time come
    from neighbouring slots where there are enough of them.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count))  # a heap
        self._lines: OrderedDict[Hashable, OrderedDict[int, Want]] = OrderedDict()  # of each owner; the first is next
        self._held: Counter[Hashable] = Counter()  # slots by owner

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def waiting(self) -> int:
        return sum(map(len, self._lines.values()))

    def held(self, owner: Hashable) -> int:
        """Slots that an owner has now."""
        return self._held[owner]

    def want(self, count: int, owner: Hashable = None) -> Want:
        """Ask for ``count`` slots. If ``hold`` of the answer is set they are yours; else wait to be named by
        ``move`` or ``cancel``, or ``cancel`` it. Owners are served in turn, one want each, and an owner's wants in the
        order they came. Whose turn it is waits for as many slots as it wants: a small want never overtakes a large one.
        """
        if not 1 <= count <= self.count:
            raise ValueError(f"{count} of {self.count} slots")
        want = Want(count, owner)
        if not self._lines and count <= len(self._free):
            self._fill(want)
        else:
            self._lines.setdefault(owner, OrderedDict())[id(want)] = want
        return want

    def rival(self, owner: Hashable) -> Want | None:
        """In a line that is full: the last want of whoever has most of them, at least two more than ``owner``, who may
        have its place. None: ``owner`` has its share already. ``cancel`` it."""
        line = max(self._lines.values(), key=len, default=None)
        if line is None or len(line) < len(self._lines.get(owner, ())) + 2:
            return None
        return next(reversed(line.values()))

    def cancel(self, want: Want) -> list[Want]:
        """Leave the line. Returns the wants that got their slots because of it: tell them. If ``want`` was filled
        already, its slots are still held: ``move`` them to ``release``."""
        self._leave(want)
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
        for slot in hold.slots:
            heappush(self._free, slot)
        self._held[hold.owner] -= len(hold.slots)
        if not self._held[hold.owner]:
            del self._held[hold.owner]
        return self._serve()

    def _serve(self) -> list[Want]:
        served = []
        while self._lines:
            want = next(iter(next(iter(self._lines.values())).values()))
            if want.count > len(self._free):
                break
            self._leave(want)
            if want.owner in self._lines:
                self._lines.move_to_end(want.owner)
            self._fill(want)
            served.append(want)
        return served

    def _fill(self, want: Want) -> None:
        want.hold = Hold(self._take(want.count), want.owner)
        self._held[want.owner] += want.count

    def _leave(self, want: Want) -> None:
        line = self._lines.get(want.owner, OrderedDict())
        line.pop(id(want), None)
        if not line:
            self._lines.pop(want.owner, None)

    def _take(self, count: int) -> tuple[int, ...]:
        if count == 1:
            return (heappop(self._free),)
        chosen = _neighbours(sorted(self._free), count)
        taken = set(chosen)
        self._free = sorted(slot for slot in self._free if slot not in taken)
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
