"""Backends are killed, terminated or frozen while the server itself works."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from dbpool import DatabaseUnavailable, Pool
from dbpool.pool._pool import _MAX_UNCHECKED_USE
from tests.pools import (
    GRACE,
    SLACK,
    assert_serves_all,
    await_exit,
    await_server_messages,
    await_up,
    fill,
    terminate,
    within,
)
from tests.postgres import Server, until
from tests.threads import Load, Task

PID = "select pg_backend_pid()"


# Killed


def test_callers_wait_while_the_server_recovers_from_a_killed_backend(
    own_server: Server, make_pool: Callable[..., Pool]
) -> None:
    pool = make_pool(min_size=4, max_size=4)
    pids = fill(pool)
    os.kill(pids[0], signal.SIGKILL)  # the postmaster ends all other backends and recovers
    await_exit(own_server, pids)
    assert pool.fetch_value(PID) not in pids
    assert_serves_all(pool)


def test_a_backend_killed_in_a_query_fails_only_its_caller(
    own_server: Server, make_pool: Callable[..., Pool]
) -> None:
    pool = make_pool(min_size=2, max_size=4)
    pids = fill(pool)
    caller = Task(pool.fetch_value, "select pg_sleep(60)")
    until(lambda: "pg_sleep" in str(_queries(own_server, pids)))
    (busy,) = [pid for pid, query in _queries(own_server, pids) if "pg_sleep" in query]
    os.kill(busy, signal.SIGKILL)
    assert isinstance(caller.error(), psycopg.OperationalError)
    await_exit(own_server, pids)
    assert pool.fetch_value(PID) not in pids
    assert pool.stats().counters.discarded["broken"] == 1
    assert_serves_all(pool)


def test_a_pool_serves_after_all_backends_were_killed(
    own_server: Server, make_pool: Callable[..., Pool]
) -> None:
    pool = make_pool(min_size=6, max_size=6)
    pids = fill(pool)
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # the postmaster was quicker
            pass
    assert pool.run(_pid, timeout=30) not in pids
    assert_serves_all(pool)


# Terminated


def test_idle_connections_that_were_terminated_are_not_handed_out(
    own_server: Server, make_pool: Callable[..., Pool]
) -> None:
    pool = make_pool(min_size=8, max_size=8)
    pids = fill(pool)
    terminate(own_server, pids[3:])
    seen = {pool.fetch_value(PID) for _ in range(20)}
    assert seen.isdisjoint(pids[3:])
    assert_serves_all(pool)
    assert pool.stats().counters.discarded["dead"] == 5
    assert pool.breaker.state == "closed"


def test_a_caller_is_served_each_time_all_idle_connections_were_terminated(
    own_server: Server, make_pool: Callable[..., Pool]
) -> None:
    pool = make_pool(min_size=5, max_size=5)
    for _ in range(5):
        pids = fill(pool)
        terminate(own_server, pids)
        assert pool.fetch_value(PID) not in pids
    assert_serves_all(pool)


def test_terminations_under_load_fail_at_most_the_terminated_connections(
    own_server: Server, make_pool: Callable[..., Pool]
) -> None:
    pool = make_pool(min_size=4, max_size=4)
    load = Load(lambda: pool.fetch_value(PID), threads=4)
    load.await_calls()
    killed = 0
    for _ in range(10):
        pids = own_server.backends(f"dbpool:{pool.name}")
        terminate(own_server, pids)
        killed += len(pids)
        load.await_calls(20)
    load.stop()
    assert len(load.errors) <= killed
    assert all(not isinstance(error, DatabaseUnavailable) for error in load.errors)
    assert_serves_all(pool)


def test_a_holder_terminated_in_a_transaction_gets_an_error_and_its_slot_is_free(
    own_server: Server, make_pool: Callable[..., Pool]
) -> None:
    pool = make_pool(max_size=1)
    pool.execute("create table t (id int)")
    with pytest.raises(psycopg.OperationalError), pool.connection() as conn:
        conn.execute("insert into t values (1)")
        terminate(own_server, [conn.info.backend_pid])
        conn.execute("insert into t values (2)")
    assert pool.fetch_value("select count(*) from t") == 0
    assert pool.stats().counters.discarded["broken"] == 1
    assert_serves_all(pool)


@pytest.mark.parametrize("is_changed", [False, True])  # a changed attribute is restored on return
@pytest.mark.parametrize("options", [{}, {"reset": lambda conn: None}])
def test_a_connection_terminated_while_held_is_not_handed_to_a_waiter(
    own_server: Server, make_pool: Callable[..., Pool], options: dict[str, Any], is_changed: bool
) -> None:
    pool = make_pool(max_size=1, **options)
    conn = pool.getconn()
    pid = conn.info.backend_pid
    if is_changed:
        conn.prepare_threshold = 7
    waiter = Task(pool.fetch_value, PID)
    until(lambda: pool.stats().waiting)
    terminate(own_server, [pid])
    await_server_messages(pool)
    time.sleep(_MAX_UNCHECKED_USE)  # after a shorter use it would be handed over unchecked
    pool.putconn(conn)
    assert waiter.result() != pid
    assert_serves_all(pool)


def test_check_waits_for_silent_connections_together(
    own_server: Server, make_pool: Callable[..., Pool]
) -> None:
    pool = make_pool(min_size=5, max_size=5, ping_timeout=0.5, ping_after=0.0)
    fill(pool)
    own_server.freeze(own_server.backends(f"dbpool:{pool.name}"))
    with within(5 * 0.5):
        pool.check()
    assert pool.stats().counters.discarded["dead"] == 5
    own_server.thaw()
    assert_serves_all(pool)


def test_check_keeps_connections_that_answered(
    own_server: Server, make_pool: Callable[..., Pool]
) -> None:
    pool = make_pool(min_size=3, max_size=3, ping_timeout=0.5, ping_after=0.0)
    *healthy, frozen = fill(pool)
    own_server.freeze([frozen])
    pool.check()
    own_server.thaw()
    assert set(healthy) <= set(fill(pool))
    assert pool.stats().counters.discarded["dead"] == 1


def test_other_connections_serve_while_check_waits_for_one(
    own_server: Server, make_pool: Callable[..., Pool]
) -> None:
    pool = make_pool(min_size=3, max_size=3, ping_timeout=2.0)
    own_server.freeze(fill(pool)[:1])
    checking = Task(pool.check)
    until(lambda: pool.stats().active == 1)
    with within(1.0):
        for _ in range(10):
            assert pool.fetch_value("select 1") == 1
    assert pool.stats().active == 1  # check still waits for the frozen connection
    checking.result()
    own_server.thaw()
    assert pool.stats().counters.discarded["dead"] == 1
    assert_serves_all(pool)


def test_a_caller_terminated_in_a_query_gets_admin_shutdown(
    own_server: Server, make_pool: Callable[..., Pool]
) -> None:
    pool = make_pool(max_size=2)
    caller = Task(pool.fetch_value, "select pg_sleep(60)")
    name = f"dbpool:{pool.name}"
    until(lambda: "pg_sleep" in str(_queries(own_server, own_server.backends(name))))
    terminate(own_server, own_server.backends(name))
    assert isinstance(caller.error(), psycopg.errors.AdminShutdown)
    assert pool.fetch_value("select 1") == 1
    assert_serves_all(pool)


def test_run_repeats_a_transaction_that_was_terminated(
    own_server: Server, make_pool: Callable[..., Pool]
) -> None:
    pool = make_pool(max_size=2)
    pool.execute("create table t (id int)")
    pids: list[int] = []

    def work(conn: psycopg.Connection[Any]) -> None:
        pids.append(conn.info.backend_pid)
        conn.execute("insert into t values (1)")
        if len(pids) == 1:
            terminate(own_server, pids)
        conn.execute("insert into t values (2)")

    pool.run(work)
    assert len(set(pids)) == 2
    assert pool.fetch_all("select id from t order by id") == [(1,), (2,)]
    assert_serves_all(pool)


# Frozen


def test_a_frozen_idle_backend_costs_the_caller_one_ping_timeout(
    own_server: Server, make_pool: Callable[..., Pool]
) -> None:
    pool = make_pool(min_size=2, max_size=2, ping_after=0.0)
    pids = fill(pool)
    own_server.freeze([pool.fetch_value(PID)])  # the connection that is lent next
    caller = Task(pool.fetch_value, PID)
    assert caller.result() in set(own_server.backends()) | set(pids)
    assert caller.seconds < 0.3 + SLACK  # one ping_timeout
    own_server.thaw()
    assert_serves_all(pool)


def test_callers_of_a_frozen_server_time_out_and_are_served_after_it_thaws(
    own_server: Server, make_pool: Callable[..., Pool]
) -> None:
    pool = make_pool(min_size=3, max_size=3, ping_after=0.0)
    pids = fill(pool)
    own_server.freeze([*pids, own_server.postmaster_pid])
    callers = [Task(pool.getconn, 0.7) for _ in range(6)]
    for caller in callers:
        assert isinstance(caller.error(), DatabaseUnavailable)
        assert 0.6 < caller.seconds < 0.7 + SLACK
    thawed = time.monotonic()
    own_server.thaw()
    assert pool.fetch_value("select 1") == 1
    assert time.monotonic() - thawed < 1.0 + SLACK
    assert_serves_all(pool)


def test_with_a_frozen_postmaster_existing_connections_still_serve(
    own_server: Server, make_pool: Callable[..., Pool]
) -> None:
    pool = make_pool(min_size=2, max_size=3, connect_timeout=2, outage_grace=GRACE)
    pids = fill(pool)
    own_server.freeze([own_server.postmaster_pid])
    with pool.connection() as first, pool.connection() as second:
        began = time.monotonic()
        assert isinstance(Task(pool.getconn).error(), DatabaseUnavailable)
        assert time.monotonic() - began < GRACE + 2 * SLACK
        assert {first.info.backend_pid, second.info.backend_pid} == set(pids)
    # The pool lends existing connections although the breaker is open.
    for _ in range(20):
        assert pool.fetch_value(PID) in pids
    own_server.thaw()
    await_up(pool)
    assert_serves_all(pool)


def test_a_first_connect_to_a_frozen_server_fails_within_the_grace(
    own_server: Server, make_pool: Callable[..., Pool]
) -> None:
    pool = make_pool(outage_grace=GRACE)
    own_server.freeze([own_server.postmaster_pid])
    caller = Task(pool.getconn)
    error = caller.error()
    assert isinstance(error, DatabaseUnavailable)
    assert error.kind == "timeout"
    assert caller.seconds < GRACE + SLACK
    own_server.thaw()
    await_up(pool)
    assert_serves_all(pool)


def test_after_a_retry_a_dropped_connection_is_freed_by_reference_count(
    own_server: Server, make_pool: Callable[..., Pool]
) -> None:
    pool = make_pool(max_size=1)
    pids: list[int] = []

    def work(conn: psycopg.Connection[Any]) -> None:
        pids.append(conn.info.backend_pid)
        if len(pids) == 1:
            terminate(own_server, pids)
        conn.execute("select 1")

    gc.disable()
    try:
        pool.run(work)
        pool.getconn()  # the result is dropped
        assert pool.fetch_value("select 1") == 1
    finally:
        gc.enable()
    assert pool.stats().counters.discarded["collected"] == 1


def _queries(server: Server, pids: list[int]) -> list[tuple[Any, ...]]:
    return server.execute(
        "select pid, query from pg_stat_activity where pid = any(%s) and state = 'active'", pids
    )


def _pid(conn: psycopg.Connection[Any]) -> Any:
    (pid,) = conn.execute(PID).fetchone() or (0,)
    return pid
