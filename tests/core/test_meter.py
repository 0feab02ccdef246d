"""Shares add up exactly to what was measured, per batch, per second and in total."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_byoc.core.meter import ENDED, KEPT_SECONDS, SECOND, Balance, Meter, Share, Usage, by_second, split

weights = st.lists(st.integers(0, 10**8), min_size=1, max_size=20).filter(any)
intervals = st.integers(0, 5 * SECOND)


@given(intervals, weights)
def test_split_is_exact_and_fair(interval: int, parts: list[int]) -> None:
    shares = split(interval, parts)
    assert sum(shares) == interval
    total = sum(parts)
    for share, weight in zip(shares, parts, strict=True):
        assert abs(share - interval * weight / total) <= 1 + 1e-6 * interval
        assert share >= 0
        assert weight or not share


def test_split_needs_weight() -> None:
    with pytest.raises(ValueError, match="more than 0"):
        split(5, [0, 0])


@given(st.integers(0, 10 * SECOND), st.integers(0, 10 * SECOND))
def test_by_second_covers_the_interval(start: int, length: int) -> None:
    pieces = by_second(start, start + length)
    assert sum(piece for _, piece in pieces) == length
    assert all(0 < piece <= SECOND for _, piece in pieces)
    assert [second for second, _ in pieces] == sorted({second for second, _ in pieces})


shares = st.builds(
    Share, st.sampled_from(["a", "b", "c"]), st.integers(1, 8), st.integers(1, 10**7), st.integers(0, 10**9)
)
batches = st.tuples(st.integers(0, 20 * SECOND), intervals, intervals, st.lists(shares, min_size=1, max_size=6))


@given(st.lists(batches, max_size=20))
def test_conservation(booked: list[tuple[int, int, int, list[Share]]]) -> None:
    meter = Meter()
    meter.open("a")
    meter.open("b")  # "c" is not: its share is in the common row
    end = 100 * SECOND
    for gap, compute, copy, parts in booked:
        end = end + gap % SECOND
        answered = meter.book(end, compute, copy, parts)
        assert sum(part[0] for part in answered) == compute
        assert sum(part[1] for part in answered) == copy
    total = Usage()
    for usage in meter.totals.values():
        total.add(usage)
    rows = Usage()
    for _, _, usage in meter.rows(end):
        rows.add(usage)
    for field in ("frames", "compute_ns", "copy_ns", "queue_ns"):
        assert getattr(total, field) == getattr(meter.device, field), field
        assert getattr(rows, field) == getattr(meter.device, field), field
    assert meter.device.batches == len(booked)


def test_time_is_entered_in_the_second_it_was_spent_in() -> None:
    meter = Meter()
    meter.book(10 * SECOND + SECOND // 4, SECOND // 2, 0, [Share("a", 2, 3, 7)])
    assert [(second, usage.compute_ns, usage.frames) for second, _, usage in meter.rows(11 * SECOND)] == [
        (9, SECOND // 4, 0),
        (10, SECOND // 4, 2),
    ]


def test_a_batch_counts_once_for_each_name() -> None:
    meter = Meter()
    meter.open("a")
    meter.open("b")
    meter.book(SECOND, 10, 0, [Share("a", 1, 1, 0), Share("a", 1, 1, 0), Share("b", 1, 1, 0)])
    assert meter.totals["a"].batches == meter.totals["b"].batches == meter.device.batches == 1
    assert meter.totals["a"].frames == 2


def test_rows_are_kept_for_a_minute_and_totals_for_ever() -> None:
    meter = Meter()
    meter.open("a")
    for second in range(200):
        meter.book(second * SECOND + 1, 1, 0, [Share("a", 1, 1, 0)])
    assert {second for second, _, _ in meter.rows(199 * SECOND)} == set(range(140, 200))
    assert len(meter.rows(199 * SECOND + KEPT_SECONDS * SECOND)) == 0
    assert meter.totals["a"].frames == 200
    assert meter.end("a").frames == 200
    assert meter.end("a") == Usage()
    meter.book(300 * SECOND, 1, 0, [Share("a", 1, 1, 0)])  # a frame that was still on the device
    assert {name: usage.frames for name, usage in meter.totals.items()} == {ENDED: 201}


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 10**9), st.integers(0, 10**9), st.integers(1, 99))))
def test_the_names_add_up_to_the_device_whenever_somebody_ends(batches: list[tuple[str, int, int, int]]) -> None:
    meter, handed = Meter(), 0
    for name, compute, copy, pixels in batches:
        meter.open(name)
        parts = meter.book(3 * SECOND, compute, copy, [Share(name, 1, pixels, 0), Share("late", 1, 7, 0)])
        handed += sum(map(sum, parts))
        if pixels % 2:
            meter.end(name)
        device, names = meter.spent()
        assert Balance(device, names, device, handed).error == 0.0


@pytest.mark.parametrize(
    ("balance", "error"),
    [
        (Balance(0, 0, 0, 0), 0.0),
        (Balance(1000, 980, 1000, 1000), 0.02),  # lost on the way to a name
        (Balance(1000, 1000, 500, 550), 0.05),  # handed out twice
        (Balance(0, 5, 0, 0), 5.0),
    ],
)
def test_the_error_is_the_larger_difference(balance: Balance, error: float) -> None:
    assert balance.error == error
