"""The answer to COMMIT or to a single statement does not arrive: when the outcome is uncertain."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import class_row, dict_row, tuple_row

from dbpool import CommitUncertain, Pool
from tests.pools import MakePool, assert_serves_all, fill, terminate
from tests.postgres import Server, until
from tests.proxy import Cut, Proxy
from tests.threads import Task

COMMIT = b"COMMIT"
INSERT = "insert into t values (%s)"


class Row:
    def __init__(self, id: int) -> None:  # noqa: A002
        self.id = id


class OwnCommit(psycopg.Connection[Any]):
    """A connection class with its own `commit`."""

    def commit(self) -> None:
        super().commit()


@pytest.fixture
def rows(own_server: Server) -> Callable[[], int]:
    own_server.execute("create table t (id int primary key deferrable initially deferred)")

    def count() -> int:
        return int(own_server.execute("select count(*) from t")[0][0])

    return count


Rows = Callable[[], int]


def by_block(pool: Pool) -> None:
    with pool.connection() as conn:
        conn.execute(INSERT, [1])


def by_run(pool: Pool) -> None:
    pool.run(lambda conn: conn.execute(INSERT, [1]))


@pytest.mark.parametrize("pipeline_begin", [False, True])
@pytest.mark.parametrize("work", [by_block, by_run])
@pytest.mark.parametrize("connection_class", [psycopg.Connection, OwnCommit])
@pytest.mark.parametrize("when", [Cut.BEFORE, Cut.DURING])
def test_a_commit_without_an_answer_is_uncertain(
    proxy: Proxy, make_pool: MakePool, rows: Rows, work: Callable[[Pool], None],
    connection_class: Any, pipeline_begin: bool, when: Cut,
) -> None:  # fmt: skip
    pool = make_pool(
        proxy.conninfo, connection_class=connection_class, pipeline_begin=pipeline_begin
    )
    fill(pool)
    proxy.cut(COMMIT, when)
    with pytest.raises(CommitUncertain) as caught:
        work(pool)
    assert caught.value.pool == "faults"
    assert caught.value.snapshot is not None
    assert type(caught.value.__cause__) is psycopg.OperationalError
    until(lambda: rows() == (0 if when is Cut.BEFORE else 1))


@pytest.mark.parametrize("pipeline_begin", [False, True])
@pytest.mark.parametrize("work", [by_block, by_run])
def test_a_commit_whose_result_arrived_is_no_error_though_the_connection_is_lost(
    proxy: Proxy, make_pool: MakePool, rows: Rows, work: Callable[[Pool], None],
    pipeline_begin: bool,
) -> None:  # fmt: skip
    pool = make_pool(proxy.conninfo, pipeline_begin=pipeline_begin)
    fill(pool)
    proxy.cut(COMMIT, Cut.DURING, messages=1)  # without ReadyForQuery
    work(pool)
    assert rows() == 1
    assert_serves_all(pool)


@pytest.mark.parametrize("work", [by_block, by_run])
@pytest.mark.parametrize("messages", [1, 2])
def test_the_servers_error_at_commit_keeps_its_class(
    proxy: Proxy, make_pool: MakePool, rows: Rows, own_server: Server,
    work: Callable[[Pool], None], messages: int,
) -> None:  # fmt: skip
    own_server.execute("insert into t values (1)")
    pool = make_pool(proxy.conninfo)
    fill(pool)
    proxy.cut(COMMIT, Cut.DURING, messages=messages)
    with pytest.raises(psycopg.errors.UniqueViolation):
        work(pool)
    assert rows() == 1


@pytest.mark.parametrize("connection_class", [psycopg.Connection, OwnCommit])
def test_a_commit_to_a_terminated_backend_is_not_uncertain(
    own_server: Server, proxy: Proxy, make_pool: MakePool, rows: Rows, connection_class: Any
) -> None:
    pool = make_pool(proxy.conninfo, connection_class=connection_class)
    with pytest.raises(psycopg.errors.AdminShutdown), pool.connection() as conn:
        conn.execute(INSERT, [1])
        terminate(own_server, [conn.info.backend_pid])
    assert rows() == 0


def test_a_loss_noticed_before_commit_is_sent_is_not_uncertain(
    proxy: Proxy, make_pool: MakePool, rows: Rows
) -> None:
    pool = make_pool(proxy.conninfo)
    with pytest.raises(psycopg.OperationalError) as caught, pool.connection() as conn:
        conn.execute(INSERT, [1])
        proxy.drop()
        until(lambda: proxy.links == 0)
    assert not isinstance(caught.value, CommitUncertain)
    assert rows() == 0


def test_a_loss_in_the_users_own_commit_is_not_translated(
    proxy: Proxy, make_pool: MakePool, rows: Rows
) -> None:
    pool = make_pool(proxy.conninfo)
    proxy.cut(COMMIT, Cut.DURING)
    with pytest.raises(psycopg.OperationalError) as caught, pool.connection() as conn:
        conn.execute(INSERT, [1])
        conn.commit()
    assert not isinstance(caught.value, CommitUncertain)
    until(lambda: rows() == 1)


def read_only(conn: psycopg.Connection[Any]) -> None:
    conn.read_only = True


@pytest.mark.parametrize(
    "options",
    [
        {"configure": read_only},
        {"kwargs": {"options": "-c default_transaction_read_only=on"}},
    ],
)
@pytest.mark.parametrize("connection_class", [psycopg.Connection, OwnCommit])
def test_a_read_only_transaction_is_never_uncertain(
    proxy: Proxy, make_pool: MakePool, options: dict[str, Any], connection_class: Any
) -> None:
    pool = make_pool(proxy.conninfo, connection_class=connection_class, **options)
    pool.fetch_one("select 1")
    proxy.cut(COMMIT, Cut.DURING)
    with pytest.raises(psycopg.OperationalError) as caught, pool.connection() as conn:
        conn.execute("select 1")
    assert not isinstance(caught.value, CommitUncertain)
    proxy.cut(b"'mark'", Cut.DURING)
    with pytest.raises(psycopg.OperationalError) as caught:
        pool.execute("select 'mark'")
    assert not isinstance(caught.value, CommitUncertain)


# Single statements


FACTORIES = [None, tuple_row, dict_row, class_row(Row)]


@pytest.mark.parametrize("row_factory", FACTORIES)
@pytest.mark.parametrize("when", [Cut.BEFORE, Cut.DURING])
def test_a_single_statement_without_an_answer_is_uncertain(
    proxy: Proxy, make_pool: MakePool, rows: Rows, row_factory: Any, when: Cut
) -> None:
    pool = make_pool(proxy.conninfo)
    calls: list[Callable[[], Any]] = [
        lambda: pool.execute("insert into t values (1)"),
        lambda: pool.execute(sql.SQL(INSERT), [2]),
        lambda: pool.fetch_one(INSERT + " returning id", [3], row_factory=row_factory),
        lambda: pool.fetch_all(b"insert into t values (4) returning id", row_factory=row_factory),
        lambda: pool.execute("select 'insert into t'"),  # a function may write
    ]
    for number, call in enumerate(calls, 1):
        proxy.cut(b"insert into t", when)
        with pytest.raises(CommitUncertain) as caught:
            call()
        assert type(caught.value.__cause__) is psycopg.OperationalError
        if when is Cut.DURING:
            until(lambda number=number: rows() == min(number, 4))  # type: ignore[misc]
    assert rows() == (0 if when is Cut.BEFORE else 4)


@pytest.mark.parametrize("row_factory", [None, class_row(Row)])
@pytest.mark.parametrize("messages", [0, 1])
def test_a_loss_while_a_statement_is_prepared_is_not_uncertain(
    proxy: Proxy, make_pool: MakePool, rows: Rows, row_factory: Any, messages: int
) -> None:
    pool = make_pool(proxy.conninfo, max_size=1)
    query = INSERT + " returning id"
    for number in range(5):
        pool.fetch_one(query, [number], row_factory=row_factory)
    proxy.cut(b"_pg3_", Cut.DURING, messages=messages)
    with pytest.raises(psycopg.OperationalError) as caught:
        pool.fetch_one(query, [5], row_factory=row_factory)
    assert not isinstance(caught.value, CommitUncertain)
    assert rows() == 5
    for number in range(5, 11):
        pool.fetch_one(query, [number], row_factory=row_factory)
    proxy.cut(b"_pg3_", Cut.DURING)  # now it is prepared
    with pytest.raises(CommitUncertain):
        pool.fetch_one(query, [11], row_factory=row_factory)
    until(lambda: rows() == 12)


@pytest.mark.parametrize("part", ["parameter", "text"])
def test_a_loss_while_a_statement_is_being_sent_is_not_uncertain(
    proxy: Proxy, make_pool: MakePool, rows: Rows, part: str
) -> None:
    pool = make_pool(proxy.conninfo)
    fill(pool)
    large = "x" * 30_000_000
    proxy.cut(b"insert into t", Cut.BEFORE)
    proxy.delay = 0.3  # the proxy reads nothing until then, so the pool cannot send everything
    with pytest.raises(psycopg.OperationalError) as caught:
        if part == "parameter":
            pool.execute("insert into t select 1 where %s::text <> ''", [large])
        else:
            pool.execute(f"insert into t select 1 where '{large}' <> ''")
    proxy.delay = 0.0
    assert not isinstance(caught.value, CommitUncertain)
    assert rows() == 0
    if part == "parameter":
        assert pool.execute("insert into t select 1 where %s::text <> ''", [large]) == 1


READING = [
    "select 'mark'",
    "  SELECT 'mark';  ",
    "((select 'mark'))",
    "-- insert\n/* delete; */ select 'mark'",
    "select 'mark', 'a;b'",
    "select $a$;$a$, 'mark', \"id\" from t -- ;",
    "show /* mark */ work_mem",
    "table t -- mark",
    "values ('mark')",
    "select\n'mark'",
]
WRITING = [
    "with a as (insert into t values (1) returning *) select 'mark' from a",
    "(with a as (delete from t returning *) select 'mark' from a)",
    "explain analyze insert into t select 1 where 'mark' = ''",
    "select 'mark'; delete from t",
    "/* /* */ select */ delete from t where 'mark' = '' returning 1",
    "selected('mark')",
    "call select_('mark')",
]


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize(
    ("method", "query", "is_uncertain"),
    [
        *(("fetch_all", query, False) for query in READING),
        *(("fetch_all", query, True) for query in WRITING),
        *(("fetch_one", *case) for case in ((READING[0], False), (WRITING[0], True))),
        *(("fetch_value", *case) for case in ((READING[0], False), (WRITING[0], True))),
    ],
)
def test_a_fetch_is_uncertain_only_if_its_statement_may_write(
    proxy: Proxy, make_pool: MakePool, method: str, query: str, is_uncertain: bool
) -> None:
    pool = make_pool(proxy.conninfo)
    proxy.cut(b"mark", Cut.BEFORE)
    with pytest.raises(psycopg.OperationalError) as caught:
        getattr(pool, method)(query)
    assert isinstance(caught.value, CommitUncertain) is is_uncertain
    if is_uncertain:
        return
    proxy.cut(b"mark", Cut.BEFORE)
    with pytest.raises(CommitUncertain):
        pool.execute(query)


@pytest.mark.parametrize(
    "query", ["insert into t select 1 from pg_sleep(30)", "select pg_sleep(30)"]
)
def test_a_terminated_statement_raises_admin_shutdown(
    own_server: Server, proxy: Proxy, make_pool: MakePool, rows: Rows, query: str
) -> None:
    pool = make_pool(proxy.conninfo)
    (pid,) = fill(pool)
    task = Task(lambda: pool.execute(query))
    until(lambda: own_server.execute(
        "select 1 from pg_stat_activity where pid = %s and wait_event = 'PgSleep'", pid
    ))  # fmt: skip
    terminate(own_server, [pid])
    assert type(task.error()) is psycopg.errors.AdminShutdown
    assert rows() == 0


def test_a_single_statement_in_a_transaction_is_uncertain_only_at_its_commit(
    proxy: Proxy, make_pool: MakePool, rows: Rows
) -> None:
    def configure(conn: psycopg.Connection[Any]) -> None:
        conn.isolation_level = psycopg.IsolationLevel.SERIALIZABLE

    pool = make_pool(proxy.conninfo, configure=configure)
    proxy.cut(b"insert into t", Cut.DURING)
    with pytest.raises(psycopg.OperationalError) as caught:
        pool.execute("insert into t values (1)")
    assert not isinstance(caught.value, CommitUncertain)  # nothing was committed yet
    proxy.cut(COMMIT, Cut.DURING)
    with pytest.raises(CommitUncertain):
        pool.execute("insert into t values (1)")
    until(lambda: rows() == 1)
    proxy.cut(COMMIT, Cut.DURING)
    with pytest.raises(psycopg.OperationalError) as caught:
        pool.fetch_all("select * from t")
    assert not isinstance(caught.value, CommitUncertain)
    proxy.cut(COMMIT, Cut.DURING, messages=1)
    assert pool.execute("insert into t values (2)") == 1


def test_a_statement_whose_result_arrived_is_no_error_though_deallocate_fails(
    proxy: Proxy, make_pool: MakePool, own_server: Server, rows: Rows
) -> None:
    own_server.execute("create table gone (id int)")
    pool = make_pool(proxy.conninfo, max_size=1)
    for _ in range(6):
        pool.fetch_one("select %s::int", [1])
    proxy.cut(b"DEALLOCATE ALL", Cut.BEFORE)  # psycopg sends it after a DROP
    assert pool.execute("drop table gone") == -1
    assert not proxy.is_armed
    assert rows() == 0


# psycopg notices the loss before libpq does


def failing_wait(
    proxy: Proxy, armed: threading.Event, is_answered: bool
) -> type[psycopg.Connection[Any]]:
    """Return a class whose `wait`, while *armed*, ends as if `poll` had reported only an error."""

    class FailingWait(psycopg.Connection[Any]):
        def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
            if not armed.is_set():
                return super().wait(gen, *args, **kwargs)
            armed.clear()
            if not is_answered:
                proxy.go_silent()
            next(gen)  # sends the statement
            if is_answered:
                select.select([self.fileno()], [], [], 10)
            proxy.drop(reset=True)
            select.select([self.fileno()], [], [], 10)
            raise psycopg.OperationalError("connection socket closed")

    return FailingWait


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("is_answered", [False, True])
def test_a_loss_that_only_psycopg_noticed_is_handled_as_a_loss(
    proxy: Proxy, make_pool: MakePool, caplog: pytest.LogCaptureFixture, is_answered: bool
) -> None:
    armed, pids = threading.Event(), []
    connection_class = failing_wait(proxy, armed, is_answered)
    pool = make_pool(proxy.conninfo, connection_class=connection_class, max_size=1)
    pool.wait()

    def insert_in_block() -> None:
        with pool.connection() as conn:
            conn.execute(INSERT, [1])
            armed.set()

    def work(conn: psycopg.Connection[Any]) -> None:
        pids.append(conn.info.backend_pid)
        armed.set() if len(pids) == 1 else armed.clear()
        conn.execute(INSERT, [2])

    with pytest.raises(CommitUncertain):
        insert_in_block()
    armed.set()
    with pytest.raises(CommitUncertain):
        pool.execute(INSERT, [3])
    armed.set()
    with pytest.raises(psycopg.OperationalError) as caught:
        pool.fetch_value("select 1")
    assert not isinstance(caught.value, CommitUncertain)
    pool.run(work)
    assert len(pids) == 2
    assert pool.stats().counters.discarded["broken"] == 4
    assert "in the middle of an operation" not in caplog.text
