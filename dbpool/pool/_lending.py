"""Lending: to a block or a single statement; how a connection is found, and evicted if it is dead.

The hot half of a checkout is in `Pool`: here a caller waits, or a connection needs more than a look.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from operator import attrgetter, methodcaller
from time import monotonic, sleep
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar
from weakref import ref

import psycopg
from psycopg import Cursor
from psycopg_pool.abc import CT

from dbpool.errors import CommitUncertain, DatabaseUnavailable, PoolError, describe
from dbpool.holders import ConnectionRecord, Owner
from dbpool.liveness import Liveness, PingTimeout, check_socket, closed_by_peer, notice_loss
from dbpool.pool import _psycopg
from dbpool.pool._notices import Notices
from dbpool.pool._waiting import Waiter
from dbpool.retry import is_reading, is_refused

if TYPE_CHECKING:
    from dbpool.pool._pool import Pool
    from dbpool.pool._seam import PoolBase

T = TypeVar("T")

_SINGLE: Final = "a statement in autocommit"

# Seconds to pause when the user's own check refuses a connection that was just made.
_CHECK_PAUSE: Final = 0.25

# What a single statement gives; a cursor class may have its own idea of it.
Result = Callable[[Cursor[Any]], T]
ROWS: Final[Result[list[Any]]] = methodcaller("fetchall")
ROW: Final[Result[Any | None]] = methodcaller("fetchone")
ROW_COUNT: Final[Result[int]] = attrgetter("rowcount")


class Step(Owner):
    """One step in which a connection is in transit: `with Step(pool)`.

    If it is interrupted, the pool takes back what it has.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def __enter__(self) -> ref[Any]:
        return ref(self)

    def __exit__(self, exc_type: type[BaseException] | None, *exc: object) -> None:
        if exc_type is not None:  # does nothing if the connection was returned
            self._pool._recover(ref(self))


class Lease(Generic[CT]):
    """Lends a connection for the length of a `with` block. Made by `Pool.connection`."""

    # A plain class: a generator-based context manager costs a microsecond more.
    __slots__ = ("__weakref__", "_conn", "_pool", "_timeout")
    _conn: Any

    def __init__(self, pool: Pool[CT], timeout: float | None) -> None:
        self._pool, self._timeout, self._conn = pool, timeout, None

    def __enter__(self) -> CT:
        pool = self._pool
        if self._conn is not None:  # threads that share one would return each other's connections
            raise RuntimeError("each block needs a connection() of its own")
        self._conn = ...
        # Not `sys._getframe().f_back`: making our own frame object costs 3 % of a checkout.
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
                if exc is not None or status == _psycopg.ACTIVE:
                    _handle_error(pool, conn, exc)
                is_stock = conn._record.has_stock_blocks
                if exc is None and status == _psycopg.INTRANS and is_stock:
                    _psycopg.commit(conn, pool._check_certain)
                # With nothing begun there is nothing to end: saves a lock and two calls.
                elif status != _psycopg.IDLE or not is_stock:
                    conn.__exit__(exc_type, exc, tb)
            except psycopg.OperationalError as ex:
                if exc_type is None and status == _psycopg.INTRANS and not is_stock:
                    pool._check_certain(conn, ex)
                raise
            finally:
                pool._release(conn)
                self._conn = ...  # what is kept of a block keeps no connection alive
        except BaseException:  # does nothing if the connection was returned
            pool._recover(ref(self))
            raise


def _handle_error(pool: Pool[CT], conn: Any, error: BaseException | None) -> None:
    """Act on what the error that leaves a block says about its connection or its server.

    Without an error, insist on a connection that can commit.
    """
    pool._maintenance.on_error(pool, conn, error)
    if refused := handle_refusal(pool, error):
        raise refused
    if isinstance(error, psycopg.Error) and _psycopg.is_stale_plan(error):
        _psycopg.forget_plans(conn)
    _psycopg.insist_on_unlocked(conn, pool.timeout, error)


class Statement(Generic[T]):
    """One statement, and how far it got."""

    __slots__ = ("cursor", "kept", "params", "query", "result", "row_factory", "sent")

    def __init__(self, query: Any, params: Any, row_factory: Any, result: Result[T]) -> None:
        self.query, self.params, self.row_factory, self.result = query, params, row_factory, result
        self.cursor: Any = None
        self.kept: _psycopg.KeptCursor | None = None

    def run_once(self, pool: Pool[Any], frame: FrameType) -> T:
        """Check out, run it, return. *frame* is that of the public method."""
        self.sent = ""  # names what the server may have done although its answer does not come
        step = Step(pool)
        conn = pool._acquire(None, frame.f_back or frame, ref(step))
        with step:
            try:
                return self.run(pool, conn)
            except psycopg.OperationalError as ex:
                return self.on_lost(pool, conn, ex)
            except psycopg.Error as ex:
                pool._maintenance.on_error(pool, conn, ex)
                raise
            finally:
                _psycopg.end_autocommit(conn)
                if self.kept is not None:
                    self.kept.detach()
                pool._release(conn, None if pool._user_check else self.kept)  # else a check saw it

    def run(self, pool: Pool[Any], conn: Any) -> T:
        """Run it on *conn* and return its result."""
        record: ConnectionRecord = conn._record
        row_factory = self.row_factory or conn.row_factory
        if record.has_stock_cursors:
            is_stock = row_factory in _psycopg.STOCK_ROW_FACTORIES
            cursor = (is_stock and record.cursor) or _psycopg.KeptCursor(conn)
            self.kept, record.cursor = cursor if is_stock else None, None
            cursor.attach(conn, row_factory)
        else:
            cursor = conn.cursor(row_factory=row_factory)  # so that a tracer sees it
        self.cursor = cursor
        # A connection from the pool is as it was set up, so these are the set-up's.
        if record.has_stock_class and _psycopg.begin_autocommit(conn):
            self.sent = _SINGLE
            try:
                return self.result(cursor.execute(self.query, self.params))
            except psycopg.Error as ex:
                _psycopg.forget_stale_plan(ex, conn, cursor, self.query, self.params)
            return self.result(cursor.execute(self.query, self.params, prepare=False))
        with conn:
            value = self.result(cursor.execute(self.query, self.params))
            self.sent = "COMMIT"
            if record.has_stock_blocks:
                _psycopg.commit(conn, pool._check_certain)
            return value

    def on_lost(self, pool: Pool[Any], conn: Any, ex: psycopg.OperationalError) -> T:
        """Return the result if all of it came before the connection was lost, else raise."""
        notice_loss(conn)
        if self.sent == _SINGLE and conn.closed and self.cursor.pgresult:
            return self.result(self.cursor)  # lost over what psycopg tidies up afterwards
        error: Any = ex.__cause__ if isinstance(ex, CommitUncertain) else ex
        if self.sent and getattr(self.cursor, "is_sent", True):
            query = _psycopg.converted_query(self.cursor, self.query).query
            if self.result is ROW_COUNT or not is_reading(query):
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
            if (refused := handle_refusal(pool, ex)) is None:
                raise
            until = until or monotonic() + pool.timeout
            if monotonic() >= until:
                raise refused from refused.__cause__


def acquire(
    pool: PoolBase[Any], conn: Any, owner: ref[Any], started: float, timeout: float | None
) -> Any:
    """Return *conn* if it is usable, else the next that is; wait for one if there is none."""
    deadline = started + (pool.timeout if timeout is None else timeout)
    while True:
        is_verified = False
        if conn is None:
            waiter = pool.trace(_wait, pool, Waiter(owner, started, deadline))
            conn, is_verified = waiter.conn, waiter.is_verified and not pool._user_check
        if is_verified or _evict_unless_usable(pool, conn, deadline):
            return conn
        if pool._user_check and conn._record.created_at >= started:
            sleep(max(0.0, min(_CHECK_PAUSE, deadline - monotonic())))
        conn = None if started < deadline <= monotonic() else pool._store.take_idle(owner)


def _wait(pool: PoolBase[Any], waiter: Waiter) -> Waiter:
    """Wait until *waiter* has a connection; raise if it gets none."""
    if not pool._store.is_open:
        pool._open_on_use()
    pool._store.join(waiter, pool.max_waiting, close_returns=pool.close_returns)
    if waiter.wait():
        pool._notices.timed_out(*pool._store.time_out(waiter, pool.suspicion))
    if waiter.next is not None:
        waiter.next.wake()
    if waiter.is_over:
        if usage := pool._store.metrics.usage:
            usage.gave_up(waiter.thread.endpoint, sys._getframe())
        if pool.listeners.active or not isinstance(waiter.error, PoolError):
            pool._notices.not_served(waiter.error, monotonic() - waiter.started, waiter.is_rejected)
        try:
            raise waiter.error
        finally:
            # An error that is kept keeps its traceback, that the frames of all callers, and those
            # the waiter: all would stay until the cyclic collector comes.
            waiter.error = None
    return waiter


def _evict_unless_usable(pool: PoolBase[Any], conn: Any, deadline: float) -> bool:
    """Return whether *conn* may be lent; evict it if not.

    Only a ping can tell of one that was idle for ping_after, or sent something. While connects fail
    one past its lifetime is better than none.
    """
    settings, record, now = pool.settings, conn._record, monotonic()
    if now >= record.expires_at and not pool._store.breaker.is_failing:
        evict(pool, conn, "expired")
        return False
    found = check_socket(conn, record.readable)
    if found is Liveness.DEAD:
        evict(pool, conn, "dead", by_server=True)
        evict_closed_by_server(pool)
        return False
    timeout = min(settings.ping_timeout, deadline - now)
    is_unsure = found is Liveness.UNKNOWN or now - record.idle_since >= settings.ping_after
    if is_unsure and timeout > 0.0 and not ping(pool, conn, timeout):
        return False
    return not pool._user_check or _run_check(pool, conn, pool._user_check)


def _run_check(pool: PoolBase[Any], conn: Any, check: Callable[[Any], None]) -> bool:
    """Run the user's `check`; the timeout does not bound it."""
    _psycopg.attach(conn, pool)
    conn._record.cursor, failure = None, ""
    try:
        check(conn)
        if conn.pgconn.transaction_status != _psycopg.IDLE:
            conn.commit()  # what it began is not its user's
    except Exception as ex:  # noqa: BLE001  # a user's callback may raise anything
        failure = f"connection failed check: {describe(ex, conn)}"
    pool.breaker.check_failure = failure  # the reason if no connection passes in time
    if failure:
        pool._notices.check_failed(failure)  # where no frame has the error
        evict(pool, conn, "dead")
    return not failure


def evict(pool: PoolBase[Any], conn: Any, reason: str, *, by_server: bool = False) -> None:
    """Close a connection that is in transit, and replace it if it is needed."""
    pool._store.evict(conn._record, reason)
    pool._store.notices += [Notices.replaced] * by_server
    pool._store.bag.close_evicted()


def evict_closed_by_server(pool: PoolBase[Any]) -> None:
    """Evict all idle connections whose server closed them."""
    store = pool._store
    if lost := closed_by_peer(conn._record.fd for conn in list(store.bag.idle)):
        store.notices += [Notices.replaced] * store.evict_idle("dead", lambda r: r.fd in lost)
        store.flush_later()  # a caller may wait: it should not have to close many


def handle_refusal(pool: PoolBase[Any], ex: BaseException | None) -> DatabaseUnavailable | None:
    """If a pooler refuses a statement by *ex*, return what to raise for it, else None.

    A pooler that ends, or that cannot reach the server, can serve no idle connection: they are
    evicted, and the ping of each new one decides. See `is_refused`.
    """
    if not is_refused(ex):
        return None
    if "timeout" not in str(ex):
        pool._store.evict_idle("dead", lambda record: True)
        pool._store.bag.close_evicted()
    return pool.breaker.unavailable_error(pool.name, pool.stats(), cause=ex)


def ping(
    pool: PoolBase[Any], conn: Any, timeout: float, answered: Collection[ConnectionRecord] = ()
) -> bool:
    """Ping a connection in transit; return whether it answered in time. Evict it if not.

    After a timeout also evict all connections idle longer than ping_after, except those that
    *answered*: where one ping times out, the others will not answer either.
    """
    try:
        _psycopg.ping_unmarked(conn, timeout)
    except psycopg.Error as ex:
        settings, store, late = pool.settings, pool._store, int(isinstance(ex, PingTimeout))
        evict(pool, conn, "dead", by_server=not late)
        if settings.pooler == "transaction":  # a ping without an answer is saturation
            handle_refusal(pool, ex)
        elif late and timeout >= settings.ping_timeout:
            oldest = monotonic() - settings.ping_after
            late += store.evict_idle("dead", lambda r: r.idle_since <= oldest and r not in answered)
            store.bag.close_evicted()
        store.notices += [lambda notices: notices.replaced("did not answer")] * late
        return False
    return True
