"""Metrics: what they say about jobs, streams, batches and books, and that their labels stay bounded."""

from __future__ import annotations

from typing import Any

import pytest
from gpu_byoc_backends.numpy_cpu import NumpyBackend

from gpu_byoc.config import EngineConfig
from gpu_byoc.core.meter import Meter
from gpu_byoc.engine.engine import Engine
from gpu_byoc.processors.green_tint import GreenTint
from gpu_byoc.worker.hardware import backend_report
from tests.support.engines import Door, Gated
from tests.support.scrapes import scrape
from tests.support.streams import clip, publish, rig, watching
from tests.support.workers import asynchronous, running


@asynchronous
async def test_batches_frames_and_waits_are_counted_by_size() -> None:
    async with running(GreenTint()) as r:
        for frames in (1, 1, 3):
            headers = {"X_Frame_Width": "4", "X_Frame_Height": "2"}
            assert (await r.post(bytes(24 * frames), **headers))[0] == 200
        found = await scrape(r)
        compute = (await r.get("/compute"))["totals"]["jobs"]["compute_seconds"]
    at = {"device": "cpu"}
    assert found.value("byoc_batch_frames_sum", **at) == 5
    assert found.value("byoc_batch_frames_bucket", le="1.0", **at) == 2
    assert found.value("byoc_batch_frames_bucket", le="4.0", **at) == 3
    assert found.value("byoc_batch_compute_seconds_count", **at) == 3
    assert found.value("byoc_batch_compute_seconds_sum", **at) == compute
    assert found.value("byoc_batch_copy_seconds_sum", **at) == 0
    assert found.value("byoc_frame_queue_seconds_count", **at) == 5, "per frame, not per batch"
    assert sum(found["byoc_batches_left_total"].values()) == 3
    assert found.value("byoc_batches_left_total", reason="device_free", **at) == 3
    assert found.value("byoc_device_batches_total", **at) == 3
    assert found.value("byoc_frames_total", kind="jobs") == 5
    assert found.value("byoc_frames_total", kind="streams") == 0


def test_a_second_try_is_counted() -> None:
    processor = Gated()
    engine = Engine(NumpyBackend(), processor, EngineConfig(max_wait_ms=10_000, max_batch=2))
    engine.start().result(20)
    try:
        door = Door(engine, processor)
        leases = [door.submit(value) for value in (13, 1)]
        outcomes = [outcome.get(timeout=20) for _, outcome in leases]
        assert [outcome.error is None for outcome in outcomes] == [False, True]
        assert {reason: count for reason, count in engine.left().items() if count} == {"full": 1, "retry": 2}
        for lease, _ in leases:
            lease.release()
    finally:
        engine.close()


@asynchronous
async def test_a_streams_numbers_outlive_it_and_its_name_is_no_label() -> None:
    async with rig(GreenTint(), encoder="libx264", lossless=False) as r:
        before = await scrape(r.worker)
        for name in ("a-stream", "another"):
            r.create(name)
            assert (await r.call("stream/start", r.urls(name) | {"params": {"max_framerate": 5}}))[0] == 200
            async with watching(r, name):
                await publish(r, name, clip(10, 2))
                await r.until_over()
        after = await scrape(r.worker)
    assert before.value("byoc_streams_active") == after.value("byoc_streams_active") == 0
    assert after.value("byoc_streams_ended_total", state="ended") == 2
    assert after.value("byoc_streams_ended_total", state="failed") == 0
    came, went = (after.value("byoc_stream_frames_total", way=way) for way in ("in", "out"))
    dropped = sum(after["byoc_frames_dropped_total"].values())
    assert came == 40
    assert after.value("byoc_frames_dropped_total", reason="framerate") > 0
    assert went + dropped == came
    assert after.value("byoc_frames_total", kind="streams") >= went
    labels = {value for series in after.values() for labels in series for _, value in labels}
    assert not [value for value in labels if "a-stream" in value or "another" in value]


@pytest.mark.parametrize("name", ["jobs", "(ended)"])
@asynchronous
async def test_no_stream_takes_the_name_of_other_work(name: str) -> None:
    """It would be charged for that work, and take its totals away when it ends."""
    async with rig(GreenTint(), encoder="libx264") as r:
        assert (await r.worker.post(bytes(300)))[0] == 200
        r.create(name)
        status, answer = await r.call("stream/start", r.urls(name))
        assert (status, answer["error"]) == (400, "bad_request")
        assert (await scrape(r.worker)).value("byoc_frames_total", kind="jobs") == 1


@asynchronous
async def test_callers_cannot_make_time_series() -> None:
    """Sizes, names and routes are theirs to choose; how many lines a scrape has is not."""
    async with running(GreenTint()) as r:
        for _ in range(2):  # the second starts when the first is through with everything
            assert (await r.post(bytes(3)))[0] == 200
        assert (await r.post(bytes(4)))[0] == 400
        before = await scrape(r)
        for pixels in range(2, 12):
            assert (await r.post(bytes(3 * pixels), X_Job_Id=f"j{pixels}"))[0] == 200
            assert (await r.post(bytes(3 * pixels + 1), X_Model_Id=f"m{pixels}"))[0] == 400
        after = await scrape(r)
    assert {name: set(series) for name, series in after.items()} == {
        name: set(series) for name, series in before.items()
    }
    assert after.value("byoc_slots", device="cpu") == 11 * 32
    assert after.value("byoc_slot_memory_bytes", device="cpu") == 32 * sum(3 * pixels for pixels in range(1, 12))


@asynchronous
async def test_a_gpus_memory_and_use_are_there_when_its_backend_knows_them() -> None:
    async with running(GreenTint()) as r:
        assert r.worker.engine is not None
        assert (await scrape(r)).get("byoc_gpu_memory_bytes") is None, "none on a CPU"
        stats = {"memory_total": 100, "memory_free": 40, "utilization_compute": 7, "utilization_memory": 1}
        part = stats | {"utilization_compute": None}
        (engine,) = r.worker.engine.engines
        engine.backend.info = lambda: {"gpu_info": {}, "gpu_stats": {"0": stats, "3": part}}  # type: ignore[method-assign]
        found = await scrape(r)
        assert (await r.get("/hardware/stats"))["gpu_stats"]["0"] == stats
    assert found.value("byoc_gpu_memory_bytes", gpu="0") == 60
    assert found.value("byoc_gpu_memory_total_bytes", gpu="3") == 100
    assert found["byoc_gpu_utilization_percent"] == {frozenset({("gpu", "0")}): 7}


# --- the books check themselves


@asynchronous
async def test_the_books_balance_while_jobs_and_streams_run_and_fail() -> None:
    async with rig(Gated(), encoder="libx264") as r:
        r.create("a")
        assert (await r.call("stream/start", r.urls("a")))[0] == 200
        async with watching(r, "a"):
            await publish(r, "a", clip(10, 1), close=False)
            for value in (1, 13, 2):
                await r.worker.post(bytes([value]) * 300)
            found = await scrape(r.worker)
            assert found.value("byoc_metering_error_ratio", device="cpu") == 0
            r.delete("a")
            await r.until_over()
        found = await scrape(r.worker)
        assert found.value("byoc_metering_error_ratio", device="cpu") == 0
        assert found.value("byoc_device_compute_seconds_total", device="cpu") > 0
        assert found.value("byoc_degraded") == 0


@pytest.mark.parametrize("flaw", ["a name's share is lost", "a result says more than was booked"])
@asynchronous
async def test_a_defect_in_the_books_is_said_aloud(flaw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    book = Meter.book

    def flawed(self: Meter, end: int, compute: int, copy: int, shares: Any) -> Any:
        parts = book(self, end, compute, copy, shares)
        if flaw.startswith("a name"):
            self.totals["jobs"].compute_ns -= compute // 2
            return parts
        return [(2 * compute, copy) for compute, copy in parts]

    monkeypatch.setattr(Meter, "book", flawed)
    async with running(GreenTint()) as r:
        assert (await r.post(bytes(3000)))[0] == 200
        found = await scrape(r)
        report = backend_report(r.worker.engine, [])
    assert found.value("byoc_metering_error_ratio", device="cpu") > 0.4
    assert found.value("byoc_degraded") == 1
    assert "the books are off by" in report["degraded"][0]
