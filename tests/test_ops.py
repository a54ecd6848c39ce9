"""The files for Prometheus, Grafana and Kubernetes match what the application exposes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from dbpool.metrics import Metrics
from dbpool.processes import Processes
from dbpool.prometheus import expose

ROOT = Path(__file__).parent.parent
OPS = ROOT / "ops"
RULES: list[dict[str, Any]] = yaml.safe_load((OPS / "prometheus/rules.yml").read_text())["groups"][
    0
]["rules"]
DASHBOARD: dict[str, Any] = json.loads((OPS / "grafana/dashboards/dbpool.json").read_text())
KEYWORDS = {
    "bool", "by", "and", "le", "max", "sum", "rate", "increase", "histogram_quantile", "pool_name",
    "code", "label_values", "max_over_time", "on", "reason", "state",
}  # fmt: skip


class Counting:
    """Stands in for a pool: any object with `stats()` is enough."""

    def stats(self) -> Any:
        metrics = Metrics()
        metrics.wait.add(0.001)
        return metrics.snapshot([], state="up", size=1, idle=1)


@pytest.fixture(scope="module")
def exposed_names() -> set[str]:
    text = expose(Processes({"default": Counting()}).collect())[0].decode()
    return {
        sample.name for family in text_string_to_metric_families(text) for sample in family.samples
    }


def expressions() -> Iterator[str]:
    for rule in RULES:
        yield rule["expr"]
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for variable in DASHBOARD["templating"]["list"]:
        yield from [variable["query"]] if variable["type"] == "query" else []


@pytest.mark.parametrize("expression", [*expressions()])
def test_every_series_in_rules_and_dashboard_is_exposed(
    expression: str, exposed_names: set[str]
) -> None:
    names = set(re.findall(r"\b[a-z]\w*\b", re.sub(r'"[^"]*"|\$\w+|\[[^]]*\]', "", expression)))
    assert names - KEYWORDS
    assert names - KEYWORDS <= exposed_names


def test_every_rule_has_a_severity_and_advice() -> None:
    for rule in RULES:
        assert rule["labels"]["severity"] in {"critical", "warning"}
        annotations = rule["annotations"]
        assert "runbook" in annotations or "python -m dbpool explain" in annotations["summary"]


def test_every_rule_is_tested() -> None:
    tests = yaml.safe_load((OPS / "prometheus/rules_test.yml").read_text())["tests"]
    fired = {
        case["alertname"]
        for one in tests
        for case in one["alert_rule_test"]
        if case.get("exp_alerts")
    }
    assert fired == {rule["alert"] for rule in RULES}


def test_the_documentation_shows_these_rules() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/alerts.md").read_text(), re.DOTALL)
    shown = [loaded for block in blocks if "groups" in (loaded := yaml.safe_load(block))]
    assert [one["groups"][0]["rules"] for one in shown] == [RULES]


def test_the_dashboard_can_be_provisioned() -> None:
    assert DASHBOARD["uid"] == "dbpool"
    assert "id" not in DASHBOARD, "Grafana's database assigns it"
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${source}"}
        position = panel["gridPos"]
        assert position["x"] + position["w"] <= 24
    source = yaml.safe_load((OPS / "grafana/provisioning/datasources/prometheus.yml").read_text())
    assert source["datasources"][0]["uid"] == "prometheus"


# -- Kubernetes: `make manifests` checks the schemas; these tests check the rest --------------

MANIFESTS: dict[str, dict[str, Any]] = {
    manifest["kind"]: manifest
    for path in (OPS / "kubernetes").glob("*.yaml")
    for manifest in yaml.safe_load_all(path.read_text())
}
WEB = MANIFESTS["Deployment"]["spec"]["template"]
SCHEMA = MANIFESTS["Job"]["spec"]["template"]


def test_the_service_selects_only_serving_pods() -> None:
    labels = WEB["metadata"]["labels"]
    spec = {kind: manifest.get("spec", {}) for kind, manifest in MANIFESTS.items()}
    assert spec["Service"]["selector"] == labels
    for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
        assert spec[kind]["selector"]["matchLabels"] == labels
    assert SCHEMA["metadata"]["labels"].items() & labels.items() != labels.items()


@pytest.mark.parametrize("pod", [WEB["spec"], SCHEMA["spec"]], ids=["web", "schema"])
def test_a_pod_has_only_the_permissions_that_it_needs(pod: dict[str, Any]) -> None:
    """It meets the restricted pod security standard, and its file system is read-only."""
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    assert {"requests", "limits"} <= container["resources"].keys()


def test_kustomization_yaml_says_how_to_make_every_secret_file() -> None:
    header = (OPS / "kubernetes/kustomization.yaml").read_text()
    files = set(re.findall(r"--from-literal=(\w+)", header))
    used = set(re.findall(r"/run/secrets/dbpool/(\w+)", str([WEB, SCHEMA])))
    assert used == files
    monitor = MANIFESTS["PodMonitor"]["spec"]["podMetricsEndpoints"][0]["authorization"]
    assert monitor["credentials"]["key"] in files
    for pod in (WEB["spec"], SCHEMA["spec"]):
        assert "valueFrom" not in str(pod)


def test_liveness_does_not_depend_on_the_database() -> None:
    (container,) = WEB["spec"]["containers"]
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("liveness", "startup")}
    assert set(paths.values()) == {"/db/health/live"}
    assert container["readinessProbe"]["httpGet"]["path"] == "/db/health/ready"


def test_a_pods_grace_period_covers_its_whole_shutdown() -> None:
    (container,) = WEB["spec"]["containers"]
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    graceful_timeout, closing_pools = 2, 1
    assert WEB["spec"]["terminationGracePeriodSeconds"] > wait + graceful_timeout + closing_pools
