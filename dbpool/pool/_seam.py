"""The seam to psycopg_pool: PoolBase keeps its type, constructor, tasks and threads.

Nothing else touches protected members of psycopg_pool. Public methods of the parent that work on
its own state are replaced here or in `Pool`.
"""

from __future__ import annotations

import os
import threading
from operator import call, index
from time import monotonic, sleep
from typing import Any
from weakref import ref

from psycopg_pool import ConnectionPool, PoolClosed
from psycopg_pool.abc import CT

from dbpool.breaker import Breaker
from dbpool.errors import closed_error, is_permanent
from dbpool.events import Emitter
from dbpool.holders import Owner, current
from dbpool.metrics import HolderSnapshot, PoolState, Snapshot
from dbpool.pool import _fork
from dbpool.pool._connector import Connector
from dbpool.pool._maintenance import MAX_INTERVAL, MIN_INTERVAL, Maintenance, Workers
from dbpool.pool._notices import Notices
from dbpool.pool._returning import finish
from dbpool.pool._store import Store
from dbpool.retry import Budget
from dbpool.settings import Settings

_WAIT_INTERVAL = 0.005  # seconds between two looks of `wait`


class PoolBase(ConnectionPool[CT]):
    """psycopg_pool's pool around parts of ours in place of its own state: its life and its threads."""

    # Calls a function of the pool and what it is for: a waiter to wait, or an attempt to connect.
    # A tracer takes its place, see `dbpool.opentelemetry`.
    trace: Any = staticmethod(call)
    suspicion = ""  # what keeps the holders, as the monitor found last; "" if nothing is known
    _make_usage: Any = type(None)  # by default nothing counts the use by endpoint

    def __init__(self, settings: Settings, listeners: Any, is_lazy: bool, **options: Any) -> None:
        self.settings, self.listeners = settings, Emitter(listeners)
        self._lazy = is_lazy  # whether it may open itself, once
        super().__init__(open=False, **options)
        # The parent's protected members are read here, and nowhere else.
        self._user_configure, self._user_reset = self._configure, self._reset
        # The stock check does no more than is done anyway.
        self._user_check = None if self._check == self.check_connection else self._check
        # A connection idle for less than this is lent after a look at its socket alone.
        self._unchecked_seconds = 0.0 if self._user_check else settings.ping_after
        self._resets = self._user_reset or settings.session_reset != "none"
        self._build((settings.min_size, settings.max_size))

    def _build(self, sizes: tuple[int, int]) -> None:
        """Make all parts anew, as in a new process."""
        settings = self.settings
        threads = self._threads = Workers(self)
        self._notices = Notices(self.name, self.listeners)
        self._store = Store(self.name, sizes, settings.outage_grace, self.listeners, threads.jobs)
        self._lock = self._store.lock
        self.count_usage(self._make_usage)
        self._maintenance = Maintenance(Connector(settings, self._notices.warn_once))
        self._budget = Budget(2 * settings.max_size)

    def __repr__(self) -> str:
        if not hasattr(self, "_budget"):
            return "<dbpool.Pool that could not be made>"
        size, idle = 0 if self.closed else self._store.size, len(self._store.bag.idle)
        return f"<dbpool.Pool {self.name!r} {self.state} size={size} idle={idle}>"

    @property
    def closed(self) -> bool:
        """True if the pool is closed."""
        return not self._store.is_open

    @property
    def min_size(self) -> int:
        """The number of connections that are kept at least."""
        return self._store.min_size

    @property
    def max_size(self) -> int:
        """The number of connections that there are at most."""
        return self._store.max_size

    def get_stats(self) -> dict[str, int]:
        """Return the parent's statistics, exact: counts, sums in milliseconds, and sizes."""
        return self._store.parent_stats()

    def pop_stats(self) -> dict[str, int]:
        """Like `get_stats`, and let its counts and sums begin at zero again."""
        return self._store.parent_stats(pop=True)

    @property
    def breaker(self) -> Breaker:
        """The circuit breaker."""
        return self._store.breaker

    @property
    def state(self) -> PoolState:
        """`"starting"` until first connected, `"up"`, `"down"` in an outage, or `"stopped"`."""
        return self._store.state

    @property
    def last_alive_at(self) -> float | None:
        """Monotonic time of the last healthy return or connect: a passive proof of life."""
        return self._store.breaker.last_alive_at or None

    def stats(self) -> Snapshot:
        """Return a consistent snapshot of the state and of all counters since opening."""
        return self._store.snapshot()

    def count_usage(self, make: Any) -> None:
        """Have what *make* returns count the use by endpoint; *make* is called again after a fork."""
        self._make_usage = make
        self.usage = self._store.metrics.usage = make()

    def holders(self) -> list[HolderSnapshot]:
        """Return at most 20 holders of connections, longest first."""
        return list(self.stats().holders)

    # Opening and closing

    def open(self, wait: bool = False, timeout: float = 30.0) -> None:
        """Open the pool; with *wait* until min_size connections are made, see `wait`.

        Raises `PoolClosed` if it was closed.
        """
        self._open()
        if wait:
            self.wait(timeout)

    def _open(self) -> None:
        _fork.notice_fork()
        store = self._store
        if store.was_opened and not store.is_open:
            raise PoolClosed("pool has already been opened/closed and cannot be reused")
        with self._threads.starting:  # those who come meanwhile wait for it
            if not store.is_open:
                # First: what is interrupted from here on is healed.
                _fork.process.watch(self)
                try:
                    self._threads.start(self)
                except BaseException:  # no threads to be had, say: the next user tries again
                    _fork.process.unwatch(self)
                    raise
            is_new = store.open()
        if is_new:
            self._notices.opened()

    def _open_on_use(self) -> None:
        """Open if the pool may open itself, and was not opened yet."""
        if self._lazy and not self._store.was_opened:
            self._open()

    def wait(self, timeout: float = 30.0) -> None:
        """Wait until min_size connections are made, and none of them is still being reset.

        Those that are out count. If that takes longer than *timeout* seconds, or cannot
        succeed, close the pool and raise `DatabaseUnavailable`.
        """
        deadline = monotonic() + timeout
        self._open_on_use()
        while self._store.bag.ready() < self.min_size:
            if self.closed:
                raise closed_error(self.name, was_opened=self._store.was_opened)
            is_hopeless = self.breaker.is_open and is_permanent(self.breaker.kind)
            if monotonic() >= deadline or is_hopeless:
                error = self.breaker.unavailable_error(self.name, self.stats())
                self.close()
                raise error
            sleep(_WAIT_INTERVAL)  # an interrupted thread might not notify

    def close(self, timeout: float = 2.0) -> None:
        """Close the pool: reject waiting callers, close idle connections, stop the threads.

        Connections that are checked out are closed when they are returned. All of it takes at
        most *timeout* seconds; a thread that hangs, in a connect or in a listener, is left to
        end by itself.
        """
        deadline = monotonic() + timeout
        _fork.notice_fork()
        was_open = (self._lazy or self._store.was_opened) and self._store.close()
        threads = self._threads.stop()
        self._maintenance.flush(self)
        for thread in threads:
            if thread is not threading.current_thread() and thread.is_alive():
                thread.join(max(0.0, deadline - monotonic()))
        if was_open:
            self._maintenance.send_cancels(self)
            self._notices.closed(max(0.0, deadline - monotonic()))
        _fork.process.unwatch(self)  # last: the watchdog ends what is interrupted before

    # Maintenance

    @property
    def maintenance_interval(self) -> float:
        """Seconds between two calls of `maintain`."""
        limits = self.settings.leak_after / 4.0, self.settings.slow_acquire / 2.0
        return max(MIN_INTERVAL, min(MAX_INTERVAL, *filter(None, limits)))

    def maintain(self, now: float) -> None:
        """Do what is due at the monotonic time *now*; the watchdog calls it."""
        self._maintenance.run(self, now)

    def _recover(self, owner: ref[Any]) -> None:
        """Take back what *owner* has or waits for: an exception has ended its step."""
        step = Owner()
        in_transit = self._store.recover(owner, ref(step))
        self._store.bag.close_evicted()
        for conn in in_transit:
            finish(self, conn)

    def _heal(self) -> None:
        """Complete what an exception kept a caller's thread from."""
        store = self._store
        if not store.was_opened:  # its opening was given up
            return
        store.heal(close_returns=self.close_returns, has_idle_workers=self._threads.jobs.empty())
        if store.is_open:
            self._threads.start(self)
        else:
            self._threads.stop()
            self.listeners.close()
            _fork.process.unwatch(self)
        self._maintenance.flush(self)

    def resize(self, min_size: int, max_size: int | None = None) -> None:
        """Change the sizes; what is too many goes at once if idle, else when it returns.

        Raises `ValueError` for a size below 0, or a max_size below min_size, and `TypeError` for
        what is no whole number.
        """
        _fork.notice_fork()
        self._store.resize(*map(index, self._check_size(min_size, max_size)))
        self._store.bag.close_evicted()

    def drain(self) -> None:
        """Replace all connections: the idle ones now, those that are out when they return."""
        _fork.notice_fork()
        self._maintenance.replace_all(self)

    def check(self) -> None:
        """Ping every idle connection, within ping_timeout each; replace those that fail.

        Once a ping has timed out, the others that have been idle for long go with it.
        """
        _fork.notice_fork()
        self._maintenance.check(self)

    def return_held(self, since: float) -> list[HolderSnapshot]:
        """Take back what this thread checked out after *since*, a monotonic time, and still holds.

        It is closed, which rolls it back: its holder may not have forgotten it yet.
        Returns who held it.
        """
        if not self._store.bag.out:
            return []
        taken = self._store.reap_held(current.thread, since)
        self._notices.reaped(taken)
        self._store.bag.close_evicted()
        return list(taken)

    def after_fork(self) -> None:
        """In a child process: leave what is the parent's alone and start from nothing."""
        store = self._store
        if store.bag.pid == os.getpid():
            return
        _fork.detach_inherited_sockets(list(store.bag.records))
        self.listeners.reset()
        is_stopped = store.was_opened and not store.is_open
        self._lazy = self._lazy or store.was_opened
        self._build((store.min_size, store.max_size))
        self._store.was_opened = is_stopped

    def __del__(self) -> None:
        # Nobody waits for the threads here: this may be one of them, or the process's end.
        if hasattr(self, "_budget"):
            self._threads.stop()
            self.listeners.close()
