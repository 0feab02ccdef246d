"""Flags in Go's manner."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_byoc.errors import ConfigError
from gpu_byoc.local.goflags import Flag, parse, usage

FLAGS = (
    Flag("byoc", False, "a switch"),
    Flag("byocModelID", "", "a text"),
    Flag("dataDir", "~/x", "a directory", ("datadir",)),
    Flag("v", 3, "a number"),
)


@given(
    st.booleans(),
    st.text(),
    st.integers(-(10**17), 10**17),
    st.lists(st.tuples(st.booleans(), st.booleans()), min_size=3, max_size=3),
    st.permutations([0, 1, 2]),
)
def test_every_spelling_means_the_same(
    switch: bool, text: str, number: int, spelling: list[tuple[bool, bool]], order: list[int]
) -> None:
    """One dash or two, with = or with a space, in any order."""
    given = [("byoc", str(switch).lower()), ("byocModelID", text), ("v", str(number))]
    argv: list[str] = []
    for index in order:
        (name, value), (two, equals) = given[index], spelling[index]
        flag = "--" + name if two else "-" + name
        if name == "byoc":
            argv += [flag] if switch and equals else [f"{flag}={value}"]
        else:
            argv += [f"{flag}={value}"] if equals else [flag, value]
    assert parse(FLAGS, argv) == {"byoc": switch, "byocModelID": text, "dataDir": "~/x", "v": number}


@given(st.lists(st.text(max_size=12) | st.sampled_from(["-byoc", "-v", "--", "-", "-datadir=", "-v=x", "=", "---v"])))
def test_any_argument_list_is_parsed_or_refused(argv: list[str]) -> None:
    try:
        values = parse(FLAGS, argv)
    except ConfigError:
        pass
    else:
        assert {name: type(value) for name, value in values.items()} == {
            "byoc": bool,
            "byocModelID": str,
            "dataDir": str,
            "v": int,
        }


def test_defaults_aliases_and_the_last_one_wins() -> None:
    assert parse(FLAGS, [])["dataDir"] == "~/x"
    assert parse(FLAGS, ["-datadir", "a", "-dataDir=b"])["dataDir"] == "b"
    assert parse(FLAGS, ["-datadir="])["dataDir"] == ""


def test_every_unknown_flag_is_named_with_what_is_near() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(FLAGS, ["-byocModelId", "x", "-zzz", "1", "-byoc", "--byocmodel=3"])
    assert str(caught.value).startswith(
        "unknown flags: -byocModelId (did you mean -byocModelID?), -zzz, -byocmodel (did you mean -byocModelID?)"
    )


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["-byoc", "true"], "unexpected argument 'true'"),
        (["x"], "unexpected argument 'x'"),
        (["--"], "unexpected argument '--'"),
        (["-"], "unexpected argument '-'"),
        (["---v=1"], "unexpected argument '---v=1'"),
        (["-byoc=maybe"], "'maybe' for flag -byoc"),
        (["-v", "high"], "'high' for flag -v"),
        (["-v", "\u0661"], "for flag -v"),  # a digit, but not one that Go would take
        (["-v"], "-v needs a value"),
    ],
)
def test_mistakes_are_named(argv: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(FLAGS, argv)
    assert told in str(caught.value)


def test_usage_lists_every_flag() -> None:
    text = usage(FLAGS)
    assert all(f"  -{flag.name}" in text and flag.help in text for flag in FLAGS)
    assert "  -dataDir, -datadir str\n" in text
    assert "(default ~/x)" in text
