"""A statement that an exception left running is cancelled before its connection is closed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from dbpool import Pool
from tests.interrupts import alarm
from tests.pools import MakePool
from tests.postgres import Server, until
from tests.threads import Task

SLOW = "select pg_sleep(30)"


class Interrupted(Exception):  # like a task queue's soft time limit
    """Raised by a signal handler in the middle of a statement."""


pytestmark = pytest.mark.skipif(
    not psycopg.capabilities.has_cancel_safe(), reason="libpq cancels safely from 17 on"
)


def by_fetch(pool: Pool[Any]) -> None:
    pool.fetch_value(SLOW)


def by_execute(pool: Pool[Any]) -> None:
    pool.execute(SLOW)


def by_block(pool: Pool[Any]) -> None:
    with pool.connection() as conn:
        conn.execute("select 1")
        conn.execute(SLOW)


def by_parameters(pool: Pool[Any]) -> None:
    with pool.connection() as conn:
        conn.execute("select pg_sleep(%s)", [30])


def by_run(pool: Pool[Any]) -> None:
    pool.run(lambda conn: conn.execute(SLOW))


def by_hand(pool: Pool[Any]) -> None:
    conn = pool.getconn()
    try:
        conn.execute(SLOW)
    finally:
        pool.putconn(conn)


def by_forgetting(pool: Pool[Any]) -> None:
    since = time.monotonic()
    conn = pool.getconn()
    try:
        conn.execute(SLOW)
    finally:
        assert len(pool.return_held(since)) == 1


def running(server: Server) -> int:
    ((number,),) = server.execute(
        "select count(*) from pg_stat_activity where state = 'active' and query ~ 'pg_sleep'"
        " and pid <> pg_backend_pid()"
    )
    return int(number)


USES = [by_fetch, by_execute, by_block, by_parameters, by_run, by_hand, by_forgetting]


@pytest.mark.parametrize(
    ("use", "pipeline_begin"), [*((use, False) for use in USES), (by_parameters, True)]
)
def test_an_interrupted_statement_is_cancelled(
    own_server: Server, make_pool: MakePool, use: Callable[[Pool[Any]], None], pipeline_begin: bool
) -> None:
    pool = make_pool(max_size=1, pipeline_begin=pipeline_begin)
    pool.wait()
    for _ in range(3):
        with pytest.raises(Interrupted), alarm(0.1, Interrupted):
            use(pool)
        began = time.monotonic()
        assert pool.fetch_value("select 1") == 1, "the slot is free"
        assert time.monotonic() - began < 1.0, "the slot is free at once"
    until(lambda: running(own_server) == 0, 5.0)


def test_nothing_is_cancelled_while_connects_fail(own_server: Server, make_pool: MakePool) -> None:
    own_server.execute("create role app login password 'right'")
    pool = make_pool(own_server.conninfo_for(user="app", password="right"), min_size=2, timeout=1)
    conn, other = pool.getconn(), pool.getconn()
    own_server.execute("alter role app password 'new'")
    other.close()
    pool.putconn(other)  # one below min_size: the pool keeps trying to connect
    until(lambda: pool.breaker.is_failing)
    with pytest.raises(Interrupted), alarm(0.1, Interrupted):
        conn.execute(SLOW)
    pool.putconn(conn)
    pool.maintain(time.monotonic())
    assert running(own_server) == 1
    own_server.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where query = %s", SLOW
    )


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_cancels_no_statement_of_its_parent(
    own_server: Server, make_pool: MakePool
) -> None:
    pool = make_pool(max_size=1)
    conn = pool.getconn()
    holder = Task(lambda: conn.execute("select pg_sleep(2)").fetchone())
    until(lambda: running(own_server) == 1)

    child = os.fork()
    if child == 0:
        try:
            pool.putconn(conn)
            pool.maintain(time.monotonic())
            pool.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert holder.result() is not None, "the parent's statement was cancelled"
    conn.rollback()
    pool.putconn(conn)


def test_close_cancels_interrupted_statements(own_server: Server, make_pool: MakePool) -> None:
    pool = make_pool(max_size=1)
    pool.wait()
    with pytest.raises(Interrupted), alarm(0.1, Interrupted):
        pool.fetch_value(SLOW)
    pool.close()
    until(lambda: running(own_server) == 0, 5.0)
