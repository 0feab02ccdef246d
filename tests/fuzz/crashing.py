"""A target with every kind of fault, to see that the hunt finds them. It imports nothing of ours."""

from __future__ import annotations

import os
import signal
import time

KEPT: list[bytes] = []


class Crashing:
    def run(self, data: bytes) -> str:
        if b"crash" in data:
            os.kill(os.getpid(), signal.SIGSEGV)
        if b"raise" in data:
            raise ValueError("asked for")
        if b"hang" in data:
            time.sleep(60)
        if b"grow" in data:
            KEPT.append(b"x" * (64 << 20))
        if b"peak" in data:
            len(b"x" * (100 << 20))
        return "fine"

    def close(self) -> None:
        pass
