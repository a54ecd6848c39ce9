"""Connections lost around COMMIT, and transactions that conflict."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg import IsolationLevel

from dbpool import CommitUncertain, Pool, events
from tests.pools import MakePool, Recorder, assert_serves_all, fill, terminate
from tests.postgres import Server, until
from tests.proxy import Cut, Proxy
from tests.threads import Task

COMMIT = b"COMMIT"
INSERT = "insert into t values (%s) on conflict do nothing"


@pytest.fixture
def table(own_server: Server) -> Callable[[], list[int]]:
    """Make a table; the returned function reads its rows from another connection."""
    own_server.execute("create table t (id int primary key)")
    return lambda: [n for (n,) in own_server.execute("select id from t order by id")]


@pytest.fixture
def pool(proxy: Proxy, make_pool: MakePool) -> Pool:
    return make_pool(proxy.conninfo, max_size=2)


class Insert:
    """A function for `run` that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, conn: psycopg.Connection[Any], number: int) -> int:
        self.calls += 1
        conn.execute(INSERT, [number])
        return number


Rows = Callable[[], list[int]]


# Connections cut around the COMMIT of run()


def test_run_repeats_a_transaction_that_was_lost_before_commit(
    proxy: Proxy, pool: Pool, table: Rows
) -> None:
    calls: list[int] = []

    def insert(conn: psycopg.Connection[Any]) -> None:
        calls.append(conn.info.backend_pid)
        conn.execute("insert into t values (1)")
        if len(calls) == 1:
            proxy.drop()
            until(lambda: proxy.links == 0)

    pool.run(insert)
    assert len(set(calls)) == 2
    assert table() == [1]
    assert pool.stats().counters.retries == 1
    assert_serves_all(pool)


def test_a_commit_that_never_arrived_is_uncertain(proxy: Proxy, pool: Pool, table: Rows) -> None:
    insert = Insert()
    fill(pool)
    proxy.cut(COMMIT, Cut.BEFORE)
    with pytest.raises(CommitUncertain) as caught:
        pool.run(insert, 1)
    assert caught.value.pool == "faults"
    assert caught.value.snapshot is not None
    assert isinstance(caught.value.__cause__, psycopg.OperationalError)
    assert (insert.calls, table()) == (1, [])
    assert_serves_all(pool)


def test_a_commit_whose_answer_was_lost_is_uncertain(proxy: Proxy, pool: Pool, table: Rows) -> None:
    insert = Insert()
    fill(pool)
    proxy.cut(COMMIT, Cut.DURING)
    with pytest.raises(CommitUncertain):
        pool.run(insert, 1)
    assert insert.calls == 1
    until(lambda: table() == [1])
    assert_serves_all(pool)


@pytest.mark.parametrize("when", [Cut.BEFORE, Cut.DURING])
def test_run_repeats_an_uncertain_commit_if_idempotent(
    proxy: Proxy, pool: Pool, table: Rows, when: Cut
) -> None:
    insert = Insert()
    fill(pool)
    proxy.cut(COMMIT, when)
    assert pool.run(insert, 1, idempotent=True) == 1
    assert (insert.calls, table()) == (2, [1])
    assert_serves_all(pool)


@pytest.mark.parametrize("idempotent", ["false", "no", 1, [0]])
def test_only_true_repeats_an_uncertain_commit(
    proxy: Proxy, pool: Pool, table: Rows, idempotent: Any
) -> None:
    insert = Insert()
    fill(pool)
    proxy.cut(COMMIT, Cut.DURING)
    with pytest.raises(CommitUncertain):
        pool.run(insert, 1, idempotent=idempotent)
    assert insert.calls == 1


def test_a_connection_cut_after_the_commits_answer_is_no_failure(
    proxy: Proxy, pool: Pool, table: Rows
) -> None:
    insert = Insert()
    fill(pool)
    proxy.cut(COMMIT, Cut.AFTER)
    assert pool.run(insert, 1) == 1
    assert (insert.calls, table()) == (1, [1])
    until(lambda: proxy.links < 1)
    assert pool.run(insert, 2) == 2
    assert_serves_all(pool)


def test_run_repeats_a_read_only_transaction_whose_commit_was_lost(
    proxy: Proxy, pool: Pool
) -> None:
    fill(pool)
    proxy.cut(COMMIT, Cut.DURING)
    assert pool.run(lambda conn: conn.execute("select 1").fetchone(), read_only=True) == (1,)
    assert pool.stats().counters.retries == 1
    assert_serves_all(pool)


# Without run()


@pytest.mark.parametrize(("when", "rows"), [(Cut.BEFORE, []), (Cut.DURING, [1])])
def test_a_block_whose_commit_is_cut_raises_commit_uncertain(
    proxy: Proxy, pool: Pool, table: Rows, when: Cut, rows: list[int]
) -> None:
    fill(pool)
    proxy.cut(COMMIT, when)
    with pytest.raises(CommitUncertain) as caught, pool.connection() as conn:
        conn.execute(INSERT, [1])
    assert type(caught.value.__cause__) is psycopg.OperationalError
    until(lambda: table() == rows)
    assert pool.stats().counters.discarded["broken"] == 1
    assert_serves_all(pool)


def test_a_block_terminated_before_its_commit_raises(
    own_server: Server, pool: Pool, table: Rows
) -> None:
    with pytest.raises(psycopg.OperationalError), pool.connection() as conn:
        conn.execute(INSERT, [1])
        terminate(own_server, [conn.info.backend_pid])
    assert table() == []
    assert_serves_all(pool)


@pytest.mark.parametrize(("when", "rows"), [(Cut.BEFORE, []), (Cut.DURING, [1])])
def test_a_single_statement_is_never_sent_twice(
    proxy: Proxy, pool: Pool, table: Rows, when: Cut, rows: list[int]
) -> None:
    fill(pool)
    proxy.cut(b"insert into t", when)
    with pytest.raises(CommitUncertain) as caught:
        pool.execute("insert into t values (1)")
    assert type(caught.value.__cause__) is psycopg.OperationalError
    until(lambda: table() == rows)
    assert not proxy.is_armed
    assert_serves_all(pool)


def test_run_repeats_nothing_twice_if_its_function_uses_savepoints(
    proxy: Proxy, pool: Pool, table: Rows
) -> None:
    def insert(conn: psycopg.Connection[Any]) -> None:
        with conn.transaction():
            conn.execute("insert into t values (1)")
        with conn.transaction():
            conn.execute("insert into t values (2)")

    proxy.cut(b"values (2)", Cut.BEFORE)
    pool.run(insert)
    assert table() == [1, 2]
    pool.execute("delete from t")
    proxy.cut(b"COMMIT", Cut.DURING)
    with pytest.raises(CommitUncertain):
        pool.run(insert)
    until(lambda: table() == [1, 2])
    assert_serves_all(pool)


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_the_function_of_run_may_not_commit_or_roll_back(pool: Pool, table: Rows, end: str) -> None:
    def insert(conn: psycopg.Connection[Any]) -> None:
        conn.execute("insert into t values (1)")
        getattr(conn, end)()

    with pytest.raises(psycopg.ProgrammingError, match="forbidden"):
        pool.run(insert)
    assert table() == []
    assert_serves_all(pool)


def test_the_function_of_run_may_raise_rollback(pool: Pool, table: Rows) -> None:
    def insert_and_roll_back(conn: psycopg.Connection[Any]) -> int:
        conn.execute("insert into t values (1)")
        raise psycopg.Rollback

    assert pool.run(insert_and_roll_back) is None
    assert table() == []
    assert_serves_all(pool)


def test_rollback_raised_on_a_lost_connection_is_no_error(pool: Pool, table: Rows) -> None:
    def lose_connection(conn: psycopg.Connection[Any]) -> int:
        conn.execute("insert into t values (1)")
        conn.close()
        raise psycopg.Rollback

    assert pool.run(lose_connection) is None
    assert table() == []
    assert_serves_all(pool)


def test_successful_calls_refill_the_retry_budget(proxy: Proxy, pool: Pool) -> None:
    def ask(conn: psycopg.Connection[Any]) -> None:
        conn.execute("select 'once more'", prepare=False)

    while pool._budget.draw():
        pass
    for _ in range(9):
        pool.run(ask)
    proxy.cut(b"once more", Cut.BEFORE)
    with pytest.raises(psycopg.OperationalError):
        pool.run(ask)
    pool.run(ask)
    proxy.cut(b"once more", Cut.BEFORE)
    pool.run(ask)
    assert_serves_all(pool)


def test_the_retry_budget_bounds_retries_when_every_connection_is_lost(
    proxy: Proxy, pool: Pool
) -> None:
    def lose(conn: psycopg.Connection[Any]) -> None:
        proxy.drop()
        conn.execute("select 1")

    calls = 0
    for _ in range(4):
        with pytest.raises(psycopg.OperationalError):
            pool.run(lose, attempts=3)
        calls += 1
    # The budget allows two for each connection that the pool may have; 4 calls could have made 8.
    assert pool.stats().counters.retries == 4
    assert calls == 4
    assert_serves_all(pool)


# Two real transactions


def test_two_serializable_transactions_that_conflict_both_succeed(
    own_server: Server, make_pool: MakePool
) -> None:
    own_server.execute("create table doctors (name text primary key, on_call bool)")
    own_server.execute("insert into doctors values ('a', true), ('b', true)")
    recorder = Recorder()
    pool = make_pool(max_size=2, listeners=[recorder])
    together = threading.Barrier(2, timeout=10)
    local = threading.local()

    def go_off_call(conn: psycopg.Connection[Any], name: str) -> bool:
        (count,) = conn.execute("select count(*) from doctors where on_call").fetchone() or (0,)
        if not hasattr(local, "has_met"):
            local.has_met = True
            together.wait()
        if count < 2:
            return False
        conn.execute("update doctors set on_call = false where name = %s", [name])
        return True

    serializable = IsolationLevel.SERIALIZABLE
    tasks = [Task(lambda n=n: pool.run(go_off_call, n, isolation=serializable)) for n in "ab"]
    assert sorted(task.result() for task in tasks) == [False, True]
    assert own_server.execute("select count(*) from doctors where on_call") == [(1,)]
    assert_serves_all(pool)
    pool.close()  # sends what is still queued
    assert pool.stats().counters.retries == recorder.count(events.Retried) >= 1


@pytest.fixture
def quick_deadlocks(own_server: Server) -> None:
    own_server.execute("alter system set deadlock_timeout = '50ms'")
    own_server.reload()


@pytest.mark.usefixtures("quick_deadlocks")
def test_two_transactions_that_deadlock_both_succeed(
    own_server: Server, make_pool: MakePool
) -> None:
    own_server.execute("create table t (id int primary key, n int)")
    own_server.execute("insert into t values (1, 0), (2, 0)")
    pool = make_pool(max_size=2)
    together = threading.Barrier(2, timeout=10)
    local = threading.local()

    def update(conn: psycopg.Connection[Any], first: int, second: int) -> None:
        conn.execute("update t set n = n + 1 where id = %s", [first])
        if not hasattr(local, "has_met"):
            local.has_met = True
            together.wait()
        conn.execute("update t set n = n + 1 where id = %s", [second])

    tasks = [Task(pool.run, update, 1, 2), Task(pool.run, update, 2, 1)]
    for task in tasks:
        task.result()
    assert own_server.execute("select n from t order by id") == [(2,), (2,)]
    assert pool.stats().counters.retries >= 1
    assert_serves_all(pool)
