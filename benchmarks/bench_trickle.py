"""Fan-out of the trickle server, one publisher to many readers, against the loopback copy floor.

The floor is the same bytes through a bare asyncio process that writes what it reads to every reader. Both servers run
as processes of their own and face the same client: blocking sockets, one thread that publishes, one that reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .harness import Sheet, Window, marks, percentile, together
from .load import cpu_of, free_port, process

FANOUT = (1, 8, 64)
CHUNK = 64 << 10
PING = 1316
"""Bytes of a small write: seven TS packets, as encoders emit them."""

_TRICKLE = "import sys; from gpu_byoc.transport.trickle_server import main; sys.exit(main(sys.argv[1:]))"


async def floor(port: int) -> None:
    """A connection begins with ``r`` (it is to get everything) or ``w`` (what it sends goes to everybody)."""
    readers: list[asyncio.StreamWriter] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readexactly(1) == b"r":
            readers.append(writer)
            writer.write(b"r")
            return
        while data := await reader.read(1 << 20):
            for each in readers:
                each.write(data)
            for each in readers:
                await each.drain()
        for each in readers:
            each.close()
        readers.clear()
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", port, limit=1 << 20) as server:
        await server.serve_forever()


@dataclass
class Target:
    """One of the two servers, spoken to in its own way."""

    name: str
    port: int
    used: Callable[[], float]
    """CPU seconds that the server has used so far."""
    seq: int = 0

    def connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def reader(self) -> socket.socket:
        sock = self.connect()
        if self.name == "floor":
            sock.sendall(b"r")
            sock.recv(1)
        else:
            sock.sendall(f"GET /bench/{self.seq} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        return sock

    def publisher(self) -> socket.socket:
        sock = self.connect()
        if self.name == "floor":
            sock.sendall(b"w")
        else:
            sock.sendall(f"POST /bench/{self.seq} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        return sock

    def frame(self, data: bytes) -> bytes:
        return data if self.name == "floor" else b"%x\r\n%s\r\n" % (len(data), data)

    def end(self, sock: socket.socket) -> None:
        if self.name != "floor":
            sock.sendall(b"0\r\n\r\n")
            if not sock.recv(4096).startswith(b"HTTP/1.1 200"):
                raise RuntimeError("the POST was not answered with 200")
            self.seq += 1
        sock.close()


@contextlib.contextmanager
def _targets() -> Iterator[tuple[Target, Target]]:
    ports = free_port(), free_port()
    with (
        process("-m", f"{__package__}.bench_trickle", str(ports[0])) as bare,
        process("-c", _TRICKLE, "--port", str(ports[1]), "--autocreate", "--max-channel-mb", "512") as trickle,
    ):
        floor_, ours = Target("floor", ports[0], cpu_of(bare.pid)), Target("trickle", ports[1], cpu_of(trickle.pid))
        for target in (floor_, ours):
            _until_it_listens(target)
        sock = ours.publisher()  # creates the channel
        ours.end(sock)
        yield floor_, ours


def _until_it_listens(target: Target) -> None:
    for _ in range(2000):
        try:
            target.connect().close()
            return
        except ConnectionRefusedError:
            time.sleep(0.005)
    raise TimeoutError(f"the {target.name} process does not listen")


def _drain(socks: list[socket.socket], size: int) -> None:
    """Read all connections to their ends. Each has to bring ``size`` bytes at least."""
    with selectors.DefaultSelector() as selector:
        got = dict.fromkeys(socks, 0)
        buffer = bytearray(1 << 20)
        for sock in socks:
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_READ, sock)
        while selector.get_map():
            ready = selector.select(60)
            if not ready:
                raise TimeoutError("a reader got nothing for a minute")
            for key, _ in ready:
                reader: socket.socket = key.data
                count = reader.recv_into(buffer)
                got[reader] += count
                if not count:
                    selector.unregister(reader)
                    reader.close()
    if min(got.values()) < size:
        raise RuntimeError(f"a reader got {min(got.values())} of {size} bytes")


def _flood(target: Target, readers: int, size: int) -> Window:
    """From the first byte sent to the last one received: one operation. CPU is the server's."""
    socks = [target.reader() for _ in range(readers)]
    sock = target.publisher()
    frame = target.frame(random.Random(1).randbytes(CHUNK))

    def publish() -> None:
        for _ in range(size // CHUNK):
            sock.sendall(frame)
        target.end(sock)

    used, began = target.used(), time.perf_counter()
    thread = threading.Thread(target=publish)
    thread.start()
    _drain(socks, size)
    spent = time.perf_counter() - began
    thread.join()
    return Window((spent,), spent, target.used() - used)


def _pings(target: Target, readers: int, count: int) -> list[float]:
    """Seconds from a small write to its arrival at the last reader."""
    socks = [target.reader() for _ in range(readers)]
    sock = target.publisher()
    frame = target.frame(bytes(PING - 1) + b"\xff")
    times = []
    for _ in range(count):
        began = time.perf_counter()
        sock.sendall(frame)
        for each in socks:
            tail = b""
            while b"\xff" not in tail:
                tail = each.recv(4096)
                if not tail:
                    raise ConnectionError("a reader was cut off")
        times.append(time.perf_counter() - began)
    target.end(sock)
    for each in socks:
        each.close()
    return times


def run(sheet: Sheet) -> None:
    """Rounds of floor and trickle in turn; ratios are medians over the rounds."""
    fanout = sheet.size.pick(FANOUT[:1], FANOUT, FANOUT)
    sheet.expect(len(fanout))
    sheet.settings(
        trickle="gpu-byoc trickle, chunked POST, one GET a reader",
        floor="a bare asyncio process that writes what it reads to every reader",
        client="this process: one thread publishes, one reads",
    )
    with _targets() as targets:
        for readers in fanout:
            sheet.doing(f"{readers} readers")
            _fan_out(sheet, targets, readers)


def _fan_out(sheet: Sheet, targets: tuple[Target, Target], readers: int) -> None:
    size = max(1 << 20, sheet.size.pick(1, 4, 32) * (1 << 20) // max(1, readers // 8))
    measured = together({each.name: functools.partial(_flood, each, readers, size) for each in targets}, sheet.size)
    pings: dict[str, list[float]] = {target.name: [] for target in targets}
    for _ in range(sheet.size.pick(1, 3, 9)):
        for target in targets:
            pings[target.name] += _pings(target, readers, sheet.size.pick(3, 20, 60))
    floor, ours, total = measured["floor"], measured["trickle"], size * readers / 1e6
    sheet.row(
        f"{readers} reader" + "s" * (readers > 1),
        readers=readers,
        trickle_mb_per_s=total / ours.p50,
        floor_mb_per_s=total / floor.p50,
        of_floor=1 / ours.ratio(floor),
        trickle_p50_ms=percentile(pings["trickle"], 0.5) * 1e3,
        trickle_p99_ms=percentile(pings["trickle"], 0.99) * 1e3,
        floor_p50_ms=percentile(pings["floor"], 0.5) * 1e3,
        cpu_ms_per_mb=ours.cpu * 1e3 / total,
        **marks(floor, ours),
    )


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(floor(int(sys.argv[1])))
