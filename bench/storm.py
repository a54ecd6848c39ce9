"""How many connects a second a server meets after an outage, and after a deploy: a simulation.

Each worker has a pool of four connections and needs all of them. The server closes them at once and
refuses new ones for a while. The simulation computes when each pool connects: dbpool tries with one
connection at a time and connects the others once that succeeds, psycopg_pool tries with each
connection by itself, and "no jitter" is dbpool's schedule without its randomness. Both schedules
come from the libraries themselves.

The peak is the most connects in any 10 ms, as a rate: a backlog overflows, and backends are
forked, in milliseconds. While the server is away the first attempt, which all make when they
notice, is not counted.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import repeat
from unittest import mock

from psycopg_pool.base import AttemptWithBackoff

from bench._report import Cell, Table
from dbpool.breaker import _BASE, _CAP, _FIRST
from dbpool.pool._connector import _LIFETIME_SPREAD
from dbpool.retry import delays

WORKERS = (10, 100, 1_000, 10_000)
CONNECTIONS = 4  # of each worker
OUTAGE = 30.0  # seconds
NOTICE_SECONDS = 0.01  # seconds within which all notice that their connections were closed
CONNECT_SECONDS = 0.005  # seconds from one connect to the next of a pool that is being served again
WINDOWS = (0.01, 0.1, 1.0)
LIFETIME = 1800.0


def run(quick: bool) -> Table:
    """Simulate an outage and a deploy for all numbers of workers."""
    table = Table("storm", "Peak of connects a second", ["dbpool", "psycopg_pool", "no jitter"])
    random.seed(1)  # the libraries draw from the module's own generator
    sizes = WORKERS[:2] if quick else WORKERS
    for workers in sizes:
        for name, reconnects in PEERS.items():
            times = [t for _ in range(workers) for t in reconnects()]
            during = [t for t in times if 2 * NOTICE_SECONDS < t < OUTAGE]
            table.put(f"{workers:,} workers, server away", name, _cell(during))
            after = [t for t in times if t >= OUTAGE]
            table.put(f"{workers:,} workers, server back", name, _cell(after))
    for workers in sizes:
        title = f"{workers:,} workers, lifetimes after a deploy"
        for name, spread in SPREADS.items():
            number = workers * CONNECTIONS
            times = [NOTICE_SECONDS * random.random() + _lifetime(spread) for _ in range(number)]
            table.put(title, name, _cell(times))
    return table


def _cell(times: list[float]) -> Cell:
    """Return the peak in each window; the text has that of the shortest."""
    peaks = {f"peak_{window:g}s": peak(times, window) for window in WINDOWS}
    highest, last = peaks[f"peak_{WINDOWS[0]:g}s"], max(times)
    text = f"{highest:,.0f}/s (last at {last:,.1f} s)"
    return Cell(text, {"peak": highest, "last": last, **peaks})


def peak(times: list[float], window: float) -> float:
    """Return the most that fall into one window, as a rate per second."""
    return max(Counter(int(t / window) for t in times).values()) / window


# An outage


def _dbpool() -> Iterator[float]:
    return _one_then_all(delays(_FIRST, _CAP, _BASE))


def _no_jitter() -> Iterator[float]:
    with mock.patch("backoff.full_jitter", side_effect=float):
        yield from _one_then_all(delays(_FIRST, _CAP, _BASE))


def _one_then_all(pauses: Iterator[float]) -> Iterator[float]:
    """Yield the times of one pool's connects, from the moment its connections were closed."""
    now = NOTICE_SECONDS * random.random()
    while now < OUTAGE:
        yield now
        now += next(pauses)
    for n in range(CONNECTIONS):
        yield now + n * CONNECT_SECONDS


def _psycopg_pool() -> Iterator[float]:
    for _ in repeat(None, CONNECTIONS):
        now, attempt = NOTICE_SECONDS * random.random(), AttemptWithBackoff(timeout=300.0)
        while now < OUTAGE:
            yield now
            attempt.update_delay(now)
            now += attempt.delay
        yield now


PEERS: dict[str, Callable[[], Iterator[float]]] = {
    "dbpool": _dbpool,
    "psycopg_pool": _psycopg_pool,
    "no jitter": _no_jitter,
}


# A deploy: what opened together, and when it reaches the end of its lifetime

SPREADS = {"dbpool": _LIFETIME_SPREAD, "psycopg_pool": 0.05, "no jitter": 0.0}


def _lifetime(spread: float) -> float:
    return LIFETIME * (1 - spread * random.random())
