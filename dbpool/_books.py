"""What a pool knows and tells: the books, the breaker, outages, its numbers.

Part of the one place that touches protected members of psycopg_pool, see `_supply`.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from os import getpid
from time import monotonic, time
from typing import Any, Final

import psycopg
from psycopg import Cursor
from psycopg_pool import ConnectionPool
from psycopg_pool.abc import CT

from dbpool import _fork, events, holders
from dbpool._parts import Attempt, Call, Waiter
from dbpool._timeouts import Timeouts
from dbpool.breaker import Breaker
from dbpool.errors import (
    DatabaseMisconfigured,
    DatabaseUnavailable,
    classify,
    describe,
    is_permanent,
    sanitize,
)
from dbpool.events import Emitter
from dbpool.holders import Slot
from dbpool.metrics import BreakerSnapshot, Metrics, Snapshot
from dbpool.settings import Settings

logger = logging.getLogger("dbpool")

_MAX_CANCELS = 100  # requests that wait to be sent; beyond them the oldest is dropped
_QUIET = 10.0  # seconds at least without another of its kind that end an episode
REPLACED: Final = "replaced %d connections that the server closed"


class Books(ConnectionPool[CT]):
    """The pool's shared state: connections, waiters, connects under way and failed.

    Under `_lock` while open: `_slots` has a record of every connection, `_connects` one of every
    place where one is to be made; sizes are counted from these. A connection is idle in `_pool`,
    held if its slot says since when, and else on its way, in the hands of the slot's `owner`.
    `_probe` is the attempt that tries again while connects fail; no other begins beside it.

    A signal handler may raise in a caller's thread after any call. So what belongs together is
    changed without a call between, what is to be done outside the lock is put on `_todo` or
    `_closing` first, and `heal`, which the watchdog calls, ends what was begun.
    """

    _pool: deque[Any]
    _waiting: deque[Waiter]  # type: ignore[assignment]  # ours instead of WaitingClient

    def __init__(
        self, settings: Settings, listeners: Emitter, conninfo: Any, **options: Any
    ) -> None:
        super().__init__(conninfo, open=False, **options)
        self.settings = settings
        self.listeners = listeners
        self._lazy = True
        self._resets = self._reset or settings.session_reset != "none"
        self._warned: set[str] = set()
        self._cursors: type[Cursor[Any]] = Cursor  # of connections for which nothing else is asked
        if settings.pipeline_begin:
            from dbpool._pipelining import PipeliningCursor

            self._cursors = PipeliningCursor
        # For how long an idle connection is handed out after a look alone: never if the user
        # wants to check it; what the stock check does is done here anyway.
        is_harmless = self._check in (None, self.check_connection)
        self._trusted = settings.ping_after if is_harmless else float("-inf")
        self._clear()
        self._pid = getpid()

    def _clear(self) -> None:
        """Start from nothing, as in a new process."""
        self._lock = threading.RLock()
        self._timeouts = Timeouts(self.settings)
        self._pool = deque()
        self._waiting = deque()
        self._workers = []
        self._sched_runner = None
        self._slots: set[Slot] = set()  # of all connections there are
        self._connects: set[Attempt] = set()  # of all that are to be made
        self._pinging: set[float] = set()  # when those began that have connected, to a pooler
        self._probe: Attempt | None = None
        self._lost: deque[Any] = deque()  # says that one was collected; filled without any lock
        self._todo: deque[Callable[[Any], None]] = deque()  # for a worker
        self._closing: deque[Any] = deque()  # connections that are given up, to be closed
        self._outage_told = False
        self._metrics = Metrics()
        self._queued = 0
        self._in_vain = 0.0  # seconds waited by those whose time ran out
        self._popped: dict[str, int] = {}
        self._cancels: deque[Any] = deque(maxlen=_MAX_CANCELS)  # requests to be sent
        self._episodes: dict[str, tuple[int, float]] = {}  # by cause: how often, and when last
        self._last_seen = 0.0
        self._silent_since = -1.0  # what TCP knows of an outage before connects fail
        self._moved_at = self._heeded_at = float("-inf")
        self._standby_due = 0.0  # when to look again whether one is back
        self.breaker = Breaker(self.settings.outage_grace)

    @property
    def _nconns(self) -> int:
        return len(self._slots) + len(self._connects)

    @_nconns.setter
    def _nconns(self, _: int) -> None:
        """Nothing is counted: the parent's constructor sets it."""

    @property
    def _connecting(self) -> int:
        return len(self._connects)

    @property
    def _attempts(self) -> list[float]:
        """When the attempts under way began."""
        return [attempt.started for attempt in list(self._connects) if attempt.started]

    def _wake(self) -> None:
        """Have a worker do what may not happen under the lock, or in a caller's thread."""
        self.run_task(Call(self, Books._catch_up))

    def _catch_up(self) -> None:
        """Do what was put on `_todo`, and close what was given up."""
        self._close_evicted()
        while self._todo:
            with suppress(IndexError):  # another thread may be quicker
                self._todo.popleft()(self)

    def _close_evicted(self) -> None:
        for conn in list(self._closing):  # to close one twice does no harm
            self._close_connection(conn)
            with suppress(ValueError):
                self._closing.remove(conn)

    def _heed_life(self) -> None:
        """Close the breaker if a connection came back healthy since it opened. The lock is held."""
        if (outage := self.breaker.seen_alive(self._last_seen)) is not None:
            self._todo.append(lambda pool: pool._tell_back(outage))
            self._wake()

    def _judge(self) -> None:
        """Open the breaker if it is time to: then nobody waits any longer. The lock is held."""
        breaker = self.breaker
        if not breaker.is_failing:
            return
        opened = events.CircuitOpened(self.name, breaker.last_error or "", breaker.kind)
        idle, out = len(self._pool), self._active()
        if breaker.judge(last_seen=self._last_seen, idle=idle, out=out):
            self._todo.append(lambda pool: pool._tell_down(opened))
            self._metrics.circuit_opened += 1
            self._refuse_as_unavailable()
            self._wake()

    def _refuse_as_unavailable(self) -> None:
        """Refuse all who wait while the breaker is open. The lock is held."""
        snapshot = self.stats()
        self._refuse_waiters(lambda: self._unavailable(snapshot))

    def _refuse_waiters(self, reason: Callable[[], Exception]) -> None:
        """Refuse all who wait, each for a *reason* of its own. The lock is held."""
        while self._waiting:  # what a garbage collection ends in here may take part
            error, waiter = reason(), self._waiting[0]
            del self._waiting[0]
            self._refuse(waiter, error)

    def _refuse(self, waiter: Waiter, reason: Exception) -> None:
        """Have *reason* raised where it waits. The lock is held."""
        if waiter.conn is None and not waiter.is_over:
            self._metrics.rejected += 1
            waiter.refuse(reason)

    def _unavailable(
        self, snapshot: Snapshot | None = None, silent: float = 0.0, cause: Any = None
    ) -> DatabaseUnavailable:
        """Say that the database is to blame; where no connect failed, for its silence.

        The lock is held. A *cause* of the caller's counts instead of the last failed connect.
        """
        breaker = self.breaker
        seconds, kind = breaker.failing_for, classify(cause) if cause else breaker.kind
        cause = sanitize(cause) if cause else breaker.error
        silent = min(self._attempts, default=silent)
        if cause is None and silent:
            seconds, kind = monotonic() - silent, "timeout"
            cause = unanswered(seconds)
        cls = DatabaseMisconfigured if is_permanent(kind) else DatabaseUnavailable
        span = f" for {seconds:.1f} s" if seconds >= 0.1 else ""
        shown = "" if kind == "unknown" else f" ({kind})"
        error = cls(
            f"pool {self.name!r}: no connection to the database{span}{shown}:"
            f" {'none was made in time' if cause is None else describe(cause)}",
            pool=self.name,
            snapshot=snapshot or self.stats(),
            kind=kind,
            since=time() - seconds,
            retry_after=breaker.retry_after or 0.0,
        )
        error.__cause__ = cause
        return error

    def _active(self) -> int:
        return self._nconns - len(self._pool) - self._connecting

    def _warn_once(self, text: str) -> None:
        with self._lock:
            is_new = text not in self._warned
            self._warned.add(text)
        if is_new:
            logger.warning("pool %r: %s", self.name, text)

    def _extra(self, event: str, **fields: object) -> dict[str, object]:
        """What a line of the log carries for who collects them."""
        return {"dbpool": {"pool": self.name, "event": event, **fields}}

    def _tell_down(self, opened: events.CircuitOpened) -> None:
        with _fork.telling:
            logger.error(
                "pool %r: the database %s (%s): %s",
                self.name,
                "cannot be used as configured" if is_permanent(opened.kind) else "is unavailable",
                opened.kind,
                opened.error,
                extra=self._extra("circuit_opened", kind=opened.kind),
            )
        if self.listeners.active:
            self.listeners.emit(opened)

    def _tell_back(self, seconds: float) -> None:
        with _fork.telling:
            logger.warning(
                "pool %r: the database is back after %.1f s",
                self.name,
                seconds,
                extra=self._extra("circuit_closed", seconds=seconds),
            )
        if self.listeners.active:
            self.listeners.emit(events.CircuitClosed(self.name, seconds))

    def _warn(self, event: str, cause: str, message: str, count: int = 1, **fields: Any) -> None:
        """Log the first of what happens for one *cause*; count the rest of the episode.

        *cause* has a `%d` for the number of times, which the line that ends the episode gives.
        """
        if self._count(cause, count) == count:
            message = message.removeprefix(f"pool {self.name!r}: ")  # as errors begin
            logger.warning("pool %r: %s", self.name, message, extra=self._extra(event, **fields))

    def _count(self, cause: str, count: int) -> int:
        """Count what happens for one *cause*; return how often it did in this episode."""
        with self._lock:
            count += self._episodes.get(cause, (0, 0.0))[0]
            self._episodes[cause] = count, monotonic()
            return count

    def _end_episodes(self, quiet: float | None = None) -> None:
        """Log what the episodes came to that have been *quiet*, by default for some seconds."""
        now, quiet = monotonic(), max(_QUIET, 2.0 * self.timeout) if quiet is None else quiet
        with self._lock:
            over = {
                cause: self._episodes.pop(cause)[0]
                for cause, (_, last) in list(self._episodes.items())
                if now - last >= (min(quiet, 1.0) if cause == REPLACED else quiet)
            }
        for cause, count in over.items():
            if count > 1 or cause == REPLACED:
                text = (cause if count > 1 else cause.replace("s ", " ", 1)).replace(
                    "%d", str(count)
                )
                extra = self._extra("episode_ended", cause=cause, count=count)
                logger.info("pool %r: %s", self.name, text, extra=extra)

    # Numbers

    @property
    def state(self) -> str:
        """`"starting"` until first connected, `"up"`, `"down"` in an outage, or `"stopped"`."""
        if self._closed and self._opened:
            return "stopped"
        if self.breaker.is_open:
            return "down"
        return "up" if self._last_seen else "starting"

    @property
    def last_seen(self) -> float | None:
        """Monotonic time of the last healthy return or connect: a passive proof of life."""
        return self._last_seen or None

    def stats(self) -> Snapshot:
        """Return a consistent snapshot of the state and of all counters since opening."""
        with self._lock:
            now = monotonic()
            held = [slot for slot in list(self._slots) if slot.since]
            return self._metrics.snapshot(
                state=self.state,
                size=0 if self._closed else self._nconns,
                active=0 if self._closed else self._active(),
                idle=len(self._pool),
                connecting=0 if self._closed else self._connecting,
                waiting=len(self._waiting),
                min_size=self._min_size,
                max_size=self._max_size,
                pending=[slot.wait for slot in held],
                breaker=BreakerSnapshot(
                    state=self.breaker.state,
                    since=self.breaker.since,
                    last_error=self.breaker.last_error,
                    retry_after=self.breaker.retry_after,
                ),
                holders=holders.report(held, now),
            )

    def get_stats(self) -> dict[str, int]:
        """Return the parent's statistics, exact: counts, sums in milliseconds, and sizes."""
        with self._lock:
            return self._totals(since=self._popped) | self._get_measures()

    def pop_stats(self) -> dict[str, int]:
        """Like `get_stats`, and let its counts and sums begin at zero again."""
        with self._lock:
            before, self._popped = self._popped, self._totals(since={})
            stats = {key: value - before.get(key, 0) for key, value in self._popped.items()}
            return stats | self._get_measures()

    def _totals(self, since: dict[str, int]) -> dict[str, int]:
        """The parent's counts and sums beyond those of *since*. The lock is held."""
        m = self._metrics
        m.count_finished()
        pending = [slot.wait for slot in list(self._slots) if slot.since]
        failed = m.timeouts + m.rejected
        totals = {
            self._REQUESTS_NUM: m.checkouts + len(pending) + failed,
            self._REQUESTS_QUEUED: self._queued,
            self._REQUESTS_WAIT_MS: int(1000.0 * (m.wait.sum + sum(pending) + self._in_vain)),
            self._REQUESTS_ERRORS: failed,
            self._USAGE_MS: int(1000.0 * m.use.sum),
            self._RETURNS_BAD: m.broken,
            self._CONNECTIONS_NUM: m.connects + m.connect_failures,
            self._CONNECTIONS_MS: int(1000.0 * m.connect.sum),
            self._CONNECTIONS_ERRORS: m.connect_failures,
            self._CONNECTIONS_LOST: m.dead,
        }
        return {key: value - since.get(key, 0) for key, value in totals.items()}


def unanswered(seconds: float) -> psycopg.OperationalError:
    return psycopg.errors.ConnectionTimeout(f"no answer from the server for {seconds:.1f} s")
