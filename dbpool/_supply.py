"""How connections are made and given up: growth, attempts, the probe of an outage.

The pool is built in layers: `_books`, `_supply`, `_life`, `_checkin`, `_checkout`, `_upkeep`,
`_run`, `pool`. Together, and with `_parts`, they are the one place that touches protected members
of psycopg_pool and of psycopg; `tests/test_seam.py` fails when those change.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from time import monotonic
from typing import Any, Final, get_origin
from weakref import ref

import psycopg
from psycopg import Connection, Cursor
from psycopg_pool.abc import CT
from psycopg_pool.pool import AddConnection

from dbpool import _fork, errors, events
from dbpool._books import REPLACED, Books, logger, unanswered
from dbpool._parts import BLOCKS, Attempt, Call, insist_on_idle, is_stock, new_slot
from dbpool._secrets import conceal, conceal_params, secrets_of
from dbpool._session import reset_message
from dbpool.holders import Owner, Slot
from dbpool.liveness import PingTimeout, closed_by_peer, file_limit_error, ping
from dbpool.settings._conninfo import already_set

_LOOK_FOR_CHANGE = 1.0  # seconds between two looks at a conninfo that was refused
_NAMES_A_DATABASE = {"host", "hostaddr", "port", "dbname", "service", "DATABASE_URL"}
_LOOK_AGAIN = 0.1  # seconds at least between two looks at an attempt without an answer
_LATE = 0.2  # seconds after which an attempt that no worker has begun may have been lost

# An owner that is gone: what it has is given up, see `heal`.
NOBODY: Final = ref(Owner())


class Supply(Books[CT]):
    """The making of connections: up to min_size, for those who wait, and after an outage.

    And their giving up.
    """

    # Making

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
            attempt = Attempt()
            self._connects.add(attempt)
            self._enqueue(attempt)

    def _enqueue(self, attempt: Attempt) -> None:
        """Have a worker make that attempt; twice does no harm."""
        self.run_task(AddConnection(self, attempt))  # type: ignore[arg-type]

    def _add_connection(self, attempt: Any, growing: bool = False) -> None:
        """Make one attempt; a worker calls it."""
        if self._is_needless(attempt) or self._put_off(attempt):
            return
        started = monotonic()
        params: dict[str, Any] = {}
        secrets: set[str] = set()
        self._attempt_begins(attempt, started)
        try:
            params = self._params()
            conn = self._make(params, secrets, started)
        except BaseException as ex:  # noqa: BLE001  # whatever it is, the slot must not be lost
            secrets |= secrets_of(already_set(params, os.environ), getattr(ex, "pgconn", None))
            kind, error = errors.classify(ex), _advised(errors.sanitize(ex, secrets), params)
            # libpq and psycopg give no reason then, or another.
            if "FATAL" not in str(error) and (lack := file_limit_error()):
                kind, error = (
                    errors.FailureKind.DESCRIPTORS,
                    psycopg.OperationalError(f"{error}: {lack}"),
                )
        else:
            self._attempt_succeeded(conn, attempt)
            return
        # Out here, where no traceback leads to what the error says and to where it was raised.
        self._attempt_failed(kind, error, params, attempt)

    def _is_needless(self, attempt: Attempt) -> bool:
        """Give the place up if nobody needs it any more, or if another tries in an outage."""
        with self._lock:
            if attempt not in self._connects or attempt.started:  # another worker was quicker
                return True
            if attempt.is_retry:
                # While nothing is there at all, who comes next is to be told at once.
                is_alone = self._nconns == self._connecting
                is_missed = self._nconns <= self._min_size or bool(self._waiting)
                needed = is_alone or is_missed or self.breaker.is_open
            else:  # it may have queued for a worker while others failed
                needed = self._probe is None and not (self.breaker.is_open and self._attempts)
            # In an outage the probe stays, however small the pool has been made.
            if not needed or (self._nconns > self._max_size and not self.breaker.is_open):
                self._drop_place(attempt)
                return True
            return False

    def _put_off(self, probe: Attempt) -> bool:
        """Whether it is too early for that probe."""
        early = probe.due - monotonic()
        if early <= 0 or (probe.watching and self._params_now() != probe.params):
            return False
        self._schedule(probe)
        return True

    def _schedule(self, probe: Attempt) -> None:
        delay = max(0.0, probe.due - monotonic())
        if probe.watching:
            delay = min(delay, _LOOK_FOR_CHANGE)
        self.schedule_task(AddConnection(self, probe), delay)  # type: ignore[arg-type]

    def _drop_place(self, attempt: Attempt) -> None:
        """Give a place up whose connection was not made. The lock is held."""
        self._connects.discard(attempt)
        if self._probe is attempt:
            self._probe = None
            self.breaker.reset()

    def _attempt_begins(self, attempt: Attempt, started: float) -> None:
        with self._lock:
            attempt.started = started
            self.breaker.attempt()
        self._await_answer(attempt, started, self.breaker.patience)

    def _await_answer(self, attempt: Attempt, started: float, delay: float) -> None:
        self.schedule_task(Call(self, lambda pool: pool._attempt_overdue(attempt, started)), delay)

    def _resume_attempts(self) -> None:
        """Enqueue the attempts that an exception kept from it. The lock is held."""
        late = monotonic() - _LATE
        for attempt in list(self._connects):
            if not attempt.started and attempt.due < late and self._tasks.empty():
                self._enqueue(attempt)

    def _resolve_conninfo(self) -> str:
        found: str = conceal(super()._resolve_conninfo() or self.settings.resolve())
        return found

    def _resolve_kwargs(self) -> dict[str, Any]:
        return conceal_params(super()._resolve_kwargs())

    def _params(self) -> dict[str, Any]:
        return self.settings.connect_params(
            self._resolve_conninfo(), self._resolve_kwargs(), defaults=False
        )

    def _params_now(self) -> dict[str, Any]:
        """The parameters of an attempt made now, {} if they cannot be had."""
        try:
            return self._params()
        except BaseException:  # noqa: BLE001  # a user's callback may raise anything
            return {}

    def _make(self, params: dict[str, Any], secrets: set[str], started: float) -> CT:
        """Connect and configure; close again what cannot be configured.

        The *secrets* that it was made with are added then.
        """
        conn: Any = self._timeouts.connect(self._connect_to, params, self._warn_once)
        try:
            known = already_set(params, os.environ)
            if self.settings.pooler == "transaction":  # which answers the login itself
                patience = float(known["connect_timeout"]) or self.settings.connect_timeout
                self._ping_server(conn, patience, started)
            self._furnish(conn)
            # psycopg tries twice then, and never tells libpq of the preference.
            conn._slot.prefers_standby = known.get("target_session_attrs") == "prefer-standby"
        except BaseException:
            secrets |= secrets_of(params, conn.pgconn)
            self._close_connection(conn)
            raise
        return conn  # type: ignore[no-any-return]

    def _ping_server(self, conn: CT, timeout: float, started: float) -> None:
        """Make one round trip to the server behind a pooler; without an answer it is saturated."""
        self._pinging.add(started)
        try:
            ping(conn, timeout)
        except PingTimeout:
            text = f"the pooler gave no server connection within {timeout:g} s"
            raise psycopg.OperationalError(text) from None
        finally:
            self._pinging.discard(started)

    def _lost_server(self, ex: BaseException | None) -> errors.DatabaseUnavailable | None:
        """What to raise for *ex* if a pooler says by it that it reaches no server.

        Then no idle connection does: they are replaced, which each new connection's ping decides.
        """
        if self.settings.pooler != "transaction" or "login has been failing" not in str(ex):
            return None
        self._retire("dead", lambda slot: True)
        with self._lock:
            return self._unavailable(cause=ex)

    def _connect_to(self, params: dict[str, Any]) -> CT:
        cls: Any = self.connection_class
        if self._cursors is not Cursor and (get_origin(cls) or cls) is Connection:
            params = {"cursor_factory": self._cursors, **params}  # a tracer builds upon it
        conn: CT = cls.connect("", **params)  # as the parent does: by position
        return conn

    def _furnish(self, conn: Any) -> None:
        conn._pool = self
        # A class with its own idea of how a block begins or ends is always asked for it. Judged
        # from the connection: the class may be a generic, or stand behind a tracer's wrapper.
        has_stock_class = is_stock(conn.__class__, *BLOCKS)
        if has_stock_class and conn.cursor_factory is Cursor:
            conn.cursor_factory = self._cursors
        if self._configure:
            self._configure(conn)
            insist_on_idle(conn, "configure")
        message = b""
        if self.settings.session_reset == "session":
            message = reset_message(conn, float(self.settings.connect_timeout))
        self._set_connection_expiry_date(conn)
        slot = new_slot(conn, self._cursors)
        slot.reset_message, slot.has_stock_class = message, has_stock_class
        if self._cursors is not Cursor and not issubclass(conn.cursor_factory, self._cursors):
            self._warn_once(
                "pipeline_begin has no effect: the connections have cursors of their own"
            )
        slot.watch(conn, self._lost.append)
        conn._slot = slot

    def _attempt_succeeded(self, conn: CT, attempt: Attempt) -> None:
        now = monotonic()
        seconds = now - attempt.started
        with self._lock:
            self._slots.add(conn._slot)  # type: ignore[attr-defined]
            self._connects.discard(attempt)
            self._probe = None
            self._outage_told = False
            outage = self.breaker.succeeded()
            if outage is not None and self._silent_since >= self._last_seen:
                outage = max(outage, now - self._silent_since)
            self._metrics.connects += 1
            self._metrics.connect.add(seconds)
            self._last_seen = now
            troubles = self._metrics.dead + self._metrics.connect_failures
            if self._nconns > self._max_size:  # it was made smaller meanwhile
                conn._slot.expires_at = 0.0  # type: ignore[attr-defined]
        self._add_to_pool(conn)
        with self._lock:
            self._refill()
        if outage is not None:
            self._tell_back(outage)
        if self._timeouts.is_due(self.max_lifetime, troubles):
            self.run_task(Call(self, lambda pool: pool._ask_again()))
        if self.listeners.active:
            self.listeners.emit(events.Connected(self.name, seconds))

    def _attempt_failed(
        self, kind: str, error: BaseException, params: Any, attempt: Attempt
    ) -> None:
        is_lasting = errors.is_permanent(kind) and self._params_now() == params
        self._discard_closed()  # what is idle keeps the breaker closed, if it is alive
        with self._lock:
            started, attempt.started = attempt.started, 0.0
            self._metrics.connect_failures += 1
            if self._closed:
                return
            self.breaker.failed(started, error, kind, last_seen=self._last_seen)
            failed = events.ConnectFailed(
                self.name, monotonic() - started, self.breaker.last_error or "", kind
            )
            self._try_again(attempt, params, kind, is_lasting=is_lasting)
            self._judge()
            lasts = self.breaker.failing_for >= self.reconnect_timeout and not self._outage_told
            self._outage_told |= lasts
        logger.debug("pool %r: connecting failed (%s): %s", self.name, kind, failed.error)
        is_lasting = kind == errors.SATURATED or errors.is_permanent(kind)
        # Where none exists the breaker tells of it, once it opens.
        if is_lasting and not self.breaker.is_open and (exist := len(self._slots)):
            text = f"no new connection ({kind}): {failed.error}; {exist} of at most"
            text += f" {self._max_size} exist, {len(self._waiting)} waiting"
            with _fork.telling:
                self._warn("connect_failed", f"%d failed connects ({kind})", text, kind=kind)
        if self.listeners.active:
            self.listeners.emit(failed)
        self._catch_up()
        if lasts:
            self.reconnect_failed()

    def _try_again(
        self, attempt: Attempt, params: dict[str, Any], kind: str, *, is_lasting: bool
    ) -> None:
        """Have *attempt* try again later, unless another does. The lock is held."""
        if self._probe not in (None, attempt):
            self._drop_place(attempt)
            return
        self._probe = attempt
        attempt.params, attempt.watching, attempt.is_retry = params, is_lasting, True
        attempt.postpone(kind)
        self.breaker.retry_at = attempt.due
        self._schedule(attempt)

    def _attempt_overdue(self, attempt: Attempt, started: float) -> None:
        with self._lock:
            if attempt not in self._connects or attempt.started != started or self._closed:
                return
            error = unanswered(monotonic() - started)
            kind = errors.SATURATED if started in self._pinging else "timeout"
            self.breaker.overdue(started, error, kind, last_seen=self._last_seen)
            self._judge()
            due = max(started, self._last_seen) + self.breaker.patience
            self._await_answer(attempt, started, max(due - monotonic(), _LOOK_AGAIN))
        self._catch_up()

    # Giving up

    def _discard(self, conn: Any, reason: str, *, by_server: bool = False) -> None:
        """Close a connection that is out; replace it if it is missed."""
        with self._lock:
            self._remove(conn._slot, reason)
            self._refill()
        if by_server:
            self._count(REPLACED, 1)
        self._close_evicted()

    def _retire(
        self, reason: str, condition: Callable[[Slot], bool], most: int | None = None
    ) -> None:
        """Close idle connections for whose slot *condition* holds, coldest first."""
        self._take_out(reason, condition, most)
        self._close_evicted()

    def _take_out(
        self, reason: str, condition: Callable[[Slot], bool], most: int | None = None
    ) -> int:
        """Give idle connections up like `_retire`, and leave closing them to the caller."""
        with self._lock:
            gone = [conn for conn in self._pool if condition(conn._slot)][:most]
            for conn in gone:
                conn._slot.owner = NOBODY  # should this be interrupted
                self._pool.remove(conn)
                self._remove(conn._slot, reason)
            self._refill()
        return len(gone)

    def _remove(self, slot: Slot, reason: str) -> None:
        """Forget a connection; `_close_evicted` closes it. The lock is held."""
        conn = None if slot.ref is None else slot.ref()
        if conn is not None:
            self._closing.append(conn)
        self._slots.discard(slot)
        slot.ref = slot.owner = None  # its collection means nothing any more
        metrics = self._metrics
        setattr(metrics, reason, getattr(metrics, reason) + 1)
        if self.listeners.active:
            self.listeners.emit(events.Discarded(self.name, reason))

    def _discard_closed(self) -> None:
        """Give up all idle ones whose server is gone."""
        if lost := closed_by_peer(conn._slot.fd for conn in list(self._pool)):
            self._count(REPLACED, self._take_out("dead", lambda slot: slot.fd in lost))
            self._wake()  # somebody may be waiting: closing many is not their business


def _advised(error: BaseException, params: dict[str, Any]) -> BaseException:
    """Add what to do about it to an error's text, where that is known."""
    known = {**already_set(params, os.environ), **os.environ}
    if errors.UNSUPPORTED_PARAMETER in errors.describe(error):
        advice = "a transaction pooler needs DBPOOL_POOLER=transaction"
    elif params and not known.keys() & _NAMES_A_DATABASE:
        advice = "DATABASE_URL is not set: libpq's defaults are used"
    else:
        return error
    if isinstance(error, psycopg.Error):
        error.args = (f"{error}; {advice}",)
    return error
