"""Time stamps of 33 bits -> one timeline in 90 kHz ticks that never wraps and never goes back.

Values are the sender's own, plus a multiple of 2**33, as long as the sender counts on. Where it starts again (publisher
restarted, clip looped) everything after is moved so that it follows what came before; audio and video move by the same
amount, each when its own stamps jump.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gpu_byoc.media.mpegts import CLOCK, WRAP

JUMP: Final = 10 * CLOCK
"""Steps up to this are normal: a pause, a lost segment. Beyond, a stamp is believed when a second one agrees."""
_BACK: Final = CLOCK
"""A step back by less is a late unit, and dropped, unless it is trusted; by more it is a new start."""
_STEP: Final = CLOCK // 25
"""From the end of the old time to the start of the new."""


def apart(later: int, earlier: int) -> int:
    """Ticks from ``earlier`` to ``later`` the short way round the 33-bit circle."""
    return (later - earlier + WRAP // 2) % WRAP - WRAP // 2


@dataclass(slots=True)
class _Track:
    epoch: int = 0
    offset: int = 0
    last: int | None = None
    doubtful: int | None = None


class Timeline:
    """One for all tracks of a program."""

    def __init__(self) -> None:
        self._tracks: dict[str, _Track] = {}
        self._epoch = 0
        self._offset = 0
        self._latest: int | None = None

    def place(self, name: str, raw: int, trusted: bool) -> int | None:
        """The place of a unit of track ``name`` with decoding time ``raw``; None if the unit has to be dropped.

        ``trusted``: a jump is likely here (a keyframe, or the stream announced a discontinuity) and believed at once.
        Places of one track never decrease.
        """
        if (track := self._tracks.get(name)) is None:
            track = self._tracks[name] = _Track()
        place = self._first(track, raw) if track.last is None else self._next(track, track.last, raw, trusted)
        if place is None:
            track.doubtful = raw
            return None
        track.last, track.doubtful = place, None
        self._latest = place if self._latest is None else max(place, self._latest)
        return place

    def _first(self, track: _Track, raw: int) -> int | None:
        if self._latest is None:
            return raw
        track.epoch, track.offset = self._epoch, self._offset
        step = apart(raw + self._offset, self._latest)
        return self._latest + step if abs(step) <= JUMP else None

    def _next(self, track: _Track, last: int, raw: int, trusted: bool) -> int | None:
        step = apart(raw + track.offset, last)
        if 0 <= step <= JUMP:
            return last + step
        assert self._latest is not None
        if track.epoch != self._epoch:  # another track has started again; perhaps this one does it now
            near = apart(raw + self._offset, self._latest)
            if abs(near) <= JUMP:
                track.epoch, track.offset = self._epoch, self._offset
                return self._latest + near if self._latest + near >= last else None
        if -_BACK < step < 0 and not trusted:
            return None
        agreed = track.doubtful is not None and 0 <= apart(raw, track.doubtful) <= JUMP
        if not (trusted or agreed):
            return None
        if step > 0:
            return last + step
        self._epoch += 1
        self._offset = self._latest + _STEP - raw
        track.epoch, track.offset = self._epoch, self._offset
        return self._latest + _STEP
