"""Every item leaves exactly once, in its stream's order; no stream starves or is taken more than its share."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpu_byoc.core.batching import Batcher, Item

MAX_BATCH = 4


class Batching(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.count = 0
        self.batcher: Batcher[int] = Batcher(MAX_BATCH)
        self.waiting: list[Item[int]] = []  # by arrival

    @rule(stream=st.integers(0, 3), key=st.integers(0, 1), frames=st.integers(1, MAX_BATCH))
    def add(self, stream: int, key: int, frames: int) -> None:
        self.now += 1
        self.count += 1
        item = Item(self.count, stream, key, frames, self.now)
        self.batcher.add(item)
        self.waiting.append(item)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(self.waiting))
        assert self.batcher.cancel(item)
        assert not self.batcher.cancel(item), "cancelled twice"
        self.waiting.remove(item)

    @rule()
    def take(self) -> None:
        batch = self.batcher.take(self.now)
        assert bool(batch) == bool(self.waiting), "an idle device takes what is there, at once"
        if not batch:
            return
        assert batch[0] is self.waiting[0], "the oldest leaves first"
        assert len({item.key for item in batch}) == 1
        assert sum(item.frames for item in batch) <= MAX_BATCH
        heads = defaultdict(list)
        for item in self.waiting:
            heads[item.stream].append(item)
        taken = defaultdict(list)
        for item in batch:
            taken[item.stream].append(item)
        for stream, items in taken.items():
            assert items == heads[stream][: len(items)], "out of its stream's order"
        left_over = MAX_BATCH - sum(item.frames for item in batch)
        for stream, queue in heads.items():
            following = queue[len(taken[stream]) :]
            if following and following[0].key == batch[0].key and following[0].frames <= left_over:
                raise AssertionError("a place was left empty that somebody could have had")
        for item in batch:
            self.waiting.remove(item)

    @invariant()
    def counts(self) -> None:
        assert self.batcher.waiting == sum(item.frames for item in self.waiting)
        assert (self.batcher.due(self.now) is None) == (not self.waiting)

    def teardown(self) -> None:
        """Nothing is kept for ever: taking empties it, in at most as many batches as there are items."""
        for _ in range(len(self.waiting)):
            self.take()
        assert not self.waiting
        assert self.batcher.drain() == []


TestBatching = Batching.TestCase
TestBatching.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def item(stream: str, arrived: int = 0, frames: int = 1, key: str = "k") -> Item[str]:
    return Item(f"{stream}@{arrived}", stream, key, frames, arrived)


def test_one_streams_share_is_capped_while_others_wait() -> None:
    batcher: Batcher[str] = Batcher(4)
    for arrived in range(10):
        batcher.add(item("greedy", arrived))
    batcher.add(item("a", 20))
    batcher.add(item("b", 21))
    assert sorted(str(i.stream) for i in batcher.take(30)) == ["a", "b", "greedy", "greedy"]
    assert [i.value for i in batcher.take(30)] == ["greedy@2", "greedy@3", "greedy@4", "greedy@5"]


def test_waiting_for_company_is_counted_from_the_first() -> None:
    batcher: Batcher[str] = Batcher(3, max_wait=100)
    assert batcher.due(0) is None
    batcher.add(item("a", 10))
    assert batcher.take(50) == []
    assert batcher.due(50) == 110
    batcher.add(item("b", 60))
    assert batcher.due(60) == 110, "the second does not prolong the first one's wait"
    assert [i.stream for i in batcher.take(110)] == ["a", "b"]
    for stream in "abc":
        batcher.add(item(stream, 200))
    assert len(batcher.take(200)) == 3, "full: leaves at once"


def test_without_sharing_every_item_leaves_alone() -> None:
    batcher: Batcher[str] = Batcher(8, share=False)
    batcher.add(item("a", 1, frames=3))
    batcher.add(item("b", 2))
    assert [i.stream for i in batcher.take(3)] == ["a"]
    assert [i.stream for i in batcher.take(3)] == ["b"]


def test_it_says_why_each_batch_left() -> None:
    batcher: Batcher[str] = Batcher(2)
    for stream in "abc":
        batcher.add(item(stream))
    assert [len(batcher.take(1)), len(batcher.take(1)), len(batcher.take(1))] == [2, 1, 0]
    assert batcher.left == {"full": 1, "device_free": 1}

    patient: Batcher[str] = Batcher(3, max_wait=100)
    patient.add(item("a", 0))
    assert patient.take(50) == []
    assert len(patient.take(100)) == 1
    patient.add(item("a", 200))
    assert len(patient.take(201, drain=True)) == 1, "nobody waits for company any more"
    for stream, key in (("a", "k"), ("b", "k"), ("c", "other")):
        patient.add(item(stream, 300, key=key))
    assert [len(patient.take(300)), len(patient.take(400))] == [2, 1], "enough wait, though not all of one kind"
    assert patient.left == {"max_wait": 2, "drain": 1, "full": 1}

    single: Batcher[str] = Batcher(8, share=False)
    single.add(item("a"))
    single.take(0)
    assert single.left == {"alone": 1}


def test_drain_takes_everything() -> None:
    batcher: Batcher[str] = Batcher(2)
    items = [item("a", 1), item("a", 2), item("b", 3)]
    for each in items:
        batcher.add(each)
    assert set(batcher.drain()) == set(items)
    assert batcher.waiting == 0
    assert batcher.take(9) == []


@pytest.mark.parametrize("frames", [0, 3])
def test_an_item_must_fit_a_batch(frames: int) -> None:
    with pytest.raises(ValueError, match="a batch holds"):
        Batcher[str](2).add(item("a", frames=frames))


def test_a_limit_that_is_reached_is_full_and_waits_for_nobody() -> None:
    batcher: Batcher[str] = Batcher(8, max_wait=100, limit=lambda first: 2)
    batcher.add(item("a"))
    assert batcher.due(5) == 100
    batcher.add(item("b", arrived=3))
    assert batcher.due(5) == 5
    assert [i.stream for i in batcher.take(5)] == ["a", "b"]
    assert batcher.left == {"full": 1}


def test_a_limit_makes_batches_smaller_and_splits_no_item() -> None:
    limit = 2
    batcher: Batcher[str] = Batcher(8, limit=lambda first: limit)
    batcher.add(item("a", 1, frames=3))
    for arrived, stream in enumerate("bcde", start=2):
        batcher.add(item(stream, arrived))
    assert [i.stream for i in batcher.take(9)] == ["a"], "more than the limit: alone"
    assert [i.stream for i in batcher.take(9)] == ["b", "c"]
    limit = 100
    assert [i.stream for i in batcher.take(9)] == ["d", "e"]
