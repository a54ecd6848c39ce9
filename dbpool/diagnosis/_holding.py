"""Findings about who holds connections: locks, idle transactions, slow statements, nesting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final

from dbpool.diagnosis._finding import Finding, Severity, count, duration
from dbpool.diagnosis._scene import (
    ABORTED,
    IDLE_IN_TRANSACTION,
    QUERY,
    UNKNOWN,
    Holder,
    PoolScene,
)
from dbpool.diagnosis._server_view import ServerView, Session

_LOCK_AFTER: Final = 1.0  # seconds
_LOCK_LONG: Final = 5.0
_IDLE_AFTER: Final = 5.0
_IDLE_LOOKS: Final = 10
_SLOW_AFTER: Final = 5.0
_SLOW_LOOKS: Final = 5
_MANY: Final = 3  # slow statements that are told of though nobody waits for a connection
_MUCH: Final = 1 / 3  # of the connections, that are as much
_UNUSED_AFTER: Final = 10.0
_UNUSED_SHARE: Final = 0.5
_MAX_BLOCKERS: Final = 5  # in one finding
_MAX_BLOCKED: Final = 20
_GRANT: Final = " GRANT pg_read_all_stats to the role shows what other roles' sessions do."


def waiting_for_lock(pool: PoolScene) -> Finding | None:
    """DB04: our connections wait for a lock; who is at the root of the queue."""
    view = pool.last_view
    known = [] if view is None else view.waiting_for_locks()
    waited = {each.pid: _seconds(pool, each, each.query_seconds) or 0.0 for each in known}
    waiting = [each for each in known if waited[each.pid]]
    seconds = max(waited.values(), default=0.0)
    if view is None or seconds < _LOCK_AFTER:
        return None
    roots = view.roots(waiting)
    blockers = [_blocker(pool, view, pid) for pid in roots[:_MAX_BLOCKERS]]
    change = view.schema_change(waiting)
    return Finding(
        "DB04",
        _lock_severity(pool, seconds),
        pool=pool.name,
        since=pool.now - seconds,
        text=_lock_text(pool, waiting, blockers, change, view),
        brief=_lock_text(pool, waiting, [b | {"client": None} for b in blockers], change, view),
        do=_lock_advice(blockers, change) + (_GRANT if view.is_limited else ""),
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


def _seconds(pool: PoolScene, session: Session, then: float | None) -> float | None:
    """Return for how long one of our sessions does what it did *then*; None if it has ended.

    A server is not asked at each look. What it said is still so if the same checkout goes on.
    """
    holder, view = pool.holder_of(session.pid), pool.last_view
    if holder is None or view is None or then is None:  # of another host, or not among the longest
        return then
    age = max(0.0, pool.now - view.time)
    is_idle = (session.state or "").startswith(IDLE_IN_TRANSACTION)
    is_same = holder.status == UNKNOWN or holder.is_unused == is_idle
    return min(then + age, holder.seconds) if is_same and holder.seconds >= age else None


def _lock_severity(pool: PoolScene, seconds: float) -> Severity:
    """A short wait for a lock is daily life, unless it stops other callers."""
    if pool.is_short:
        return Severity.CRITICAL
    return Severity.WARNING if seconds >= _LOCK_LONG else Severity.NOTICE


def _describe(pool: PoolScene, pid: int) -> dict[str, Any]:
    """Return what is known of a session as a holder of this pool's."""
    holder = pool.holder_of(pid)
    return {
        "pid": pid,
        "worker": holder and holder.worker,
        "endpoint": holder and holder.endpoint,
        "where": holder and holder.where,
    }


def _blocker(pool: PoolScene, view: ServerView, pid: int) -> dict[str, Any]:
    session = view.sessions.get(pid)
    found = _describe(pool, pid)
    if pid == 0:
        oldest = max(view.prepared, key=lambda each: each.seconds, default=None)
        found |= {"state": "prepared transaction", "gid": oldest and oldest.gid}
        return found | {"seconds": oldest and oldest.seconds, "owner": oldest and oldest.owner}
    if session is None:
        return found | {"state": None, "seconds": None}
    is_idle = (session.state or "").startswith(IDLE_IN_TRANSACTION)
    return found | {
        "state": session.state if session.backend_type != "autovacuum worker" else "autovacuum",
        "seconds": session.state_seconds if is_idle else session.query_seconds,
        "application_name": session.application_name,
        "client": session.client,
        "query": session.query,
    }


def _who(blocker: dict[str, Any]) -> str:
    """Name a blocker as well as it is known."""
    if blocker["where"]:
        endpoint, where = blocker["endpoint"], blocker["where"]
        place = f"{endpoint} ({where})" if endpoint else where
        return f"{place} in worker {blocker['worker']}" if blocker["worker"] else place
    if blocker["pid"] == 0:
        gid = blocker.get("gid")
        return f"the prepared transaction {gid!r}" if gid else "a prepared transaction"
    if blocker["state"] == "autovacuum":
        return f"autovacuum (pid {blocker['pid']})"
    known = [str(blocker[k]) for k in ("application_name", "client") if blocker.get(k)]
    return f"the session {blocker['pid']}" + (f" ({', '.join(known)})" if known else "")


def _lock_text(
    pool: PoolScene,
    waiting: Sequence[Session],
    blockers: Sequence[dict[str, Any]],
    change: Session | None,
    view: ServerView,
) -> str:
    number_of = count(len(waiting), "connection")
    verb = "waits" if len(waiting) == 1 else "wait"
    if not blockers:
        return f"{number_of} of {pool.name} {verb} for a lock; who holds it could not be seen"
    first = blockers[0]
    held = f", {first['state']}" if first["state"] and first["pid"] else ""
    held += f" for {duration(first['seconds'])}" if first["seconds"] else ""
    more = f", and {count(len(blockers) - 1, 'other')}" if len(blockers) > 1 else ""
    queue = f"; {count(pool.waiting, 'caller')} wait for a connection" if pool.waiting else ""
    if change is not None and change.pid != first["pid"]:
        who = change.application_name or f"pid {change.pid}"
        return (
            f"{change.ddl} of {who} (session {change.pid}) waits for {_who(first)}{held}{more};"
            f" {number_of} of {pool.name} {verb} behind it{queue}"
        )
    return (
        f"{number_of} of {pool.name} {verb} for a lock that {_who(first)} holds{held}{more}{queue}"
    )


def _lock_advice(blockers: Sequence[dict[str, Any]], change: Session | None) -> str:
    if not blockers:
        return "Look at pg_locks and pg_stat_activity on the server as a superuser."
    first = blockers[0]
    if first["pid"] == 0:
        return "End the prepared transaction on the server: COMMIT PREPARED or ROLLBACK PREPARED."
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


def idle_in_transaction(pool: PoolScene) -> Finding | None:
    """DB05: holders have left a transaction open and do nothing in it."""
    found = [(holder, *_idle(pool, holder)) for holder in pool.holders]
    stuck = [(h, seconds, exact) for h, seconds, exact in found if seconds is not None]
    if not stuck:
        return None
    holder, seconds, is_exact = max(stuck, key=lambda each: each[1])
    aborted = sum(h.status == ABORTED for h, _, _ in stuck)
    guess = "" if is_exact else " (as seen from here: the server was not asked)"
    is_bad = pool.waiting > 0 or pool.refused > 0
    return Finding(
        "DB05",
        Severity.CRITICAL if is_bad else Severity.NOTICE,
        pool=pool.name,
        since=pool.now - seconds,
        text=f"{count(len(stuck), 'connection')} of {pool.name} idle in a transaction, the longest"
        f" for {duration(seconds)}{guess}, checked out by {holder.place};"
        f" {count(pool.waiting, 'caller')} waiting",
        do="Commit or roll back before slow work, and hold a connection only while it is used."
        " idle_in_transaction_timeout ends such transactions.",
        evidence={
            "waiting": pool.waiting,
            "connections": len(stuck),
            "aborted": aborted,
            "exact": is_exact,
            "holders": _holders(pool, [h for h, _, _ in stuck]),
        },
    )


def _idle(pool: PoolScene, holder: Holder) -> tuple[float | None, bool]:
    """Return for how long a holder is idle in a transaction if that is long, and who said so."""
    session = pool.session_of(holder)
    if session is not None and session.state_seconds is not None:
        is_idle = (session.state or "").startswith(IDLE_IN_TRANSACTION)
        seconds = _seconds(pool, session, session.state_seconds) or 0.0
        return (seconds if is_idle and seconds >= _IDLE_AFTER else None), True
    run = pool.watch.run_of(holder, pool.now)
    if holder.is_waiting or run is None or run.status not in (IDLE_IN_TRANSACTION, ABORTED):
        return None, False
    return (min(float(run.looks), holder.seconds) if run.looks >= _IDLE_LOOKS else None), False


def slow_statements(pool: PoolScene) -> Finding | None:
    """DB07: at least half of the connections are in statements that take long; no lock is found.

    Where nobody waits for a connection, all threads of a worker may be among the holders: several
    slow statements are a notice then.
    """
    slow = [(holder, seconds) for holder in pool.holders if (seconds := _slow(pool, holder))]
    if not slow or 2 * len(slow) < len(pool.holders):
        return None
    if not pool.is_stuck and len(slow) < min(_MANY, _MUCH * pool.max_size):
        return None
    seconds = max(seconds for _, seconds in slow)
    return Finding(
        "DB07", Severity.CRITICAL if pool.is_stuck else Severity.NOTICE,
        pool=pool.name, since=pool.now - seconds,
        text=f"slow statements hold {len(slow)} of {count(pool.max_size, 'connection')} of"
        f" {pool.name}, the longest for {duration(seconds)}, from {_places(h for h, _ in slow)};"
        f" {count(pool.waiting, 'caller')} waiting",
        do="Look at the statement's plan (EXPLAIN) and its indexes; bound it by statement_timeout."
        " More connections would make it slower.",
        evidence={
            "waiting": pool.waiting, "connections": len(slow), "seconds": seconds,
            "holders": _holders(pool, [h for h, _ in slow]),
        },
    )  # fmt: skip


def _slow(pool: PoolScene, holder: Holder) -> float | None:
    """Return for how long a holder's statement has run, if that is long."""
    session = pool.session_of(holder)
    if session is not None and session.query_seconds is not None:
        seconds = _seconds(pool, session, session.query_seconds) or 0.0
        is_busy = session.state == "active" and session.wait_type != "Lock"
        return seconds if is_busy and seconds >= _SLOW_AFTER else None
    run = pool.watch.run_of(holder, pool.now)
    if run is None or run.status != QUERY or run.looks < _SLOW_LOOKS:
        return None
    seconds = min(float(run.looks), holder.seconds)
    return seconds if seconds >= _SLOW_AFTER else None


def nested(pool: PoolScene) -> Finding | None:
    """DB09: callers wait for a connection while they hold one of the same pool."""
    holders = [holder for holder in pool.holders if holder.is_waiting]
    timeouts = pool.watch.nested
    if not (holders and pool.is_short) and not timeouts:
        return None
    since = pool.watch.nested_since if timeouts else None
    since = min([pool.now - holder.seconds for holder in holders] + [since or pool.now])
    places = f" at {_places(holders)}" if holders else ""
    everybody = len(holders) >= pool.max_size
    return Finding(
        "DB09", Severity.CRITICAL, pool=pool.name, since=since,
        text=f"{count(len(holders) or timeouts, 'caller')} of {pool.name} wait for a second"
        f" connection while holding one{places}"
        + (": all connections are held this way, and none can become free" if everybody else ""),
        do="Pass the connection on instead of checking out another inside the block. Else max_size"
        " must be at least threads * (held at once - 1) + 1.",
        evidence={"waiting": pool.waiting, "max_size": pool.max_size, "timed_out": timeouts,
                  "holders": _holders(pool, holders)},
    )  # fmt: skip


def held_unused(pool: PoolScene) -> Finding | None:
    """DB15: callers wait while most holders do nothing in the database."""
    share, since = pool.watch.unused_share, pool.watch.unused_since
    if share is None or since is None or share < _UNUSED_SHARE:
        return None
    if pool.now - since < _UNUSED_AFTER:
        return None
    unused = [holder for holder in pool.holders if holder.is_unused] or list(pool.holders)
    return Finding(
        "DB15", Severity.CRITICAL if pool.is_stuck else Severity.WARNING,
        pool=pool.name, since=since,
        text=f"{count(pool.waiting, 'caller')} of {pool.name} wait while the holders do nothing in"
        f" the database {share:.0%} of the time: {_places(unused)}",
        do="Move everything that is not database work (calls to other services, rendering,"
        " sleeping) out of the block that holds the connection.",
        evidence={"waiting": pool.waiting, "unused_share": round(share, 2),
                  "holders": _holders(pool, unused)},
    )  # fmt: skip


def has_turnover(pool: PoolScene) -> bool:
    """Whether connections come and go, so that no single holder is to blame."""
    return sum(step.checkouts for step in pool.known(2)) >= max(1, pool.active)


def _places(holders: Iterable[Holder]) -> str:
    """Name the places that hold most, three at most."""
    places = Counter(holder.place for holder in holders).most_common()
    shown = [place if n == 1 else f"{place} ({n} times)" for place, n in places[:3]]
    more = [f"{count(len(places) - 3, 'other place')}"] if len(places) > 3 else []
    return ", ".join([*shown, *more]) or "an unknown place"


def _holders(pool: PoolScene, holders: Sequence[Holder]) -> list[dict[str, Any]]:
    longest = sorted(holders, key=lambda holder: (-holder.seconds, holder.pid or 0))
    return [
        {
            "pid": holder.pid,
            "worker": holder.worker,
            "endpoint": holder.endpoint,
            "where": holder.where,
            "status": holder.status,
            "seconds": holder.seconds,
        }
        for holder in longest[:_MAX_BLOCKERS]
    ]
