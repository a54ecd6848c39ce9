"""Statements that a pooler refuses before a server gets them: the pool sends them again."""

from __future__ import annotations

import socketserver
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from dbpool import CommitUncertain, DatabaseUnavailable, Pool
from dbpool.errors import classify
from tests.pools import MakePool, fill, within

SHUTDOWN = "server shutting down"
ENDED = [
    SHUTDOWN,
    "server login has been failing, try again later (server_login_retry)",
    "server login has been failing, cached error: FATAL: no (server_login_retry)",
    "pgbouncer cannot connect to server",
]
REFUSALS = [*ENDED, "query_wait_timeout", "query_timeout", "client_idle_timeout"]
# PgBouncer sends this also for a statement that a server may have received.
UNCERTAIN = ["server conn crashed?", "query timeout", "database removed", "admin forced disconnect"]


class Pooler(socketserver.ThreadingTCPServer):
    """Speaks the protocol as PgBouncer does. `refusals` are its errors for the next statements.

    After each it closes the connection. It never refuses inside a transaction, nor a ping.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Client)
        self.refusals: list[str] = []
        self.done: list[bytes] = []
        self.logins = 0
        self.lock = threading.Lock()
        self.conninfo = f"host=127.0.0.1 port={self.server_address[1]} user=app sslmode=disable"

    def refusal(self) -> str | None:
        with self.lock:
            return self.refusals.pop(0) if self.refusals else None


class _Client(socketserver.StreamRequestHandler):
    server: Pooler
    status = b"I"

    def handle(self) -> None:
        (size,) = struct.unpack("!i", self.rfile.read(4))
        self.rfile.read(size - 4)
        self.server.logins += 1
        self.send(b"R", struct.pack("!i", 0))
        self.send(b"K", struct.pack("!ii", 1, 1))
        self.ready()
        while (kind := self.rfile.read(1)) == b"Q":
            (size,) = struct.unpack("!i", self.rfile.read(4))
            query = self.rfile.read(size - 4).rstrip(b"\0")
            text = self.server.refusal() if query and self.status == b"I" else None
            if text is not None:
                self.send(b"E", b"SFATAL\0VFATAL\0C08P01\0M" + text.encode() + b"\0\0")
                return
            self.answer(query)
            self.ready()
        assert kind in {b"", b"X"}

    def answer(self, query: bytes) -> None:
        if not query:
            self.send(b"I")
            return
        self.status = {b"BEGIN": b"T", b"COMMIT": b"I"}.get(query, self.status)
        if query.startswith(b"select"):
            self.send(
                b"T", struct.pack("!h", 1) + b"n\0" + struct.pack("!ihihih", 0, 0, 23, 4, -1, 0)
            )
            self.send(b"D", struct.pack("!hi", 1, 1) + b"1")
        self.server.done.append(query)
        self.send(b"C", query.split()[0].upper() + b" 0 1\0")

    def ready(self) -> None:
        self.send(b"Z", self.status)

    def send(self, kind: bytes, text: bytes = b"") -> None:
        self.wfile.write(kind + struct.pack("!i", len(text) + 4) + text)


@pytest.fixture
def pooler() -> Iterator[Pooler]:
    with Pooler() as pooler:
        thread = threading.Thread(target=pooler.serve_forever, args=(0.02,))
        thread.start()
        yield pooler
        pooler.shutdown()
        thread.join(10)


@pytest.fixture
def pool(pooler: Pooler, make_pool: MakePool) -> Pool[Any]:
    pool = make_pool(pooler.conninfo, pooler="transaction", min_size=4, max_size=4)
    fill(pool)
    return pool


USES: dict[str, Callable[[Pool[Any]], Any]] = {
    "execute": lambda pool: pool.execute("insert"),
    "fetch": lambda pool: pool.fetch_value("select"),
    "run": lambda pool: pool.run(lambda conn: conn.execute("insert")).rowcount,
    "run once": lambda pool: pool.run(lambda conn: conn.execute("insert"), attempts=1).rowcount,
}


@pytest.mark.parametrize("text", REFUSALS)
def test_a_refused_statement_is_sent_again(pooler: Pooler, pool: Pool[Any], text: str) -> None:
    pooler.refusals = [text]
    assert pool.execute("insert") == 1
    assert pooler.done == [b"insert"]


@pytest.mark.parametrize("use", USES)
def test_a_statement_is_sent_again_however_many_connections_are_refused(
    pooler: Pooler, pool: Pool[Any], use: str
) -> None:
    """As while other clients return their connections to a pooler that shuts down."""
    pooler.refusals = [SHUTDOWN] * 20
    assert USES[use](pool) == 1
    assert pooler.refusals == []


@pytest.mark.parametrize("text", ENDED)
def test_one_refusal_by_a_pooler_that_shuts_down_evicts_all_idle_connections(
    pooler: Pooler, pool: Pool[Any], text: str
) -> None:
    pooler.refusals = [text]
    before = pooler.logins
    pool.execute("insert")
    fill(pool)
    assert pooler.logins == before + 4


def test_query_wait_timeout_evicts_no_other_connection(pooler: Pooler, pool: Pool[Any]) -> None:
    pooler.refusals = ["query_wait_timeout"]
    before = pooler.logins
    pool.execute("insert")
    fill(pool)
    assert pooler.logins == before + 1


@pytest.mark.parametrize("use", USES)
def test_a_statement_is_sent_again_until_the_pools_timeout(
    pooler: Pooler, make_pool: MakePool, use: str
) -> None:
    pool = make_pool(pooler.conninfo, pooler="transaction", timeout=0.3, max_size=2)
    pooler.refusals = [SHUTDOWN] * 100_000
    with within(5.0), pytest.raises(DatabaseUnavailable) as caught:
        USES[use](pool)
    assert caught.value.kind == "shutdown"
    assert isinstance(caught.value.__cause__, psycopg.errors.ProtocolViolation)
    pooler.refusals = []


def test_run_sends_a_refused_statement_again_until_its_own_timeout(
    pooler: Pooler, pool: Pool[Any]
) -> None:
    pooler.refusals = [SHUTDOWN] * 100_000
    with within(5.0), pytest.raises(DatabaseUnavailable):
        pool.run(lambda conn: conn.execute("insert"), timeout=0.2)
    pooler.refusals = []


def test_a_refusal_inside_a_block_raises_database_unavailable(
    pooler: Pooler, pool: Pool[Any]
) -> None:
    """The pool does not know what the block did before, so it cannot run it again."""
    pooler.refusals = [SHUTDOWN]
    with pytest.raises(DatabaseUnavailable) as caught, pool.connection() as conn:
        conn.execute("insert")
    assert caught.value.kind == "shutdown"
    assert pool.execute("insert") == 1


@pytest.mark.parametrize("text", UNCERTAIN)
def test_a_statement_that_a_server_may_have_got_raises_commit_uncertain(
    pooler: Pooler, pool: Pool[Any], text: str
) -> None:
    pooler.refusals = [text]
    with pytest.raises(CommitUncertain):
        pool.execute("insert")
    assert pooler.done == []


def test_a_login_refused_by_a_pooler_that_shuts_down_has_kind_shutdown() -> None:
    assert classify(psycopg.OperationalError("FATAL:  pooler is shutting down")) == "shutdown"


def test_a_servers_own_error_with_a_poolers_words_is_not_sent_again(dsn: str) -> None:
    with Pool(dsn, max_size=1) as pool:
        pool.execute("create sequence calls")
        pool.execute(
            "create function refuse() returns int language plpgsql as $$ begin"
            f" perform nextval('calls'); raise '{SHUTDOWN}' using errcode = '08P01'; end $$"
        )
        with pytest.raises(psycopg.errors.ProtocolViolation):
            pool.fetch_value("select refuse()")
        with pytest.raises(psycopg.errors.ProtocolViolation), pool.connection() as conn:
            conn.execute("select refuse()")
        with pytest.raises(psycopg.errors.ProtocolViolation):
            pool.run(lambda conn: conn.execute("select refuse()"))
        assert pool.fetch_value("select last_value from calls") == 3
        assert pool.stats().counters.connects == 1
