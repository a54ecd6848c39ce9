"""How soon the first write succeeds after a standby was promoted, its dead primary still listed.

The dead host refuses, or its packets are dropped: a connect to it then takes connect_timeout. The
promotion comes after ten seconds, when pools are at their longer pauses. Callers try again until a
write succeeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import psycopg
from psycopg_pool import ConnectionPool

from bench._report import Cell, Table
from dbpool import Pool
from tests.postgres import Server, served
from tests.proxy import Mode, Proxy
from tests.replication import SYNCHRONOUS, TABLE, make_standby
from tests.threads import Load

REPETITIONS = 10
OUTAGE = 10.0  # seconds until the promotion
CONNECT_TIMEOUT = 2  # libpq's least

Make = Callable[[str], Any]

PEERS: dict[str, Make] = {
    "dbpool": lambda conninfo: Pool(conninfo, max_size=4),
    "psycopg_pool, check": lambda conninfo: ConnectionPool(
        conninfo, min_size=1, max_size=4, open=True, check=ConnectionPool.check_connection, timeout=5
    ),
}  # fmt: skip


def run(quick: bool) -> Table:
    """Fail over with each pool, where the dead host refuses and where it is silent."""
    table = Table("failover", "First write after the promotion", list(PEERS))
    outage = 3.0 if quick else OUTAGE
    for title, is_silent in (
        ("the dead host refuses", False),
        (f"its packets are dropped, connect_timeout {CONNECT_TIMEOUT} s", True),
    ):
        for name, make in PEERS.items():
            times = [_once(make, is_silent, outage) for _ in range(1 if quick else REPETITIONS)]
            text = f"{median(times):.2f} s (at most {max(times):.2f} s)"
            table.put(title, name, Cell(text, {"seconds": median(times), "figures": times}))
    return table


def _once(make: Make, is_silent: bool, outage: float) -> float:
    """Return how many seconds after the promotion the first write succeeded."""
    with served(**SYNCHRONOUS) as primary:
        primary.execute("set synchronous_commit = local; " + TABLE)
        standby = make_standby(primary)
        proxy = Proxy(primary.port)
        try:
            return _fail_over(make, is_silent, outage, (primary, standby), proxy)
        finally:
            proxy.close()
            standby.close()


def _fail_over(
    make: Make, is_silent: bool, outage: float, pair: tuple[Server, Server], proxy: Proxy
) -> float:
    primary, standby = pair
    conninfo = (
        f"host=127.0.0.1,127.0.0.1 port={proxy.port},{standby.port} user=postgres dbname=postgres"
        f" target_session_attrs=read-write connect_timeout={CONNECT_TIMEOUT}"
    )
    written: list[float] = []
    with make(conninfo) as pool:
        load = Load(lambda: _write(pool, written), threads=4)
        load.await_calls(20)
        proxy.mode = Mode.SILENT
        if not is_silent:
            proxy.refuse()
        proxy.drop()
        primary.kill_postmaster()
        time.sleep(outage)
        standby.promote()
        promoted = time.monotonic()
        while not any(at > promoted for at in written):
            assert time.monotonic() < promoted + 60
            time.sleep(0.01)
        load.stop()
    return min(at for at in written if at > promoted) - promoted


def _write(pool: Any, written: list[float]) -> None:
    try:
        with pool.connection() as conn:
            conn.execute("insert into appends values (1)")
    except psycopg.OperationalError:
        return
    written.append(time.monotonic())
