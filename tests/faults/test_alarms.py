"""Real signals: an alarm raises in the main thread at a random point, thousands of times."""

from __future__ import annotations

import logging
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from dbpool import Pool
from tests.pools import assert_serves_all
from tests.postgres import until

# Python can only report an exception that is raised in a finalizer or in a callback from C.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore:.*was deleted while still open:ResourceWarning",
)

Action = Callable[[Pool], object]


class Alarm(Exception):  # like Celery's soft time limit, `except Exception` catches it
    pass


fired: list[int] = []


@contextmanager
def alarms() -> Iterator[Callable[[float], object]]:
    """A function that raises `Alarm` in this thread after the given number of seconds."""

    def on_alarm(number: int, frame: object) -> None:
        fired.append(number)
        raise Alarm

    previous = signal.signal(signal.SIGALRM, on_alarm)
    try:
        yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def block(pool: Pool) -> None:
    with pool.connection() as conn:
        conn.execute("insert into kept values (1)")


def transaction(pool: Pool) -> None:
    def work(conn: Any) -> None:
        with conn.transaction():
            conn.execute("insert into kept values (%s)", [2])

    pool.run(work)


def pipeline(pool: Pool) -> None:
    with pool.connection() as conn, conn.pipeline():
        conn.execute("select 1")
        conn.execute("select 2")


def single(pool: Pool) -> None:
    pool.fetch_all("select n from kept limit %s", [1])


def get_and_put(pool: Pool) -> None:
    conn = pool.getconn()
    try:
        conn.execute("select 1")
    finally:
        pool.putconn(conn)


ACTIONS: list[Action] = [block, transaction, pipeline, single, get_and_put]


def _call_until_alarm(
    action: Action, pool: Pool, set_alarm: Callable[[float], object], delay: float
) -> None:
    try:
        set_alarm(delay)
        while not fired:  # it may have been swallowed
            action(pool)
    finally:
        set_alarm(0)


def _interrupt(pool: Pool, wanted: int, seconds: float) -> int:
    """Interrupt calls of all kinds; return how many were interrupted."""
    rng, interrupted = random.Random(7), 0
    deadline = time.monotonic() + seconds
    with alarms() as set_alarm:
        while interrupted < wanted and time.monotonic() < deadline:
            action = rng.choice(ACTIONS)
            fired.clear()
            try:
                # A function of its own: Python 3.13 does not catch what is raised between two
                # rounds of a loop in the same function.
                _call_until_alarm(action, pool, set_alarm, rng.uniform(1e-5, 1.5e-3))
            except (Alarm, psycopg.Error):  # psycopg may have raised its own error instead
                assert fired, "a call failed without an alarm"
                interrupted += 1
    return interrupted


def _survives(dsn: str, wanted: int, seconds: float) -> int:
    with Pool(dsn, min_size=1, max_size=3, timeout=5) as pool:
        pool.execute("create table kept (n int)")
        interrupted = _interrupt(pool, wanted, seconds)
        until(lambda: pool.stats().active == 0, 2.0)
        assert_serves_all(pool)
        for action in ACTIONS * 5:  # later calls succeed
            action(pool)
        stats = pool.stats()
        assert stats.active + stats.idle + stats.connecting == stats.size <= 3
    return interrupted


@pytest.fixture(autouse=True)
def _no_kept_frames(caplog: pytest.LogCaptureFixture) -> None:
    """Keep no log record of psycopg's: each keeps the frames of an error, and so a connection.

    One that `getconn` gave to nobody, because an alarm came first, would then not be collected.
    """
    caplog.set_level(logging.ERROR, logger="psycopg")


def test_hundreds_of_alarms_lose_nothing(dsn: str) -> None:
    assert _survives(dsn, 400, 20.0) > 50


@pytest.mark.slow
def test_25_000_alarms_lose_nothing(dsn: str) -> None:
    assert _survives(dsn, 25_000, 600.0) == 25_000
