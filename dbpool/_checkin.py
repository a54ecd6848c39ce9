"""How connections are taken back, mended, passed on, or given up.

Part of the one place that touches protected members of psycopg_pool, see `_supply`.
"""

from __future__ import annotations

from time import monotonic
from typing import Any

from psycopg.pq import TransactionStatus
from psycopg_pool.abc import CT
from psycopg_pool.pool import ReturnConnection

from dbpool import events
from dbpool._life import Life
from dbpool._parts import manners
from dbpool._supply import logger
from dbpool.holders import Slot

_IDLE = TransactionStatus.IDLE
_UNKNOWN = TransactionStatus.UNKNOWN


class Checkin(Life[CT]):
    """The taking back. A connection that is out has its slot in `_out`."""

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
                if self.listeners.active:
                    self._later(
                        lambda pool: pool.listeners.emit(events.Discarded(pool.name, "collected"))
                    )
                logger.warning(
                    "pool %r: a connection was never returned and has been garbage-collected;"
                    " it was checked out at %s",
                    self.name,
                    slot.where(),
                )
