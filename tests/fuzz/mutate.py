"""Inputs that are almost right: a few small changes to one that is. Everything comes from one seeded generator."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from gpu_byoc.media import mpegts
from gpu_byoc.media.mpegts import PACKET, SYNC, WRAP

MOST = 1 << 17
"""Bytes of an input; what needs more to go wrong is among the made seeds."""

_NUMBERS = (b"0", b"-1", b"-2", b"1e9", b"00", b"+1", b"2147483648", b"-9223372036854775809", b"9" * 25, b"9" * 5000)
_WORDS = (
    *(b"\r\n", b"\r\n\r\n", b"\n", b"\0", b" ", b"\t", b":", b";", b",", b'"', b"{", b"[", b"%", b"%00", b"../"),
    *(
        b"nan",
        b"Infinity",
        b"null",
        b"true",
        b"[]",
        b"{}",
        "\N{SNOWMAN}".encode(),
        "\u0660".encode(),
        b"\xed\xa0",
        b"\xff",
    ),
    *(b"Transfer-Encoding: chunked\r\n", b"Content-Length: 4\r\n", b"Expect: 100-continue\r\n", b"Upgrade: h2c\r\n"),
    *(b"Connection: close\r\n", b"Content-Encoding: gzip\r\n", b"Trailer: x\r\n", b"a" * 300, b"a" * 9000, b"[" * 3000),
)


class Mutator:
    """``pool`` are inputs to start from; more may be added. ``packets`` says that they are transport streams."""

    def __init__(self, rng: random.Random, pool: Sequence[bytes], *, packets: bool) -> None:
        self.pool = list(pool)
        self._rng = rng
        plain = [self._flip, self._byte, self._cut, self._double, self._drop, self._splice, self._zero]
        text = [self._number, self._word, self._line, self._number, self._word]
        stream = [self._header, self._field, self._stamp, self._shuffle, self._table, self._payload, self._header]
        self._steps: list[Callable[[bytearray], bytearray]] = [*plain, *(stream if packets else text)]

    def next(self) -> bytes:
        data = bytearray(self._rng.choice(self.pool))
        for _ in range(self._rng.choice((1, 1, 2, 3, 8))):
            data = self._rng.choice(self._steps)(data) if data else bytearray(self._rng.randbytes(40))
        return bytes(data[:MOST])

    # --- any bytes

    def _at(self, data: bytearray) -> int:
        return self._rng.randrange(len(data))

    def _span(self, data: bytearray, most: int = 400) -> slice:
        start = self._at(data)
        return slice(start, start + self._rng.randint(1, most))

    def _flip(self, data: bytearray) -> bytearray:
        data[self._at(data)] ^= 1 << self._rng.randrange(8)
        return data

    def _byte(self, data: bytearray) -> bytearray:
        data[self._at(data)] = self._rng.choice((0, 1, 0x0A, 0x47, 0x7F, 0x80, 0xFE, 0xFF, self._rng.randrange(256)))
        return data

    def _cut(self, data: bytearray) -> bytearray:
        return data[: self._at(data)]

    def _double(self, data: bytearray) -> bytearray:
        part = data[self._span(data)]
        data[(at := self._at(data)) : at] = part * self._rng.choice((1, 1, 2, 20))
        return data

    def _drop(self, data: bytearray) -> bytearray:
        del data[self._span(data)]
        return data

    def _zero(self, data: bytearray) -> bytearray:
        span = self._span(data, 40)
        data[span] = self._rng.choice((b"\0", b"\xff", b" ")) * len(data[span])
        return data

    def _splice(self, data: bytearray) -> bytearray:
        other = self._rng.choice(self.pool)
        return data[: self._at(data)] + other[self._rng.randrange(len(other) + 1) :]

    # --- text

    def _number(self, data: bytearray) -> bytearray:
        digits = [at for at, byte in enumerate(data[:4000]) if 48 <= byte <= 57]
        if not digits:
            return self._word(data)
        start = end = self._rng.choice(digits)
        while end < len(data) and 48 <= data[end] <= 57:
            end += 1
        data[start:end] = self._rng.choice((*_NUMBERS, str(self._rng.getrandbits(self._rng.randrange(70))).encode()))
        return data

    def _word(self, data: bytearray) -> bytearray:
        at = self._at(data)
        data[at : at + self._rng.choice((0, 0, 1, 4))] = self._rng.choice(_WORDS)
        return data

    def _line(self, data: bytearray) -> bytearray:
        lines = bytes(data).split(b"\r\n")
        at = self._rng.randrange(len(lines))
        other = bytes(self._rng.choice(self.pool)).split(b"\r\n")
        lines[at : at + self._rng.randrange(2)] = [self._rng.choice(other)] * self._rng.choice((0, 1, 1, 2, 150))
        return bytearray(b"\r\n".join(lines))

    # --- transport streams

    def _packet(self, data: bytearray) -> int:
        """Where one of its packets begins."""
        return self._rng.randrange(max(1, len(data) // PACKET)) * PACKET

    def _header(self, data: bytearray) -> bytearray:
        """PID, flags, counter."""
        at = self._packet(data) + self._rng.randrange(1, 4)
        if at < len(data):
            data[at] ^= 1 << self._rng.randrange(8)
        return data

    def _field(self, data: bytearray) -> bytearray:
        """An adaptation field that was not there, or another size for the one that is."""
        at = self._packet(data)
        if at + 6 < len(data):
            data[at + 3] |= 0x20
            data[at + 4] = self._rng.choice((0, 1, 7, 182, 183, 184, 255))
            data[at + 5] = self._rng.randrange(256)
        return data

    def _stamp(self, data: bytearray) -> bytearray:
        """Another time in some PES header."""
        found = [at for at in range(0, len(data) - 40, PACKET) if data[at + 1] & 0x40]
        at = bytes(data).find(b"\0\0\1", self._rng.choice(found)) if found else -1
        if 0 <= at < len(data) - 20:
            ticks = self._rng.choice((0, 1, WRAP - 1, WRAP // 2, self._rng.randrange(WRAP)))
            data[at + 9 : at + 14] = mpegts.stamp_bytes(self._rng.choice((2, 3)), ticks)
        return data

    def _shuffle(self, data: bytearray) -> bytearray:
        """Packets that are missing, twice there, or elsewhere."""
        packets = [data[at : at + PACKET] for at in range(0, len(data), PACKET)]
        packet = packets.pop(self._rng.randrange(len(packets)))
        for _ in range(self._rng.choice((0, 1, 2, 30))):
            packets.insert(self._rng.randrange(len(packets) + 1), packet)
        return bytearray(b"".join(packets))

    def _table(self, data: bytearray) -> bytearray:
        """A PAT or PMT that is wrong and has the right checksum."""
        tables = [
            at for at in range(0, len(data) - PACKET + 1, PACKET) if data[at + 1] & 0x40 and data[at + 5] in (0, 2)
        ]
        tables = [at for at in tables if data[at] == SYNC and data[at + 4] == 0 and data[at + 6] & 0xF0 == 0xB0]
        if not tables:
            return self._flip(data)
        at = self._rng.choice(tables) + 5
        size = 3 + ((data[at + 1] & 15) << 8 | data[at + 2])
        if not 12 <= size <= PACKET - 5:
            return data
        section = data[at : at + size - 4]
        for _ in range(self._rng.choice((1, 2, 4))):
            section[self._rng.randrange(3, len(section))] = self._rng.choice(
                (0, 1, 0x1B, 0x24, 0x0F, 0x06, 0xFF, self._rng.randrange(256))
            )
        data[at : at + size] = section + mpegts.crc(bytes(section)).to_bytes(4, "big")
        return data

    def _payload(self, data: bytearray) -> bytearray:
        """Bits behind the header of a packet that begins something: PES headers, SPS, PPS, slice headers."""
        found = [at for at in range(0, len(data) - PACKET + 1, PACKET) if data[at + 1] & 0x40]
        if found:
            at = self._rng.choice(found)
            for _ in range(self._rng.choice((1, 3, 10))):
                data[at + self._rng.randrange(4, 90)] ^= 1 << self._rng.randrange(8)
        return data
