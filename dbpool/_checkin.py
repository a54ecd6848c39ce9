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
from weakref import ref

import psycopg
from psycopg import capabilities
from psycopg.pq import TransactionStatus
from psycopg_pool.abc import CT

from dbpool import _fork, events, holders
from dbpool._books import logger
from dbpool._life import Life
from dbpool._parts import Call, KeptCursor, WatchedAdapters, insist_on_idle, manners
from dbpool._session import reset
from dbpool._supply import NOBODY
from dbpool.errors import describe
from dbpool.holders import Holder, Owner, Slot
from dbpool.liveness import Liveness, check_socket, is_active, ping
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
        slot: Slot | None = getattr(conn, "_slot", None)
        if slot is not None and slot.is_reaped:
            return
        self._check_pool_putconn(conn)
        step = Owner()
        owner = ref(step)
        if slot is not None and slot.since:
            slot.owner = owner  # from here on it is this step that answers for it
        try:
            # Where a tracer wraps connections, what its wrapper holds comes back by `close()`.
            self._release((slot and slot.ref and slot.ref()) or conn)
        except BaseException:
            self._recover(owner)
            raise

    def _release(self, conn: Any, cursor: KeptCursor | None = None) -> None:
        """Pass a healthy connection on to who waits longest, else make it idle.

        A *cursor* to keep says that no code of a user's saw the connection.
        """
        slot: Slot = conn._slot
        now = monotonic()
        use = now - slot.since
        if not (
            conn.pgconn.transaction_status == _IDLE
            and now < slot.expires_at
            and not slot.reported
            and not self._resets
            and self.breaker.error is None  # else connects fail: is this one alive?
            # One tuple comparison covers all that a user may have changed on the connection.
            and (cursor is not None or manners(conn) == slot.manners)
        ):
            self._release_unfit(conn)
            return
        slot.cursor = cursor
        with self._lock:
            if not slot.since:
                self._insist_on_reaped(slot)
                return
            wait = slot.wait
            self._last_seen = slot.idle_since = now
            if self._waiting or self._closed:
                self._place(conn, is_fresh=use < _BRIEF)
            else:  # without a call in between
                slot.since, slot.owner, conn._pool = 0.0, None, None
                self._pool.append(conn)
            ended = self._metrics.finished
            ended += [(wait, use)]
            if len(ended) >= Metrics.BATCH:
                self._metrics.count_finished()
        if self._closing:
            self._close_evicted()
        if self.listeners.active:
            self.listeners.emit(events.CheckedIn(self.name, use))

    def _insist_on_reaped(self, slot: Slot) -> None:
        """Raise `ValueError` for what is returned twice, not for what was taken from its holder."""
        if not slot.is_reaped:
            raise ValueError(f"can't return connection to pool {self.name!r}, it is not out")

    def _release_unfit(self, conn: Any) -> None:
        """Take back a connection that is not as it was set up, or too old: mend it, or give it up.

        With a user's `reset` a worker does that.
        """
        slot: Slot = conn._slot
        slot.cursor = None
        if slot.fd < 0:  # inherited by a fork: its session is the parent's
            self._close_connection(conn)
            return
        step = Owner()
        owner = ref(step)
        task = Call(self, lambda pool: pool._return_connection(conn, from_getconn=False))
        given = ref(task)
        now = monotonic()
        with self._lock:
            if not slot.since:
                self._insist_on_reaped(slot)
                return
            use = now - slot.since
            self._metrics.finished += [(slot.wait, use)]
            slot.since, slot.owner = 0.0, owner
            is_late, slot.reported = slot.reported, False
        try:
            if is_late:
                self._tell_late(slot, use)
            if self.listeners.active:
                self.listeners.emit(events.CheckedIn(self.name, use))
            self._cancel_later(conn)
            if (message := slot.reset_message) and not self._closed:
                self._tidy(conn, lambda conn: reset(conn, message, self.settings.ping_timeout))
            with self._lock:
                if self._reset and not self._closed:  # workers told to stop come to it before that
                    slot.owner = given
                    self._tasks.put(task)
                    return
            self._return_connection(conn, from_getconn=False)
        except BaseException:
            self._recover(owner)
            raise

    def _recover(self, owner: ref[Any]) -> None:
        """Take back what *owner* has or waits for: an exception has ended its step."""
        step = Owner()
        conns = []
        with self._lock:
            for waiter in [waiter for waiter in list(self._waiting) if waiter.owner is owner]:
                with suppress(ValueError):
                    self._waiting.remove(waiter)
            for slot in [slot for slot in list(self._slots) if slot.owner is owner]:
                conn = None if slot.since or slot.ref is None else slot.ref()
                if conn is None:  # it is out: its user's code may still have it
                    self._give_up(slot, "broken")
                else:
                    slot.owner = ref(step)
                    conns.append(conn)
            self._refill()
        self._close_evicted()
        for conn in conns:
            self._return_connection(conn, from_getconn=False)

    def _give_up(self, slot: Slot, reason: str) -> None:
        """Take a connection from who has it. The lock is held."""
        if slot.since:
            self._metrics.finished += [(slot.wait, monotonic() - slot.since)]
        slot.since, slot.is_reaped, slot.owner = 0.0, True, NOBODY
        if conn := slot.ref and slot.ref():
            self._cancel_later(conn)
        self._remove(slot, reason)

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
        cause = f"%d connections returned late, from {where}"
        text = f"a connection reported as held for too long came back after {seconds:.1f} s;"
        text += f" it was checked out at {where}"
        self._warn("returned_late", cause, text, seconds=seconds, where=where)
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
        cause = f"%d returned connections discarded, from {conn._slot.where()}"  # type: ignore[attr-defined]
        self._warn("discarded", cause, f"discarding returned connection: {why}")
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
        elif (seen := self._look(conn)) is Liveness.DEAD:
            self._discard(conn, "dead", by_server=True)
        else:
            slot.idle_since = monotonic()
            if seen is Liveness.ALIVE:
                with self._lock:
                    self._last_seen = slot.idle_since
            self._add_to_pool(conn, is_fresh=seen is Liveness.ALIVE)

    def _look(self, conn: Any) -> Liveness:
        """Look at a connection; where connects fail, silence behind a pooler proves nothing."""
        seen = check_socket(conn, conn._slot.readable)
        is_proof = not self.breaker.is_failing or self.settings.pooler != "transaction"
        if seen is Liveness.ALIVE and not is_proof:
            try:
                ping(conn, self.settings.ping_timeout)
            except psycopg.Error:
                return Liveness.DEAD
        return seen

    def _mend_manners(self, conn: Any, slot: Slot) -> bool:
        """Put back what a user changed; false if that cannot be done."""
        if manners(conn) == slot.manners:
            return True
        if conn._tpc is not None or conn._pipeline is not None or conn._num_transactions:
            logger.warning("discarding connection returned in a two-phase commit or a pipeline")
            return False
        (conn._autocommit, conn.row_factory, conn.cursor_factory, conn.server_cursor_factory,
         conn._isolation_level, conn._read_only, conn._deferrable,
         conn._prepared.prepare_threshold, conn._prepared.prepared_max) = slot.manners[:9]  # fmt: skip
        conn._notice_handlers[:], conn._notify_handlers[:] = slot.manners[11:13]
        conn._adapters = WatchedAdapters(slot.adapters)
        conn._begin_statement = b""
        return True

    def _place(self, conn: Any, *, is_fresh: bool) -> None:
        """Hand a connection over or queue it, last in first out. The lock is held.

        *is_fresh* says that its server spoke just now: who gets it need not look. Of a closed
        pool it is to be closed by `_close_evicted`.
        """
        slot: Slot = conn._slot
        if self._closed:
            slot.since, slot.owner, conn._pool = 0.0, NOBODY, None
            self._closing.append(conn)
            self._slots.discard(slot)
            return
        is_fresh = is_fresh and self._trusted >= 0.0
        while self._waiting:
            waiter = self._waiting[0]
            if waiter.conn is not None or waiter.is_over:  # whoever ended it was interrupted
                del self._waiting[0]
                continue
            slot.since, slot.owner, conn._pool = 0.0, waiter.owner, None  # without a call between
            waiter.conn, waiter.is_fresh = conn, is_fresh
            del self._waiting[0]
            waiter.latch.release()
            return
        slot.since, slot.owner, conn._pool = 0.0, None, None
        self._pool.append(conn)

    def _add_to_pool(self, conn: Any, *, is_fresh: bool = True) -> None:
        with self._lock:
            self._place(conn, is_fresh=is_fresh)
        self._close_evicted()

    def _reclaim(self) -> None:
        """Give up the connections whose owner is gone. The lock is held.

        With `close_returns` those too that their user closed: psycopg returns none whose server
        went away.
        """
        self._lost.clear()
        for slot in list(self._slots):
            answering = slot.owner or slot.ref  # an idle one answers for itself
            if answering is None or answering() is None:
                forgotten = holders.report([slot], monotonic())
                self._metrics.leaks += bool(slot.since)
                self._todo.append(partial(Checkin._tell_collected, forgotten=forgotten))
                self._give_up(slot, "collected")
            elif self.close_returns and slot.since and not slot.is_open:
                self._give_up(slot, "broken")
        if self._closing or self._todo:
            self._wake()
        self._refill()

    def _tell_collected(self, forgotten: Sequence[Holder]) -> None:
        for holder in forgotten:
            if self.listeners.active:
                self.listeners.emit(events.Leaked(self.name, holder))
            with _fork.telling:
                cause = f"%d connections forgotten, from {holder.where}"
                text = "a connection was never returned and has been garbage-collected; it was"
                text += f" checked out at {holder.where}"
                self._warn("leaked", cause, text, holder=asdict(holder))
