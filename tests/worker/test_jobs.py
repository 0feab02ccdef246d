"""Frame jobs over real HTTP: what goes in, what comes out, what is refused, and that every slot comes back."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from gpu_byoc.config import EngineConfig
from gpu_byoc.processor import ArrayProcessor, FrameProcessor
from gpu_byoc.processors.grayscale import Grayscale
from gpu_byoc.processors.green_tint import GreenTint
from tests.support.scrapes import scrape
from tests.support.workers import asynchronous, running

FRAME = 640 * 480 * 3


def tinted(data: bytes, boost: int = 80) -> bytes:
    pixels = np.frombuffer(data, np.uint8).reshape(-1, 3).astype(np.int32)
    pixels[:, 1] = np.minimum(pixels[:, 1] + boost, 255)
    return pixels.astype(np.uint8).tobytes()


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).tobytes()


def error(body: bytes) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(body)
    assert answer["status"] == "error"
    assert answer["message"]
    return answer


def _everything(sock: socket.socket) -> bytes:
    """What comes until the other side closes."""
    with sock:
        parts = []
        while part := sock.recv(1 << 20):
            parts.append(part)
    return b"".join(parts)


class Slow(FrameProcessor):
    """Holds every frame at a gate, on its own thread."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.seen = 0

    async def process(self, frame: bytes) -> bytes:
        self.seen += 1
        self.gate.wait(20)
        return frame


@asynchronous
async def test_the_pages_black_frame() -> None:
    async with running(GreenTint()) as r:
        for path in ("/live/video-to-video", "/", "/green-tint-cpu"):
            status, headers, body = await r.post(bytes(FRAME), path)
            assert status == 200
            assert len(body) == FRAME
            assert sum(body[1::3]) == 24576000
            assert sum(body[0::3]) == sum(body[2::3]) == 0
            assert headers["Content-Type"] == "application/octet-stream"
            metadata = json.loads(headers["X-Metadata"])
            assert metadata["backend"] == "numpy"
            assert metadata["device"] == "cpu"
            assert metadata["frames"] == metadata["batch"] == 1
            assert metadata["compute_seconds"] > 0
            assert metadata["queue_seconds"] > 0
            assert metadata["copy_seconds"] == 0
            assert {part.split(";")[0].strip() for part in headers["Server-Timing"].split(",")} == {
                "queue",
                "copy",
                "compute",
            }
        assert r.free() == 0


@pytest.mark.parametrize("size", [3, 30, 11520, 11523, 3 * 99991])
def test_any_whole_number_of_pixels(size: int) -> None:
    @asynchronous
    async def go() -> None:
        async with running(GreenTint()) as r:
            data = noise(size)
            assert (await r.post(data))[2] == tinted(data)

    go()


@asynchronous
async def test_geometry_params_and_several_frames_travel_in_the_content_type() -> None:
    async with running(GreenTint()) as r:
        data = noise(5 * 16 * 8 * 3)
        kind = "application/octet-stream; width=16; height=8; format=rgb24; boost=7"
        status, headers, body = await r.post(data, Content_Type=kind)
        assert status == 200
        assert body == tinted(data, 7)
        assert json.loads(headers["X-Metadata"])["frames"] == 5
        assert json.loads(headers["X-Metadata"])["batch"] == 5, "the frames of one body are one batch"
        status, _, body = await r.post(data, X_Frame_Width="16", X_Frame_Height="8", X_Frame_Format="rgb24")
        assert status == 200
        assert body == tinted(data)


@asynchronous
async def test_a_chunked_body_of_unknown_length() -> None:
    async def pieces() -> Any:
        for start in range(0, len(data), 1000):
            yield data[start : start + 1000]

    data = noise(30000)
    async with running(GreenTint()) as r:
        status, _, body = await r.post(pieces())
        assert status == 200
        assert body == tinted(data)


async def nothing() -> AsyncIterator[bytes]:
    for part in list[bytes]():
        yield part


@asynchronous
async def test_an_empty_body_is_a_keep_alive() -> None:
    async with running(GreenTint()) as r:
        for empty in (b"", nothing()):  # the second one's length is not said
            status, headers, body = await r.post(empty)
            assert (status, body) == (200, b"")
            assert json.loads(headers["X-Metadata"])["frames"] == 0
        assert (await scrape(r)).value("byoc_frame_latency_ms_count") == 0, "no job"
        assert (await r.get("/compute"))["device"]["frames"] == 0


@pytest.mark.parametrize(
    ("headers", "size", "status", "code", "says"),
    [
        ({}, 100, 400, "bad_frame", "no whole number of rgb24 pixels"),
        ({"Content_Type": "application/octet-stream; width=10; height=10"}, 299, 400, "bad_frame", "10x10 rgb24"),
        ({"Content_Type": "application/octet-stream; width=10"}, 300, 400, "bad_frame", "height is missing"),
        ({"Content_Type": "application/octet-stream; width=0; height=9"}, 300, 400, "bad_frame", "width='0'"),
        ({"Content_Type": "application/octet-stream; width=x; height=9"}, 300, 400, "bad_frame", "width='x'"),
        ({"Content_Type": "application/octet-stream; width=99999; height=9"}, 300, 400, "bad_frame", "99999"),
        ({"Content_Type": "application/octet-stream; format=yuv9"}, 300, 400, "bad_frame", "unknown pixel format"),
        ({"Content_Type": "application/octet-stream; format=rgba"}, 300, 400, "bad_frame", "takes rgb24"),
        ({"Content_Type": "application/octet-stream; boost=900"}, 300, 422, "bad_params", "above the maximum"),
        ({"Content_Type": "application/octet-stream; bost=9"}, 300, 422, "bad_params", "unknown"),
        ({"Content_Type": "text/plain"}, 300, 415, "unsupported_media_type", "text/plain"),
        ({"Content_Type": "application/octet-stream; width=1; height=1"}, 300, 413, "too_large", "--max-batch"),
        ({}, 300_003, 413, "too_large", "--max-body"),
        ({"Content_Type": "image/png"}, 300, 422, "corrupt_image", ""),
        ({"Content_Type": "application/json"}, 300, 400, "bad_request", "not JSON"),
        ({"Content_Type": "application/octet-stream; boost=1e999"}, 300, 422, "bad_params", "expected int"),
        ({"Content_Type": "application/octet-stream; width*=utf-8''16"}, 300, 400, "bad_request", "not understood"),
    ],
)
def test_bad_input_is_refused_clearly_and_the_next_job_works(
    headers: dict[str, str], size: int, status: int, code: str, says: str
) -> None:
    @asynchronous
    async def go() -> None:
        async with running(GreenTint(), max_body=300_000) as r:
            got, sent, body = await r.post(noise(size), **headers)
            assert got == status
            answer = error(body)
            assert answer["error"] == code
            assert says in answer["message"]
            assert json.loads(sent["X-Metadata"])["frames"] == 0, "also an error says what it cost"
            assert sent["Server-Timing"].startswith("queue;dur=0")
            if code == "bad_params":
                assert answer["field"] in ("boost", "bost")
            assert (await r.post(bytes(30)))[0] == 200
            assert r.free() == 0
            metrics = r.worker.metrics.text().decode()
            assert f'byoc_errors_total{{type="{code}"}} 1.0' in metrics

    go()


@asynchronous
async def test_a_body_over_the_limit_is_refused_before_it_is_read() -> None:
    """The head alone is answered: not one byte of the announced body has been sent."""
    async with running(GreenTint(), max_body=1000) as r:
        for extra in ("", "Expect: 100-continue\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", r.port)
            writer.write(f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n{extra}\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 413")
            writer.close()
            await writer.wait_closed()


@asynchronous
async def test_a_compressed_body_is_refused_and_not_inflated() -> None:
    async with running(GreenTint()) as r:
        for data in (gzip.compress(bytes(300)), b"no gzip at all"):
            status, _, body = await r.post(data, Content_Encoding="gzip")
            assert status == 415
            assert "gzip" in error(body)["message"]
        assert (await r.post(bytes(300)))[0] == 200


@asynchronous
async def test_expect_continue_is_honoured() -> None:
    async with running(GreenTint()) as r:
        reader, writer = await asyncio.open_connection("127.0.0.1", r.port)
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 Continue")
        writer.write(b"abc")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        assert await reader.readexactly(3) == tinted(b"abc")
        writer.close()
        await writer.wait_closed()


@asynchronous
async def test_a_body_that_stops_or_ends_early_gives_its_slot_back() -> None:
    async with running(GreenTint(), body_timeout=0.1) as r:
        reader, writer = await asyncio.open_connection("127.0.0.1", r.port)
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3000\r\n\r\n" + bytes(100))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 408")
        writer.close()
        await writer.wait_closed()
        assert r.free() == 0

        reader, writer = await asyncio.open_connection("127.0.0.1", r.port)
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3000\r\n\r\n" + bytes(100))
        await r.until(lambda: r.worker.active == 1)
        writer.close()
        await writer.wait_closed()
        await r.until(lambda: r.worker.active == 0)
        assert r.free() == 0


@asynchronous
async def test_a_slow_reader_gets_its_own_frame_though_slots_are_few() -> None:
    """Two slots, answers far larger than the socket's buffers, and other jobs that would overwrite a slot given back
    too early."""
    size = 24_000_000
    async with running(GreenTint(), EngineConfig(slots=2, max_batch=1), slot_wait=10) as r:
        data = noise(size)
        slow = socket.create_connection(("127.0.0.1", r.port))
        head = f"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {size}\r\n\r\n".encode()
        await asyncio.to_thread(slow.sendall, head + data)
        first = await asyncio.to_thread(slow.recv, 1000)
        assert first.startswith(b"HTTP/1.1 200")
        for seed in range(1, 6):
            other = noise(size, seed)
            status, _, body = await r.post(other)
            assert status == 200
            assert body == tinted(other), "the slot that is still being read was not handed out"
        assert r.free() == -1, "the slow reader's slot is still his"

        answer = first + await asyncio.to_thread(_everything, slow)
        assert answer.split(b"\r\n\r\n", 1)[1] == tinted(data)
        await r.until(lambda: r.free() == 0)


@asynchronous
async def test_the_last_bytes_of_an_answer_are_still_the_slots() -> None:
    """An answer below asyncio's ordinary high-water mark, most of it not taken by the socket: ``write`` returns at
    once, and since Python 3.12 the transport refers to the slot until the reader has read."""
    size = 60_000
    async with running(GreenTint(), EngineConfig(slots=2, max_batch=1), slot_wait=10) as r:
        r.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        data = noise(size)
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", r.port))
        head = f"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {size}\r\n\r\n".encode()
        await asyncio.to_thread(slow.sendall, head + data)
        await r.until(lambda: r.worker.engine is not None and r.worker.engine.usage()[2].frames == 1)
        for seed in range(1, 6):
            other = noise(size, seed)
            assert (await r.post(other))[2] == tinted(other)
        assert r.free() == -1, "the slow reader's slot is still his"
        answer = await asyncio.to_thread(_everything, slow)
        assert answer.split(b"\r\n\r\n", 1)[1] == tinted(data)
        await r.until(lambda: r.free() == 0)


@asynchronous
async def test_a_reader_that_never_reads_is_cut_off() -> None:
    async with running(GreenTint(), body_timeout=1.5) as r:
        size = 24_000_000
        stuck = socket.create_connection(("127.0.0.1", r.port))
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await asyncio.to_thread(
            stuck.sendall, f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode() + bytes(size)
        )
        await r.until(lambda: r.worker.active == 0 and r.free() == 0)
        stuck.close()
        assert 'type="client_gone"} 1.0' in r.worker.metrics.text().decode()


@asynchronous
async def test_a_picture_nobody_reads_is_cut_off_too() -> None:
    from gpu_byoc.frames import FrameSpec
    from gpu_byoc.media import images

    spec = FrameSpec(3000, 2000)
    png = images.encode(memoryview(bytearray(noise(spec.nbytes))), spec, "image/png")
    async with running(GreenTint(), body_timeout=1.0) as r:
        r.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        stuck = socket.socket()
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.connect(("127.0.0.1", r.port))
        head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(png)}\r\n\r\n"
        await asyncio.to_thread(stuck.sendall, head.encode() + png)
        await r.until(lambda: 'type="client_gone"} 1.0' in r.worker.metrics.text().decode())
        stuck.close()
        assert r.worker.active == 0
        assert r.worker.budget.used == 0


@asynchronous
async def test_a_body_that_only_drips_is_given_up() -> None:
    async with running(GreenTint(), EngineConfig(slots=1, max_batch=1), body_timeout=0.2) as r:
        reader, writer = await asyncio.open_connection("127.0.0.1", r.port)
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 90000\r\n\r\n")
        answer = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
        for _ in range(600):
            if answer.done():
                break
            writer.write(b"x")
            await asyncio.wait([answer], timeout=0.05)
        assert (await answer).startswith(b"HTTP/1.1 408")
        writer.close()
        await writer.wait_closed()
        assert (await r.post(bytes(300)))[0] == 200


@asynchronous
async def test_bodies_that_are_collected_share_a_budget() -> None:
    async with running(GreenTint(), max_collected=1000) as r:
        _, writer = await asyncio.open_connection("127.0.0.1", r.port)
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n320\r\n" + bytes(800) + b"\r\n")
        await r.until(lambda: r.worker.budget.used == 800)
        status, headers, body = await r.post(bytes(300), Content_Type="image/png")
        assert status == 503
        assert "Retry-After" in headers
        assert error(body)["error"] == "overloaded"
        writer.close()
        await writer.wait_closed()
        await r.until(lambda: r.worker.budget.used == 0)


@asynchronous
async def test_a_processor_that_does_not_answer_is_a_timeout() -> None:
    processor = Slow()
    async with running(processor, job_timeout=1.0) as r:
        status, _, body = await r.post(bytes(300))
        assert status == 504
        assert error(body)["error"] == "processor_timeout"
        assert await r.get("/health") == {"status": "OK"}, "the device is still busy with it"
        processor.gate.set()
        await r.until(lambda: r.free() == 0)
        await r.until(lambda: r.worker.state == "IDLE")


@asynchronous
async def test_a_new_frame_size_waits_for_its_memory_not_for_slots() -> None:
    processor = Slow()
    async with running(processor, slot_wait=0.01) as r:
        first = asyncio.create_task(r.post(bytes(300)))
        await r.until(lambda: processor.seen == 1)
        other = asyncio.create_task(r.post(bytes(600)))
        await r.until(lambda: r.worker.active == 2)
        await asyncio.wait([other], timeout=0.05)
        processor.gate.set()
        assert (await first)[0] == (await other)[0] == 200


@asynchronous
async def test_clients_that_leave_are_not_computed_for() -> None:
    processor = Slow()
    async with running(processor, EngineConfig(slots=4, max_batch=1)) as r:
        running_job = asyncio.create_task(r.post(bytes(300)))
        await r.until(lambda: processor.seen == 1)
        leaving = [asyncio.create_task(r.post(bytes(300))) for _ in range(3)]
        await r.until(lambda: r.free() == -4)
        for task in leaving:
            task.cancel()
        await asyncio.wait(leaving)
        await r.until(lambda: r.free() == -1)
        processor.gate.set()
        assert (await running_job)[0] == 200
        assert processor.seen == 1
        assert (await r.post(bytes(300)))[0] == 200


@asynchronous
async def test_no_slot_is_503_with_retry_after_and_health_answers_meanwhile() -> None:
    processor = Slow()
    async with running(processor, EngineConfig(slots=1, max_batch=1), slot_wait=0.05) as r:
        first = asyncio.create_task(r.post(bytes(300)))
        await r.until(lambda: processor.seen == 1)
        status, headers, body = await r.post(bytes(300))
        assert status == 503
        assert int(headers["Retry-After"]) >= 1
        assert error(body)["error"] == "overloaded"
        assert await r.get("/health") == {"status": "OK"}
        processor.gate.set()
        assert (await first)[0] == 200
        await r.until(lambda: r.worker.state == "IDLE")


@asynchronous
async def test_jobs_of_several_clients_share_batches() -> None:
    class Gate(GreenTint):
        kernels = {}
        entered = threading.Event()
        gate = threading.Event()

        def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
            self.entered.set()
            assert self.gate.wait(20)
            return super().process_batch(frames, params, xp)

    async with running(Gate(), EngineConfig(slots=8, max_batch=8)) as r:
        first = asyncio.create_task(r.post(noise(300)))
        await asyncio.to_thread(Gate.entered.wait, 20)
        data = [noise(300, seed) for seed in range(6)]
        others = [asyncio.create_task(r.post(each)) for each in data]
        assert r.worker.engine is not None
        fleet = r.worker.engine
        await r.until(lambda: fleet.waiting == 6)
        Gate.gate.set()
        assert (await first)[0] == 200
        for task, each in zip(others, data, strict=True):
            status, headers, body = await task
            assert status == 200
            assert body == tinted(each)
            assert json.loads(headers["X-Metadata"])["batch"] == 6


@pytest.mark.parametrize(
    ("answer", "code", "says"),
    [
        (lambda frame: 1 / 0, "processor_failed", "ZeroDivisionError"),
        (lambda frame: frame[:-1], "processor_output", "299 bytes for a frame of 300"),
        (lambda frame: None, "processor_output", "NoneType"),
        (lambda frame: exec("raise SystemExit(3)"), "processor_failed", "SystemExit"),
    ],
)
def test_a_processor_that_fails_is_named_and_the_next_job_works(answer: Any, code: str, says: str) -> None:
    class Bad(FrameProcessor):
        async def process(self, frame: bytes) -> bytes:
            result: bytes = frame if frame[0] else answer(frame)
            return result

    @asynchronous
    async def go() -> None:
        async with running(Bad()) as r:
            status, _, body = await r.post(bytes(300))
            assert status == 500
            assert error(body)["error"] == code
            assert says in error(body)["message"]
            assert (await r.post(b"\x01" * 300))[2] == b"\x01" * 300
            assert r.free() == 0
            assert (await r.get("/compute"))["device"]["frames"] == 1, "failed work is not billed"

    go()


@asynchronous
async def test_images_come_back_as_what_they_were() -> None:
    from gpu_byoc.frames import FrameSpec
    from gpu_byoc.media import images

    spec = FrameSpec(33, 17)
    pixels = noise(spec.nbytes)
    png = images.encode(memoryview(bytearray(pixels)), spec, "image/png")
    async with running(GreenTint()) as r:
        status, headers, body = await r.post(png, Content_Type="image/png; boost=3")
        assert status == 200
        assert headers["Content-Type"] == "image/png"
        out = bytearray(spec.nbytes)
        images.decode_into(body, spec, memoryview(out), "image/png")
        assert out == tinted(pixels, 3)
        jpeg = images.encode(memoryview(bytearray(pixels)), spec, "image/jpeg")
        status, headers, body = await r.post(jpeg, Content_Type="image/jpeg")
        assert status == 200
        assert body[:2] == b"\xff\xd8"
        assert images.probe(body, "image/jpeg", 10**6) == spec

        encoded = base64.b64encode(png).decode()
        for image in (encoded, "data:image/png;base64," + encoded):
            request = json.dumps({"image": image, "params": {"boost": 5}})
            status, _, body = await r.post(request, Content_Type="application/json")
            assert status == 200
            answer = json.loads(body)
            assert answer["image"].startswith("data:image/png;base64,") == image.startswith("data:")
            images.decode_into(base64.b64decode(answer["image"].split(",")[-1]), spec, memoryview(out), "image/png")
            assert out == tinted(pixels, 5)
            assert answer["metadata"]["frames"] == 1
        assert r.free() == 0


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"[]", 400, "expected"),
        (b'{"image": 5}', 400, "expected"),
        (b'{"image": "?"}', 400, "base64"),
        (b'{"image": "AAAA"}', 415, "neither"),
        (b'{"image": "AAAA", "params": 3}', 400, "params"),
        (b"\xff", 400, "JSON"),
        ('{"image": "\u00e9"}'.encode(), 400, "base64"),
        (b"[" * 200_000, 400, "JSON"),
        (b'{"image": ' + b"1" * 5000 + b"}", 400, "JSON"),
    ],
)
def test_bad_json(body: bytes, status: int, says: str) -> None:
    @asynchronous
    async def go() -> None:
        async with running(GreenTint()) as r:
            got, _, answer = await r.post(body, Content_Type="application/json")
            assert got == status
            assert says in error(answer)["message"]

    go()


@asynchronous
async def test_a_frame_processor_takes_any_bytes_but_no_unknown_format() -> None:
    class Same(FrameProcessor):
        async def process(self, frame: bytes) -> bytes:
            return frame

    async with running(Same()) as r:
        assert (await r.post(b"12345"))[2] == b"12345"
        status, _, body = await r.post(b"12345", Content_Type="application/octet-stream; format=yuv9")
        assert status == 400
        assert "yuv9" in error(body)["message"]


@asynchronous
async def test_other_processors() -> None:
    class Planes(ArrayProcessor):
        pixel_format = "gray"

        def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
            return xp.flip(frames, axis=2)

    async with running(Grayscale()) as r:
        body = (await r.post(noise(300)))[2]
        assert body[0::3] == body[1::3] == body[2::3]
    async with running(Planes()) as r:
        kind = "application/octet-stream; width=10; height=2; format=gray"
        assert (await r.post(bytes(range(20)), Content_Type=kind))[2] == bytes([*range(9, -1, -1), *range(19, 9, -1)])
        status, _, body = await r.post(b"x", Content_Type="image/png")
        assert status == 415
        assert "gray" in error(body)["message"]


@asynchronous
async def test_no_job_before_the_processor_is_ready() -> None:
    async with running(GreenTint()) as r:
        engine, r.worker.engine = r.worker.engine, None
        status, headers, body = await r.post(bytes(300))
        assert status == 503
        assert "Retry-After" in headers
        assert error(body)["error"] == "not_ready"
        async with r.session.get(r.url + "/health") as answer:
            assert answer.status == 503
            assert await answer.json() == {"status": "LOADING"}
        r.worker.engine = engine
