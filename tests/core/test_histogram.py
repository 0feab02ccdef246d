"""Counts by size, against counting one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_byoc.core.histogram import Histogram


@given(st.sets(st.integers(0, 1000), min_size=1), st.lists(st.tuples(st.integers(0, 1200), st.integers(1, 9))))
def test_it_counts_what_is_at_most_each_bound(bounds: set[int], values: list[tuple[int, int]]) -> None:
    histogram = Histogram(sorted(bounds))
    for value, times in values:
        histogram.add(value, times)
    reading = histogram.read()
    flat = [value for value, times in values for _ in range(times)]
    expected = [sum(value <= bound for value in flat) for bound in sorted(bounds)] + [len(flat)]
    assert (list(reading.upto), reading.total) == (expected, sum(flat))


@pytest.mark.parametrize("bounds", [(), (2, 1), (1, 1)])
def test_bounds_ascend(bounds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascend"):
        Histogram(bounds)
