"""How connections are taken back, mended, and passed on.

Part of the one place that touches protected members of psycopg_pool, see `_supply`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from os import getpid
from time import monotonic
from typing import Any

import psycopg
from psycopg import capabilities
from psycopg.adapt import AdaptersMap
from psycopg.pq import TransactionStatus
from psycopg_pool.abc import CT

from dbpool import _fork, events, holders
from dbpool._books import logger
from dbpool._life import Life
from dbpool._parts import KeptCursor, insist_on_idle, manners
from dbpool._session import reset
from dbpool.errors import describe
from dbpool.holders import Holder, Slot
from dbpool.liveness import Look, is_active, look, ping
from dbpool.metrics import Metrics

_IDLE = TransactionStatus.IDLE
_UNKNOWN = TransactionStatus.UNKNOWN

# A connection used for no longer than this is passed on without a look: the look's system call
# would cost a busy pool more than the use. Held for longer, its server may have gone unseen.
_BRIEF = 0.01


class Checkin(Life[CT]):
    """The taking back: returned, counted, passed on, or collected while it was out."""

    def putconn(self, conn: CT) -> None:
        """Give back a connection obtained by `getconn`.

        Raise `ValueError` if it is not this pool's, or not out.
        """
        self._check_pool_putconn(conn)
        slot: Slot = conn._slot  # type: ignore[attr-defined]
        # Where a tracer wraps connections, what its wrapper holds comes back by `close()`.
        self._release((slot.ref and slot.ref()) or conn)

    def _release(self, conn: Any, cursor: KeptCursor | None = None) -> None:
        """Pass a healthy connection on to who waits longest, else make it idle.

        A *cursor* to keep says that no code of a user's saw the connection.
        """
        slot: Slot = conn._slot
        now = monotonic()
        use = now - slot.since
        is_fit = (
            conn.pgconn.transaction_status == _IDLE
            and now < slot.expires_at
            and not slot.reported
            and not self._resets
            and self.breaker.error is None  # else connects fail: is this one alive?
            # One tuple comparison covers all that a user may have changed on the connection.
            and (cursor is not None or manners(conn) == slot.manners)
        )
        slot.cursor = cursor if is_fit else None
        if not is_fit and slot.fd < 0:  # inherited by a fork: its session is the parent's
            self._close_connection(conn)
            return
        is_orphan = False
        with self._lock:
            if not slot.since:
                raise ValueError(f"can't return connection to pool {self.name!r}, it is not out")
            slot.since = 0.0
            is_late, slot.reported = slot.reported, False
            self._metrics.ended.append((slot.wait, use))
            if len(self._metrics.ended) >= Metrics.BATCH:
                self._metrics.count_ended()
            if is_fit:
                conn._pool = None
                self._last_seen = slot.idle_since = now
                if self._waiting or self._closed:
                    is_orphan = self._place(conn, is_fresh=use < _BRIEF)
                else:
                    self._pool.append(conn)
        if is_orphan:
            self._close_connection(conn)
        if is_late:
            self._tell_late(slot, use)
        if self.listeners.active:
            self.listeners.emit(events.CheckedIn(self.name, use))
        if not is_fit:
            self._mend(conn)

    def _mend(self, conn: Any) -> None:
        """Make a connection that came back unfit idle again, or give it up."""
        self._cancel_later(conn)
        if (message := conn._slot.reset_message) and not self._closed:
            self._tidy(conn, lambda conn: reset(conn, message, self.settings.ping_timeout))
        with self._lock:
            if self._reset and not self._closed:  # workers told to stop come to it before that
                self._later(lambda pool: pool._return_connection(conn, from_getconn=False))
                return
        self._return_connection(conn, from_getconn=False)

    def _cancel_later(self, conn: Any) -> None:
        """Have the statement cancelled that still runs on a connection, which is closed next.

        Only in the process that made it: a request goes over a socket of its own, and would end a
        statement of the parent's.
        """
        slot: Slot | None = getattr(conn, "_slot", None)
        is_ours = slot is not None and slot.fd >= 0 and self._pid == getpid()
        if is_ours and is_active(conn) and capabilities.has_cancel_safe():
            with suppress(psycopg.Error):
                self._cancels.append(conn.pgconn.cancel_conn())

    def _tell_late(self, slot: Slot, seconds: float) -> None:
        with self._lock:
            self._metrics.returned_late += 1
        where = slot.where()
        self._warn(
            "returned_late",
            f"%d connections returned late, from {where}",
            f"a connection reported as held for too long came back after {seconds:.1f} s;"
            f" it was checked out at {where}",
            seconds=seconds,
            where=where,
        )
        if self.listeners.active:
            self.listeners.emit(events.ReturnedLate(self.name, seconds, where))

    def _reset_connection(self, conn: CT) -> None:
        self._tidy(conn, self._reset)

    def _tidy(self, conn: CT, reset: Callable[[CT], None] | None) -> None:
        """Roll back and call *reset*: the parent would log the texts of errors."""
        status = conn.pgconn.transaction_status
        try:
            if status == TransactionStatus.ACTIVE:
                raise psycopg.ProgrammingError("it was returned in the middle of an operation")
            if status not in (_IDLE, _UNKNOWN):
                where = conn._slot.where()  # type: ignore[attr-defined]
                cause = f"%d connections returned in a transaction, from {where}"
                self._warn("rolled_back", cause, f"rolling back returned connection: {conn}")
                conn.rollback()
            if reset and status != _UNKNOWN:
                reset(conn)
                insist_on_idle(conn, "reset")
        except Exception as ex:  # noqa: BLE001  # a user's callback may raise anything
            why = describe(ex, conn)
        except BaseException:
            self._discard(conn, "broken")
            raise
        else:
            return
        logger.warning("pool %r: discarding returned connection: %s", self.name, why)
        self._close_connection(conn)

    def _return_connection(self, conn: Any, from_getconn: bool) -> None:
        """Make a returned connection fit for the next holder, or give it up."""
        if self._closed:
            self._add_to_pool(conn)  # which closes it
            return
        self._reset_connection(conn)
        slot: Slot = conn._slot
        if conn.pgconn.transaction_status == _UNKNOWN:
            self._discard(conn, "broken", by_server=conn.broken)
        elif monotonic() >= slot.expires_at and not self.breaker.is_failing:
            self._discard(conn, "expired")
        elif not self._mend_manners(conn, slot):
            self._discard(conn, "broken")
        elif (seen := self._look(conn)) is Look.DEAD:
            self._discard(conn, "dead", by_server=True)
        else:
            slot.idle_since = monotonic()
            if seen is Look.ALIVE:
                with self._lock:
                    self._last_seen = slot.idle_since
            self._add_to_pool(conn, is_fresh=seen is Look.ALIVE)

    def _look(self, conn: Any) -> Look:
        """Look at a connection; where connects fail, silence behind a pooler proves nothing."""
        seen = look(conn, conn._slot.readable)
        if seen is Look.ALIVE and self.breaker.is_failing and self.settings.pooler == "transaction":
            try:
                ping(conn, self.settings.ping_timeout)
            except psycopg.Error:
                return Look.DEAD
        return seen

    def _mend_manners(self, conn: Any, slot: Slot) -> bool:
        """Put back what a user changed; false if that cannot be done."""
        if manners(conn) == slot.manners:
            return True
        if conn._tpc is not None or conn._pipeline is not None:
            logger.warning("discarding connection returned in a two-phase commit or a pipeline")
            return False
        (conn._autocommit, conn.row_factory, conn.cursor_factory, conn.server_cursor_factory,
         conn._isolation_level, conn._read_only, conn._deferrable,
         conn._prepared.prepare_threshold, conn._prepared.prepared_max) = slot.manners[:9]  # fmt: skip
        conn._notice_handlers[:], conn._notify_handlers[:] = slot.manners[11:13]
        conn._adapters = AdaptersMap(slot.adapters)
        conn._begin_statement = b""
        return True

    def _place(self, conn: Any, *, is_fresh: bool) -> bool:
        """Hand a connection over or queue it, last in first out. The lock is held.

        *is_fresh* says that its server spoke just now: who gets it need not look. True if the
        pool is closed: then the connection is to be closed too.
        """
        if self._waiting:
            waiter = self._waiting.popleft()
            waiter.conn, waiter.is_fresh = conn, is_fresh and self._trusted >= 0.0
            waiter.latch.release()
        elif self._closed:
            self._slots.discard(conn._slot)
        else:
            self._pool.append(conn)
        return self._closed

    def _add_to_pool(self, conn: Any, *, is_fresh: bool = True) -> None:
        conn._pool = None
        with self._lock:
            conn._slot.since = 0.0
            is_orphan = self._place(conn, is_fresh=is_fresh)
        if is_orphan:
            self._close_connection(conn)

    def _reclaim(self) -> None:
        """Free the slots of connections that were collected while out. The lock is held."""
        while self._lost:
            slot = self._lost.popleft()
            if slot in self._slots:
                now, forgotten = monotonic(), holders.report([slot], monotonic())
                if slot.since:
                    self._metrics.ended.append((slot.wait, now - slot.since))
                    self._metrics.leaks += 1
                    slot.since = 0.0
                self._remove(slot, "collected")
                self._refill()
                self._later(partial(Checkin._tell_collected, forgotten=forgotten))

    def _tell_collected(self, forgotten: Sequence[Holder]) -> None:
        if self.listeners.active:
            self.listeners.emit(events.Discarded(self.name, "collected"))
        for holder in forgotten:
            if self.listeners.active:
                self.listeners.emit(events.Leaked(self.name, holder))
            with _fork.telling:
                self._warn(
                    "leaked",
                    f"%d connections forgotten, from {holder.where}",
                    "a connection was never returned and has been garbage-collected;"
                    f" it was checked out at {holder.where}",
                    holder=asdict(holder),
                )
