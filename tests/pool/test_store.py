"""The pool's shared state: what its lock protects, and that its numbers add up."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

import pytest

from dbpool import Pool
from tests.fake import FakeServer
from tests.postgres import until
from tests.threads import Task, run_in_threads


class Guarded(set[Any]):
    """A set of records that fails if it is changed without the pool's lock."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool._store.bag.records)
        self.lock: Any = pool._lock

    def add(self, slot: Any) -> None:
        assert self.lock._is_owned()
        super().add(slot)

    def discard(self, slot: Any) -> None:
        assert self.lock._is_owned()
        super().discard(slot)

    def difference_update(self, *slots: Any) -> None:
        assert self.lock._is_owned()
        super().difference_update(*slots)


@pytest.mark.parametrize("reset", [None, lambda conn: conn.execute("reset all") and conn.commit()])
def test_records_are_changed_only_under_the_lock(
    fake: FakeServer, reset: Callable[[Any], Any] | None
) -> None:
    pool: Pool = fake.pool(max_size=6, reset=reset)
    with pool.connection():
        pool._store.bag.records = Guarded(pool)
    unchanged, changed, broken, lost, returned_late, changed_late = (
        pool.getconn() for _ in range(6)
    )
    changed.prepare_threshold = changed_late.prepare_threshold = 7
    broken.close()
    for conn in (unchanged, changed, broken):
        pool.putconn(conn)
    del lost
    gc.collect()
    pool.maintain(monotonic())
    until(lambda: pool.stats().active == 2)
    pool.close()
    pool.putconn(returned_late)
    pool.putconn(changed_late)
    assert returned_late.closed
    assert changed_late.closed
    assert not pool._store.bag.records


def test_get_stats_has_the_parents_keys_and_pop_stats_resets(pool: Pool) -> None:
    for _ in range(3):
        with pool.connection():
            pass
    stats = pool.get_stats()
    assert stats["requests_num"] == 3
    assert stats["connections_num"] == 1
    assert stats["pool_min"] == 1
    assert stats["pool_max"] == 4
    assert stats["pool_size"] == 1
    assert stats["pool_available"] == 1
    assert stats["requests_waiting"] == 0
    assert pool.pop_stats()["requests_num"] == 3
    assert pool.get_stats()["requests_num"] == 0
    assert pool.get_stats()["pool_size"] == 1


def test_counts_add_up_and_are_exact_under_threads(fake: FakeServer) -> None:
    with fake.pool(max_size=4, timeout=30) as pool:
        wrong: list[Any] = []
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.0005):
                stats = pool.stats()
                total = stats.active + stats.idle + stats.connecting
                if total != stats.size or min(stats.active, stats.idle, stats.connecting) < 0:
                    wrong.append(stats)

        def work() -> None:
            for _ in range(500):
                with pool.connection():
                    pass

        watcher = Task(watch)
        run_in_threads(16, work)
        done.set()
        watcher.result(10)
        assert not wrong
        stats = pool.stats()
        assert stats.counters.checkouts == stats.wait.count == stats.use.count == 8000
