"""Which web sites' scripts may talk to this worker: none, unless --cors-origin names them (Fetch standard, 3.2).

Without these headers a browser lets a script see no answer, and lets it send nothing but the simplest requests. No
cookies are involved (the worker has none), so credentials are never allowed. ``/health`` and ``/ready`` are answered
outside of this and never have the headers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from aiohttp import hdrs, web

from gpu_byoc.core.origins import parse_origin
from gpu_byoc.errors import ConfigError

ANY: Final = "*"
PREFLIGHT_SECONDS: Final = "600"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Cors:
    """``install`` on an application. Raises ConfigError for what is no origin."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._origins = frozenset(each if each == ANY else _checked(each) for each in origins)

    def install(self, app: web.Application) -> None:
        if self._origins:
            app.middlewares.insert(0, self._preflight)
            app.on_response_prepare.append(self._mark)

    @web.middleware
    async def _preflight(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """A browser's question before the request itself, which no route is there to answer."""
        if request.method != hdrs.METH_OPTIONS or hdrs.ACCESS_CONTROL_REQUEST_METHOD not in request.headers:
            return await handler(request)
        if not self._allowed(request):
            return web.Response(status=403, text="--cors-origin does not name this site\n")
        headers = {
            hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, POST",
            hdrs.ACCESS_CONTROL_ALLOW_HEADERS: request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, ""),
            hdrs.ACCESS_CONTROL_MAX_AGE: PREFLIGHT_SECONDS,
        }
        return web.Response(status=204, headers=headers)

    async def _mark(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers.add(hdrs.VARY, hdrs.ORIGIN)
        if self._allowed(request):
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = request.headers[hdrs.ORIGIN]
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = ANY

    def _allowed(self, request: web.Request) -> bool:
        origin = request.headers.get(hdrs.ORIGIN)
        return origin is not None and (ANY in self._origins or origin in self._origins)


def _checked(text: str) -> str:
    try:
        return str(parse_origin(text))
    except ValueError as error:
        raise ConfigError(f"--cors-origin {text!r} is not like https://example.com: {error}") from None
