"""Returning: what to do with a connection that did not come back as it was set up.

It is rolled back, reset by the user's `reset`, put back as it was, and checked.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

import psycopg

from dbpool.errors import describe
from dbpool.holders import ConnectionRecord
from dbpool.liveness import Liveness, check_socket, ping
from dbpool.pool import _psycopg
from dbpool.pool._lending import Step, evict

if TYPE_CHECKING:
    from dbpool.pool._seam import PoolBase


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
    store, record, settings = pool._store, conn._record, pool.settings
    reason, liveness = "", Liveness.UNKNOWN
    if store.is_open:
        if message := record.reset_message:
            _reset(pool, conn, lambda c: _psycopg.reset_session(c, message, settings.ping_timeout))
        _reset(pool, conn, pool._user_reset)
        _psycopg.restore_session_state(conn)
        if conn.pgconn.transaction_status == _psycopg.UNKNOWN:
            reason = "broken"
        elif monotonic() >= record.expires_at and not store.breaker.is_failing:
            reason = "expired"
        elif (liveness := _check(pool, conn)) is Liveness.DEAD:
            reason = "dead"
        if reason:
            is_lost, doubted = reason == "dead" or conn.broken, monotonic() - settings.ping_after
            # Where one is lost, the end of the others may be under way or never come: each is
            # pinged before it is lent.
            for idle in list(store.bag.idle) if is_lost else ():
                idle._record.idle_since = min(idle._record.idle_since, doubted)
            evict(pool, conn, reason, by_server=is_lost)
            return
        record.idle_since = monotonic()
    store.add(conn, is_verified=liveness is Liveness.ALIVE)  # which closes it in a closed pool
    store.bag.close_evicted()


def _reset(pool: PoolBase[Any], conn: Any, reset: Callable[[Any], None] | None) -> None:
    """Roll back and call *reset*; a connection for which that fails is closed."""
    status, where = conn.pgconn.transaction_status, conn._record.where()
    try:
        if status == _psycopg.ACTIVE:
            raise psycopg.ProgrammingError("it was returned in the middle of an operation")
        if status != _psycopg.UNKNOWN:
            _psycopg.insist_on_restorable(conn)
            if status != _psycopg.IDLE:
                pool._notices.rolled_back(conn, where)
                conn.rollback()
            if reset:
                reset(conn)
                _psycopg.insist_on_idle(conn, "reset")
    except Exception as ex:  # noqa: BLE001  # a user's callback may raise anything
        reason = describe(ex, conn)
    except BaseException:
        evict(pool, conn, "broken")
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
