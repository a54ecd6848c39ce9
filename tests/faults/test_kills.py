"""Backends and postmasters die, by signal or by an administrator's command."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from tests.faults.support import MakePool, backend_pid, idle_pids, within
from tests.postgres import Server, until


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_killed_backend_takes_its_equals_with_it_and_nobody_notices(
    own_server: Server, make_pool: MakePool
) -> None:
    pool = make_pool(min_size=5)
    pool.wait()
    os.kill(idle_pids(pool)[0], signal.SIGKILL)  # the postmaster ends all the others
    assert [pool.fetch_value("select 1") for _ in range(10)] == [1] * 10


def test_all_backends_killed_at_once(own_server: Server, make_pool: MakePool) -> None:
    pool = make_pool(min_size=5)
    pool.wait()
    for pid in idle_pids(pool):
        os.kill(pid, signal.SIGKILL)
    assert [pool.fetch_value("select 1") for _ in range(10)] == [1] * 10
    until(lambda: pool.stats().idle == 5)


def test_a_backend_killed_in_a_query_fails_that_query_only(
    own_server: Server, make_pool: MakePool
) -> None:
    pool = make_pool(max_size=2)
    with ThreadPoolExecutor(1) as executor:
        with pool.connection() as conn:
            call = executor.submit(conn.execute, "select pg_sleep(60)")
            until(
                lambda: own_server.execute(
                    "select 1 from pg_stat_activity where wait_event = 'PgSleep'"
                )
            )
            os.kill(backend_pid(conn), signal.SIGKILL)
            assert isinstance(call.exception(10), psycopg.OperationalError)
    assert pool.fetch_value("select 1") == 1
    assert pool.stats().counters.discarded["broken"] == 1


def test_a_killed_postmaster_is_an_outage_until_it_is_started(
    own_server: Server, make_pool: MakePool
) -> None:
    pool = make_pool(min_size=3, timeout=20, outage_grace=10)
    pool.wait()
    own_server.kill_postmaster()
    with ThreadPoolExecutor(3) as executor:
        calls = [executor.submit(pool.fetch_value, "select 1") for _ in range(3)]
        until(lambda: pool.stats().waiting == 3)
        own_server.start()
        assert [call.result(10) for call in calls] == [1] * 3


def test_a_terminated_idle_connection_is_never_handed_out(
    own_server: Server, make_pool: MakePool
) -> None:
    pool = make_pool(max_size=1)
    for _ in range(20):
        pid = pool.fetch_value("select pg_backend_pid()")
        own_server.execute("select pg_terminate_backend(%s)", pid)
        assert pool.fetch_value("select pg_backend_pid()") != pid
    assert pool.stats().counters.discarded["dead"] == 20


def test_all_idle_connections_terminated(own_server: Server, make_pool: MakePool) -> None:
    pool = make_pool(min_size=8)
    pool.wait()
    pids = idle_pids(pool)
    own_server.execute("select pg_terminate_backend(pid) from unnest(%s::int[]) as pid", pids)
    with within(2.0):
        for _ in range(20):
            assert pool.fetch_value("select pg_backend_pid()") not in pids
    until(lambda: pool.stats().idle == 8)


def test_terminated_in_transaction(own_server: Server, make_pool: MakePool) -> None:
    own_server.execute("create table t (id int)")
    pool = make_pool(max_size=1)
    with pytest.raises(psycopg.OperationalError):
        with pool.connection() as conn:
            conn.execute("insert into t values (1)")
            own_server.execute("select pg_terminate_backend(%s, 5000)", backend_pid(conn))
            conn.execute("insert into t values (2)")
    assert pool.fetch_value("select count(*) from t") == 0


def test_terminated_in_transaction_and_noticed_at_commit(
    own_server: Server, make_pool: MakePool
) -> None:
    own_server.execute("create table t (id int)")
    pool = make_pool(max_size=1)
    with pytest.raises(psycopg.OperationalError):
        with pool.connection() as conn:
            conn.execute("insert into t values (1)")
            own_server.execute("select pg_terminate_backend(%s, 5000)", backend_pid(conn))
    assert pool.fetch_value("select count(*) from t") == 0


def test_terminated_in_a_query(own_server: Server, make_pool: MakePool) -> None:
    pool = make_pool(max_size=1)
    with ThreadPoolExecutor(1) as executor:
        call = executor.submit(pool.execute, "select pg_sleep(60)")
        until(
            lambda: own_server.execute(
                "select 1 from pg_stat_activity where wait_event = 'PgSleep'"
            )
        )
        for pid in own_server.backends("dbpool:faults"):
            own_server.execute("select pg_terminate_backend(%s)", pid)
        assert isinstance(call.exception(10), psycopg.OperationalError)
    assert pool.fetch_value("select 1") == 1
