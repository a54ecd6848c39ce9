"""Findings about who holds connections: idle transactions, slow statements, nesting, unused ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final

from dbpool.diagnosis._finding import Finding, Severity, are_few, count, duration
from dbpool.diagnosis._scene import (
    ABORTED,
    IDLE,
    IDLE_IN_TRANSACTION,
    QUERY,
    Holder,
    PoolScene,
)

_IDLE_AFTER: Final = 5.0
_IDLE_LOOKS: Final = 10
_SLOW_AFTER: Final = 5.0
_SLOW_LOOKS: Final = 5
_SLOW_COUNT: Final = 3  # slow statements that are told of though nobody waits for a connection
_SLOW_SHARE: Final = 1 / 3  # of the connections, that are as much
_UNUSED_AFTER: Final = 10.0
_UNUSED_LOOKS: Final = 10
_LONG_WAIT: Final = 0.1  # seconds
_UNUSED_SHARE: Final = 0.5
_MAX_HOLDERS: Final = 5  # in one finding
# What to do about statements that wait for this event in the server.
_WAITS: Final = {
    "IPC/SyncRep": "Commits wait for a synchronous standby: bring it back, or take it out of"
    " synchronous_standby_names.",
    "Client/ClientWrite": "The server waits until the application reads the rows: read them faster,"
    " or fetch fewer.",
    "Client/ClientRead": "The server waits until the application sends more: look at what it does"
    " between two parts of a COPY or of a pipeline.",
}
_SLOW_ADVICE: Final = (
    "Look at the statement's plan (EXPLAIN) and its indexes; bound it by statement_timeout. More"
    " connections would make it slower."
)
_POOLED: Final = (
    " Behind a pooler they may as well wait for a lock or for a server connection: see"
    " pg_stat_activity on the server and SHOW POOLS."
)


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
    are_many = _are_many(pool, [h for h, _, _ in stuck])
    worst = Severity.CRITICAL if are_many else Severity.WARNING
    return Finding(
        "DB05",
        worst if is_bad else Severity.NOTICE,
        pool=pool.name,
        since=pool.now - seconds,
        text=f"{count(len(stuck), 'connection')} of {pool.name}"
        f" {'is' if len(stuck) == 1 else 'are'} idle in a transaction, the longest for"
        f" {duration(seconds)}{guess}, checked out by {holder.place};"
        f" {count(pool.waiting, 'caller')} waiting",
        do="Commit or roll back before slow work, and hold a connection only while it is used."
        " idle_in_transaction_timeout ends such transactions.",
        evidence={
            "waiting": pool.waiting,
            "connections": len(stuck),
            "aborted": aborted,
            "exact": is_exact,
            "holders": _holders([h for h, _, _ in stuck]),
        },
        is_minor=not are_many and are_few(len(stuck), pool.max_size),
    )


def _idle(pool: PoolScene, holder: Holder) -> tuple[float | None, bool]:
    """Return for how long a holder is idle in a transaction if that is long, and who said so."""
    session = pool.session_of(holder)
    if session is not None and session.state_seconds is not None:
        is_idle = (session.state or "").startswith(IDLE_IN_TRANSACTION)
        seconds = pool.lasted(session, session.state_seconds) or 0.0
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
    if not pool.is_stuck and len(slow) < min(_SLOW_COUNT, _SLOW_SHARE * pool.max_size):
        return None
    seconds = max(seconds for _, seconds in slow)
    wait = _common_wait(pool, [holder for holder, _ in slow])
    return Finding(
        "DB07", Severity.CRITICAL if pool.is_stuck else Severity.NOTICE,
        pool=pool.name, since=pool.now - seconds,
        text=f"slow statements hold {len(slow)} of {count(pool.max_size, 'connection')} of"
        f" {pool.name}, the longest for {duration(seconds)}, from {_places(h for h, _ in slow)};"
        f" {count(pool.waiting, 'caller')} waiting"
        + (f"; most of the statements wait for {wait} in the server" if wait else ""),
        do=_WAITS.get(wait or "", _SLOW_ADVICE) + (_POOLED if pool.pooler else ""),
        evidence={
            "waiting": pool.waiting, "connections": len(slow), "seconds": seconds, "wait": wait,
            "holders": _holders([h for h, _ in slow]),
        },
    )  # fmt: skip


def _slow(pool: PoolScene, holder: Holder) -> float | None:
    """Return for how long a holder's statement has run, if that is long."""
    session = pool.session_of(holder)
    if session is not None and session.query_seconds is not None:
        seconds = pool.lasted(session, session.query_seconds) or 0.0
        is_busy = session.state == "active" and session.wait_type != "Lock"
        return seconds if is_busy and seconds >= _SLOW_AFTER else None
    run = pool.watch.run_of(holder, pool.now)
    if run is None or run.status != QUERY or run.looks < _SLOW_LOOKS:
        return None
    seconds = min(float(run.looks), holder.seconds)
    return seconds if seconds >= _SLOW_AFTER else None


def _common_wait(pool: PoolScene, holders: Sequence[Holder]) -> str | None:
    """Return what the statements of half of these holders, or of more, wait for in the server."""
    sessions = [session for holder in holders if (session := pool.session_of(holder))]
    (wait, number), *_ = Counter(session.wait for session in sessions).most_common(1) or [(None, 0)]
    return wait if 2 * number >= len(holders) else None


def nested(pool: PoolScene) -> Finding | None:
    """DB09: callers wait for a connection while they hold one of the same pool."""
    holders = [holder for holder in pool.holders if holder.is_waiting]
    timeouts = pool.watch.nested
    if not (holders and pool.is_short) and not timeouts:
        return None
    since = pool.watch.nested_since if timeouts else None
    since = min([pool.now - holder.seconds for holder in holders] + [since or pool.now])
    places = f" at {_places(holders)}" if holders else ""
    are_all = len(holders) >= pool.max_size
    return Finding(
        "DB09", Severity.CRITICAL, pool=pool.name, since=since,
        text=f"{_callers_wait(pool, len(holders) or timeouts)} for a second connection while holding"
        f" one{places}"
        + (": all connections are held this way, and none can become free" if are_all else ""),
        do="Pass the connection on instead of checking out another inside the block. Else max_size"
        " must be at least threads * (held at once - 1) + 1.",
        evidence={"waiting": pool.waiting, "max_size": pool.max_size, "timed_out": timeouts,
                  "holders": _holders(holders)},
    )  # fmt: skip


def held_unused(pool: PoolScene) -> Finding | None:
    """DB15: callers wait while most holders, or a few for long, do nothing in the database."""
    share, since = pool.watch.unused_share or 0.0, pool.watch.unused_since
    is_common = share >= _UNUSED_SHARE and since is not None and pool.now - since >= _UNUSED_AFTER
    is_common = is_common and _waits_are_long(pool)
    kept = _kept(pool) if pool.is_stuck else []
    unused = kept or [holder for holder in pool.holders if holder.is_unused] or list(pool.holders)
    if is_common:
        what = f"the holders do nothing in the database {share:.0%} of the time"
    elif kept:
        longest = max(holder.seconds for holder in kept)
        since = pool.now - longest
        held = count(len(kept), "connection has", "connections have")
        what = f"{held} run no query for up to {duration(longest)}"
    else:
        return None
    return Finding(
        "DB15", Severity.CRITICAL if pool.is_stuck else Severity.WARNING,
        pool=pool.name, since=since or pool.now,
        text=f"{_callers_wait(pool, pool.waiting)} while {what}: {_places(unused)}",
        do="Move everything that is not database work (calls to other services, rendering,"
        " sleeping) out of the block that holds the connection.",
        evidence={"waiting": pool.waiting, "unused_share": round(share, 2),
                  "holders": _holders(unused)},
    )  # fmt: skip


def _waits_are_long(pool: PoolScene) -> bool:
    """Whether callers waited for long of late, if that is known: a busy pool has some who wait."""
    steps = pool.known(2)
    if pool.refused or not sum(step.checkouts for step in steps):
        return True
    return any((step.wait.quantile(0.95) or 0.0) > _LONG_WAIT for step in steps)


def _kept(pool: PoolScene) -> list[Holder]:
    """Return who has held for long without a query or a transaction, if they are many."""
    runs = [(holder, pool.watch.run_of(holder, pool.now)) for holder in pool.holders]
    kept = [h for h, run in runs if run and run.status == IDLE and run.looks >= _UNUSED_LOOKS]
    return kept if _are_many(pool, kept) else []


def _are_many(pool: PoolScene, holders: Sequence[Holder]) -> bool:
    """Whether these are half of the holders of a worker, or more: its callers wait for them."""
    of_all = Counter(holder.worker for holder in pool.holders)
    found = Counter(holder.worker for holder in holders)
    return any(2 * number >= of_all[worker] for worker, number in found.items())


def has_turnover(pool: PoolScene) -> bool:
    """Whether connections come and go, so that no single holder is to blame."""
    return sum(step.checkouts for step in pool.known(2)) >= max(1, pool.active)


def _callers_wait(pool: PoolScene, callers: int) -> str:
    return count(callers, f"caller of {pool.name} waits", f"callers of {pool.name} wait")


def _places(holders: Iterable[Holder]) -> str:
    """Name the places that hold most, three at most."""
    places = Counter(holder.place for holder in holders).most_common()
    shown = [place if n == 1 else f"{place} ({n} times)" for place, n in places[:3]]
    more = [f"{count(len(places) - 3, 'other place')}"] if len(places) > 3 else []
    return ", ".join([*shown, *more]) or "an unknown place"


def _holders(holders: Sequence[Holder]) -> list[dict[str, Any]]:
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
        for holder in longest[:_MAX_HOLDERS]
    ]
