"""Many callers whose time is over in the same instant: when has the last one got its error?

The last two columns have no pool: threads that each wait on a lock of their own until the deadline,
and threads that wake one another, which is as fast as Python's threads can run one after another.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

from psycopg_pool import ConnectionPool

from bench._measure import spread
from bench._report import Cell, Table
from dbpool import Pool
from tests.postgres import served

COUNTS = (250, 1000, 5000)
TIMEOUT = 4.0  # seconds, in which all threads start

Wait = Callable[[float], object]  # until that monotonic time; it fails then
Opened = Iterator[Wait]


def run(quick: bool) -> Table:
    """Measure how long after the common deadline the last of many threads goes on."""
    peers = deque([_dbpool, _psycopg_pool, _locks, _chain])
    names = ["dbpool", "psycopg_pool", "locks alone", "locks in a chain"]
    columns = dict(zip(peers, names, strict=True))
    table = Table("timeouts", "callers with one deadline", names)
    before = threading.stack_size(256 * 1024)
    with served() as server:
        for count in COUNTS[:1] if quick else COUNTS:
            figures: dict[str, list[float]] = {name: [] for name in names}
            for _ in range(1 if quick else 5):
                for opened in peers:
                    with contextmanager(opened)(server.conninfo) as wait:
                        figures[columns[opened]].append(_last_of(count, wait))
                peers.rotate()
            for name, seconds in figures.items():
                table.put(f"{count} callers", name, _cell(seconds))
    threading.stack_size(before)
    return table


def _last_of(count: int, wait: Wait) -> float:
    """Return how late the last of *count* threads was, in seconds."""
    delays: list[float] = []
    deadline = time.monotonic() + TIMEOUT

    def work() -> None:
        try:
            wait(deadline)
        except Exception:  # noqa: BLE001  # of each peer another
            delays.append(time.monotonic() - deadline)

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    # To join them at once would wake this thread for each, and slow down all.
    while len(delays) < count and time.monotonic() < deadline + 120.0:
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    if len(delays) < count or min(delays) < -0.05:
        raise RuntimeError("a caller got something else than a timeout")
    return max(delays)


def _cell(seconds: list[float]) -> Cell:
    middle = median(seconds)
    text = f"{middle * 1e3:.0f} ms ±{spread(seconds) * 1e3:.0f}"
    return Cell(text, {"seconds": middle, "spread": spread(seconds), "rounds": len(seconds)})


def _dbpool(conninfo: str) -> Opened:
    with Pool(conninfo, max_size=1) as pool, pool.connection():
        yield lambda deadline: pool.getconn(deadline - time.monotonic())


def _psycopg_pool(conninfo: str) -> Opened:
    with ConnectionPool(conninfo, min_size=1, max_size=1) as pool, pool.connection():
        yield lambda deadline: pool.getconn(deadline - time.monotonic())


def _locks(_: str) -> Opened:
    def wait(deadline: float) -> None:
        lock = threading.Lock()
        lock.acquire()
        lock.acquire(timeout=deadline - time.monotonic())
        raise TimeoutError

    yield wait


def _chain(_: str) -> Opened:
    first, joining = threading.Lock(), threading.Lock()
    first.acquire()
    locks = [first]

    def wait(_: float) -> None:
        own = threading.Lock()
        own.acquire()
        with joining:
            before = locks[-1]
            locks.append(own)
        before.acquire(timeout=60.0)
        own.release()
        raise TimeoutError

    timer = threading.Timer(TIMEOUT, first.release)
    timer.start()
    yield wait
    timer.join()
