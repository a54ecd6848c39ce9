"""Workers: the threads that run a pool's tasks, and psycopg_pool's scheduler."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import ref

from psycopg_pool import ConnectionPool
from psycopg_pool.pool import MaintenanceTask, StopWorker
from psycopg_pool.sched import Scheduler

from dbpool._threads import run_in_thread

Job = Callable[[Any], None]  # of a worker, called with the pool


class Call(MaintenanceTask):
    """Calls *fn* with the pool, if that still lives, in a worker or when due in the scheduler.

    Runs once, also on a closed pool: it may have to close a connection.
    """

    def __init__(self, pool: ConnectionPool[Any], fn: Job) -> None:
        super().__init__(pool)
        self._fn: Job | None = fn

    def tick(self) -> None:
        """Run in the scheduler's thread: for what is short and must not queue."""
        self.run()

    def run(self) -> None:
        """Run in a worker, whether the pool is open or not."""
        if (pool := self.pool()) is not None:
            self._run(pool)

    def _run(self, pool: ConnectionPool[Any]) -> None:
        fn, self._fn = self._fn, None  # a worker keeps its last task until there is another
        if fn is not None:
            fn(pool)


class Workers:
    """The threads of a pool: the scheduler, and workers that take tasks from a queue."""

    def __init__(self, pool: ConnectionPool[Any]) -> None:
        self.tasks: Any = queue.SimpleQueue()  # made in C, unlike the parent's
        self.scheduler = Scheduler()
        self.threads: list[threading.Thread] = []
        self._starting = threading.RLock()  # held while the threads are started or stopped
        self._pool = ref(pool)  # weakly: it dies while they run
        self._name, self._worker = pool.name, pool.worker

    def run(self, job: Job) -> None:
        """Have a worker do *job*."""
        if (pool := self._pool()) is not None:
            pool.run_task(Call(pool, job))

    def run_later(self, job: Job, delay: float) -> None:
        """Have the scheduler do *job*, which must be short, in *delay* seconds."""
        if (pool := self._pool()) is not None:
            pool.schedule_task(Call(pool, job), delay)

    def start(self, number: int, is_open: Callable[[], bool]) -> None:
        """Start the scheduler and that many workers, unless they run or the pool is closed."""
        with self._starting:
            if is_open() and not any(thread.is_alive() for thread in self.threads):
                try:
                    run_in_thread(partial(self._start, number))
                except BaseException:
                    self.stop()
                    raise

    def _start(self, number: int) -> None:
        self.threads = []
        targets: list[Any] = [self.scheduler.run, *[partial(self._worker, self.tasks)] * number]
        names = ["scheduler", *(f"worker-{n}" for n in range(number))]
        for target, name in zip(targets, names, strict=True):
            thread = threading.Thread(target=target, name=f"{self._name}-{name}", daemon=True)
            thread.start()
            self.threads.append(thread)

    def stop(self) -> list[threading.Thread]:
        """Have the threads end; return them. To be called again if it was interrupted."""
        with self._starting:
            threads = self.threads
            if threads:
                # What wakes the scheduler is an Event: a worker does that, where there is one.
                stop: Any = SimpleNamespace(run=partial(self.scheduler.enter, 0.0, None))
                give: Any = self.tasks.put if threads[1:] else lambda task: task.run()
                give(stop)
                for _ in threads[1:]:
                    self.tasks.put(StopWorker(self))  # type: ignore[arg-type]
                self.threads = []
            return threads
