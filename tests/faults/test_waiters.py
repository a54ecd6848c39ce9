"""Waiters that are torn away, and pools that are closed at bad moments."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from weakref import ref

import pytest
from psycopg_pool import PoolClosed

from dbpool import DatabaseUnavailable, PoolExhausted
from dbpool.holders import Owner
from tests.pools import GRACE, MakePool, assert_adds_up, assert_serves_all, fill, within
from tests.postgres import Server, until
from tests.proxy import Mode, Proxy
from tests.threads import Task


@contextmanager
def alarm(seconds: float, raising: type[BaseException]) -> Iterator[None]:
    """Raise in this, the main thread, after that long, wherever it is."""

    def ring(number: int, frame: object) -> None:
        raise raising

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


class Timeout(BaseException):
    """As gevent's: no Exception, and raised from outside."""


TORN = pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, Timeout])


@TORN
def test_torn_away_while_all_are_out(make_pool: MakePool, error: type[BaseException]) -> None:
    pool = make_pool(max_size=1)
    conn = pool.getconn()
    with pytest.raises(error), alarm(0.05, error):
        pool.getconn()
    assert pool.stats().waiting == 0
    pool.putconn(conn)
    assert_serves_all(pool)


@TORN
def test_torn_away_while_a_connection_is_made(
    proxy: Proxy, make_pool: MakePool, error: type[BaseException]
) -> None:
    pool = make_pool(proxy.conninfo, max_size=2)
    proxy.delay = 0.1
    with pytest.raises(error), alarm(0.05, error):
        pool.getconn()
    assert pool.stats().waiting == 0
    assert_adds_up(pool)
    proxy.delay = 0.0
    assert_serves_all(pool)


@pytest.mark.parametrize("torn", [False, True])
def test_served_in_the_moment_in_which_it_gives_up(make_pool: MakePool, torn: bool) -> None:
    pool = make_pool(max_size=1)
    conn = pool.getconn()
    step = Owner()
    with pool._lock:
        waiter = pool._queue_up(ref(step), time.monotonic(), 0.0)
    pool.putconn(conn)
    if not torn:
        pool._expire(waiter)
        assert (waiter.conn, waiter.error) == (conn, None)
    pool._recover(ref(step))
    assert pool.stats().counters.timeouts == 0
    assert_serves_all(pool)


def test_torn_away_at_any_moment_of_the_wait_nothing_is_lost(make_pool: MakePool) -> None:
    pool = make_pool(max_size=2)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            with pool.connection():
                pass

    def ring(number: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code.co_name == "_await":
            raise Timeout
        signal.setitimer(signal.ITIMER_REAL, 0.0001)  # it does not wait: again, soon

    others = [Task(work) for _ in range(4)]
    previous = signal.signal(signal.SIGALRM, ring)
    try:
        for _ in range(200):
            with pytest.raises(Timeout):
                signal.setitimer(signal.ITIMER_REAL, 0.0002)
                while True:
                    pool.putconn(pool.getconn())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        stop.set()
    for other in others:
        other.result()
    assert_serves_all(pool)


def test_waiters_that_time_out_leave_their_place(make_pool: MakePool) -> None:
    pool = make_pool(max_size=1, max_waiting=3)
    conn = pool.getconn()
    for _ in range(5):
        waiters = [Task(pool.getconn, 0.05) for _ in range(3)]
        for waiter in waiters:
            assert isinstance(waiter.error(), PoolExhausted)
    assert pool.stats().counters.rejected == 0
    pool.putconn(conn)
    assert_serves_all(pool)


# Closing


def test_closing_refuses_those_who_wait_first(make_pool: MakePool) -> None:
    pool = make_pool(max_size=1)
    conn = pool.getconn()
    waiters = [Task(pool.getconn) for _ in range(5)]
    until(lambda: pool.stats().waiting == 5)
    with within(1.0):
        pool.close()
        for waiter in waiters:
            assert isinstance(waiter.error(), PoolClosed)
    pool.putconn(conn)
    assert conn.closed


def test_closing_while_connects_hang(proxy: Proxy, make_pool: MakePool) -> None:
    proxy.mode = Mode.SILENT
    pool = make_pool(proxy.conninfo, min_size=3, max_size=3, connect_timeout=60)
    waiters = [Task(pool.getconn) for _ in range(5)]
    until(lambda: proxy.accepted == 3)
    with within(2.5):
        pool.close(timeout=2)
    for waiter in waiters:
        assert isinstance(waiter.error(), PoolClosed)
        assert waiter.seconds < 1.5
    proxy.drop()


def test_a_connection_made_after_closing_is_closed(own_server: Server, make_pool: MakePool) -> None:
    own_server.freeze([own_server.postmaster_pid])
    pool = make_pool(min_size=2, connect_timeout=60)
    waiter = Task(pool.getconn)
    until(lambda: pool.stats().connecting == 2)
    pool.close(timeout=0.1)
    assert isinstance(waiter.error(), PoolClosed)
    own_server.thaw()
    until(lambda: not own_server.backends("dbpool:faults"))


def test_closing_in_an_outage(own_server: Server, make_pool: MakePool) -> None:
    pool = make_pool(min_size=3, outage_grace=GRACE)
    fill(pool)
    own_server.stop("immediate")
    with pytest.raises(DatabaseUnavailable):
        pool.fetch_value("select 1")
    with within(1.0):
        pool.close()
    assert pool.state == "stopped"
    with pytest.raises(PoolClosed):
        pool.fetch_value("select 1")


def test_closing_while_idle_connections_are_silent(proxy: Proxy, make_pool: MakePool) -> None:
    pool = make_pool(proxy.conninfo, min_size=5)
    fill(pool)
    proxy.go_dark()
    with within(1.0):
        pool.close()
    proxy.drop()


def test_closing_under_load_lets_holders_finish(own_server: Server, make_pool: MakePool) -> None:
    pool = make_pool(max_size=3)
    own_server.execute("create table t (id int)")
    inside, go_on = threading.Barrier(4), threading.Event()

    def work() -> None:
        with pool.connection() as conn:
            inside.wait(10)
            go_on.wait(10)
            conn.execute("insert into t values (1)")

    holders = [Task(work) for _ in range(3)]
    inside.wait(10)
    pool.close()
    go_on.set()
    for holder in holders:
        holder.result()
    assert own_server.execute("select count(*) from t") == [(3,)]


def test_closing_from_many_threads_at_once(make_pool: MakePool) -> None:
    pool = make_pool(min_size=3)
    fill(pool)
    for closer in [Task(pool.close) for _ in range(8)]:
        closer.result()
        assert closer.seconds < 2.5
