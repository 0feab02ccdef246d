"""Trickle channels against a model of the wire contract, and the rules one by one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from gpu_byoc.core.trickle import (
    CHANGES,
    CHUNK_COST,
    NEWEST,
    NEXT,
    Channel,
    Ended,
    Limits,
    Segment,
    Trickle,
    parse_index,
)
from gpu_byoc.errors import BadRequest, ChannelClosed, Overloaded, TooLarge


def channel(**limits: Any) -> Channel:
    return Trickle(Limits(**limits), now=0).create("a", "video/MP2T", now=0)


def put(at: Channel, index: int, *data: bytes, reset: bool = False, now: float = 0) -> Segment:
    """A whole POST."""
    segment = at.publish(index, reset)
    for each in data:
        at.append(segment, each, now)
    at.finish(segment)
    return segment


def content(segment: Segment | None) -> bytes:
    assert segment is not None
    return b"".join(segment.chunks)


# --- a model that says the same in other words: an endless list of segments, of which a window of slots is kept


@dataclass(eq=False)
class Shadow:
    """A segment of the model."""

    index: int
    text: bytes = b""
    open: bool = True
    posts: int = 0
    forsaken: bool = False
    anew: bool = False
    cut: bool = False


@dataclass
class Model:
    upcoming: int = 0
    kept: dict[int, Shadow] = field(default_factory=dict)  # by slot
    shut: bool = False

    def at(self, index: int) -> Shadow | None:
        one = self.kept.get(index % 5)
        return one if one and one.index == index else None

    def put(self, index: int, anew: bool = False) -> Shadow:
        if index % 5 in self.kept:
            self.kept[index % 5].open = False
        self.kept[index % 5] = Shadow(index, anew=anew)
        return self.kept[index % 5]

    def post(self, index: int, reset: bool) -> Shadow:
        index = self.upcoming if index == -1 else index
        one, holder = self.at(index), self.kept.get(index % 5)
        if one is None:
            one = self.put(index, anew=holder is not None and holder.index > index)
        elif not one.open and (reset or index + 1 != self.upcoming or one.cut or self.restarting(index)):
            one = self.put(index, anew=index + 1 < self.upcoming or (index + 1 == self.upcoming and not one.cut))
        one.posts += 1
        for lower in self.kept.values():
            lower.open &= not (reset and lower.index < index)
        return one

    def restarting(self, index: int) -> bool:
        lower = [one for one in self.kept.values() if one.index < index and one.anew]
        return any(one.posts and one.open and not one.text for one in lower)

    def body(self, one: Shadow, text: bytes) -> None:
        if not one.open:
            return
        if not one.text:
            before, self.upcoming = self.upcoming, one.index + 1
            for other in list(self.kept.values()):
                hole = other.forsaken and not other.posts and not other.text
                if other.index < one.index and hole:
                    other.open = False
                kept_open = other.open and other.posts and other.index < before
                if other.index > one.index and one.anew and one.index < before and not kept_open:
                    other.open = False
                    del self.kept[other.index % 5]
        one.text += text

    def end(self, one: Shadow) -> None:
        one.posts -= 1
        if one.open and not one.text:
            self.upcoming = one.index + 1
        one.open = False

    def vanish(self, one: Shadow) -> None:
        one.posts -= 1
        if not one.posts and one.text:
            one.cut |= one.open
            one.open = False
        elif not one.posts:
            one.forsaken = True

    def get(self, index: int) -> Shadow | None:
        if index < 0:
            index = self.upcoming if index == -1 else max(0, self.upcoming - 1)
        expected = index == self.upcoming or (index == 1 and self.upcoming == 0)
        return self.at(index) or (self.put(index) if expected and not self.shut else None)

    def delete(self, index: int) -> bool:
        one = self.at(index)
        if one is None:
            return False
        if one.open and not one.text:
            self.upcoming = max(self.upcoming, index + 1)
        one.open = False
        return True

    def close(self) -> None:
        self.shut = True
        for one in self.kept.values():
            one.open = False
        self.kept = {}


Pair = tuple[Segment, Shadow]


class Wire(RuleBasedStateMachine):
    """POSTs, their chunks and ends, GETs and DELETEs in any order, against the model after each of them."""

    posts: Bundle[Pair] = Bundle("posts")
    indices = st.one_of(st.integers(-1, 8), st.sampled_from([100, 101]))

    @initialize()
    def begin(self) -> None:
        self.root = Trickle(Limits(), now=0)
        self.channel = self.root.create("a", "video/MP2T", now=0)
        self.model = Model()
        self.known: dict[Segment, tuple[Shadow, int, bool]] = {}

    def know(self, segment: Segment, shadow: Shadow) -> Pair:
        self.known.setdefault(segment, (shadow, 0, False))
        return segment, shadow

    @rule(target=posts, index=indices, reset=st.booleans())
    def post(self, index: int, reset: bool) -> Pair:
        segment, shadow = self.channel.publish(index, reset), self.model.post(index, reset)
        return self.know(segment, shadow)

    @rule(pair=posts, data=st.binary(min_size=1, max_size=3))
    def body(self, pair: Pair, data: bytes) -> None:
        self.channel.append(pair[0], data, now=0)
        self.model.body(pair[1], data)

    @rule(pair=consumes(posts))
    def end(self, pair: Pair) -> None:
        self.channel.finish(pair[0])
        self.model.end(pair[1])

    @rule(pair=consumes(posts))
    def vanish(self, pair: Pair) -> None:
        self.channel.leave(pair[0])
        self.model.vanish(pair[1])

    @rule(index=st.one_of(indices, st.just(-2)))
    def get(self, index: int) -> None:
        segment, shadow = self.channel.find(index), self.model.get(index)
        assert (segment is None) == (shadow is None)
        if segment is not None and shadow is not None:
            self.know(segment, shadow)

    @rule(index=indices)
    def delete(self, index: int) -> None:
        if index >= 0 and self.model.delete(index):
            self.channel.release(index)
        else:
            with pytest.raises(BadRequest):
                self.channel.release(index)

    @invariant()
    def same(self) -> None:
        assert self.channel.next_seq == self.model.upcoming
        ring = {segment.seq % 5: segment.seq for segment in self.channel.segments}
        assert ring == {slot: one.index for slot, one in self.model.kept.items()}
        for segment, (shadow, _, _) in self.known.items():
            assert (segment.seq, content(segment)) == (shadow.index, shadow.text)
            assert (segment.ended is None) == shadow.open

    @invariant()
    def nobody_sleeps_through(self) -> None:
        """Every segment that has more bytes or an end since the last look is among the changed ones."""
        changed = self.root.changed()
        for segment, (shadow, chunks, ended) in self.known.items():
            now = (len(segment.chunks), segment.ended is not None)
            if now != (chunks, ended):
                assert segment in changed
            self.known[segment] = (shadow, *now)
        assert self.root.changed() == []

    def teardown(self) -> None:
        if not hasattr(self, "root"):
            return
        waited_for = [segment for segment in self.channel.segments if segment.ended is None]
        self.root.delete("a", now=0)
        self.model.close()
        assert set(waited_for) <= set(self.root.changed())
        assert all(segment.ended is Ended.CLOSED for segment in waited_for)
        self.same()
        with pytest.raises(ChannelClosed):
            self.channel.publish(0)
        assert self.channel.find(NEXT) is None


TestWire = Wire.TestCase
TestWire.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


# --- the rules one by one


def test_a_preconnect_moves_nothing_and_the_first_byte_does() -> None:
    a = channel()
    segment = a.publish(3)
    assert a.next_seq == 0
    a.append(segment, b"x", now=0)
    assert a.next_seq == 4


def test_an_empty_body_uses_up_its_index() -> None:
    a = channel()
    assert put(a, NEXT).ended is Ended.COMPLETE
    assert a.next_seq == 1


def test_a_fresh_channel_can_be_waited_on_at_four_indices_and_not_at_a_fifth() -> None:
    a = channel()
    assert [a.find(index) for index in (NEXT, NEWEST, 0)] == [a.find(0)] * 3
    assert a.find(1) is not None
    assert a.find(2) is None


@pytest.mark.parametrize("index", [-3, -5, -10])
def test_no_index_below_the_named_ones(index: int) -> None:
    a = channel()
    for call in (a.publish, a.find, a.release):
        with pytest.raises(BadRequest, match="Invalid idx"):
            call(index)
    with pytest.raises(BadRequest):
        a.publish(NEWEST)
    assert (a.next_seq, a.segments) == (0, [])


@pytest.mark.parametrize(("text", "index"), [("7", 7), ("+7", 7), ("-1", -1), ("007", 7), ("0" * 99 + "3", 3)])
def test_index_syntax(text: str, index: int) -> None:
    assert parse_index(text) == index


@pytest.mark.parametrize("text", ["", "x", "1.0", " 1", "1_0", "٣", "--1", "9" * 19, "9" * 5000, "next"])
def test_what_is_no_index(text: str) -> None:
    with pytest.raises(BadRequest, match="Invalid idx"):
        parse_index(text)


def test_the_ring_keeps_five_and_ends_what_it_drops() -> None:
    a = channel()
    first = a.publish(0)
    a.append(first, b"0", now=0)
    for index in range(1, 6):
        put(a, index, b"x")
    assert [segment.seq for segment in a.segments] == [5, 1, 2, 3, 4]
    assert first.ended is Ended.RELEASED
    assert a.find(0) is None
    a.append(first, b"late", now=0)
    assert content(first) == b"0"


def test_the_newest_finished_index_again_is_ignored() -> None:
    a = channel()
    put(a, 0, b"once")
    again = put(a, 0, b"twice")
    assert (content(again), a.next_seq) == (b"once", 1)


@pytest.mark.parametrize("written", [1, 2, 3, 4, 5, 6, 7, 11])
def test_a_publisher_that_starts_over_takes_its_readers_along(written: int) -> None:
    a = channel()
    for index in range(written):
        put(a, index, b"old")
    waiting = a.find(NEXT)
    assert waiting is not None
    if written == 1:
        put(a, 0, b"new", reset=True)  # without, it would be a repeat
    else:
        put(a, 0, b"new")
    assert (a.next_seq, content(a.find(NEWEST))) == (1, b"new")
    assert waiting.ended or waiting.seq == 1
    upcoming = a.find(NEXT)
    assert upcoming is not None
    assert (upcoming.seq, upcoming.chunks, upcoming.ended) == (1, [], None)


def test_starting_over_spares_what_the_new_publisher_has_opened_ahead() -> None:
    a = channel()
    for index in range(8):
        put(a, index, b"old")
    first, second = a.publish(0), a.publish(1)
    a.append(first, b"new", now=0)
    assert second.ended is None
    assert a.find(1) is second


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("written", range(2, 9))
def test_a_publisher_that_starts_over_and_opens_ahead_loses_no_index(written: int, cut: bool) -> None:
    """As publishers do: the next segment is opened before the first byte of this one."""
    a = channel()
    for index in range(written):
        put(a, index, b"old")
    if cut:
        torn = a.publish(written)
        a.append(torn, b"half", now=0)
        a.leave(torn)
    ahead = a.publish(0)
    for index in range(8):
        segment, ahead = ahead, a.publish(index + 1)
        assert a.find(index) is segment, "readers wait for what the publisher has open"
        a.append(segment, b"new%d" % index, now=0)
        assert segment.ended is None
        assert ahead.ended is None, "not taken for a repeat of the old one, nor for a leftover"
        a.finish(segment)
        assert (a.next_seq, content(a.find(NEWEST))) == (index + 1, b"new%d" % index)


def test_the_newest_index_that_was_cut_off_may_be_written_again_and_its_readers_wait_for_the_next() -> None:
    a = channel()
    torn = a.publish(0)
    a.append(torn, b"half", now=0)
    a.leave(torn)
    waiting = a.find(1)
    put(a, 0, b"whole")
    assert waiting is not None
    assert (content(a.find(0)), a.next_seq) == (b"whole", 1)
    assert waiting.ended is None


def test_an_index_that_comes_late_is_no_new_start() -> None:
    a = channel()
    put(a, 0, b"0")
    a.find(1)
    put(a, 2, b"2")
    put(a, 1, b"1")
    assert content(a.find(2)) == b"2"


def test_reset_ends_lower_segments_and_keeps_their_bytes() -> None:
    a = channel()
    lower = a.publish(0)
    a.append(lower, b"half", now=0)
    a.publish(1, reset=True)
    assert lower.ended is Ended.RELEASED
    assert content(a.find(0)) == b"half"


def test_a_publisher_that_vanishes_amid_a_segment_ends_it_unless_another_is_at_it() -> None:
    a = channel()
    segment = a.publish(0)
    a.append(segment, b"x", now=0)
    assert a.publish(0) is segment
    a.leave(segment)
    assert segment.ended is None
    a.leave(segment)
    assert segment.ended is Ended.ABORTED


def test_a_hole_is_released_when_a_later_index_starts_and_not_before() -> None:
    a = channel()
    hole = a.publish(0)
    a.leave(hole)
    assert (hole.ended, a.next_seq) == (None, 0)
    assert a.publish(0) is hole  # the same index on a new connection
    a.leave(hole)
    later = a.publish(1)
    assert hole.ended is None
    a.append(later, b"x", now=0)
    assert hole.ended is Ended.RELEASED


def test_a_hole_that_its_publisher_has_come_back_to_is_none() -> None:
    a = channel()
    a.leave(a.publish(0))
    back = a.publish(0)
    put(a, 1, b"later index, earlier byte")
    a.append(back, b"x", now=0)
    assert content(a.find(0)) == b"x"


def test_deleting_a_silent_segment_moves_on_and_never_back() -> None:
    a = channel()
    a.publish(0)
    a.release(0)
    assert a.next_seq == 1
    old = a.publish(2)
    put(a, 6, b"x")
    a.release(2)
    assert (old.ended, a.next_seq) == (Ended.RELEASED, 7)
    with pytest.raises(BadRequest, match="Nonexistent segment"):
        a.release(4)


def test_reuse_of_a_silent_slot_does_not_move_the_index_back() -> None:
    a = channel()
    silent = a.publish(0)
    put(a, 4, b"x")
    a.publish(5)
    assert silent.ended is Ended.RELEASED
    a.finish(silent)
    assert a.next_seq == 5


def test_over_the_bound_of_a_segment() -> None:
    a = channel(segment=100 + CHUNK_COST)
    segment = a.publish(0)
    a.append(segment, b"x" * 60, now=0)
    with pytest.raises(TooLarge, match="segment 0 of channel a: a segment may have 164 bytes"):
        a.append(segment, b"x" * 41, now=0)
    assert segment.ended is Ended.REFUSED
    assert content(segment) == b"x" * 60
    a.leave(segment)
    assert content(put(a, NEXT, b"y" * 100)) == b"y" * 100


def test_a_first_chunk_over_the_bound_uses_up_its_index() -> None:
    a = channel(segment=100)
    segment = a.publish(0)
    with pytest.raises(TooLarge):
        a.append(segment, b"x" * 101, now=0)
    assert (a.next_seq, a.held) == (1, 0)


def test_over_the_bound_of_a_channel_until_the_ring_turns() -> None:
    a = channel(segment=200, channel=700)
    for index in range(4):
        put(a, index, b"x" * 100)
    with pytest.raises(TooLarge, match="together"):
        put(a, 4, b"x" * 100)
    assert a.held == 4 * (100 + CHUNK_COST)
    put(a, 5, b"x" * 100)  # takes the slot of 0
    assert a.held == 4 * (100 + CHUNK_COST)


def test_tiny_chunks_count_what_they_cost() -> None:
    a = channel(segment=10 * (CHUNK_COST + 1))
    segment = a.publish(0)
    for _ in range(10):
        a.append(segment, b"x", now=0)
    with pytest.raises(TooLarge):
        a.append(segment, b"x", now=0)


def test_bytes_keep_a_channel_from_being_idle() -> None:
    root = Trickle(Limits(idle=300), now=0)
    a, _, _ = (root.create(name, "", now=0) for name in ("a", "b", "_kept"))
    long = a.publish(0)
    for now in range(0, 1000, 100):
        a.append(long, b"x", now=now)
    assert root.sweep(now=299) == []
    assert root.sweep(now=1000) == ["b"]
    assert root.sweep(now=1199) == []
    assert root.sweep(now=1200) == ["a"]
    assert list(root.channels) == ["_kept"]
    assert long.ended is Ended.CLOSED


def test_names_and_the_bound_on_them() -> None:
    root = Trickle(Limits(channels=2), now=0)
    a = root.create("a", "video/MP2T", now=0)
    put(a, 0, b"x")
    assert root.create("a", "text/plain", now=0) is a
    assert a.mime == "video/MP2T"
    root.create("b", "", now=0)
    with pytest.raises(Overloaded, match="2 channels"):
        root.create("c", "", now=0)
    assert (root.delete("a", now=0), root.delete("a", now=0)) == (True, False)
    assert root.create("a", "", now=0).next_seq == 0


def test_the_changefeed() -> None:
    root = Trickle(Limits(idle=10), now=0, changefeed=True)
    feed = root.channels[CHANGES]
    root.create("a", "", now=0)
    root.create("a", "", now=0)
    root.create("b", "", now=5)
    root.delete("b", now=6)
    waiting = feed.find(NEXT)
    root.sweep(now=12)
    said = [json.loads(content(segment)) for segment in sorted(feed.segments, key=lambda each: each.seq)[:-1]]
    assert said == [{"added": ["a"]}, {"added": ["b"]}, {"removed": ["b"]}, {"removed": ["a"]}]
    assert waiting is feed.find(4)
    assert content(waiting) == b'{"removed":["a"]}'
    root.close()
    assert feed.next_seq == 5


def test_the_changefeed_begins_with_itself() -> None:
    root = Trickle(Limits(), now=0, changefeed=True)
    assert content(root.channels[CHANGES].find(0)) == b'{"added":["_changes"]}'
