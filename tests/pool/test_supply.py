"""When the pool connects: for waiters, and to keep min_size and max_size."""

from __future__ import annotations

import time
from time import monotonic
from typing import Any

import pytest
from psycopg import Connection

from dbpool import DatabaseUnavailable, Pool, PoolExhausted
from tests.fake import FakeServer
from tests.postgres import until
from tests.threads import Task, run_in_threads

FULL = "FATAL:  remaining connection slots are reserved for roles with the SUPERUSER attribute"


def test_grows_for_waiters_and_shrinks_when_idle(fake: FakeServer) -> None:
    with fake.pool(max_size=4, max_idle=0.2, leak_after=0.2) as pool:
        conns = [pool.getconn() for _ in range(4)]
        assert pool.stats().size == 4
        for conn in conns:
            pool.putconn(conn)
        until(lambda: pool.stats().size == 1)
        assert pool.stats().counters.discarded["idle"] == 3


def test_grows_for_all_waiters_at_once(fake: FakeServer) -> None:
    with fake.pool(max_size=6, timeout=20) as pool:
        started = monotonic()
        conns = run_in_threads(6, pool.getconn)
        assert pool.stats().active == 6
        assert monotonic() - started < 3.0, "only the watchdog grew it"
        for conn in conns:
            pool.putconn(conn)


def test_a_configure_that_leaves_a_transaction_open_is_an_error(dsn: str) -> None:
    def configure(conn: Connection[Any]) -> None:
        conn.execute("select 1")

    with Pool(dsn, configure=configure, timeout=1, outage_grace=0.1) as pool:
        with pytest.raises(DatabaseUnavailable) as caught:
            pool.getconn()
    assert "configure" in str(caught.value)


def test_resize_grows_and_shrinks(fake: FakeServer) -> None:
    with fake.pool(min_size=1, max_size=4) as pool:
        pool.resize(3, 4)
        until(lambda: pool.stats().idle == 3)
        pool.resize(1, 1)
        until(lambda: pool.stats().size == 1)
        assert pool.fetch_value("select 1") == 1


def test_resize_holds_while_connections_are_being_made(fake: FakeServer) -> None:
    with fake.pool(min_size=1, max_size=20) as pool:
        pool.wait()
        fake.delay = 0.02
        pool.resize(20, 20)
        pool.resize(1, 2)
        until(lambda: pool.stats().connecting == 0)
        for _ in range(3):
            assert pool.fetch_value("select 1") == 1
        conns = [pool.getconn(), pool.getconn()]
        with pytest.raises(PoolExhausted):
            pool.getconn(timeout=0.05)
        for conn in conns:
            pool.putconn(conn)


def test_a_smaller_size_closes_connections_as_they_return(pool: Pool) -> None:
    out = [pool.getconn() for _ in range(4)]
    pool.resize(1, 2)
    for conn in out:
        pool.putconn(conn)
    until(lambda: pool.stats().size == 2)
    assert sum(conn.closed for conn in out) == 2


def test_resize_can_end_a_wait(fake: FakeServer) -> None:
    with fake.pool(min_size=1, max_size=9) as pool:
        pool.wait(10)
        pool._min_size = 9  # more than it has, and no connect begun: only resize can end the wait
        waiter = Task(pool.wait, 20.0)
        pool.resize(1, 9)
        waiter.result(10.0)
        assert not pool.closed


def test_the_last_connection_serves_past_its_lifetime_until_another_can_be_made(
    fake: FakeServer,
) -> None:
    """The pool connects a successor before it expires, so it knows that connecting fails."""
    with fake.pool(max_size=2, max_lifetime=1.2, leak_after=0.2) as pool:
        pid = pool.fetch_value("select pg_backend_pid()")
        fake.refuse(FULL)
        ends = monotonic() + 1.5
        while monotonic() < ends:
            assert pool.fetch_value("select pg_backend_pid()") == pid
            time.sleep(0.01)
        fake.accept()
        until(lambda: pool.fetch_value("select pg_backend_pid()") != pid)
        until(lambda: fake.backends() == [pool.fetch_value("select pg_backend_pid()")])


def test_a_pool_without_a_minimum_makes_no_successor(fake: FakeServer) -> None:
    with fake.pool(min_size=0, max_size=2, max_lifetime=0.3, leak_after=0.2) as pool:
        assert pool.fetch_value("select 1") == 1
        logins = fake.logins
        until(lambda: pool.stats().size == 0)
        assert fake.logins == logins
