"""Stuck is what has not moved for as long as somebody has looked; everything else is busy, idle or asleep."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_byoc.core.vigil import Stuck, Vigil

DEVICE, BATCH, STEP = 1000, 300, 60


@pytest.fixture
def vigil() -> Vigil:
    return Vigil(DEVICE, BATCH, STEP)


def first(vigil: Vigil, looks: range, **seen: int | None) -> tuple[int, Stuck] | None:
    """When the alarm goes off, and for what, while the same is seen at every look."""
    for now in looks:
        found = vigil.look(now, **{"probe": None, "batch": None, "landed": 0} | seen)  # type: ignore[arg-type]
        if found is not None:
            return now, found
    return None


def test_a_batch_that_does_not_come_back(vigil: Vigil) -> None:
    assert first(vigil, range(0, 2000, 50), batch=1) == (BATCH, Stuck.PROCESSOR)


def test_a_device_that_does_not_answer(vigil: Vigil) -> None:
    assert first(vigil, range(0, 2000, 50), probe=1) == (DEVICE, Stuck.DEVICE)


def test_an_idle_device_is_well(vigil: Vigil) -> None:
    assert first(vigil, range(0, 100_000, 50)) is None


def test_busy_and_moving_is_well(vigil: Vigil) -> None:
    """One batch after the other, and a canary that waits behind all of them."""
    for now in range(0, 10_000, 50):
        assert vigil.look(now, probe=1, batch=now // 200, landed=now // 200) is None


def test_a_clock_that_jumps_or_a_process_that_was_stopped_is_no_alarm(vigil: Vigil) -> None:
    assert vigil.look(0, probe=1, batch=1, landed=0) is None
    assert vigil.look(10**12, probe=1, batch=1, landed=0) is None
    assert first(vigil, range(10**12 + 50, 10**12 + 2000, 50), probe=1, batch=1) == (10**12 + 250, Stuck.PROCESSOR)


def test_limits_of_zero_are_never_reached() -> None:
    assert first(Vigil(0, 0, STEP), range(0, 100_000, 50), probe=1, batch=1) is None


LOOKS = st.lists(
    st.tuples(
        st.integers(0, 200),  # time since the look before
        st.none() | st.integers(1, 2),  # probe
        st.none() | st.integers(1, 2),  # batch
        st.integers(0, 1),  # landed since
    ),
    max_size=80,
)


@given(LOOKS)
def test_the_alarm_goes_off_exactly_when_the_same_was_seen_for_the_limit(
    looks: list[tuple[int, int | None, int | None, int]],
) -> None:
    vigil = Vigil(DEVICE // 8, BATCH // 4, STEP)
    now = landed = 0
    seen: list[tuple[int, int | None, int | None, int]] = []  # awake time before this look, and what it saw
    for number, (step, probe, batch, more) in enumerate(looks):
        now, landed = now + step, landed + more
        seen.append((min(step, STEP) if number else 0, probe, batch, landed))
        assert vigil.look(now, probe, batch, landed) == expected(seen)


def expected(seen: list[tuple[int, int | None, int | None, int]]) -> Stuck | None:
    """By going back over all looks, as far as they saw the same."""

    def waited(same: list[object]) -> int:
        total = 0
        for at in range(len(seen) - 1, 0, -1):
            if same[at] is None or same[at] != same[at - 1]:
                break
            total += seen[at][0]
        return total

    if waited([None if probe is None else (probe, landed) for _, probe, _, landed in seen]) >= DEVICE // 8:
        return Stuck.DEVICE
    return Stuck.PROCESSOR if waited([batch for _, _, batch, _ in seen]) >= BATCH // 4 else None
