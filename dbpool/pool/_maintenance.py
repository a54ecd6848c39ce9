"""What a pool's own threads do: workers connect and close, the watchdog replaces, heals and reports."""

from __future__ import annotations

import queue
import threading
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

import psycopg
from psycopg_pool.sched import Scheduler

from dbpool._threads import run_in_thread
from dbpool.breaker import Attempt
from dbpool.errors import FailureKind, is_permanent
from dbpool.holders import ConnectionRecord
from dbpool.liveness import cancel
from dbpool.pool import _fork
from dbpool.pool._bag import Job, Jobs
from dbpool.pool._connector import Connector, Failure
from dbpool.pool._lending import Step, evict_closed_by_server, ping
from dbpool.pool._notices import logger

if TYPE_CHECKING:
    from dbpool.pool._seam import PoolBase

_CHANGE_INTERVAL: Final = 1.0  # seconds between two looks at a conninfo that was refused
_MIN_OVERDUE_INTERVAL: Final = 0.1  # seconds between two looks at an attempt without an answer
# Seconds. A primary that moved may make many statements fail at once: one drain is enough. Also the
# time between two looks for a standby that is preferred.
_MOVED_INTERVAL: Final = 5.0

# Seconds between two runs: twice the longest heals what was interrupted.
MIN_INTERVAL: Final = 0.05
MAX_INTERVAL: Final = 0.5
_CANCEL_SECONDS: Final = 1.0  # for all cancel requests of one run
# What the server calls where a function's plan is for types that have changed. Its session keeps it.
_STALE_FUNCTION: Final = ("plpgsql_param_eval", "CheckVarSlot", "getBaseType")


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
            pool: Any = self._pool()
            if pool is not None or job == self._end_scheduler:
                job(pool)
        except BaseException as ex:  # noqa: BLE001  # SystemExit of a callback, say
            pool._notices.task_failed(type(ex).__name__)

    def _end_scheduler(self, _pool: object) -> None:
        self.scheduler.enter(0.0, None)  # once: another stop would end the next thread

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            self._do(job)
            del job  # it may hold a connection

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
            name = f"{self._name}-worker-{n - 1}" if n else f"{self._name}-scheduler"
            thread = threading.Thread(target=target, name=name, daemon=True)
            thread.start()
            self.threads.append(thread)

    def stop(self) -> list[threading.Thread]:
        """Have the threads end; return them. To be called again if it was interrupted."""
        with self.starting:
            threads = self.threads
            if threads[1:]:  # a worker ends the scheduler: what wakes that is an Event
                self.jobs.put(self._end_scheduler)
            elif threads:
                self._end_scheduler(None)
            for _ in threads[1:]:
                self.jobs.put(None)
            self.threads = []
            return threads


class Maintenance:
    """Connects, shrinks, replaces, heals and reports, away from the callers' threads.

    Each method takes the pool: a part that kept its pool would keep it alive.
    """

    def __init__(self, connector: Connector) -> None:
        self.connector = connector
        self._moved_at, self._standby_due = float("-inf"), 0.0

    # Connecting

    def connect(self, pool: PoolBase[Any], attempt: Attempt) -> None:
        """Make one attempt, if its connection is still needed and it is due."""
        store = pool._store
        if not store.admit(attempt):
            return
        if attempt.due > store.breaker.clock() and not (
            attempt.awaits_change and self.connector.have_changed(pool, attempt.params)
        ):
            self._connect_later(pool, attempt)
            return
        started = attempt.started = store.breaker.clock()
        self.check_answer(pool, attempt, started)
        made = pool.trace(self.connector.connect, pool, attempt)
        if isinstance(made, Failure):
            self._failed(pool, attempt, started, made)
        else:
            self._connected(pool, attempt, made)

    def _connected(self, pool: PoolBase[Any], attempt: Attempt, conn: Any) -> None:
        metrics = pool._store.metrics
        seconds = pool._store.connected(conn, attempt)
        self.flush(pool)  # the end of an outage comes before the connection that ended it
        pool._notices.connected(seconds)
        troubles = metrics.discarded["dead"] + metrics.connect_failures
        if self.connector.server_defaults.begin_if_due(pool.max_lifetime, troubles):
            pool._threads.jobs.put(lambda pool: pool._maintenance.check_server_defaults(pool))

    def _failed(self, pool: PoolBase[Any], attempt: Attempt, started: float, why: Failure) -> None:
        store, breaker, kind = pool._store, pool._store.breaker, why.kind
        is_wrong = is_permanent(kind)
        # A token that is new at each call is no correction.
        attempt.awaits_change = is_wrong and not self.connector.have_changed(pool)
        evict_closed_by_server(pool)  # an idle one that is alive keeps the breaker closed
        is_retry = store.failed(attempt, why.error, kind)
        if not store.is_open:
            return
        if is_retry:
            self._connect_later(pool, attempt)
        text, sizes, exist = breaker.last_error or "", "", len(store.bag.records)
        # Where no connection exists, the opening of the breaker is logged.
        if exist and (kind == FailureKind.SATURATED or is_wrong) and not breaker.is_open:
            sizes = f"{exist} of at most {store.max_size} exist, {len(store.waiting)} waiting"
        pool._notices.connect_failed(breaker.clock() - started, text, kind, sizes)
        self.flush(pool)
        if is_retry and breaker.report_failure(pool.reconnect_timeout):
            pool.reconnect_failed()

    def _connect_later(self, pool: PoolBase[Any], attempt: Attempt) -> None:
        limit = _CHANGE_INTERVAL if attempt.awaits_change else float("inf")
        delay = min(limit, max(0.0, attempt.due - pool._store.breaker.clock()))
        pool._threads.run_later(lambda pool: pool._store.enqueue(attempt), delay)

    def check_answer(self, pool: PoolBase[Any], attempt: Attempt, started: float) -> None:
        """Count an attempt as failing if it has no answer for too long; look again until it has."""
        if (left := pool._store.overdue(attempt, started)) is not None:
            again = partial(self.check_answer, attempt=attempt, started=started)
            pool._threads.run_later(again, max(left, _MIN_OVERDUE_INTERVAL))
            self.flush(pool)

    def check_server_defaults(self, pool: PoolBase[Any]) -> None:
        """Ask for the server's timeouts again, and replace connections if they have changed."""
        connector, defaults = self.connector, self.connector.server_defaults
        if not pool._store.is_open or pool._store.breaker.is_failing:
            return
        try:
            have_changed = defaults.ask_again(partial(connector.open, pool), connector.params(pool))
        except Exception:  # noqa: BLE001  # whatever it is, the next connect asks again
            defaults.troubles = -1
            return
        if have_changed:
            logger.info("pool %r: the server's timeouts have changed", pool.name)
            self.replace_all(pool)

    def replace_all(self, pool: PoolBase[Any]) -> None:
        """Replace all connections: the idle ones now, those that are out when they return."""
        pool._store.expire()
        pool._store.bag.close_evicted()

    def flush(self, pool: PoolBase[Any]) -> None:
        """Close what was evicted, and send the notices that were queued under the lock."""
        pool._store.bag.close_evicted()
        while pool._store.notices:
            with _fork.process.log_lock, suppress(IndexError):  # another thread may be quicker
                pool._store.notices.popleft()(pool._notices)

    # Maintaining

    def run(self, pool: PoolBase[Any], now: float) -> None:
        """Do all that is due."""
        self.send_cancels(pool)
        with _fork.process.log_lock:
            pool._notices.end_episodes(pool.timeout)
            pool._heal()
            self.shrink(pool)
            self._look_for_standby(pool, now)
            slow, limit = pool.settings.slow_acquire, pool.settings.leak_after
            if slow and (began := pool._store.mark_slow(now - slow)):
                pool._notices.slow_acquire([now - each for each in began], pool._store.snapshot())
            if limit and (held := pool._store.mark_held_long(now - limit)):
                pool._notices.held_long(held, limit)

    def shrink(self, pool: PoolBase[Any]) -> None:
        """Close what has been idle for *max_idle* beyond min_size, or is past its lifetime."""
        now, store = monotonic(), pool._store
        spare = store.size - store.min_size
        if spare > 0:
            store.evict_idle("idle", lambda record: record.idle_since <= now - pool.max_idle, spare)
        if not store.breaker.is_failing:
            store.evict_idle("expired", lambda record: record.expires_at <= now)
        pool._store.bag.close_evicted()

    def send_cancels(self, pool: PoolBase[Any]) -> None:
        """Send the cancel requests, one after the other, for a second at most."""
        deadline = monotonic() + _CANCEL_SECONDS
        with suppress(IndexError):  # there are no more
            while (remaining := deadline - monotonic()) > 0.0:
                request = pool._store.bag.cancels.popleft()
                if not pool._store.breaker.is_failing:
                    with suppress(psycopg.Error):
                        cancel(request, remaining)

    def check(self, pool: PoolBase[Any]) -> None:
        """Ping every idle connection, within ping_timeout each; replace those that fail.

        Once a ping has timed out, the others that have been idle for long go with it.
        """
        answered: set[ConnectionRecord] = set()
        with Step(pool) as owner:
            for idle in list(pool._store.bag.idle):
                conn = pool._store.take_idle(owner, idle)
                if conn and ping(pool, conn, pool.settings.ping_timeout, answered):
                    answered.add(conn._record)
                    pool._store.add(conn, is_verified=True)

    # Failover

    def on_error(self, pool: PoolBase[Any], conn: Any, error: BaseException | None) -> None:
        """Replace all connections if a statement failed because the server became read-only.

        That is so where the conninfo asked for a server that can write, and the transaction was
        not read-only itself, or where the server says that its role changed. Replace this one
        alone if its session has a stale plan of a function.
        """
        record: ConnectionRecord = conn._record
        source = error.diag.source_function if isinstance(error, psycopg.Error) else None
        if (source or "").startswith(_STALE_FUNCTION):
            record.expires_at = 0.0
        if not isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
            return
        standby = conn.pgconn.parameter_status(b"in_hot_standby")
        has_moved = standby != record.standby or (record.read_write and not conn.read_only)
        if has_moved and (now := monotonic()) >= self._moved_at + _MOVED_INTERVAL:
            self._moved_at = now
            pool._notices.moved()
            self.replace_all(pool)

    def _look_for_standby(self, pool: PoolBase[Any], now: float) -> None:
        """Have a worker look now and then whether a standby is back, while the primary serves."""
        is_due = now >= self._standby_due and not pool._store.breaker.is_failing
        if is_due and any(self._on_primary(record) for record in list(pool._store.bag.records)):
            self._standby_due = now + _MOVED_INTERVAL
            pool._threads.jobs.put(lambda pool: pool._maintenance.return_to_standby(pool))

    def return_to_standby(self, pool: PoolBase[Any]) -> None:
        """Replace the connections to a primary if a new one would be to a standby."""
        try:
            conn = self.connector.open(pool, self.connector.params(pool))
        except Exception:  # noqa: BLE001  # whatever it is, the connections in use are better
            return
        standby = conn.pgconn.parameter_status(b"in_hot_standby")
        conn.close()
        if standby == b"on":
            pool._notices.standby_back(pool._store.expire(self._on_primary))
            pool._store.bag.close_evicted()

    def _on_primary(self, record: ConnectionRecord) -> bool:
        """Whether a connection that prefers a standby is to a primary.

        What an idle one says now may be read; of one that is out, what it said at first counts.
        """
        if not record.prefers_standby or (conn := record.ref()) is None:
            return False
        is_idle = record.owner is None and not conn.closed
        standby = conn.pgconn.parameter_status(b"in_hot_standby") if is_idle else record.standby
        return bool(standby == b"off")
