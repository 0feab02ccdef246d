"""Status, versions, hardware, compute rows and metrics, as the network and an operator read them."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from gpu_byoc import __version__
from gpu_byoc.processors.green_tint import GreenTint
from tests.support.workers import asynchronous, running


@asynchronous
async def test_the_networks_own_keys() -> None:
    async with running(GreenTint(), app_version="7.8") as r:
        for path in ("/stream/status", "/api/stream/status"):
            status = await r.get(path)
            expected = {"status", "state", "error_message", "pipeline_ready", "active_streams", "startup_complete"}
            assert expected | {"pipeline_state", "additional_info"} <= set(status)
            assert status["state"] == status["status"] == "IDLE"
            assert status["pipeline_ready"] is True
        assert await r.get("/health") == {"status": "IDLE"}
        assert await r.get("/version") == {"pipeline": "byoc", "model_id": "green-tint-cpu", "version": __version__}
        assert await r.get("/app-version") == {"version": "7.8"}
        info, stats = await r.get("/hardware/info"), await r.get("/hardware/stats")
        assert info["gpu_info"] == {}
        assert stats["gpu_stats"] == {}
        assert info["model_id"] == "green-tint-cpu"
        assert info["pipeline"] == "byoc"


@asynchronous
async def test_compute_rows_totals_status_and_metrics_agree() -> None:
    async with running(GreenTint()) as r:
        for _ in range(5):
            assert (await r.post(bytes(3000)))[0] == 200
        report = await r.get("/compute")
        assert set(report["rows"][0]) == {
            *("second", "name", "frames", "batches", "compute_seconds", "copy_seconds", "queue_seconds")
        }
        assert {row["name"] for row in report["rows"]} == {"jobs"}
        assert report["device"]["frames"] == 5
        total = report["totals"]["jobs"]
        assert abs(sum(row["compute_seconds"] for row in report["rows"]) - total["compute_seconds"]) < 1e-8
        assert sum(row["frames"] for row in report["rows"]) == 5
        assert (await r.get("/stream/status"))["compute"]["totals"]["jobs"] == total

        async with r.session.get(r.url + "/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            families = {f.name: f for f in text_string_to_metric_families(await answer.text())}
        for name in ("byoc_sessions_active", "byoc_frame_latency_ms", "byoc_gpu_memory_bytes", "byoc_errors"):
            assert name in families, name
        compute = families["byoc_compute_seconds"].samples[0]
        assert compute.labels == {"kind": "jobs"}
        assert compute.value == total["compute_seconds"]
        count = [s.value for s in families["byoc_frame_latency_ms"].samples if s.name.endswith("_count")]
        assert count == [5]
        assert families["byoc_slots_free"].samples[0].value == families["byoc_slots"].samples[0].value == 32


@asynchronous
async def test_unknown_routes_and_methods_are_json_errors() -> None:
    async with running(GreenTint()) as r:
        for method, path, status in (("GET", "/nothing", 404), ("GET", "/live/video-to-video", 405)):
            async with r.session.request(method, r.url + path) as answer:
                assert answer.status == status
                assert (await answer.json())["status"] == "error"


@asynchronous
async def test_a_draining_worker_is_alive_but_not_ready() -> None:
    async with running(GreenTint()) as r:
        r.worker.draining = True
        status = await r.get("/stream/status")
        assert status["pipeline_ready"] is False
        assert status["additional_info"]["draining"] is True
        assert (await r.get("/health"))["status"] == "IDLE"
        code, _, body = await r.post(bytes(3))
        assert code == 503
        assert b"draining" in body


@asynchronous
async def test_an_unknown_expectation_is_a_json_error() -> None:
    async with running(GreenTint()) as r:
        code, headers, body = await r.post(bytes(3), Expect="200-maybe")
        assert code == 417
        assert b"expectation_failed" in body
        assert "X-Metadata" in headers
