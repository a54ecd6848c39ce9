"""A fake server: connections without PostgreSQL, for tests of what a pool does around them.

A test can make a `FakeServer` accept, refuse, hang, answer slowly, fall silent or die.
A pool reaches it by the `connection_class` of that server:

    fake = FakeServer()
    with fake.pool(max_size=1) as pool:
        assert pool.fetch_value("select 1") == 1
        fake.refuse("FATAL:  the database system is starting up")

It knows no SQL beyond a few constants and no transactions: each statement is one in autocommit.
What PostgreSQL or libpq does with a statement, a login or a commit is tested on real ones;
tests/test_fake.py compares the two.
"""

from __future__ import annotations

import itertools
import re
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from types import SimpleNamespace
from typing import Any, ClassVar, Self
from weakref import WeakValueDictionary

import psycopg
from psycopg.pq import ConnStatus, ExecStatus, TransactionStatus

from dbpool import Pool

Rows = Sequence[tuple[Any, ...]]
# The rows of an answer, an error to raise, or a function of the parameters that returns rows.
Answer = Rows | BaseException | Callable[..., Rows]

REFUSED = 'connection to server at "127.0.0.1", port 1 failed: Connection refused'
LOST = "server closed the connection unexpectedly"


class FakeServer:
    """The server of fake connections.

    `answers` has rows for the text of a statement; without an entry, constants (`select 1`) and
    `select pg_backend_pid()` are answered. `attempts` are the parameters of each attempt to
    connect, `logins` how many succeeded, `statements` the texts that were received, `pings`
    how many empty queries.
    """

    conninfo = "host=127.0.0.1 port=1 dbname=shop user=app"  # no server listens there

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.attempts: list[dict[str, Any]] = []
        self.logins = self.pings = 0
        self.statements: list[str] = []
        self.delay = 0.0  # seconds that a login takes
        self.max_connections: int | None = (
            None  # how many connections it takes; None for any number
        )
        self.connection_class: type[FakeConnection] = type(
            "FakeConnection", (FakeConnection,), {"server": self}
        )
        self._refusal = ""
        self._unless: Callable[[dict[str, Any]], bool] = bool
        self._hangs = self.is_silent = False
        self._changed = threading.Condition()
        self._pids = itertools.count(1001)
        self._backends: WeakValueDictionary[int, FakePGconn] = WeakValueDictionary()

    def pool(self, conninfo: Any = conninfo, **options: Any) -> Pool[Any]:
        """Return a pool of connections to it, for a `with` statement."""
        return Pool(conninfo, **{"connection_class": self.connection_class, **options})

    # Behaviour that a test sets

    def accept(self) -> None:
        """Accept connections, and answer all pending statements."""
        self._set_state()

    def refuse(
        self, text: str = REFUSED, unless: Callable[[dict[str, Any]], bool] = lambda params: False
    ) -> None:
        """Refuse new connections with that error text; existing ones stay.

        *unless* gets the parameters of an attempt, and returns whether to accept it.
        """
        self._unless = unless
        self._set_state(refusal=text)

    def hang(self) -> None:
        """Leave new connections without an answer."""
        self._set_state(hangs=True)

    def go_silent(self) -> None:
        """Answer neither new connections nor pings nor statements."""
        self._set_state(hangs=True, is_silent=True)

    def stop(self, text: str = REFUSED) -> None:
        """End all connections, and refuse new ones."""
        self.refuse(text)
        self.kill()

    def kill(self, *pids: int) -> None:
        """End these backends, by default all."""
        for pid in pids or self.backends():
            self._backends[pid].hang_up()
        with self._changed:
            self._changed.notify_all()

    def backends(self) -> list[int]:
        """Return the pids of open connections."""
        return [pid for pid, pgconn in list(self._backends.items()) if pgconn.is_open]

    def send_notice(self, pid: int) -> None:
        """Send a backend's client a byte that is no answer, as a notice is."""
        self._backends[pid].receive()

    def _set_state(
        self, refusal: str = "", *, hangs: bool = False, is_silent: bool = False
    ) -> None:
        with self._changed:
            self._refusal, self._hangs, self.is_silent = refusal, hangs, is_silent
            self._changed.notify_all()

    # Called by connections

    def log_in(self, params: dict[str, Any]) -> FakePGconn:
        """Accept or refuse an attempt to connect."""
        self.attempts.append(params)
        seconds = float(params.get("connect_timeout") or 60)
        with self._changed:
            if not self._changed.wait_for(lambda: not self._hangs, seconds):
                raise psycopg.errors.ConnectionTimeout("connection timeout expired")
        time.sleep(self.delay)
        if self._refusal and not self._unless(params):
            raise psycopg.OperationalError(self._refusal)
        with self._changed:  # one at a time, so that no two take the same room
            if self.max_connections is not None and len(self.backends()) >= self.max_connections:
                raise psycopg.OperationalError("FATAL:  sorry, too many clients already")
            pgconn = FakePGconn(self, next(self._pids))
            self.logins += 1
            self._backends[pgconn.backend_pid] = pgconn
            return pgconn

    def answer(self, pgconn: FakePGconn, query: Any, params: Sequence[Any]) -> Rows:
        """Return the rows of a statement, or raise its error."""
        text = query.decode() if isinstance(query, bytes) else str(query)
        self.statements.append(text)
        with self._changed:
            self._changed.wait_for(lambda: not (self.is_silent and pgconn.is_open))
        pgconn.check_open()
        found = self.answers.get(text)
        if callable(found):
            found = pgconn.while_active(found, *params)
        if isinstance(found, BaseException):
            raise found
        return _constant(text, pgconn.backend_pid) if found is None else found


def _constant(text: str, pid: int) -> Rows:
    if text == "select pg_backend_pid()":
        return [(pid,)]
    if match := re.fullmatch(r"select ('?)(\w+)\1", text):
        return [(match[2] if match[1] else int(match[2]),)]
    raise NotImplementedError(f"the fake server has no answer to {text!r}")


class FakePGconn:
    """The part of libpq's connection that a pool and psycopg use."""

    pipeline_status = 0
    used_password = needs_password = ssl_in_use = False
    password = error_message = b""
    host = hostaddr = db = user = b""
    port = b"1"
    _encoding = "utf-8"

    def __init__(self, server: FakeServer, backend_pid: int) -> None:
        self._server, self.backend_pid = server, backend_pid
        self._client_end, self._server_end = socket.socketpair()
        self.socket = self._client_end.fileno()
        self.status = ConnStatus.OK
        self.transaction_status = TransactionStatus.IDLE
        self.notice_handler = self.notify_handler = None
        self.info: list[Any] = []
        self._answers: list[Any] = []

    def parameter_status(self, name: bytes) -> bytes:
        return b"off"

    def finish(self) -> None:
        self.status, self.transaction_status = ConnStatus.BAD, TransactionStatus.UNKNOWN
        self._client_end.close()
        self._server_end.close()

    def __del__(self) -> None:
        self.finish()

    # Events

    @property
    def is_open(self) -> bool:
        """Whether neither side has closed it."""
        return self._client_end.fileno() >= 0 and self._server_end.fileno() >= 0

    def hang_up(self) -> None:
        """Close the connection from the server's side."""
        self._server_end.close()

    def receive(self) -> None:
        """Receive a byte from the server."""
        self._server_end.send(b"N")

    def check_open(self) -> None:
        """Raise libpq's error if the connection is lost."""
        if not self.is_open:
            self.status, self.transaction_status = ConnStatus.BAD, TransactionStatus.UNKNOWN
            raise psycopg.OperationalError(LOST)

    def while_active(self, fn: Callable[..., Rows], *args: Any) -> Rows:
        """Call *fn* with the transaction status ACTIVE."""
        self.transaction_status = TransactionStatus.ACTIVE
        try:
            return fn(*args)
        finally:
            self.check_open()
            self.transaction_status = TransactionStatus.IDLE

    # Queries without psycopg's cursors, as in a ping

    def consume_input(self) -> None:
        if not self._client_end.recv(1):
            self.status = ConnStatus.BAD
            raise psycopg.OperationalError(LOST)

    def send_query(self, query: bytes) -> None:
        self.check_open()
        self._server.pings += not query
        self._answers = [_result(self, query), None]
        self.transaction_status = TransactionStatus.ACTIVE

    def cancel_conn(self) -> None:
        raise psycopg.OperationalError("this server takes no cancel requests")

    def flush(self) -> int:
        return 0

    def get_result(self) -> Any:
        self.transaction_status = TransactionStatus.IDLE
        return self._answers.pop(0)

    def is_busy(self) -> bool:
        return self._server.is_silent and bool(self._answers)

    def notifies(self) -> None:
        return None


def _result(pgconn: FakePGconn, query: bytes) -> Any:
    if not query:
        return SimpleNamespace(status=ExecStatus.EMPTY_QUERY)
    with suppress(NotImplementedError):
        ((value, *_), *_) = pgconn._server.answer(pgconn, query, ())
        return SimpleNamespace(
            status=ExecStatus.TUPLES_OK, get_value=lambda row, column: str(value).encode()
        )
    return SimpleNamespace(
        status=ExecStatus.FATAL_ERROR, get_error_message=lambda: "ERROR:  this server is a fake"
    )


class FakeCursor:
    """A cursor that returns the server's rows and ignores the row factory."""

    def __init__(self, connection: Any, **kwargs: Any) -> None:
        self.connection = connection
        self._rows: list[tuple[Any, ...]] = []

    def execute(self, query: Any, params: Sequence[Any] | None = None, **kwargs: Any) -> Self:
        pgconn = self.connection.pgconn
        self._rows = list(self.connection.server.answer(pgconn, query, params or ()))
        return self

    @property
    def rowcount(self) -> int:
        return len(self._rows)

    @property
    def pgresult(self) -> Any:
        return self._rows or None

    def fetchone(self) -> tuple[Any, ...] | None:
        return self._rows.pop(0) if self._rows else None

    def fetchall(self) -> list[tuple[Any, ...]]:
        rows, self._rows = self._rows, []
        return rows

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self.fetchall())

    def _convert_query(self, query: str, params: Any = None) -> Any:
        return SimpleNamespace(query=query.encode())


class FakeConnection(psycopg.Connection[Any]):
    """A connection to a fake server; this class itself connects to one that always accepts."""

    server: ClassVar[FakeServer]

    def __init__(self, pgconn: FakePGconn) -> None:
        super().__init__(pgconn)  # type: ignore[arg-type]
        self.cursor_factory = FakeCursor  # type: ignore[assignment]

    @classmethod
    def connect(cls, conninfo: str = "", *, autocommit: bool = False, **params: Any) -> Self:
        conn = cls(cls.server.log_in(params))
        conn._autocommit = autocommit
        return conn

    def wait(self, gen: Generator[Any, Any, Any], *args: Any, **kwargs: Any) -> Any:
        with closing(gen):
            self.pgconn.transaction_status = TransactionStatus.IDLE  # type: ignore[misc]


FakeConnection.server = FakeServer()
