"""Lending: a lease, and the slow sides of a checkout and of a return.

On a slow side a caller waits, a connection needs more than a look, or it did not come back as it
was set up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Generic
from weakref import ref

import psycopg
from psycopg.pq import TransactionStatus
from psycopg_pool.abc import CT

from dbpool.errors import describe
from dbpool.holders import ConnectionRecord
from dbpool.liveness import Liveness, check_socket, ping
from dbpool.pool import _psycopg
from dbpool.pool._bag import Step, Waiter, lock_timeout
from dbpool.pool._connector import insist_on_idle
from dbpool.pool._notices import logger

if TYPE_CHECKING:
    from dbpool.pool._pool import Pool
    from dbpool.pool._seam import PoolBase

_IDLE, _ACTIVE, _INTRANS, _INERROR, _UNKNOWN = TransactionStatus

# Seconds to pause when the user's own check refuses a connection that was just made.
_CHECK_PAUSE = 0.25


class Lease(Generic[CT]):
    """Lends a connection for the length of a `with` block. Made by `Pool.connection`."""

    # A plain class: a generator-based context manager costs a microsecond more.
    __slots__ = ("__weakref__", "_conn", "_pool", "_timeout")
    _conn: Any

    def __init__(self, pool: Pool[CT], timeout: float | None) -> None:
        self._pool = pool
        self._timeout = timeout

    def __enter__(self) -> CT:
        pool = self._pool
        try:
            caller = sys._getframe(1)
        except ValueError:  # called from C, as by `atexit` or gevent
            caller = None
        # Our own frame is not kept in a variable: it would hold itself, and so the connection.
        conn = self._conn = pool._acquire(self._timeout, caller or sys._getframe(), ref(self))
        if conn._record.has_stock_blocks:  # type: ignore[attr-defined]
            return conn
        try:
            return conn.__enter__()
        except BaseException:
            pool._release(conn)
            raise

    def __exit__(self, exc_type: object, exc: BaseException | None, tb: object) -> None:
        pool, conn = self._pool, self._conn
        try:
            try:
                status = conn.pgconn.transaction_status
                if exc is not None or status == _ACTIVE:
                    _inspect(pool, conn, exc)
                is_stock = conn._record.has_stock_blocks
                if exc is None and status == _INTRANS and is_stock:
                    _psycopg.commit(conn, pool._check_certain)
                # With nothing begun there is nothing to end: saves a lock and two calls.
                elif status != _IDLE or not is_stock:
                    conn.__exit__(exc_type, exc, tb)
            except psycopg.OperationalError as ex:
                if exc_type is None and status == _INTRANS and not is_stock:
                    pool._check_certain(conn, ex)
                raise
            finally:
                pool._release(conn)
        except BaseException:  # does nothing if the connection was returned
            pool._recover(ref(self))
            raise


def _inspect(pool: Pool[CT], conn: Any, error: BaseException | None) -> None:
    """Do what the error that leaves a block says about its connection or its server.

    Without an error, insist on a connection that can commit.
    """
    if type(error) is psycopg.errors.ReadOnlySqlTransaction:
        pool._maintenance.on_read_only_error(conn)
    elif lost := pool._supply.evict_refused(error):
        raise lost
    elif _psycopg.is_stale_plan(error):
        _psycopg.forget_plans(conn)
    _psycopg.insist_on_unlocked(conn, lock_timeout(pool.timeout), error)


# Acquiring


def acquire(
    pool: PoolBase[Any], conn: Any, owner: ref[Any], started: float, timeout: float | None
) -> Any:
    """Return *conn* if it is usable, else the next that is; wait for one if there is none."""
    deadline = started + (pool.timeout if timeout is None else timeout)
    while True:
        is_fresh = False
        if conn is None:
            waiter = pool.trace(_wait, pool, Waiter(owner, started, deadline))
            conn, is_fresh = waiter.conn, waiter.is_fresh and not pool._user_check
        if is_fresh or _evict_unless_usable(pool, conn, deadline):
            return conn
        if pool._user_check and conn._record.created_at >= started:
            sleep(lock_timeout(min(_CHECK_PAUSE, deadline - monotonic())))
        conn = None if started < deadline <= monotonic() else pool._store.take_idle(owner)


def _wait(pool: PoolBase[Any], waiter: Waiter) -> Waiter:
    """Wait until *waiter* has a connection; raise if it gets none."""
    if not pool._store.is_open:
        pool._open_on_use()
    pool._store.join(waiter, pool.max_waiting, close_returns=pool.close_returns)
    if waiter.wait():
        pool._notices.timed_out(*pool._store.time_out(waiter))
    if waiter.is_over:
        if usage := pool._store.metrics.usage:
            usage.gave_up(waiter.thread.endpoint, sys._getframe())
        pool._notices.not_served(waiter.error, monotonic() - waiter.started, waiter.is_rejected)
        raise waiter.take_error()  # no variable keeps it: it would keep this frame
    return waiter


def _evict_unless_usable(pool: PoolBase[Any], conn: Any, deadline: float) -> bool:
    """Return whether *conn* may be lent; evict it if not.

    Only a ping can tell of one that was idle for ping_after, or sent something. While connects fail
    one past its lifetime is better than none.
    """
    settings, supply, record, now = pool.settings, pool._supply, conn._record, monotonic()
    if now >= record.expires_at and not pool._store.breaker.is_failing:
        supply.evict(conn, "expired")
        return False
    found = check_socket(conn, record.readable)
    if found is Liveness.DEAD:
        supply.evict(conn, "dead", by_server=True)
        supply.evict_closed_by_server()
        return False
    timeout = min(settings.ping_timeout, deadline - now)
    is_unsure = found is Liveness.UNKNOWN or now - record.idle_since >= settings.ping_after
    if is_unsure and timeout > 0.0 and not supply.ping(conn, timeout):
        return False
    return not pool._user_check or _passes_check(pool, conn, pool._user_check)


def _passes_check(pool: PoolBase[Any], conn: Any, check: Callable[[Any], None]) -> bool:
    """Run the user's `check`; the timeout does not bound it."""
    _psycopg.attach(conn, pool)
    conn._record.cursor = None
    try:
        check(conn)
        if conn.pgconn.transaction_status != _IDLE:
            conn.commit()  # what it began is not its user's
    except Exception as ex:  # noqa: BLE001  # a user's callback may raise anything
        reason = describe(ex, conn)
    else:
        return True
    logger.info("connection failed check: %s", reason)  # where no frame has the error
    pool._supply.evict(conn, "dead")
    return False


# Taking back


def take_back(pool: PoolBase[Any], conn: Any) -> None:
    """Take back a connection that is not as it was set up, too old, or was held for too long.

    A user's `reset` runs in a worker.
    """
    store, record = pool._store, conn._record
    record.cursor = None
    if record.fd < 0:  # inherited by a fork: its session is the parent's
        _psycopg.close(conn)
        return
    with Step(pool) as owner:
        is_late = record.is_reported
        if (use := store.end_use(record, owner)) is None:
            insist_on_reaped(pool, record)
            return
        pool._notices.checked_in(use, record.where(), is_late=is_late)
        store.bag.cancel_later(conn)
        if not (pool._user_reset and store.give_to_worker(record, lambda p: finish(p, conn))):
            finish(pool, conn)


def finish(pool: PoolBase[Any], conn: Any) -> None:
    """Make a connection in transit fit for the next holder, or evict it."""
    store, record, liveness = pool._store, conn._record, Liveness.UNKNOWN
    if store.is_open:
        timeout = pool.settings.ping_timeout
        if message := record.reset_message:
            _reset(pool, conn, lambda conn: _psycopg.reset_session(conn, message, timeout))
        _reset(pool, conn, pool._user_reset)
        reason = ""
        if conn.pgconn.transaction_status == _UNKNOWN:
            reason = "broken"
        elif monotonic() >= record.expires_at and not store.breaker.is_failing:
            reason = "expired"
        elif not _psycopg.restore_session_state(conn):
            logger.warning(
                "discarding connection returned in a two-phase commit, pipeline or notifies()"
            )
            reason = "broken"
        elif (liveness := _check(pool, conn)) is Liveness.DEAD:
            reason = "dead"
        if reason:
            pool._supply.evict(conn, reason, by_server=reason == "dead" or conn.broken)
            return
        record.idle_since = monotonic()
    store.add(conn, is_fresh=liveness is Liveness.ALIVE)  # which closes it in a closed pool
    pool._supply.close_evicted()


def _reset(pool: PoolBase[Any], conn: Any, reset: Callable[[Any], None] | None) -> None:
    """Roll back and call *reset*; a connection for which that fails is closed."""
    status, where = conn.pgconn.transaction_status, conn._record.where()
    try:
        if status == _ACTIVE:
            raise psycopg.ProgrammingError("it was returned in the middle of an operation")
        if status not in (_IDLE, _UNKNOWN):
            pool._notices.rolled_back(conn, where)
            conn.rollback()
        if reset and status != _UNKNOWN:
            reset(conn)
            insist_on_idle(conn, "reset")
    except Exception as ex:  # noqa: BLE001  # a user's callback may raise anything
        reason = describe(ex, conn)
    except BaseException:
        pool._supply.evict(conn, "broken")
        raise
    else:
        return
    pool._notices.not_reusable(reason, where)  # out here, where no frame has the error
    _psycopg.close(conn)


def _check(pool: PoolBase[Any], conn: Any) -> Liveness:
    """Check the socket; while connects fail, silence behind a pooler proves nothing."""
    liveness = check_socket(conn, conn._record.readable)
    is_proof = not pool._store.breaker.is_failing or pool.settings.pooler != "transaction"
    if liveness is Liveness.ALIVE and not is_proof:
        try:
            ping(conn, pool.settings.ping_timeout)
        except psycopg.Error:
            return Liveness.DEAD
    return liveness


def insist_on_reaped(pool: PoolBase[Any], record: ConnectionRecord) -> None:
    """Raise `ValueError` for a second return, not for that of what was taken from its holder."""
    if not record.is_reaped:
        raise ValueError(f"can't return connection to pool {pool.name!r}, it is not out")
