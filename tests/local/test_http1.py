"""The answer parser: the same answer however it is cut, and nothing that can be read in two ways."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_byoc.local.http1 import MAX_HEAD, MAX_LINE, AnswerParser, Malformed


def feed(raw: bytes, cuts: list[int], parser: AnswerParser | None = None) -> tuple[AnswerParser, bytes]:
    """Feed ``raw`` cut at these places."""
    parser = parser or AnswerParser()
    places = [0, *sorted(cut % (len(raw) + 1) for cut in cuts), len(raw)]
    pieces: list[bytes] = []
    for start, end in itertools.pairwise(places):
        if start < end:
            pieces += parser.feed(raw[start:end])
    assert all(pieces), "a piece is never empty"
    return parser, b"".join(pieces)


CUTS = st.lists(st.integers(0, 2000), max_size=20)


@given(st.binary(max_size=300), CUTS)
def test_a_body_with_a_length(body: bytes, cuts: list[int]) -> None:
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nX-A: b\r\n\r\n" % len(body) + body
    parser, got = feed(raw, cuts)
    assert got == body
    assert parser.head is not None
    assert (parser.head.status, parser.head.length, parser.head.headers["x-a"]) == (200, len(body), "b")
    assert parser.done
    assert parser.reusable


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=6), st.booleans(), CUTS)
def test_a_chunked_body(chunks: list[bytes], trailer: bool, cuts: list[int]) -> None:
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    for chunk in chunks:
        raw += b"%X;ext=1\r\n%b\r\n" % (len(chunk), chunk)
    raw += b"0\r\n" + (b"Trailer: x\r\n" if trailer else b"") + b"\r\n"
    parser, got = feed(raw, cuts)
    assert got == b"".join(chunks)
    assert parser.done
    assert parser.reusable
    assert parser.head is not None
    assert parser.head.length is None


@given(st.binary(max_size=100), CUTS)
def test_a_body_until_the_peer_closes(body: bytes, cuts: list[int]) -> None:
    parser, got = feed(b"HTTP/1.1 200 OK\r\n\r\n" + body, cuts)
    assert got == body
    done = [parser.done]
    parser.eof()
    assert [*done, parser.done] == [False, True]
    assert not parser.reusable


@given(st.binary(max_size=400), CUTS)
def test_noise_is_malformed_or_parsed_but_nothing_else(noise: bytes, cuts: list[int]) -> None:
    for raw in (
        noise,
        b"HTTP/1.1 200 OK\r\n" + noise,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + noise,
    ):
        try:
            feed(raw, cuts)
        except Malformed:
            pass


def test_interim_answers_are_skipped_and_some_have_no_body() -> None:
    parser, got = feed(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", [10, 30])
    assert (parser.head and parser.head.status, got, parser.done, parser.reusable) == (204, b"", True, True)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: x, Close\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nextra",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokextra",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nextra",
    ],
)
def test_a_connection_that_cannot_be_used_again(head: bytes) -> None:
    parser, got = feed(head, [])
    assert parser.done
    assert not parser.reusable
    assert b"extra" not in got


def test_keep_alive_of_http_1_0() -> None:
    assert feed(b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n", [])[0].reusable


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 2x0 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\n\r\n",
        b"HTTP/1.1 999 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nName : x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\r\n folded\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\x00\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * (MAX_LINE + 1),
        b"x" * MAX_HEAD,
    ],
)
def test_malformed(raw: bytes) -> None:
    with pytest.raises(Malformed):
        feed(raw, [])


@pytest.mark.parametrize("raw", [b"", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab"])
def test_broken_off(raw: bytes) -> None:
    parser, _ = feed(raw, [])
    with pytest.raises(Malformed, match="closed"):
        parser.eof()


def test_the_same_length_twice_is_one_length() -> None:
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx"
    assert feed(raw, [])[1] == b"x"
