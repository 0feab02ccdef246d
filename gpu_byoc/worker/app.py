"""The worker's routes, its state, and the errors it answers with."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from aiohttp import hdrs, web

from gpu_byoc._version import VERSION
from gpu_byoc.config import ServeConfig
from gpu_byoc.engine.device import Outcome
from gpu_byoc.engine.engine import Engine
from gpu_byoc.errors import Draining, ExpectationFailed, GpuByocError, NotReady, TooLarge
from gpu_byoc.processor import Processor
from gpu_byoc.worker import jobs, telemetry
from gpu_byoc.worker.bodies import Budget, http_error
from gpu_byoc.worker.streams import Streams

log = logging.getLogger("gpu_byoc.worker")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Worker:
    """One processor behind HTTP. ``engine`` is None while it loads.

    ``state``: LOADING until the processor is initialised, IDLE, OK while there is work, ERROR once only a restart
    helps.
    """

    def __init__(self, config: ServeConfig, processor: Processor) -> None:
        self.config = config
        self.processor = processor
        self.engine: Engine | None = None
        self.degraded: list[str] = []
        self.draining = False
        self.active = 0
        self.budget = Budget(config.max_collected)
        self.quiet = asyncio.Event()  # set when the last job ends while draining
        self.began = time.monotonic()
        self.streams = Streams(self)
        self.metrics = telemetry.Metrics(self)

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
        return self.state in ("IDLE", "OK") and not self.draining

    def ready_engine(self) -> Engine:
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
        app.router.add_get("/health", self._health)
        app.router.add_get("/version", _json(self._version))
        app.router.add_get("/app-version", _json(lambda: {"version": self.config.app_version}))
        app.router.add_get("/hardware/info", _json(lambda: telemetry.hardware(self, "gpu_info")))
        app.router.add_get("/hardware/stats", _json(lambda: telemetry.hardware(self, "gpu_stats")))
        app.router.add_get("/compute", _json(lambda: telemetry.compute_report(self)))
        app.router.add_get("/metrics", self._metrics)
        return app

    # --- handlers

    async def _job(self, request: web.Request) -> web.StreamResponse:
        if self.draining:
            raise Draining("the worker is shutting down; send the job elsewhere")
        self.ready_engine()
        self.active += 1
        try:
            return await jobs.handle(self, request)
        finally:
            self._left()

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
        if request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return None

    def _refuse(self, error: GpuByocError) -> web.Response:
        self.metrics.errors.labels(error.code).inc()
        return http_error(error, jobs.headers(self, Outcome(None), 0))

    async def _health(self, request: web.Request) -> web.Response:
        """``{"status": ...}``. 503 only when waiting or a restart is the right reaction: LOADING and ERROR."""
        state = self.state
        return web.json_response({"status": state}, status=503 if state in ("LOADING", "ERROR") else 200)

    async def _status(self, request: web.Request) -> web.Response:
        return web.json_response(telemetry.status(self, request.headers.get("X-Stream-Id")))

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self.metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    def _version(self) -> dict[str, str]:
        return {"pipeline": self.config.pipeline, "model_id": self.config.capability, "version": VERSION}

    @web.middleware
    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except GpuByocError as error:
            return self._refuse(error)
        except web.HTTPException as error:
            code = error.reason.lower().replace(" ", "_")
            body = {"status": "error", "error": code, "message": f"{request.method} {request.path}: {error.reason}"}
            allow = {name: value for name, value in error.headers.items() if name == hdrs.ALLOW}
            return web.json_response(body, status=error.status, headers=allow)
        except (ConnectionError, asyncio.CancelledError):  # aiohttp cancels the handler of a client that went away
            self.metrics.errors.labels("cut_off" if self.draining else "client_gone").inc()
            raise
        except Exception:  # a bug of ours: the caller gets no internals, the log gets everything
            log.exception("%s %s failed", request.method, request.path)
            return self._refuse(GpuByocError("internal error; the worker's log says more"))


def _json(read: Callable[[], object]) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response(read())

    return handler


def _literal(path: str) -> str:
    """A path without any of the router's own syntax."""
    return path.replace("{", "%7B").replace("}", "%7D")
