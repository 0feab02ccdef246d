"""The local orchestrator: advertises containers, forwards jobs to them, and keeps the ledger.

Containers are the one that its command line names, and those that register (see ``registry``).

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
    BadRequest,
    ContainerTimeout,
    ContainerUnauthorized,
    ContainerUnreachable,
    Draining,
    GpuByocError,
    LedgerUnavailable,
    NoCapacity,
)
from gpu_byoc.local.capabilities import Capabilities, unreachable
from gpu_byoc.local.container import Container, reason_of
from gpu_byoc.local.http1 import AnswerHead, Malformed
from gpu_byoc.local.intake import Body, capability_of, content_type, refuse_coding
from gpu_byoc.local.ledger import Entry, Ledger, billed, compute_seconds, utc
from gpu_byoc.local.ports import Listener, listen
from gpu_byoc.local.registry import Registry
from gpu_byoc.local.relay import CLIENT_GONE, ROUTE, Ending, Exchange, Road, conclude, refusal
from gpu_byoc.local.upstream import Pool
from gpu_byoc.logs import about

log = logging.getLogger(__name__)


class _Job(Ending):
    """What the ledger will say about a job."""

    __slots__ = ("began", "booked", "capability", "compute", "dispatched", "ended", "id", "listing", "started")

    def __init__(self, capability: str) -> None:
        super().__init__()
        self.id = uuid.uuid4().hex
        self.capability = capability
        self.started = time.time()  # the wall clock, for people
        self.began = time.perf_counter()  # the steady one, for the bill
        self.ended: float | None = None
        self.dispatched = False
        self.compute: float | None = None
        self.booked: Entry | None = None  # what the ledger was told before the answer ended
        self.listing: asyncio.TimerHandle | None = None  # lists it as running if it takes long

    def entry(self) -> Entry:
        """Its row. The job is over with that, as far as the ledger is concerned."""
        if self.listing is not None:
            self.listing.cancel()
        if self.ended is None:
            self.ended = time.perf_counter()
        wall = self.ended - self.began
        cost = billed(wall, self.dispatched)
        return Entry(self.id, self.capability, utc(self.started), wall, cost, self.compute, self.outcome, self.status)


class Orchestrator:
    """``async with Orchestrator(config):`` serves until the block ends. Raises an OperatorError if it cannot start."""

    def __init__(self, config: OrchestratorConfig) -> None:
        self.config = config
        self.ledger = Ledger(config.datadir)
        self.running = 0
        self.outcomes: Counter[str] = Counter()  # of this run; refusals too, which the ledger does not have
        self.container: Container | None = None  # the one of the command line
        self._capabilities: Capabilities | None = None
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
            self._capabilities = Capabilities(session)
            stack.push_async_callback(self._capabilities.close)
            status = web.get("/status", self._get_status)
            routes = [
                web.post(ROUTE, self._post_job),
                web.get("/process/token", self._get_token),
                web.get("/health", self._get_health),
                status,
                *Registry(self._capabilities, config.secret).routes(),
            ]
            self._cli = await listen([status], config.cli_host, config.cli_port, "-cliAddr")
            stack.push_async_callback(self._cli.close)
            self._listener = await listen(routes, config.host, config.port, "-serviceAddr")
            stack.push_async_callback(self._listener.close)
            log.info("Orchestrator listening on %s (status on %s)", self._listener.url, self._cli.url)
            if config.byoc:
                self.container = self._capabilities.fix(config.model_id, config.container_url, config.capacity)
            elif not config.secret:
                log.warning("no -byoc and no -orchSecret: this orchestrator advertises no capability")
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
        job = _Job(container.capability)
        self.running += 1
        try:
            with about(job=job.id):
                work = self._place(request, container, body, job)
                response = await conclude(request, work, job, {"X-Job-Id": job.id})
                if job.booked is None:
                    await self._book(job)
                return response
        finally:
            if job.outcome == CLIENT_GONE and self._draining:
                job.outcome, job.status = Draining.code, Draining.status  # it took too long to end
            self.running -= 1
            self.outcomes[job.outcome] += 1
            self.ledger.add(job.entry(), job.booked)

    def _admit(self, request: web.Request) -> tuple[Container, Body]:
        """Whether this job may start now. Raises what it is refused with; nothing was started then."""
        assert self._capabilities is not None
        capability = capability_of(request)
        refuse_coding(request)
        if self._draining and self._capabilities.of(capability):
            raise Draining("this orchestrator is shutting down")
        if self.ledger.error:
            raise LedgerUnavailable(f"the ledger cannot be written ({self.ledger.error}), so no job can be booked")
        return self._capabilities.pick(capability), Body(request, self.config.max_body)

    async def _place(self, request: web.Request, container: Container, body: Body, job: _Job) -> web.StreamResponse:
        """Forward the job to the container, or to the next one if nothing of the job could be sent there."""
        assert self._capabilities is not None
        log.info("Job received from gateway: %s", job.capability)
        while True:
            with container.busy():
                response = await self._forward(request, container, body, job)
            if isinstance(response, web.StreamResponse):
                return response
            log.warning("%s: %s", job.capability, response)
            try:
                container = self._capabilities.pick(job.capability)
            except (NoCapacity, ContainerUnreachable):
                raise response from None

    async def _forward(
        self, request: web.Request, container: Container, body: Body, job: _Job
    ) -> web.StreamResponse | ContainerUnreachable:
        """The answer, or why the container never heard of the job."""
        token = container.token
        headers = [content_type(request), ("X-Model-Id", container.capability)]
        headers += [("Authorization", f"Bearer {token}")] if token else []
        async with self._road.exchange(container.origin, body) as exchange:
            try:
                await exchange.start(headers)
            except OSError as error:
                lost = container.slow if isinstance(error, TimeoutError) else container.refused
                lost(reason_of(error))
                return unreachable(container, reason_of(error))
            try:
                self._dispatched(job)
                head = await self._answer(exchange, container, token)
                job.compute = compute_seconds(head.headers.get("x-metadata"))
                return await self._send_back(request, exchange, head, job)
            finally:
                job.ended = exchange.ended

    def _dispatched(self, job: _Job) -> None:
        job.dispatched = True
        job.listing = self.ledger.begin(job.id, job.capability, utc(job.started))
        log.info("Forwarded to BYOC container")

    async def _send_back(
        self, request: web.Request, exchange: Exchange, head: AnswerHead, job: _Job
    ) -> web.StreamResponse:
        outcome = "ok" if head.status < 400 else "worker_error"

        async def whole() -> None:
            job.outcome, job.status, job.ended = outcome, head.status, exchange.ended
            await self._book(job)
            job.outcome = "internal"  # until the client has it

        job.status = head.status
        response = await exchange.send_back(request, head, {"X-Job-Id": job.id}, whole)
        job.outcome = outcome
        return response

    async def _book(self, job: _Job) -> None:
        """What the client gets the end of is in the ledger."""
        job.booked = job.entry()
        await self.ledger.book(job.booked)

    async def _answer(self, exchange: Exchange, container: Container, token: str) -> AnswerHead:
        try:
            head = await exchange.head()
        except (OSError, Malformed) as error:
            container.doubt()
            raise ContainerUnreachable(
                f"the container {container.url} broke off without an answer: {error}; see its log"
            ) from error
        if head.status == 401:
            container.unauthorized(token)
            raise ContainerUnauthorized(
                f"the container {container.url} does not take "
                + ("the token that it registered with" if token else "jobs without a token, and has not registered")
            )
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
        state, free, reason = self._room(capability)
        token: dict[str, Any] = {
            "sender_address": address,
            "price": {"pixelsPerUnit": 1},
            "service_addr": self._service_addr(request),
            "available_capacity": free,
            # Not go-livepeer's: why there is none, so that a gateway can say so.
            "capability_state": state,
        }
        return web.json_response(token | ({"reason": reason} if reason else {}))

    def _room(self, capability: str) -> tuple[str, int, str]:
        """The capability's state in a word, how many more jobs may come, and why there are none."""
        assert self._capabilities is not None
        state, free, reason = self._capabilities.room(capability)
        if state == "unknown":
            return state, 0, ""
        if self._draining:
            return "draining", 0, ""
        if self.ledger.error:
            return "unbooked", 0, f"its ledger cannot be written: {self.ledger.error}"
        return state, free, reason

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
        totals = self.ledger.totals
        return {
            "role": "orchestrator",
            "version": VERSION,
            "service_addr": self._listener.url if self._listener else None,
            "capabilities": self._capabilities.describe() if self._capabilities else [],
            "outcomes": dict(self.outcomes),
            "ledger": {
                "path": str(self.ledger.path),
                "jobs": totals.jobs,
                "wall_seconds": totals.wall_seconds,
                "billed_seconds": totals.billed_seconds,
                "compute_seconds": totals.compute_seconds,
                "error": self.ledger.error or None,
                "waiting": self.ledger.waiting,
            },
        }


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
