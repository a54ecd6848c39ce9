"""The server stops and comes back: soon, late, or slowly."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from dbpool import DatabaseMisconfigured, DatabaseUnavailable, events
from tests.faults.support import MakePool, Recorder, assert_whole, within
from tests.postgres import Server, until

MODES = pytest.mark.parametrize("mode", ["fast", "immediate"])


@MODES
def test_a_restart_between_requests_is_not_noticed(
    own_server: Server, make_pool: MakePool, mode: str
) -> None:
    pool = make_pool(min_size=10)
    pool.wait()
    own_server.restart(mode)
    with within(3.0):
        assert [pool.fetch_value("select 1") for _ in range(30)] == [1] * 30
    until(lambda: pool.stats().idle == 10)
    assert pool.stats().counters.discarded["dead"] >= 1


def test_many_dead_connections_are_passed_over_at_once(
    make_server: Callable[..., Server], make_pool: MakePool
) -> None:
    server = make_server(max_connections=120)
    pool = make_pool(server.conninfo, min_size=100)
    pool.wait()
    pool.resize(0, 100)
    server.restart("immediate")
    with within(2.0):
        assert pool.fetch_value("select 1") == 1
    assert pool.stats().counters.discarded["dead"] == 100
    pool.close()
    until(lambda: not server.backends("dbpool:faults"))


@MODES
def test_a_restart_under_load_fails_no_call_and_loses_no_row(
    own_server: Server, make_pool: MakePool, mode: str
) -> None:
    own_server.execute("create table t (id int primary key)")
    pool = make_pool(max_size=4)
    numbers, finished, enough = itertools.count(), set[int](), threading.Event()

    def insert(conn: psycopg.Connection[Any], n: int) -> None:
        conn.execute("insert into t values (%s) on conflict do nothing", [n])

    def work() -> None:
        while not enough.is_set():
            n = next(numbers)
            pool.run(insert, n, idempotent=True, timeout=15)
            finished.add(n)

    with ThreadPoolExecutor(8) as executor:
        calls = [executor.submit(work) for _ in range(8)]
        try:
            until(lambda: len(finished) > 100)
            own_server.restart(mode)
            before = len(finished)
            until(lambda: len(finished) > before + 100)
        finally:
            enough.set()
    for call in calls:
        call.result()
    assert {n for (n,) in own_server.execute("select id from t")} == finished


def test_an_outage_is_answered_at_once_with_its_cause_and_ends_by_itself(
    own_server: Server, make_pool: MakePool
) -> None:
    heard = Recorder()
    pool = make_pool(listeners=[heard])
    assert pool.fetch_value("select 1") == 1
    began = time.time()
    own_server.stop()
    with within(2.0), pytest.raises(DatabaseUnavailable) as caught:
        pool.fetch_value("select 1")
    error = caught.value
    assert not isinstance(error, DatabaseMisconfigured)
    assert error.kind == "refused"
    assert began - 1 <= error.since <= time.time()
    assert 0 <= error.retry_after <= 1.0
    assert isinstance(error.__cause__, psycopg.OperationalError)
    assert "refused" in str(error.__cause__)
    assert error.snapshot is not None
    assert error.snapshot.breaker.state in {"open", "half-open"}
    assert pool.state == "down"

    with within(1.0):
        others = []
        for _ in range(100):
            with pytest.raises(DatabaseUnavailable) as another:
                pool.fetch_value("select 1")
            others.append(another.value)
    assert len({id(other) for other in others}) == 100
    assert_whole(pool)

    own_server.start()
    until(lambda: pool.state == "up", 3.0)
    assert pool.fetch_value("select 1") == 1
    assert pool.breaker.state == "closed"
    assert pool.breaker.last_error is None
    assert heard.count(events.CircuitOpened) == 1
    assert heard.count(events.CircuitClosed) == 1


def test_all_who_wait_are_told_when_the_breaker_opens(
    own_server: Server, make_pool: MakePool
) -> None:
    pool = make_pool(max_size=2, outage_grace=0.5)
    out = [pool.getconn(), pool.getconn()]
    with ThreadPoolExecutor(6) as executor:
        calls = [executor.submit(pool.getconn) for _ in range(6)]
        until(lambda: pool.stats().waiting == 6)
        own_server.stop("immediate")
        with within(3.0):
            for conn in out:
                pool.putconn(conn)
                conn.close()
            errors = [call.exception(10) for call in calls]
    taken = [call.result() for call in calls if call.exception() is None]
    for conn in taken:  # handed over before anybody could know
        pool.putconn(conn)
    assert {type(error) for error in errors} - {type(None)} == {DatabaseUnavailable}
    assert len(taken) <= 2


def test_run_with_a_deadline_waits_an_outage_out(own_server: Server, make_pool: MakePool) -> None:
    pool = make_pool()
    pool.fetch_value("select 1")
    own_server.stop()
    with pytest.raises(DatabaseUnavailable):
        pool.run(lambda conn: conn.execute("select 1").fetchone())
    with ThreadPoolExecutor(1) as executor:
        call = executor.submit(
            pool.run, lambda conn: conn.execute("select 7").fetchone(), timeout=20
        )
        until(lambda: pool.state == "down")
        own_server.start()
        assert call.result(10) == (7,)


def test_run_with_a_deadline_gives_up_at_it(own_server: Server, make_pool: MakePool) -> None:
    pool = make_pool()
    pool.fetch_value("select 1")
    own_server.stop()
    with within(2.0), pytest.raises(DatabaseUnavailable):
        pool.run(lambda conn: conn.execute("select 1"), timeout=0.8)


def test_a_server_that_does_not_accept_yet_is_waited_for(
    own_server: Server, make_pool: MakePool
) -> None:
    own_server.stop()
    own_server.demote()
    own_server.options["hot_standby"] = "off"  # until it is promoted it says 57P03
    own_server.start()
    pool = make_pool()
    with within(3.0), pytest.raises(DatabaseUnavailable) as caught:
        pool.fetch_value("select 1")
    assert caught.value.kind == "starting"
    assert not isinstance(caught.value, DatabaseMisconfigured)
    own_server.promote()
    until(lambda: pool.state == "up", 3.0)
    assert pool.fetch_value("select 1") == 1


def test_an_outage_within_the_grace_is_ridden_through(
    own_server: Server, make_pool: MakePool
) -> None:
    heard = Recorder()
    pool = make_pool(outage_grace=10, timeout=20, listeners=[heard])
    pool.fetch_value("select 1")
    own_server.stop()
    with ThreadPoolExecutor(4) as executor:
        calls = [executor.submit(pool.fetch_value, "select 1") for _ in range(4)]
        until(lambda: heard.count(events.ConnectFailed) >= 2)
        own_server.start()
        assert [call.result(10) for call in calls] == [1] * 4
    assert heard.count(events.CircuitOpened) == 0


def test_reconnect_failed_is_called_once_and_probing_goes_on(
    own_server: Server, make_pool: MakePool
) -> None:
    told: list[object] = []
    pool = make_pool(reconnect_timeout=0.5, reconnect_failed=told.append)
    pool.fetch_value("select 1")
    own_server.stop()
    with pytest.raises(DatabaseUnavailable):
        pool.fetch_value("select 1")
    until(lambda: told)
    failures = pool.stats().counters.connect_failures
    until(lambda: pool.stats().counters.connect_failures >= failures + 2)
    assert told == [pool]
    own_server.start()
    until(lambda: pool.state == "up", 3.0)
