"""The seam to psycopg: its protected members are touched here, in `_pipelining` and nowhere else.

The hot lines of `_pool.py` excepted, which `tests/test_seam.py` names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from operator import attrgetter
from types import FunctionType
from typing import Any, Final, cast

import psycopg
from psycopg import Connection, Cursor
from psycopg.adapt import AdaptersMap
from psycopg.errors import error_from_result
from psycopg.generators import fetch, send
from psycopg.pq import ExecStatus, TransactionStatus
from psycopg.rows import RowFactory, dict_row, namedtuple_row, scalar_row, tuple_row

from dbpool._threads import clamp_timeout
from dbpool.holders import ConnectionRecord
from dbpool.liveness import Liveness, check_socket, notice_loss, ping, poller, run_query

IDLE, ACTIVE, INTRANS, INERROR, UNKNOWN = TransactionStatus

CheckCertain = Callable[[Any, psycopg.Error], None]

# How a block begins and ends.
_BLOCK_METHODS: Final = """__enter__ __exit__ commit rollback
    _commit_gen _exec_command _start_query _get_tx_start_command"""

# What a user may change and another would not want to find changed, first what can be set back.
# To register a type copies the registry; an exception that tears a block's end leaves a number.
_STATE: Final = """
    _autocommit row_factory cursor_factory server_cursor_factory _isolation_level _read_only
    _deferrable _prepared.prepare_threshold _prepared.prepared_max _tpc _pipeline _notice_handlers
    _notify_handlers _adapters.changes _adapters.types._registry _num_transactions
    _notifies_backlog"""
session_state: Final[Callable[[Any], tuple[object, ...]]] = attrgetter(*_STATE.split())
_AUTOCOMMIT, _SETTABLE, _HANDLERS = 0, slice(9), slice(11, 13)  # where in a session state

# Row factories that look at a cursor's result alone.
STOCK_ROW_FACTORIES: Final = (tuple_row, dict_row, namedtuple_row, scalar_row)


class WatchedAdapters(AdaptersMap):
    """A connection's adapters, which count what is registered."""

    changes = 0

    def register_dumper(self, *args: Any) -> None:
        """Register it, as psycopg does."""
        self.changes += 1
        super().register_dumper(*args)

    def register_loader(self, *args: Any) -> None:
        """Register it, as psycopg does."""
        self.changes += 1
        super().register_loader(*args)


def remember_session_state(conn: Any) -> tuple[tuple[object, ...], AdaptersMap]:
    """Return a new connection's session state, and its adapters to begin from again."""
    adapters, conn._adapters = conn.adapters, WatchedAdapters(conn.adapters)
    state: list[Any] = [*session_state(conn)]
    state[_HANDLERS] = map(list, state[_HANDLERS])
    return tuple(state), adapters


def insist_on_restorable(conn: Any) -> None:
    """Raise if something was left open on *conn* that nothing but its user can end."""
    if conn._tpc or conn._pipeline or conn._num_transactions or conn._notifies_backlog is None:
        raise psycopg.ProgrammingError("it was returned in a block, pipeline or notifies()")


def restore_session_state(conn: Any) -> None:
    """Put back what a user changed."""
    record: ConnectionRecord = conn._record
    state = record.session_state
    if session_state(conn) == state:
        return
    conn._begin_statement = b""  # first: if the rest is interrupted, the state still differs
    (conn._autocommit, conn.row_factory, conn.cursor_factory, conn.server_cursor_factory,
     conn._isolation_level, conn._read_only, conn._deferrable,
     conn._prepared.prepare_threshold, conn._prepared.prepared_max) = state[_SETTABLE]  # fmt: skip
    conn._notice_handlers[:], conn._notify_handlers[:] = cast("Any", state[_HANDLERS])
    conn._adapters = WatchedAdapters(record.adapters)


def new_record(conn: Any, cursors: type[Cursor[Any]]) -> ConnectionRecord:
    """Return the record of a new connection whose cursors are to be *cursors*."""
    fd = conn.fileno()
    standby = conn.pgconn.parameter_status(b"in_hot_standby")
    record = ConnectionRecord(fd, standby, poller(fd), *remember_session_state(conn))
    record.has_stock_blocks = is_stock(type(conn))
    # Judged from the connection: its class may be a generic, or stand behind a tracer's wrapper.
    record.has_stock_class = is_stock(conn.__class__)
    record.has_stock_cursors = conn.cursor_factory is cursors and is_stock(type(conn), "cursor")
    record.backend_pid = conn.pgconn.backend_pid
    # As libpq understood it: it may be set by a service file or PGTARGETSESSIONATTRS.
    options = {option.keyword: option.val for option in conn.pgconn.info}
    record.read_write = options.get(b"target_session_attrs") in {b"read-write", b"primary"}
    return record


def is_stock(cls: type, *names: str) -> bool:
    """Whether *cls* has psycopg's own methods of these *names*, by default those around a block."""
    methods = [getattr(cls, name, None) for name in names or _BLOCK_METHODS.split()]
    return all(
        type(method) is FunctionType  # what wrapt makes is an instance of it as well
        and str(method.__globals__.get("__name__")).startswith("psycopg.")
        for method in methods
    )


def attach(conn: Any, pool: Any) -> None:
    """Set the pool that psycopg's `close()` returns a connection to, for a callback or a holder.

    None while it is idle: then it keeps no pool alive.
    """
    conn._pool = pool


def close(conn: Any) -> None:
    """Close a connection for good, also one whose `close()` would return it to its pool."""
    attach(conn, None)
    conn.close()


class KeptCursor(Cursor[Any]):
    """A cursor that serves one single statement after the other and remembers none of them.

    It saves making one, which copies the connection's adapters: some 6 us of a fetch. It knows its
    connection only while it serves, so that it keeps none alive which its user lost.
    """

    __slots__ = ("is_sent",)  # whether all of the statement has been sent

    def attach(self, conn: Connection[Any], row_factory: RowFactory[Any]) -> None:
        """Make ready for a statement."""
        self._conn, self._pgconn, self._row_factory = conn, conn.pgconn, row_factory
        self.is_sent = False

    # Written out, as each of these costs every statement.
    def _execute_send(
        self, query: Any, *, force_extended: bool = False, binary: bool | None = None
    ) -> None:
        Cursor._execute_send(self, query, force_extended=force_extended, binary=binary)
        self.is_sent = not self._pgconn.flush() or self._send_rest()

    def _send_query_prepared(self, name: bytes, pgq: Any, *, binary: bool | None = None) -> None:
        Cursor._send_query_prepared(self, name, pgq, binary=binary)
        self.is_sent = not self._pgconn.flush() or self._send_rest()

    def _send_rest(self) -> bool:
        self._conn.wait(send(self._pgconn))
        return True

    def detach(self) -> None:
        """Drop the statement, its parameters, what was learned for them, and the result."""
        gone: Any = None  # `execute` sets them all anew
        self._conn = self._pgconn = self._tx = gone
        self._query = self._last_query = self._results = self.pgresult = gone


def begin_autocommit(conn: Any) -> bool:
    """Have one statement run in autocommit, unless a transaction needs settings; return whether.

    Without psycopg's check of the connection's status, and without its lock.
    """
    is_plain = conn._isolation_level is conn._read_only is conn._deferrable is None
    conn._autocommit = is_plain or conn._autocommit
    return is_plain


def end_autocommit(conn: Any) -> None:
    """Set autocommit back to what it was set up as."""
    conn._autocommit = conn._record.session_state[_AUTOCOMMIT]


def converted_query(cursor: Any, query: Any, params: Any = None) -> Any:
    """Return the statement as *cursor* sends it."""
    return cursor._convert_query(query, params)


# Prepared statements

# What the server calls where it refuses a plan: columns have changed, a type or the plan is gone.
_CHECKS: Final = re.compile("RevalidateCached|FetchPrepared|getTypeOutput|lookup_type_cache")
# The context of an error in a parameter, in any language. That of code names a function.
_PARAMETER: Final = re.compile(r"[^\n(\"]*\$\d+( = .*)?", re.DOTALL)


def is_stale_plan(error: psycopg.Error) -> bool:
    """Whether the server refused a statement before it began: its plan may be for another schema.

    A plan keeps the types that its parameters had. An error with a position is one of the analysis.
    """
    if context := error.diag.context:  # a procedure that met a stale plan may have committed before
        return bool(_PARAMETER.fullmatch(context))
    return bool(error.diag.statement_position or _CHECKS.match(error.diag.source_function or ""))


def forget_plans(conn: Any) -> None:
    """Have psycopg prepare its statements anew. A rollback does so too, but not in autocommit."""
    conn._prepared.clear()


def forget_stale_plan(error: psycopg.Error, conn: Any, cursor: Any, *query: Any) -> None:
    """Forget the plans if psycopg's was refused before any of it was done, else raise *error*."""
    prepared = conn._prepared
    names = prepared._names if conn.pgconn.transaction_status == IDLE else ()
    if not is_stale_plan(error) or prepared.key(converted_query(cursor, *query)) not in names:
        raise error
    forget_plans(conn)


# Transactions


def commit_block(conn: Any, block: Any, check_certain: CheckCertain) -> None:
    """End the transaction of `_transaction._begin_block`, see `commit`."""
    if conn._record.has_stock_blocks and not conn._pipeline:
        if misnested := block._pop_savepoint("commit"):
            raise misnested
        commit(conn, check_certain)
        return
    try:
        block.__exit__(None, None, None)
        if conn.pgconn.transaction_status != IDLE:
            conn.commit()
    except psycopg.Error as ex:
        check_certain(conn, ex)
        raise


def commit(conn: Any, check_certain: CheckCertain) -> None:
    """Commit as `conn.commit()` does; sending COMMIT without its three generators saves 5 us.

    Once COMMIT was sent, an error is first given to *check_certain*, which may raise another.
    """
    if conn._num_transactions or conn._tpc or conn._pipeline or conn._notifies_backlog is None:
        insist_on_unlocked(conn, 0.0)
        conn.commit()  # which says what is wrong with that
        return
    pgconn = conn.pgconn
    if conn._record.readable(0):
        insist_on_alive(conn)
    with conn.lock:
        pgconn.send_query(b"COMMIT")
        if pgconn.flush():
            conn.wait(send(pgconn))
        try:
            result = conn.wait(fetch(pgconn))
        except psycopg.OperationalError as ex:
            check_certain(conn, ex)
            raise
        with suppress(psycopg.OperationalError):  # nothing depends on what may be lost now
            conn.wait(fetch(pgconn))
    if result.status != ExecStatus.COMMAND_OK:
        error = error_from_result(result, encoding=pgconn._encoding)
        check_certain(conn, error)
        raise error


def insist_on_unlocked(conn: Any, timeout: float, error: BaseException | None = None) -> None:
    """Close a connection on which `stream()`, `copy()` or `notifies()` was left open.

    Such a generator holds psycopg's lock: what ends the block would wait for ever. Another thread
    may have the lock for *timeout* seconds. Raises unless *error* ends the block; then a pipeline
    whose end the error tore is closed too.
    """
    is_torn = conn._notifies_backlog is None or (error and conn.pgconn.pipeline_status)
    is_free = conn.closed
    try:
        if not (is_free or is_torn) and conn.lock.acquire(timeout=clamp_timeout(timeout)):
            notice_loss(conn)
            conn.lock.release()
            is_free = True
    finally:  # if a signal handler raised in there, the lock may be left taken
        if not is_free:
            close(conn)
    if error is None and not is_free:
        raise psycopg.ProgrammingError("not committed: a stream, copy or notifies() was left open")


def insist_on_idle(conn: Any, callback: str) -> None:
    """Raise if the user's callback of that name left something open on *conn*."""
    if (status := conn.pgconn.transaction_status) != IDLE:
        left = f"connection left in status {TransactionStatus(status).name}"
        raise psycopg.ProgrammingError(f"{left} by the {callback} function: discarded")
    insist_on_restorable(conn)


def insist_on_alive(conn: Any) -> None:
    """Raise if COMMIT would do nothing, or what the server said last if it is known to be gone."""
    if conn.pgconn.transaction_status == INERROR:
        text = "the transaction is in error, nothing was committed"
        raise psycopg.errors.InFailedSqlTransaction(text)
    fatal_errors: list[psycopg.Error] = []
    if check_socket(conn, conn._record.readable, fatal_errors) is Liveness.DEAD:
        conn.pgconn.finish()
        fatal_errors.append(psycopg.OperationalError("the connection was lost before COMMIT"))
        raise fatal_errors[0]


# Whether anything was sent since the last session reset. libpq forgets an error's text as soon as it
# begins to send, so the text that only `mark_session` provokes says that nothing was sent since.

_MARK: Final = b"no COPY in progress\n"


def is_session_marked(conn: Any) -> bool:
    """Whether nothing was sent since `mark_session`."""
    return bool(conn.pgconn.error_message == _MARK)


def mark_session(conn: Any) -> None:
    """Remember that the session is as it was set up."""
    with suppress(psycopg.OperationalError):
        conn.pgconn.put_copy_end()  # it sends nothing, and fails with the text that is the mark


def ping_unmarked(conn: Any, timeout: float) -> None:
    """Like `ping`; it does not count as something that was sent."""
    is_marked = is_session_marked(conn)
    ping(conn, timeout)
    if is_marked:
        mark_session(conn)


def reset_session(conn: Any, message: bytes, timeout: float) -> None:
    """Reset the session, unless nothing at all was sent since that was done last."""
    if not is_session_marked(conn):
        if query_value(conn, message, timeout) == "t":
            forget_plans(conn)  # what is prepared may be for temporary tables
        if conn._notifies_backlog:  # what came for an earlier holder
            conn._notifies_backlog.clear()
        mark_session(conn)


def query_value(conn: Any, statements: bytes, timeout: float) -> str:
    """Run *statements* within *timeout* seconds; return the first value of the first result."""
    result = run_query(conn, statements, timeout)
    if result.status == ExecStatus.FATAL_ERROR:
        raise error_from_result(result, encoding=conn.pgconn._encoding)
    return str((result.get_value(0, 0) or b"").decode(conn.pgconn._encoding))
