"""The bounds that few set: each is a flag and a variable, takes effect, and is counted when it is reached."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import time
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import fields, replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gpu_byoc.config import EngineConfig, LimitConfig, ServeConfig
from gpu_byoc.errors import ConfigError
from gpu_byoc.processor import ArrayProcessor
from gpu_byoc.processors.green_tint import GreenTint
from gpu_byoc.processors.passthrough import Passthrough
from gpu_byoc.worker.limits import bounds
from tests.support.clips import counter, live_stream, pid, ts_packets, video_packets
from tests.support.processes import free_port
from tests.support.processes import running as process
from tests.support.scrapes import scrape
from tests.support.streams import Gate, Rig, clip, publish, rig
from tests.support.workers import another, asynchronous, running

NULL_PACKET = b"\x47\x1f\xff\x10" + b"\xff" * 184


@pytest.mark.parametrize("each", fields(LimitConfig), ids=lambda each: each.name)
def test_what_would_make_a_worker_unusable_is_refused(each: Any) -> None:
    least, most = each.metadata["least"], each.metadata["most"]

    def made(value: Any) -> LimitConfig:
        changes: dict[str, Any] = {each.name: value}
        return LimitConfig(**changes)

    assert made(least) != made(most)
    flag = "--" + each.name.replace("_", "-")
    for value in (least - 1, 0, -1, most + 1, float("nan")):
        with pytest.raises(ConfigError, match=f"{flag} is {least} to {most}"):
            made(value)


def test_no_frame_size_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="--max-frame-sizes must be at least 1"):
        EngineConfig(max_frame_sizes=0)


PAGE = """
import asyncio, sys
from gpu_byoc import FrameProcessor, run_processor

class Same(FrameProcessor):
    def process_frame(self, frame, params):
        return frame

asyncio.run(run_processor(Same(), port=int({port})))
"""


def metrics(port: int) -> dict[str, dict[str, float]]:
    """Values by name of the sample, then by its only label's value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        samples = [sample for family in families for sample in family.samples]
    found: dict[str, dict[str, float]] = {}
    for sample in samples:
        found.setdefault(sample.name, {})[",".join(sample.labels.values())] = sample.value
    return found


SMALL = {each.name.replace("_", "-"): each.metadata["least"] for each in fields(LimitConfig)} | {"max-frame-sizes": 2}


@pytest.mark.parametrize("way", ["flags", "variables", "run"])
def test_every_one_can_be_set(way: str, tmp_path: Any) -> None:
    port = free_port()
    flags = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    names = {"GPU_BYOC_" + name.upper().replace("-", "_"): str(value) for name, value in SMALL.items()}
    command = ["serve", "--backend", "numpy", "--host", "127.0.0.1", "--port", str(port)]
    if way == "run":
        page = tmp_path / "page.py"
        page.write_text(PAGE.format(port=port))
        command = ["run", str(page), "--host", "127.0.0.1"]
    with process(*command, *([] if way == "variables" else flags), env=names if way == "variables" else None) as worker:
        worker.wait_for("listening")
        said = metrics(port)["byoc_limit"]
        assert worker.end() == 0
    assert said == bounds(ServeConfig()) | SMALL


def counted(port: int, name: str, least: float) -> float:
    """Once it is so many: the doorman says what it counted with its next word."""
    deadline = time.monotonic() + 20
    while (value := metrics(port)[name][""]) < least and time.monotonic() < deadline:
        time.sleep(0.02)
    return value


def said(client: socket.socket, data: bytes) -> bytes:
    """All that is answered until the other side closes."""
    client.settimeout(20)
    client.sendall(data)
    answer = b""
    while part := client.recv(4096):
        answer += part
    return answer


def test_connections_of_a_process() -> None:
    port = free_port()
    small = {"head-timeout": "2", "max-head-kb": "1", "idle-timeout": "1", "max-at-door": "8"}
    flags = [word for name, value in small.items() for word in (f"--{name}", value)]
    with process("serve", "--backend", "numpy", "--host", "127.0.0.1", "--port", str(port), *flags) as worker:
        worker.wait_for("listening")

        def connect() -> socket.socket:
            return socket.create_connection(("127.0.0.1", port), timeout=20)

        with connect() as client:
            answer = said(client, b"GET /version HTTP/1.1\r\nX: " + b"x" * 2000)
            assert answer.startswith(b"HTTP/1.1 431 ")
            assert b"more than 1024 bytes" in answer
        with connect() as client:
            assert said(client, b"GET /ver").startswith(b"HTTP/1.1 408 ")
        assert counted(port, "byoc_connections_dropped_total", 2) == 2
        with contextlib.ExitStack() as stack:
            waiting = [stack.enter_context(connect()) for _ in range(9)]
            assert waiting[0].recv(1) == b"", "the oldest made room"
            assert counted(port, "byoc_connections_dropped_total", 3) >= 3
        idle = metrics(port)["byoc_connections_idle_closed_total"][""]
        keeping = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        keeping.request("GET", "/version")
        keeping.getresponse().read()
        assert keeping.sock.recv(1) == b"", "it was idle for too long"
        keeping.close()
        assert counted(port, "byoc_connections_idle_closed_total", idle + 1) >= idle + 1
        assert worker.end() == 0


@asynchronous
async def test_frame_sizes() -> None:
    async with running(Passthrough(), EngineConfig(slots=2, max_batch=1, max_frame_sizes=2)) as r:
        for pixels in (1, 2, 3):
            assert (await r.post(bytes(3 * pixels)))[0] == 200
            await r.until(lambda: r.free() == 0)
        assert (await scrape(r)).value("byoc_frame_sizes", device="cpu") == 2


class Failing(ArrayProcessor):
    def process_batch(self, batch: Any, params: Any, xp: Any) -> Any:
        raise ValueError("none of them")


@asynchronous
async def test_clients_that_are_remembered() -> None:
    async with running(Failing(), limits=LimitConfig(max_failing_clients=1)) as one, another(one) as two:
        assert (await one.post(bytes(3)))[0] == 500
        assert (await scrape(one)).value("byoc_clients_forgotten_total") == 0
        assert (await two.post(bytes(3)))[0] == 500
        assert (await scrape(one)).value("byoc_clients_forgotten_total") == 1


@contextlib.asynccontextmanager
async def started(
    processor: ArrayProcessor, urls: dict[str, str] | None = None, slots: int = 3, **limits: int
) -> AsyncIterator[Rig]:
    """A rig with a stream, ``s``, that runs."""
    async with rig(processor, EngineConfig(slots=slots, max_batch=2)) as r:
        worker = r.worker.worker
        worker.config = replace(worker.config, limits=LimitConfig(**limits))
        r.create("s")
        assert (await r.call("stream/start", r.urls("s") | (urls or {})))[0] == 200
        yield r


async def until_counted(r: Rig, reason: str) -> None:
    """A fault of the stream's, in the metrics too."""
    stream = r.stream("s")
    await r.worker.until(lambda: stream.session.problems[reason] > 0)
    assert (await scrape(r.worker)).value("byoc_stream_problems_total", reason=reason) > 0


@asynchronous
async def test_messages_of_streams() -> None:
    async with started(GreenTint(), max_message_kb=4, max_update_kb=1, max_update_lines=2) as r:
        status, answer = await r.call("stream/start", r.urls("t") | {"more": "x" * 4096})
        assert (status, answer["error"]) == (413, "too_large")
        status, answer = await r.call("stream/update", {"boost": 100, "more": "x" * 1024})
        assert (status, answer["error"]) == (413, "too_large")
        assert (await scrape(r.worker)).value("byoc_errors_total", type="too_large") == 2
        r.server.hub.write("s-control", json.dumps({"boost": 101, "more": "x" * 1024}).encode())
        await until_counted(r, "control")
        assert not r.stream("s").session.problems["params"]
        r.server.hub.write("s-control", b"\n".join(b'{"boost": %d}' % boost for boost in (102, 103, 104)))
        await until_counted(r, "params")
        assert r.stream("s").params.processor.boost == 103, "the third line is not read"


@asynchronous
async def test_input_that_waits_to_be_decoded() -> None:
    gate = Gate()
    async with started(gate, input_buffer_mb=1) as r:
        pieces = [*clip(10, 1), *[NULL_PACKET * 4000] * 3]
        sending = asyncio.create_task(publish(r, "s", pieces, close=False))
        await asyncio.to_thread(gate.entered.wait, 20)
        await until_counted(r, "input_waits")
        gate.gate.set()
        await sending


@asynchronous
async def test_output_that_waits_to_be_sent() -> None:
    waiting: list[asyncio.StreamWriter] = []

    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        waiting.append(writer)

    stuck = await asyncio.start_server(never, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{stuck.sockets[0].getsockname()[1]}/out"
    async with started(Passthrough(), {"publish_url": url}, output_buffer_mb=1) as r:
        sink = r.stream("s")._sink
        assert sink is not None
        assert sink._limit == 1 << 20
        sink._limit = 1  # pictures of these clips are small
        await publish(r, "s", clip(20, 2), close=False)
        await until_counted(r, "output_waits")
        await r.worker.worker.streams.close(0)
    stuck.close()
    for writer in waiting:
        writer.close()


@asynchronous
async def test_a_picture_that_is_too_large() -> None:
    (whole,) = clip(10, 1)
    packets = ts_packets(whole)
    last = packets[video_packets(whole)[-1]]
    start = next(packet for packet in packets if packet[1] & 0x40 and pid(packet) == 0x100)
    head = start[:3] + bytes([start[3] & 0xF0 | counter(last) + 1 & 15]) + start[4:]
    rest = [b"\x47\x01\x00" + bytes([0x10 | counter(head) + 1 + number & 15]) + bytes(184) for number in range(6000)]
    async with started(Passthrough(), max_packet_mb=1) as r:
        await publish(r, "s", [whole + head + b"".join(rest)], close=False)
        await until_counted(r, "too_long")
        assert r.stream("s").session.problems == {"too_long": 1}


@asynchronous
async def test_sound_that_waits_for_pictures() -> None:
    """Two seconds of it, 94 packets, while the first picture is computed."""
    gate = Gate()
    async with started(gate, slots=128, max_audio_packets=64, max_audio_mb=1) as r:
        stream = r.stream("s")
        assert stream.pump.house._most_audio_bytes == 1 << 20
        source = [live_stream(50, first=90_000, gop=50, audio="aac")]
        await publish(r, "s", source, close=False)
        await r.worker.until(lambda: stream.session.problems["audio_full"] > 20)
        assert (await scrape(r.worker)).value("byoc_stream_problems_total", reason="audio_full") > 20
        gate.gate.set()
        await r.worker.until(lambda: stream.session.frames_out == 50)
        assert stream.session.dropped == {}, "packets of sound are no frames"
        assert stream.session.problems.keys() == {"audio_full"}


@asynchronous
async def test_news_that_nobody_takes() -> None:
    async with started(GreenTint(), {"events_url": "http://127.0.0.1:9/events"}, max_news=16) as r:
        for boost in range(20):
            r.stream("s").update({"boost": boost})
        await until_counted(r, "events_dropped")
