"""Spans as a real OTLP/HTTP collector on loopback gets them."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from gpu_byoc.config import ServeConfig
from gpu_byoc.errors import ConfigError
from gpu_byoc.processors.green_tint import GreenTint
from gpu_byoc.worker.tracing import Tracing, job_id
from tests.support.engines import Gated
from tests.support.streams import Rig, clip, publish, rig, watching
from tests.support.workers import Running, asynchronous, running

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}


class Collector:
    """Takes POST /v1/traces; ``spans`` are dicts of what was in them."""

    def __init__(self) -> None:
        self.spans: queue.Queue[dict[str, Any]] = queue.Queue()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.path == "/v1/traces"
                collector.take(body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def take(self, body: bytes) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            about = values(resource.resource.attributes)
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.put(
                        {
                            "name": span.name,
                            "trace": span.trace_id.hex(),
                            "parent": span.parent_span_id.hex(),
                            "error": span.status.code == 2,
                            "seconds": (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
                            **about,
                            **values(span.attributes),
                        }
                    )

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry is not installed: pip install gpu-byoc[otel]")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="pip install gpu-byoc[otel]")
    collector = Collector()
    yield collector
    collector.close()


@contextlib.asynccontextmanager
async def traced(collector: Collector, r: Running) -> AsyncIterator[list[dict[str, Any]]]:
    """The spans of what is done inside, when it is over."""
    r.worker.tracing = Tracing(ServeConfig(otel_endpoint=collector.url + "/", capability="c"))
    spans: list[dict[str, Any]] = []
    yield spans
    await asyncio.to_thread(r.worker.tracing.close)
    while not collector.spans.empty():
        spans.append(collector.spans.get())


@asynchronous
async def test_a_job_is_a_span_of_the_callers_trace(collector: Collector) -> None:
    async with running(GreenTint()) as r:
        async with traced(collector, r) as spans:
            assert (await r.post(bytes(300), X_Job_Id="mine", **PARENT))[0] == 200
            assert (await r.post(bytes(300)))[0] == 200
        first, second = spans
        assert (first["name"], first["trace"], first["parent"]) == ("job", TRACE, "b7ad6b7169203331")
        assert (first["byoc.job"], first["byoc.frames"], first["byoc.batch"]) == ("mine", 1, 1)
        assert (first["service.name"], first["byoc.capability"], first["byoc.device"]) == ("gpu-byoc", "c", "cpu")
        assert not first["error"]
        times = sum(first[f"byoc.{part}_seconds"] for part in ("queue", "copy", "compute"))
        assert 0 < times <= first["seconds"]
        assert second["trace"] != TRACE
        assert second["parent"] == ""
        compute = (await r.get("/compute"))["totals"]["jobs"]["compute_seconds"]
        assert sum(span["byoc.compute_seconds"] for span in spans) == pytest.approx(compute, abs=1e-8)


@asynchronous
async def test_a_failure_says_whose_it_is(collector: Collector) -> None:
    async with running(Gated()) as r:
        async with traced(collector, r) as spans:
            assert (await r.post(bytes([13]) * 3))[0] == 500
            assert (await r.post(bytes(4)))[0] == 400, "no whole number of pixels"
        assert [(span["error"], span["error.type"]) for span in spans] == [
            (True, "processor_failed"),
            (False, "bad_frame"),
        ]
        assert [span["http.response.status_code"] for span in spans] == [500, 400]


@asynchronous
async def test_a_stream_is_a_span_from_start_to_end(collector: Collector) -> None:
    async with rig() as r, traced(collector, r.worker) as spans:
        await one_stream(r)
    (span,) = spans
    assert (span["name"], span["byoc.stream"], span["trace"]) == ("stream", "a", TRACE)
    assert (span["byoc.state"], span["error"]) == ("ended", False)
    assert span["byoc.frames_in"] == span["byoc.frames_out"] > 0
    assert span["byoc.dropped"] == 0
    assert span["byoc.compute_seconds"] > 0


@asynchronous
async def test_a_span_ends_with_its_job_or_stream_however_that_ends(collector: Collector) -> None:
    """A caller that hangs up, and a stream that is cut off with the worker: both spans are sent, and say so."""
    processor = Gated()
    async with rig(processor) as r, traced(collector, r.worker) as spans:
        processor.gate = threading.Event()
        called = len(processor.sizes)
        job = asyncio.create_task(r.worker.post(bytes(300), X_Job_Id="gone", **PARENT))
        await r.worker.until(lambda: len(processor.sizes) > called)
        r.create("a")
        assert (await r.call("stream/start", r.urls("a"), **PARENT))[0] == 200
        await publish(r, "a", clip(5, 1), close=False)  # the first frame waits for its slot, and that for the device
        await r.worker.until(lambda: r.stream("a").session.frames_in > 0)
        job.cancel()
        await r.worker.until(lambda: r.worker.worker.active == 0)
        await r.worker.worker.streams.close(0.0)
        processor.gate.set()
    by_name = {span["name"]: span for span in spans}
    assert len(spans) == 2
    assert {span["parent"] for span in spans} == {"b7ad6b7169203331"}, "neither is a part of the other"
    assert (by_name["job"]["byoc.job"], by_name["job"]["error.type"]) == ("gone", "client_gone")
    stream = by_name["stream"]
    assert (stream["byoc.state"], stream["error"], stream["byoc.frames_in"]) == ("failed", True, 1)
    assert "cut off" in stream["byoc.reason"]


async def one_stream(r: Rig) -> None:
    r.create("a")
    assert (await r.call("stream/start", r.urls("a"), **PARENT))[0] == 200
    async with watching(r, "a"):
        await publish(r, "a", clip())
        await r.until_over()


@asynchronous
async def test_a_collector_that_is_away_holds_up_nothing() -> None:
    pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry is not installed: pip install gpu-byoc[otel]")
    async with running(GreenTint()) as r:
        r.worker.tracing = Tracing(ServeConfig(otel_endpoint="http://127.0.0.1:9"))
        assert (await r.post(bytes(300)))[0] == 200
        async with asyncio.timeout(20):
            await asyncio.to_thread(r.worker.tracing.close)


def test_without_the_extra_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigError, match=r"gpu-byoc\[otel\]"):
        Tracing(ServeConfig(otel_endpoint="http://127.0.0.1:9"))


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "line\nbreak", "é"])
def test_an_id_that_is_no_plain_word_is_replaced(given: str) -> None:
    first, second = job_id({"X-Job-Id": given}), job_id({"X-Job-Id": given})
    assert given not in (first, second)
    assert first != second
    assert job_id({"X-Job-Id": "ab-12.3:4_5"}) == "ab-12.3:4_5"
