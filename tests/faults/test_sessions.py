"""Sessions that end while idle, held or returned; also under TLS."""

from __future__ import annotations

import select
import shutil
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.pq import TransactionStatus

from dbpool import DatabaseMisconfigured, Pool
from tests.pools import SLACK, MakePool, assert_serves_all, await_server_messages, fill, terminate
from tests.postgres import Server, until
from tests.proxy import Proxy
from tests.threads import Load, Task

PID = "select pg_backend_pid()"


# The server's own timeouts


def test_a_holder_idle_in_transaction_too_long_loses_the_connection(
    own_server: Server, make_pool: MakePool
) -> None:
    pool = make_pool(max_size=1, idle_in_transaction_timeout=0.5)
    own_server.execute("create table t (id int)")
    with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout), pool.connection() as conn:
        conn.execute("insert into t values (1)")
        until(lambda: not own_server.backends("dbpool:faults"))
        conn.execute("insert into t values (2)")
    assert pool.fetch_value("select count(*) from t") == 0
    assert_serves_all(pool)


def test_a_block_idle_in_transaction_too_long_raises_at_commit(
    own_server: Server, make_pool: MakePool
) -> None:
    pool = make_pool(max_size=1, idle_in_transaction_timeout=0.5)
    with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout), pool.connection() as conn:
        conn.execute("select 1")
        until(lambda: not own_server.backends("dbpool:faults"))
    assert_serves_all(pool)


def inserting(
    pids: list[int], cut: Callable[[], object] = bool
) -> Callable[[psycopg.Connection[Any]], None]:
    """Return a function for `run` whose first call waits until the server ends the session."""

    def insert(conn: psycopg.Connection[Any]) -> None:
        pids.append(conn.info.backend_pid)
        conn.execute("insert into t values (1)")
        if len(pids) == 1:
            cut()
            # The backend may be gone before its last message is here.
            until(lambda: select.select([conn], [], [], 0)[0])

    return insert


def test_run_repeats_a_transaction_that_was_idle_too_long(
    own_server: Server, make_pool: MakePool
) -> None:
    pool = make_pool(max_size=1, idle_in_transaction_timeout=0.5)
    own_server.execute("create table t (id int)")
    pids: list[int] = []
    pool.run(inserting(pids))
    assert len(set(pids)) == 2
    assert own_server.execute("select count(*) from t") == [(1,)]
    assert_serves_all(pool)


def test_run_raises_the_servers_reason_for_ending_the_session(make_pool: MakePool) -> None:
    pool = make_pool(max_size=1, idle_in_transaction_timeout=0.2)
    calls: list[int] = []

    def sleep_too_long(conn: psycopg.Connection[Any]) -> None:
        calls.append(conn.info.backend_pid)
        until(lambda: select.select([conn], [], [], 0)[0])

    with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout, match="idle-in-trans"):
        pool.run(sleep_too_long, attempts=2)
    assert len(set(calls)) == 2
    assert_serves_all(pool)


def test_a_terminate_message_is_noticed_before_the_socket_closes(
    own_server: Server, proxy: Proxy, make_pool: MakePool
) -> None:
    proxy.hides_close = True
    pool = make_pool(proxy.conninfo, min_size=2, max_size=2, ping_timeout=20)
    pids = fill(pool)
    terminate(own_server, pids)
    await_server_messages(pool)
    caller = Task(pool.fetch_value, PID)
    assert caller.result() not in pids
    assert caller.seconds < SLACK
    assert_serves_all(pool)  # checks out the other connection too
    assert pool.stats().counters.discarded["dead"] == 2


def test_run_notices_a_terminate_message_before_it_sends_commit(
    own_server: Server, proxy: Proxy, make_pool: MakePool
) -> None:
    proxy.hides_close = True
    pool = make_pool(proxy.conninfo, max_size=1)
    own_server.execute("create table t (id int)")
    pids: list[int] = []
    caller = Task(pool.run, inserting(pids, lambda: terminate(own_server, pids)))
    caller.result()
    assert caller.seconds < SLACK
    assert len(set(pids)) == 2
    assert own_server.execute("select count(*) from t") == [(1,)]


def test_a_statement_timeout_keeps_the_connection(make_pool: MakePool) -> None:
    pool = make_pool(max_size=1, statement_timeout=0.3)
    pid = pool.fetch_value(PID)
    with pytest.raises(psycopg.errors.QueryCanceled):
        pool.fetch_value("select pg_sleep(60)")
    with pytest.raises(psycopg.errors.QueryCanceled), pool.connection() as conn:
        conn.execute("select pg_sleep(60)")
    assert pool.fetch_value(PID) == pid
    assert_serves_all(pool)


# Messages that the server sends unasked


def test_a_connection_with_a_pending_notification_is_not_discarded(
    own_server: Server, make_pool: MakePool
) -> None:
    pool = make_pool(max_size=1)
    with pool.connection() as conn:
        conn.autocommit = True
        conn.execute("listen news")
        pid = conn.info.backend_pid
    for _ in range(3):
        own_server.execute("notify news, 'today'")
        until(lambda: conn._record.readable(0))
        assert pool.fetch_value(PID) == pid
    assert pool.stats().counters.discarded["dead"] == 0
    assert_serves_all(pool)


def test_a_terminate_message_behind_a_notification_is_noticed(
    own_server: Server, make_pool: MakePool
) -> None:
    pool = make_pool(max_size=1)
    with pool.connection() as conn:
        conn.autocommit = True
        conn.execute("listen news")
        pid = conn.info.backend_pid
    own_server.execute("notify news")
    terminate(own_server, [pid])
    assert pool.fetch_value(PID) != pid
    assert pool.stats().counters.discarded["dead"] == 1
    assert_serves_all(pool)


# States in which a connection is returned


def _begin(conn: psycopg.Connection[Any]) -> None:
    conn.execute("insert into t values (1)")


def _fail(conn: psycopg.Connection[Any]) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        conn.execute("select 1/0")


def _copy_in(conn: psycopg.Connection[Any]) -> None:
    conn.pgconn.exec_(b"begin")
    conn.pgconn.exec_(b"copy t from stdin")


def _copy_out(conn: psycopg.Connection[Any]) -> None:
    conn.pgconn.exec_(b"copy (select generate_series(1, 1000000)) to stdout")


def _query(conn: psycopg.Connection[Any]) -> None:
    conn.pgconn.send_query(b"select pg_sleep(0.05)")


def _close(conn: psycopg.Connection[Any]) -> None:
    conn.close()


def _pipeline(conn: psycopg.Connection[Any]) -> None:
    conn.pipeline().__enter__()


RETURN_STATES = [_begin, _fail, _copy_in, _copy_out, _query, _close, _pipeline]


@pytest.mark.parametrize("prepare", RETURN_STATES, ids=lambda prepare: prepare.__name__)
def test_the_next_holder_gets_a_good_connection_whatever_state_it_is_returned_in(
    own_server: Server, make_pool: MakePool, prepare: Callable[[psycopg.Connection[Any]], None]
) -> None:
    own_server.execute("create table t (id int)")
    pool = make_pool(max_size=1)
    for _ in range(3):
        conn = pool.getconn()
        prepare(conn)
        pool.putconn(conn)
        with pool.connection() as good:
            assert good.info.transaction_status == TransactionStatus.IDLE
            assert good.execute("select count(*) from t").fetchone() == (0,)
    assert_serves_all(pool)


# Under TLS


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1 with its key, in one file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl command to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    path = folder / "certificate.pem"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2",
         "-keyout", folder / "key.pem", "-out", path],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    with path.open("a") as file:
        file.write((folder / "key.pem").read_text())
    return path


@pytest.fixture
def tls_proxy(own_server: Server, certificate: Path) -> Iterator[Proxy]:
    """A proxy that speaks TLS, as the test server may be built without it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    proxy = Proxy(own_server.port, tls=context)
    yield proxy
    proxy.close()


@pytest.fixture
def tls_pool(tls_proxy: Proxy, certificate: Path, make_pool: MakePool) -> Pool:
    conninfo = tls_proxy.conninfo_for(sslmode="verify-full", sslrootcert=certificate)
    return make_pool(conninfo, min_size=2, max_size=4)


def test_tls_connections_work(tls_pool: Pool) -> None:
    pids = fill(tls_pool)
    with tls_pool.connection() as conn:
        assert conn.pgconn.ssl_in_use
    load = Load(lambda: tls_pool.fetch_value(PID), threads=4)
    load.await_calls(200)
    load.stop()
    assert load.errors == []
    assert set(pids) <= set(fill(tls_pool))
    assert sum(tls_pool.stats().counters.discarded.values()) == 0
    assert_serves_all(tls_pool)


def test_tls_connections_that_were_terminated_are_not_handed_out(
    own_server: Server, tls_pool: Pool
) -> None:
    for _ in range(10):
        pids = fill(tls_pool)
        terminate(own_server, pids)
        await_server_messages(tls_pool)
        assert tls_pool.fetch_value(PID) not in pids
    assert_serves_all(tls_pool)


def test_silent_tls_connections_cost_the_caller_one_ping_timeout(
    tls_proxy: Proxy, certificate: Path, make_pool: MakePool
) -> None:
    conninfo = tls_proxy.conninfo_for(sslmode="require", sslrootcert=certificate)
    pool = make_pool(conninfo, min_size=4, max_size=4, ping_after=0)
    pids = fill(pool)
    tls_proxy.go_silent()
    assert pool.fetch_value(PID) not in pids
    assert pool.stats().counters.discarded["dead"] == 4
    assert_serves_all(pool)
    tls_proxy.drop()


def test_an_untrusted_certificate_is_a_configuration_error(
    tls_proxy: Proxy, make_pool: MakePool
) -> None:
    untrusted = tls_proxy.conninfo_for(sslmode="verify-full", sslrootcert="system")
    pool = make_pool(untrusted)
    with pytest.raises(DatabaseMisconfigured) as caught:
        pool.fetch_value("select 1")
    assert caught.value.kind == "tls"
