from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpu_byoc.redact import redacted, scrubbed, traceback_of

SECRET = "c0ffee-out"
PART = st.sampled_from(["no luck:", "http://h", "\n", "'", "HTTP 500", "https://a.b:1/", " ", "(", "url=URL('", "é"])


def test_a_url_is_named_by_its_origin() -> None:
    assert redacted(f"https://orch:8935/ai/trickle/{SECRET}/5") == "https://orch:8935/***"
    assert redacted("http://user:pass@[::1]:80/a?b#c") == "http://***@[::1]:80/***"
    assert redacted("http://a http://b/ 'HTTP://c/d'") == "http://a http://b 'HTTP://c/***'"
    assert redacted("nothing to hide at a/b") == "nothing to hide at a/b"


@given(st.lists(PART), st.lists(PART))
def test_the_path_of_no_url_is_left(before: list[str], after: list[str]) -> None:
    url = f"https://orch:8935/ai/trickle/{SECRET}"
    text = " ".join([*before, url + "/17", *after])
    assert SECRET not in redacted(text)
    assert "orch:8935/***" in redacted(text)


@given(st.text(max_size=20), st.text(max_size=20))
def test_what_a_server_says_of_a_channel_is_left_out(before: str, after: str) -> None:
    said = scrubbed(f"{before}no /ai/trickle/{SECRET}/3 here, {SECRET}{after}", f"http://h/ai/trickle/{SECRET}/")
    assert SECRET not in said
    assert said.isprintable()


def test_secrets() -> None:
    assert scrubbed("Bearer abc\r\nX: y", secrets=["abc"]) == "Bearer ***  X: y"
    assert scrubbed("an a", "http://h/a") == "an a", "a letter is no secret"
    assert scrubbed("no trickle in my-token-5/x", "http://h/ai/trickle/my-token-5/x") == "no trickle in ***/x"


def test_a_traceback() -> None:
    try:
        raise ValueError(f"https://orch/ai/{SECRET} is odd")
    except ValueError as error:
        text = traceback_of(error)
    assert "ValueError: https://orch/*** is odd" in text
    assert "test_a_traceback" in text
    assert SECRET not in text.replace("{SECRET}", "")
