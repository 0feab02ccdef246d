"""Publishing to a trickle channel: one POST per segment, the next one always open ahead.

Names are imported from ``trickle_client``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from types import TracebackType
from typing import Final, Self

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import StreamWriter
from aiohttp.payload import Payload

from gpu_byoc.core.cursor import RESET, Backoff, End, Publication, Retry, Skip, Stored, first_index
from gpu_byoc.errors import ChannelClosed, ChannelFailed, SegmentFailed
from gpu_byoc.redact import redacted, scrubbed

PROGRESS_SECONDS: Final = 5.0
"""How long the server may take for a piece of a body, or to confirm a finished one, as in livepeer_gateway. There is
no bound on a segment as a whole, nor on the time that one is open before its first byte."""

PIECE: Final = 64 << 10
"""Bytes that are written at once and have to make progress. One control message (32 KiB at most) stays in one."""

_ANSWER = 4096  # bytes of an answer's text that are looked at


class Publisher:
    """Publishes to a channel, as an async context manager that leaves nothing running.

    On entering it asks for the channel's next index (unless ``first`` says it) and opens that segment. ``segment()``
    gives the segment that is open and opens the next, so that a first byte never waits for a connection. Segments that
    were not closed when the block ends are cut off. ``delete`` closes the channel for everybody then.

    Raises:
        ChannelMissing: there is no such channel.
        ChannelClosed: it has been closed. ``ended`` says so as soon as the server does, also between segments.
        ChannelFailed: the server stays away, or several segments in a row were lost.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        content_type: str,
        *,
        first: int | None = None,
        delete: bool = False,
        progress: float = PROGRESS_SECONDS,
        backoff: Backoff | None = None,
        label: str = "",
    ) -> None:
        """``label`` is what errors call the channel; its URL is a secret and is not in their texts."""
        self.ended: End | None = None
        self.url = url.rstrip("/")
        self.label = label or redacted(self.url)
        self.session = session
        self._headers = {"Content-Type": content_type}
        self._first = first
        self._delete = delete
        self.progress = progress
        self._backoff = backoff or Backoff()
        self._place: Publication | None = None
        self._ahead: OutgoingSegment | None = None
        self._open: set[OutgoingSegment] = set()

    async def __aenter__(self) -> Self:
        reset = False
        if self._first is None:
            first = await self._ask_next()
            self._place, reset = Publication(first, self._backoff, self.label, met=True), first > 0
        else:
            self._place = Publication(self._first, self._backoff, self.label)
        # The publisher before us may have left segments that readers still wait for.
        self._ahead = self._post(self._place, {RESET: "1"} if reset else {})
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def open(self) -> OutgoingSegment:
        """The next segment. Close it, or abort it."""
        if self._place is None:
            raise RuntimeError("a publisher opens segments inside of its `async with` block")
        if self.ended:
            raise self.closed(self.ended)
        while True:
            segment = self._ahead or self._post(self._place)
            self._ahead = None
            if not segment.settled:
                break
            await segment.outcome()  # answered before its first byte: says why, or that this index is not wanted
        self._ahead = self._post(self._place)
        return segment

    def segment(self) -> _Opening:
        """``async with publisher.segment() as segment``: closed at the end of the block, aborted by an exception."""
        return _Opening(self)

    async def send(self, data: bytes) -> int:
        """A whole segment. Returns its index."""
        async with self.segment() as segment:
            await segment.write(data)
        return segment.seq

    async def aclose(self) -> None:
        """Cut off what is open, then delete the channel if that was asked for. May be called twice.

        Raises:
            ChannelFailed: the channel could not be deleted.
        """
        self._place = self._ahead = None
        given_up, self._open = self._open, set()
        if given_up:
            await _give_up(given_up)
        if self._delete:
            self._delete = False
            await self._delete_channel()

    def closed(self, end: End) -> ChannelClosed:
        return ChannelClosed(f"{self.label} is closed ({end.why}) and takes nothing more")

    async def release(self, seq: int) -> None:
        """Tell the server that a broken segment gets no more: one like go-livepeer's leaves its readers waiting."""
        try:
            async with (
                asyncio.timeout(self.progress),
                self.session.delete(f"{self.url}/{seq}", allow_redirects=False),
            ):
                pass
        except (aiohttp.ClientError, OSError):
            pass  # the segment's own error is what counts

    def forget(self, segment: OutgoingSegment) -> None:
        self._open.discard(segment)

    def _post(self, place: Publication, headers: dict[str, str] | None = None) -> OutgoingSegment:
        segment = OutgoingSegment(self, place, self._headers | (headers or {}))
        self._open.add(segment)
        return segment

    async def _ask_next(self) -> int:
        failures = 0
        while True:
            try:
                async with (
                    asyncio.timeout(self.progress),
                    self.session.get(f"{self.url}/next", allow_redirects=False) as response,
                ):
                    text = await _text(response)
                    first = first_index(response.status, response.headers, text, self.label)
                if first is not None:
                    return first
                reason = f"HTTP {response.status}: {scrubbed(text, self.url)[:200]}"
            except (aiohttp.ClientError, OSError) as error:
                reason = words(error, self.url)
            failures += 1
            if failures >= self._backoff.attempts:
                raise ChannelFailed(f"{self.label}: no luck {failures} times in a row, the last time: {reason}")
            await asyncio.sleep(self._backoff.delay(failures))

    async def _delete_channel(self) -> None:
        try:
            async with (
                asyncio.timeout(self.progress),
                self.session.delete(self.url, allow_redirects=False) as response,
            ):
                if response.status not in (200, 400, 404):  # 400, or 404, where it has gone already
                    text = scrubbed(await _text(response), self.url)
                    raise ChannelFailed(f"DELETE {self.label}: HTTP {response.status}: {text}")
        except (aiohttp.ClientError, OSError) as error:
            raise ChannelFailed(f"DELETE {self.label}: {words(error, self.url)}") from error


class OutgoingSegment:
    """A segment that is being published. One task uses it: ``write`` as often as you like, then ``close``, or
    ``abort``. ``sent`` bytes have been handed to the connection.

    Nothing is queued: ``write`` returns when the connection has taken the bytes. Before the first of them, the
    request is repeated when it breaks; after it, the segment fails. Raises, from ``write`` and ``close``: as
    Publisher, and SegmentFailed for this segment alone.
    """

    def __init__(self, publisher: Publisher, place: Publication, headers: dict[str, str]) -> None:
        self.seq = place.take()
        self.sent = 0
        self.closing = asyncio.Event()  # the body ends, and with it the segment as a whole one
        self._cut = False
        self._publisher = publisher
        self._place = place
        self._headers = headers
        self._writer: StreamWriter | None = None
        self._changed = asyncio.Event()  # a connection is there, or the outcome is
        self.task = asyncio.create_task(self._run())
        self.task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Stored | Skip | End]) -> None:
        self._writer = None
        self._changed.set()

    @property
    def settled(self) -> bool:
        """The server has answered, or the attempts are used up: it takes no more."""
        return self.task.done()

    async def write(self, data: bytes) -> None:
        if self.closing.is_set() or self._cut:
            raise RuntimeError("write after close or abort")
        view = memoryview(data).cast("B")
        for start in range(0, len(view), PIECE):
            if not self.settled:
                await self._hand_over(view[start : start + PIECE])
            if self.settled:
                await self.outcome()
                raise SegmentFailed(self.seq, f"the server ended it after {self.sent} bytes")

    async def close(self) -> None:
        """End the segment, and return when the server has confirmed it. The next one can be opened meanwhile."""
        self.closing.set()
        await asyncio.wait([self.task], timeout=self._publisher.progress)
        if not self.settled:
            await self._stuck("the server has not confirmed it")
        await self.outcome()

    async def abort(self) -> None:
        """Cut the segment off: the request breaks, it does not end. May be called twice."""
        again = self._cut
        await self.cancel()
        if self.sent and not again:
            await self._publisher.release(self.seq)

    async def cancel(self) -> None:
        """Cut off without a word to the server, which will see the connection break."""
        self._cut = True
        self._publisher.forget(self)
        await _give_up([self])

    async def outcome(self) -> Stored | Skip:
        """What became of a segment that is settled."""
        self._publisher.forget(self)
        if self.task.cancelled():
            raise SegmentFailed(self.seq, f"cut off after {self.sent} bytes")
        done = self.task.result()
        if isinstance(done, End):
            raise self._publisher.closed(done)
        return done

    def connected(self, writer: StreamWriter) -> None:
        """For the body: the request's head is out, what is written goes there from now on."""
        self._writer = writer
        self._changed.set()

    async def _hand_over(self, piece: memoryview) -> None:
        try:
            if not self._changed.is_set():
                async with asyncio.timeout(self._publisher.progress):
                    await self._changed.wait()
            if (writer := self._writer) is not None and not self.settled:
                self.sent += len(piece)
                await writer.write(piece, drain=False)  # does not wait
                if writer.transport is not None and writer.transport.get_write_buffer_size():
                    async with asyncio.timeout(self._publisher.progress):
                        await writer.drain()
        except TimeoutError:
            await self._stuck("the server takes no more")
        except (aiohttp.ClientError, OSError):  # the request breaks for the same reason, and says what it means
            await asyncio.wait([self.task], timeout=self._publisher.progress)
            if not self.settled:
                await self._stuck("the connection broke")
        except BaseException:  # cancelled, with the piece perhaps on its way: this segment cannot become whole any more
            self.task.cancel()
            raise

    async def _stuck(self, what: str) -> None:
        await self.abort()
        raise SegmentFailed(self.seq, f"{what}, {self._publisher.progress:g} s after {self.sent} bytes")

    async def _run(self) -> Stored | Skip | End:
        """One POST after the other, until one is answered or has sent something."""
        while True:
            self._writer = None
            self._changed.clear()
            body = _Body(self)
            try:
                decision = await self._attempt(body)
            except (aiohttp.ClientError, OSError) as error:
                decision = self._place.failed(self.seq, words(error, self._publisher.url), self.sent)
            if isinstance(decision, End):
                self._publisher.ended = decision
            if not isinstance(decision, Retry):
                return decision
            await asyncio.sleep(decision.after)

    async def _attempt(self, body: _Body) -> Stored | Skip | End | Retry:
        publisher = self._publisher
        response = await publisher.session.post(
            f"{publisher.url}/{self.seq}", data=body, headers=self._headers, allow_redirects=False
        )
        try:
            async with asyncio.timeout(publisher.progress):
                text = scrubbed(await _text(response), publisher.url)
            return self._place.answered(self.seq, response.status, response.headers, text, self.sent, body.ended)
        finally:
            if not body.ended:
                response.close()  # nobody wants the rest of it
            response.release()


class _Body(Payload):
    """The body of one POST, of no known length: the segment writes it, as long as this lasts."""

    def __init__(self, segment: OutgoingSegment) -> None:
        super().__init__(segment)
        self.ended = False
        self._segment = segment

    @property
    def autoclose(self) -> bool:
        return True

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        raise TypeError("a segment's body is written once, as it comes")

    async def write(self, writer: AbstractStreamWriter) -> None:
        assert isinstance(writer, StreamWriter), "aiohttp's client has no other"
        await writer.write(b"")  # sends the head of the request now, not with the first byte of the body
        self._segment.connected(writer)
        await self._segment.closing.wait()
        self.ended = True


class _Opening:
    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    async def __aenter__(self) -> OutgoingSegment:
        self._segment = await self._publisher.open()
        return self._segment

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self._segment.close()
        elif isinstance(error, Exception):
            await self._segment.abort()
        else:
            await self._segment.cancel()  # we are told to hurry


def words(error: BaseException, url: str) -> str:
    """An error of the network about ``url``, for a message: some say nothing but their name, and some the whole URL."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        why = scrubbed(str(error.certificate_error), url)
        return f"{why}; --ca-file names who issued its certificate, --insecure takes any"
    text = scrubbed(str(error), url)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


async def _text(response: aiohttp.ClientResponse) -> str:
    """The beginning of an answer's text."""
    text = b""
    while len(text) < _ANSWER and (more := await response.content.read(_ANSWER - len(text))):
        text += more
    return text.decode("utf-8", "replace").strip()


async def _give_up(segments: Collection[OutgoingSegment]) -> None:
    """Break their requests. All are told before the first is waited for, so that a cancel of ours leaves none out."""
    tasks = [segment.task for segment in segments]
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # seen; they are given up
