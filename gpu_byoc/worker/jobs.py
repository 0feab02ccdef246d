"""Frame jobs: one HTTP request, one to a few frames, answered in kind.

Three bodies are understood: raw pixels, a JPEG or PNG image, and JSON with an image in base64. All take the same way:
lease slots, fill them, submit, wait, answer, release.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from email.message import Message
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from aiohttp import web

from gpu_byoc.core.slots import State
from gpu_byoc.engine.device import Outcome
from gpu_byoc.engine.engine import Lease
from gpu_byoc.errors import (
    BadFrame,
    BadRequest,
    GpuByocError,
    Overloaded,
    ProcessorError,
    ProcessorTimeout,
    TooLarge,
    UnsupportedMedia,
)
from gpu_byoc.frames import MAX_SIDE, FrameSpec
from gpu_byoc.processor import parse_params, pixel_format
from gpu_byoc.worker.bodies import Body, caller, collected, giving_way, read_into, write_from

if TYPE_CHECKING:
    from gpu_byoc.worker.app import Worker

T = TypeVar("T")

RAW = "application/octet-stream"
IMAGES = ("image/jpeg", "image/png")
JSON = "application/json"

LOOK = 0.1
"""Seconds between two looks of a job in the line at who holds the slots, and how long already."""

STREAM = "jobs"
"""The name under which frame jobs are booked."""


@lru_cache(maxsize=256)
def parse_content_type(header: str) -> tuple[str, Mapping[str, str]]:
    """``type/subtype`` in lower case, and the parameters: ``image/png; a=1`` -> ("image/png", {"a": "1"}).

    Raises:
        BadRequest: a parameter in the encoded form of RFC 2231, which nobody needs here.
    """
    message = Message()
    message["Content-Type"] = header
    pairs = message.get_params(failobj=[("", "")])
    if not all(isinstance(value, str) for _, value in pairs):
        raise BadRequest(f"Content-Type {header!r:.100}: parameters in the form name*=... are not understood")
    return message.get_content_type() if "/" in header else header.lower(), dict(pairs[1:])


@dataclass(frozen=True, slots=True)
class Job:
    """What a request asks for: ``frames`` frames of ``spec``, with checked ``params``."""

    spec: FrameSpec
    frames: int
    params: Any


async def handle(worker: Worker, request: web.Request) -> web.StreamResponse:
    """``POST`` of a frame job. Typed errors are answered by the middleware."""
    began = time.monotonic()
    length = request.content_length
    if length is not None and length > worker.config.max_body:
        raise TooLarge(f"a body of {length} bytes; the limit is {worker.config.max_body} (--max-body-mb)")
    if not request.body_exists or length == 0:
        return _keep_alive(worker)
    coding = request.headers.get("Content-Encoding", "identity")
    if coding.lower() != "identity":
        raise UnsupportedMedia(f"Content-Encoding {coding!r:.40}; send the body as it is")
    media, fields = parse_content_type(request.headers.get("Content-Type", RAW))
    if media == RAW and length is not None:
        response = await _raw(worker, request, parse_raw(worker, request.headers, fields, length), None)
    else:
        found = await _collected(worker, request, media, fields)
        if found is None:
            return _keep_alive(worker)
        response = found
    worker.metrics.latency.observe((time.monotonic() - began) * 1e3)
    return response


def _keep_alive(worker: Worker) -> web.Response:
    return web.Response(headers=headers(worker, Outcome(None), 0))


async def _collected(
    worker: Worker, request: web.Request, media: str, fields: Mapping[str, str]
) -> web.StreamResponse | None:
    """What must be there as a whole before slots can be leased: images, JSON, raw bodies of unknown length. None for an
    empty one, which is no job."""
    if media not in (RAW, JSON, *IMAGES):
        raise UnsupportedMedia(f"Content-Type {media!r}; this worker takes {RAW}, {', '.join(IMAGES)} and {JSON}")
    config = worker.config
    async with collected(request, config.max_body, config.body_timeout, worker.budget) as body:
        if not body.size:
            return None
        if media == RAW:
            return await _raw(worker, request, parse_raw(worker, request.headers, fields, body.size), body)
        if media == JSON:
            return await _json(worker, request, body)
        image, outcome = await _image(worker, request, body.data, media, parse_params(worker.processor, fields))
        return await _answer(worker, request, body, image, media, outcome)


async def _answer(
    worker: Worker, request: web.Request, body: Body, answer: bytes, media: str, outcome: Outcome
) -> web.StreamResponse:
    response = web.StreamResponse(headers=headers(worker, outcome, 1))
    response.content_type = media
    worker.budget.replace(body, len(answer))
    await _write(worker, request, response, [memoryview(answer)], body.lent())
    return response


async def _write(
    worker: Worker,
    request: web.Request,
    response: web.StreamResponse,
    views: Sequence[memoryview],
    lent: AbstractAsyncContextManager[None],
) -> None:
    try:
        async with lent:
            await write_from(request, response, views, worker.config.body_timeout)
    except Overloaded as error:  # half of the answer is out, and no other one can follow
        raise ConnectionResetError("the client read slowly, and others waited for its room") from error


# --- raw pixels


async def _raw(worker: Worker, request: web.Request, job: Job, body: Body | None) -> web.StreamResponse:
    lease = await _lease(worker, request, job)
    try:
        views = lease.views
        if body is None:
            async with _lent(worker, lease):
                await read_into(request, views, worker.config.body_timeout)
        else:
            at = 0
            for view in views:
                view[:] = memoryview(body.data)[at : at + view.nbytes]
                at += view.nbytes
            worker.budget.replace(body, 0)
        outcome = await _run(worker, lease, job)
        response = web.StreamResponse(headers=headers(worker, outcome, job.frames))
        response.content_type = RAW
        await _write(worker, request, response, views, _lent(worker, lease))
    finally:
        _let_go(lease)
    return response


def parse_raw(worker: Worker, headers: Mapping[str, str], fields: Mapping[str, str], length: int) -> Job:
    """Geometry from the Content-Type's parameters, else from ``X-Frame-*`` headers, else pixels in a row.

    Whatever else the Content-Type carries is a parameter of the processor: it is the only header that the network
    hands on.

    Raises:
        BadFrame: geometry, format and length do not fit together.
        BadParams: a parameter does not fit the processor.
    """
    rest = dict(fields)
    given = {key: rest.pop(key, None) or headers.get(f"X-Frame-{key.title()}") for key in ("width", "height", "format")}
    rest.pop("charset", None)
    wanted = pixel_format(worker.processor)
    kind = given["format"] or wanted or "rgb24"
    if wanted is not None and kind != wanted:
        FrameSpec(1, 1, kind)  # an unknown name is said to be unknown
        raise BadFrame(f"frames are {kind}, the processor takes {wanted}; convert them first")
    if given["width"] is None and given["height"] is None:
        size = FrameSpec(1, 1, kind).nbytes
        if wanted is None:
            spec = FrameSpec(length, 1, "gray")  # a FrameProcessor takes any bytes
        elif length % size:
            raise BadFrame(f"{length} bytes are no whole number of {kind} pixels of {size} bytes")
        else:
            spec = FrameSpec(length // size, 1, kind)
    else:
        spec = FrameSpec(_side("width", given["width"]), _side("height", given["height"]), kind)
        if length % spec.nbytes:
            raise BadFrame(f"{length} bytes are no whole number of {spec} frames of {spec.nbytes} bytes")
    return Job(spec, length // spec.nbytes, parse_params(worker.processor, rest))


def _side(name: str, text: str | None) -> int:
    if text is None:
        raise BadFrame(f"{name} is missing; give width and height, or neither")
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= MAX_SIDE and len(text) < 9):
        raise BadFrame(f"{name}={text[:20]!r} is not a number from 1 to {MAX_SIDE}")
    return int(text)


# --- images


async def _image(
    worker: Worker, request: web.Request, data: bytearray | bytes, media: str, params: Any
) -> tuple[bytes, Outcome]:
    """Decode into a slot, process, encode out of it. Decoding and encoding are done off the event loop."""
    from gpu_byoc.media import images

    if (wanted := pixel_format(worker.processor)) not in (None, "rgb24"):
        raise UnsupportedMedia(f"the processor takes {wanted}, images are rgb24; send raw frames")
    spec = images.probe(data, media, worker.config.max_pixels)
    job = Job(spec, 1, params)
    lease = await _lease(worker, request, job)
    try:
        (view,) = lease.views
        await _in_thread(lambda: images.decode_into(data, spec, view, media))
        outcome = await _run(worker, lease, job)
        return await _in_thread(lambda: images.encode(view, spec, media)), outcome
    finally:
        _let_go(lease)


async def _json(worker: Worker, request: web.Request, body: Body) -> web.StreamResponse:
    """``{"image": base64 or data URL, "params": {...}}``, answered with the same two spellings."""
    data, given, is_url = await _in_thread(lambda: parse_json(body.data))
    media = _sniff(data)
    image, outcome = await _image(worker, request, data, media, parse_params(worker.processor, given))

    def write() -> bytes:
        encoded = base64.b64encode(image).decode()
        answer = {
            "status": "success",
            "image": f"data:{media};base64,{encoded}" if is_url else encoded,
            "metadata": metadata(worker, outcome, 1),
        }
        return json.dumps(answer).encode()

    return await _answer(worker, request, body, await _in_thread(write), JSON, outcome)


def parse_json(text: bytes | bytearray) -> tuple[bytes, dict[str, Any], bool]:
    """(image file, params, whether the image came as a data URL). Raises BadRequest."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict) or not isinstance(body.get("image"), str):
        raise BadRequest('expected {"image": "<base64 or data URL>", "params": {...}}')
    given = body.get("params") or {}
    if not isinstance(given, dict):
        raise BadRequest("params must be an object")
    _, comma, payload = body["image"].rpartition(",")
    try:
        return base64.b64decode(payload, validate=True), given, bool(comma)
    except ValueError as error:
        raise BadRequest(f"image is not base64: {error}") from error


def _sniff(data: bytes) -> str:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8"):
        return "image/jpeg"
    raise UnsupportedMedia("image is neither JPEG nor PNG")


# --- the way through the engine


async def _lease(worker: Worker, request: web.Request, job: Job) -> Lease:
    """Slots for the job, or ``Overloaded`` after ``slot_wait`` seconds in the line."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def settle(error: GpuByocError | None) -> None:
        if ready.done():
            return
        if error is None:
            ready.set_result(None)
        else:
            ready.set_exception(error)

    def tell(error: GpuByocError | None) -> None:
        loop.call_soon_threadsafe(settle, error)

    lease = worker.ready_engine().lease(job.spec, job.frames, tell, client=caller(request))
    if lease.granted:
        return lease
    # Slots of a new frame size are ours at once, but their memory may still have to be made and even pinned.
    patience = worker.config.job_timeout if lease.held else worker.config.slot_wait
    try:
        async with asyncio.timeout(patience):
            while not ready.done():
                lease.reclaim()
                await asyncio.wait([ready], timeout=LOOK)
            ready.result()
    except TimeoutError:
        lease.release()
        raise worker.ready_engine().refuse(f"no slot became free within {patience:g} s; try again later") from None
    except Overloaded as error:  # it had a place in the line and lost it
        lease.release()
        raise worker.ready_engine().refuse(str(error)) from None
    except BaseException:  # a cancel above all: the place in the line goes back
        lease.release()
        raise
    finally:
        if not ready.cancel():  # what is told later is told to nobody
            ready.exception()  # read, also where a cancel came first
    return lease


@contextlib.asynccontextmanager
async def _lent(worker: Worker, lease: Lease) -> AsyncIterator[None]:
    """While the caller sends its frames or reads its answer. Raises Overloaded where that is slow and others, who have
    fewer slots, wait for them."""
    loop = asyncio.get_running_loop()
    try:
        async with giving_way() as cut:
            lease.lend(lambda: loop.call_soon_threadsafe(cut))
            try:
                yield
            finally:
                lease.keep()
    except Overloaded as error:
        raise worker.ready_engine().refuse(str(error)) from None


async def _run(worker: Worker, lease: Lease, job: Job) -> Outcome:
    """Submit and wait for the outcome; what failed is raised. Cancelled or out of time: work that was not begun is
    dropped, and what the device makes of the rest still counts for its client."""
    loop = asyncio.get_running_loop()
    finished: asyncio.Future[Outcome] = loop.create_future()

    def settle(outcome: Outcome) -> None:
        if finished.done():
            lease.release()
        else:
            finished.set_result(outcome)

    def done(outcome: Outcome) -> None:
        """On the engine's thread. Where nobody waits any more there may be no loop either."""
        worker.suspects.ran(lease.client, isinstance(outcome.error, ProcessorError), time.monotonic())
        if finished.done():
            lease.release()
        else:
            loop.call_soon_threadsafe(settle, outcome)

    # Jobs have no order among themselves, but those that can share a batch stand in one line.
    alone = worker.suspects.alone(lease.client, time.monotonic())
    order = (STREAM, lease.client if alone else "", job.spec, job.params)
    lease.submit(STREAM, job.params, done, order=order, alone=alone)
    seconds = worker.config.job_timeout
    try:
        async with asyncio.timeout(seconds):
            outcome = await finished
    except TimeoutError:
        raise ProcessorTimeout(f"no result within {seconds:g} s (--job-timeout)") from None
    if outcome.error is not None:
        raise outcome.error
    if worker.tracing is not None:
        worker.tracing.ran(outcome, job.frames)
    return outcome


def _let_go(lease: Lease) -> None:
    """The end of a job. Slots that the device is using go back when it is through with them (``done`` in ``_run``)."""
    assert lease.hold is not None
    if lease.hold.state is not State.RUNNING:
        lease.release()


async def _in_thread(work: Callable[[], T]) -> T:
    """Run ``work`` on the thread pool. Cancelled, it still waits for the thread: that one may be using a slot."""
    future = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError:
                continue
        raise


# --- what every answer carries


def metadata(worker: Worker, outcome: Outcome, frames: int) -> dict[str, Any]:
    backend = worker.engine.engines[0].backend if worker.engine else None
    return {
        "backend": backend.name if backend else None,
        "device": outcome.device or (backend.device if backend else None),
        "frames": frames,
        "batch": outcome.batch,
        "queue_seconds": outcome.queue_ns / 1e9,
        "copy_seconds": outcome.copy_ns / 1e9,
        "compute_seconds": outcome.compute_ns / 1e9,
    }


def headers(worker: Worker, outcome: Outcome, frames: int) -> dict[str, str]:
    """``X-Metadata`` and ``Server-Timing``; an answer without frames has them with zeros."""
    timing = (("queue", outcome.queue_ns), ("copy", outcome.copy_ns), ("compute", outcome.compute_ns))
    return {
        "X-Metadata": json.dumps(metadata(worker, outcome, frames)),
        "Server-Timing": ", ".join(f"{name};dur={ns / 1e6:.3f}" for name, ns in timing),
    }
