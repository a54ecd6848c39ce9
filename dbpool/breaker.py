"""The circuit breaker over a database's availability.

It guards waiting, never serving: whoever finds an idle connection is served whatever it
says. It has no threads and makes no attempts; the pool reports attempts and asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from dbpool.errors import SATURATED, is_permanent

CLOSED: Final = "closed"
OPEN: Final = "open"
HALF_OPEN: Final = "half-open"

# Seconds that an attempt may take, however short the grace, before it counts as failing: over
# TLS to another region a healthy server needs a third of one.
_UNANSWERED: Final = 0.5


class Breaker:
    """Opens when connects have kept failing for *grace* seconds without a sign of life.

    A sign of life is a connection that came back healthy after the first failure. A failure
    that waiting will hardly cure needs no grace, unless connections are out that may yet come
    back; and a full server is not down while connections are out. The caller serialises
    all calls but `reset` and the reading of attributes.
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
        return None if self.error is None else " ".join(str(self.error).split())

    def attempt(self) -> None:
        """An attempt to connect begins."""
        self._attempting = True

    def succeeded(self) -> float | None:
        """An attempt succeeded: close. Return how long it was open, if it was."""
        opened_at = self._opened_at
        self.reset()
        return None if opened_at is None else self._clock() - opened_at

    def failed(
        self, started: float, error: BaseException, kind: str, *, last_seen: float, out: int
    ) -> bool:
        """The attempt begun at *started* failed; return whether that opened the breaker.

        *last_seen* is when a connection last came back healthy, *out* how many are out.
        """
        self._attempting = False
        self.error, self.kind = error, kind
        if self._failing_since is None or last_seen > self._failing_since:
            self._failing_since = max(started, last_seen)
        if out and kind == SATURATED:
            return False
        patience = 0.0 if is_permanent(kind) and not out else self.grace
        return self._open_after(patience)

    def overdue(self, started: float, error: BaseException, *, last_seen: float) -> bool:
        """The attempt begun at *started* is still without an answer: count that as failing.

        False as well if a connection came back healthy less than the patience ago: ask again.
        """
        silent_since = max(started, last_seen)
        if self._clock() - silent_since < self.patience:
            return False
        if self._failing_since is None or last_seen > self._failing_since:
            self._failing_since = silent_since
            self.error, self.kind = error, "timeout"
        return self._open_after(self.patience)

    def seen_alive(self, last_seen: float) -> float | None:
        """Close if a connection came back healthy after it opened; return as `succeeded`."""
        if self._opened_at is None or last_seen <= self._opened_at:
            return None
        return self.succeeded()

    def reset(self) -> None:
        """Close, and forget what failed: the next failure starts a new grace."""
        self._failing_since = self._opened_at = self.error = None
        self.kind = "unknown"
        self._attempting = False

    def _open_after(self, patience: float) -> bool:
        if self._opened_at is not None or self.failing_for < patience:
            return False
        self._opened_at = self._clock()
        return True
