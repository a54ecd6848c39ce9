"""Pools whose work is undone when a test ends.

A test's work goes over one connection, which is taken out of the pool for that time. A checkout
also takes a real connection, but returns a view of that one: so waiting, exhaustion and holders are
as usual. No protected members are used: the pool's public methods are replaced on the instance.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from operator import attrgetter, methodcaller
from types import TracebackType
from typing import Any, Final, Self

import psycopg
from psycopg.rows import tuple_row

from dbpool.pool import Pool
from dbpool.testing._session import RoundTrips, Session
from dbpool.testing._view import View

__all__ = ["Isolation"]

_THREAD: Final = "dbpool-testing"  # holds the connection of a test, by the name in `holders()`
_DOORS: Final = (
    "connection", "getconn", "putconn", "run", "fetch_all", "fetch_one", "fetch_value", "execute",
)  # fmt: skip


class _Block:
    """What `connection()` returns in a test."""

    def __init__(self, isolation: _Isolated, lease: Any) -> None:
        self._isolation, self._lease = isolation, lease
        self._view: Any = None

    def __enter__(self) -> Any:
        pooled = self._lease.__enter__()
        try:
            self._view = self._isolation.view(pooled)
        except BaseException:
            self._lease.__exit__(None, None, None)
            raise
        return self._view

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        try:
            self._view.end(commit=exc is None)
        finally:
            self._lease.__exit__(None, None, None)


class _Isolated:
    """One pool whose public methods use a test's session."""

    def __init__(self, pool: Pool[Any]) -> None:
        if "connection" in vars(pool):
            raise RuntimeError(f"pool {pool.name!r} is already isolated")
        self._pool = pool
        self._leaks = pool.stats().counters.leaks
        pool.resize(pool.min_size, pool.max_size + 1)
        try:
            self._main = _in_thread(pool.getconn)
        except BaseException:
            pool.resize(pool.min_size, pool.max_size - 1)
            raise
        self.session = Session(self._main, pool.timeout)
        self._class: Any = type("View", (View, type(self._main)), {})
        self._doors = {name: getattr(pool, name) for name in _DOORS}
        for name in _DOORS:
            setattr(pool, name, getattr(self, f"_{name}"))

    def view(self, pooled: Any, *, is_single: bool = False) -> Any:
        """Return a view for the holder of a pooled connection, and begin its transaction."""
        main = self._main
        view: Any = object.__new__(self._class)
        view._test, view._levels, view._is_single = self.session, [], is_single
        psycopg.Connection.__init__(view, main.pgconn, main.row_factory)
        view.lock = self.session.lock
        view.cursor_factory = main.cursor_factory
        view.server_cursor_factory = main.server_cursor_factory
        view.prepare_threshold = None  # views would give their statements the same names
        view._is_autocommit = main.autocommit
        view.pooled = pooled
        if not is_single:
            view._levels.append(self.session.begin())
        return view

    # The doors

    def _connection(self, timeout: float | None = None) -> _Block:
        return _Block(self, self._doors["connection"](timeout))

    def _getconn(self, timeout: float | None = None) -> Any:
        pooled = self._doors["getconn"](timeout)
        try:
            view = self.view(pooled)
        except BaseException:
            self._doors["putconn"](pooled)
            raise
        view.give_back = self._putconn
        return view

    def _putconn(self, conn: Any) -> None:
        if not isinstance(conn, View):
            self._doors["putconn"](conn)
        elif conn.pooled is not None:
            pooled, conn.pooled = conn.pooled, None
            conn.end(commit=False)
            self._doors["putconn"](pooled)

    def _run(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def work(pooled: Any, *args: Any) -> Any:
            view = self.view(pooled)
            try:
                with view.transaction():
                    return fn(view, *args)
            finally:
                view.end(commit=True)

        return self._doors["run"](work, *args, **kwargs)

    def _single(self, query: Any, params: Any, row_factory: Any, result: Callable[..., Any]) -> Any:
        with self._doors["connection"]() as pooled:
            view = self.view(pooled, is_single=True)
            cursor = view.cursor(row_factory=row_factory or view.row_factory)
            return result(cursor.execute(query, params))

    def _fetch_all(self, query: Any, params: Any = None, *, row_factory: Any = None) -> Any:
        return self._single(query, params, row_factory, methodcaller("fetchall"))

    def _fetch_one(self, query: Any, params: Any = None, *, row_factory: Any = None) -> Any:
        return self._single(query, params, row_factory, methodcaller("fetchone"))

    def _fetch_value(self, query: Any, params: Any = None) -> Any:
        row = self._single(query, params, tuple_row, methodcaller("fetchone"))
        return None if row is None else row[0]

    def _execute(self, query: Any, params: Any = None) -> Any:
        return self._single(query, params, None, attrgetter("rowcount"))

    # The end

    def close(self) -> list[str]:
        """Undo everything; return what is still held, or was forgotten."""
        pool = self._pool
        held = [each for each in pool.holders() if not each.thread.startswith(_THREAD)]
        leaks = pool.stats().counters.leaks - self._leaks
        for name in _DOORS:
            delattr(pool, name)
        self.session.close()
        pool.putconn(self._main)
        pool.resize(pool.min_size, pool.max_size - 1)
        problems = [
            f"pool {pool.name!r}: {each.thread} still holds a connection, checked out at {each.where}"
            for each in held
        ]
        if self.session.was_ended:
            problems.append(
                f"pool {pool.name!r}: a statement (COMMIT, ROLLBACK, a procedure) ended the"
                " transaction of the test: what was done before it may not have been undone"
            )
        if leaks:
            problems.append(f"pool {pool.name!r}: {leaks} connections were never returned")
        return problems


def _in_thread(fn: Callable[[], Any]) -> Any:
    """Call *fn* in a thread of its own, so that the test does not count as the holder."""
    found: list[Any] = []
    failed: list[BaseException] = []

    def call() -> None:
        try:
            found.append(fn())
        except BaseException as ex:  # noqa: BLE001  # raised below
            failed.append(ex)

    thread = threading.Thread(target=call, name=_THREAD)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


class Isolation:
    """A context manager that, at its end, undoes what was done with its pools.

    Takes pools, mappings of pools such as `Databases`, or both.
    """

    __module__ = "dbpool.testing"

    def __init__(self, *pools: Pool[Any] | Mapping[str, Pool[Any]]) -> None:
        self._isolated: list[_Isolated] = []
        try:
            for pool in _all(pools):
                self._isolated.append(_Isolated(pool))
        except BaseException:
            self.close(check=False)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close(check=exc is None)

    @contextmanager
    def round_trips(self, counter: RoundTrips | None = None) -> Iterator[RoundTrips]:
        """Count the round trips of all pools within a block, in *counter* if one is given."""
        counter = counter or RoundTrips()
        with ExitStack() as stack:
            for each in self._isolated:
                each.session.counters.add(counter)
                stack.callback(each.session.counters.discard, counter)
            yield counter

    def close(self, *, check: bool = True) -> None:
        """Undo everything. With *check*, raise `AssertionError` if connections are still held."""
        problems: list[str] = []
        while self._isolated:
            problems += self._isolated.pop().close()
        if check and problems:
            raise AssertionError("\n".join(problems))


def _all(pools: Iterable[Pool[Any] | Mapping[str, Pool[Any]]]) -> Iterator[Pool[Any]]:
    for each in pools:
        if isinstance(each, Mapping):
            yield from each.values()
        else:
            yield each
