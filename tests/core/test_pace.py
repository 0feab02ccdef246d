from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpu_byoc.core.pace import BURST, Pace

STEPS = st.lists(st.tuples(st.floats(0, 5), st.floats(0, 300)), max_size=60)  # seconds later, amount


@given(STEPS, st.floats(1, 200))
def test_no_more_than_the_rate_and_one_burst(steps: list[tuple[float, float]], rate: float) -> None:
    pace, now, through = Pace(rate, 0.0), 0.0, list[tuple[float, float]]()
    for later, amount in steps:
        now += later
        if pace.affords(amount, now):
            through.append((now, amount))
    for at, (begin, _) in enumerate(through):  # over every span that begins and ends with something let through
        for end in range(at, len(through)):
            total = sum(amount for _, amount in through[at:end])
            assert total <= (rate * (through[end][0] - begin + BURST)) * (1 + 1e-9) + max(a for _, a in through)


def test_what_comes_steadily_at_the_rate_passes() -> None:
    pace = Pace(100.0, 0.0)
    assert all(pace.affords(10.0, at / 10) for at in range(1000))


def test_what_never_fits_passes_when_all_is_unspent() -> None:
    pace = Pace(10.0, 0.0)
    assert pace.affords(1000.0, 0.0)
    assert not pace.affords(1000.0, 50.0)
    assert pace.affords(1000.0, 102.0)


@given(STEPS, st.floats(1, 200))
def test_a_reader_who_waits_keeps_to_the_rate(steps: list[tuple[float, float]], rate: float) -> None:
    pace, now, total = Pace(rate, 0.0), 0.0, 0.0
    for later, amount in steps:
        now += later
        total += amount
        now += pace.wait(amount, now)
        assert total <= rate * (now + BURST) * (1 + 1e-9) + 1e-6


def test_within_the_burst_nobody_waits() -> None:
    pace = Pace(100.0, 5.0)
    assert pace.wait(200.0, 5.0) == 0.0
    assert pace.wait(50.0, 5.0) == 0.5
