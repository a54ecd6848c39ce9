"""How connections are made idle or handed over, counted, and given up.

Part of the one place that touches protected members of psycopg_pool, see `_supply`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import Any

from psycopg_pool.abc import CT

from dbpool import events
from dbpool._books import logger
from dbpool._life import Life
from dbpool.holders import Slot
from dbpool.liveness import hung_up


class Discard(Life[CT]):
    """The giving up. A connection that is out has its slot in `_out`, one given up nowhere."""

    def _count(self, slot: Slot, use: float) -> None:
        """Count a checkout that ended, wait and use at once. The lock is held.

        Raise `ValueError` if that was counted before, as after a second return.
        """
        if slot not in self._out or not slot.since:
            raise ValueError(f"can't return connection to pool {self.name!r}, it is not out")
        slot.since = 0.0
        metrics = self._metrics
        metrics.ended.append((slot.wait, use))
        if len(metrics.ended) >= metrics.BATCH:
            metrics.count_ended()

    def _place(self, conn: Any, slot: Slot, *, is_fresh: bool) -> None:
        """Hand a connection over or queue it, last in first out. The lock is held."""
        if self._waiting:
            self._out.add(slot)
            self._waiting.popleft().give(conn, is_fresh=is_fresh and self._trusted >= 0.0)
            return
        self._out.discard(slot)
        if not self._closed:
            fresh_until, expires_at = slot.idle_since + self._trusted, slot.expires_at
            # min() would be a call.
            slot.fresh_until = fresh_until if fresh_until < expires_at else expires_at  # noqa: FURB136
            self._pool.append(conn)

    def _add_to_pool(self, conn: Any) -> None:
        conn._pool = None
        with self._lock:
            conn._slot.since = 0.0
            is_orphan = self._closed
            self._place(conn, conn._slot, is_fresh=True)
        if is_orphan:
            self._close_connection(conn)

    def _discard(self, conn: Any, reason: str) -> None:
        """Close a connection that is out; replace it if it is missed."""
        with self._lock:
            self._remove(conn._slot, reason)
            self._refill()
        self._dispose([conn], reason)

    def _retire(
        self, reason: str, condition: Callable[[Slot], bool], most: int | None = None
    ) -> int:
        """Close idle connections for whose slot *condition* holds, coldest first; how many?"""
        gone = self._take_out(reason, condition, most)
        self._dispose(gone, reason)
        return len(gone)

    def _take_out(
        self, reason: str, condition: Callable[[Slot], bool], most: int | None = None
    ) -> list[Any]:
        """Give idle connections up like `_retire`, and leave closing them to the caller."""
        with self._lock:
            gone = [conn for conn in self._pool if condition(conn._slot)][:most]
            for conn in gone:
                self._pool.remove(conn)
                self._remove(conn._slot, reason)
            self._refill()
        return gone

    def _remove(self, slot: Slot, reason: str) -> None:
        """Take a connection out of the books. The lock is held."""
        slot.forget()
        self._out.discard(slot)
        self._nconns -= 1
        metrics = self._metrics
        setattr(metrics, reason, getattr(metrics, reason) + 1)

    def _dispose(self, conns: Sequence[Any], reason: str) -> None:
        for conn in conns:
            self._close_connection(conn)
            if self.listeners.active:
                self.listeners.emit(events.Discarded(self.name, reason))

    def _discard_dead(self, found: Any) -> None:
        """One was *found* dead: give it up, and with it all idle ones whose server is gone."""
        self._discard(found, "dead")
        if lost := hung_up(conn._slot.fd for conn in list(self._pool)):
            gone = self._take_out("dead", lambda slot: slot.fd in lost)
            # A caller is waiting: closing many is not its business.
            self._later(lambda pool: pool._dispose(gone, "dead"))

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
                self._later(partial(Discard._tell_collected, slot=slot))

    def _tell_collected(self, slot: Slot) -> None:
        if self.listeners.active:
            self.listeners.emit(events.Discarded(self.name, "collected"))
        logger.warning(
            "pool %r: a connection was never returned and has been garbage-collected;"
            " it was checked out at %s",
            self.name,
            slot.where(),
        )
