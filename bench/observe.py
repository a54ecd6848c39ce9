"""What watching costs: a snapshot, a report over 16 processes, readiness idle, busy and hung."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from bench._report import Cell, Table
from dbpool import Databases, Settings
from dbpool.diagnosis.history import STEPS, Buckets, History, Step, slot_of
from dbpool.health import Health
from dbpool.metrics import HolderSnapshot, Metrics
from dbpool.monitor import Monitor
from dbpool.monitor._shared_files import SharedFiles
from dbpool.processes import Processes
from dbpool.processes._files import read, start_time, write
from tests.postgres import served

COLUMN = "dbpool"


def run(quick: bool) -> Table:
    """Measure; medians and the worst of many repetitions."""
    table = Table("observe", "What watching costs", [COLUMN])
    times = 50 if quick else 500
    with served() as server:
        settings = {"default": Settings(conninfo=server.conninfo, max_size=8)}
        with Databases(settings) as databases:
            pool = databases.default
            pool.resize(8, 8)
            pool.wait()
            for _ in range(200):
                pool.fetch_value("select 1")
            table.put("snapshot of a pool, all idle", COLUMN, _measure(pool.stats, times))
            health = Health(databases)
            table.put("readiness, just served", COLUMN, _measure(health.ready, times))

            def idle() -> None:
                pool.breaker.last_alive_at -= 60.0  # nothing came back for a minute: it has to ask
                health.ready()

            table.put("readiness, idle", COLUMN, _measure(idle, times))
            held = [pool.getconn() for _ in range(8)]
            table.put("snapshot of a pool, 8 held", COLUMN, _measure(pool.stats, times))
            waiting = threading.Thread(target=lambda: pool.putconn(pool.getconn()))
            waiting.start()
            table.put("readiness, busy", COLUMN, _measure(health.ready, times))
            for conn in held:
                pool.putconn(conn)
            waiting.join()
            server.freeze([*server.backends(), server.postmaster_pid])
            table.put("readiness, database hangs", COLUMN, _measure(idle, 3))
            server.thaw()
    report, with_history = _reports(times)
    table.put("report over 16 processes", COLUMN, report)
    table.put("the same with history, as JSON", COLUMN, with_history)
    table.put("memory of a pool's metrics", COLUMN, _memory())
    return table


def _measure(fn: Callable[[], object], times: int) -> Cell:
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        fn()
        taken.append(time.perf_counter() - started)
    middle, worst = median(taken), max(taken)
    return Cell(
        f"{middle * 1e3:.3g} ms, worst {worst * 1e3:.3g} ms", {"median": middle, "worst": worst}
    )


class _Pool:
    """Stands in for a pool that has seen every duration, and whose connections are all held."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        for step in range(73):
            for histogram in (self.metrics.wait, self.metrics.use, self.metrics.connect):
                histogram.add(1e-6 * 10 ** (step / 8))

    def stats(self) -> object:
        holders = [
            HolderSnapshot(f"thread-{n}", n / 7, "app/views.py:41 list_orders") for n in range(8)
        ]
        return self.metrics.snapshot([], state="up", size=8, active=8, holders=tuple(holders))


def _reports(times: int) -> tuple[Cell, Cell]:
    pools = {"default": _Pool(), "replica": _Pool()}
    memory = "/dev/shm"  # where the gunicorn hooks put it
    with tempfile.TemporaryDirectory(dir=memory if Path(memory).is_dir() else None) as directory:
        processes = Processes(pools, directory=directory)  # type: ignore[arg-type]
        processes.publish()
        (own_file,) = Path(directory).glob("*.json")
        pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdecimal()]
        for pid in [pid for pid in pids if start_time(pid)][:15]:
            record = read(own_file) | {"pid": pid, "start": start_time(pid)}
            write(Path(directory) / f"app-{pid}-{record['start']}.json", record)
        parts = len(processes.report()["processes"])
        cell = _measure(processes.report, times)
        now = time.monotonic()
        shared = SharedFiles(Path(directory), "app", "1-a")
        shared.add_up(list(pools), dict.fromkeys(pools, _history(now)), now)
        shared.save("findings", {"at": now, "valid": 3600.0, "findings": [{"code": "DB00"}]})
        monitor = Monitor(pools, processes, blockers=False)
        with_history = _measure(
            lambda: json.dumps(monitor.extend(processes.collect(), ("history",))), times
        )
        processes.close()
    return Cell(
        f"{cell.text} ({parts} processes)", {**cell.values, "processes": parts}
    ), with_history


def _history(now: float) -> History:
    """Fifteen minutes of a busy pool."""
    random = Random(1)

    def times() -> Buckets:
        return Buckets(tuple(random.randrange(2000) for _ in range(12)), random.random())

    def step() -> Step:
        numbers: dict[str, Any] = {
            "in_use": random.random(),
            "size": 8.0,
            "checkouts": random.randrange(9999),
        }
        return Step(**numbers, wait=times(), use=times(), connect=times())

    end = slot_of(now)
    return History({slot: step() for slot in range(end - STEPS, end)})


def _memory() -> Cell:
    import tracemalloc

    tracemalloc.start()
    metrics = Metrics()
    for n in range(100_000):
        metrics.connect.add(n / 1000)
        metrics.finished.append((n / 1000, n / 100, None, None, 0))
        if len(metrics.finished) >= metrics.BATCH:
            metrics.count_finished()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return Cell(f"{size / 1024:.1f} KiB", {"bytes": size})
