"""Findings about connecting: the database is down, the settings are wrong, a limit is reached."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from dbpool.diagnosis._finding import Finding, Severity, count, duration
from dbpool.diagnosis._scene import QUERY, UNKNOWN, PoolScene, number, text
from dbpool.errors import is_permanent

_NO_ANSWER: Final = "timeout"
_SATURATED: Final = "saturated"
_DESCRIPTORS: Final = "descriptors"
_OTHER_LIMIT: Final = re.compile(
    r"too many connections for (role|database)|no more connections allowed|max_client_conn"
    r"|no server connection within|query_wait_timeout"
    r"|(role|database) \"[^\"]*\".* connection limit",
    re.IGNORECASE,
)
_SILENT_AFTER: Final = 2.0  # seconds of a look at the server
_FAILING_AFTER: Final = 1.0  # seconds that connects may fail before that is said
_DOWN_AFTER: Final = 5.0  # seconds; a server that restarts answers again by then


def connecting(pool: PoolScene) -> Finding | None:
    """Return what keeps the pool from connecting: DB01, DB02, DB03 or DB17."""
    error = text(pool.breaker.get("last_error"))
    since = number(pool.breaker.get("since"), pool.now)
    is_open = pool.breaker.get("state") in ("open", "half-open")
    if error is None and not is_open:
        return _limit_of_late(pool) or _unanswered(pool)
    error, kind = error or "no error is known", pool.error_kind
    lasted = max(0.0, pool.now - since)
    if not is_open and lasted < _FAILING_AFTER:
        return _limit_of_late(pool)
    evidence = {"error": error, "kind": kind, "seconds": lasted, "waiting": pool.waiting}
    if kind in (_SATURATED, _DESCRIPTORS):
        return _limit(pool, error, since, evidence)
    if is_permanent(kind):
        return Finding(
            "DB02", Severity.CRITICAL if is_open else Severity.WARNING,
            pool=pool.name, since=since, evidence=evidence,
            text=f"{pool.name} has failed to connect for {duration(lasted)}: {error}",
            do=_SETTINGS.get(kind, _SETTINGS["conninfo"]),
        )  # fmt: skip
    return _down(pool, since, evidence, error=error, is_sure=is_open)


def _down(
    pool: PoolScene, since: float, evidence: Mapping[str, object], *, error: str, is_sure: bool
) -> Finding:
    """DB01: a notice for as long as the server may just be restarting."""
    lasted = max(0.0, pool.now - since)
    is_long = lasted >= _DOWN_AFTER or not number(pool.counters.get("connects"))
    accepts = " accepts connections but has not answered"
    state = accepts if evidence["kind"] == _NO_ANSWER else " has been down"
    return Finding(
        "DB01", Severity.CRITICAL if is_sure and is_long else Severity.NOTICE,
        pool=pool.name, since=since, evidence=evidence,
        text=f"the database of {pool.name}{state} for {duration(lasted)}: {error}",
        do="Look at the server and the network to it. The pool tries again by itself and needs no"
        " restart of the application.",
    )  # fmt: skip


def _unanswered(pool: PoolScene) -> Finding | None:
    """DB01: no connect has failed, but the server answers neither the holders nor the monitor."""
    view = pool.view
    asking = [holder for holder in pool.holders if holder.status in (QUERY, UNKNOWN)]
    if view is None or view.silent_since is None or not asking:
        return None
    began = [pool.now - holder.seconds for holder in asking]
    if min(began) >= view.time:  # the server has answered none of these statements either
        since = min(view.silent_since, max(began))
    elif pool.now - view.silent_since >= _SILENT_AFTER:
        since = view.silent_since
    else:  # they lasted while it answered, and a look may take long
        return None
    lasted = pool.now - since
    error = f"no answer to the monitor, and {count(len(asking), 'connection')} wait for one"
    evidence = {"error": None, "kind": _NO_ANSWER, "seconds": lasted, "waiting": pool.waiting}
    return _down(pool, since, evidence, error=error, is_sure=True)


_SETTINGS: Final = {
    "password": "Correct the password or its file; the pool reads it again at each attempt where a"
    " file or a callable gives it. The server says the same of a role whose password has expired"
    " (VALID UNTIL).",
    "role": "Create the role on the server, or correct the user in the connection settings.",
    "database": "Create the database, or correct its name in the connection settings.",
    "access": "Allow the role: see pg_hba.conf and GRANT CONNECT on the server.",
    "tls": "Compare sslmode, sslrootcert and the server's certificate.",
    "conninfo": "Correct the connection settings: python -m dbpool check shows them without"
    " secrets.",
}  # fmt: skip


_LIMITS: Final = (
    "Raise the limit that the message names (ALTER ROLE … CONNECTION LIMIT, ALTER DATABASE …"
    " CONNECTION LIMIT, PgBouncer's max_client_conn or pool sizes), or lower max_size of the pools"
    " that share it."
)
_FILES: Final = (
    "The process may open no more files: find what it leaves open (lsof -p), or raise the limit"
    " (ulimit -n, LimitNOFILE=). The database is not the cause."
)


def _limit_of_late(pool: PoolScene) -> Finding | None:
    """DB03 or DB17 while callers wait, though no connect fails just now: one came free, or was given up."""
    limit, is_short = pool.watch.limit, pool.waiting > 0 or pool.refused > 0
    if limit is None or pool.now - limit.since < _FAILING_AFTER or not is_short:
        return None
    evidence: dict[str, object] = {
        "error": limit.error, "kind": _SATURATED, "seconds": pool.now - limit.since,
        "waiting": pool.waiting,
    }  # fmt: skip
    return _limit(pool, limit.error, limit.since, evidence)


def _limit(pool: PoolScene, error: str, since: float, evidence: dict[str, object]) -> Finding:
    severity = Severity.CRITICAL if pool.waiting or pool.refused else Severity.WARNING
    view = pool.view
    facts = None if view is None else view.facts
    is_own = evidence["kind"] == _DESCRIPTORS
    if is_own or _OTHER_LIMIT.search(error):
        return Finding(
            "DB17", severity, pool=pool.name, since=since, evidence=evidence,
            text=f"{pool.name} cannot get another connection: {error}"
            f" ({count(pool.waiting, 'caller')} waiting)",
            do=_FILES if is_own else _LIMITS,
        )  # fmt: skip
    known = ""
    if view is not None and facts is not None and facts.max_connections is not None:
        age = max(0.0, pool.now - view.time)
        evidence |= {"used": facts.used, "max": facts.max_connections, "ours": facts.ours}
        evidence["age"] = age
        used = f"{facts.used} of {facts.max_connections}"
        known = f": {used} are used, {facts.ours} by us"
        if age > 1:
            known = f" ({duration(age)} ago {used} were used, {facts.ours} by us)"
    return Finding(
        "DB03", severity, pool=pool.name, since=since, evidence=evidence,
        text=f"the server of {pool.name} has no free connection slot{known}; the pool has"
        f" {pool.active + pool.idle} of {pool.max_size}, {count(pool.waiting, 'caller')} waiting",
        do="Find who else uses the server's connections (pg_stat_activity), lower max_size of the"
        " pools that share it, put a pooler in front of it, or raise max_connections.",
    )  # fmt: skip
