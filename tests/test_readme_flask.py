"""What the README shows for Flask, run as it stands there."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from flask import Flask

from dbpool import Pool
from dbpool.flask import DBPool

from .conftest import MakeApp
from .postgres import until

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

db = DBPool()


def create_app(config: dict[str, Any]) -> Flask:
    """An application as a user has one."""
    app = Flask("app")
    app.config.update(config)
    db.init_app(app)

    @app.post("/<int:number>")
    def insert(number: int) -> str:
        with db.pool.connection() as conn:
            conn.execute("insert into t values (%s)", [number])
            if number > 100:
                raise OverflowError(number)
        return "inserted"

    @app.get("/")
    def sum_up() -> str:
        return str(db.pool.fetch_value("select coalesce(sum(id), 0) from t"))

    return app


def run_block(containing: str, **names: Any) -> dict[str, Any]:
    """Run one of the README's blocks; its fixtures stay generator functions."""
    (block,) = [block for block in BLOCKS if containing in block]
    scope = {"pytest": SimpleNamespace(fixture=lambda function: function), **names}
    exec(block, scope)
    return scope


def test_each_test_may_have_a_database(dsn: str) -> None:
    postgresql = SimpleNamespace(info=SimpleNamespace(dsn=dsn))
    fixture = run_block("def app(postgresql)", create_app=create_app)["app"](postgresql)
    app: Flask = next(fixture)
    with app.app_context():
        db.pool.execute("create table t (id int)")
    assert app.test_client().post("/1").text == "inserted"
    assert app.test_client().get("/").text == "1"
    assert next(fixture, None) is None
    with app.app_context():
        assert db.pool.closed


@pytest.fixture
def undone(dsn: str, caplog: pytest.LogCaptureFixture) -> Iterator[Flask]:
    """The application of the README's second way of testing; in the end all is undone."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("create table t (id int)")
    scope = run_block("class Undone", create_app=create_app, TEST_DATABASE=dsn)
    with caplog.at_level(logging.DEBUG):
        fixture = scope["client"](caplog)
        client = next(fixture)
        yield client.application
        assert next(fixture, None) is None
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []
    with psycopg.connect(dsn, autocommit=True) as conn:
        until(lambda: conn.execute("select * from t").fetchall() == [])


def test_requests_of_a_test_share_a_transaction_that_is_undone(undone: Flask) -> None:
    client = undone.test_client()
    for number in (1, 2, 3):
        assert client.post(f"/{number}").text == "inserted"
    with pytest.raises(OverflowError):
        client.post("/101")
    assert client.get("/").text == "6"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"isolation": psycopg.IsolationLevel.SERIALIZABLE},
        {"isolation": psycopg.IsolationLevel.READ_COMMITTED, "attempts": 1},
        {"read_only": True},
        {"isolation": psycopg.IsolationLevel.REPEATABLE_READ, "read_only": True},
    ],
)
def test_transactions_with_an_isolation_level_may_be_tested_so(
    undone: Flask, options: dict[str, Any]
) -> None:
    with undone.app_context():
        db.pool.execute("insert into t values (1)")
        assert db.pool.run(lambda conn: conn.execute("select id from t").fetchall(), **options) == [
            (1,)
        ]
        with pytest.raises(ZeroDivisionError):
            db.pool.run(lambda conn: (conn.execute("delete from t"), 1 / 0), **options)
        db.pool.run(lambda conn: conn.execute("insert into t values (2)"), isolation=None)
        assert db.pool.fetch_all("select id from t order by id") == [(1,), (2,)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("autocommit", True),
        ("isolation_level", psycopg.IsolationLevel.SERIALIZABLE),
        ("read_only", True),
        ("deferrable", True),
    ],
)
def test_a_view_may_set_up_its_connection_in_such_a_test(
    undone: Flask, name: str, value: object
) -> None:
    with undone.app_context():
        with db.pool.connection() as conn:
            setattr(conn, name, value)
            conn.execute("insert into t values (1)")
        assert db.pool.fetch_value("select count(*) from t") == 1


def test_a_statement_that_fails_spoils_nothing_in_such_a_test(undone: Flask) -> None:
    with undone.app_context():
        db.pool.execute("insert into t values (1)")
        with pytest.raises(psycopg.errors.UndefinedTable):
            db.pool.execute("insert into nowhere values (1)")
        conn = db.pool.getconn()
        conn.execute("insert into t values (2)")
        db.pool.putconn(conn)  # not committed
        assert db.pool.fetch_all("select id from t") == [(1,)]


def test_a_streamed_response_takes_its_connection_as_shown(
    make_app: MakeApp, dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    db = DBPool()
    app = make_app(dsn, db=db)
    run_block("stream_with_context", app=app, db=db)
    pool: Pool[Any] = app.extensions["dbpool"].databases.default
    with app.test_client().get("/numbers") as answer:
        lines = answer.get_data(as_text=True).splitlines()
        assert (len(lines), lines[-1], answer.mimetype) == (100_000, "100000", "text/plain")
    with app.test_client().get("/numbers", buffered=False) as answer:
        assert next(iter(answer.response)) == b"1\n"  # the client leaves after the first line
    until(lambda: pool.stats().active == 0)
    assert pool.fetch_value("select 1") == 1
    assert "still held" not in caplog.text


def test_a_connection_that_outlives_its_view_is_taken_away_and_the_log_says_what_to_do(
    make_app: MakeApp, dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    db = DBPool()
    app = make_app(dsn, db=db)
    failures: list[Exception] = []

    @app.get("/")
    def view() -> Any:
        conn = db.pool.getconn()

        def lines() -> Iterator[str]:
            try:
                yield str(conn.execute("select 1").fetchone())
            except psycopg.Error as ex:
                failures.append(ex)

        return lines()

    app.test_client().get("/").get_data()
    assert len(failures) == 1
    assert "takes its connection inside its generator" in caplog.text
