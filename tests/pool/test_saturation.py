"""A server without room for more: no outage as long as connections come back."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from dbpool import DatabaseUnavailable, PoolExhausted
from tests.fake import FakeServer
from tests.pools import GRACE, SLACK, MakePool, assert_serves_all, await_up, fill
from tests.postgres import until
from tests.threads import Task


def test_a_full_server_is_no_outage_while_connections_are_out(
    fake: FakeServer, make_pool: MakePool
) -> None:
    pool = make_pool(min_size=1, max_size=4, outage_grace=GRACE)
    fill(pool)
    fake.max_connections = 1
    with pool.connection():
        caller = Task(pool.getconn, 1.0)  # longer than the grace
        error = caller.error()
        assert isinstance(error, DatabaseUnavailable)  # not PoolExhausted: connects fail
        assert error.kind == "saturated"
        assert 0.9 < caller.seconds < 1.0 + SLACK
        assert pool.breaker.state == "closed"
        waiter = Task(pool.fetch_value, "select 1")
        until(lambda: pool.stats().waiting == 1)
    assert waiter.result() == 1
    fake.max_connections = None
    until(lambda: not pool.breaker.is_failing)
    assert_serves_all(pool)


def test_callers_fail_after_the_grace_if_the_server_is_full_and_the_pool_empty(
    fake: FakeServer, make_pool: MakePool
) -> None:
    fake.max_connections = 0
    pool = make_pool(max_size=4, outage_grace=GRACE)
    callers = [Task(pool.getconn) for _ in range(4)]
    for caller in callers:
        error = caller.error()
        assert type(error) is DatabaseUnavailable
        assert error.kind == "saturated"
        assert caller.seconds < GRACE + 2 * SLACK
    fake.max_connections = None
    await_up(pool)
    assert_serves_all(pool)


def test_callers_wait_within_the_grace_for_a_full_server_to_have_room(
    fake: FakeServer, make_pool: MakePool
) -> None:
    fake.max_connections = 0
    pool = make_pool(max_size=4)
    callers = [Task(pool.fetch_value, "select 1") for _ in range(4)]
    until(lambda: pool.stats().counters.connect_failures >= 2)
    fake.max_connections = None
    assert [caller.result() for caller in callers] == [1] * 4
    assert_serves_all(pool)


def test_a_full_server_is_no_outage_while_idle_connections_live(
    fake: FakeServer, make_pool: MakePool
) -> None:
    fake.max_connections = 3
    pool = make_pool(min_size=6, max_size=6, outage_grace=GRACE)
    pool.open()
    until(lambda: pool.stats().idle == 3 and pool.breaker.failing_for > 3 * GRACE)
    assert pool.state == "up"
    assert pool.stats().counters.circuit_opened == 0
    assert pool.fetch_value("select 1") == 1
    fake.max_connections = None
    assert_serves_all(pool)


@pytest.mark.parametrize("callback", ["check", "reset"])
def test_a_slow_callback_is_no_fault_of_the_database(fake: FakeServer, callback: str) -> None:
    busy, done = threading.Event(), threading.Event()

    def wait(conn: Any) -> None:
        busy.set()
        done.wait(20)

    with fake.pool(max_size=1, timeout=0.2, **{callback: wait}) as pool:
        other = Task(pool.execute, "select 1")
        assert busy.wait(20)
        with pytest.raises(PoolExhausted, match="none, they are being checked or reset"):
            pool.getconn()
        done.set()
        assert other.result() == 1
