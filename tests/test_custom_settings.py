"""`session_reset` and settings with a dot in their name, which the server does not list."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from psycopg import sql
from psycopg.conninfo import make_conninfo

from dbpool import Pool
from dbpool.pool._session import custom_names
from tests.postgres import Server

Conn = psycopg.Connection[Any]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="libpq traces on Linux only")

VALUE = 'it\'s "a" \\ tenant; -- é'


def tenant(pool: Pool[Any], name: str = "app.tenant") -> Any:
    return pool.fetch_value("select current_setting(%s, true)", [name])


def make(dsn: str, configure: Callable[[Conn], None], **options: Any) -> Pool[Any]:
    return Pool(dsn, max_size=1, session_reset="session", configure=configure, **options)


def by_set(conn: Conn) -> None:
    conn.execute(sql.SQL("set app.tenant = {}").format(VALUE))
    conn.commit()


def by_set_session_to(conn: Conn) -> None:
    conn.execute(sql.SQL("/* who */ SET SESSION\n  app\n. tenant TO {}").format(VALUE))
    conn.commit()


def by_quoted_name(conn: Conn) -> None:
    conn.execute(sql.SQL('set "app"."tenant" = {}').format(VALUE))
    conn.commit()


def by_another_case(conn: Conn) -> None:
    conn.execute(sql.SQL('set "App"."TENANT" = {}').format(VALUE))
    conn.commit()


def by_set_config(conn: Conn) -> None:
    conn.execute("select set_config('app.tenant', %s, false)", [VALUE])
    conn.commit()


def by_parameter(conn: Conn) -> None:
    conn.execute("select set_config(%s, %s, false)", ["app.tenant", VALUE])
    conn.commit()


def by_binary_parameter(conn: Conn) -> None:
    conn.execute("select set_config(%b, %b, false)", ["app.tenant", VALUE])
    conn.commit()


def in_autocommit(conn: Conn) -> None:
    conn.autocommit = True
    by_parameter_alone(conn)
    conn.autocommit = False


def by_parameter_alone(conn: Conn) -> None:
    conn.execute("select set_config(%s, %s, false)", ["app.tenant", VALUE])


def in_transaction(conn: Conn) -> None:
    with conn.transaction(), conn.transaction():
        by_parameter_alone(conn)


def by_executemany(conn: Conn) -> None:
    values = [["app.other", "x"], ["app.tenant", VALUE]]
    conn.cursor().executemany("select set_config(%s, %s, false)", values)
    conn.commit()


def in_pipeline(conn: Conn) -> None:
    with conn.pipeline():
        conn.execute("set app.other = x")
        by_parameter_alone(conn)
    conn.commit()


def by_client_cursor(conn: Conn) -> None:
    psycopg.ClientCursor(conn).execute("select set_config(%s, %s, false)", ["app.tenant", VALUE])
    conn.commit()


def by_prepared_statement(conn: Conn) -> None:
    conn.execute("select set_config(%s, %s, false)", ["app.tenant", VALUE], prepare=True)
    conn.commit()


def by_libpq(conn: Conn) -> None:
    value = sql.Literal(VALUE).as_bytes(conn)
    conn.pgconn.exec_(b"select 1; set app.tenant = " + value)


METHODS = [
    by_set, by_set_session_to, by_quoted_name, by_another_case, by_set_config, by_parameter,
    by_binary_parameter, in_autocommit, in_transaction, by_executemany, in_pipeline,
    by_client_cursor, by_prepared_statement, by_libpq,
]  # fmt: skip


@pytest.mark.parametrize("configure", METHODS)
def test_every_holder_finds_the_custom_setting_of_configure(
    dsn: str, configure: Callable[[Conn], None]
) -> None:
    with make(dsn, configure) as pool:
        for statement in ("select 1", "set app.tenant = 'another'", "reset all", "discard all"):
            assert tenant(pool) == VALUE
            with pool.connection() as conn:
                conn.autocommit = True
                conn.execute(statement)
        assert tenant(pool) == VALUE
        assert pool.stats().counters.connects == 1


def test_without_session_reset_nothing_is_restored(dsn: str) -> None:
    with Pool(dsn, max_size=1, configure=by_set) as pool:
        pool.execute("set app.tenant = 'another'")
        assert tenant(pool) == "another"


def test_a_name_may_contain_any_letters(dsn: str) -> None:
    def configure(conn: Conn) -> None:
        conn.execute("select set_config(%s, 'v', false)", ["große_app.kunde$1.x"])
        conn.commit()

    with make(dsn, configure) as pool:
        pool.execute("reset all")
        assert tenant(pool, "große_app.kunde$1.x") == "v"


def test_a_holders_own_custom_setting_is_reset(dsn: str) -> None:
    with make(dsn, by_set) as pool:
        pool.execute("set app.of_a_holder = 'secret'")
        assert not tenant(pool, "app.of_a_holder")
        assert tenant(pool) == VALUE


def test_a_setting_local_to_a_transaction_is_not_restored(dsn: str) -> None:
    def configure(conn: Conn) -> None:
        conn.execute("select set_config('app.tenant', 'x', true)")
        conn.commit()

    with make(dsn, configure) as pool:
        assert not tenant(pool)
        pool.execute("set app.tenant = 'another'")
        assert not tenant(pool)


@pytest.fixture
def of_role(dsn: str, server: Server) -> Any:
    """A connection string of a role for which the server sets app.tenant and app.region."""
    server.execute("create role tenant_of_role login password 'x'")
    server.execute("alter role tenant_of_role set app.tenant = 'of the role'")
    server.execute("alter role tenant_of_role set app.region = 'of the role'")
    yield make_conninfo(dsn, user="tenant_of_role", password="x")
    server.execute("drop role tenant_of_role")


@pytest.mark.parametrize("value", ["of configure", ""])
def test_a_value_of_configure_wins_over_the_roles(of_role: str, value: str) -> None:
    def configure(conn: Conn) -> None:
        conn.execute("select current_setting('app.region')")
        conn.execute("select set_config('app.tenant', %s, false)", [value])
        conn.commit()

    with make(of_role, configure) as pool:
        for statement in ("select 1", "set app.tenant = 'x'; set app.region = 'x'", "reset all"):
            pool.execute(statement)
            assert tenant(pool) == value
            assert tenant(pool, "app.region") == "of the role"


def test_texts_that_look_like_setting_names_do_no_harm(dsn: str) -> None:
    def configure(conn: Conn) -> None:
        conn.execute("set plpgsql.extra_warnings = 'all'; select 'www.example.org', 'a.b@c.de'")
        conn.execute("select t.relname from pg_catalog.pg_class as t where 'x.y' = t.relname")
        conn.execute("select 'nowhere.set', 'plpgsql.variable_conflict'")
        conn.commit()

    with make(dsn, configure) as pool:
        before = tenant(pool, "plpgsql.extra_warnings")
        pool.execute("set plpgsql.extra_warnings = 'none'")
        assert tenant(pool, "plpgsql.extra_warnings") == before == "all"
        assert tenant(pool, "nowhere.set") is None


def test_each_connection_gets_its_own_value_back(dsn: str) -> None:
    def configure(conn: Conn) -> None:
        conn.execute("select set_config('app.pid', pg_backend_pid()::text, false)")
        conn.commit()

    query = "select current_setting('app.pid') = pg_backend_pid()::text"
    with Pool(dsn, max_size=1, session_reset="session", configure=configure) as pool:
        for _ in range(3):  # only the first connection is traced
            with pool.connection() as conn:
                conn.execute("reset all")
            assert pool.fetch_value(query) is True
            with pool.connection() as conn:
                conn.close()
        assert pool.stats().counters.connects >= 3


def test_an_error_in_configure_is_the_cause(dsn: str) -> None:
    def configure(conn: Conn) -> None:
        conn.execute("set app.tenant = 'x'")
        conn.execute("select 1/0")

    with make(dsn, configure, outage_grace=0) as pool, pytest.raises(psycopg.Error) as caught:
        pool.getconn()
    assert "division by zero" in str(caught.value.__cause__)


def test_no_trace_file_is_left_open(dsn: str) -> None:
    with make(dsn, by_set) as pool:
        assert tenant(pool) == VALUE
        for descriptor in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):  # it was iterdir's own descriptor
                assert "memfd:dbpool" not in str(descriptor.readlink())


# Names, without a server


IDENTIFIERS = st.from_regex(r"[a-zA-Z_é][a-zA-Z0-9_$é]{0,8}", fullmatch=True)
CUSTOM = st.lists(IDENTIFIERS, min_size=2, max_size=4).map(".".join)


@given(CUSTOM, st.sampled_from(['F\t9\tQuery\t "{}"', '2026-01-01 10:00:00.1\tF\t9\tQuery\t "{}"']))
@example("a.b", "F\t9\tBind\t \"\" \"\" 2 0 0 2 3 '{}' 1 '1' 1 0")
def test_a_name_is_found_in_what_is_sent(name: str, line: str) -> None:
    for text in (f"set {name} = 1", f"select set_config('{name}', 'x', false)", name):
        trace = f'B\t5\tReadyForQuery\t I\n{line.format(text)}\nB\t8\tCommandComplete\t "SET"\n'
        assert name in custom_names(trace.encode())


@given(CUSTOM)
def test_names_in_what_the_server_sends_are_ignored(name: str) -> None:
    assert not custom_names(f"F\t4\tSync\nB\t11\tDataRow\t 1 1 '{name}'\n".encode())


@given(st.binary(max_size=200))
def test_no_trace_breaks_the_parser(trace: bytes) -> None:
    custom_names(trace)


def test_the_number_of_names_is_bounded() -> None:
    text = " ".join(f"a.b{number}" for number in range(5000))
    assert len(custom_names(f'F\t9\tQuery\t "{text}"'.encode())) == 1000
