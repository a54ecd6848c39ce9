"""How connections are handed out: the hot path, and its slow side where callers wait.

Part of the one place that touches protected members of psycopg_pool, see `_supply`.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from itertools import takewhile
from time import monotonic, sleep
from types import FrameType
from typing import Any
from weakref import ref

import psycopg
from psycopg.pq import TransactionStatus
from psycopg_pool import PoolClosed, TooManyRequests
from psycopg_pool.abc import CT

from dbpool import events, holders
from dbpool._books import logger
from dbpool._checkin import Checkin
from dbpool._parts import Waiter, bounded
from dbpool._session import ping_between
from dbpool.errors import PoolError, PoolExhausted, describe
from dbpool.holders import Owner, Slot
from dbpool.liveness import Liveness, PingTimeout, check_socket, is_active, is_retransmitting
from dbpool.metrics import Snapshot

_here = holders.here
_application_files = holders.application_files
_IDLE = TransactionStatus.IDLE

# Seconds to pause when the user's own check refuses a connection that was just made.
_CHECK_PAUSE = 0.25

# uWSGI forks without running Python's fork hooks; only there each checkout compares pids.
_FORKS_UNSEEN = "uwsgi" in sys.modules
_noticing: dict[int, threading.Lock] = {}  # by pid: one thread of a child notices for all


class Checkout(Checkin[CT]):
    """The handing out, and the waiting for it."""

    def getconn(self, timeout: float | None = None) -> CT:
        """Obtain a connection; it *must* be given back by `putconn`. See `connection`."""
        step = Owner()
        try:
            caller = sys._getframe(1)
        except ValueError:  # called from C
            caller = None
        conn = self._acquire(timeout, caller or sys._getframe(), ref(step))
        slot: Slot = conn._slot  # type: ignore[attr-defined]
        slot.owner = slot.ref  # from here on it is lost once it is collected
        return conn

    def _acquire(self, timeout: float | None, frame: FrameType, owner: ref[Any]) -> CT:
        """Hand out a connection that is alive, to the code of *frame*.

        *owner*, one of its own for each call, is who answers for the connection.

        A frame gives its code and offset only, so that no local variable is kept. The stack is
        walked only where an installed package calls, not where the application does.
        """
        if _FORKS_UNSEEN and os.getpid() != self._pid:
            with _noticing.setdefault(os.getpid(), threading.Lock()):
                self.after_fork()
        started = monotonic()
        waiter: Waiter | None = None
        try:
            with self._lock:
                if self._pool:
                    conn = self._pool[-1]
                    slot: Slot = conn._slot
                    slot.owner = owner  # before it is taken: an exception may come in between
                    self._pool.pop()
                else:
                    waiter = self._queue_up(owner, started, timeout)
            if waiter is not None:
                conn = self._await(waiter)
                slot, is_good = conn._slot, waiter.is_fresh
            else:
                is_good = (
                    started < slot.expires_at
                    and started - slot.idle_since < self._trusted
                    and not slot.readable(0)
                )
            if not is_good:
                conn = self._acquire_slowly(conn, started, timeout, owner)
                slot = conn._slot
            code = frame.f_code
            if code.co_filename not in _application_files:
                frame = holders.caller(frame)
                code = frame.f_code
            slot.who, slot.code, slot.lasti = _here.who, code, frame.f_lasti
            conn._pool = self
            slot.since = now = monotonic()
            slot.wait = now - started
            if self.listeners.active:
                self.listeners.emit(events.CheckedOut(self.name, slot.wait))
        except (PoolError, PoolClosed, TooManyRequests):  # it has nothing, and waits no more
            raise
        except BaseException:  # of a signal handler, say, or gevent.Timeout: leave no hole
            self._recover(owner)
            raise
        return conn  # type: ignore[no-any-return]

    def _acquire_slowly(
        self, conn: Any, started: float, timeout: float | None, owner: ref[Any]
    ) -> Any:
        """Hand out *conn* if it is usable, else the next that is."""
        deadline = started + (self.timeout if timeout is None else timeout)
        while not self._usable(conn, deadline):
            if self._trusted < 0.0 and conn._created_at >= started:
                sleep(bounded(min(_CHECK_PAUSE, deadline - monotonic())))
            # One ping that took all the time is enough; without time nothing was pinged.
            is_late = started < deadline <= monotonic()
            with self._lock:
                if self._pool and not is_late:
                    conn = self._pool[-1]
                    conn._slot.owner = owner
                    self._pool.pop()
                    continue
                waiter = self._queue_up(owner, started, timeout)
            conn = self._await(waiter)
        return conn

    def _queue_up(self, owner: ref[Any], started: float, timeout: float | None) -> Waiter:
        """Join those who wait; one who may not finds itself refused. The lock is held."""
        if self._lost or (self.close_returns and self._nconns >= self._max_size):
            self._reclaim()
        if self._closed:
            self._open_on_use()
        idle = len(self._pool)
        waiter = Waiter(owner, started, started + (self.timeout if timeout is None else timeout))
        refusal = self._refusal() if self.breaker.is_failing or self.max_waiting else None
        if refusal is not None:
            self._refuse(waiter, refusal)
            return waiter
        self._queued += 1
        self._waiting.append(waiter)
        if len(self._pool) > idle:  # given back by what a garbage collection ended in here
            self._place(self._pool.pop(), is_fresh=False)
        if self._nconns < self._max_size:
            self._refill()
        return waiter

    def _refusal(self) -> Exception | None:
        """Why a newcomer may not wait, if so. The lock is held."""
        self._heed_life()
        self._judge()
        if self.breaker.is_open:
            return self._unavailable()
        if self.max_waiting and len(self._waiting) >= self.max_waiting:
            return TooManyRequests(
                f"pool {self.name!r}: {len(self._waiting)} waiting already, max_waiting is"
                f" {self.max_waiting}; {self._active()} of {self._max_size} connections checked out"
            )
        return None

    def _await(self, waiter: Waiter) -> Any:
        in_time = waiter.latch.acquire(timeout=bounded(waiter.deadline - monotonic()))
        if not in_time and waiter.conn is None and not waiter.is_over:
            self._expire(waiter)
        if waiter.is_over:
            if isinstance(waiter.error, TooManyRequests):
                self._warn("rejected", "%d callers refused (TooManyRequests)", str(waiter.error))
            if self.listeners.active:
                timed_out = events.WaitTimedOut(self.name, monotonic() - waiter.started)
                self.listeners.emit(events.Rejected(self.name) if waiter.is_refused else timed_out)
            raise waiter.take_error()
        return waiter.conn

    def _expire(self, waiter: Waiter) -> None:
        """Refuse a waiter whose time is over, and those behind it for whom that holds too.


        One snapshot serves all of them. One that was served this very moment is left alone.
        """
        with self._lock:
            now, snapshot = monotonic(), self.stats()
            held = Counter(slot.who for slot in list(self._slots) if slot.since)
            behind = takewhile(lambda each: each.deadline <= now, list(self._waiting))
            late = [w for w in dict.fromkeys([waiter, *behind]) if w.conn is None and not w.is_over]
            why = self._why_none_came_back(now - waiter.started)
            for each in late:
                seconds = now - each.started
                error = self._timed_out(seconds, snapshot, held[each.who], why)
                with suppress(ValueError):
                    self._waiting.remove(each)
                self._metrics.timeouts += 1
                self._in_vain += seconds
                each.refuse(error, is_late=True)
        if late:
            cause = f"%d callers timed out ({type(error).__name__})"
            self._warn("wait_timed_out", cause, str(error), count=len(late))

    def _timed_out(self, seconds: float, snapshot: Snapshot, mine: int, why: str) -> PoolError:
        """Say why there was no connection in time to a thread that holds *mine*.

        The lock is held.
        """
        busy = snapshot.active
        if self.breaker.is_failing or snapshot.connecting or busy < self._max_size:
            return self._unavailable(snapshot)
        held = snapshot.holders
        if not held and self._last_seen < monotonic() - seconds:  # all are asked whether they live
            return self._unavailable(snapshot, silent=self._last_seen)
        nested = (
            f"; nested: this thread itself holds {mine}, and n threads that hold {mine + 1} at once"
            f" need a max_size of at least n * {mine} + 1"
        )
        return PoolExhausted(
            f"pool {self.name!r}: no connection within {seconds:.2f} s: {busy} of"
            f" {self._max_size} checked out, {snapshot.idle} idle, {len(self._waiting) - 1} more"
            f" waiting; held longest: {holders.grouped(held) or 'unknown'}"
            f"{nested if mine else why}",
            pool=self.name,
            snapshot=snapshot,
        )

    def _why_none_came_back(self, seconds: float) -> str:
        """What to suspect if none came back in that time and some run statements. Lock held."""
        conns = [slot.ref() for slot in list(self._slots) if slot.ref and slot.since]
        if self._last_seen >= monotonic() - seconds or not any(map(is_active, conns)):
            return ""
        number = sum(is_retransmitting(conn._slot.fd) for conn in conns if conn)
        if number and self._silent_since < self._last_seen:
            self._silent_since = monotonic() - seconds
        silent = f": {number} of {len(conns)} sockets wait for acknowledgements" if number else ""
        return f"; none came back in that time: slow statements or a silent network{silent}"

    def _usable(self, conn: Any, deadline: float) -> bool:
        """Whether a connection may be handed out; one that may not is given up."""
        slot: Slot = conn._slot
        now = monotonic()
        if now >= slot.expires_at and not self.breaker.is_failing:
            self._discard(conn, "expired")
            return False
        seen = check_socket(conn, slot.readable)
        if seen is Liveness.DEAD:
            self._discard(conn, "dead", by_server=True)
            self._discard_closed()
            return False
        is_doubtful = seen is Liveness.UNKNOWN or now - slot.idle_since >= self.settings.ping_after
        bound = min(self.settings.ping_timeout, deadline - now)
        if is_doubtful and bound > 0.0 and not self._answers(conn, bound):
            return False
        return self._passes_check(conn)

    def _answers(self, conn: Any, timeout: float, others: Collection[Slot] = ()) -> bool:
        """Whether the server of a connection answers a ping; one that does not is given up.

        With it go all idle ones that have been unused for long, but for *others* that answered:
        where one ping times out, its equals will not answer either.
        """
        try:
            ping_between(conn, timeout)
        except psycopg.Error as ex:
            self._discard(conn, "dead", by_server=not isinstance(ex, PingTimeout))
            if self.settings.pooler == "transaction":  # a ping without an answer is saturation
                self._lost_server(ex)
            elif isinstance(ex, PingTimeout) and timeout >= self.settings.ping_timeout:
                oldest = monotonic() - self.settings.ping_after
                self._retire("dead", lambda s: s.idle_since <= oldest and s not in others)
            return False
        return True

    def _passes_check(self, conn: Any) -> bool:
        """Run the user's own check; the time it takes is theirs."""
        if self._check is None or self._trusted >= 0.0:
            return True
        conn._slot.cursor, conn._pool = None, self
        try:
            self._check(conn)
            if conn.pgconn.transaction_status != _IDLE:  # what it began is not its user's
                conn.commit()
        except Exception as ex:  # noqa: BLE001  # a user's callback may raise anything
            why = describe(ex, conn)
        else:
            return True
        logger.info("connection failed check: %s", why)  # out here, where no frame has the error
        self._discard(conn, "dead")
        return False
