"""HTTP/1.1 answers, sans-IO: bytes in, a head and pieces of a body out (RFC 9112).

Only what a relay needs, and strict: an answer that can be read in two ways is refused, because what is relayed here
is framed anew for the next reader.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

MAX_HEAD: Final = 64 * 1024  # bytes; aiohttp allows 8 KiB a line and 128 lines, nobody sends more than a few KiB
MAX_LINE: Final = 4096  # bytes of a chunk-size line or a trailer

_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_HEX = re.compile(rb"[0-9A-Fa-f]{1,16}\Z")
_NO_BODY = frozenset({204, 304})


class Malformed(Exception):
    """The peer does not speak HTTP/1.x, or broke off; the connection cannot be used any further."""


class AnswerHead(NamedTuple):
    """Status and headers (names in lower case, repeated ones joined with a comma).

    ``length`` is the number of body bytes, None when only the end of the body will tell.
    """

    status: int
    headers: dict[str, str]
    length: int | None


class AnswerParser:
    """One answer. Feed it until ``done``; then make a new one for the next answer on the connection.

    ``head`` is set as soon as it is complete. ``reusable`` says, once done, whether the connection can carry
    another request.
    """

    __slots__ = ("_buffer", "_chunked", "_expect", "_keep", "_left", "done", "head", "reusable")

    def __init__(self) -> None:
        self.head: AnswerHead | None = None
        self.done = False
        self.reusable = False
        self._buffer = b""  # an unfinished head or line
        self._keep = False
        self._chunked = False
        self._left = 0  # body bytes to come: of the body, or of this chunk; -1 = until the peer closes
        self._expect = "size"  # the next line of a chunked body: "size", "end" of a chunk, or "trailer"

    def feed(self, data: bytes) -> list[bytes]:
        """Take what arrived; return the pieces of the body in it (none is empty).

        Raises Malformed; the caller must then close the connection.
        """
        if self.head is None:
            data = self._feed_head(data)
        if not data:
            return []
        if self.done:
            self.reusable = False  # nobody asked for these bytes: nothing on this connection can be trusted
            return []
        if self._chunked:
            return self._feed_chunks(data)
        return self._feed_plain(data)

    def eof(self) -> None:
        """The peer closed. Ends a body that lasts until then; Malformed if anything was still to come."""
        self.reusable = False
        if self.done:
            return
        if self.head is None:
            raise Malformed("the connection was closed before an answer came")
        if self._left >= 0:
            raise Malformed("the connection was closed in the middle of the answer")
        self.done = True

    def _feed_head(self, data: bytes) -> bytes:
        """Returns what follows the head: b"" while it is not complete."""
        data = self._buffer + data if self._buffer else data
        while True:
            end = data.find(b"\r\n\r\n", 0, MAX_HEAD)
            if end < 0:
                if len(data) >= MAX_HEAD:
                    raise Malformed(f"no end of the answer's head within {MAX_HEAD} bytes")
                self._buffer = data
                return b""
            status, version, headers = _parse_head(data[:end])
            data = data[end + 4 :]
            if status >= 200:
                break  # 100 to 199 are interim: the answer is still to come
        self._buffer = b""
        self._frame(status, version, headers)
        return data

    def _frame(self, status: int, version: bytes, headers: dict[str, str]) -> None:
        """Decide where the body ends (RFC 9112, 6.3)."""
        tokens = {token.strip().lower() for token in headers.get("connection", "").split(",")}
        self._keep = "close" not in tokens and (version == b"HTTP/1.1" or "keep-alive" in tokens)
        coding = headers.get("transfer-encoding")
        length: int | None
        if status in _NO_BODY:
            length = 0
        elif coding is not None:
            if coding.strip().lower() != "chunked" or "content-length" in headers:
                raise Malformed(f"cannot tell where an answer with Transfer-Encoding {coding!r} ends")
            self._chunked, length = True, None
        elif "content-length" in headers:
            length = _content_length(headers["content-length"])
        else:
            length, self._left, self._keep = None, -1, False
        if length is not None:
            self._left = length
            if not length:
                self._finish()
        self.head = AnswerHead(status, headers, length)

    def _feed_plain(self, data: bytes) -> list[bytes]:
        if self._left < 0:
            return [data]
        extra = len(data) - self._left
        if extra < 0:
            self._left = -extra
            return [data]
        piece = data[: self._left] if extra else data
        self._left = 0
        self._finish()
        self.reusable = self.reusable and not extra
        return [piece]

    def _feed_chunks(self, data: bytes) -> list[bytes]:
        pieces = []
        at = 0
        while at < len(data) and not self.done:
            if self._left:
                piece = data[at : at + self._left]
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                continue
            end = data.find(b"\n", at)
            line = self._buffer + data[at : end if end >= 0 else len(data)]
            if len(line) > MAX_LINE:
                raise Malformed(f"a line of a chunked body is longer than {MAX_LINE} bytes")
            if end < 0:
                self._buffer = line
                break
            self._buffer, at = b"", end + 1
            if line[-1:] != b"\r":
                raise Malformed("a line of a chunked body does not end in CR LF")
            self._chunk_line(line[:-1])
        if at < len(data):
            self.reusable = False
        return pieces

    def _chunk_line(self, line: bytes) -> None:
        if self._expect == "end":
            if line:
                raise Malformed("a chunk is longer than its size says")
            self._expect = "size"
        elif self._expect == "size":
            size = line.partition(b";")[0].strip(b" \t")
            if not _HEX.match(size):
                raise Malformed(f"not a chunk size: {size[:20]!r}")
            self._left = int(size, 16)
            self._expect = "end" if self._left else "trailer"
        elif not line:
            self._finish()

    def _finish(self) -> None:
        self.done = True
        self.reusable = self._keep


def _parse_head(raw: bytes) -> tuple[int, bytes, dict[str, str]]:
    first, *lines = raw.split(b"\r\n")
    version, _, rest = first.partition(b" ")
    code = rest[:3]
    if version not in (b"HTTP/1.1", b"HTTP/1.0") or not code.isdigit() or rest[3:4] not in (b"", b" "):
        raise Malformed(f"not an HTTP/1.x answer: {first[:40]!r}")
    status = int(code)
    if not 100 <= status <= 599 or status == 101:
        raise Malformed(f"no use for an answer with status {status}")
    headers: dict[str, str] = {}
    for line in lines:
        key, colon, raw_value = line.partition(b":")
        if not colon or not _NAME.match(key) or _CONTROL.search(raw_value):
            raise Malformed(f"not a header line: {line[:40]!r}")
        name = key.decode("ascii").lower()
        # errors="replace": what is relayed must be encodable again
        value = raw_value.strip(b" \t").decode("utf-8", "replace")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return status, version, headers


def _content_length(value: str) -> int:
    """The length; "5, 5" is 5 (RFC 9112, 6.3), "5, 6" is an attack or a bug."""
    values = {part.strip() for part in value.split(",")}
    first = values.pop()
    if values or not (first.isascii() and first.isdigit() and len(first) < 19):
        raise Malformed(f"not a Content-Length: {value[:40]!r}")
    return int(first)
