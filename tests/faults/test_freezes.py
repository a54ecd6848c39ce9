"""Backends are stopped by SIGSTOP, which leaves their sockets open but silent."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from tests.pools import MakePool, fill, terminate, within
from tests.postgres import Server


def test_many_frozen_backends_cost_the_caller_one_ping_timeout(
    own_server: Server, make_pool: MakePool
) -> None:
    pool = make_pool(min_size=10, ping_after=0)
    frozen = fill(pool)
    own_server.freeze(frozen)
    with within(2.0):
        assert pool.fetch_value("select pg_backend_pid()") not in frozen
    own_server.thaw()
    assert pool.stats().counters.discarded["dead"] == 10


def test_after_a_lost_connection_the_others_are_pinged_before_use(
    own_server: Server, make_pool: MakePool
) -> None:
    pool = make_pool(min_size=2, max_size=2)
    pids = fill(pool)
    with pytest.raises(psycopg.OperationalError), pool.connection() as conn:
        lost = conn.info.backend_pid
        (silent,) = {*pids} - {lost}
        own_server.freeze([silent])
        terminate(own_server, [lost])
        conn.execute("select 1")
    with within(2.0):
        assert pool.fetch_value("select pg_backend_pid()") not in pids
    own_server.thaw()


def test_a_backend_frozen_in_a_transaction_delays_no_other_caller(
    own_server: Server, make_pool: MakePool
) -> None:
    pool = make_pool(max_size=2)
    with ThreadPoolExecutor(1) as executor, pool.connection() as conn:
        conn.execute("select 1")
        own_server.freeze([conn.info.backend_pid])
        stuck = executor.submit(conn.execute, "select 2")
        with within(2.0):
            assert [pool.fetch_value("select 1") for _ in range(20)] == [1] * 20
        own_server.thaw()
        assert stuck.result(10).fetchone() == (2,)
