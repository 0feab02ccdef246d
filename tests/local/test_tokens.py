"""Whom a gateway tries, and in which order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_byoc.errors import AllBusy, ContainerUnreachable, GpuByocError, NoCapability, NotReady, OrchestratorUnreachable
from gpu_byoc.local.tokens import Peer, Token, _read_token, order, why_none


def token(free: int, state: str = "ready") -> Token:
    return Token(Peer(f"http://host{free}"), free, state, "why", 0)


@given(st.lists(st.integers(-2, 5), max_size=6), st.integers(0, 100))
def test_only_those_with_room_most_first(room: list[int], turn: int) -> None:
    tokens = [token(free) for free in room]
    chosen = order(tokens, turn)
    free = {id(each.peer): each.free for each in tokens}
    got = [free[id(peer)] for peer in chosen]
    assert got == sorted((n for n in room if n > 0), reverse=True)


@given(st.integers(1, 5), st.integers(0, 50))
def test_equals_take_turns(peers: int, turn: int) -> None:
    tokens = [token(3) for _ in range(peers)]
    firsts = {id(order(tokens, turn + step)[0]) for step in range(peers)}
    assert len(firsts) == peers, "in as many jobs as there are peers each is first once"


def test_own_jobs_are_subtracted() -> None:
    peer = Peer("http://a")
    with peer.busy():
        asked = Token(peer, 2, "ready", "", peer.jobs)  # the orchestrator counted that job already
        assert asked.free == 2
        with peer.busy(), peer.busy():
            assert asked.free == 0
    assert asked.free == 3


@pytest.mark.parametrize(
    ("states", "kind"),
    [
        (["ready", "down"], AllBusy),
        (["loading", "down"], NotReady),
        (["draining"], NotReady),
        (["down", "unknown"], ContainerUnreachable),
        (["unknown"], NoCapability),
        ([], NoCapability),
    ],
)
def test_why_there_is_none(states: list[str], kind: type[GpuByocError]) -> None:
    error = why_none("green", [Peer("http://a")], [token(0, state) for state in states])
    assert type(error) is kind
    assert "green" in str(error)


def test_nobody_answered() -> None:
    peer = Peer("http://a")
    peer.error = "connection refused"
    error = why_none("green", [peer], [])
    assert isinstance(error, OrchestratorUnreachable)
    assert "http://a (connection refused)" in str(error)
    assert isinstance(why_none("green", [peer, Peer("http://b")], []), NoCapability), "the other one answered"


def test_a_token_of_go_livepeer() -> None:
    """It leaves out what is 0 and has no word for a state; jobs go to its service_addr."""
    peer = Peer("http://a")
    got = _read_token(peer, {"available_capacity": 2, "service_addr": "http://b:1/"}, 0)
    assert (got.free, got.state, peer.origin.url) == (2, "ready", "http://b:1")
    assert _read_token(peer, {"service_addr": "http://b:1"}, 0).state == "unknown"


@pytest.mark.parametrize(
    "value",
    [
        *([], None, {"available_capacity": "2"}, {"available_capacity": True}, {"service_addr": 1}),
        *({"service_addr": "b"}, {"service_addr": "http://"}, {"service_addr": "http://a..b:1"}),
    ],
)
def test_no_token(value: object) -> None:
    with pytest.raises(ValueError, match="token"):
        _read_token(Peer("http://a"), value, 0)
