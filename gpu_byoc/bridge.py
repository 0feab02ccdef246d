"""Bounded pipes between the event loop and a thread. Closing one wakes both ends; an error put in comes out.

A pipe carries items that each weigh something (bytes, as a rule) and takes more as long as what is inside weighs less
than ``limit``: one item may go over it, so that an item larger than the limit still passes.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Closed(Exception):
    """The other end is gone: what is put in goes nowhere, and nothing more comes out."""


class _Pipe(Generic[T]):
    """Both ends. ``_lock`` guards everything; the loop is woken through ``call_soon_threadsafe``."""

    def __init__(self, limit: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._limit = limit
        self._lock = threading.Condition()
        self._items: deque[tuple[T, int]] = deque()
        self._weight = 0
        self._ended = False  # no more will be put in
        self._error: BaseException | None = None
        self._broken = False  # nobody takes out any more
        self._waiter: asyncio.Future[None] | None = None  # the loop's end, waiting

    @property
    def weight(self) -> int:
        return self._weight

    @property
    def full(self) -> bool:
        """Whether what is put in next waits."""
        return self._weight >= self._limit

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more will be put in; what is inside still comes out, then the end (or ``error``). Any thread."""
        with self._lock:
            if not self._ended:
                self._ended, self._error = True, error
            self._wake()

    def abandon(self) -> None:
        """Nobody takes out any more: what is inside is dropped, and whoever puts in gets Closed. Any thread."""
        with self._lock:
            self._broken = True
            self._items.clear()
            self._weight = 0
            self._wake()

    def _wake(self) -> None:
        self._lock.notify_all()
        if self._waiter is not None:
            waiter, self._waiter = self._waiter, None
            self._loop.call_soon_threadsafe(_settle, waiter)

    def _add(self, item: T, weight: int) -> None:
        self._items.append((item, weight))
        self._weight += weight
        self._wake()

    def _room(self) -> bool:
        if self._broken or self._ended:
            raise Closed
        return self._weight < self._limit

    def _take(self) -> T | None:
        """An item, or None while there is none; raises what ended it."""
        if self._items:
            item, weight = self._items.popleft()
            self._weight -= weight
            if self._weight < self._limit:
                self._wake()
            return item
        if self._broken:
            raise Closed
        if self._ended:
            if self._error is not None:
                raise self._error
            raise EOFError
        return None

    async def _wait(self, waiter: asyncio.Future[None]) -> None:
        try:
            await waiter
        finally:
            with self._lock:
                if self._waiter is waiter:
                    self._waiter = None


def _settle(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class ToThread(_Pipe[T]):
    """The loop puts in, a thread takes out."""

    async def put(self, item: T, weight: int) -> None:
        """Wait for room. Raises Closed if nobody takes out any more."""
        while True:
            with self._lock:
                if self._room():
                    self._add(item, weight)
                    return
                waiter = self._waiter = self._loop.create_future()
            await self._wait(waiter)

    def get(self) -> T:
        """Block for the next item. Raises EOFError at the end, Closed after ``abandon``, or what ``end`` was given."""
        with self._lock:
            while (item := self._take()) is None:
                self._lock.wait()
            return item


class ToLoop(_Pipe[T]):
    """A thread puts in, the loop takes out."""

    def put(self, item: T, weight: int) -> None:
        """Block for room. Raises Closed if nobody takes out any more."""
        with self._lock:
            while not self._room():
                self._lock.wait()
            self._add(item, weight)

    async def get(self) -> T:
        """Wait for the next item. Raises EOFError at the end, Closed after ``abandon``, or what ``end`` was given."""
        while True:
            with self._lock:
                item = self._take()
                if item is not None:
                    return item
                waiter = self._waiter = self._loop.create_future()
            await self._wait(waiter)
