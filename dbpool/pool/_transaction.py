"""Transactions of `Pool.run`: a function in one, which is run again where that may help."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from time import monotonic, sleep
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from weakref import ref

import psycopg
from psycopg import IsolationLevel

from dbpool.errors import CommitUncertain, DatabaseMisconfigured, DatabaseUnavailable, describe
from dbpool.pool import _psycopg
from dbpool.pool._lending import Step
from dbpool.retry import delays, is_conflict, is_refused

if TYPE_CHECKING:
    from dbpool.pool._pool import Pool

T = TypeVar("T")

_OUTAGE_INTERVAL = 0.02  # seconds between two looks whether an outage is over


class RunOptions(NamedTuple):
    """How `run` runs a function."""

    attempts: int
    idempotent: bool
    isolation: IsolationLevel | None
    read_only: bool
    deadline: float | None


def run(pool: Pool[Any], fn: Callable[[Any], T], options: RunOptions, caller: FrameType) -> T:
    """Call `fn(conn)` as `Pool.run` says."""
    pauses, deadline = enumerate(delays(first=0.05, cap=1.0), 1), options.deadline or float("inf")
    while True:
        step = Step(pool)
        conn = _acquire(pool, options.deadline, caller, ref(step))
        with step:
            try:
                result = _transact(pool, conn, fn, options)
            except psycopg.Error as ex:
                attempt, pause = next(pauses)
                is_last = attempt >= options.attempts or monotonic() + pause >= deadline
                if is_last or not _allow_retry(pool, ex, conn, idempotent=options.idempotent):
                    raise
                # The error itself would hold this frame, and so the connection.
                error = describe(ex, conn)
            else:
                pool._budget.refund()
                return result
            finally:
                pool._release(conn)
        pool._store.count_retry()
        pool._notices.retried(attempt, error, pause)
        sleep(pause)


def _acquire(pool: Pool[Any], deadline: float | None, caller: FrameType, owner: ref[Any]) -> Any:
    """Acquire; with a deadline, wait out an outage that waiting may cure."""
    while True:
        remaining = None if deadline is None else max(0.0, deadline - monotonic())
        try:
            return pool._acquire(remaining, caller, owner)
        except DatabaseUnavailable as ex:
            if not (deadline and remaining) or isinstance(ex, DatabaseMisconfigured):
                raise
        while pool.state == "down" and (left := deadline - monotonic()) > 0.0:
            sleep(min(left, _OUTAGE_INTERVAL))


def _transact(pool: Pool[Any], conn: Any, fn: Callable[[Any], T], options: RunOptions) -> T:
    if options.isolation is not None:
        conn.isolation_level = options.isolation
    if options.read_only:
        conn.read_only = True
    block = _begin_block(conn)
    try:
        result = fn(conn)
        _psycopg.insist_on_unlocked(conn, pool.timeout)
        _psycopg.insist_on_alive(conn)
    except BaseException as ex:
        pool._maintenance.on_error(pool, conn, ex)
        _psycopg.insist_on_unlocked(conn, pool.timeout, ex)
        _roll_back_block(conn, block, ex)
        if isinstance(ex, psycopg.Rollback) and ex.transaction in (None, block):
            return None  # type: ignore[return-value]
        raise
    _psycopg.commit_block(conn, block, pool._check_certain)
    return result


def _allow_retry(pool: Pool[Any], ex: psycopg.Error, conn: Any, *, idempotent: bool) -> bool:
    """Return whether it may run again; after a lost connection, draw that on the budget."""
    # A connection that was closed on this side is not `broken`.
    was_undone = idempotent if isinstance(ex, CommitUncertain) else conn.broken
    is_lost = bool(was_undone) and not is_refused(ex)  # what is refused is sent again anyway
    return is_conflict(ex) or (is_lost and pool._budget.draw())


def _begin_block(conn: Any) -> Any:
    """Begin a transaction, so that a block inside it is a savepoint; return its block.

    psycopg refuses `commit()` and `rollback()` in it.
    """
    record = conn._record
    block: Any = psycopg.Transaction(conn) if record.has_stock_blocks else conn.transaction()
    try:
        if not record.has_stock_class and not conn.autocommit:
            conn.execute("")  # begins: the block does not end what the class is to end
        block.__enter__()
    except BaseException:
        if conn.pgconn.transaction_status != _psycopg.IDLE:  # whether it began is not known
            conn.pgconn.finish()
        raise
    return block


def _roll_back_block(conn: Any, block: Any, error: BaseException) -> None:
    """Roll back the transaction of `_begin_block`; if that fails, the return closes it."""
    with suppress(psycopg.Error):
        block.__exit__(type(error), error, error.__traceback__)
        if not conn.closed and conn.pgconn.transaction_status != _psycopg.IDLE:
            conn.rollback()
