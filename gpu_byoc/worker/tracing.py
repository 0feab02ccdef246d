"""Ids of jobs, and OpenTelemetry spans of jobs and streams.

A span a job, from its head to the end of its answer, and a span a stream, from start to end; both continue a caller's
trace (``traceparent``). Queue, copy and compute are attributes: copy and compute are shares of a batch that others were
in, too, so they are no intervals on anybody's time line. Nothing of OpenTelemetry is imported before it is asked for.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from gpu_byoc._version import VERSION
from gpu_byoc.config import ServeConfig
from gpu_byoc.core.meter import SECOND, Usage
from gpu_byoc.engine.device import Outcome
from gpu_byoc.errors import ConfigError, GpuByocError

EXPORT_SECONDS: Final = 1
"""What one export may take, and what a shutdown waits for the last one: a collector that is slow costs spans, not the
drain."""

_ID: Final = re.compile(r"[\w.:-]{1,64}", re.ASCII)
_PROCESS: Final = secrets.token_hex(3)
_numbers = itertools.count(1)


def job_id(headers: Mapping[str, str]) -> str:
    """The caller's ``X-Job-Id`` where it is a plain word; else one of ours, unlike those of any other process."""
    given = headers.get("X-Job-Id", "")
    return given if _ID.fullmatch(given) else f"{_PROCESS}-{next(_numbers)}"


class Tracing:
    """Sends spans to an OTLP/HTTP collector, from a thread of its own, in batches. What a collector does not take is
    lost; it never holds up a job. The standard variables (OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER,
    OTEL_EXPORTER_OTLP_HEADERS ...) are read by the SDK itself."""

    def __init__(self, config: ServeConfig) -> None:
        """Raises ConfigError where OpenTelemetry is not installed."""
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError(
                f"--otel-endpoint (or OTEL_EXPORTER_OTLP_ENDPOINT) needs OpenTelemetry ({error}): "
                "pip install gpu-byoc[otel], or unset it"
            ) from error
        ours = {"service.name": "gpu-byoc", "service.version": VERSION, "byoc.capability": config.capability}
        self._trace = trace
        self._provider = TracerProvider(
            resource=Resource(ours).merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        exporter = OTLPSpanExporter(f"{config.otel_endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("gpu_byoc", VERSION)
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def job(self, headers: Mapping[str, str], name: str) -> Iterator[None]:
        with self._span("job", headers, {"byoc.job": name}) as span:
            try:
                yield
            except GpuByocError as error:
                span.set_attributes({"error.type": error.code, "http.response.status_code": error.status})
                if error.status >= 500:
                    span.set_status(self._trace.StatusCode.ERROR, str(error))
                raise
            except (ConnectionError, asyncio.CancelledError):
                span.set_attribute("error.type", "client_gone")
                raise

    @contextmanager
    def stream(self, headers: Mapping[str, str], name: str) -> Iterator[None]:
        with self._span("stream", headers, {"byoc.stream": name}):
            yield

    def ran(self, outcome: Outcome, frames: int) -> None:
        """In the task of a job: its frames are computed."""
        self._add(
            {
                "byoc.frames": frames,
                "byoc.batch": outcome.batch,
                "byoc.device": outcome.device,
                **_times(outcome.queue_ns, outcome.copy_ns, outcome.compute_ns),
            }
        )

    def streamed(self, numbers: Mapping[str, Any], usage: Usage) -> None:
        """In the task of a stream: it is over. ``numbers`` are those of its status."""
        self._add(
            {
                "byoc.state": numbers["state"],
                "byoc.reason": numbers["reason"],
                "byoc.frames_in": numbers["frames_in"],
                "byoc.frames_out": numbers["frames_out"],
                "byoc.dropped": sum(numbers["dropped"].values()),
                **_times(usage.queue_ns, usage.copy_ns, usage.compute_ns),
            }
        )
        if numbers["state"] == "failed":
            self._trace.get_current_span().set_status(self._trace.StatusCode.ERROR, numbers["reason"])

    def close(self) -> None:
        """Send what is left, for so long as that may take."""
        closing = threading.Thread(target=self._provider.shutdown, name="gpu-byoc-otel-close", daemon=True)
        closing.start()
        closing.join(2 * EXPORT_SECONDS)

    def _add(self, attributes: Mapping[str, Any]) -> None:
        self._trace.get_current_span().set_attributes(attributes)

    @contextmanager
    def _span(self, name: str, headers: Mapping[str, str], attributes: Mapping[str, str]) -> Iterator[Any]:
        carrier = {key: headers[key] for key in ("traceparent", "tracestate") if key in headers}
        with self._tracer.start_as_current_span(
            name,
            context=self._propagator.extract(carrier),
            kind=self._trace.SpanKind.SERVER,
            attributes=attributes,
            record_exception=False,  # a refusal is an answer, and says so by its attributes
            set_status_on_exception=False,
        ) as span:
            yield span


def _times(queue: int, copy: int, compute: int) -> dict[str, float]:
    seconds = {"queue": queue, "copy": copy, "compute": compute}
    return {f"byoc.{name}_seconds": nanoseconds / SECOND for name, nanoseconds in seconds.items()}
