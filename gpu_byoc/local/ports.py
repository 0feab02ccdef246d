"""What listens in a gateway or an orchestrator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from gpu_byoc.errors import OperatorError
from gpu_byoc.transport.listen import bind, port_of, serve

SHUTDOWN_SECONDS: Final = 3.5
"""Jobs that are under way may take this long to end after SIGTERM. aiohttp waits that long twice, before and after it
tells a job to end, and the default kill comes after 10 s."""


@dataclass(frozen=True, slots=True)
class Listener:
    """A server that listens; ``port`` is the real one where 0 was asked for."""

    runner: web.AppRunner
    host: str
    port: int

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    async def close(self) -> None:
        """Stop listening, wait for the jobs under way, then drop what is left."""
        await self.runner.cleanup()


async def listen(routes: list[web.RouteDef], host: str, port: int, flag: str) -> Listener:
    """Serve ``routes`` on host and port. Raises PortInUse or ConfigError, both naming ``flag``."""
    app = web.Application(middlewares=[_explaining(routes)])
    app.router.add_routes(routes)
    try:
        sock = bind(host, port)
    except OperatorError as error:
        raise type(error)(f"{flag}: {error}") from error
    return Listener(await serve(app, sock, SHUTDOWN_SECONDS), host, port_of(sock))


def _explaining(routes: list[web.RouteDef]) -> Middleware:
    """404 and 405 as JSON, which every other error is here, with what there is instead."""
    there = ", ".join(f"{route.method} {route.path}" for route in routes)

    @web.middleware
    async def explain(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except (web.HTTPNotFound, web.HTTPMethodNotAllowed) as error:
            code = error.reason.lower().replace(" ", "_")
            message = f"{request.method} {request.path}: {error.reason}; here are {there}"
            allow = {name: value for name, value in error.headers.items() if name == hdrs.ALLOW}
            body = {"status": "error", "error": code, "message": message}
            return web.json_response(body, status=error.status, headers=allow)

    return explain
