"""Pipes between the loop and a thread: bounded, in order, and closing wakes both ends."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from gpu_byoc.bridge import Closed, ToLoop, ToThread
from tests.support.workers import asynchronous


def started(work: Any) -> asyncio.Future[Any]:
    return asyncio.get_running_loop().run_in_executor(None, work)


@asynchronous
async def test_to_a_thread_in_order_and_bounded() -> None:
    pipe: ToThread[int] = ToThread(limit=10)
    for n in range(2):
        await pipe.put(n, 5)
    third = asyncio.create_task(pipe.put(2, 5))
    await asyncio.wait([third], timeout=0.02)
    assert not third.done(), "there is no room"
    assert await started(pipe.get) == 0
    await third
    pipe.end()
    assert [await started(pipe.get) for _ in range(2)] == [1, 2]
    with pytest.raises(EOFError):
        await started(lambda: _raises(pipe))


def _raises(pipe: ToThread[int]) -> None:
    """EOFError cannot be a future's own StopIteration-like end, so it is raised in the thread and handed on."""
    pipe.get()


@asynchronous
async def test_to_the_loop_in_order_and_bounded() -> None:
    pipe: ToLoop[int] = ToLoop(limit=3)

    def work() -> None:
        for n in range(100):
            pipe.put(n, 1)
        pipe.end()

    thread = started(work)
    got = []
    while True:
        try:
            got.append(await pipe.get())
        except EOFError:
            break
        assert pipe.weight <= 3
    assert got == list(range(100))
    await thread


@asynchronous
async def test_one_item_may_be_larger_than_the_limit() -> None:
    pipe: ToLoop[bytes] = ToLoop(limit=1)
    pipe.put(bytes(100), 100)
    second = started(lambda: pipe.put(b"x", 1))
    await asyncio.wait([second], timeout=0.02)
    assert not second.done(), "but then there is no room"
    assert await pipe.get() == bytes(100)
    await second


@asynchronous
async def test_an_error_comes_out_behind_what_was_put_in() -> None:
    pipe: ToLoop[int] = ToLoop(limit=10)
    pipe.put(1, 1)
    pipe.end(KeyError("gone"))
    assert await pipe.get() == 1
    with pytest.raises(KeyError, match="gone"):
        await pipe.get()
    with pytest.raises(Closed):
        pipe.put(2, 1)


@pytest.mark.parametrize("how", ["end", "abandon"])
def test_closing_wakes_a_waiting_thread(how: str) -> None:
    @asynchronous
    async def go() -> None:
        pipe: ToThread[int] = ToThread(limit=1)
        caught: list[BaseException] = []

        def work() -> None:
            try:
                pipe.get()
            except (EOFError, Closed) as error:
                caught.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        getattr(pipe, how)()
        await asyncio.to_thread(thread.join, 10)
        assert [type(error) for error in caught] == [EOFError if how == "end" else Closed]

    go()


@asynchronous
async def test_abandoning_wakes_who_waits_for_room_on_either_side() -> None:
    out: ToThread[int] = ToThread(limit=1)
    await out.put(1, 1)
    waiting = asyncio.create_task(out.put(2, 1))
    await asyncio.wait([waiting], timeout=0.01)
    out.abandon()
    with pytest.raises(Closed):
        await waiting
    back: ToLoop[int] = ToLoop(limit=1)
    back.put(1, 1)
    thread = started(lambda: back.put(2, 1))
    back.abandon()
    with pytest.raises(Closed):
        await thread
    with pytest.raises(Closed):
        await back.get()


@asynchronous
async def test_a_cancelled_wait_loses_nothing() -> None:
    pipe: ToLoop[int] = ToLoop(limit=4)
    waiting = asyncio.create_task(pipe.get())
    await asyncio.wait([waiting], timeout=0.01)
    waiting.cancel()
    await asyncio.wait([waiting])
    pipe.put(7, 1)
    assert await pipe.get() == 7
