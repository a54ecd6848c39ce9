"""A spike: 50 threads at once on a pool of 5 to 50 whose connects take 150 ms.

HikariCP's test of that name: a pool that opens a connection for every waiter is slow and ends up
with far too many.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import psycopg
import sqlalchemy
from psycopg_pool import ConnectionPool

from bench._measure import spread
from bench._report import Cell, Table
from dbpool import Pool
from tests.postgres import served

THREADS, MIN_SIZE, MAX_SIZE, CONNECT_SECONDS = 50, 5, 50, 0.15


class SlowConnection(psycopg.Connection[Any]):
    """Takes its time to connect."""

    @classmethod
    def connect(cls, conninfo: str = "", **kwargs: Any) -> Any:
        """Connect, slowly."""
        time.sleep(CONNECT_SECONDS)
        return super().connect(conninfo, **kwargs)


def run(quick: bool) -> Table:
    """Measure until the last thread has had its connection for 2 ms, the peers in turns."""
    peers: deque[tuple[str, Callable[[str], tuple[float, int]]]] = deque(
        [
            ("dbpool", partial(_pooled, Pool)),
            ("psycopg_pool", partial(_pooled, ConnectionPool)),
            ("SQLAlchemy", _sqlalchemy),
        ]
    )
    table = Table("spike", f"{THREADS} threads at once", [name for name, _ in peers])
    figures: dict[str, list[tuple[float, int]]] = {name: [] for name in table.columns}
    with served(max_connections=200) as server:
        for _ in range(1 if quick else 15):
            for name, once in peers:
                figures[name].append(once(server.conninfo))
            peers.rotate()
    for name, found in figures.items():
        table.put("time to finish, connections at the end", name, _cell(found))
    return table


def _cell(figures: list[tuple[float, int]]) -> Cell:
    times = [seconds for seconds, _ in figures]
    middle, size = median(times), median(size for _, size in figures)
    text = f"{middle * 1e3:.0f} ms ±{spread(times) / middle:.0%}, {size:.0f} connections"
    return Cell(
        text,
        {"seconds": middle, "spread": spread(times), "connections": size, "rounds": len(times)},
    )


def _pooled(make: Any, conninfo: str) -> tuple[float, int]:
    pool = make(
        conninfo, min_size=MIN_SIZE, max_size=MAX_SIZE, connection_class=SlowConnection, open=True
    )
    pool.wait()
    seconds = _spike(pool.connection)
    size = int(pool.get_stats()["pool_size"])
    pool.close()
    return seconds, size


def _sqlalchemy(conninfo: str) -> tuple[float, int]:
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://",
        creator=lambda: SlowConnection.connect(conninfo),
        pool_size=MIN_SIZE,
        max_overflow=MAX_SIZE - MIN_SIZE,
    )
    conns = [engine.connect() for _ in range(MIN_SIZE)]
    for conn in conns:
        conn.close()
    made: list[object] = []
    sqlalchemy.event.listen(engine, "connect", lambda *_: made.append(1))
    seconds = _spike(engine.connect)
    engine.dispose()
    return seconds, MIN_SIZE + len(made)


def _spike(connection: Any) -> float:
    barrier = threading.Barrier(THREADS + 1)

    def work() -> None:
        barrier.wait()
        with connection():
            time.sleep(0.002)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    barrier.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started
