"""Store: what the pool's lock protects, and every step that is taken under it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import partial, wraps
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar, cast
from weakref import ref

from dbpool.breaker import Attempt, Breaker
from dbpool.events import Emitter
from dbpool.holders import ConnectionRecord
from dbpool.metrics import Metrics
from dbpool.pool import _bag, _rules
from dbpool.pool._bag import Bag, Waiter, WaitQueue
from dbpool.pool._notices import Notices

if TYPE_CHECKING:
    from dbpool.pool._supply import Job, Jobs

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
        self, name: str, sizes: tuple[int, int], grace: float, listeners: Emitter, jobs: Jobs
    ) -> None:
        self.lock = threading.RLock()  # a garbage collection inside may come back in
        self.name = name
        self.min_size, self.max_size = sizes
        self.jobs = jobs  # for the workers
        self.is_open = self.was_opened = False
        self.metrics = Metrics()
        self.listeners = listeners
        self.bag = Bag()
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

    take_idle = locked(_bag.take_idle)

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
            self.jobs.put(job)
        return self.is_open

    def hand_over_or_store(self, conn: Any, *, is_fresh: bool) -> None:
        """Lend a healthy connection to the first waiter, else make it idle; the lock is held.

        *is_fresh* says that its server spoke just now: the waiter need not check it. In a closed
        pool the connection is to be closed.
        """
        if is_fresh:
            self.breaker.last_alive_at = self.breaker.clock()
        if not self.is_open:
            self.bag.forget(conn._record)
        elif not self.waiting.serve(conn, is_fresh=is_fresh):
            self.bag.store(conn)

    add = locked(hand_over_or_store)
    recover = locked(_bag.recover)

    # Giving up

    evict = locked(_bag.evict)
    evict_idle = locked(_bag.evict_idle)
    reap_held = locked(_bag.reap_held)
    expire = locked(_bag.expire)

    def _reclaim(self, *, close_returns: bool) -> None:
        """Evict the connections whose owner is gone.

        With *close_returns* those too that their user closed: psycopg returns none whose server
        went away.
        """
        self.collected.clear()
        if forgotten := _bag.reap_ownerless(self):
            self.notices.append(partial(Notices.forgotten, holders=forgotten))
        if close_returns:
            for record in [record for record in self.bag.held() if not record.is_open]:
                _bag.reap(self, record, "broken")
        if self.bag.to_close or self.notices:
            self.flush_later()
        self.refill()

    def flush_later(self) -> None:
        """Have a worker close and log what may not be done under the lock or by a caller."""
        self.jobs.put(lambda pool: pool._supply.flush())

    # Connecting

    @locked
    def refill(self) -> None:
        """Begin the connects that are missing: up to min_size, then one at a time for waiters."""
        breaker = self.breaker
        if not self.is_open or breaker.retry is not None or breaker.is_open:
            return
        missing = max(0, self.min_size - self.size)
        if self.waiting and not breaker.attempts and self.size < self.max_size:
            missing = max(1, missing)
        for _ in range(missing):
            self.enqueue(breaker.add())

    @locked
    def enqueue(self, attempt: Attempt) -> None:
        """Have a worker make that attempt; twice does no harm."""
        self.jobs.put(lambda pool: pool._supply.connect(pool, attempt))

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
        _bag.trim(self)
        if has_idle_workers:
            for attempt in self.breaker.interrupted():
                self.enqueue(attempt)

    mark_slow = locked(_bag.mark_slow)
    mark_held_long = locked(_bag.mark_held_long)

    @locked
    def resize(self, min_size: int, max_size: int) -> None:
        """Change the sizes; what is too many goes at once if idle, else when it returns."""
        self.min_size, self.max_size = min_size, max_size
        _bag.trim(self)
        self.refill()
