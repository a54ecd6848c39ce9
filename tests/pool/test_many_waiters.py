"""Many callers wait at the same time: each times out at its own deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

from dbpool import Pool, PoolExhausted
from tests.fake import FakeServer
from tests.postgres import until

MANY_WAITERS = 200  # more waiters than the number that each watch their own deadline
# Seconds on a busy machine. A waiter that is not woken looks at the clock once in a second.
MAX_DELAY = 0.75


@contextmanager
def small_stacks() -> Iterator[None]:
    before = threading.stack_size(256 * 1024)
    yield
    threading.stack_size(before)


class Callers:
    """Threads that wait for a connection, and what became of each."""

    def __init__(self, pool: Pool[Any]) -> None:
        self.pool = pool
        self.delays: list[float] = []  # seconds after its deadline, of each that timed out
        self.served: list[Any] = []
        self.threads: list[threading.Thread] = []

    def add(self, number: int, deadline: float) -> None:
        """Start that many more threads, which wait until *deadline*."""
        new = [threading.Thread(target=self._wait, args=[deadline]) for _ in range(number)]
        self.threads += new
        for thread in new:
            thread.start()

    def _wait(self, deadline: float) -> None:
        try:
            self.served.append(self.pool.getconn(deadline - time.monotonic()))
        except PoolExhausted:
            self.delays.append(time.monotonic() - deadline)

    def join(self) -> None:
        """Wait for all. To join each at once would wake this thread for each, and slow down all."""
        until(lambda: len(self.delays) + len(self.served) == len(self.threads), 60.0, pause=0.05)
        for thread in self.threads:
            thread.join(30)


VERY_MANY_WAITERS = 4000


def delays_in_a_chain(deadline: float) -> list[float]:
    """Let thousands wake one another from *deadline* on, which is as fast as threads can run."""
    delays: list[float] = []
    locks = [threading.Lock() for _ in range(VERY_MANY_WAITERS + 1)]
    for lock in locks:
        lock.acquire()

    def wait(own: threading.Lock, next_one: threading.Lock) -> None:
        own.acquire(timeout=60.0)
        next_one.release()
        delays.append(time.monotonic() - deadline)

    for pair in pairwise(locks):
        threading.Thread(target=wait, args=pair).start()
    time.sleep(max(0.0, deadline - time.monotonic()))
    locks[0].release()
    # To join the threads would wake this one for each, and slow down all.
    until(lambda: len(delays) == VERY_MANY_WAITERS, 60.0, pause=0.05)
    return delays


@pytest.mark.slow
def test_thousands_of_waiters_with_one_deadline_time_out_quickly(fake: FakeServer) -> None:
    """If every thread woke by itself, they would compete for the interpreter for seconds."""
    with small_stacks():
        chain = delays_in_a_chain(time.monotonic() + 5.0)
        with fake.pool(max_size=1) as pool, pool.connection():
            callers = Callers(pool)
            callers.add(VERY_MANY_WAITERS, time.monotonic() + 5.0)
            callers.join()
            assert pool.stats().counters.timeouts == VERY_MANY_WAITERS
    assert len(callers.delays) == VERY_MANY_WAITERS
    assert min(callers.delays) >= 0.0
    assert max(callers.delays) < 4 * max(chain)


def test_waiters_behind_served_ones_time_out_at_their_deadline(fake: FakeServer) -> None:
    with fake.pool(max_size=1) as pool:
        conn = pool.getconn()
        callers = Callers(pool)
        callers.add(MANY_WAITERS, time.monotonic() + 2.0)
        until(lambda: pool.stats().waiting == MANY_WAITERS)
        pool.putconn(conn)
        for number in range(1, 150):
            until(lambda n=number: len(callers.served) == n)  # type: ignore[misc]
            pool.putconn(callers.served[-1])
        callers.join()
        pool.putconn(callers.served[-1])
        assert (len(callers.served), len(callers.delays)) == (150, MANY_WAITERS - 150)
        assert max(callers.delays) < MAX_DELAY


def test_shorter_deadlines_hold_in_a_long_queue(fake: FakeServer) -> None:
    with fake.pool(max_size=1) as pool, pool.connection():
        long, short = Callers(pool), Callers(pool)
        long.add(MANY_WAITERS, time.monotonic() + 3.0)
        until(lambda: pool.stats().waiting == MANY_WAITERS)
        short.add(20, time.monotonic() + 0.5)
        long.add(20, time.monotonic() + 3.0)
        short.join()
        long.join()
        assert (len(short.delays), len(long.delays)) == (20, MANY_WAITERS + 20)
        assert max(short.delays) < MAX_DELAY
        assert max(long.delays) < MAX_DELAY
