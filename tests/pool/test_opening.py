"""Opening and closing: a pool opens itself once, and a closed one stays closed."""

from __future__ import annotations

import gc
import threading
from contextlib import suppress

import pytest
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool, PoolClosed

import dbpool
from dbpool import Pool
from tests.fake import FakeServer
from tests.postgres import until
from tests.threads import Task


def test_is_a_connection_pool(pool: Pool) -> None:
    assert isinstance(pool, ConnectionPool)


def test_opens_itself_on_first_use(fake: FakeServer) -> None:
    pool: Pool = fake.pool()
    try:
        assert pool.closed
        assert pool.state == "starting"
        assert pool.fetch_value("select 1") == 1
        assert not pool.closed
        assert pool.state == "up"
    finally:
        pool.close()


def test_open_false_needs_an_explicit_open(fake: FakeServer) -> None:
    pool: Pool = fake.pool(open=False)
    with pytest.raises(PoolClosed, match="not open yet"):
        pool.wait(1.0)
    with pytest.raises(PoolClosed, match="not open yet"):
        pool.getconn()
    pool.open(wait=True, timeout=10)
    assert pool.fetch_value("select 1") == 1
    pool.close()


def test_open_true_opens_now(fake: FakeServer) -> None:
    with fake.pool(open=True) as pool:
        assert not pool.closed
        until(lambda: pool.stats().idle == 1)


class FailingNumber:
    """A `num_workers` that makes opening fail, after a pause that the test ends."""

    def __init__(self) -> None:
        self.entered, self.proceed = threading.Event(), threading.Event()

    def __rmul__(self, threads: object) -> object:
        self.entered.set()
        self.proceed.wait(10)
        raise RuntimeError("can't start new thread")


def test_a_pool_opens_after_an_opening_that_failed(fake: FakeServer) -> None:
    pool = fake.pool(timeout=8)
    pool.num_workers = num_workers = FailingNumber()  # type: ignore[assignment]
    first = Task(pool.fetch_value, "select 1")
    num_workers.entered.wait(10)
    pool.num_workers = 3
    second = Task(pool.fetch_value, "select 1")
    with suppress(AssertionError):
        until(lambda: pool.stats().waiting, 0.2)
    num_workers.proceed.set()
    assert str(first.error()) == "can't start new thread"
    assert second.result(4.0) == 1
    pool.close()


def test_a_pool_closed_during_a_failing_open_stays_closed(fake: FakeServer) -> None:
    pool = fake.pool()
    pool.num_workers = num_workers = FailingNumber()  # type: ignore[assignment]
    opening = Task(pool.open)
    num_workers.entered.wait(10)
    closing = Task(pool.close)
    until(lambda: pool.state == "stopped")
    pool.num_workers = 3
    num_workers.proceed.set()
    assert str(opening.error()) == "can't start new thread"
    closing.result()
    with pytest.raises(PoolClosed):
        pool.fetch_value("select 1")
    assert pool.state == "stopped"


def test_wait_waits_for_min_size(fake: FakeServer) -> None:
    with fake.pool(min_size=3) as pool:
        pool.wait(timeout=10)
        assert pool.stats().idle == 3


@pytest.mark.parametrize("used", [True, False])
def test_a_closed_pool_never_opens_itself_again(fake: FakeServer, used: bool) -> None:
    pool: Pool = fake.pool()
    if used:
        pool.fetch_value("select 1")
    pool.close()
    assert pool.state == "stopped"
    with pytest.raises(PoolClosed):
        pool.fetch_value("select 1")
    with pytest.raises(PoolClosed):
        pool.open()


def test_close_fails_waiters_and_closes_returned_connections(fake: FakeServer) -> None:
    pool: Pool = fake.pool(max_size=1)
    conn = pool.getconn()
    waiter = Task(pool.getconn)
    until(lambda: pool.stats().waiting == 1)
    pool.close()
    assert isinstance(waiter.error(5), PoolClosed)
    assert not conn.closed
    pool.putconn(conn)
    assert conn.closed
    stats = pool.stats()
    assert (stats.size, stats.active, stats.idle, stats.connecting, stats.waiting) == (0,) * 5


@pytest.mark.parametrize("changed", [False, True])
def test_a_closed_pool_closes_returned_connections(pool: Pool, changed: bool) -> None:
    with pool.connection() as conn:
        if changed:
            conn.row_factory = dict_row  # type: ignore[assignment]
        conn.execute("select 1")
        pool.close()
    assert conn.closed
    assert pool.stats().active == 0


def test_waiters_that_close_fails_are_counted(fake: FakeServer) -> None:
    pool = fake.pool(max_size=1)
    conn = pool.getconn()
    waiter = Task(pool.getconn)
    until(lambda: pool.stats().waiting == 1)
    pool.close()
    assert isinstance(waiter.error(), PoolClosed)
    assert pool.stats().counters.rejected == 1
    assert pool.get_stats()["requests_errors"] == 1
    pool.putconn(conn)


def test_garbage_collecting_an_open_pool_stops_its_threads(fake: FakeServer) -> None:
    before = set(threading.enumerate())
    pool: Pool = fake.pool(name="forgotten")
    pool.fetch_value("select 1")
    del pool
    gc.collect()
    until(lambda: set(threading.enumerate()) <= before)


def test_all_pools_share_one_watchdog_thread(fake: FakeServer) -> None:
    with fake.pool(name="one") as one, fake.pool(name="two") as two:
        one.open()
        two.open()
        names = [thread.name for thread in threading.enumerate()]
        assert names.count("dbpool-watchdog") == 1


def test_repr_shows_the_state_and_no_secret(fake: FakeServer) -> None:
    pool: Pool = fake.pool(fake.conninfo + " password=hunter2", name="main")
    assert repr(pool) == "<dbpool.Pool 'main' starting size=0 idle=0>"
    pool.fetch_value("select 1")
    assert repr(pool) == "<dbpool.Pool 'main' up size=1 idle=1>"
    assert "hunter2" not in repr(pool.settings)
    pool.close()
    assert repr(pool) == "<dbpool.Pool 'main' stopped size=0 idle=0>"


def test_public_names_are_importable() -> None:
    for name in dbpool.__all__:
        assert getattr(dbpool, name)
