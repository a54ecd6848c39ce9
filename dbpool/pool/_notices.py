"""Notices: what a pool says of what happens to it, in its log and to its listeners.

Each method is one kind of happening: its line of the log and its event, side by side. What may
happen many times in a row is logged the first time; a line at the end of the episode says how often.
The caller of one holds no lock of the pool.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache, partial
from time import monotonic
from typing import Any, Final

from psycopg_pool import TooManyRequests

from dbpool import events
from dbpool.errors import is_permanent
from dbpool.holders import ThreadInfo, frames_of, stack_of
from dbpool.metrics import HolderSnapshot, Snapshot, holders_by_place
from dbpool.pool import _fork

logger = logging.getLogger("dbpool")

_MIN_QUIET: Final = 10.0  # seconds at least without another of its kind that end an episode
# Counted only: nothing is logged before the episode ends, which it therefore does within a second.
_REPLACED: Final = "replaced %d connections that "


class Notices:
    """The log and the listeners of one pool."""

    def __init__(self, name: str, listeners: events.Emitter) -> None:
        self.name, self.listeners = name, listeners
        self._lock = threading.RLock()  # a garbage collection inside may come back in
        self._episodes: dict[str, tuple[int, float]] = {}  # by cause: how often, and when last
        # Logs each text once.
        self.warn_once = cache(partial(logger.warning, "pool %r: %s", name))

    # Connecting

    def connected(self, seconds: float) -> None:
        """A connection was made, in that time."""
        self._emit(events.Connected, seconds)

    def connect_failed(self, seconds: float, error: str, kind: str, sizes: str) -> None:
        """An attempt failed; worth a warning only with *sizes*: connections exist, growth fails."""
        logger.debug("pool %r: connecting failed (%s): %s", self.name, kind, error)
        if sizes:
            text, cause = f"no new connection ({kind}): {error}; {sizes}", "%d failed connects"
            with _fork.process.log_lock:
                self._warn("connect_failed", f"{cause} ({kind})", text, kind=kind)
        self._emit(events.ConnectFailed, seconds, error, kind)

    def down(self, error: str, kind: str) -> None:
        """The breaker opened."""
        state = "cannot be used as configured" if is_permanent(kind) else "is unavailable"
        text = f"the database {state} ({kind}): {error}"
        self._log(logging.ERROR, text, "circuit_opened", kind=kind)
        self._emit(events.CircuitOpened, error, kind)

    def back(self, seconds: float) -> None:
        """The breaker closed after an outage of that length."""
        text = f"the database is back after {seconds:.1f} s"
        self._log(logging.WARNING, text, "circuit_closed", seconds=seconds)
        self._emit(events.CircuitClosed, seconds)

    def replaced(self, why: str = "the server closed") -> None:
        """A connection was lost while it was idle, and is replaced."""
        self._count(_REPLACED + why, 1)

    def moved(self) -> None:
        """The server became read-only."""
        self._log(logging.WARNING, "the primary has moved, replacing connections", "moved")

    def standby_back(self, number: int) -> None:
        """A preferred standby accepts connections again."""
        text = f"a standby is back, replacing {number} connections to the primary"
        self._log(logging.INFO, text, "standby_back")

    # Lending

    def timed_out(self, number: int, error: BaseException | None) -> None:
        """That many callers got no connection in time; *error* is that of one of them."""
        cause = f"%d callers timed out ({type(error).__name__})"
        if error is not None:
            self._warn("wait_timed_out", cause, str(error), number)

    def slow_acquire(self, waits: list[float], snapshot: Snapshot) -> None:
        """These callers have waited for that many seconds, and still wait."""
        for seconds in waits:
            self._emit(events.SlowAcquire, seconds)
        text = f"a caller has waited {max(waits):.1f} s for a connection; {snapshot.waiting} wait,"
        text += f" {snapshot.active} of {snapshot.max_size} checked out"
        text += f"; held longest: {holders_by_place(snapshot.holders)}" if snapshot.holders else ""
        cause = "%d callers waited for long"
        self._warn("slow_acquire", cause, text, len(waits), seconds=max(waits))

    def not_served(self, error: BaseException | None, seconds: float, is_rejected: bool) -> None:
        """A caller was rejected, or timed out after that time."""
        if isinstance(error, TooManyRequests):
            self._warn("rejected", "%d callers refused (TooManyRequests)", str(error))
        if is_rejected:
            self._emit(events.Rejected)
        else:
            self._emit(events.WaitTimedOut, seconds)

    def held_long(self, held: list[tuple[ThreadInfo | None, HolderSnapshot]], limit: float) -> None:
        """These connections have been held for more than *limit* seconds."""
        if self.listeners.active:
            for info, holder in held:
                self._emit(events.HeldLong, holder, stack_of(info.thread) if info else "")
        held.sort(key=lambda each: each[1].seconds)
        for where, (info, longest) in {each[1].where: each for each in held}.items():
            number = sum(holder.where == where for _, holder in held)
            cause = f"%d connections held for more than {limit:g} s, from {where}"
            more = f" and {number - 1} more" if number > 1 else ""
            text = f"a connection has been held for {longest.seconds:.1f} s by {longest.thread}"
            text += f"{more}, checked out at {where}; now at "
            text += frames_of(info.thread) if info else "?"
            self._warn("held_long", cause, text, number, holder=asdict(longest))

    def forgotten(self, holders: Iterable[HolderSnapshot]) -> None:
        """These holders lost their connection: it was garbage-collected."""
        for holder in holders:
            self._emit(events.Leaked, holder)
            cause = f"%d connections forgotten, from {holder.where}"
            text = "a connection was never returned and has been garbage-collected; it was"
            text += f" checked out at {holder.where}"
            self._warn("leaked", cause, text, holder=asdict(holder))

    def check_failed(self, reason: str) -> None:
        """The user's `check` raised: the connection is not lent."""
        self._warn("check_failed", "%d checks failed", reason)

    # Taking back

    def checked_in(self, use: float, where: str, *, is_late: bool) -> None:
        """A connection came back after *use* seconds; *is_late* if it was reported as held long."""
        if is_late:
            cause = f"%d connections returned late, from {where}"
            text = f"a connection reported as held for too long came back after {use:.1f} s;"
            text += f" it was checked out at {where}"
            self._warn("returned_late", cause, text, seconds=use, where=where)
            self._emit(events.ReturnedLate, use, where)
        self._emit(events.CheckedIn, use)

    def reaped(self, holders: Iterable[HolderSnapshot]) -> None:
        """These connections were taken from those who still held them."""
        for holder in holders:
            self._emit(events.Leaked, holder)

    def rolled_back(self, conn: Any, where: str) -> None:
        """A connection was returned in a transaction."""
        cause = f"%d connections returned in a transaction, from {where}"
        self._warn("rolled_back", cause, f"rolling back returned connection: {conn}, from {where}")

    def not_reusable(self, reason: str, where: str) -> None:
        """A returned connection cannot be lent again."""
        cause = f"%d returned connections discarded, from {where}"
        self._warn("discarded", cause, f"discarding returned connection: {reason}, from {where}")

    def retried(self, attempt: int, error: str, pause: float) -> None:
        """A transaction is run again after *pause* seconds."""
        self._emit(events.Retried, attempt, error, pause)

    # Life

    def opened(self) -> None:
        """The pool opened."""
        self._emit(events.Opened)

    def closed(self, seconds: float) -> None:
        """The pool closed; its listeners have that long to finish."""
        self.end_episodes()
        self._emit(events.Closed)
        self.listeners.close(seconds)

    def task_failed(self, error: str) -> None:
        """A worker's job raised, as a user's `reset` may by `SystemExit`."""
        text = f"a maintenance task failed: {error}"
        self._warn("task_failed", "%d maintenance tasks failed", text)

    def end_episodes(self, timeout: float | None = None) -> None:
        """Log how often it happened of each episode: of all, or those quiet for two *timeout*."""
        now, quiet = monotonic(), 0.0 if timeout is None else max(_MIN_QUIET, 2.0 * timeout)
        with self._lock:
            over = {
                cause: self._episodes.pop(cause)[0]
                for cause, (_, last) in list(self._episodes.items())
                if now - last >= (min(quiet, 1.0) if cause.startswith(_REPLACED) else quiet)
            }
        for cause, count in over.items():
            if count > 1 or cause.startswith(_REPLACED):
                text = cause.replace("s ", " ", int(count == 1)).replace("%d", str(count))
                self._log(logging.INFO, text, "episode_ended", cause=cause, count=count)

    def _warn(self, event: str, cause: str, message: str, count: int = 1, **fields: Any) -> None:
        """Log the first of what happens for one *cause*; count the rest of the episode.

        *cause* has a `%d` for the number of times, which the line that ends the episode gives.
        """
        if self._count(cause, count) == count:
            message = message.removeprefix(f"pool {self.name!r}: ")  # as errors begin
            self._log(logging.WARNING, message, event, **fields)

    def _count(self, cause: str, count: int) -> int:
        """Count what happens for one *cause*; return how often it did in this episode."""
        with self._lock:
            count += self._episodes.get(cause, (0, 0.0))[0]
            self._episodes[cause] = count, monotonic()
            return count

    def _log(self, level: int, text: str, event: str, **fields: object) -> None:
        """Log *text* with structured fields."""
        extra = {"dbpool": {"pool": self.name, "event": event, **fields}}
        logger.log(level, "pool %r: %s", self.name, text, extra=extra)

    def _emit(self, event: type[events.Event], *values: Any) -> None:
        if self.listeners.active:
            self.listeners.emit(event(self.name, *values))
