"""The local gateway: takes jobs over HTTP, finds an orchestrator for each, and tries the next one when one fails."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Final, NamedTuple

import aiohttp
from aiohttp import web

from gpu_byoc._version import VERSION
from gpu_byoc.config import GatewayConfig
from gpu_byoc.errors import (
    ContainerTimeout,
    Draining,
    NetworkError,
    OrchestratorTimeout,
    OrchestratorUnreachable,
    ProcessorTimeout,
)
from gpu_byoc.local.container import reason_of
from gpu_byoc.local.http1 import AnswerHead, Malformed
from gpu_byoc.local.intake import Body, capability_of, content_type, refuse_coding
from gpu_byoc.local.metadata import read_object
from gpu_byoc.local.ports import Listener, listen
from gpu_byoc.local.relay import RELAYED, ROUTE, Ending, Exchange, Road, conclude
from gpu_byoc.local.tokens import Peer, TokenBook
from gpu_byoc.local.upstream import Pool

log = logging.getLogger(__name__)

MAX_ERROR_BODY: Final = 64 * 1024  # bytes kept of a 5xx answer while the next orchestrator is tried
TOO_SLOW: Final = frozenset({ContainerTimeout.code, ProcessorTimeout.code})
"""Such an answer is the client's: the job was computed, and is paid for, once; others would be no faster."""


class _Failure(NamedTuple):
    """What one orchestrator came to: its 5xx answer, or the error of reaching it."""

    peer: Peer
    answer: web.Response | None
    text: str


class Gateway:
    """``async with Gateway(config):`` serves until the block ends. Raises an OperatorError if it cannot start."""

    def __init__(self, config: GatewayConfig) -> None:
        self.config = config
        self.running = 0
        self.outcomes: Counter[str] = Counter()
        self._pool = Pool()
        self._road = Road(self._pool, config.stall, config.job_timeout, OrchestratorTimeout, OrchestratorUnreachable)
        self._draining = False
        self._exits = AsyncExitStack()
        self._book: TokenBook | None = None
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

    async def __aenter__(self) -> Gateway:
        async with AsyncExitStack() as stack:
            config = self.config
            stack.push_async_callback(self._pool.close)
            session = await stack.enter_async_context(aiohttp.ClientSession())
            self._book = TokenBook(config.orchestrators, session, config.token_ttl)
            stack.push_async_callback(self._book.close)
            status = web.get("/status", self._get_status)
            job = self._post_job if config.http_ingest else self._no_ingest
            routes = [web.post(ROUTE, job), web.get("/health", self._get_health), status]
            self._cli = await listen([status], config.cli_host, config.cli_port, "-cliAddr")
            stack.push_async_callback(self._cli.close)
            self._listener = await listen(routes, config.host, config.port, "-httpAddr")
            stack.push_async_callback(self._listener.close)
            log.info("Gateway listening on %s (status on %s)", self._listener.url, self._cli.url)
            await self._look_around(self._book)
            self._exits = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._draining = True
        await self._exits.aclose()

    async def _look_around(self, book: TokenBook) -> None:
        """Say once at the start if nobody is there; a gateway may well be started first."""
        await book.ask("-")  # any name: an orchestrator answers for those that it does not have, too
        if all(peer.error for peer in book.peers):
            told = ", ".join(f"{peer.url} ({peer.error})" for peer in book.peers)
            log.warning("no orchestrator can be reached yet: %s; asking again with each job", told)

    # --- jobs

    async def _no_ingest(self, request: web.Request) -> web.StreamResponse:
        body = {"status": "error", "error": "no_ingest", "message": "start the gateway with -httpIngest to send jobs"}
        return web.json_response(body, status=404)

    async def _post_job(self, request: web.Request) -> web.StreamResponse:
        self.running += 1
        ending = Ending()
        try:
            return await conclude(request, self._route(request, ending), ending)
        finally:
            self.running -= 1
            self.outcomes[ending.outcome] += 1

    async def _route(self, request: web.Request, ending: Ending) -> web.StreamResponse:
        response = await self._first_answer(request)
        ending.status = response.status
        ending.outcome = "ok" if response.status < 400 else f"relayed_{response.status}"
        return response

    async def _first_answer(self, request: web.Request) -> web.StreamResponse:
        """Try one orchestrator after the other, until one gives an answer below 500, or has tried for too long."""
        assert self._book is not None
        capability = capability_of(request)
        refuse_coding(request)
        if self._draining:
            raise Draining("this gateway is shutting down")
        body = Body(request, self.config.max_body, keep=True)
        failures: list[_Failure] = []
        for peer in await self._book.order_for(capability):
            with peer.busy():
                result = await self._try(request, capability, body, peer)
            if isinstance(result, web.StreamResponse):
                return result
            self._book.failed(capability, peer)
            log.warning("%s: orchestrator %s failed: %s", capability, peer.url, result.text)
            failures.append(result)
        return _last_word(failures)

    async def _try(
        self, request: web.Request, capability: str, body: Body, peer: Peer
    ) -> web.StreamResponse | _Failure:
        headers = [content_type(request), ("X-Model-Id", capability)]
        origin = peer.origin
        try:
            async with self._road.exchange(origin, body) as exchange:
                await exchange.start(headers)
                head = await exchange.head()
                if head.status < 500:
                    return await exchange.send_back(request, head, {"X-Orchestrator-Url": origin.url})
                text = await _keep(exchange)
        except (OSError, Malformed) as error:
            return _Failure(peer, None, reason_of(error))
        answer = None if text is None else _again(head, text, origin.url)
        if answer is not None and head.status == 504 and read_object(text or b"").get("error") in TOO_SLOW:
            return answer
        return _Failure(peer, answer, f"it answered {head.status}")

    # --- what people ask

    async def _get_health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "OK"})

    async def _get_status(self, request: web.Request) -> web.Response:
        return web.json_response(self.status())

    def status(self) -> dict[str, Any]:
        """What ``GET /status`` answers."""
        peers = self._book.peers if self._book else []
        return {
            "role": "gateway",
            "version": VERSION,
            "http_addr": self._listener.url if self._listener else None,
            "http_ingest": self.config.http_ingest,
            "running": self.running,
            "outcomes": dict(self.outcomes),
            "orchestrators": [
                {"url": peer.url, "service_addr": peer.origin.url, "jobs": peer.jobs, "error": peer.error or None}
                for peer in peers
            ],
        }


async def _keep(exchange: Exchange) -> bytes | None:
    """The body of a 5xx answer, kept in case that nobody does better; None if it is too long to be a message."""
    text = bytearray()
    while piece := await exchange.read():
        text += piece
        if len(text) > MAX_ERROR_BODY:
            return None
    return bytes(text)


def _again(head: AnswerHead, text: bytes, url: str) -> web.Response:
    """A kept answer, for the client."""
    response = web.Response(status=head.status, body=text, headers={"X-Orchestrator-Url": url})
    for name in RELAYED:
        if (value := head.headers.get(name.lower())) is not None:
            response.headers[name] = value
    return response


def _last_word(failures: list[_Failure]) -> web.StreamResponse:
    """When every orchestrator failed: the latest answer that is about the job, else a "busy", else our own 502."""
    answers = [failure.answer for failure in failures if failure.answer is not None]
    for answer in reversed(answers):
        if answer.status != 503:
            return answer
    if answers:
        return answers[-1]
    told = ", ".join(f"{failure.peer.url} ({failure.text})" for failure in failures)
    error: NetworkError = OrchestratorUnreachable(f"no orchestrator could take the job: {told}")
    raise error
