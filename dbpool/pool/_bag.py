"""Bag and WaitQueue: the connections of a pool, and the callers who wait for one.

They have no lock of their own: the store changes them under its lock.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import takewhile
from operator import attrgetter
from os import getpid
from queue import SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

import psycopg
from psycopg import capabilities

from dbpool import events
from dbpool.holders import NOBODY, ConnectionRecord, ThreadInfo, current
from dbpool.liveness import is_active, is_retransmitting
from dbpool.metrics import HolderSnapshot, describe_holders
from dbpool.pool._psycopg import attach, close

if TYPE_CHECKING:
    from dbpool.pool._store import Store

_MAX_CANCELS: Final = 100  # requests that wait to be sent; beyond them the oldest is dropped
_CROWD: Final = 100  # waiters

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


class Waiter:
    """One caller waiting for a connection; all but the wait itself happens under the lock.

    At its end it has a connection, whose record then names *owner*, or an error.

    Threads whose waits end in one instant keep the interpreter from one another, for seconds. So in
    a crowd the first alone keeps the time, and those who are late wake one another, one by one.
    """

    def __init__(self, owner: ref[Any], started: float, deadline: float) -> None:
        self.owner, self.started, self.deadline, self.until = owner, started, deadline, deadline
        self.thread = current.thread
        self.conn: Any = None
        self.error: BaseException | None = None
        self.is_fresh = False  # whether `conn` needs no check: its server spoke just now
        self.is_over = self.is_rejected = self.is_reported = False  # reported as waiting for long
        self.next: Waiter | None = None  # whom it wakes, if both are late
        self.latch = threading.Lock()
        self.latch.acquire()

    @property
    def is_waiting(self) -> bool:
        """Whether it has neither a connection nor an error yet."""
        return self.conn is None and not self.is_over

    def wait(self) -> bool:
        """Wait until served, rejected or late; return whether it still waits then."""
        while self.latch.acquire(timeout=lock_timeout(self.until - monotonic())):
            if not self.is_waiting:  # else it keeps the time from now on
                break
        return self.is_waiting

    def wake(self) -> None:
        """End its wait, or have it keep the time."""
        if self.latch.locked():
            self.latch.release()

    def reject(self, error: BaseException) -> bool:
        """Have *error* raised if it still waits; return whether it does."""
        if not self.is_waiting:
            return False
        self.error, self.is_over, self.is_rejected = error, True, True
        self.wake()
        return True

    def take_error(self) -> BaseException:
        """Return its error, once.

        An error kept here would keep its traceback, that the frames of all callers, and those this
        waiter: they and what they hold would stay until the cyclic collector comes.
        """
        error, self.error = self.error, None
        assert error is not None
        return error


class WaitQueue(deque[Waiter]):
    """The waiters in the order in which they came."""

    latest = 0.0  # the latest deadline

    def join(self, waiter: Waiter) -> None:
        """Enqueue a waiter; in a crowd it leaves the time to those before it, unless it is first."""
        self.latest = max(self.latest if self else 0.0, waiter.deadline)
        if len(self) >= _CROWD and waiter.deadline > self.latest - 0.01:
            waiter.until += 1.0
        self.append(waiter)

    def lead(self) -> None:
        """Have the first keep the time; it waits a little longer, for those behind it."""
        if self and self[0].until > self[0].deadline + 0.1:
            self[0].until = self[0].deadline + 0.01
            self[0].wake()

    def serve(self, conn: Any, *, is_fresh: bool) -> bool:
        """Give a connection to the first that still waits; return whether anybody does."""
        record: ConnectionRecord = conn._record
        while self:
            waiter = self[0]
            if waiter.is_waiting:
                record.since, record.owner = 0.0, waiter.owner  # without a call in between
                waiter.conn, waiter.is_fresh = conn, is_fresh
                del self[0]
                waiter.wake()
                self.lead()
                return True
            del self[0]  # whoever ended its wait was interrupted
        return False

    def reject_all(self, make_error: Callable[[], Exception]) -> int:
        """Reject all who wait, each with an error of its own; return how many."""
        number = 0
        while self:  # what a garbage collection ends in here may take part
            error, waiter = make_error(), self[0]
            del self[0]
            number += waiter.reject(error)
        return number

    def expired(self, waiter: Waiter, now: float) -> list[Waiter]:
        """Return *waiter* and, from the front, all whose time is over too; none if it was served."""
        late = takewhile(lambda each: each.deadline <= now, list(self) if waiter.is_waiting else [])
        return [each for each in dict.fromkeys([waiter, *late]) if each.is_waiting]

    def discard(self, waiter: Waiter) -> None:
        """Remove *waiter* if it is there."""
        if waiter in self:
            self.remove(waiter)


def lock_timeout(seconds: float) -> float:
    """Return a timeout that a lock takes: -1 would wait for ever, too large a one would overflow."""
    return min(max(seconds, 0.0), threading.TIMEOUT_MAX)


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
    store.refill()


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
    if (conn := record.ref()) is not None:
        store.bag.cancel_later(conn)
    evict(store, record, reason)


def reap_held(store: Store, thread: ThreadInfo, since: float) -> tuple[HolderSnapshot, ...]:
    """Take from *thread* what it checked out after *since* and still holds; describe it."""
    held = [r for r in store.bag.held() if r.thread is thread and r.since >= since]
    described = describe_holders(held, monotonic())
    for record in held:
        reap(store, record, "broken")
        store.metrics.count_forgotten(record)
    return described


def reap_ownerless(store: Store) -> tuple[HolderSnapshot, ...]:
    """Evict the connections whose owner is gone; describe those that were held."""
    owners = [(record, record.owner or record.ref) for record in list(store.bag.records)]
    gone = [record for record, owner in owners if owner() is None]
    described = describe_holders(gone, monotonic())
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
    store.waiting.lead()
    in_transit = []
    for record in [record for record in list(store.bag.records) if record.owner is owner]:
        conn = None if record.since else record.ref()
        if conn is None:  # it is held: its user's code may still have it
            reap(store, record, "broken")
        else:
            record.owner = step
            in_transit.append(conn)
    store.refill()
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
    waiting = [w for w in list(store.waiting) if w.is_waiting and not w.is_reported]
    slow = [waiter for waiter in waiting if waiter.started <= before]
    for waiter in slow:
        waiter.is_reported = True
    return [waiter.started for waiter in slow]
