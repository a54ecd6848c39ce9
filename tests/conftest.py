"""Fixtures: real servers, fresh databases, and an environment without the shell's settings."""

from __future__ import annotations

import faulthandler
import gc
import itertools
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Generic, TypeVar

import hypothesis
import pytest
from flask import Flask
from pytest_postgresql.janitor import DatabaseJanitor

from dbpool import Pool
from dbpool.flask import DBPool, create_blueprint

from .fake import FakeServer
from .gunicorn_site import Site
from .pools import MakePool, assert_closes, assert_whole
from .postgres import Server, copy, until
from .proxy import Proxy

# pytest captures the tests' standard error; the hard deadline reports to this copy.
_terminal = os.dup(2)

# The shell's settings must not reach the tests or the tools that start servers for them.
for _name in [n for n in os.environ if n.startswith(("PG", "DBPOOL_", "DATABASE_URL"))]:
    del os.environ[_name]

# Shells start background jobs with SIGINT ignored, and all processes of the tests inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("default", deadline=None)  # machines stall

MakeApp = Callable[..., Flask]
T = TypeVar("T")

HARD_DEADLINE = 120.0  # seconds; a test that hangs ends the run with every thread's stack
SLOW_DEADLINE = 900.0


def pytest_collection_finish() -> None:
    """Exclude imported modules and collected tests from garbage collections: they cost 100 ms."""
    gc.collect()
    gc.freeze()


class Prefetcher(Generic[T]):
    """Makes the next object while the last is in use, and removes that while the next is in use.

    Both take longer than many tests.
    """

    def __init__(self, make: Callable[[], T], clear: Callable[[T], object]) -> None:
        self._make, self._clear = make, clear
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._next = self._worker.submit(make)

    def get(self) -> T:
        """Return an object for the caller's own use."""
        made = self._next.result(60)
        self._next = self._worker.submit(self._make)
        return made

    def remove(self, made: T) -> None:
        """Remove the object in the background."""
        self._worker.submit(self._clear, made)

    def close(self) -> None:
        """Remove objects that were not taken, and wait until all is done."""
        self.remove(self._next.result(60))
        self._worker.shutdown()


@pytest.fixture(scope="session")
def template() -> Iterator[Prefetcher[Path]]:
    """Directories with a copy of one data directory, much quicker than initdb."""
    server = Server()
    copies = Prefetcher(lambda: copy(server.data), shutil.rmtree)
    yield copies
    copies.close()
    server.close()


@pytest.fixture(scope="session")
def server(template: Prefetcher[Path]) -> Iterator[Server]:
    """The shared server, for tests that do not harm it."""
    with closing(Server(template.get())) as server:
        server.start()
        yield server


@pytest.fixture(scope="session")
def fresh_databases(server: Server) -> Iterator[Prefetcher[DatabaseJanitor]]:
    """Databases on the shared server."""
    numbers = itertools.count()

    def make() -> DatabaseJanitor:
        name = f"tests{next(numbers)}"
        janitor = DatabaseJanitor(user="postgres", host="127.0.0.1", port=server.port, dbname=name)
        janitor.init()
        return janitor

    with closing(Prefetcher(make, DatabaseJanitor.drop)) as databases:
        yield databases


@pytest.fixture
def dsn(fresh_databases: Prefetcher[DatabaseJanitor], server: Server) -> Iterator[str]:
    """The connection string of a fresh database."""
    database = fresh_databases.get()
    yield server.conninfo_for(dbname=database.dbname)
    fresh_databases.remove(database)


@pytest.fixture
def make_server(template: Prefetcher[Path]) -> Iterator[Callable[..., Server]]:
    """A function that starts a private server, options by keyword; removed after the test."""
    with ExitStack() as servers:

        def make(**options: object) -> Server:
            server = servers.enter_context(closing(Server(template.get(), **options)))
            server.start()
            return server

        yield make


@pytest.fixture
def own_server(make_server: Callable[..., Server]) -> Server:
    """A private server, which the test may harm."""
    return make_server()


@pytest.fixture
def proxy(own_server: Server) -> Iterator[Proxy]:
    """A proxy in front of the private server."""
    proxy = Proxy(own_server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    """A fake server, for tests of what a pool does around its connections."""
    server = FakeServer()
    yield server
    server.accept()  # releases hanging connects


@pytest.fixture
def make_pool() -> Iterator[MakePool]:
    """A function that makes pools on a server, a fake server, or a connection string.

    After the test it checks that no connection was lost, that they close in time, and that no
    backend is left.
    """
    made: list[tuple[Pool[Any], Server | None]] = []

    def make(target: Any = "", *, server: Server | None = None, **options: Any) -> Pool[Any]:
        if isinstance(target, FakeServer):
            pool = target.pool(**options)
        elif isinstance(target, Server):
            server = server or target
            pool = Pool(target.conninfo, **options)
        else:
            pool = Pool(target, **options)
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
    """The log, from level INFO."""
    caplog.set_level(logging.INFO, logger="dbpool")
    return caplog


@pytest.fixture
def make_app(request: pytest.FixtureRequest) -> MakeApp:
    """A function that makes applications on a connection string or the fake server."""

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


@pytest.fixture
def make_site(tmp_path: Path, dsn: str) -> Iterator[Callable[..., Site]]:
    """A function that starts gunicorn with an application and its pool; killed at the end."""
    sites: list[Site] = []

    def make(**options: Any) -> Site:
        sites.append(Site(tmp_path, dsn, **options))
        return sites[-1]

    yield make
    for site in sites:
        site.kill()


@pytest.fixture(autouse=True)
def hard_deadline(request: pytest.FixtureRequest) -> Iterator[None]:
    """End the whole run if a test hangs."""
    slow = request.node.get_closest_marker("slow")
    seconds = SLOW_DEADLINE if slow else HARD_DEADLINE
    faulthandler.dump_traceback_later(seconds, exit=True, file=_terminal)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def no_thread_left(hard_deadline: None) -> Iterator[None]:
    """Fail a test that leaves a pool's thread behind."""
    before = set(threading.enumerate())

    def remaining() -> list[str]:
        threads = set(threading.enumerate()) - before
        return sorted(thread.name for thread in threads)

    yield
    if remaining():
        gc.collect()  # a pool without references stops its threads
    try:
        until(lambda: not remaining(), 5.0)
    except AssertionError:
        pytest.fail(f"threads were left behind: {', '.join(remaining())}")
