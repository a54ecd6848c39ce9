"""The numbers of a pool, read from its store while the store's lock is held."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

from dbpool import holders
from dbpool.metrics import BreakerSnapshot, Snapshot

if TYPE_CHECKING:
    from dbpool.pool._store import Store


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
        holders=holders.describe(held, monotonic(), {w.thread for w in store.waiting}),
    )


def parent_totals(store: Store) -> dict[str, int]:
    """Return the counts and sums of psycopg_pool's statistics since opening."""
    metrics = store.metrics
    metrics.count_finished()
    pending = [record.wait for record in store.bag.held()]
    failed = metrics.timeouts + metrics.rejected
    wait = metrics.wait.sum_ns / 1e9 + sum(pending) + store.timed_out_wait_seconds
    return {
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


def parent_sizes(store: Store) -> dict[str, int]:
    """Return the sizes of psycopg_pool's statistics."""
    return {
        "pool_min": store.min_size,
        "pool_max": store.max_size,
        "pool_size": store.size,
        "pool_available": len(store.bag.idle),
        "requests_waiting": len(store.waiting),
    }
