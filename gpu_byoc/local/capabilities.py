"""The containers that an orchestrator may send jobs to, by capability: who has it, and who gets the next job."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any, Final

import aiohttp

from gpu_byoc.errors import AllBusy, BadRequest, ContainerUnreachable, NoCapacity, NotReady
from gpu_byoc.local.container import Container, State
from gpu_byoc.local.offer import Offer

log = logging.getLogger(__name__)

MAX_CONTAINERS: Final = 256  # each is asked for its health every two seconds

_TERMS: Final = ("description", "price_per_unit", "price_scaling", "currency")

_FIRST: Final = (State.READY, State.LOADING, State.DOWN)
"""Of several containers, the one in the best state speaks for the capability."""


class Capabilities:
    """By (name, URL). ``close`` ends what watches them. Without a container a capability is unknown."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._table: dict[tuple[str, str], Container] = {}
        self._watches: set[asyncio.Task[None]] = set()
        self._turn = 0

    def __iter__(self) -> Iterator[Container]:
        return (container for container in self._table.values() if not container.forgotten)

    def of(self, name: str) -> list[Container]:
        """Those that have the capability, best state first."""
        found = [container for container in self if container.capability == name]
        return sorted(found, key=lambda container: _FIRST.index(container.state))

    def fix(self, name: str, url: str, capacity: int) -> Container:
        """One that the command line names. It stays, and a worker that registers with that URL gives it its token."""
        return self._add(Container(url, name, self._session, capacity))

    def register(self, offer: Offer) -> Container:
        """A new container, or a new word from one that is there. Raises BadRequest when there are too many."""
        container = self._table.get((offer.name, offer.url))
        if container is None or container.forgotten:
            if len(self._table) >= MAX_CONTAINERS:
                raise BadRequest(f"there are {MAX_CONTAINERS} containers already")
            container = self._add(Container(offer.url, offer.name, self._session, None))
        container.offer = offer
        return container

    def unregister(self, name: str, url: str | None) -> None:
        """Forget who registered with this name, or only the one at ``url``."""
        for container in list(self):
            if container.capability == name and container.offer and url in (None, container.url):
                container.offer = None
                container.forget("it has unregistered", logging.INFO)

    def pick(self, name: str) -> Container:
        """For one job: the one with most room; among equals, whose turn was longest ago.

        Raises NoCapacity, NotReady, ContainerUnreachable or AllBusy, as the job is to be refused with.
        """
        having = self.of(name)
        if not having:
            raise NoCapacity(f"No capacity available for capability {name}: this orchestrator does not have it")
        best = max(having, key=lambda container: (container.free, -container.turn))
        if best.free:
            self._turn += 1
            best.turn = self._turn
            return best
        first = having[0]
        if first.state is State.LOADING:
            raise NotReady(f"the container {first.url} is not ready: {first.reason}")
        if first.state is State.DOWN:
            raise unreachable(first, first.reason)
        places = sum(container.capacity for container in having if container.state is State.READY)
        raise AllBusy(f"{name}: all {places} places of this orchestrator are taken")

    def room(self, name: str) -> tuple[str, int, str]:
        """The capability's state in a word, how many more jobs may come, and why there are none."""
        having = self.of(name)
        if not having:
            return "unknown", 0, ""
        best = having[0]
        if best.state is not State.READY:
            return best.state, 0, f"container {best.url}: {best.reason}"
        return best.state, sum(container.free for container in having), ""

    def describe(self) -> list[dict[str, Any]]:
        """For the status. No token."""
        return [
            {
                "name": container.capability,
                "container_url": container.url,
                "state": container.state,
                "reason": container.reason,
                "capacity": container.capacity,
                "running": container.running,
                "registered": container.offer is not None,
                **{term: getattr(container.offer, term) for term in _TERMS if container.offer},
            }
            for container in self
        ]

    async def close(self) -> None:
        for watch in self._watches:
            watch.cancel()
        if self._watches:
            await asyncio.wait(self._watches)

    def _add(self, container: Container) -> Container:
        self._table[container.capability, container.url] = container
        watch = asyncio.create_task(self._watch(container))
        self._watches.add(watch)
        watch.add_done_callback(self._ended)
        return container

    async def _watch(self, container: Container) -> None:
        await container.watch()
        if self._table.get((container.capability, container.url)) is container:
            del self._table[container.capability, container.url]

    def _ended(self, watch: asyncio.Task[None]) -> None:
        self._watches.discard(watch)
        if not watch.cancelled() and (bug := watch.exception()) is not None:
            log.critical("a container is not watched any more", exc_info=bug)


def unreachable(container: Container, reason: str) -> ContainerUnreachable:
    whose = "CAPABILITY_URL of the worker" if container.offer else "-byocContainerURL"
    return ContainerUnreachable(
        f"cannot reach the BYOC container {container.url}: {reason}. Is it running, does it listen on 0.0.0.0, "
        f"and is {whose} its address?"
    )
