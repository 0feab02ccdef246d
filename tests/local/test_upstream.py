"""The pool of connections to the next hop, and that closing it leaves none."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from gpu_byoc.local.upstream import Origin, Pool
from tests.local.kit import in_loop, soon


@contextlib.asynccontextmanager
async def server() -> AsyncIterator[tuple[Origin, set[asyncio.StreamWriter]]]:
    """Something that accepts; the connections that it has."""
    connected: set[asyncio.StreamWriter] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.add(writer)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()
        connected.discard(writer)

    listening = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with listening:
        yield Origin(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"), connected
        await soon(lambda: not connected)


@in_loop
async def test_close_waits_for_connections_made_after_all_others_had_gone() -> None:
    async with server() as (origin, connected):
        pool = Pool()
        first = await pool.acquire(origin)
        first.close()
        pool.release(origin, first)
        await soon(lambda: not pool._live)
        await pool.acquire(origin)
        await soon(lambda: len(connected) == 1)
        await pool.close()
        assert not pool._live, "close returned before the connection was gone"


@in_loop
async def test_close_while_a_connection_is_being_made() -> None:
    async with server() as (origin, _):
        pool = Pool()
        acquiring = asyncio.create_task(pool.acquire(origin))
        await asyncio.sleep(0)
        assert not acquiring.done()
        assert not pool._live
        await pool.close()
        with pytest.raises(ConnectionAbortedError):
            await acquiring
        await soon(lambda: not pool._live)
        with pytest.raises(ConnectionAbortedError):
            await pool.acquire(origin)
