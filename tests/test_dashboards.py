"""The dashboard, the alert rules and the operator's page name metrics and labels that a worker's scrape really has."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpu_byoc import errors
from gpu_byoc.config import RegistrationConfig
from gpu_byoc.processors.green_tint import GreenTint
from gpu_byoc.worker import devices
from gpu_byoc.worker.registration import Registration
from tests.backends.fake_cupy import StandInBackend
from tests.support.scrapes import Scrape, scrape
from tests.support.streams import clip, publish, rig, watching

DOCS = Path(__file__).resolve().parent.parent / "docs"
PROMETHEUS_OWN = {"instance", "job"}  # labels that every scraped series gets

METRIC = re.compile(r"\bbyoc_\w+")
SELECTOR = re.compile(r"(\w+)\{([^}]*)\}")
MATCHER = re.compile(r'(\w+)(=~|!=|!~|=)"([^"]*)"')
GROUPING = re.compile(r"\b(?:by|on|without|ignoring) ?\(([^)]*)\)")
LEGEND = re.compile(r"\{\{\s*\$?(?:labels\.)?(\w+)")


class Registered(Registration):
    @property
    def age(self) -> float | None:
        return 1.0


async def everything() -> Scrape:
    """Of a worker with a GPU's backend, after a job, a refused job and a stream that dropped frames."""
    async with rig(GreenTint(), backend="stand-in", encoder="libx264", lossless=False) as r:
        worker = r.worker.worker
        assert (await r.worker.post(bytes(300)))[0] == 200
        assert (await r.worker.post(bytes(4)))[0] == 400
        r.create("a")
        assert (await r.call("stream/start", r.urls("a") | {"params": {"max_framerate": 5}}))[0] == 200
        async with watching(r, "a"):
            await publish(r, "a", [*clip(10, 1), bytes(1880)])
            await r.until_over()
        assert worker.engine is not None
        (engine,) = worker.engine.engines
        await r.worker.until(lambda: engine.vitals().canary is not None)
        settings = RegistrationConfig("http://127.0.0.1:9", "secret")
        worker.registration = Registered(dataclasses.replace(worker.config, registration=settings), 8000)
        return await scrape(r.worker)


@cache
def scraped() -> Scrape:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "load_backend", lambda name: StandInBackend)
        patch.setattr("gpu_byoc_backends._nvml.Meter.read", lambda self: (5, 1))
        return asyncio.run(everything())


def families() -> set[str]:
    return {name for name in scraped().families if name.startswith("byoc_")} - CREATED


CREATED = {"byoc_errors_created", "byoc_frame_latency_ms_created"}  # prometheus_client's own


def panels() -> list[dict[str, Any]]:
    board: dict[str, Any] = json.loads((DOCS / "grafana" / "gpu-byoc.json").read_text("utf-8"))
    return list(board["panels"])


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DOCS / "alerts.yaml").read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str, list[str]]]:
    """(where, expression, labels that its legend or summary shows)."""
    for panel in panels():
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"], LEGEND.findall(target["legendFormat"])
    for rule in rules():
        shown = re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])
        yield rule["alert"], rule["expr"], shown


def problems(expression: str, shown: list[str], found: Scrape) -> list[str]:
    bare = re.sub(r"\$__\w+", "5m", expression)
    names = METRIC.findall(bare)
    said = [f"no metric {name}" for name in names if name not in found]
    known = [name for name in names if name in found]
    for name, matchers in SELECTOR.findall(bare):
        for label, _, value in MATCHER.findall(matchers):
            if label in PROMETHEUS_OWN or name not in found:
                continue
            values = {dict(labels).get(label) for labels in found[name]}
            if label == "type" or name == "byoc_frames_dropped_total":
                values |= {kind.code for kind in kinds()}
            if not any(each is not None and re.fullmatch(value, each) for each in values):
                said.append(f"{name} has no {label} like {value}, only {values}")
    grouped = {label.strip() for group in GROUPING.findall(bare) for label in group.split(",")}
    for label in grouped | set(shown):
        if label not in PROMETHEUS_OWN and not any(label in found.labels(name) for name in known):
            said.append(f"no label {label}")
    return said


def kinds(top: type[errors.GpuByocError] = errors.GpuByocError) -> Iterator[type[errors.GpuByocError]]:
    yield top
    for each in top.__subclasses__():
        yield from kinds(each)


def test_every_metric_and_label_exists() -> None:
    found = scraped()
    wrong = [
        f"{where}: {text}" for where, expression, shown in expressions() for text in problems(expression, shown, found)
    ]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("expression", "shown", "expected"),
    [
        ("rate(byoc_nothing_total[5m])", [], "no metric byoc_nothing_total"),
        ('byoc_frames_total{kind="cats"}', [], "byoc_frames_total has no kind like cats"),
        ("sum by (stream) (byoc_frames_total)", [], "no label stream"),
        ("byoc_frames_total", ["stream"], "no label stream"),
    ],
)
def test_what_does_not_exist_is_noticed(expression: str, shown: list[str], expected: str) -> None:
    assert any(text.startswith(expected) for text in problems(expression, shown, scraped()))


def test_the_panels_are_whole() -> None:
    board = panels()
    assert len({panel["id"] for panel in board}) == len(board)
    taken: set[tuple[int, int]] = set()
    for panel in board:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, f"{panel['title']} lies over another"
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_every_alert_has_a_severity_and_a_paragraph() -> None:
    text = (DOCS / "operations.md").read_text("utf-8")
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert f"| `{rule['alert']}` |" in text, rule["alert"]
    assert set(re.findall(r"\| `(Byoc\w+)` \|", text)) == {rule["alert"] for rule in rules()}


def test_every_metric_is_explained_and_no_other() -> None:
    text = (DOCS / "operations.md").read_text("utf-8")
    explained = set(re.findall(r"^\| `(byoc_\w+)` \|", text, re.MULTILINE))
    assert families() <= explained
    counted = {f"byoc_connections_{what}_total" for what in ("dropped", "idle_closed", "refused")}
    door = {"byoc_connections"} | counted
    assert explained - families() == door  # of a whole process


def promtool(*arguments: str) -> None:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed (apt install prometheus)")
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_the_rules() -> None:
    promtool("check", "rules", str(DOCS / "alerts.yaml"))


GPU = 'byoc_gpu_memory_total_bytes{gpu="0"}'
FIRES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "ByocDown": ({'up{job="gpu-byoc"}': "0x80"}, {'up{job="gpu-byoc"}': "1x80"}),
    "ByocNotRegistered": ({"byoc_registered": "0x80"}, {"byoc_registered": "1x80"}),
    "ByocDegraded": ({"byoc_degraded": "2x80"}, {"byoc_degraded": "0x80"}),
    "ByocDeviceSilent": ({"byoc_canary_age_seconds": "0+1x80"}, {"byoc_canary_age_seconds": "0.5x80"}),
    "ByocBatchStuck": ({"byoc_batch_under_way_seconds": "0+1x80"}, {"byoc_batch_under_way_seconds": "0.1x80"}),
    "ByocRefusing": ({"byoc_refused_total": "0+1x80"}, {"byoc_refused_total": "7x80"}),
    "ByocLatencyHigh": (
        {
            'byoc_frame_latency_ms_bucket{le="100.0"}': "0+9x80",
            'byoc_frame_latency_ms_bucket{le="200.0"}': "0+10x80",
            'byoc_frame_latency_ms_bucket{le="+Inf"}': "0+10x80",
        },
        {f'byoc_frame_latency_ms_bucket{{le="{le}"}}': "0+10x80" for le in ("100.0", "200.0", "+Inf")},
    ),
    "ByocFramesDropped": (
        {'byoc_frames_dropped_total{reason="late"}': "0+9x80", 'byoc_stream_frames_total{way="in"}': "0+100x80"},
        {
            'byoc_frames_dropped_total{reason="late"}': "0+1x80",
            'byoc_frames_dropped_total{reason="framerate"}': "0+90x80",
            'byoc_stream_frames_total{way="in"}': "0+100x80",
        },
    ),
    "ByocStreamsFail": (
        {'byoc_streams_ended_total{state="failed"}': "0+1x80"},
        {'byoc_streams_ended_total{state="failed"}': "9x80", 'byoc_streams_ended_total{state="ended"}': "0+9x80"},
    ),
    "ByocProcessorFails": (
        {'byoc_errors_total{type="processor_output"}': "0+9x80"},
        {'byoc_errors_total{type="bad_frame"}': "0+9x80", 'byoc_errors_total{type="internal"}': "1x80"},
    ),
    "ByocFramesFail": (
        {'byoc_frames_dropped_total{reason="processor_failed"}': "0+9x80"},
        {'byoc_frames_dropped_total{reason="late"}': "0+9x80"},
    ),
    "ByocOutOfMemory": ({"byoc_out_of_memory_total": "0x70 1x10"}, {"byoc_out_of_memory_total": "3x80"}),
    "ByocGpuMemoryFull": (
        {'byoc_gpu_memory_bytes{gpu="0"}': "96x80", GPU: "100x80"},
        {'byoc_gpu_memory_bytes{gpu="0"}': "90x80", GPU: "100x80"},
    ),
    "ByocNotPinned": ({'byoc_pinned{device="cuda:0"}': "0x80", GPU: "100x80"}, {'byoc_pinned{device="cpu"}': "0x80"}),
    "ByocMeteringError": ({"byoc_metering_error_ratio": "0.02x80"}, {"byoc_metering_error_ratio": "0x80"}),
    "ByocMeteringDrift": ({"byoc_metering_error_ratio": "0.0000001x80"}, {"byoc_metering_error_ratio": "0x80"}),
    "ByocMeteringImpossible": (
        {"byoc_device_compute_seconds_total": "0+20x80"},
        {"byoc_device_compute_seconds_total": "0+14.9x80"},  # a scrape each fifteen seconds
    ),
}
"""By alert, the series of a worker at which it fires, and of one at which it must not."""


def test_each_alert_fires_when_it_should_and_only_then(tmp_path: Path) -> None:
    assert FIRES.keys() == {rule["alert"] for rule in rules()}
    tests = [
        {
            "interval": "15s",
            "input_series": [
                {
                    "series": name.replace("{", '{instance="w",') if "{" in name else name + '{instance="w"}',
                    "values": each,
                }
                for name, each in series.items()
            ],
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{alertname="{alert}", alertstate="firing", instance="w"}})',
                    "eval_time": "19m",
                    "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
                }
            ],
        }
        for alert, both in FIRES.items()
        for series, fires in zip(both, (True, False), strict=True)
    ]
    file = tmp_path / "tests.yaml"
    whole = {"rule_files": [str(DOCS / "alerts.yaml")], "evaluation_interval": "15s", "tests": tests}
    file.write_text(yaml.safe_dump(whole), "utf-8")
    promtool("test", "rules", str(file))
