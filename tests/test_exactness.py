"""Counters are exact with many threads, and their size is constant."""

from __future__ import annotations

import sys
import threading
import tracemalloc
from collections.abc import Iterator

import pytest

from dbpool import Pool
from dbpool.metrics import Snapshot
from tests.fake import FakeServer
from tests.threads import Task, run_in_threads

from .postgres import Server


@pytest.fixture
def frequent_switching() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def run_checkouts(pool: Pool, threads: int, times: int, statement: str | None) -> list[Snapshot]:
    """Check out in many threads; return the snapshots taken meanwhile that do not add up."""
    wrong: list[Snapshot] = []
    done = threading.Event()

    def work() -> None:
        for _ in range(times):
            with pool.connection() as conn:
                if statement:
                    conn.execute(statement)

    def watch() -> None:
        while not done.wait(0.002):
            stats = pool.stats()
            parts = (stats.active, stats.idle, stats.connecting)
            if sum(parts) != stats.size or min(parts) < 0 or stats.waiting < 0:
                wrong.append(stats)

    watcher = Task(watch)
    run_in_threads(threads, work)
    done.set()
    watcher.result()
    return wrong


def assert_exact(pool: Pool, checkouts: int) -> None:
    stats = pool.stats()
    assert stats.counters.checkouts == checkouts
    assert stats.wait.count == stats.use.count == checkouts
    assert stats.counters.timeouts == stats.counters.rejected == stats.counters.leaks == 0
    assert stats.counters.held_long == 0
    assert (stats.active, stats.waiting) == (0, 0)
    assert pool.get_stats()["requests_num"] == checkouts


@pytest.mark.parametrize("statement", [None, "select 1"])
def test_counts_are_exact(
    frequent_switching: None, fake: FakeServer, statement: str | None
) -> None:
    with fake.pool(max_size=8, timeout=120) as pool:
        assert run_checkouts(pool, threads=16, times=250, statement=statement) == []
        assert_exact(pool, 16 * 250)


@pytest.mark.slow
@pytest.mark.parametrize(("times", "statement"), [(100_000, None), (5_000, "select 1")])
def test_counts_are_exact_with_64_threads(
    request: pytest.FixtureRequest, fake: FakeServer, times: int, statement: str | None
) -> None:
    if statement:
        request.getfixturevalue("frequent_switching")
    with fake.pool(max_size=8, timeout=600) as pool:
        assert run_checkouts(pool, threads=64, times=times, statement=statement) == []
        assert_exact(pool, 64 * times)


def test_counts_add_up_while_the_pool_is_resized_and_restarted(own_server: Server) -> None:
    pool: Pool = Pool(own_server.conninfo, max_size=8, timeout=30)
    done = threading.Event()
    wrong: list[Snapshot] = []

    def work() -> None:
        while not done.is_set():
            try:
                pool.fetch_value("select 1")
            except Exception:  # noqa: BLE001  # the server restarts meanwhile
                pass

    def watch() -> None:
        while not done.wait(0.001):
            stats = pool.stats()
            parts = (stats.active, stats.idle, stats.connecting)
            if sum(parts) != stats.size or min(parts) < 0:
                wrong.append(stats)

    tasks = [Task(target) for target in (work, work, work, work, watch)]
    for size in (2, 6, 1, 8):
        pool.resize(min(size, 2), size)
        pool.drain()
        pool.fetch_value("select 1")
    own_server.restart("immediate")
    pool.fetch_value("select 1")
    pool.close()
    done.set()
    for task in tasks:
        task.result(30)
    assert wrong == []


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_ended_threads_leave_no_memory_in_use(fake: FakeServer, count: int) -> None:
    def once() -> None:
        with pool.connection():
            pass

    def run_short_threads(times: int) -> None:
        for _ in range(times):
            thread = threading.Thread(target=once)
            thread.start()
            thread.join()

    with fake.pool(max_size=4) as pool:
        run_short_threads(100)
        tracemalloc.start()
        before = tracemalloc.take_snapshot()
        run_short_threads(count)
        after = tracemalloc.take_snapshot()
        tracemalloc.stop()
    own_sizes = [
        difference.size_diff
        for difference in after.compare_to(before, "filename")
        if "/dbpool/" in difference.traceback[0].filename
    ]
    assert sum(own_sizes) < 16 * 1024
