"""Registration with an orchestrator: told again and again that we are here, asked to forget us at the end.

``POST {orchestrator}/capability/register`` with the orchestrator's secret as the bare Authorization header. Each
registration gives the orchestrator a new bearer token, and from the opening of the port on nobody else's calls are
taken. A registration that fails is tried again for as long as the worker lives; it never stops the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import secrets
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any, Final

import aiohttp

from gpu_byoc.config import ServeConfig
from gpu_byoc.core.registration import Registrar, State
from gpu_byoc.errors import GpuByocError, NotReady, OrchestratorUnreachable, RegistrationRefused, Unauthorized
from gpu_byoc.transport.tls import tls
from gpu_byoc.worker.drain import ended

log = logging.getLogger("gpu_byoc.registration")

TOLD: Final = 500
"""Letters of an orchestrator's answer that are shown. More is read, so that no secret in it is cut and kept."""

ATTEMPT_SECONDS: Final = 5.0
"""For one attempt: an orchestrator may look at the worker before it answers, and ours does, for up to two seconds."""

LEAVE_SECONDS: Final = 1.5
"""For all of the leaving, at a time when a container runtime's ten seconds are already running."""

SETTLE_SECONDS: Final = 0.25
"""How long calls that the orchestrator had already sent when it forgot us are waited for. Of the above."""


class Registration:
    """One worker at one orchestrator. ``run`` as a task once jobs are taken, then ``leave``; ``check`` each call."""

    def __init__(self, config: ServeConfig, port: int) -> None:
        assert config.registration is not None
        self._settings = config.registration
        self._name = config.capability
        self._capacity = config.capacity
        self._url = self._settings.url or _own_url(config.host, port)
        self._tls = tls(config.insecure, config.security.ca_file)
        self._core = Registrar(time.monotonic(), self._settings.seconds, random.random, _new_token)
        self._error = ""
        self._broken = False  # by a bug: nothing is repeated any more
        self._leaving = asyncio.Event()
        self._under_way: asyncio.Task[None] | None = None  # the last attempt
        self._sockets: list[socket.socket] = []  # of the last call

    # --- what the rest of the worker asks

    def check(self, headers: Mapping[str, str]) -> None:
        """Let a call from the network in, or raise.

        Raises:
            NotReady: no registration has been accepted so far, or only just, so the token may be the one of the worker
                that was here before. An orchestrator would take a 401 as a reason to drop us.
            Unauthorized: the token is wrong, or there is none.
        """
        if self.knows(headers):
            return
        if not self._core.strict(time.monotonic()):
            raise NotReady(
                f"this worker takes calls from {self._settings.orch_url}, with the token of a registration that is "
                "still to come or only just made"
            )
        raise Unauthorized("this worker takes calls only from the orchestrator it is registered with, by its token")

    def knows(self, headers: Mapping[str, str]) -> bool:
        """Whether a call shows a token that is good now."""
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        return scheme.lower() == "bearer" and self._core.allows(token.strip(), time.monotonic())

    @property
    def registered(self) -> bool:
        return self._core.state is State.REGISTERED and not self._broken

    @property
    def age(self) -> float | None:
        """Seconds since an orchestrator last said yes."""
        last = self._core.last_success
        return None if last is None else time.monotonic() - last

    def report(self) -> dict[str, Any]:
        """For the status. No token, no secret."""
        return {
            "state": "broken" if self._broken else self._core.state.value,
            "orchestrator": self._settings.orch_url,
            "capability": self._name,
            "url": self._url,
            "capacity": self._capacity,
            "seconds_since_success": self.age,
            "error": self._error or None,
        }

    # --- the loop

    async def run(self) -> None:
        """Register whenever it is due. Returns after ``leave``. Raises what is a bug of ours."""
        try:
            await self._run()
        except Exception:  # the worker goes on; it is forgotten by the orchestrator sooner or later
            self._broken, self._error = True, "internal error; see the worker's log"
            raise

    async def _run(self) -> None:
        while (due := self._core.due) is not None:
            try:
                async with asyncio.timeout(due - time.monotonic()):
                    await self._leaving.wait()
            except TimeoutError:
                pass
            if self._core.due is not None:
                self._under_way = asyncio.create_task(self._attempt())
                try:
                    await asyncio.wait([self._under_way])
                finally:
                    await ended(self._under_way)
                if not self._under_way.cancelled():
                    self._under_way.result()

    async def leave(self) -> None:
        """Ask the orchestrator to forget us, and let in what it had sent before. Takes LEAVE_SECONDS at most.

        Nothing that would make us known again is sent after that. A registration that has reached the orchestrator, and
        that it answers later than we wait, is the one thing that may still come to be; the first call that is refused
        then ends it.
        """
        self._core.leave()
        self._leaving.set()
        if not self._core.sent:
            return
        try:
            async with asyncio.timeout(LEAVE_SECONDS - SETTLE_SECONDS):
                await self._last_attempt()
                await self._post("unregister", self._name.encode(), {"X-Capability-Url": self._url})
        except (GpuByocError, TimeoutError) as error:
            why = str(error) or "no answer in time"
            log.warning("not unregistered, %s will find out by itself: %s", self._settings.orch_url, why)
            return
        log.info("unregistered from %s: %s", self._settings.orch_url, self._name)
        await asyncio.sleep(SETTLE_SECONDS)

    async def _last_attempt(self) -> None:
        """Wait for the one that is under way, and then cut it off, with what the kernel has not delivered of it: still
        connecting, or sent again and again, it could arrive after the end."""
        if self._under_way is None:
            return
        await asyncio.wait([self._under_way], timeout=LEAVE_SECONDS / 3)
        if not self._under_way.done():
            for sock in self._sockets:
                with contextlib.suppress(OSError):  # it is closed
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await ended(self._under_way)

    async def _attempt(self) -> None:
        try:
            await self._post("register", self._body(self._core.attempt()), {"Content-Type": "application/json"})
        except GpuByocError as error:
            self._error = str(error)
            if self._core.failed(time.monotonic(), error.code):
                log.warning("not registered: %s; trying again", error)
        else:
            self._error = ""
            if self._core.accepted(time.monotonic()):
                place = (self._settings.orch_url, self._name, self._url, self._capacity)
                log.info("registered with %s: %s at %s, capacity %d", *place)

    def _body(self, token: str) -> bytes:
        fields = {
            "name": self._name,
            "description": self._settings.description,
            "url": self._url,
            "capacity": self._capacity,
            "price_per_unit": self._settings.price_per_unit,
            "price_scaling": self._settings.price_scaling,
            "currency": "wei",
            "token": token,
        }
        return json.dumps(fields).encode()

    async def _post(self, what: str, data: bytes, headers: Mapping[str, str]) -> None:
        """One call, on a connection of its own. Raises OrchestratorUnreachable or RegistrationRefused."""
        url = f"{self._settings.orch_url.rstrip('/')}/capability/{what}"
        self._sockets.clear()
        connector = aiohttp.TCPConnector(ssl=self._tls, force_close=True, socket_factory=self._socket)
        timeout = aiohttp.ClientTimeout(total=ATTEMPT_SECONDS)
        try:
            async with (
                aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
                session.post(
                    url,
                    data=data,
                    headers={"Authorization": self._settings.secret, **headers},
                    allow_redirects=False,  # the secret is for this orchestrator
                ) as answer,
            ):
                text = (await answer.content.read(16 * TOLD)).decode("utf-8", "replace").strip()
                status = answer.status
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            why = str(error) or f"no answer within {ATTEMPT_SECONDS:g} s"
            if isinstance(error, aiohttp.ClientConnectorCertificateError):
                why += "; --ca-file may name a file with its certificate"
            raise OrchestratorUnreachable(f"cannot reach the orchestrator at {url}: {why}") from error
        if status != 200:
            raise RegistrationRefused(f"{url} answered {status}: {self._harmless(text)}{_hint(status, text)}")

    def _socket(self, address: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, _, _ = address
        self._sockets.append(socket.socket(family, kind, protocol))
        return self._sockets[-1]

    def _harmless(self, text: str) -> str:
        """What an orchestrator says, fit for a log: it may repeat what we sent."""
        for secret in (self._settings.secret, *self._core.tokens):
            text = text.replace(secret, "***")
        return "".join(letter if letter.isprintable() else " " for letter in text[:TOLD])


def _hint(status: int, text: str) -> str:
    if status in (401, 403) or "authorization" in text.lower():
        return ". Is ORCH_SECRET the secret that the orchestrator was started with (-orchSecret)?"
    if status == 404:
        return ". Is ORCH_URL an orchestrator, one that takes registrations?"
    return ""


def _own_url(host: str, port: int) -> str:
    """Where we listen, as seen from this machine; a wildcard is no address to call."""
    if host in ("0.0.0.0", "::", ""):
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _new_token() -> str:
    return secrets.token_urlsafe(32)
