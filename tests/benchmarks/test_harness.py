"""Windows, agreement, percentiles and sheets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness import (
    AGREE,
    BAND,
    Sheet,
    Size,
    Stable,
    Window,
    agreed,
    calls,
    marks,
    percentile,
    settle,
    spread,
    stable,
    together,
)

positive = st.floats(1e-9, 1e9)
some = st.lists(positive, min_size=1, max_size=60)


@given(some, st.floats(0, 1))
def test_a_percentile_is_one_of_the_values_with_enough_below_and_above(values: list[float], q: float) -> None:
    found = percentile(values, q)
    assert found in values
    at_most, at_least = sum(each <= found for each in values), sum(each >= found for each in values)
    assert at_most >= q * len(values) - 1e-6
    assert at_least >= (1 - q) * len(values) - 1e-6


@given(some, st.floats(0, 1), st.floats(0, 1))
def test_percentiles_rise(values: list[float], a: float, b: float) -> None:
    assert percentile(values, min(a, b)) <= percentile(values, max(a, b))


@pytest.mark.parametrize(("q", "wanted"), [(0, 1), (0.5, 50), (0.95, 95), (0.99, 99), (1, 100), (0.07, 7)])
def test_percentiles_by_nearest_rank(q: float, wanted: int) -> None:
    assert percentile(list(range(100, 0, -1)), q) == wanted


def test_no_values_no_percentile() -> None:
    with pytest.raises(ValueError, match="no percentile"):
        percentile([], 0.5)


@given(some, st.floats(1e-3, 1e3))
def test_a_spread_is_a_part_and_does_not_depend_on_the_unit(values: list[float], unit: float) -> None:
    assert 0 <= spread(values) <= 1
    assert spread([each * unit for each in values]) == pytest.approx(spread(values), abs=1e-9)
    assert spread(values[:1] * 3) == 0


@given(st.lists(positive, max_size=25), st.floats(0.001, 0.9))
def test_what_agreed_agrees_and_nothing_before_it_did(medians: list[float], band: float) -> None:
    first = agreed(medians, band)
    runs = [medians[at : at + AGREE] for at in range(max(0, len(medians) - AGREE + 1))]
    if first is None:
        assert all(spread(run) > band for run in runs)
    else:
        assert spread(runs[first]) <= band
        assert all(spread(run) > band for run in runs[:first])


def window(*seconds: float) -> Window:
    return Window(seconds, sum(seconds), 2 * sum(seconds))


def windows(*medians: float) -> tuple[Callable[[], Window], Iterator[float]]:
    """What gives one window after the other, each of one operation, and what is left of them."""
    left = iter(medians)
    return lambda: window(next(left)), left


def test_windows_go_on_until_three_agree_and_only_those_count() -> None:
    take, left = windows(99, 1, 2, 3, 3.1, 3.2, 77)
    found = settle(take)
    assert (found.stable, found.p50, found.operations) == (True, 3.1, 3)
    assert list(found.rounds) == [1, 2, 3, 3.1, 3.2]  # the 99 warmed up
    assert list(left) == [77]
    assert found.spread == pytest.approx(0.2 / 3.2)
    assert found.spread < BAND


def test_windows_that_never_agree_are_all_told_and_marked() -> None:
    take, left = windows(1, *range(1, 100))
    found = settle(take, Size.QUICK)
    assert not found.stable
    assert len(found.rounds) == Size.QUICK.most
    assert found.operations == Size.QUICK.most
    assert next(left) == Size.QUICK.most + 1
    assert found.figures()["unstable"] is True
    assert found.figures()["spread"] == pytest.approx(1 - 1 / Size.QUICK.most)


def test_the_slowest_to_agree_keeps_the_others_running_and_ratios_are_of_the_same_round() -> None:
    floor, _ = windows(9, 1, 1, 1, 10, 10, 10)
    ours, _ = windows(9, 2, 4, 3, 30, 30, 30)
    found = together({"floor": floor, "ours": ours})
    assert list(found["floor"].rounds) == [1, 1, 1, 10, 10, 10]
    assert (found["floor"].p50, found["ours"].p50) == (1, 30)
    assert found["ours"].ratio(found["floor"]) == 3  # the median of 2, 4, 3, 3, 3, 3: not 30


def test_a_row_is_as_sure_as_the_least_sure_of_what_it_is_made_of() -> None:
    sure = Stable((window(1.0), window(1.0), window(1.0)), (1, 1, 1), stable=True)
    shaky = Stable((window(1.0), window(2.0), window(4.0)), (1, 2, 4), stable=False)
    assert marks(sure) == {"spread": 0, "windows": 3}
    assert marks(sure, shaky) == {"spread": 0.75, "windows": 3, "unstable": True}


def test_figures_are_of_one_operation_and_cost_of_one_frame() -> None:
    found = Stable((window(0.1, 0.3), window(0.2)), (0.2, 0.2), stable=True)
    assert (found.operations, found.p50, found.p99) == (3, 0.2, 0.3)
    assert found.rate == pytest.approx(3 / 0.6)
    assert found.cpu == pytest.approx(0.4)
    assert found.figures(frames=4)["cpu_seconds_per_million_frames"] == pytest.approx(0.4 / 4 * 1e6)
    assert found.figures()["p50_us"] == pytest.approx(200_000)


def test_calls_are_timed_one_by_one() -> None:
    done = []
    found = calls(lambda: done.append(1), 0.0)()
    assert len(found.seconds) == len(done) == 3  # as many as make a median, however short
    assert sum(found.seconds) == pytest.approx(found.wall)
    assert stable(lambda: None, Size.TINY).p50 > 0


def test_a_sheet_keeps_rows_and_tells_of_each() -> None:
    told: list[tuple[int, int, str]] = []
    sheet = Sheet(Size.TINY, lambda it: told.append((len(it.rows), it.expected, it.now)))
    sheet.expect(3)
    sheet.doing("a")
    sheet.row("a", gb_per_s=1.5, batch=2, device_us=None)
    sheet.skip("b", "not here")
    sheet.fail("c", "wrong bytes")
    assert sheet.rows == [
        {"name": "a", "gb_per_s": 1.5, "batch": 2},
        {"name": "b", "skipped": "not here"},
        {"name": "c", "failed": "wrong bytes"},
    ]
    assert told == [(0, 3, ""), (0, 3, "a"), (1, 3, "a"), (2, 3, "a"), (3, 3, "a")]


def test_what_a_row_says_wins_over_what_was_measured() -> None:
    sheet = Sheet(Size.TINY)
    measured = Stable((window(1.0), window(1.0), window(1.0)), (1, 1, 1), stable=True)
    sheet.row("a", measured, p99_us=None, p50_us=5.0)
    assert sheet.rows[0]["p50_us"] == 5
    assert "p99_us" not in sheet.rows[0]


def test_two_rows_of_one_name_are_refused() -> None:
    sheet = Sheet(Size.TINY)
    sheet.skip("a", "not here")
    with pytest.raises(ValueError, match="a second row 'a'"):
        sheet.row("a", gb_per_s=math.pi)
