"""The worker's routes, its state, and the errors it answers with."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import Any

from aiohttp import hdrs, web

from gpu_byoc._version import VERSION
from gpu_byoc.config import ServeConfig
from gpu_byoc.engine.device import Outcome
from gpu_byoc.engine.fleet import Fleet
from gpu_byoc.errors import Draining, ExpectationFailed, GpuByocError, NotReady, TooLarge, Unauthorized
from gpu_byoc.logs import about
from gpu_byoc.processor import Processor
from gpu_byoc.transport.door import Door
from gpu_byoc.worker import jobs, telemetry
from gpu_byoc.worker.admission import Suspects
from gpu_byoc.worker.bodies import Budget, http_error
from gpu_byoc.worker.cors import Cors
from gpu_byoc.worker.discretion import is_here, unnamed
from gpu_byoc.worker.health import Health, is_deep
from gpu_byoc.worker.registration import Registration
from gpu_byoc.worker.streams import Streams, addressed
from gpu_byoc.worker.tracing import Tracing, job_id

log = logging.getLogger("gpu_byoc.worker")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

CLIENT_CLOSED_REQUEST = 499
"""nginx's number for it. Nobody reads it: it only ends the request."""


class Worker:
    """One processor behind HTTP. ``engine`` is None while it loads.

    ``state``: LOADING until the processor is initialised, IDLE, OK while there is work, ERROR once only a restart
    helps.
    """

    def __init__(self, config: ServeConfig, processor: Processor) -> None:
        self.config = config
        self.processor = processor
        self.engine: Fleet | None = None
        self.degraded: list[str] = []
        self.sandbox: dict[str, str] | None = None  # around decoding: its walls, and why one does not stand
        self.draining = False
        self.registration: Registration | None = None  # with an orchestrator; calls are then checked
        self.door: Door | None = None  # None in tests that serve without one
        self.active = 0
        self.budget = Budget(config.max_collected)
        self.suspects = Suspects(config.error_budget, config.limits.max_failing_clients)
        self.quiet = asyncio.Event()  # set when the last job ends while draining
        self.began = time.monotonic()
        self.health = Health(self)
        self.streams = Streams(self)
        self.metrics = telemetry.Metrics(self)
        self.tracing: Tracing | None = None

    @property
    def state(self) -> str:
        if self.engine is None:
            return "LOADING"
        if self.engine.fatal is not None or not (self.engine.alive or self.draining):
            return "ERROR"
        return "OK" if self.active or self.streams or self.engine.busy else "IDLE"

    @property
    def accepts(self) -> bool:
        """Whether a job that comes now has a chance."""
        return self.health.ready

    def ready_engine(self) -> Fleet:
        """Raises NotReady while the processor loads."""
        if self.engine is None:
            raise NotReady("the processor is still initialising; wait until /health says IDLE")
        return self.engine

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._errors], client_max_size=self.config.max_body)
        names = ["/live/video-to-video", "/"]
        if self.config.capability:
            names.append("/" + self.config.capability.strip("/"))
        for path in dict.fromkeys(names):
            app.router.add_post(_literal(path), self._job, expect_handler=self._expect)
        self.streams.add_routes(app)
        for path in ("/stream/status", "/api/stream/status"):
            app.router.add_get(path, self._status)
        app.router.add_get("/health", self._health)  # here with ?deep=1, or behind other requests: see the door
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/version", _json(self._version))
        app.router.add_get("/app-version", _json(lambda: {"version": self.config.app_version}))
        app.router.add_get("/hardware/info", _json(lambda: telemetry.hardware(self, "gpu_info")))
        app.router.add_get("/hardware/stats", _json(lambda: telemetry.hardware(self, "gpu_stats")))
        app.router.add_get("/compute", self._compute)
        app.router.add_get("/metrics", self._metrics)
        Cors(self.config.security.cors_origins).install(app)
        return app

    # --- handlers

    async def _job(self, request: web.Request) -> web.StreamResponse:
        if self.draining:
            raise Draining("the worker is shutting down; send the job elsewhere")
        self.ready_engine()
        self.active += 1
        name = job_id(request.headers)
        try:
            with about(job=name), self.tracing.job(request.headers, name) if self.tracing else nullcontext():
                return await self._handled(request, name)
        finally:
            self._left()

    async def _handled(self, request: web.Request, name: str) -> web.StreamResponse:
        try:
            response = await jobs.handle(self, request)
        except GpuByocError as error:
            log.debug("job %s: %s: %s", name, error.code, error)
            raise
        except (web.HTTPException, ConnectionError):
            raise
        except Exception as bug:  # here, where its log line is one about this job
            raise self._internal(request) from bug
        log.debug("job %s: answered", name)
        return response

    def _left(self) -> None:
        self.active -= 1
        if self.draining and not self.active:
            self.quiet.set()

    async def _expect(self, request: web.Request) -> web.StreamResponse | None:
        """``Expect: 100-continue``: a body that will be refused is not asked for."""
        if request.headers.get(hdrs.EXPECT, "").lower() != "100-continue":
            return self._refuse(ExpectationFailed("only Expect: 100-continue is understood"))
        if (request.content_length or 0) > self.config.max_body:
            return self._refuse(
                TooLarge(
                    f"a body of {request.content_length} bytes; the limit is {self.config.max_body} (--max-body-mb)"
                )
            )
        try:
            self._check(request)
            if self.draining:
                raise Draining("the worker is shutting down; send the job elsewhere")
            self.ready_engine()
        except GpuByocError as error:
            return self._refuse(error)
        if request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return None

    def _check(self, request: web.Request) -> None:
        """Raise for a call that is not from our orchestrator. The network's calls are POSTs; the rest only reads."""
        if self.registration is not None and request.method == hdrs.METH_POST:
            self.registration.check(request.headers)

    def _refuse(self, error: GpuByocError) -> web.Response:
        self.metrics.errors.labels(error.code).inc()
        challenge = {hdrs.WWW_AUTHENTICATE: "Bearer"} if isinstance(error, Unauthorized) else {}
        response = http_error(error, self.state, jobs.headers(self, Outcome(None), 0) | challenge)
        if self.draining:
            response.force_close()  # the next request is for another worker
        return response

    async def _health(self, request: web.Request) -> web.Response:
        if not is_deep(request.path_qs):
            return _json_bytes(*self.health.health())
        status, body = self.health.deep()
        return web.json_response(self._seen_by(request, json.loads(body)), status=status)

    async def _ready(self, request: web.Request) -> web.Response:
        return _json_bytes(*self.health.routing())

    async def _status(self, request: web.Request) -> web.Response:
        return web.json_response(self._seen_by(request, telemetry.status(self, addressed(request, request.query))))

    async def _compute(self, request: web.Request) -> web.Response:
        return web.json_response(self._seen_by(request, telemetry.compute_report(self)))

    def _seen_by(self, request: web.Request, report: dict[str, Any]) -> dict[str, Any]:
        """What this caller is shown of it."""
        registration = self.registration
        if registration is None or registration.knows(request.headers) or is_here(request.headers, request.remote):
            return report
        return unnamed(report)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self.metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    def _version(self) -> dict[str, str]:
        return {"pipeline": self.config.pipeline, "model_id": self.config.capability, "version": VERSION}

    @web.middleware
    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            self._check(request)
            return await handler(request)
        except GpuByocError as error:
            return self._refuse(error)
        except web.HTTPException as error:
            code = error.reason.lower().replace(" ", "_")
            body = {"status": "error", "error": code, "message": f"{request.method} {request.path}: {error.reason}"}
            allow = {name: value for name, value in error.headers.items() if name == hdrs.ALLOW}
            return web.json_response(body, status=error.status, headers=allow)
        except asyncio.CancelledError:  # aiohttp cancels the handler of a client that went away
            self._gone()
            raise
        except ConnectionError:  # amid its answer: raised, aiohttp would log it as an error of ours
            self._gone()
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=CLIENT_CLOSED_REQUEST)
        except Exception:  # a bug of ours: the caller gets no internals, the log gets everything
            return self._refuse(self._internal(request))

    def _gone(self) -> None:
        self.metrics.errors.labels("cut_off" if self.draining else "client_gone").inc()

    def _internal(self, request: web.Request) -> GpuByocError:
        log.exception("%s %s failed", request.method, request.path)
        return GpuByocError("internal error; the worker's log says more")


def _json_bytes(status: int, body: bytes) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json", charset="utf-8")


def _json(read: Callable[[], object]) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response(read())

    return handler


def _literal(path: str) -> str:
    """A path without any of the router's own syntax."""
    return path.replace("{", "%7B").replace("}", "%7D")
