"""`docker compose --profile cluster up`: two databases, PgBouncer and Prometheus."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from webapp import ROOT

from .engine import Load, Project, docker, inspect, request, until_true

DOCS = ROOT / "docs"
Record = Callable[[str, object], None]
SERVICES = ["web", "standby", "pgbouncer", "web-cluster", "prometheus"]


@pytest.fixture(scope="module")
def cluster(stack: Project) -> Iterator[Project]:
    """All services but Grafana, whose image may be unavailable."""
    command = ["--profile", "cluster", "up", "--detach", "--wait", *SERVICES]
    stack(*command, "--wait-timeout", "120")
    yield stack
    stack("--profile", "cluster", "rm", "--stop", "--force", *SERVICES[1:])


@pytest.fixture(scope="module")
def page(cluster: Project) -> int:
    return int(cluster.environ["CLUSTER_PORT"])


def ready(page: int) -> dict[str, str]:
    answer = request(page, "/db/health/ready")
    assert answer.status == 200
    states: dict[str, str] = answer.json()["databases"]
    return states


def sql(cluster: Project, service: str, statement: str) -> str:
    command = ["psql", "-U", "postgres", "-d", "webapp", "-qAt", "-c", statement]
    return cluster("exec", "-T", service, *command).strip()


def test_the_page_has_two_databases(cluster: Project, page: int, token: str) -> None:
    until_true(lambda: ready(page) == {"default": "up", "replica": "up"})
    health = request(page, "/db/health", token=token).json()["databases"]
    roles = {name: database["role"] for name, database in health.items()}
    assert roles == {"default": "primary", "replica": "standby"}
    assert request(page, "/db/stats", token=token).json()["pools"].keys() == roles.keys()


def test_notes_go_through_pgbouncer_to_the_standby(cluster: Project, page: int) -> None:
    title = f"written {time.time()}"
    assert request(page, "/notes", "POST", {"title": title}).status == 201
    found = f"select count(*) from notes where title = '{title}'"
    until_true(lambda: sql(cluster, "standby", found) == "1")
    clients = "select distinct client_addr from pg_stat_activity where usename = 'webapp'"
    networks = inspect(cluster.container("pgbouncer"))["NetworkSettings"]["Networks"].values()
    assert {network["IPAddress"] for network in networks} <= set(
        sql(cluster, "db", clients).split()
    )


def prometheus(cluster: Project, path: str) -> Any:
    answer = request(int(cluster.environ["PROMETHEUS_PORT"]), f"/api/v1/{path}")
    assert answer.status == 200, answer.body
    return answer.json()["data"]


def query(cluster: Project, expression: str) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = prometheus(cluster, f"query?query={quote(expression)}")["result"]
    return result


def test_prometheus_sees_every_pool_and_has_the_rules(cluster: Project, page: int) -> None:
    def seen() -> set[tuple[str, str]]:
        series = query(cluster, "db_client_connection_max")
        return {(one["metric"]["service"], one["metric"]["pool_name"]) for one in series}

    until_true(
        lambda: (
            seen() == {("web", "default"), ("web-cluster", "default"), ("web-cluster", "replica")}
        )
    )
    assert {target["health"] for target in prometheus(cluster, "targets")["activeTargets"]} == {
        "up"
    }
    (group,) = prometheus(cluster, "rules")["groups"]
    rules = yaml.safe_load((cluster.checkout / "ops/prometheus/rules.yml").read_text())
    assert [rule["name"] for rule in group["rules"]] == [
        rule["alert"] for rule in rules["groups"][0]["rules"]
    ]


def test_every_panel_of_the_dashboard_has_something_to_show(cluster: Project, page: int) -> None:
    path = cluster.checkout / "ops/grafana/dashboards/dbpool.json"
    panels = json.loads(path.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    assert len(expressions) > 10
    for _ in range(5):
        request(page, "/notes")
    for expression in expressions:
        promql = expression.replace("$pool", ".*")
        promql = (
            promql.replace("$__rate_interval", "1m")
            .replace("$__range", "1h")
            .replace("> 0", ">= 0")
        )
        until_true(lambda promql=promql: query(cluster, promql))  # type: ignore[misc]


def test_the_queries_of_the_documentation_are_answered(cluster: Project) -> None:
    expressions = []
    for page in (DOCS / "observability.md", DOCS / "sizing.md"):
        text = page.read_text()
        expressions += re.findall(r"```promql\n(.*?)```", text, re.DOTALL)
        table = text.partition("| question | expression |")[2].partition("\n\n")[0]
        expressions += re.findall(r"\| `(.*)` \|$", table, re.MULTILINE)
    assert len(expressions) == 9
    for expression in expressions:
        query(cluster, expression)


def test_the_rules_fire_when_they_should(cluster: Project) -> None:
    folder: Path = cluster.checkout / "ops/prometheus"
    owner = str(folder.stat().st_uid)
    run = [
        "run",
        "--rm",
        "--user",
        owner,
        "--volume",
        f"{folder}:/rules:ro",
        "--entrypoint=promtool",
    ]
    assert "SUCCESS" in docker(*run, "dbpool-prometheus", "check", "rules", "/rules/rules.yml")
    assert "SUCCESS" in docker(*run, "dbpool-prometheus", "test", "rules", "/rules/rules_test.yml")


def test_the_files_of_the_page_on_alerts_are_valid(cluster: Project, tmp_path: Path) -> None:
    """As `promtool` checks them there; `observability.md` shows the beginning of one."""
    rules, alerting, _ = yaml_blocks("alerts.md")
    (tmp_path / "dbpool.yml").write_text(rules)
    (tmp_path / "prometheus.yml").write_text(yaml_blocks("observability.md")[0] + alerting)
    collector = yaml.safe_load(yaml_blocks("observability.md")[1])["receivers"]["prometheus"]
    (tmp_path / "collector.yml").write_text(yaml.safe_dump(collector["config"]))
    (tmp_path / "dbpool_token").write_text("a-token")
    commands = re.findall(r"^promtool (.*)", (DOCS / "alerts.md").read_text(), re.MULTILINE)
    assert len(commands) == 2
    tmp_path.chmod(0o755)
    run = [
        "run",
        "--rm",
        f"--volume={tmp_path}:/files:ro",
        f"--volume={tmp_path}:/etc/prometheus:ro",
        f"--volume={tmp_path}:/etc/otelcol:ro",
        "--workdir=/files",
        "--entrypoint=promtool",
        "dbpool-prometheus",
    ]
    for command in [*commands, "check config collector.yml"]:
        assert "SUCCESS" in docker(*run, *command.split())


def yaml_blocks(page: str) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def test_a_restart_of_pgbouncer_fails_no_request(
    cluster: Project, page: int, record_property: Record
) -> None:
    """It refuses the next statement on each connection, and the pool sends that again."""
    with Load(page, clients=4).running() as load:
        for _ in range(3):
            load.await_requests()
            cluster("restart", "pgbouncer")
        load.await_requests()
    record_property("PgBouncer restarted under load, written", load.written)
    record_property("PgBouncer restarted under load, failed", load.kinds())
    assert load.failed == []


def test_a_killed_pgbouncer_costs_at_most_the_statements_in_flight(
    cluster: Project, page: int, record_property: Record
) -> None:
    with Load(page, clients=4).running() as load:
        load.await_requests()
        cluster("kill", "pgbouncer")
        cluster("start", "pgbouncer")
        load.await_requests()
    record_property("PgBouncer killed under load, written", load.written)
    record_property("PgBouncer killed under load, failed", load.kinds())
    assert len(load.failed) <= load.clients, load.failed


def test_a_stopped_standby_fills_no_disk_and_comes_back(
    cluster: Project, page: int, record_property: Record
) -> None:
    cluster("stop", "standby")
    until_true(lambda: ready(page)["replica"] != "up")
    assert request(page, "/db/health/ready").json()["status"] == "degraded"
    assert request(page, "/notes").status == 200

    before = int(sql(cluster, "db", "select pg_current_wal_lsn() - '0/0'::pg_lsn"))
    write = "do $$ begin for i in 1..256 loop perform pg_logical_emit_message(false, 'x', repeat('x', 1 << 20)); end loop; end $$"
    for _ in range(8):
        sql(cluster, "db", write)
    written = int(sql(cluster, "db", "select pg_current_wal_lsn() - '0/0'::pg_lsn")) - before
    assert written >= 2 << 30
    sql(cluster, "db", "checkpoint")
    size = int(sql(cluster, "db", "select sum(size) from pg_ls_waldir()"))
    record_property("WAL written while the standby is stopped, MiB", written >> 20)
    record_property("WAL kept after that, MiB", size >> 20)
    assert size < 600 << 20

    cluster("start", "standby")
    until_true(lambda: ready(page) == {"default": "up", "replica": "up"})
    until_true(lambda: sql(cluster, "db", "select state from pg_stat_replication") == "streaming")


def test_the_whole_cluster_needs_little_memory(cluster: Project, record_property: Record) -> None:
    limits = {
        service: inspect(cluster.container(service))["HostConfig"]["Memory"] >> 20
        for service in [*SERVICES, "db"]
    }
    assert sum(limits.values()) + 256 <= 1536, "with Grafana"
    for service in limits:
        assert inspect(cluster.container(service))["State"]["OOMKilled"] is False
    used = docker("stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}}")
    record_property("memory", used.replace("\n", "; "))
