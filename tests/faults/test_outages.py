"""The server is down for longer than callers wait, and comes back."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from dbpool import DatabaseMisconfigured, DatabaseUnavailable, events
from tests.pools import GRACE, MakePool, Recorder, assert_serves_all, await_up, within
from tests.postgres import Server, until
from tests.threads import Task

MODES = pytest.mark.parametrize("mode", ["fast", "immediate"])


def test_callers_in_an_outage_fail_at_once_and_it_ends_by_itself(
    own_server: Server, make_pool: MakePool
) -> None:
    recorder = Recorder()
    pool = make_pool(listeners=[recorder], outage_grace=GRACE)
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
    own_server.start()
    await_up(pool, 3.0)
    assert pool.fetch_value("select 1") == 1
    assert pool.breaker.state == "closed"
    assert pool.breaker.last_error is None
    pool.close()  # sends what is still queued
    assert recorder.count(events.CircuitOpened) == 1
    assert recorder.count(events.CircuitClosed) == 1


def test_run_with_a_timeout_waits_for_the_end_of_an_outage(
    own_server: Server, make_pool: MakePool
) -> None:
    pool = make_pool(outage_grace=GRACE)
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


def test_run_gives_up_at_its_timeout(own_server: Server, make_pool: MakePool) -> None:
    pool = make_pool(outage_grace=GRACE)
    pool.fetch_value("select 1")
    own_server.stop()
    with within(2.0), pytest.raises(DatabaseUnavailable):
        pool.run(lambda conn: conn.execute("select 1"), timeout=0.8)


@pytest.mark.parametrize("method", ["returned", "block"])
def test_returning_an_unused_connection_does_not_end_an_outage(
    own_server: Server, make_pool: MakePool, method: str
) -> None:
    pool = make_pool(max_size=2, outage_grace=2.0)
    block = pool.connection()
    conn = pool.getconn() if method == "returned" else block.__enter__()
    own_server.stop("fast")
    until(lambda: pool.state == "down" or Task(pool.getconn).error() is None)
    if method == "returned":
        pool.putconn(conn)
    else:
        block.__exit__(None, None, None)
    with within(1.5), pytest.raises(DatabaseUnavailable):  # less than the grace
        pool.getconn()
    assert pool.state == "down"
    own_server.start()
    await_up(pool)
    assert_serves_all(pool)
