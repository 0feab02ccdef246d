"""The worker on several devices, without the one that was asked for, and with one that is lost or stuck."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gpu_byoc.config import EngineConfig, ServeConfig
from gpu_byoc.errors import BackendUnavailable, ConfigError, DeviceLost, PluginError
from gpu_byoc.processor import ArrayProcessor, FrameProcessor, Processor
from gpu_byoc.processors.green_tint import GreenTint
from gpu_byoc.worker import devices
from gpu_byoc.worker.devices import open_engine
from tests.support import processes
from tests.support.processes import free_port, post, until_health
from tests.support.workers import Running, asynchronous, running


class Counting(ArrayProcessor):
    """Adds what its own setup has counted; ``gate`` holds the first two batches until both are there."""

    gate = threading.Barrier(2)

    def __init__(self, step: int) -> None:
        self.step = step
        self.setups = 0

    def setup(self, xp: Any, device: Any) -> None:
        self.setups += 1

    def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
        self.gate.wait(20)
        return frames + xp.asarray(self.setups * self.step, dtype=xp.uint8)


async def metrics(r: Running) -> dict[str, dict[tuple[str, ...], float]]:
    """By metric and label values in the order of the labels' names; each series once."""
    async with r.session.get(r.url + "/metrics") as answer:
        text = await answer.text()
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            series = found.setdefault(sample.name, {})
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            assert labels not in series, f"{sample.name}{labels} twice"
            series[labels] = sample.value
    return found


async def two_devices(backend: str) -> None:
    async with running(Counting(step=7), backend=backend, device="cpu,cpu") as r:
        answers = await asyncio.gather(*(r.post(bytes(3)) for _ in range(2)))
        assert [(status, body) for status, _, body in answers] == [(200, b"\x07\x07\x07")] * 2, "set up once each"
        assert {json.loads(headers["X-Metadata"])["device"] for _, headers, _ in answers} == {"cpu"}
        status = await r.get("/stream/status")
        assert status["backend"]["device"] == "cpu,cpu#2"
        assert [(d["device"], d["frames"], d["batches"]) for d in status["backend"]["devices"]] == [
            ("cpu", 1, 1),
            ("cpu#2", 1, 1),
        ], "jobs went to both"
        assert {room["device"] for room in status["slots"]} == {"cpu", "cpu#2"}
        assert status["compute"]["totals"]["jobs"]["frames"] == status["compute"]["device"]["frames"] == 2
        for path in ("/hardware/info", "/hardware/stats"):
            assert [d["device"] for d in (await r.get(path))["backend"]["devices"]] == ["cpu", "cpu#2"]
        await r.idle()
        found = await metrics(r)
        assert found["byoc_device_frames_total"] == {("cpu",): 1, ("cpu#2",): 1}
        assert found["byoc_backend_info"] == {(backend, "cpu"): 1, (backend, "cpu#2"): 1}
        assert found["byoc_slots_free"] == {("cpu",): 32, ("cpu#2",): 32}
        assert found["byoc_pinned"] == {("cpu",): 0, ("cpu#2",): 0}
        assert found["byoc_batch_limit"] == {("cpu",): 8, ("cpu#2",): 8}
        assert found["byoc_out_of_memory_total"] == {("cpu",): 0, ("cpu#2",): 0}
        assert 0 <= found["byoc_last_batch_age_seconds"]["cpu#2",] < 20
        assert found["byoc_frames_total"]["jobs",] == 2


@asynchronous
async def test_two_devices_share_the_jobs_and_keep_their_state_apart() -> None:
    await two_devices("numpy")


@pytest.mark.needs_torch
@asynchronous
async def test_two_devices_of_torch() -> None:
    await two_devices("torch")


@asynchronous
async def test_memory_is_shared_out_and_streams_multiplied() -> None:
    config = ServeConfig(backend="numpy", device="cpu, cpu", engine=EngineConfig(memory=1000))
    fleet = await open_engine(config, GreenTint(), [])
    assert fleet.config.memory == 500
    assert config.most_streams == 2 * 32 // 3
    await asyncio.to_thread(fleet.close)


def test_a_list_with_a_hole_is_no_list() -> None:
    for text in ("cpu,", ",", ""):
        with pytest.raises(ConfigError, match="is not a list of devices"):
            ServeConfig(device=text)


class Uncopyable(GreenTint):
    def __init__(self) -> None:
        self.lock = threading.Lock()


class Frames(FrameProcessor):
    async def process(self, frame: bytes) -> bytes:
        return frame


@pytest.mark.parametrize(
    ("processor", "config", "error", "says"),
    [
        (Uncopyable(), {"backend": "numpy", "device": "cpu,cpu"}, PluginError, "make in setup() what cannot be copied"),
        (Frames(), {"device": "cpu,cpu"}, BackendUnavailable, "runs once: choose one device"),
        (Frames(), {"require_gpu": True}, BackendUnavailable, "cannot be seen from outside"),
        (Frames(), {"backend": "nope"}, BackendUnavailable, "no backend named 'nope'"),
        (
            GreenTint(),
            {"backend": "numpy", "require_gpu": True},
            BackendUnavailable,
            "it runs on cpu, and --require-gpu",
        ),
        (
            GreenTint(),
            {"backend": "numpy", "device": "cpu,cuda:1"},
            BackendUnavailable,
            "numpy runs on cpu, not on cuda:1",
        ),
    ],
)
def test_what_several_devices_or_a_gpu_ask_for(
    processor: Processor, config: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error) as caught:
        asyncio.run(open_engine(ServeConfig(**config), processor, []))
    assert says in str(caught.value)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gpu-byoc-")]


@asynchronous
async def test_a_frame_processor_says_that_a_backend_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(devices, "load_backend", lambda _: None)  # cupy need not be here
    fleet = await open_engine(ServeConfig(backend="cupy"), Frames(), [])
    await asyncio.to_thread(fleet.close)
    assert "--backend cupy is not used: Frames is a FrameProcessor" in caplog.text


def test_auto_with_a_gpu_required_names_every_reason_instead_of_falling_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "AUTO", ("no-such", "numpy"))
    with pytest.raises(BackendUnavailable) as caught:
        asyncio.run(open_engine(ServeConfig(require_gpu=True), GreenTint(), []))
    assert "no-such: no backend named 'no-such'" in str(caught.value)
    assert "numpy: it runs on cpu, and --require-gpu asks for a GPU" in str(caught.value)


@asynchronous
async def test_a_plain_fallback_is_shown_everywhere(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(devices, "AUTO", ("no-such", "numpy"))
    caplog.set_level("INFO")
    async with running(GreenTint(), backend="auto") as r:
        reason = "backend numpy instead of a better one: no-such: no backend named 'no-such'"
        assert any("backend numpy on cpu; not no-such" in message for message in caplog.messages)
        for path, key in (("/stream/status", "backend"), ("/hardware/info", "backend")):
            assert (await r.get(path))[key]["degraded"][0].startswith(reason)
        assert (await metrics(r))["byoc_degraded"] == {(): 1}


@asynchronous
async def test_one_lost_device_of_two_turns_health() -> None:
    async with running(GreenTint(), device="cpu,cpu") as r:
        assert r.worker.engine is not None
        r.worker.engine.engines[1]._device.give_up(DeviceLost("cuda:1 fell off the bus"))
        async with r.session.get(r.url + "/health") as answer:
            assert (answer.status, await answer.json()) == (503, {"status": "ERROR"})
        assert "fell off the bus" in (await r.get("/stream/status"))["error_message"]


# --- real processes

STUCK = """
import asyncio, sys, threading, time
from gpu_byoc import ArrayProcessor, FrameProcessor, run_processor
from gpu_byoc.config import EngineConfig

class Sleeps(FrameProcessor):
    async def process(self, frame):
        time.sleep(60)  # not to be cancelled

class Loops(ArrayProcessor):
    def process_batch(self, frames, params, xp):
        while True:
            pass

asyncio.run(run_processor({kind}(), port={port}, host="127.0.0.1", backend="numpy",
                          engine=EngineConfig(processor_timeout=0.5)))
"""


@pytest.mark.parametrize("kind", ["Sleeps", "Loops"])
def test_a_processor_that_never_returns_ends_the_process_and_says_so(kind: str, tmp_path: Path) -> None:
    port, file = free_port(), tmp_path / "stuck.py"
    file.write_text(STUCK.format(kind=kind, port=port))
    with processes.running(program=(str(file),)) as worker:
        worker.wait_for("listening")
        began = time.monotonic()
        status, body = post(port, "/", b"abc")
        assert status == 504
        assert json.loads(body)["error"] == "processor_timeout"
        assert f"{kind} has not come back for 0.5 s (--processor-timeout)" in json.loads(body)["message"]
        assert worker.popen.wait(30) == 75
        assert time.monotonic() - began < 15
        worker.wait_for("the process must be restarted: " + kind)


LOST = """
import asyncio, sys, threading
from gpu_byoc import ArrayProcessor
from gpu_byoc.config import ServeConfig
from gpu_byoc.errors import DeviceLost
from gpu_byoc.processors.green_tint import GreenTint
from gpu_byoc.worker import devices, serve
from gpu_byoc_backends.numpy_cpu import NumpyBackend

sick = threading.Event()

class Sick(NumpyBackend):
    device = "cuda:0"

    def probe(self):
        if sick.is_set():
            raise DeviceLost("an illegal address was met")

def ask():
    sys.stdin.readline()
    sick.set()

threading.Thread(target=ask, daemon=True).start()
devices.load_backend = lambda name: Sick
serve._page_format()
config = ServeConfig(host="127.0.0.1", port={port}, backend="sick")
code = asyncio.run(serve.run(config, GreenTint()))
serve.leave(code)
"""


def test_a_lost_device_turns_health_and_ends_the_process(tmp_path: Path) -> None:
    port, file = free_port(), tmp_path / "lost.py"
    file.write_text(LOST.format(port=port))
    with subprocess.Popen(
        [sys.executable, "-u", str(file)], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdin is not None
        assert worker.stderr is not None
        for line in worker.stderr:
            if "listening" in line:
                break
        until_health(port, "IDLE")
        worker.stdin.write("now\n")
        worker.stdin.flush()
        assert worker.wait(30) == 70
        assert "the process must be restarted: an illegal address was met" in worker.stderr.read()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--require-gpu", "yes", "--backend", "numpy"), "it runs on cpu, and --require-gpu asks for a GPU"),
        (("--device", "cpu,", "--backend", "numpy"), "--device 'cpu,' is not a list of devices"),
        (("--processor-timeout", "-1"), "--processor-timeout is 0 (none) to 86400 seconds"),
        (("--device-timeout", "nan"), "--device-timeout is 0 (none) to 86400 seconds"),
    ],
)
def test_flags_that_cannot_be(arguments: tuple[str, ...], says: str) -> None:
    with processes.running("serve", "--host", "127.0.0.1", "--port", "0", *arguments) as worker:
        worker.wait_for(says)
        assert worker.popen.wait(30) == 2


def test_the_flags_arrive() -> None:
    port = free_port()
    arguments = ("--backend", "numpy", "--device", "cpu,cpu", "--require-pinned", "yes", "--processor-timeout", "9")
    with processes.running("serve", "--host", "127.0.0.1", "--port", str(port), *arguments) as worker:
        worker.wait_for("backend numpy on cpu,cpu#2, as asked for")
        worker.wait_for("listening")
        assert post(port, "/", bytes(3))[0] == 200
        assert worker.end() == 0
