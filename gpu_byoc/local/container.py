"""The orchestrator's view of a container: asked for its health until it is up, and again until it is gone.

One that the command line names (-byocContainerURL) is asked for ever. One that has registered is forgotten, until it
registers again, when it was ready and cannot be reached any more, when it answers a job with 401, or when it has not
been up for PATIENCE seconds: as in go-livepeer, but that one looks only when it sends a job.
"""

from __future__ import annotations

import asyncio
import enum
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import aiohttp

from gpu_byoc.local.offer import Offer
from gpu_byoc.local.upstream import Origin

log = logging.getLogger(__name__)

FIRST_RETRY: Final = 0.1  # seconds; a container that is starting is registered soon after it answers
LAST_RETRY: Final = 2.0  # seconds between questions in the long run, up or down
PROBE_SECONDS: Final = 2.0
STRIKES: Final = 3
"""So many answers in a row must fail to come before a container that was ready counts as down: one that burns CPU may
miss one. A refused connection, or a health that says so, counts at once."""


PATIENCE: Final = 60.0
"""Seconds for one that registered before it listened, as some workers do. One that answers 503 is loading: no limit."""


class State(enum.StrEnum):
    DOWN = "down"  # no connection, or no answer
    LOADING = "loading"  # it answers, but it does not take jobs yet, or no longer
    READY = "ready"


class Container:
    """``state`` and ``reason`` (in words, empty while ready). Only a ready container is advertised.

    ``watch`` runs as a task of the orchestrator. ``refused`` and ``slow`` are what a job calls that could not connect,
    ``unauthorized`` one that was answered with 401. ``fixed`` is how many jobs at once one gets that the command line
    names; None: only its own ``offer`` speaks for it.
    """

    def __init__(self, url: str, capability: str, session: aiohttp.ClientSession, fixed: int | None = 1) -> None:
        self.url = url
        self.origin = Origin(url)
        self.capability = capability
        self.offer: Offer | None = None
        self.forgotten = False
        self.running = 0
        self.turn = 0  # of the last job, in the orchestrator's count
        self.asked = asyncio.Event()  # its first answer, or none, is known
        self._fixed = fixed
        self.state = State.DOWN
        self.reason = "not asked yet"
        self._session = session
        self._strikes = 0
        self._told = False  # whether the log has the present state
        self._hurry = asyncio.Event()

    @property
    def capacity(self) -> int:
        return self.offer.capacity if self.offer is not None else self._fixed or 0

    @property
    def free(self) -> int:
        """How many more jobs it takes."""
        return max(0, self.capacity - self.running) if self.state is State.READY else 0

    @contextmanager
    def busy(self) -> Iterator[None]:
        """One job. The count survives a new registration: those under way are not forgotten."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    @property
    def token(self) -> str:
        """What shows the container who we are; "" if it has not said."""
        return self.offer.token if self.offer is not None else ""

    async def watch(self) -> None:
        """Ask until it is forgotten."""
        delay = FIRST_RETRY
        since = asyncio.get_running_loop().time()  # it was last heard of
        while not self.forgotten:
            before = self.state
            self._hurry.clear()
            await self.ask()
            self.asked.set()
            now = asyncio.get_running_loop().time()
            if self.state is not State.DOWN:
                since = now
            elif now - since > PATIENCE:
                self.forget(f"not up within {PATIENCE:g} s of its registration")
            ready = self.state is State.READY
            delay = LAST_RETRY if ready else FIRST_RETRY if before is State.READY else min(delay * 1.5, LAST_RETRY)
            try:
                async with asyncio.timeout(delay):
                    await self._hurry.wait()
                delay = FIRST_RETRY
            except TimeoutError:
                pass

    async def ask(self) -> None:
        """One question, and what follows from its answer."""
        try:
            state, reason = await self._probe()
        except (aiohttp.ClientConnectorError, ConnectionError) as error:
            state, reason = State.DOWN, _reason(error)
        except (aiohttp.ClientError, TimeoutError) as error:
            self._strikes += 1
            if self.state is State.READY and self._strikes < STRIKES:
                return
            state, reason = State.DOWN, f"no answer to a health check ({type(error).__name__})"
        self._become(state, reason)

    def refused(self, reason: str) -> None:
        """A job could not connect: unregister at once, and ask again soon."""
        self._become(State.DOWN, reason)
        self._hurry.set()

    def slow(self, reason: str) -> None:
        """A job got no connection in time, which may as well be our own fault: no more jobs until it answers."""
        self._become(State.LOADING, reason)
        self._hurry.set()

    def doubt(self) -> None:
        """A job was broken off: ask at once what is the matter."""
        self._hurry.set()

    def unauthorized(self, token: str) -> None:
        """It does not take this token. It has to register again, unless it has done so meanwhile."""
        if token == self.token:
            self.offer = None
            self.forget("it answers 401")

    def forget(self, reason: str, level: int = logging.WARNING) -> None:
        """Drop a registered one until it registers again; one of the command line stays."""
        if self._fixed is None and not self.forgotten:
            self.forgotten = True
            log.log(level, "BYOC capability unregistered: %s: container %s: %s", self.capability, self.url, reason)
        self._hurry.set()

    async def _probe(self) -> tuple[State, str]:
        status, text = await self._get("/health")
        if status == 404:  # a container that knows nothing but the quickstart page's own check
            status, text = await self._get("/api/stream/status")
            said = ""
        else:
            said = _status_word(text)
        if status == 200 and said not in ("LOADING", "ERROR"):
            return State.READY, ""
        return State.LOADING, f"it says {said}" if said else f"it answers {status}"

    async def _get(self, path: str) -> tuple[int, str]:
        timeout = aiohttp.ClientTimeout(total=PROBE_SECONDS)
        async with self._session.get(self.url + path, timeout=timeout, allow_redirects=False) as answer:
            raw = await answer.content.read(65536)
            return answer.status, raw.decode("utf-8", "replace")

    def _become(self, state: State, reason: str) -> None:
        if self.forgotten:
            return
        if state is not State.DOWN:
            self._strikes = 0
        changed = state is not self.state
        was_ready = self.state is State.READY
        self.state, self.reason = state, reason
        if self._told and not changed:
            return
        self._told = True
        if state is State.READY:
            log.info("BYOC capability registered: %s -> %s", self.capability, self.url)
        elif was_ready and state is State.DOWN and self._fixed is None:
            self.forget(reason)
        elif was_ready:
            log.warning("BYOC capability unregistered: %s: container %s: %s", self.capability, self.url, reason)
        else:
            log.warning(
                "BYOC container %s is not ready (%s); %s is registered as soon as it is",
                self.url,
                reason,
                self.capability,
            )


def _status_word(text: str) -> str:
    """``{"status": "IDLE"}`` -> "IDLE"; "" for anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        return ""
    status = value.get("status") if isinstance(value, dict) else None
    return status.upper() if isinstance(status, str) else ""


def _reason(error: Exception) -> str:
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    return reason_of(cause)


def reason_of(error: BaseException) -> str:
    """An error of a connection in a few words: "connection refused"."""
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, TimeoutError):
        return "no connection in time"
    text = getattr(error, "strerror", None) or str(error)
    return str(text) or type(error).__name__
