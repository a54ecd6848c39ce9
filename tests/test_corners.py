"""Rare races: two calls at once, or a garbage collection in the middle of one."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg_pool import PoolClosed

import dbpool.pool._lending
from dbpool import Pool, Settings
from dbpool.pool._waiting import Waiter
from tests.fake import FakeServer
from tests.threads import Task

from .postgres import until


@pytest.mark.parametrize("reset", [None, lambda conn: None])
def test_a_garbage_collected_connection_is_replaced_and_logged(
    fake: FakeServer, reset: Callable[[Any], None] | None, caplog: pytest.LogCaptureFixture
) -> None:
    def leak_connection() -> None:
        pool.getconn().autocommit = True

    with fake.pool(max_size=1, reset=reset) as pool:
        with pool.connection() as conn:
            conn.autocommit = True
        until(lambda: pool.stats().idle == 1)
        del conn
        leak_connection()
        gc.collect()
        assert pool.fetch_value("select 1") == 1
    assert "garbage-collected" in caplog.text


def test_a_block_that_is_kept_keeps_no_connection(fake: FakeServer) -> None:
    with fake.pool(max_size=1) as pool:
        block = pool.connection()
        with block:
            pass
        pool.getconn()
        gc.collect()
        assert pool.fetch_value("select 1") == 1
        with pytest.raises(RuntimeError, match="of its own"), block:
            pass


def test_close_closes_connections_that_wait_for_their_reset(fake: FakeServer) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def reset(conn: Any) -> None:
        reached.set()
        go_on.wait(10)

    pool: Pool = fake.pool(max_size=3, num_workers=1, reset=reset)
    conns = [pool.getconn() for _ in range(3)]
    for conn in conns:
        pool.putconn(conn)
    reached.wait(10)
    closing = Task(pool.close)
    until(lambda: pool.closed)
    go_on.set()
    closing.result(10)
    until(lambda: all(conn.closed for conn in conns))
    assert pool.stats().size == 0


def test_pop_stats_loses_no_request(fake: FakeServer) -> None:
    calls, threads = 400, 4

    def work() -> None:
        for _ in range(calls):
            with pool.connection():
                pass

    with fake.pool(max_size=4) as pool:
        working = [Task(work) for _ in range(threads)]
        counted = 0
        while any(task.is_running for task in working):
            counted += pool.pop_stats()["requests_num"]
        assert counted + pool.pop_stats()["requests_num"] == calls * threads


def test_resize_counts_connections_returned_while_it_runs(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake.pool(max_size=4) as pool:
        out = [pool.getconn() for _ in range(4)]
        pool.putconn(out.pop())
        close = psycopg.Connection.close

        def close_and_return(conn: Any) -> None:
            close(conn)
            while out:
                pool.putconn(out.pop())

        monkeypatch.setattr(psycopg.Connection, "close", close_and_return)
        pool.resize(1, 1)
        until(lambda: pool.stats().size == 1)


def test_a_check_may_use_the_connection_as_a_context_manager(dsn: str) -> None:
    def check(conn: psycopg.Connection[Any]) -> None:
        with conn:
            conn.execute("select 1")

    with Pool(dsn, max_size=1, check=check) as pool:
        pids = {pool.fetch_value("select pg_backend_pid()") for _ in range(5)}
    assert len(pids) == 1


def test_a_connection_lent_again_during_a_leak_report_is_not_blamed_on_its_new_holder(
    fake: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    with fake.pool(min_size=2, max_size=2, leak_after=0.3) as pool:
        pool.wait()
        # Together, so one run of the watchdog finds both; on two lines, so it logs two reports.
        first = pool.getconn()
        second = pool.getconn()
        other_holder: list[Task] = []

        class ReturnDuringReport(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                if "has been held" in record.getMessage() and not other_holder:
                    for conn in (first, second):
                        pool.putconn(conn)
                    other_holder.append(Task(check_out, name="innocent"))
                    checked_out.wait(10)

        checked_out, done = threading.Event(), threading.Event()
        checked_out_at: list[float] = []

        def check_out() -> None:
            with pool.connection(), pool.connection():
                checked_out_at.append(time.time())
                checked_out.set()
                done.wait(10)

        handler = ReturnDuringReport()
        logging.getLogger("dbpool").addHandler(handler)
        try:
            until(lambda: caplog.text.count("has been held") >= 2)
        finally:
            logging.getLogger("dbpool").removeHandler(handler)
            done.set()
        other_holder[0].result(10)
    reported = [
        r.created for r in caplog.records if "by innocent" in r.getMessage().partition("\n")[0]
    ]
    assert all(when >= checked_out_at[0] + 0.3 for when in reported), "blamed too early"


def test_a_connection_returned_while_waiters_are_rejected_goes_to_one_of_them(
    fake: FakeServer,
) -> None:
    with fake.pool(max_size=1) as pool:
        conn = pool.getconn()
        waiting = [Task(pool.getconn) for _ in range(3)]
        until(lambda: pool.stats().waiting == 3)

        def reason() -> Exception:  # as if its holder were garbage collected now
            if conn._record.since:
                pool.putconn(conn)
            return PoolClosed("as closing does")

        with pool._lock:
            pool._store.waiting.reject_all(reason)
        outcomes = [task.outcome(10) for task in waiting]
        assert sum(isinstance(outcome, PoolClosed) for outcome in outcomes) == 2
        assert sum(outcome is conn for outcome in outcomes) == 1
        pool.putconn(conn)


def test_a_connection_returned_while_a_caller_joins_the_queue_is_handed_over(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake.pool(max_size=1, timeout=5) as pool:
        conn = pool.getconn()

        def return_and_wait(*args: Any) -> Waiter:  # as if its holder were garbage collected now
            pool.putconn(conn)
            return Waiter(*args)

        monkeypatch.setattr(dbpool.pool._lending, "Waiter", return_and_wait)
        assert pool.getconn(timeout=1) is conn
        assert (pool.stats().idle, pool.stats().waiting) == (0, 0)
        monkeypatch.undo()
        pool.putconn(conn)


def test_max_size_none_means_min_size_from_any_source(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fake.pool(settings=Settings(min_size=5), max_size=None).max_size == 5
    assert fake.pool(min_size=3, max_size=None).max_size == 3
    monkeypatch.setenv("DATABASE_URL", fake.conninfo)
    monkeypatch.setenv("DBPOOL_MIN_SIZE", "4")
    assert Pool(max_size=None).max_size == 4
