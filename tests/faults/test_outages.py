"""The server is away for longer than anybody would wait, and comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from dbpool import DatabaseMisconfigured, DatabaseUnavailable, events
from tests.pools import GRACE, MakePool, Recorder, assert_serves_all, await_up, within
from tests.postgres import Server, free_port, until
from tests.proxy import Mode, Proxy
from tests.threads import Task

MODES = pytest.mark.parametrize("mode", ["fast", "immediate"])


def test_many_dead_connections_are_passed_over_at_once(
    make_server: Callable[..., Server], make_pool: MakePool
) -> None:
    server = make_server(max_connections=120)
    pool = make_pool(server=server, min_size=100)
    pool.wait()
    pool.resize(0, 100)
    server.restart("immediate")
    with within(2.0):
        assert pool.fetch_value("select 1") == 1
    assert pool.stats().counters.discarded["dead"] == 100


def test_an_outage_is_answered_at_once_with_its_cause_and_ends_by_itself(
    own_server: Server, make_pool: MakePool
) -> None:
    heard = Recorder()
    pool = make_pool(listeners=[heard], outage_grace=GRACE)
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
    pool.close()  # all is told then
    assert heard.count(events.CircuitOpened) == 1
    assert heard.count(events.CircuitClosed) == 1


def test_all_who_wait_are_told_when_the_breaker_opens(
    own_server: Server, make_pool: MakePool
) -> None:
    pool = make_pool(max_size=2, outage_grace=0.5)
    out = [pool.getconn(), pool.getconn()]
    with ThreadPoolExecutor(6) as executor:
        calls = [executor.submit(pool.fetch_value, "select 1") for _ in range(6)]
        until(lambda: pool.stats().waiting == 6)
        own_server.stop("immediate")
        with within(3.0):
            for conn in out:
                pool.putconn(conn)
            errors = [call.exception(10) for call in calls]
    # Two may have been handed over before anybody could know.
    assert sum(type(error) is DatabaseUnavailable for error in errors) >= 4
    assert all(isinstance(error, psycopg.OperationalError) for error in errors)


def test_run_with_a_deadline_waits_an_outage_out(own_server: Server, make_pool: MakePool) -> None:
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


def test_run_with_a_deadline_gives_up_at_it(own_server: Server, make_pool: MakePool) -> None:
    pool = make_pool(outage_grace=GRACE)
    pool.fetch_value("select 1")
    own_server.stop()
    with within(2.0), pytest.raises(DatabaseUnavailable):
        pool.run(lambda conn: conn.execute("select 1"), timeout=0.8)


def test_reconnect_failed_is_called_once_and_probing_goes_on(
    own_server: Server, make_pool: MakePool
) -> None:
    told: list[object] = []
    pool = make_pool(reconnect_timeout=0.5, reconnect_failed=told.append, outage_grace=GRACE)
    pool.fetch_value("select 1")
    own_server.stop()
    with pytest.raises(DatabaseUnavailable):
        pool.fetch_value("select 1")
    until(lambda: told)
    failures = pool.stats().counters.connect_failures
    until(lambda: pool.stats().counters.connect_failures >= failures + 2)
    assert told == [pool]
    own_server.start()
    await_up(pool, 3.0)


def test_closing_ends_the_outage_for_its_watchers(make_pool: MakePool, proxy: Proxy) -> None:
    told: list[object] = []
    heard = Recorder()
    proxy.mode = Mode.SILENT
    pool = make_pool(
        proxy.conninfo, reconnect_timeout=0.0, reconnect_failed=told.append,
        listeners=[heard],
    )  # fmt: skip
    pool.open()
    until(lambda: proxy.links)
    pool.close(timeout=0.1)
    proxy.drop()  # now the attempt fails
    until(lambda: pool.stats().counters.connect_failures)
    until(lambda: not [t for t in threading.enumerate() if t.name.startswith("faults-worker")])
    assert told == []
    assert heard.count(events.ConnectFailed) == 0


def test_a_pool_made_smaller_in_an_outage_goes_on_probing(
    own_server: Server, make_pool: MakePool
) -> None:
    heard = Recorder()
    pool = make_pool(max_size=4, listeners=[heard], outage_grace=GRACE)
    held = [pool.getconn(), pool.getconn()]
    own_server.stop("immediate")
    with pytest.raises(DatabaseUnavailable):
        pool.getconn()
    pool.resize(1, 2)
    failures = pool.stats().counters.connect_failures
    until(lambda: pool.stats().counters.connect_failures >= failures + 2)
    assert pool.state == "down"
    own_server.start()
    await_up(pool, 3.0)
    for conn in held:
        pool.putconn(conn)
    assert_serves_all(pool)
    pool.close()  # all is told then
    assert heard.count(events.CircuitOpened) == 1
    assert heard.count(events.CircuitClosed) == 1


def test_a_reconnect_failed_that_hangs_is_in_no_other_pools_way(
    own_server: Server, make_pool: MakePool
) -> None:
    called, ends = threading.Event(), threading.Event()

    def hang(pool: object) -> None:
        called.set()
        ends.wait(30)

    down = make_pool(
        own_server.conninfo_for(port=free_port()), reconnect_timeout=0.1, reconnect_failed=hang
    )
    down.open()
    try:
        assert called.wait(10)
        pool = make_pool(max_size=6)
        conns = Task(lambda: [pool.getconn() for _ in range(6)]).result(10)
        for conn in conns:
            pool.putconn(conn)
        assert_serves_all(pool)
    finally:
        ends.set()
        down.close()


@pytest.mark.parametrize("way", ["returned", "block"])
def test_returning_what_was_not_used_in_an_outage_is_no_sign_of_life(
    own_server: Server, make_pool: MakePool, way: str
) -> None:
    pool = make_pool(max_size=2, outage_grace=2.0)
    block = pool.connection()
    conn = pool.getconn() if way == "returned" else block.__enter__()
    own_server.stop("fast")
    until(lambda: pool.state == "down" or Task(pool.getconn).error() is None)
    if way == "returned":
        pool.putconn(conn)
    else:
        block.__exit__(None, None, None)
    with within(1.5), pytest.raises(DatabaseUnavailable):  # less than the grace
        pool.getconn()
    assert pool.state == "down"
    own_server.start()
    await_up(pool)
    assert_serves_all(pool)


def test_who_waits_when_the_breaker_opens_is_counted_and_told_of(
    own_server: Server, make_pool: MakePool
) -> None:
    heard = Recorder()
    pool = make_pool(max_size=2, outage_grace=GRACE, listeners=[heard])
    own_server.stop("fast")
    callers = [Task(pool.getconn) for _ in range(5)]
    assert all(isinstance(caller.error(), DatabaseUnavailable) for caller in callers)
    counters, parents = pool.stats().counters, pool.get_stats()
    assert (counters.rejected, counters.timeouts, counters.circuit_opened) == (5, 0, 1)
    assert (parents["requests_num"], parents["requests_errors"]) == (5, 5)
    until(lambda: heard.count(events.Rejected) == 5)
    own_server.start()
    await_up(pool)


def test_rare_callers_of_a_pool_without_a_minimum_hear_of_an_outage_at_once(
    own_server: Server, make_pool: MakePool
) -> None:
    pool = make_pool(min_size=0, max_size=2, timeout=0.1, outage_grace=GRACE)
    own_server.stop("fast")
    assert isinstance(Task(pool.getconn).error(), DatabaseUnavailable)
    until(lambda: pool.state == "down")  # although nobody waits
    own_server.start()
    await_up(pool)


def test_a_callback_that_ends_its_thread_does_not_end_the_pool(
    own_server: Server, make_pool: MakePool
) -> None:
    def give_up(*_: object) -> None:
        raise SystemExit

    pool = make_pool(reset=give_up, reconnect_failed=give_up, reconnect_timeout=0.0, max_size=2)
    for _ in range(2 * len(pool._workers) + 4):  # each return is reset in a worker
        assert pool.fetch_value("select 1") == 1
    own_server.restart("fast")
    assert pool.fetch_value("select 1") == 1
    assert all(worker.is_alive() for worker in pool._workers)
    until(lambda: pool.stats().active == 0)
