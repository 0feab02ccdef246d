"""A client of the gateway: one job per request, several on their way, answers in the order of the jobs."""

from __future__ import annotations

import asyncio
import io
import json
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, ClassVar, Final, TypeVar

import aiohttp

from gpu_byoc.errors import ConfigError, GpuByocError, NetworkError
from gpu_byoc.frames import FrameSpec

RAW: Final = "application/octet-stream"
ROUTE: Final = "/live/video-to-video"

RETRIES: Final = 8  # of a job that is refused with 503
LONGEST_PAUSE: Final = 10.0  # seconds; a Retry-After of more is cut to it
ANSWER_SECONDS: Final = 60.0  # without a byte from the gateway
CONNECT_SECONDS: Final = 5.0

T = TypeVar("T")


class JobRefused(GpuByocError):
    """The gateway answered with something else than 200; the message is its own."""

    code = "job_refused"
    blame = "client"

    def __init__(self, http_status: int, message: str) -> None:
        super().__init__(f"HTTP {http_status}: {message}")
        self.http_status = http_status


class GatewayUnreachable(NetworkError):
    """Nothing listens there, or it went away during the job."""

    code = "gateway_unreachable"


@dataclass(frozen=True, slots=True)
class Answer:
    """``seconds`` is from the first byte sent to the last one received, pauses before a retry included."""

    body: bytes
    metadata: Mapping[str, Any]
    headers: Mapping[str, str]
    seconds: float
    retries: int


@dataclass(slots=True)
class Tally:
    """Sums over answers: what the client waited, and what the worker says it spent (X-Metadata), in seconds."""

    latencies: list[float] = field(default_factory=list)
    retries: int = 0
    frames: int = 0
    queue_seconds: float = 0.0
    copy_seconds: float = 0.0
    compute_seconds: float = 0.0
    where: str = ""  # backend and device of the last answer

    SUMS: ClassVar = ("queue_seconds", "copy_seconds", "compute_seconds")

    def add(self, answer: Answer) -> None:
        self.latencies.append(answer.seconds)
        self.retries += answer.retries
        said = answer.metadata
        self.frames += int(_number(said.get("frames", 1)))
        for name in self.SUMS:
            setattr(self, name, getattr(self, name) + _number(said.get(name, 0)))
        if "backend" in said:
            self.where = f"{said['backend']} on {said.get('device', 'an unnamed device')}"

    def percentile(self, part: float) -> float:
        """The smallest latency that ``part`` (0..1) of the jobs did not exceed; 0 without jobs."""
        ordered = sorted(self.latencies)
        return ordered[max(0, math.ceil(part * len(ordered)) - 1)] if ordered else 0.0


def raw_type(spec: FrameSpec | None, params: Mapping[str, str]) -> str:
    """Content-Type of raw frames: the one header that every hop hands on, so geometry and parameters travel in it."""
    geometry = {"width": spec.width, "height": spec.height, "format": spec.format} if spec else {}
    return with_params(RAW, {**{name: str(value) for name, value in geometry.items()}, **params})


def with_params(media: str, params: Mapping[str, str]) -> str:
    """``image/png`` and {"boost": "40"} -> ``image/png; boost=40``. Raises ConfigError for what cannot travel so."""
    parts = [media]
    for name, value in params.items():
        if not (name.isascii() and name.replace("_", "").replace("-", "").isalnum()):
            raise ConfigError(f"--param {name!r}: a name has letters, digits, - and _")
        if not value.isascii() or not value.isprintable() or set(value) & set('"\\'):
            # Quotes in quotes are legal, and read in more than one way on the other side of the network.
            raise ConfigError(f"--param {name}: the value must be printable ASCII without quotes and backslashes")
        token = value.replace("_", "").replace("-", "").replace(".", "").isalnum()
        parts.append(f"{name}={value}" if token else f'{name}="{value}"')
    return "; ".join(parts)


class JobClient:
    """``async with JobClient(url, model_id) as client: answer = await client.send(body, content_type)``.

    At most ``connections`` requests at once. Cancelling a ``send`` closes its connection, which ends the job.
    """

    def __init__(self, gateway: str, model_id: str, connections: int) -> None:
        if not gateway.startswith(("http://", "https://")):
            raise ConfigError(f"--gateway {gateway!r} must be a URL like http://localhost:8935")
        self.url = gateway.rstrip("/") + ROUTE
        self._headers = {"X-Model-Id": model_id}
        self._connections = connections
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> JobClient:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=ANSWER_SECONDS),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def send(self, body: bytes, content_type: str) -> Answer:
        """One job. A 503 is tried again after its Retry-After, RETRIES times.

        Raises:
            JobRefused: any other status than 200, or 503 to the end.
            GatewayUnreachable: no connection, or none any more.
        """
        began = time.perf_counter()
        for attempt in range(RETRIES + 1):
            status, headers, data = await self._post(body, content_type)
            if status == 200:
                metadata = _object(headers.get("X-Metadata", ""))
                return Answer(data, metadata, headers, time.perf_counter() - began, attempt)
            if status != 503 or attempt == RETRIES:
                break
            await asyncio.sleep(_pause(headers.get("Retry-After", "")))
        said = _object(data).get("message") or data[:500].decode("utf-8", "replace").strip()
        raise JobRefused(status, str(said or "no message"))

    async def _post(self, body: bytes, content_type: str) -> tuple[int, Mapping[str, str], bytes]:
        assert self._session is not None, "use it as an async context manager"
        headers = {**self._headers, "Content-Type": content_type}
        try:
            async with self._session.post(self.url, data=io.BytesIO(body), headers=headers) as answer:
                return answer.status, answer.headers, await answer.read()
        except (aiohttp.ClientConnectorError, aiohttp.InvalidURL) as error:
            raise GatewayUnreachable(f"no gateway at {self.url} ({error}); start it, or give its --gateway") from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise GatewayUnreachable(f"{self.url} broke the job off: {str(error) or 'no answer in time'}") from error


async def in_order(
    client: JobClient, jobs: Iterator[tuple[T, bytes, str]], limit: int
) -> AsyncGenerator[tuple[T, Answer], None]:
    """Send (tag, body, content type) after another, ``limit`` on their way; yield (tag, answer) in the same order.

    ``jobs`` is advanced in a thread, one step at a time: reading a video burns CPU. Use it with ``aclosing``: leaving
    early, for any reason, cancels what is on its way and waits for it. The first failure is raised at its turn.
    """
    pending: deque[tuple[T, asyncio.Task[Answer]]] = deque()
    more = True
    try:
        while more or pending:
            while more and len(pending) < limit:
                job = await in_thread(next, jobs, None)
                if job is None:
                    more = False
                else:
                    tag, body, content_type = job
                    pending.append((tag, asyncio.create_task(client.send(body, content_type))))
            if pending:
                tag, task = pending[0]
                answer = await task
                pending.popleft()
                yield tag, answer
    finally:
        for _, task in pending:
            task.cancel()
        await asyncio.gather(*(task for _, task in pending), return_exceptions=True)


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """``asyncio.to_thread`` that is not left before the thread has: a file is never closed under its reader."""
    step = asyncio.create_task(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(step)
    except asyncio.CancelledError:
        await asyncio.gather(step, return_exceptions=True)
        raise


def _pause(retry_after: str) -> float:
    seconds = int(retry_after) if retry_after.isascii() and retry_after.isdigit() else 1
    return min(max(float(seconds), 0.1), LONGEST_PAUSE)


def _object(text: str | bytes) -> dict[str, Any]:
    """The JSON object in ``text``; empty if there is none: these are notes for people, not the job's result."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return 0.0
    return float(value)
