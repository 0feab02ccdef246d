"""The registration's core against a model of an orchestrator: whatever is lost on the way, its calls get in."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpu_byoc.core.registration import FIRST_RETRY, JITTER, OVERLAP, Registrar, State

PERIOD = 30.0


def registrar(now: float = 0.0, random: Callable[[], float] = lambda: 0.5, period: float = PERIOD) -> Registrar:
    numbers = itertools.count()
    return Registrar(now, period, random, lambda: f"token{next(numbers)}")


def test_a_token_is_good_from_the_moment_it_is_sent_and_a_while_after_it_is_replaced() -> None:
    core = registrar()
    assert not core.allows("token0", 0)
    assert core.attempt() == "token0"
    assert core.allows("token0", 0), "the orchestrator may call before its answer is here"
    assert core.accepted(1)
    assert core.attempt() == "token1"
    assert core.allows("token0", 31)
    assert core.allows("token1", 31)
    assert not core.accepted(31), "no news"
    assert core.allows("token0", 31 + OVERLAP - 0.01)
    assert not core.allows("token0", 31 + OVERLAP)
    assert core.allows("token1", 31 + OVERLAP)
    assert core.tokens == ["token1"], "nothing is kept for ever"


def test_who_has_another_token_may_mean_the_worker_before_us_until_a_while_after_the_first_success() -> None:
    core = registrar()
    core.attempt()
    assert not core.strict(1e9)
    core.accepted(1)
    assert not core.strict(1 + OVERLAP - 0.01), "sent before the orchestrator took us, and still on its way"
    assert core.strict(1 + OVERLAP)
    core.attempt()
    core.accepted(31)
    assert core.strict(31), "the one before was ours"


def test_an_attempt_whose_answer_was_lost_is_repeated_with_its_token() -> None:
    core = registrar()
    core.attempt()
    core.accepted(0)
    assert core.attempt() == "token1"
    assert core.failed(1, "timeout")
    assert core.attempt() == "token1", "the orchestrator may have taken it"
    assert core.allows("token0", 1000), "or not"
    assert core.allows("token1", 1000)
    assert core.accepted(1000)
    assert core.attempt() == "token2"


def test_no_token_is_none() -> None:
    core = registrar()
    for text in ("", "None", "token", "token00", "\udce4"):
        assert not core.allows(text, 0)
    core.attempt()
    core.accepted(0)
    for text in ("", "None", "token", "token00", "token1", "\udce4"):
        assert not core.allows(text, 0)


def test_news_is_a_change_of_state_or_of_reason() -> None:
    core = registrar()
    core.attempt()
    assert [core.failed(1, "unreachable"), core.failed(2, "unreachable"), core.failed(3, "refused")] == [
        *(True, False, True)
    ]
    assert [core.accepted(4), core.accepted(5)] == [True, False]
    assert core.failed(6, "refused"), "it was fine in between"
    assert core.last_success == 5


@given(st.floats(0, 1), st.integers(1, 200), st.floats(0.01, 1e6))
def test_delays_grow_to_the_period_and_no_further(number: float, failures: int, period: float) -> None:
    core = registrar(0.0, lambda: number, period)
    delays = []
    for _ in range(failures):
        core.attempt()
        core.failed(100.0, "unreachable")
        assert core.due is not None
        delays.append((core.due - 100.0) / (0.5 + number))
    assert abs(delays[0] - min(FIRST_RETRY, period)) < 1e-6 * period + 1e-6
    assert all(later >= earlier - 1e-6 for earlier, later in itertools.pairwise(delays))
    assert max(delays) <= period * (1 + 1e-6) + 1e-6
    core.accepted(100.0)
    assert core.due is not None
    assert abs(core.due - 100.0 - period) <= period * JITTER + 1e-6
    core.failed(200.0, "unreachable")
    assert core.due is not None
    assert core.due - 200.0 <= 1.5 * FIRST_RETRY + 1e-6, "a success starts the delays anew"


def test_nothing_is_due_after_leaving() -> None:
    core = registrar()
    core.leave()
    assert (core.due, core.sent) == (None, False), "nothing to undo"
    core = registrar()
    core.attempt()
    core.leave()
    assert core.sent
    assert not core.accepted(1)
    assert not core.failed(1, "unreachable")
    assert (core.state, core.due) == (State.LEFT, None)
    assert core.allows("token0", 1), "what the orchestrator has sent already gets in"


class Registration(RuleBasedStateMachine):
    """The orchestrator takes an attempt, or not, and its answer arrives, or not. Calls are under way for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.core = registrar()
        self.held: str | None = None  # by the orchestrator
        self.calls: list[tuple[float, str]] = []  # when each was sent, with which token
        self.handed_out: set[str] = set()

    @precondition(lambda self: self.core.due is not None)
    @rule(taken=st.booleans(), answered=st.booleans(), call=st.booleans())
    def attempt(self, taken: bool, answered: bool, call: bool) -> None:
        assert self.core.due is not None
        self.now = max(self.now, self.core.due)
        if call and self.held:
            self.calls.append((self.now, self.held))
        token = self.core.attempt()
        self.handed_out.add(token)
        if taken:
            self.held = token
        if taken and answered:
            self.core.accepted(self.now)
        else:
            self.core.failed(self.now, "refused" if answered else "unreachable")

    @rule()
    def restart(self) -> None:
        self.held = None

    @rule(seconds=st.floats(0, OVERLAP * 0.9))
    def call(self, seconds: float) -> None:
        """One is sent now; the others arrive."""
        self.now += seconds
        if self.held:
            self.calls.append((self.now, self.held))

    @rule()
    def leave(self) -> None:
        self.core.leave()

    @invariant()
    def whoever_holds_a_token_gets_in(self) -> None:
        self.calls = [(at, token) for at, token in self.calls if self.now - at < OVERLAP]
        assert self.held is None or self.core.allows(self.held, self.now)
        assert all(self.core.allows(token, self.now) for _, token in self.calls)
        assert not self.core.allows("another", self.now)
        assert set(self.core.tokens) <= self.handed_out

    @invariant()
    def it_is_never_long_until_the_next_attempt(self) -> None:
        if self.core.state is State.LEFT:
            assert self.core.due is None
        else:
            assert self.core.due is not None
            assert self.core.due <= self.now + 1.5 * PERIOD + 1e-6


TestRegistration = Registration.TestCase
