"""Pools that are closed at bad moments."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from psycopg_pool import PoolClosed

from dbpool import DatabaseUnavailable, Pool
from tests.fake import FakeServer
from tests.pools import (
    GRACE,
    MakePool,
    fill,
    within,
)
from tests.postgres import Server, until
from tests.threads import Task


def test_close_fails_all_waiters_at_once(make_pool: MakePool) -> None:
    pool = make_pool(max_size=1)
    conn = pool.getconn()
    waiters = [Task(pool.getconn) for _ in range(5)]
    until(lambda: pool.stats().waiting == 5)
    with within(1.0):
        pool.close()
        for waiter in waiters:
            assert isinstance(waiter.error(), PoolClosed)
    pool.putconn(conn)
    assert conn.closed


def test_closing_while_connects_hang_takes_no_longer_than_its_timeout(
    fake: FakeServer, make_pool: MakePool
) -> None:
    fake.hang()
    pool = make_pool(min_size=3, max_size=3, connect_timeout=60)
    waiters = [Task(pool.getconn) for _ in range(5)]
    until(lambda: len(fake.attempts) == 3)
    with within(2.5):
        pool.close(timeout=2)
    for waiter in waiters:
        assert isinstance(waiter.error(), PoolClosed)
        assert waiter.seconds < 1.5
    fake.accept()


def test_a_connection_made_after_closing_is_closed(fake: FakeServer, make_pool: MakePool) -> None:
    fake.hang()
    # With these options the pool sends no query after the login.
    options: Any = {"statement_timeout": "server", "idle_in_transaction_timeout": "server"}
    pool = make_pool(min_size=2, connect_timeout=60, **options)
    waiter = Task(pool.getconn)
    until(lambda: len(fake.attempts) == 2)
    pool.close(timeout=0.1)
    assert isinstance(waiter.error(), PoolClosed)
    fake.accept()
    until(lambda: fake.logins == 2 and not fake.backends())


def test_closing_in_an_outage_is_quick(fake: FakeServer, make_pool: MakePool) -> None:
    pool = make_pool(min_size=3, outage_grace=GRACE)
    fill(pool)
    fake.stop()
    with pytest.raises(DatabaseUnavailable):
        pool.fetch_value("select 1")
    with within(1.0):
        pool.close()
    assert pool.state == "stopped"
    with pytest.raises(PoolClosed):
        pool.fetch_value("select 1")


def test_closing_while_idle_connections_are_silent_is_quick(
    fake: FakeServer, make_pool: MakePool
) -> None:
    pool = make_pool(min_size=5)
    fill(pool)
    fake.go_silent()
    with within(1.0):
        pool.close()


def test_closing_under_load_lets_holders_finish(own_server: Server) -> None:
    pool = Pool(own_server.conninfo, max_size=3)
    own_server.execute("create table t (id int)")
    barrier, go_on = threading.Barrier(4), threading.Event()

    def work() -> None:
        with pool.connection() as conn:
            barrier.wait(10)
            go_on.wait(10)
            conn.execute("insert into t values (1)")

    holders = [Task(work) for _ in range(3)]
    barrier.wait(10)
    pool.close()
    go_on.set()
    for holder in holders:
        holder.result()
    assert own_server.execute("select count(*) from t") == [(3,)]


def test_many_threads_may_close_at_once(make_pool: MakePool) -> None:
    pool = make_pool(min_size=3)
    fill(pool)
    for closer in [Task(pool.close) for _ in range(8)]:
        closer.result()
        assert closer.seconds < 2.5
