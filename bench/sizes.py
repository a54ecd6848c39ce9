"""The size that `python -m dbpool plan` advises, beside the smallest size that sufficed.

Threads pause, take a connection, hold it for as long as a statement sleeps in the server, and
come again. The knee is the smallest `max_size` at which the 95th percentile of the waits, as the
pool itself counts them, is below 5 ms.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench._report import Cell, Table
from dbpool import Pool
from dbpool.sizing import TARGET, Measured, measure
from tests.postgres import Server, served

MEASURED_SIZE = 20  # max_size while the load is measured
SECONDS = 8.0  # for each size: more than 1,000 checkouts of each load


@dataclass(frozen=True)
class Case:
    """A load: how long a connection is held, and how long a thread pauses, in seconds."""

    hold: Callable[[random.Random], float]
    pause: float
    threads: int = 16


CASES = {
    "exponential 10 ms, 16 threads": Case(lambda r: r.expovariate(100), 0.04),
    "constant 20 ms, 16 threads": Case(lambda r: 0.02, 0.05),
    "9 of 10 2 ms, else 50 ms, 16 threads": Case(lambda r: 0.05 if r.random() < 0.1 else 0.002, 0.02),
    "log-normal 30 ms, 12 threads": Case(lambda r: r.lognormvariate(-3.7, 0.6), 0.04, 12),
    "exponential 10 ms, 8 busy threads": Case(lambda r: r.expovariate(100), 0.005, 8),
}  # fmt: skip


def run(quick: bool) -> Table:
    """Measure each load at sizes around the advised one."""
    table = Table("sizes", "Connections that a load needs", ["advised", "knee", "twice the load"])
    with served() as server:
        for name, case in list(CASES.items())[: 1 if quick else None]:
            found = _measure(server, case, MEASURED_SIZE, 4.0 if quick else SECONDS)[0]
            advised = found.needs(case.threads)
            twice = found.needs(case.threads, 2.0)
            assert advised is not None, found.reason
            table.put(name, "advised", Cell(str(advised), {"connections": advised}))
            table.put(name, "twice the load", Cell(str(twice), {"connections": twice}))
            knee = _knee(server, case, advised, 4.0 if quick else SECONDS)
            table.put(name, "knee", Cell(str(knee), {"connections": knee}))
    return table


def _knee(server: Server, case: Case, start: int, seconds: float) -> int:
    """Return the smallest size that suffices, searched from *start*."""
    size = start
    if _measure(server, case, size, seconds)[1] < TARGET:
        while size > 1 and _measure(server, case, size - 1, seconds)[1] < TARGET:
            size -= 1
        return size
    while size < case.threads:
        size += 1
        if _measure(server, case, size, seconds)[1] < TARGET:
            break
    return size


def _measure(server: Server, case: Case, size: int, seconds: float) -> tuple[Measured, float]:
    """Return what was measured at that size, and the 95th percentile of the waits in seconds."""
    stop = threading.Event()
    with Pool(server.conninfo, min_size=size, max_size=size, timeout=30) as pool:
        pool.wait()
        threads = [
            threading.Thread(target=_ask, args=(pool, case, seed, stop))
            for seed in range(case.threads)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        before = _report(pool)
        time.sleep(seconds)
        after = _report(pool)
        stop.set()
        for thread in threads:
            thread.join()
        p95 = pool.stats().wait.quantile(0.95)
    return measure(before, after, "default"), p95


def _ask(pool: Pool[Any], case: Case, seed: int, stop: threading.Event) -> None:
    rng = random.Random(seed)
    while not stop.wait(rng.expovariate(1 / case.pause)):
        with pool.connection() as conn:
            conn.execute("select pg_sleep(%s)", [case.hold(rng)])


def _report(pool: Pool[Any]) -> dict[str, Any]:
    return {
        "time": time.time(),
        "processes": [{"age": 0.0}],
        "pools": {"default": pool.stats().to_json()},
    }
