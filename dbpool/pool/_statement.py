"""Single statements in one round trip: what `fetch_*` and `execute` share."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter, methodcaller
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar
from weakref import ref

import psycopg
from psycopg import Cursor

from dbpool.errors import CommitUncertain
from dbpool.holders import ConnectionRecord
from dbpool.pool._bag import Step
from dbpool.pool._outcomes import is_reading
from dbpool.pool._psycopg import (
    STOCK_ROW_FACTORIES,
    KeptCursor,
    commit,
    converted_query,
    forget_stale_plan,
    is_set_up_plainly,
    set_autocommit,
)

if TYPE_CHECKING:
    from dbpool.pool._pool import Pool

T = TypeVar("T")

# What a single statement gives; a cursor class may have its own idea of it.
fetch_all: Callable[[Cursor[Any]], list[Any]] = methodcaller("fetchall")
fetch_one: Callable[[Cursor[Any]], Any] = methodcaller("fetchone")
row_count: Callable[[Cursor[Any]], int] = attrgetter("rowcount")

_SINGLE: Final = "a statement in autocommit"


class Statement(Generic[T]):
    """One statement, and what is known of how far it came."""

    __slots__ = ("cursor", "kept", "params", "query", "result", "row_factory", "sent")

    def __init__(
        self, query: Any, params: Any, row_factory: Any, result: Callable[[Cursor[Any]], T]
    ) -> None:
        self.query, self.params, self.row_factory, self.result = query, params, row_factory, result
        self.cursor: Any = None
        self.kept: KeptCursor | None = None
        self.sent = ""  # what may have been done although its answer does not come

    def run(self, pool: Pool[Any], conn: Any) -> T:
        """Run it on *conn* and return its result."""
        record: ConnectionRecord = conn._record
        row_factory = self.row_factory or conn.row_factory
        if record.has_stock_cursors:
            is_stock = row_factory in STOCK_ROW_FACTORIES
            cursor = (is_stock and record.cursor) or KeptCursor(conn)
            self.kept, record.cursor = cursor if is_stock else None, None
            cursor.attach(conn, row_factory)
        else:
            cursor = conn.cursor(row_factory=row_factory)  # so that a tracer sees it
        self.cursor = cursor
        # A connection from the pool is as it was set up, so these are the set-up's.
        if record.has_stock_class and is_set_up_plainly(conn):
            set_autocommit(conn, True)
            self.sent = _SINGLE
            try:
                return self.result(cursor.execute(self.query, self.params))
            except psycopg.errors.FeatureNotSupported as ex:
                forget_stale_plan(ex, conn, converted_query(cursor, self.query, self.params))
            return self.result(cursor.execute(self.query, self.params, prepare=False))
        with conn:
            value = self.result(cursor.execute(self.query, self.params))
            self.sent = "COMMIT"
            if record.has_stock_blocks:
                commit(conn, pool._check_certain)
            return value

    def on_lost(self, pool: Pool[Any], conn: Any, ex: psycopg.OperationalError) -> T:
        """Return the result if all of it came before the connection was lost, else raise."""
        if self.sent is _SINGLE and conn.closed and self.cursor.pgresult:
            return self.result(self.cursor)  # lost over what psycopg tidies up afterwards
        error: Any = ex.__cause__ if isinstance(ex, CommitUncertain) else ex
        was_sent = self.sent and getattr(self.cursor, "is_sent", True)
        is_fetch = self.result is not row_count
        if was_sent and not (
            is_fetch and is_reading(converted_query(self.cursor, self.query).query)
        ):
            pool._check_certain(conn, error, self.sent)
        error = pool._supply.evict_lost(error) or error
        raise error from error.__cause__


def run_statement(pool: Pool[Any], statement: Statement[T], frame: FrameType) -> T:
    """Check out, run one statement, return. *frame* is that of the public method."""
    step = Step(pool)
    conn = pool._acquire(None, frame.f_back or frame, ref(step))
    with step:
        try:
            return statement.run(pool, conn)
        except psycopg.errors.ReadOnlySqlTransaction:
            pool._maintenance.on_read_only_error(conn)
            raise
        except psycopg.OperationalError as ex:
            return statement.on_lost(pool, conn, ex)
        finally:
            set_autocommit(conn, conn._record.session_state[0])
            kept = statement.kept
            if kept is not None:
                kept.detach()
            pool._release(conn, None if pool._has_user_check else kept)  # else a check saw it
