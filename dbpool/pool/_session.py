"""The state that a holder leaves in its session on the server, and the message that resets it."""

from __future__ import annotations

import json
from typing import Any, Final

from psycopg import sql

from dbpool.errors import ConfigError
from dbpool.pool._psycopg import (
    drop_notifies,
    forget_plans,
    is_session_marked,
    mark_session,
    query_value,
)

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


def reset_message(conn: Any, timeout: float) -> bytes:
    """Return the message that leads back to the state in which `configure` left the session.

    Raises `ConfigError` if no message can.
    """
    state = json.loads(query_value(conn, _STATE, timeout))
    calls = [
        sql.SQL("set_config({}, {}, false)").format(name, value).as_bytes(conn)
        for name, value in (state["settings"] or {}).items()
    ]
    message = _RESET + (b"; SELECT " + b", ".join(calls) if calls else b"")
    reset(conn, message, timeout)
    after = json.loads(query_value(conn, _STATE, timeout))
    if changed := [name for name in state if after[name] != state[name]]:
        raise ConfigError(
            "session_reset cannot put back what configure or the connection class set up:"
            f" {', '.join(changed)}"
        )
    mark_session(conn)
    return message


def reset(conn: Any, message: bytes, timeout: float) -> None:
    """Reset the session, unless nothing at all was sent since that was done last."""
    if not is_session_marked(conn):
        if query_value(conn, message, timeout) == b"t":
            forget_plans(conn)  # what is prepared may be for temporary tables
        drop_notifies(conn)
        mark_session(conn)
