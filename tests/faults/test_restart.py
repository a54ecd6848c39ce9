"""A server restarts: callers wait for a short one, and fail at once in a long one."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from dbpool import DatabaseUnavailable, Pool
from tests.pools import GRACE, SLACK, assert_serves_all, await_up, fill
from tests.postgres import Server, until
from tests.threads import Load, Task

MODES = ["fast", "immediate"]


@pytest.mark.parametrize("mode", MODES)
def test_callers_after_a_restart_do_not_notice_it(
    own_server: Server, make_pool: Callable[..., Pool], mode: str
) -> None:
    pool = make_pool(min_size=10, max_size=10)
    before = fill(pool)
    own_server.restart(mode)
    after = {pool.fetch_value("select pg_backend_pid()") for _ in range(30)}
    assert not after & set(before)
    assert pool.stats().counters.discarded["dead"] >= 1
    assert_serves_all(pool)


@pytest.mark.parametrize("mode", MODES)
def test_callers_wait_for_a_restart_shorter_than_the_grace(
    own_server: Server, make_pool: Callable[..., Pool], mode: str
) -> None:
    pool = make_pool(min_size=4, max_size=4, timeout=30)
    fill(pool)
    own_server.stop(mode)
    callers = [Task(pool.fetch_value, "select 1") for _ in range(8)]
    until(lambda: pool.stats().waiting == 8)
    own_server.start()
    assert [caller.result() for caller in callers] == [1] * 8
    assert pool.breaker.state == "closed"
    assert_serves_all(pool)


@pytest.mark.parametrize("mode", MODES)
def test_a_restart_under_load_fails_only_statements_in_flight(
    own_server: Server, make_pool: Callable[..., Pool], mode: str
) -> None:
    pool = make_pool(max_size=6, timeout=30)
    load = Load(lambda: pool.fetch_value("select 1"), threads=6)
    load.await_calls()
    own_server.restart(mode)
    load.await_calls()
    load.stop()
    # Each thread may have had one statement in flight; no thread failed to get a connection.
    assert len(load.errors) <= 6
    assert all(type(error) is not DatabaseUnavailable for error in load.errors)
    assert all(isinstance(error, psycopg.OperationalError) for error in load.errors)
    assert_serves_all(pool)


@pytest.mark.parametrize("mode", MODES)
def test_run_loses_and_doubles_nothing_in_a_restart_under_load(
    own_server: Server, make_pool: Callable[..., Pool], mode: str
) -> None:
    pool = make_pool(max_size=8)
    pool.execute("create table t (id text primary key)")
    calls: list[str] = []

    def insert(conn: psycopg.Connection[Any], key: str) -> None:
        conn.execute("insert into t values (%s) on conflict do nothing", [key])

    def call() -> None:
        key = uuid.uuid4().hex
        calls.append(key)
        pool.run(insert, key, idempotent=True, timeout=60, attempts=20)

    load = Load(call, threads=8)
    load.await_calls()
    own_server.restart(mode)
    load.await_calls()
    load.stop()
    assert load.errors == []
    assert {key for (key,) in pool.fetch_all("select id from t")} == set(calls)
    assert_serves_all(pool)


def test_callers_fail_at_once_in_a_stop_longer_than_the_grace(
    own_server: Server, make_pool: Callable[..., Pool]
) -> None:
    pool = make_pool(min_size=2, max_size=4, outage_grace=GRACE)
    fill(pool)
    own_server.stop()
    waiters = [Task(pool.getconn) for _ in range(4)]
    for waiter in waiters:
        error = waiter.error()
        assert isinstance(error, DatabaseUnavailable)
        assert error.kind == "refused"
        assert isinstance(error.__cause__, psycopg.OperationalError)
        assert waiter.seconds < GRACE + 2 * SLACK  # the grace and one attempt, not the timeout
    began = time.monotonic()
    for _ in range(100):
        with pytest.raises(DatabaseUnavailable):
            pool.getconn()
    assert time.monotonic() - began < SLACK
    assert pool.state == "down"
    own_server.start()
    await_up(pool)
    assert_serves_all(pool)


def test_callers_are_served_as_soon_as_a_stopped_server_is_back(
    own_server: Server, make_pool: Callable[..., Pool]
) -> None:
    pool = make_pool(max_size=4, outage_grace=GRACE)

    def call() -> None:
        try:
            pool.fetch_value("select 1")
        except psycopg.OperationalError:
            time.sleep(0.001)  # a rejected caller comes again
            raise

    load = Load(call)
    load.await_calls()
    own_server.stop()
    until(lambda: pool.state == "down")
    load.await_calls()
    own_server.start()
    await_up(pool)
    failed = len(load.errors)
    load.await_calls()
    load.stop()
    assert len(load.errors) <= failed + 6  # calls that were being rejected at that moment
    assert_serves_all(pool)


def test_a_killed_postmaster_is_an_outage_until_the_server_is_started(
    own_server: Server, make_pool: Callable[..., Pool]
) -> None:
    pool = make_pool(min_size=3, max_size=3, outage_grace=GRACE)
    fill(pool)
    own_server.kill_postmaster()
    assert isinstance(Task(pool.fetch_value, "select 1").error(), DatabaseUnavailable)
    own_server.start()
    assert pool.run(lambda conn: conn.execute("select 1").fetchone(), timeout=20) == (1,)
    assert_serves_all(pool)


def test_callers_wait_for_a_server_that_is_starting_up(
    make_server: Callable[..., Server], make_pool: Callable[..., Pool]
) -> None:
    standby = make_server()
    # A standby without a primary to recover from keeps answering 57P03.
    standby.stop()
    (standby.data / "standby.signal").touch()
    standby.options["hot_standby"] = "off"
    standby.start()
    pool = make_pool(server=standby, outage_grace=GRACE)
    error = Task(pool.fetch_value, "select 1").error()
    assert isinstance(error, DatabaseUnavailable)
    assert error.kind == "starting"
    caller = Task(lambda: pool.run(lambda c: c.execute("select 1").fetchone(), timeout=30))
    standby.promote()
    assert caller.result() == (1,)
    assert_serves_all(pool)
