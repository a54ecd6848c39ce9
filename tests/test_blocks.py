"""A `connection()` block ends as psycopg_pool's does, whatever happened in it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg.pq import TransactionStatus
from psycopg_pool import ConnectionPool

from dbpool import Pool

Conn = psycopg.Connection[Any]

_left_open = contextlib.ExitStack()

SETUP = """
    drop table if exists blocks;
    create table blocks (id integer constraint "nur_für_einen" unique deferrable initially deferred);
    create or replace function notice() returns trigger language plpgsql as $$
        begin raise notice 'raised at commit'; return null; end $$;
    create constraint trigger notices after insert on blocks
        deferrable initially deferred for each row execute function notice();
"""


def _nothing(conn: Conn) -> None:
    pass


def _insert(conn: Conn) -> None:
    conn.execute("insert into blocks values (1)")


def _twice(conn: Conn) -> None:
    conn.execute("set client_encoding to latin1")  # the error message has this encoding
    conn.commit()
    conn.execute("insert into blocks values (2), (2)")


def _fail(conn: Conn) -> None:
    with contextlib.suppress(psycopg.Error):
        conn.execute("select 1 / 0")


def _raise(conn: Conn) -> None:
    conn.execute("insert into blocks values (4)")
    raise KeyError("the user's own")


def _leave_a_transaction_open(conn: Conn) -> None:
    _left_open.enter_context(conn.transaction())
    conn.execute("insert into blocks values (5)")


def _leave_a_pipeline_open(conn: Conn) -> None:
    _left_open.enter_context(conn.pipeline())
    conn.execute("insert into blocks values (6) returning id").fetchone()  # all results are here


def _begin_two_phases(conn: Conn) -> None:
    conn.tpc_begin(conn.xid(1, "a", "b"))
    conn.execute("insert into blocks values (7)")


def _notify(conn: Conn) -> None:
    conn.execute("listen blocks")
    conn.execute("notify blocks, 'sent at commit'")


def _close(conn: Conn) -> None:
    conn.execute("insert into blocks values (8)")
    conn.close()


def _autocommit(conn: Conn) -> None:
    conn.autocommit = True
    conn.execute("insert into blocks values (9)")


@pytest.fixture
def pools(dsn: str) -> Iterator[tuple[Pool, ConnectionPool]]:
    with Pool(dsn, max_size=1) as pool, ConnectionPool(dsn, min_size=1, open=True) as reference:
        yield pool, reference
    with psycopg.connect(dsn) as conn:
        conn.execute("drop table if exists blocks; drop function if exists notice")


@pytest.mark.parametrize(
    "work",
    [
        _nothing, _insert, _twice, _fail, _raise, _leave_a_transaction_open,
        _leave_a_pipeline_open, _begin_two_phases, _notify, _close, _autocommit,
    ],
)  # fmt: skip
def test_a_block_ends_as_in_psycopg_pool(
    pools: tuple[Pool, ConnectionPool], work: Callable[[Conn], None]
) -> None:
    actual, expected = (_outcome(pool, work) for pool in pools)
    assert actual == expected


def _outcome(pool: Any, work: Callable[[Conn], None]) -> dict[str, object]:
    """The outcome of a block that does *work*: errors, log lines, rows."""
    with pool.connection() as conn:
        conn.execute(SETUP)
    received: list[str] = []
    error: BaseException | None = None
    try:
        with pool.connection() as conn:
            conn.add_notice_handler(lambda notice: received.append(notice.message_primary or ""))
            conn.add_notify_handler(lambda notify: received.append(notify.payload))
            work(conn)
    except Exception as ex:  # noqa: BLE001  # any exception is compared
        error = ex
    with contextlib.suppress(psycopg.Error):
        _left_open.close()
    with pool.connection() as conn:
        assert conn.pgconn.transaction_status == TransactionStatus.IDLE
        rows = conn.execute("select id from blocks order by 1").fetchall()
    diag = getattr(error, "diag", None)
    return {
        "error": type(error),
        "text": str(error),
        "diag": diag and (diag.sqlstate, diag.constraint_name, diag.message_detail),
        "context": error and type(error.__context__),
        "received": received,
        "rows": rows,
    }
