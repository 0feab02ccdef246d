"""A client of the gateway: one job per request, several on their way, answers in the order of the jobs."""

from __future__ import annotations

import asyncio
import io
import math
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, ClassVar, Final, TypeVar

import aiohttp

from gpu_byoc.errors import ConfigError, GpuByocError, NetworkError
from gpu_byoc.frames import FrameSpec
from gpu_byoc.local.container import reason_of
from gpu_byoc.local.metadata import amount, read_object
from gpu_byoc.local.relay import ROUTE

RAW: Final = "application/octet-stream"

RETRIES: Final = 8  # of a job that is refused with 503
LONGEST_PAUSE: Final = 10.0  # seconds; a Retry-After of more is cut to it
ANSWER_SECONDS: Final = 330.0  # without a byte from the gateway; 10 more than it waits itself
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
    """``seconds`` is from the first byte sent to the last one received, pauses before a retry included. ``status`` is
    200: any other is a JobRefused."""

    body: bytes
    metadata: Mapping[str, Any]
    headers: Mapping[str, str]
    seconds: float
    retries: int
    status: int = 200


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
        self.frames += int(amount(said.get("frames", 1)) or 0)
        for name in self.SUMS:
            setattr(self, name, getattr(self, name) + (amount(said.get(name)) or 0.0))
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
        if not model_id.strip() or not model_id.isprintable():
            raise ConfigError(
                f"--model-id {model_id!r}: it travels in a header; only what can be printed, and not nothing"
            )
        self.gateway = gateway.rstrip("/")
        self.url = self.gateway + ROUTE
        self._told_busy = False
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
                metadata = read_object(headers.get("X-Metadata", ""))
                return Answer(data, metadata, headers, time.perf_counter() - began, attempt, status)
            if status != 503 or attempt == RETRIES:
                break
            self._tell_busy(_message(data))
            await asyncio.sleep(_pause(headers.get("Retry-After", "")))
        raise JobRefused(status, _message(data))

    def _tell_busy(self, said: str) -> None:
        """Once a client: whoever watches must not take a pause for a hang."""
        if not self._told_busy:
            self._told_busy = True
            print(f"HTTP 503: {said}; sending jobs again, each up to {RETRIES} times", file=sys.stderr)

    async def _post(self, body: bytes, content_type: str) -> tuple[int, Mapping[str, str], bytes]:
        assert self._session is not None, "use it as an async context manager"
        headers = {**self._headers, "Content-Type": content_type}
        try:
            async with self._session.post(self.url, data=io.BytesIO(body), headers=headers) as answer:
                return answer.status, answer.headers, await answer.read()
        except aiohttp.ClientConnectorError as error:
            raise self._no_gateway(reason_of(error.os_error)) from error
        except (aiohttp.InvalidURL, aiohttp.ConnectionTimeoutError) as error:
            raise self._no_gateway(str(error)) from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise GatewayUnreachable(f"{self.url} broke the job off: {str(error) or 'no answer in time'}") from error

    def _no_gateway(self, reason: str) -> GatewayUnreachable:
        return GatewayUnreachable(
            f"no gateway at {self.gateway}: {reason}. Start one with 'gpu-byoc livepeer -gateway -httpIngest', "
            "or say with --gateway where it is"
        )


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


def _message(data: bytes) -> str:
    """What an answer that is no success says, in one line."""
    said = read_object(data).get("message") or data[:500].decode("utf-8", "replace")
    return " ".join(str(said).split()) or "no message"
