"""PgBouncer's sizes, which its console shows to roles in `stats_users` or `admin_users`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from psycopg import Connection
from psycopg.rows import dict_row

from dbpool.sizing._budget import Demand, Limit

CONSOLE = "pgbouncer"  # the name of its database


@dataclass(frozen=True)
class PoolerLimits:
    """PgBouncer's limits for one database and role; 0 means no limit.

    `pool_size` bounds its connections to the server, its reserve included.
    """

    address: str  # the same for all pools behind one PgBouncer
    database: str
    role: str
    max_clients: int
    clients: int
    ours: int
    pool_size: int
    max_db_connections: int


def read_pooler_limits(
    console: Connection[Any], database: str, role: str, application: str
) -> PoolerLimits:
    """Ask PgBouncer's console, with a few statements."""
    config = {row["key"]: row["value"] for row in _rows(console, "SHOW CONFIG")}
    known = {row["name"]: row for row in _rows(console, "SHOW DATABASES")}.get(database, {})
    clients = [row for row in _rows(console, "SHOW CLIENTS") if row["database"] != CONSOLE]
    ours = [
        row
        for row in clients
        if (row["database"], row["user"]) == (database, role)
        and str(row.get("application_name", application)).partition("@")[0] == application
    ]
    reserve = known.get("reserve_pool_size", known.get("reserve_pool"))
    sizes = [known.get("pool_size"), reserve]
    defaults = [config["default_pool_size"], config["reserve_pool_size"]]
    return PoolerLimits(
        address=f"{console.info.host}:{console.info.port}",
        database=database,
        role=role,
        max_clients=int(config["max_client_conn"]),
        clients=len(clients),
        ours=len(ours),
        pool_size=sum(int(d if s is None else s) for s, d in zip(sizes, defaults, strict=True)),
        max_db_connections=int(known.get("max_connections") or 0),
    )


def _rows(console: Connection[Any], command: str) -> list[dict[str, Any]]:
    with console.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(command.encode()).fetchall()


def client_limits(
    pools: Iterable[tuple[Demand, PoolerLimits]],
) -> list[tuple[Limit, list[Demand]]]:
    """Return how many clients each PgBouncer accepts: the pools' connections are its clients."""
    found: dict[str, list[tuple[Demand, PoolerLimits]]] = {}
    for demand, seen in pools:
        found.setdefault(seen.address, []).append((demand, seen))
    return [_client_limit(under) for under in found.values()]


def _client_limit(under: list[tuple[Demand, PoolerLimits]]) -> tuple[Limit, list[Demand]]:
    seen = under[-1][1]  # the newest look
    ours = sum({(s.database, s.role): s.ours for _, s in under}.values())
    names = ", ".join(sorted(demand.database for demand, _ in under))
    others = max(0, seen.clients - ours)
    limit = Limit(f"PgBouncer in front of {names}", "max_client_conn", seen.max_clients, 0, others)
    return limit, [demand for demand, _ in under]


def behind(demand: Demand, seen: PoolerLimits) -> Demand:
    """Return what reaches the server: at most PgBouncer's own pool, during a deploy too."""
    sizes = [seen.pool_size, seen.max_db_connections or seen.pool_size, demand.most_in_deploy]
    return replace(
        demand,
        database=f"{demand.database} through PgBouncer",
        processes=1,
        max_size=min(sizes),
        setting="PgBouncer's default_pool_size",
        in_deploy=1,
        monitors=0,
    )
