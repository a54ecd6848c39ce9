"""Returning a connection: which ones the pool keeps, closes or rejects."""

from __future__ import annotations

import gc
from collections.abc import Callable

import psycopg
import pytest

from dbpool import Pool
from tests.fake import FakeServer
from tests.postgres import Server


@pytest.mark.parametrize("foreign", [True, False])
def test_a_connection_that_is_not_checked_out_cannot_be_returned(
    pool: Pool, fake: FakeServer, foreign: bool
) -> None:
    pool.wait()
    conn = fake.connection_class.connect() if foreign else pool.getconn()
    if not foreign:
        pool.putconn(conn)
    with pytest.raises(ValueError, match="can't return connection"):
        pool.putconn(conn)
    assert pool.stats().idle == pool.stats().size
    if foreign:
        conn.close()


def test_a_connection_returned_inside_its_block_is_not_returned_again(pool: Pool) -> None:
    with pytest.raises(ValueError, match="not out"), pool.connection() as conn:
        pool.putconn(conn)
    stats = pool.stats()
    assert (stats.size, stats.idle, stats.active, stats.counters.checkouts) == (1, 1, 0, 1)
    assert pool.fetch_value("select 1") == 1


def test_a_garbage_collected_connection_frees_its_slot(fake: FakeServer) -> None:
    with fake.pool(max_size=1) as pool:
        pool.getconn()
        gc.collect()
        assert pool.fetch_value("select 1") == 1
        counters = pool.stats().counters
        assert counters.discarded["collected"] == 1
        assert counters.checkouts == 2


@pytest.mark.parametrize("statement", ["select 1", "select 1/0"])
def test_an_open_transaction_is_rolled_back_on_return(server_pool: Pool, statement: str) -> None:
    conn = server_pool.getconn()
    try:
        conn.execute(statement)
    except psycopg.Error:
        pass
    server_pool.putconn(conn)
    assert server_pool.getconn() is conn
    assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    server_pool.putconn(conn)


def test_a_connection_returned_closed_is_replaced(pool: Pool) -> None:
    with pool.connection() as conn:
        conn.close()
    assert pool.fetch_value("select 1") == 1
    assert pool.stats().counters.discarded["broken"] == 1


def test_a_connection_returned_in_copy_is_replaced(server_pool: Pool) -> None:
    server_pool.execute("create table t (id int)")
    conn = server_pool.getconn()
    copying = conn.cursor().copy("copy t from stdin")
    copying.__enter__()
    server_pool.putconn(conn)
    assert conn.closed
    assert server_pool.fetch_value("select 1") == 1


def test_a_connection_returned_in_a_pipeline_is_replaced(server_pool: Pool) -> None:
    conn = server_pool.getconn()
    pipeline = conn.pipeline()
    pipeline.__enter__()
    server_pool.putconn(conn)
    assert conn.closed
    assert server_pool.fetch_value("select 1") == 1


def test_a_connection_returned_in_a_two_phase_commit_is_replaced(
    make_server: Callable[..., Server],
) -> None:
    with Pool(make_server(max_prepared_transactions=2).conninfo, max_size=1) as pool:
        conn = pool.getconn()
        conn.tpc_begin(conn.xid(1, "a", "b"))
        conn.execute("select 1")
        conn.tpc_prepare()
        pool.putconn(conn)
        assert conn.closed
        with pool.connection() as other:
            (prepared,) = other.tpc_recover()
            other.tpc_rollback(prepared)


def test_drain_replaces_idle_and_returned_connections(fake: FakeServer) -> None:
    with fake.pool(min_size=2, max_size=2) as pool:
        pool.wait()
        idle, out = pool.getconn(), pool.getconn()
        pool.putconn(idle)
        pool.drain()
        assert idle.closed
        pool.putconn(out)
        assert out.closed
        assert pool.fetch_value("select 1") == 1
