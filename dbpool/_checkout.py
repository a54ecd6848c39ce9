"""How connections are handed out and taken back: the hot path and its slow sides.

Together with `_supply` and `_upkeep` the one place that touches protected members of psycopg_pool and of
psycopg; `tests/test_seam.py` fails when those change.
"""

from __future__ import annotations

import os
import sys
import threading
from time import monotonic
from types import FrameType
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus
from psycopg_pool import ConnectionPool, TooManyRequests
from psycopg_pool.abc import CT
from psycopg_pool.pool import ReturnConnection

from dbpool import events, holders
from dbpool._parts import Waiter, manners
from dbpool._supply import Supply, logger
from dbpool.errors import PoolError, PoolExhausted
from dbpool.holders import Slot
from dbpool.liveness import Look, PingTimeout, look, ping

_IDLE = TransactionStatus.IDLE
_UNKNOWN = TransactionStatus.UNKNOWN
_get_ident = threading.get_ident

# uWSGI forks without running Python's fork hooks; only there each checkout compares pids.
_FORKS_UNSEEN = "uwsgi" in sys.modules


class Checkout(Supply[CT]):
    """The handing out. A connection that is out has its slot in `_out`."""

    # Out

    def getconn(self, timeout: float | None = None) -> CT:
        """Obtain a connection; it *must* be given back by `putconn`. See `connection`."""
        return self._acquire(timeout, sys._getframe(1))

    def _acquire(self, timeout: float | None, frame: FrameType) -> CT:
        """Hand out a connection that is alive, to the code that runs in *frame*.

        The frame gives its code and offset only, so that no stack is walked and no local
        variable is kept.
        """
        if _FORKS_UNSEEN and os.getpid() != self._pid:
            self.after_fork()
        started = monotonic()
        conn: Any = None
        with self._lock:
            if self._pool:
                conn = self._pool.pop()
                self._out.add(conn._slot)
        # One comparison stands for lifetime, idle time and a check of the user's own.
        if conn is None or started >= conn._slot.fresh_until or conn._slot.readable(0):
            conn = self._acquire_slowly(conn, started, timeout)
        slot = conn._slot
        code = frame.f_code
        slot.thread, slot.code, slot.lasti = _get_ident(), code, frame.f_lasti
        conn._pool = self
        slot.since = now = monotonic()
        slot.wait = now - started
        if self.listeners.active:
            self.listeners.emit(events.CheckedOut(self.name, slot.wait))
        return conn  # type: ignore[no-any-return]

    def _acquire_slowly(self, conn: Any, started: float, timeout: float | None) -> Any:
        deadline = started + (self.timeout if timeout is None else timeout)
        while conn is None or not self._usable(conn, deadline):
            conn = self._next(started, deadline)
        return conn

    def _next(self, started: float, deadline: float) -> Any:
        """Take an idle connection, or wait for one."""
        with self._lock:
            self._reclaim()
            if self._pool:
                conn = self._pool.pop()
                self._out.add(conn._slot)
                return conn
            self._open_on_use()
            refusal = self._refusal()
            if refusal is None:
                self._queued += 1
                waiter = Waiter()
                self._waiting.append(waiter)
                self._refill()
        if refusal is not None:
            if self.listeners.active:
                self.listeners.emit(events.Rejected(self.name))
            raise refusal
        return self._await(waiter, started, deadline)

    def _refusal(self) -> Exception | None:
        """Why a newcomer may not wait, if so. The lock is held."""
        self.breaker.seen_alive(self._last_seen)
        if self.breaker.is_open:
            self._metrics.rejected += 1
            return self._unavailable()
        if self.max_waiting and len(self._waiting) >= self.max_waiting:
            self._metrics.rejected += 1
            return TooManyRequests(
                f"the pool {self.name!r} has already {len(self._waiting)} requests waiting"
            )
        return None

    def _await(self, waiter: Waiter, started: float, deadline: float) -> Any:
        try:
            waiter.latch.acquire(timeout=_bounded(deadline - monotonic()))
        except BaseException:  # KeyboardInterrupt, SystemExit, gevent.Timeout: leave no hole
            self._leave(waiter)
            raise
        if waiter.conn is None and waiter.error is None:
            with self._lock:
                if waiter.conn is None and waiter.error is None:
                    self._waiting.remove(waiter)
                    self._metrics.timeouts += 1
                    waiter.error = self._timed_out(monotonic() - started)
            if waiter.error is not None and self.listeners.active:
                self.listeners.emit(events.WaitTimedOut(self.name, monotonic() - started))
        if waiter.error is not None:
            raise waiter.error
        return waiter.conn

    def _leave(self, waiter: Waiter) -> None:
        with self._lock:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
        if waiter.conn is not None:
            self._add_to_pool(waiter.conn)

    def _timed_out(self, seconds: float) -> PoolError:
        """Say why there was no connection in time. The lock is held."""
        busy = self._active()
        if self.breaker.is_failing or self._connecting or busy < self._max_size:
            return self._unavailable()
        held = holders.report(self._out, monotonic())
        longest = "; ".join(f"{h.thread} {h.seconds:.1f} s at {h.where}" for h in held[:5])
        mine = sum(slot.thread == _get_ident() for slot in self._out)
        nested = (
            f"; this thread itself holds {mine}: nested checkouts need max_size of at least"
            " threads * (held - 1) + 1"
        )
        return PoolExhausted(
            f"pool {self.name!r}: no connection within {seconds:.2f} s: {busy} of"
            f" {self._max_size} checked out, {len(self._pool)} idle, {len(self._waiting)} others"
            f" waiting; held longest: {longest or 'unknown'}{nested if mine else ''}",
            pool=self.name,
            snapshot=self.stats(),
        )

    def _usable(self, conn: Any, deadline: float) -> bool:
        """Whether a connection may be handed out; one that may not is given up."""
        slot: Slot = conn._slot
        now = monotonic()
        if now >= slot.expires_at and not self.breaker.is_failing:
            self._discard(conn, "expired")
            return False
        seen = look(conn, slot.readable)
        if seen is Look.DEAD:
            self._discard(conn, "dead")
            return False
        unused = now - slot.idle_since
        if seen is Look.DOUBTFUL or unused >= self.settings.ping_after:
            return self._answers(conn, min(self.settings.ping_timeout, deadline - now))
        return self._passes_check(conn)

    def _answers(self, conn: Any, timeout: float) -> bool:
        try:
            ping(conn, timeout)
        except PingTimeout:
            self._discard(conn, "dead")
            if timeout >= self.settings.ping_timeout:
                self._discard_unused()
            return False
        except psycopg.Error:
            self._discard(conn, "dead")
            return False
        return self._passes_check(conn)

    def _passes_check(self, conn: Any) -> bool:
        """Run the user's own check; the time it takes is theirs."""
        if self._check is None or self._check is self._stock_check:
            return True
        try:
            self._check(conn)
        except Exception as ex:
            logger.info("connection failed check: %s", ex)
            self._discard(conn, "dead")
            return False
        except BaseException:
            self._add_to_pool(conn)
            raise
        return True

    _stock_check = staticmethod(ConnectionPool.check_connection)

    # Back

    def putconn(self, conn: CT) -> None:
        """Give back a connection obtained by `getconn`.

        Raise `ValueError` if it is not this pool's, or not out.
        """
        self._check_pool_putconn(conn)
        self._release(conn)

    def _release(self, conn: Any) -> None:
        slot: Slot = conn._slot
        now = monotonic()
        # One tuple comparison covers all that a user may have changed on the connection.
        if (
            conn.pgconn.transaction_status != _IDLE
            or now >= slot.expires_at
            or manners(conn) != slot.manners
            or slot.reported
            or self._reset
        ):
            self._release_slowly(conn, slot, now)
            return
        conn._pool = None
        self._take_back(conn, slot, now)

    def _take_back(self, conn: Any, slot: Slot, now: float) -> None:
        """Pass a healthy connection on to who waits longest, else make it idle."""
        use = now - slot.since
        with self._lock:
            self._check_out(slot)
            self._count(slot, use)
            self._last_seen = slot.idle_since = now
            self._place(conn, slot)
        if self._closed and not conn.closed:
            self._close_connection(conn)
        if self.listeners.active:
            self.listeners.emit(events.CheckedIn(self.name, use))

    def _check_out(self, slot: Slot) -> None:
        """Raise `ValueError` unless it is out, as after a second return. The lock is held."""
        if slot not in self._out or not slot.since:
            raise ValueError(f"can't return connection to pool {self.name!r}, it is not out")

    def _count(self, slot: Slot, use: float) -> None:
        """Count a checkout that ended: wait and use at once, exact. The lock is held."""
        metrics = self._metrics
        metrics.checkouts += 1
        metrics.wait.add(slot.wait)
        metrics.use.add(use)
        slot.since = 0.0

    def _place(self, conn: Any, slot: Slot) -> None:
        """Hand a connection over or queue it, last in first out. The lock is held."""
        if self._waiting:
            self._out.add(slot)
            self._waiting.popleft().give(conn)
            return
        self._out.discard(slot)
        if not self._closed:
            slot.fresh_until = min(slot.expires_at, slot.idle_since + self._ping_after)
            self._pool.append(conn)

    @property
    def _ping_after(self) -> float:
        """Seconds after which an idle connection needs more than a look."""
        return self.settings.ping_after if self._check is None else 0.0

    def _add_to_pool(self, conn: Any) -> None:
        conn._pool = None
        with self._lock:
            conn._slot.since = 0.0
            self._place(conn, conn._slot)
        if self._closed:
            self._close_connection(conn)

    def _release_slowly(self, conn: Any, slot: Slot, now: float) -> None:
        if slot.fd < 0:  # inherited by a fork: its session is the parent's
            self._close_connection(conn)
            return
        use = now - slot.since
        with self._lock:
            self._check_out(slot)
            self._count(slot, use)
        if slot.reported:
            self._tell_late(slot, use)
        if self.listeners.active:
            self.listeners.emit(events.CheckedIn(self.name, use))
        if self._closed:
            self._out.discard(slot)
            self._close_connection(conn)
        elif self._reset:
            self.run_task(ReturnConnection(self, conn, from_getconn=False))
        else:
            self._return_connection(conn, from_getconn=False)

    def _tell_late(self, slot: Slot, seconds: float) -> None:
        slot.reported = False
        where = slot.where()
        logger.warning(
            "pool %r: a connection reported as held for too long came back after %.1f s;"
            " it was checked out at %s",
            self.name,
            seconds,
            where,
        )
        if self.listeners.active:
            self.listeners.emit(events.ReturnedLate(self.name, seconds, where))

    def _return_connection(self, conn: Any, from_getconn: bool) -> None:
        """Make a returned connection fit for the next holder, or give it up."""
        self._reset_connection(conn)
        slot: Slot = conn._slot
        if conn.pgconn.transaction_status == _UNKNOWN:
            self._discard(conn, "broken")
        elif monotonic() >= slot.expires_at and not self.breaker.is_failing:
            self._discard(conn, "expired")
        elif not self._mend_manners(conn, slot):
            self._discard(conn, "broken")
        else:
            with self._lock:
                self._last_seen = slot.idle_since = monotonic()
            self._add_to_pool(conn)
            return
        logger.debug("pool %r: returned connection was given up", self.name)

    def _mend_manners(self, conn: Any, slot: Slot) -> bool:
        """Put back what a user changed; false if that cannot be done."""
        if manners(conn) == slot.manners:
            return True
        if conn._tpc is not None or conn._pipeline is not None:
            logger.warning("discarding connection returned in a two-phase commit or a pipeline")
            return False
        (
            conn._autocommit,
            conn.row_factory,
            conn.cursor_factory,
            conn.server_cursor_factory,
            conn._isolation_level,
            conn._read_only,
            conn._deferrable,
            conn.prepare_threshold,
            prepared_max,
        ) = slot.manners[:9]
        conn._prepared.prepared_max = prepared_max
        conn._begin_statement = b""
        return True

    # Giving up

    def _discard(self, conn: Any, reason: str) -> None:
        """Close a connection that is out; replace it if it is missed."""
        with self._lock:
            self._remove(conn._slot, reason)
            self._refill()
        self._close_connection(conn)
        if self.listeners.active:
            self.listeners.emit(events.Discarded(self.name, reason))

    def _remove(self, slot: Slot, reason: str) -> None:
        """Take a connection out of the books. The lock is held."""
        slot.forget()
        self._out.discard(slot)
        self._nconns -= 1
        metrics = self._metrics
        setattr(metrics, reason, getattr(metrics, reason) + 1)

    def _retire(self, reason: str, condition: Any) -> int:
        """Close the idle connections for whose slot *condition* holds; return how many."""
        with self._lock:
            gone = [conn for conn in self._pool if condition(conn._slot)]
            for conn in gone:
                self._pool.remove(conn)
                self._remove(conn._slot, reason)
            self._refill()
        for conn in gone:
            self._close_connection(conn)
            if self.listeners.active:
                self.listeners.emit(events.Discarded(self.name, reason))
        return len(gone)

    def _discard_unused(self) -> None:
        """One ping timed out: its equals will not answer either."""
        oldest = monotonic() - self.settings.ping_after
        self._retire("dead", lambda slot: slot.idle_since <= oldest)

    def _reclaim(self) -> None:
        """Free the slots of connections that were collected while out. The lock is held."""
        while self._lost:
            slot = self._lost.popleft()
            if slot in self._out:
                if slot.since:
                    self._count(slot, monotonic() - slot.since)
                self._remove(slot, "collected")
                self._refill()
                logger.warning(
                    "pool %r: a connection was never returned and has been garbage-collected;"
                    " it was checked out at %s",
                    self.name,
                    slot.where(),
                )


def _bounded(seconds: float) -> float:
    """A lock's timeout: -1 would wait for ever, too large a one would overflow."""
    return min(max(seconds, 0.0), threading.TIMEOUT_MAX)
