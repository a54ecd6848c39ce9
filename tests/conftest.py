"""Fixtures: real servers, fresh databases, and no trace of the shell's own settings."""

from __future__ import annotations

import faulthandler
import gc
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import hypothesis
import pytest
from flask import Flask
from pytest_postgresql.janitor import DatabaseJanitor

from dbpool import Pool
from dbpool.flask import DBPool, create_blueprint

from .fake import FakeServer
from .pools import MakePool, assert_closes, assert_whole
from .postgres import Copies, Server, dismiss_reaper, until
from .proxy import Proxy

# pytest captures the standard error of tests; this is where a hard end can still be told.
_terminal = os.dup(2)

# The shell's own settings must not reach the tests, nor the tools that start servers for them.
for _name in [n for n in os.environ if n.startswith(("PG", "DBPOOL_", "DATABASE_URL"))]:
    del os.environ[_name]

hypothesis.settings.register_profile("default", deadline=None)  # machines stall

MakeApp = Callable[..., Flask]

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


class _Databases:
    """Fresh databases. The next is made while the last is in use, and one given back is dropped
    meanwhile: together they take longer than many a test.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._numbers = itertools.count()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="databases")
        self._next = self._worker.submit(self._make)

    def _janitor(self, name: str) -> DatabaseJanitor:
        return DatabaseJanitor(
            user="postgres", host="127.0.0.1", port=self._server.port, dbname=name
        )

    def _make(self) -> str:
        name = f"tests{next(self._numbers)}"
        self._janitor(name).init()
        return name

    def take(self) -> str:
        """Return the name of a fresh database."""
        name = self._next.result(60)
        self._next = self._worker.submit(self._make)
        return name

    def give_back(self, name: str) -> None:
        """Drop it, and end whatever is still connected to it."""
        self._worker.submit(self._janitor(name).drop)

    def close(self) -> None:
        """Wait until all is done."""
        self._worker.shutdown()


@pytest.fixture(scope="session")
def fresh_databases(server: Server) -> Iterator[_Databases]:
    """Databases on the shared server."""
    databases = _Databases(server)
    yield databases
    databases.close()


@pytest.fixture
def dsn(fresh_databases: _Databases, server: Server) -> Iterator[str]:
    """The connection string of a fresh database."""
    name = fresh_databases.take()
    yield server.conninfo_for(dbname=name)
    fresh_databases.give_back(name)


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


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    """A server that is not there, for tests of what a pool does around its connections."""
    server = FakeServer()
    yield server
    server.accept()  # those who hang


@pytest.fixture
def make_pool() -> Iterator[MakePool]:
    """Make pools of a server, a fake one, or what a connection string names.

    After the test nothing of them is lost, they close in time, and nothing stays behind on the
    server.
    """
    made: list[tuple[Pool[Any], Server | None]] = []

    def make(where: Any = "", *, server: Server | None = None, **options: Any) -> Pool[Any]:
        if isinstance(where, FakeServer):
            pool = where.pool(**options)
        elif isinstance(where, Server):
            server = server or where
            pool = Pool(where.conninfo, **options)
        else:
            pool = Pool(where, **options)
        made.append((pool, server))
        return pool

    yield make
    for pool, server in made:
        if server:
            server.thaw()
        assert_whole(pool)
        assert_closes(pool)
    for pool, server in made:
        if server and server.is_running():
            name = f"dbpool:{pool.name}"
            until(lambda server=server, name=name: not server.backends(name))  # type: ignore[misc]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What is logged, from INFO on."""
    caplog.set_level(logging.INFO, logger="dbpool")
    return caplog


@pytest.fixture
def make_app(request: pytest.FixtureRequest) -> MakeApp:
    """Make applications on a connection string or on the fake server; their pools are closed."""

    def make(
        database: str | FakeServer,
        authorize: Any = None,
        db: DBPool | None = None,
        app: Flask | None = None,
        **config: Any,
    ) -> Flask:
        app = app or Flask("app")
        conninfo = database if isinstance(database, str) else database.conninfo
        app.config.update(TESTING=True, DATABASE_URL=conninfo, **config)
        (db or DBPool()).init_app(app)
        for pool in app.extensions["dbpool"].databases.values():
            if isinstance(database, FakeServer) and pool.settings.conninfo == conninfo:
                pool.connection_class = database.connection_class
        request.addfinalizer(app.extensions["dbpool"].databases.close)
        request.addfinalizer(app.extensions["dbpool"].processes.close)
        app.register_blueprint(create_blueprint(authorize=authorize), url_prefix="/db")
        return app

    return make


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
