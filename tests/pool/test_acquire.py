"""Checking out: which connection is handed out, and what a `with` block does."""

from __future__ import annotations

from typing import Any

import pytest

from dbpool import Pool
from tests.fake import FakeConnection, FakeServer
from tests.postgres import until


def test_commits_on_success_and_rolls_back_on_error(server_pool: Pool) -> None:
    server_pool.execute("create table t (id int)")
    with server_pool.connection() as conn:
        conn.execute("insert into t values (1)")
    with pytest.raises(ZeroDivisionError), server_pool.connection() as conn:
        conn.execute("insert into t values (2)")
        raise ZeroDivisionError
    assert server_pool.fetch_all("select id from t") == [(1,)]


def test_hands_out_the_connection_used_last(fake: FakeServer) -> None:
    with fake.pool(min_size=3, max_size=3) as pool:
        pool.wait()
        pids = {pool.fetch_value("select pg_backend_pid()") for _ in range(10)}
    assert len(pids) == 1


def test_timeout_zero_still_gets_an_idle_connection(pool: Pool) -> None:
    pool.wait()
    pool.putconn(pool.getconn(timeout=0))


def test_timeout_zero_closes_no_connection_that_was_idle_for_long(fake: FakeServer) -> None:
    with fake.pool(min_size=3, max_size=3, ping_after=0) as pool:
        pool.wait()
        with pool.connection(timeout=0):
            pass
        assert pool.stats().idle == 3


def test_a_connection_past_its_lifetime_is_not_handed_out(fake: FakeServer) -> None:
    with fake.pool(max_size=1, max_lifetime=0.2) as pool:
        pid = pool.fetch_value("select pg_backend_pid()")
        until(lambda: pool.fetch_value("select pg_backend_pid()") != pid)
        assert pool.stats().counters.discarded["expired"] >= 1


def test_a_connection_whose_enter_raises_is_returned(fake: FakeServer) -> None:
    class EnterFails(FakeConnection):
        def __enter__(self) -> Any:
            raise RuntimeError("not now")

    with fake.pool(max_size=1, connection_class=EnterFails) as pool:
        for _ in range(2):
            with pytest.raises(RuntimeError) as caught, pool.connection(timeout=5):
                raise AssertionError("it was entered")
            assert pool.stats().active == 0, caught


def test_entering_one_connection_block_twice_is_an_error(
    fake: FakeServer,
) -> None:
    with fake.pool(max_size=3) as pool:
        shared = pool.connection()
        with shared as first:
            with pytest.raises(RuntimeError, match=r"connection\(\) of its own"), shared:
                pass
            with pool.connection() as second:
                assert first is not second
        with pytest.raises(RuntimeError), shared:
            pass
        assert pool.stats().active == 0
