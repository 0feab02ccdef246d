"""The Kubernetes manifests: valid by the schemas of Kubernetes and the Prometheus Operator, in step with the worker."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from functools import reduce
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import promql_parser
import pytest
import yaml

from gpu_byoc.config import ServeConfig
from tests.support.workers import asynchronous, running

ROOT = Path(__file__).resolve().parents[2]
FILES = {path.stem: path for path in sorted((ROOT / "deploy/k8s").glob("*.yaml"))}
NATIVE = sorted(FILES.keys() - {"podmonitor"})  # whose kind is the Prometheus Operator's
DOCS = ROOT / "docs"
SCHEMAS = ROOT / "tests/data/operator"


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


def problems(kind: str, said: dict[str, Any]) -> list[str]:
    """What the operator's schema has against it. A field that a cluster would drop without a word counts."""
    schema = json.loads((SCHEMAS / f"{kind}.json").read_text(encoding="utf-8"))
    found = jsonschema.Draft202012Validator(schema).iter_errors(said)
    return [f"{'.'.join(map(str, deepest.absolute_path))}: {deepest.message}" for deepest in map(inner, found)]


def inner(error: Any) -> Any:
    """Of a value that is of no form allowed, why not of the first: the others are only null."""
    return inner(error.context[0]) if error.context else error


def alerts() -> dict[str, Any]:
    said: dict[str, Any] = yaml.safe_load((DOCS / "alerts.yaml").read_text(encoding="utf-8"))
    return said


def test_the_operator_takes_the_podmonitor() -> None:
    said = manifest("podmonitor")
    assert (said["apiVersion"], said["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    assert problems("PodMonitor", said) == []


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("metadata", "lables", {}),
        ("spec", "jobLable", "x"),
        ("spec.selector", "matchLabel", {}),
        ("spec.podMetricsEndpoints.0", "intervall", "10s"),
        ("spec.podMetricsEndpoints.0", "interval", "10 s"),
        ("spec.podMetricsEndpoints.0", "scrapeTimeout", "ten"),
        ("spec.podMetricsEndpoints.0", "scheme", "gopher"),
        ("spec.podMetricsEndpoints.0", "port", 8000),
        ("spec", "podMetricsEndpoints", {}),
        ("spec", "selector", None),
    ],
)
def test_the_operators_schema_would_refuse(where: str, name: str, value: object) -> None:
    said = manifest("podmonitor")
    at(said, where)[name] = value
    (problem,) = problems("PodMonitor", said)
    assert problem.startswith(f"{where}.{name}:") or f"{name!r} was unexpected" in problem


def test_the_operators_schema_would_miss_a_selector() -> None:
    said = manifest("podmonitor")
    del said["spec"]["selector"]
    assert problems("PodMonitor", said) == ["spec: 'selector' is a required property"]


def at(said: Any, where: str) -> Any:
    return reduce(lambda part, step: part[int(step) if step.isdigit() else step], where.split("."), said)


def test_the_alert_rules_are_a_prometheusrule() -> None:
    rule = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule", "metadata": {"name": "gpu-byoc"}}
    assert problems("PrometheusRule", {**rule, "spec": alerts()}) == []
    for name, value in (("for", "a minute"), ("label", {})):
        wrong = alerts()
        wrong["groups"][0]["rules"][0][name] = value
        (problem,) = problems("PrometheusRule", {**rule, "spec": wrong})
        assert problem.startswith("spec.groups.0.rules.0")
        assert name in problem


@pytest.mark.parametrize("kind", ["PodMonitor", "PrometheusRule"])
def test_the_schemas_are_those_that_were_extracted(kind: str) -> None:
    digest = hashlib.sha256((SCHEMAS / f"{kind}.json").read_bytes()).hexdigest()
    assert f"| {kind}.json | `{digest}` |" in (SCHEMAS / "README.md").read_text(encoding="utf-8")


def expressions() -> list[str]:
    """Of the alert rules and of the dashboard, whose variables a duration stands in for."""
    board = json.loads((DOCS / "grafana/gpu-byoc.json").read_text(encoding="utf-8"))
    shown = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    ruled = [rule["expr"] for group in alerts()["groups"] for rule in group["rules"]]
    return [re.sub(r"\$__\w+", "5m", each) for each in [*ruled, *shown]]


@pytest.mark.parametrize("expression", expressions())
def test_prometheus_can_read(expression: str) -> None:
    promql_parser.parse(expression)


@pytest.mark.parametrize("wrong", ["sum by (a (rate(x[5m]))", "rate(x)", "quantile_of(x)"])
def test_prometheus_would_refuse(wrong: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the parser has no class of its own
        promql_parser.parse(wrong)


def test_the_job_that_alerts_ask_for_is_the_podmonitors() -> None:
    named = {job for each in expressions() for job in re.findall(r'\bjob="([^"]*)"', each)}
    labels = manifest("deployment")["spec"]["template"]["metadata"]["labels"]
    assert named == {labels[manifest("podmonitor")["spec"]["jobLabel"]]}


def test_the_adapters_rule_gives_the_hpa_its_metric() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "kubernetes.md").read_text(encoding="utf-8"), re.S)
    (rule,) = yaml.safe_load(text)["rules"]
    (metric,) = manifest("hpa")["spec"]["metrics"]
    assert rule["name"]["matches"] == metric["pods"]["metric"]["name"]
    assert rule["seriesQuery"].startswith(metric["pods"]["metric"]["name"] + "{")
    promql_parser.parse(rule["seriesQuery"])
    filled = rule["metricsQuery"].replace("<<.Series>>", rule["name"]["matches"])
    promql_parser.parse(filled.replace("<<.LabelMatchers>>", 'namespace="x",pod="y"'))


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
