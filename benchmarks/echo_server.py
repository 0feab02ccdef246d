"""The floor of a frame job: a bare aiohttp server that copies chunks into one preallocated slot and answers from it.

It has the read buffer of our worker, no access log, and none of its work. Run as
``python -m benchmarks.echo_server PORT [tuned]``; tuned, it also has the allocator setting and large receives of our
worker, which any aiohttp server could have.
"""

from __future__ import annotations

import sys

from aiohttp import web

from gpu_byoc.transport.listen import keep_freed_memory, widen

TUNED = sys.argv[2:] == ["tuned"]
SLOT = memoryview(bytearray(64 << 20))


async def echo(request: web.Request) -> web.StreamResponse:
    if TUNED:
        widen(request.transport)
    at = 0
    while chunk := await request.content.readany():
        SLOT[at : at + len(chunk)] = chunk
        at += len(chunk)
    response = web.StreamResponse()
    response.content_type = "application/octet-stream"
    response.content_length = at
    await response.prepare(request)
    await response.write(SLOT[:at])
    await response.write_eof()
    return response


async def health(request: web.Request) -> web.Response:
    return web.json_response({"status": "IDLE"})


def main() -> None:
    if TUNED:
        keep_freed_memory()
    app = web.Application(client_max_size=64 << 20)
    app.router.add_post("/", echo)
    app.router.add_get("/health", health)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None, read_bufsize=1 << 20)


if __name__ == "__main__":
    main()
