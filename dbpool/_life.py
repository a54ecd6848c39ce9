"""A pool's life: opening on use, waiting until it is full, closing, surviving a fork.

Part of the one place that touches protected members of psycopg_pool, see `_supply`.
"""

from __future__ import annotations

import queue
import threading
from contextlib import suppress
from functools import partial
from os import getpid
from time import monotonic, sleep
from types import SimpleNamespace
from typing import Any

import psycopg
from psycopg_pool import PoolClosed
from psycopg_pool.abc import CT
from psycopg_pool.pool import StopWorker

from dbpool import _fork, events, holders
from dbpool._supply import Supply
from dbpool._threads import run_in_thread
from dbpool.errors import is_permanent
from dbpool.liveness import cancel

_LOOK = 0.005  # seconds between two looks of `wait`


class Life(Supply[CT]):
    """When a pool is open. `_lazy` says whether it may open itself, once."""

    # Opening and closing

    def _open_on_use(self) -> None:
        """Open if that is due. The lock is held. Raise `PoolClosed` if it is closed."""
        if self._lazy and not self._opened:
            self._open()
        else:
            self._check_open_getconn()

    def _open(self) -> None:
        if self._closed and not self._opened:
            # First: what is interrupted from here on is healed.
            holders.watch(self)  # type: ignore[arg-type]
        super()._open()

    def _start_workers(self) -> None:
        self._tasks = queue.SimpleQueue()  # type: ignore[assignment]  # made in C, unlike Queue
        self._workers = []
        try:
            run_in_thread(super()._start_workers)
        except BaseException:  # no threads to be had, say: who uses it next tries again
            self._signal_stop_worker()
            self._closed, self._opened = True, False
            holders.unwatch(self)
            raise

    def _start_initial_tasks(self) -> None:
        self._refill()
        if self.listeners.active:
            self.listeners.emit(events.Opened(self.name))

    def close(self, timeout: float = 2.0) -> None:
        """Close: refuse those who wait, close what is idle, stop the threads.

        Connections that are out are closed when they come back. All of it takes at most
        *timeout* seconds; a thread that hangs, in a connect or in a listener, is left to end
        by itself.
        """
        deadline = monotonic() + timeout
        with self._lock:
            was_open, self._closed = not self._closed, True
            self._opened = self._opened or self._lazy
            threads = self._stop()
        self._close_evicted()
        for thread in threads:
            if thread is not threading.current_thread() and thread.is_alive():
                thread.join(max(0.0, deadline - monotonic()))
        if was_open:
            self._send_cancels()
            self._end_episodes(quiet=0.0)
            if self.listeners.active:
                self.listeners.emit(events.Closed(self.name))
                self.listeners.close(max(0.0, deadline - monotonic()))
        holders.unwatch(self)  # last: the watchdog ends what is interrupted before

    def _stop(self) -> list[threading.Thread]:
        """Give up what is idle, refuse who waits, tell the threads to end. The lock is held.

        Of a closed pool; to be called again if it was interrupted. Returns the threads.
        """
        while self._pool:
            conn = self._pool[-1]
            self._closing.append(conn)
            self._slots.discard(conn._slot)
            self._pool.pop()
        self._refuse_waiters(lambda: PoolClosed(f"the pool {self.name!r} is closed"))
        return self._signal_stop_worker()

    def _signal_stop_worker(self) -> list[threading.Thread]:
        """As the parent does, but to be called again if it was interrupted."""
        if self._sched_runner is None:
            return []
        threads = [self._sched_runner, *self._workers]
        stop: Any = SimpleNamespace(run=partial(self._sched.enter, 0.0, None))
        # What wakes the scheduler is an Event: a worker does that, where there is one.
        give: Any = self._tasks.put if self._workers else lambda task: task.run()
        give(stop)
        for _ in self._workers:
            self._tasks.put(StopWorker(self))
        self._workers, self._sched_runner = [], None
        return threads

    def _send_cancels(self) -> None:
        """Send the cancel requests, one after the other, for a second at most."""
        deadline = monotonic() + 1.0
        with suppress(IndexError):  # there are no more
            while (remaining := deadline - monotonic()) > 0.0:
                request = self._cancels.popleft()
                if not self.breaker.is_failing:
                    with suppress(psycopg.Error):
                        cancel(request, remaining)

    def __del__(self) -> None:
        # Nobody waits for the threads here: this may be one of them, or the process's end.
        if not getattr(self, "_closed", True):
            self._signal_stop_worker()
            self.listeners.close()

    def wait(self, timeout: float = 30.0) -> None:
        """Wait until min_size connections are made, and none of them is still being reset.

        Those that are out count. If that takes longer than *timeout* seconds, or cannot
        succeed, close the pool and raise `DatabaseUnavailable`.
        """
        deadline = monotonic() + timeout
        while True:
            with self._lock:
                self._open_on_use()
                if sum(s.owner is None or s.since > 0.0 for s in self._slots) >= self._min_size:
                    return
                is_hopeless = self.breaker.is_open and is_permanent(self.breaker.kind)
                if monotonic() >= deadline or is_hopeless:
                    error = self._unavailable()
                    break
            sleep(_LOOK)  # an exception may keep from telling whoever should
        self.close()
        raise error

    # Forks

    def after_fork(self) -> None:
        """In a child process: leave what is the parent's alone and start from nothing."""
        if self._pid == getpid():
            return
        _fork.silence(list(self._slots))
        self.listeners.reset()
        stopped = self._closed and self._opened
        self._clear()
        self._closed, self._opened, self._lazy = True, stopped, self._lazy or self._opened
        self._pid = getpid()  # last: other threads wait for it
