"""`pipeline_begin` saves one round trip, and changes nothing else that users could see."""

from __future__ import annotations

import contextlib
import select
import signal
import tempfile
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import Connection, Cursor, IsolationLevel
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row

from dbpool import ConfigError, Pool, Settings
from dbpool.pool._pipelining import PipeliningCursor
from tests.threads import run_in_threads

from .postgres import Server

Conn = Connection[Any]

SETUP = """
    drop table if exists joined, gone;
    create table joined (id int unique, body text);
    create or replace function say(what text) returns text language plpgsql as $$
        begin raise notice 'it says %', what; return what; end $$;
"""


@pytest.fixture
def pools(server: Server) -> Iterator[tuple[Pool, Pool]]:
    """Two pools: one sends BEGIN with the first statement, the other does not."""
    with (
        Pool(server.conninfo, max_size=1, name="pipelining", pipeline_begin=True) as pipelining,
        Pool(server.conninfo, max_size=1, name="plain") as plain,
    ):
        yield pipelining, plain
    server.execute("drop table if exists joined, gone; drop function if exists say")


# On the wire


def _two(conn: Conn) -> None:
    conn.execute("select %s::int", [1])
    conn.execute("select %s::int", [2])


def _prepared(conn: Conn) -> None:
    conn.execute("select %s::int", [1], prepare=True)
    conn.commit()
    conn.execute("select %s::int", [1])


@pytest.mark.parametrize(
    ("work", "pipelined", "plain"),
    [
        (_two, "BEGIN select Sync | select Sync |", "BEGIN | select Sync | select Sync |"),
        (
            _prepared,
            "BEGIN | select Sync | Bind Sync | COMMIT | BEGIN Bind Sync |",
            "BEGIN | select Sync | Bind Sync | COMMIT | BEGIN | Bind Sync |",
        ),
    ],
)
def test_begin_is_sent_with_the_first_statement(
    pools: tuple[Pool, Pool], work: Callable[[Conn], None], pipelined: str, plain: str
) -> None:
    assert [_sent(pool, work) for pool in pools] == [pipelined, plain]


def _sent(pool: Pool, work: Callable[[Conn], None]) -> str:
    """The messages to the server, with a bar at each wait for an answer."""
    with tempfile.TemporaryFile("w+") as file, pool.connection() as conn:
        conn.pgconn.trace(file.fileno())
        work(conn)
        conn.pgconn.untrace()
        file.seek(0)
        sent: list[str] = []
        for line in file:
            _, side, _, kind, *rest = line.rstrip("\n").split("\t")
            known = [word for word in ("BEGIN", "COMMIT", "select") if word in "".join(rest)]
            if side == "B":
                sent += ["|"] if sent[-1] != "|" else []
            elif kind in ("Query", "Parse"):
                sent += known
            elif kind == "Sync" or (kind == "Bind" and '"_pg3' in "".join(rest)):
                sent.append(kind)
        return " ".join(sent)


# Seen by users


def _insert(conn: Conn) -> Any:
    return conn.execute("insert into joined values (%s, 'x') returning *", [1]).fetchall()


def _update_nothing(conn: Conn) -> Any:
    cursor = conn.execute("update joined set body = %(to)s where id = -1", {"to": "y"})
    return cursor.rowcount, cursor.statusmessage, cursor.description


def _read(conn: Conn) -> Any:
    return conn.execute("select id, body from joined where id > %s order by 1", [0]).fetchall()


def _read_as_dict(conn: Conn) -> Any:
    return conn.cursor(row_factory=dict_row).execute("select %s::int as n", [3]).fetchone()


def _read_binary(conn: Conn) -> Any:
    cursor = conn.cursor().execute("select %s::int", [3], binary=True)
    assert cursor.pgresult
    return cursor.fetchall(), cursor.pgresult.fformat(0)


def _read_often(conn: Conn) -> Any:
    """Often enough to be prepared, each time as a transaction's first statement."""
    rows = []
    for number in range(8):
        rows += conn.execute("select %s::int * 2", [number]).fetchall()
        conn.commit()
    return rows, conn.execute("select statement from pg_prepared_statements order by 1").fetchall()


def _read_too_often(conn: Conn) -> Any:
    """More different statements than are kept prepared."""
    conn.prepared_max = 2
    for number in range(5):
        conn.execute(f"select %s::int + {number}", [number], prepare=True)
        conn.commit()
    return conn.execute("select count(*) from pg_prepared_statements").fetchone()


def _run_too_many(conn: Conn) -> Any:
    """More different statements than psycopg counts, with a small limit of prepared ones."""
    for number in range(4):
        conn.execute(f"select %s::int - {number}", [number], prepare=True)
    conn.commit()
    conn.prepared_max = 1
    for number in range(4):
        conn.execute(f"select %s::int / 2 + {number}", [number])
        conn.commit()
    prepared_count = conn.execute("select count(*) from pg_prepared_statements").fetchone()
    return prepared_count, len(conn._prepared._counts), len(conn._prepared._names)


def _use_a_cursor_again(conn: Conn) -> Any:
    cursor = conn.cursor()
    cursor.execute("select generate_series(1, %s)", [3]).fetchone()
    conn.commit()
    first = cursor.execute("select generate_series(1, %s)", [3]).fetchone()
    conn.commit()
    with contextlib.suppress(psycopg.Error):
        cursor.execute("select 1 / %s", [0])
    return first, cursor.rowcount, cursor.description, cursor.statusmessage


def _fail_often(conn: Conn) -> Any:
    """Often enough to be prepared; all but the first call fail."""
    for number in (1, 0, 0, 0, 0, 0, 0, 0):
        with contextlib.suppress(psycopg.Error):
            conn.execute("select 40 / %s", [number])
        conn.commit()  # a rollback would drop prepared statements
    return conn.execute("select statement from pg_prepared_statements order by 1").fetchall()


def _pass_too_many(conn: Conn) -> Any:
    values = [1] * 65536
    with contextlib.suppress(psycopg.OperationalError):
        conn.execute(f"select 1 where 1 in ({', '.join(['%s'] * len(values))})", values)
    return conn.info.transaction_status, conn.execute("select %s::int", [1]).fetchall()


def _pass_no_sequence(conn: Conn) -> Any:
    class NotASequence:
        def __bool__(self) -> bool:
            raise ValueError("neither")

    try:
        conn.execute("select %s", NotASequence())  # type: ignore[call-overload]
    except TypeError as ex:
        return str(ex), conn.info.transaction_status


def _pass_much(conn: Conn) -> Any:
    large = "x" * 5_000_000  # more than the sockets' buffers hold, both ways
    return [len(row[0]) for row in conn.execute("select %s || %s", [large, large]).fetchall()]


def _lose_what_is_prepared(conn: Conn) -> Any:
    results = []
    for number in range(9):
        if number in (5, 7):
            conn.execute("alter table joined rename to gone" if number == 5 else SETUP)
            conn.commit()
        try:
            results.append(conn.execute("select body from joined where id = %s", [5]).fetchall())
        except psycopg.Error as ex:
            results.append([(type(ex), str(ex))])
        conn.rollback()
    return results


def _divide(conn: Conn) -> Any:
    return conn.execute("select 1 / %s", [0])


def _divide_and_go_on(conn: Conn) -> Any:
    with contextlib.suppress(psycopg.Error):
        conn.execute("select 1 / %s", [0])
    return conn.execute("select %s::int", [1])


def _misspell(conn: Conn) -> Any:
    return conn.execute("selekt %s", [1])


def _misspell_begin(conn: Conn) -> Any:
    conn._begin_statement = b"BEGIN nonsense"
    return conn.execute("select %s::int", [1])


def _forget_a_parameter(conn: Conn) -> Any:
    return conn.execute("select %s, %s", [1])


def _pass_the_unknown(conn: Conn) -> Any:
    return conn.execute("select %s", [object()])


def _many_in_one(conn: Conn) -> Any:
    cursor = conn.execute("select 1; select 2", {"unused": 1})
    return cursor.fetchall(), cursor.nextset(), cursor.fetchall()


def _without_parameters(conn: Conn) -> Any:
    return conn.execute("select 1").fetchall()


def _fail_once_and_roll_back(conn: Conn) -> Any:
    with contextlib.suppress(psycopg.Error), conn.transaction():
        conn.execute("insert into joined values (%s), (7)", [7])
    return conn.execute("select count(*) from joined where id = %s", [7]).fetchall()


def _within_a_savepoint(conn: Conn) -> Any:
    conn.execute("insert into joined values (%s)", [8])
    with contextlib.suppress(psycopg.Error), conn.transaction():
        conn.execute("insert into joined values (%s)", [8])
    return conn.execute("select count(*) from joined where id = %s", [8]).fetchall()


def _set_up(conn: Conn) -> Any:
    conn.isolation_level = IsolationLevel.SERIALIZABLE
    conn.read_only = conn.deferrable = True
    names = "transaction_isolation", "transaction_read_only", "transaction_deferrable"
    shown = [conn.execute("select current_setting(%s)", [name]).fetchone() for name in names]
    conn.rollback()
    conn.isolation_level = conn.read_only = conn.deferrable = None
    return shown


def _write_read_only(conn: Conn) -> Any:
    conn.rollback()
    conn.read_only = True
    return conn.execute("insert into joined values (%s)", [9])


def _in_autocommit(conn: Conn) -> Any:
    conn.rollback()
    conn.autocommit = True
    cursor = conn.execute("select %s::int", [1])
    status = conn.pgconn.transaction_status
    conn.autocommit = False
    return cursor.fetchall(), status


def _in_a_pipeline(conn: Conn) -> Any:
    with conn.pipeline():
        one, two = conn.execute("select %s::int", [1]), conn.execute("select %s::int", [2])
        return one.fetchall(), two.fetchall()


def _stream(conn: Conn) -> Any:
    return list(conn.cursor().stream("select generate_series(1, %s)", [3]))


def _many(conn: Conn) -> Any:
    cursor = conn.cursor()
    cursor.executemany("insert into joined values (%s, 'many')", [[21], [22]])
    return cursor.rowcount


def _copy(conn: Conn) -> Any:
    with conn.cursor().copy("copy (select %s::int) to stdout", [5]) as copy:
        return list(copy.rows())


def _copy_by_execute(conn: Conn) -> Any:
    return conn.execute("copy (select %s::int) to stdout", [5])


def _named_cursor(conn: Conn) -> Any:
    with conn.cursor("named") as cursor:
        return cursor.execute("select generate_series(1, %s)", [3]).fetchall()


def _listen(conn: Conn) -> Any:
    conn.execute("select say(%s)", ["this"])
    conn.execute("select pg_notify('joined', %s)", ["that"])


def _time_out(conn: Conn) -> Any:
    conn.execute("set statement_timeout = 20")
    conn.commit()
    try:
        return conn.execute("select pg_sleep(%s)", [5])
    finally:
        conn.rollback()
        conn.execute("reset statement_timeout")
        conn.commit()


def _die(conn: Conn) -> Any:
    return conn.execute("select pg_terminate_backend(pg_backend_pid(), %s)", [5000])


def _after_close(conn: Conn) -> Any:
    conn.close()
    return conn.execute("select %s::int", [1])


def _on_a_closed_cursor(conn: Conn) -> Any:
    cursor = conn.cursor()
    cursor.close()
    return cursor.execute("select %s::int", [1])


def _raise(conn: Conn) -> Any:
    conn.execute("insert into joined values (%s)", [30])
    raise KeyError("the user's own")


WORKS: list[Callable[[Conn], Any]] = [
    _insert, _update_nothing, _read, _read_as_dict, _read_binary, _read_often, _read_too_often,
    _fail_often, _pass_too_many, _pass_no_sequence, _pass_much, _run_too_many, _use_a_cursor_again,
    _lose_what_is_prepared, _divide, _divide_and_go_on, _misspell, _misspell_begin,
    _forget_a_parameter, _pass_the_unknown, _many_in_one, _without_parameters,
    _fail_once_and_roll_back, _within_a_savepoint, _set_up, _write_read_only, _in_autocommit,
    _in_a_pipeline, _stream, _many, _copy, _copy_by_execute, _named_cursor, _listen, _time_out,
    _die, _after_close, _on_a_closed_cursor, _raise,
]  # fmt: skip


@pytest.mark.parametrize("work", WORKS)
def test_users_see_the_same(pools: tuple[Pool, Pool], work: Callable[[Conn], Any]) -> None:
    actual, expected = (_outcome(pool, [[work]]) for pool in pools)
    assert actual == expected


blocks = st.lists(st.lists(st.sampled_from(WORKS), min_size=1, max_size=4), max_size=3)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(blocks)
def test_users_see_the_same_of_any_sequence(
    pools: tuple[Pool, Pool], works: list[list[Callable[[Conn], Any]]]
) -> None:
    actual, expected = (_outcome(pool, works) for pool in pools)
    assert actual == expected


def _outcome(pool: Pool, blocks: list[list[Callable[[Conn], Any]]]) -> list[object]:
    """The results of blocks, and what they leave behind."""
    with pool.connection() as conn:
        conn.execute("select pg_advisory_xact_lock(1)")
        conn.execute(SETUP)
    results: list[object] = []
    for works in blocks:
        with contextlib.suppress(KeyError, psycopg.Error), pool.connection() as conn:
            conn.add_notice_handler(lambda notice: results.append(notice.message_primary))
            conn.add_notify_handler(lambda notify: results.append(notify.payload))
            conn.execute("listen joined")
            conn.commit()
            for work in works:
                try:
                    results.append(work(conn))
                except psycopg.Error as ex:
                    results.append(_described(ex))
                    results.append(conn.info.transaction_status)
                    if len(works) == 1 or conn.closed:
                        raise
                if isinstance(results[-1], Cursor):
                    results[-1] = results[-1].fetchall()
            conn.cursor_factory = conn._record.session_state[2]  # type: ignore[attr-defined]
        with pool.connection() as conn:
            conn.close()  # drops its handlers and prepared statements
    with pool.connection() as conn:
        return [*results, conn.execute("select * from joined order by 1").fetchall()]


def _described(ex: psycopg.Error) -> tuple[object, ...]:
    diag = ex.diag
    position = diag.statement_position, diag.context, diag.constraint_name
    return type(ex), str(ex), ex.sqlstate, *position, type(ex.__cause__), type(ex.__context__)


@contextlib.contextmanager
def _alarm_raises(error: type[BaseException]) -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise error

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_connection_can_be_used_after_an_interrupt(pools: tuple[Pool, Pool]) -> None:
    with _alarm_raises(KeyboardInterrupt):
        for pool in pools:
            with pool.connection() as conn:
                pid = conn.info.backend_pid
                signal.setitimer(signal.ITIMER_REAL, 0.2)
                with pytest.raises(KeyboardInterrupt):
                    conn.execute("select pg_sleep(%s)", [60])
                assert conn.info.transaction_status == TransactionStatus.INERROR
                conn.rollback()
                assert conn.execute("select %s::int", [1]).fetchone() == (1,)
            assert pool.fetch_value("select pg_backend_pid()") == pid


def test_a_copy_by_execute_closes_the_connection(pools: tuple[Pool, Pool]) -> None:
    for pool in pools:
        with pytest.raises(psycopg.ProgrammingError) as caught, pool.connection() as conn:
            conn.execute("create table copied as select generate_series(1, 10) as id")
            conn.commit()
            conn.execute("copy copied to stdout -- %s", [1])
        assert "use copy() instead" in str(caught.value)
        assert caught.value.__context__ is None
        assert conn.closed
        pool.execute("drop table copied")


class _TimeIsOverError(Exception):
    """Raised by a signal handler, as in job queues."""


def test_an_exception_during_the_wait_closes_the_connection(pools: tuple[Pool, Pool]) -> None:
    """It cannot be used any more, as with psycopg, and gives no wrong answer."""
    with _alarm_raises(_TimeIsOverError):
        for pool in pools:
            conn = pool.getconn()
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(_TimeIsOverError):
                conn.execute("select %s::int from pg_sleep(0.5)", [666])
            assert conn.closed or select.select([conn.pgconn.socket], [], [], 10)[0]
            for statement in ("insert into joined values (%s)", "select %s::int"):
                with pytest.raises(psycopg.OperationalError):
                    conn.execute(statement, [7])
            pool.putconn(conn)
            assert conn.closed
            assert pool.fetch_one("select %s::int", [1]) == (1,)


def test_a_failing_thread_does_not_disturb_another_threads_statement(dsn: str) -> None:
    def fail() -> None:
        for _ in range(100):
            with contextlib.suppress(psycopg.Error):
                conn.execute("select 1 / %s", [0])
            conn.rollback()

    with Pool(dsn, pipeline_begin=True) as pool, pool.connection() as conn:
        run_in_threads(4, fail)
        assert not conn.closed
        assert conn.execute("select %s::int", [1]).fetchone() == (1,)


def test_a_kept_error_keeps_no_connection_alive(pools: tuple[Pool, Pool]) -> None:
    for pool in pools:
        with pytest.raises(psycopg.errors.AdminShutdown) as caught, pool.connection() as conn:
            _die(conn)
        error = caught.value.with_traceback(None)
        ref = weakref.ref(conn)
        del conn, caught
        assert ref() is None, error


# Configuration


def test_a_connection_class_may_override_how_a_transaction_begins(dsn: str) -> None:
    begun: list[str] = []

    class UserConnection(Connection[Any]):
        def _start_query(self) -> Any:
            begun.append("asked")
            yield from super()._start_query()

    with (
        Pool(dsn, pipeline_begin=True, connection_class=UserConnection) as pool,
        pool.connection() as conn,
    ):
        conn.execute("select %s::int", [1])
        assert begun == ["asked"]


def test_single_statements_keep_their_cursor(pools: tuple[Pool, Pool]) -> None:
    for pool in pools:
        assert pool.fetch_one("select %s::int", [1]) == (1,)
        (conn,) = pool._store.bag.idle
        assert conn._record.cursor is not None


def test_a_users_cursor_factory_is_kept(dsn: str) -> None:
    with Pool(dsn, pipeline_begin=True, kwargs={"cursor_factory": psycopg.ClientCursor}) as pool:
        with pool.connection() as conn:
            assert type(conn.cursor()) is psycopg.ClientCursor
    with Pool(dsn, pipeline_begin=True) as pool, pool.connection() as conn:
        assert type(conn.cursor()) is PipeliningCursor


@pytest.mark.parametrize(("text", "value"), [("1", True), ("yes", True), ("off", False)])
def test_it_is_read_from_the_environment(text: str, value: bool) -> None:
    settings = Settings.from_env(environ={"DBPOOL_PIPELINE_BEGIN": text})
    assert settings.pipeline_begin is value


def test_an_invalid_switch_is_rejected() -> None:
    with pytest.raises(ConfigError, match="DBPOOL_PIPELINE_BEGIN"):
        Settings.from_env(environ={"DBPOOL_PIPELINE_BEGIN": "maybe"})
