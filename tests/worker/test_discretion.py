"""Which streams run is for the orchestrator and for this machine, where the worker is registered."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gpu_byoc.config import RegistrationConfig, ServeConfig
from gpu_byoc.processors.green_tint import GreenTint
from gpu_byoc.worker.discretion import is_here, unnamed
from gpu_byoc.worker.registration import Registration
from tests.support.streams import Rig, clip, publish, rig
from tests.support.workers import asynchronous

NAME = "stream-4f2a9b"
READS = ("/stream/status", "/api/stream/status", "/health?deep=1", "/health?deep", "/compute")
FROM_AFAR = {"X-Forwarded-For": "203.0.113.9"}


async def read(r: Rig, path: str, **headers: str) -> Any:
    async with r.worker.session.get(r.worker.url + path, headers=headers) as answer:
        assert answer.status == 200
        return await answer.json()


@asynchronous
async def test_streams_are_counted_and_not_named() -> None:
    async with rig(GreenTint()) as r:
        for name in (NAME, "another"):
            r.create(name)
            assert (await r.call("stream/start", r.urls(name) | {"params": {"boost": 137}}))[0] == 200
            await publish(r, name, clip(10, 1), close=False)
        assert (await r.worker.post(bytes(3)))[0] == 200
        await r.worker.until(lambda: sum(each.session.frames_out for each in r.worker.worker.streams.running()) == 20)
        for path in READS:
            assert NAME in json.dumps(await read(r, path, **FROM_AFAR)), "not registered: this is nobody's network"

        settings = RegistrationConfig("http://127.0.0.1:1", "hush")
        config = ServeConfig(capability="c", registration=settings)
        guard = r.worker.worker.registration = Registration(config, r.worker.port)
        guard._core.attempt()
        guard._core.accepted(0.0)
        token = {"Authorization": f"Bearer {guard._core.tokens[0]}"}
        for path in READS:
            found = json.dumps(hidden := await read(r, path, **FROM_AFAR))
            assert NAME not in found
            assert "another" not in found
            assert "boost" not in found
            assert NAME in json.dumps(await read(r, path)), "this machine"
            assert NAME in json.dumps(await read(r, path, **FROM_AFAR, **token)), "the orchestrator"
            assert NAME not in json.dumps(await read(r, path, **FROM_AFAR, Authorization="Bearer x"))
            if "streams" in hidden:
                assert [each["frames_out"] for each in hidden["streams"]] == [10, 10]
        seen = await read(r, "/compute", **FROM_AFAR)
        assert {name: row["frames"] for name, row in seen["totals"].items()} == {"jobs": 1, "streams": 20}
        assert sum(row["frames"] for row in seen["rows"]) == seen["device"]["frames"] == 21
        named = await read(r, "/stream/status", **FROM_AFAR, **{"X-Stream-Id": NAME})
        assert named["stream"]["frames_out"] == 10, "who knows a name may ask how it does"
        assert "params" not in named["stream"]
        async with r.worker.session.get(r.worker.url + "/metrics") as answer:
            assert NAME not in await answer.text()

        assert (await r.call("stream/stop", {"gateway_request_id": "another"}, **token))[0] == 200
        for path in READS:  # of the only stream there is more
            assert NAME not in json.dumps(await read(r, path, **FROM_AFAR))
            assert NAME in json.dumps(await read(r, path))


def test_rows_of_a_second_are_added_up() -> None:
    rows = [{"second": at, "name": name, "frames": 1, "compute_seconds": 0.5} for at in (7, 8) for name in "ab"]
    rows.append({"second": 8, "name": "jobs", "frames": 3, "compute_seconds": 0.25})
    assert unnamed({"rows": rows})["rows"] == [
        {"second": 7, "name": "streams", "frames": 2, "compute_seconds": 1.0},
        {"second": 8, "name": "streams", "frames": 2, "compute_seconds": 1.0},
        {"second": 8, "name": "jobs", "frames": 3, "compute_seconds": 0.25},
    ]
    assert rows[0]["frames"] == 1, "the engine's own stay as they are"
    assert unnamed({"status": "IDLE"}) == {"status": "IDLE"}


@pytest.mark.parametrize(
    ("peer", "host", "more", "here"),
    [
        ("127.0.0.1", "127.0.0.1:8000", {}, True),
        ("127.0.0.1", "localhost", {}, True),
        ("::1", "[::1]:8000", {}, True),
        ("::ffff:127.0.0.1", "localhost:1", {}, True),
        ("10.0.0.5", "127.0.0.1:8000", {}, False),
        ("fe80::1%eth0", "localhost", {}, False),
        ("::1%lo", "localhost", {}, True),
        ("", "localhost", {}, False),  # a Unix socket
        ("/run/worker.sock", "localhost", {}, False),
        (None, "localhost", {}, False),
        ("127.0.0.1", "worker.example:8000", {}, False),  # a page whose name points here, or a proxy that keeps names
        ("127.0.0.1", "", {}, False),
        ("127.0.0.1", "localhost", {"Origin": "https://a.example"}, False),
        ("127.0.0.1", "localhost", {"X-Forwarded-For": "10.0.0.5"}, False),
        ("127.0.0.1", "localhost", {"Forwarded": "for=10.0.0.5"}, False),
    ],
)
def test_who_is_on_this_machine(peer: str | None, host: str, more: dict[str, str], here: bool) -> None:
    assert is_here({"Host": host} | more, peer) == here
