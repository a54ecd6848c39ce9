"""The pools that are compared, each used the way its documentation shows."""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self

import psycopg
import sqlalchemy
from psycopg_pool import ConnectionPool

from dbpool import Pool


class Peer(ABC):
    """A pool of *size* connections at most, that waits *timeout* seconds or its default."""

    name: ClassVar[str]
    is_slow: ClassVar[bool] = False  # whether a restart costs it half a minute

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
        """Lend a connection."""

    def query(self, statement: str = "select 1") -> Any:
        """Run one statement and return its first value."""
        with self.connection() as conn:
            return conn.execute(statement).fetchone()[0]

    def hold(self, barrier: threading.Barrier) -> None:
        """Hold a connection until all others are held."""
        with self.connection() as conn:
            conn.execute("select 1")
            barrier.wait(30)

    def checkout(self) -> None:
        """Take a connection and give it back."""
        with self.connection():
            pass

    def age(self) -> None:  # noqa: B027  # most peers do not look at it
        """Make idle connections look as if they had been idle for long, where that matters."""

    def close(self) -> None:
        """Close."""
        self.pool.close()


class Dbpool(Peer):
    name = "dbpool"

    def _make(self, conninfo: str, size: int, timeout: float | None) -> Pool:
        options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        return Pool(conninfo, max_size=size, **options)

    def connection(self) -> AbstractContextManager[Any]:
        return self.pool.connection()  # type: ignore[no-any-return]

    def age(self) -> None:
        with self.pool._lock:
            for conn in self.pool._pool:
                conn._slot.idle_since -= 60.0
                conn._slot.fresh_until -= 60.0


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
    is_slow = True
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
