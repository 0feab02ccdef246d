"""The orchestrator's view of its container: asked for its health until it is up, and again until it is gone."""

from __future__ import annotations

import asyncio
import enum
import json
import logging
from typing import Final

import aiohttp

log = logging.getLogger(__name__)

FIRST_RETRY: Final = 0.1  # seconds; a container that is starting is registered soon after it answers
LAST_RETRY: Final = 2.0  # seconds between questions in the long run, up or down
PROBE_SECONDS: Final = 2.0
STRIKES: Final = 3
"""So many answers in a row must fail to come before a container that was ready counts as down: one that burns CPU may
miss one. A refused connection, or a health that says so, counts at once."""


class State(enum.StrEnum):
    DOWN = "down"  # no connection, or no answer
    LOADING = "loading"  # it answers, but it does not take jobs yet, or no longer
    READY = "ready"


class Container:
    """``state`` and ``reason`` (in words, empty while ready). Only a ready container is advertised.

    ``watch`` runs as a task of the orchestrator. ``refused`` is what a job calls that could not connect.
    """

    def __init__(self, url: str, capability: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.capability = capability
        self.state = State.DOWN
        self.reason = "not asked yet"
        self._session = session
        self._strikes = 0
        self._told = False  # whether the log has the present state
        self._hurry = asyncio.Event()

    async def watch(self) -> None:
        """Ask for ever. Ends by being cancelled."""
        delay = FIRST_RETRY
        while True:
            before = self.state
            await self.ask()
            ready = self.state is State.READY
            delay = LAST_RETRY if ready else FIRST_RETRY if before is State.READY else min(delay * 1.5, LAST_RETRY)
            self._hurry.clear()
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
