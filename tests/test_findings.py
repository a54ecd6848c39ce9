"""The diagnosis in the views and commands: the same texts everywhere."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from flask import Flask
from prometheus_client.parser import text_string_to_metric_families

from dbpool import PoolError
from dbpool.diagnosis import CODES

from .conftest import MakeApp
from .postgres import until

NOWHERE = "host=127.0.0.1 port=1 user=u dbname=d"


@pytest.fixture
def down(make_app: MakeApp) -> Flask:
    """An application whose database is down; its pool has noticed."""
    app = make_app(NOWHERE, DBPOOL_DETAILS="always", DBPOOL_OUTAGE_GRACE="0s")
    with suppress(PoolError):
        app.extensions["dbpool"].databases.default.fetch_value("select 1")
    return app


def get(app: Flask, path: str) -> Any:
    answer = app.test_client().get(path)
    assert answer.status_code in (200, 503), answer.data
    return answer.json


def test_stats_and_health_show_the_same_findings(down: Flask) -> None:
    (found,) = get(down, "/db/stats")["findings"]
    assert (found["id"], found["severity"]) == ("DB01/default", "critical")
    assert "Connection refused" in found["text"]
    (other,) = get(down, "/db/health")["findings"]
    assert (other["id"], other["do"]) == (found["id"], found["do"])
    assert other["since"] == pytest.approx(found["since"], abs=0.01)


def test_health_shows_no_findings_without_a_token(make_app: MakeApp) -> None:
    app = make_app(NOWHERE, DBPOOL_TOKEN="a-token-of-some-length", DBPOOL_OUTAGE_GRACE="0s")
    assert "findings" not in get(app, "/db/health")
    assert "findings" not in get(app, "/db/health/ready")


def test_history_and_endpoints_are_sent_only_if_asked_for(down: Flask) -> None:
    monitor = down.extensions["dbpool"].monitor
    monitor.tick()
    assert {"history", "journal", "endpoints"}.isdisjoint(get(down, "/db/stats"))
    report = get(down, "/db/stats?include=history,journal,endpoints")
    assert report["history"]["step"] == 5.0
    assert [line["event"] for line in report["journal"]] == ["down"]
    (row,) = report["endpoints"]["default"]
    assert (row["checkouts"], row["gave_up"]) == (0, 1)
    assert row["endpoint"].startswith("tests/test_findings.py:"), "a line of code"
    assert len(json.dumps(report, separators=(",", ":"))) < 20 * 1024
    assert down.test_client().get("/db/stats?include=everything").status_code == 400
    monitor.close()


def test_metrics_have_every_code_as_0_or_1(down: Flask) -> None:
    body = down.test_client().get("/db/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(body)}
    samples = families["dbpool_finding"].samples
    values = {(s.labels["pool_name"], s.labels["code"]): s.value for s in samples}
    assert values.keys() == {(pool, code) for pool in ("default", "") for code in CODES}
    assert [key for key, value in values.items() if value] == [("default", "DB01")]


def test_the_finding_ends_when_the_server_is_back(dsn: str, make_app: MakeApp) -> None:
    app = make_app(dsn, DBPOOL_DETAILS="always")
    app.extensions["dbpool"].databases.default.fetch_value("select 1")
    (found,) = get(app, "/db/stats")["findings"]
    assert (found["id"], found["severity"]) == ("DB00", "ok")
    assert "default has 0 of 10 connections in use, nobody waits" in found["text"]


def test_holders_are_shown_by_endpoint(
    dsn: str, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = [0.0]
    monkeypatch.setattr("dbpool.monitor._monitor.monotonic", lambda: monotonic() + passed[0])
    app = make_app(dsn, DBPOOL_DETAILS="always")
    own = app.extensions["dbpool"]

    def report() -> str:
        with own.databases.default.connection():
            own.monitor.tick()
            passed[0] += 1.0
            own.monitor.tick()
        return "done"

    app.add_url_rule("/report", "orders.report", report)
    assert app.test_client().get("/report").text == "done"
    (row,) = get(app, "/db/stats?include=endpoints")["endpoints"]["default"]
    assert (row["endpoint"], row["checkouts"], row["use_share"]) == ("orders.report", 1, 1.0)
    assert row["in_use"] == 1.0
    own.monitor.close()


def test_a_serving_applications_monitor_ends_with_its_pools(dsn: str, tmp_path: Path) -> None:
    from dbpool.flask import DBPool, create_blueprint

    app = Flask("serving")
    app.config.update(DATABASE_URL=dsn, DBPOOL_DETAILS="always", DBPOOL_DOTENV="off")
    tmp_path.chmod(0o700)
    app.config["DBPOOL_STATS_DIR"] = str(tmp_path)
    DBPool(app)
    app.register_blueprint(create_blueprint(), url_prefix="/db")
    own = app.extensions["dbpool"]
    try:
        assert app.test_client().get("/db/health/live").status_code == 200
        until((tmp_path / "serving.findings").exists)
        assert get(app, "/db/stats")["findings"][0]["code"] == "DB00"
    finally:
        own.processes.close()
        own.databases.close()  # ends the monitor's thread, as a fixture checks for every test
