"""Guards the hot path by counting its calls, which does not depend on the machine's speed.

`bench/` measures how long a checkout takes. Most slowdowns first show as more calls.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
from psycopg_pool import ConnectionPool

from dbpool import Pool
from tests.fake import FakeServer


def calls_of(fn: Callable[[], object]) -> Counter[str]:
    """Count the Python and C functions that one call of *fn* calls."""
    counted: Counter[str] = Counter()

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        if event in ("call", "c_call"):
            counted[event] += 1

    sys.setprofile(profile)
    try:
        fn()
    finally:
        sys.setprofile(None)
    return counted


def check_out(pool: Any) -> None:
    with pool.connection():
        pass


def select(pool: Any) -> None:
    with pool.connection() as conn:
        conn.execute("select 1").fetchone()


@pytest.fixture
def pool(dsn: str) -> Iterator[Pool]:
    with Pool(dsn, min_size=4, max_size=4) as pool:
        pool.wait()
        select(pool)
        pool.fetch_one("select 1")
        yield pool


@pytest.fixture
def parent(dsn: str) -> Iterator[ConnectionPool]:
    with ConnectionPool(dsn, min_size=4, max_size=4, open=True) as parent:
        parent.wait()
        select(parent)
        yield parent


def test_a_checkout_calls_less_than_the_parents(pool: Pool, parent: ConnectionPool) -> None:
    calls, parent_calls = calls_of(lambda: check_out(pool)), calls_of(lambda: check_out(parent))
    assert calls["call"] < parent_calls["call"]
    assert calls.total() < parent_calls.total()


def test_a_query_calls_less_than_the_parents(pool: Pool, parent: ConnectionPool) -> None:
    calls, parent_calls = calls_of(lambda: select(pool)), calls_of(lambda: select(parent))
    assert calls.total() < 0.8 * parent_calls.total()
    single_calls = calls_of(lambda: pool.fetch_one("select 1"))
    assert single_calls.total() < 0.6 * parent_calls.total()


def test_a_checkout_calls_no_more_than_it_did(pool: Pool) -> None:
    """Raise these numbers only for something that is worth its cost in every checkout."""
    calls = calls_of(lambda: check_out(pool))
    assert calls["call"] <= 11
    assert calls["c_call"] <= 15


def test_the_cost_of_a_checkout_does_not_grow_with_the_pool(dsn: str) -> None:
    def cost(size: int) -> Counter[str]:
        with Pool(dsn, min_size=size, max_size=size) as pool:
            pool.wait()
            check_out(pool)
            return calls_of(lambda: check_out(pool))

    assert cost(32) == cost(2)


def test_only_waits_and_connects_are_traced(fake: FakeServer) -> None:
    with fake.pool(max_size=1) as pool:
        traced = []

        def trace(fn: Callable[..., Any], *args: Any) -> Any:
            traced.append(type(args[-1]).__name__)
            return fn(*args)

        pool.trace = trace
        check_out(pool)
        assert sorted(traced) == ["Attempt", "Waiter"]
        check_out(pool)
        assert len(traced) == 2
