"""Lease: the context manager that lends a connection."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic
from weakref import ref

import psycopg
from psycopg.errors import ProtocolViolation
from psycopg.pq import TransactionStatus
from psycopg_pool.abc import CT

from dbpool.pool._psycopg import commit, end_torn_pipeline, forget_plans, is_stale_plan

if TYPE_CHECKING:
    from dbpool.pool._pool import Pool

_IDLE, _INTRANS = TransactionStatus.IDLE, TransactionStatus.INTRANS


class Lease(Generic[CT]):
    """Lends a connection for the length of a `with` block. Made by `Pool.connection`."""

    # A plain class: a generator-based context manager costs a microsecond more.
    __slots__ = ("__weakref__", "_conn", "_pool", "_timeout")

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

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        pool, conn = self._pool, self._conn
        try:
            try:
                if exc is not None:
                    _inspect_error(pool, conn, exc)
                status = conn.pgconn.transaction_status
                is_stock = conn._record.has_stock_blocks  # type: ignore[attr-defined]
                if exc is None and status == _INTRANS and is_stock:
                    commit(conn, pool._check_certain)
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


def _inspect_error(pool: Pool[CT], conn: Any, error: BaseException) -> None:
    """Do what the error that leaves a block says about its connection or its server."""
    if type(error) is psycopg.errors.ReadOnlySqlTransaction:
        pool._maintenance.on_read_only_error(conn)
    elif type(error) is ProtocolViolation and (lost := pool._supply.evict_lost(error)):
        raise lost
    elif is_stale_plan(error):
        forget_plans(conn)
    end_torn_pipeline(conn)
