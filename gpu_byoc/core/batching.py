"""Which frames share the next batch.

The rules, all of them:

* A batch has one key (frame spec and parameters: what can be computed together) and at most ``max_batch`` frames, or
  fewer where ``limit`` says so for its oldest item.
* The oldest waiting item always leaves with the next batch; so nothing starves.
* The other places go to the streams in turn, one item each per round; so no stream takes more than its share while
  others wait, and takes everything while none does.
* Items of one stream leave in the order they came. An item is never split.
* A batch leaves as soon as the device has room for it (work-conserving); with ``max_wait`` it waits for company until
  it is full or the oldest item has waited that long, counted from that item's arrival.
* With ``share`` off every item leaves alone.

Times are integer nanoseconds of any one clock.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Item(Generic[T]):
    """``frames`` frames that stay together. ``value`` is the caller's own."""

    value: T
    stream: Hashable
    key: Hashable
    frames: int
    arrived: int


class Batcher(Generic[T]):
    """Items in, batches out."""

    def __init__(
        self,
        max_batch: int,
        max_wait: int = 0,
        share: bool = True,
        limit: Callable[[Item[T]], int] | None = None,
    ) -> None:
        self.max_batch = max_batch
        self.limit = limit
        self.share = share
        self.max_wait = max_wait
        self.waiting = 0  # frames
        self.left: Counter[str] = Counter()  # batches, by why they left
        # Streams in turn; the front one is next. A stream is here only while it has items.
        self._streams: OrderedDict[Hashable, deque[Item[T]]] = OrderedDict()

    def add(self, item: Item[T]) -> None:
        if not 1 <= item.frames <= self.max_batch:
            raise ValueError(f"an item of {item.frames} frames; a batch holds 1..{self.max_batch}")
        queue = self._streams.get(item.stream)
        if queue is None:
            queue = self._streams[item.stream] = deque()
        queue.append(item)
        self.waiting += item.frames

    def cancel(self, item: Item[T]) -> bool:
        """Take an item out; False if it is not waiting here (any more)."""
        queue = self._streams.get(item.stream)
        if queue is None or item not in queue:
            return False
        queue.remove(item)
        if not queue:
            del self._streams[item.stream]
        self.waiting -= item.frames
        return True

    def due(self, now: int) -> int | None:
        """When the next batch may leave: a time (at or before ``now``: at once), or None while nothing waits."""
        if not self._streams:
            return None
        if self.max_wait == 0:
            return now
        oldest = self._oldest()
        return now if self.waiting >= self._most(oldest) else oldest.arrived + self.max_wait

    def take(self, now: int, drain: bool = False) -> list[Item[T]]:
        """The next batch, or an empty list if none is due; with ``drain`` due or not. The caller has to compute it.

        ``left`` counts why: ``full`` (it is, or with ``max_wait`` as many frames waited as fill one), ``max_wait`` (its
        oldest item had waited that long), ``device_free`` (nothing was waited for), ``drain``, ``alone`` (``share`` is
        off).
        """
        due = self.due(now)
        if due is None or (due > now and not drain):
            return []
        first = self._oldest()
        most = self._most(first)
        crowd = self.waiting >= most
        self._pop(first)
        batch, room = [first], most - first.frames  # below 0 where one item is more than the limit: it is never split
        found = self.share
        while room > 0 and found:
            found = False
            for stream in list(self._streams):
                item = self._streams[stream][0]
                if item.key == first.key and item.frames <= room:
                    self._pop(item)
                    batch.append(item)
                    room -= item.frames
                    found = True
                    if not room:
                        break
        self.left[self._why(room <= 0 or (crowd and self.max_wait > 0), drain)] += 1
        return batch

    def _why(self, full: bool, drain: bool) -> str:
        if not self.share:
            return "alone"
        if full:
            return "full"
        if drain:
            return "drain"
        return "max_wait" if self.max_wait else "device_free"

    def drain(self) -> list[Item[T]]:
        """Everything that waits, taken out."""
        items = [item for queue in self._streams.values() for item in queue]
        self._streams.clear()
        self.waiting = 0
        return items

    def _most(self, first: Item[T]) -> int:
        """Frames in the batch that ``first`` leaves with."""
        return self.max_batch if self.limit is None else min(self.max_batch, self.limit(first))

    def _oldest(self) -> Item[T]:
        return min((queue[0] for queue in self._streams.values()), key=lambda item: item.arrived)

    def _pop(self, item: Item[T]) -> None:
        """Take the head of its stream, and send the stream to the end of the line."""
        queue = self._streams[item.stream]
        taken = queue.popleft()
        assert taken is item
        self.waiting -= item.frames
        if queue:
            self._streams.move_to_end(item.stream)
        else:
            del self._streams[item.stream]
