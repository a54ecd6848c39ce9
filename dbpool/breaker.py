"""The circuit breaker over a database's availability.

It guards waiting, never serving: whoever finds an idle connection is served whatever it
says. It has no threads and makes no attempts; the pool reports attempts and asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from dbpool.errors import SATURATED, describe, is_permanent

CLOSED: Final = "closed"
OPEN: Final = "open"
HALF_OPEN: Final = "half-open"

# Seconds that an attempt may take, however short the grace, before it counts as failing: over
# TLS to another region a healthy server needs a third of one.
_UNANSWERED: Final = 0.5


class Breaker:
    """Opens when connects have kept failing for *grace* seconds without a sign of life.

    A sign of life is a connection that came back healthy after the first failure. While there
    are idle connections nobody waits, so there is nothing to open for. A failure that waiting
    will hardly cure needs no grace, unless connections are out that may yet come back; and a
    full server is not down while connections are out. The caller serialises all calls but
    `reset` and the reading of attributes.
    """

    def __init__(self, grace: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.grace = grace
        self.patience = max(grace, _UNANSWERED)  # with an attempt that has no answer yet
        self.error: BaseException | None = None  # of the last failed attempt, detached
        self.kind = "unknown"
        self.retry_at = 0.0  # on `clock`: when the pool tries next
        self._clock = clock
        self._failing_since: float | None = None
        self._opened_at: float | None = None
        self._attempting = False

    def __repr__(self) -> str:
        return f"<Breaker {self.state} kind={self.kind!r} failing_for={self.failing_for:.1f}>"

    @property
    def state(self) -> str:
        """`"closed"`, `"open"`, or `"half-open"` while an attempt is made that may close it."""
        if self._opened_at is None:
            return CLOSED
        return HALF_OPEN if self._attempting else OPEN

    @property
    def is_open(self) -> bool:
        """Whether those who would wait are refused; half-open counts as open."""
        return self._opened_at is not None

    @property
    def is_failing(self) -> bool:
        """Whether the last attempt to connect failed, open or not."""
        return self._failing_since is not None

    @property
    def failing_for(self) -> float:
        """Seconds since the first failure, 0 when the last attempt succeeded."""
        return 0.0 if self._failing_since is None else self._clock() - self._failing_since

    @property
    def since(self) -> float | None:
        """Unix time of the first failure, None while connects succeed."""
        return None if self._failing_since is None else time.time() - self.failing_for

    @property
    def retry_after(self) -> float | None:
        """Seconds until the next attempt, None while connects succeed."""
        return max(0.0, self.retry_at - self._clock()) if self.is_failing else None

    @property
    def last_error(self) -> str | None:
        """The text of the last failure on one line, None while connects succeed."""
        return None if self.error is None else describe(self.error)

    def attempt(self) -> None:
        """An attempt to connect begins."""
        self._attempting = True

    def succeeded(self) -> float | None:
        """An attempt succeeded: close. Return how long the outage was, if it was open."""
        seconds = self.failing_for if self.is_open else None
        self.reset()
        return seconds

    def failed(self, started: float, error: BaseException, kind: str, *, last_seen: float) -> None:
        """The attempt begun at *started* failed; for *last_seen* see `judge`."""
        self._attempting = False
        self.error, self.kind = error, kind
        self._fails_since(started, last_seen)

    def overdue(
        self, started: float, error: BaseException, kind: str = "timeout", *, last_seen: float
    ) -> None:
        """The attempt begun at *started* is still without an answer: count that as failing.

        Not yet if a connection came back healthy less than the patience ago: say it again.
        """
        if self._clock() - max(started, last_seen) >= self.patience:
            if not (self.is_failing and kind == SATURATED):  # why it fails is known
                self.error, self.kind = error, kind
            self._fails_since(started, last_seen)

    def judge(self, *, last_seen: float, idle: int, out: int) -> bool:
        """Open if it is time to; return whether that was now.

        *last_seen* is when a connection last came back healthy, *idle* how many are there to be
        handed out, *out* how many are out.
        """
        if self._failing_since is None or self._opened_at is not None or idle:
            return False
        self._failing_since = max(self._failing_since, last_seen)
        if out and self.kind == SATURATED:
            return False
        if self.failing_for < (0.0 if is_permanent(self.kind) and not out else self.grace):
            return False
        self._opened_at = self._clock()
        return True

    def seen_alive(self, last_seen: float) -> float | None:
        """Close if a connection came back healthy after it opened; return as `succeeded`.

        What failed is kept: connecting may still do so.
        """
        if self._opened_at is None or last_seen <= self._opened_at:
            return None
        seconds, self._opened_at, self._failing_since = self.failing_for, None, last_seen
        return seconds

    def reset(self) -> None:
        """Close, and forget what failed: the next failure starts a new grace."""
        self._failing_since = self._opened_at = self.error = None
        self.kind = "unknown"
        self._attempting = False

    def _fails_since(self, started: float, last_seen: float) -> None:
        if self._failing_since is None or last_seen > self._failing_since:
            self._failing_since = max(started, last_seen)
