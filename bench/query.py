"""One SELECT, one INSERT, and a transaction of three statements, each peer's usual way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import psycopg

from bench._measure import against, interleaved, one_cpu
from bench._peers import ALL_PEERS, Dbpool, DbpoolPipelining, Peer, PsycopgPool
from bench._report import Table
from tests.postgres import served
from tests.proxy import Proxy

ONE_ROUND_TRIP = "dbpool, one trip"
_BY_KEY = "select body from rows where id = %s"
_NETWORK_DELAY = 0.001  # seconds that a message takes each way
FLOOR = "psycopg, autocommit, no pool"  # what no pool over psycopg can be cheaper than


def run(quick: bool) -> Table:
    """Measure on pools whose connections are all open, as they are in a server that is used."""
    repetitions = (20, 6) if quick else (100, 100)
    others = [cls.name for cls in ALL_PEERS if cls is not Dbpool]
    names = [Dbpool.name, ONE_ROUND_TRIP, DbpoolPipelining.name, *others, FLOOR]
    table = Table("query", "Queries", names)
    with one_cpu(), served() as server:
        server.execute("create table rows (id bigserial primary key, body text)")
        with (
            _opened(ALL_PEERS, server.conninfo, 4) as peers,
            psycopg.connect(server.conninfo, autocommit=True) as single_conn,
        ):
            pool = peers[Dbpool.name].pool
            select = partial(pool.fetch_one, "select 1")
            insert = partial(pool.execute, "insert into rows (body) values ('x')")
            for row, work, extra in (
                (
                    "one SELECT",
                    _select,
                    {ONE_ROUND_TRIP: select, FLOOR: partial(_fetch, single_conn)},
                ),
                ("one INSERT", _insert, {ONE_ROUND_TRIP: insert}),
                ("three statements", _three_statements, {}),
            ):
                _measure(table, row, _calls(work, peers) | extra, repetitions)
        # With one connection there is none to choose; of many, the one used last is warm.
        for size in (1, 16):
            with _opened([Dbpool, PsycopgPool], server.conninfo, size) as peers:
                select = partial(peers[Dbpool.name].pool.fetch_one, "select 1")
                row = f"one SELECT, pool of {size}"
                _measure(table, row, _calls(_select, peers) | {ONE_ROUND_TRIP: select}, repetitions)
        _by_key(table, "one SELECT by key", server.conninfo, repetitions)
        with contextlib.closing(Proxy(server.port)) as proxy:
            proxy.delay = _NETWORK_DELAY
            _by_key(
                table,
                "the same, server far away",
                proxy.conninfo,
                (repetitions[0] // 10, repetitions[1] // 2),
            )
    return table


def _by_key(table: Table, row: str, conninfo: str, repetitions: tuple[int, int]) -> None:
    """One SELECT with a parameter, which is the kind that BEGIN can go with."""
    with (
        _opened([Dbpool, DbpoolPipelining, PsycopgPool], conninfo, 4) as peers,
        psycopg.connect(conninfo, autocommit=True) as single_conn,
    ):
        select = partial(peers[Dbpool.name].pool.fetch_one, _BY_KEY, [1])
        extra = {ONE_ROUND_TRIP: select, FLOOR: partial(_fetch_by_key, single_conn)}
        _measure(table, row, _calls(_select_by_key, peers) | extra, repetitions)


@contextlib.contextmanager
def _opened(classes: list[type[Peer]], conninfo: str, size: int) -> Iterator[dict[str, Peer]]:
    with contextlib.ExitStack() as stack:
        peers = {c.name: stack.enter_context(c.opened(conninfo, size)) for c in classes}
        for peer in peers.values():
            peer.fill(size)
        yield peers


def _measure(
    table: Table, row: str, calls: Mapping[str, Callable[[], object]], repetitions: tuple[int, int]
) -> None:
    for name, cell in against(interleaved(calls, *repetitions), PsycopgPool.name).items():
        table.put(row, name, cell)


def _calls(
    work: Callable[[Peer], None], peers: Mapping[str, Peer]
) -> dict[str, Callable[[], object]]:
    return {name: partial(work, peer) for name, peer in peers.items()}


def _select(peer: Peer) -> None:
    with peer.connection() as conn:
        _fetch(conn)


def _fetch(conn: Any) -> None:
    conn.execute("select 1").fetchone()


def _select_by_key(peer: Peer) -> None:
    with peer.connection() as conn:
        _fetch_by_key(conn)


def _fetch_by_key(conn: Any) -> None:
    conn.execute(_BY_KEY, [1]).fetchone()


def _insert(peer: Peer) -> None:
    with peer.connection() as conn:
        conn.execute("insert into rows (body) values ('x')")


def _three_statements(peer: Peer) -> None:
    with peer.connection() as conn:
        conn.execute("insert into rows (body) values ('x')")
        conn.execute("update rows set body = 'y' where id = 1")
        conn.execute("select body from rows where id = 1").fetchone()
