"""Store: what the pool's lock protects, and every step that is taken under it."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from functools import partial, wraps
from time import monotonic
from typing import Any, TypeVar, cast
from weakref import ref

from dbpool import errors
from dbpool.breaker import Attempt, Breaker
from dbpool.events import Emitter
from dbpool.holders import ConnectionRecord
from dbpool.liveness import is_active
from dbpool.metrics import SIZES, Metrics, PoolState, Snapshot, describe_holders
from dbpool.pool import _bag
from dbpool.pool._bag import Bag, Job, Jobs
from dbpool.pool._notices import Notices
from dbpool.pool._waiting import Waiter, WaitQueue

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
        self.name, (self.min_size, self.max_size) = name, sizes
        self.jobs = jobs  # for the workers
        self.is_open = self.was_opened = False
        self.metrics, self.listeners = Metrics(), listeners
        self.bag, self.waiting, self.breaker = Bag(), WaitQueue(), Breaker(grace)
        self.notices: deque[Callable[[Notices], None]] = deque()
        self.collected: deque[Any] = deque()  # references that died; filled without the lock

    @property
    def size(self) -> int:
        return len(self.bag.records) + len(self.breaker.attempts)

    @property
    def state(self) -> PoolState:
        """Starting until first connected, up, down in an outage, or stopped."""
        if self.was_opened and not self.is_open:
            return PoolState.STOPPED
        if self.breaker.is_open:
            return PoolState.DOWN
        return PoolState.UP if self.breaker.last_alive_at else PoolState.STARTING

    @locked
    def snapshot(self) -> Snapshot:
        """Return the state, the sizes, the holders, and all counters since opening."""
        bag, held, counts = self.bag, self.bag.held(), (0, 0, 0)
        if self.is_open:  # all sizes are 0 after close, whatever is still out
            counts = bag.out, len(bag.idle), len(self.breaker.attempts)
        sizes = sum(counts), *counts, len(self.waiting), self.min_size, self.max_size
        return self.metrics.snapshot(
            [record.wait for record in held],
            state=self.state,
            breaker=self.breaker.snapshot(),
            holders=describe_holders(held, monotonic(), {w.thread for w in list(self.waiting)}),
            **dict(zip(SIZES, sizes, strict=True)),
        )

    @locked
    def parent_stats(self, *, pop: bool = False) -> dict[str, int]:
        """Return psycopg_pool's statistics; counts and sums are those since the last *pop*."""
        pending = [record.wait for record in self.bag.held()]
        sizes = self.min_size, self.max_size, self.size, len(self.bag.idle), len(self.waiting)
        return self.metrics.parent_stats(pending, sizes, pop=pop)

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
        self._refill()
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
        self.metrics.rejected += self.waiting.reject_all(partial(errors.closed_error, self.name))
        return was_open

    # Lending

    take_idle = locked(_bag.take_idle)

    @locked
    def join(self, waiter: Waiter, max_waiting: int, *, close_returns: bool) -> None:
        """Enqueue the caller; if waiting is not allowed, the waiter is rejected at once."""
        if self.collected or (close_returns and self.size >= self.max_size):
            self._reclaim(close_returns=close_returns)
        if not self.is_open:
            raise errors.closed_error(self.name, was_opened=self.was_opened)
        breaker = self.breaker
        error: Exception | None = None
        if breaker.is_failing:
            self._close_if_alive()
            self._trip_if_due()
            if breaker.is_open:
                error = breaker.unavailable_error(self.name, self.snapshot())
        if not error and max_waiting and len(self.waiting) >= max_waiting:
            error = errors.too_many_error(self.name, self.snapshot(), max_waiting)
        if error is not None:
            self.metrics.rejected += waiter.reject(error)
            return
        self.metrics.queued += 1
        self.waiting.join(waiter)
        # One may have come back; it is not for one whose time, if it had any, went by in a ping.
        if self.bag.idle and not waiter.started < waiter.deadline <= breaker.clock():
            self.hand_over_or_store(self.bag.idle.pop(), is_verified=False)
        self._refill()

    @locked
    def time_out(self, waiter: Waiter, suspicion: str = "") -> tuple[int, errors.PoolError | None]:
        """Fail a waiter whose time is over, and all at the front of the queue whose time is over too.

        One snapshot serves all. A waiter that was served at the last moment is left alone. Returns
        how many failed, and the error of one. *suspicion* says what keeps the holders, if known.
        """
        breaker, now, moment, error = self.breaker, self.snapshot(), self.breaker.clock(), None
        if breaker.last_alive_at < waiter.started:
            silence, is_silent = self.bag.suspicion()
            suspicion = suspicion or silence
            if is_silent and breaker.silent_since < breaker.last_alive_at:
                breaker.silent_since = waiter.started
        held_by = Counter(record.thread for record in self.bag.held())
        is_asked = any(is_active(record.ref()) for record in list(self.bag.records))
        late = self.waiting.expired(waiter, moment)
        for each, following in zip(late, [*late[1:], None], strict=False):
            held, seconds = held_by[each.thread], moment - each.started
            error = breaker.timeout_error(self.name, now, seconds if is_asked else 0.0)
            error = error or errors.exhausted_error(self.name, now, seconds, held, suspicion)
            self.waiting.discard(each)
            self.metrics.timeouts += 1
            self.metrics.nested += held > 0
            self.metrics.timed_out_seconds += seconds
            each.error, each.is_over, each.next = error, True, following
        self.waiting.set_timekeeper()
        return len(late), error

    # Taking back

    @locked
    def end_use(self, record: ConnectionRecord, owner: ref[Any]) -> float | None:
        """End a holder's use; from now on *owner* has it. Return the seconds, None if not held."""
        if not record.since:
            return None
        use = monotonic() - record.since
        self.metrics.finished += [(record.wait, use, record.endpoint, record.code, record.lasti)]
        self.metrics.returned_late += record.is_reported
        record.since, record.owner, record.is_reported = 0.0, owner, False
        return use

    @locked
    def give_to_worker(self, record: ConnectionRecord, job: Job) -> bool:
        """Have a worker do *job*, which has the connection; false in a closed pool."""
        if self.is_open:  # workers that end later do it first
            record.owner = ref(job)
            self.jobs.put(job)
        return self.is_open

    def hand_over_or_store(self, conn: Any, *, is_verified: bool) -> None:
        """Lend a healthy connection to the first waiter, else make it idle; the lock is held.

        *is_verified* says that its server spoke just now: the waiter need not check it. In a closed
        pool the connection is to be closed.
        """
        if is_verified:
            self.breaker.last_alive_at = self.breaker.clock()
        if not self.is_open:
            self.bag.forget(conn._record)
        elif not self.waiting.serve(conn, is_verified=is_verified):
            self.bag.store(conn)

    add = locked(hand_over_or_store)
    recover = locked(_bag.recover)
    evict = locked(_bag.evict)
    evict_idle = locked(_bag.evict_idle)
    reap_held = locked(_bag.reap_held)
    expire = locked(_bag.expire)
    mark_slow = locked(_bag.mark_slow)
    mark_held_long = locked(_bag.mark_held_long)

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
        self._refill()

    def flush_later(self) -> None:
        """Have a worker close and log what may not be done under the lock or by a caller."""
        self.jobs.put(lambda pool: pool._maintenance.flush(pool))

    # Connecting

    def _refill(self) -> None:
        """Begin the connects up to min_size, and one at a time for waiters; the lock is held."""
        breaker, size = self.breaker, self.size
        if size >= self.max_size or not self.is_open or breaker.retry or breaker.is_open:
            return
        missing = max(0, self.min_size - size)
        if self._is_short() and not breaker.attempts:
            missing = max(1, missing)
        for _ in range(missing):
            self.enqueue(breaker.reserve())

    def _is_short(self) -> bool:
        """Whether somebody waits, or the last connection expires soon: its successor comes first."""
        last = self.bag.records if len(self.bag.records) == 1 <= self.min_size else ()
        return bool(self.waiting) or any(r.expires_soon(self.breaker.clock()) for r in last)

    @locked
    def enqueue(self, attempt: Attempt) -> None:
        """Have a worker make that attempt; twice does no harm."""
        self.jobs.put(lambda pool: pool._maintenance.connect(pool, attempt))

    @locked
    def admit(self, attempt: Attempt) -> bool:
        """Let a worker make that attempt; if nobody needs it, release its place and return false."""
        breaker = self.breaker
        if not self.is_open or attempt.started or attempt not in breaker.attempts:
            return False  # another worker was quicker
        # While nothing is there at all, the next caller is to learn at once whether it works.
        is_missed = not self.bag.records or self.size <= self.min_size or self._is_short()
        is_excess = self.size > self.max_size
        return not breaker.release_if_unneeded(attempt, is_missed=is_missed, is_excess=is_excess)

    @locked
    def connected(self, conn: Any, attempt: Attempt) -> float:
        """Add a new connection; return how long it took."""
        seconds = self.breaker.clock() - attempt.started
        self.bag.records.add(conn._record)
        if (outage := self.breaker.succeeded(attempt)) is not None:
            self.notices.append(partial(Notices.back, seconds=outage))
        self.metrics.connects += 1
        self.metrics.connect.add(seconds)
        if self.size > self.max_size:  # it was made smaller meanwhile
            conn._record.expires_at = 0.0
        self.hand_over_or_store(conn, is_verified=True)
        self._refill()
        return seconds

    @locked
    def failed(self, attempt: Attempt, error: BaseException, kind: str) -> bool:
        """Record a failed attempt; return whether it is to be tried again."""
        self.metrics.connect_failures += 1
        if not self.is_open:
            return False
        is_retry = self.breaker.failed(attempt, error, kind)
        self._trip_if_due()
        return is_retry

    @locked
    def overdue(self, attempt: Attempt, started: float) -> float | None:
        """Count an attempt without an answer as failing; return when to look again, in seconds."""
        breaker = self.breaker
        is_over = attempt not in breaker.attempts or attempt.started != started
        if is_over or not self.is_open:
            return None
        breaker.overdue(attempt, errors.no_answer_error(breaker.clock() - started))
        self._trip_if_due()
        return max(started, breaker.last_alive_at) + breaker.answer_timeout - breaker.clock()

    def _close_if_alive(self) -> None:
        """Close the breaker if a connection came back healthy since it opened."""
        if (outage := self.breaker.close_if_alive()) is not None:
            self.notices.append(partial(Notices.back, seconds=outage))
            self.flush_later()

    def _trip_if_due(self) -> None:
        """Open the breaker if it is time to; while it is open, nobody waits."""
        breaker, bag = self.breaker, self.bag
        if breaker.trip_if_due(idle=len(bag.idle), out=bag.out):
            error, kind = breaker.last_error or "", breaker.kind
            self.notices.append(partial(Notices.down, error=error, kind=kind))
            self.metrics.circuit_opened += 1
            self.flush_later()
        if breaker.is_open and self.waiting:  # one snapshot for all
            reject = partial(breaker.unavailable_error, self.name, self.snapshot())
            self.metrics.rejected += self.waiting.reject_all(reject)

    @locked
    def heal(self, *, close_returns: bool, has_idle_workers: bool) -> None:
        """Complete what an exception kept a caller from. Does nothing that is not due."""
        if not self.is_open:
            self.close()
        self._reclaim(close_returns=close_returns)
        self._close_if_alive()
        self._trip_if_due()
        _bag.trim(self)
        if has_idle_workers:
            for attempt in self.breaker.interrupted():
                self.enqueue(attempt)

    @locked
    def resize(self, min_size: int, max_size: int) -> None:
        """Change the sizes; what is too many goes at once if idle, else when it returns."""
        self.min_size, self.max_size = min_size, max_size
        _bag.trim(self)
        self._refill()
