"""Helpers for tests of pools: common steps, and checks of a pool after a fault."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
import pytest

from dbpool import Pool, PoolExhausted, TooManyRequests

from .postgres import Server, until

MakePool = Callable[..., Pool[Any]]

# Seconds that a slow machine may add to a bound that the pool promises.
SLACK = 1.0
# For tests of an outage. Other tests have a longer grace, as a stalled machine would look like one.
GRACE = 0.3


class Recorder:
    """A listener that keeps all events."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self._lock = threading.Lock()

    def __call__(self, event: Any) -> None:
        with self._lock:
            self.events.append(event)

    def count(self, kind: type) -> int:
        with self._lock:
            return sum(type(event) is kind for event in self.events)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if the block takes longer than that."""
    started = time.monotonic()
    yield
    taken = time.monotonic() - started
    assert taken < seconds, f"it took {taken:.2f} s, more than {seconds} s"


def fill(pool: Pool) -> list[int]:
    """Wait for min_size connections; return the pids of their backends."""
    pool.wait(timeout=20)
    until(lambda: pool.stats().connecting == 0)
    with pool._lock:
        return [conn.info.backend_pid for conn in pool._store.bag.idle]


def await_up(pool: Pool, seconds: float = 1.0 + SLACK) -> None:
    """Wait until the pool has noticed by itself that the server is back, within a second.

    Then lengthen the grace, so that a stalled machine does not look like another outage.
    """
    until(lambda: pool.state == "up", seconds)
    pool.breaker.grace = pool.breaker.answer_timeout = 30.0


def lines(log: pytest.LogCaptureFixture, level: int) -> list[str]:
    """Return what dbpool logged at that level."""
    return [r.message for r in log.records if r.levelno == level and r.name == "dbpool"]


def time_out_callers(pool: Pool[Any], number: int, timeout: float = 0.05) -> None:
    """Let that many threads wait for a connection; most of them time out."""

    def call() -> None:
        with suppress(PoolExhausted, TooManyRequests):
            pool.putconn(pool.getconn(timeout=timeout))

    with ThreadPoolExecutor(number) as threads:
        for _ in range(number):
            threads.submit(call)


def exhaustion_message(pool: Pool[Any]) -> str:
    """Check out from an exhausted pool; return the text of its error."""
    with pytest.raises(PoolExhausted) as caught:
        pool.getconn()
    return str(caught.value)


def assert_adds_up(pool: Pool) -> None:
    """Check that every connection is in exactly one state."""
    with pool._lock:
        stats = pool.stats()
        assert stats.active + stats.idle + stats.connecting == stats.size
        assert min(stats.active, stats.idle, stats.connecting) >= 0
        assert len(pool._store.bag.records) + stats.connecting == stats.size
        idle = {conn._record for conn in pool._store.bag.idle}
        assert len(idle) == stats.idle
        assert idle <= pool._store.bag.records
        assert not any(record.since for record in idle)


def assert_whole(pool: Pool) -> None:
    """Check that no connection is out, no caller waits, and no capacity was lost."""
    if pool.closed:
        return
    until(lambda: pool.stats().active == 0 and pool.stats().waiting == 0, 20.0)
    assert not any(record.since for record in pool._store.bag.records)
    assert_adds_up(pool)


def assert_serves_all(pool: Pool, seconds: float = 20.0) -> None:
    """Check that the pool lends max_size working connections at the same time."""
    assert_whole(pool)
    deadline = time.monotonic() + seconds
    conns: list[Any] = []
    try:
        while len(conns) < pool.max_size:
            conns.append(pool.getconn(timeout=deadline - time.monotonic()))
        pids = {conn.execute("select pg_backend_pid()").fetchone()[0] for conn in conns}
        assert len(pids) == pool.max_size
        assert_adds_up(pool)
    finally:
        for conn in conns:
            pool.putconn(conn)
    assert_whole(pool)


def terminate(server: Server, pids: list[int]) -> None:
    """Call pg_terminate_backend, and wait until these backends have gone."""
    for pid in pids:
        server.execute("select pg_terminate_backend(%s)", pid)
    await_exit(server, pids)


def await_exit(server: Server, pids: list[int]) -> None:
    """Wait until these backends have gone."""

    def have_exited() -> bool:
        with suppress(psycopg.OperationalError):  # after a kill the server is recovering
            return not set(pids) & set(server.backends())
        return False

    until(have_exited, 20.0)


def await_server_messages(pool: Pool) -> None:
    """Wait until a message from the server has arrived on all idle connections, also by a proxy."""
    fds = [record.fd for record in list(pool._store.bag.records)]
    until(lambda: len(select.select(fds, [], [], 0)[0]) == len(fds))


def await_server(server: Server) -> None:
    """Wait until a recovering server accepts connections again."""

    def accepts() -> bool:
        with suppress(psycopg.OperationalError):
            server.execute("select 1")
            return True
        return False

    until(accepts, 30.0, pause=0.05)


# The seconds that closing a pool may take, and a little more for a slow machine.
CLOSE_SECONDS = 2.3


def assert_closes(pool: Pool[Any]) -> None:
    """Check that closing takes no longer than promised, and leaves nothing behind."""
    with within(CLOSE_SECONDS):
        pool.close()
    stats = pool.stats()
    numbers = (stats.size, stats.active, stats.idle, stats.connecting, stats.waiting)
    assert numbers == (0, 0, 0, 0, 0)
