"""dbpool.testing undoes everything that an application's test does in the database."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from flask import Flask
from psycopg import IsolationLevel
from psycopg.rows import dict_row

from dbpool import Databases, DatabaseUnavailable, Pool, PoolExhausted, Settings
from dbpool.flask import DBPool
from dbpool.testing import Isolation, dbpool_isolated, round_trips

from .conftest import MakeApp
from .threads import Task, run_in_threads

__all__ = ["dbpool_isolated", "round_trips"]  # fixtures

ROOT = Path(__file__).parent.parent
Ids = Callable[[], list[int]]


@pytest.fixture
def pool(dsn: str) -> Iterator[Pool[Any]]:
    with Pool(dsn, max_size=4, timeout=5) as pool:
        pool.execute("create table t (id int primary key)")
        yield pool


@pytest.fixture
def outside(dsn: str, pool: Pool[Any]) -> Iterator[Ids]:
    """The table's rows as another client sees them."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        yield lambda: [row[0] for row in conn.execute("select id from t order by id")]


def ids(pool: Pool[Any]) -> list[int]:
    return [row[0] for row in pool.fetch_all("select id from t order by id")]


def insert(conn: Any, number: int) -> None:
    conn.execute("insert into t values (%s)", [number])


# Undone


def test_everything_that_a_test_does_is_undone(pool: Pool[Any], outside: Ids) -> None:
    with Isolation(pool):
        pool.execute("insert into t values (1)")
        with pool.connection() as conn:
            insert(conn, 2)
        pool.run(insert, 3)
        conn = pool.getconn()
        insert(conn, 4)
        conn.commit()
        pool.putconn(conn)
        assert ids(pool) == [1, 2, 3, 4]
        assert outside() == []
    assert ids(pool) == outside() == []


def test_afterwards_the_pool_is_as_it_was(pool: Pool[Any], outside: Ids) -> None:
    for number in (1, 2):
        with Isolation(pool):
            pool.execute("insert into t values (9)")
        pool.execute("insert into t values (%s)", [number])
    assert outside() == [1, 2]
    assert pool.max_size == 4
    assert pool.stats().active == 0


def test_only_a_failed_block_is_rolled_back(pool: Pool[Any]) -> None:
    with Isolation(pool):
        pool.execute("insert into t values (1)")
        with pytest.raises(ZeroDivisionError), pool.connection() as conn:
            insert(conn, 2)
            raise ZeroDivisionError
        assert ids(pool) == [1]


def test_a_connection_that_is_not_committed_is_rolled_back(pool: Pool[Any]) -> None:
    with Isolation(pool):
        conn = pool.getconn()
        insert(conn, 1)
        conn.commit()
        insert(conn, 2)
        conn.rollback()
        insert(conn, 3)
        pool.putconn(conn)
        assert ids(pool) == [1]
        with pytest.raises(psycopg.OperationalError, match="closed"):
            insert(conn, 4)


def test_a_failed_statement_affects_no_other(pool: Pool[Any]) -> None:
    with Isolation(pool):
        pool.execute("insert into t values (1)")
        with pytest.raises(psycopg.errors.UniqueViolation):
            pool.execute("insert into t values (1)")
        with pool.connection() as conn:
            insert(conn, 2)
            with pytest.raises(psycopg.errors.UniqueViolation):
                insert(conn, 1)
            with pytest.raises(psycopg.errors.InFailedSqlTransaction):
                insert(conn, 3)
        assert ids(pool) == [1]  # the end of a failed transaction is a rollback


def test_savepoints_work_as_usual(pool: Pool[Any]) -> None:
    with Isolation(pool):
        with pool.connection() as conn:
            insert(conn, 1)
            with pytest.raises(psycopg.errors.UniqueViolation), conn.transaction():
                insert(conn, 2)
                insert(conn, 1)
            with conn.transaction() as block:
                insert(conn, 3)
                raise psycopg.Rollback(block)
            with conn.transaction():
                insert(conn, 4)
            with conn.transaction(force_rollback=True):
                insert(conn, 5)
        assert ids(pool) == [1, 4]


def test_in_autocommit_each_statement_is_its_own_transaction(pool: Pool[Any]) -> None:
    with Isolation(pool):
        with pytest.raises(ZeroDivisionError), pool.connection() as conn:
            conn.autocommit = True
            insert(conn, 1)
            with pytest.raises(psycopg.errors.UniqueViolation):
                insert(conn, 1)
            insert(conn, 2)
            raise ZeroDivisionError
        assert ids(pool) == [1, 2]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"isolation": IsolationLevel.SERIALIZABLE},
        {"isolation": IsolationLevel.REPEATABLE_READ, "read_only": True},
        {"attempts": 1, "timeout": 5.0},
        {"idempotent": True},
    ],
)
def test_run_applies_its_options(pool: Pool[Any], options: dict[str, Any]) -> None:
    with Isolation(pool):
        pool.execute("insert into t values (1)")
        assert pool.run(lambda conn: conn.execute("select id from t").fetchall(), **options) == [
            (1,)
        ]
        with pytest.raises(ZeroDivisionError):
            pool.run(fail, **options)
        assert ids(pool) == [1]


def fail(conn: Any) -> None:
    insert(conn, 2)
    raise ZeroDivisionError


def test_run_repeats_after_a_conflict(pool: Pool[Any]) -> None:
    attempts: list[int] = []

    def work(conn: Any) -> None:
        attempts.append(len(attempts))
        insert(conn, len(attempts))
        if len(attempts) < 3:
            raise psycopg.errors.SerializationFailure

    with Isolation(pool):
        pool.run(work)
        assert (len(attempts), ids(pool)) == (3, [3])


def test_run_has_its_usual_errors(pool: Pool[Any]) -> None:
    def swallow(conn: Any) -> None:
        with pytest.raises(psycopg.errors.UndefinedTable):
            conn.execute("select * from nowhere")

    with Isolation(pool):
        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            pool.run(swallow)
        with pytest.raises(psycopg.ProgrammingError, match=r"commit\(\) is forbidden"):
            pool.run(lambda conn: conn.commit())
        assert pool.run(lambda conn: conn.execute("select 1").fetchone()) == (1,)


# Several blocks and threads


def test_blocks_of_one_thread_nest(pool: Pool[Any]) -> None:
    with Isolation(pool):
        with pool.connection() as outer:
            insert(outer, 1)
            with pool.connection() as inner:
                insert(inner, 2)
                assert inner is not outer
            with pytest.raises(ZeroDivisionError), pool.connection() as inner:
                insert(inner, 3)
                raise ZeroDivisionError
            pool.run(insert, 4)
            insert(outer, 5)
        assert ids(pool) == [1, 2, 4, 5]


def test_connections_may_be_returned_in_any_order(pool: Pool[Any]) -> None:
    with Isolation(pool):
        first, second = pool.getconn(), pool.getconn()
        insert(first, 1)
        insert(second, 2)
        first.commit()
        pool.putconn(first)
        insert(second, 3)
        second.commit()
        insert(second, 4)
        pool.putconn(second)
        assert ids(pool) == [1, 2, 3]


def test_threads_share_the_test_and_their_blocks_take_turns(pool: Pool[Any], outside: Ids) -> None:
    numbers = iter(range(100))
    together = threading.Barrier(4)

    def work() -> None:
        together.wait(10)
        for _ in range(5):
            with pool.connection() as conn:
                insert(conn, next(numbers))
                conn.execute("select pg_sleep(0.001)")
            pool.run(insert, next(numbers))
            pool.execute("insert into t values (%s)", [next(numbers)])

    with Isolation(pool):
        run_in_threads(4, work)
        assert ids(pool) == list(range(60))
    assert outside() == []


def test_a_single_statement_of_another_thread_waits_for_no_block(pool: Pool[Any]) -> None:
    with Isolation(pool), pool.connection() as conn:
        insert(conn, 1)
        assert Task(ids, pool).result(10) == [1]
        error = Task(pool.execute, "insert into t values (1)").error(10)
        assert isinstance(error, psycopg.errors.UniqueViolation)
        insert(conn, 2)


def test_a_block_of_another_thread_that_would_wait_for_ever_says_why(dsn: str) -> None:
    with Pool(dsn, timeout=1) as pool:
        with pool.connection(), pool.connection(), pool.connection():
            pass  # makes all connections that the test needs
        with Isolation(pool), pool.connection():
            error = Task(pool.run, lambda conn: None).error(10)
    assert isinstance(error, TimeoutError)
    assert "one after another" in str(error)


# What stays real


def test_the_pools_capacity_still_applies(dsn: str) -> None:
    with Pool(dsn, max_size=1, timeout=1) as pool, Isolation(pool), pool.connection():
        with pytest.raises(PoolExhausted):
            pool.getconn(timeout=0.05)


def test_configure_still_applies(dsn: str) -> None:
    def configure(conn: Any) -> None:
        conn.execute("set timezone to 'Asia/Tokyo'")
        conn.commit()
        conn.row_factory = dict_row

    with Pool(dsn, configure=configure) as pool, Isolation(pool):
        row: Any = pool.fetch_one("show timezone")
        assert row == {"TimeZone": "Asia/Tokyo"}
        with pool.connection() as conn:
            row = conn.execute("select 1 as one").fetchone()
            assert row == {"one": 1}


def test_cursors_of_every_kind_work(pool: Pool[Any]) -> None:
    with Isolation(pool):
        with pool.connection() as conn, conn.cursor() as cursor:
            cursor.executemany("insert into t values (%s)", [[1], [2], [3]])
            with cursor.copy("copy t from stdin") as copy:
                copy.write_row([4])
            with conn.pipeline():
                insert(conn, 5)
            with conn.cursor(name="rows") as rows:
                assert [row[0] for row in rows.execute("select id from t")] == [1, 2, 3, 4, 5]
        assert pool.fetch_one("select count(*) as n from t", row_factory=dict_row) == {"n": 5}
        for _ in range(10):  # prepared statements of two connections must not conflict
            with pool.connection() as one, pool.connection() as two:
                one.execute("select 1")
                two.execute("select 2")


def test_sqlalchemy_works_within_a_test(dsn: str, outside: Ids) -> None:
    sqlalchemy = pytest.importorskip("sqlalchemy")
    with Pool(dsn, close_returns=True) as pool:
        engine = sqlalchemy.create_engine(
            "postgresql+psycopg://",
            creator=lambda: pool.getconn(),  # noqa: PLW0108  # looked up at each call
            poolclass=sqlalchemy.NullPool,
        )
        with Isolation(pool):
            with engine.begin() as conn:
                conn.execute(sqlalchemy.text("insert into t values (1)"))
            assert ids(pool) == [1]
        assert outside() == []


def test_the_views_of_an_application_work_within_a_test(make_app: MakeApp, dsn: str) -> None:
    db = DBPool()
    app = make_app(dsn, db=db, app=Flask("app"))
    app.add_url_rule("/", view_func=lambda: str(db.pool.fetch_value("select count(*) from t")))
    with Isolation(app.extensions["dbpool"].databases), app.app_context():
        db.pool.execute("create table t (id int)")
        assert app.test_client().get("/").text == "0"
        assert app.test_client().get("/db/health/ready").json == {
            "status": "up",
            "databases": {"default": "up"},
        }


def test_several_databases_are_each_undone(dsn: str, outside: Ids) -> None:
    settings = {name: Settings(name=name, conninfo=dsn) for name in ("default", "other")}
    with Databases(settings) as databases:
        with Isolation(databases):
            databases["default"].execute("insert into t values (1)")
            databases["other"].execute("insert into t values (2)")
        assert outside() == []


# Errors that it finds


def test_a_connection_that_is_still_held_at_the_end_fails_the_test(pool: Pool[Any]) -> None:
    isolation = Isolation(pool)
    conn = pool.getconn()
    with pytest.raises(
        AssertionError, match=r"MainThread still holds .* at tests/test_testing\.py"
    ):
        isolation.close()
    assert conn is not None


def test_a_connection_that_was_forgotten_fails_the_test(pool: Pool[Any]) -> None:
    isolation = Isolation(pool)
    pool.getconn()
    pool.execute("insert into t values (1)")
    with pytest.raises(AssertionError, match="never returned"):
        isolation.close()


@pytest.mark.parametrize("statement", ["commit", "rollback"])
def test_a_statement_that_ends_the_transaction_fails_the_test(
    pool: Pool[Any], outside: Ids, statement: str
) -> None:
    isolation = Isolation(pool)
    with pool.connection() as conn:
        insert(conn, 1)
        conn.execute(statement.encode())
        insert(conn, 2)
    pool.execute(statement)
    pool.execute("insert into t values (3)")
    with pytest.raises(AssertionError, match="may not have been undone"):
        isolation.close()
    assert 3 not in outside()
    assert pool.fetch_value("select 1") == 1


def test_a_connection_kept_after_a_test_cannot_be_used(pool: Pool[Any], outside: Ids) -> None:
    isolation = Isolation(pool)
    conn = pool.getconn()
    with pytest.raises(AssertionError):
        isolation.close()
    assert conn.closed
    with pytest.raises(psycopg.OperationalError, match="closed"):
        insert(conn, 1)
    assert outside() == []


def test_a_pool_that_is_closed_within_a_test_stays_closed(pool: Pool[Any]) -> None:
    with Isolation(pool):
        pool.execute("insert into t values (1)")
        pool.close()
    assert pool.closed


def test_without_a_server_the_pool_is_left_as_it_was() -> None:
    with Pool("host=127.0.0.1 port=1", max_size=2, timeout=0.3, outage_grace=0.05) as pool:
        with pytest.raises(DatabaseUnavailable):
            Isolation(pool)
        assert pool.max_size == 2
        assert "getconn" not in vars(pool)


def test_a_failing_test_raises_only_its_own_error(pool: Pool[Any]) -> None:
    with pytest.raises(ZeroDivisionError), Isolation(pool):
        conn = pool.getconn()
        raise ZeroDivisionError
    assert conn is not None


def test_a_pool_is_isolated_once(pool: Pool[Any], outside: Ids) -> None:
    with Isolation(pool):
        with pytest.raises(RuntimeError, match="already"):
            Isolation(pool)
        pool.execute("insert into t values (1)")
    assert outside() == []


# Round trips


def two_statements(conn: Any) -> None:
    conn.execute("select 1")
    conn.execute("select 2")


def in_a_block(pool: Pool[Any]) -> None:
    with pool.connection() as conn:
        two_statements(conn)


def with_a_savepoint(pool: Pool[Any]) -> None:
    with pool.connection() as conn:
        conn.execute("select 1")
        with conn.transaction():
            conn.execute("select 2")


def in_autocommit(pool: Pool[Any]) -> None:
    with pool.connection() as conn:
        conn.autocommit = True
        two_statements(conn)


def many(pool: Pool[Any]) -> None:
    with pool.connection() as conn:
        conn.cursor().executemany("insert into t values (%s)", [[11], [12], [13]])


def in_a_pipeline(pool: Pool[Any]) -> None:
    with pool.connection() as conn, conn.pipeline():
        insert(conn, 31)
        insert(conn, 32)


def copied(pool: Pool[Any]) -> None:
    with pool.connection() as conn, conn.cursor().copy("copy t from stdin") as copy:
        copy.write_row([21])


def by_a_server_cursor(pool: Pool[Any]) -> None:
    with pool.connection() as conn, conn.cursor(name="rows") as rows:
        rows.execute("select generate_series(1, 150)").fetchall()


def failing(pool: Pool[Any]) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero), pool.connection() as conn:
        conn.execute("select 1 / 0")


def nothing(pool: Pool[Any]) -> None:
    with pool.connection():
        pass


@pytest.fixture
def counted_by_libpq(dsn: str, tmp_path: Path) -> Callable[[Callable[[Pool[Any]], object]], int]:
    """A function that counts round trips without isolation, from libpq's trace."""

    def count(work: Callable[[Pool[Any]], object]) -> int:
        with (tmp_path / "trace").open("w+b") as file, Pool(dsn, max_size=1) as pool:
            pool.fetch_one("select 1")
            with pool.connection() as conn:
                conn.pgconn.trace(file.fileno())
            work(pool)
            with pool.connection() as conn:
                conn.pgconn.untrace()
            file.seek(0)
            return file.read().count(b"ReadyForQuery")

    return count


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda pool: pool.fetch_value("select 1"), 1),
        (lambda pool: pool.execute("select 1"), 1),
        (in_a_block, 4),
        (lambda pool: pool.run(two_statements), 4),
        (with_a_savepoint, 6),
        (in_autocommit, 2),
        (many, 3),
        (in_a_pipeline, 3),
        (copied, 3),
        (by_a_server_cursor, 6),
        (failing, 3),
        (nothing, 0),
    ],
)
def test_round_trips_are_counted_as_without_isolation(
    pool: Pool[Any],
    work: Callable[[Pool[Any]], object],
    expected: int,
    counted_by_libpq: Callable[..., int],
) -> None:
    with Isolation(pool) as isolation, isolation.round_trips() as trips:
        work(pool)
    assert trips.count == expected == counted_by_libpq(work)


def test_the_fixtures_isolate_and_count(
    pool: Pool[Any], dbpool_isolated: Callable[..., Isolation], round_trips: Any
) -> None:
    dbpool_isolated(pool)
    with round_trips() as trips:
        pool.execute("insert into t values (1)")
        in_a_block(pool)
    assert trips.count == 5
    assert repr(trips) == "<RoundTrips count=5>"


def test_without_a_database_there_is_a_server_for_the_session(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["dbpool.testing"]')
    (tmp_path / "test_it.py").write_text(
        "import dbpool\n"
        "def test_it(dbpool_dsn):\n"
        "    with dbpool.Pool(dbpool_dsn) as pool:\n"
        "        print(pool.fetch_value('show unix_socket_directories'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": os.environ["HOME"]},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    socket = Path(done.stdout.splitlines()[0])
    assert socket.name == "socket"
    assert not socket.parent.exists()
