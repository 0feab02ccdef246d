"""Which orchestrator gets the next job: the tokens a gateway holds, and the order in which it tries them.

A token is an orchestrator's word about one capability at one moment (``GET /process/token``). It is taken for true for
a short time, less the jobs that this gateway has sent since; so a job costs no extra round trip, and a gateway that
is busy asks in the background.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import aiohttp

from gpu_byoc.config import is_plain_url
from gpu_byoc.errors import AllBusy, ContainerUnreachable, GpuByocError, NoCapability, NotReady, OrchestratorUnreachable
from gpu_byoc.local.container import reason_of
from gpu_byoc.local.upstream import Origin

if TYPE_CHECKING:
    from collections.abc import Iterator

ASK_SECONDS: Final = 0.5  # go-livepeer's limit for one token call
ASK_AGAIN_SECONDS: Final = 0.05  # a token that says "full" is believed for so long before a job is refused over it
MAX_TOKEN: Final = 64 * 1024  # bytes
UNSIGNED: Final = base64.b64encode(b'{"addr": "", "sig": "0x"}').decode()


class Peer:
    """One orchestrator. ``jobs`` are those of this gateway that it is working on."""

    def __init__(self, url: str) -> None:
        self.url = url  # as in -orchAddr
        self.origin = Origin(url)  # where jobs go: what its last token said
        self.jobs = 0
        self.error = ""  # why it did not answer the last time, "" if it did

    def called(self, service_addr: str) -> None:
        if service_addr.rstrip("/") != self.origin.url:
            self.origin = Origin(service_addr)

    @contextmanager
    def busy(self) -> Iterator[None]:
        self.jobs += 1
        try:
            yield
        finally:
            self.jobs -= 1


@dataclass(slots=True)
class Token:
    """``capacity`` was free when it was asked for, with ``jobs`` of ours under way then."""

    peer: Peer
    capacity: int
    state: str
    reason: str
    jobs: int

    @property
    def free(self) -> int:
        return self.capacity - (self.peer.jobs - self.jobs)


@dataclass(slots=True)
class Tokens:
    """The tokens for one capability, and when they were asked for (loop time)."""

    asked: float
    tokens: list[Token] = field(default_factory=list)

    def drop(self, peer: Peer) -> None:
        self.tokens = [token for token in self.tokens if token.peer is not peer]


def order(tokens: Sequence[Token], turn: int) -> list[Peer]:
    """Those with room, the one with most first; equals take turns, the ``turn`` counting jobs."""
    some = [token for token in tokens if token.free > 0]
    if len(some) < 2:
        return [token.peer for token in some]
    shift = turn % len(some)
    some = some[shift:] + some[:shift]
    some.sort(key=lambda token: -token.free)  # stable: equals keep their turn
    return [token.peer for token in some]


def why_none(capability: str, peers: Sequence[Peer], tokens: Sequence[Token]) -> GpuByocError:
    """What to answer when no orchestrator has room, from what they said."""
    nobody = f"No orchestrator advertising capability {capability}"
    by_state: dict[str, Token] = {}
    for token in tokens:
        by_state.setdefault("full" if token.state == "ready" else token.state, token)
    if "full" in by_state:
        return AllBusy(f"every orchestrator that has the capability {capability} is busy; try again")
    kinds = {"loading": NotReady, "draining": NotReady, "unbooked": NotReady, "down": ContainerUnreachable}
    for state, kind in kinds.items():
        if state in by_state:
            token = by_state[state]
            return kind(f"{nobody}: {token.peer.url} has it, but not now: {token.reason or state}")
    down = [peer for peer in peers if peer.error]
    if down and len(down) == len(peers):
        told = ", ".join(f"{peer.url} ({peer.error})" for peer in down)
        return OrchestratorUnreachable(f"{nobody}: none of the orchestrators can be reached: {told}")
    return NoCapability(
        f"{nobody}. Names are case-sensitive: X-Model-Id must equal -byocModelID; the orchestrator must run with "
        "-byoc, and its log must show 'BYOC capability registered'"
    )


class TokenBook:
    """Tokens by capability. ``order_for`` is what a job asks; ``close`` ends what is asked in the background."""

    def __init__(self, urls: Sequence[str], session: aiohttp.ClientSession, ttl: float) -> None:
        self.peers = [Peer(url) for url in urls]
        self._session = session
        self._ttl = ttl
        self._turn = 0
        self._known: dict[str, Tokens] = {}
        self._asking: dict[str, asyncio.Task[Tokens]] = {}

    async def order_for(self, capability: str) -> list[Peer]:
        """Whom to try, best first; never empty. Raises what the job is to be refused with."""
        self._turn += 1
        now = asyncio.get_running_loop().time()
        known = self._known.get(capability)
        if known is not None and now - known.asked < self._ttl:
            if now - known.asked > self._ttl / 2:
                self._ask_once(capability)  # in the background: under load no job waits for a token
            if chosen := order(known.tokens, self._turn):
                return chosen
            if known.tokens and now - known.asked < ASK_AGAIN_SECONDS:
                raise why_none(capability, self.peers, known.tokens)
        # shield: this job may be cancelled, but others wait for the same answer
        known = await asyncio.shield(self._ask_once(capability))
        if chosen := order(known.tokens, self._turn):
            return chosen
        raise why_none(capability, self.peers, known.tokens)

    def failed(self, capability: str, peer: Peer) -> None:
        """It was unreachable or answered 5xx: do not try it again before it has been asked again."""
        if (known := self._known.get(capability)) is not None:
            known.drop(peer)
            if not order(known.tokens, 0):
                del self._known[capability]

    async def ask(self, capability: str) -> Tokens:
        """Ask every orchestrator now, in parallel."""
        asked = asyncio.get_running_loop().time()
        found = await asyncio.gather(*(self._ask_peer(peer, capability) for peer in self.peers))
        return Tokens(asked, [token for token in found if token is not None])

    async def close(self) -> None:
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ask_once(self, capability: str) -> asyncio.Task[Tokens]:
        task = self._asking.get(capability)
        if task is None:
            task = self._asking[capability] = asyncio.create_task(self._refresh(capability))
        return task

    async def _refresh(self, capability: str) -> Tokens:
        try:
            tokens = await self.ask(capability)
        finally:
            del self._asking[capability]
        # Only names that somebody has are remembered: X-Model-Id is the client's to choose, memory is ours.
        if any(token.state != "unknown" for token in tokens.tokens):
            self._known[capability] = tokens
        else:
            self._known.pop(capability, None)
        return tokens

    async def _ask_peer(self, peer: Peer, capability: str) -> Token | None:
        headers = {"Livepeer-Eth-Address": UNSIGNED, "Livepeer-Capability": capability}
        jobs = peer.jobs
        try:
            async with self._session.get(
                f"{peer.url}/process/token",
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=ASK_SECONDS),
                allow_redirects=False,
            ) as answer:
                if answer.status != 200:
                    peer.error = f"it answered {answer.status} to GET /process/token"
                    return None
                token = _read_token(peer, json.loads(await _text(answer)), jobs)
        except aiohttp.ClientConnectorError as error:
            peer.error = reason_of(error.os_error)
        except TimeoutError:
            peer.error = f"no answer within {ASK_SECONDS} s"
        except (aiohttp.ClientError, OSError, ValueError, RecursionError) as error:
            peer.error = str(error) or type(error).__name__
        else:
            peer.error = ""
            return token
        return None


async def _text(answer: aiohttp.ClientResponse) -> bytes:
    """Raises ValueError for more than a token has."""
    text = bytearray()
    async for piece in answer.content.iter_any():
        text += piece
        if len(text) > MAX_TOKEN:
            raise ValueError(f"its token is longer than {MAX_TOKEN} bytes")
    return bytes(text)


def _read_token(peer: Peer, value: Any, jobs: int) -> Token:
    """Raises ValueError on anything that is not a token."""
    if not isinstance(value, dict):
        raise ValueError("its token is not a JSON object")
    capacity = value.get("available_capacity", 0)  # go-livepeer leaves out what is 0
    address = value.get("service_addr", peer.url)
    if isinstance(capacity, bool) or not isinstance(capacity, int):
        raise ValueError("its token's available_capacity is not a number")
    if not isinstance(address, str) or not is_plain_url(address):
        raise ValueError("its token's service_addr is not a URL")
    peer.called(address)
    # An orchestrator that is not ours says no more than 0 for a capability that it does not have, or has no room for.
    state = value.get("capability_state", "ready" if capacity > 0 else "unknown")
    return Token(peer, capacity, str(state), str(value.get("reason", "")), jobs)
