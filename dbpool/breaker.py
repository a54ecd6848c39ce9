"""The circuit breaker for a database's availability: all that a pool knows about an outage.

It decides whether callers wait, never whether they are served: an idle live connection is lent
whatever its state. It has no threads and makes no attempts: the pool reports them, and asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from dbpool import errors
from dbpool.errors import FailureKind
from dbpool.metrics import BreakerSnapshot, Snapshot
from dbpool.retry import delays

# Seconds that an attempt may take, however short the grace, before it counts as failing: over
# TLS to another region a healthy server needs a third of one.
_MIN_ANSWER_TIMEOUT: Final = 0.5

# Delays between attempts: up to 250 ms at first, up to 1 s later, so that the end of a short
# restart is noticed soon. If the first were shorter, all workers would try again within a few hundredths.
_FIRST, _CAP, _BASE = 0.25, 1.0, 1.3

_RESUME_AFTER: Final = 0.2  # seconds after which an attempt that no worker began is late


class Attempt:
    """A place that is reserved for a new connection, and the tries to make it."""

    def __init__(self, now: float = 0.0) -> None:
        self.due = now  # when to try, monotonic
        self.started = 0.0  # 0 while no try is under way
        self.is_retry = False
        self.is_pinging = False  # connected to a pooler, waiting for the server behind it
        self.params: dict[str, Any] = {}  # of the last try
        self.awaits_change = False  # whether a change of params makes it due at once
        self._fast = delays(_FIRST, _CAP, _BASE)
        self._slow = delays(first=1.0, cap=15.0)  # after a failure that waiting hardly cures

    def delay(self, kind: str) -> float:
        """Return the seconds until the next try, after a failure of that *kind*."""
        return next(self._slow if errors.is_permanent(kind) else self._fast)


class Breaker:
    """Opens when connects have kept failing for *grace* seconds without a sign of life.

    A sign of life is a connection that came back healthy after the first failure. While there
    are idle connections nobody waits, so it does not open. A failure that waiting will hardly cure
    needs no grace, unless connections are checked out that may come back; and a full server is not
    down while connections are checked out. The caller serialises all calls; attributes may be read
    at any time. Times are those of *clock*, in seconds.
    """

    def __init__(self, grace: float, clock: Callable[[], float] | None = None) -> None:
        self.grace = grace
        self.answer_timeout = max(grace, _MIN_ANSWER_TIMEOUT)  # of an attempt under way
        self.attempts: set[Attempt] = set()
        self.retry: Attempt | None = None  # the only attempt while connects fail
        self.retry_at = 0.0  # when it is made
        self.last_alive_at = 0.0  # when a connection last was made, or came back healthy
        self.silent_since = -1.0  # when an outage began that TCP noticed before a connect failed
        self.is_failure_reported = False  # whether `reconnect_failed` was called in this outage
        self.error: BaseException | None = None  # of the last failed attempt, sanitized
        self.last_error: str | None = None  # its text on one line, None while connects succeed
        self.kind: str = FailureKind.UNKNOWN
        self.check_failure = ""  # of the user's `check`, if the last one failed
        # Looked up at each call: freezegun puts another in its place for a while.
        self.clock = clock or (lambda: time.monotonic())  # noqa: PLW0108
        self._failing_since: float | None = None
        self._opened_at: float | None = None

    def __repr__(self) -> str:
        return f"<Breaker {self.state} kind={self.kind!r} failing_for={self.failing_for:.1f}>"

    @property
    def state(self) -> str:
        """`"closed"`, `"open"`, or `"half-open"` while an attempt is made that may close it."""
        if self._opened_at is None:
            return "closed"
        return "half-open" if self.pending() else "open"

    @property
    def is_open(self) -> bool:
        """Whether callers who would have to wait are rejected; half-open counts as open."""
        return self._opened_at is not None

    @property
    def is_failing(self) -> bool:
        """Whether the last attempt to connect failed, open or not."""
        return self._failing_since is not None

    @property
    def failing_for(self) -> float:
        """Seconds since the first failure, 0 when the last attempt succeeded."""
        return 0.0 if self._failing_since is None else self.clock() - self._failing_since

    @property
    def since(self) -> float | None:
        """Unix time of the first failure, None while connects succeed."""
        return None if self._failing_since is None else time.time() - self.failing_for

    @property
    def retry_after(self) -> float | None:
        """Seconds until the next attempt, None while connects succeed."""
        return max(0.0, self.retry_at - self.clock()) if self.is_failing else None

    def pending(self) -> list[float]:
        """Return when the tries that are now under way began."""
        return [attempt.started for attempt in list(self.attempts) if attempt.started]

    def interrupted(self) -> list[Attempt]:
        """Return the attempts that are late: because of an exception, no worker began them."""
        late = self.clock() - _RESUME_AFTER
        return [each for each in list(self.attempts) if not each.started and each.due < late]

    def reserve(self) -> Attempt:
        """Reserve the place of a connection that is to be made."""
        attempt = Attempt(self.clock())
        self.attempts.add(attempt)
        return attempt

    def release_if_unneeded(self, attempt: Attempt, *, is_missed: bool, is_excess: bool) -> bool:
        """Release the reserved place if its connection is no longer needed; return whether it was.

        *is_missed* says whether anybody would miss the connection, *is_excess* whether it would be
        one too many. In an outage one attempt always goes on, even if the pool was resized.
        """
        if attempt.is_retry:
            is_wanted = is_missed or self.is_open
        else:  # it may have queued for a worker while others failed
            is_wanted = self.retry is None and not (self.is_open and self.pending())
        if is_wanted and (self.is_open or not is_excess):
            return False
        self.release(attempt)
        return True

    def release(self, attempt: Attempt) -> None:
        """Release a place whose connection is no longer needed."""
        self.attempts.discard(attempt)
        if self.retry is attempt:
            self.retry = None
            self.reset()

    def succeeded(self, attempt: Attempt) -> float | None:
        """Close: a connection was made. Return how long the outage was, if the breaker was open."""
        seconds = self.failing_for if self.is_open else None
        if seconds is not None and self.silent_since >= self.last_alive_at:
            seconds = max(seconds, self.clock() - self.silent_since)
        self.attempts.discard(attempt)
        self.retry, self.last_alive_at = None, self.clock()
        self.is_failure_reported = False
        self.reset()
        return seconds

    def failed(self, attempt: Attempt, error: BaseException, kind: str) -> bool:
        """Record a failure, and decide which attempt tries again, and when: one at a time does.

        Returns whether it is this one; if not, its place is released.
        """
        started, attempt.started = attempt.started, 0.0
        self._fails_since(started, error, kind)
        if self.retry not in (None, attempt):
            self.release(attempt)
            return False
        self.retry, attempt.is_retry = attempt, True
        self.retry_at = attempt.due = self.clock() + attempt.delay(kind)
        return True

    def overdue(self, attempt: Attempt, error: BaseException) -> None:
        """Count an attempt that still has no answer as failed.

        Not yet if a connection came back healthy less than `answer_timeout` ago: call it again.
        """
        if self.clock() - max(attempt.started, self.last_alive_at) >= self.answer_timeout:
            kind: str = FailureKind.SATURATED if attempt.is_pinging else FailureKind.TIMEOUT
            if attempt.is_pinging and self.is_failing and self.error:  # the reason is known
                error, kind = self.error, self.kind
            self._fails_since(attempt.started, error, kind)

    def trip_if_due(self, *, idle: int, out: int) -> bool:
        """Open if it is time to; return whether this call opened it.

        *idle* and *out* are the numbers of idle and of checked-out connections.
        """
        if self._failing_since is None or self._opened_at is not None or idle:
            return False
        self._failing_since = max(self._failing_since, self.last_alive_at)
        if out and self.kind == FailureKind.SATURATED:
            return False
        if self.failing_for < (0.0 if errors.is_permanent(self.kind) and not out else self.grace):
            return False
        self._opened_at = self.clock()
        return True

    def close_if_alive(self) -> float | None:
        """Close if a connection came back healthy after it opened; return what `succeeded` does.

        The failure is kept: connecting may still fail.
        """
        if self._opened_at is None or self.last_alive_at <= self._opened_at:
            return None
        seconds, self._opened_at, self._failing_since = self.failing_for, None, self.last_alive_at
        return seconds

    def snapshot(self) -> BreakerSnapshot:
        """Return its state, as views show it."""
        kind = self.kind if self.is_failing else None
        return BreakerSnapshot(self.state, self.since, self.last_error, self.retry_after, kind)

    def unavailable_error(
        self, pool: str, now: Snapshot, cause: BaseException | None = None, answered_at: float = 0.0
    ) -> errors.DatabaseUnavailable:
        """Build the error for a caller; a *cause* replaces the last failed connect.

        *answered_at* is when the server answered last, 0 if that does not matter. If no connect has
        failed, the cause is "no answer".
        """
        seconds, kind, reason = self.failing_for, self.kind, self.error
        text = self.last_error or self.check_failure or "none was made in time"
        silent_since = min(self.pending(), default=answered_at)
        if cause is not None:
            kind, reason = errors.classify(cause), errors.sanitize(cause)
            text = errors.describe(reason)
        elif reason is None and silent_since:
            seconds, kind = self.clock() - silent_since, FailureKind.TIMEOUT
            reason = errors.no_answer_error(seconds)
            text = str(reason)
        is_wrong = errors.is_permanent(kind)
        cls = errors.DatabaseMisconfigured if is_wrong else errors.DatabaseUnavailable
        span = f" for {seconds:.1f} s" if seconds >= 0.1 else ""
        shown = "" if kind == FailureKind.UNKNOWN else f" ({kind})"
        error = cls(
            f"pool {pool!r}: no connection to the database{span}{shown}: {text}",
            pool=pool, snapshot=now, kind=kind, since=time.time() - seconds,
            retry_after=self.retry_after or 0.0,
        )  # fmt: skip
        error.__cause__ = reason
        return error

    def timeout_error(self, pool: str, now: Snapshot, asked: float) -> errors.PoolError | None:
        """Build the error of a caller who waited too long, None if the pool is exhausted.

        That is so only if every connection is checked out and making one does not fail. *asked*
        says for how many seconds connections may have asked the server in vain, 0 if none does: a
        `check` or `reset` of the user's may be busy with something else.
        """
        if self.is_failing or now.connecting or now.active < now.max_size:
            return self.unavailable_error(pool, now)
        if asked and not now.holders and self.last_alive_at < self.clock() - asked:
            # All connections are being asked whether they are alive, and none has answered.
            return self.unavailable_error(pool, now, answered_at=self.last_alive_at)
        return None

    def report_failure(self, after: float) -> bool:
        """Return true once in an outage, when connects have failed for *after* seconds.

        The one attempt that goes on calls this, without the lock.
        """
        was_reported = self.is_failure_reported
        self.is_failure_reported |= self.retry is not None and self.failing_for >= after
        return self.is_failure_reported and not was_reported

    def reset(self) -> None:
        """Close, and forget the failure: the next failure starts a new grace."""
        self._failing_since = self._opened_at = self.error = self.last_error = None
        self.kind = FailureKind.UNKNOWN

    def _fails_since(self, started: float, error: BaseException, kind: str) -> None:
        self.error, self.kind, self.last_error = error, kind, errors.describe(error)
        if self._failing_since is None or self.last_alive_at > self._failing_since:
            self._failing_since = max(started, self.last_alive_at)
