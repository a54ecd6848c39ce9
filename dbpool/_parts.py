"""The small parts of a pool: waiters, attempts, tasks, a connection's manners, kept cursors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from operator import attrgetter
from time import monotonic
from types import FunctionType
from typing import Any, Final, cast
from weakref import ref

import psycopg
from psycopg import Connection, Cursor
from psycopg.adapt import AdaptersMap
from psycopg.generators import send
from psycopg.pq import TransactionStatus
from psycopg.rows import RowFactory, dict_row, namedtuple_row, scalar_row, tuple_row
from psycopg_pool import ConnectionPool
from psycopg_pool.pool import MaintenanceTask

from dbpool.errors import is_permanent
from dbpool.holders import Slot, here
from dbpool.liveness import poller
from dbpool.retry import delays

# How a block begins and ends.
BLOCKS: Final = (
    "__enter__", "__exit__", "commit", "rollback", "_commit_gen", "_exec_command", "_start_query",
    "_get_tx_start_command",
)  # fmt: skip

# What a user may change on a connection and would not want to find changed by another.
manners: Final[Callable[[Any], tuple[object, ...]]] = attrgetter(
    "_autocommit",
    "row_factory",
    "cursor_factory",
    "server_cursor_factory",
    "_isolation_level",
    "_read_only",
    "_deferrable",
    "_prepared.prepare_threshold",
    "_prepared.prepared_max",
    "_tpc",
    "_pipeline",
    "_notice_handlers",
    "_notify_handlers",
    "_adapters.changes",
    "_adapters.types._registry",  # what registers a type copies it first
    "_num_transactions",  # not 0 once an exception tore a block's end
)

# Row factories that look at a cursor's result alone.
HARMLESS: Final = (tuple_row, dict_row, namedtuple_row, scalar_row)

# Reconnects: 50 ms to 1 s. The base keeps a delay below some 0.6 of the outage so far, so that
# a short restart is met again soon.
_FIRST, _CAP, _BASE = 0.05, 1.0, 1.3
_PERMANENT_FIRST, _PERMANENT_CAP = 1.0, 15.0


def bounded(seconds: float) -> float:
    """A lock's timeout: -1 would wait for ever, too large a one would overflow."""
    return min(max(seconds, 0.0), threading.TIMEOUT_MAX)


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


def remember(conn: Any) -> tuple[tuple[object, ...], AdaptersMap]:
    """Return a new connection's state, and its adapters to begin from again."""
    adapters, conn._adapters = conn.adapters, WatchedAdapters(conn.adapters)
    state = manners(conn)
    return (*state[:11], *(list(cast("Any", part)) for part in state[11:13]), *state[13:]), adapters


def new_slot(conn: Any, cursors: type[Cursor[Any]]) -> Slot:
    """Return what a pool remembers of a new connection whose cursors are to be *cursors*."""
    standby = conn.pgconn.parameter_status(b"in_hot_standby")
    slot = Slot(conn.fileno(), standby, poller(conn.fileno()), *remember(conn))
    slot.has_stock_blocks = is_stock(type(conn), *BLOCKS)
    slot.has_stock_cursors = conn.cursor_factory is cursors and is_stock(type(conn), "cursor")
    # As libpq understood it: it may be set by a service file or PGTARGETSESSIONATTRS.
    options = {option.keyword: option.val for option in conn.pgconn.info}
    slot.read_write = options.get(b"target_session_attrs") in {b"read-write", b"primary"}
    slot.expires_at, slot.idle_since = conn._expire_at, conn._created_at
    return slot


def is_stock(cls: type, *names: str) -> bool:
    """Whether those methods of *cls* are psycopg's own functions: neither overridden nor wrapped."""
    methods = [getattr(cls, name, None) for name in names]
    return all(
        isinstance(method, FunctionType)
        and str(method.__globals__.get("__name__")).startswith("psycopg.")
        for method in methods
    )


def insist_on_idle(conn: Any, callback: str) -> None:
    """Raise if the user's callback of that name left something open on *conn*."""
    if (status := conn.pgconn.transaction_status) != TransactionStatus.IDLE:
        left = f"connection left in status {TransactionStatus(status).name}"
        raise psycopg.ProgrammingError(f"{left} by the {callback} function: discarded")


class Waiter:
    """One caller waiting for a connection; all but the wait itself happens under the lock.

    It has either a connection, or is over; *owner* is who answers for the connection then.
    """

    __slots__ = ("conn", "deadline", "error", "is_fresh", "is_over", "is_refused", "latch",
                 "owner", "started", "who")  # fmt: skip

    def __init__(self, owner: ref[Any], started: float, deadline: float) -> None:
        self.owner, self.started, self.deadline = owner, started, deadline
        self.who = here.who
        self.conn: Any = None
        self.error: BaseException | None = None
        self.is_fresh = False  # whether `conn` needs no look: its server spoke just now
        self.is_over = self.is_refused = False
        self.latch = threading.Lock()
        self.latch.acquire()

    def take_error(self) -> BaseException:
        """Return why it was refused, once.

        An error kept here would keep its traceback, that the frames of all who called, and
        those this waiter: they and what they hold would stay until the cyclic collector comes.
        """
        error, self.error = self.error, None
        assert error is not None
        return error

    def refuse(self, error: BaseException, *, is_late: bool = False) -> None:
        """Have *error* raised where it waits; *is_late* says that its time is over."""
        self.error, self.is_refused, self.is_over = error, not is_late, True
        self.latch.release()


class KeptCursor(Cursor[Any]):
    """A cursor that serves one single statement after the other and remembers none of them.

    What it saves is the making, which copies the connection's adapters: some 6 us of a fetch.
    It knows its connection only while it serves, so that it keeps none alive which its user lost.
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


class Attempt:
    """The place of a connection that is to be made, and is tried until it can."""

    def __init__(self) -> None:
        self.params: dict[str, Any] = {}  # those of the last failed attempt
        self.due = monotonic()
        self.started = 0.0  # while one is under way
        self.is_retry = False
        self.watching = False  # whether a change of params makes it due at once
        self._fast = delays(_FIRST, _CAP, _BASE)
        self._slow = delays(_PERMANENT_FIRST, _PERMANENT_CAP)

    def postpone(self, kind: str) -> None:
        self.due = monotonic() + next(self._slow if is_permanent(kind) else self._fast)


class Call(MaintenanceTask):
    """Calls *fn* with the pool, if that still lives, in a worker or when due in the scheduler.

    Once, and of a closed pool too, unlike the parent's tasks: what it is for may be to be closed.
    """

    def __init__(self, pool: ConnectionPool[Any], fn: Callable[[Any], None]) -> None:
        super().__init__(pool)
        self._fn: Callable[[Any], None] | None = fn

    def tick(self) -> None:
        """Run in the scheduler's thread: for what is short and must not queue."""
        self.run()

    def run(self) -> None:
        """Run in a worker, whether the pool is open or not."""
        if (pool := self.pool()) is not None:
            self._run(pool)

    def _run(self, pool: ConnectionPool[Any]) -> None:
        fn, self._fn = self._fn, None  # a worker keeps its last task until there is another
        if fn is not None:
            fn(pool)
