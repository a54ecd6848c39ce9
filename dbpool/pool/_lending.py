"""Lending: the slow side of a checkout, where a caller waits or a connection needs more than a look."""

from __future__ import annotations

from time import monotonic, sleep
from typing import TYPE_CHECKING, Any
from weakref import ref

from psycopg.pq import TransactionStatus

from dbpool.errors import describe
from dbpool.pool._inspect import Verdict, inspect
from dbpool.pool._notices import logger
from dbpool.pool._psycopg import attach
from dbpool.pool._waiting import Waiter, lock_timeout

if TYPE_CHECKING:
    from dbpool.pool._seam import PoolBase

# Seconds to pause when the user's own check refuses a connection that was just made.
_CHECK_PAUSE = 0.25


def acquire(
    pool: PoolBase[Any], conn: Any, owner: ref[Any], started: float, timeout: float | None
) -> Any:
    """Return *conn* if it is usable, else the next that is; wait for one if there is none."""
    deadline = started + (pool.timeout if timeout is None else timeout)
    while True:
        is_fresh = False
        if conn is None:
            waiter = _wait(pool, Waiter(owner, started, deadline))
            conn, is_fresh = waiter.conn, waiter.is_fresh and not pool._has_user_check
        if is_fresh or _is_usable(pool, conn, deadline):
            return conn
        if pool._has_user_check and conn._record.created_at >= started:
            sleep(lock_timeout(min(_CHECK_PAUSE, deadline - monotonic())))
        is_late = started < deadline <= monotonic()
        conn = None if is_late else pool._store.take_idle(owner)


def _wait(pool: PoolBase[Any], waiter: Waiter) -> Waiter:
    """Wait until *waiter* has a connection; raise if it gets none."""
    if not pool._store.is_open:
        pool._open_on_use()
    pool._store.join(waiter, pool.max_waiting, close_returns=pool.close_returns)
    if waiter.wait():
        pool._notices.timed_out(*pool._store.time_out(waiter))
    if waiter.is_over:
        pool._notices.not_served(waiter.error, monotonic() - waiter.started, waiter.is_rejected)
        raise waiter.take_error()  # no variable keeps it: it would keep this frame
    return waiter


def _is_usable(pool: PoolBase[Any], conn: Any, deadline: float) -> bool:
    """Whether to lend a connection; evict it if not."""
    settings, supply = pool.settings, pool._supply
    verdict = inspect(conn, settings.ping_after, is_failing=pool.breaker.is_failing)
    if verdict is Verdict.EXPIRED:
        supply.evict(conn, "expired")
        return False
    if verdict is Verdict.DEAD:
        supply.evict(conn, "dead", by_server=True)
        supply.evict_closed_by_server()
        return False
    timeout = min(settings.ping_timeout, deadline - monotonic())
    if verdict is Verdict.UNSURE and timeout > 0.0 and not supply.ping(conn, timeout):
        return False
    return not pool._has_user_check or _passes_check(pool, conn)


def _passes_check(pool: PoolBase[Any], conn: Any) -> bool:
    """Run the user's `check`; the timeout does not bound it."""
    attach(conn, pool)
    conn._record.cursor = None
    check: Any = pool._callbacks.check
    try:
        check(conn)
        if conn.pgconn.transaction_status != TransactionStatus.IDLE:
            conn.commit()  # what it began is not its user's
    except Exception as ex:  # noqa: BLE001  # a user's callback may raise anything
        reason = describe(ex, conn)
    else:
        return True
    logger.info("connection failed check: %s", reason)  # where no frame has the error
    pool._supply.evict(conn, "dead")
    return False
