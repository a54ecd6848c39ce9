"""Waiting for a connection: the order, the timeout, and the bound of the queue."""

from __future__ import annotations

from functools import partial

import pytest
from psycopg_pool import PoolTimeout, TooManyRequests

from dbpool import PoolExhausted
from tests.fake import FakeServer
from tests.postgres import until
from tests.threads import Task


def test_waiters_are_served_in_order(fake: FakeServer) -> None:
    with fake.pool(max_size=1, timeout=10) as pool:
        served: list[int] = []
        conn = pool.getconn()
        callers = []
        for n in range(5):

            def check_out(n: int) -> None:
                with pool.connection():
                    served.append(n)

            callers.append(Task(check_out, n))
            until(partial(lambda n: pool.stats().waiting == n + 1, n))
        pool.putconn(conn)
        for caller in callers:
            caller.result(10)
    assert served == [0, 1, 2, 3, 4]


def test_exhaustion_names_the_holder_and_its_line(fake: FakeServer) -> None:
    with fake.pool(max_size=1) as pool:
        with pool.connection():
            error = Task(pool.getconn, 0.05).error(5)
    assert isinstance(error, PoolExhausted)
    assert isinstance(error, PoolTimeout)
    assert "1 of 1 checked out" in str(error)
    assert "test_exhaustion_names_the_holder_and_its_line" in str(error)
    assert "nested" not in str(error)
    assert error.pool == "default"
    assert error.snapshot is not None
    assert error.snapshot.active == 1


def test_exhaustion_explains_a_nested_checkout(fake: FakeServer) -> None:
    with fake.pool(max_size=1) as pool, pool.connection():
        with pytest.raises(PoolExhausted, match=r"holds 1, .* hold 2 at once .* n \* 1 \+ 1"):
            pool.getconn(timeout=0.05)
        other = Task(pool.getconn, 0.05).error(5)
        assert "nested:" not in str(other)
        counters = pool.stats().counters
        assert (counters.nested, counters.timeouts) == (1, 2)


def test_a_timed_out_waiter_no_longer_counts(fake: FakeServer) -> None:
    with fake.pool(max_size=1, max_waiting=1) as pool:
        conn = pool.getconn()
        for _ in range(3):
            with pytest.raises(PoolExhausted):
                pool.getconn(timeout=0.02)
        waiter = Task(pool.getconn, 10)
        until(lambda: pool.stats().waiting == 1)
        with pytest.raises(TooManyRequests):
            pool.getconn()
        pool.putconn(conn)
        pool.putconn(waiter.result(10))
        assert pool.stats().counters.timeouts == 3
        assert pool.stats().counters.rejected == 1


def test_the_wait_of_timed_out_callers_is_counted_as_in_psycopg_pool(fake: FakeServer) -> None:
    with fake.pool(max_size=1) as pool, pool.connection():
        before = pool.get_stats()["requests_wait_ms"]
        with pytest.raises(PoolExhausted):
            pool.getconn(timeout=0.2)
        assert pool.get_stats()["requests_wait_ms"] >= before + 200
