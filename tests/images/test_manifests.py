"""The Kubernetes manifests: valid by Kubernetes' own schemas, and in step with the worker."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from gpu_byoc.config import ServeConfig
from tests.support.workers import asynchronous, running

ROOT = Path(__file__).resolve().parents[2]
FILES = {path.stem: path for path in sorted((ROOT / "deploy/k8s").glob("*.yaml"))}
NATIVE = sorted(FILES.keys() - {"podmonitor"})  # the Prometheus Operator's kind has no schema of Kubernetes'


def manifest(name: str) -> dict[str, Any]:
    (said,) = yaml.safe_load_all(FILES[name].read_text(encoding="utf-8"))
    assert isinstance(said, dict)
    return said


@pytest.fixture
def pod() -> dict[str, Any]:
    spec: dict[str, Any] = manifest("deployment")["spec"]["template"]["spec"]
    return spec


@pytest.fixture
def worker(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["containers"]
    assert isinstance(container, dict)
    return container


def test_all_of_them_are_there() -> None:
    assert set(FILES) == {"deployment", "hpa", "networkpolicy", "podmonitor", "service"}


@pytest.mark.parametrize("version", ["1.29", "1.37"])
@pytest.mark.parametrize("name", NATIVE)
def test_the_schema_takes_it(name: str, version: str) -> None:
    kubernetes_validate.validate(manifest(name), version, strict=True)


def test_the_schema_would_refuse_a_typo() -> None:
    said = manifest("deployment")
    said["spec"]["template"]["spec"]["terminationGraceSeconds"] = 15
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(said, "1.37", strict=True)


def test_they_all_mean_the_same_pods() -> None:
    labels = manifest("deployment")["spec"]["template"]["metadata"]["labels"]
    assert manifest("deployment")["spec"]["selector"]["matchLabels"] == labels
    assert manifest("service")["spec"]["selector"] == labels
    assert manifest("podmonitor")["spec"]["selector"]["matchLabels"] == labels
    assert manifest("networkpolicy")["spec"]["podSelector"]["matchLabels"] == labels
    assert manifest("hpa")["spec"]["scaleTargetRef"]["name"] == manifest("deployment")["metadata"]["name"]


def test_the_grace_period_holds_the_hook_and_the_drain(pod: dict[str, Any], worker: dict[str, Any]) -> None:
    command, seconds = worker["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    assert pod["terminationGracePeriodSeconds"] >= float(seconds) + ServeConfig().drain_seconds + 2


def test_it_runs_as_the_image_does(pod: dict[str, Any], worker: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert [pod["securityContext"][name] for name in ("runAsUser", "runAsGroup", "fsGroup")] == [10001] * 3
    assert worker["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {mount["mountPath"] for mount in worker["volumeMounts"]} == {"/tmp", "/data"}
    assert pod["automountServiceAccountToken"] is False


def test_a_service_does_not_become_the_workers_settings(pod: dict[str, Any]) -> None:
    """A Service named gpu-byoc would set GPU_BYOC_PORT=tcp://... in every pod that lets it."""
    assert manifest("service")["metadata"]["name"] == "gpu-byoc"
    assert pod["enableServiceLinks"] is False


def test_it_asks_for_a_gpu(worker: dict[str, Any]) -> None:
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1


@asynchronous
async def test_probes_and_metrics_are_the_workers() -> None:
    """Each path answers 200 on a worker that is ready, and the HPA's metric is among the metrics."""
    (container,) = manifest("deployment")["spec"]["template"]["spec"]["containers"]
    (endpoint,) = manifest("podmonitor")["spec"]["podMetricsEndpoints"]
    (metric,) = manifest("hpa")["spec"]["metrics"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports[endpoint["port"]] == 8000
    from gpu_byoc.processors.passthrough import Passthrough

    async with running(Passthrough()) as at:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container[probe]["httpGet"]
            assert ports[asked["port"]] == 8000
            async with at.session.get(at.url + asked["path"]) as answer:
                assert answer.status == 200, (probe, asked["path"])
        async with at.session.get(at.url + endpoint["path"]) as answer:
            text = await answer.text()
        assert f"\n{metric['pods']['metric']['name']} " in text


def test_the_args_are_flags_of_serve(worker: dict[str, Any]) -> None:
    command, *words = worker["args"]
    assert command == "serve"
    known = (ROOT / "gpu_byoc/cli.py").read_text(encoding="utf-8")
    names = {node.value for node in ast.walk(ast.parse(known)) if isinstance(node, ast.Constant)}
    assert {word.removeprefix("--") for word in words if word.startswith("--")} <= names
