"""Parameters are checked at the door, with the field named."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_byoc.errors import BadParams
from gpu_byoc.processor import ArrayProcessor, FrameProcessor, NoParams, parse_params
from gpu_byoc.processors.green_tint import GreenTint


class Every(ArrayProcessor):
    @dataclasses.dataclass(frozen=True, slots=True)
    class Params:
        count: int = dataclasses.field(default=1, metadata={"min": 0, "max": 9})
        scale: float = 0.5
        on: bool = False
        mode: str = dataclasses.field(default="a", metadata={"choices": ("a", "b")})

    kernels: ClassVar[dict[str, Any]] = {}


@pytest.mark.parametrize(
    ("given_params", "expected"),
    [
        ({}, (1, 0.5, False, "a")),
        ({"count": "7", "scale": "2", "on": "YES", "mode": "b"}, (7, 2.0, True, "b")),
        ({"count": 3.0, "scale": 1, "on": False}, (3, 1.0, False, "a")),
    ],
)
def test_good(given_params: dict[str, Any], expected: tuple[Any, ...]) -> None:
    params = parse_params(Every(), given_params)
    assert dataclasses.astuple(params) == expected
    assert hash(params) == hash(parse_params(Every(), given_params)), "equal parameters can share a batch"


@pytest.mark.parametrize(
    ("given_params", "field"),
    [
        ({"count": -1}, "count"),
        ({"count": 10}, "count"),
        ({"count": "x"}, "count"),
        ({"count": True}, "count"),
        ({"count": 1.5}, "count"),
        ({"count": None}, "count"),
        ({"scale": "nan"}, "scale"),
        ({"scale": float("inf")}, "scale"),
        ({"on": "maybe"}, "on"),
        ({"mode": "c"}, "mode"),
        ({"mode": 3}, "mode"),
        ({"other": 3}, "other"),
    ],
)
def test_bad(given_params: dict[str, Any], field: str) -> None:
    with pytest.raises(BadParams) as caught:
        parse_params(Every(), given_params)
    assert caught.value.field == field
    assert caught.value.body()["field"] == field
    assert repr(field) in str(caught.value)


def test_a_frame_processor_has_no_parameters() -> None:
    assert parse_params(FrameProcessor(), {}) == NoParams()
    with pytest.raises(BadParams, match="knows: none"):
        parse_params(FrameProcessor(), {"boost": 1})


words = st.text("-+.0159einfa ", max_size=8)
json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(["boost", "x", ""]), json_like))
def test_anything_else_is_bad_params_and_nothing_else(given_params: dict[str, Any]) -> None:
    try:
        params = parse_params(GreenTint(), given_params)
    except BadParams:
        return
    assert set(given_params) <= {"boost"}
    assert 0 <= params.boost <= 255
