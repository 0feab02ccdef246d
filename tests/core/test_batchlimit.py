"""A batch that does not fit halves the limit at once; only time, and full ones that succeed, bring it back in steps."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gpu_byoc.core.batching import Batcher, Item
from gpu_byoc.core.batchlimit import MOST_PATIENCE, PATIENCE, BatchLimit

STEP = PATIENCE // 50


def test_down_at_once_and_up_in_steps() -> None:
    limit = BatchLimit(8)
    limit.failed(8, 100)
    assert limit.frames == 4
    limit.fitted(4, 100 + 2 * PATIENCE - 1)
    assert limit.frames == 4
    limit.fitted(2, 100 + 2 * PATIENCE)
    assert limit.frames == 4, "a batch with room for as much again says nothing about it"
    limit.fitted(4, 100 + 2 * PATIENCE)
    assert limit.frames == 8
    assert limit.patience == 2 * PATIENCE, "it has just failed at 8"
    limit.fitted(8, 100 + 4 * PATIENCE - 1)
    assert limit.patience == 2 * PATIENCE
    limit.fitted(8, 100 + 4 * PATIENCE)
    assert (limit.frames, limit.patience) == (8, PATIENCE)


def test_a_device_that_stays_short_is_asked_ever_less_often() -> None:
    limit, tries, now = BatchLimit(8), [], 0
    for _ in range(9):
        limit.failed(8, now)
        began = now
        while limit.frames < 8:
            now += STEP
            limit.fitted(limit.frames, now)
        tries.append((now - began) // PATIENCE)
    assert tries == [2, 4, 8, 16, 32, 64, 64, 64, 64], "but never less often than that"


@pytest.mark.parametrize(("frames", "most"), [(1, 8), (2, 6), (3, 8), (3, 16), (5, 24), (7, 8)])
def test_it_grows_back_whatever_the_size_of_the_jobs(frames: int, most: int) -> None:
    """Jobs are not split: the largest batch that they can fill is less than the limit where they do not divide it."""
    limit, now = BatchLimit(most), 0
    batcher: Batcher[int] = Batcher(most, limit=lambda first: limit.frames)

    def full() -> int:
        while batcher.waiting < 4 * most:
            batcher.add(Item(0, 0, "", frames, 0))
        return sum(item.frames for item in batcher.take(0))

    limit.failed(full(), now)
    assert limit.frames < most
    while limit.frames < most:
        now += PATIENCE
        assert now < 100 * PATIENCE
        limit.fitted(full(), now)


def test_one_frame_is_the_least_and_what_failed_counts_not_what_was_allowed() -> None:
    limit = BatchLimit(16)
    limit.failed(6, 0)
    assert limit.frames == 3
    for _ in range(5):
        limit.failed(limit.frames, 0)
    assert limit.frames == 1


def test_a_batch_that_falls_to_pieces_is_one_time_that_memory_ran_out() -> None:
    limit = BatchLimit(8)
    for size in (8, 4):
        limit.failed(size, 0)
    limit.fitted(2, 0)
    limit.fitted(2, 0)
    limit.failed(4, 0)  # the other half
    assert (limit.frames, limit.patience) == (2, 2 * PATIENCE)
    limit.failed(2, 0)
    assert (limit.frames, limit.patience) == (1, 2 * PATIENCE)
    limit.fitted(1, 0)
    limit.failed(1, 0)
    assert (limit.frames, limit.patience) == (1, 4 * PATIENCE), "it had fitted before: memory ran out again"


class Limit(RuleBasedStateMachine):
    """Against the rules written down a second time: what may change, by how much, and when."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = BatchLimit(13)
        self.now = self.changed = 0
        self.last = "fitted"

    @rule(frames=st.integers(1, 16))
    def failed(self, frames: int) -> None:
        before, patience = self.limit.frames, self.limit.patience
        self.limit.failed(frames, self.now)
        again = self.last == "fitted" and frames <= before
        self.changed, self.last = self.now, "failed"
        assert self.limit.frames == max(1, min(before, frames // 2))
        assert self.limit.patience == min(MOST_PATIENCE, patience * (1 + again))

    @rule(frames=st.integers(1, 16), step=st.integers(0, 3 * PATIENCE))
    def fitted(self, frames: int, step: int) -> None:
        before, patience = self.limit.frames, self.limit.patience
        self.now += step
        self.limit.fitted(frames, self.now)
        self.last = "fitted"
        if frames > before / 2 and self.now >= self.changed + patience:
            self.changed = self.now
            assert self.limit.frames == min(13, before * 2)
            assert self.limit.patience == (patience if before < 13 else PATIENCE)
        else:
            assert (self.limit.frames, self.limit.patience) == (before, patience)

    @invariant()
    def within_bounds(self) -> None:
        assert 1 <= self.limit.frames <= 13
        assert PATIENCE <= self.limit.patience <= MOST_PATIENCE


TestLimit = Limit.TestCase
