"""Fixtures: real servers, fresh databases, and no trace of the shell's own settings."""

from __future__ import annotations

import faulthandler
import gc
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
from pytest_postgresql import factories

from .postgres import Copies, Server, dismiss_reaper, until
from .proxy import Proxy

# pytest captures the standard error of tests; this is where a hard end can still be told.
_terminal = os.dup(2)

# The shell's own settings must not reach the tests, nor the tools that start servers for them.
for _name in [n for n in os.environ if n.startswith(("PG", "DBPOOL_", "DATABASE_URL"))]:
    del os.environ[_name]

hypothesis.settings.register_profile("default", deadline=None)  # machines stall

HARD_DEADLINE = 120.0  # seconds; a test that hangs ends the run with every thread's stack
SLOW_DEADLINE = 900.0


@pytest.fixture(scope="session")
def template() -> Iterator[Copies]:
    """A data directory to copy: much quicker than making a new one."""
    server = Server()
    copies = Copies(server.data)
    yield copies
    copies.close()
    server.close()
    dismiss_reaper()


@pytest.fixture(scope="session")
def server(template: Copies) -> Iterator[Server]:
    """The server that all tests share which do it no harm."""
    server = Server(template)
    try:
        server.start()
        yield server
    finally:
        server.close()


class _Executor:
    """What pytest-postgresql wants to know of a server."""

    def __init__(self, server: Server) -> None:
        self.host = "127.0.0.1"
        self.port = server.port
        self.user = "postgres"
        self.password = ""
        self.options = ""
        self.maintenance_dbname = "postgres"
        self.template_dbname = "template1"
        self.version = 18


@pytest.fixture(scope="session")
def executor(server: Server) -> _Executor:
    """The shared server, as pytest-postgresql has it."""
    return _Executor(server)


pg_noproc = factories.postgresql_noproc(dbname="tests", depends_on="executor")
database = factories.postgresql("pg_noproc")


@pytest.fixture
def dsn(database: Any, server: Server) -> str:
    """The connection string of a fresh database."""
    return server.conninfo_for(dbname=database.info.dbname)


@pytest.fixture
def make_server(template: Copies) -> Iterator[Callable[..., Server]]:
    """Start private servers, options by keyword; they are gone after the test."""
    servers: list[Server] = []

    def make(**options: object) -> Server:
        server = Server(template, **options)
        servers.append(server)
        server.start()
        return server

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def own_server(make_server: Callable[..., Server]) -> Server:
    """A private server, to be harmed."""
    return make_server()


@pytest.fixture
def proxy(own_server: Server) -> Iterator[Proxy]:
    """A proxy in front of the private server."""
    proxy = Proxy(own_server.port)
    yield proxy
    proxy.close()


@pytest.fixture(autouse=True)
def hard_deadline(request: pytest.FixtureRequest) -> Iterator[None]:
    """End the run if a test hangs."""
    slow = request.node.get_closest_marker("slow")
    seconds = SLOW_DEADLINE if slow else HARD_DEADLINE
    faulthandler.dump_traceback_later(seconds, exit=True, file=_terminal)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def no_thread_left(hard_deadline: None) -> Iterator[None]:
    """Fail a test that leaves a thread of a pool's behind."""
    before = set(threading.enumerate())

    def left() -> list[str]:
        threads = set(threading.enumerate()) - before
        return sorted(thread.name for thread in threads)

    yield
    if left():
        gc.collect()  # a pool that nobody holds any more stops its threads
    try:
        until(lambda: not left(), 5.0)
    except AssertionError:
        pytest.fail(f"threads were left behind: {', '.join(left())}")
