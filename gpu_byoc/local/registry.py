"""``POST /capability/register`` and ``/capability/unregister``: how workers make themselves known to an orchestrator.

The answers are go-livepeer's, plain text and 400 for a wrong secret too; but without a secret of its own this
orchestrator takes nobody's registration, and a currency that it does not know is 400 and no crash. The jobs of a worker
that registers again go on counting.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from typing import Final

from aiohttp import web

from gpu_byoc.errors import BadRequest
from gpu_byoc.local.capabilities import Capabilities
from gpu_byoc.local.offer import read_offer

log = logging.getLogger(__name__)

MAX_BODY: Final = 64 * 1024
LOOK_SECONDS: Final = 3.0
"""A new container is asked for its health before it is told yes, so that jobs find it ready; a probe takes 2 s."""

URL_HEADER: Final = "X-Capability-Url"
"""Ours: which one of several workers with the same capability unregisters. Without it all of them do: go-livepeer
knows no more than one."""


class Registry:
    """The two routes. ``secret`` is what workers have to show; "" refuses everybody."""

    def __init__(self, capabilities: Capabilities, secret: str) -> None:
        self._capabilities = capabilities
        self._secret = secret

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/capability/register", self._register),
            web.post("/capability/unregister", self._unregister),
        ]

    async def _register(self, request: web.Request) -> web.Response:
        if not self._trusted(request):
            return _refused("invalid authorization")
        try:
            offer = read_offer(await _body(request))
            container = self._capabilities.register(offer)
        except BadRequest as error:
            return _refused(f"Error registering capability: {error}")
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                await container.asked.wait()
        except TimeoutError:
            pass  # it is known, and advertised as soon as it answers
        return _ok()

    async def _unregister(self, request: web.Request) -> web.Response:
        if not self._trusted(request):
            return _refused("invalid authorization")
        try:
            name = (await _body(request)).decode("utf-8", "replace").strip()
        except BadRequest as error:
            return _refused(str(error))
        url = request.headers.get(URL_HEADER)
        self._capabilities.unregister(name, url.rstrip("/") if url else None)
        return _ok()

    def _trusted(self, request: web.Request) -> bool:
        """The secret itself, without a scheme."""
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if self._secret and hmac.compare_digest(given, self._secret.encode()):
            return True
        why = "the secret is wrong" if self._secret else "no -orchSecret was given"
        log.warning("%s from %s refused: %s", request.path, request.remote, why)
        return False


async def _body(request: web.Request) -> bytes:
    if (request.content_length or 0) > MAX_BODY:
        raise BadRequest(f"the body is larger than {MAX_BODY} bytes")
    body = bytearray()
    async for piece in request.content.iter_any():
        body += piece
        if len(body) > MAX_BODY:
            raise BadRequest(f"the body is larger than {MAX_BODY} bytes")
    return bytes(body)


def _ok() -> web.Response:
    return web.Response(text="ok", content_type="application/json")


def _refused(text: str) -> web.Response:
    return web.Response(text=text + "\n", status=400)
