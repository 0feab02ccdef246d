"""What a gateway and an orchestrator take from a client: the checks on a job's headers, and its body piece by piece."""

from __future__ import annotations

import asyncio

from aiohttp import web

from gpu_byoc.errors import BadRequest, GpuByocError, TooLarge, UnsupportedMedia
from gpu_byoc.transport.listen import widen


class ClientGone(Exception):
    """The client closed its connection, or stopped reading; there is nobody to answer."""


class Body:
    """A request's body. ``piece(0)``, ``piece(1)`` ... b"" at its end.

    With ``keep`` pieces can be asked for again, for another attempt; without it each is asked for once, in order.
    Raises what ended it: TooLarge, BadRequest (broken encoding, or not as long as it was announced), ClientGone.
    """

    __slots__ = ("_content", "_ended", "_keep", "_kept", "_limit", "_most", "_size", "error", "length")

    def __init__(self, request: web.BaseRequest, limit: int, keep: bool = False) -> None:
        widen(request.transport)
        self._content = request.content
        self._limit = limit
        self._keep = keep
        self._kept: list[bytes] = []
        self._size = 0
        self._ended = False
        self.error: GpuByocError | ClientGone | None = None
        self.length = request.content_length  # None for a chunked body
        if self.length is not None and self.length > limit:
            raise too_large(limit)
        self._most = limit if self.length is None else self.length

    async def piece(self, index: int) -> bytes:
        if index < len(self._kept):
            return self._kept[index]
        if self.error is not None:
            raise self.error
        if self._ended:
            return b""
        try:
            data, _ = await self._content.readchunk()
            while not data and not self._content.at_eof():  # the end of an HTTP chunk comes as an empty piece
                data, _ = await self._content.readchunk()
        except web.RequestPayloadError as error:
            self.error = BadRequest(f"the request's body cannot be read: {error}")
            raise self.error from error
        except (OSError, asyncio.IncompleteReadError) as error:
            self.error = ClientGone("the client went away in the middle of its request")
            raise self.error from error
        self._size += len(data)
        if self._size > self._most:
            self.error = too_large(self._limit) if self.length is None else self._not_as_announced()
            raise self.error
        if not data:
            if self.length is not None and self._size != self.length:
                self.error = self._not_as_announced()
                raise self.error
            self._ended = True
        elif self._keep:
            self._kept.append(data)
        return data

    def _not_as_announced(self) -> BadRequest:
        """The length was announced to the next hop; a byte more would be read there as the next request's."""
        return BadRequest(f"the request's body is not of the {self.length} bytes that its Content-Length says")


def too_large(limit: int) -> TooLarge:
    return TooLarge(f"the request's body is larger than the limit of {limit} bytes; send fewer frames at a time")


def capability_of(request: web.BaseRequest) -> str:
    """The capability that a job asks for. Raises BadRequest."""
    name = request.headers.get("X-Model-Id", "").strip()
    if not name:
        raise BadRequest("the header X-Model-Id is missing: it names the capability, for example green-tint-cpu")
    if not name.isprintable():
        raise BadRequest("the header X-Model-Id has characters that cannot be printed")
    return name


def refuse_coding(request: web.BaseRequest) -> None:
    """Raises UnsupportedMedia for a compressed body: what is relayed must be what its length says."""
    codings = ",".join(request.headers.getall("Content-Encoding", ()))
    if any(coding.strip().lower() not in ("", "identity") for coding in codings.split(",")):
        raise UnsupportedMedia(f"Content-Encoding {codings[:40]!r}: send the body as it is, not compressed")


def content_type(request: web.BaseRequest) -> tuple[str, str]:
    """The request's Content-Type as it came, parameters included, but a tab is a space. Raises BadRequest."""
    value = request.headers.get("Content-Type", "application/octet-stream").replace("\t", " ")
    if not value.isprintable():
        raise BadRequest("the header Content-Type has characters that cannot be printed")
    return "Content-Type", value
