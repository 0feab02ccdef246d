"""No slot is lost or held twice, under any order of events and cancels."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpu_byoc.core.slots import Hold, SlotPool, State, Want


class Pool(RuleBasedStateMachine):
    """Drives a pool with everything that can happen and keeps books of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = SlotPool(5)
        self.holds: list[Hold] = []
        self.line: list[Want] = []
        self.turns: list[str] = []  # owners that wait; the first is next

    def tell(self, served: list[Want]) -> None:
        for want in served:
            assert want is self.next(), "served out of turn"
            assert want.hold is not None
            self.holds.append(want.hold)
            self.leave(want)
            if want.owner in self.turns:
                self.turns.append(self.turns.pop(0))

    def next(self) -> Want:
        return next(want for want in self.line if want.owner == self.turns[0])

    def leave(self, want: Want) -> None:
        self.line.remove(want)
        if all(other.owner != want.owner for other in self.line):
            self.turns.remove(str(want.owner))

    @rule(count=st.integers(1, 5), owner=st.sampled_from("abc"))
    def want(self, count: int, owner: str) -> None:
        want = self.pool.want(count, owner)
        if want.hold is None:
            self.line.append(want)
            if owner not in self.turns:
                self.turns.append(owner)
        else:
            assert not self.line, "overtook those who wait"
            self.holds.append(want.hold)

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        want = data.draw(st.sampled_from(self.line))
        self.leave(want)
        self.tell(self.pool.cancel(want))

    @precondition(lambda self: self.line)
    @rule(owner=st.sampled_from("abcd"))
    def rival(self, owner: str) -> None:
        """Whoever gives way has more than the newcomer even afterwards, and nobody has more; nobody is served by it."""
        waiting = Counter(str(want.owner) for want in self.line)
        rival = self.pool.rival(owner)
        if rival is None:
            assert max(waiting.values()) < waiting[owner] + 2
            return
        assert waiting[str(rival.owner)] == max(waiting.values()) >= waiting[owner] + 2
        assert rival is [want for want in self.line if want.owner == rival.owner][-1]
        self.leave(rival)
        assert self.pool.cancel(rival) == []

    @precondition(lambda self: self.holds)
    @rule(data=st.data(), event=st.sampled_from(["submit", "start", "finish", "release"]))
    def move(self, data: st.DataObject, event: str) -> None:
        hold = data.draw(st.sampled_from(self.holds))
        before = hold.state
        legal = {
            "submit": {State.HELD},
            "start": {State.QUEUED},
            "finish": {State.RUNNING, State.ABANDONED},
            "release": set(State),
        }[event]
        if before not in legal:
            with pytest.raises(ValueError, match="cannot"):
                self.pool.move(hold, event)
            assert hold.state is before
            return
        self.tell(self.pool.move(hold, event))

    @invariant()
    def every_slot_is_in_one_place(self) -> None:
        taken = [slot for hold in self.holds if hold.state is not State.FREE for slot in hold.slots]
        assert len(taken) == len(set(taken)), "held twice"
        assert len(taken) + self.pool.free == 5, "lost"

    @invariant()
    def nobody_waits_for_what_is_there(self) -> None:
        assert self.pool.waiting == len(self.line)
        if self.line:
            assert self.next().count > self.pool.free

    def teardown(self) -> None:
        """However it was left: when everything ends, all slots are free and nobody waits."""
        while self.line:
            want = self.line[-1]
            self.leave(want)
            self.tell(self.pool.cancel(want))
        for hold in self.holds:
            running = hold.state is State.RUNNING
            assert not self.pool.move(hold, "release")
            if running or hold.state is State.ABANDONED:
                assert not self.pool.move(hold, "finish")
        assert self.pool.free == 5


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_last_in_first_out() -> None:
    pool = SlotPool(3)
    first, second = pool.want(1).hold, pool.want(1).hold
    assert first is not None
    assert second is not None
    pool.move(first, "release")
    again = pool.want(1).hold
    assert again is not None
    assert again.slots == first.slots, "the memory that is still in the cache goes out first"


def test_neighbours_where_there_are_enough() -> None:
    pool = SlotPool(6)
    holds = [pool.want(1).hold for _ in range(6)]
    for index in (5, 0, 3, 2):  # free: 0 2 3 5
        hold = holds[index]
        assert hold is not None
        assert hold.slots == (index,)
        pool.move(hold, "release")
    pair = pool.want(2).hold
    assert pair is not None
    assert pair.slots == (2, 3)
    scattered = pool.want(2).hold
    assert scattered is not None
    assert scattered.slots == (0, 5)


def test_a_small_want_does_not_overtake_a_large_one() -> None:
    pool = SlotPool(2)
    one = pool.want(1).hold
    large, small = pool.want(2), pool.want(1)
    assert one is not None
    assert large.hold is None
    assert small.hold is None, "a free slot is kept for the one who came first"
    assert pool.move(one, "release") == [large]
    assert pool.cancel(small) == []


def test_who_holds_how_many_is_known_until_they_are_free() -> None:
    pool = SlotPool(3)
    first, second = pool.want(1, "a"), pool.want(2, "b")
    waits = pool.want(1, "a")
    assert (pool.held("a"), pool.held("b"), pool.held("c")) == (1, 2, 0)
    assert first.hold is not None
    assert second.hold is not None
    pool.move(second.hold, "submit")
    pool.move(second.hold, "start")
    assert pool.move(second.hold, "release") == []
    assert pool.held("b") == 2, "the device is not through with them"
    assert pool.move(second.hold, "finish") == [waits]
    assert (pool.held("a"), pool.held("b")) == (2, 0)
    assert pool.move(first.hold, "release") == []
    assert pool.move(first.hold, "release") == []
    assert pool.held("a") == 1, "given back once"


@pytest.mark.parametrize("count", [0, -1, 3])
def test_impossible_wants(count: int) -> None:
    with pytest.raises(ValueError, match="of 2 slots"):
        SlotPool(2).want(count)


def test_what_is_taken_one_by_one_lies_side_by_side_whatever_order_it_came_back_in() -> None:
    pool = SlotPool(8)
    holds = [pool.want(1).hold for _ in range(8)]
    for index in (5, 2, 7, 0, 3, 6, 1, 4):
        hold = holds[index]
        assert hold is not None
        pool.move(hold, "release")
    again = [want.hold.slots[0] for want in (pool.want(1) for _ in range(4)) if want.hold]
    assert again == [0, 1, 2, 3]
