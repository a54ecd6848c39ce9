"""The threads of a pool, and what they do first: connect and retry, evict and close."""

from __future__ import annotations

import queue
import threading
from collections.abc import Collection
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

import psycopg
from psycopg_pool.sched import Scheduler

from dbpool._threads import run_in_thread
from dbpool.breaker import Attempt
from dbpool.errors import SATURATED, DatabaseUnavailable, is_permanent
from dbpool.holders import ConnectionRecord
from dbpool.liveness import PingTimeout, closed_by_peer
from dbpool.pool import _fork
from dbpool.pool._bag import Job, Jobs
from dbpool.pool._connector import Connector, Failure
from dbpool.pool._notices import Notices, logger
from dbpool.pool._psycopg import close, ping_unmarked
from dbpool.pool._store import Store
from dbpool.retry import is_refused

if TYPE_CHECKING:
    from dbpool.pool._seam import PoolBase

_CHANGE_INTERVAL: Final = 1.0  # seconds between two looks at a conninfo that was refused
_MIN_OVERDUE_INTERVAL: Final = 0.1  # seconds between two looks at an attempt without an answer


class Workers:
    """The threads of a pool: the scheduler, and workers that do jobs from a queue.

    They have the pool weakly, so that it dies while they run. In a closed pool they do first what
    was queued before: it may be to close a connection.
    """

    def __init__(self, pool: PoolBase[Any]) -> None:
        self.jobs: Jobs = queue.SimpleQueue()
        self.scheduler = Scheduler()
        self.threads: list[threading.Thread] = []
        self.starting = threading.RLock()  # held while the threads are started or stopped
        self._pool, self._name = ref(pool), pool.name

    def run_later(self, job: Job, delay: float) -> None:
        """Have the scheduler do *job*, which must be short, in *delay* seconds."""
        self.scheduler.enter(delay, partial(self._do, job))

    def _do(self, job: Job) -> None:
        try:
            if (pool := self._pool()) is not None:
                job(pool)
        except BaseException as ex:  # noqa: BLE001  # SystemExit of a callback, say
            logger.warning("a maintenance task failed: %s", type(ex).__name__)

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            self._do(job)
            del job  # it may hold a connection
        self.scheduler.enter(0.0, None)  # which ends it

    def start(self, pool: PoolBase[Any]) -> None:
        """Start the scheduler and the workers, unless they run or the pool is closed."""
        with self.starting:
            if pool.state != "stopped" and not any(thread.is_alive() for thread in self.threads):
                try:
                    run_in_thread(partial(self._start, pool.num_workers))
                except BaseException:
                    self.stop()
                    raise

    def _start(self, number: int) -> None:
        self.threads = []
        for n, target in enumerate([self.scheduler.run, *[self._work] * number]):
            name = f"worker-{n - 1}" if n else "scheduler"
            thread = threading.Thread(target=target, name=f"{self._name}-{name}", daemon=True)
            thread.start()
            self.threads.append(thread)

    def stop(self) -> list[threading.Thread]:
        """Have the threads end; return them. To be called again if it was interrupted."""
        with self.starting:
            threads = self.threads
            for _ in threads[1:]:
                self.jobs.put(None)
            if len(threads) == 1:  # else a worker does it: what wakes the scheduler is an Event
                self.scheduler.enter(0.0, None)
            self.threads = []
            return threads


class Supply:
    """Brings connections into the store, and takes them out of it."""

    def __init__(self, store: Store, connector: Connector, notices: Notices) -> None:
        self.store, self.notices = store, notices
        self.connector, self.settings = connector, connector.settings

    # Connecting, in a worker

    def connect(self, pool: PoolBase[Any], attempt: Attempt) -> None:
        """Make one attempt, if its connection is still needed and it is due."""
        store, connector = self.store, self.connector
        if not store.may_begin(attempt):
            return
        is_due = attempt.due <= store.breaker.clock()
        if not (is_due or (attempt.awaits_change and connector.have_changed(pool, attempt.params))):
            self._connect_later(pool, attempt)
            return
        started = attempt.started = store.breaker.clock()
        self.check_answer(pool, attempt, started)
        made = pool.trace(connector.connect, pool, attempt)
        if isinstance(made, Failure):
            self._failed(pool, attempt, started, made)
        else:
            self._connected(pool, attempt, made)

    def _connected(self, pool: PoolBase[Any], attempt: Attempt, conn: Any) -> None:
        metrics = self.store.metrics
        seconds = self.store.connected(conn, attempt)
        self.flush()  # the end of an outage comes before the connection that ended it
        self.notices.connected(seconds)
        troubles = metrics.dead + metrics.connect_failures
        if self.connector.server_defaults.is_due(pool.max_lifetime, troubles):
            pool._threads.jobs.put(lambda pool: pool._supply.check_server_defaults(pool))

    def _failed(self, pool: PoolBase[Any], attempt: Attempt, started: float, why: Failure) -> None:
        store, breaker, kind = self.store, self.store.breaker, why.kind
        awaits_change = is_permanent(kind) and not self.connector.have_changed(pool, why.params)
        self.evict_closed_by_server()  # an idle one that is alive keeps the breaker closed
        attempt.params = why.params
        is_retry = store.failed(attempt, why.error, kind, awaits_change=awaits_change)
        if not store.is_open:
            return
        if is_retry:
            self._connect_later(pool, attempt)
        text, sizes, exist = breaker.last_error or "", "", len(store.bag.records)
        # Where no connection exists, the opening of the breaker is logged.
        if exist and (kind == SATURATED or is_permanent(kind)) and not breaker.is_open:
            sizes = f"{exist} of at most {store.max_size} exist, {len(store.waiting)} waiting"
        self.notices.connect_failed(breaker.clock() - started, text, kind, sizes)
        self.flush()
        if is_retry and breaker.report_failure(pool.reconnect_timeout):
            pool.reconnect_failed()

    def _connect_later(self, pool: PoolBase[Any], attempt: Attempt) -> None:
        delay = max(0.0, attempt.due - self.store.breaker.clock())
        if attempt.awaits_change:
            delay = min(delay, _CHANGE_INTERVAL)
        pool._threads.run_later(lambda pool: pool._store.enqueue(attempt), delay)

    def check_answer(self, pool: PoolBase[Any], attempt: Attempt, started: float) -> None:
        """Count an attempt as failing if it has no answer for too long; look again until it has."""
        if (left := self.store.overdue(attempt, started)) is not None:
            delay = max(left, _MIN_OVERDUE_INTERVAL)
            pool._threads.run_later(lambda p: p._supply.check_answer(p, attempt, started), delay)
            self.flush()

    def check_server_defaults(self, pool: PoolBase[Any]) -> None:
        """Ask for the server's timeouts again, and replace connections if they have changed."""
        connector, defaults = self.connector, self.connector.server_defaults
        if not self.store.is_open or self.store.breaker.is_failing:
            return
        try:
            params = connector.params(pool)
            have_changed = defaults.ask_again(lambda p: connector.open(pool, p), params)
        except Exception as ex:  # noqa: BLE001  # whatever it is, the next connect asks again
            defaults.troubles = -1
            logger.debug("pool %r: asking for timeouts failed: %s", pool.name, type(ex).__name__)
            return
        if have_changed:
            logger.info("pool %r: the server's timeouts have changed", pool.name)
            self.replace_all()

    # Evicting

    def evict(self, conn: Any, reason: str, *, by_server: bool = False) -> None:
        """Close a connection that is in transit, and replace it if it is needed."""
        self.store.evict(conn._record, reason)
        if by_server:
            self.notices.replaced()
        self.close_evicted()

    def evict_closed_by_server(self) -> None:
        """Evict all idle connections whose server closed them."""
        lost = closed_by_peer(conn._record.fd for conn in list(self.store.bag.idle))
        if lost:
            self.notices.replaced(self.store.evict_idle("dead", lambda record: record.fd in lost))
            self.store.flush_later()  # a caller may wait: it should not have to close many

    def replace_all(self) -> None:
        """Replace all connections: the idle ones now, those that are out when they return."""
        self.store.expire()
        self.close_evicted()

    def evict_refused(self, ex: BaseException | None) -> DatabaseUnavailable | None:
        """Return what to raise for *ex* if a pooler refuses a statement by it, see `is_refused`.

        If it ends, or cannot reach the server, no idle connection can: they are evicted, and the
        ping of each new one decides.
        """
        if not is_refused(ex):
            return None
        store = self.store
        if "timeout" not in str(ex):
            store.evict_idle("dead", lambda record: True)
            self.close_evicted()
        return store.breaker.unavailable(store.name, store.snapshot(), cause=ex)

    def ping(self, conn: Any, timeout: float, answered: Collection[ConnectionRecord] = ()) -> bool:
        """Ping a connection in transit; return whether it answered in time. Evict it if not.

        After a timeout also evict all connections idle longer than ping_after, except those that
        *answered*: where one ping times out, the others will not answer either.
        """
        try:
            ping_unmarked(conn, timeout)
        except psycopg.Error as ex:
            is_late, settings, store = isinstance(ex, PingTimeout), self.settings, self.store
            self.evict(conn, "dead", by_server=not is_late)
            if settings.pooler == "transaction":  # a ping without an answer is saturation
                self.evict_refused(ex)
            elif is_late and timeout >= settings.ping_timeout:
                oldest = monotonic() - settings.ping_after
                store.evict_idle("dead", lambda r: r.idle_since <= oldest and r not in answered)
                self.close_evicted()
            return False
        return True

    def flush(self) -> None:
        """Close what was evicted, and send the notices that were queued under the lock."""
        self.close_evicted()
        while self.store.notices:
            with _fork.process.log_lock, suppress(IndexError):  # another thread may be quicker
                self.store.notices.popleft()(self.notices)

    def close_evicted(self) -> None:
        """Close what was evicted."""
        to_close = self.store.bag.to_close
        for conn in list(to_close):  # to close one twice does no harm
            close(conn)
            with suppress(ValueError):
                to_close.remove(conn)
