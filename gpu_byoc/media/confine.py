"""What a process that decodes strangers' streams gives up, before it reads the first byte of one.

* limits: no file, socket or pipe can be opened any more (RLIMIT_NOFILE 0; those that are open go on working), memory is
  bounded (RLIMIT_AS), no core is dumped, nothing new is written (RLIMIT_FSIZE 0);
* privileges: none can be gained (PR_SET_NO_NEW_PRIVS), none are left (capabilities dropped), and it dies with the
  thread that started it (PR_SET_PDEATHSIG);
* system calls: all but those on a short list fail with EPERM (seccomp). Not on it: whatever starts a program or a
  process, opens anything, talks to a network, or looks into another process;
* namespaces: a network of its own with nothing in it, no other process's IPC. Containers mostly forbid to make these;
  then the three others stand alone, and the status says so.

Numbers are from Linux's headers: prctl.h, seccomp.h, filter.h, audit.h, sched.h, and unistd.h of both architectures.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import Final

WALLS: Final = ("limits", "privileges", "system calls", "namespaces")

_PDEATHSIG, _DUMPABLE, _SECCOMP, _NO_NEW_PRIVS = 1, 4, 22, 38  # prctl's
_SECCOMP_FILTER: Final = 2
_NEW_USER, _NEW_NET, _NEW_IPC = 0x1000_0000, 0x4000_0000, 0x0800_0000  # unshare's

# Of each machine: its audit number, and (since x86 has a second set of calls) where numbers end.
_MACHINES: Final = {"x86_64": (0xC000003E, 0x4000_0000), "aarch64": (0xC00000B7, 0x4000_0000)}
_CALLS: Final[dict[str, tuple[int, int]]] = {  # x86_64, aarch64
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "readv": (19, 65),
    "writev": (20, 66),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "nanosleep": (35, 101),
    "getpid": (39, 172),
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "sendmsg": (46, 211),
    "recvmsg": (47, 212),
    "exit": (60, 93),
    "uname": (63, 160),
    "gettimeofday": (96, 169),
    "getrusage": (98, 165),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "futex": (202, 98),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "getrandom": (318, 278),
}

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # BPF: a word; jump if equal, if >=; return
_ALLOW, _REFUSE = 0x7FFF_0000, 0x0005_0000 | 1  # SECCOMP_RET_ALLOW; _ERRNO with EPERM
_NUMBER_AT, _MACHINE_AT = 0, 4  # in struct seccomp_data


class _Program(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def confine(memory: int) -> dict[str, str]:
    """Give up everything for good; ``memory`` is how many bytes may be mapped beside those that are now. Returns, for
    each of ``WALLS``, "" or why it does not stand. For a process with one thread that has imported all it needs."""
    libc = ctypes.CDLL(None, use_errno=True)
    walls = {"namespaces": _unshare(libc)}
    walls["privileges"] = _drop(libc)
    walls["limits"] = _limit(memory)
    walls["system calls"] = _filter(libc)  # last, for it forbids what the others do
    return {name: walls[name] for name in WALLS}


def _unshare(libc: ctypes.CDLL) -> str:
    """As root of a user namespace of our own: without one, only root may make the others."""
    if libc.unshare(_NEW_USER | _NEW_NET | _NEW_IPC):
        return f"the kernel does not let it make namespaces: {_reason()}"
    return ""


def _drop(libc: ctypes.CDLL) -> str:
    if libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0) or libc.prctl(_DUMPABLE, 0, 0, 0, 0):
        return _reason()
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0):
        return _reason()
    # struct __user_cap_header_struct of version 3, and its two sets of effective, permitted and inheritable ones
    if libc.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24)):
        return f"capabilities: {_reason()}"
    return ""


def _limit(memory: int) -> str:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    most = pages * resource.getpagesize() + memory
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        for which in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):
            resource.setrlimit(which, (0, 0))
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _filter(libc: ctypes.CDLL) -> str:
    machine = platform.machine() if sys.byteorder == "little" and sys.maxsize > 1 << 32 else ""
    if machine not in _MACHINES:
        return f"there is no list of system calls for {platform.machine()}"
    program = _bpf(machine)
    if libc.prctl(_SECCOMP, _SECCOMP_FILTER, ctypes.byref(_Program(len(program) // 8, program)), 0, 0):
        return f"the kernel takes no filter: {_reason()}"
    return ""


def _bpf(machine: str) -> bytes:
    """Whether the call is one of this machine's and on the list; jumps count instructions to pass over."""
    audit, end = _MACHINES[machine]
    numbers = [each[list(_MACHINES).index(machine)] for each in _CALLS.values()]
    count = len(numbers)
    lines = [
        (_LOAD, 0, 0, _MACHINE_AT),
        (_EQUAL, 0, count + 2, audit),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_AT_LEAST, count, 0, end),
        *((_EQUAL, count - at, 0, number) for at, number in enumerate(numbers)),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def _reason() -> str:
    return os.strerror(ctypes.get_errno())
