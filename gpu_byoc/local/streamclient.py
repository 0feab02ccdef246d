"""The network's side of one live stream: five trickle channels, a publisher in real time, a viewer with a clock.

Latency is taken by time stamp: from the moment a coded picture's bytes are handed to the connection until the output's
picture with the same PTS is here as a whole. Both ends are in this process, so there is one clock.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final

import aiohttp

from gpu_byoc.errors import GpuByocError, NetworkError, SegmentFailed
from gpu_byoc.local.streamclip import START, Clip, due
from gpu_byoc.media.audio import AudioPacket
from gpu_byoc.media.demux import Demuxer, DemuxEvent, Picture
from gpu_byoc.media.encode import CodedPicture
from gpu_byoc.media.mpegts import CLOCK
from gpu_byoc.media.mux import Piece, Segmenter
from gpu_byoc.transport.trickle_client import OutgoingSegment, Publisher, Subscriber

AHEAD: Final = 3  # segments, as fast as possible: a ring holds five, one of them is being written
STALL_SECONDS: Final = 30.0  # without a picture while the publisher is held back for one
TAIL_SECONDS: Final = 10.0  # for something of the last segment to come out
QUIET_SECONDS: Final = 0.5  # without a picture, after which a short stream is taken to wait for the end of input
HELD: Final = 16  # pictures that a decoder of H.264 may hold back for their order (max_dec_frame_buffering)
END_SECONDS: Final = 15.0  # for the worker to end the stream
KEEP_SECONDS: Final = 10.0  # between signs of life, as go-livepeer and livepeer_gateway have it
_ASK_SECONDS: Final = 10.0
_LATELY: Final = 250  # latencies that the progress display looks at

MPEGTS: Final = "video/MP2T"
CHANNELS: Final = {
    "subscribe": ("", MPEGTS),
    "publish": ("-out", MPEGTS),
    "control": ("-control", "application/json"),
    "events": ("-events", "application/json"),
    "data": ("-data", "application/jsonl"),
}


class StreamRefused(GpuByocError):
    """A server did not take the request; the message has its own words."""

    code = "stream_refused"
    blame = "client"


class StreamFailed(NetworkError):
    """The stream began and did not come to its proper end."""

    code = "stream_failed"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is played. ``seconds`` None: the clip once. Not ``real_time``: as fast as it comes out."""

    clip: Clip
    real_time: bool = True
    seconds: float | None = None

    @property
    def length(self) -> float:
        """Seconds of video."""
        return self.clip.seconds if self.seconds is None else self.seconds


@dataclass(slots=True)
class Figures:
    """What one stream came to. ``published`` and ``received`` are the moments (``time.monotonic``) by PTS.

    ``dropped`` and ``problems`` are the worker's counts by reason, ``compute_seconds`` what the device spent on it:
    both as of its last heartbeat.
    """

    published: dict[int, float] = field(default_factory=dict)
    received: dict[int, float] = field(default_factory=dict)
    unknown: int = 0  # pictures that came out with a PTS of none that went in, or a second time
    latest: deque[float] = field(default_factory=lambda: deque(maxlen=_LATELY))
    state: str = "starting"
    dropped: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    compute_seconds: float = 0.0

    @property
    def dropped_frames(self) -> int:
        return self.dropped.total()

    @property
    def lost(self) -> int:
        """Frames that went in, did not come out, and were not counted as dropped."""
        return len(self.published) - len(self.received) - self.dropped_frames

    @property
    def untaken(self) -> int:
        """Of the lost, those published after the last that came out, where the worker has ended the stream by itself.
        What it had taken by then came out or is counted as dropped, so it never took these."""
        if self.state not in ("ended", "failed"):
            return 0
        behind = itertools.takewhile(lambda pts: pts not in self.received, reversed(self.published))
        return max(0, min(self.lost, sum(1 for _ in behind)))

    def latencies(self) -> list[float]:
        return [at - self.published[pts] for pts, at in self.received.items()]


def quantile(values: Sequence[float], part: float) -> float:
    """The smallest value that ``part`` (0..1) of them do not exceed; NaN without any."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)] if ordered else math.nan


class LiveClient:
    """``await run()`` is the whole life of a stream; ``error`` says afterwards why it failed, if it did.

    ``record`` gets the output as it comes. ``on_first`` is called with the first picture that comes out, ``on_last``
    when everything is out and before the stream is ended.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        name: str,
        trickle: str,
        worker: str,
        plan: Plan,
        *,
        record: BinaryIO | None = None,
        on_first: Callable[[], None] = lambda: None,
        on_last: Callable[[], None] = lambda: None,
    ) -> None:
        """``trickle`` is the URL under which the channels are, with its slash; ``worker`` is the worker's."""
        self.name = name
        self.figures = Figures()
        self.error: str | None = None
        self._http = http
        self._urls = {role: f"{trickle}{name}{suffix}" for role, (suffix, _) in CHANNELS.items()}
        self._worker = worker
        self._plan = plan
        self._record = record
        self._on_first = on_first
        self._on_last = on_last
        self._furthest = -1  # the largest PTS that came out
        self._came = asyncio.Event()
        self._read = -1  # the index of the output segment that was read last
        self._all_in = False
        self._over = asyncio.Event()  # the worker's last heartbeat is here

    async def run(self) -> None:
        """Never raises but for a cancel; then, too, the channels are deleted and so the stream ends."""
        try:
            for role, (_, mime) in CHANNELS.items():
                await self._create(self._urls[role], mime)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch())
                group.create_task(self._listen())
                await self._start()
                keeping = group.create_task(self._keep())
                await self._publish()
                await self._ended()
                keeping.cancel()
                await self._delete()
        except* GpuByocError as errors:
            self.error = "; ".join(_texts(errors))
        finally:
            await self._delete()

    # --- the servers

    async def _create(self, url: str, mime: str) -> None:
        status, text = await self._ask("POST", url, headers={"Expect-Content": mime})
        if status != 200:
            hint = "; start it with --autocreate, or mend the path in its URL" if status == 404 else ""
            raise StreamRefused(f"{url} could not be created: HTTP {status}: {text}{hint}")

    async def _start(self) -> None:
        urls = {f"{role}_url": url for role, url in self._urls.items()}
        url = f"{self._worker}/stream/start"
        status, text = await self._ask("POST", url, json={"gateway_request_id": self.name, **urls})
        if status != 200:
            with suppress(ValueError, AttributeError):
                text = json.loads(text).get("message", text)
            raise StreamRefused(f"the worker did not start {self.name}: HTTP {status}: {text}")

    async def _delete(self) -> None:
        """All channels, as far as they are there. Deleting twice does no harm."""
        for url in self._urls.values():
            with suppress(StreamRefused):
                await self._ask("DELETE", url)

    async def _ask(self, method: str, url: str, **named: Any) -> tuple[int, str]:
        try:
            async with asyncio.timeout(_ASK_SECONDS), self._http.request(method, url, **named) as answer:
                return answer.status, (await answer.text(errors="replace")).strip()[:500]
        except (aiohttp.ClientError, OSError) as error:  # a timeout is an OSError
            raise StreamRefused(f"{method} {url}: {str(error) or 'no answer in time'}") from error

    # --- in

    async def _keep(self) -> None:
        """A sign of life on the control channel, as gateways give it: servers sweep channels that are silent."""
        async with Publisher(self._http, self._urls["control"], CHANNELS["control"][1]) as control:
            while True:
                await control.send(json.dumps({"keep": "alive"}).encode())
                await asyncio.sleep(KEEP_SECONDS)

    async def _publish(self) -> None:
        """The clip into segments, each picture when it is due; then wait for all of it, and end the input."""
        segmenter = Segmenter(self._plan.clip.audio)
        async with (
            Publisher(self._http, self._urls["subscribe"], MPEGTS, delete=True) as publisher,
            asyncio.TaskGroup() as closing,
        ):
            feed = _Feed(publisher, closing)
            began = time.monotonic()
            for unit in self._plan.clip.play(self._plan.seconds):
                if self._plan.real_time:
                    await asyncio.sleep(began + (due(unit) - START) / CLOCK - time.monotonic())
                if isinstance(unit, AudioPacket):
                    await feed.write(segmenter.audio(unit))
                else:
                    await self._picture_in(feed, segmenter, unit)
            await feed.write(segmenter.finish())
            feed.close()
            await self._tail(feed.begins)
            self._on_last()
            self._all_in = True

    async def _picture_in(self, feed: _Feed, segmenter: Segmenter, picture: CodedPicture) -> None:
        *before, piece = segmenter.video(picture)
        await feed.write(before)
        if piece.starts:
            feed.close()
            if not self._plan.real_time:
                await self._room(feed.ends)
            await feed.open(picture.pts)
        self.figures.published[picture.pts] = time.monotonic()
        await feed.write([piece])
        feed.ends[-1] = max(feed.ends[-1], picture.pts)

    async def _room(self, ends: Sequence[int]) -> None:
        """Wait for the end of the segment AHEAD of the next one; at first for anything, as a worker that is still
        subscribing would begin with the newest segment. ``ends`` has the last PTS of each segment so far."""
        if not ends:
            return
        until = ends[-AHEAD] if len(ends) >= AHEAD else 0
        while self._furthest < until:
            if not await self._another(STALL_SECONDS):
                raise StreamFailed(f"nothing of {self.name} came out for {STALL_SECONDS:g} s")

    async def _tail(self, begins: Sequence[int]) -> None:
        """Wait until the worker reads the last segment: it will get all of it then, though the channel is closed.
        That is known from a picture of it that is out, or of the one before if a decoder may hold all of the last.
        ``begins`` has the first PTS of each segment."""
        order = self.figures.published
        late = [first for first in begins[-2:] if sum(pts >= first for pts in order) > HELD]
        until = late[-1] if late else -1
        patience = TAIL_SECONDS if late else QUIET_SECONDS
        while self._furthest < until or (not late and len(self.figures.received) < len(order)):
            if not await self._another(patience):
                return

    async def _another(self, seconds: float) -> bool:
        """Whether another picture comes out within so many seconds."""
        self._came.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._came.wait()
        except TimeoutError:
            return False
        return True

    # --- out

    async def _watch(self) -> None:
        demuxer = Demuxer()
        async with Subscriber(self._http, self._urls["publish"], start=0, every=True) as segments:
            async for segment in segments:
                try:
                    async for chunk in segment:
                        now = time.monotonic()
                        if self._record is not None:
                            self._record.write(chunk)
                        self._take(demuxer.feed(chunk), now)
                except SegmentFailed:
                    self.figures.problems["output_segment"] += 1
                self._take(demuxer.end_segment(), time.monotonic())
                self._read = segment.seq
                self._came.set()

    def _take(self, events: Sequence[DemuxEvent], now: float) -> None:
        figures = self.figures
        for event in events:
            if not isinstance(event, Picture) or event.pts is None:
                continue
            published = figures.published.get(event.pts)
            if published is None or event.pts in figures.received:
                figures.unknown += 1
                continue
            if not figures.received:
                self._on_first()
            figures.received[event.pts] = now
            figures.latest.append(now - published)
            self._furthest = max(self._furthest, event.pts)
            self._came.set()

    async def _listen(self) -> None:
        """The worker's events, until the channel is deleted. Raises StreamFailed when it says that the stream did."""
        said = ""
        async with Subscriber(self._http, self._urls["events"], start=0, every=True) as segments:
            async for segment in segments:
                try:
                    lines = (await segment.read()).splitlines()
                except SegmentFailed:
                    self.figures.problems["event_segment"] += 1
                    continue
                for line in lines:
                    event = json.loads(line)["event"]
                    if event["type"] == "error":
                        said = event.get("message", "")
                    if event["type"] == "heartbeat":
                        self._beat(event)
                if self.figures.state == "failed":
                    raise StreamFailed(f"{self.name} failed: {said or 'the worker does not say why'}")
                if self.figures.state == "ended":
                    if not self._all_in:
                        raise StreamFailed(f"the worker ended {self.name} before the end of its input")
                    self._over.set()

    def _beat(self, event: dict[str, Any]) -> None:
        figures = self.figures
        figures.state = event["state"]
        figures.dropped = Counter(event["dropped"])
        figures.problems |= Counter(event["problems"])  # counts that only grow; ours have other names
        figures.compute_seconds = event["compute"]["total_compute_seconds"]

    async def _ended(self) -> None:
        """Return when the worker has ended the stream and all of its output is here."""
        try:
            async with asyncio.timeout(END_SECONDS):
                await self._over.wait()
        except TimeoutError:
            raise StreamFailed(f"the worker did not end {self.name} within {END_SECONDS:g} s") from None
        status, text = await self._ask("GET", self._urls["publish"] + "/next")
        last = int(text) - 1 if status == 200 and text.isascii() and text.isdigit() else -1
        while self._read < last and await self._another(QUIET_SECONDS):
            pass


class _Feed:
    """Pieces into segments. A segment is confirmed while the next one is written."""

    def __init__(self, publisher: Publisher, closing: asyncio.TaskGroup) -> None:
        self.begins: list[int] = []  # the PTS of each segment's keyframe
        self.ends: list[int] = []  # the largest PTS of each segment, so far
        self._publisher = publisher
        self._closing = closing
        self._segment: OutgoingSegment | None = None

    async def open(self, pts: int) -> None:
        self._segment = await self._publisher.open()
        self.begins.append(pts)
        self.ends.append(pts)

    async def write(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if self._segment is not None:
                await self._segment.write(piece.data)

    def close(self) -> None:
        """The segment is complete: its readers need not wait for more."""
        if self._segment is not None:
            self._closing.create_task(self._segment.close())
            self._segment = None


def _texts(errors: BaseExceptionGroup[BaseException]) -> Iterator[str]:
    for each in errors.exceptions:
        if isinstance(each, BaseExceptionGroup):
            yield from _texts(each)
        else:
            yield str(each)
