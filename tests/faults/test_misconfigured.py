"""Errors of configuration fail callers at once, and end once they are corrected."""

from __future__ import annotations

import logging
import socket
import struct
from functools import partial
from typing import Any

import psycopg
import pytest

from dbpool import DatabaseMisconfigured, DatabaseUnavailable
from dbpool.errors import classify
from dbpool.events import ConnectFailed
from tests.clock import ShiftedClock
from tests.pools import (
    GRACE,
    SLACK,
    MakePool,
    Recorder,
    assert_serves_all,
    await_server_messages,
    await_up,
    fill,
    terminate,
)
from tests.postgres import Server, until
from tests.proxy import Proxy
from tests.sockets import answering
from tests.threads import Task

SECRET = "s3cr3t-of-theirs"


@pytest.fixture
def app(own_server: Server) -> Server:
    """A server with a role that needs a password, and with everything that a test misuses."""
    own_server.execute(f"create role app login password '{SECRET}'")
    own_server.execute("create role visitor password 'x'")
    own_server.execute("create role crowd login password 'x' connection limit 0")
    return own_server


TRUST = "host all all 127.0.0.1/32 trust\n"
ONLY_POSTGRES = "host all postgres 127.0.0.1/32 trust\n"
REJECT = ONLY_POSTGRES + "host all app 127.0.0.1/32 reject\n"

# For each: its kind, the client's parameters, and pg_hba lines if they differ from the default.
WRONG: dict[str, tuple[str, dict[str, object], str]] = {
    "password": ("password", {"user": "app", "password": "wrong"}, ""),
    "no password": ("password", {"user": "app"}, ""),
    "no such role": ("role", {"user": "nobody"}, TRUST),
    "no such role, with a password": ("password", {"user": "nobody", "password": "x"}, ""),
    "role without login": ("role", {"user": "visitor", "password": "x"}, ""),
    "no such database": ("database", {"dbname": "missing"}, ""),
    "closed database": ("database", {"dbname": "closed"}, ""),
    "private database": ("access", {"user": "app", "dbname": "private"}, TRUST),
    "no line in pg_hba": ("access", {"user": "app"}, ONLY_POSTGRES),
    "rejected by pg_hba": ("access", {"user": "app"}, REJECT),
    "parameter": ("conninfo", {"options": "-c no_such_parameter=1"}, ""),
    "value": ("conninfo", {"options": "-c statement_timeout=never"}, ""),
    "tls": ("tls", {"sslmode": "require"}, ""),
    "certificate": ("tls", {"sslrootcert": "/nowhere", "sslmode": "verify-full"}, ""),
}

PREPARED = {
    "closed database": ["create database closed allow_connections false"],
    "private database": [
        "create database private",
        "revoke connect on database private from public",
    ],
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_configuration_error_is_raised_at_once_with_its_cause(
    app: Server, make_pool: MakePool, wrong: str
) -> None:
    kind, params, hba = WRONG[wrong]
    for statement in PREPARED.get(wrong, ()):
        app.execute(statement)
    if hba:
        _authenticate(app, hba)
    pool = make_pool(app.conninfo_for(**params))
    for _ in range(3):
        caller = Task(pool.getconn)
        error = caller.error()
        assert isinstance(error, DatabaseMisconfigured)
        assert error.kind == kind
        assert isinstance(error.__cause__, psycopg.Error)
        assert str(error.__cause__) in str(error)
        assert caller.seconds < SLACK
    # The pool makes few attempts however many callers come, so that no account gets locked.
    assert pool.stats().counters.connect_failures <= 3


def test_a_wrong_password_ends_when_the_conninfo_changes(app: Server, make_pool: MakePool) -> None:
    password = {"password": "wrong"}
    pool = make_pool(lambda: app.conninfo_for(user="app", **password))
    assert isinstance(Task(pool.getconn).error(), DatabaseMisconfigured)
    password["password"] = SECRET
    await_up(pool)
    assert_serves_all(pool)


def test_a_password_changed_on_the_server_is_no_outage_while_a_connection_lives(
    app: Server, make_pool: MakePool
) -> None:
    pool = make_pool(app.conninfo_for(user="app", password=SECRET), max_size=2)
    fill(pool)
    app.execute("alter role app password 'another'")
    with pool.connection():
        waiter = Task(pool.fetch_value, "select 1")
        until(lambda: pool.stats().counters.connect_failures)
    assert waiter.result() == 1
    assert pool.state == "up"
    conn = pool.getconn()
    conn.close()
    pool.putconn(conn)
    error = Task(pool.getconn, 5.0).error()
    assert isinstance(error, DatabaseMisconfigured), "without connections callers fail at once"
    assert error.kind == "password"
    app.execute(f"alter role app password '{SECRET}'")
    # The next attempt is due within 15 s, but the pool reads its conninfo once a second.
    pool.breaker.clock = ShiftedClock(15.0)
    await_up(pool)
    assert_serves_all(pool)


def test_a_password_changed_on_the_server_hits_new_connections_only(
    app: Server, make_pool: MakePool
) -> None:
    password = {"password": SECRET}
    pool = make_pool(
        lambda: app.conninfo_for(user="app", **password), min_size=2, max_size=3, outage_grace=GRACE
    )
    pids = fill(pool)
    app.execute("alter role app password 'another'")
    with pool.connection(), pool.connection():
        assert isinstance(Task(pool.getconn).error(), DatabaseMisconfigured)
    assert {pool.fetch_value("select pg_backend_pid()") for _ in range(10)} <= set(pids)
    password["password"] = "another"
    until(lambda: not pool.breaker.is_failing, 1.0 + SLACK)
    assert_serves_all(pool)


def test_a_full_role_is_not_a_misconfiguration(app: Server, make_pool: MakePool) -> None:
    pool = make_pool(app.conninfo_for(user="crowd", password="x"), outage_grace=GRACE)
    error = Task(pool.getconn).error()
    assert type(error) is DatabaseUnavailable
    assert error.kind == "saturated"
    app.execute("alter role crowd connection limit -1")
    await_up(pool)
    assert_serves_all(pool)


def test_errors_contain_no_secret(
    app: Server, make_pool: MakePool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    errors = []
    for params in (
        {"user": "app", "password": SECRET, "dbname": "missing"},
        {"user": "postgres", "password": SECRET, "options": f"-c no_such_thing={SECRET}x"},
    ):
        pool = make_pool(app.conninfo_for(**params))
        errors.append(Task(pool.getconn).error())
    malformed = f"postgresql://app:{SECRET}%@127.0.0.1:{app.port}/x"
    pool = make_pool(lambda: malformed)
    errors.append(Task(pool.getconn).error())
    for error in errors:
        seen: BaseException | None = error
        while seen is not None:
            assert SECRET not in f"{seen!r} {seen} {vars(seen)}"
            assert getattr(seen, "pgconn", None) is None
            seen = seen.__cause__ or seen.__context__
    assert SECRET not in caplog.text


# Errors that are not errors of configuration


# Runs after the login, before the server's first ReadyForQuery.
SLOW_LOGIN = """
create function linger() returns event_trigger language plpgsql as
    $$ begin if session_user = 'app' then perform pg_sleep(60); end if; end $$;
create event trigger linger on login execute function linger();
"""


def test_a_backend_terminated_during_its_login_has_kind_shutdown(
    app: Server, make_pool: MakePool
) -> None:
    if app.version < 17:
        pytest.skip("event triggers on login come with PostgreSQL 17")
    app.execute(SLOW_LOGIN)
    recorder = Recorder()
    pool = make_pool(app.conninfo_for(user="app", password=SECRET), listeners=[recorder])
    caller = Task(pool.fetch_value, "select 1")
    until(lambda: app.execute("select 1 from pg_stat_activity where wait_event = 'PgSleep'"))
    pids = app.backends("dbpool:faults")
    app.execute("drop event trigger linger")
    terminate(app, pids)
    assert caller.result() == 1
    until(lambda: recorder.count(ConnectFailed))
    assert {event.kind for event in recorder.events if type(event) is ConnectFailed} == {"shutdown"}
    assert_serves_all(pool)


def test_errors_in_another_language_are_transient_and_shown(
    app: Server, proxy: Proxy, make_pool: MakePool
) -> None:
    proxy.translate = _in_spanish
    conninfo = proxy.conninfo_for(user="app", password="wrong", sslmode="disable")
    pool = make_pool(conninfo, outage_grace=GRACE)
    error = Task(pool.getconn).error()
    assert type(error) is DatabaseUnavailable
    assert error.kind == "unknown"
    assert "no se pudo" in str(error)
    app.execute("alter role app password 'wrong'")
    await_up(pool)
    assert_serves_all(pool)


def test_a_termination_message_in_another_language_is_recognised(
    own_server: Server, proxy: Proxy, make_pool: MakePool
) -> None:
    proxy.translate = _in_spanish
    pool = make_pool(proxy.conninfo_for(sslmode="disable"), min_size=4, max_size=4)
    pids = fill(pool)
    terminate(own_server, pids)
    await_server_messages(pool)
    assert pool.fetch_value("select pg_backend_pid()") not in pids
    assert_serves_all(pool)


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
def test_a_connection_cut_in_the_tls_handshake_is_transient(
    own_server: Server, make_pool: MakePool, reset: bool
) -> None:
    with answering(partial(_accept_tls_and_close, reset=reset)) as port:
        params = {"port": port, "sslmode": "require"}
        pool = make_pool(lambda: own_server.conninfo_for(**params), outage_grace=GRACE)
        error = Task(pool.getconn).error()
        assert type(error) is DatabaseUnavailable
        assert error.kind == "closed"
        params |= {"port": own_server.port, "sslmode": "prefer"}
        await_up(pool)
        assert_serves_all(pool)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("FATAL:  sorry, too many clients already", "saturated"),
        ("FATAL:  remaining connection slots are reserved for roles with the", "saturated"),
        ("FATAL:  the database system is starting up", "starting"),
        ("FATAL:  the database system is shutting down", "shutdown"),
        ("FATAL:  the database system is in recovery mode", "starting"),
        ("FATAL:  the database system is not yet accepting connections", "starting"),
        ("SSL SYSCALL error: Connection reset by peer", "closed"),
        ("SSL SYSCALL error: EOF detected", "closed"),
        ("SSL error: unexpected eof while reading", "closed"),
        ("SSL error: certificate verify failed", "tls"),
        ("server does not support SSL, but SSL was required", "tls"),
        ("could not receive data from server: Connection timed out", "timeout"),
        ("No route to host", "unknown"),
        ("", "unknown"),
    ],
)
def test_libpqs_messages_are_classified(text: str, kind: str) -> None:
    prefix = 'connection failed: connection to server at "10.0.0.1", port 5432 failed: '
    assert classify(psycopg.OperationalError(prefix + text)) == kind


def _authenticate(server: Server, hba: str) -> None:
    """Make these lines the server's pg_hba; return once they are loaded."""

    def loaded() -> Any:
        return server.execute("select pg_conf_load_time()")

    before = loaded()
    (server.data / "pg_hba.conf").write_text(hba)
    server.reload()
    until(lambda: loaded() != before)


def _in_spanish(chunk: bytes) -> bytes:
    """Translate a server's errors: severity and message, not the SQLSTATE."""
    out, at = b"", 0
    while at + 5 <= len(chunk):
        (length,) = struct.unpack_from("!i", chunk, at + 1)
        kind, body = chunk[at : at + 1], chunk[at + 5 : at + 1 + length]
        if kind == b"E":
            fields = [_field(field) for field in body.rstrip(b"\0").split(b"\0")]
            body = b"\0".join(fields) + b"\0\0"
        out += kind + struct.pack("!i", len(body) + 4) + body
        at += 1 + length
    return out + chunk[at:]


def _field(field: bytes) -> bytes:
    translated = {b"S": "GRAVÍSIMO", b"M": "no se pudo continuar: contraseña, administración …"}
    text = translated.get(field[:1])
    return field if text is None else field[:1] + text.encode()


def _accept_tls_and_close(peer: socket.socket, reset: bool) -> None:
    """Agree to speak TLS, and end the connection in the handshake."""
    peer.recv(8)
    peer.sendall(b"S")
    peer.recv(1 if reset else 65536)
    if reset:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
