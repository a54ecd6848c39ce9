"""The extension and the blueprint, on a real database, as a client sees them."""

from __future__ import annotations

import base64
import logging
import re
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from flask import Flask, Response, jsonify
from flask.testing import FlaskClient

from dbpool import ConfigError, Pool
from dbpool.events import Connected
from dbpool.flask import DBPool, create_blueprint

from .postgres import Server, until

TOKEN = "open sesame"
NOWHERE = "host=127.0.0.1 port=1 user=u dbname=d"

MakeApp = Callable[..., Flask]


@pytest.fixture
def make_app(request: pytest.FixtureRequest) -> MakeApp:
    """Make applications; their pools are closed after the test."""

    def make(
        conninfo: str, authorize: Any = None, db: DBPool | None = None, **config: Any
    ) -> Flask:
        app = Flask("app")
        app.config.update(TESTING=True, DATABASE_URL=conninfo, **config)
        (db or DBPool()).init_app(app)
        request.addfinalizer(app.extensions["dbpool"].databases.close)
        request.addfinalizer(app.extensions["dbpool"].processes.close)
        app.register_blueprint(create_blueprint(authorize=authorize), url_prefix="/db")
        return app

    return make


@pytest.fixture
def app(make_app: MakeApp, dsn: str) -> Flask:
    return make_app(dsn, DBPOOL_TOKEN=TOKEN)


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


def bearer(token: str = TOKEN) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def basic(password: str = TOKEN) -> dict[str, str]:
    credentials = base64.b64encode(f"anybody:{password}".encode()).decode()
    return {"Authorization": f"Basic {credentials}"}


# The extension


def test_pools_are_reached_through_the_current_application(make_app: MakeApp, dsn: str) -> None:
    db = DBPool()
    one = make_app(dsn, db=db, DBPOOL_DATABASES={"replica": dsn})
    two = make_app(dsn, db=db)
    with one.app_context():
        assert isinstance(db.pool, Pool)
        assert db["replica"].name == "replica"
        assert db.pool is db.databases.default
        first = db.pool
        assert db.pool.fetch_value("select 1") == 1
    with two.app_context():
        assert db.pool is not first
        with pytest.raises(KeyError):
            db["replica"]


def test_the_extension_keeps_no_application(make_app: MakeApp, dsn: str) -> None:
    db = DBPool()
    app = make_app(dsn, db=db)
    assert app not in vars(db).values()
    with pytest.raises(RuntimeError, match="application context"):
        _ = db.pool


def test_a_second_registration_is_refused(app: Flask) -> None:
    with pytest.raises(RuntimeError, match="already"):
        DBPool().init_app(app)


def test_a_blueprint_without_the_extension_is_refused() -> None:
    with pytest.raises(RuntimeError, match="init_app"):
        Flask("app").register_blueprint(create_blueprint())


def test_an_application_without_the_extension_says_what_is_missing() -> None:
    db = DBPool()
    with Flask("bare").app_context(), pytest.raises(RuntimeError, match=r"init_app.*'bare'"):
        _ = db.pool


def test_wrong_configuration_is_refused_at_once(make_app: MakeApp, dsn: str) -> None:
    with pytest.raises(ConfigError, match="DBPOOL_TIMEOUT"):
        make_app(dsn, DBPOOL_TIMEOUT="soon")
    with pytest.raises(ConfigError, match="'reports'"):
        make_app(dsn, DBPOOL_REQUIRED="default,reports")


def test_listeners_hear_of_all_pools(make_app: MakeApp, dsn: str) -> None:
    heard: list[Any] = []
    app = make_app(dsn, db=DBPool(listeners=[heard.append]))
    with app.app_context():
        app.extensions["dbpool"].databases.default.fetch_value("select 1")
    until(lambda: any(isinstance(event, Connected) for event in heard))


def test_a_connection_held_at_the_end_of_a_request_is_returned_and_reported(
    make_app: MakeApp, dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    db = DBPool()
    app = make_app(dsn, db=db)
    kept = []

    @app.get("/forgetful")
    def forgetful() -> str:
        conn = db.pool.getconn()
        conn.execute("create table t (id int)")
        kept.append(conn)
        return "done"

    with caplog.at_level(logging.ERROR, logger="dbpool"):
        assert app.test_client().get("/forgetful").status_code == 200
    pool = app.extensions["dbpool"].databases.default
    assert pool.stats().active == 0
    assert "forgetful" in caplog.text
    assert "endpoint forgetful" in caplog.text
    assert pool.fetch_value("select to_regclass('t')") is None, "nothing may be committed"


def test_a_connection_held_around_a_request_stays_out(make_app: MakeApp, dsn: str) -> None:
    app = make_app(dsn)
    pool = app.extensions["dbpool"].databases.default
    with pool.connection() as conn:
        app.test_client().get("/db/health/live")
        assert pool.stats().active == 1
        assert conn.execute("select 1").fetchone() == (1,)


def test_a_holder_carries_its_endpoint(make_app: MakeApp, dsn: str) -> None:
    db = DBPool()
    app = make_app(dsn, db=db)

    @app.get("/look")
    def look() -> Response:
        with db.pool.connection():
            return jsonify([holder.endpoint for holder in db.pool.holders()])

    assert app.test_client().get("/look").json == ["look"]


@pytest.mark.parametrize(
    ("accept", "mimetype"),
    [
        ("application/json", "application/json"),
        ("text/html", "text/html"),
        ("*/*", "application/json"),
    ],
)
def test_an_unavailable_database_is_a_503(make_app: MakeApp, accept: str, mimetype: str) -> None:
    db = DBPool()
    app = make_app(NOWHERE, db=db, DBPOOL_OUTAGE_GRACE="100ms")
    app.add_url_rule("/", view_func=lambda: db.pool.fetch_value("select 1"))
    answer = app.test_client().get("/", headers={"Accept": accept})
    assert answer.status_code == 503
    assert answer.mimetype == mimetype
    assert int(answer.headers["Retry-After"]) >= 1
    assert "127.0.0.1" not in answer.text


def test_a_busy_pool_is_a_503(make_app: MakeApp, dsn: str) -> None:
    db = DBPool()
    app = make_app(dsn, db=db, DBPOOL_MAX_SIZE=1, DBPOOL_TIMEOUT="20ms")
    app.add_url_rule("/", view_func=lambda: db.pool.fetch_value("select 1"))
    pool = app.extensions["dbpool"].databases.default
    pool.wait() if not pool.closed else pool.open(wait=True)
    with pool.connection():
        answer = app.test_client().get("/")
    assert answer.status_code == 503
    assert answer.json == {"error": "the service is busy"}


def test_error_handlers_can_be_turned_off(make_app: MakeApp) -> None:
    db = DBPool()
    app = make_app(NOWHERE, db=db, DBPOOL_OUTAGE_GRACE="50ms", DBPOOL_ERROR_HANDLERS=False)
    app.testing = False
    app.config["PROPAGATE_EXCEPTIONS"] = False
    app.add_url_rule("/", view_func=lambda: db.pool.fetch_value("select 1"))
    app.logger.disabled = True
    assert app.test_client().get("/").status_code == 500


# The blueprint


def test_liveness_touches_no_database(make_app: MakeApp) -> None:
    app = make_app(NOWHERE)
    answer = app.test_client().get("/db/health/live")
    assert (answer.status_code, answer.json) == (200, {"status": "up"})
    assert app.extensions["dbpool"].databases.default.closed


def test_readiness_opens_the_pool_and_tells_up(client: FlaskClient) -> None:
    answer = client.get("/db/health/ready")
    assert (answer.status_code, answer.json) == (
        200,
        {"status": "up", "databases": {"default": "up"}},
    )
    assert answer.headers["Cache-Control"] == "no-store"


def test_readiness_tells_down_and_when_to_come_back(make_app: MakeApp) -> None:
    client = make_app(NOWHERE, DBPOOL_OUTAGE_GRACE="100ms").test_client()
    first = client.get("/db/health/ready")
    assert first.status_code == 503
    until(lambda: client.get("/db/health/ready").json == {
        "status": "down", "databases": {"default": "down"}
    })  # fmt: skip
    answer = client.get("/db/health/ready")
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1


def test_an_optional_database_only_degrades(make_app: MakeApp, dsn: str) -> None:
    app = make_app(dsn, DBPOOL_DATABASES={"replica": NOWHERE}, DBPOOL_OUTAGE_GRACE="50ms")
    client = app.test_client()

    def ask() -> Any:
        return client.get("/db/health/ready")

    until(lambda: ask().json["databases"] == {"default": "up", "replica": "down"})
    assert ask().status_code == 200
    assert ask().json["status"] == "degraded"


def test_everyone_gets_status_words_and_no_more(client: FlaskClient) -> None:
    answer = client.get("/db/health")
    assert answer.status_code == 200
    assert answer.json == {"status": "up", "databases": {"default": "up"}}


def test_a_trusted_reader_gets_facts(client: FlaskClient) -> None:
    client.get("/db/health/ready")
    detail = client.get("/db/health", headers=bearer()).get_json()["databases"]["default"]
    assert detail["status"] == "up"
    assert detail["role"] == "primary"
    assert detail["latency"] > 0
    assert re.match(r"\d+\.\d+", detail["server_version"])
    assert detail["tls"] is False
    assert detail["connections"]["max"] == 100
    assert sum(detail["connections"]["ours"].values()) >= 1
    assert detail["last_error"] is None


@pytest.mark.parametrize("path", ["/db/stats", "/db/metrics", "/db/"])
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        (bearer(), 200),
        (basic(), 200),
        (bearer("wrong"), 401),
        (basic("wrong"), 401),
        (bearer("öffne dich"), 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": "Digest username=x"}, 401),
        ({"X-Forwarded-For": "127.0.0.1"}, 401),
    ],
)
def test_details_need_the_token(
    client: FlaskClient, path: str, headers: dict[str, str], status: int
) -> None:
    answer = client.get(path, headers=headers)
    assert answer.status_code == status
    assert answer.headers["Cache-Control"] == "no-store"
    if status == 401:
        assert {h.split()[0] for h in answer.headers.getlist("WWW-Authenticate")} == {
            "Basic",
            "Bearer",
        }


def test_without_a_token_details_are_closed(make_app: MakeApp, dsn: str) -> None:
    client = make_app(dsn).test_client()
    assert client.get("/db/stats", headers=bearer("")).status_code == 403
    assert client.get("/db/stats").status_code == 403


def test_details_may_be_opened_to_all(make_app: MakeApp, dsn: str) -> None:
    assert make_app(dsn, DBPOOL_DETAILS="always").test_client().get("/db/stats").status_code == 200


@pytest.mark.parametrize(("answer", "status"), [(True, 200), (False, 403)])
def test_an_application_may_have_its_own_rule(
    make_app: MakeApp, dsn: str, answer: bool, status: int
) -> None:
    client = make_app(dsn, authorize=lambda: answer, DBPOOL_TOKEN=TOKEN).test_client()
    assert client.get("/db/stats", headers=bearer()).status_code == status


def test_stats_say_what_the_pool_is_doing(app: Flask, client: FlaskClient) -> None:
    pool = app.extensions["dbpool"].databases.default
    with pool.connection():
        stats = client.get("/db/stats", headers=bearer()).get_json()
    assert stats["schema"] == 1
    assert stats["scope"] == "process"
    assert len(stats["processes"]) == 1
    found = stats["pools"]["default"]
    assert found["active"] == 1
    assert found["active"] + found["idle"] + found["connecting"] == found["size"]
    assert found["counters"]["checkouts"] == 1
    assert found["wait"]["count"] == 1
    assert found["breaker"] == {
        "state": "closed", "since": None, "last_error": None, "retry_after": None
    }  # fmt: skip
    (holder,) = found["holders"]
    assert "test_stats_say_what_the_pool_is_doing" in holder["where"]


def test_scope_is_checked(client: FlaskClient) -> None:
    assert client.get("/db/stats?scope=process", headers=bearer()).status_code == 200
    assert client.get("/db/stats?scope=nonsense", headers=bearer()).status_code == 400


def test_metrics_are_negotiated(client: FlaskClient) -> None:
    classic = client.get("/db/metrics", headers=bearer())
    assert classic.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert "db_client_connection_count{" in classic.text
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    modern = client.get("/db/metrics", headers=bearer() | accept)
    assert modern.headers["Content-Type"].startswith("application/openmetrics-text")
    assert modern.text.endswith("# EOF\n")


def test_the_live_page_works_under_a_strict_policy(client: FlaskClient) -> None:
    page = client.get("/db/", headers=basic())
    assert "script-src 'self'" in page.headers["Content-Security-Policy"]
    assert "unsafe-inline" not in page.headers["Content-Security-Policy"]
    assert "<style" not in page.text
    assert " style=" not in page.text
    for address in re.findall(r'(?:src|href)="([^"]+)"', page.text):
        assert address.startswith("/db/")
        with client.get(address, headers=basic()) as answer:
            assert answer.status_code == 200


@pytest.mark.parametrize("path", ["/db", "/db/health/", "/db/health/ready/", "/db/health/live/"])
def test_no_answer_is_a_redirect(client: FlaskClient, path: str) -> None:
    assert client.get(path, headers=bearer()).status_code == 200


@pytest.mark.parametrize("method", ["post", "put", "delete", "patch"])
def test_other_methods_are_refused(client: FlaskClient, method: str) -> None:
    assert getattr(client, method)("/db/health/ready").status_code == 405


def test_no_secret_is_in_any_answer(
    make_app: MakeApp, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    conninfo = server.conninfo_for(user="nobody_here", password="hunter2-and-more")
    client = make_app(conninfo, DBPOOL_TOKEN=TOKEN, DBPOOL_OUTAGE_GRACE="50ms").test_client()
    shown = ""
    for path in ("health/ready", "health", "stats", "metrics", ""):
        shown += client.get(f"/db/{path}", headers=bearer()).text
    assert "hunter2" not in shown + caplog.text
    assert TOKEN not in shown + caplog.text


class Undone(psycopg.Connection[Any]):
    """The README's way of rolling back after a test."""

    def commit(self) -> None:
        self.execute("savepoint kept")

    def rollback(self) -> None:
        self.execute("rollback to savepoint kept")


def test_an_applications_tests_may_be_rolled_back(make_app: MakeApp, dsn: str) -> None:
    with Pool(dsn) as plain:
        plain.execute("create table t (id int)")
        app = make_app(dsn, db=DBPool(connection_class=Undone), DBPOOL_MAX_SIZE=1)
        pool = app.extensions["dbpool"].databases.default
        with pool.connection():
            pass
        pool.execute("insert into t values (1)")
        with pool.connection() as conn:
            conn.execute("insert into t values (2)")
        with pytest.raises(ZeroDivisionError), pool.connection() as conn:
            conn.execute("insert into t values (3)")
            raise ZeroDivisionError
        with pytest.raises(psycopg.errors.UndefinedTable):
            pool.execute("insert into nowhere values (4)")
        pool.run(lambda conn: conn.execute("insert into t values (5)"))
        assert pool.fetch_all("select id from t order by id") == [(1,), (2,), (5,)]
        pool.close()
        assert plain.fetch_all("select id from t") == []
