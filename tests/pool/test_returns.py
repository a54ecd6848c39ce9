"""Connections that come back dead, late or twice, also while the pool waits or closes."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from psycopg_pool import PoolClosed

from dbpool import Pool, PoolExhausted
from tests.fake import FakeConnection
from tests.interrupts import interrupted
from tests.postgres import until
from tests.threads import Task, run_in_threads


def make(**options: Any) -> Pool:
    defaults: dict[str, Any] = {"min_size": 1, "max_size": 1, "timeout": 5.0} | options
    return Pool(connection_class=FakeConnection, kwargs={"host": "nowhere"}, **defaults)


def test_closing_a_dead_connection_returns_it_at_once() -> None:
    with make(close_returns=True) as pool:
        conns = []
        for _ in range(3):
            conn = pool.getconn(timeout=1.0)
            conns.append(conn)  # keeps it alive, as an exception's traceback does
            conn.pgconn.finish()  # as psycopg does once the server has gone
            conn.close()  # does nothing more: psycopg sees it closed
        assert pool.getconn(timeout=1.0) not in conns
        assert pool.stats().size == 1


def test_a_closed_dead_connection_is_counted_without_another_caller() -> None:
    with make(close_returns=True) as pool:
        conn = pool.getconn()
        conn.pgconn.finish()
        conn.close()
        until(lambda: pool.stats().active == 0, 1.5)
        assert pool.stats().counters.discarded["broken"] == 1


def test_returning_a_connection_that_the_pool_took_back_does_nothing() -> None:
    with make(close_returns=True, max_size=2) as pool:
        conn = pool.getconn()
        conn.pgconn.finish()
        until(lambda: pool.stats().active == 0, 1.5)
        before = pool.stats().counters
        pool.putconn(conn)
        pool.putconn(conn)
        assert pool.stats().counters == before
        with pool.connection() as held:
            held.pgconn.finish()
            until(lambda: pool.stats().active == 0, 1.5)
        since = time.monotonic()
        conn = pool.getconn()
        assert pool.return_held(since)
        pool.putconn(conn)  # as in a user's `finally`


def test_returning_twice_is_still_an_error() -> None:
    with make() as pool:
        conn = pool.getconn()
        pool.putconn(conn)
        with pytest.raises(ValueError, match="return"):
            pool.putconn(conn)


def test_wait_waits_for_resets() -> None:
    resetting, go_on = threading.Event(), threading.Event()

    def reset(conn: object) -> None:
        resetting.set()
        assert go_on.wait(10.0)

    with make(reset=reset) as pool:
        pool.putconn(pool.getconn())
        assert resetting.wait(5.0)
        waiting = Task(pool.wait)
        time.sleep(0.1)  # long enough to return if it did not wait
        assert not waiting.ended
        go_on.set()
        waiting.result()


def test_wait_counts_connections_that_are_checked_out() -> None:
    with make(min_size=2, max_size=2) as pool, pool.connection(), pool.connection():
        pool.wait(timeout=1.0)


def test_a_pool_that_closes_hands_over_no_closed_connection() -> None:
    """A connection may come back at any point of `close`, as by a garbage collection."""
    for point in range(1, 200):
        pool = make()
        conn = pool.getconn()
        waiting = Task(pool.getconn)
        until(lambda: pool.stats().waiting == 1)  # noqa: B023  # called now
        returned = _close_and_return(pool, conn, point)
        got = None
        try:
            got = waiting.result(5.0)
        except PoolClosed:
            pass
        if got is not None:
            assert not got.closed, point
        if not returned:
            return


@pytest.mark.parametrize(
    "action",
    [
        lambda pool: pool.stats(),
        lambda pool: pool.getconn(timeout=0.001),
        lambda pool: pool.maintain(time.monotonic()),
        lambda pool: pool.drain(),
    ],
    ids=["stats", "a wait that times out", "maintenance", "drain"],
)
def test_a_connection_may_come_back_at_any_point_of_a_call(action: Callable[[Pool], Any]) -> None:
    """A garbage collection or a signal handler may return a connection at any point."""
    for point in itertools.count(1):
        with make(max_size=2, slow_acquire=0.001, leak_after=0) as pool:
            conn, other = pool.getconn(), pool.getconn()
            waiting = Task(pool.getconn)
            until(lambda: pool.stats().waiting == 1)
            with (
                suppress(PoolExhausted),
                interrupted(point, call=lambda: pool.putconn(conn)) as points,  # noqa: B023
            ):
                action(pool)
            pool.putconn(other)
            if not points.is_reached:
                pool.putconn(conn)
            pool.putconn(waiting.result())
            until(lambda: pool.stats().idle == pool.stats().size)
        if not points.is_reached:
            return


def _close_and_return(pool: Pool, conn: Any, point: int) -> bool:
    """Close the pool and return *conn* at that point of it; false if there was no such point."""
    with interrupted(point, call=lambda: pool.putconn(conn)) as points:
        pool.close()
    return points.is_reached


def test_waiters_that_time_out_together_share_snapshots() -> None:
    count = 250
    with make() as pool, pool.connection():
        deadline = time.monotonic() + 1.5
        delays: list[float] = []
        snapshots = []

        def wait() -> None:
            with pytest.raises(PoolExhausted) as caught:
                pool.getconn(timeout=deadline - time.monotonic())
            delays.append(time.monotonic() - deadline)
            snapshots.append(caught.value.snapshot)

        run_in_threads(count, wait, seconds=10.0)
        assert len(delays) == count
        assert len(set(map(id, snapshots))) <= count / 5
        assert pool.stats().counters.timeouts == count
        assert pool.stats().waiting == 0
