"""Trickle channels: who may write and read which segment, and who is released when. No clock, no socket, no wait.

A channel keeps segments in a ring of five: index ``i`` lives in slot ``i mod 5``, and another index in the same slot
ends the one before. A segment, from its publisher's and its readers' side::

    OPEN  --append----------------------------------------> OPEN       readers get the bytes
    OPEN  --finish----------------------------------------> COMPLETE
    OPEN  --leave, after bytes, by the last publisher-----> ABORTED    cut off: readers are not left waiting
    OPEN  --leave, before a byte--------------------------> OPEN       the publisher may come back to it ...
    OPEN  --... and a later index starts------------------> RELEASED   ... but now it is a hole
    OPEN  --deleted, slot reused, reset, or made obsolete-> RELEASED
    OPEN  --append, over a bound--------------------------> REFUSED
    OPEN  --channel deleted, swept or shut down-----------> CLOSED

``next_seq`` is the index that is expected next. It is assigned, not maximised, when a segment gets its first byte or
completes without one, so that a publisher that starts over at 0 takes its readers along.

Readers are positions: a number of chunks already seen of ``Segment.chunks``. Chunks are shared, never copied here, and
survive as long as somebody reads them. Whatever happens, ``changed()`` says which segments to look at again.

Times are seconds of any one clock that does not run backwards.
"""

from __future__ import annotations

import enum
import json
import re
from dataclasses import dataclass, field
from typing import Final

from gpu_byoc.errors import BadRequest, ChannelClosed, Overloaded, TooLarge

RING: Final = 5
"""Segments held per channel, as in go-livepeer."""

NEXT: Final = -1
"""Asks for the segment that is expected next."""

NEWEST: Final = -2
"""Asks, as a reader, for the newest segment that has started."""

CHANGES: Final = "_changes"
"""Name of the channel that says which channels come and go."""

CHUNK_COST: Final = 64
"""Bytes that a chunk counts on top of its length: what CPython needs to hold it, so that a body of one-byte chunks
does not take forty times what the bounds say."""

_INDEX = re.compile(r"[+-]?0*[0-9]{1,19}")  # as Go's Atoi; \d would let other scripts' digits in
_LARGEST = (1 << 63) - 2  # the index after it still fits the 64 bits that others keep it in


class Ended(enum.Enum):
    """Why a segment takes no more bytes."""

    COMPLETE = "complete"
    ABORTED = "aborted"
    RELEASED = "released"
    REFUSED = "refused"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds. ``segment`` and ``channel`` (all segments in its ring) are bytes: 64 MiB is a 2 s segment at 250 Mbit/s.
    ``idle`` is after how many seconds without a byte a channel is swept: five minutes, as in go-livepeer."""

    segment: int = 64 << 20
    channel: int = 128 << 20
    channels: int = 4096
    idle: float = 300.0


@dataclass(slots=True, eq=False)
class Segment:
    """``chunks`` only grows. ``publishers`` are at it now; ``left`` says that one went away without a byte."""

    seq: int
    chunks: list[bytes] = field(default_factory=list)
    cost: int = 0
    ended: Ended | None = None
    publishers: int = 0
    left: bool = False
    restart: bool = False

    def __repr__(self) -> str:
        state = self.ended.value if self.ended else "open"
        return f"<Segment {self.seq} {state}, {len(self.chunks)} chunks, {self.publishers} publishers>"


def parse_index(text: str) -> int:
    """An index as it stands in a path: optional sign, leading zeros allowed, 64 bits.

    Raises:
        BadRequest: it is not one.
    """
    if not _INDEX.fullmatch(text) or abs(index := int(text)) > _LARGEST:
        raise BadRequest("Invalid idx")
    return index


class Channel:
    """One channel. After each call that is not a question, look at what ``Trickle.changed()`` returns."""

    def __init__(self, name: str, mime: str, limits: Limits, now: float, changed: list[Segment]) -> None:
        self.name = name
        self.mime = mime
        self.next_seq = 0
        self.closed = False
        self.last_byte = now  # or creation
        self._limits = limits
        self._changed = changed
        self._ring: list[Segment | None] = [None] * RING

    @property
    def segments(self) -> list[Segment]:
        """What is in the ring, by slot."""
        return [segment for segment in self._ring if segment]

    @property
    def held(self) -> int:
        """Bytes that the ring keeps in memory."""
        return sum(segment.cost for segment in self.segments)

    # --- a publisher

    def publish(self, index: int, reset: bool = False) -> Segment:
        """A publisher is here for ``index`` (or NEXT). Give what it sends to ``append``, and end with ``finish`` or
        ``leave``, once. Where the segment has ended already, its body is not wanted.

        The newest index again, once complete, is a repeat of it and is ignored; cut off, it is another publisher's that
        goes on there. An older finished one, or one whose slot holds a higher index, is a publisher that starts over;
        so is the newest while a lower one that starts over is silent, as publishers open the next segment before they
        write the first. With ``reset``, lower segments are released.

        Raises:
            BadRequest: no such index can be written.
            ChannelClosed: nothing can.
        """
        if self.closed:
            raise ChannelClosed(f"channel {self.name} is closed")
        seq = self.next_seq if index == NEXT else index
        if seq < 0:
            raise BadRequest("Invalid idx")
        segment = self._ring[seq % RING]
        if segment is None or segment.seq != seq:
            over = segment is not None and segment.seq > seq
            segment = self._store(seq)
            segment.restart = over
        elif segment.ended and (reset or not self._repeats(segment)):
            goes_on = segment.ended is Ended.ABORTED and seq == self.next_seq - 1
            segment = self._store(seq)
            segment.restart = seq < self.next_seq and not goes_on
        segment.publishers += 1
        if reset:
            for other in self.segments:
                if other.seq < seq:
                    self._end(other, Ended.RELEASED)
        return segment

    def append(self, segment: Segment, data: bytes, now: float) -> None:
        """Bytes from a publisher. Those that come after the segment's end are dropped, as the wire wants it.

        Raises:
            TooLarge: over a bound. The segment has ended; tell the publisher, then ``leave``.
        """
        if segment.ended or not data:
            return
        cost = len(data) + CHUNK_COST
        if segment.cost + cost > self._limits.segment:
            self._refuse(segment, f"a segment may have {self._limits.segment} bytes; start the next one earlier")
        if self.held + cost > self._limits.channel:
            self._refuse(segment, f"the segments of a channel may have {self._limits.channel} bytes together")
        first = not segment.chunks
        segment.chunks.append(data)
        segment.cost += cost
        self.last_byte = now
        self._changed.append(segment)
        if first:
            self._started(segment)

    def finish(self, segment: Segment) -> None:
        """A publisher's body ended as it should. An empty body uses up its index."""
        segment.publishers -= 1
        if segment.ended is None and not segment.chunks:
            self.next_seq = segment.seq + 1
        self._end(segment, Ended.COMPLETE)

    def leave(self, segment: Segment) -> None:
        """A publisher vanished. With bytes, and nobody else at it, the segment is cut off. Without, it stays: the same
        index may be posted again on a new connection."""
        segment.publishers -= 1
        if segment.publishers:
            return
        if segment.chunks:
            self._end(segment, Ended.ABORTED)
        else:
            segment.left = True

    def write(self, data: bytes, now: float) -> None:
        """A whole segment from this process, at NEXT. The one after it exists at once, for readers to wait on."""
        segment = self.publish(NEXT)
        try:
            self.append(segment, data, now)
        except TooLarge:
            self.leave(segment)
            raise
        self.finish(segment)
        self.find(NEXT)

    # --- a reader

    def find(self, index: int) -> Segment | None:
        """The segment to read for ``index``, NEXT or NEWEST; None where there is none and ``next_seq`` says where to
        go on. The next one may be waited for before anybody writes it; on a fresh channel index 1 may be, too.

        Raises:
            BadRequest: no such index can be read.
        """
        seq = {NEXT: self.next_seq, NEWEST: max(self.next_seq - 1, 0)}.get(index, index)
        if seq < 0:
            raise BadRequest("Invalid idx")
        segment = self._ring[seq % RING]
        if segment is not None and segment.seq == seq:
            return segment
        if not self.closed and (seq == self.next_seq or (seq == 1 and self.next_seq == 0)):
            return self._store(seq)
        return None

    # --- endings

    def release(self, index: int) -> None:
        """Segment DELETE: its readers and its silent publisher need not wait for it any longer.

        Raises:
            BadRequest: there is no such segment.
        """
        if index < 0:
            raise BadRequest("Invalid idx")
        segment = self._ring[index % RING]
        if segment is None or segment.seq != index:
            raise BadRequest("Nonexistent segment")
        if segment.ended is None and not segment.chunks:
            self.next_seq = max(self.next_seq, index + 1)  # never back: others may be ahead of it
        self._end(segment, Ended.RELEASED)

    def close(self) -> None:
        """The end of everything here. Readers keep what they are reading."""
        self.closed = True
        for segment in self.segments:
            self._end(segment, Ended.CLOSED)
        self._ring = [None] * RING

    def _repeats(self, segment: Segment) -> bool:
        """Whether somebody who posts this finished segment again has nothing new to say."""
        if segment.seq != self.next_seq - 1 or segment.ended is Ended.ABORTED:
            return False
        begun = (each for each in self.segments if each.restart and each.publishers and each.seq < segment.seq)
        return all(each.chunks or each.ended for each in begun)

    def _store(self, seq: int) -> Segment:
        before = self._ring[seq % RING]
        if before is not None:
            self._end(before, Ended.RELEASED)
        segment = self._ring[seq % RING] = Segment(seq)
        return segment

    def _end(self, segment: Segment, why: Ended) -> None:
        if segment.ended is None:
            segment.ended = why
            self._changed.append(segment)

    def _refuse(self, segment: Segment, rule: str) -> None:
        if not segment.chunks:
            self.next_seq = segment.seq + 1
        self._end(segment, Ended.REFUSED)
        raise TooLarge(f"segment {segment.seq} of channel {self.name}: {rule}")

    def _started(self, segment: Segment) -> None:
        """First byte: the expected index moves, and what it made obsolete is let go of."""
        before, self.next_seq = self.next_seq, segment.seq + 1
        for slot, other in enumerate(self._ring):
            if other is None or other is segment:
                continue
            if other.seq < segment.seq and other.left and not other.publishers and not other.chunks:
                self._end(other, Ended.RELEASED)  # nobody will fill this hole
            elif segment.restart and before > segment.seq < other.seq and _stale(other, before):
                self._end(other, Ended.RELEASED)
                self._ring[slot] = None


def _stale(segment: Segment, before: int) -> bool:
    """Whether a higher segment is from before a restart, and not one that its publisher has opened ahead since.
    ``before`` is what was expected next then."""
    return segment.ended is not None or not segment.publishers or segment.seq >= before


class Trickle:
    """All channels of a server, by name. With ``changefeed``, CHANGES says which come and go."""

    def __init__(self, limits: Limits, now: float, changefeed: bool = False) -> None:
        self.limits = limits
        self.channels: dict[str, Channel] = {}
        self._changed: list[Segment] = []
        if changefeed:
            self.create(CHANGES, "application/json", now)

    def create(self, name: str, mime: str, now: float) -> Channel:
        """The channel of this name, which keeps its type if it exists already.

        Raises:
            Overloaded: there are too many.
        """
        channel = self.channels.get(name)
        if channel is None:
            if len(self.channels) >= self.limits.channels:
                raise Overloaded(f"{len(self.channels)} channels are open, and no more are allowed; delete some")
            channel = self.channels[name] = Channel(name, mime, self.limits, now, self._changed)
            self._tell("added", name, now)
        return channel

    def delete(self, name: str, now: float) -> bool:
        """Close and forget; False if there was none. Its name is free at once."""
        channel = self.channels.pop(name, None)
        if channel is None:
            return False
        channel.close()
        self._tell("removed", name, now)
        return True

    def sweep(self, now: float) -> list[str]:
        """Delete the channels that got no byte for the idle time; names that begin with ``_`` stay. Returns which."""
        idle = [
            name
            for name, channel in self.channels.items()
            if not name.startswith("_") and now - channel.last_byte >= self.limits.idle
        ]
        for name in idle:
            self.delete(name, now)
        return idle

    def close(self) -> None:
        """Close all channels, without a word on CHANGES: it ends as well."""
        for channel in self.channels.values():
            channel.close()
        self.channels.clear()

    def changed(self) -> list[Segment]:
        """Segments with new bytes or an end since the last call. Wake their readers and their publishers."""
        changed, self._changed[:] = self._changed[:], []
        return changed

    def _tell(self, what: str, name: str, now: float) -> None:
        feed = self.channels.get(CHANGES)
        if feed is not None:
            feed.write(json.dumps({what: [name]}, separators=(",", ":")).encode(), now)
