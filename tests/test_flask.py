"""The Flask extension and the blueprint's views."""

from __future__ import annotations

import base64
import json
import logging
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from flask import (
    Blueprint,
    Flask,
    Response,
    abort,
    copy_current_request_context,
    g,
    jsonify,
    redirect,
    stream_with_context,
)
from flask.testing import FlaskClient

from dbpool import CommitUncertain, ConfigError, Pool, PoolError, PoolTimeout, holders
from dbpool.events import Connected
from dbpool.flask import DBPool, create_blueprint
from tests.fake import FakeServer
from tests.scripts import python
from tests.threads import Task

from .conftest import MakeApp
from .postgres import Server, until

TOKEN = "open sesame"
NOWHERE = "host=127.0.0.1 port=1 user=u dbname=d"
PROMETHEUS_3 = (  # what it sends as `Accept`
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/"
    "openmetrics-text;version=0.0.1;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)


@pytest.fixture
def app(make_app: MakeApp, fake: FakeServer) -> Flask:
    return make_app(fake, DBPOOL_TOKEN=TOKEN)


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


def bearer(token: str = TOKEN) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def basic(password: str = TOKEN) -> dict[str, str]:
    credentials = base64.b64encode(f"anybody:{password}".encode()).decode()
    return {"Authorization": f"Basic {credentials}"}


# The extension


def test_pools_are_reached_through_the_current_application(
    make_app: MakeApp, fake: FakeServer
) -> None:
    db = DBPool()
    one = make_app(fake, db=db, DBPOOL_DATABASES={"replica": fake.conninfo})
    two = make_app(fake, db=db)
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


def test_the_extension_keeps_no_application(make_app: MakeApp, fake: FakeServer) -> None:
    db = DBPool()
    app = make_app(fake, db=db)
    assert app not in vars(db).values()
    with pytest.raises(RuntimeError, match="application context"):
        _ = db.pool


def test_a_second_registration_is_an_error(app: Flask) -> None:
    with pytest.raises(RuntimeError, match="already"):
        DBPool().init_app(app)


def test_a_blueprint_without_the_extension_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="init_app"):
        Flask("app").register_blueprint(create_blueprint())


def test_the_error_without_the_extension_names_init_app() -> None:
    db = DBPool()
    with Flask("bare").app_context(), pytest.raises(RuntimeError, match=r"init_app.*'bare'"):
        _ = db.pool


def test_wrong_configuration_is_an_error_at_once(make_app: MakeApp, fake: FakeServer) -> None:
    with pytest.raises(ConfigError, match="DBPOOL_TIMEOUT"):
        make_app(fake, DBPOOL_TIMEOUT="soon")
    with pytest.raises(ConfigError, match="'reports'"):
        make_app(fake, DBPOOL_REQUIRED="default,reports")


def test_listeners_get_the_events_of_all_pools(make_app: MakeApp, fake: FakeServer) -> None:
    received: list[Any] = []
    app = make_app(fake, db=DBPool(listeners=[received.append]))
    with app.app_context():
        app.extensions["dbpool"].databases.default.fetch_value("select 1")
    until(lambda: any(isinstance(event, Connected) for event in received))


def test_a_connection_held_at_the_end_of_a_request_is_returned_and_reported(
    make_app: MakeApp, dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    db = DBPool()
    app = make_app(dsn, db=db)
    leaked = []

    @app.get("/forgetful")
    def forgetful() -> str:
        conn = db.pool.getconn()
        conn.execute("create table t (id int)")
        leaked.append(conn)
        return "done"

    with caplog.at_level(logging.ERROR, logger="dbpool"):
        assert app.test_client().get("/forgetful").status_code == 200
    pool = app.extensions["dbpool"].databases.default
    assert pool.stats().active == 0
    assert leaked[0].closed, "the next holder would share it with the code that forgot it"
    assert "forgetful" in caplog.text
    assert "endpoint forgetful" in caplog.text
    assert pool.fetch_value("select to_regclass('t')") is None, "it was committed"


def test_code_that_forgets_at_every_request_is_logged_once(
    make_app: MakeApp, fake: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    db = DBPool()
    app = make_app(fake, db=db)
    leaked = []

    @app.get("/forgetful")
    def forgetful() -> str:
        leaked.append(db.pool.getconn())
        return "done"

    @app.get("/also")
    def also() -> str:
        leaked.append(db.pool.getconn())
        return "done"

    for path in ["/forgetful"] * 5 + ["/also"] * 5:
        app.test_client().get(path)
    lines = [each.getMessage() for each in caplog.records if "still held" in each.getMessage()]
    assert [re.findall(r"endpoint (\w+)", line) for line in lines] == [["forgetful"], ["also"]]
    counters = app.extensions["dbpool"].databases.default.stats().counters
    assert counters.leaks == 10, "all are counted"


def test_what_a_task_forgets_is_logged_without_an_endpoint(
    make_app: MakeApp, fake: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    db = DBPool()
    with make_app(fake, db=db).app_context():
        forgotten = db.pool.getconn()
    assert forgotten.closed
    (message,) = caplog.messages
    assert message.endswith(
        " was still held when the application context ended: it was rolled back and closed"
    )


def test_a_connection_held_around_a_request_stays_out(make_app: MakeApp, fake: FakeServer) -> None:
    app = make_app(fake)
    pool = app.extensions["dbpool"].databases.default
    with pool.connection() as conn:
        app.test_client().get("/db/health/live")
        assert pool.stats().active == 1
        assert conn.execute("select 1").fetchone() == (1,)


def test_the_applications_own_teardown_comes_first(
    make_app: MakeApp, fake: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    db = DBPool()
    app = Flask("app")

    @app.teardown_appcontext
    def return_conn(error: BaseException | None) -> None:
        if "conn" in g:
            db.pool.putconn(g.pop("conn"))

    app = make_app(fake, db=db, app=app)

    @app.get("/")
    def view() -> str:
        g.conn = db.pool.getconn()
        return "done"

    assert app.test_client().get("/").status_code == 200
    assert app.extensions["dbpool"].databases.default.stats().active == 0
    assert "still held" not in caplog.text


@pytest.mark.parametrize("hook", ["teardown_request", "teardown_appcontext"])
def test_a_request_ends_although_the_applications_teardown_fails(
    make_app: MakeApp, fake: FakeServer, hook: str
) -> None:
    db = DBPool()
    app = make_app(fake, db=db)
    leaked: list[Any] = []

    @app.get("/")
    def view() -> str:
        leaked.append(db.pool.getconn())
        return "done"

    def fail(error: BaseException | None) -> None:
        raise ValueError("a bug")

    getattr(app, hook)(fail)
    with pytest.raises(ValueError, match="a bug"):
        app.test_client().get("/")
    own = app.extensions["dbpool"]
    assert own.databases.default.stats().active == 0
    assert own.processes.collect("process").processes[0].busy == 0
    assert holders.current.thread.endpoint is None


def test_a_copy_of_a_requests_context_does_not_end_the_request(
    make_app: MakeApp, fake: FakeServer
) -> None:
    db = DBPool()
    app = make_app(fake, db=db)
    own = app.extensions["dbpool"]

    def busy() -> int | None:
        return int(own.processes.collect("process").processes[0].busy)

    @app.get("/")
    def view() -> Response:
        task = copy_current_request_context(lambda: db.pool.fetch_value("select 1"))
        found = Task(task).result()
        with db.pool.connection():
            return jsonify(found, busy(), [holder.endpoint for holder in db.pool.holders()])

    assert app.test_client().get("/").json == [1, 1, ["view"]]
    assert busy() == 0
    assert holders.current.thread.endpoint is None


def test_an_exception_in_a_view_leaves_nothing_held(make_app: MakeApp, dsn: str) -> None:
    db = DBPool()
    app = make_app(dsn, db=db)
    app.testing = False
    app.logger.disabled = True

    @app.get("/")
    def view() -> str:
        conn = db.pool.getconn()
        conn.execute("create table t (id int)")
        raise ValueError("a bug")

    assert app.test_client().get("/").status_code == 500
    pool = app.extensions["dbpool"].databases.default
    assert pool.stats().active == 0
    assert pool.fetch_value("select to_regclass('t')") is None


def test_a_stream_keeps_its_connection_until_it_ends(
    make_app: MakeApp, fake: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    db = DBPool()
    app = make_app(fake, db=db)
    fake.answers["select generate_series(1, 3)"] = [(1,), (2,), (3,)]
    own = app.extensions["dbpool"]

    def busy() -> int | None:
        return int(own.processes.collect("process").processes[0].busy)

    @app.get("/")
    def view() -> Response:
        def rows() -> Iterator[str]:
            with db.pool.connection() as conn:
                for (number,) in conn.execute("select generate_series(1, 3)"):
                    yield f"{number}\n"
                yield f"{[holder.endpoint for holder in db.pool.holders()]} {busy()}"

        return Response(stream_with_context(rows()))

    assert app.test_client().get("/").text == "1\n2\n3\n['view'] 1"
    assert busy() == 0
    assert holders.current.thread.endpoint is None
    assert app.extensions["dbpool"].databases.default.stats().active == 0
    assert "still held" not in caplog.text


def test_another_threads_connection_is_not_taken_back(make_app: MakeApp, fake: FakeServer) -> None:
    db = DBPool()
    app = make_app(fake, db=db)
    pool = app.extensions["dbpool"].databases.default
    taken, release = threading.Event(), threading.Event()
    others: list[Task] = []

    def work() -> object:
        with pool.connection() as conn:
            taken.set()
            release.wait(10)
            return conn.execute("select 1").fetchone()

    @app.get("/")
    def view() -> str:
        others.append(Task(work))
        taken.wait(10)
        return "started"

    assert app.test_client().get("/").text == "started"
    assert pool.stats().active == 1
    release.set()
    assert others[0].result() == (1,)


def test_contexts_may_nest(make_app: MakeApp, fake: FakeServer) -> None:
    db = DBPool()
    app = make_app(fake, db=db)

    @app.get("/outer")
    def outer() -> Response:
        with db.pool.connection() as conn:
            with app.app_context():
                forgotten = db.pool.getconn()
            assert len(db.pool.holders()) == 1, f"only {forgotten} came back"
            inner = app.test_client().get("/inner").text
            app.test_client().get("/nowhere")
            assert conn.execute("select 1").fetchone() == (1,)
            return jsonify(inner, [holder.endpoint for holder in db.pool.holders()])

    @app.get("/inner")
    def inner() -> str:
        return str(db.pool.fetch_value("select 1"))

    assert app.test_client().get("/outer").json == ["1", ["outer"]]
    assert holders.current.thread.endpoint is None


def test_a_dotenv_is_read_but_not_under_test(
    fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text(f"DATABASE_URL='{fake.conninfo}'\nDBPOOL_MAX_SIZE=3\n")
    monkeypatch.chdir(tmp_path)
    for testing, size in ((False, 3), (True, 10)):
        app, db = Flask("app"), DBPool()
        app.testing = testing
        db.init_app(app)
        with app.app_context():
            assert db.pool.max_size == size


def test_init_app_on_a_serving_application_fails_and_changes_nothing() -> None:
    app = Flask("app")
    app.test_client().get("/")
    with pytest.raises(AssertionError, match="before_request"):
        DBPool().init_app(app)
    assert "dbpool" not in app.extensions


def test_an_unknown_database_is_named_in_the_error(make_app: MakeApp, fake: FakeServer) -> None:
    db = DBPool()
    with (
        make_app(fake, db=db).app_context(),
        pytest.raises(KeyError, match="no database 'replicca', only default"),
    ):
        db["replicca"]


def test_patching_by_gevent_after_the_import_logs_one_warning() -> None:
    pytest.importorskip("gevent")
    patch = "from gevent import monkey; monkey.patch_all()"
    imports = "from flask import Flask; from dbpool.flask import DBPool, create_blueprint"
    serve = """
app = Flask("app")
app.config.update(DATABASE_URL="host=127.0.0.1 port=1 user=u dbname=d")
DBPool(app)
app.register_blueprint(create_blueprint(), url_prefix="/db")
for _ in range(3):
    assert app.test_client().get("/db/health/live").status_code == 200
"""
    for lines, times in (((imports, patch), 1), ((patch, imports), 0), ((imports,), 0)):
        done = python("-c", "\n".join([*lines, serve]), check=True)
        assert done.stderr.count("before gevent patched") == times, done.stderr


def test_a_holder_carries_its_endpoint(make_app: MakeApp, fake: FakeServer) -> None:
    db = DBPool()
    app = make_app(fake, db=db)

    @app.get("/look")
    def look() -> Response:
        with db.pool.connection():
            return jsonify([holder.endpoint for holder in db.pool.holders()])

    assert app.test_client().get("/look").json == ["look"]


def test_functions_that_were_registered_before_know_the_endpoint_too(
    make_app: MakeApp, fake: FakeServer
) -> None:
    db, app = DBPool(), Flask("app")

    @app.before_request
    def look() -> Response:
        with db.pool.connection():
            return jsonify([holder.endpoint for holder in db.pool.holders()])

    app = make_app(fake, db=db, app=app)
    app.add_url_rule("/", "index", lambda: "not reached")
    assert app.test_client().get("/").json == ["index"]
    assert holders.current.thread.endpoint is None


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


def test_a_busy_pool_is_a_503(make_app: MakeApp, fake: FakeServer) -> None:
    db = DBPool()
    app = make_app(fake, db=db, DBPOOL_MAX_SIZE=1, DBPOOL_TIMEOUT="20ms")
    app.add_url_rule("/", view_func=lambda: db.pool.fetch_value("select 1"))
    pool = app.extensions["dbpool"].databases.default
    pool.wait() if not pool.closed else pool.open(wait=True)
    with pool.connection():
        answer = app.test_client().get("/")
    assert answer.status_code == 503
    assert answer.json == {"error": "the service is busy"}


def test_an_uncertain_commit_is_a_500_without_retry_after(
    make_app: MakeApp, fake: FakeServer
) -> None:
    app = make_app(fake, db=DBPool())

    @app.get("/")
    def uncertain() -> str:
        raise CommitUncertain("who knows")

    answer = app.test_client().get("/")
    assert answer.status_code == 500
    assert answer.json == {"error": "the outcome of the request is unknown"}
    assert "Retry-After" not in answer.headers


def test_error_handlers_can_be_turned_off(make_app: MakeApp) -> None:
    db = DBPool()
    app = make_app(NOWHERE, db=db, DBPOOL_OUTAGE_GRACE="50ms", DBPOOL_ERROR_HANDLERS=False)
    app.testing = False
    app.config["PROPAGATE_EXCEPTIONS"] = False
    app.add_url_rule("/", view_func=lambda: db.pool.fetch_value("select 1"))
    app.logger.disabled = True
    assert app.test_client().get("/").status_code == 500


@pytest.mark.parametrize("error", [PoolError, PoolTimeout])
@pytest.mark.parametrize("is_first", [True, False])
def test_the_applications_own_handlers_stay(
    make_app: MakeApp, error: type[Exception], is_first: bool
) -> None:
    db = DBPool()
    app = Flask("app")
    if is_first:
        app.register_error_handler(error, lambda ex: (f"ours: {type(ex).__name__}", 504))
    app = make_app(NOWHERE, db=db, app=app, DBPOOL_OUTAGE_GRACE="50ms")
    if not is_first:
        app.register_error_handler(error, lambda ex: (f"ours: {type(ex).__name__}", 504))
    app.add_url_rule("/", view_func=lambda: db.pool.fetch_value("select 1"))
    answer = app.test_client().get("/")
    assert (answer.status_code, answer.text) == (504, "ours: DatabaseUnavailable")


def test_exhaustion_is_explained_in_the_log_not_to_the_client(
    make_app: MakeApp, fake: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    db = DBPool()
    app = make_app(fake, db=db, DBPOOL_MAX_SIZE=1, DBPOOL_TIMEOUT="50ms")
    app.add_url_rule("/", "shop.index", lambda: db.pool.fetch_value("select 1"))
    pool = app.extensions["dbpool"].databases.default
    pool.open(wait=True)
    with pool.connection():
        answer = app.test_client().get("/")
    assert (answer.status_code, answer.headers["Cache-Control"]) == (503, "no-store")
    assert "test_flask.py" not in answer.text
    assert re.search(r"no connection within 0\.\d+ s: 1 of 1 checked out", caplog.text)
    assert "shop.index answers" not in caplog.text, "it logged a line for each request"
    assert "test_flask.py" in caplog.text, "the log does not name the holder"


def test_a_closed_pool_is_a_503(
    make_app: MakeApp, fake: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    db = DBPool()
    app = make_app(fake, db=db)
    app.add_url_rule("/", view_func=lambda: db.pool.fetch_value("select 1"))
    app.extensions["dbpool"].databases.close()
    for _ in range(5):
        answer = app.test_client().get("/")
        assert (answer.status_code, answer.headers["Retry-After"] in {"1", "2", "3"}) == (503, True)
    assert caplog.text.count("PoolClosed") == 1, "more than one line in a minute"


# The blueprint


def test_liveness_touches_no_database(make_app: MakeApp) -> None:
    app = make_app(NOWHERE)
    answer = app.test_client().get("/db/health/live")
    assert (answer.status_code, answer.json) == (200, {"status": "up"})
    assert app.extensions["dbpool"].databases.default.closed


def test_readiness_opens_the_pool_and_is_up(client: FlaskClient) -> None:
    answer = client.get("/db/health/ready")
    assert (answer.status_code, answer.json) == (
        200,
        {"status": "up", "databases": {"default": "up"}},
    )
    assert answer.headers["Cache-Control"] == "no-store"


def test_readiness_is_down_with_retry_after(make_app: MakeApp) -> None:
    client = make_app(NOWHERE, DBPOOL_OUTAGE_GRACE="100ms").test_client()
    first = client.get("/db/health/ready")
    assert first.status_code == 503
    until(lambda: client.get("/db/health/ready").json == {
        "status": "down", "databases": {"default": "down"}
    })  # fmt: skip
    answer = client.get("/db/health/ready")
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1


def test_an_optional_database_only_degrades(make_app: MakeApp, fake: FakeServer) -> None:
    app = make_app(fake, DBPOOL_DATABASES={"replica": NOWHERE}, DBPOOL_OUTAGE_GRACE="50ms")
    client = app.test_client()

    def ask() -> Any:
        return client.get("/db/health/ready")

    until(lambda: ask().json["databases"] == {"default": "up", "replica": "down"})
    assert ask().status_code == 200
    assert ask().json["status"] == "degraded"


def test_without_a_token_health_shows_only_status_words(client: FlaskClient) -> None:
    answer = client.get("/db/health")
    assert answer.status_code == 200
    assert answer.json == {"status": "up", "databases": {"default": "up"}}


def test_with_a_token_health_shows_details(make_app: MakeApp, dsn: str) -> None:
    client = make_app(dsn, DBPOOL_TOKEN=TOKEN).test_client()
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


def test_without_a_token_details_are_closed(make_app: MakeApp, fake: FakeServer) -> None:
    client = make_app(fake).test_client()
    assert client.get("/db/stats", headers=bearer("")).status_code == 403
    assert client.get("/db/stats").status_code == 403


def test_details_may_be_opened_to_all(make_app: MakeApp, fake: FakeServer) -> None:
    assert make_app(fake, DBPOOL_DETAILS="always").test_client().get("/db/stats").status_code == 200


def test_authorize_must_be_callable() -> None:
    with pytest.raises(TypeError, match="authorize must be callable, not 'admin'"):
        create_blueprint(authorize="admin")  # type: ignore[arg-type]


@pytest.mark.parametrize(("answer", "status"), [(True, 200), (False, 403)])
def test_authorize_decides_who_sees_details(
    make_app: MakeApp, fake: FakeServer, answer: bool, status: int
) -> None:
    client = make_app(fake, authorize=lambda: answer, DBPOOL_TOKEN=TOKEN).test_client()
    assert client.get("/db/stats", headers=bearer()).status_code == status


def test_authorize_may_return_a_response(make_app: MakeApp, fake: FakeServer) -> None:
    client = make_app(fake, authorize=lambda: redirect("/login")).test_client()
    assert client.get("/db/stats").headers["Location"] == "/login"
    assert client.get("/db/health").json == {"status": "up", "databases": {"default": "up"}}


def test_an_authorize_that_returns_a_tuple_denies_access(
    make_app: MakeApp, fake: FakeServer
) -> None:
    client = make_app(fake, authorize=lambda: ("go away", 418)).test_client()
    assert client.get("/db/stats").status_code == 418


def test_health_shows_status_words_if_authorize_aborts_or_fails(
    make_app: MakeApp, fake: FakeServer, log: pytest.LogCaptureFixture
) -> None:
    app = make_app(fake, authorize=lambda: abort(418))
    assert app.test_client().get("/db/stats").status_code == 418
    assert app.test_client().get("/db/health").json == {
        "status": "up", "databases": {"default": "up"}
    }  # fmt: skip
    assert log.messages == [], "that is its answer to a probe"
    failing = make_app(fake, authorize=lambda: 1 / 0)
    for _ in range(5):
        assert failing.test_client().get("/db/health").status_code == 200
    assert log.messages == ["health shows status words only: ZeroDivisionError"]
    with pytest.raises(ZeroDivisionError):
        failing.test_client().get("/db/stats")


@pytest.mark.parametrize("content", ["", "\n"])
def test_an_empty_token_opens_nothing(
    make_app: MakeApp, fake: FakeServer, tmp_path: Path, content: str
) -> None:
    (tmp_path / "token").write_text(content)
    client = make_app(fake, DBPOOL_TOKEN_FILE=str(tmp_path / "token")).test_client()
    for headers in ({}, basic(""), bearer("")):
        assert client.get("/db/stats", headers=headers).status_code == 403


def test_a_token_may_be_in_a_file(make_app: MakeApp, fake: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a key to the door\n")
    client = make_app(fake, DBPOOL_TOKEN_FILE=str(tmp_path / "token")).test_client()
    assert client.get("/db/stats", headers=basic("a key to the door")).status_code == 200
    assert client.get("/db/stats", headers=basic("a kéy to the door")).status_code == 401


def test_checks_of_the_application_are_part_of_health(make_app: MakeApp, fake: FakeServer) -> None:
    db = DBPool()
    app = make_app(fake, db=db, DBPOOL_TOKEN=TOKEN)
    client = app.test_client()
    client.get("/db/health/ready")

    def check() -> None:
        raise ConnectionError("redis://:hunter2@cache")

    with app.app_context():
        db.health.add("redis", check, required=True)
    for path in ("/db/health", "/db/health/ready"):
        answer = client.get(path)
        assert answer.status_code == 503
        assert answer.json == {
            "status": "down", "databases": {"default": "up"}, "checks": {"redis": "down"}
        }  # fmt: skip
    answer = client.get("/db/health", headers=bearer())
    assert (answer.status_code, answer.headers["Retry-After"] in {"1", "2", "3"}) == (503, True)
    assert answer.get_json()["checks"]["redis"]["error"] == "ConnectionError"
    assert "hunter2" not in answer.text


@pytest.mark.parametrize("path", ["live", "ready"])
def test_probes_may_use_head(client: FlaskClient, path: str) -> None:
    answer = client.head(f"/db/health/{path}")
    assert (answer.status_code, answer.data) == (200, b"")
    assert answer.headers["Cache-Control"] == "no-store"
    allowed = client.options(f"/db/health/{path}").headers["Allow"]
    assert set(allowed.split(", ")) == {"GET", "HEAD", "OPTIONS"}


def test_metrics_without_the_package_name_the_extra(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "dbpool.prometheus", raising=False)
    answer = client.get("/db/metrics", headers=bearer())
    assert answer.status_code == 501
    assert "the package prometheus-client" in answer.get_json()["error"]
    assert "dbpool" not in answer.get_json()["error"], "anybody may register that name"


def test_a_blueprint_may_be_mounted_twice_or_inside_another(
    make_app: MakeApp, fake: FakeServer
) -> None:
    app = make_app(fake, DBPOOL_DETAILS="always")
    admin = Blueprint("admin", __name__, url_prefix="/admin")
    admin.register_blueprint(create_blueprint("pools"), url_prefix="/pools")
    app.register_blueprint(admin)
    client = app.test_client()
    page = client.get("/admin/pools/").text
    assert 'data-stats="/admin/pools/stats"' in page
    assert 'src="/admin/pools/static/live.js"' in page
    assert client.get("/db/stats").status_code == client.get("/admin/pools/stats").status_code


@pytest.mark.parametrize("prefix", [None, "/", "/static"])
def test_the_page_finds_its_files_under_any_prefix(
    make_app: MakeApp, fake: FakeServer, prefix: str | None
) -> None:
    app = make_app(fake, DBPOOL_DETAILS="always")
    app.register_blueprint(create_blueprint("second"), url_prefix=prefix)
    client = app.test_client()
    page = client.get(f"{prefix or ''}/").text
    for path in re.findall(r'(?:src|href)="([^"]+)"', page):
        with client.get(path, follow_redirects=True) as answer:
            assert answer.status_code == 200, path


def test_what_an_application_adds_to_its_pages_does_not_reach_the_blueprints(
    make_app: MakeApp, fake: FakeServer
) -> None:
    app = Flask("app")
    app.jinja_options = {"variable_start_string": "[[", "variable_end_string": "]]"}
    app = make_app(fake, app=app, DBPOOL_TOKEN=TOKEN)

    @app.context_processor
    def with_user() -> dict[str, Any]:
        raise PoolError("the user is in the database")

    client = app.test_client()
    page = client.get("/db/", headers=bearer() | {"Accept": "text/html"})
    assert (page.status_code, 'data-stats="/db/stats"' in page.text) == (200, True)
    form = client.get("/db/sign-in")
    assert (form.status_code, 'action="/db/sign-in"' in form.text) == (200, True)


def test_parameters_that_are_given_twice_add_up_or_are_an_error(
    make_app: MakeApp, fake: FakeServer
) -> None:
    client = make_app(fake, DBPOOL_DETAILS="always").test_client()
    both: Any = client.get("/db/stats?include=history&include=journal,%20workers").json
    assert {"history", "journal", "workers"} <= both.keys()
    for query in ("scope=all&scope=process", "limit=1&limit=2", "since=1&since=x"):
        for path in ("stats", "metrics"):
            answer = client.get(f"/db/{path}?{query}")
            assert (answer.status_code, "given once" in answer.text) == (400, True)


def test_stats_shows_the_pools_state_and_counters(app: Flask, client: FlaskClient) -> None:
    pool = app.extensions["dbpool"].databases.default
    with pool.connection():
        stats = client.get("/db/stats", headers=bearer()).get_json()
    assert stats["schema"] == 2
    assert stats["scope"] == "process"
    assert len(stats["processes"]) == 1
    found = stats["pools"]["default"]
    assert found["active"] == 1
    assert found["active"] + found["idle"] + found["connecting"] == found["size"]
    assert found["counters"]["checkouts"] == 1
    assert found["wait"]["count"] == 1
    assert found["breaker"] == {
        "state": "closed", "since": None, "last_error": None, "retry_after": None, "kind": None
    }  # fmt: skip
    (holder,) = found["holders"]
    assert "test_stats_shows_the_pools_state_and_counters" in holder["where"]


def test_an_unknown_scope_is_rejected(client: FlaskClient) -> None:
    assert client.get("/db/stats?scope=process", headers=bearer()).status_code == 200
    assert client.get("/db/stats?scope=nonsense", headers=bearer()).status_code == 400


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", "text/plain; version=0.0.4"),
        ("*/*", "text/plain; version=0.0.4"),
        ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text"),
        ("text/plain;version=0.0.4;q=0.5,application/openmetrics-text", "application/openmetrics"),
        ("application/openmetrics-text;q=0.2, text/plain;version=0.0.4;q=0.9", "text/plain"),
        ("application/openmetrics-text;q=0,text/plain;q=0.1", "text/plain"),
        ("application/openmetrics-text;q=0.0", "text/plain"),
        (PROMETHEUS_3, "application/openmetrics-text; version=1.0.0"),
    ],
)
def test_the_format_of_metrics_is_negotiated(client: FlaskClient, accept: str, wanted: str) -> None:
    answer = client.get("/db/metrics", headers=bearer() | {"Accept": accept})
    assert answer.headers["Content-Type"].startswith(wanted)
    assert "db_client_connections{" in answer.text
    assert answer.text.endswith("# EOF\n") == wanted.startswith("application")


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
def test_other_methods_are_rejected(client: FlaskClient, method: str) -> None:
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


class UncommittedConnection(psycopg.Connection[Any]):
    """Rolls back after a test, as the README shows."""

    def commit(self) -> None:
        self.execute("savepoint kept")

    def rollback(self) -> None:
        self.execute("rollback to savepoint kept")


def test_a_connection_class_can_roll_back_an_applications_tests(
    make_app: MakeApp, dsn: str
) -> None:
    with Pool(dsn) as plain:
        plain.execute("create table t (id int)")
        app = make_app(dsn, DBPOOL_MAX_SIZE=1)
        pool = app.extensions["dbpool"].databases.default
        pool.connection_class = UncommittedConnection
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


def test_run_works_with_a_connection_class_that_never_commits(dsn: str) -> None:
    with Pool(dsn) as plain, Pool(dsn, connection_class=UncommittedConnection, max_size=1) as pool:
        plain.execute("create table t (id int)")
        pool.run(lambda conn: conn.execute("insert into t values (1)"))
        with pytest.raises(ZeroDivisionError):
            pool.run(lambda conn: (conn.execute("insert into t values (2)"), 1 / 0))
        assert pool.fetch_all("select id from t") == [(1,)]
        assert plain.fetch_all("select id from t") == []


_NO_DESCRIPTORS = """
import json, os, resource, sys
from flask import Flask
from dbpool.flask import DBPool, create_blueprint

app = Flask("app")
app.config.update(
    DATABASE_URL="host=127.0.0.1 port=1 user=u dbname=d",
    DBPOOL_DETAILS="always",
    DBPOOL_STATS_DIR=sys.argv[1],
    PROPAGATE_EXCEPTIONS=True,
    DBPOOL_OUTAGE_GRACE="0s",
)
DBPool().init_app(app)
app.register_blueprint(create_blueprint(), url_prefix="/db")
client = app.test_client()
client.get("/nothing")  # it opens files of its own
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def ask(path, expected):
    for _ in range(50):  # a connect that ends meanwhile leaves its descriptor
        try:
            while True:
                os.open("/dev/null", os.O_RDONLY)
        except OSError:
            status = client.get(path).status_code
        if status == expected:
            break
    return status


print({path: ask(path, status) for path, status in json.loads(sys.argv[2]).items()}, flush=True)
os._exit(0)
"""


def test_the_views_answer_without_free_file_descriptors(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    expected = {
        "/db/": 200,
        "/db/metrics": 200,
        "/db/stats": 200,
        "/db/health/live": 200,
        "/db/health/ready": 503,
        "/db/health": 503,
        "/db/static/live.js": 503,
    }
    done = python("-c", _NO_DESCRIPTORS, str(tmp_path), json.dumps(expected))
    assert done.stdout == f"{expected}\n", done.stderr
