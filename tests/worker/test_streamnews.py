"""A stream's news when it is cancelled while something is on its way: nothing is lost, and nothing is said twice."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from gpu_byoc.core.cursor import Backoff
from gpu_byoc.core.trickle import Limits
from gpu_byoc.transport.listen import bind, port_of, serve
from gpu_byoc.transport.trickle_client import Subscriber, open_session
from gpu_byoc.transport.trickle_server import TrickleServer
from gpu_byoc.worker.drain import ended
from gpu_byoc.worker.streamnews import News
from gpu_byoc.worker.streamparams import Urls
from tests.support.workers import asynchronous


class Server:
    """A trickle server with one channel. ``door`` lets requests in that publish, ``back`` lets their answers out;
    ``stored`` is set when a segment has arrived."""

    def __init__(self) -> None:
        self.door, self.back, self.stored = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.url = ""

    @web.middleware
    async def hold(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if request.method != "POST":
            return await handler(request)
        await self.door.wait()
        answer = await handler(request)
        self.stored.set()
        await self.back.wait()
        return answer


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    server, trickle = Server(), TrickleServer(Limits())
    app = web.Application(middlewares=[server.hold])
    trickle.mount(app, "/")
    trickle.hub.create("news", "application/json")
    sock = bind("127.0.0.1", 0)
    runner = await serve(app, sock, shutdown=1.0)
    server.url = f"http://127.0.0.1:{port_of(sock)}/news"
    try:
        yield server
        server.door.set()
        server.back.set()
    finally:
        trickle.hub.delete("news")
        await runner.cleanup()


async def lines(url: str, last: str) -> list[str]:
    """What a reader gets, up to the word ``last``."""
    found: list[str] = []
    async with (
        asyncio.timeout(20),
        open_session() as session,
        Subscriber(session, url, start=0, every=True) as segments,
    ):
        async for segment in segments:
            for line in (await segment.read()).splitlines():
                said = json.loads(line)
                found.append(said["event"]["type"] if "event" in said else said["type"])
            if last in found:
                break
    return found


@pytest.mark.parametrize("way", ["events", "data"])
@pytest.mark.parametrize("arrives", [False, True])
@asynchronous
async def test_what_is_on_its_way_at_a_cancel_is_heard_once(way: str, arrives: bool) -> None:
    async with serving() as server, open_session() as http:
        urls = Urls(events=server.url) if way == "events" else Urls(data=server.url)
        news = News("s", urls, lambda what: None, Backoff(), most=16)
        say = news.tell if way == "events" else news.line
        for word in ("first", "second"):
            say(word)
        sending = asyncio.create_task(news.events(http) if way == "events" else news.data(http))
        if arrives:
            server.door.set()
            await server.stored.wait()
            asyncio.get_running_loop().call_later(0.05, server.back.set)
        else:
            while news._events if way == "events" else news._lines:  # until the first is on its way
                if way == "events" and len(news._events) == 1:
                    break
                await asyncio.sleep(0)
        await ended(sending)
        assert sending.cancelled()
        server.door.set()
        server.back.set()
        say("last")
        await news.last_words(http)
        assert await lines(server.url, "last") == ["first", "second", "last"]


@pytest.mark.parametrize("way", ["events", "data"])
@pytest.mark.parametrize("there", [True, False])
def test_what_nobody_takes_is_bounded_and_counted(way: str, there: bool) -> None:
    url = "http://127.0.0.1:1/news" if there else None
    problems: list[str] = []
    news = News("s", Urls(events=url, data=url), problems.append, Backoff(), most=16)
    for number in range(18):
        (news.tell if way == "events" else news.line)("word", number=number)
    kept = news._events if way == "events" else news._lines
    assert len(kept) == 16
    assert '"number": 2' in (json.dumps(kept[0]) if isinstance(kept[0], dict) else kept[0].decode()), "the oldest went"
    assert problems == ([f"{way}_dropped"] * 2 if there else [])
