"""The fake server behaves like PostgreSQL in everything that tests rely on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from psycopg.pq import TransactionStatus

from dbpool.errors import classify
from dbpool.liveness import Liveness, PingTimeout, check_socket, ping, poller

from .fake import FakeServer
from .postgres import Server, until

pytestmark = pytest.mark.usefixtures("template")  # its threads belong to no test


@dataclass
class Subject:
    """One interface to the fake server and to PostgreSQL."""

    connect: Callable[..., psycopg.Connection[Any]]
    kill: Callable[[int], object]
    go_silent: Callable[[list[int]], object]
    answer_again: Callable[[], object]
    stop: Callable[[], object]
    fill: Callable[[], object]


def of_fake(fake: FakeServer, made: ExitStack) -> Subject:
    return Subject(
        connect=lambda **params: made.enter_context(
            closing(fake.connection_class.connect(**params))
        ),
        kill=fake.kill,
        go_silent=lambda pids: fake.go_silent(),
        answer_again=fake.accept,
        stop=fake.stop,
        fill=lambda: setattr(fake, "max_connections", 0),
    )


def of_postgres(server: Server, made: ExitStack) -> Subject:
    def connect(**params: Any) -> psycopg.Connection[Any]:
        conn = psycopg.connect(server.conninfo_for(**params), autocommit=True)
        return made.enter_context(closing(conn))

    def fill() -> None:
        server.options |= {"max_connections": 2, "superuser_reserved_connections": 0}
        server.restart()
        for _ in range(2):
            connect()

    return Subject(
        connect=connect,
        kill=lambda pid: server.execute("select pg_terminate_backend(%s)", pid),
        go_silent=lambda pids: server.freeze([server.postmaster_pid, *pids]),
        answer_again=server.thaw,
        stop=server.stop,
        fill=fill,
    )


@pytest.fixture(params=["fake", "PostgreSQL"])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    with ExitStack() as made:
        if request.param == "fake":
            yield of_fake(request.getfixturevalue("fake"), made)
        else:
            yield of_postgres(request.getfixturevalue("own_server"), made)


def seen(conn: psycopg.Connection[Any]) -> Liveness:
    return check_socket(conn, poller(conn.fileno()))


def test_statements_are_answered(subject: Subject) -> None:
    conn = subject.connect()
    assert conn.execute("select 1").fetchone() == (1,)
    assert conn.execute("select 'a'").fetchall() == [("a",)]
    assert conn.execute("select pg_backend_pid()").fetchone() == (conn.info.backend_pid,)
    assert conn.info.transaction_status == TransactionStatus.IDLE
    assert seen(conn) is Liveness.ALIVE
    ping(conn, 5.0)
    conn.close()
    assert (conn.closed, conn.broken) == (True, False)


def test_the_end_of_a_backend_is_noticed(subject: Subject) -> None:
    conn, other = subject.connect(), subject.connect()
    subject.kill(conn.info.backend_pid)
    until(lambda: seen(conn) is Liveness.DEAD)
    assert seen(other) is Liveness.ALIVE
    with pytest.raises(psycopg.OperationalError):
        conn.execute("select 1")
    assert conn.closed
    assert other.execute("select 1").fetchone() == (1,)


def test_a_statement_that_is_sent_to_an_ended_backend_fails(subject: Subject) -> None:
    conn = subject.connect()
    subject.kill(conn.info.backend_pid)
    with pytest.raises(psycopg.OperationalError):
        conn.execute("select 1")
    assert (conn.closed, conn.broken) == (True, True)


def test_a_silent_connection_is_not_closed(subject: Subject) -> None:
    conn = subject.connect()
    subject.go_silent([conn.info.backend_pid])
    assert seen(conn) is Liveness.ALIVE
    with pytest.raises(PingTimeout):
        ping(conn, 0.05)
    with pytest.raises(psycopg.OperationalError) as caught:
        subject.connect(connect_timeout=2)
    assert classify(caught.value) == "timeout"
    subject.answer_again()


def test_a_stopped_server_refuses_connections(subject: Subject) -> None:
    conn = subject.connect()
    subject.stop()
    until(lambda: seen(conn) is Liveness.DEAD)
    with pytest.raises(psycopg.OperationalError) as caught:
        subject.connect()
    assert classify(caught.value) == "refused"


def test_a_full_server_says_so(subject: Subject) -> None:
    subject.fill()
    with pytest.raises(psycopg.OperationalError) as caught:
        subject.connect()
    assert classify(caught.value) == "saturated"
