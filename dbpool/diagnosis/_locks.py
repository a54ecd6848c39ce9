"""The finding about locks: who holds what our connections wait for, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from dbpool.diagnosis._finding import Finding, Severity, count, duration
from dbpool.diagnosis._scene import IDLE_IN_TRANSACTION, PoolScene
from dbpool.diagnosis._server_view import AUTOVACUUM, REPLAY, ServerView, Session

_LOCK_AFTER: Final = 1.0  # seconds
_LOCK_LONG: Final = 5.0
_MAX_BLOCKERS: Final = 5  # in one finding
_MAX_BLOCKED: Final = 20
_GRANT: Final = " GRANT pg_read_all_stats to the role shows what other roles' sessions do."
# The state that a blocker is shown in, and its name in a sentence.
_BACKGROUND: Final = {
    AUTOVACUUM: ("autovacuum", "autovacuum"),
    REPLAY: ("replay", "the replay of the primary's changes"),
}
_NAMES: Final = dict(_BACKGROUND.values())


def waiting_for_lock(pool: PoolScene) -> Finding | None:
    """DB04: our connections wait for a lock; who is at the root of the queue."""
    view = pool.last_view
    known = [] if view is None else view.waiting_for_locks()
    waited = {each.pid: pool.lasted(each, each.query_seconds) or 0.0 for each in known}
    waiting = [each for each in known if waited[each.pid]]
    seconds = max(waited.values(), default=0.0)
    if view is not None and view.locked_since is not None and _is_own_queue(pool, view, known):
        # One short wait follows another: those that the last look saw may have ended.
        waiting, seconds = known, max(seconds, pool.now - view.locked_since)
    if view is None or not waiting or seconds < _LOCK_AFTER:
        return None
    roots = view.roots(waiting)
    blockers = [_blocker(pool, view, pid) for pid in roots[:_MAX_BLOCKERS]]
    change = view.schema_change(waiting)
    return Finding(
        "DB04",
        _severity(pool, seconds),
        pool=pool.name,
        since=pool.now - seconds,
        text=_text(pool, waiting, blockers, change),
        brief=_text(pool, waiting, [each | {"client": None} for each in blockers], change),
        do=_advice(blockers, change) + (_GRANT if view.is_limited else ""),
        evidence={
            "waiting": pool.waiting + len(waiting),
            "blocked": [
                _describe(pool, each.pid) | {"blocked_by": list(each.blocked_by)}
                for each in waiting[:_MAX_BLOCKED]
            ],
            "blockers": blockers,
            "roots": len(roots),
            "schema_change": None if change is None else _describe(pool, change.pid) | {
                "statement": change.ddl, "application_name": change.application_name,
            },
            "limited": view.is_limited,
        },
    )  # fmt: skip


def _is_own_queue(pool: PoolScene, view: ServerView, waiting: Sequence[Session]) -> bool:
    """Whether callers wait while our sessions wait for one another alone: that goes on by itself."""
    roots = [view.sessions.get(pid) for pid in view.roots(waiting)]
    is_short = pool.waiting > 0 or pool.refused > 0
    return is_short and all(root is not None and root.is_ours for root in roots)


def _severity(pool: PoolScene, seconds: float) -> Severity:
    """A short wait for a lock is normal, unless it stops other callers."""
    if pool.is_short:
        return Severity.CRITICAL
    return Severity.WARNING if seconds >= _LOCK_LONG else Severity.NOTICE


def _describe(pool: PoolScene, pid: int, session: Session | None = None) -> dict[str, Any]:
    """Return what is known of a session as a holder of this pool's, or of another's."""
    holder = pool.holder_of(pid) or (session and pool.neighbour_of(session))
    return {
        "pid": pid,
        "worker": holder and holder.worker,
        "endpoint": holder and holder.endpoint,
        "where": holder and holder.where,
    }


def _blocker(pool: PoolScene, view: ServerView, pid: int) -> dict[str, Any]:
    session = view.sessions.get(pid)
    found = _describe(pool, pid, session)
    if pid == 0:
        oldest = max(view.prepared, key=lambda each: each.seconds, default=None)
        found |= {"state": "prepared transaction", "gid": oldest and oldest.gid}
        return found | {"seconds": oldest and oldest.seconds, "owner": oldest and oldest.owner}
    if session is None:
        return found | {"state": None, "seconds": None}
    is_idle = (session.state or "").startswith(IDLE_IN_TRANSACTION)
    kind = view.background_of(session)
    return found | {
        "state": _BACKGROUND[kind][0] if kind else session.state,
        "seconds": session.state_seconds if is_idle else session.query_seconds,
        "application_name": session.application_name,
        "client": session.client,
        "statement": None if is_idle else session.ddl,
        "wait": None if is_idle else session.wait,
        "query": session.query,
    }


def _name_of(blocker: Mapping[str, Any]) -> str:
    """Name a blocker as well as it is known."""
    if blocker["where"]:
        endpoint, where = blocker["endpoint"], blocker["where"]
        place = f"{endpoint} ({where})" if endpoint else where
        return f"{place} in worker {blocker['worker']}" if blocker["worker"] else place
    if blocker["pid"] == 0:
        gid = blocker.get("gid")
        return f"the prepared transaction {gid!r}" if gid else "a prepared transaction"
    if name := _NAMES.get(blocker["state"]):
        return f"{name} (pid {blocker['pid']})"
    known = [str(blocker[k]) for k in ("application_name", "client") if blocker.get(k)]
    return f"the session {blocker['pid']}" + (f" ({', '.join(known)})" if known else "")


def _activity(blocker: Mapping[str, Any]) -> str:
    """Say what a blocker does meanwhile, and for how long it has."""
    state = blocker["state"] if blocker["pid"] and blocker["state"] not in _NAMES else None
    activity = blocker.get("statement") or blocker.get("wait")
    text = f", {state}" if state else ""
    text += f" in {activity}" if state and activity else ""
    return text + (f" for {duration(blocker['seconds'])}" if blocker["seconds"] else "")


def _text(
    pool: PoolScene,
    waiting: Sequence[Session],
    blockers: Sequence[Mapping[str, Any]],
    change: Session | None,
) -> str:
    waiters = count(
        len(waiting), f"connection of {pool.name} waits", f"connections of {pool.name} wait"
    )
    if not blockers:
        return f"{waiters} for a lock; who holds it could not be seen"
    first = blockers[0]
    held = _activity(first)
    held += f", and {count(len(blockers) - 1, 'other')}" if len(blockers) > 1 else ""
    callers = count(pool.waiting, "caller waits", "callers wait")
    queue = f"; {callers} for a connection" if pool.waiting else ""
    if change is not None and change.pid != first["pid"]:
        who = change.application_name or f"pid {change.pid}"
        return (
            f"{change.ddl} of {who} (session {change.pid}) waits for {_name_of(first)}{held};"
            f" {waiters} behind it{queue}"
        )
    return f"{waiters} for a lock that {_name_of(first)} holds{held}{queue}"


def _advice(blockers: Sequence[Mapping[str, Any]], change: Session | None) -> str:
    if not blockers:
        return "Look at pg_locks and pg_stat_activity on the server as a superuser."
    first = blockers[0]
    if first["pid"] == 0:
        return "End the prepared transaction on the server: COMMIT PREPARED or ROLLBACK PREPARED."
    if first["state"] == "replay":
        return (
            "A transaction on the primary holds the lock: find it in pg_locks and pg_stat_activity"
            " there and end it. A schema change stops a replica's readers until it commits."
        )
    if change is not None and change.pid == first["pid"]:
        return (
            f"Cancel the schema change: select pg_cancel_backend({first['pid']}). One that reads or"
            " rewrites a table locks others out meanwhile; CREATE INDEX CONCURRENTLY and NOT VALID"
            " constraints do not."
        )
    if change is not None:
        return (
            "Cancel the schema change (pg_cancel_backend) and run it again with a short"
            " lock_timeout, or end the session that it waits for."
        )
    if first["where"]:
        return (
            "Commit before slow work in the code that holds the lock. To free it now:"
            f" select pg_terminate_backend({first['pid']})."
        )
    return f"End the session that holds the lock: select pg_terminate_backend({first['pid']})."
