"""Running: single statements in one round trip, and functions in transactions of their own."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from operator import attrgetter, methodcaller
from time import monotonic, sleep
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar
from weakref import ref

import psycopg
from psycopg import Cursor, IsolationLevel
from psycopg.pq import TransactionStatus

from dbpool.errors import CommitUncertain, DatabaseMisconfigured, DatabaseUnavailable, describe
from dbpool.holders import ConnectionRecord
from dbpool.pool import _psycopg
from dbpool.pool._bag import Step, lock_timeout
from dbpool.pool._psycopg import KeptCursor, converted_query, insist_on_alive
from dbpool.retry import delays, is_conflict, is_refused

if TYPE_CHECKING:
    from dbpool.pool._pool import Pool

T = TypeVar("T")

_IDLE = TransactionStatus.IDLE

_OUTAGE_INTERVAL = 0.02  # seconds between two looks whether an outage is over

# Where a semicolon or a keyword means nothing: in literals, names, comments.
_OPAQUE: Final = rb"""'(?:[^']|'')*'|"[^"]*"|--[^\n]*|/\*.*?\*/|\$(\w*)\$.*?\$\1\$"""
_READING: Final = rb"[\s(]*(?:select|show|table|values)\b[^;]*[;\s]*"

# What a single statement gives; a cursor class may have its own idea of it.
Result = Callable[[Cursor[Any]], T]
fetch_all: Result[list[Any]] = methodcaller("fetchall")
fetch_one: Result[Any] = methodcaller("fetchone")
row_count: Result[int] = attrgetter("rowcount")

_SINGLE: Final = "a statement in autocommit"


# Single statements


class Statement(Generic[T]):
    """One statement, and what is known of how far it came."""

    __slots__ = ("cursor", "kept", "params", "query", "result", "row_factory", "sent")

    def __init__(self, query: Any, params: Any, row_factory: Any, result: Result[T]) -> None:
        self.query, self.params, self.row_factory, self.result = query, params, row_factory, result
        self.cursor: Any = None
        self.kept: KeptCursor | None = None

    def run_once(self, pool: Pool[Any], frame: FrameType) -> T:
        """Check out, run it, return. *frame* is that of the public method."""
        self.sent = ""  # what may have been done although its answer does not come
        step = Step(pool)
        conn = pool._acquire(None, frame.f_back or frame, ref(step))
        with step:
            try:
                return self.run(pool, conn)
            except psycopg.errors.ReadOnlySqlTransaction:
                pool._maintenance.on_read_only_error(conn)
                raise
            except psycopg.OperationalError as ex:
                return self.on_lost(pool, conn, ex)
            finally:
                _psycopg.set_autocommit(conn, conn._record.session_state[0])
                kept = self.kept
                if kept is not None:
                    kept.detach()
                pool._release(conn, None if pool._user_check else kept)  # else a check saw it

    def run(self, pool: Pool[Any], conn: Any) -> T:
        """Run it on *conn* and return its result."""
        record: ConnectionRecord = conn._record
        row_factory = self.row_factory or conn.row_factory
        if record.has_stock_cursors:
            is_stock = row_factory in _psycopg.STOCK_ROW_FACTORIES
            cursor = (is_stock and record.cursor) or KeptCursor(conn)
            self.kept, record.cursor = cursor if is_stock else None, None
            cursor.attach(conn, row_factory)
        else:
            cursor = conn.cursor(row_factory=row_factory)  # so that a tracer sees it
        self.cursor = cursor
        # A connection from the pool is as it was set up, so these are the set-up's.
        if record.has_stock_class and _psycopg.is_set_up_plainly(conn):
            _psycopg.set_autocommit(conn, True)
            self.sent = _SINGLE
            try:
                return self.result(cursor.execute(self.query, self.params))
            except psycopg.errors.FeatureNotSupported as ex:
                converted = converted_query(cursor, self.query, self.params)
                _psycopg.forget_stale_plan(ex, conn, converted)
            return self.result(cursor.execute(self.query, self.params, prepare=False))
        with conn:
            value = self.result(cursor.execute(self.query, self.params))
            self.sent = "COMMIT"
            if record.has_stock_blocks:
                _psycopg.commit(conn, pool._check_certain)
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
        raise error from error.__cause__


def resend(fn: Callable[..., T], pool: Pool[Any], *args: Any, until: float | None = None) -> T:
    """Call `fn(pool, *args)`, and again if a pooler refuses what it sends.

    It does so until *until*, by default for the pool's timeout.
    """
    while True:
        try:
            return fn(pool, *args)
        except psycopg.errors.ProtocolViolation as ex:
            if (refused := pool._supply.evict_refused(ex)) is None:
                raise
            until = until or monotonic() + pool.timeout
            if monotonic() >= until:
                raise refused from refused.__cause__


def is_lost_unanswered(conn: Any, error: psycopg.Error) -> bool:
    """Whether the connection was lost before any answer of the server's to what it was sent.

    SQLSTATE class 08 is the answer of a pooler that lost the server. What a pooler refused, or what
    cannot write, has nothing to be uncertain about.
    """
    parameter = conn.pgconn.parameter_status
    is_certain = is_refused(error) or conn.read_only or parameter(b"in_hot_standby") == b"on"
    if conn.read_only is None:
        is_certain |= parameter(b"default_transaction_read_only") == b"on"
    return bool(conn.closed and (error.sqlstate or "08")[:2] == "08" and not is_certain)


def is_reading(statement: bytes) -> bool:
    """Whether it begins with SELECT, SHOW, TABLE or VALUES; comments and parentheses may precede.

    Where that cannot be told, as of several statements in one or of nested comments, it is not.
    """
    text = re.sub(_OPAQUE, b" ", statement, flags=re.DOTALL)
    is_clear = b"*/" not in text and not (b"\\" in statement and b";" in statement)
    return is_clear and bool(re.fullmatch(_READING, text, re.IGNORECASE | re.DOTALL))


# Transactions


class Options(NamedTuple):
    """How `run` runs a function."""

    attempts: int
    idempotent: bool
    isolation: IsolationLevel | None
    read_only: bool
    deadline: float | None


def run(pool: Pool[Any], fn: Callable[[Any], T], options: Options, caller: FrameType) -> T:
    """Call `fn(conn)` as `Pool.run` says."""
    pauses, deadline = delays(first=0.05, cap=1.0), options.deadline or float("inf")
    for attempt in count(1):
        step = Step(pool)
        conn = _acquire(pool, options.deadline, caller, ref(step))
        with step:
            try:
                result = _transact(pool, conn, fn, options)
            except psycopg.Error as ex:
                pause = next(pauses)
                is_last = attempt >= options.attempts or monotonic() + pause >= deadline
                if is_last or not _is_safe(pool, ex, conn, idempotent=options.idempotent):
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
    raise AssertionError("unreachable")


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


def _transact(pool: Pool[Any], conn: Any, fn: Callable[[Any], T], options: Options) -> T:
    if options.isolation is not None:
        conn.isolation_level = options.isolation
    if options.read_only:
        conn.read_only = True
    block = _begin_block(conn)
    try:
        result = fn(conn)
        _psycopg.insist_on_unlocked(conn, lock_timeout(pool.timeout))
        insist_on_alive(conn)
    except BaseException as ex:
        if isinstance(ex, psycopg.errors.ReadOnlySqlTransaction):
            pool._maintenance.on_read_only_error(conn)
        _psycopg.insist_on_unlocked(conn, lock_timeout(pool.timeout), ex)
        _roll_back_block(conn, block, ex)
        if isinstance(ex, psycopg.Rollback) and ex.transaction in (None, block):
            return None  # type: ignore[return-value]
        raise
    _psycopg.commit_block(conn, block, pool._check_certain)
    return result


def _is_safe(pool: Pool[Any], ex: psycopg.Error, conn: Any, *, idempotent: bool) -> bool:
    """Whether the transaction may run again; after a lost connection that draws on the budget."""
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
        if conn.pgconn.transaction_status != _IDLE:  # whether it began is not known
            conn.pgconn.finish()
        raise
    return block


def _roll_back_block(conn: Any, block: Any, error: BaseException) -> None:
    """Roll back the transaction of `_begin_block`; if that fails, the return closes it."""
    with suppress(psycopg.Error):
        block.__exit__(type(error), error, error.__traceback__)
        if not conn.closed and conn.pgconn.transaction_status != _IDLE:
            conn.rollback()
