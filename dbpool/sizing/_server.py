"""What a server allows, and how much of it is in use, as an ordinary role sees it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from psycopg import Connection
from psycopg.rows import class_row

from dbpool._rows import decoded
from dbpool.sizing._budget import Demand, Limit

# An ordinary role does not see the backend_type of other users' sessions. It sees their database,
# which background processes do not have. Our own have the same application_name, up to the host.
_QUERY = """
with sessions as (
    select datname, usename,
           datname = current_database() and usename = session_user
           and split_part(application_name, '@', 1) in (
               split_part(current_setting('application_name'), '@', 1), 'dbpool:monitor') as is_ours
      from pg_stat_activity
     where (backend_type = 'client backend' or backend_type is null and datid is not null)
       and pid <> pg_backend_pid())
select pg_postmaster_start_time()::text || ' ' || current_setting('port') as identity,
       current_database() as database,
       session_user::text as role,
       current_setting('max_connections')::int as most,
       current_setting('superuser_reserved_connections')::int
           + coalesce(current_setting('reserved_connections', true), '0')::int as reserved,
       case when rolsuper or rolconnlimit < 0 then null else rolconnlimit end as role_limit,
       case when rolsuper or datconnlimit < 0 then null else datconnlimit end as database_limit,
       (select count(*) from sessions) as used,
       (select count(*) from sessions where usename = session_user) as used_by_role,
       (select count(*) from sessions where datname = current_database()) as used_in_database,
       split_part(current_setting('application_name'), '@', 1) as application,
       (select count(*) from sessions where is_ours) as ours
  from pg_roles, pg_database
 where rolname = session_user and datname = current_database()
"""


@dataclass(frozen=True)
class ServerLimits:
    """One server as the role of one database sees it. A limit of None means that there is none."""

    identity: str  # the same for all connections to one running server
    database: str
    role: str
    most: int
    reserved: int
    role_limit: int | None
    database_limit: int | None
    used: int
    used_by_role: int
    used_in_database: int
    application: str
    ours: int  # sessions of this role, database and application


def read_server_limits(conn: Connection[Any]) -> ServerLimits:
    """Ask the server of a connection; one round trip."""
    with conn.cursor(row_factory=decoded(class_row(ServerLimits))) as cursor:
        found = cursor.execute(_QUERY).fetchone()
    assert found is not None  # the current role and database exist
    return found


def server_limits(
    pools: Iterable[tuple[Demand, ServerLimits]],
) -> list[tuple[Limit, list[Demand]]]:
    """Return the limits of all servers, roles and databases, each with the pools under it."""
    found: dict[tuple[str, ...], list[tuple[Demand, ServerLimits]]] = {}
    for demand, seen in pools:
        keys: list[tuple[str, ...]] = [(seen.identity,)]
        if seen.role_limit is not None:
            keys.append((seen.identity, "role", seen.role))
        if seen.database_limit is not None:
            keys.append((seen.identity, "database", seen.database))
        for key in keys:
            found.setdefault(key, []).append((demand, seen))
    return [(_limit(key, under), [d for d, _ in under]) for key, under in found.items()]


def _limit(key: tuple[str, ...], under: list[tuple[Demand, ServerLimits]]) -> Limit:
    seen = under[-1][1]  # the newest look
    # Pools of one role, database and application see the same sessions.
    ours = sum({(s.role, s.database, s.application): s.ours for _, s in under}.values())
    if len(key) == 1:
        names = ", ".join(sorted({demand.database for demand, _ in under}))
        others = max(0, seen.used - ours)
        return Limit(f"the server of {names}", "max_connections", seen.most, seen.reserved, others)
    kind, name = key[1:]
    most = seen.role_limit if kind == "role" else seen.database_limit
    used = seen.used_by_role if kind == "role" else seen.used_in_database
    return Limit(
        what=f"the CONNECTION LIMIT of {kind} {name}",
        setting=f"that limit (ALTER {kind.upper()} {name} CONNECTION LIMIT)",
        most=most or 0,
        others=max(0, used - ours),
    )
