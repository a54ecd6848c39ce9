"""Other connection classes: generics, subclasses, and connections patched by tracers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, Generic, TypeVar

import psycopg
import pytest
from psycopg import Connection, Cursor
from psycopg.adapt import Dumper, Loader
from psycopg.rows import DictRow, Row, dict_row
from psycopg.types.json import set_json_loads

from dbpool import Pool

T = TypeVar("T")

SELECT = "select 1 as n"


class UserConnection(Connection[Row]):
    """A user's generic class."""


class UserDictConnection(UserConnection[DictRow]):
    """A user's class with the row type given."""


class CommitCounter(Connection[Row]):
    """Counts the calls of `commit`."""

    commits = 0

    def commit(self) -> None:
        type(self).commits += 1
        super().commit()


class Unrelated(Generic[T]):
    pass


class TwoParameters(Unrelated[T], UserConnection[Row]):
    """Generic in two parameters."""


@pytest.mark.parametrize(
    "cls",
    [
        Connection[DictRow],
        UserConnection[DictRow],
        UserDictConnection,
        UserConnection,
        TwoParameters[int, DictRow],
    ],
    ids=str,
)
@pytest.mark.parametrize("pipeline_begin", [False, True])
def test_a_generic_class_serves_like_any(dsn: str, cls: Any, pipeline_begin: bool) -> None:
    kwargs = {"row_factory": dict_row}
    with Pool(
        dsn, connection_class=cls, kwargs=kwargs, max_size=1, pipeline_begin=pipeline_begin
    ) as pool:
        with pool.connection() as conn:
            assert conn.execute(SELECT).fetchone() == {"n": 1}
            assert conn.execute("select %s::int as n", [2]).fetchone() == {"n": 2}
        assert pool.fetch_one(SELECT) == {"n": 1}
        assert pool.run(lambda conn: conn.execute(SELECT).fetchone()) == {"n": 1}
        assert pool.execute("select") == 1


def test_a_generic_class_may_override_commit(dsn: str) -> None:
    CommitCounter.commits = 0
    with Pool(dsn, connection_class=CommitCounter[DictRow], max_size=1) as pool:
        with pool.connection() as conn:
            conn.execute(SELECT)
        assert CommitCounter.commits == 1
        pool.fetch_one(SELECT)
        assert CommitCounter.commits == 2


# What tracers do, in small: wrap the connection, set another cursor class, or replace psycopg's
# methods.


class Wrapper:
    """Like wrapt's ObjectProxy: it poses as the wrapped object, and keeps its own names apart."""

    def __init__(self, wrapped: Any, seen: list[str]) -> None:
        object.__setattr__(self, "_self_wrapped", wrapped)
        object.__setattr__(self, "_self_seen", seen)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._self_wrapped)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_self_wrapped"), name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._self_wrapped, name, value)


class TracedCursor(Wrapper):
    def execute(self, query: str, *args: Any, **kwargs: Any) -> Any:
        self._self_seen.append(query)
        self._self_wrapped.execute(query, *args, **kwargs)
        return self


class TracedConnection(Wrapper):
    def __enter__(self) -> Any:
        self._self_wrapped.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._self_wrapped.__exit__(*exc)

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        return TracedCursor(self._self_wrapped.cursor(*args, **kwargs), self._self_seen)

    def execute(self, query: str, *args: Any, **kwargs: Any) -> Any:
        return self.cursor().execute(query, *args, **kwargs)

    def commit(self) -> None:
        self._self_seen.append("commit")
        self._self_wrapped.commit()


@pytest.fixture
def seen() -> list[str]:
    return []


def by_wrapper(patch: pytest.MonkeyPatch, seen: list[str]) -> None:
    connect = Connection.connect
    patch.setattr(
        Connection,
        "connect",
        lambda *args, **kwargs: TracedConnection(connect(*args, **kwargs), seen),
    )


def by_cursor_class(patch: pytest.MonkeyPatch, seen: list[str]) -> None:
    connect = Connection.connect

    def traced(*args: Any, cursor_factory: type[Cursor[Any]] = Cursor, **kwargs: Any) -> Any:
        class Traced(cursor_factory):  # type: ignore[misc, valid-type]
            def execute(self, query: Any, *args: Any, **kwargs: Any) -> Any:
                seen.append(query)
                return super().execute(query, *args, **kwargs)

        return connect(*args, cursor_factory=Traced, **kwargs)

    patch.setattr(Connection, "connect", traced)


def by_method(patch: pytest.MonkeyPatch, seen: list[str]) -> None:
    execute = Cursor.execute

    def traced(self: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(query)
        return execute(self, query, *args, **kwargs)

    patch.setattr(Cursor, "execute", traced)


def by_cursor_method(patch: pytest.MonkeyPatch, seen: list[str]) -> None:
    cursor = Connection.cursor

    def traced(self: Any, *args: Any, **kwargs: Any) -> Any:
        return TracedCursor(cursor(self, *args, **kwargs), seen)

    patch.setattr(Connection, "cursor", traced)


Trace = Callable[[pytest.MonkeyPatch, list[str]], None]
TRACES = [by_wrapper, by_cursor_class, by_method, by_cursor_method]


@pytest.fixture(params=TRACES)
def traced(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, seen: list[str]
) -> Iterator[list[str]]:
    trace: Trace = request.param
    trace(monkeypatch, seen)
    return seen  # type: ignore[return-value]


@pytest.mark.parametrize("pipeline_begin", [False, True])
@pytest.mark.parametrize("as_generic", [False, True])
def test_a_tracer_sees_every_statement(
    dsn: str, traced: list[str], pipeline_begin: bool, as_generic: bool
) -> None:
    cls: Any = Connection[DictRow] if as_generic else Connection
    with Pool(dsn, max_size=1, pipeline_begin=pipeline_begin, connection_class=cls) as pool:
        for number in range(2):
            pool.execute(f"select {number}")
            pool.fetch_all(f"select {number}, 'all'")
            pool.fetch_one(f"select {number}, 'one'")
            assert pool.fetch_value(f"select {number} + %s", [1]) == number + 1
            with pool.connection() as conn:
                conn.execute(f"select {number}, 'block'")
            pool.run(lambda conn, n=number: conn.execute(f"select {n}, 'run'"))
    expected = [
        f"select {number}{rest}"
        for number in range(2)
        for rest in ("", ", 'all'", ", 'one'", " + %s", ", 'block'", ", 'run'")
    ]
    assert [query for query in traced if str(query).startswith("select")] == expected


def test_closing_a_wrapped_connection_returns_it(
    dsn: str, monkeypatch: pytest.MonkeyPatch, seen: list[str]
) -> None:
    by_wrapper(monkeypatch, seen)
    with Pool(dsn, max_size=1, close_returns=True) as pool:
        for _ in range(3):
            conn = pool.getconn()
            assert type(conn).__name__ == "TracedConnection"
            conn.execute(SELECT)
            conn.close()
            del conn
        assert pool.execute("vacuum") == -1  # in autocommit, as without a tracer
        assert pool.stats().counters.connects == 1
        assert (pool.stats().size, pool.stats().idle) == (1, 1)


class WrappedMethod(Wrapper):
    """Like wrapt's FunctionWrapper, with which most tracers replace methods."""

    def __get__(self, conn: Any, cls: type) -> Any:
        return WrappedMethod(self._self_wrapped.__get__(conn, cls), self._self_seen)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._self_seen.append(self._self_wrapped.__name__)
        return self._self_wrapped(*args, **kwargs)


def by_function(method: Any, seen: list[str]) -> Any:
    @wraps(method)
    def traced(*args: Any, **kwargs: Any) -> Any:
        seen.append(method.__name__)
        return method(*args, **kwargs)

    return traced


@pytest.mark.parametrize("wrap", [by_function, WrappedMethod])
@pytest.mark.parametrize("name", ["commit", "__enter__", "__exit__", "cursor"])
def test_a_replaced_method_is_called(
    dsn: str, monkeypatch: pytest.MonkeyPatch, seen: list[str], name: str, wrap: Any
) -> None:
    monkeypatch.setattr(Connection, name, wrap(vars(Connection)[name], seen))
    with Pool(dsn, max_size=1) as pool:
        with pool.connection() as conn:
            conn.execute(SELECT)
        assert name in seen
        seen.clear()
        pool.fetch_one(SELECT)
        assert name in seen


def test_pipeline_begin_works_with_a_tracers_cursor_class(
    dsn: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    by_cursor_class(monkeypatch, [])
    with Pool(dsn, max_size=1, pipeline_begin=True) as pool, pool.connection() as conn:
        assert any(cls.__name__ == "PipeliningCursor" for cls in conn.cursor_factory.__mro__)
        assert conn.execute("select %s::int", [1]).fetchone() == (1,)
    assert "pipeline_begin" not in caplog.text


@pytest.mark.parametrize("cls", [Connection, CommitCounter])
def test_pipeline_begin_without_effect_logs_one_line(
    dsn: str, cls: Any, caplog: pytest.LogCaptureFixture
) -> None:
    kwargs = {"cursor_factory": psycopg.ClientCursor}
    with Pool(dsn, min_size=2, connection_class=cls, pipeline_begin=True, kwargs=kwargs) as pool:
        pool.wait()
        pool.fetch_one(SELECT)
    assert caplog.text.count("pipeline_begin has no effect") == 1


# Handlers and adapters of one holder are removed before the next.


class SetDumper(Dumper):
    def dump(self, obj: Any) -> bytes:
        return ",".join(obj).encode()


class FixedLoader(Loader):
    def load(self, data: Any) -> str:
        return "loud"


def change_dumpers(conn: Connection[Any]) -> None:
    conn.adapters.register_dumper(set, SetDumper)


def change_loaders(conn: Connection[Any]) -> None:
    conn.adapters.register_loader("int4", FixedLoader)


def change_types(conn: Connection[Any]) -> None:
    conn.adapters.types.add(psycopg.types.TypeInfo("mine", 99_999, 99_998))


def change_json(conn: Connection[Any]) -> None:
    set_json_loads(lambda text: "loaded", conn)


def observed(conn: Connection[Any]) -> tuple[Any, ...]:
    """What a holder can observe of handlers and adapters."""

    def dump() -> object:
        try:
            return conn.execute("select %s::text", [{"a"}]).fetchone()
        except psycopg.ProgrammingError:
            return None

    return (
        dump(),
        conn.execute("select 1::int4, '{}'::json").fetchone(),
        "mine" in {info.name for info in conn.adapters.types},
    )


CHANGES = [change_dumpers, change_loaders, change_types, change_json]


@pytest.mark.parametrize("holders", [1, 2], ids=["once", "again by the next"])
@pytest.mark.parametrize("first", [None, *CHANGES])
@pytest.mark.parametrize("change", CHANGES)
def test_an_adapter_of_one_holder_is_gone_for_the_next(
    dsn: str, change: Callable[[Any], None], first: Callable[[Any], None] | None, holders: int
) -> None:
    with Pool(dsn, max_size=1, configure=first) as pool:
        with pool.connection() as conn:
            before = observed(conn)
        for _ in range(holders):
            with pool.connection() as conn:
                change(conn)
                if change is not first:
                    assert observed(conn) != before
        with pool.connection() as conn:
            assert observed(conn) == before
        assert pool.stats().counters.connects == 1


@pytest.mark.parametrize("by_configure", [0, 1])
def test_handlers_of_one_holder_are_gone_for_the_next(dsn: str, by_configure: int) -> None:
    received: list[str] = []

    def add(conn: Connection[Any]) -> None:
        conn.add_notice_handler(lambda notice: received.append("notice"))
        conn.add_notify_handler(lambda notify: received.append("notify"))

    def trigger(conn: Connection[Any]) -> list[str]:
        received.clear()
        conn.autocommit = True
        conn.execute("do $$ begin raise notice 'x'; end $$")
        conn.execute("listen x")
        conn.execute("notify x")
        return list(received)

    with Pool(dsn, max_size=1, configure=add if by_configure else None) as pool:
        for _ in range(3):  # as SQLAlchemy does for each connection it is given
            with pool.connection() as conn:
                add(conn)
                assert trigger(conn) == ["notice"] * (1 + by_configure) + ["notify"] * (
                    1 + by_configure
                )
        with pool.connection() as conn:
            assert trigger(conn) == ["notice"] * by_configure + ["notify"] * by_configure
        assert pool.stats().counters.connects == 1
