"""The store's rules: when to connect, when the breaker opens, what a caller is told, and numbers.

Plain functions of the store, called with its lock held. `Store` makes steps of some, see
`_store.locked`.
"""

from __future__ import annotations

import time
from collections import Counter
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg_pool import PoolClosed, TooManyRequests

from dbpool import errors, holders
from dbpool.breaker import Attempt
from dbpool.errors import DatabaseUnavailable, PoolError
from dbpool.liveness import is_active, is_retransmitting
from dbpool.metrics import BreakerSnapshot, Snapshot
from dbpool.pool._bag import Waiter
from dbpool.pool._notices import Notices

if TYPE_CHECKING:
    from dbpool.pool._store import Store

# Connecting


def may_begin(store: Store, attempt: Attempt) -> bool:
    """Whether a worker is to make that attempt; if nobody needs it, release its place."""
    if not store.is_open or attempt.started or attempt not in store.breaker.attempts:
        return False  # another worker was quicker
    # While nothing is there at all, the next caller is to learn at once whether it works.
    is_missed = not store.bag.records or store.size <= store.min_size or bool(store.waiting)
    is_excess = store.size > store.max_size
    return not store.breaker.release_if_unneeded(attempt, is_missed=is_missed, is_excess=is_excess)


def begin(store: Store, attempt: Attempt) -> float:
    """Begin a try; return when."""
    attempt.started = store.breaker.clock()
    return attempt.started


def connected(store: Store, conn: Any, attempt: Attempt) -> float:
    """Add a new connection; return how long it took."""
    seconds = store.breaker.clock() - attempt.started
    store.bag.records.add(conn._record)
    if (outage := store.breaker.succeeded(attempt)) is not None:
        store.notices.append(partial(Notices.back, seconds=outage))
    store.metrics.connects += 1
    store.metrics.connect.add(seconds)
    if store.size > store.max_size:  # it was made smaller meanwhile
        conn._record.expires_at = 0.0
    store.hand_over_or_store(conn, is_fresh=True)
    store.refill()
    return seconds


def failed(
    store: Store, attempt: Attempt, error: BaseException, kind: str, *, awaits_change: bool
) -> bool:
    """Record a failed attempt; return whether it is to be tried again."""
    store.metrics.connect_failures += 1
    if not store.is_open:
        return False
    is_retry = store.breaker.failed(attempt, error, kind, awaits_change=awaits_change)
    trip_if_due(store)
    return is_retry


def overdue(store: Store, attempt: Attempt, started: float) -> float | None:
    """Count an attempt without an answer as failing; return when to look again, in seconds."""
    breaker = store.breaker
    is_over = attempt not in breaker.attempts or attempt.started != started
    if is_over or not store.is_open:
        return None
    breaker.overdue(attempt, _no_answer(breaker.clock() - started))
    trip_if_due(store)
    return max(started, breaker.last_alive_at) + breaker.patience - breaker.clock()


# The breaker


def close_if_alive(store: Store) -> None:
    """Close the breaker if a connection came back healthy since it opened."""
    if (outage := store.breaker.close_if_alive()) is not None:
        store.notices.append(partial(Notices.back, seconds=outage))
        store.flush_later()


def trip_if_due(store: Store) -> None:
    """Open the breaker if it is time to; while it is open, nobody waits."""
    breaker, bag = store.breaker, store.bag
    if breaker.trip_if_due(idle=len(bag.idle), out=bag.out):
        error, kind = breaker.last_error or "", breaker.kind
        store.notices.append(partial(Notices.down, error=error, kind=kind))
        store.metrics.circuit_opened += 1
        store.flush_later()
    if breaker.is_open and store.waiting:
        # One snapshot for all.
        reject = partial(_unavailable, store, snapshot(store))
        store.metrics.rejected += store.waiting.reject_all(reject)


# Errors


def closed(store: Store) -> PoolClosed:
    """Build the error of a checkout from a pool that is closed, or not open yet."""
    state = "already closed" if store.was_opened else "not open yet"
    return PoolClosed(f"the pool {store.name!r} is {state} [DBE06]")


def too_many(store: Store, max_waiting: int) -> TooManyRequests:
    """Build the error of a caller who may not wait beside the others."""
    now = snapshot(store)
    text = f"pool {store.name!r}: {now.waiting} waiting already, max_waiting is {max_waiting};"
    return TooManyRequests(f"{text} {now.active} of {now.max_size} connections checked out [DBE05]")


def unavailable(store: Store, cause: BaseException | None = None) -> DatabaseUnavailable:
    """Build DatabaseUnavailable; a *cause* counts instead of the last failed connect."""
    return _unavailable(store, snapshot(store), cause)


def _unavailable(
    store: Store, now: Snapshot, cause: BaseException | None = None, answered_at: float = 0.0
) -> DatabaseUnavailable:
    """Build it; *answered_at* is when the server answered last, 0 if that does not matter.

    Without a failed connect its cause is "no answer".
    """
    breaker = store.breaker
    seconds, kind, reason = breaker.failing_for, breaker.kind, breaker.error
    text = breaker.last_error or "none was made in time"
    silent_since = min(breaker.pending(), default=answered_at)
    if cause is not None:
        kind, reason = errors.classify(cause), errors.sanitize(cause)
        text = errors.describe(reason)
    elif reason is None and silent_since:
        seconds, kind = breaker.clock() - silent_since, "timeout"
        reason = _no_answer(seconds)
        text = str(reason)
    cls = errors.DatabaseMisconfigured if errors.is_permanent(kind) else DatabaseUnavailable
    span = f" for {seconds:.1f} s" if seconds >= 0.1 else ""
    shown = "" if kind == "unknown" else f" ({kind})"
    text = f"pool {store.name!r}: no connection to the database{span}{shown}: {text}"
    since, retry_after = time.time() - seconds, breaker.retry_after or 0.0
    error = cls(
        text, pool=store.name, snapshot=now, kind=kind, since=since, retry_after=retry_after
    )
    error.__cause__ = reason
    return error


def _no_answer(seconds: float) -> psycopg.OperationalError:
    span = f"for {seconds:.1f} s" if seconds >= 0.1 else "yet"
    return psycopg.errors.ConnectionTimeout(f"no answer from the server {span}")


def time_out(store: Store, waiter: Waiter) -> tuple[int, PoolError | None]:
    """Fail a waiter whose time is over, and those behind it for whom that holds too.

    One snapshot serves all. One that was served this very moment is left alone. Returns how
    many failed, and the error of one of them.
    """
    breaker, now, error = store.breaker, snapshot(store), None
    held, moment = store.bag.held(), breaker.clock()
    suspicion, is_silent = _suspicion(store, moment - waiter.started)
    if is_silent and breaker.silent_since < breaker.last_alive_at:
        breaker.silent_since = waiter.started
    held_by = Counter(record.thread for record in held)
    late = store.waiting.expired(waiter, moment)
    for each in late:
        seconds = moment - each.started
        error = _timed_out(store, now, seconds, held_by[each.thread], suspicion)
        store.waiting.discard(each)
        store.metrics.timeouts += 1
        store.timed_out_wait_seconds += seconds
        each.fail(error)
    return len(late), error


def _timed_out(store: Store, now: Snapshot, seconds: float, held: int, suspicion: str) -> PoolError:
    """Build the error of a caller who waited *seconds*, and itself has *held* connections.

    PoolExhausted only if every connection is checked out and making one does not fail, else
    DatabaseUnavailable. *suspicion* says what may keep the holders, if anything is known.
    """
    breaker, n = store.breaker, held
    if breaker.is_failing or now.connecting or now.active < now.max_size:
        return _unavailable(store, now)
    if not now.holders and breaker.last_alive_at < breaker.clock() - seconds:
        # All connections are being asked whether they are alive, and none has answered.
        return _unavailable(store, now, answered_at=breaker.last_alive_at)
    nested = (
        f"; nested: this thread itself holds {n}, and n threads that hold {n + 1} at once"
        f" need a max_size of at least n * {n} + 1"
    )
    text = (
        f"pool {store.name!r}: no connection within {seconds:.2f} s: {now.active} of {now.max_size}"
        f" checked out, {now.idle} idle, {now.waiting - 1} more waiting; held longest:"
        f" {holders.group(now.holders) or 'unknown'}{nested if n else suspicion}"
    )
    return errors.PoolExhausted(text, pool=store.name, snapshot=now)


def _suspicion(store: Store, seconds: float) -> tuple[str, bool]:
    """Say what to suspect if no connection came back for *seconds* and statements run on some.

    Returns also whether TCP knows that the network is silent.
    """
    breaker, held = store.breaker, store.bag.held()
    is_recent = breaker.last_alive_at >= breaker.clock() - seconds
    if is_recent or not any(is_active(record.conn) for record in held):
        return "", False
    silent = sum(is_retransmitting(record.fd) for record in held if record.is_open)
    sockets = f": {silent} of {len(held)} sockets wait for acknowledgements" if silent else ""
    text = f"; none came back in that time: slow statements or a silent network{sockets}"
    return text, bool(silent)


# Numbers


def snapshot(store: Store) -> Snapshot:
    """Return the state, the sizes, the holders, and all counters since opening."""
    bag, breaker, held = store.bag, store.breaker, store.bag.held()
    # All sizes are 0 after close, whatever is still out.
    idle = len(bag.idle) if store.is_open else 0
    active, connecting = (bag.out, len(breaker.attempts)) if store.is_open else (0, 0)
    return store.metrics.snapshot(
        state=store.state,
        size=active + idle + connecting,
        active=active,
        idle=idle,
        connecting=connecting,
        waiting=len(store.waiting),
        min_size=store.min_size,
        max_size=store.max_size,
        pending=[record.wait for record in held],
        breaker=BreakerSnapshot(
            state=breaker.state,
            since=breaker.since,
            last_error=breaker.last_error,
            retry_after=breaker.retry_after,
            kind=breaker.kind if breaker.is_failing else None,
        ),
        holders=holders.describe(held, monotonic(), {w.thread for w in list(store.waiting)}),
    )


def parent_stats(store: Store, *, pop: bool = False) -> dict[str, int]:
    """Return psycopg_pool's statistics; counts and sums are those since the last *pop*."""
    metrics, before = store.metrics, store.popped
    metrics.count_finished()
    pending = [record.wait for record in store.bag.held()]
    failed = metrics.timeouts + metrics.rejected
    wait = metrics.wait.sum_ns / 1e9 + sum(pending) + store.timed_out_wait_seconds
    totals = {
        "requests_num": metrics.checkouts + len(pending) + failed,
        "requests_queued": store.queued,
        "requests_wait_ms": int(1000.0 * wait),
        "requests_errors": failed,
        "usage_ms": metrics.use.sum_ns // 1_000_000,
        "returns_bad": metrics.broken,
        "connections_num": metrics.connects + metrics.connect_failures,
        "connections_ms": metrics.connect.sum_ns // 1_000_000,
        "connections_errors": metrics.connect_failures,
        "connections_lost": metrics.dead,
    }
    if pop:
        store.popped = totals
    return {key: value - before.get(key, 0) for key, value in totals.items()} | {
        "pool_min": store.min_size,
        "pool_max": store.max_size,
        "pool_size": store.size,
        "pool_available": len(store.bag.idle),
        "requests_waiting": len(store.waiting),
    }
