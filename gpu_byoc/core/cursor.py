"""What a trickle client asks next, and what an answer means. No clock, no socket, no wait.

A subscriber's cursor::

    answer                                          what follows
    anything with Lp-Trickle-Closed                 End: the channel was closed, whatever the status and the body
    200, Lp-Trickle-Seq n                           Read n, then ask for n+1; n beyond what was asked for is a gap
    200 without a number                            a failure, unless a definite index was asked for: then it is that
    470, Lp-Trickle-Latest beyond what was asked    ask for Latest: we were too slow; what lies between is a gap
    ... and OLDEST was wanted, nothing read so far  ask for the oldest that the ring may hold, then the ones after it
    ... and every one is wanted                     the same; what the ring holds no more is a gap
    470, Latest one below                           wait and ask again: its publisher has not started the one before
    470, Latest further below                       ask for Latest: its publisher has started over
    404, after any good answer                      End: the channel is gone
    404, at first                                   ChannelMissing
    anything else, or none                          ask again with a growing delay; ChannelFailed after some in a row
    nothing for a while                             ask the same again: connections that carry nothing die unnoticed

A publisher's cursor::

    200 to a whole body                             Stored
    200 to a body without a byte so far             Skip: the server is done with this index, open the next one
    200 amid a body                                 SegmentFailed
    anything with Lp-Trickle-Closed, or 404         End (404 at first: ChannelMissing)
    no answer, 408, 429 or 5xx, before a byte left  Retry the same index with a growing delay
    any other answer or none                        SegmentFailed, and ChannelFailed after some in a row

Ends are values, errors are exceptions: SegmentFailed ends a segment, the others end the channel. Times are seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from gpu_byoc.core.trickle import RING
from gpu_byoc.errors import ChannelFailed, ChannelMissing, SegmentFailed

SEQ: Final = "Lp-Trickle-Seq"
LATEST: Final = "Lp-Trickle-Latest"
CLOSED: Final = "Lp-Trickle-Closed"
RESET: Final = "Lp-Trickle-Reset"

OLDEST: Final = -3
"""Where a subscriber may start that wants all there is. Never on the wire, which has no word for it: the index 0, and
where that is gone, what the ring may still hold."""

ABSENT: Final = 470
"""Status for an index that a channel does not have."""

STEP: Final = 0.25
"""Pause after a 470: livepeer_gateway waits 250 ms, go-livepeer's gateway 300 ms."""

PATIENCE: Final = 8
"""How often to ask again for an index whose forerunner has not started, before going back to the forerunner."""

_NUMBER = re.compile(r"[0-9]{1,19}")
_AGAIN = (408, 429)


@dataclass(frozen=True, slots=True)
class Backoff:
    """Delays after failures in a row: ``first``, doubling up to ``cap``; ``attempts`` failures are the last straw.
    The default gives a server 7.75 s to come back; the clients of go-livepeer and livepeer_gateway give it 1 to 3."""

    first: float = 0.25
    cap: float = 4.0
    attempts: int = 6

    def delay(self, failures: int) -> float:
        return min(self.cap, self.first * 2.0 ** min(failures - 1, 30))


@dataclass(frozen=True, slots=True)
class Ask:
    """GET this index (or NEXT, NEWEST) after so many seconds."""

    seq: int
    after: float = 0.0


@dataclass(frozen=True, slots=True)
class Read:
    """The body of this answer is segment ``seq``; ``skipped`` segments before it were missed. What to ask for
    meanwhile is ``Subscription.ask()``."""

    seq: int
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class End:
    """Nothing more will come, or be taken: ``closed`` (the server said so) or ``gone`` (404)."""

    why: str


@dataclass(frozen=True, slots=True)
class Stored:
    """The segment is complete on the server."""


@dataclass(frozen=True, slots=True)
class Skip:
    """The server wants nothing for this index. Go on with the next one."""


@dataclass(frozen=True, slots=True)
class Retry:
    """POST the same index again after so many seconds."""

    after: float


class Subscription:
    """A subscriber's place in a channel. ``skipped`` counts segments that were missed, over all."""

    def __init__(
        self, start: int, backoff: Backoff | None = None, label: str = "trickle", *, every: bool = False
    ) -> None:
        """``start`` is an index, NEXT, NEWEST or OLDEST. ``label`` begins the text of errors: the channel's URL.
        ``every``: who falls behind reads what there still is, and does not go on with what comes next."""
        self.skipped = 0
        self._label = label
        self._seeking = start == OLDEST  # what is gone before the first that is found was never ours to miss
        self._want = 0 if self._seeking else start
        self._every = every
        self._tried = 0  # indices asked for one after the other, for one that the ring still has
        self._backoff = backoff or Backoff()
        self._failures = 0
        self._ahead = 0  # 470s in a row for the index after the one that is to be written
        self._missed = 0  # segments that were gone, since the last one that was read
        self._met = False

    def ask(self) -> Ask:
        """What to ask for now. Then tell what came of it: ``answered``, ``failed`` or ``quiet``."""
        return Ask(self._want)

    def quiet(self) -> Ask:
        """No answer yet, and none was due: drop the request and make this one."""
        return self.ask()

    def failed(self, reason: str) -> Ask:
        """No answer, or no usable one.

        Raises:
            ChannelFailed: too often in a row.
        """
        self._failures += 1
        if self._failures >= self._backoff.attempts:
            raise ChannelFailed(f"{self._label}: no luck {self._failures} times in a row, the last time: {reason}")
        return Ask(self._want, self._backoff.delay(self._failures))

    def answered(self, status: int, headers: Mapping[str, str]) -> Ask | Read | End:
        """An answer's status and headers; the body is only of interest after ``Read``.

        Raises:
            ChannelMissing: there is no such channel.
            ChannelFailed: the last of several unusable answers.
        """
        if CLOSED in headers:
            return End("closed")
        if status == 404:
            if not self._met:
                raise _missing(self._label)
            return End("gone")
        if status == 200:
            return self._segment(headers)
        if status == ABSENT:
            return self._absent(headers)
        return self.failed(f"HTTP {status}")

    def _segment(self, headers: Mapping[str, str]) -> Ask | Read:
        seq = _number(headers, SEQ)
        if seq is None:
            if self._want < 0:
                return self.failed(f"a 200 without {SEQ}: this is no trickle server")
            seq = self._want
        self._progress()
        self._seeking, self._tried = False, 0
        gap = max(0, seq - self._want) if self._want >= 0 else 0
        self.skipped += gap
        skipped, self._missed = self._missed + gap, 0
        self._want = seq + 1
        return Read(seq, skipped)

    def _absent(self, headers: Mapping[str, str]) -> Ask:
        latest = _number(headers, LATEST)
        if latest is None:
            return self.failed(f"a {ABSENT} without {LATEST}")
        if (self._seeking or self._every) and 0 <= self._want < latest:
            self._progress()
            after = min(max(self._want + 1, latest - RING), latest)
            if not self._seeking:
                self._miss(after - self._want)
            self._want = after
            self._tried += 1
            return Ask(after, STEP if self._tried > RING + 1 else 0.0)
        ahead = self._ahead + 1 if latest == self._want - 1 else 0
        self._progress()
        if 0 < ahead < PATIENCE:
            self._ahead = ahead
            return Ask(self._want, STEP)
        if 0 <= self._want < latest:
            self._miss(latest - self._want)
        self._want = latest
        return Ask(latest, STEP)

    def _miss(self, count: int) -> None:
        self._missed += count
        self.skipped += count

    def _progress(self) -> None:
        self._met = True
        self._failures = self._ahead = 0


class Publication:
    """A publisher's place in a channel: the index of the segment that is opened next."""

    def __init__(self, first: int, backoff: Backoff | None = None, label: str = "trickle", met: bool = False) -> None:
        """``label`` begins the text of errors. ``met``: the channel is known to be there, so that 404 is its end."""
        self._label = label
        self.next = first
        self._backoff = backoff or Backoff()
        self._failures = 0
        self._met = met

    def take(self) -> int:
        """The index for one more segment. Tell what comes of its POST: ``answered`` or ``failed``."""
        self.next += 1
        return self.next - 1

    def answered(
        self, seq: int, status: int, headers: Mapping[str, str], text: str, sent: int, whole: bool
    ) -> Stored | Skip | Retry | End:
        """The answer to segment ``seq``'s POST; ``sent`` bytes had left by then, and ``whole`` says that the body had
        ended. ``text`` is what the server said, for the error message.

        Raises:
            SegmentFailed: this segment is lost.
            ChannelMissing: there is no such channel.
            ChannelFailed: several segments in a row were lost.
        """
        if CLOSED in headers:
            return End("closed")
        if status == 404:
            if not self._met:
                raise _missing(self._label)
            return End("gone")
        if status == 200:
            self._met, self._failures = True, 0
            if whole:
                return Stored()
            if not sent:
                return Skip()
            raise SegmentFailed(seq, f"the server ended it after {sent} bytes")
        reason = f"HTTP {status}: {text.strip()[:200]}"
        if status >= 500 or status in _AGAIN:
            return self.failed(seq, reason, sent)
        raise self._lost(seq, reason)

    def failed(self, seq: int, reason: str, sent: int) -> Retry:
        """The POST broke after ``sent`` bytes. Before the first one, nothing is lost yet.

        Raises:
            SegmentFailed: this segment is lost.
            ChannelFailed: several in a row were, or the server stays away.
        """
        if sent:
            raise self._lost(seq, reason)
        self._failures += 1
        if self._failures >= self._backoff.attempts:
            raise ChannelFailed(f"{self._label}: no luck {self._failures} times in a row, the last time: {reason}")
        return Retry(self._backoff.delay(self._failures))

    def _lost(self, seq: int, reason: str) -> SegmentFailed | ChannelFailed:
        self._failures += 1
        if self._failures >= self._backoff.attempts:
            return ChannelFailed(f"{self._label}: {self._failures} segments lost in a row, now {seq}: {reason}")
        return SegmentFailed(seq, reason)


def first_index(status: int, headers: Mapping[str, str], text: str, label: str = "trickle") -> int | None:
    """The index that ``GET {channel}/next`` answers with; None if this is no answer to go by.

    Raises:
        ChannelMissing: there is no such channel.
    """
    if status == 404:
        raise _missing(label)
    latest = _number(headers, LATEST)
    if status != 200:
        return None
    return latest if latest is not None or not _NUMBER.fullmatch(text.strip()) else int(text)


def _missing(label: str) -> ChannelMissing:
    return ChannelMissing(f"{label}: 404 from the server: a wrong URL, or nobody has created the channel")


def _number(headers: Mapping[str, str], name: str) -> int | None:
    text = headers.get(name, "")
    return int(text) if _NUMBER.fullmatch(text) else None
