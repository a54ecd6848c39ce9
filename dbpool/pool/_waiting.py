"""WaitQueue: the callers who wait for a connection, in the order in which they came.

It has no lock of its own: the store changes it under its lock. The wait itself is outside.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from itertools import takewhile
from time import monotonic
from typing import Any, Final
from weakref import ref

from dbpool._threads import clamp_timeout
from dbpool.holders import ConnectionRecord, current

_CROWD: Final = 100  # waiters from which on the first alone keeps the time


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
        self.error: Any = None  # to be raised
        self.is_verified = False  # whether `conn` needs no check: its server spoke just now
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
        while self.latch.acquire(timeout=clamp_timeout(self.until - monotonic())):
            if not self.is_waiting:  # else it keeps the time from now on
                return False
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


class WaitQueue(deque[Waiter]):
    """The waiters in the order in which they came."""

    latest = 0.0  # the latest deadline

    def join(self, waiter: Waiter) -> None:
        """Enqueue a waiter; in a crowd it leaves the time to those before it, unless it is first."""
        self.latest = max(self.latest if self else 0.0, waiter.deadline)
        if len(self) >= _CROWD and waiter.deadline > self.latest - 0.01:
            waiter.until += 1.0
        self.append(waiter)

    def set_timekeeper(self) -> None:
        """Have the first keep the time; it waits a little longer, for those behind it."""
        if self and self[0].until > self[0].deadline + 0.1:
            self[0].until = self[0].deadline + 0.01
            self[0].wake()

    def serve(self, conn: Any, *, is_verified: bool) -> bool:
        """Give a connection to the first that still waits; return whether anybody does."""
        record: ConnectionRecord = conn._record
        while self:
            waiter = self[0]
            if waiter.is_waiting:
                record.since, record.owner = 0.0, waiter.owner  # without a call in between
                waiter.conn, waiter.is_verified = conn, is_verified
                del self[0]
                waiter.wake()
                self.set_timekeeper()
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
