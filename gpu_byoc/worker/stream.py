"""One live stream: five trickle channels around a pump. One task group; whatever ends first ends the rest."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import aiohttp

from gpu_byoc.bridge import Closed, ToLoop, ToThread
from gpu_byoc.core.cursor import Backoff
from gpu_byoc.core.meter import SECOND, Usage
from gpu_byoc.core.pace import Pace
from gpu_byoc.core.session import Session
from gpu_byoc.core.trickle import NEWEST
from gpu_byoc.engine.fleet import Fleet
from gpu_byoc.errors import (
    BadParams,
    ChannelFailed,
    ChannelMissing,
    DecoderFailed,
    GpuByocError,
    ProcessorError,
    SegmentFailed,
    StreamQuarantined,
    TooLarge,
    UnsupportedMedia,
)
from gpu_byoc.media.decode import StreamReader
from gpu_byoc.media.demux import Limits
from gpu_byoc.media.sandbox import SandboxedReader
from gpu_byoc.processor import pixel_format
from gpu_byoc.redact import redacted, traceback_of
from gpu_byoc.transport.trickle_client import OLDEST, IncomingSegment, Publisher, Subscriber
from gpu_byoc.worker.intake import Arrival
from gpu_byoc.worker.outlet import Departure
from gpu_byoc.worker.pump import Pump
from gpu_byoc.worker.streamnews import News
from gpu_byoc.worker.streamout import Output
from gpu_byoc.worker.streamparams import StreamParams, Urls, parse_stream_params

if TYPE_CHECKING:
    from gpu_byoc.worker.app import Worker

log = logging.getLogger("gpu_byoc.stream")

SEGMENT_COST = 16 << 10
"""Bytes that a segment counts for beside its own: an empty one is a request all the same."""
HEARTBEAT = 1.0
JOIN_SECONDS = 5.0
FLUSH_SECONDS = 8.0
"""How long a stream that was stopped may take to get out what is inside: what a container has before it is killed."""

CLOSE_SECONDS = 1.0
"""How long a trickle server may take to close a channel when the worker ends."""

PATIENCE = Backoff(attempts=8)

_TOLD: Mapping[str, type[GpuByocError]] = {
    "decoder": DecoderFailed,
    "no_video": UnsupportedMedia,
    "too_large": TooLarge,
}
"""Problems of the input that are events: the others are only counted. All but ``decoder`` once a stream."""


class _Ended(Exception):
    """Ends the task group; how it ended is in the session."""


class LiveStream:
    """``run`` is the stream's whole life; ``stop`` ends it in good order. ``connect`` opens the session in which all of
    its channels are."""

    def __init__(
        self,
        worker: Worker,
        name: str,
        urls: Urls,
        params: StreamParams,
        encoder: str,
        connect: Callable[[], aiohttp.ClientSession],
    ) -> None:
        self.name = name
        self.urls = urls
        self.params = params
        self.session = Session(time.monotonic())
        self._books = threading.Lock()  # over the session's numbers, which the pump's threads write
        self.ended = asyncio.Event()
        self._worker = worker
        self._connect = connect
        self._security = security = worker.config.security
        self._limits = limits = worker.config.limits
        self._pace = Pace(security.max_input_mbit * 1e6 / 8, time.monotonic())
        self._control_pace = Pace(security.max_update_rate, time.monotonic())
        self._fleet = worker.ready_engine()
        check_size(self._fleet, params, security.max_stream_pixels)
        self._loop = asyncio.get_running_loop()
        self._source: ToThread[Arrival] = ToThread(limits.input_buffer_mb << 20)
        self._sink: ToLoop[Departure] | None = ToLoop(limits.output_buffer_mb << 20) if urls.publish else None
        self._finished: asyncio.Future[BaseException | None] = self._loop.create_future()
        self._stopping = asyncio.Event()
        self._flush_seconds = FLUSH_SECONDS
        self._news = News(name, urls, self._problem, PATIENCE, limits.max_news)
        self._output = self._make_output()
        self._used = Usage()  # at the last heartbeat
        self._fps = {"ingress": 0.0, "egress": 0.0}
        self._said_stopped = self._said_first_in = False
        self.segments_in = 0  # that have been read to their end
        engine = self._fleet.open_stream(name)  # from here on nothing fails before run(), which closes it
        self.pump = Pump(
            engine,
            name,
            params,
            self._source,
            self._sink,
            self._told,
            encoder=encoder,
            budget=None if worker.config.lossless else worker.config.latency_budget,
            pixel_format=pixel_format(worker.processor) or "rgb24",
            open_reader=partial(
                SandboxedReader if security.sandbox_decode else StreamReader,
                Limits(max_pixels=security.max_stream_pixels, max_pes=limits.max_packet_mb << 20),
            ),
            pixel_rate=None if worker.config.lossless else security.max_pixel_rate,
            may_fail=worker.config.error_budget,
            most_audio=limits.max_audio_packets,
            most_audio_bytes=limits.max_audio_mb << 20,
            # one more may come
            share=lambda: max(3, engine.config.slots // (self._fleet.streams_on(engine) + 1)),
        )
        self.encoder = encoder

    def _make_output(self) -> Output | None:
        if self._sink is None or self.urls.publish is None:
            return None
        return Output(
            self.name,
            self.urls.publish,
            self._sink,
            self._told,
            first=lambda: self._news.tell("send_first_processed_segment"),
            give_up=self._stopping.is_set,
            backoff=PATIENCE,
        )

    # --- from outside

    def stop(self, reason: str, flush: float | None = None) -> None:
        """End in good order: what has arrived still goes through, within ``flush`` seconds. May be called twice."""
        if flush is not None:
            self._flush_seconds = min(flush, FLUSH_SECONDS)
        if self.session.happen("stop", reason):
            self._said_stopped = True
            self._news.tell("stream_stopped", reason=reason)
        self._stopping.set()

    def affords_update(self) -> bool:
        """Whether one more may come by HTTP: at the pace of its control channel, both together."""
        if self._control_pace.affords(1, time.monotonic()):
            return True
        self._problem("control_rate")
        return False

    def update(self, given: Mapping[str, Any]) -> StreamParams:
        """New parameters from the next frame on. Raises BadParams, and then the old ones stay."""
        params = parse_stream_params(self._worker.processor, given, self.params.given)
        check_size(self._fleet, params, self._security.max_stream_pixels)
        self.params = params
        self.pump.update(params)
        self._news.tell("params_updated", params=dict(params.given))
        return params

    def numbers(self) -> dict[str, Any]:
        with self._books:
            fps = {f"{way}_video_fps": rate for way, rate in self._fps.items()}
            numbers = self.session.numbers()
        return {
            "stream_id": self.name,
            "params": dict(self.params.given),
            "encoder": self.encoder,
            "fps": fps,
            "queue_age_seconds": self.pump.house.age(),
            **numbers,
        }

    # --- its life

    async def run(self) -> None:
        """Never raises but for a cancel, which drops what is inside."""
        log.info("stream %s: started", self.name)
        try:
            async with self._connect() as http:
                await self._live(http)
        finally:
            self.pump.stop()
            self.session.happen("failed", "cut off")
            usage = self._fleet.end_stream(self.name)
            end = self.session.state.value, self.session.reason
            log.info("stream %s: %s (%s), %s", self.name, *end, _sums(self.session, usage))
            if self._worker.tracing is not None:
                self._worker.tracing.streamed(self.numbers(), usage)
            self.ended.set()

    async def _live(self, http: aiohttp.ClientSession) -> None:
        self.pump.start()
        try:
            async with asyncio.TaskGroup() as group:
                for part in (self._news.events, self._news.data, self._control, self._media_in, self._media_out):
                    group.create_task(part(http))
                group.create_task(self._heart())
                group.create_task(self._deadline())
                group.create_task(self._lifetime())
        except* _Ended:
            pass
        except* Exception as errors:  # ours, or a bug: either way this stream is over, and no other
            self._fail(errors.exceptions[0])
        finally:
            self.pump.stop()
            if not await asyncio.to_thread(self.pump.join, JOIN_SECONDS):
                self._problem("threads_left")
                log.error("stream %s: its threads did not end within %g s", self.name, JOIN_SECONDS)
            self._count_unpublished()
        await self._last_words(http)

    def _count_unpublished(self) -> None:
        """Frames that were encoded, and then nobody was there to take them out of the sink."""
        taken = self._output.taken if self._output is not None else 0
        with self._books:
            if left := self.pump.outlet.departed - taken:
                self.session.dropped["unpublished"] += left

    async def _deadline(self) -> None:
        """A stop is not for ever: what cannot be got out by then is dropped."""
        await self._stopping.wait()
        seconds = self._flush_seconds
        await asyncio.sleep(seconds)
        raise ChannelFailed(f"the output took nothing more within {seconds:.1f} s after the stop")

    async def _lifetime(self) -> None:
        if seconds := self._security.max_stream_seconds:
            await asyncio.sleep(seconds)
            self.stop(f"it has lasted {seconds:g} s, and --max-stream-seconds allows no more")

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
        start = OLDEST if self._worker.config.lossless else NEWEST
        async with Subscriber(http, url, start, backoff=PATIENCE, label=_label("subscribe", url)) as segments:
            async for segment in segments:
                if segment.skipped:
                    self._problem("segments_skipped", segment.skipped)
                try:
                    await self._segment_in(segment)
                except Closed:  # the pump has ended
                    return

    async def _segment_in(self, segment: IncomingSegment) -> None:
        try:
            async for chunk in segment:
                if self._source.full:
                    self._problem("input_waits")
                await self._source.put(Arrival(chunk, time.monotonic()), len(chunk))
                await self._slow_down(len(chunk))
        except SegmentFailed as error:
            self._problem("segment_failed")
            log.warning("stream %s: %s", self.name, error)
        self.segments_in += 1
        if not self._said_first_in and segment.received:
            self._said_first_in = True
            self._news.tell("receive_first_ingest_segment")
        await self._source.put(Arrival(None, time.monotonic()), SEGMENT_COST)
        await self._slow_down(SEGMENT_COST)

    async def _slow_down(self, size: int) -> None:
        """An input that is faster than it may be is read more slowly: its sender waits, or we miss segments."""
        wait = self._pace.wait(size, time.monotonic())
        if not wait:
            return
        self._problem("input_rate")
        if self.session.problems["input_rate"] == 1:
            self._over(f"more input than the {self._security.max_input_mbit:g} Mbit/s of --max-input-mbit; it waits")
        await asyncio.sleep(wait)

    async def _media_out(self, http: aiohttp.ClientSession) -> None:
        """The stream is over when all of its output is published."""
        if self._output is not None:
            await self._output.run(http)
        error = await self._finished
        if error is not None:
            raise error
        self.session.happen("input_ended", "end of input")
        self.session.happen("flushed")
        raise _Ended

    # --- control, and the heartbeat

    async def _control(self, http: aiohttp.ClientSession) -> None:
        if self.urls.control is None:
            return
        label = _label("control", self.urls.control)
        try:
            async with Subscriber(http, self.urls.control, backoff=PATIENCE, label=label, every=True) as messages:
                async for message in messages:
                    await self._message(await self._read(message))
            self.stop("the control channel is closed")
        except ChannelMissing:
            self.stop("the control channel is gone")

    async def _read(self, message: Any) -> bytes:
        try:
            data: bytes = await message.read(self._limits.max_update_kb << 10)
        except SegmentFailed as error:
            self._problem("control")
            log.warning("stream %s: control: %s", self.name, error)
            return b""
        return data

    async def _message(self, data: bytes) -> None:
        lines, most = [line for line in data.splitlines() if line.strip()], self._limits.max_update_lines
        for line in lines[:most]:
            self._line(line)
        if len(lines) > most:
            self._refused(BadParams("control", f"{len(lines)} lines in a message; only {most} were read"))
        if wait := self._control_pace.wait(max(1, min(len(lines), most)), time.monotonic()):
            self._problem("control_rate")
            await asyncio.sleep(wait)

    def _line(self, line: bytes) -> None:
        try:
            message = json.loads(line)
            if message == {"keep": "alive"}:
                return
            if not isinstance(message, dict):
                raise BadParams("params", "expected an object")
            self.update(message)
        except (ValueError, RecursionError) as error:
            self._refused(BadParams("control", f"not JSON: {error}"))
        except BadParams as error:
            self._refused(error)

    def _refused(self, error: BadParams) -> None:
        self._problem("params")
        self._news.tell("error", **error.body())

    async def _heart(self) -> None:
        """A beat each second, from the first moment to the last, whatever the frames are doing."""
        beat = self._loop.time()
        while True:
            self._beat()
            beat = max(beat + HEARTBEAT, self._loop.time())
            await asyncio.sleep(beat - self._loop.time())

    def _beat(self) -> None:
        """Numbers since the last beat, to events and data. Compute adds up: over all beats it is the stream's total."""
        now, total = time.monotonic(), self._fleet.total(self.name)
        with self._books:
            numbers, fps = self.session.numbers(), self.session.beat(now)
            self._fps = fps
        row = {
            "second": self._fleet.now() // SECOND,
            "frames": total.frames - self._used.frames,
            "compute_seconds": (total.compute_ns - self._used.compute_ns) / SECOND,
            "copy_seconds": (total.copy_ns - self._used.copy_ns) / SECOND,
            "queue_seconds": (total.queue_ns - self._used.queue_ns) / SECOND,
            "total_compute_seconds": total.compute_ns / SECOND,
        }
        self._used = total
        self._news.line("compute", **row)
        self._news.pulse(
            fps=fps,
            compute=row,
            queue_age_seconds=self.pump.house.age(),
            urls={name: getattr(self.urls, name) is not None for name in Urls.__dataclass_fields__},
            **{name: numbers[name] for name in ("state", "dropped", "problems", "latency_seconds", "dimensions")},
        )

    async def _last_words(self, http: aiohttp.ClientSession) -> None:
        """The last event and the last line."""
        self.session.happen("failed", "ended without a reason")  # no effect where there is one
        if not self._said_stopped:
            self._news.tell("stream_stopped", reason=self.session.reason)
        self._beat()
        await self._news.last_words(http)
        if self._worker.draining:
            await self._close_channels(http)

    async def _close_channels(self, http: aiohttp.ClientSession) -> None:
        """Of a worker that ends: readers are told so at once. Otherwise whoever made the channels closes them."""
        urls = [url for url in (self.urls.publish, self.urls.data, self.urls.events) if url is not None]
        closing = [Publisher(http, url, "", delete=True, progress=CLOSE_SECONDS).aclose() for url in urls]
        for failure in await asyncio.gather(*closing, return_exceptions=True):
            if isinstance(failure, GpuByocError):
                log.warning("not closed: %s", failure)

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
                news = detail == "pixel_rate" and session.dropped[detail] == 1
            elif what == "lost":
                session.took_back(detail, "segment_lost")
            elif what == "trouble":
                session.problems[detail] += 1
            elif what == "problem":
                session.problems[detail.reason] += 1
                first = session.problems[detail.reason] == 1
                news = detail.reason == "decoder" or (first and detail.reason in _TOLD)
            elif what == "failed_frame":
                session.dropped[detail.code] += 1
                news = session.dropped[detail.code] == 1 or not isinstance(detail, ProcessorError)
            elif what == "format":
                session.width, session.height = detail.width, detail.height
            else:
                news = what == "finished"
        if what == "out":
            self._worker.metrics.latency.observe(detail * 1e3)
        elif what == "failed_frame":
            self._worker.metrics.errors.labels(detail.code).inc()
        if news:
            self._loop.call_soon_threadsafe(self._note, what, detail)

    def _note(self, what: str, detail: Any) -> None:
        session = self.session
        if what == "in":
            session.happen("frame")
            self._news.tell("stream_started", dimensions={"width": session.width, "height": session.height})
        elif what == "failed_frame":
            self._news.tell("error", **detail.body())
        elif what == "dropped":
            self._over(f"more than the {self._security.max_pixel_rate} pixels a second of --max-pixel-rate: dropped")
        elif what == "problem":
            self._over(detail.detail, _TOLD[detail.reason])
        elif not self._finished.done():
            if detail is not None:
                self._fail(detail)
            self._finished.set_result(detail)

    def _over(self, text: str, kind: type[GpuByocError] = TooLarge) -> None:
        """It sends more than it may, or what nothing can be made of. It is told and counted; it goes on."""
        error = kind(text)
        log.warning("stream %s: %s", self.name, error)
        self._worker.metrics.errors.labels(error.code).inc()
        self._news.tell("error", **error.body())

    def _fail(self, error: BaseException) -> None:
        """Once. What is not one of ours is a bug: the log says all of it, the outside only that."""
        known = error if isinstance(error, GpuByocError) else GpuByocError("internal error; see the worker's log")
        if self.session.happen("failed", str(known)):
            log.error("stream %s failed: %s", self.name, error if known is error else traceback_of(error))
            self._worker.metrics.errors.labels(known.code).inc()
            self._news.tell("error", **known.body())
            if isinstance(known, StreamQuarantined):
                self._worker.metrics.quarantined.labels(known.reason).inc()
                self._news.tell("stream_quarantined", reason=known.reason, message=str(known))


def _label(what: str, url: str) -> str:
    return f"{what}_url at {redacted(url)}"


def check_size(fleet: Fleet, params: StreamParams, most: int) -> None:
    """Refuse an output size of more than ``most`` pixels, and one of which not even the slots of one stream fit into
    memory. Raises BadParams."""
    if params.width is not None and params.height is not None:
        if params.width * params.height > most:
            raise BadParams("width", f"{params.width}x{params.height} is over the {most} pixels of --max-stream-pixels")
        nbytes, memory = params.width * params.height * 4, fleet.config.memory
        if 3 * nbytes > memory:
            raise BadParams("width", f"{params.width}x{params.height} needs more memory than --memory-mb allows")


def _sums(session: Session, usage: Usage) -> str:
    dropped = sum(session.dropped.values())
    return (
        f"{session.frames_in} frames in, {session.frames_out} out, {dropped} dropped, "
        f"{usage.compute_ns / SECOND:.3f} s of compute"
    )
