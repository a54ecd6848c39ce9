"""One SELECT, one INSERT, and a transaction of three statements, each peer's usual way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from bench._measure import against, interleaved, one_cpu
from bench._peers import EVERYONE, Dbpool, Peer, PsycopgPool
from bench._report import Table
from tests.postgres import Server

ONE_TRIP = "dbpool, one trip"


def run(quick: bool) -> Table:
    """Measure on pools of 4, and one SELECT on pools of 16 whose connections are all warm."""
    times, rounds = (40, 5) if quick else (200, 11)
    table = Table(
        "query", "Queries", [Dbpool.name, ONE_TRIP, *(c.name for c in EVERYONE if c is not Dbpool)]
    )
    with one_cpu():
        server = Server()
        server.start()
        try:
            server.execute("create table rows (id bigserial primary key, body text)")
            peers = {cls.name: cls(server.conninfo, 4) for cls in EVERYONE}
            ours = peers[Dbpool.name].pool
            for row, work, one_trip in (
                ("one SELECT", _select, lambda: ours.fetch_one("select 1")),
                (
                    "one INSERT",
                    _insert,
                    lambda: ours.execute("insert into rows (body) values ('x')"),
                ),
                ("three statements", _three, None),
            ):
                calls = {name: _bound(work, peer) for name, peer in peers.items()}
                if one_trip is not None:
                    calls[ONE_TRIP] = one_trip
                cells = against(interleaved(calls, times, rounds), PsycopgPool.name)
                for name, cell in cells.items():
                    table.put(row, name, cell)
            for peer in peers.values():
                peer.close()
            _of_sixteen(server, table, times, rounds)
        finally:
            server.close()
    return table


def _of_sixteen(server: Server, table: Table, times: int, rounds: int) -> None:
    """Whoever reuses the connection used last finds its backend warm."""
    peers = {cls.name: cls(server.conninfo, 16) for cls in (Dbpool, PsycopgPool)}
    for peer in peers.values():
        barrier = threading.Barrier(16)
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(lambda _, p=peer, b=barrier: p.hold(b), range(16)))
    calls = {name: _bound(_select, peer) for name, peer in peers.items()}
    for name, cell in against(interleaved(calls, times, rounds), PsycopgPool.name).items():
        table.put("one SELECT, pool of 16", name, cell)
    for peer in peers.values():
        peer.close()


def _bound(work: Callable[[Peer], None], peer: Peer) -> Callable[[], None]:
    return lambda: work(peer)


def _select(peer: Peer) -> None:
    with peer.connection() as conn:
        conn.execute("select 1").fetchone()


def _insert(peer: Peer) -> None:
    with peer.connection() as conn:
        conn.execute("insert into rows (body) values ('x')")


def _three(peer: Peer) -> None:
    with peer.connection() as conn:
        conn.execute("insert into rows (body) values ('x')")
        conn.execute("update rows set body = 'y' where id = 1")
        conn.execute("select body from rows where id = 1").fetchone()
