"""Pool: what users call, and the two hot halves of a checkout, acquire and release."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from time import monotonic
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, Unpack
from weakref import ref

import psycopg
from psycopg import Connection, IsolationLevel
from psycopg.abc import Params, Query
from psycopg.rows import RowFactory, tuple_row
from psycopg_pool import PoolClosed, TooManyRequests
from psycopg_pool.abc import CT, ConninfoParam

from dbpool import events, holders
from dbpool._secrets import conceal
from dbpool.errors import CommitUncertain, PoolError
from dbpool.holders import ConnectionRecord, application_files, current
from dbpool.liveness import notice_loss
from dbpool.metrics import Metrics
from dbpool.pool import _fork, _lending, _options, _returning, _transaction
from dbpool.pool._lending import ROW, ROW_COUNT, ROWS, Lease, Statement, Step, resend
from dbpool.pool._psycopg import IDLE, KeptCursor, session_state
from dbpool.pool._seam import PoolBase
from dbpool.retry import is_lost_unanswered
from dbpool.settings import Settings

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    T = TypeVar("T")
    R = TypeVar("R", default=Any)  # what a row factory makes; without one it may be anything

# uWSGI forks without running Python's fork hooks; only there each checkout compares pids.
_FORKS_UNSEEN: Final = "uwsgi" in sys.modules

# A connection used for no longer than this many seconds is handed over without a check: its system
# call would cost a busy pool more than the use. Held for longer, its server may have gone unseen.
_MAX_UNCHECKED_USE: Final = 0.01


class Pool(PoolBase[CT]):
    """A `psycopg_pool.ConnectionPool` that survives outages, and explains what went wrong.

    It takes every parameter of the parent, and also the fields of `Settings`. *conninfo* is a
    connection string, or a callable that returns one and is called before each connect. The
    environment is read only if neither *conninfo*, *kwargs* nor *settings* is given; *name* then
    says which database's variables are read. *listeners* are called with the events in
    `dbpool.events`, in a separate thread. Raises `ConfigError` if a setting is wrong.

    It differs from the parent on purpose:

    - The pool opens itself on first use (`open=None`); `open=True` opens it now, `open=False`
      requires a call of `open()`. A closed pool stays closed.
    - The defaults are `min_size` 1, `max_size` 10 (at least `min_size`), `timeout` 5 s,
      `max_lifetime` 30 min and the name `default`. Server-side timeouts and keepalives are set
      unless the connection string has them.
    - The connection used last is handed out first. Waiting callers are served in order.
    - A connection is checked before it is handed out, and pinged if it was idle for
      `ping_after` seconds. Therefore `check=ConnectionPool.check_connection` adds nothing.
    - `timeout` covers the whole acquisition. With 0 an idle connection is still handed out,
      after a look at its socket only.
    - Instead of `PoolTimeout` the pool raises `PoolExhausted` or `DatabaseUnavailable`, which are
      subclasses of it. In an outage it raises at once.
    - `close` takes at most 2 s by default, even if something hangs.
    - The pool tries to connect until it succeeds. It calls `reconnect_failed` once per outage,
      after `reconnect_timeout` seconds.
    - `max_lifetime` is enforced at checkout too. What a caller changed on a connection
      (autocommit, row_factory, isolation_level ...) is restored on return.
    - `connection()` does not call `getconn` and `putconn`: use `configure`, `check` and `reset`
      instead of overriding them.
    - After a fork the child starts with an empty pool, which opens on first use.
    """

    __module__ = "dbpool"

    def __init__(
        self,
        conninfo: ConninfoParam = "",
        *,
        connection_class: type[CT] = Connection,  # type: ignore[assignment]
        settings: Settings | None = None,
        listeners: Iterable[Any] = (),
        **options: Unpack[_options.Options],
    ) -> None:
        conninfo, settings, listeners, rest = map(conceal, (conninfo, settings, listeners, options))
        del options  # as they came they would show a password to whoever looks at this frame
        opening = rest.pop("open", None)
        settings, rest = _options.resolve(conninfo, connection_class, settings, rest)
        super().__init__(settings, listeners, opening is None, conninfo=conninfo, **rest)
        _fork.register(self)
        if opening:
            self.open()

    # Connections

    def connection(self, timeout: float | None = None) -> Lease[CT]:  # type: ignore[override]
        """Return a context manager that hands out a connection for a `with` block.

        At the end of the block it commits, or rolls back if the block raised, and returns the
        connection. *timeout*, in seconds, covers the whole acquisition; the default is the
        pool's. Raises `PoolExhausted`, `DatabaseUnavailable`, `TooManyRequests` or `PoolClosed`.
        """
        return Lease(self, timeout)

    def getconn(self, timeout: float | None = None) -> CT:
        """Check out a connection; it *must* be returned by `putconn`. See `connection`."""
        step = holders.Owner()
        # There is no caller where C calls. No frame is kept in a variable, where it might hold itself.
        conn = self._acquire(timeout, sys._getframe().f_back or sys._getframe(), ref(step))
        conn._record.owner = conn._record.ref  # type: ignore[attr-defined]  # lost once it is collected
        return conn

    def putconn(self, conn: CT) -> None:
        """Return a connection obtained by `getconn`.

        Raises `ValueError` if it is not this pool's, or not checked out.
        """
        record: ConnectionRecord | None = getattr(conn, "_record", None)
        if record is not None and record.is_reaped:
            return
        if (pool := getattr(conn, "_pool", None)) is not self:
            whose = f"it comes from pool {pool.name!r}" if pool else "it doesn't come from any pool"
            raise ValueError(f"can't return connection to pool {self.name!r}, {whose}: {conn}")
        with Step(self) as owner:
            if record is not None and record.since:
                record.owner = owner  # from here on this step has it
            # Where a tracer wraps connections, what its wrapper holds comes back by `close()`.
            self._release((record and record.ref()) or conn)

    def _acquire(self, timeout: float | None, frame: FrameType, owner: ref[Any]) -> CT:
        """Lend a connection that is alive to the code of *frame*; *owner* is one of its own.

        A frame gives its code and offset only, so that no local variable is kept. The stack is
        walked only where an installed package calls, not where the application does.
        """
        if _FORKS_UNSEEN and os.getpid() != _fork.process.pid:
            _fork.notice_fork()
        started = monotonic()
        store = self._store
        try:
            with store.lock:
                if idle := store.bag.idle:
                    conn = idle[-1]
                    record: ConnectionRecord = conn._record
                    record.owner = owner  # before it is taken: an exception may come in between
                    idle.pop()
                else:
                    conn = None
            if conn is None or not (
                started < record.expires_at
                and started - record.idle_since < self._unchecked_seconds
                and not record.readable(0)
            ):
                conn = _lending.acquire(self, conn, owner, started, timeout)
                record = conn._record
            code = frame.f_code
            if code.co_filename not in application_files:
                frame = holders.caller(frame)
                code = frame.f_code
            record.thread = thread = current.thread
            record.endpoint, record.code, record.lasti = thread.endpoint, code, frame.f_lasti
            conn._pool = self
            record.since = now = monotonic()
            record.wait = now - started
            if self.listeners.active:
                self.listeners.emit(events.CheckedOut(self.name, record.wait))
        except (PoolError, PoolClosed, TooManyRequests):  # it has nothing, and waits no more
            raise
        except BaseException:  # of a signal handler, say, or gevent.Timeout
            self._recover(owner)
            raise
        return conn  # type: ignore[no-any-return]

    def _release(self, conn: Any, cursor: KeptCursor | None = None) -> None:
        """Lend a healthy connection to the first waiter, else make it idle.

        A *cursor* to keep says that no code of a user's saw the connection.
        """
        record: ConnectionRecord = conn._record
        store = self._store
        now = monotonic()
        use = now - record.since
        if not (
            conn.pgconn.transaction_status == IDLE
            and now < record.expires_at
            and not record.is_reported
            and not self._resets
            and store.breaker.error is None  # else connects fail: is this one alive?
            # One tuple comparison covers all that a user may have changed on the connection.
            and (cursor is not None or session_state(conn) == record.session_state)
        ):
            _returning.take_back(self, conn)
            return
        record.cursor = cursor
        with store.lock:
            if not record.since:
                _returning.insist_on_reaped(self, record)
                return
            wait = record.wait
            store.breaker.last_alive_at = record.idle_since = now
            if store.waiting or not store.is_open:
                store.hand_over_or_store(conn, is_verified=use < _MAX_UNCHECKED_USE)
            else:  # as `bag.store`, without a call in between
                record.since, record.owner, conn._pool = 0.0, None, None
                store.bag.idle.append(conn)
            finished = store.metrics.finished
            finished += [(wait, use, record.endpoint, record.code, record.lasti)]
            if len(finished) >= Metrics.BATCH:
                store.metrics.count_finished()
        if store.bag.to_close:
            store.bag.close_evicted()
        if self.listeners.active:
            self.listeners.emit(events.CheckedIn(self.name, use))

    def _check_certain(self, conn: Any, error: psycopg.Error, what: str = "COMMIT") -> None:
        """Raise `CommitUncertain` if the connection was lost while *what* had no answer."""
        notice_loss(conn)
        if is_lost_unanswered(conn, error):
            lost = f"the connection was lost during {what}; it may or may not have been done"
            text = f"pool {self.name!r}: {lost}"
            raise CommitUncertain(text, pool=self.name, snapshot=self.stats()) from error

    # Statements and transactions

    def fetch_all(
        self,
        query: Query,
        params: Params | None = None,
        *,
        row_factory: RowFactory[R] | None = None,
    ) -> list[R]:
        """Run one statement in one round trip and return its rows.

        It runs in autocommit, or in a transaction if the connection has an isolation level, or
        is read-only or deferrable. It is sent again only if it had no effect: the server refused
        a prepared statement because a table or type has changed or it was deallocated, or a pooler
        refused the statement before the server got it. A statement that returns no rows takes
        effect, and then raises `psycopg.ProgrammingError`: use `execute` for it.

        Raises `CommitUncertain` if the connection is lost before the whole answer came, unless
        the statement begins with SELECT, SHOW, TABLE or VALUES: the error is then psycopg's.
        """
        return resend(Statement(query, params, row_factory, ROWS).run_once, self, sys._getframe())

    def fetch_one(
        self,
        query: Query,
        params: Params | None = None,
        *,
        row_factory: RowFactory[R] | None = None,
    ) -> R | None:
        """Like `fetch_all`, but return the first row, or None if there is none."""
        return resend(Statement(query, params, row_factory, ROW).run_once, self, sys._getframe())

    def fetch_value(self, query: Query, params: Params | None = None) -> Any:
        """Like `fetch_all`, but return the first column of the first row, or None."""
        row = resend(Statement(query, params, tuple_row, ROW).run_once, self, sys._getframe())
        return None if row is None else row[0]

    def execute(self, query: Query, params: Params | None = None) -> int:
        """Run one statement like `fetch_all`, and return the number of rows that it affected.

        As in psycopg, that is -1 for a statement without such a number. Raises `CommitUncertain`
        if the connection is lost before the whole answer came, whatever the statement.
        """
        return resend(Statement(query, params, None, ROW_COUNT).run_once, self, sys._getframe())

    def run(
        self,
        fn: Callable[..., T],
        *args: Any,
        attempts: int = 3,
        idempotent: bool = False,
        isolation: IsolationLevel | None = None,
        read_only: bool = False,
        timeout: float | None = None,
    ) -> T:
        """Call `fn(conn, *args)` in a transaction, commit it, and return what *fn* returned.

        *isolation* and *read_only* apply to the transaction. After a serialization failure or a
        deadlock, or if the connection is lost before COMMIT was sent, the whole transaction runs
        again: *attempts* is the largest number of runs in all. With `idempotent=True`, and nothing
        else that is true, it also runs again if the connection is lost during COMMIT, which
        otherwise raises `CommitUncertain`. Any other error is raised at once.

        *timeout*, in seconds, bounds all waiting and retrying; with a timeout, `run` waits until
        an outage is over, instead of raising `DatabaseUnavailable` at once. In *fn*,
        `conn.transaction()` is a savepoint, and psycopg refuses `commit()` and `rollback()`. If
        *fn* raises `psycopg.Rollback`, the transaction is rolled back and `run` returns None.
        """
        if not events.runs_when_called(fn):
            raise TypeError("fn must not be asynchronous or a generator: nothing would run it")
        deadline = None if timeout is None else monotonic() + timeout
        repeats = idempotent is True  # not for a setting's text "false"
        options = _transaction.RunOptions(attempts, repeats, isolation, read_only, deadline)
        caller = sys._getframe().f_back or sys._getframe()
        run: Callable[..., T] = _transaction.run
        return resend(run, self, lambda c: fn(c, *args), options, caller, until=deadline)
