"""Child processes that never outlive their parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gpu_byoc.local import children
from gpu_byoc.local.children import Child, ChildEnded, Children, pick_ports

SLEEP = (sys.executable, "-c", "import time; print('up'); time.sleep(60)")
STUBBORN = (
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); time.sleep(60)",
)


def until_it_says(child: Child, text: str) -> None:
    deadline = time.monotonic() + 20
    while not any(text in line for line in child.lines()):
        child.check()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_leaving_the_block_ends_them_in_a_session_of_their_own(tmp_path: Path) -> None:
    with Children(tmp_path) as family:
        child = family.start("sleeper", SLEEP)
        until_it_says(child, "up")
        assert os.getsid(child.process.pid) == child.process.pid != os.getsid(0)
        child.check()
    assert child.process.returncode == -signal.SIGTERM


def test_one_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "STOP_SECONDS", 0.2)
    with Children(tmp_path) as family:
        stubborn, other = family.start("stubborn", STUBBORN), family.start("sleeper", SLEEP)
        until_it_says(stubborn, "up")
        until_it_says(other, "up")
    assert stubborn.process.returncode == -signal.SIGKILL
    assert other.process.returncode == -signal.SIGTERM


def test_a_second_ctrl_c_does_not_wait_for_it(tmp_path: Path) -> None:
    family = Children(tmp_path)
    stubborn = family.start("stubborn", STUBBORN)
    until_it_says(stubborn, "up")
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)  # raises KeyboardInterrupt, as SIGINT does
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the alarm must not come outside
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            family.close()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < children.STOP_SECONDS / 2
    assert stubborn.process.returncode == -signal.SIGKILL


PARENT = """
import sys, time
from pathlib import Path
from gpu_byoc.local.children import Children
family = Children(Path(sys.argv[1]))
child = family.start("stubborn", sys.argv[2:])
while not child.lines():
    time.sleep(0.005)
print(child.process.pid, flush=True)
time.sleep(60)
"""


def test_a_parent_that_is_killed_takes_them_along(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, tmp_path, *STUBBORN], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
    gone, alive = psutil.wait_procs([child], timeout=20)
    assert not alive
    assert gone == [child]


def test_one_that_ends_is_noticed_with_the_end_of_its_log(tmp_path: Path) -> None:
    script = "print(*range(100), sep='\\n'); print('port in use'); raise SystemExit(2)"
    with Children(tmp_path) as family:
        child = family.start("worker", (sys.executable, "-c", script))
        child.process.wait(20)
        with pytest.raises(ChildEnded, match="the worker ended with exit status 2") as caught:
            child.check()
    said = str(caught.value)
    assert "port in use" in said
    assert "\n    99\n" in said
    assert "\n    50\n" not in said


def test_a_program_that_does_not_exist(tmp_path: Path) -> None:
    with Children(tmp_path) as family:
        child = family.start("worker", ("/no/such/program",))
        child.process.wait(20)
        with pytest.raises(ChildEnded, match="No such file"):
            child.check()


def test_ports_that_are_taken_are_replaced() -> None:
    (free,) = pick_ports([0])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        held = taken.getsockname()[1]
        ports = pick_ports([held, free, free, 0])
        assert ports[1] == free
        assert len(set(ports)) == 4
        assert held not in ports
        assert 0 not in ports
