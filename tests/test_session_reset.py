"""`session_reset`: nothing that a holder left in its session reaches the next one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.pq import TransactionStatus

from dbpool import ConfigError, DatabaseMisconfigured, Pool, Settings
from dbpool.pool._psycopg import reset_session
from tests.postgres import Server, until
from tests.proxy import Proxy

Conn = psycopg.Connection[Any]

STATE = """
    select current_user, session_user, current_setting('role'), current_setting('search_path'),
        current_setting('statement_timeout'), current_setting('timezone'),
        current_setting('default_transaction_read_only'), current_setting('app.tenant', true),
        current_setting('client_encoding'), current_setting('work_mem'),
        (select count(*) from pg_listening_channels()),
        (select count(*) from pg_class where relnamespace = pg_my_temp_schema()),
        (select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()),
        (select count(*) from pg_cursors where is_holdable)
"""

SESSION_STATE = {
    "role": "set role pg_monitor",
    "session authorization": "set session authorization pg_monitor",
    "set": "set search_path = elsewhere; set statement_timeout = 0",
    "set_config": "select set_config('timezone', 'Asia/Tokyo', false)",
    "custom": "select set_config('app.tenant', 'somebody', false)",
    "characteristics": "set session characteristics as transaction read only",
    "encoding": "set client_encoding = latin1",
    "temporary table": "create temporary table secrets as select 'x' as word",
    "advisory lock": "select pg_advisory_lock(1), pg_advisory_lock_shared(2), pg_advisory_lock(1)",
    "listen": "listen here; listen there",
    "cursor": "declare held cursor with hold for select generate_series(1, 9)",
    "sequence": "create temporary sequence s; select nextval('s')",
}


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    """A proxy in front of the shared server, which it does not harm."""
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def conninfo(proxy: Proxy, dsn: str) -> str:
    return make_conninfo(dsn, port=proxy.port)


class RoundTrips:
    """Counts the server's ReadyForQuery messages, one for each round trip."""

    def __init__(self, proxy: Proxy) -> None:
        self.count = 0
        proxy.translate = self._count_ready

    def _count_ready(self, chunk: bytes) -> bytes:
        self.count += chunk.count(b"Z\0\0\0\5")
        return chunk


def state(pool: Pool[Any]) -> Any:
    return pool.fetch_one(STATE)


def in_block(pool: Pool[Any], statement: str) -> None:
    with pool.connection() as conn:
        conn.execute(statement)


def in_autocommit(pool: Pool[Any], statement: str) -> None:
    with pool.connection() as conn:
        conn.autocommit = True
        conn.execute(statement)


def in_aborted_block(pool: Pool[Any], statement: str) -> None:
    with pytest.raises(ZeroDivisionError), pool.connection() as conn:
        conn.execute(statement)
        conn.commit()
        with pytest.raises(psycopg.errors.DivisionByZero):
            conn.execute("select 1/0")
        raise ZeroDivisionError


def by_hand(pool: Pool[Any], statement: str) -> None:
    conn = pool.getconn()
    conn.execute(statement)
    conn.commit()
    conn.execute("select 1")
    pool.putconn(conn)  # with an open transaction


def by_run(pool: Pool[Any], statement: str) -> None:
    pool.run(lambda conn: conn.execute(statement))


def by_execute(pool: Pool[Any], statement: str) -> None:
    pool.execute(statement)


def by_fetch(pool: Pool[Any], statement: str) -> None:
    with suppress(psycopg.ProgrammingError):  # most return no rows
        pool.fetch_value(statement)


def by_libpq(pool: Pool[Any], statement: str) -> None:
    with pool.connection() as conn:
        conn.pgconn.exec_(statement.encode())


METHODS = [
    in_block, in_autocommit, in_aborted_block, by_hand, by_run, by_execute, by_fetch, by_libpq,
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_holder_finds_no_session_state_of_the_previous_one(
    dsn: str, method: Callable[[Pool[Any], str], None]
) -> None:
    with Pool(dsn, max_size=1, session_reset="session") as pool:
        before = state(pool)
        for statement in SESSION_STATE.values():
            method(pool, statement)
            after = state(pool)
            assert after[:7] + after[8:] == before[:7] + before[8:]
            assert not after[7]
        assert pool.stats().counters.connects == 1


@pytest.mark.parametrize("name", SESSION_STATE)
def test_without_the_setting_session_state_stays(dsn: str, name: str) -> None:
    with Pool(dsn, max_size=1) as pool:
        before = state(pool)
        in_block(pool, SESSION_STATE[name])
        assert state(pool) != before


def test_the_reset_costs_one_round_trip_only_after_a_statement(conninfo: str, proxy: Proxy) -> None:
    def cost(pool: Pool[Any], work: Callable[[Pool[Any]], object]) -> int:
        before = trips.count
        work(pool)
        return trips.count - before

    def nothing(pool: Pool[Any]) -> None:
        for _ in range(5):
            with pool.connection():
                pass
            with pool.connection() as conn:
                conn.commit()
                conn.rollback()
                conn.cursor().close()
            pool.putconn(pool.getconn())

    trips = RoundTrips(proxy)
    works: dict[Callable[[Pool[Any]], object], int] = {
        nothing: 0,
        lambda pool: pool.fetch_one("select 1"): 1,
        lambda pool: pool.fetch_one("select %s::int", [1]): 1,
        lambda pool: pool.execute("set timezone = 'Asia/Tokyo'"): 1,
        lambda pool: in_block(pool, "select 1"): 3,
        lambda pool: by_hand(pool, "select 1"): 6,
        lambda pool: pool.run(lambda conn: conn.execute("select 1")): 3,
    }
    options: dict[str, Any] = {"max_size": 1, "ping_after": 600}
    with (
        Pool(conninfo, **options) as plain,
        Pool(conninfo, session_reset="session", **options) as resetting,
    ):
        for pool in (plain, resetting):
            pool.fetch_one("select 1")
            nothing(pool)
        for work, trips_without in works.items():
            assert cost(plain, work) == trips_without
            assert cost(resetting, work) == trips_without + bool(trips_without)
            assert cost(resetting, nothing) == 0


def test_the_pools_own_ping_causes_no_reset(conninfo: str, proxy: Proxy) -> None:
    trips = RoundTrips(proxy)
    with Pool(conninfo, max_size=1, session_reset="session", ping_after=0) as pool:
        pool.wait()
        before = trips.count
        for number in range(1, 4):
            with pool.connection():
                pass
            assert trips.count - before == number  # the ping
        pool.check()
        with pool.connection():
            pass
        assert trips.count - before == 5
        pool.execute("set timezone = 'Asia/Tokyo'")
        assert state(pool)[5] != "Asia/Tokyo"


def test_session_state_of_a_users_check_is_reset(dsn: str) -> None:
    statements = ["set timezone = 'Asia/Tokyo'"]

    def check(conn: Conn) -> None:
        for statement in statements:
            conn.execute(statement)

    with Pool(dsn, max_size=1, session_reset="session", check=check) as pool:
        with pool.connection():
            pass
        statements.clear()
        assert state(pool)[5] != "Asia/Tokyo"


def test_prepared_statements_stay_and_never_fail(dsn: str) -> None:
    names = "select count(*) from pg_prepared_statements"
    with Pool(dsn, max_size=2, session_reset="session") as pool:
        for number in range(400):
            assert pool.fetch_value("select %s::int", [number]) == number
            with pool.connection() as conn:
                assert conn.execute("select %s::int + 1", [number]).fetchone() == (number + 1,)
        with pool.connection() as conn:
            assert conn.execute(names).fetchone() == (2,)


def test_a_temporary_table_of_the_same_name_may_have_other_columns(dsn: str) -> None:
    with Pool(dsn, max_size=1, session_reset="session") as pool:
        for number in range(12):
            columns = ", ".join(f"c{n} int" for n in range(1 + number // 6))
            with pool.connection() as conn:
                conn.execute(f"create temporary table scratch ({columns})")
                assert conn.execute("select * from scratch where c0 = %s", [1]).fetchall() == []


def configured(conn: Conn) -> None:
    conn.autocommit = True
    conn.execute("set timezone = 'Asia/Tokyo'")
    conn.execute('set search_path = "a\'b", public, "$user"')
    conn.execute("set statement_timeout = '12345ms'")
    conn.execute("set datestyle = 'SQL, DMY'")
    conn.execute("set log_min_error_statement = 'log'")
    conn.autocommit = False


def test_every_holder_finds_what_configure_set(dsn: str) -> None:
    with Pool(dsn, max_size=1, session_reset="session", configure=configured) as pool:
        before = state(pool)
        shown = pool.fetch_value("show datestyle")
        assert before[3:6] == ('"a\'b", public, "$user"', "12345ms", "Asia/Tokyo")
        for statement in SESSION_STATE.values():
            in_block(pool, statement)
            in_block(pool, "reset all")
            in_block(pool, "set datestyle = 'German'")
            assert state(pool)[:7] == before[:7]
            assert pool.fetch_value("show datestyle") == shown


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("set role pg_monitor", "role"),
        ("set session authorization pg_monitor", "role"),
        ("listen here", "LISTEN"),
        ("create temporary table mine (id int)", "temporary"),
        ("create temporary view mine as select 1", "temporary"),
        ("select pg_advisory_lock(1)", "advisory lock"),
        ("declare mine cursor with hold for select 1", "cursor"),
    ],
)
def test_configure_may_not_leave_state_that_cannot_be_restored(
    dsn: str, statement: str, named: str
) -> None:
    def configure(conn: Conn) -> None:
        conn.execute(statement)
        conn.commit()

    with Pool(dsn, session_reset="session", configure=configure) as pool:
        with pytest.raises(DatabaseMisconfigured, match=named) as caught, pool.connection():
            pass
        assert isinstance(caught.value.__cause__, ConfigError)
    with Pool(dsn, configure=configure) as pool, pool.connection():
        pass


def test_a_role_that_the_server_sets_at_login_is_set_again(dsn: str, server: Server) -> None:
    server.execute("create role group_of_users")
    server.execute("create role user_of_group login in role group_of_users password 'x'")
    server.execute("alter role user_of_group set role = group_of_users")
    try:
        conninfo = make_conninfo(dsn, user="user_of_group", password="x")
        with Pool(conninfo, max_size=1, session_reset="session") as pool:
            before = state(pool)
            assert before[:3] == ("group_of_users", "user_of_group", "group_of_users")
            in_block(pool, "reset role; set role none")
            assert state(pool) == before
    finally:
        server.execute("drop role user_of_group")
        server.execute("drop role group_of_users")


def test_notifications_for_one_holder_do_not_reach_the_next(dsn: str) -> None:
    with Pool(dsn, max_size=1, session_reset="session") as pool:
        with pool.connection() as conn:
            conn.autocommit = True
            conn.execute("listen here")
            conn.execute("notify here, 'secret'")
        with pool.connection() as conn:
            assert list(conn.notifies(timeout=0.05)) == []


def test_the_session_is_reset_before_the_users_reset(dsn: str) -> None:
    found: list[Any] = []

    def reset(conn: Conn) -> None:
        assert conn.pgconn.transaction_status == TransactionStatus.IDLE
        found.append(conn.execute(STATE).fetchone())
        conn.execute("set timezone = 'Asia/Tokyo'")
        conn.commit()

    with Pool(dsn, max_size=1, session_reset="session", reset=reset) as pool:
        in_block(pool, "set timezone = 'Europe/Vienna'")
        until(lambda: len(found) == 1)
        assert found[0][5] not in ("Europe/Vienna", "Asia/Tokyo")
        with pool.connection() as conn:
            assert conn.execute("show timezone").fetchone() == ("Asia/Tokyo",)
        until(lambda: len(found) == 2)
        assert found[1][5] == found[0][5]


def test_the_reset_runs_in_the_returning_thread(dsn: str) -> None:
    with Pool(dsn, max_size=1, session_reset="session", configure=configured) as pool:
        threads: list[str] = []
        with pool.connection() as conn:
            conn.add_notice_handler(lambda notice: threads.append(threading.current_thread().name))
            conn.autocommit = True
            conn.execute("set client_min_messages = debug1")
            conn.execute("create temporary table gone (id serial)")
            threads.clear()
        assert pool.stats().idle == 1
        assert set(threads) <= {threading.current_thread().name}


def test_a_session_that_cannot_be_reset_in_time_is_replaced(conninfo: str, proxy: Proxy) -> None:
    with Pool(conninfo, max_size=1, session_reset="session", ping_timeout=0.2) as pool:
        pool.fetch_one("select 1")
        conn = pool.getconn()
        conn.execute("set timezone = 'Asia/Tokyo'")
        conn.commit()
        proxy.go_silent()
        pool.putconn(conn)
        assert conn.closed
        assert state(pool)[5] != "Asia/Tokyo"
        assert pool.stats().counters.discarded["broken"] == 1


def test_an_error_in_the_reset_replaces_the_connection(dsn: str, server: Server) -> None:
    with Pool(dsn, max_size=1, session_reset="session") as pool:
        pid = pool.fetch_value("select pg_backend_pid()")
        with pool.connection() as conn:
            conn.execute("create temporary table t as select generate_series(1, 3)")
            conn.execute("set idle_in_transaction_session_timeout = 0")
            conn.commit()
            conn.autocommit = True
            conn.execute("set statement_timeout = 1")  # last: only the reset can hit this timeout
        conn = pool.getconn()
        conn.execute("select 1")
        conn.commit()
        server.execute("select pg_terminate_backend(%s)", conn.info.backend_pid)
        until(lambda: not server.backends() or conn.info.backend_pid not in server.backends())
        pool.putconn(conn)
        assert pool.fetch_value("select pg_backend_pid()") != pid


def test_an_interrupted_holder_leaves_no_session_state(dsn: str) -> None:
    class Interrupt(BaseException):
        pass

    def interrupt() -> None:
        with pool.connection() as conn:
            conn.autocommit = True
            conn.execute("set timezone = 'Asia/Tokyo'")
            conn.pgconn.send_query(b"select pg_sleep(5)")
            raise Interrupt

    with Pool(dsn, max_size=1, session_reset="session") as pool:
        with pytest.raises(Interrupt):
            interrupt()
        assert state(pool)[5] != "Asia/Tokyo"


def test_values_of_session_reset(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().session_reset == "none"
    assert Settings.from_env(environ={"DBPOOL_RESET": "session"}).session_reset == "session"
    monkeypatch.setenv("DATABASE_URL", dsn)
    monkeypatch.setenv("DBPOOL_RESET", "session")
    with Pool(max_size=1) as pool:
        pool.execute("set timezone = 'Asia/Tokyo'")
        assert state(pool)[5] != "Asia/Tokyo"
    for wrong in ("all", "", "yes"):
        with pytest.raises(ConfigError, match=r"DBPOOL_RESET.* none or session"):
            Settings(session_reset=wrong)
    with pytest.raises(ConfigError, match=r"DBPOOL_RESET.*pooler"):
        Settings(session_reset="session", pooler="transaction")
    assert Settings(session_reset="none", pooler="transaction").pooler == "transaction"


def test_a_hot_standby_resets_as_well(make_server: Callable[..., Server]) -> None:
    server = make_server()
    server.stop()
    server.demote()
    server.start()
    with Pool(server.conninfo, max_size=1, session_reset="session") as pool:
        before = state(pool)
        for name in ("role", "set", "set_config", "encoding", "advisory lock"):
            in_block(pool, SESSION_STATE[name])
            assert state(pool) == before
        assert pool.stats().counters.connects == 1


def test_everything_sent_is_noticed_by_libpqs_state(dsn: str) -> None:
    def send_in_pipeline(conn: Conn) -> None:
        with conn.pipeline():
            conn.execute("select 1")

    def copy(conn: Conn) -> None:
        with conn.cursor() as cursor, cursor.copy("copy (select 1) to stdout") as out:
            list(out)

    def prepare(conn: Conn) -> None:
        conn.pgconn.prepare(b"mine", b"select 1")

    calls: list[Callable[[Conn], object]] = [
        lambda conn: conn.execute("select 1"),
        lambda conn: conn.execute("select %s", [1]),
        lambda conn: conn.execute("select 1", prepare=True),
        lambda conn: list(conn.cursor().stream("select 1")),
        lambda conn: conn.cursor().executemany("select %s", [[1], [2]]),
        lambda conn: conn.transaction().__enter__(),
        lambda conn: conn.pgconn.exec_(b"select 1"),
        lambda conn: conn.pgconn.exec_params(b"select 1", None),
        lambda conn: conn.pgconn.send_query(b"select 1"),
        send_in_pipeline, copy, prepare,
    ]  # fmt: skip
    for method in calls:
        with closing(psycopg.connect(dsn, autocommit=True)) as conn:
            reset_session(conn, b"select 1", 5.0)
            mark = conn.pgconn.error_message
            assert mark
            method(conn)
            assert conn.pgconn.error_message != mark


@pytest.mark.parametrize("encoding", ["latin1", "utf8"])
def test_settings_of_configure_are_restored_in_every_encoding(dsn: str, encoding: str) -> None:
    def configure(conn: Conn) -> None:
        conn.execute("set search_path = 'schéma'")
        conn.commit()

    conninfo = make_conninfo(dsn, client_encoding=encoding)
    with Pool(conninfo, max_size=1, session_reset="session", configure=configure) as pool:
        for _ in range(2):
            assert pool.fetch_value("show search_path") == '"schéma"'
            in_block(pool, "set search_path = elsewhere")
