"""A server without room for more: no outage as long as connections come back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import psycopg
import pytest

from tests.pools import MakePool, assert_serves_all, await_exit, fill
from tests.postgres import Server, until
from tests.threads import Load, Task

MAX_CLIENTS = 8  # connections for ordinary roles
PID = "select pg_backend_pid()"


class Clients:
    """Other clients, which occupy a server's connections."""

    def __init__(self, conninfo: str) -> None:
        self._conninfo = conninfo
        self._stack = ExitStack()

    def connect(self, number: int) -> None:
        for _ in range(number):
            until(self._connect_one)

    def _connect_one(self) -> bool:
        try:
            self._stack.enter_context(psycopg.connect(self._conninfo))
        except psycopg.OperationalError:  # a client that left may still occupy its slot
            return False
        return True

    def disconnect(self) -> None:
        self._stack.close()


@pytest.fixture
def small(make_server: Callable[..., Server]) -> Server:
    """A server with room for 8 connections, and for the superuser."""
    server = make_server(max_connections=MAX_CLIENTS + 5, superuser_reserved_connections=5)
    server.execute("create role app login")
    (server.data / "pg_hba.conf").write_text("host all all 127.0.0.1/32 trust\n")
    server.restart()
    return server


@pytest.fixture
def clients(small: Server) -> Iterator[Clients]:
    clients = Clients(small.conninfo_for(user="app"))
    yield clients
    clients.disconnect()


def test_existing_connections_serve_while_the_server_is_full(
    small: Server, clients: Clients, make_pool: MakePool
) -> None:
    pool = make_pool(small.conninfo_for(user="app"), server=small, min_size=2, max_size=6)
    pids = fill(pool)
    clients.connect(MAX_CLIENTS - 2)
    failures = pool.stats().counters.connect_failures
    load = Load(lambda: pool.fetch_value(PID), threads=8)
    until(lambda: pool.stats().counters.connect_failures >= failures + 4)
    load.await_calls()
    load.stop()
    assert load.errors == []
    assert pool.breaker.state == "closed"
    assert {pool.fetch_value(PID) for _ in range(10)} <= set(pids)
    clients.disconnect()
    assert_serves_all(pool)


def test_more_threads_than_the_server_has_room_are_all_served(
    small: Server, make_pool: MakePool
) -> None:
    pool = make_pool(small.conninfo_for(user="app"), server=small, max_size=16)
    load = Load(lambda: pool.fetch_value("select pg_sleep(0.002)"), threads=16)
    until(lambda: pool.stats().counters.connect_failures >= 3)
    load.await_calls(500)
    load.stop()
    assert load.errors == []
    assert pool.breaker.state == "closed"
    assert pool.stats().size <= MAX_CLIENTS + 1
    assert pool.stats().idle == MAX_CLIENTS


def test_a_pool_on_a_full_server_gets_room_that_another_gives_up(
    small: Server, make_pool: MakePool
) -> None:
    first = make_pool(small.conninfo_for(user="app"), server=small, min_size=MAX_CLIENTS)
    pids = fill(first)
    second = make_pool(small.conninfo_for(user="app"), server=small, timeout=30)
    caller = Task(second.fetch_value, PID)
    until(lambda: second.breaker.is_failing)
    first.resize(1, 2)
    assert caller.result() not in pids
    first.close()
    await_exit(small, pids)
    assert second.fetch_value("select 1") == 1


def test_a_caller_waits_for_the_restart_of_a_full_server(
    small: Server, clients: Clients, make_pool: MakePool
) -> None:
    pool = make_pool(small.conninfo_for(user="app"), server=small, min_size=2, max_size=6)
    fill(pool)
    clients.connect(MAX_CLIENTS - 2)
    began = time.monotonic()
    small.restart("immediate")
    assert pool.fetch_value("select 1") == 1
    assert time.monotonic() - began < 10.0
    assert_serves_all(pool)
