"""Log lines: what they look like, and that each says which stream or job it is about."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_byoc import logs
from gpu_byoc.errors import ConfigError
from gpu_byoc.local.glog import GlogFormatter, to_stderr
from gpu_byoc.logs import about
from gpu_byoc.processors.green_tint import GreenTint
from gpu_byoc.worker import jobs
from tests.support.engines import Gated
from tests.support.streams import clip, publish, rig, watching
from tests.support.workers import asynchronous, running


def line(formatter: logging.Formatter, message: str, *args: object, error: BaseException | None = None) -> str:
    info = (type(error), error, error.__traceback__) if error else None
    return formatter.format(logging.LogRecord("gpu_byoc.x", logging.WARNING, "", 0, message, args, info))


@contextlib.contextmanager
def captured(level: int = logging.INFO) -> Iterator[list[dict[str, Any]]]:
    """What is logged inside, as the JSON that a log collector gets."""
    stream = io.StringIO()
    lines: list[dict[str, Any]] = []
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.formatter("json"))
    logger = logging.getLogger("gpu_byoc")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        lines += [json.loads(each) for each in stream.getvalue().splitlines()]


def test_text_is_the_pages() -> None:
    assert line(logs.formatter("text"), "Trickle server listening on port %d", 8000) == (
        "WARNING: Trickle server listening on port 8000"
    )


def test_text_adds_an_id_that_the_line_does_not_mention() -> None:
    text = logs.formatter("text")
    with about(stream="abc"):
        assert line(text, "stream %s: started", "abc") == "WARNING: stream abc: started"
        assert line(text, "it raised") == "WARNING: it raised (stream abc)"
        with about(job="7"):
            assert line(text, "it raised") == "WARNING: it raised (stream abc, job 7)"
    assert line(text, "it raised") == "WARNING: it raised"


@pytest.mark.parametrize("name", ["a", "raised", "1.2", "a+", "job"])
def test_an_id_that_is_part_of_some_word_is_added_all_the_same(name: str) -> None:
    text = logs.formatter("text")
    with about(stream=name):
        for said in ("a job raised 1 of 1.2", "stream", f"stream {name}2: started", f"upstream {name}"):
            assert line(text, said) == f"WARNING: {said} (stream {name})"
        for said in (f"stream {name}: started", f"the end of stream {name}"):
            assert line(text, said) == f"WARNING: {said}"


def test_a_nodes_text_names_the_job_where_something_goes_wrong_and_shows_no_url() -> None:
    text = GlogFormatter()
    with about(job="7"):
        assert line(text, "the container broke off") == "W0000 the container broke off (job 7)"
        record = logging.LogRecord("x", logging.INFO, "", 0, "Forwarded to BYOC container", (), None)
        assert text.format(record) == "I0000 Forwarded to BYOC container", "as on the page"
    assert line(text, "the container broke off") == "W0000 the container broke off"
    assert "secret-path" not in line(text, "failed", error=OSError("http://127.0.0.1:1/secret-path"))


def test_json_is_one_object_with_the_time_in_utc() -> None:
    before = datetime.now(UTC)
    with about(stream="a", job="b"):
        entry = json.loads(line(logs.formatter("json"), "x %s", "y"))
    assert entry["time"].endswith("Z")
    assert abs((datetime.fromisoformat(entry["time"]) - before).total_seconds()) < 20
    expected = {"level": "warning", "logger": "gpu_byoc.x", "message": "x y", "stream": "a", "job": "b"}
    assert {key: value for key, value in entry.items() if key != "time"} == expected


@given(st.text(), st.text())
def test_whatever_is_in_it_it_stays_one_line(message: str, name: str) -> None:
    with about(stream=name):
        text = line(logs.formatter("json"), "%s", message, error=ValueError(message))
    assert len(text.splitlines()) == 1
    entry = json.loads(text)
    assert (entry["message"], entry["stream"]) == (message, name)
    assert entry["exception"].endswith("ValueError" + (f": {message}" if message else ""))


def test_a_thread_begins_with_nothing_and_is_given_its_own() -> None:
    seen: list[dict[str, str]] = []

    def look() -> None:
        seen.append(dict(logs.whom()))

    with about(stream="other"):
        for target in (look, about(stream="mine")(look)):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
    assert seen == [{}, {"stream": "mine"}]


@pytest.mark.parametrize("setup", [logs.formatter, lambda name: to_stderr(3, name)])
def test_an_unknown_format_is_a_mistake(setup: Any) -> None:
    with pytest.raises(ConfigError, match="'xml' is not one of text, json"):
        setup("xml")


# --- a worker's lines


@asynchronous
async def test_every_line_of_a_stream_says_so_and_there_is_none_per_frame() -> None:
    with captured() as lines:
        async with rig(Gated(), encoder="libx264") as r:
            for name in ("one", "two"):
                r.create(name)
                assert (await r.call("stream/start", r.urls(name)))[0] == 200
                async with watching(r, name):
                    await publish(r, name, clip(20, 2))
                    await r.until_over()
    about_streams = [each for each in lines if each["logger"] in ("gpu_byoc.stream", "gpu_byoc.engine")]
    names = {each.get("stream") for each in about_streams if not each["message"].startswith("encoder ")}
    assert names == {"one", "two"}, about_streams
    for name in ("one", "two"):
        messages = [each["message"] for each in about_streams if each.get("stream") == name]
        assert messages[0] == f"stream {name}: started"
        assert messages[-1].startswith(f"stream {name}: ended (")
        assert len(messages) <= 4, "40 frames"


@asynchronous
async def test_what_a_processor_raised_is_logged_with_the_job_whose_frame_it_was() -> None:
    with captured() as lines:
        async with running(Gated()) as r:
            assert (await r.post(bytes(3)))[0] == 200
            assert (await r.post(bytes([13]) * 3, X_Job_Id="culprit"))[0] == 500
    (raised,) = [each for each in lines if "raised ValueError" in each["message"]]
    assert raised["job"] == "culprit"
    assert "thirteen" in raised["exception"]


@asynchronous
async def test_a_bug_is_logged_with_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(worker: Any, request: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(jobs, "handle", broken)
    with captured() as lines:
        async with running(GreenTint()) as r:
            status, _, body = await r.post(bytes(3), X_Job_Id="j1")
    assert status == 500
    assert b"a bug" not in body
    (entry,) = [each for each in lines if "exception" in each]
    assert (entry["job"], entry["message"]) == ("j1", "POST /live/video-to-video failed")
    assert "RuntimeError: a bug" in entry["exception"]


@asynchronous
async def test_a_job_is_a_line_only_for_debugging() -> None:
    async with running(GreenTint()) as r:
        with captured() as quiet:
            assert (await r.post(bytes(3), X_Job_Id="j1"))[0] == 200
        with captured(logging.DEBUG) as talking:
            assert (await r.post(bytes(3), X_Job_Id="j2"))[0] == 200
            assert (await r.post(bytes(4), X_Job_Id="j3"))[0] == 400
    assert quiet == []
    assert [(each["job"], each["level"]) for each in talking] == [("j2", "debug"), ("j3", "debug")]
    assert "bad_frame" in talking[1]["message"]


PAGE = """
import asyncio
from gpu_byoc import ArrayProcessor, run_processor

class Same(ArrayProcessor):
    def process_batch(self, frames, params, xp):
        return frames

asyncio.run(run_processor(Same(), port=0, host="127.0.0.1", backend="numpy"))
"""


@pytest.mark.parametrize(
    "command",
    [
        ("serve", "--log-format", "json", "--host", "127.0.0.1", "--port", "0", "--backend", "numpy"),
        ("run", "--log-format", "json", "FILE"),
        ("FILE",),
    ],
)
def test_a_whole_process_in_json(tmp_path: Path, command: tuple[str, ...]) -> None:
    file = tmp_path / "page.py"
    file.write_text(PAGE)
    arguments = [str(file) if each == "FILE" else each for each in command]
    module = [] if command == ("FILE",) else ["-m", "gpu_byoc"]
    environment = {"GPU_BYOC_LOG_FORMAT": "json", "PATH": "/usr/bin:/bin"} if not module else None
    with subprocess.Popen(
        [sys.executable, *module, *arguments], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        entries = []
        for text in process.stderr:
            entries.append(json.loads(text))
            if "listening" in entries[-1]["message"]:
                process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert {each["level"] for each in entries} == {"info"}
    assert any(each["message"].startswith("Trickle server listening on port ") for each in entries)
    assert entries[-1]["message"].startswith("stopped: ")


# --- what the operator's page says of them

ROOT = Path(__file__).resolve().parent.parent.parent
LEVELS = {"info": "info", "warning": "warning", "error": "error", "exception": "error", "critical": "critical"}
MADE_ELSEWHERE = {"drain.summary()": "stopped: …"}
"""Messages that are put together by a function, by its call."""


def logged(files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """(message with … for what varies, level) of every log call from ``info`` upwards."""
    for path in files:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS):
                continue
            whose = ast.unparse(node.func.value)
            if whose != "log" and not whose.startswith("logging.getLogger("):
                continue
            first = node.args[0]
            if isinstance(first, ast.Constant):
                text = re.sub(r"%[.\d]*[a-z]", "…", str(first.value))
            else:
                text = MADE_ELSEWHERE[ast.unparse(first)]
            yield text, LEVELS[node.func.attr]


def explained(title: str) -> dict[str, str]:
    """The rows of one table of the page."""
    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    table = text.partition(f"| {title} | level |")[2].partition("\n\n")[0]
    return dict(re.findall(r"^\| `(.+?)` \| (\w+) \|", table, re.MULTILINE))


def test_every_line_is_explained_and_no_other() -> None:
    ours = {*(ROOT / "gpu_byoc").rglob("*.py")}
    network = {*(ROOT / "gpu_byoc" / "local").rglob("*.py")}
    worker = dict(logged((ours - network) | {*(ROOT / "backends").rglob("*.py")}))
    assert len(worker) > 20
    assert explained("line of a worker") == worker
    assert explained("line of `gpu-byoc livepeer`") == dict(logged(network))


@pytest.mark.parametrize("name", ["text", "json"])
def test_a_traceback_names_a_channel_by_its_origin_only(name: str) -> None:
    try:
        raise OSError("cannot reach http://127.0.0.1:8935/secret-channel/3")
    except OSError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "failed", (), sys.exc_info())
    line = logs.formatter(name).format(record)
    assert "http://127.0.0.1:8935/***" in line
    assert "secret-channel" not in line
