"""Whole transactions: when `run` commits, retries and gives up."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from psycopg import Connection, IsolationLevel

from dbpool import Pool


def test_run_commits_and_returns_the_result(server_pool: Pool) -> None:
    server_pool.execute("create table t (id int)")

    def insert(conn: Connection[Any], value: int) -> int:
        return conn.execute("insert into t values (%s)", [value]).rowcount

    assert server_pool.run(insert, 7) == 1
    assert server_pool.fetch_all("select * from t") == [(7,)]


def test_run_sets_isolation_and_read_only_for_its_own_transaction_only(server_pool: Pool) -> None:
    def show(conn: Connection[Any]) -> Any:
        return conn.execute(
            "select current_setting('transaction_isolation'),"
            " current_setting('transaction_read_only')"
        ).fetchone()

    serializable = IsolationLevel.SERIALIZABLE
    assert server_pool.run(show, isolation=serializable, read_only=True) == ("serializable", "on")
    assert server_pool.run(show) == ("read committed", "off")


def test_run_opens_a_transaction_also_with_autocommit(dsn: str) -> None:
    with Pool(dsn, kwargs={"autocommit": True}) as pool:
        pool.execute("create table t (id int)")

        def fail(conn: Connection[Any]) -> None:
            conn.execute("insert into t values (1)")
            raise LookupError

        with pytest.raises(LookupError):
            pool.run(fail)
        assert pool.fetch_all("select * from t") == []
        with pool.connection() as conn:
            assert conn.autocommit


def test_run_raises_if_the_function_swallowed_an_sql_error(server_pool: Pool) -> None:
    def suppress_error(conn: Connection[Any]) -> None:
        try:
            conn.execute("select 1/0")
        except psycopg.Error:
            pass

    with pytest.raises(psycopg.errors.InFailedSqlTransaction):
        server_pool.run(suppress_error)
    assert server_pool.fetch_value("select 1") == 1


def test_run_retries_a_serialization_failure(server_pool: Pool) -> None:
    server_pool.execute("create table t (id int primary key, n int)")
    server_pool.execute("insert into t values (1, 0)")
    calls: list[int] = []

    def increment(conn: Connection[Any]) -> None:
        calls.append(1)
        (n,) = conn.execute("select n from t where id = 1").fetchone() or (0,)
        if len(calls) == 1:
            server_pool.execute("update t set n = n + 10 where id = 1")
        conn.execute("update t set n = %s where id = 1", [n + 1])

    server_pool.run(increment, isolation=IsolationLevel.REPEATABLE_READ)
    assert len(calls) == 2
    assert server_pool.fetch_value("select n from t") == 11
    assert server_pool.stats().counters.retries == 1


def test_run_gives_up_after_its_attempts(server_pool: Pool) -> None:
    calls: list[int] = []

    def fail(conn: Connection[Any]) -> None:
        calls.append(1)
        conn.execute("do $$ begin raise sqlstate '40001'; end $$")

    with pytest.raises(psycopg.errors.SerializationFailure):
        server_pool.run(fail, attempts=2)
    assert len(calls) == 2


def test_run_retries_no_other_error(server_pool: Pool) -> None:
    calls: list[int] = []

    def fail(conn: Connection[Any]) -> None:
        calls.append(1)
        conn.execute("select 1/0")

    with pytest.raises(psycopg.errors.DivisionByZero):
        server_pool.run(fail)
    assert len(calls) == 1
