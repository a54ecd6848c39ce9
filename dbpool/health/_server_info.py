"""Queries to a server over a pooled connection: a ping, and information about the server."""

from __future__ import annotations

import json
from time import monotonic
from typing import Any, Final

import psycopg
from psycopg import Connection
from psycopg.pq import ExecStatus

from dbpool.liveness import ping, run_query
from dbpool.pool import Pool

# An ordinary role cannot see the backend_type of other users' sessions. It can see their database;
# background processes have none.
_STATEMENT: Final = b"""
select json_build_object(
    'server_version', current_setting('server_version'),
    'role', case when pg_is_in_recovery() then 'standby' else 'primary' end,
    'replication_lag', case when pg_is_in_recovery() then json_build_object(
        'bytes', pg_wal_lsn_diff(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()),
        'seconds', case
            when pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() then 0
            else extract(epoch from clock_timestamp() - pg_last_xact_replay_timestamp()) end) end,
    'connections', json_build_object(
        'used', (select count(*) from pg_stat_activity where backend_type = 'client backend'
                     or backend_type is null and datid is not null),
        'max', current_setting('max_connections')::int,
        'ours', (select coalesce(json_object_agg(state, n), '{}') from (
            select coalesce(state, 'unknown') as state, count(*) as n from pg_stat_activity
             where split_part(application_name, '@', 1)
                   = split_part(current_setting('application_name'), '@', 1)
               and usename = current_user and datname = current_database() group by 1) as own)))
"""


def read_server_info(pool: Pool[Any], timeout: float) -> dict[str, Any]:
    """Return information about a pool's server, over one of the pool's connections.

    Each of the three steps, the checkout included, takes at most *timeout* seconds. `latency` is
    the duration of an empty round trip, in seconds.
    """
    with pool.connection(timeout=timeout) as conn:
        try:
            started = monotonic()
            ping(conn, timeout)
            latency = monotonic() - started
            return {
                "latency": latency,
                **_query_info(conn, timeout),
                "tls": bool(conn.pgconn.ssl_in_use),
            }
        except psycopg.OperationalError:
            conn.pgconn.finish()  # an answer may still come
            raise


def ping_database(pool: Pool[Any], timeout: float) -> None:
    """Make one round trip over one of a pool's connections; opens the pool if it is not open yet.

    Takes at most *timeout* seconds. Raises what `Pool.connection` raises, or
    `psycopg.OperationalError`.
    """
    deadline = monotonic() + timeout
    with pool.connection(timeout=timeout) as conn:
        try:
            ping(conn, max(0.001, deadline - monotonic()))
        except psycopg.OperationalError:
            conn.pgconn.finish()  # a rollback would wait for the missing answer
            raise


def _query_info(conn: Connection[Any], timeout: float) -> dict[str, Any]:
    result = run_query(conn, _STATEMENT, timeout)
    if result.status != ExecStatus.TUPLES_OK:
        raise psycopg.DatabaseError(result.get_error_message())
    info: dict[str, Any] = json.loads(result.get_value(0, 0) or b"")
    return info
