"""The pools that are compared, each used the way its documentation shows."""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from queue import SimpleQueue
from typing import Any, ClassVar, Self

import django.conf
import psycopg
import psycopg2.pool
import sqlalchemy
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import ConnectionPool

from dbpool import Pool

if not django.conf.settings.configured:
    django.conf.settings.configure(USE_TZ=False)

from django.db.backends.postgresql.base import DatabaseWrapper  # after configure()


class Peer(ABC):
    """A pool of *size* connections at most, that waits *timeout* seconds or its default."""

    name: ClassVar[str]

    def __init__(self, conninfo: str, size: int, timeout: float | None = None) -> None:
        self.pool = self._make(conninfo, size, timeout)

    @classmethod
    @contextlib.contextmanager
    def opened(cls, conninfo: str, size: int, timeout: float | None = None) -> Iterator[Self]:
        """Make it, and close it at the end."""
        peer = cls(conninfo, size, timeout)
        try:
            yield peer
        finally:
            peer.close()

    @abstractmethod
    def _make(self, conninfo: str, size: int, timeout: float | None) -> Any: ...

    @abstractmethod
    def connection(self) -> AbstractContextManager[Any]:
        """Check out a connection, for a `with` statement."""

    def query(self, statement: str = "select 1") -> Any:
        """Run one statement and return its first value."""
        with self.connection() as conn:
            return conn.execute(statement).fetchone()[0]

    def hold(self, barrier: threading.Barrier) -> None:
        """Hold a connection until all others are held."""
        with self.connection() as conn:
            conn.execute("select 1")
            barrier.wait(30)

    def fill(self, size: int) -> None:
        """Open that many connections."""
        barrier = threading.Barrier(size)
        with ThreadPoolExecutor(size) as threads:
            list(threads.map(lambda _: self.hold(barrier), range(size)))

    def checkout(self) -> None:
        """Check out a connection and return it."""
        with self.connection():
            pass

    def age(self) -> None:  # noqa: B027  # most peers have no such check
        """Make idle connections look as if they had been idle for long, where that matters."""

    def close(self) -> None:
        """Close."""
        self.pool.close()


class Dbpool(Peer):
    name = "dbpool"
    pipeline_begin: ClassVar[bool] = False

    def _make(self, conninfo: str, size: int, timeout: float | None) -> Pool:
        options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        return Pool(conninfo, max_size=size, pipeline_begin=self.pipeline_begin, **options)

    def connection(self) -> AbstractContextManager[Any]:
        return self.pool.connection()  # type: ignore[no-any-return]

    def age(self) -> None:
        with self.pool._lock:
            for conn in self.pool._store.bag.idle:
                conn._record.idle_since -= 60.0


class DbpoolPipelining(Dbpool):
    name = "dbpool, pipeline_begin"
    pipeline_begin = True


class PsycopgPool(Peer):
    name = "psycopg_pool"
    check: ClassVar[Any] = None

    def _make(self, conninfo: str, size: int, timeout: float | None) -> ConnectionPool:
        options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        return ConnectionPool(
            conninfo, min_size=1, max_size=size, open=True, check=self.check, **options
        )

    def connection(self) -> AbstractContextManager[Any]:
        return self.pool.connection()  # type: ignore[no-any-return]


class PsycopgPoolChecked(PsycopgPool):
    name = "psycopg_pool, check"
    check = staticmethod(ConnectionPool.check_connection)


class SQLAlchemy(Peer):
    name = "SQLAlchemy, pre_ping"

    def _make(self, conninfo: str, size: int, timeout: float | None) -> Any:
        return sqlalchemy.create_engine(
            "postgresql+psycopg://",
            creator=lambda: psycopg.connect(conninfo),
            pool_size=size,
            max_overflow=0,
            pool_timeout=30.0 if timeout is None else timeout,
            pool_pre_ping=True,
        )

    @contextlib.contextmanager
    def connection(self) -> Iterator[Any]:
        with self.pool.begin() as conn:
            yield _Driver(conn)

    def close(self) -> None:
        self.pool.dispose()


class _Driver:
    """Lets a SQLAlchemy connection run a plain statement like psycopg's."""

    def __init__(self, conn: Any) -> None:
        self._conn = conn

    def execute(self, statement: str) -> Any:
        return self._conn.exec_driver_sql(statement)


PEERS: list[type[Peer]] = [Dbpool, PsycopgPool, PsycopgPoolChecked, SQLAlchemy]


class Floor(Peer):
    """No pool, but connections in a queue written in C: the least that lending them can cost."""

    name = "a bare queue"

    def _make(self, conninfo: str, size: int, timeout: float | None) -> Any:
        connections: SimpleQueue[psycopg.Connection[Any]] = SimpleQueue()
        for _ in range(size):
            connections.put(psycopg.connect(conninfo))
        return connections

    @contextlib.contextmanager
    def connection(self) -> Iterator[Any]:
        conn = self.pool.get()
        try:
            yield conn
            conn.commit()
        finally:
            self.pool.put(conn)

    def close(self) -> None:
        while not self.pool.empty():
            self.pool.get().close()


class QueuePool(SQLAlchemy):
    """SQLAlchemy's pool by itself, without the engine and without a ping."""

    name = "SQLAlchemy QueuePool"

    def _make(self, conninfo: str, size: int, timeout: float | None) -> Any:
        return sqlalchemy.QueuePool(
            lambda: psycopg.connect(conninfo),
            pool_size=size,
            max_overflow=0,
            timeout=30.0 if timeout is None else timeout,
        )

    @contextlib.contextmanager
    def connection(self) -> Iterator[Any]:
        conn = self.pool.connect()
        try:
            yield _Cursors(conn)
            conn.commit()
        finally:
            conn.close()


class Psycopg2(Peer):
    """psycopg2's pool, which neither waits nor checks connections."""

    name = "psycopg2 ThreadedConnectionPool"

    def _make(self, conninfo: str, size: int, timeout: float | None) -> Any:
        return psycopg2.pool.ThreadedConnectionPool(1, size, conninfo)

    @contextlib.contextmanager
    def connection(self) -> Iterator[Any]:
        conn = self.pool.getconn()
        try:
            with conn:
                yield _Cursors(conn)
        finally:
            self.pool.putconn(conn)

    def close(self) -> None:
        self.pool.closeall()


class _Cursors:
    """Lets a DB-API connection run a statement like psycopg's."""

    def __init__(self, conn: Any) -> None:
        self._conn = conn

    def execute(self, statement: str) -> Any:
        cursor = self._conn.cursor()
        cursor.execute(statement)
        return cursor


class Django(Peer):
    """Django's connection with its pool option, closed at the end of each request."""

    name = "Django pool"

    def _make(self, conninfo: str, size: int, timeout: float | None) -> Any:
        params = conninfo_to_dict(conninfo)
        return DatabaseWrapper(
            {
                "ENGINE": "django.db.backends.postgresql",
                "NAME": params["dbname"],
                "USER": params["user"],
                "PASSWORD": "",
                "HOST": params["host"],
                "PORT": params["port"],
                "OPTIONS": {"pool": {"min_size": 1, "max_size": size}},
                "TIME_ZONE": None,
                "CONN_MAX_AGE": 0,
                "CONN_HEALTH_CHECKS": False,
                "AUTOCOMMIT": True,
                "ATOMIC_REQUESTS": False,
            },
            alias=f"bench{id(self)}",
        )

    @contextlib.contextmanager
    def connection(self) -> Iterator[Any]:
        self.pool.ensure_connection()
        try:
            yield _Cursors(self.pool)
        finally:
            self.pool.close()

    def fill(self, size: int) -> None:
        with self.connection():
            self.pool.pool.resize(size, size)
            self.pool.pool.wait()

    def close(self) -> None:
        self.pool.close_pool()


ALL_PEERS: list[type[Peer]] = [*PEERS, QueuePool, Psycopg2, Django]
