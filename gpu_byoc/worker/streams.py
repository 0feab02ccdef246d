"""The table of live streams and its routes: start, stop, params, status."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from aiohttp import web

from gpu_byoc.core.meter import ENDED, SECOND, Usage
from gpu_byoc.errors import AllBusy, BadParams, BadRequest, Draining, GpuByocError, OriginRefused, Overloaded
from gpu_byoc.logs import about
from gpu_byoc.transport.origins import Gatekeeper, Pins
from gpu_byoc.transport.tls import tls
from gpu_byoc.worker.bodies import collected
from gpu_byoc.worker.jobs import STREAM as JOBS
from gpu_byoc.worker.streamparams import StreamParams, Urls, as_urls, given_urls, origin_policy, parse_stream_params

if TYPE_CHECKING:
    from gpu_byoc.media.encode import EncoderChoice
    from gpu_byoc.worker.app import Worker
    from gpu_byoc.worker.stream import LiveStream

log = logging.getLogger("gpu_byoc.stream")

STOP_SECONDS = 6.0
"""How long a stop waits for the stream to flush before it says so anyway; the stream goes on flushing."""


class Streams:
    """By stream id. Every stream's task is awaited here."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._streams: dict[str, LiveStream] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.encoder: EncoderChoice | None = None  # found out once, when the first stream starts
        self._choosing = asyncio.Lock()
        self._gate = Gatekeeper(origin_policy(worker.config))
        self._tls = tls(worker.config.insecure, worker.config.security.ca_file)

    def __len__(self) -> int:
        return len(self._streams)

    def add_routes(self, app: web.Application) -> None:
        for prefix in ("/stream", "/api/stream"):
            app.router.add_post(f"{prefix}/start", self.start)
            app.router.add_post(f"{prefix}/stop", self.stop)
            for name in ("params", "update"):
                app.router.add_post(f"{prefix}/{name}", self.update)
        app.router.add_post("/live-video-to-video", self.start)

    def one(self, name: str | None) -> dict[str, Any] | None:
        """The numbers of one stream, without a name those of the only one there is. Raises BadRequest."""
        if not name:
            return next(iter(self._streams.values())).numbers() if len(self._streams) == 1 else None
        if name not in self._streams:
            raise BadRequest(f"no stream {name!r} is running")
        return self._streams[name].numbers()

    def numbers(self) -> list[dict[str, Any]]:
        return [stream.numbers() for stream in self._streams.values()]

    # --- routes

    async def start(self, request: web.Request) -> web.Response:
        worker = self._worker
        if worker.draining:
            raise Draining("the worker is shutting down; start the stream elsewhere")
        worker.ready_engine()
        body = await self._json(request, worker.config.limits.max_message_kb)
        name = _name(request, body)
        urls, pins = await self._admit(name, given_urls(body), request.remote)
        try:
            params = parse_stream_params(worker.processor, body.get("params"))
        except BadParams as error:
            return self._bad(error)
        async with self._choosing:
            if self.encoder is None:  # media code is loaded with the first stream: a worker of jobs never needs it
                self.encoder = await asyncio.to_thread(_choose_encoder, worker.config.encoder)
                log.info("encoder %s: %s", self.encoder.name, self.encoder.reason)
        try:
            stream = self._make(name, urls, pins, params, self.encoder.name)
        except BadParams as error:
            return self._bad(error)
        task = asyncio.create_task(self._run(stream, request.headers))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return self._success("Stream started successfully", request_id=name)

    async def stop(self, request: web.Request) -> web.Response:
        stream = self._find(request, await self._any_json(request), "stop")
        stream.stop("stop was asked for")
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await stream.ended.wait()
        except TimeoutError:
            pass
        return self._success("Stream stopped successfully")

    async def update(self, request: web.Request) -> web.Response:
        body = await self._json(request, self._worker.config.limits.max_update_kb)
        name = body.pop("gateway_request_id", None)
        stream = self._find(request, {"gateway_request_id": name}, "update")
        if not stream.affords_update():
            raise Overloaded("more updates a second than --max-update-rate: nothing has changed; try again")
        stream.update(body)
        return self._success("Parameters updated successfully")

    async def _admit(self, name: str, urls: Mapping[str, str], caller: str | None) -> tuple[Urls, Pins]:
        try:
            admitted, pins = await self._gate.admit(urls, caller)
        except OriginRefused as error:
            log.warning("stream %s refused: %s", name, error)
            raise
        return as_urls(admitted), pins

    def _make(self, name: str, urls: Urls, pins: Pins, params: StreamParams, encoder: str) -> LiveStream:
        from gpu_byoc.transport.trickle_client import open_session
        from gpu_byoc.worker.stream import LiveStream

        if self._worker.draining:
            raise Draining("the worker is shutting down; start the stream elsewhere")
        if name in self._streams:
            raise BadRequest(f"stream already exists: {name}")
        if len(self._streams) >= self._worker.config.most_streams:
            raise AllBusy(f"{len(self._streams)} streams are running, --max-streams allows no more; try elsewhere")
        if (waits := self._waits()) > self._worker.config.latency_budget / 4 and not self._worker.config.lossless:
            raise AllBusy(
                f"frames of the streams that run wait {waits * 1e3:.0f} ms for the device: one more would make them "
                "late; try elsewhere"
            )
        stream = LiveStream(self._worker, name, urls, params, encoder, lambda: open_session(self._tls, pins))
        self._streams[name] = stream
        return stream

    def _waits(self) -> float:
        """Seconds that a frame of the running streams waited for the device, on average over the last full second."""
        fleet = self._worker.ready_engine()
        last, booked = fleet.now() // SECOND - 1, Usage()
        for second, name, usage in fleet.usage()[0]:
            if second == last and name in self._streams:
                booked.add(usage)
        return booked.queue_ns / SECOND / booked.frames if booked.frames else 0.0

    # --- the end

    def running(self) -> list[LiveStream]:
        return list(self._streams.values())

    async def close(self, seconds: float | None, flush: float | None = None) -> None:
        """Stop all in good order; after ``seconds`` drop what is left (None: wait as long as it takes). ``flush``: in
        how many seconds a stream has to get out what is inside."""
        for stream in self._streams.values():
            stream.stop("the worker is shutting down", flush)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _run(self, stream: LiveStream, headers: Mapping[str, str]) -> None:
        tracing = self._worker.tracing
        try:
            with about(stream=stream.name), tracing.stream(headers, stream.name) if tracing else nullcontext():
                await stream.run()
        finally:
            del self._streams[stream.name]
            self._worker.metrics.streams.end(stream.numbers())

    # --- requests

    def _success(self, message: str, **more: str) -> web.Response:
        return web.json_response({"status": "success", "message": message, **more, "current_state": self._worker.state})

    def _bad(self, error: BadParams) -> web.Response:
        """For a start, where the network's own workers answer 400."""
        return web.json_response(error.body() | {"current_state": self._worker.state}, status=400)

    async def _json(self, request: web.Request, most_kb: int) -> dict[str, Any]:
        if not request.content_type.startswith("application/json"):
            raise BadRequest(f"Content-Type {request.content_type!r}; expected application/json")
        async with collected(request, most_kb << 10, self._worker.config.body_timeout, self._worker.budget) as text:
            pass
        try:
            body = json.loads(text.data)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the body is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise BadRequest("the body is not a JSON object")
        return body

    async def _any_json(self, request: web.Request) -> dict[str, Any]:
        """Stop takes any body or none."""
        try:
            return await self._json(request, self._worker.config.limits.max_message_kb)
        except GpuByocError:
            return {}

    def _find(self, request: web.Request, body: Mapping[str, Any], what: str) -> LiveStream:
        """By header, by body, or the only one there is."""
        name = addressed(request, body)
        if isinstance(name, str) and name:
            if name not in self._streams:
                raise BadRequest(f"No active stream to {what}: no stream {name!r} is running")
            return self._streams[name]
        if not self._streams:
            raise BadRequest(f"No active stream to {what}")
        if len(self._streams) > 1:
            raise BadRequest(f"which stream? X-Stream-Id or gateway_request_id is one of: {', '.join(self._streams)}")
        return next(iter(self._streams.values()))


def _choose_encoder(wanted: str) -> EncoderChoice:
    from gpu_byoc.media.encode import choose_encoder
    from gpu_byoc.worker import stream as _loads_the_rest  # noqa: F401

    return choose_encoder(wanted)


def addressed(request: web.Request, given: Mapping[str, Any]) -> Any:
    """The stream that a call says it is about, as it says it; None where it does not."""
    return request.headers.get("X-Stream-Id") or given.get("gateway_request_id")


def _name(request: web.Request, body: Mapping[str, Any]) -> str:
    name = addressed(request, body)
    if name is None:
        return uuid.uuid4().hex[:8]
    if not isinstance(name, str) or not name.strip() or len(name) > 200 or not name.isprintable():
        raise BadRequest("gateway_request_id is to be a text of 1 to 200 printable characters")
    if name in (JOBS, ENDED):
        raise BadRequest(f"gateway_request_id {name!r} is what the books call other work; choose another")
    return name
