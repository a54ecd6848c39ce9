"""The state that a holder leaves in its session on the server, and the message that resets it.

Part of the one place that touches protected members of psycopg, see `_supply`.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any, Final

import psycopg
from psycopg import sql
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus

from dbpool.errors import ConfigError
from dbpool.liveness import ping, run_query

# DISCARD ALL but for the prepared statements. One message is one transaction: all or nothing.
_RESET: Final = (
    b"SELECT exists(SELECT FROM pg_catalog.pg_class"
    b" WHERE relnamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema());"
    b" SET SESSION AUTHORIZATION DEFAULT; RESET ROLE; RESET ALL; CLOSE ALL; UNLISTEN *;"
    b" SELECT pg_advisory_unlock_all(); DISCARD SEQUENCES; DISCARD TEMP"
)
_STATE: Final = b"""
select json_build_object(
    'settings', (select json_object_agg(name, setting) from pg_settings where source = 'session'),
    'a role', concat_ws(' ', session_user, current_setting('role')),
    'LISTEN', (select json_agg(name) from pg_listening_channels() as name),
    'a temporary object', (select json_agg(relname) from pg_class
                            where relnamespace = pg_my_temp_schema()),
    'an advisory lock', (select count(*) from pg_locks
                          where locktype = 'advisory' and pid = pg_backend_pid()),
    'a cursor', (select json_agg(name) from pg_cursors where is_holdable))
"""
# libpq forgets an error's text as soon as it begins to send anything.
_MARK: Final = b"no COPY in progress\n"


def reset_message(conn: Any, timeout: float) -> bytes:
    """Return the message that leads back to the state in which `configure` left the session.

    Raises `ConfigError` if no message can.
    """
    state = json.loads(_ask(conn, _STATE, timeout))
    calls = [
        sql.SQL("set_config({}, {}, false)").format(name, value).as_bytes(conn)
        for name, value in (state["settings"] or {}).items()
    ]
    message = _RESET + (b"; SELECT " + b", ".join(calls) if calls else b"")
    reset(conn, message, timeout)
    after = json.loads(_ask(conn, _STATE, timeout))
    if changed := [name for name in state if after[name] != state[name]]:
        raise ConfigError(
            "session_reset cannot put back what configure or the connection class set up:"
            f" {', '.join(changed)}"
        )
    _mark(conn)
    return message


def reset(conn: Any, message: bytes, timeout: float) -> None:
    """Reset the session, unless nothing at all was sent since that was done last."""
    if conn.pgconn.error_message != _MARK:
        if _ask(conn, message, timeout) == b"t":
            conn._prepared.clear()  # what is prepared may be for temporary tables
        if conn._notifies_backlog:
            conn._notifies_backlog.clear()
        _mark(conn)


def ping_between(conn: Any, timeout: float) -> None:
    """Like `ping`; it counts for nothing that was sent."""
    was_marked = conn.pgconn.error_message == _MARK
    ping(conn, timeout)
    if was_marked:
        _mark(conn)


def _mark(conn: Any) -> None:
    with suppress(psycopg.OperationalError):
        conn.pgconn.put_copy_end()  # it sends nothing, and fails with the text that is the mark


def _ask(conn: Any, statements: bytes, timeout: float) -> bytes:
    result = run_query(conn, statements, timeout)
    if result.status == ExecStatus.FATAL_ERROR:
        raise error_from_result(result, encoding=conn.pgconn._encoding)
    return result.get_value(0, 0) or b""
