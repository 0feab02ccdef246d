"""The error budget against a plain count over the same window."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_byoc.core.errorbudget import LEAST, SECONDS, ErrorBudget


def test_a_stream_that_only_fails_is_over_with_the_fiftieth_frame() -> None:
    budget = ErrorBudget(0.5)
    verdicts = [budget.spend(True, number / 25) for number in range(LEAST)]
    assert verdicts == [False] * (LEAST - 1) + [True]


@pytest.mark.parametrize(("share", "over"), [(0.5, False), (0.49, True), (0.0, True), (1.0, False)])
def test_every_other_frame(share: float, over: bool) -> None:
    budget = ErrorBudget(share)
    assert any(budget.spend(number % 2 == 1, number / 24) for number in range(500)) is over


def test_all_may_fail_where_the_share_is_one() -> None:
    budget = ErrorBudget(1.0)
    assert not any(budget.spend(True, number / 25) for number in range(500))


def test_a_bad_second_among_good_ones_is_forgiven_and_forgotten() -> None:
    budget = ErrorBudget(0.5)
    assert not any(budget.spend(25 * 3 <= number < 25 * 4, number / 25) for number in range(25 * 20))
    assert budget.failed == 0
    assert budget.frames <= 25 * SECONDS


def test_too_few_frames_are_no_verdict() -> None:
    budget = ErrorBudget(0.5)
    assert not any(budget.spend(True, number / 4) for number in range(1000)), "four a second, all of them failed"


@given(
    st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.01, 0.2, 0.9, 3.0, 11.0])), max_size=400),
    st.floats(0, 1),
)
def test_as_a_plain_count(frames: list[tuple[bool, float]], share: float) -> None:
    budget, now, seen = ErrorBudget(share), 0.0, list[tuple[int, bool]]()
    for failed, later in frames:
        now += later
        seen.append((int(now), failed))
        window = [bad for at, bad in seen if at > int(now) - SECONDS]
        expected = failed and len(window) >= LEAST and sum(window) > share * len(window)
        assert budget.spend(failed, now) == expected
        assert (budget.frames, budget.failed) == (len(window), sum(window))
