"""A prepared statement that the server rejects, as after a schema change, fails at most once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from psycopg.errors import FeatureNotSupported, InvalidSqlStatementName
from psycopg.rows import class_row, dict_row

from dbpool import Pool

SELECT = "select * from t where id = %s"


class Row:
    def __init__(self, **values: Any) -> None:
        self.values = values


@pytest.fixture
def other(dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """Another client, which changes the schema."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("create table t (id int primary key, a int)")
        conn.execute("insert into t values (1, 10), (2, 20)")
        conn.execute("create schema other create table t (id text, a int)")
        yield conn


CHANGES = {
    "add": "alter table t add column b int",
    "drop": "alter table t drop column a",
    "type": "alter table t alter column a type text",
    "again": "begin; drop table t; create table t (x int, id int); insert into t values (9, 1); commit",
}

CALLS: dict[str, Callable[[Pool[Any]], Any]] = {
    "fetch_all": lambda pool: pool.fetch_all(SELECT, [1]),
    "fetch_one": lambda pool: pool.fetch_one(SELECT, [1]),
    "fetch_one dict": lambda pool: pool.fetch_one(SELECT, [1], row_factory=dict_row),
    "fetch_one class": lambda pool: pool.fetch_one(SELECT, [1], row_factory=class_row(Row)),
    "fetch_value": lambda pool: pool.fetch_value(SELECT, [1]),
    "execute": lambda pool: pool.execute(SELECT, [1]),
}


@pytest.mark.parametrize("pipeline_begin", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", CALLS)
def test_a_single_statement_does_not_fail(
    dsn: str, other: psycopg.Connection[Any], name: str, change: str, pipeline_begin: bool
) -> None:
    call = CALLS[name]
    with Pool(dsn, max_size=1, pipeline_begin=pipeline_begin) as pool:
        for _ in range(8):
            call(pool)
        other.execute(CHANGES[change])
        for _ in range(8):
            assert call(pool)
        assert pool.fetch_one(SELECT, [1]) == other.execute(SELECT, [1]).fetchone()
        assert pool.stats().counters.connects == 1


def test_a_write_is_done_once(dsn: str, other: psycopg.Connection[Any]) -> None:
    query = "insert into t (id) values (%s) returning *"
    with Pool(dsn, max_size=1) as pool:
        for number in range(10, 18):
            pool.fetch_one(query, [number])
        other.execute("alter table t add column b int default 5")
        for number in range(18, 26):
            assert pool.fetch_one(query, [number]) == (number, None, 5)
    assert other.execute("select count(*) from t").fetchone() == (18,)


def test_a_changed_search_path_is_handled_too(dsn: str, other: psycopg.Connection[Any]) -> None:
    with Pool(dsn, max_size=1) as pool:
        for _ in range(8):
            assert pool.fetch_one("select * from t where a = %s", [10]) == (1, 10)
        pool.execute("set search_path = other")
        assert pool.fetch_one("select * from t where a = %s", [10]) is None


NEW_ENUM = (
    "alter type mood rename to old; create type mood as enum ('sad', 'glad');"
    "alter table m alter m type mood using m::text::mood"
)
# A plan keeps the type that its first analysis gave to a parameter that was sent as text.
# The setup, a statement with its parameters, the change, and parameters that are right from then on.
PARAMETERS: dict[str, tuple[str, str, list[Any], str, list[Any]]] = {
    "column": ("", "select a from t where id = %s", ["1"], "alter table t alter id type text", ["1"]),
    "value": ("", "select a from t where id = %s", ["1"], "alter table t alter id type text", ["x"]),
    "lines": ("", "select a from t where id = %s", ["1"], "alter table t alter id type text", ["\n'("]),
    "array": ("", "select a from t where id = any(%s)", [["1"]], "alter table t alter id type text", [["1"]]),
    "assignment": ("", "update t set a = %s returning id", ["1"], "alter table t alter a type jsonb using to_json(a)", ["{}"]),
    "enum": (
        "create type mood as enum ('sad'); create table m (m mood); insert into m values ('sad')",
        "select 1 from m where m = %s", ["sad"],
        f"{NEW_ENUM}; drop type old", ["glad"],
    ),
    "enum kept": (
        "create type mood as enum ('sad'); create table m (m mood); insert into m values ('sad')",
        "select 1 from m where m = %s", ["sad"],
        NEW_ENUM, ["sad"],
    ),
    "domain": (
        "create domain short as text check (value < 'x'); create table m (m short)",
        "insert into m values (%s) returning *", ["a"],
        "alter table m alter m type text", ["z"],
    ),
    "composite": (
        "create type pair as (a int, b int)", "select (%s, 2)::pair", [1],
        "drop type pair; create type pair as (a int, b int)", [1],
    ),
    "function": (
        "create function f(n int) returns int return n", "select f(%s)", ["1"],
        "drop function f; create function f(n text) returns text return n", ["x"],
    ),
    "table": (
        "", "select * from t where id = %s", ["1"],
        "alter table t rename to gone; alter table other.t set schema public", ["1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_single_statement_does_not_fail_although_a_parameters_type_has_changed(
    dsn: str, other: psycopg.Connection[Any], name: str
) -> None:
    setup, query, before, change, after = PARAMETERS[name]
    other.execute(setup)
    with Pool(dsn, max_size=1) as pool:
        for _ in range(8):
            pool.fetch_all(query, before)
        other.execute(change)
        expected = other.execute(query, after).fetchall()
        for _ in range(8):
            assert pool.fetch_all(query, after) == expected
        assert pool.stats().counters.connects == 1


@pytest.mark.parametrize("name", PARAMETERS)
def test_in_an_autocommit_block_a_parameter_whose_type_has_changed_fails_once(
    dsn: str, other: psycopg.Connection[Any], name: str
) -> None:
    setup, query, before, change, after = PARAMETERS[name]
    other.execute(setup)
    with Pool(dsn, max_size=1, kwargs={"autocommit": True}) as pool:

        def call(params: list[Any]) -> list[Any]:
            with pool.connection() as conn:
                return conn.execute(query, params).fetchall()

        for _ in range(8):
            call(before)
        other.execute(change)
        with pytest.raises(psycopg.Error):
            call(after)
        expected = other.execute(query, after).fetchall()
        for _ in range(8):
            assert call(after) == expected


def test_a_value_that_never_was_right_fails(dsn: str, other: psycopg.Connection[Any]) -> None:
    with Pool(dsn, max_size=1) as pool:
        for _ in range(8):
            pool.fetch_one(SELECT, ["1"])
        for _ in range(8):
            with pytest.raises(psycopg.errors.InvalidTextRepresentation):
                pool.fetch_one(SELECT, ["x"])
        assert pool.fetch_one(SELECT, ["1"]) == (1, 10)


def prepared(pool: Pool[Any]) -> list[Any]:
    """The prepared statements of the pool's only connection."""
    return pool.fetch_all("select name from pg_prepared_statements where statement like '%% t %%'")


def in_autocommit(pool: Pool[Any], query: str) -> Any:
    return pool.fetch_one(query)


def in_block(pool: Pool[Any], query: str = SELECT) -> Any:
    params = [1] if query == SELECT else None
    with pool.connection() as conn:
        return conn.execute(query, params).fetchone()


def in_pipeline(pool: Pool[Any]) -> Any:
    with pool.connection() as conn, conn.pipeline():
        return conn.execute(SELECT, [1]).fetchone()


def in_run(pool: Pool[Any], query: str = SELECT) -> Any:
    params = [1] if query == SELECT else None
    return pool.run(lambda conn: conn.execute(query, params).fetchone())


@pytest.mark.parametrize("autocommit", [False, True])
@pytest.mark.parametrize("call", [in_block, in_pipeline, in_run])
def test_a_statement_in_a_block_fails_once(
    dsn: str, other: psycopg.Connection[Any], call: Callable[[Pool[Any]], Any], autocommit: bool
) -> None:
    with Pool(dsn, max_size=1, kwargs={"autocommit": autocommit}) as pool:
        for _ in range(8):
            call(pool)
        assert prepared(pool)
        other.execute(CHANGES["add"])
        with pytest.raises(FeatureNotSupported):
            call(pool)
        for _ in range(8):
            assert call(pool) == (1, 10, None)


def test_in_a_transaction_a_single_statement_fails_once(
    dsn: str, other: psycopg.Connection[Any]
) -> None:
    def configure(conn: psycopg.Connection[Any]) -> None:
        conn.isolation_level = psycopg.IsolationLevel.SERIALIZABLE

    with Pool(dsn, max_size=1, configure=configure) as pool:
        for _ in range(8):
            pool.fetch_one(SELECT, [1])
        other.execute(CHANGES["add"])
        with pytest.raises(FeatureNotSupported):
            pool.fetch_one(SELECT, [1])
        assert pool.fetch_one(SELECT, [1]) == (1, 10, None)


def test_a_users_own_prepared_statement_is_not_sent_again(
    dsn: str, other: psycopg.Connection[Any]
) -> None:
    with Pool(dsn, max_size=1, kwargs={"prepare_threshold": None}) as pool:
        pool.execute("prepare mine as select * from t")
        assert pool.fetch_all("execute mine") == [(1, 10), (2, 20)]
        other.execute(CHANGES["add"])
        for _ in range(2):
            with pytest.raises(FeatureNotSupported):
                pool.fetch_all("execute mine")


def test_a_procedure_that_has_committed_is_not_called_again(
    dsn: str, other: psycopg.Connection[Any]
) -> None:
    other.execute("create table log (n int)")
    other.execute(
        "create procedure work(n int) language plpgsql as $$ begin"
        " insert into log values (n); commit; execute 'execute mine'; end $$"
    )
    with Pool(dsn, max_size=1) as pool:
        pool.execute("prepare mine as select * from t")
        for number in range(8):
            pool.execute("call work(%s)", [number])
        other.execute(CHANGES["add"])
        with pytest.raises(FeatureNotSupported):
            pool.execute("call work(%s)", [8])
    assert other.execute("select count(*) from log").fetchone() == (9,)


def deallocate(pool: Pool[Any]) -> None:
    """Drop psycopg's prepared statements without its notice."""
    pool.execute("do $$ begin execute 'deallocate all'; end $$")


def test_a_deallocated_statement_is_prepared_again(
    dsn: str, other: psycopg.Connection[Any]
) -> None:
    with Pool(dsn, max_size=1) as pool:
        for call in CALLS.values():
            for _ in range(8):
                call(pool)
            deallocate(pool)
            assert call(pool)


def test_a_deallocated_statement_fails_once_in_a_block(
    dsn: str, other: psycopg.Connection[Any]
) -> None:
    with Pool(dsn, max_size=1, kwargs={"autocommit": True}) as pool:
        for _ in range(8):
            in_block(pool)
        deallocate(pool)
        with pytest.raises(InvalidSqlStatementName):
            in_block(pool)
        for _ in range(8):
            assert in_block(pool) == (1, 10)


def test_a_users_own_missing_prepared_statement_is_an_error(
    dsn: str, other: psycopg.Connection[Any]
) -> None:
    with Pool(dsn, max_size=1) as pool:
        for _ in range(8):
            with pytest.raises(InvalidSqlStatementName):
                pool.execute("execute mine(%s)", [1])


def test_other_feature_not_supported_errors_are_raised(
    dsn: str, other: psycopg.Connection[Any]
) -> None:
    with Pool(dsn, max_size=1) as pool:
        for _ in range(2):
            with pytest.raises(FeatureNotSupported):
                pool.fetch_all("select * from t full join t as u on t.a < u.a")
            with pytest.raises(FeatureNotSupported):
                pool.execute("select * from t where id = %s union select * from t for update", [1])


# plpgsql and SQL functions keep plans for the length of a session.
FUNCTIONS = {
    "record": (
        "create function f(n int) returns text language plpgsql as $$ declare r record;"
        " begin select * into r from t where id = n; return r.a::text || '!'; end $$"
    ),
    "sql": "create function f(n int) returns setof t language sql as 'select * from t where id = n'",
    "trigger": (
        "create table log (line text);"
        "create function note() returns trigger language plpgsql as $$ begin"
        " insert into log values (new.a::text || '!'); return new; end $$;"
        "create trigger note before insert on t for each row execute function note();"
        "create sequence ids start 10; create function f(n int) returns int language sql as"
        " 'insert into t values (nextval(''ids''), n) returning 1'"
    ),
}


@pytest.mark.parametrize("call", [in_autocommit, in_block, in_run])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_with_a_stale_plan_fails_once(
    dsn: str,
    other: psycopg.Connection[Any],
    name: str,
    call: Callable[[Pool[Any], str], Any],
) -> None:
    other.execute(FUNCTIONS[name])
    query = "select * from f(1)"
    with Pool(dsn, max_size=1) as pool:
        for _ in range(8):
            call(pool, query)
        other.execute(CHANGES["type"])
        with suppress(psycopg.errors.DatatypeMismatch):  # older servers notice some by themselves
            call(pool, query)
        expected = other.execute(query).fetchone()
        for _ in range(8):
            assert call(pool, query) == expected
