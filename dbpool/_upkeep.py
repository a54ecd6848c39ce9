"""What keeps a pool in shape: patrols, draining, checking, resizing.

Part of the one place that touches protected members of psycopg_pool, see `_supply`.
"""

from __future__ import annotations

from dataclasses import asdict
from time import monotonic
from typing import Any
from weakref import ref

from psycopg_pool._acompat import Queue
from psycopg_pool.abc import CT
from psycopg_pool.pool import MaintenanceTask

from dbpool import _fork, events, holders
from dbpool._books import logger
from dbpool._checkout import Checkout
from dbpool._parts import Call
from dbpool.holders import Owner, Slot

# A primary that moved may make many statements fail at once; one drain is enough. And how long it
# is between two looks for a standby that is preferred.
_MOVED_PAUSE = 5.0

_PATROL = 0.5  # seconds between two patrols at most: twice that heals what was interrupted


class Upkeep(Checkout[CT]):
    """The rest of a pool's life, away from the hot path."""

    # Threads

    @classmethod
    def worker(cls, q: Queue[MaintenanceTask]) -> None:
        """Run maintenance tasks from *q* until told to stop, whatever a user's callback raises."""
        while True:
            try:
                return super().worker(q)
            except BaseException as ex:  # noqa: BLE001  # SystemExit of a callback, say
                logger.warning("a maintenance task failed: %s", type(ex).__name__)

    # Patrols

    @property
    def patrol_every(self) -> float:
        """Seconds between two patrols of the watchdog."""
        return min(_PATROL, self.settings.leak_after / 4.0 or _PATROL)

    def heal(self) -> None:
        """End what an exception kept a caller's thread from: the books are right afterwards.

        Does nothing that is not due.
        """
        with self._lock:
            if not self._opened:  # its opening was given up
                return
            if self._closed:
                self._stop()
                self.listeners.close()
                holders.unwatch(self)
            elif not any(thread.is_alive() for thread in self._workers):
                self._start_workers()
            self._reclaim()
            self._resume_attempts()
            if (now := monotonic()) >= self._heeded_at + 1.0:  # a healthy return may close it
                self._heeded_at = now
                self._heed_life()
            if self.breaker.is_open and self._waiting:
                self._refuse_as_unavailable()
            self._trim()
        self._catch_up()

    def patrol(self, now: float) -> None:
        """Free what was collected, retire what is old, report what is held for too long."""
        self._send_cancels()
        with _fork.telling:
            self._end_episodes()
            self.heal()
            self._shrink_pool()
            self._seek_standby(now)
            if self.settings.leak_after:
                self._report_held_long(now)

    def _report_held_long(self, now: float) -> None:
        oldest = now - self.settings.leak_after
        with self._lock:
            late = [s for s in self._slots if 0.0 < s.since <= oldest and not s.reported]
            for slot in late:
                slot.reported = True
            self._metrics.held_long += len(late)
            # Described in here: afterwards one may be back and with another.
            held = [(slot.who, holder) for slot in late for holder in holders.report([slot], now)]
        if self.listeners.active:
            for who, holder in held:
                stack = holders.stack_of(who.thread) if who else ""
                self.listeners.emit(events.HeldLong(self.name, holder, stack))
        held.sort(key=lambda each: each[1].seconds)
        for where, (who, longest) in {holder.where: (who, holder) for who, holder in held}.items():
            number = sum(holder.where == where for _, holder in held)
            cause = (
                f"%d connections held for more than {self.settings.leak_after:g} s, from {where}"
            )
            more = f" and {number - 1} more" if number > 1 else ""
            text = (
                f"a connection has been held for {longest.seconds:.1f} s by {longest.thread}{more},"
            )
            text += (
                f" checked out at {where}; now at {holders.frames_of(who.thread) if who else '?'}"
            )
            self._warn("held_long", cause, text, number, holder=asdict(longest))

    def _shrink_pool(self) -> None:
        """Close what has been idle for max_idle beyond min_size, or is past its lifetime."""
        now = monotonic()
        idle_before = now - self.max_idle
        spare = self._nconns - self._min_size
        if spare > 0:
            self._retire("idle", lambda slot: slot.idle_since <= idle_before, spare)
        if not self.breaker.is_failing:
            self._retire("expired", lambda slot: slot.expires_at <= now)

    def _ask_again(self) -> None:
        """Ask for the server's timeouts again, and replace connections if they have changed."""
        if self._closed or self.breaker.is_failing:
            return
        try:
            has_changed = self._timeouts.ask_again(self._connect_to, self._params())
        except Exception as ex:  # noqa: BLE001  # whatever it is, the next connect asks again
            self._timeouts.troubles = -1
            logger.debug("pool %r: asking for timeouts failed: %s", self.name, type(ex).__name__)
            return
        if has_changed:
            logger.info("pool %r: the server's timeouts have changed", self.name)
            self.drain()

    # Draining, checking, resizing

    def drain(self) -> None:
        """Replace all connections: the idle ones now, those that are out when they return."""
        with self._lock:
            for slot in list(self._slots):
                slot.expires_at = 0.0
        self._retire("expired", lambda slot: not slot.expires_at)

    def _on_primary(self) -> list[Slot]:
        """Connections that would rather be to a standby. The lock is held."""
        # What an idle one says now may be read, of those that are out what they said at first.
        slots = [slot for slot in self._slots if slot.prefers_standby]
        idle = {c._slot: c.pgconn.parameter_status(b"in_hot_standby") for c in self._pool if slots}
        return [slot for slot in slots if idle.get(slot, slot.standby) == b"off"]

    def _seek_standby(self, now: float) -> None:
        """Have a worker look now and then whether a standby is back, while the primary serves."""
        with self._lock:
            is_due = now >= self._standby_due and not (self._closed or self.breaker.is_failing)
            if is_due and self._on_primary():
                self._standby_due = now + _MOVED_PAUSE
                self.run_task(Call(self, Upkeep._return_to_standby))

    def _return_to_standby(self) -> None:
        """Replace the connections to a primary if a new one would be to a standby."""
        try:
            conn = self._connect_to(self._params())
        except Exception:  # noqa: BLE001  # whatever it is, the connections in use are better
            return
        standby = conn.pgconn.parameter_status(b"in_hot_standby")
        conn.close()
        if standby == b"on":
            with self._lock:
                slots = self._on_primary()
                for slot in slots:
                    slot.expires_at = 0.0
            logger.info("pool %r: a standby is back, replacing %d connections to the primary",
                        self.name, len(slots), extra=self._extra("standby_back"))  # fmt: skip
            self._retire("expired", lambda slot: not slot.expires_at)

    def _moved(self, conn: Any) -> None:
        """A statement failed because the server takes no writes: drain if that is news.

        It is news where the conninfo asked for a server that can write, and the transaction was
        not to read alone, or where the server itself says that its role changed.
        """
        slot: Slot = conn._slot
        standby = conn.pgconn.parameter_status(b"in_hot_standby")
        is_news = standby != slot.standby or (slot.read_write and not conn.read_only)
        if is_news and (now := monotonic()) >= self._moved_at + _MOVED_PAUSE:
            self._moved_at = now
            logger.warning(
                "pool %r: the primary has moved, replacing connections",
                self.name,
                extra=self._extra("moved"),
            )
            self.drain()

    def check(self) -> None:
        """Ping every idle connection, within ping_timeout each; replace those that fail.

        Once a ping has timed out, the others that have been idle for long go with it.
        """
        answered: set[Slot] = set()
        step = Owner()
        owner = ref(step)
        try:
            for conn in list(self._pool):
                with self._lock:
                    if conn not in self._pool:  # lent meanwhile, or gone
                        continue
                    conn._slot.owner = owner
                    self._pool.remove(conn)
                if self._answers(conn, self.settings.ping_timeout, answered):
                    answered.add(conn._slot)
                    self._add_to_pool(conn)
        except BaseException:
            self._recover(owner)
            raise

    def resize(self, min_size: int, max_size: int | None = None) -> None:
        """Change the size; what is too many goes at once if idle, else when it returns."""
        min_size, max_size = self._check_size(min_size, max_size)
        with self._lock:
            self._min_size, self._max_size = min_size, max_size
            self._trim()
            self._refill()
        self._close_evicted()

    def _trim(self) -> None:
        """Give up what is beyond max_size: at once if idle, else when it returns.

        The lock is held.
        """
        excess = len(self._slots) - self._max_size
        if excess > 0:
            excess -= self._take_out("idle", lambda slot: True, excess)
            out = [slot for slot in list(self._slots) if slot.owner is not None]
            for slot in sorted(out, key=lambda slot: slot.expires_at)[:excess]:
                slot.expires_at = 0.0
