"""Frame jobs: one HTTP request, one to a few frames, answered in kind.

Three bodies are understood: raw pixels, a JPEG or PNG image, and JSON with an image in base64. All take the same way:
lease slots, fill them, submit, wait, answer, release.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.message import Message
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from aiohttp import web

from gpu_byoc.engine.device import Outcome
from gpu_byoc.engine.engine import Lease
from gpu_byoc.errors import BadFrame, BadRequest, GpuByocError, Overloaded, TooLarge, UnsupportedMedia
from gpu_byoc.frames import MAX_SIDE, FrameSpec
from gpu_byoc.processor import parse_params, pixel_format
from gpu_byoc.worker.bodies import read_all, read_into, write_from

if TYPE_CHECKING:
    from gpu_byoc.worker.app import Worker

T = TypeVar("T")

RAW = "application/octet-stream"
IMAGES = ("image/jpeg", "image/png")
JSON = "application/json"

STREAM = "jobs"
"""The name under which frame jobs are booked."""


@lru_cache(maxsize=256)
def parse_content_type(header: str) -> tuple[str, Mapping[str, str]]:
    """``type/subtype`` in lower case, and the parameters: ``image/png; a=1`` -> ("image/png", {"a": "1"})."""
    message = Message()
    message["Content-Type"] = header
    pairs = message.get_params(failobj=[("", "")])
    return message.get_content_type() if "/" in header else header.lower(), dict(pairs[1:])


@dataclass(frozen=True, slots=True)
class Job:
    """What a request asks for: ``frames`` frames of ``spec``, with checked ``params``."""

    spec: FrameSpec
    frames: int
    params: Any


async def handle(worker: Worker, request: web.Request) -> web.StreamResponse:
    """``POST`` of a frame job. Typed errors are answered by the middleware."""
    length = request.content_length
    if length is not None and length > worker.config.max_body:
        raise TooLarge(f"a body of {length} bytes; the limit is {worker.config.max_body} (--max-body)")
    if not request.body_exists or length == 0:
        return web.Response(headers={"X-Metadata": json.dumps({"frames": 0})})  # a keep-alive
    media, fields = parse_content_type(request.headers.get("Content-Type", RAW))
    if media == RAW:
        return await _raw(worker, request, fields, length)
    if media in IMAGES:
        data = await read_all(request, worker.config.max_body, worker.config.body_timeout)
        params = parse_params(worker.processor, fields)
        image, outcome = await _image(worker, data, media, params)
        return web.Response(body=image, content_type=media, headers=_headers(worker, outcome, 1))
    if media == JSON:
        return await _json(worker, request)
    raise UnsupportedMedia(f"Content-Type {media!r}; this worker takes {RAW}, {', '.join(IMAGES)} and {JSON}")


# --- raw pixels


async def _raw(
    worker: Worker, request: web.Request, fields: Mapping[str, str], length: int | None
) -> web.StreamResponse:
    body = None
    if length is None:  # chunked: how many slots it needs is known only at its end
        body = await read_all(request, worker.config.max_body, worker.config.body_timeout)
        length = len(body)
        if not length:
            return web.Response(headers={"X-Metadata": json.dumps({"frames": 0})})
    job = parse_raw(worker, request.headers, fields, length)
    began = time.monotonic()
    lease = await _lease(worker, job)
    try:
        views = lease.views
        if body is None:
            await read_into(request, views, worker.config.body_timeout)
        else:
            at = 0
            for view in views:
                view[:] = memoryview(body)[at : at + view.nbytes]
                at += view.nbytes
        outcome = await _run(lease, job)
        response = web.StreamResponse(headers=_headers(worker, outcome, job.frames))
        response.content_type = RAW
        await write_from(request, response, views, worker.config.body_timeout)
    finally:
        lease.release()
    worker.metrics.latency.observe((time.monotonic() - began) * 1e3)
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
        if wanted is None:
            spec = FrameSpec(length, 1, "gray")  # a FrameProcessor takes any bytes
        else:
            size = FrameSpec(1, 1, kind).nbytes
            if length % size:
                raise BadFrame(f"{length} bytes are no whole number of {kind} pixels of {size} bytes")
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


async def _image(worker: Worker, data: bytearray | bytes, media: str, params: Any) -> tuple[bytes, Outcome]:
    """Decode into a slot, process, encode out of it. Decoding and encoding are done off the event loop."""
    from gpu_byoc.media import images

    if (wanted := pixel_format(worker.processor)) not in (None, "rgb24"):
        raise UnsupportedMedia(f"the processor takes {wanted}, images are rgb24; send raw frames")
    spec = images.probe(data, media, worker.config.max_pixels)
    began = time.monotonic()
    lease = await _lease(worker, Job(spec, 1, params))
    try:
        (view,) = lease.views
        await _in_thread(lambda: images.decode_into(data, spec, view, media))
        outcome = await _run(lease, Job(spec, 1, params))
        encoded = await _in_thread(lambda: images.encode(view, spec, media))
    finally:
        lease.release()
    worker.metrics.latency.observe((time.monotonic() - began) * 1e3)
    return encoded, outcome


async def _json(worker: Worker, request: web.Request) -> web.Response:
    """``{"image": base64 or data URL, "params": {...}}``, answered with the same two spellings."""
    text = await read_all(request, worker.config.max_body, worker.config.body_timeout)
    try:
        body = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict) or not isinstance(body.get("image"), str):
        raise BadRequest('expected {"image": "<base64 or data URL>", "params": {...}}')
    given = body.get("params") or {}
    if not isinstance(given, dict):
        raise BadRequest("params must be an object")
    _, comma, payload = body["image"].rpartition(",")
    try:
        data = base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise BadRequest(f"image is not base64: {error}") from error
    media = _sniff(data)
    image, outcome = await _image(worker, data, media, parse_params(worker.processor, given))
    encoded = base64.b64encode(image).decode()
    answer = {
        "status": "success",
        "image": f"data:{media};base64,{encoded}" if comma else encoded,
        "metadata": _metadata(worker, outcome, 1),
    }
    return web.json_response(answer, headers=_headers(worker, outcome, 1))


def _sniff(data: bytes) -> str:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8"):
        return "image/jpeg"
    raise UnsupportedMedia("image is neither JPEG nor PNG")


# --- the way through the engine


async def _lease(worker: Worker, job: Job) -> Lease:
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

    lease = worker.ready_engine().lease(job.spec, job.frames, tell)
    if lease.granted:
        return lease
    try:
        async with asyncio.timeout(worker.config.slot_wait):
            await ready
    except TimeoutError:
        lease.release()
        worker.ready_engine().refused += 1
        raise Overloaded(f"no slot became free within {worker.config.slot_wait:g} s; try again later") from None
    except BaseException:
        lease.release()
        raise
    return lease


async def _run(lease: Lease, job: Job) -> Outcome:
    """Submit and wait for the outcome; what failed is raised. Cancelled: the caller releases, the work is dropped."""
    loop = asyncio.get_running_loop()
    finished: asyncio.Future[Outcome] = loop.create_future()

    def settle(outcome: Outcome) -> None:
        if not finished.done():
            finished.set_result(outcome)

    def done(outcome: Outcome) -> None:
        loop.call_soon_threadsafe(settle, outcome)

    # Jobs have no order among themselves, but those that can share a batch stand in one line.
    lease.submit(STREAM, job.params, done, order=(STREAM, job.spec, job.params))
    outcome = await finished
    if outcome.error is not None:
        raise outcome.error
    return outcome


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


def _metadata(worker: Worker, outcome: Outcome, frames: int) -> dict[str, Any]:
    backend = worker.ready_engine().backend
    return {
        "backend": backend.name,
        "device": backend.device,
        "frames": frames,
        "batch": outcome.batch,
        "queue_seconds": outcome.queue_ns / 1e9,
        "copy_seconds": outcome.copy_ns / 1e9,
        "compute_seconds": outcome.compute_ns / 1e9,
    }


def _headers(worker: Worker, outcome: Outcome, frames: int) -> dict[str, str]:
    timing = (("queue", outcome.queue_ns), ("copy", outcome.copy_ns), ("compute", outcome.compute_ns))
    return {
        "X-Metadata": json.dumps(_metadata(worker, outcome, frames)),
        "Server-Timing": ", ".join(f"{name};dur={ns / 1e6:.3f}" for name, ns in timing),
    }
