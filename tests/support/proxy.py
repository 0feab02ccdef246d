"""A TCP proxy on loopback that cuts and delays: networks as they are."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Proxy:
    """Passes bytes on between its clients and ``port``.

    ``cut_in`` and ``cut_out`` are after how many bytes to the client, or to the server, on one connection that
    connection is reset; once, then they are None again. Of every connection ``piece`` bytes are passed on at a time,
    with a ``pause`` before each.
    """

    def __init__(self, port: int) -> None:
        self.target = port
        self.port = 0
        self.accepted = 0
        self.cuts = 0
        self.cut_in: int | None = None
        self.cut_out: int | None = None
        self.piece = 1 << 16
        self.pause = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    def drop(self) -> None:
        """Reset every connection there is."""
        for writer in self._writers:
            writer.transport.abort()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, upstream[1]}
        self._writers |= both
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass(reader, upstream[1], both, "cut_out"))
                group.create_task(self._pass(upstream[0], writer, both, "cut_in"))
        finally:
            self._writers -= both
            for each in both:
                each.transport.abort()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, both: set[asyncio.StreamWriter], cut: str
    ) -> None:
        passed = 0
        try:
            while data := await reader.read(self.piece):
                limit: int | None = getattr(self, cut)
                if limit is not None and passed + len(data) > limit:
                    setattr(self, cut, None)
                    writer.write(data[: limit - passed])
                    await writer.drain()
                    self.cuts += 1
                    break
                if self.pause:
                    await asyncio.sleep(self.pause)
                writer.write(data)
                await writer.drain()
                passed += len(data)
        except ConnectionError:
            pass
        for each in both:  # half-closed connections are of no use to anybody here
            each.close()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.create_task(self._client(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        self.drop()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def proxy(port: int) -> AsyncIterator[Proxy]:
    made = Proxy(port)
    listener = await asyncio.start_server(made.accept, "127.0.0.1", 0)
    made.port = listener.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        listener.close()
        await made.close()
        await listener.wait_closed()
