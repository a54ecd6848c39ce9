"""A pool's life: opening on use, waiting until it is full, closing, surviving a fork.

Part of the one place that touches protected members of psycopg_pool, see `_supply`.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from os import getpid
from time import monotonic

import psycopg
from psycopg_pool import PoolClosed
from psycopg_pool.abc import CT

from dbpool import _fork, events, holders
from dbpool._supply import Supply
from dbpool.errors import is_permanent
from dbpool.liveness import cancel


class Life(Supply[CT]):
    """When a pool is open. `_lazy` says whether it may open itself, once."""

    # Opening and closing

    def _open_on_use(self) -> None:
        """Open if that is due. The lock is held. Raise `PoolClosed` if it is closed."""
        if self._lazy and not self._opened:
            self._open()
        else:
            self._check_open_getconn()

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
        holders.unwatch(self)
        with self._lock:
            if self._closed:
                self._opened = self._opened or self._lazy
                return
            self._closed = True
            idle = list(self._pool)
            self._pool.clear()
            self._slots.difference_update(conn._slot for conn in idle)
            self._refuse_waiters(lambda: PoolClosed(f"the pool {self.name!r} is closed"))
            threads = self._signal_stop_worker()
        for conn in idle:
            self._close_connection(conn)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - monotonic()))
        self._send_cancels()
        self._end_episodes(quiet=0.0)
        if self.listeners.active:
            self.listeners.emit(events.Closed(self.name))
            self.listeners.end(max(0.0, deadline - monotonic()))

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
            self.listeners.end()

    def wait(self, timeout: float = 30.0) -> None:
        """Wait until min_size connections are made.

        If that takes longer than *timeout* seconds, or cannot succeed, close the pool and
        raise `DatabaseUnavailable`.
        """
        deadline = monotonic() + timeout
        error: Exception | None = None
        with self._lock:
            self._open_on_use()
            while self._nconns - self._connecting < self._min_size and error is None:
                self._changed.wait(max(0.0, deadline - monotonic()))
                self._check_open_getconn()
                is_hopeless = self.breaker.is_open and is_permanent(self.breaker.kind)
                if monotonic() >= deadline or is_hopeless:
                    error = self._unavailable()
        if error is not None:
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
