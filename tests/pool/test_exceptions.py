"""An exception raised from outside ends a caller's wait, at any point."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from weakref import ref

import pytest

from dbpool import PoolExhausted
from dbpool.holders import Owner
from dbpool.pool._waiting import Waiter
from tests.fake import FakeServer
from tests.interrupts import alarm
from tests.pools import (
    MakePool,
    assert_adds_up,
    assert_serves_all,
)
from tests.threads import Task


class Timeout(BaseException):
    """Like gevent's Timeout: a BaseException, raised from outside."""


raising_each_error = pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, Timeout])


@raising_each_error
def test_an_exception_during_a_wait_loses_no_connection(
    make_pool: MakePool, error: type[BaseException]
) -> None:
    pool = make_pool(max_size=1)
    conn = pool.getconn()
    with pytest.raises(error), alarm(0.05, error):
        pool.getconn()
    assert pool.stats().waiting == 0
    pool.putconn(conn)
    assert_serves_all(pool)


@raising_each_error
def test_an_exception_while_a_connection_is_made_loses_none(
    fake: FakeServer, make_pool: MakePool, error: type[BaseException]
) -> None:
    pool = make_pool(max_size=2)
    fake.delay = 0.1
    with pytest.raises(error), alarm(0.05, error):
        pool.getconn()
    assert pool.stats().waiting == 0
    assert_adds_up(pool)
    fake.delay = 0.0
    assert_serves_all(pool)


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_a_waiter_served_at_its_timeout_loses_no_connection(
    make_pool: MakePool, is_interrupted: bool
) -> None:
    pool = make_pool(max_size=1)
    conn = pool.getconn()
    step = Owner()
    with pool._lock:
        waiter = Waiter(ref(step), time.monotonic(), 0.0)
        pool._store.join(waiter, 0, close_returns=False)
    pool.putconn(conn)
    if not is_interrupted:
        pool._store.time_out(waiter)
        assert (waiter.conn, waiter.error) == (conn, None)
    pool._recover(ref(step))
    assert pool.stats().counters.timeouts == 0
    assert_serves_all(pool)


def test_an_exception_at_any_point_of_a_wait_loses_no_connection(make_pool: MakePool) -> None:
    pool = make_pool(max_size=2)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            with pool.connection():
                pass

    def on_alarm(number: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code.co_name == "wait":
            raise Timeout
        signal.setitimer(signal.ITIMER_REAL, 0.0001)  # not in `wait` yet: try again

    others = [Task(work) for _ in range(4)]
    previous = signal.signal(signal.SIGALRM, on_alarm)
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


def test_waiters_that_time_out_leave_the_queue(make_pool: MakePool) -> None:
    pool = make_pool(max_size=1, max_waiting=3)
    conn = pool.getconn()
    for _ in range(5):
        waiters = [Task(pool.getconn, 0.05) for _ in range(3)]
        for waiter in waiters:
            assert isinstance(waiter.error(), PoolExhausted)
    assert pool.stats().counters.rejected == 0
    pool.putconn(conn)
    assert_serves_all(pool)
