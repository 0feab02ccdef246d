"""The demo as a user runs it: real processes on free ports, interrupted at several moments, and lied to."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest

from gpu_byoc.frames import FrameSpec
from gpu_byoc.local import demo, demo_network, sheet
from gpu_byoc.local.children import Child, Children, pick_ports
from gpu_byoc.media import clips, images

COMMAND = (sys.executable, "-u", "-m", "gpu_byoc", "demo", "--free-ports", "--backend", "numpy")


@contextmanager
def started(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """The demo with ``directory`` as its working directory, and a folder of its own for temporary files."""
    (directory / "tmp").mkdir()
    process = subprocess.Popen(
        COMMAND,
        cwd=directory,
        env={**os.environ, "TMPDIR": str(directory / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if text in line:
            return said
    raise AssertionError(f"it ended without {text!r}:\n{said}")


def decode(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    data = path.read_bytes()
    spec = images.probe(data, images.PNG, 1 << 24)
    out = np.zeros(spec.nbytes, np.uint8)
    images.decode_into(data, spec, out.data, images.PNG)
    return out.reshape(spec.shape)


def test_the_whole_of_it(tmp_path: Path) -> None:
    with started(tmp_path) as process:
        said, _ = process.communicate(timeout=150)
    assert process.returncode == 0, said
    result = "Status: 200\nResponse size: 921600 bytes\nGreen channel sum: 24576000 (input was 0)\n"
    assert f"\n{result}" in said
    path = (
        r"client  .*\n.*-> gateway :\d+\n.*-> orchestrator :\d+\n"
        r".*I0000 Job received from gateway: green-tint-cpu\n.*I0000 Forwarded to BYOC container\n"
        r".*-> worker :\d+, numpy on cpu\n.*-> green_tint: .*\n"
        r".*I0000 Container response received, returning to gateway\n.*<- client     921600 bytes"
    )
    assert re.search(path, said)
    assert "BYOC capability registered: green-tint-cpu -> http://127.0.0.1:" in said
    assert "132/132" in said
    assert "every byte of 132 frames equals numpy's" in said
    assert re.search(r"132 frames in [\d.]+ s: .* p50 .* p99", said)
    assert re.search(r"numpy on cpu: queue [\d.]+ s, copy 0.0000 s, compute [\d.]+ s", said)
    assert re.search(r"ledger: 133 jobs, [\d.]+ s of wall time, 133 s billed: each job's wall seconds rounded up", said)
    (worker,) = re.findall(r"^  worker .*$", said, re.MULTILINE)
    assert len(worker) <= 100
    assert "\x1b" not in said, "colours in a pipe"
    assert sorted(path.name for path in (tmp_path / "demo-out").iterdir()) == ["before-after.png", "green-tint.mp4"]
    assert not list((tmp_path / "tmp").iterdir()), "temporary files are left"

    info = clips.ClipInfo(FrameSpec(640, 360), Fraction(25), 132)
    assert clips.probe(tmp_path / "demo-out" / "green-tint.mp4") == info
    picture = decode(tmp_path / "demo-out" / "before-after.png")
    before, after = np.split(picture[8:-8], 2)  # equal halves, but for the gap between them
    assert after[..., 1].astype(int).mean() - before[..., 1].astype(int).mean() > 30


@pytest.mark.parametrize(
    ("moment", "number", "code"),
    [
        ("1. A worker", signal.SIGTERM, 143),
        ("2. The quickstart", signal.SIGINT, 130),
        ("132 frames of", signal.SIGINT, 130),
    ],
)
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, moment: str, number: int, code: int) -> None:
    with started(tmp_path) as process:
        read_until(process, moment)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == code, said
        assert "interrupted" in said
        assert "Traceback" not in said
        assert not [child for child in family if child.is_running()]
    assert not list((tmp_path / "tmp").iterdir()), "temporary files are left"
    assert not list((tmp_path / "demo-out").iterdir()), "half a result is left"


def test_kill_9_leaves_no_process_behind(tmp_path: Path) -> None:
    with started(tmp_path) as process:
        read_until(process, "132 frames of")
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) == 4  # gateway, orchestrator, worker, and what answers for the worker
        process.kill()
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive


def test_a_worker_that_cannot_start_is_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--free-ports", "--backend", "abacus", "--output", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "the worker ended with exit status 2" in said
    assert "abacus" in said


LIAR = """
from gpu_byoc.processors.green_tint import GreenTint

class Liar(GreenTint):
    kernels = {{}}

    def process_batch(self, frames, params, xp):
        tinted = super().process_batch(frames, params, xp)
        {lie}
        return tinted
"""


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        pytest.param("tinted[:, 0, 0, 0] = 1", "the black frame came back", id="always"),
        pytest.param(
            "if tinted.shape[2] == 640: tinted[:, 359, 639, 2] ^= 1",
            "132 frames are not what numpy says, the first is number 0",
            id="one bit of each frame with a geometry",
        ),
    ],
)
def test_wrong_pixels_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lie: str, message: str
) -> None:
    (tmp_path / "liar.py").write_text(LIAR.format(lie=lie))
    honest = demo_network._worker

    def lying(ports: demo_network.Ports, backend: str) -> list[str]:
        return [str(tmp_path / "liar.py:Liar") if part == "green_tint" else part for part in honest(ports, backend)]

    monkeypatch.setattr(demo_network, "_worker", lying)
    assert demo.main(["--free-ports", "--backend", "numpy", "--output", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert "All done" not in captured.out
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_page_port_that_is_taken_is_replaced_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: dict[str, list[str]] = {}

    class Recorder(Children):
        def start(self, name: str, command: object) -> Child:
            assert isinstance(command, tuple)
            commands[name] = list(command)
            return super().start(name, (sys.executable, "-c", "pass"))

    wanted = pick_ports([0] * 5)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        wanted[3] = taken.getsockname()[1]

        class Page(demo_network.Ports):
            def __init__(self, *ports: int) -> None:
                super().__init__(*(ports or wanted))

        monkeypatch.setattr(demo_network, "Ports", Page)
        with Recorder(tmp_path) as family:
            network = demo_network.start(family, "numpy", tmp_path, free_ports=False)
    ((old, new),) = network.replaced
    assert old == wanted[3] != new
    assert network.url == f"http://127.0.0.1:{new}"
    assert f"127.0.0.1:{new}" in commands["gateway"]
    assert f"127.0.0.1:{wanted[1]}" in commands["gateway"]
    assert f"127.0.0.1:{wanted[1]}" in commands["orchestrator"]


def test_the_page_ports_and_commands() -> None:
    ports = demo_network.Ports()
    orchestrator = " ".join(demo_network._orchestrator(ports, Path("D"))[3:])
    gateway = " ".join(demo_network._gateway(ports, Path("D"))[3:])
    assert orchestrator == (
        "livepeer -orchestrator -network offchain -serviceAddr 127.0.0.1:8936 -cliAddr 127.0.0.1:7936 -byoc "
        "-byocContainerURL http://127.0.0.1:8000 -byocModelID green-tint-cpu -datadir D"
    )
    assert gateway == (
        "livepeer -gateway -network offchain -orchAddr 127.0.0.1:8936 -httpAddr 127.0.0.1:8935 -httpIngest "
        "-cliAddr 127.0.0.1:5935 -datadir D"
    )


def test_the_sheet() -> None:
    black, white = np.zeros((10, 20, 3), np.uint8), np.full((10, 20, 3), 255, np.uint8)
    picture = sheet.before_after([(black, white), (white, black)])
    height, width, _ = picture.shape
    assert height == 5 + 5 + 3 * 8
    left = width - 2 * 10 - 2 * 8
    for top, colours in ((8, (0, 255)), (8 + 5 + 8, (255, 0))):
        for number, colour in enumerate(colours):
            assert (picture[top : top + 5, left + number * 18 : left + number * 18 + 10] == colour).all()
