"""How connections are made: growth, attempts, and the probe of an outage.

The pool is built in layers: `_books`, `_supply`, `_life`, `_discard`, `_checkin`, `_checkout`,
`_upkeep`, `_run`. Together they are the one place that touches protected members of
psycopg_pool and of psycopg; `tests/test_seam.py` fails when those change.
"""

from __future__ import annotations

from time import monotonic
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus
from psycopg_pool.abc import CT
from psycopg_pool.pool import AddConnection

from dbpool import _fork, events
from dbpool._books import Books, logger, unanswered
from dbpool._conninfo import mask
from dbpool._parts import Call, Probe, manners
from dbpool.errors import classify, detached, is_permanent
from dbpool.holders import Slot
from dbpool.liveness import readability

_LOOK_FOR_CHANGE = 1.0  # seconds between two looks at a conninfo that was refused
_LOOK_AGAIN = 0.1  # seconds at least between two looks at an attempt without an answer


class Supply(Books[CT]):
    """The making of connections: up to min_size, for those who wait, and after an outage."""

    def _refill(self) -> None:
        """Begin what is missing: up to min_size, then one at a time for those who wait.

        The lock is held.
        """
        if self._closed or self._probe is not None or self.breaker.is_open:
            return
        missing = max(0, self._min_size - self._nconns)
        if self._waiting and not self._connecting and self._nconns < self._max_size:
            missing = max(1, missing)
        for _ in range(missing):
            self._nconns += 1
            self._connecting += 1
            self.run_task(AddConnection(self))

    def _add_connection(self, attempt: Any, growing: bool = False) -> None:
        """Make one attempt; a worker calls it. *attempt* is a `Probe` if it is a repeated one."""
        if self._is_needless(attempt) or (attempt is not None and self._put_off(attempt)):
            return
        started = monotonic()
        params: dict[str, Any] = {}
        self._attempt_begins(started)
        try:
            params = self._params()
            conn = self._make(params)
        except BaseException as ex:  # noqa: BLE001  # whatever it is, the slot must not be lost
            self._attempt_failed(ex, started, params, attempt)
        else:
            self._attempt_succeeded(conn, started)

    def _is_needless(self, probe: Probe | None) -> bool:
        """Give the slot up if nobody needs it any more, or if another tries in an outage."""
        with self._lock:
            if probe is not None:
                needed = self._nconns <= self._min_size or self._waiting or self.breaker.is_open
            else:  # it may have queued for a worker while others failed
                needed = self._probe is None and not (self.breaker.is_open and self._attempts)
            # In an outage the probe stays, however small the pool has been made.
            if not needed or (self._nconns > self._max_size and not self.breaker.is_open):
                self._drop_slot(probe)
                return True
            return False

    def _put_off(self, probe: Probe) -> bool:
        """Whether it is too early for that probe."""
        early = probe.due - monotonic()
        if early <= 0 or (probe.watching and self._params_now() != probe.params):
            return False
        self._schedule(probe)
        return True

    def _schedule(self, probe: Probe) -> None:
        delay = max(0.0, probe.due - monotonic())
        if probe.watching:
            delay = min(delay, _LOOK_FOR_CHANGE)
        self.schedule_task(AddConnection(self, probe), delay)  # type: ignore[arg-type]

    def _drop_slot(self, probe: Probe | None) -> None:
        """Give a slot up whose connection was not made. The lock is held."""
        self._nconns -= 1
        self._connecting -= 1
        if probe is not None and self._probe is probe:
            self._probe = None
            self.breaker.reset()

    def _attempt_begins(self, started: float) -> None:
        with self._lock:
            self._attempts.append(started)
            self.breaker.attempt()
        self._await_answer(started, self.breaker.patience)

    def _await_answer(self, started: float, delay: float) -> None:
        self.schedule_task(Call(self, lambda pool: pool._attempt_overdue(started)), delay)

    def _resolve_conninfo(self) -> str:
        return super()._resolve_conninfo() or self.settings.resolve()

    def _params(self) -> dict[str, Any]:
        return self.settings.connect_params(self._resolve_conninfo(), self._resolve_kwargs())

    def _params_now(self) -> dict[str, Any]:
        """The parameters of an attempt made now, {} if they cannot be had."""
        try:
            return self._params()
        except Exception:  # noqa: BLE001  # a user's callback may raise anything
            return {}

    def _connect(self, timeout: float | None = None) -> CT:
        return self._make(self._params())

    def _make(self, params: dict[str, Any]) -> CT:
        """Connect and configure; close again what cannot be configured."""
        conn = self.connection_class.connect("", **params)  # as the parent does: by position
        try:
            self._furnish(conn, params)
        except BaseException:
            self._close_connection(conn)
            raise
        return conn

    def _furnish(self, conn: Any, params: dict[str, Any]) -> None:
        conn._pool = self
        if self._configure:
            self._configure(conn)
            if (status := conn.pgconn.transaction_status) != TransactionStatus.IDLE:
                raise psycopg.ProgrammingError(
                    f"connection left in status {TransactionStatus(status).name}"
                    f" by configure function {self._configure}: discarded"
                )
        self._set_connection_expiry_date(conn)
        slot = Slot(conn, readability(conn.fileno()), manners(conn), self._lost.append)
        slot.read_write = params.get("target_session_attrs") in {"read-write", "primary"}
        slot.expires_at = conn._expire_at
        slot.idle_since = conn._created_at
        conn._slot = slot

    def _attempt_succeeded(self, conn: CT, started: float) -> None:
        now = monotonic()
        with self._lock:
            self._attempts.remove(started)
            self._connecting -= 1
            self._probe = None
            self._outage_told = False
            outage = self.breaker.succeeded()
            self._metrics.connects += 1
            self._metrics.connect.add(now - started)
            self._last_seen = now
            if self._nconns > self._max_size:  # it was made smaller meanwhile
                conn._slot.expires_at = 0.0  # type: ignore[attr-defined]
        self._add_to_pool(conn)
        with self._lock:
            self._refill()
            self._changed.notify_all()
        with _fork.telling:
            if outage is not None:
                self._tell_back(outage)
            if self.listeners.active:
                self.listeners.emit(events.Connected(self.name, now - started))

    def _attempt_failed(
        self, ex: BaseException, started: float, params: dict[str, Any], probe: Probe | None
    ) -> None:
        kind, error = classify(ex), self._masked(ex, params)
        volatile = self._params_now() != params if is_permanent(kind) else True
        with self._lock:
            self._attempts.remove(started)
            self._metrics.connect_failures += 1
            if self._closed:
                return
            opened = self.breaker.failed(
                started, error, kind, last_seen=self._last_seen, out=self._active()
            )
            if self._probe not in (None, probe):
                self._drop_slot(None)
            else:
                self._probe = probe = probe or Probe(params)
                probe.params, probe.watching = params, not volatile
                probe.postpone(kind)
                self.breaker.retry_at = probe.due
                self._schedule(probe)
            if opened:
                self._fail_waiters()
            lasts = self.breaker.failing_for >= self.reconnect_timeout and not self._outage_told
            self._outage_told |= lasts
            self._changed.notify_all()
        logger.debug("pool %r: connecting failed (%s): %s", self.name, kind, error)
        with _fork.telling:
            self._tell_failed(monotonic() - started, opened)
        if lasts:
            self.reconnect_failed()

    def _masked(self, ex: BaseException, params: dict[str, Any]) -> BaseException:
        error = detached(ex)
        secrets = [str(params[key]) for key in ("password", "sslpassword") if params.get(key)]
        if isinstance(error, psycopg.Error):
            error.args = (mask(str(error), secrets),)
        return error

    def _attempt_overdue(self, started: float) -> None:
        with self._lock:
            if started not in self._attempts or self._closed:
                return
            error = unanswered(monotonic() - started)
            opened = self.breaker.overdue(started, error, last_seen=self._last_seen)
            if opened:
                self._fail_waiters()
                self._changed.notify_all()
            due = max(started, self._last_seen) + self.breaker.patience
            self._await_answer(started, max(due - monotonic(), _LOOK_AGAIN))
        if opened:
            with _fork.telling:
                self._tell_down()
