"""Who used how much of the device, second by second. Integer nanoseconds throughout, so that sums are exact.

Three names that are never mixed: *compute* and *copy* are what the device spent on a batch, shared out among its
frames by pixels; *queue* is how long a frame waited for the device, its own whole time. The shares of a batch add up
to the measured interval exactly. Wall seconds, which the network bills, are the orchestrator's business.

``now`` and ``end`` are nanoseconds since the Unix epoch of a clock that never jumps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SECOND = 1_000_000_000

KEPT_SECONDS = 60
"""Rows kept, as GET /compute shows them: one minute, so that whoever looks every half minute sees each second whole."""


@dataclass(frozen=True, slots=True)
class Share:
    """One frame group's part in a batch: who, how many frames and pixels, how long they waited together."""

    name: str
    frames: int
    pixels: int
    queue_ns: int


@dataclass(slots=True)
class Usage:
    """Sums over some time. ``batches`` counts each batch that had at least one frame of this name."""

    frames: int = 0
    batches: int = 0
    compute_ns: int = 0
    copy_ns: int = 0
    queue_ns: int = 0

    def add(self, other: Usage) -> None:
        self.frames += other.frames
        self.batches += other.batches
        self.compute_ns += other.compute_ns
        self.copy_ns += other.copy_ns
        self.queue_ns += other.queue_ns

    def count(self, frames: int, queue_ns: int, compute_ns: int = 0, copy_ns: int = 0) -> None:
        self.frames += frames
        self.compute_ns += compute_ns
        self.copy_ns += copy_ns
        self.queue_ns += queue_ns


def split(interval: int, weights: Sequence[int]) -> list[int]:
    """Share ``interval`` in proportion to ``weights``: non-negative integers that add up to it exactly, each within
    one of its exact part."""
    total = sum(weights)
    if total <= 0:
        raise ValueError(f"weights must add up to more than 0, got {list(weights)}")
    shares, before, reached = [], 0, 0
    for weight in weights:
        before += weight
        upto = interval * before // total
        shares.append(upto - reached)
        reached = upto
    return shares


def by_second(start: int, end: int) -> list[tuple[int, int]]:
    """The interval [start, end) cut at whole seconds: (second, nanoseconds in it)."""
    pieces = []
    while start < end:
        second = start // SECOND
        until = min(end, (second + 1) * SECOND)
        pieces.append((second, until - start))
        start = until
    return pieces


TOLERANCE = 0.01
"""The part of a device's time that may be missing from the books, or be in them twice, before it is said aloud. By
construction nothing is: whatever is there is a defect."""


@dataclass(frozen=True, slots=True)
class Balance:
    """The same device time, compute and copy, in nanoseconds, from sums that are kept apart.

    ``device`` adds up the intervals of whole batches, ``names`` the totals by name. ``settled`` is ``device`` at the
    last moment at which the results of all that was booked had been handed out, ``handed`` what was in those results.
    """

    device: int
    names: int
    settled: int
    handed: int

    @property
    def error(self) -> float:
        """The larger difference, as a part of the device's time; 0.0 where the books balance."""
        off = max(abs(self.device - self.names), abs(self.settled - self.handed))
        return off / max(self.device, 1)


ENDED = "(ended)"
"""The name under which the totals of streams that are over are kept together, so that names still add up."""


class Meter:
    """Books batches; answers with rows per second and totals per name.

    A name has totals of its own from ``open`` to ``end``; what is booked for it before or after goes to ENDED.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Usage] = {}
        self.device = Usage()  # each batch once
        self._rows: dict[int, dict[str, Usage]] = {}

    def book(self, end: int, compute: int, copy: int, shares: Sequence[Share]) -> list[tuple[int, int]]:
        """Enter one finished batch. Returns (compute, copy) nanoseconds of each share, in order.

        Device time is entered in the seconds it was spent in; frames, batches and waiting in the one it ended in.
        """
        last = end // SECOND
        if last not in self._rows:
            self._forget(end)
        computes, copies = [0] * len(shares), [0] * len(shares)
        for i, row, part in self._spread(end, compute, shares):
            computes[i] += part
            row.compute_ns += part
        for i, row, part in self._spread(end, copy, shares):
            copies[i] += part
            row.copy_ns += part

        for share, its_compute, its_copy in zip(shares, computes, copies, strict=True):
            self._total(share.name).count(share.frames, share.queue_ns, its_compute, its_copy)
            self._row(last, share.name).count(share.frames, share.queue_ns)
            self.device.count(share.frames, share.queue_ns)
        for name in {share.name for share in shares}:
            self._total(name).batches += 1
            self._row(last, name).batches += 1
        self.device.batches += 1
        self.device.compute_ns += compute
        self.device.copy_ns += copy
        return list(zip(computes, copies, strict=True))

    def rows(self, now: int) -> list[tuple[int, str, Usage]]:
        """(second, name, usage) of the last minute, oldest first."""
        self._forget(now)
        return [(second, name, usage) for second in sorted(self._rows) for name, usage in self._rows[second].items()]

    def spent(self) -> tuple[int, int]:
        """Device time, compute and copy: of the device's own total, and of the totals by name."""
        names = sum(usage.compute_ns + usage.copy_ns for usage in self.totals.values())
        return self.device.compute_ns + self.device.copy_ns, names

    def open(self, name: str) -> None:
        """A stream begins. Names of streams that run at the same time differ."""
        self.totals.setdefault(name, Usage())

    def end(self, name: str) -> Usage:
        """A stream is over: its totals are returned and go to ENDED. Its rows stay for their minute."""
        usage = self.totals.pop(name, None) or Usage()
        self._total(ENDED).add(usage)
        return usage

    def _total(self, name: str) -> Usage:
        usage = self.totals.get(name)
        if usage is None:
            usage = self.totals.setdefault(ENDED, Usage())
        return usage

    def _spread(self, end: int, interval: int, shares: Sequence[Share]) -> Iterator[tuple[int, Usage, int]]:
        """The ``interval`` that ended at ``end``, in parts: whose (an index), in the row of which second, how much."""
        weights = [share.pixels for share in shares]
        for second, piece in by_second(end - interval, end):
            for i, part in enumerate(split(piece, weights)):
                yield i, self._row(second, shares[i].name), part

    def _row(self, second: int, name: str) -> Usage:
        row = self._rows.setdefault(second, {})
        usage = row.get(name)
        if usage is None:
            usage = row[name] = Usage()
        return usage

    def _forget(self, now: int) -> None:
        oldest = now // SECOND - KEPT_SECONDS
        for second in [second for second in self._rows if second <= oldest]:
            del self._rows[second]
