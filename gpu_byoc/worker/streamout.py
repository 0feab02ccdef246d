"""The output of one live stream: pieces from the pump into the segments of a trickle channel.

A frame counts as out when the connection has taken its last byte, and is taken back when its segment turns out to be
lost. A publisher that breaks is made anew; what it could not take meanwhile is counted as dropped.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

import aiohttp

from gpu_byoc.bridge import Closed, ToLoop
from gpu_byoc.core.cursor import Backoff
from gpu_byoc.errors import ChannelClosed, ChannelFailed, SegmentFailed
from gpu_byoc.redact import redacted
from gpu_byoc.transport.trickle_client import OutgoingSegment, Publisher
from gpu_byoc.worker.house import Tell
from gpu_byoc.worker.outlet import Departure

log = logging.getLogger("gpu_byoc.stream")

RESTARTS: Final = 5
"""Publishers in a row that break before the first segment: after that the channel is given up."""


class Output:
    """``run`` is its whole life. It tells ``out``, ``dropped``, ``lost``, ``trouble``; ``first`` is called once, when
    something has left; ``give_up`` says that a broken publisher is not worth another one."""

    def __init__(
        self,
        name: str,
        url: str,
        sink: ToLoop[Departure],
        tell: Tell,
        *,
        first: Callable[[], None],
        give_up: Callable[[], bool],
        backoff: Backoff,
    ) -> None:
        self.taken = 0  # frames that came out of the sink
        self._name = name
        self._url = url
        self._sink = sink
        self._tell = tell
        self._first: Callable[[], None] | None = first
        self._give_up = give_up
        self._backoff = backoff

    async def run(self, http: aiohttp.ClientSession) -> None:
        """To the end of the output. Raises ChannelMissing, ChannelClosed, ChannelFailed."""
        failures = 0
        while True:
            try:
                label = f"publish_url at {redacted(self._url)}"
                async with Publisher(http, self._url, "video/MP2T", backoff=self._backoff, label=label) as publisher:
                    failures = 0
                    return await _Segments(self, publisher).run()
            except ChannelFailed as error:
                failures += 1
                if failures > RESTARTS or self._give_up():
                    raise
                self._trouble("publisher_restarted", f"publishing anew: {error}")
            try:
                async with asyncio.timeout(min(0.25 * 2**failures, 5.0)):
                    while (departure := await self.next()) is not None:
                        self.unpublished(departure)
                    return None
            except TimeoutError:
                pass

    async def next(self) -> Departure | None:
        """None at the end, also where the pump failed: it says so itself."""
        try:
            departure = await self._sink.get()
        except (EOFError, Closed):
            return None
        except asyncio.CancelledError:
            raise
        except Exception:  # the pump's own failure, which it has told already
            return None
        self.taken += departure.arrived is not None
        return departure

    def out(self, departure: Departure) -> None:
        if departure.arrived is not None:
            self._tell("out", time.monotonic() - departure.arrived)
        if self._first is not None:
            self._first()
            self._first = None

    def unpublished(self, departure: Departure) -> None:
        if departure.arrived is not None:
            self._tell("dropped", "unpublished")

    def lost(self, frames: int, why: str) -> None:
        """A segment that had taken so many frames."""
        self._trouble("segment_lost", f"output {why}")
        if frames:
            self._tell("lost", frames)

    def _trouble(self, reason: str, text: str) -> None:
        self._tell("trouble", reason)
        log.warning("stream %s: %s", self._name, text)


class _Segments:
    """One publisher's time. ``_frames`` has the segments that are not confirmed, and how many frames each has taken."""

    def __init__(self, output: Output, publisher: Publisher) -> None:
        self._output = output
        self._publisher = publisher
        self._frames: dict[OutgoingSegment, int] = {}
        self._current: OutgoingSegment | None = None
        self._closing: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        output = self._output
        try:
            while (departure := await output.next()) is not None:
                try:
                    written = await self._write(departure)
                except SegmentFailed as error:
                    self._drop_current(str(error))
                    written = False
                except BaseException:  # the channel's end, or a cancel: on its way, and nobody will know
                    output.unpublished(departure)
                    raise
                if written:
                    output.out(departure)
                else:
                    output.unpublished(departure)
            if self._current is not None:
                await self._close(self._current)
        except BaseException:  # a cancel above all: nobody waits for confirmations then
            for task in self._closing:
                task.cancel()
            raise
        finally:
            if self._closing:
                await asyncio.wait(self._closing)
            for segment, frames in self._frames.items():
                output.lost(frames, f"segment {segment.seq}: never confirmed")

    async def _write(self, departure: Departure) -> bool:
        """False where the segment is broken already; the next one starts with a keyframe."""
        if departure.piece.starts:
            if self._current is not None:
                task = asyncio.create_task(self._close(self._current))
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
                self._current = None
            self._current = await self._publisher.open()
            self._frames[self._current] = 0
        if self._current is None:
            return False
        await self._current.write(departure.piece.data)
        self._frames[self._current] += departure.arrived is not None
        return True

    def _drop_current(self, why: str) -> None:
        """It broke; without one, the next did before its first byte."""
        segment, self._current = self._current, None
        self._output.lost(0 if segment is None else self._frames.pop(segment), why)

    async def _close(self, segment: OutgoingSegment) -> None:
        try:
            await segment.close()
        except SegmentFailed as error:
            self._output.lost(self._frames.pop(segment), str(error))
        except (ChannelClosed, ChannelFailed):
            pass  # the next ``open`` says so; the frames are lost at the end
        else:
            del self._frames[segment]
