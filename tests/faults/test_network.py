"""Network faults while connections are made, idle, or in use."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from dbpool import DatabaseMisconfigured, DatabaseUnavailable
from tests.pools import GRACE, SLACK, MakePool, assert_serves_all, await_up, fill, lines, terminate
from tests.postgres import Server, free_port, until
from tests.proxy import Mode, Proxy
from tests.threads import Load, Task

PID = "select pg_backend_pid()"


# Connecting


def _inject(proxy: Proxy, fault: str) -> None:
    if fault == "refused":
        proxy.refuse()
    else:
        proxy.mode = Mode[fault.upper()]


def _repair(proxy: Proxy) -> None:
    proxy.mode = Mode.PASS
    proxy.listen()
    proxy.drop()  # last: clients that are cut off reconnect at once


FAULTS = [("refused", "refused"), ("reset", "closed"), ("close", "closed"), ("silent", "timeout")]


@pytest.mark.parametrize(("fault", "kind"), FAULTS)
def test_callers_fail_within_the_grace_if_the_first_connect_fails(
    proxy: Proxy, make_pool: MakePool, fault: str, kind: str
) -> None:
    _inject(proxy, fault)
    pool = make_pool(proxy.conninfo, outage_grace=GRACE)
    callers = [Task(pool.getconn) for _ in range(3)]
    for caller in callers:
        error = caller.error()
        assert isinstance(error, DatabaseUnavailable)
        assert not isinstance(error, DatabaseMisconfigured)
        assert error.kind == kind
        assert caller.seconds < GRACE + 2 * SLACK
    _repair(proxy)
    await_up(pool)
    assert_serves_all(pool)


@pytest.mark.parametrize(("fault", "kind"), FAULTS)
def test_existing_connections_are_lent_while_connects_fail(
    proxy: Proxy, make_pool: MakePool, fault: str, kind: str
) -> None:
    pool = make_pool(proxy.conninfo, min_size=2, max_size=4, outage_grace=GRACE)
    pids = fill(pool)
    _inject(proxy, fault)
    with pool.connection(), pool.connection():
        assert isinstance(Task(pool.getconn).error(), DatabaseUnavailable)
    assert {pool.fetch_value(PID) for _ in range(20)} <= set(pids)
    # A pool that serves is "up", even if it cannot connect more.
    until(lambda: pool.fetch_value(PID) in pids and pool.state == "up")
    # Waiters are not rejected as long as these two connections keep coming back.
    failures = pool.stats().counters.connect_failures
    load = Load(lambda: pool.fetch_value(PID), threads=6)
    until(lambda: pool.stats().counters.connect_failures >= failures + 2)
    load.stop()
    assert load.errors == []
    _repair(proxy)
    until(lambda: not pool.breaker.is_failing)
    await_up(pool)
    assert_serves_all(pool)


def test_a_connection_past_its_lifetime_is_kept_as_long_as_connects_fail(
    proxy: Proxy, make_pool: MakePool
) -> None:
    pool = make_pool(proxy.conninfo, min_size=1, max_size=2, max_lifetime=0.3, outage_grace=GRACE)
    pid = pool.fetch_value(PID)
    expires_at = time.monotonic() + 0.3
    proxy.refuse()
    with pool.connection():
        assert isinstance(Task(pool.getconn).error(), DatabaseUnavailable)
    # Only that long: once no caller needs another connection, the pool makes no failing connects.
    until(lambda: time.monotonic() > expires_at)
    with pool.connection() as conn:
        conn.row_factory = dict_row  # so that its return takes the slow path
        assert conn.info.backend_pid == pid
    assert pool.fetch_value(PID) == pid
    proxy.listen()
    until(lambda: not pool.breaker.is_failing)
    assert pool.fetch_value(PID) != pid


def test_callers_fail_within_the_grace_if_the_network_falls_silent_while_growing(
    proxy: Proxy, make_pool: MakePool
) -> None:
    pool = make_pool(
        proxy.conninfo,
        min_size=1,
        max_size=2,
        ping_after=0.0,
        connect_timeout=10,
        outage_grace=GRACE,
    )
    fill(pool)
    proxy.mode = Mode.SILENT
    conn = pool.getconn()
    grower = Task(pool.getconn)  # starts a connect
    until(pool.breaker.pending)
    pool.putconn(conn)  # a sign of life after that connect began
    conn = grower.result()
    proxy.go_silent()
    caller = Task(pool.getconn)
    error = caller.error()
    pool.putconn(conn)
    assert isinstance(error, DatabaseUnavailable)
    assert caller.seconds < GRACE + 2 * SLACK
    _repair(proxy)
    until(lambda: not pool.breaker.is_failing)
    assert_serves_all(pool)


def test_after_a_failed_connect_the_other_due_connects_are_held_back(
    proxy: Proxy, make_pool: MakePool
) -> None:
    proxy.mode = Mode.CLOSE
    pool = make_pool(proxy.conninfo_for(sslmode="disable"), min_size=20, max_size=20)
    pool.open()
    until(lambda: pool.stats().counters.connect_failures and pool.stats().connecting == 1)
    assert proxy.accepted < 10  # one for each of three workers, and some retries
    _repair(proxy)
    await_up(pool)
    assert_serves_all(pool)


@pytest.mark.parametrize(("fault", "kind"), FAULTS)
def test_in_an_outage_one_connect_at_a_time_is_tried(
    proxy: Proxy, make_pool: MakePool, fault: str, kind: str
) -> None:
    pool = make_pool(proxy.conninfo, min_size=4, max_size=4, outage_grace=GRACE)
    fill(pool)
    _inject(proxy, fault)
    proxy.drop()
    Task(pool.getconn).error()
    until(lambda: len(pool.breaker.pending()) <= 1)
    proxy.drop()
    highest = 0
    attempted = pool.stats().counters.connect_failures
    deadline = time.monotonic() + 20
    while pool.stats().counters.connect_failures < attempted + 4 and time.monotonic() < deadline:
        highest = max(highest, len(pool.breaker.pending()))
        if fault == "silent":
            proxy.drop()
        with pytest.raises(DatabaseUnavailable):
            pool.getconn()
    assert highest <= 1  # an attempt that fails at once may go unseen
    assert pool.stats().counters.connect_failures >= attempted + 4
    _repair(proxy)
    await_up(pool)
    assert_serves_all(pool)


def test_a_slow_connect_is_no_outage_without_any_grace(proxy: Proxy, make_pool: MakePool) -> None:
    proxy.delay = 0.02  # for each of several messages
    pool = make_pool(proxy.conninfo, outage_grace=0)
    assert pool.fetch_value("select 1") == 1
    assert pool.stats().counters.rejected == 0


def test_a_connect_that_takes_longer_than_the_grace_still_ends_the_outage(
    proxy: Proxy, make_pool: MakePool
) -> None:
    pool = make_pool(proxy.conninfo, outage_grace=GRACE)
    proxy.delay = 0.2  # for each of several messages
    error = Task(pool.getconn).error()
    assert isinstance(error, DatabaseUnavailable)
    assert error.kind == "timeout"
    await_up(pool, 10.0)
    proxy.delay = 0.0
    assert pool.stats().counters.connect_failures == 0
    assert_serves_all(pool)


@pytest.mark.parametrize("refused", ["at once", "after waiting", "at the deadline"])
def test_a_dropped_error_keeps_none_of_its_callers_objects_alive(
    proxy: Proxy, make_pool: MakePool, refused: str
) -> None:
    proxy.refuse()
    pool = make_pool(proxy.conninfo, outage_grace=30 if refused == "at the deadline" else GRACE)
    if refused == "at once":
        Task(pool.getconn).error()

    def call() -> weakref.ref[object]:
        request = threading.Event()  # stands for an object of the caller
        with pytest.raises(DatabaseUnavailable):
            pool.getconn(timeout=0.1 if refused == "at the deadline" else 5.0)
        return weakref.ref(request)

    gc.disable()
    try:
        request = call()
        until(lambda: request() is None)  # the rejecting thread may still be returning
    finally:
        gc.enable()
    _repair(proxy)
    await_up(pool)


def test_a_host_name_that_resolves_later_is_used(own_server: Server, make_pool: MakePool) -> None:
    settings = {"conninfo": own_server.conninfo_for(host="nowhere.invalid")}
    pool = make_pool(lambda: settings["conninfo"], outage_grace=GRACE)
    error = Task(pool.getconn).error()
    assert type(error) is DatabaseUnavailable
    assert error.kind == "dns"
    settings["conninfo"] = own_server.conninfo
    await_up(pool)
    assert_serves_all(pool)


def test_one_of_several_hosts_is_enough(own_server: Server, make_pool: MakePool) -> None:
    hosts = f"host=127.0.0.1,127.0.0.1 port={free_port()},{own_server.port}"
    pool = make_pool(f"{hosts} user=postgres dbname=postgres")
    assert pool.fetch_value("select 1") == 1
    own_server.restart("immediate")
    assert_serves_all(pool)


# Idle


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
def test_connections_cut_while_idle_are_not_handed_out(
    proxy: Proxy, make_pool: MakePool, reset: bool
) -> None:
    pool = make_pool(proxy.conninfo, min_size=8, max_size=8)
    pids = fill(pool)
    proxy.drop(reset=reset)
    until(lambda: proxy.links == 0)
    seen = {pool.fetch_value(PID) for _ in range(20)}
    assert not seen & set(pids)
    assert pool.stats().counters.discarded["dead"] == 8
    assert_serves_all(pool)


def test_a_silent_network_costs_the_caller_one_ping_timeout_and_is_logged_once(
    proxy: Proxy, make_pool: MakePool, log: pytest.LogCaptureFixture
) -> None:
    pool = make_pool(proxy.conninfo, min_size=10, max_size=10, ping_after=0.0)
    pids = fill(pool)
    proxy.go_silent()
    caller = Task(pool.fetch_value, PID)
    assert caller.result() not in pids
    assert 0.25 < caller.seconds < 0.3 + SLACK
    assert pool.stats().counters.discarded["dead"] == 10
    assert_serves_all(pool)
    expected = ["pool 'faults': replaced 10 connections that did not answer"]
    until(lambda: [line for line in lines(log, logging.INFO) if "replaced" in line] == expected)
    proxy.drop()


def test_timeouts_hold_if_old_and_new_connections_are_silent(
    proxy: Proxy, make_pool: MakePool
) -> None:
    pool = make_pool(proxy.conninfo, min_size=4, max_size=4, ping_after=0.0)
    fill(pool)
    proxy.mode = Mode.SILENT
    proxy.go_silent()
    callers = [Task(pool.getconn, 0.6) for _ in range(8)]
    for caller in callers:
        assert isinstance(caller.error(), DatabaseUnavailable)
        assert 0.5 < caller.seconds < 0.6 + SLACK
    assert pool.stats().waiting == 0
    _repair(proxy)
    assert_serves_all(pool)


@pytest.mark.parametrize("timeout", [0.001, 0.1])
def test_a_ping_is_bounded_by_the_callers_deadline_too(
    proxy: Proxy, make_pool: MakePool, timeout: float
) -> None:
    pool = make_pool(proxy.conninfo, min_size=3, max_size=3, ping_after=0.0, ping_timeout=30)
    fill(pool)
    proxy.mode = Mode.SILENT
    proxy.go_silent()
    caller = Task(pool.getconn, timeout)
    assert isinstance(caller.error(), DatabaseUnavailable)
    assert caller.seconds < timeout + SLACK
    assert pool.stats().counters.discarded["dead"] <= 1, "more than one was pinged"
    _repair(proxy)
    assert_serves_all(pool)


def test_a_timeout_while_connections_are_pinged_is_not_pool_exhausted(
    proxy: Proxy, make_pool: MakePool
) -> None:
    pool = make_pool(proxy.conninfo, min_size=2, max_size=2, ping_after=0.0, ping_timeout=30)
    fill(pool)
    proxy.go_silent()
    callers = [Task(pool.getconn) for _ in range(2)]
    until(lambda: pool.stats().active == 2)
    assert isinstance(Task(pool.getconn, 0.1).error(), DatabaseUnavailable)
    proxy.drop()
    for caller in callers:
        pool.putconn(caller.result())
    assert_serves_all(pool)


def test_pings_answered_too_late_count_as_failed(proxy: Proxy, make_pool: MakePool) -> None:
    pool = make_pool(proxy.conninfo, min_size=2, max_size=2, ping_after=0.5)
    pids = fill(pool)
    until(lambda: all(time.monotonic() > c._record.idle_since + 0.5 for c in pool._store.bag.idle))
    proxy.delay = 0.2  # the round trip takes longer than ping_timeout
    assert pool.fetch_value(PID) not in pids
    assert pool.stats().counters.discarded["dead"] == 2
    proxy.delay = 0.0
    assert_serves_all(pool)


# In use


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
def test_a_connection_cut_in_a_query_fails_only_that_caller(
    own_server: Server, proxy: Proxy, make_pool: MakePool, reset: bool
) -> None:
    pool = make_pool(proxy.conninfo, max_size=1)
    caller = Task(pool.fetch_value, "select pg_sleep(60)")
    until(lambda: _busy_pids(own_server))
    next_one = Task(pool.fetch_value, "select 1")
    until(lambda: pool.stats().waiting == 1)
    proxy.drop(reset=reset)
    assert isinstance(caller.error(), psycopg.OperationalError)
    assert next_one.result() == 1
    assert pool.stats().counters.discarded["broken"] == 1
    assert_serves_all(pool)
    terminate(own_server, _busy_pids(own_server))


def test_run_repeats_a_transaction_that_was_cut(proxy: Proxy, make_pool: MakePool) -> None:
    pool = make_pool(proxy.conninfo, max_size=2)
    pool.execute("create table t (id int)")
    pids: list[int] = []

    def work(conn: psycopg.Connection[Any]) -> None:
        pids.append(conn.info.backend_pid)
        conn.execute("insert into t values (1)")
        if len(pids) == 1:
            proxy.drop(reset=True)
        conn.execute("insert into t values (2)")

    pool.run(work)
    assert len(pids) == 2
    assert pool.fetch_value("select count(*) from t") == 2
    assert_serves_all(pool)


def test_a_query_on_a_silent_network_delays_no_other_caller(
    own_server: Server, proxy: Proxy, make_pool: MakePool
) -> None:
    pool = make_pool(proxy.conninfo, max_size=2)
    stuck = Task(pool.fetch_value, "select pg_sleep(0.2)")
    until(lambda: _busy_pids(own_server))
    proxy.go_silent()
    assert [pool.fetch_value("select 1") for _ in range(10)] == [1] * 10
    proxy.drop()
    assert isinstance(stuck.error(), psycopg.OperationalError)
    assert_serves_all(pool)


def test_a_connection_cut_before_its_return_is_discarded(proxy: Proxy, make_pool: MakePool) -> None:
    pool = make_pool(proxy.conninfo, max_size=2)
    with pytest.raises(psycopg.OperationalError), pool.connection() as conn:
        conn.execute("select 1")
        proxy.drop(reset=True)
        # The end of the block commits, which fails.
    conn = pool.getconn()
    conn.execute("select 1")
    proxy.drop()
    pool.putconn(conn)
    assert pool.stats().counters.discarded["broken"] == 2
    assert_serves_all(pool)


# Repeated faults


def test_repeated_network_faults_under_load_lose_no_connection(
    proxy: Proxy, make_pool: MakePool
) -> None:
    pool = make_pool(proxy.conninfo, min_size=2, max_size=4, ping_after=0.0, outage_grace=GRACE)

    def call() -> None:
        try:
            pool.fetch_value("select 1")
        except DatabaseUnavailable:
            time.sleep(0.002)
            raise

    load = Load(call, threads=8)
    for fault, _ in FAULTS * 3:
        load.await_calls(20)
        _inject(proxy, fault)
        proxy.drop(reset=fault == "reset")
        load.await_calls(20)
        _repair(proxy)
    load.await_calls()
    load.stop()
    assert all(isinstance(error, psycopg.OperationalError) for error in load.errors)
    await_up(pool, 10.0)
    assert_serves_all(pool)


def _busy_pids(server: Server) -> list[int]:
    """The backends that run pg_sleep: they do not notice that their client has gone."""
    rows = server.execute(
        "select pid from pg_stat_activity where state = 'active' and query ~ '^select pg_sleep'"
    )
    return [pid for (pid,) in rows]
