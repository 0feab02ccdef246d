"""``python -m benchmarks.named_threads serve ...``: our command line, its threads known to the kernel by their names.

Python gives threads names that only Python knows (before 3.14); with the kernel's, CPU time can be told by thread from
outside. The name is set once, when a thread begins, and costs nothing after that.
"""

from __future__ import annotations

import ctypes
import runpy
import sys
import threading
from types import FrameType
from typing import Any, Final

PR_SET_NAME: Final = 15  # prctl(2)
LENGTH: Final = 15  # bytes that the kernel keeps: the end of a name says what the thread does


def main() -> None:
    libc = ctypes.CDLL(None)

    def begin(frame: FrameType, event: str, argument: Any) -> None:
        libc.prctl(PR_SET_NAME, threading.current_thread().name[-LENGTH:].encode(), 0, 0, 0)
        sys.setprofile(None)

    threading.setprofile(begin)
    runpy.run_module("gpu_byoc", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
