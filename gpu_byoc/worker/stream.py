"""One live stream: five trickle channels around a pump. One task group; whatever ends first ends the rest.

``events`` and ``data`` have queues of their own that drop their oldest entry rather than wait: a slow reader of news
never holds up the picture.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import aiohttp

from gpu_byoc.bridge import Closed, ToLoop, ToThread
from gpu_byoc.core.cursor import Backoff
from gpu_byoc.core.meter import SECOND, Usage
from gpu_byoc.core.session import Session
from gpu_byoc.errors import (
    BadParams,
    ChannelClosed,
    ChannelFailed,
    ChannelMissing,
    GpuByocError,
    ProcessorError,
    SegmentFailed,
)
from gpu_byoc.media.mux import Piece
from gpu_byoc.processor import pixel_format
from gpu_byoc.transport.trickle_client import OutgoingSegment, Publisher, Subscriber
from gpu_byoc.worker.pump import Arrival, Pump
from gpu_byoc.worker.streamparams import StreamParams, Urls, parse_stream_params

if TYPE_CHECKING:
    from gpu_byoc.worker.app import Worker

log = logging.getLogger("gpu_byoc.stream")

SOURCE_BYTES = 8 << 20
"""Input that may wait for the decoder: 3 s at 20 Mbit/s. Beyond it the subscriber is not read."""

SINK_BYTES = 8 << 20
"""Output that may wait for the publisher; beyond it encoding waits, then slots run out and frames are dropped."""

MESSAGE_BYTES = 32 * 1024
NEWS = 256
HEARTBEAT = 1.0
PATIENCE = Backoff(attempts=8)


class _Ended(Exception):
    """Ends the task group; how it ended is in the session."""


class LiveStream:
    """``run`` is the stream's whole life; ``stop`` ends it in good order."""

    def __init__(self, worker: Worker, name: str, urls: Urls, params: StreamParams, encoder: str) -> None:
        self.name = name
        self.urls = urls
        self.params = params
        self.session = Session(time.monotonic())
        self._books = threading.Lock()  # over the session's numbers, which the pump's threads write
        self.ended = asyncio.Event()
        self._worker = worker
        self._engine = worker.ready_engine()
        self._loop = asyncio.get_running_loop()
        self._source: ToThread[Arrival] = ToThread(SOURCE_BYTES)
        self._sink: ToLoop[Piece] | None = ToLoop(SINK_BYTES) if urls.publish else None
        self._finished: asyncio.Future[BaseException | None] = self._loop.create_future()
        self._stopping = asyncio.Event()
        self._news: deque[dict[str, Any]] = deque(maxlen=NEWS)
        self._has_news = asyncio.Event()
        self._lines: deque[bytes] = deque(maxlen=NEWS)
        self._has_lines = asyncio.Event()
        self._first_out = False
        self.segments_in = 0  # that have been read to their end
        self.pump = Pump(
            self._engine,
            name,
            params,
            self._source,
            self._sink,
            self._told,
            encoder=encoder,
            budget=None if worker.config.lossless else worker.config.latency_budget,
            pixel_format=pixel_format(worker.processor) or "rgb24",
        )

    # --- from outside

    def stop(self, reason: str) -> None:
        """End in good order: what has arrived still goes through. May be called twice."""
        if self.session.happen("stop", reason):
            self.tell("stream_stopped", reason=reason)
        self._stopping.set()

    def update(self, given: Mapping[str, Any]) -> StreamParams:
        """New parameters from the next frame on. Raises BadParams, and then the old ones stay."""
        params = parse_stream_params(self._worker.processor, given, self.params.given)
        self.params = self.pump.params = params
        self.tell("params_updated", params=dict(params.given))
        return params

    def tell(self, kind: str, queue: str = "ai_stream_events", **fields: Any) -> None:
        """Queue an event for the events channel."""
        event = {"type": kind, "timestamp": int(time.time() * 1000), **fields}
        self._news.append({"event": event, "queue_event_type": queue})
        self._has_news.set()

    def numbers(self) -> dict[str, Any]:
        with self._books:
            return {"stream_id": self.name, "params": dict(self.params.given), **self.session.numbers()}

    # --- its life

    async def run(self) -> None:
        """Never raises but for a cancel, which drops what is inside."""
        log.info("stream %s: started", self.name)
        try:
            async with aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ssl=not self._worker.config.insecure),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            ) as http:
                await self._live(http)
        finally:
            self.pump.stop()
            self._source.abandon()
            usage = self._engine.end_stream(self.name)
            end = self.session.state.value, self.session.reason
            log.info("stream %s: %s (%s), %s", self.name, *end, _sums(self.session, usage))
            self.ended.set()

    async def _live(self, http: aiohttp.ClientSession) -> None:
        self.pump.start()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._events(http))
                group.create_task(self._heart())
                group.create_task(self._data(http))
                group.create_task(self._control(http))
                group.create_task(self._media_in(http))
                group.create_task(self._media_out(http))
        except* _Ended:
            pass
        except* GpuByocError as errors:
            self._fail(errors.exceptions[0])
        self.pump.stop()
        await asyncio.to_thread(self.pump.join, 5.0)
        await self._last_words(http)

    async def _media_in(self, http: aiohttp.ClientSession) -> None:
        if self.urls.subscribe is None:
            await self._stopping.wait()
            self._source.end()
            return
        reading = asyncio.create_task(self._subscribe(http, self.urls.subscribe))
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait([reading, stopping], return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
                self.session.happen("input_ended", "end of input")
        finally:
            for task in (reading, stopping):
                task.cancel()
            await asyncio.wait([reading, stopping])
        self._source.end()

    async def _subscribe(self, http: aiohttp.ClientSession, url: str) -> None:
        first = True
        async with Subscriber(http, url, backoff=PATIENCE) as segments:
            async for segment in segments:
                if segment.skipped:
                    self._problem("segments_skipped", segment.skipped)
                try:
                    async for chunk in segment:
                        await self._source.put(Arrival(chunk, time.monotonic()), len(chunk))
                except SegmentFailed as error:
                    self._problem("segment_failed")
                    log.warning("stream %s: %s", self.name, error)
                except Closed:
                    return
                self.segments_in += 1
                if first and segment.received:
                    first = False
                    self.tell("receive_first_ingest_segment")
                try:
                    await self._source.put(Arrival(None, time.monotonic()), 0)
                except Closed:
                    return

    async def _media_out(self, http: aiohttp.ClientSession) -> None:
        """The stream is over when all of its output is published."""
        if self._sink is not None and self.urls.publish is not None:
            await self._publish(http, self.urls.publish, self._sink)
        error = await self._finished
        if error is not None:
            raise error if isinstance(error, GpuByocError) else _Ended from error
        self.session.happen("input_ended", "end of input")
        self.session.happen("flushed")
        raise _Ended

    async def _publish(self, http: aiohttp.ClientSession, url: str, sink: ToLoop[Piece]) -> None:
        """Pieces into segments. A publisher that breaks is made anew, and what it missed is counted as dropped."""
        failures = 0
        while True:
            try:
                async with Publisher(http, url, "video/MP2T", backoff=PATIENCE) as publisher:
                    failures = 0
                    return await self._segments(publisher, sink)
            except (ChannelMissing, ChannelClosed):
                raise
            except ChannelFailed as error:
                failures += 1
                if failures > 5:
                    raise
                self._problem("publisher_restarted")
                log.warning("stream %s: publishing anew: %s", self.name, error)
                await asyncio.sleep(min(0.25 * 2**failures, 5.0))

    async def _segments(self, publisher: Publisher, sink: ToLoop[Piece]) -> None:
        segment: OutgoingSegment | None = None
        closing: set[asyncio.Task[None]] = set()
        try:
            while True:
                try:
                    piece = await sink.get()
                except EOFError:
                    break
                except Closed:
                    return
                if piece.starts:
                    if segment is not None:
                        task = asyncio.create_task(self._close(segment))
                        closing.add(task)
                        task.add_done_callback(closing.discard)
                    segment = await publisher.open()
                if segment is None:
                    continue  # broken in the middle; the next one starts with a keyframe
                try:
                    await segment.write(piece.data)
                except SegmentFailed as error:
                    self._segment_lost(error)
                    segment = None
                    continue
                if not self._first_out:
                    self._first_out = True
                    self.tell("send_first_processed_segment")
            if segment is not None:
                await self._close(segment)
        finally:
            if closing:
                await asyncio.wait(closing)

    async def _close(self, segment: OutgoingSegment) -> None:
        try:
            await segment.close()
        except SegmentFailed as error:
            self._segment_lost(error)
        except ChannelClosed:
            pass  # the next ``open`` says so

    def _segment_lost(self, error: SegmentFailed) -> None:
        self._problem("segment_lost")
        log.warning("stream %s: output %s", self.name, error)

    # --- the three small channels

    async def _control(self, http: aiohttp.ClientSession) -> None:
        if self.urls.control is None:
            return
        try:
            async with Subscriber(http, self.urls.control, backoff=PATIENCE) as messages:
                async for message in messages:
                    await self._message(await self._read(message))
            self.stop("the control channel is closed")
        except ChannelMissing:
            self.stop("the control channel is gone")

    async def _read(self, message: Any) -> bytes:
        try:
            data: bytes = await message.read(MESSAGE_BYTES)
        except SegmentFailed as error:
            self._problem("control")
            log.warning("stream %s: control: %s", self.name, error)
            return b""
        return data

    async def _message(self, data: bytes) -> None:
        for line in data.splitlines() or []:
            if not line.strip():
                continue
            try:
                message = json.loads(line)
                if message == {"keep": "alive"}:
                    continue
                if not isinstance(message, dict):
                    raise BadParams("params", "expected an object")
                self.update(message)
            except (ValueError, RecursionError) as error:
                self._refused(BadParams("control", f"not JSON: {error}"))
            except BadParams as error:
                self._refused(error)

    def _refused(self, error: BadParams) -> None:
        self._problem("params")
        self.tell("error", **error.body())

    async def _heart(self) -> None:
        """A beat each second, from the first moment to the last, whatever the frames are doing."""
        while True:
            self.tell("heartbeat", "stream_heartbeat", **self._beat())
            await asyncio.sleep(HEARTBEAT)

    def _beat(self) -> dict[str, Any]:
        now = time.monotonic()
        second = self._engine.now() // SECOND - 1
        usage = self._engine.second(self.name, second)
        row = {
            "second": second,
            "frames": usage.frames,
            "compute_seconds": usage.compute_ns / SECOND,
            "copy_seconds": usage.copy_ns / SECOND,
            "queue_seconds": usage.queue_ns / SECOND,
        }
        self._lines.append(json.dumps({"type": "compute", "stream_id": self.name, **row}).encode() + b"\n")
        self._has_lines.set()
        with self._books:
            numbers, fps = self.session.numbers(), self.session.beat(now)
        return {
            "stream_id": self.name,
            "fps": fps,
            "compute": row,
            "urls": {name: getattr(self.urls, name) is not None for name in Urls.__dataclass_fields__},
            **{name: numbers[name] for name in ("state", "dropped", "problems", "latency_seconds", "dimensions")},
        }

    async def _events(self, http: aiohttp.ClientSession) -> None:
        if self.urls.events is None:
            return
        while True:
            try:
                async with Publisher(http, self.urls.events, "application/json", backoff=PATIENCE) as publisher:
                    while True:
                        await self._has_news.wait()
                        await self._send_news(publisher)
            except ChannelMissing:
                log.warning("stream %s: there is no events channel; nobody hears of it", self.name)
                return
            except ChannelClosed:
                return
            except (ChannelFailed, SegmentFailed) as error:
                self._problem("events")
                log.warning("stream %s: events: %s", self.name, error)
                await asyncio.sleep(HEARTBEAT)

    async def _send_news(self, publisher: Publisher) -> None:
        while self._news:
            await publisher.send(json.dumps(self._news[0]).encode())
            self._news.popleft()
        self._has_news.clear()

    async def _data(self, http: aiohttp.ClientSession) -> None:
        if self.urls.data is None:
            return
        while True:
            try:
                async with Publisher(http, self.urls.data, "application/jsonl", backoff=PATIENCE) as publisher:
                    while True:
                        await self._has_lines.wait()
                        self._has_lines.clear()
                        lines = b"".join(self._lines)
                        self._lines.clear()
                        if lines:
                            await publisher.send(lines)
            except (ChannelMissing, ChannelClosed):
                return
            except (ChannelFailed, SegmentFailed) as error:
                self._problem("data")
                log.warning("stream %s: data: %s", self.name, error)
                await asyncio.sleep(HEARTBEAT)

    async def _last_words(self, http: aiohttp.ClientSession) -> None:
        """The last events, on a publisher of their own: the ordinary one went with the task group."""
        if self.urls.events is None:
            return
        self.tell("heartbeat", "stream_heartbeat", **self._beat())
        try:
            async with asyncio.timeout(2.0), Publisher(http, self.urls.events, "application/json") as publisher:
                await self._send_news(publisher)
        except (TimeoutError, GpuByocError) as error:
            log.debug("stream %s: nobody takes the last events: %s", self.name, error)

    def _problem(self, reason: str, count: int = 1) -> None:
        with self._books:
            self.session.problems[reason] += count

    # --- what the pump says, from its threads

    def _told(self, what: str, detail: Any = None) -> None:
        """Numbers are booked here, on the pump's threads; only what makes news goes to the event loop."""
        session, news = self.session, False
        with self._books:
            if what == "in":
                session.came_in()
                news = session.frames_in == 1
            elif what == "out":
                session.went_out(detail)
            elif what == "dropped":
                session.dropped[detail] += 1
            elif what == "problem":
                session.problems[detail.reason] += 1
            elif what == "failed_frame":
                session.dropped[detail.code] += 1
                news = session.dropped[detail.code] == 1 or not isinstance(detail, ProcessorError)
            elif what == "format":
                session.width, session.height = detail.width, detail.height
            else:
                news = what == "finished"
        if what == "out":
            self._worker.metrics.latency.observe(detail * 1e3)
        if news:
            self._loop.call_soon_threadsafe(self._note, what, detail)

    def _note(self, what: str, detail: Any) -> None:
        session = self.session
        if what == "in":
            session.happen("frame")
            self.tell("stream_started", dimensions={"width": session.width, "height": session.height})
        elif what == "failed_frame":
            self.tell("error", **detail.body())
        elif not self._finished.done():
            if detail is not None:
                self._fail(detail)
            self._finished.set_result(detail)

    def _fail(self, error: BaseException) -> None:
        if self.session.happen("failed", str(error)):
            known = error if isinstance(error, GpuByocError) else GpuByocError("internal error; see the worker's log")
            log.error("stream %s failed: %s", self.name, error, exc_info=None if known is error else error)
            self.tell("error", **known.body())


def _sums(session: Session, usage: Usage) -> str:
    dropped = sum(session.dropped.values())
    return (
        f"{session.frames_in} frames in, {session.frames_out} out, {dropped} dropped, "
        f"{usage.compute_ns / SECOND:.3f} s of compute"
    )
