"""The state that a holder leaves in its session on the server, and the message that resets it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Collection
from typing import Any, Final

from psycopg import sql

from dbpool.errors import ConfigError
from dbpool.pool._psycopg import mark_session, query_value, reset_session

Names = Collection[str]

# DISCARD ALL but for the prepared statements. One message is one transaction: all or nothing.
_RESET: Final = (
    b"SELECT exists(SELECT FROM pg_catalog.pg_class"
    b" WHERE relnamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema());"
    b" SET SESSION AUTHORIZATION DEFAULT; RESET ROLE; RESET ALL; CLOSE ALL; UNLISTEN *;"
    b" SELECT pg_advisory_unlock_all(); DISCARD SEQUENCES; DISCARD TEMP"
)
_STATE: Final = sql.SQL("""
select json_build_object(
    'settings', (select json_object_agg(name, setting) from pg_settings where source = 'session'),
    'custom settings', (select json_object_agg(name, value) from (
        select name, current_setting(name, true) as value from unnest(string_to_array({}, ',')) as name
        where lower(name) not in (select lower(name) from pg_settings)) as _ where value is not null),
    'a role', concat_ws(' ', session_user, current_setting('role')),
    'LISTEN', (select json_agg(name) from pg_listening_channels() as name),
    'a temporary object', (select json_agg(relname) from pg_class
                            where relnamespace = pg_my_temp_schema()),
    'an advisory lock', (select count(*) from pg_locks
                          where locktype = 'advisory' and pid = pg_backend_pid()),
    'a cursor', (select json_agg(name) from pg_cursors where is_holdable))
""")
# libpq traces a message a line, what the server sent with a B in front; parameters are escaped.
_FROM_SERVER: Final = re.compile(rb"^(?:[^\t\n]*\t)?B\t.*$", re.MULTILINE)
_ESCAPED: Final = re.compile(rb"\\x([0-9a-f]{2})")
_CUSTOM_NAME: Final = re.compile(r"[^\W\d][\w$]*(?:\s*\.\s*[^\W\d][\w$]*)+")


def call_traced(configure: Callable[[Any], None], conn: Any, known: Names | None) -> Names:
    """Call the user's `configure`; return the names of custom settings that it may have made.

    The server lists no setting with a dot in its name, such as `app.tenant`. Unless *known*, the
    names are looked for in what is sent: libpq traces it into memory. One connection of a pool is
    traced, since psycopg never frees the stream (4 KB). A name that a function on the server puts
    together is not found.
    """
    if known is not None or not (sys.platform == "linux" and hasattr(os, "memfd_create")):
        configure(conn)
        return known or ()
    with os.fdopen(os.memfd_create("dbpool"), "rb") as memory:
        conn.pgconn.trace(memory.fileno())
        try:
            configure(conn)
        finally:
            conn.pgconn.untrace()
        memory.seek(0)
        return custom_names(memory.read(), conn.info.encoding)


def custom_names(trace: bytes, encoding: str = "utf-8") -> Names:
    """Return what may be names of custom settings in what was sent, 1,000 at most."""
    sent = _ESCAPED.sub(lambda m: bytes.fromhex(m[1].decode()), _FROM_SERVER.sub(b"", trace))
    text = sent.decode(encoding, errors="replace").replace('"', "")
    names = dict.fromkeys("".join(match[0].split()) for match in _CUSTOM_NAME.finditer(text))
    return list(names)[:1000]


def reset_message(conn: Any, timeout: float, custom: Names) -> bytes:
    """Return the message that leads back to the state in which `configure` left the session.

    *custom* are names of custom settings. Raises `ConfigError` if no message can.
    """
    # Text and no list: in older versions of psycopg 3.3 its dumper holds the connection in a cycle.
    query = _STATE.format(",".join(custom)).as_bytes(conn)
    state = json.loads(query_value(conn, query, timeout))
    calls = [
        sql.SQL("set_config({}, {}, false)").format(name, value).as_bytes(conn)
        for name, value in ((state["settings"] or {}) | (state["custom settings"] or {})).items()
    ]
    message = _RESET + (b"; SELECT " + b", ".join(calls) if calls else b"")
    reset_session(conn, message, timeout)
    after = json.loads(query_value(conn, query, timeout))
    if changed := [name for name in state if after[name] != state[name]]:
        text = "session_reset cannot put back what configure or the connection class set up"
        raise ConfigError(f"{text}: {', '.join(changed)}")
    mark_session(conn)
    return message
