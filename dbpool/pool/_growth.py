"""Growth: the store's rules for connecting, and for the breaker. Its lock is held.

`Store` makes steps of its own of them, see `_store.locked`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from dbpool import events
from dbpool.breaker import Attempt
from dbpool.pool import _explain
from dbpool.pool._notices import Notices

if TYPE_CHECKING:
    from dbpool.pool._store import Store


def refill(store: Store) -> None:
    """Begin the connects that are missing: up to min_size, then one at a time for waiters."""
    breaker = store.breaker
    if not store.is_open or breaker.retry is not None or breaker.is_open:
        return
    missing = max(0, store.min_size - store.size)
    if store.waiting and not breaker.attempts and store.size < store.max_size:
        missing = max(1, missing)
    for _ in range(missing):
        enqueue(store, breaker.add())


def enqueue(store: Store, attempt: Attempt) -> None:
    """Have a worker make that attempt; twice does no harm."""
    store.workers.run(lambda pool: pool._supply.connect(pool, attempt))


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


def connected(store: Store, conn: Any, attempt: Attempt) -> tuple[float, float | None]:
    """Add a new connection; return how long it took, and how long the outage was, if any."""
    seconds = store.breaker.clock() - attempt.started
    store.bag.records.add(conn._record)
    outage = store.breaker.succeeded(attempt)
    store.metrics.connects += 1
    store.metrics.connect.add(seconds)
    if store.size > store.max_size:  # it was made smaller meanwhile
        conn._record.expires_at = 0.0
    store.hand_over_or_store(conn, is_fresh=True)
    store.refill()
    return seconds, outage


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
    breaker.overdue(attempt, _explain.no_answer(breaker.clock() - started))
    trip_if_due(store)
    return max(started, breaker.last_alive_at) + breaker.patience - breaker.clock()


def close_if_alive(store: Store) -> None:
    """Close the breaker if a connection came back healthy since it opened."""
    if (outage := store.breaker.close_if_alive()) is not None:
        store.notices.append(partial(Notices.back, seconds=outage))
        store.flush_later()


def trip_if_due(store: Store) -> None:
    """Open the breaker if it is time to; while it is open, nobody waits."""
    breaker, bag = store.breaker, store.bag
    if breaker.trip_if_due(idle=len(bag.idle), out=bag.out):
        opened = events.CircuitOpened(store.name, breaker.last_error or "", breaker.kind)
        store.notices.append(partial(Notices.down, event=opened))
        store.metrics.circuit_opened += 1
        store.flush_later()
    if breaker.is_open and store.waiting:
        snapshot = store.snapshot()  # one for all
        store.metrics.rejected += store.waiting.reject_all(
            lambda: _explain.unavailable(store.name, snapshot, breaker)
        )
