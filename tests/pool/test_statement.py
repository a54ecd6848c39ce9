"""One statement in one round trip: `fetch_all`, `fetch_one`, `fetch_value`, `execute`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import Connection
from psycopg.rows import dict_row, tuple_row
from psycopg.types.string import TextLoader

from dbpool import Pool


class UppercaseCursor(psycopg.Cursor[Any]):
    """A cursor class with its own idea of a result."""

    def fetchone(self) -> Any:
        row: Any = super().fetchone()
        return (row[0].upper(),)

    def fetchall(self) -> list[Any]:
        return [(text.upper(),) for (text,) in super().fetchall()]


def test_fetches_use_the_connections_cursor_class(dsn: str) -> None:
    with Pool(dsn, kwargs={"cursor_factory": UppercaseCursor}) as pool:
        assert pool.fetch_value("select 'a'") == "A"
        assert pool.fetch_one("select 'a'") == ("A",)
        assert pool.fetch_all("select 'a'") == [("A",)]


def test_fetch_all_fetch_one_and_fetch_value(server_pool: Pool) -> None:
    assert server_pool.fetch_all("select * from generate_series(1, %s) as n", [3]) == [
        (1,),
        (2,),
        (3,),
    ]
    assert server_pool.fetch_one("select 1 as a, 2 as b", row_factory=dict_row) == {"a": 1, "b": 2}
    assert server_pool.fetch_one("select 1 where false") is None
    assert server_pool.fetch_value("select %(x)s::text", {"x": "y"}) == "y"
    assert server_pool.fetch_value("select 1 where false") is None
    server_pool.execute("create table t (id int)")
    assert server_pool.execute("insert into t select generate_series(1, 5)") == 5
    assert server_pool.fetch_value("select count(*) from t") == 5


def test_a_single_statement_takes_one_round_trip(dsn: str, tmp_path: Path) -> None:
    with Pool(dsn, max_size=1) as pool, (tmp_path / "trace").open("w+") as trace:
        with pool.connection() as conn:
            conn.pgconn.trace(trace.fileno())
        assert pool.fetch_value("select %s::int", [1]) == 1
        conn.pgconn.untrace()
        trace.seek(0)
        answers = [line for line in trace if "ReadyForQuery" in line]
        assert len(answers) == 1


def test_a_single_statement_leaves_nothing_behind(dsn: str) -> None:
    with Pool(dsn, max_size=1) as pool:
        row = pool.fetch_one("select %s::text as a", ["secret"], row_factory=dict_row)
        assert row == {"a": "secret"}
        with pytest.raises(psycopg.errors.DivisionByZero):
            pool.fetch_value("select 1/%s", [0])
        cursor = pool._store.bag.idle[0]._record.cursor
        names = ("_conn", "_pgconn", "_tx", "_query", "_last_query", "_results", "pgresult")
        assert {name: getattr(cursor, name) for name in names} == dict.fromkeys(names)
        assert pool.fetch_value("select 2") == 2
        assert pool._store.bag.idle[0]._record.cursor is cursor


def test_a_users_row_factory_gets_a_cursor_of_its_own(dsn: str) -> None:
    seen: list[psycopg.Cursor[Any]] = []

    def spy(cursor: psycopg.Cursor[Any]) -> Any:
        seen.append(cursor)
        return tuple_row(cursor)

    with Pool(dsn, max_size=1) as pool:
        pool.fetch_one("select 1")
        pool.fetch_one("select 2", row_factory=spy)
        assert pool.fetch_one("select 3") == (3,)
    assert seen[0].fetchone() is None
    assert isinstance(seen[0], psycopg.Cursor)
    assert seen[0].connection is not None  # the cached cursor has none between statements


class UppercaseLoader(TextLoader):
    def load(self, data: Any) -> str:
        return str(super().load(data)).upper()


@pytest.mark.parametrize(("name", "expected"), [("check", "aAa"), ("reset", "aaa")])
def test_adapters_of_a_check_stay_until_the_return_those_of_a_reset_are_removed(
    dsn: str, name: str, expected: str
) -> None:
    calls: list[Connection[Any]] = []

    def callback(conn: Connection[Any]) -> None:
        if len(calls) == 1:
            conn.adapters.register_loader("text", UppercaseLoader)
        calls.append(conn)

    options: Any = {name: callback}
    with Pool(dsn, max_size=1, **options) as pool:
        seen = [pool.fetch_value("select 'a'::text") for _ in range(3)]
    assert "".join(seen) == expected


def test_a_connection_is_kept_after_a_failed_statement(server_pool: Pool) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        server_pool.fetch_one("select 1/0")
    with pytest.raises(psycopg.errors.UndefinedTable):
        server_pool.execute("insert into nowhere values (1)")
    assert server_pool.fetch_value("select 1") == 1
    assert server_pool.stats().counters.connects == 1


def test_a_statement_uses_what_configure_set(dsn: str) -> None:
    def configure(conn: Connection[Any]) -> None:
        conn.read_only = True

    with Pool(dsn, configure=configure) as pool:
        assert pool.fetch_value("show transaction_read_only") == "on"
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            pool.execute("create table t (id int)")
