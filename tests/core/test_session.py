"""A stream's life and its numbers, without a clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_byoc.core.session import Session, State

EVENTS = ["frame", "stop", "input_ended", "flushed", "failed"]


@given(st.lists(st.sampled_from(EVENTS), max_size=20))
def test_a_life_ends_once_and_keeps_its_first_reason(events: list[str]) -> None:
    session, first = Session(began=0.0), None
    for number, event in enumerate(events):
        before = session.state
        try:
            changed = session.happen(event, f"{event} {number}")
        except ValueError:
            assert event == "flushed"
            assert before in (State.STARTING, State.RUNNING), "nothing else is impossible while it lives"
            continue
        if before in (State.ENDED, State.FAILED):
            assert not changed
            assert session.state is before
            continue
        assert changed == (session.state is not before)
        first = first or session.reason
        assert session.reason.startswith(first)


def test_the_ordinary_life() -> None:
    session = Session(began=0.0)
    states = []
    for event in ("frame", "frame", "input_ended", "stop", "flushed", "failed"):
        session.happen(event, event)
        states.append(session.state)
    assert states == [State.RUNNING, State.RUNNING, State.FLUSHING, State.FLUSHING, State.ENDED, State.ENDED]
    assert session.over
    with pytest.raises(ValueError, match="starting cannot have flushed"):
        Session(began=0.0).happen("flushed")


def test_rates_are_since_the_last_beat() -> None:
    session = Session(began=10.0)
    for _ in range(50):
        session.came_in()
    assert session.beat(12.0) == {"ingress": 25.0, "egress": 0.0}
    session.went_out(0.05)
    assert session.beat(13.0) == {"ingress": 0.0, "egress": 1.0}
    assert session.beat(13.0)["egress"] == 0.0


def test_what_was_lost_after_it_went_out_is_dropped_and_not_out() -> None:
    session = Session(0.0)
    for _ in range(5):
        session.came_in()
        session.went_out(0.01)
    session.took_back(3, "segment_lost")
    assert (session.frames_in, session.frames_out, dict(session.dropped)) == (5, 2, {"segment_lost": 3})


def test_percentiles_of_latency() -> None:
    session = Session(began=0.0)
    assert session.latency(0.5) is None
    for n in range(100):
        session.went_out(n / 1000)
    assert session.numbers()["latency_seconds"] == {"p50": 0.05, "p95": 0.095, "p99": 0.099}
