"""Processes of the server stop answering: SIGSTOP leaves their sockets open and silent."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from dbpool import DatabaseUnavailable, PoolError
from tests.faults.support import MakePool, backend_pid, idle_pids, within
from tests.postgres import Server, until


def test_a_frozen_idle_backend_is_passed_over_after_one_ping(
    own_server: Server, make_pool: MakePool
) -> None:
    pool = make_pool(min_size=4, ping_after=0)
    pool.wait()
    frozen = idle_pids(pool)[-1]  # the one that would be handed out next
    own_server.freeze([frozen])
    with within(2.0):
        assert pool.fetch_value("select pg_backend_pid()") != frozen
    own_server.thaw()


def test_all_backends_frozen_cost_one_ping_together(
    own_server: Server, make_pool: MakePool
) -> None:
    pool = make_pool(min_size=10, ping_after=0)
    pool.wait()
    frozen = idle_pids(pool)
    own_server.freeze(frozen)
    with within(2.0):
        assert pool.fetch_value("select pg_backend_pid()") not in frozen
    own_server.thaw()
    assert pool.stats().counters.discarded["dead"] == 10


def test_a_server_frozen_whole_costs_a_caller_its_timeout_and_no_more(
    own_server: Server, make_pool: MakePool
) -> None:
    pool = make_pool(min_size=4, ping_after=0, ping_timeout=1, outage_grace=10)
    pool.wait()
    own_server.freeze([own_server.postmaster_pid, *idle_pids(pool)])
    with within(0.7), pytest.raises(DatabaseUnavailable):
        pool.getconn(timeout=0.5)
    own_server.thaw()
    with within(4.0):
        assert pool.fetch_value("select 1") == 1


def test_a_frozen_postmaster_keeps_nobody_from_idle_connections(
    own_server: Server, make_pool: MakePool
) -> None:
    pool = make_pool(min_size=1, max_size=2)
    pool.wait()
    own_server.freeze([own_server.postmaster_pid])
    with pool.connection() as conn:
        with within(3.0), pytest.raises(PoolError):
            pool.getconn(timeout=0.5)  # a second one cannot be made
        assert conn.execute("select 1").fetchone() == (1,)
    for _ in range(20):
        assert pool.fetch_value("select 1") == 1
    own_server.thaw()
    until(lambda: pool.stats().connecting == 0)


def test_connects_that_hang_in_the_handshake_open_the_breaker(
    own_server: Server, make_pool: MakePool
) -> None:
    own_server.freeze([own_server.postmaster_pid])
    pool = make_pool(connect_timeout=60)
    with within(2.0), pytest.raises(DatabaseUnavailable) as caught:
        pool.fetch_value("select 1")
    assert caught.value.kind == "timeout"
    assert pool.state == "down"
    with within(0.3), pytest.raises(DatabaseUnavailable):
        pool.fetch_value("select 1")
    own_server.thaw()
    until(lambda: pool.state == "up")
    assert pool.fetch_value("select 1") == 1


def test_a_backend_frozen_in_a_transaction_holds_nobody_else_up(
    own_server: Server, make_pool: MakePool
) -> None:
    pool = make_pool(max_size=2)
    with ThreadPoolExecutor(1) as executor, pool.connection() as conn:
        conn.execute("select 1")
        own_server.freeze([backend_pid(conn)])
        stuck = executor.submit(conn.execute, "select 2")
        with within(2.0):
            assert [pool.fetch_value("select 1") for _ in range(20)] == [1] * 20
        own_server.thaw()
        assert stuck.result(10).fetchone() == (2,)
