"""Findings about connecting: the database is down, the settings are wrong, a limit is reached."""

from __future__ import annotations

import re
from typing import Final

import psycopg

from dbpool.diagnosis._finding import Finding, Severity, count, duration
from dbpool.diagnosis._scene import PoolScene, number, text
from dbpool.errors import classify, is_permanent

_NO_ANSWER: Final = "timeout"
_SATURATED: Final = "saturated"
_OTHER_LIMIT: Final = re.compile(
    r"too many connections for (role|database)|no more connections allowed|max_client_conn"
    r"|no server connection within|query_wait_timeout"
    r"|(role|database) \"[^\"]*\".* connection limit",
    re.IGNORECASE,
)
_STARTUP_GRACE: Final = 1.0  # seconds that connects may fail before a full server is named


def connecting(pool: PoolScene) -> Finding | None:
    """Return what keeps the pool from connecting: DB01, DB02, DB03 or DB17."""
    error = text(pool.breaker.get("last_error"))
    since = number(pool.breaker.get("since"), pool.now)
    is_open = pool.breaker.get("state") in ("open", "half-open")
    if error is None and not is_open:
        return None
    error = error or "no error is known"
    kind = text(pool.breaker.get("kind")) or _kind_of(error)
    lasted = max(0.0, pool.now - since)
    evidence = {"error": error, "kind": kind, "seconds": lasted, "waiting": pool.waiting}
    if kind == _SATURATED:
        return _limit(pool, error, since, evidence) if is_open or lasted >= _STARTUP_GRACE else None
    if not is_open:
        return None
    if is_permanent(kind):
        return Finding(
            "DB02", Severity.CRITICAL, pool=pool.name, since=since, evidence=evidence,
            text=f"{pool.name} cannot connect for {duration(lasted)}: {error}",
            do=_SETTINGS.get(kind, _SETTINGS["conninfo"]),
        )  # fmt: skip
    accepts = " accepts connections but does not answer" if kind == _NO_ANSWER else " is down"
    return Finding(
        "DB01", Severity.CRITICAL, pool=pool.name, since=since, evidence=evidence,
        text=f"the database of {pool.name}{accepts} for {duration(lasted)}: {error}",
        do="Look at the server and the network to it. The pool tries again by itself and needs no"
        " restart of the application.",
    )  # fmt: skip


_SETTINGS: Final = {
    "password": "Correct the password or its file; the pool reads it again at each attempt where a"
    " file or a callable gives it.",
    "role": "Create the role on the server, or correct the user in the connection settings.",
    "database": "Create the database, or correct its name in the connection settings.",
    "access": "Let the role in: see pg_hba.conf and GRANT CONNECT on the server.",
    "tls": "Compare sslmode, sslrootcert and the server's certificate.",
    "conninfo": "Correct the connection settings: python -m dbpool check shows them without"
    " secrets.",
}  # fmt: skip


def _kind_of(error: str) -> str:
    return classify(psycopg.OperationalError(error))


def _limit(pool: PoolScene, error: str, since: float, evidence: dict[str, object]) -> Finding:
    severity = Severity.CRITICAL if pool.waiting or pool.refused else Severity.WARNING
    view = pool.view
    facts = None if view is None else view.facts
    if _OTHER_LIMIT.search(error):
        return Finding(
            "DB17", severity, pool=pool.name, since=since, evidence=evidence,
            text=f"{pool.name} gets no further connection: {error}"
            f" ({count(pool.waiting, 'caller')} waiting)",
            do="Raise the limit that the message names (ALTER ROLE … CONNECTION LIMIT, ALTER"
            " DATABASE … CONNECTION LIMIT, PgBouncer's max_client_conn or pool sizes), or lower"
            " max_size of the pools that share it.",
        )  # fmt: skip
    known = ""
    if view is not None and facts is not None and facts.max_connections is not None:
        age = max(0.0, pool.now - view.time)
        evidence |= {"used": facts.used, "max": facts.max_connections, "ours": facts.ours}
        evidence["age"] = age
        known = f": {facts.used} of {facts.max_connections} are used, {facts.ours} by us"
        known += f" ({duration(age)} ago)" if age > 2 else ""
    return Finding(
        "DB03", severity, pool=pool.name, since=since, evidence=evidence,
        text=f"the server of {pool.name} has no free connection slot{known}; the pool has"
        f" {pool.active + pool.idle} of {pool.max_size}, {count(pool.waiting, 'caller')} waiting",
        do="Find who else uses the server's connections (pg_stat_activity), lower max_size of the"
        " pools that share it, put a pooler before it, or raise max_connections.",
    )  # fmt: skip
