"""Who gets a place when there are too few: clients in turn, running streams before one more, every bound in sight."""

from __future__ import annotations

import asyncio
import functools
import re
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from gpu_byoc.config import EngineConfig, SecurityConfig, ServeConfig
from gpu_byoc.core.errorbudget import LEAST, SECONDS
from gpu_byoc.core.pace import BURST
from gpu_byoc.processor import ArrayProcessor
from gpu_byoc.worker.admission import Suspects
from gpu_byoc.worker.limits import bounds
from tests.support.processes import free_port, post
from tests.support.processes import running as process
from tests.support.streams import Gate, clip, publish, rig
from tests.support.workers import Running, another, asynchronous, running

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


class Turnstile(ArrayProcessor):
    """Lets one batch through at a time, and notes whose it was by its first byte."""

    def __init__(self) -> None:
        self.turns = threading.Semaphore(0)
        self.seen: list[int] = []

    def process_batch(self, batch: Any, params: Any, xp: Any) -> Any:
        assert self.turns.acquire(timeout=20)
        self.seen.append(int(batch.flat[0]))
        return batch


def waiting(r: Running) -> int:
    assert r.worker.engine is not None
    return sum(room["waiting"] for room in r.worker.engine.rooms())


def _taken(r: Running, jobs: int) -> bool:
    return waiting(r) == max(0, jobs - 4) and r.worker.active == jobs


def _through(r: Running, turnstile: Turnstile, jobs: int) -> bool:
    return len(turnstile.seen) == jobs and r.worker.active == 8 - jobs


@asynchronous
async def test_clients_get_slots_in_turn() -> None:
    """Four slots are one client's, and three more of its jobs wait; another's only job comes second, not last."""
    turnstile = Turnstile()
    async with running(turnstile, EngineConfig(slots=4, max_batch=1), slot_wait=20) as noisy, another(noisy) as quiet:
        jobs = []
        for count in range(1, 8):
            jobs.append(asyncio.create_task(noisy.post(bytes([1]) * 3)))
            await noisy.until(functools.partial(_taken, noisy, count))
        jobs.append(asyncio.create_task(quiet.post(bytes([2]) * 3)))
        await noisy.until(lambda: waiting(noisy) == 4)
        for done in range(1, 9):
            turnstile.turns.release()
            await noisy.until(functools.partial(_through, noisy, turnstile, done))
        assert [(await job)[0] for job in jobs] == [200] * 8
        assert turnstile.seen == [1, 1, 1, 1, 1, 2, 1, 1]


@asynchronous
async def test_in_a_full_line_whoever_has_most_of_it_gives_way() -> None:
    gate = Gate()
    async with running(gate, EngineConfig(slots=3, max_batch=1), slot_wait=20) as noisy, another(noisy) as quiet:
        jobs = [asyncio.create_task(noisy.post(bytes(3))) for _ in range(6)]
        await noisy.until(lambda: waiting(noisy) == 3)
        status, headers, body = await noisy.post(bytes(3))
        assert status == 503, "one client, and the line is full"
        polite = asyncio.create_task(quiet.post(bytes(3)))
        done, rest = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
        (pushed,) = done
        status, headers, body = await pushed
        assert status == 503
        assert int(headers["Retry-After"]) >= 1
        assert b"this client has most of the line" in body
        assert waiting(noisy) == 3
        assert (await quiet.post(bytes(3)))[0] == 503, "two each would be more than its share of three"
        gate.gate.set()
        assert (await polite)[0] == 200
        assert [(await job)[0] for job in rest] == [200] * 5
        await noisy.until(lambda: noisy.free() == 0)
        assert noisy.worker.engine is not None
        assert noisy.worker.engine.refused == 3


@asynchronous
async def test_a_job_does_not_push_a_live_frame_out_of_the_line() -> None:
    gate = Gate()
    async with rig(gate, EngineConfig(slots=3, max_batch=1), slot_wait=0.2) as r:
        r.create("s")
        jobs = [asyncio.create_task(r.worker.post(bytes(64 * 48 * 3))) for _ in range(3)]
        await asyncio.to_thread(gate.entered.wait, 20)
        await r.worker.until(lambda: r.worker.free() == -3)
        assert (await r.call("stream/start", r.urls("s")))[0] == 200
        sending = asyncio.create_task(publish(r, "s", clip(10, 1)))
        await r.worker.until(lambda: waiting(r.worker) == 1)
        others = [asyncio.create_task(r.worker.post(bytes(64 * 48 * 3))) for _ in range(4)]
        assert [(await job)[0] for job in others] == [503] * 4
        assert waiting(r.worker) == 1, "the stream's frame still waits"
        gate.gate.set()
        assert [(await job)[0] for job in jobs] == [200] * 3
        stream = r.stream("s")
        await sending
        await r.until_over()
        assert stream.session.frames_out == 10


@asynchronous
async def test_one_more_stream_is_refused_while_those_that_run_are_late() -> None:
    class Slow(ArrayProcessor):
        over = threading.Event()

        def process_batch(self, batch: Any, params: Any, xp: Any) -> Any:
            self.over.wait(0.05)
            return batch

    slow = Slow()
    async with rig(slow, EngineConfig(slots=9, max_batch=1), lossless=False, latency_budget=0.4) as r:
        for name in ("a", "b"):
            r.create(name)
        assert (await r.call("stream/start", r.urls("a")))[0] == 200
        streams = r.worker.worker.streams
        sending = asyncio.create_task(publish(r, "a", clip(25, 5), close=False))
        await r.worker.until(lambda: streams._waits() > 0.1)
        status, answer = await r.call("stream/start", r.urls("b"))
        assert (status, answer["error"]) == (503, "all_busy")
        assert "would make them late" in answer["message"]
        slow.over.set()
        await sending
        await r.worker.until(lambda: streams._waits() <= 0.1)
        assert (await r.call("stream/start", r.urls("b")))[0] == 200


@asynchronous
async def test_updates_by_http_come_at_the_pace_of_the_control_channel() -> None:
    rate = 10
    async with rig(security=SecurityConfig(max_update_rate=rate)) as r:
        r.create("s")
        assert (await r.call("stream/start", r.urls("s")))[0] == 200
        stream, began = r.stream("s"), time.monotonic()

        async def update(boost: int) -> tuple[int, Any, bytes]:
            path = ("/stream/update", "/stream/params")[boost % 2]
            return await r.worker.post(b'{"boost": %d}' % boost, path, Content_Type="application/json")

        answers = [await update(boost) for boost in range(100)]
        heard = [boost for boost, (status, *_) in enumerate(answers) if status == 200]
        most = int(rate * (time.monotonic() - began + BURST)) + 1
        assert 0 < len(heard) <= most
        late = [(status, headers["Retry-After"]) for status, headers, _ in answers if status != 200]
        assert len(late) >= 100 - most
        assert set(late) <= {(503, "1")}
        assert stream.params.processor.boost == heard[-1], "one that is refused changes nothing"
        assert stream.session.problems["control_rate"] == len(late)


class Touchy(ArrayProcessor):
    """Raises on frames that begin with 255. ``met``: how many of those and of others were in each batch."""

    def __init__(self) -> None:
        self.met: list[tuple[int, int]] = []
        self.entered, self.gate = threading.Event(), threading.Event()

    def process_batch(self, batch: Any, params: Any, xp: Any) -> Any:
        bad = int((batch.reshape(len(batch), -1)[:, 0] == 255).sum())
        self.met.append((bad, len(batch) - bad))
        self.entered.set()
        assert self.gate.wait(20)
        if bad:
            raise ValueError("touched")
        return batch


@asynchronous
async def test_who_sends_poison_is_computed_alone() -> None:
    """After fifty jobs that failed no batch has both its frames and another client's; it is still served."""
    touchy, poison, fine = Touchy(), b"\xff\xff\xff", bytes(3)
    async with running(touchy, EngineConfig(slots=32, max_batch=8), slot_wait=20) as bad, another(bad) as good:
        assert bad.worker.engine is not None
        (engine,) = bad.worker.engine.engines
        touchy.gate.set()
        for _ in range(LEAST):
            assert (await bad.post(poison))[0] == 500
        assert bad.worker.suspects.found == 1
        assert (await bad.post(fine))[0] == 200
        touchy.gate.clear()
        touchy.entered.clear()
        touchy.met.clear()
        retried = engine.left()["retry"]
        first = asyncio.create_task(good.post(fine))
        await asyncio.to_thread(touchy.entered.wait, 20)
        jobs = [asyncio.create_task(each.post(data)) for _ in range(8) for each, data in ((bad, poison), (good, fine))]
        await bad.until(lambda: engine.batcher.waiting == 16)
        touchy.gate.set()
        assert [(await job)[0] for job in jobs] == [500, 200] * 8
        assert (await first)[0] == 200
        assert touchy.met.count((1, 0)) == 8
        assert all(not bad or not fine for bad, fine in touchy.met)
        assert sum(fine for _, fine in touchy.met) == 9, "each of the others' frames is computed once"
        assert engine.left()["retry"] == retried
        metrics = await (await good.session.get(good.url + "/metrics")).text()
        assert "byoc_clients_set_apart_total 1.0" in metrics


def test_who_is_set_apart_and_for_how_long() -> None:
    suspects = Suspects(0.5, most=16)
    for number in range(2 * LEAST):
        suspects.ran("mixed", number % 3 == 0, 1.0)
        suspects.ran("good", False, 1.0)
        suspects.ran("bad", True, 1.0)
    assert [suspects.alone(name, 1.0) for name in ("mixed", "good", "bad", "new")] == [False, False, True, False]
    assert suspects.alone("bad", 1.0 + SECONDS - 0.1)
    assert not suspects.alone("bad", 1.0 + SECONDS)
    assert suspects.found == 1
    for number in range(16):
        suspects.ran(number, True, 2.0)
    assert not suspects.alone("bad", 2.0), "forgotten: there is room for so many"
    assert len(suspects._budgets) == 16
    assert not suspects._until
    assert suspects.forgotten == 2


def test_every_bound_is_a_flag_and_a_metric_and_written_down() -> None:
    port, text = free_port(), OPERATIONS.read_text()
    with process("serve", "--help") as helped:
        assert helped.popen.wait(30) == 0
        helped._reader.join(30)
        flags = set(re.findall(r"--([a-z-]+)", "\n".join(helped.log)))
    with process("serve", "--backend", "numpy", "--host", "127.0.0.1", "--port", str(port)) as worker:
        worker.wait_for("listening")
        assert post(port, "/", bytes(300))[0] == 200, "a size has slots from its first frame on"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            families = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
        assert worker.end() == 0
    said = {sample.labels["limit"]: sample.value for sample in families["byoc_limit"].samples}
    assert said == bounds(ServeConfig())
    assert said.keys() <= flags
    table = text.partition("## Limits")[2].partition("\n## ")[0]
    rows = {match[1] for match in re.finditer(r"^\| `--([a-z-]+)` \|", table, re.M)}
    assert rows == said.keys(), "the table of docs/operations.md"
    named = set(re.findall(r"`(byoc_[a-z_]+?)(?:_total)?(?:\{[^}]*\})?`", table))
    assert named <= families.keys(), "metrics that the table names"
