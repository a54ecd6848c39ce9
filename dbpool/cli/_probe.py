"""Connects once as the pool would, and reports the result."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import ip_address
from time import monotonic
from typing import Any, Final

import psycopg
from psycopg.rows import tuple_row

from dbpool._rows import decoded
from dbpool._secrets import MASK
from dbpool.cli._configured import params_of, pool_options
from dbpool.errors import ConfigError, PoolError, describe
from dbpool.pool import Pool
from dbpool.settings import SERVER_SIDE, Settings
from dbpool.settings._conninfo import already_set

_EXPOSED: Final = (
    "the server is remote and sslmode is below verify-full: its identity is not checked"
)
# Fields that a connection string or libpq's variables can also set, and then override.
_CLIENT_SIDE: Final = (
    "connect_timeout",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_count",
    "tcp_user_timeout",
)


def probe(settings: Settings) -> dict[str, Any]:
    """Connect once as the pool would, and return a report without secrets."""
    effective = settings.masked()
    report: dict[str, Any] = {"ok": False, "settings": effective}
    conn: Any = None
    started = monotonic()
    pool = single(settings)
    try:
        params = params_of(settings)
        effective |= _in_effect(settings, params)
        if is_exposed(params, os.environ):
            report["warning"] = _EXPOSED
        with pool.connection() as conn:
            report["connect_seconds"] = round(monotonic() - started, 4)
            effective |= _enforced(conn)
            info = conn.info
            report |= {
                "ok": True,
                "host": info.host,
                "port": info.port,
                "database": info.dbname,
                "user": info.user,
                "server_version": info.parameter_status("server_version"),
                "tls": bool(conn.pgconn.ssl_in_use),
            }
    except (PoolError, ConfigError) as ex:
        report["error"] = describe(ex.__cause__ or ex)
        report["kind"] = getattr(ex, "kind", "conninfo")
    except psycopg.Error as ex:  # the connection broke after it was made
        report |= {"ok": False, "error": describe(ex, conn)}
    finally:
        pool.close(timeout=0.1)  # do not wait for a connect that hangs
    return report


def _in_effect(settings: Settings, params: Mapping[str, Any]) -> dict[str, object]:
    """Return the values that differ from the settings: set elsewhere, or impossible to send."""
    known = already_set(params, os.environ)
    found: dict[str, Any] = {
        key: int(known[key]) if str(known[key]).isdecimal() else MASK for key in _CLIENT_SIDE
    }
    if isinstance(found["tcp_user_timeout"], int):
        found["tcp_user_timeout"] /= 1000  # libpq counts milliseconds
    if settings.pooler == "transaction":
        found |= dict.fromkeys(SERVER_SIDE)
    return found


def _enforced(conn: psycopg.Connection[Any]) -> dict[str, object]:
    """Return the timeouts in effect on the server: roles, databases and `options` set them too."""
    query = "select name, setting::float8 / 1000 from pg_settings where name = any(%s)"
    with conn.cursor(row_factory=decoded(tuple_row)) as cursor:
        rows: Any = cursor.execute(query, [list(SERVER_SIDE.values())]).fetchall()
    seconds = dict(rows)
    return {field: seconds.get(name) for field, name in SERVER_SIDE.items()}


def is_exposed(params: Mapping[str, Any], environ: Mapping[str, str]) -> bool:
    """Whether the identity of a remote server is not checked: `sslmode` is below `verify-full`.

    `sslrootcert=system` implies `verify-full`.
    """
    known = already_set(params, environ)
    hosts = str(known.get("hostaddr") or known.get("host") or "").split(",")
    remote = [h for h in hosts if h and not h.startswith(("/", "@")) and not _is_loopback(h)]
    is_checked = known.get("sslmode") == "verify-full" or known.get("sslrootcert") == "system"
    return bool(remote) and not is_checked


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name, which may resolve to any address, except these
        return host.lower() in ("localhost", "ip6-localhost", "localhost.")


def single(settings: Settings) -> Pool[Any]:
    """Return a pool of one connection."""
    small = replace(settings, min_size=0, max_size=1, leak_after=0)
    return Pool(settings=small, **pool_options())
