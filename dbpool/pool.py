"""The pool: psycopg_pool's, made safe to run in production behind a thread-based server."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from operator import attrgetter, methodcaller
from time import monotonic
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, Unpack, overload
from weakref import ref

import psycopg
from psycopg import Connection, Cursor
from psycopg.abc import Params, Query
from psycopg.errors import ProtocolViolation
from psycopg.pq import TransactionStatus
from psycopg.rows import RowFactory, tuple_row
from psycopg_pool.abc import CT, ConninfoParam

from dbpool import _fork, events, holders
from dbpool._fork import close_all
from dbpool._outcomes import forget_if_refused, is_reading, is_stale_plan
from dbpool._parts import HARMLESS, KeptCursor
from dbpool._run import Runner
from dbpool._secrets import conceal, safe_repr
from dbpool.errors import CommitUncertain, ConfigError
from dbpool.events import Emitter
from dbpool.holders import Holder, Owner, Slot
from dbpool.settings import Settings
from dbpool.settings._parsing import did_you_mean, nearest, parse_number

if TYPE_CHECKING:  # half a per cent of what importing this takes
    from dbpool._options import Options

__all__ = ["Pool", "close_all"]

T = TypeVar("T")
R = TypeVar("R")

_IDLE, _INTRANS = TransactionStatus.IDLE, TransactionStatus.INTRANS

# What a single statement gives; a cursor class may have its own idea of it.
_fetch_all, _fetch_one = methodcaller("fetchall"), methodcaller("fetchone")
_row_count: Callable[[Cursor[Any]], int] = attrgetter("rowcount")
_SINGLE: Final = "a statement in autocommit"

_SETTINGS: Final = frozenset(field.name for field in fields(Settings)) - {"explicit"}
# Those that are the parent's parameters too, and then its parameters that are no settings.
_SHARED: Final = (
    "name", "min_size", "max_size", "timeout", "max_waiting", "max_lifetime", "max_idle",
)  # fmt: skip
_OPTIONS: Final = frozenset({
    "kwargs", "open", "configure", "check", "reset", "close_returns",
    "reconnect_timeout", "reconnect_failed", "num_workers",
})  # fmt: skip


class Pool(Runner[CT]):
    """A `psycopg_pool.ConnectionPool` with liveness, recovery, a breaker and exact numbers.

    Takes every parameter of the parent, and the fields of `Settings` beside them. *conninfo*
    is a connection string, or a callable returning one that is asked before each connect. The
    environment is read only when neither *conninfo*, *kwargs* nor *settings* is given, and then
    *name* says which database's variables. *listeners* are told of the events in
    `dbpool.events`, in a thread of their own.

    What differs from the parent on purpose:

    - it opens itself on first use (`open=None`); `open=True` opens now, `open=False` insists
      on `open()`. A closed pool stays closed;
    - `min_size` 1, `max_size` 10 (never below min_size), `timeout` 5 s, `max_lifetime` 30 min;
      server-side timeouts and TCP keepalives are set unless the conninfo sets them;
    - the connection used last is handed out first; waiters are served in order;
    - a connection is looked at before it is handed out, and pinged if idle for `ping_after`
      seconds; `check=ConnectionPool.check_connection` therefore does nothing more;
    - `timeout` covers the whole acquisition; at 0 an idle connection is still handed out,
      after a look alone;
    - `PoolTimeout` comes as `PoolExhausted` or `DatabaseUnavailable`, in an outage at once;
    - `close` takes 2 s at most by default, whatever hangs; the name is `default`;
    - connects are tried again until they succeed; `reconnect_failed` is called once per
      outage, after `reconnect_timeout` seconds;
    - lifetime is enforced at checkout too; what a user changed on a connection (autocommit,
      row_factory, isolation_level ...) is put back on return;
    - `connection()` does not come by way of `getconn` and `putconn`: a subclass hooks into it by
      `configure`, `check` and `reset`;
    - after a fork the child starts from nothing and opens anew on first use.
    """

    __module__ = "dbpool"

    def __init__(
        self,
        conninfo: ConninfoParam = "",
        *,
        connection_class: type[CT] = Connection,  # type: ignore[assignment]
        settings: Settings | None = None,
        listeners: Iterable[Any] = (),
        **options: Unpack[Options],
    ) -> None:
        conninfo, settings, rest = conceal(conninfo), conceal(settings), conceal(options)
        del options  # as they came they would show a password to whoever looks at this frame
        chosen = {name: rest.pop(name) for name in _SETTINGS & rest.keys()}
        if unknown := sorted(rest.keys() - _OPTIONS):
            meant = did_you_mean(nearest(unknown[0], _SETTINGS | _OPTIONS))
            raise ConfigError(f"Pool() has no option {unknown[0]!r}{meant}")
        opening = rest.pop("open", None)
        _check_options(connection_class, rest)
        settings = _settings(conninfo, settings, chosen, rest.get("kwargs"))
        rest |= {name: getattr(settings, name) for name in _SHARED}
        rest["connection_class"] = connection_class
        super().__init__(settings, Emitter(listeners), conninfo, **rest)
        self._lazy = opening is None
        _fork.add(self)
        if opening:
            self.open()

    def __repr__(self) -> str:
        if not hasattr(self, "_pid"):
            return "<dbpool.Pool that could not be made>"
        size, idle = 0 if self._closed else self._nconns, len(self._pool)
        return f"<dbpool.Pool {self.name!r} {self.state} size={size} idle={idle}>"

    def connection(self, timeout: float | None = None) -> Lease[CT]:  # type: ignore[override]
        """Return a context manager that lends a connection.

        Leaving it commits, or rolls back if an exception leaves, and returns the connection.
        *timeout* in seconds covers the whole acquisition, the pool's by default. Raises
        `PoolExhausted`, `DatabaseUnavailable`, `TooManyRequests` or `PoolClosed`.
        """
        return Lease(self, timeout)

    @overload
    def fetch_all(self, query: Query, params: Params | None = None) -> list[Any]: ...
    @overload
    def fetch_all(
        self, query: Query, params: Params | None = None, *, row_factory: RowFactory[R]
    ) -> list[R]: ...
    def fetch_all(
        self, query: Query, params: Params | None = None, *, row_factory: Any = None
    ) -> list[Any]:
        """Run one statement in one round trip and return its rows.

        It runs in autocommit, or in a transaction if the connection is set up with an
        isolation level, read only or deferrable. It is never sent twice, but for a prepared
        plan that the server refused before doing anything because a table has changed. A
        statement that returns no rows is done all the same, and raises
        `psycopg.ProgrammingError`: that is what `execute` is for.

        If the connection is lost before the whole answer came, it raises `CommitUncertain`;
        of a statement that begins with SELECT, SHOW, TABLE or VALUES, `execute` alone does.
        """
        return self._single(query, params, row_factory, _fetch_all, sys._getframe())

    @overload
    def fetch_one(self, query: Query, params: Params | None = None) -> Any | None: ...
    @overload
    def fetch_one(
        self, query: Query, params: Params | None = None, *, row_factory: RowFactory[R]
    ) -> R | None: ...
    def fetch_one(
        self, query: Query, params: Params | None = None, *, row_factory: Any = None
    ) -> Any | None:
        """Like `fetch_all`, but return the first row, or None if there is none."""
        return self._single(query, params, row_factory, _fetch_one, sys._getframe())

    def fetch_value(self, query: Query, params: Params | None = None) -> Any:
        """Like `fetch_all`, but return the first column of the first row, or None."""
        row = self._single(query, params, tuple_row, _fetch_one, sys._getframe())
        return None if row is None else row[0]

    def execute(self, query: Query, params: Params | None = None) -> int:
        """Run one statement like `fetch_all`, and return the number of rows it touched.

        That is -1 for a statement that has no such number, as in psycopg.
        """
        return self._single(query, params, None, _row_count, sys._getframe())

    def _single(  # noqa: C901  # one statement, and all that its loss may mean
        self,
        query: Query,
        params: Params | None,
        row_factory: RowFactory[Any] | None,
        result: Callable[[Cursor[Any]], T],
        frame: FrameType,
    ) -> T:
        step = Owner()
        owner = ref(step)
        conn: Any = self._acquire(None, frame.f_back or frame, owner)
        slot: Slot = conn._slot
        cursor: Any = None
        kept: KeptCursor | None = None
        sent = ""  # what may have been done although its answer does not come
        try:
            try:
                row_factory = row_factory or conn.row_factory
                if slot.has_stock_cursors:
                    is_harmless = row_factory in HARMLESS
                    cursor = (is_harmless and slot.cursor) or KeptCursor(conn)
                    kept, slot.cursor = cursor if is_harmless else None, None
                    cursor.attach(conn, row_factory)
                else:
                    cursor = conn.cursor(row_factory=row_factory)  # so that a tracer sees it
                # A connection from the pool is as it was set up, so these are the set-up's.
                if (
                    slot.has_stock_class
                    and conn._isolation_level is conn._read_only is conn._deferrable is None
                ):
                    conn._autocommit = True
                    sent = _SINGLE
                    try:
                        return result(cursor.execute(query, params))
                    except psycopg.errors.FeatureNotSupported as ex:
                        forget_if_refused(ex, conn, cursor._convert_query(query, params))
                    return result(cursor.execute(query, params, prepare=False))
                with conn:
                    value = result(cursor.execute(query, params))
                    sent = "COMMIT"
                    if slot.has_stock_blocks:
                        self._commit(conn)
                    return value
            except psycopg.errors.ReadOnlySqlTransaction:
                self._moved(conn)
                raise
            except psycopg.OperationalError as ex:
                if sent is _SINGLE and conn.closed and cursor.pgresult:
                    return result(cursor)  # it was lost over what psycopg tidies up afterwards
                error: Any = ex.__cause__ if isinstance(ex, CommitUncertain) else ex
                was_sent = sent and getattr(cursor, "is_sent", True)
                is_fetch = result is not _row_count
                if was_sent and not (is_fetch and is_reading(cursor._convert_query(query).query)):
                    self._check_certain(conn, error, sent)
                error = self._lost_server(ex) or error
                raise error from error.__cause__
            finally:
                conn._autocommit = slot.manners[0]
                if kept is not None:
                    kept.detach()
                self._release(conn, kept if self._trusted >= 0.0 else None)  # else a check saw it
        except BaseException:  # where it was given back this does nothing
            self._recover(owner)
            raise

    def _inspect_error(self, conn: Any, error: BaseException) -> None:
        """Do what the error that leaves a block says about its connection or its server."""
        if type(error) is psycopg.errors.ReadOnlySqlTransaction:
            self._moved(conn)
        elif type(error) is ProtocolViolation and (lost := self._lost_server(error)):
            raise lost
        elif is_stale_plan(error):
            conn._prepared.clear()  # a rollback does so too, but not in autocommit
        if conn.pgconn.pipeline_status and not conn._pipeline:
            conn.pgconn.finish()  # the error tore the end of a pipeline

    def holders(self) -> list[Holder]:
        """Return who holds connections, longest first, at most 20."""
        return list(self.stats().holders)

    def return_held(self, since: float) -> list[Holder]:
        """Take back what this thread checked out after *since*, a monotonic time, and still holds.

        It is closed, which rolls it back: whoever holds it may not have forgotten it yet.
        Returns who held it.
        """
        if len(self._pool) == len(self._slots):
            return []
        me = holders.here.who
        with self._lock:
            mine = [s for s in self._slots if s.since and s.who is me and s.since >= since]
        # What was collected meanwhile is told and freed as such.
        held = {slot: conn for slot in mine if slot.ref and (conn := slot.ref()) is not None}
        reports = list(holders.report(held, monotonic()))
        with self._lock:
            self._metrics.leaks += len(held)
        if self.listeners.active:
            for holder in reports:
                self.listeners.emit(events.Leaked(self.name, holder))
        for conn in held.values():
            self._cancel_later(conn)
            conn.pgconn.finish()
            self.putconn(conn)
            conn._slot.is_reaped = True  # who held it may still return it
        return reports


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
        if conn._slot.has_stock_blocks:  # type: ignore[attr-defined]
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
                    pool._inspect_error(conn, exc)
                status = conn.pgconn.transaction_status
                is_stock = conn._slot.has_stock_blocks  # type: ignore[attr-defined]
                if exc is None and status == _INTRANS and is_stock:
                    pool._commit(conn)
                # With nothing begun there is nothing to end: saves a lock and two calls.
                elif status != _IDLE or not is_stock:
                    conn.__exit__(exc_type, exc, tb)
            except psycopg.OperationalError as ex:
                if exc_type is None and status == _INTRANS and not is_stock:
                    pool._check_certain(conn, ex)
                raise
            finally:
                pool._release(conn)
        except BaseException:  # where it was given back this does nothing
            pool._recover(ref(self))
            raise


def _check_options(connection_class: Any, options: dict[str, Any]) -> None:
    """Raise `ConfigError` for a parameter of the parent's that would fail only once it is used."""
    if not hasattr(connection_class, "connect"):
        raise ConfigError("connection_class must be a subclass of psycopg.Connection")
    for name in ("configure", "check", "reset", "reconnect_failed"):
        if not callable(options.get(name) or print):
            hint = ' (session_reset="session" resets the session)' if name == "reset" else ""
            raise ConfigError(f"{name} must be callable{hint}, not {safe_repr(options[name])}")
    for name in options.keys() & {"reconnect_timeout", "num_workers"}:
        whole = name == "num_workers"
        options[name] = parse_number(options[name], name, whole=whole, is_time=not whole)


def _settings(
    conninfo: ConninfoParam, settings: Settings | None, chosen: dict[str, Any], kwargs: Any
) -> Settings:
    if not isinstance(settings, Settings | None):
        raise ConfigError(f"settings must be a dbpool.Settings, not {safe_repr(settings)}")
    if chosen.get("max_size", 0) is None:  # the parent's "as min_size"
        del chosen["max_size"]
        built = _settings(conninfo, settings, chosen, kwargs)
        return replace(built, max_size=built.min_size, explicit=built.explicit | {"max_size"})
    if chosen.get("name", "") is None:  # the parent's "think of one"
        del chosen["name"]
    if isinstance(conninfo, str) and conninfo:
        chosen["conninfo"] = conninfo
    explicit = frozenset(chosen)
    if settings is not None:
        return replace(settings, explicit=settings.explicit | explicit, **chosen)
    if conninfo or kwargs:
        return Settings(explicit=explicit, **chosen)
    return Settings.from_env(**chosen)
