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
from gpu_byoc.engine.engine import Engine
from gpu_byoc.errors import (
    BadParams,
    ChannelClosed,
    ChannelFailed,
    ChannelMissing,
    GpuByocError,
    ProcessorError,
    SegmentFailed,
)
from gpu_byoc.processor import pixel_format
from gpu_byoc.transport.trickle_client import OutgoingSegment, Publisher, Subscriber, open_session
from gpu_byoc.worker.pump import Arrival, Departure, Pump
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
JOIN_SECONDS = 5.0
FLUSH_SECONDS = 8.0
"""How long a stream that was stopped may take to get out what is inside: what a container has before it is killed."""

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
        self._sink: ToLoop[Departure] | None = ToLoop(SINK_BYTES) if urls.publish else None
        self._finished: asyncio.Future[BaseException | None] = self._loop.create_future()
        self._stopping = asyncio.Event()
        self._news: deque[dict[str, Any]] = deque(maxlen=NEWS)
        self._pulse: dict[str, Any] | None = None  # the newest heartbeat; older ones are of no interest
        self._used = Usage()  # at the last heartbeat
        self._fps = {"ingress": 0.0, "egress": 0.0}
        self._has_news = asyncio.Event()
        self._lines: deque[bytes] = deque(maxlen=NEWS)
        self._has_lines = asyncio.Event()
        self._first_out = self._said_stopped = False
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
            share=lambda: max(3, worker.config.engine.slots // (len(worker.streams) + 1)),  # one more may come
        )
        self.encoder = encoder
        check_size(self._engine, params)

    # --- from outside

    def stop(self, reason: str) -> None:
        """End in good order: what has arrived still goes through. May be called twice."""
        if self.session.happen("stop", reason):
            self._said_stopped = True
            self.tell("stream_stopped", reason=reason)
        self._stopping.set()

    def update(self, given: Mapping[str, Any]) -> StreamParams:
        """New parameters from the next frame on. Raises BadParams, and then the old ones stay."""
        params = parse_stream_params(self._worker.processor, given, self.params.given)
        check_size(self._engine, params)
        self.params = self.pump.params = params
        self.tell("params_updated", params=dict(params.given))
        return params

    def tell(self, kind: str, **fields: Any) -> None:
        """Queue an event for the events channel."""
        event = {"type": kind, "timestamp": int(time.time() * 1000), **fields}
        self._news.append({"event": event, "queue_event_type": "ai_stream_events"})
        self._has_news.set()

    def numbers(self) -> dict[str, Any]:
        with self._books:
            fps = {f"{way}_video_fps": rate for way, rate in self._fps.items()}
            numbers = self.session.numbers()
        return {
            "stream_id": self.name,
            "params": dict(self.params.given),
            "encoder": self.encoder,
            "fps": fps,
            "queue_age_seconds": self.pump.age(),
            **numbers,
        }

    # --- its life

    async def run(self) -> None:
        """Never raises but for a cancel, which drops what is inside."""
        log.info("stream %s: started", self.name)
        self._engine.open_stream(self.name)
        try:
            async with open_session(self._worker.config.insecure) as http:
                await self._live(http)
        finally:
            self.pump.stop()
            self.session.happen("failed", "cut off")
            usage = self._engine.end_stream(self.name)
            end = self.session.state.value, self.session.reason
            log.info("stream %s: %s (%s), %s", self.name, *end, _sums(self.session, usage))
            self.ended.set()

    async def _live(self, http: aiohttp.ClientSession) -> None:
        self.pump.start()
        try:
            async with asyncio.TaskGroup() as group:
                for part in (self._events, self._data, self._control, self._media_in, self._media_out):
                    group.create_task(part(http))
                group.create_task(self._heart())
                group.create_task(self._deadline())
        except* _Ended:
            pass
        except* Exception as errors:  # ours, or a bug: either way this stream is over, and no other
            self._fail(errors.exceptions[0])
        finally:
            self.pump.stop()
            if not await asyncio.to_thread(self.pump.join, JOIN_SECONDS):
                self._problem("threads_left")
                log.error("stream %s: its threads did not end within %g s", self.name, JOIN_SECONDS)
        await self._last_words(http)

    async def _deadline(self) -> None:
        """A stop is not for ever: what cannot be got out by then is dropped."""
        await self._stopping.wait()
        await asyncio.sleep(FLUSH_SECONDS)
        raise ChannelFailed(f"the output took nothing more within {FLUSH_SECONDS:g} s after the stop")

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
            raise error
        self.session.happen("input_ended", "end of input")
        self.session.happen("flushed")
        raise _Ended

    async def _publish(self, http: aiohttp.ClientSession, url: str, sink: ToLoop[Departure]) -> None:
        """Pieces into segments. A publisher that breaks is made anew, and what it missed is counted as dropped."""
        failures = 0
        while True:
            try:
                async with Publisher(http, url, "video/MP2T", backoff=PATIENCE) as publisher:
                    failures = 0
                    return await self._segments(publisher, sink)
            except ChannelFailed as error:
                failures += 1
                if failures > 5 or self._stopping.is_set():
                    raise
                self._problem("publisher_restarted")
                log.warning("stream %s: publishing anew: %s", self.name, error)
            try:
                async with asyncio.timeout(min(0.25 * 2**failures, 5.0)):
                    while (departure := await self._next(sink)) is not None:
                        self._unpublished(departure)
                    return None
            except TimeoutError:
                pass

    async def _next(self, sink: ToLoop[Departure]) -> Departure | None:
        """None at the end, also where the pump failed: ``_finished`` says how."""
        try:
            return await sink.get()
        except (EOFError, Closed):
            return None
        except asyncio.CancelledError:
            raise
        except Exception:  # the pump's own failure, which it has told already
            return None

    def _unpublished(self, departure: Departure) -> None:
        if departure.arrived is not None:
            self._told("dropped", "unpublished")

    async def _segments(self, publisher: Publisher, sink: ToLoop[Departure]) -> None:
        segment: OutgoingSegment | None = None
        closing: set[asyncio.Task[None]] = set()
        try:
            while (departure := await self._next(sink)) is not None:
                try:
                    if departure.piece.starts:
                        if segment is not None:
                            task = asyncio.create_task(self._close(segment))
                            closing.add(task)
                            task.add_done_callback(closing.discard)
                        segment = None
                        segment = await publisher.open()
                    if segment is None:  # broken in the middle; the next one starts with a keyframe
                        self._unpublished(departure)
                        continue
                    await segment.write(departure.piece.data)
                except SegmentFailed as error:
                    self._segment_lost(error)
                    self._unpublished(departure)
                    segment = None
                    continue
                if departure.arrived is not None:
                    self._told("out", time.monotonic() - departure.arrived)
                if not self._first_out:
                    self._first_out = True
                    self.tell("send_first_processed_segment")
            if segment is not None:
                await self._close(segment)
        except BaseException:  # a cancel above all: nobody waits for confirmations then
            for task in closing:
                task.cancel()
            raise
        finally:
            if closing:
                await asyncio.wait(closing)

    async def _close(self, segment: OutgoingSegment) -> None:
        try:
            await segment.close()
        except SegmentFailed as error:
            self._segment_lost(error)
        except (ChannelClosed, ChannelFailed):
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
        beat = self._loop.time()
        while True:
            self._beat()
            beat = max(beat + HEARTBEAT, self._loop.time())
            await asyncio.sleep(beat - self._loop.time())

    def _beat(self) -> None:
        """Numbers since the last beat, to events and data. Compute adds up: over all beats it is the stream's total."""
        now, total = time.monotonic(), self._engine.total(self.name)
        with self._books:
            numbers, fps = self.session.numbers(), self.session.beat(now)
            self._fps = fps
        row = {
            "second": self._engine.now() // SECOND,
            "frames": total.frames - self._used.frames,
            "compute_seconds": (total.compute_ns - self._used.compute_ns) / SECOND,
            "copy_seconds": (total.copy_ns - self._used.copy_ns) / SECOND,
            "queue_seconds": (total.queue_ns - self._used.queue_ns) / SECOND,
            "total_compute_seconds": total.compute_ns / SECOND,
        }
        self._used = total
        self._lines.append(json.dumps({"type": "compute", "stream_id": self.name, **row}).encode() + b"\n")
        self._has_lines.set()
        event = {
            "type": "heartbeat",
            "timestamp": int(time.time() * 1000),
            "stream_id": self.name,
            "fps": fps,
            "compute": row,
            "queue_age_seconds": self.pump.age(),
            "urls": {name: getattr(self.urls, name) is not None for name in Urls.__dataclass_fields__},
            **{name: numbers[name] for name in ("state", "dropped", "problems", "latency_seconds", "dimensions")},
        }
        self._pulse = {"event": event, "queue_event_type": "stream_heartbeat"}
        self._has_news.set()

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
        """What happened first, then how it goes. What could not be sent is kept."""
        self._has_news.clear()
        while self._news:
            event = self._news.popleft()
            try:
                await publisher.send(json.dumps(event).encode())
            except GpuByocError:
                self._news.appendleft(event)
                self._has_news.set()
                raise
        pulse, self._pulse = self._pulse, None
        if pulse is not None:
            await publisher.send(json.dumps(pulse).encode())

    async def _send_lines(self, publisher: Publisher) -> None:
        self._has_lines.clear()
        lines = b"".join(self._lines)
        self._lines.clear()
        if lines:
            await publisher.send(lines)

    async def _data(self, http: aiohttp.ClientSession) -> None:
        if self.urls.data is None:
            return
        while True:
            try:
                async with Publisher(http, self.urls.data, "application/jsonl", backoff=PATIENCE) as publisher:
                    while True:
                        await self._has_lines.wait()
                        await self._send_lines(publisher)
            except (ChannelMissing, ChannelClosed):
                return
            except (ChannelFailed, SegmentFailed) as error:
                self._problem("data")
                log.warning("stream %s: data: %s", self.name, error)
                await asyncio.sleep(HEARTBEAT)

    async def _last_words(self, http: aiohttp.ClientSession) -> None:
        """The last event and the last line, on publishers of their own: the ordinary ones went with the task group."""
        self.session.happen("failed", "ended without a reason")  # no effect where there is one
        if not self._said_stopped:
            self.tell("stream_stopped", reason=self.session.reason)
        self._beat()
        try:
            async with asyncio.timeout(2.0):
                if self.urls.events is not None:
                    async with Publisher(http, self.urls.events, "application/json") as publisher:
                        await self._send_news(publisher)
                if self.urls.data is not None:
                    async with Publisher(http, self.urls.data, "application/jsonl") as publisher:
                        await self._send_lines(publisher)
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
        """Once. What is not one of ours is a bug: the log says all of it, the outside only that."""
        known = error if isinstance(error, GpuByocError) else GpuByocError("internal error; see the worker's log")
        if self.session.happen("failed", str(known)):
            log.error("stream %s failed: %s", self.name, error, exc_info=None if known is error else error)
            self.tell("error", **known.body())


def check_size(engine: Engine, params: StreamParams) -> None:
    """Refuse an output size of which not even the slots of one stream fit into memory. Raises BadParams."""
    if params.width is not None and params.height is not None:
        nbytes, memory = params.width * params.height * 4, engine.config.memory
        if 3 * nbytes > memory:
            raise BadParams("width", f"{params.width}x{params.height} needs more memory than --memory-mb allows")


def _sums(session: Session, usage: Usage) -> str:
    dropped = sum(session.dropped.values())
    return (
        f"{session.frames_in} frames in, {session.frames_out} out, {dropped} dropped, "
        f"{usage.compute_ns / SECOND:.3f} s of compute"
    )
