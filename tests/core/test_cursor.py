"""What a trickle client asks next: answer by answer, against anything a server may say, and against our own channel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_byoc.core.cursor import (
    CLOSED,
    LATEST,
    OLDEST,
    PATIENCE,
    SEQ,
    STEP,
    Ask,
    Backoff,
    End,
    Publication,
    Read,
    Retry,
    Skip,
    Stored,
    Subscription,
    first_index,
)
from gpu_byoc.core.trickle import NEWEST, NEXT, RING, Ended, Limits, Segment, Trickle
from gpu_byoc.errors import ChannelFailed, ChannelMissing, SegmentFailed


def at(index: int) -> Subscription:
    """A subscriber that has been answered before, and asks for ``index``."""
    cursor = Subscription(index - 1)
    assert cursor.answered(200, {SEQ: str(index - 1)}) == Read(index - 1)
    return cursor


def absent(latest: int) -> dict[str, str]:
    return {LATEST: str(latest), SEQ: "whatever was asked for"}


# --- a subscriber, answer by answer


@pytest.mark.parametrize("start", [NEWEST, NEXT, 7])
def test_a_segment_then_the_next(start: int) -> None:
    cursor = Subscription(start)
    assert cursor.ask() == Ask(start)
    assert cursor.answered(200, {SEQ: "7"}) == Read(7)
    assert cursor.ask() == Ask(8)


def test_a_gap_is_counted() -> None:
    cursor = at(3)
    assert cursor.answered(200, {SEQ: "5"}) == Read(5, skipped=2)
    assert cursor.skipped == 2


@pytest.mark.parametrize("status", [200, 470, 500])
def test_closed_ends_whatever_else_is_said(status: int) -> None:
    assert Subscription(NEWEST).answered(status, {CLOSED: "", SEQ: "3", LATEST: "9"}) == End("closed")


def test_404_at_first_is_an_error_and_later_the_end() -> None:
    with pytest.raises(ChannelMissing, match="http://x/c: 404"):
        Subscription(NEWEST, label="http://x/c").answered(404, {})
    assert at(3).answered(404, {}) == End("gone")
    cursor = Subscription(5)
    cursor.answered(470, absent(9))
    assert cursor.answered(404, {}) == End("gone")


def test_too_slow_goes_on_at_what_comes_next() -> None:
    cursor = at(3)
    assert cursor.answered(470, absent(10)) == Ask(10, STEP)
    assert cursor.skipped == 7
    assert cursor.answered(200, {SEQ: "11"}) == Read(11, skipped=8), "both gaps are before this one"
    assert cursor.answered(200, {SEQ: "12"}) == Read(12)
    assert cursor.skipped == 8


@pytest.mark.parametrize(
    ("latest", "asked"),
    [(0, [0]), (1, [0, 1]), (3, [0, 1, 2, 3]), (RING, [0, 1, 2, 3, 4, 5]), (100, [0, 95, 96, 97, 98, 99, 100])],
)
def test_the_oldest_is_looked_for_at_once_and_what_is_gone_was_not_missed(latest: int, asked: list[int]) -> None:
    """A channel of which nothing is left: each index that the ring may hold is tried once."""
    cursor = Subscription(OLDEST)
    asks = [cursor.ask().seq]
    while asks[-1] < latest:
        ask = cursor.answered(470, absent(latest))
        assert ask == Ask(cursor.ask().seq), "without a pause"
        asks.append(cursor.ask().seq)
    assert asks == asked
    assert cursor.answered(200, {SEQ: str(latest)}) == Read(latest)
    assert cursor.answered(470, absent(latest + 9)) == Ask(latest + 9, STEP), "from here on it is like any other"
    assert cursor.skipped == 8


def test_the_oldest_that_is_there_is_read_and_all_after_it() -> None:
    root = Trickle(Limits(), now=0)
    channel = root.create("a", "", now=0)
    for number in range(12):
        channel.write(str(number).encode(), now=0)
    cursor, got = Subscription(OLDEST), list[str]()
    for _ in range(10):
        found = read_on(cursor, channel.find, lambda: channel.next_seq)
        if found is not None:
            got.append(found[1])
    assert got == ["8", "9", "10", "11"], "the ring of five has these, and the one that is to come"
    assert cursor.skipped == 0


def test_who_wants_every_one_reads_what_is_still_there() -> None:
    """The last message of a channel is the one that counts, and nothing may come after it."""
    root = Trickle(Limits(), now=0)
    channel = root.create("a", "", now=0)
    cursor, got = Subscription(0, every=True), list[str]()
    for number in range(12):
        channel.write(str(number).encode(), now=0)
        if number < 2:
            got.append(read_on(cursor, channel.find, lambda: channel.next_seq)[1])  # type: ignore[index]
    for _ in range(10):
        found = read_on(cursor, channel.find, lambda: channel.next_seq)
        if found is not None:
            got.append(found[1])
    assert got == ["0", "1", "8", "9", "10", "11"]
    assert cursor.skipped == 6


@pytest.mark.parametrize(("start", "every"), [(OLDEST, False), (0, True)])
def test_a_server_that_promises_more_and_more_is_not_asked_without_a_pause(start: int, every: bool) -> None:
    cursor = Subscription(start, every=every)
    pauses = [cursor.answered(470, absent(RING * step)).after for step in range(2, 40)]  # type: ignore[union-attr]
    assert pauses.count(0.0) == RING + 1
    assert pauses[RING + 1 :] == [STEP] * (38 - RING - 1)


def test_a_named_index_that_is_absent_skips_nothing_we_know_of() -> None:
    cursor = Subscription(NEWEST)
    assert cursor.answered(470, absent(10)) == Ask(10, STEP)
    assert cursor.skipped == 0


def test_one_ahead_waits_for_a_while_and_then_goes_back() -> None:
    cursor = at(3)
    for _ in range(PATIENCE - 1):
        assert cursor.answered(470, absent(2)) == Ask(3, STEP)
    assert cursor.answered(470, absent(2)) == Ask(2, STEP)
    assert cursor.skipped == 0


def test_patience_begins_anew_with_each_index() -> None:
    cursor = at(3)
    for index in range(3, 3 + 2 * PATIENCE):
        assert cursor.answered(470, absent(index - 1)) == Ask(index, STEP)
        assert cursor.answered(200, {SEQ: str(index)}) == Read(index)


def test_a_publisher_that_starts_over_is_followed() -> None:
    cursor = at(100)
    assert cursor.answered(470, absent(1)) == Ask(1, STEP)
    assert cursor.answered(200, {SEQ: "1"}) == Read(1)
    assert cursor.skipped == 0


def test_a_200_without_a_number_is_what_was_asked_for_or_nothing() -> None:
    cursor = Subscription(4)
    assert cursor.answered(200, {}) == Read(4)
    assert cursor.ask() == Ask(5)
    lost = Subscription(NEWEST, Backoff(attempts=2))
    assert lost.answered(200, {SEQ: "-2"}) == Ask(NEWEST, 0.25)
    with pytest.raises(ChannelFailed, match="no trickle server"):
        lost.answered(200, {})


@pytest.mark.parametrize("status", [301, 400, 401, 500, 503])
def test_failures_in_a_row_are_final_and_single_ones_are_not(status: int) -> None:
    cursor = at(3)
    for delay in (0.25, 0.5, 1.0, 2.0, 4.0):
        assert cursor.answered(status, {}) == Ask(3, delay)
    cursor.answered(200, {SEQ: "3"})
    for delay in (0.25, 0.5, 1.0, 2.0, 4.0):
        assert cursor.failed("no route to host") == Ask(4, delay)
    with pytest.raises(ChannelFailed, match="6 times in a row, the last time: no route to host"):
        cursor.failed("no route to host")


def test_a_470_without_latest_is_a_failure() -> None:
    assert at(3).answered(470, {LATEST: "soon"}) == Ask(3, 0.25)


def test_silence_is_no_failure() -> None:
    cursor = Subscription(NEWEST, Backoff(attempts=1))
    assert [cursor.quiet() for _ in range(1000)] == [Ask(NEWEST)] * 1000


def test_delays_are_bounded() -> None:
    assert Backoff(first=1, cap=3).delay(10_000) == 3


answers = st.lists(
    st.tuples(
        st.sampled_from([200, 200, 470, 404, 500]),
        st.sampled_from(["", "0", "5", "6", "x", "-2"]),
        st.sampled_from(["", "0", "4", "5", "6", "99", "-1"]),
        st.sampled_from([False] * 9 + [True]),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([OLDEST, NEWEST, NEXT, 0, 5]), st.booleans(), answers)
def test_whatever_a_server_answers(start: int, every: bool, given_answers: list[tuple[int, str, str, bool]]) -> None:
    cursor, failures, met, missed = Subscription(start, every=every), 0, False, 0
    seeking, tried = start == OLDEST, 0
    for status, seq, latest, closed in given_answers:
        headers = {name: value for name, value in ((SEQ, seq), (LATEST, latest)) if value}
        before = cursor.ask().seq
        try:
            decision = cursor.answered(status, headers | ({CLOSED: "terminated"} if closed else {}))
        except ChannelMissing:
            assert (status, met, closed) == (404, False, False)
            return
        except ChannelFailed:
            assert failures == 5
            return
        if isinstance(decision, End):
            assert closed or (status == 404 and met)
            return
        assert not closed
        assert status != 404
        asks = cursor.ask().seq
        if isinstance(decision, Read):
            assert status == 200
            assert asks == decision.seq + 1 > 0
            assert decision.skipped == cursor.skipped - missed
            assert decision.skipped >= (max(0, decision.seq - before) if before >= 0 else 0)
            met, failures, missed, seeking, tried = True, 0, cursor.skipped, False, 0
            continue
        assert decision.seq == asks
        if (seeking or every) and asks > before >= 0:
            assert asks <= int(latest)
            tried += 1
            assert decision.after == (STEP if tried > RING + 1 else 0)
            met, failures = True, 0
            continue
        assert decision.after >= STEP, "a server is never asked again at once"
        if status == 470 and latest.isdigit():
            assert asks in (before, int(latest))
            met, failures = True, 0
        else:
            assert asks == before
            failures += 1


# --- a subscriber and our own channel, without a wire in between


def read_on(
    cursor: Subscription, find: Callable[[int], Segment | None], latest: Callable[[], int]
) -> tuple[int, str] | None:
    """One GET that is not waited for: the index and text of a finished segment; None if there is none yet."""
    segment = find(cursor.ask().seq)
    if segment is None:
        cursor.answered(470, absent(latest()))
        return None
    if segment.ended is None:
        return None  # the GET waits, and is made anew
    assert isinstance(cursor.answered(200, {SEQ: str(segment.seq)}), Read)
    return segment.seq, b"".join(segment.chunks).decode()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["whole", "empty", "lost", "hole", "cut", "read", "read", "read"]), max_size=60))
def test_no_segment_is_lost_uncounted_and_none_comes_twice(events: list[str]) -> None:
    """A publisher with every kind of accident, and a reader that is sometimes too slow."""
    root = Trickle(Limits(), now=0)
    channel = root.create("a", "", now=0)
    cursor = Subscription(NEWEST)
    index, wrote, got = 0, [], []

    def read() -> None:
        segment = read_on(cursor, channel.find, lambda: channel.next_seq)
        if segment is not None:
            got.append(segment)

    for event in events:
        if event == "read":
            read()
            continue
        if event == "hole":  # the index is never posted
            index += 1
            continue
        segment = channel.publish(index)
        if event in ("whole", "cut"):
            channel.append(segment, str(index).encode(), now=0)
            wrote.append(index)
        if event == "lost":
            channel.leave(segment)
        elif event == "cut":
            channel.leave(segment)
            assert segment.ended is Ended.ABORTED
        else:
            channel.finish(segment)
        index += 1
    for last in range(index, index + 12):  # two turns of the ring release whatever was waited for
        segment = channel.publish(last)
        channel.append(segment, str(last).encode(), now=0)
        channel.finish(segment)
        wrote.append(last)
        for _ in range(PATIENCE + 2):
            read()
    order = [seq for seq, _ in got]
    assert order == sorted(set(order)), "in order, and none twice"
    assert all(text in ("", str(seq)) for seq, text in got)
    assert got[-1] == (index + 11, str(index + 11))
    missed = [seq for seq in wrote if order[0] <= seq and (seq, str(seq)) not in got]
    assert len(missed) <= cursor.skipped


# --- a publisher


def test_the_first_index() -> None:
    assert first_index(200, {LATEST: "7"}, "8") == 7
    assert first_index(200, {}, " 8\n") == 8
    assert first_index(200, {}, "<html>") is None
    assert first_index(502, {LATEST: "7"}, "7") is None
    with pytest.raises(ChannelMissing):
        first_index(404, {}, "Stream not found")


def test_indices_are_handed_out_once() -> None:
    place = Publication(5)
    assert [place.take() for _ in range(3)] == [5, 6, 7]


def test_what_the_answer_to_a_post_means() -> None:
    place = Publication(0)
    assert place.answered(0, 200, {}, "", sent=9, whole=True) == Stored()
    assert place.answered(1, 200, {}, "", sent=0, whole=True) == Stored()
    assert place.answered(2, 200, {}, "", sent=0, whole=False) == Skip()
    with pytest.raises(SegmentFailed, match="segment 3: the server ended it after 9 bytes") as caught:
        place.answered(3, 200, {}, "", sent=9, whole=False)
    assert caught.value.seq == 3
    assert place.answered(4, 200, {CLOSED: "terminated"}, "", sent=0, whole=False) == End("closed")
    assert place.answered(4, 404, {}, "", sent=0, whole=False) == End("gone")
    with pytest.raises(SegmentFailed, match="segment 5: HTTP 413: too large"):
        place.answered(5, 413, {}, "too large\n", sent=0, whole=False)


def test_404_to_a_publisher_at_first() -> None:
    with pytest.raises(ChannelMissing):
        Publication(0).answered(0, 404, {}, "", sent=0, whole=False)
    assert Publication(0, met=True).answered(0, 404, {}, "", sent=0, whole=False) == End("gone")


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_before_a_byte_has_left_a_post_is_repeated(status: int) -> None:
    place = Publication(0)
    assert place.answered(0, status, {}, "", sent=0, whole=False) == Retry(0.25)
    assert place.failed(0, "reset by peer", sent=0) == Retry(0.5)
    with pytest.raises(SegmentFailed):
        place.answered(0, status, {}, "", sent=1, whole=False)


def test_segments_lost_in_a_row_are_the_end_of_it() -> None:
    place = Publication(0, Backoff(attempts=3))
    for seq in range(2):
        with pytest.raises(SegmentFailed):
            place.failed(seq, "reset by peer", sent=1)
    place.answered(2, 200, {}, "", sent=1, whole=True)
    for seq in range(3, 5):
        with pytest.raises(SegmentFailed):
            place.failed(seq, "reset by peer", sent=1)
    with pytest.raises(ChannelFailed, match="3 segments lost in a row, now 5: reset by peer"):
        place.failed(5, "reset by peer", sent=1)


def test_a_server_that_stays_away() -> None:
    place = Publication(0)
    assert [place.failed(0, "refused", sent=0) for _ in range(5)] == [Retry(d) for d in (0.25, 0.5, 1.0, 2.0, 4.0)]
    with pytest.raises(ChannelFailed, match="6 times in a row, the last time: refused"):
        place.failed(0, "refused", sent=0)
