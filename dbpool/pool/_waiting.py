"""WaitQueue: the callers who wait for a connection, first come, first served.

It has no lock of its own: the store changes it under its lock.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from itertools import takewhile
from time import monotonic
from typing import Any
from weakref import ref

from dbpool.holders import ConnectionRecord, current


class Waiter:
    """One caller waiting for a connection; all but the wait itself happens under the lock.

    At its end it has a connection, whose record then names *owner*, or an error.
    """

    __slots__ = ("conn", "deadline", "error", "is_fresh", "is_over", "is_rejected", "is_reported",
                 "latch", "owner", "started", "thread")  # fmt: skip

    def __init__(self, owner: ref[Any], started: float, deadline: float) -> None:
        self.owner, self.started, self.deadline = owner, started, deadline
        self.thread = current.thread
        self.conn: Any = None
        self.error: BaseException | None = None
        self.is_fresh = False  # whether `conn` needs no check: its server spoke just now
        self.is_over = self.is_rejected = False
        self.is_reported = False  # as waiting for long
        self.latch = threading.Lock()
        self.latch.acquire()

    def is_late(self, now: float) -> bool:
        """Whether its time is over, if it had any: one ping that took all the time is enough."""
        return self.started < self.deadline <= now

    @property
    def is_waiting(self) -> bool:
        """Whether it has neither a connection nor an error yet."""
        return self.conn is None and not self.is_over

    def wait(self) -> bool:
        """Wait until served, rejected or late; return whether it still waits then."""
        self.latch.acquire(timeout=lock_timeout(self.deadline - monotonic()))
        return self.is_waiting

    def fail(self, error: BaseException) -> None:
        """Have *error* raised where it waits."""
        self.error, self.is_over = error, True
        self.latch.release()

    def reject(self, error: BaseException) -> bool:
        """Have *error* raised if it still waits; return whether it does."""
        if not self.is_waiting:
            return False
        self.is_rejected = True
        self.fail(error)
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

    def serve(self, conn: Any, *, is_fresh: bool) -> bool:
        """Give a connection to the first that still waits; return whether anybody does."""
        record: ConnectionRecord = conn._record
        while self:
            waiter = self[0]
            if waiter.is_waiting:
                record.since, record.owner = 0.0, waiter.owner  # without a call in between
                waiter.conn, waiter.is_fresh = conn, is_fresh
                del self[0]
                waiter.latch.release()
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
        """Return *waiter* and, from the front, all whose time is over too, if they still wait."""
        late = takewhile(lambda each: each.deadline <= now, list(self))
        return [each for each in dict.fromkeys([waiter, *late]) if each.is_waiting]

    def mark_slow(self, before: float) -> list[float]:
        """Mark those who have waited since *before*; return when they began, those not marked yet."""
        slow = [w for w in self if w.started <= before and w.is_waiting and not w.is_reported]
        for waiter in slow:
            waiter.is_reported = True
        return [waiter.started for waiter in slow]

    def cancel(self, owner: ref[Any]) -> None:
        """Remove the waiter of *owner*."""
        for waiter in [each for each in list(self) if each.owner is owner]:
            self.discard(waiter)

    def discard(self, waiter: Waiter) -> None:
        """Remove *waiter* if it is there."""
        if waiter in self:
            self.remove(waiter)


def lock_timeout(seconds: float) -> float:
    """Return a timeout that a lock takes: -1 would wait for ever, too large a one would overflow."""
    return min(max(seconds, 0.0), threading.TIMEOUT_MAX)
