"""The local orchestrator: advertises one container, forwards jobs to it, and keeps the ledger.

One job on the wire, as the quickstart page draws it: gateway -> ``POST /live/video-to-video`` with ``X-Model-Id`` ->
the same request to the container -> its answer back, each way piece by piece.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import time
import uuid
from collections import Counter
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any

import aiohttp
from aiohttp import web

from gpu_byoc._version import VERSION
from gpu_byoc.config import OrchestratorConfig
from gpu_byoc.errors import (
    AllBusy,
    BadRequest,
    ContainerTimeout,
    ContainerUnreachable,
    Draining,
    GpuByocError,
    NoCapacity,
    NotReady,
)
from gpu_byoc.local.container import Container, State, reason_of
from gpu_byoc.local.http1 import AnswerHead, Malformed
from gpu_byoc.local.intake import Body, capability_of, content_type, refuse_coding
from gpu_byoc.local.ledger import Entry, Ledger, billed, compute_seconds, utc
from gpu_byoc.local.ports import Listener, listen
from gpu_byoc.local.relay import CLIENT_GONE, ROUTE, Ending, Exchange, Road, conclude, refusal
from gpu_byoc.local.upstream import Origin, Pool

log = logging.getLogger(__name__)


class _Job(Ending):
    """What the ledger will say about a job."""

    __slots__ = ("began", "compute", "dispatched", "ended", "id", "started")

    def __init__(self) -> None:
        super().__init__()
        self.id = uuid.uuid4().hex
        self.started = time.time()  # the wall clock, for people
        self.began = time.perf_counter()  # the steady one, for the bill
        self.ended: float | None = None
        self.dispatched = False
        self.compute: float | None = None

    def entry(self, capability: str) -> Entry:
        wall = (self.ended or time.perf_counter()) - self.began
        cost = billed(wall, self.dispatched)
        return Entry(self.id, capability, utc(self.started), wall, cost, self.compute, self.outcome, self.status)


class Orchestrator:
    """``async with Orchestrator(config):`` serves until the block ends. Raises an OperatorError if it cannot start."""

    def __init__(self, config: OrchestratorConfig) -> None:
        self.config = config
        self.ledger = Ledger(config.datadir)
        self.running = 0
        self.outcomes: Counter[str] = Counter()  # of this run; refusals too, which the ledger does not have
        self.container: Container | None = None
        self._origin = Origin(config.container_url)
        self._pool = Pool()
        self._road = Road(self._pool, config.stall, config.job_timeout, ContainerTimeout, ContainerUnreachable)
        self._draining = False
        self._exits = AsyncExitStack()
        self._listener: Listener | None = None
        self._cli: Listener | None = None

    @property
    def port(self) -> int:
        assert self._listener is not None
        return self._listener.port

    @property
    def cli_port(self) -> int:
        assert self._cli is not None
        return self._cli.port

    async def __aenter__(self) -> Orchestrator:
        async with AsyncExitStack() as stack:
            config = self.config
            self.ledger.open()
            stack.push_async_callback(self.ledger.close)
            stack.push_async_callback(self._pool.close)
            session = await stack.enter_async_context(aiohttp.ClientSession())
            status = web.get("/status", self._get_status)
            routes = [
                web.post(ROUTE, self._post_job),
                web.get("/process/token", self._get_token),
                web.get("/health", self._get_health),
                status,
            ]
            self._cli = await listen([status], config.cli_host, config.cli_port, "-cliAddr")
            stack.push_async_callback(self._cli.close)
            self._listener = await listen(routes, config.host, config.port, "-serviceAddr")
            stack.push_async_callback(self._listener.close)
            log.info("Orchestrator listening on %s (status on %s)", self._listener.url, self._cli.url)
            if config.byoc:
                self.container = Container(config.container_url, config.model_id, session)
                watch = asyncio.create_task(self.container.watch())
                watch.add_done_callback(_say_if_it_broke)
                stack.push_async_callback(_end, watch)
            else:
                log.warning("no -byoc flag: this orchestrator advertises no capability")
            self._exits = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._draining = True  # tokens say 0 from here on, new jobs are refused, those under way may end
        await self._exits.aclose()

    # --- jobs

    async def _post_job(self, request: web.Request) -> web.StreamResponse:
        try:
            container, body = self._admit(request)
        except GpuByocError as error:
            self.outcomes[error.code] += 1
            return refusal(error)
        job = _Job()
        self.running += 1
        try:
            work = self._forward(request, container, body, job)
            return await conclude(request, work, job, {"X-Job-Id": job.id})
        finally:
            if job.outcome == CLIENT_GONE and self._draining:
                job.outcome, job.status = Draining.code, Draining.status  # it took too long to end
            self.running -= 1
            self.outcomes[job.outcome] += 1
            self.ledger.add(job.entry(container.capability))

    def _admit(self, request: web.Request) -> tuple[Container, Body]:
        """Whether this job may start now. Raises what it is refused with; nothing was started then."""
        capability = capability_of(request)
        refuse_coding(request)
        container = self.container
        if container is None or capability != container.capability:
            raise NoCapacity(f"No capacity available for capability {capability}: this orchestrator does not have it")
        if self._draining:
            raise Draining("this orchestrator is shutting down")
        if container.state is State.LOADING:
            raise NotReady(f"the container {container.url} is not ready: {container.reason}")
        if container.state is State.DOWN:
            raise _unreachable(container, container.reason)
        body = Body(request, self.config.max_body)
        if self.running >= self.config.capacity:
            raise AllBusy(f"{capability}: all {self.config.capacity} places of this orchestrator are taken")
        return container, body

    async def _forward(self, request: web.Request, container: Container, body: Body, job: _Job) -> web.StreamResponse:
        log.info("Job received from gateway: %s", container.capability)
        headers = [content_type(request), ("X-Model-Id", container.capability)]
        async with self._road.exchange(self._origin, body) as exchange:
            try:
                await self._start(exchange, headers, container, job)
                head = await self._answer(exchange, container)
                job.compute = compute_seconds(head.headers.get("x-metadata"))
                job.status = head.status
                response = await exchange.send_back(request, head, {"X-Job-Id": job.id})
                job.outcome = "ok" if head.status < 400 else "worker_error"
                return response
            finally:
                job.ended = exchange.ended

    async def _start(self, exchange: Exchange, headers: list[tuple[str, str]], container: Container, job: _Job) -> None:
        try:
            await exchange.start(headers)
        except OSError as error:
            container.refused(reason_of(error))
            raise _unreachable(container, reason_of(error)) from error
        job.dispatched = True
        self.ledger.begin(job.id, container.capability, utc(job.started))
        log.info("Forwarded to BYOC container")

    async def _answer(self, exchange: Exchange, container: Container) -> AnswerHead:
        try:
            head = await exchange.head()
        except (OSError, Malformed) as error:
            raise ContainerUnreachable(
                f"the container {container.url} broke off without an answer: {error}; see its log"
            ) from error
        log.info("Container response received, returning to gateway")
        return head

    # --- what gateways and people ask

    async def _get_token(self, request: web.Request) -> web.Response:
        """A job token as go-livepeer's, off-chain: no tickets, no price, any signature or none."""
        try:
            address = _eth_address(request.headers.get("Livepeer-Eth-Address"))
        except BadRequest as error:
            return refusal(error)
        capability = request.headers.get("Livepeer-Capability", "")
        if not capability:
            return refusal(BadRequest("the header Livepeer-Capability is missing or empty"))
        state, free = self._room(capability)
        token: dict[str, Any] = {
            "sender_address": address,
            "price": {"pixelsPerUnit": 1},
            "service_addr": self._service_addr(request),
            "available_capacity": free,
            # Not go-livepeer's: why there is none, so that a gateway can say so.
            "capability_state": state,
        }
        if state in (State.DOWN, State.LOADING) and self.container is not None:
            token["reason"] = f"container {self.container.url}: {self.container.reason}"
        return web.json_response(token)

    def _room(self, capability: str) -> tuple[str, int]:
        """The capability's state in a word, and how many more jobs may come."""
        container = self.container
        if container is None or container.capability != capability:
            return "unknown", 0
        if self._draining:
            return "draining", 0
        if container.state is not State.READY:
            return container.state, 0
        return container.state, max(0, self.config.capacity - self.running)

    def _service_addr(self, request: web.Request) -> str:
        assert self._listener is not None
        if self._listener.host in ("0.0.0.0", "::"):
            return f"http://{request.host}"  # a wildcard is no address to call: the one that was dialled is
        return self._listener.url

    async def _get_health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "OK"})

    async def _get_status(self, request: web.Request) -> web.Response:
        return web.json_response(self.status())

    def status(self) -> dict[str, Any]:
        """What ``GET /status`` answers."""
        capabilities = []
        if (container := self.container) is not None:
            capabilities.append(
                {
                    "name": container.capability,
                    "container_url": container.url,
                    "state": container.state,
                    "reason": container.reason,
                    "capacity": self.config.capacity,
                    "running": self.running,
                }
            )
        totals = self.ledger.totals
        return {
            "role": "orchestrator",
            "version": VERSION,
            "service_addr": self._listener.url if self._listener else None,
            "capabilities": capabilities,
            "outcomes": dict(self.outcomes),
            "ledger": {
                "path": str(self.ledger.path),
                "jobs": totals.jobs,
                "wall_seconds": totals.wall_seconds,
                "billed_seconds": totals.billed_seconds,
                "compute_seconds": totals.compute_seconds,
                "error": self.ledger.error or None,
                "lost": self.ledger.lost,
            },
        }


def _unreachable(container: Container, reason: str) -> ContainerUnreachable:
    return ContainerUnreachable(
        f"cannot reach the BYOC container {container.url}: {reason}. Is it running, does it listen on 0.0.0.0, "
        "and is -byocContainerURL its address?"
    )


def _eth_address(header: str | None) -> dict[str, str]:
    """``Livepeer-Eth-Address``: base64 of ``{"addr": "0x...", "sig": "0x..."}``. Raises BadRequest.

    Off-chain nobody signs: sig may be absent, empty or "0x" and is not looked at.
    """
    if header is None:
        raise BadRequest('the header Livepeer-Eth-Address is missing: base64 of {"addr": "", "sig": ""} will do')
    try:
        value = json.loads(base64.b64decode(header, validate=True))
    except (binascii.Error, ValueError, RecursionError) as error:
        raise BadRequest(f"the header Livepeer-Eth-Address is not base64 of a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise BadRequest("the header Livepeer-Eth-Address is not base64 of a JSON object")
    return {key: text for key in ("addr", "sig") if isinstance(text := value.get(key), str)}


def _say_if_it_broke(watch: asyncio.Task[None]) -> None:
    if not watch.cancelled() and (bug := watch.exception()) is not None:
        log.critical("the container is not watched any more", exc_info=bug)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
