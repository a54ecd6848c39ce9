"""One look at a server: our sessions, who blocks them, and the server's limits.

Reads pg_stat_activity. `pg_blocking_pids` locks the server's whole lock table, so that it is
called for at most 20 sessions a query.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Final

import psycopg
from psycopg.rows import tuple_row

from dbpool._rows import decoded
from dbpool.diagnosis import Prepared, ServerFacts, ServerView, Session

_DEEPEST: Final = 10  # queries up the queue
_COLUMNS: Final = (
    "pid", "state", "wait_type", "wait_event", "backend_type", "application_name", "user",
    "client", "query_seconds", "state_seconds", "transaction_seconds", "ddl", "query", "is_ours",
    "is_hidden", "blocked_by",
)  # fmt: skip

# Other roles' rows are empty but for pid, user and database, unless ours has pg_read_all_stats.
_SESSIONS: Final = """
with known as (
    select *, coalesce(usename = current_user and datname = current_database()
               and (application_name = %(name)s or starts_with(application_name, %(prefix)s)),
               false) as is_ours
      from pg_stat_activity where pid <> pg_backend_pid()),
found as (select * from known where {where} limit 500),
waiting as (select pid from found
             where wait_event_type = 'Lock' or query = '<insufficient privilege>'
             order by query_start limit 20)
select pid, state, wait_event_type, wait_event, backend_type, application_name, usename::text,
       host(client_addr),
       extract(epoch from clock_timestamp() - query_start)::float8,
       extract(epoch from clock_timestamp() - state_change)::float8,
       extract(epoch from clock_timestamp() - xact_start)::float8,
       upper(substring(query from
           '(?i)^\\s*((?:alter|create|drop|reindex|truncate|cluster|vacuum|lock)\\s+\\w+)')),
       case when %(show)s then left(query, 300) end,
       is_ours, query = '<insufficient privilege>',
       case when pid in (select pid from waiting) then pg_blocking_pids(pid) end
  from found"""
_OURS: Final = _SESSIONS.format(where="is_ours")
_BY_PID: Final = _SESSIONS.format(where="pid = any(%(pids)s)")

# Those first that hold what one of these sessions waits for.
_PREPARED: Final = """
select gid, extract(epoch from clock_timestamp() - prepared)::float8, owner::text
  from pg_prepared_xacts p where database = current_database()
 order by exists (
    select from pg_locks held join pg_locks wanted
        on (held.locktype, held.database, held.relation, held.page, held.tuple, held.transactionid,
            held.classid, held.objid, held.objsubid) is not distinct from
           (wanted.locktype, wanted.database, wanted.relation, wanted.page, wanted.tuple,
            wanted.transactionid, wanted.classid, wanted.objid, wanted.objsubid)
     where held.virtualtransaction = '-1/' || p.transaction::text and held.granted
       and not wanted.granted and wanted.pid = any(%(pids)s)) desc, prepared
 limit 5"""

# A superuser is bound by neither reserved slots nor limits.
_FACTS: Final = """
select current_setting('max_connections')::int,
       case when rolsuper then 0 else current_setting('superuser_reserved_connections')::int
            + coalesce(nullif(current_setting('reserved_connections', true), '')::int, 0) end,
       (select count(*) from pg_stat_activity
         where backend_type = 'client backend' or backend_type is null and datid is not null),
       (select count(*) from pg_stat_activity where usename = current_user
           and datname = current_database()
           and (application_name = %(name)s or starts_with(application_name, %(prefix)s))),
       case when not rolsuper then nullif(rolconnlimit, -1) end,
       (select case when not rolsuper then nullif(datconnlimit, -1) end
          from pg_database where datname = current_database()),
       case when pg_is_in_recovery() then 'standby' else 'primary' end,
       case when pg_is_in_recovery() then exists (select from pg_stat_wal_receiver) end,
       case when not pg_is_in_recovery() then null
            when exists (select from pg_stat_wal_receiver)
                 and pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() then 0
            else extract(epoch from clock_timestamp() - pg_last_xact_replay_timestamp()) end::float8
  from pg_roles where rolname = current_user"""


def look(conn: psycopg.Connection[Any], name: str, prefix: str, *, queries: bool) -> ServerView:
    """Look at the server of *conn*; our sessions are called *name*, or begin with *prefix*.

    *queries* says whether to read statements too. Raises `psycopg.Error`.
    """
    known = {"name": name, "prefix": prefix, "show": queries}
    with conn.cursor(row_factory=decoded(tuple_row)) as cursor:
        began = time.monotonic()
        pid = cursor.execute("select pg_backend_pid()").fetchone()
        latency = time.monotonic() - began
        is_joined = pid is not None and pid[0] == conn.info.backend_pid
        facts = cursor.execute(_FACTS, known).fetchone()
        sessions, hidden = _sessions(cursor, known) if is_joined else ({}, False)
        prepared: tuple[Prepared, ...] = ()
        if any(0 in session.blocked_by for session in sessions.values()):
            rows = cursor.execute(_PREPARED, {"pids": list(sessions)}).fetchall()
            prepared = tuple(Prepared(*row) for row in rows)
    return ServerView(
        time.time(),
        sessions,
        prepared,
        replace(
            ServerFacts(*facts),
            version=conn.info.parameter_status("server_version"),
            latency=latency,
            tls=bool(conn.pgconn.ssl_in_use),
        )
        if facts
        else None,
        is_joined=is_joined,
        is_limited=hidden,
    )


def _sessions(
    cursor: psycopg.Cursor[Any], known: dict[str, Any]
) -> tuple[dict[int, Session], bool]:
    """Return our sessions and those that they wait for, and whether any of these is hidden."""
    rows = cursor.execute(_OURS, known).fetchall()
    found: dict[int, Session] = {}
    is_hidden = False
    for _ in range(_DEEPEST):
        for row in rows:
            fields = dict(zip(_COLUMNS, row, strict=True))
            is_hidden |= bool(fields.pop("is_hidden"))
            fields["blocked_by"] = tuple(dict.fromkeys(fields["blocked_by"] or ()))
            found[fields["pid"]] = Session(**fields)
        wanted = {pid for session in found.values() for pid in session.blocked_by} - found.keys()
        if not wanted - {0}:
            break
        rows = cursor.execute(_BY_PID, known | {"pids": sorted(wanted - {0})}).fetchall()
        if not rows:  # they have ended meanwhile
            break
    return found, is_hidden
