"""A pool in an outage: which callers fail, how often it retries, when the outage ends."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from dbpool import DatabaseUnavailable, events
from tests.fake import FakeServer
from tests.pools import (
    GRACE,
    MakePool,
    Recorder,
    assert_serves_all,
    await_up,
    within,
)
from tests.postgres import until
from tests.threads import Task


def test_a_caller_skips_many_dead_connections_at_once(
    fake: FakeServer, make_pool: MakePool
) -> None:
    pool = make_pool(min_size=100)
    pool.wait()
    pool.resize(0, 100)
    fake.kill()
    with within(2.0):
        assert pool.fetch_value("select 1") == 1
    assert pool.stats().counters.discarded["dead"] == 100


def test_all_waiters_fail_when_the_breaker_opens(fake: FakeServer, make_pool: MakePool) -> None:
    pool = make_pool(max_size=2, outage_grace=0.5)
    out = [pool.getconn(), pool.getconn()]
    with ThreadPoolExecutor(6) as executor:
        calls = [executor.submit(pool.fetch_value, "select 1") for _ in range(6)]
        until(lambda: pool.stats().waiting == 6)
        fake.stop()
        with within(3.0):
            for conn in out:
                pool.putconn(conn)
            errors = [call.exception(10) for call in calls]
    # Two may have been handed over before the outage was noticed.
    assert sum(type(error) is DatabaseUnavailable for error in errors) >= 4
    assert all(isinstance(error, psycopg.OperationalError) for error in errors)


def test_reconnect_failed_is_called_once_and_retries_go_on(
    fake: FakeServer, make_pool: MakePool
) -> None:
    failed: list[object] = []
    pool = make_pool(reconnect_timeout=0.5, reconnect_failed=failed.append, outage_grace=GRACE)
    pool.fetch_value("select 1")
    fake.stop()
    with pytest.raises(DatabaseUnavailable):
        pool.fetch_value("select 1")
    until(lambda: failed)
    failures = pool.stats().counters.connect_failures
    until(lambda: pool.stats().counters.connect_failures >= failures + 2)
    assert failed == [pool]
    fake.accept()
    await_up(pool, 3.0)


def test_closing_ends_the_outage_for_listeners(make_pool: MakePool, fake: FakeServer) -> None:
    failed: list[object] = []
    recorder = Recorder()
    fake.hang()
    pool = make_pool(reconnect_timeout=0.0, reconnect_failed=failed.append, listeners=[recorder])
    pool.open()
    until(lambda: fake.attempts)
    pool.close(timeout=0.1)
    fake.refuse()  # now the attempt fails
    until(lambda: pool.stats().counters.connect_failures)
    until(lambda: not [t for t in threading.enumerate() if t.name.startswith("default-worker")])
    assert failed == []
    assert recorder.count(events.ConnectFailed) == 0


def test_a_pool_made_smaller_in_an_outage_goes_on_retrying(
    fake: FakeServer, make_pool: MakePool
) -> None:
    recorder = Recorder()
    pool = make_pool(max_size=4, listeners=[recorder], outage_grace=GRACE)
    held = [pool.getconn(), pool.getconn()]
    fake.stop()
    with pytest.raises(DatabaseUnavailable):
        pool.getconn()
    pool.resize(1, 2)
    failures = pool.stats().counters.connect_failures
    until(lambda: pool.stats().counters.connect_failures >= failures + 2)
    assert pool.state == "down"
    fake.accept()
    await_up(pool, 3.0)
    for conn in held:
        pool.putconn(conn)
    assert_serves_all(pool)
    pool.close()  # sends what is still queued
    assert recorder.count(events.CircuitOpened) == 1
    assert recorder.count(events.CircuitClosed) == 1


def test_a_reconnect_failed_that_hangs_blocks_no_other_pool(
    fake: FakeServer, make_pool: MakePool
) -> None:
    called, ends = threading.Event(), threading.Event()

    def hang(pool: object) -> None:
        called.set()
        ends.wait(30)

    unreachable = FakeServer()
    unreachable.refuse()
    unavailable = make_pool(unreachable, reconnect_timeout=0.1, reconnect_failed=hang)
    unavailable.open()
    try:
        assert called.wait(10)
        pool = make_pool(max_size=6)
        conns = Task(lambda: [pool.getconn() for _ in range(6)]).result(10)
        for conn in conns:
            pool.putconn(conn)
        assert_serves_all(pool)
    finally:
        ends.set()
        unavailable.close()


def test_waiters_that_the_breaker_rejects_are_counted_and_logged(
    fake: FakeServer, make_pool: MakePool
) -> None:
    recorder = Recorder()
    pool = make_pool(max_size=2, outage_grace=GRACE, listeners=[recorder])
    fake.stop()
    callers = [Task(pool.getconn) for _ in range(5)]
    assert all(isinstance(caller.error(), DatabaseUnavailable) for caller in callers)
    counters, parents = pool.stats().counters, pool.get_stats()
    assert (counters.rejected, counters.timeouts, counters.circuit_opened) == (5, 0, 1)
    assert (parents["requests_num"], parents["requests_errors"]) == (5, 5)
    until(lambda: recorder.count(events.Rejected) == 5)
    fake.accept()
    await_up(pool)


def test_a_pool_with_min_size_zero_notices_an_outage_between_rare_callers(
    fake: FakeServer, make_pool: MakePool
) -> None:
    pool = make_pool(min_size=0, max_size=2, timeout=0.1, outage_grace=GRACE)
    fake.stop()
    assert isinstance(Task(pool.getconn).error(), DatabaseUnavailable)
    until(lambda: pool.state == "down")  # although no caller waits
    fake.accept()
    await_up(pool)


def test_a_callback_that_ends_its_thread_does_not_end_the_pool(
    fake: FakeServer, make_pool: MakePool
) -> None:
    def time_out_callers(*_: object) -> None:
        raise SystemExit

    pool = make_pool(
        reset=time_out_callers, reconnect_failed=time_out_callers, reconnect_timeout=0.0, max_size=2
    )
    for _ in range(2 * len(pool._threads.threads[1:]) + 4):  # a worker resets each
        assert pool.fetch_value("select 1") == 1
    fake.kill()
    assert pool.fetch_value("select 1") == 1
    assert all(worker.is_alive() for worker in pool._threads.threads[1:])
    until(lambda: pool.stats().active == 0)
