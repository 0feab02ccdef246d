"""A process that takes inputs on stdin (four bytes of length, then the input) and answers a line of JSON for each."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fuzz.targets import Target


ADDRESS_SPACE = 8 << 30
"""A bound for the machine's sake: what allocates more gets a MemoryError, which is a finding."""


def memory() -> tuple[int, int]:
    """Resident now and at most since the last call, in bytes."""
    sizes = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, peak = (int(sizes[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return now, peak


def load(name: str) -> Target:
    if name == "crashing":
        from tests.fuzz.crashing import Crashing

        return Crashing()
    from tests.fuzz.targets import TARGETS

    return TARGETS[name]()


def main(name: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever prints is for the log
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)
    target = load(name)
    answers.write(b"ready\n")
    runs = 0
    while head := sys.stdin.buffer.read(4):
        data = sys.stdin.buffer.read(int.from_bytes(head, "big"))
        said, wrong = "", ""
        try:
            said = target.run(data)
        except Exception:  # whatever it is: that is what is looked for
            wrong = traceback.format_exc()[-3000:]
        runs += 1
        if runs % 20 == 0 or len(data) > 1 << 20:
            gc.collect()
            trim(0)
        now, peak = memory()
        answers.write(json.dumps({"said": said, "wrong": wrong, "rss": now, "peak": peak}).encode() + b"\n")
    target.close()


if __name__ == "__main__":
    main(sys.argv[1])
