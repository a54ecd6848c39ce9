"""The check before a checkout: the user's own, and the parent's."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from psycopg import Connection
from psycopg_pool import ConnectionPool, PoolTimeout

from dbpool import Pool
from tests.fake import FakeServer
from tests.postgres import until


def test_a_connection_that_fails_the_users_check_is_replaced(fake: FakeServer) -> None:
    refused: list[int] = []

    def check(conn: Connection[Any]) -> None:
        if not refused:
            refused.append(conn.info.backend_pid)
            raise psycopg.OperationalError("I don't like it")

    with fake.pool(max_size=1, check=check) as pool:
        assert pool.fetch_value("select pg_backend_pid()") != refused[0]
        assert pool.stats().counters.discarded["dead"] == 1


def test_the_parents_own_check_costs_no_round_trip(fake: FakeServer) -> None:
    with fake.pool(max_size=1, check=ConnectionPool.check_connection) as pool:
        assert pool.fetch_value("select 1") == 1
        assert fake.pings == 0


def test_a_check_that_always_fails_causes_no_storm_of_connects(fake: FakeServer) -> None:
    def check(conn: Connection[Any]) -> None:
        raise psycopg.OperationalError("never")

    with fake.pool(max_size=1, check=check) as pool:
        with pytest.raises(PoolTimeout):
            pool.getconn(timeout=0.6)
        assert pool.stats().counters.connects <= 5


def test_a_check_that_is_interrupted_loses_no_connection(dsn: str) -> None:
    checked: list[Connection[Any]] = []

    def check(conn: Connection[Any]) -> None:
        checked.append(conn)
        conn.execute("select 1")
        raise KeyboardInterrupt

    with Pool(dsn, max_size=1, check=check) as pool:
        with pytest.raises(KeyboardInterrupt):
            pool.getconn()
        stats = pool.stats()
        assert (stats.size, stats.idle, stats.active) == (1, 1, 0)
        assert checked[0].info.transaction_status == psycopg.pq.TransactionStatus.IDLE


def test_a_check_may_leave_its_transaction_open(dsn: str) -> None:
    def check(conn: Connection[Any]) -> None:
        conn.execute("select 1")

    with Pool(dsn, max_size=1, check=check) as pool:
        pool.execute("create table t (id int)")
        assert pool.execute("insert into t values (1)") == 1
        assert pool.fetch_value("insert into t values (2) returning id") == 2
        pool.run(lambda conn: conn.execute("insert into t values (3)"))
        assert pool.run(lambda conn: conn.read_only, read_only=True) is True
        with pool.connection() as conn:
            conn.execute("insert into t values (4)")
        assert pool.fetch_all("select id from t") == [(1,), (2,), (3,), (4,)]


def test_check_pings_idle_connections(fake: FakeServer) -> None:
    with fake.pool(min_size=3, max_size=3) as pool:
        pool.wait()
        conn = pool.getconn()
        pool.putconn(conn)
        conn.pgconn.finish()
        pool.check()
        until(lambda: pool.stats().idle == 3)
        assert pool.stats().counters.discarded["dead"] == 1
