"""How the log reports callers who wait: one warning for each episode, not one for each call."""

from __future__ import annotations

import logging
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from psycopg_pool import TooManyRequests

from dbpool import DatabaseUnavailable, Pool
from dbpool.flask import DBPool
from tests.conftest import MakeApp
from tests.fake import FakeServer
from tests.pools import exhaustion_message, lines, time_out_callers
from tests.postgres import until
from tests.threads import Task


def test_exhaustion_logs_one_warning_and_at_its_end_a_count(
    fake: FakeServer, log: pytest.LogCaptureFixture
) -> None:
    with fake.pool(max_size=3) as pool:
        held = [pool.getconn() for _ in range(3)]
        time_out_callers(pool, 10)
        time_out_callers(pool, 10)
        (warning,) = lines(log, logging.WARNING)
        assert warning.startswith("pool 'default': no connection within 0.0")
        assert "3 of 3 checked out" in warning
        assert warning.count("test_episodes.py") == 1, "equal holders are grouped"
        assert "MainThread and 2 more" in warning
        for conn in held:
            pool.putconn(conn)
    assert lines(log, logging.INFO) == ["pool 'default': 20 callers timed out (PoolExhausted)"]


def test_exhaustion_with_timeout_zero_is_one_episode(
    fake: FakeServer, log: pytest.LogCaptureFixture
) -> None:
    with fake.pool(timeout=0, max_size=1) as pool:
        pool.wait()
        with pool.connection():
            time_out_callers(pool, 2)
            pool.maintain(time.monotonic())
            time_out_callers(pool, 2)
        assert len(lines(log, logging.WARNING)) == 1
    assert lines(log, logging.INFO) == ["pool 'default': 4 callers timed out (PoolExhausted)"]


def test_a_full_queue_logs_one_warning_with_numbers(
    fake: FakeServer, log: pytest.LogCaptureFixture
) -> None:
    with fake.pool(max_size=1, max_waiting=1) as pool:
        conn = pool.getconn()
        waiter = Task(time_out_callers, pool, 1, 10.0)
        until(lambda: pool.stats().waiting == 1)
        for _ in range(20):
            with pytest.raises(TooManyRequests):
                pool.getconn()
        (warning,) = lines(log, logging.WARNING)
        assert "1 waiting already, max_waiting is 1" in warning
        assert "1 of 1 connections checked out" in warning
        pool.putconn(conn)
        waiter.result(10)
    assert lines(log, logging.INFO) == ["pool 'default': 20 callers refused (TooManyRequests)"]


def test_a_connection_closed_by_its_holder_is_not_reported_as_lost(
    fake: FakeServer, log: pytest.LogCaptureFixture
) -> None:
    with fake.pool() as pool:
        with pool.connection() as conn:
            conn.close()
        assert pool.fetch_value("select 1") == 1
    assert "replaced" not in log.text


def test_failing_checks_log_one_warning(fake: FakeServer, log: pytest.LogCaptureFixture) -> None:
    def check(conn: Any) -> None:
        raise ValueError("not this one")

    with fake.pool(check=check) as pool:
        while pool.stats().counters.discarded["dead"] < 2:
            time_out_callers(pool, 1)
        found = [line for line in lines(log, logging.WARNING) if "failed check" in line]
        assert found[0] == "pool 'default': connection failed check: ValueError"
        assert all(line.count("[DBE02]") for line in found[1:]), found
        with pytest.raises(DatabaseUnavailable) as caught:
            pool.getconn(0.1)
        assert "to the database: connection failed check: ValueError" in str(caught.value)
    assert re.search(r"'default': \d+ checks failed", log.text)


def test_a_reset_that_exits_logs_one_warning(
    fake: FakeServer, log: pytest.LogCaptureFixture
) -> None:
    def reset(conn: Any) -> None:
        raise SystemExit

    with fake.pool(max_size=1, reset=reset) as pool:
        for _ in range(5):
            pool.execute("select 1")
        until(lambda: pool.stats().counters.discarded["broken"] == 5)
    (warning,) = lines(log, logging.WARNING)
    assert warning == "pool 'default': a maintenance task failed: SystemExit"
    assert "pool 'default': 5 maintenance tasks failed" in lines(log, logging.INFO)


def test_connections_returned_in_a_pipeline_log_one_warning(
    dsn: str, log: pytest.LogCaptureFixture
) -> None:
    pipelines = []
    with Pool(dsn) as pool:
        for _ in range(5):
            conn = pool.getconn()
            pipelines.append(conn.pipeline())
            pipelines[-1].__enter__()
            pool.putconn(conn)
        (warning,) = lines(log, logging.WARNING)
        assert warning.startswith(
            "pool 'default': discarding returned connection: it was returned in"
        )
        assert ", from pool/test_episodes.py:" in warning
        assert pool.stats().counters.discarded["broken"] == 5
    (message,) = [line for line in lines(log, logging.INFO) if "discarded" in line]
    assert message.startswith("pool 'default': 5 returned connections discarded, from ")


def test_a_connection_returned_in_a_transaction_is_logged_with_its_holder(
    dsn: str, log: pytest.LogCaptureFixture
) -> None:
    with Pool(dsn) as pool:
        for _ in range(3):
            conn = pool.getconn()
            conn.execute("select 1")
            pool.putconn(conn)
    (warning,) = lines(log, logging.WARNING)
    assert warning.startswith("pool 'default': rolling back returned connection: ")
    assert ", from pool/test_episodes.py:" in warning


def test_an_error_handler_logs_nothing_for_each_refused_request(
    make_app: MakeApp, fake: FakeServer, log: pytest.LogCaptureFixture
) -> None:
    db = DBPool()
    app = make_app(fake, db=db, DBPOOL_MAX_SIZE=1, DBPOOL_TIMEOUT="20ms")
    app.add_url_rule("/", view_func=lambda: str(db.pool.fetch_value("select 1")))
    pool = app.extensions["dbpool"].databases.default
    pool.open(wait=True)
    with pool.connection():
        for _ in range(10):
            assert app.test_client().get("/").status_code == 503
    assert len(lines(log, logging.WARNING)) == 1


def test_exhaustion_names_slow_statements_if_no_connection_came_back(fake: FakeServer) -> None:
    ended = threading.Event()
    fake.answers["select pg_sleep(1.5)"] = lambda: (ended.wait(10) and [("",)]) or []
    with fake.pool(max_size=2, timeout=0.3) as pool:
        with ThreadPoolExecutor(2) as threads:
            slow = [threads.submit(pool.fetch_value, "select pg_sleep(1.5)") for _ in range(2)]
            until(lambda: fake.statements.count("select pg_sleep(1.5)") == 2)
            text = exhaustion_message(pool)
            ended.set()
            assert "none came back in that time: slow statements or a silent network" in text
            assert "acknowledgements" not in text
        assert [each.result() for each in slow] == ["", ""]


def test_exhaustion_names_no_slow_statements_if_holders_run_none(fake: FakeServer) -> None:
    with fake.pool(max_size=1, timeout=0.1) as pool:
        with pool.connection(), ThreadPoolExecutor(1) as threads:
            text = threads.submit(exhaustion_message, pool).result()
    assert "slow statements" not in text
