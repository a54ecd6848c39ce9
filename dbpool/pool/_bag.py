"""Bag: the connections of a pool, and the steps of the store that change them.

It has no lock of its own: the store calls these with its lock held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from operator import attrgetter
from os import getpid
from queue import SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

import psycopg
from psycopg import capabilities

from dbpool import events
from dbpool.holders import NOBODY, ConnectionRecord, ThreadInfo
from dbpool.liveness import is_active, is_retransmitting
from dbpool.metrics import HolderSnapshot, describe_holders
from dbpool.pool._psycopg import attach, close

if TYPE_CHECKING:
    from dbpool.pool._store import Store

_MAX_CANCELS: Final = 100  # requests that wait to be sent; beyond them the oldest is dropped

Condition = Callable[[ConnectionRecord], bool]
Job = Callable[[Any], None]  # of a worker, called with the pool
Jobs = SimpleQueue[Job | None]  # None ends a worker


class Bag:
    """Connections that are idle, held or in transit, each with its record.

    An idle one is in `idle`, and its record has no owner; a held one's record says since when;
    one in transit has a record that names only its owner. What belongs together changes without a
    call in between: a signal handler may raise after any call.
    """

    def __init__(self) -> None:
        self.idle: deque[Any] = deque()  # the one used last at the right
        self.records: set[ConnectionRecord] = set()
        self.to_close: deque[Any] = deque()  # forgotten, but still open
        self.cancels: deque[Any] = deque(maxlen=_MAX_CANCELS)  # requests to be sent
        self.pid = getpid()

    @property
    def out(self) -> int:
        """How many are held or in transit."""
        return len(self.records) - len(self.idle)

    def held(self) -> list[ConnectionRecord]:
        """Return the records of those that are held."""
        return [record for record in list(self.records) if record.since]

    def ready(self) -> int:
        """Return how many are idle or held."""
        return sum(record.owner is None or record.since > 0.0 for record in list(self.records))

    def suspicion(self) -> tuple[str, bool]:
        """Say what to suspect if none came back for long and statements run on some.

        Returns also whether TCP knows that the network is silent.
        """
        held = self.held()
        if not any(is_active(record.ref()) for record in held):
            return "", False
        silent = sum(is_retransmitting(record.fd) for record in held if record.is_open)
        sockets = f": {silent} of {len(held)} sockets wait for acknowledgements" if silent else ""
        text = f"; none came back in that time: slow statements or a silent network{sockets}"
        return text, bool(silent)

    def store(self, conn: Any) -> None:
        """Make a connection idle."""
        attach(conn, None)
        record: ConnectionRecord = conn._record
        record.since, record.owner = 0.0, None
        self.idle.append(conn)

    def forget(self, record: ConnectionRecord) -> None:
        """Forget a connection, and have it closed."""
        if (conn := record.ref()) is not None:
            self.to_close.append(conn)
        self.records.discard(record)
        record.since, record.ref, record.owner = 0.0, NOBODY, None  # its collection means nothing

    def close_evicted(self) -> None:
        """Close what was forgotten; called without the lock."""
        for conn in list(self.to_close):  # to close one twice does no harm
            close(conn)
            with suppress(ValueError):
                self.to_close.remove(conn)

    def cancel_later(self, conn: Any) -> None:
        """Have the statement cancelled that still runs on a connection, which is closed next.

        Only in the process that made it: a request goes over a socket of its own, and would end a
        statement of the parent's.
        """
        record: ConnectionRecord | None = getattr(conn, "_record", None)
        is_ours = record is not None and record.fd >= 0 and self.pid == getpid()
        if is_ours and is_active(conn) and capabilities.has_cancel_safe():
            with suppress(psycopg.Error):
                self.cancels.append(conn.pgconn.cancel_conn())


# Steps of the store, with its lock held


def take_idle(store: Store, owner: ref[Any], conn: Any = None) -> Any:
    """Take *conn*, by default the one used last, for *owner*; return None if it is not idle."""
    idle = store.bag.idle
    if conn is None and idle:
        conn = idle[-1]
    if conn not in idle:
        return None
    conn._record.owner = owner  # before it is taken: an exception may come in between
    idle.remove(conn)
    return conn


def evict(store: Store, record: ConnectionRecord, reason: str) -> None:
    """Forget a connection for that reason, and have it closed; replace it if it is needed."""
    store.bag.forget(record)
    store.metrics.discarded[reason] += 1
    if store.listeners.active:
        store.listeners.emit(events.Discarded(store.name, reason))
    store._refill()


def evict_idle(store: Store, reason: str, condition: Condition, most: int | None = None) -> int:
    """Evict idle connections for whose record *condition* holds, the coldest first."""
    chosen = [conn for conn in list(store.bag.idle) if condition(conn._record)][:most]
    for conn in chosen:
        take_idle(store, NOBODY, conn)
        evict(store, conn._record, reason)
    return len(chosen)


def reap(store: Store, record: ConnectionRecord, reason: str) -> None:
    """Take a connection from its holder, and evict it."""
    if record.since:
        use = monotonic() - record.since
        store.metrics.finished += [(record.wait, use, record.endpoint, record.code, record.lasti)]
    record.since, record.is_reaped, record.owner = 0.0, True, NOBODY
    store.bag.cancel_later(record.ref())
    evict(store, record, reason)


def reap_held(store: Store, thread: ThreadInfo, since: float) -> tuple[HolderSnapshot, ...]:
    """Take from *thread* what it checked out after *since* and still holds; describe it."""
    held = [r for r in store.bag.held() if r.thread is thread and r.since >= since]
    described = describe_holders(held, monotonic(), most=None)
    for record in held:
        reap(store, record, "broken")
        store.metrics.count_forgotten(record)
    return described


def reap_ownerless(store: Store) -> tuple[HolderSnapshot, ...]:
    """Evict the connections whose owner is gone; describe those that were held."""
    gone = [r for r in list(store.bag.records) if (r.owner or r.ref)() is None]
    described = describe_holders(gone, monotonic(), most=None)
    for record in gone:
        if record.since:
            store.metrics.count_forgotten(record)
        reap(store, record, "collected")
    return described


def recover(store: Store, owner: ref[Any], step: ref[Any]) -> list[Any]:
    """End what an exception interrupted: remove the waiter of *owner*, evict what it holds.

    Returns the connections that it had in transit, which are now those of *step*.
    """
    for waiter in [each for each in list(store.waiting) if each.owner is owner]:
        store.waiting.discard(waiter)
    store.waiting.set_timekeeper()
    in_transit = []
    for record in [record for record in list(store.bag.records) if record.owner is owner]:
        conn = None if record.since else record.ref()
        if conn is None:  # it is held: its user's code may still have it
            reap(store, record, "broken")
        else:
            record.owner = step
            in_transit.append(conn)
    store._refill()
    return in_transit


def expire(store: Store, condition: Condition = lambda record: True) -> int:
    """Replace connections: the idle ones now, those that are out when they return."""
    chosen = [record for record in list(store.bag.records) if condition(record)]
    for record in chosen:
        record.expires_at = 0.0
    evict_idle(store, "expired", lambda record: not record.expires_at)
    return len(chosen)


def trim(store: Store) -> None:
    """Evict what is beyond max_size: at once if idle, else when it returns, the oldest first."""
    excess = len(store.bag.records) - store.max_size
    if excess > 0:
        excess -= evict_idle(store, "idle", lambda record: True, excess)
        out = [record for record in list(store.bag.records) if record.owner is not None]
        for record in sorted(out, key=attrgetter("expires_at"))[:excess]:
            record.expires_at = 0.0


def mark_held_long(store: Store, before: float) -> list[tuple[ThreadInfo | None, HolderSnapshot]]:
    """Mark and describe what is held since *before*, unless it was marked earlier."""
    late = [r for r in store.bag.held() if r.since <= before and not r.is_reported]
    for record in late:
        record.is_reported = True
    store.metrics.held_long += len(late)
    return [(r.thread, holder) for r in late for holder in describe_holders([r], monotonic())]


def mark_slow(store: Store, before: float) -> list[float]:
    """Mark those who have waited since *before*; return when they began, those not marked yet."""
    unmarked = [w for w in list(store.waiting) if w.is_waiting and not w.is_reported]
    slow = [waiter for waiter in unmarked if waiter.started <= before]
    for waiter in slow:
        waiter.is_reported = True
    return [waiter.started for waiter in slow]
