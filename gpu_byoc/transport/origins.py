"""The names in a stream's URLs, resolved once: what was checked is what is connected to, for as long as it lasts.

Without that, a name could have one address while it is checked and another one when it is opened (DNS rebinding).
What is allowed is decided in ``core/origins.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import threading
from collections.abc import Awaitable, Callable, Mapping
from ipaddress import ip_address
from typing import Any, Final, TypeAlias

from aiohttp.abc import AbstractResolver, ResolveResult

from gpu_byoc.core.origins import Address, ChannelUrl, Origin, Policy, parse, peer
from gpu_byoc.errors import BadRequest, ChannelFailed, OriginRefused

RESOLVE_SECONDS: Final = 5.0

Resolve: TypeAlias = Callable[[str, int], Awaitable[list[Address]]]
"""The addresses of a host's name. Raises OSError."""


LOOKUPS: Final = 4
_lookups = threading.BoundedSemaphore(LOOKUPS)


async def system_addresses(host: str, port: int) -> list[Address]:
    """On a thread of its own, a few at once: a resolver may take half a minute, and neither the threads that jobs need
    nor the end of the process shall wait for it."""
    if not _lookups.acquire(blocking=False):
        raise OSError(errno.EAGAIN, "too many names are being looked up; try again")
    loop = asyncio.get_running_loop()
    done: asyncio.Future[list[Any]] = loop.create_future()

    def settle(found: list[Any], error: OSError | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(found)
        else:
            done.set_exception(error)

    def look() -> None:
        found: list[Any] = []
        failure: OSError | None = None
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except UnicodeError as error:  # a label that is too long
            failure = OSError(errno.EINVAL, str(error))
        except OSError as error:
            failure = error
        finally:
            _lookups.release()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, found, failure)

    try:
        threading.Thread(target=look, name="resolve", daemon=True).start()
    except RuntimeError as error:
        _lookups.release()
        raise OSError(errno.EAGAIN, "no thread to look the name up with") from error
    found = await done
    # An IPv6 address may carry the name of an interface; those that need one are refused anyhow.
    return list(dict.fromkeys(ip_address(str(each[4][0]).partition("%")[0]) for each in found))


class Pins(AbstractResolver):
    """The resolver of one stream's session: it knows the hosts that were checked, and no other."""

    def __init__(self, hosts: Mapping[str, list[Address]]) -> None:
        self._hosts = hosts

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        if host not in self._hosts:
            raise OSError(f"{host} is not one of this stream's hosts")
        return [
            ResolveResult(
                hostname=host,
                host=str(each),
                port=port,
                family=socket.AF_INET if each.version == 4 else socket.AF_INET6,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for each in self._hosts[host]
        ]

    async def close(self) -> None:
        """Nothing is open."""


class Gatekeeper:
    """Lets a stream's URLs in, or refuses them."""

    def __init__(self, policy: Policy, resolve: Resolve = system_addresses) -> None:
        self._policy = policy
        self._resolve = resolve

    async def admit(self, urls: Mapping[str, str], caller: str | None) -> tuple[dict[str, str], Pins]:
        """The URLs of a call from address ``caller``, by field, as they are to be opened, and a resolver for them.

        Raises:
            BadRequest: a URL that is no such URL.
            OriginRefused: one that this worker does not open for this caller.
            ChannelFailed: a host whose name has no address just now.
        """
        parsed = {field: _parsed(field, text) for field, text in urls.items()}
        for field, url in parsed.items():
            if why := self._policy.refusal(url.origin):
                raise OriginRefused(field, str(url.origin), why)
        who = None if caller is None else peer(caller)
        hosts: dict[str, list[Address]] = {}
        for field, url in parsed.items():
            if url.origin.host not in hosts:
                hosts[url.origin.host] = await self._addresses(field, url.origin, who)
        return {field: str(url) for field, url in parsed.items()}, Pins(hosts)

    async def _addresses(self, field: str, origin: Origin, caller: Address | None) -> list[Address]:
        found = [origin.address] if origin.address is not None else await self._resolved(field, origin)
        if addresses := self._policy.addresses(origin, found, caller):
            return addresses
        if self._policy.allowed:
            raise OriginRefused(field, str(origin), "nobody may make this worker connect to the addresses of that name")
        raise OriginRefused(
            field,
            str(origin),
            f"it is not where this call came from ({caller or 'unknown'}), and this worker knows no other place. If it "
            f"should open it: --allow-origin {origin} (GPU_BYOC_ALLOW_ORIGIN), or register it with that orchestrator "
            "(ORCH_URL)",
        )

    async def _resolved(self, field: str, origin: Origin) -> list[Address]:
        try:
            async with asyncio.timeout(RESOLVE_SECONDS):
                return await self._resolve(origin.host, origin.port)
        except OSError as error:  # TimeoutError is one
            why = error.strerror or f"no answer within {RESOLVE_SECONDS:g} s"
            raise ChannelFailed(f"{field}: the name {origin.host} has no address here: {why}") from error


def _parsed(field: str, text: str) -> ChannelUrl:
    try:
        return parse(text)
    except ValueError as error:
        raise BadRequest(f"{field} is not an http or https URL of a channel: {error}") from None
