"""A pool's errors are answered as documented, also if a library has wrapped them."""

from __future__ import annotations

import logging
from typing import Any

import psycopg
import pytest
from flask import Blueprint, Flask, Request, Response, abort, got_request_exception, request
from flask.sessions import SecureCookieSession, SessionInterface
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import NotFound

from dbpool import (
    CommitUncertain,
    DatabaseMisconfigured,
    DatabaseUnavailable,
    PoolClosed,
    PoolError,
    PoolExhausted,
    TooManyRequests,
)

from .conftest import MakeApp

NOWHERE = "host=127.0.0.1 port=1 user=u dbname=d"


class Wrapper(Exception):
    """A library's own error."""


class Peewee(Exception):
    def __init__(self, orig: Exception) -> None:
        self.orig = orig


class Pony(Exception):
    def __init__(self, original: Exception) -> None:
        self.original_exc = original


def chained(error: Exception) -> None:
    raise Wrapper("no connection") from error


def wrapped_twice(error: Exception) -> None:
    try:
        chained(error)
    except Wrapper as ex:
        raise LookupError("wrapped again") from ex


def as_attribute(error: Exception) -> None:
    raise Peewee(error)


def as_another_attribute(error: Exception) -> None:
    raise Pony(error)


def in_a_group(error: Exception) -> None:
    raise ExceptionGroup("tasks failed", [error, Peewee(error)])


WRAPPERS = [chained, wrapped_twice, as_attribute, as_another_attribute, in_a_group]


@pytest.fixture
def app(make_app: MakeApp) -> Flask:
    return make_app(NOWHERE)


def fail(app: Flask, raising: Any, error: BaseException, path: str = "/") -> Any:
    app.add_url_rule(path, path, lambda: raising(error))
    return app.test_client().get(path)


@pytest.mark.parametrize("raising", WRAPPERS)
@pytest.mark.parametrize(
    "error",
    [PoolExhausted, DatabaseUnavailable, DatabaseMisconfigured, TooManyRequests, PoolClosed],
)
def test_a_wrapped_pool_error_is_a_503(app: Flask, raising: Any, error: type[Exception]) -> None:
    answer = fail(app, raising, error("the host is db1.internal"))
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert "db1" not in answer.text


@pytest.mark.parametrize("raising", WRAPPERS)
def test_a_wrapped_uncertain_commit_is_a_500_without_retry_after(
    app: Flask, raising: Any, caplog: pytest.LogCaptureFixture
) -> None:
    answer = fail(app, raising, CommitUncertain("who knows"))
    assert answer.status_code == 500
    assert answer.get_json() == {"error": "the outcome of the request is unknown"}
    assert "Retry-After" not in answer.headers
    assert "answers 500: CommitUncertain" in caplog.text


def while_handling(error: Exception) -> None:
    try:
        raise error
    except PoolError:
        raise ZeroDivisionError  # noqa: B904  # a bug in a handler, no wrapper


def with_another_error(error: Exception) -> None:
    raise ExceptionGroup("tasks failed", [error, ZeroDivisionError()])


def in_a_cycle(error: Exception) -> None:
    one, two = Peewee(error), Wrapper()
    one.orig, two.__cause__ = two, one
    raise one


@pytest.mark.parametrize("raising", [while_handling, with_another_error, in_a_cycle])
def test_an_unrelated_error_beside_a_pool_error_is_a_500(app: Flask, raising: Any) -> None:
    app.config["PROPAGATE_EXCEPTIONS"] = False
    app.logger.disabled = True
    seen: list[Exception] = []

    def record_error(sender: Flask, exception: Exception, **extra: Any) -> None:
        seen.append(exception)

    with got_request_exception.connected_to(record_error, app):
        answer = fail(app, raising, PoolExhausted("all are out"))
    assert (answer.status_code, len(seen)) == (500, 1), "as for any other error"


def test_an_applications_own_error_handler_wins(app: Flask) -> None:
    shop = Blueprint("shop", __name__)

    @shop.errorhandler(LookupError)
    def in_the_shop(ex: LookupError) -> ResponseReturnValue:
        return "closed", 418

    @shop.get("/shop")
    def view() -> str:
        wrapped_twice(PoolExhausted("all are out"))
        return "not reached"

    app.register_blueprint(shop)
    app.register_error_handler(Wrapper, lambda ex: ("ours", 402))
    assert fail(app, chained, PoolExhausted("all are out")).status_code == 402
    assert app.test_client().get("/shop").status_code == 418


def test_an_applications_handler_for_pool_errors_gets_wrapped_ones(
    make_app: MakeApp,
) -> None:
    app = Flask("app")
    app.register_error_handler(PoolError, lambda ex: (f"ours: {type(ex).__name__}", 504))
    app = make_app(NOWHERE, app=app)
    assert fail(app, chained, PoolExhausted("all are out")).text == "ours: PoolExhausted"


def test_an_applications_catch_all_handler_wins(make_app: MakeApp) -> None:
    app = Flask("app")
    app.register_error_handler(Exception, lambda ex: ("ours", 500))
    app = make_app(NOWHERE, app=app)
    assert fail(app, chained, PoolExhausted("all are out")).text == "ours"


@pytest.mark.parametrize("trap", [True, False])
@pytest.mark.parametrize("propagate", [True, False])
def test_http_exceptions_and_other_errors_are_as_without_dbpool(
    make_app: MakeApp, trap: bool, propagate: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def ask(app: Flask, path: str) -> object:
        try:
            answer = app.test_client().get(path)
        except Exception as ex:  # noqa: BLE001  # compared by the test
            return type(ex)
        return answer.status_code, answer.text, sorted(answer.headers)

    def add_routes(app: Flask) -> Flask:
        app.config.update(TESTING=False, TRAP_HTTP_EXCEPTIONS=trap, PROPAGATE_EXCEPTIONS=propagate)
        app.add_url_rule("/abort", "abort", lambda: abort(409, "a conflict"))
        app.add_url_rule("/bug", "bug", lambda: str(1 / 0))
        app.add_url_rule("/key", "key", lambda: str({"a": 1}["b"]))
        app.add_url_rule("/cause", "cause", missing)
        return app

    def missing() -> str:
        raise NotFound("no such note") from PoolExhausted("all are out")

    without_dbpool, with_dbpool = add_routes(Flask("app")), add_routes(make_app(NOWHERE))
    for path in ("/abort", "/bug", "/key", "/cause", "/nowhere"):
        assert ask(with_dbpool, path) == ask(without_dbpool, path)


def test_with_error_handlers_off_wrapped_errors_are_raised(make_app: MakeApp) -> None:
    app = make_app(NOWHERE, DBPOOL_ERROR_HANDLERS=False)
    with pytest.raises(Wrapper):
        fail(app, chained, PoolExhausted("all are out"))


@pytest.mark.parametrize("kind", ["NullPool", "QueuePool"])
def test_through_sqlalchemy_an_outage_is_a_503(make_app: MakeApp, kind: str) -> None:
    sqlalchemy = pytest.importorskip("sqlalchemy")
    app = make_app(NOWHERE, DBPOOL_OUTAGE_GRACE="50ms")
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://",
        creator=app.extensions["dbpool"].databases.default.getconn,
        poolclass=getattr(sqlalchemy, kind),
    )

    @app.get("/")
    def view() -> str:
        with engine.connect() as conn:
            return str(conn.execute(sqlalchemy.text("select 1")).scalar())

    answer = app.test_client().get("/")
    assert (answer.status_code, answer.get_json()["error"]) == (503, "the database is unavailable")
    assert int(answer.headers["Retry-After"]) >= 1


def test_through_sqlalchemy_a_busy_pool_is_a_503(make_app: MakeApp, dsn: str) -> None:
    sqlalchemy = pytest.importorskip("sqlalchemy")
    app = make_app(dsn, DBPOOL_MAX_SIZE=1, DBPOOL_TIMEOUT="50ms")
    pool = app.extensions["dbpool"].databases.default
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://", creator=pool.getconn, poolclass=sqlalchemy.NullPool
    )

    @app.get("/")
    def view() -> str:
        with engine.connect() as conn:
            return str(conn.execute(sqlalchemy.text("select 1")).scalar())

    with pool.connection(timeout=10):  # a connect may take longer than 50 ms
        answer = app.test_client().get("/")
    assert (answer.status_code, answer.get_json()["error"]) == (503, "the service is busy")


def test_an_uncertain_commit_is_logged_with_its_endpoint(
    app: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    def uncertain(error: Exception) -> None:
        raise error

    with caplog.at_level(logging.WARNING, logger="dbpool"):
        assert fail(app, uncertain, CommitUncertain("who knows"), "/pay").status_code == 500
    assert "endpoint /pay answers 500" in caplog.text


def test_a_failed_statement_is_not_a_503(app: Flask) -> None:
    with pytest.raises(Wrapper):
        fail(app, chained, psycopg.errors.UndefinedTable("no such table"))


class Sessions(SessionInterface):
    """Sessions that are kept in a database."""

    def open_session(self, app: Flask, request: Request) -> SecureCookieSession:
        self.ask(app, request, "/open")
        return SecureCookieSession()

    def save_session(self, app: Flask, session: Any, response: Any) -> None:
        self.ask(app, request, "/save")

    @staticmethod
    def ask(app: Flask, request: Request, path: str) -> None:
        if request.path == path:
            app.extensions["dbpool"].databases.default.fetch_value("select 1")


@pytest.mark.parametrize("path", ["/open", "/save", "/after", "/view"])
def test_an_outage_is_a_503_wherever_in_the_request_it_is_noticed(
    make_app: MakeApp, path: str
) -> None:
    app = make_app(NOWHERE, DBPOOL_OUTAGE_GRACE="50ms")
    app.testing, app.logger.disabled = False, True
    app.session_interface = Sessions()

    @app.get(path)
    def view() -> str:
        Sessions.ask(app, request, "/view")
        return "done"

    @app.after_request
    def ask(response: Response) -> Response:
        Sessions.ask(app, request, "/after")
        return response

    answer = app.test_client().get(path)
    assert (answer.status_code, answer.get_json()["error"]) == (503, "the database is unavailable")
    assert int(answer.headers["Retry-After"]) >= 1


def test_a_handler_that_fails_is_a_500(make_app: MakeApp) -> None:
    app = make_app(NOWHERE, DBPOOL_OUTAGE_GRACE="50ms")
    app.testing, app.logger.disabled = False, True
    pool = app.extensions["dbpool"].databases.default
    app.register_error_handler(PoolError, lambda ex: pool.fetch_value("select 1"))
    app.add_url_rule("/", "any", lambda: pool.fetch_value("select 1"))
    assert app.test_client().get("/").status_code == 500
