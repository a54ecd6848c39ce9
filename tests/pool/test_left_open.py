"""A stream, copy or notifies() left open keeps psycopg's lock: the pool must not wait for it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import psycopg
import pytest

from dbpool import Pool
from tests.pools import within
from tests.postgres import until
from tests.threads import Task

SECONDS = 20.0  # more than the pool's timeout: another thread may keep the lock for that long


def stream(conn: Any) -> Generator[Any]:
    rows: Generator[Any] = conn.cursor().stream("select generate_series(1, 9999)")
    next(rows)
    return rows


def copy(conn: Any) -> Generator[Any]:
    def rows() -> Generator[Any]:
        with conn.cursor().copy("copy (select generate_series(1, 9999)) to stdout") as found:
            yield from found

    opened = rows()
    next(opened)
    return opened


def notifies(conn: Any) -> Generator[Any]:
    conn.execute("listen here")
    conn.commit()
    conn.execute("notify here")
    conn.commit()
    found: Generator[Any] = conn.notifies()
    next(found)
    return found


LEFT_OPEN = [stream, copy, notifies]
Open = Callable[[Any], Generator[Any]]


def assert_serves(pool: Pool) -> None:
    assert Task(pool.fetch_value, "select 1").result(SECONDS) == 1
    assert Task(pool.run, lambda conn: conn.execute("select 2").fetchone()).result(SECONDS) == (2,)
    until(lambda: pool.stats().active == 0)  # a user's reset runs in a worker


@pytest.fixture
def small_pool(dsn: str) -> Any:
    with Pool(dsn, max_size=1, timeout=1) as pool:
        yield pool


@pytest.mark.parametrize("open_one", LEFT_OPEN)
@pytest.mark.parametrize("autocommit", [False, True])
def test_a_block_that_leaves_one_open_ends(
    small_pool: Pool, open_one: Open, autocommit: bool
) -> None:
    opened = []

    def use() -> None:
        with small_pool.connection() as conn:
            conn.autocommit = autocommit
            opened.append(open_one(conn))

    outcome = Task(use).outcome(SECONDS)
    assert outcome is None or "was left open" in str(outcome)
    if open_one is stream:
        assert isinstance(outcome, psycopg.ProgrammingError), "its transaction did not commit"
    assert_serves(small_pool)


@pytest.mark.parametrize("open_one", LEFT_OPEN)
def test_the_users_error_reaches_the_caller_unchanged(small_pool: Pool, open_one: Open) -> None:
    opened = []

    def use(conn: Any) -> None:
        opened.append(open_one(conn))
        raise KeyError("mine")

    def block() -> None:
        with small_pool.connection() as conn:
            use(conn)

    assert isinstance(Task(block).error(SECONDS), KeyError)
    if open_one is not notifies:  # notifications arrive outside transactions only
        assert isinstance(Task(small_pool.run, use).error(SECONDS), KeyError)
    assert_serves(small_pool)


@pytest.mark.parametrize("open_one", [stream, copy])
def test_run_is_not_retried_after_a_stream_left_open(small_pool: Pool, open_one: Open) -> None:
    opened = []
    error = Task(small_pool.run, lambda conn: opened.append(open_one(conn))).error(SECONDS)
    assert isinstance(error, psycopg.ProgrammingError)
    assert len(opened) == 1
    assert_serves(small_pool)


def test_another_threads_statement_may_finish_after_the_block(small_pool: Pool) -> None:
    small_pool.timeout = SECONDS
    with small_pool.connection() as conn:
        conn.execute("create table kept (id int)")
        other = Task(conn.execute, "insert into kept select 1 from pg_sleep(0.3)")
        while conn.info.transaction_status != psycopg.pq.TransactionStatus.ACTIVE:
            pass
    other.result()
    assert small_pool.fetch_value("select count(*) from kept") == 1


@pytest.mark.parametrize("autocommit", [False, True])
def test_a_users_reset_does_not_wait_for_notifies_left_open(dsn: str, autocommit: bool) -> None:
    opened = []

    def reset(conn: psycopg.Connection[Any]) -> None:
        conn.execute("reset all")
        conn.commit()

    with Pool(dsn, max_size=1, reset=reset, kwargs={"autocommit": autocommit}) as pool:
        conn = pool.getconn()
        opened.append(notifies(conn))
        pool.putconn(conn)
        assert_serves(pool)
        with pool.connection() as conn:
            opened.append(notifies(conn))
        assert_serves(pool)


def test_run_waits_only_once_for_a_stream_left_open(dsn: str) -> None:
    opened = []
    with Pool(dsn, max_size=1, timeout=2) as pool, within(3.5):
        with pytest.raises(psycopg.ProgrammingError, match="was left open"):
            pool.run(lambda conn: opened.append(stream(conn)))
