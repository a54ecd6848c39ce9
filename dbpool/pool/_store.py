"""Store: what the pool's lock protects, and every step that is taken under it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import partial, wraps
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar, cast
from weakref import ref

from dbpool.breaker import Breaker
from dbpool.events import Emitter
from dbpool.holders import ConnectionRecord, Holder, ThreadInfo
from dbpool.metrics import Metrics
from dbpool.pool import _rules
from dbpool.pool._bag import Bag, Condition, Waiter, WaitQueue
from dbpool.pool._notices import Notices

if TYPE_CHECKING:
    from dbpool.pool._supply import Job, Workers

F = TypeVar("F", bound=Callable[..., Any])


def locked(method: F) -> F:
    """Have a method of the store hold its lock."""

    @wraps(method)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return method(self, *args, **kwargs)

    return cast("F", step)


class Store:
    """The pool's shared state: connections, waiters, connects under way, failures, counters.

    Each method is one short step under `lock`, which nobody else takes but two hot lines of
    `_pool.py`. The parts inside it, the bag, the queue, the breaker and the metrics, have no lock.
    Connections to close, notices to send and cancel requests are put on queues first and dealt
    with outside. A signal handler may raise in a caller's thread after any call: `heal` completes
    what that interrupts, and evicts a connection in transit once its owner is gone.
    """

    def __init__(
        self,
        name: str,
        sizes: tuple[int, int],
        grace: float,
        listeners: Emitter,
        workers: Workers,
    ) -> None:
        self.lock = threading.RLock()  # a garbage collection inside may come back in
        self.name = name
        self.min_size, self.max_size = sizes
        self.workers = workers
        self.is_open = self.was_opened = False
        self.metrics = Metrics()
        self.bag = Bag(name, self.metrics, listeners)
        self.waiting = WaitQueue()
        self.breaker = Breaker(grace)
        self.notices: deque[Callable[[Notices], None]] = deque()
        self.collected: deque[Any] = deque()  # says that a connection was; filled without any lock
        self.queued = 0
        self.timed_out_wait_seconds = 0.0
        self.popped: dict[str, int] = {}  # what `pop_stats` has returned

    # What there is

    @property
    def size(self) -> int:
        return len(self.bag.records) + len(self.breaker.attempts)

    @property
    def state(self) -> str:
        """`"starting"` until first connected, `"up"`, `"down"` in an outage, or `"stopped"`."""
        if self.was_opened and not self.is_open:
            return "stopped"
        if self.breaker.is_open:
            return "down"
        return "up" if self.breaker.last_alive_at else "starting"

    snapshot = locked(_rules.snapshot)
    parent_stats = locked(_rules.parent_stats)
    unavailable = locked(_rules.unavailable)

    @locked
    def count_retry(self) -> None:
        """Count a transaction that is run again."""
        self.metrics.retries += 1

    # Opening and closing

    @locked
    def open(self) -> bool:
        """Open, unless it is open or was closed; return whether that was now."""
        is_new = not self.was_opened
        self.is_open, self.was_opened = self.is_open or is_new, True
        return is_new

    @locked
    def revert_open(self) -> None:
        """Undo `open`: there were no threads to be had."""
        self.is_open = self.was_opened = False

    @locked
    def close(self) -> bool:
        """Close: reject the waiters, give up what is idle. Return whether it was open.

        Calling it again completes what was interrupted.
        """
        was_open, self.is_open, self.was_opened = self.is_open, False, True
        while self.bag.idle:
            self.bag.forget(self.bag.idle[-1]._record)
            self.bag.idle.pop()
        self.metrics.rejected += self.waiting.reject_all(partial(_rules.closed, self))
        return was_open

    # Lending

    @locked
    def take_idle(self, owner: ref[Any], conn: Any = None) -> Any:
        """Take *conn*, by default the one used last; return None if it is not idle."""
        return self.bag.take(owner, conn)

    @locked
    def join(self, waiter: Waiter, max_waiting: int, *, close_returns: bool) -> None:
        """Enqueue the caller; if waiting is not allowed, the waiter is rejected at once."""
        if self.collected or (close_returns and self.size >= self.max_size):
            self._reclaim(close_returns=close_returns)
        if not self.is_open:
            raise _rules.closed(self)
        if self.breaker.is_failing:
            _rules.close_if_alive(self)
            _rules.trip_if_due(self)
        if self.breaker.is_open:
            self.metrics.rejected += waiter.reject(self.unavailable())
        elif max_waiting and len(self.waiting) >= max_waiting:
            self.metrics.rejected += waiter.reject(_rules.too_many(self, max_waiting))
        else:
            self.queued += 1
            self.waiting.append(waiter)
            # One may have come back meanwhile.
            if self.bag.idle and not waiter.is_late(self.breaker.clock()):
                self.hand_over_or_store(self.bag.idle.pop(), is_fresh=False)
            self.refill()

    time_out = locked(_rules.time_out)

    # Taking back

    @locked
    def end_use(self, record: ConnectionRecord, owner: ref[Any]) -> float | None:
        """End a holder's use; from now on *owner* has it. Return the seconds, None if not held."""
        if not record.since:
            return None
        use = monotonic() - record.since
        self.metrics.finished += [(record.wait, use)]
        self.metrics.returned_late += record.is_reported
        record.since, record.owner, record.is_reported = 0.0, owner, False
        return use

    @locked
    def give_to_worker(self, record: ConnectionRecord, job: Job) -> bool:
        """Have a worker do *job*, which has the connection; false in a closed pool."""
        if self.is_open:  # workers that are told to stop do it first
            record.owner = ref(job)
            self.workers.run(job)
        return self.is_open

    @locked
    def add(self, conn: Any, *, is_fresh: bool) -> None:
        """Lend a healthy connection to the first waiter, else make it idle.

        *is_fresh* says that its server spoke just now: the waiter need not check it.
        """
        if is_fresh:
            self.breaker.last_alive_at = self.breaker.clock()
        self.hand_over_or_store(conn, is_fresh=is_fresh)

    def hand_over_or_store(self, conn: Any, *, is_fresh: bool) -> None:
        """As `add`, with the lock held. In a closed pool the connection is to be closed."""
        if not self.is_open:
            self.bag.forget(conn._record)
        elif not self.waiting.serve(conn, is_fresh=is_fresh):
            self.bag.store(conn)

    @locked
    def recover(self, owner: ref[Any], step: ref[Any]) -> list[Any]:
        """End what an exception interrupted: remove the waiter of *owner*, evict what it holds.

        Returns the connections that it had in transit, which are now those of *step*.
        """
        self.waiting.cancel(owner)
        in_transit = self.bag.recover(owner, step)
        self.refill()
        return in_transit

    # Giving up

    @locked
    def evict(self, conn: Any, reason: str) -> None:
        """Evict a connection that is in transit; replace it if it is needed."""
        self.bag.evict(conn._record, reason)
        self.refill()

    @locked
    def evict_idle(self, reason: str, condition: Condition, most: int | None = None) -> int:
        """Evict idle connections for whose record *condition* holds, the coldest first."""
        number = self.bag.evict_idle(reason, condition, most)
        self.refill()
        return number

    @locked
    def reap_held(self, thread: ThreadInfo, since: float) -> tuple[Holder, ...]:
        """Take from *thread* what it checked out after *since* and still holds; describe it."""
        described = self.bag.reap_held(thread, since)
        self.refill()
        return described

    def _reclaim(self, *, close_returns: bool) -> None:
        """Evict the connections whose owner is gone.

        With *close_returns* those too that their user closed: psycopg returns none whose server
        went away.
        """
        self.collected.clear()
        if forgotten := self.bag.reap_ownerless():
            self.notices.append(partial(Notices.forgotten, holders=forgotten))
        if close_returns:
            self.bag.reap_closed()
        if self.bag.to_close or self.notices:
            self.flush_later()
        self.refill()

    def flush_later(self) -> None:
        """Have a worker close and log what may not be done under the lock or by a caller."""
        self.workers.run(lambda pool: pool._supply.flush())

    # Connecting

    refill = locked(_rules.refill)
    may_begin = locked(_rules.may_begin)
    begin = locked(_rules.begin)
    connected = locked(_rules.connected)
    failed = locked(_rules.failed)
    overdue = locked(_rules.overdue)

    # Maintaining

    @locked
    def heal(self, *, close_returns: bool, has_idle_workers: bool) -> None:
        """Complete what an exception kept a caller from. Does nothing that is not due."""
        if not self.is_open:
            self.close()
        self._reclaim(close_returns=close_returns)
        if self.breaker.start_interval():
            _rules.close_if_alive(self)
        _rules.trip_if_due(self)
        self.bag.trim(self.max_size)
        if has_idle_workers:
            for attempt in self.breaker.interrupted():
                _rules.enqueue(self, attempt)

    @locked
    def mark_slow(self, before: float) -> list[float]:
        """Mark the callers who wait since *before*; return when those began that are new."""
        return self.waiting.mark_slow(before)

    @locked
    def mark_held_long(self, before: float) -> list[tuple[ThreadInfo | None, Holder]]:
        """Mark and describe what is held since *before*, unless it was marked earlier."""
        return self.bag.mark_held_long(before)

    @locked
    def expire(self, condition: Condition = lambda record: True) -> int:
        """Replace connections: the idle ones now, those that are out when they return."""
        number = self.bag.expire(condition)
        self.evict_idle("expired", lambda record: not record.expires_at)
        return number

    @locked
    def resize(self, min_size: int, max_size: int) -> None:
        """Change the sizes; what is too many goes at once if idle, else when it returns."""
        self.min_size, self.max_size = min_size, max_size
        self.bag.trim(max_size)
        self.refill()
