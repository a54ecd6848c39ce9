"""How connections are made and given up: growth, attempts, the probe of an outage.

The pool is built in layers: `_books`, `_supply`, `_life`, `_checkin`, `_checkout`, `_upkeep`,
`_run`, `pool`. Together, and with `_parts`, they are the one place that touches protected members
of psycopg_pool and of psycopg; `tests/test_seam.py` fails when those change.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, get_origin

import psycopg
from psycopg import Connection, Cursor
from psycopg_pool.abc import CT
from psycopg_pool.pool import AddConnection

from dbpool import _fork, events
from dbpool._books import REPLACED, Books, logger, unanswered
from dbpool._conninfo import already_set
from dbpool._parts import BLOCKS, Call, Probe, insist_on_idle, is_stock, remember
from dbpool._secrets import conceal, conceal_params, secrets_of
from dbpool._session import reset_message
from dbpool.errors import (
    LOGIN_FAILING,
    SATURATED,
    UNSUPPORTED,
    DatabaseUnavailable,
    classify,
    detached,
    is_permanent,
)  # fmt: skip
from dbpool.holders import Slot
from dbpool.liveness import (
    PingTimeout,
    hung_up,
    lack_of_descriptors,
    ping,
    readability,
)

_LOOK_FOR_CHANGE = 1.0  # seconds between two looks at a conninfo that was refused
_NAMES_A_DATABASE = {"host", "hostaddr", "port", "dbname", "service", "DATABASE_URL"}
_LOOK_AGAIN = 0.1  # seconds at least between two looks at an attempt without an answer


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
            self._nconns += 1
            self._connecting += 1
            self.run_task(AddConnection(self))

    def _add_connection(self, attempt: Any, growing: bool = False) -> None:
        """Make one attempt; a worker calls it. *attempt* is a `Probe` if it is a repeated one."""
        if self._is_needless(attempt) or (attempt is not None and self._put_off(attempt)):
            return
        started = monotonic()
        params: dict[str, Any] = {}
        secrets: set[str] = set()
        self._attempt_begins(started)
        try:
            params = self._params()
            conn = self._make(params, secrets, started)
        except BaseException as ex:  # noqa: BLE001  # whatever it is, the slot must not be lost
            secrets |= secrets_of(already_set(params, os.environ), getattr(ex, "pgconn", None))
            kind, error = classify(ex), _advised(detached(ex, secrets), params)
            # libpq and psycopg give no reason then, or another.
            if "FATAL" not in str(error) and (lack := lack_of_descriptors()):
                kind, error = "descriptors", psycopg.OperationalError(f"{error}: {lack}")
        else:
            self._attempt_succeeded(conn, started)
            return
        # Out here, where no traceback leads to what the error says and to where it was raised.
        self._attempt_failed(kind, error, started, params, attempt)

    def _is_needless(self, probe: Probe | None) -> bool:
        """Give the slot up if nobody needs it any more, or if another tries in an outage."""
        with self._lock:
            if probe is not None:
                # While nothing is there at all, who comes next is to be told at once.
                is_alone = self._nconns == self._connecting
                is_missed = self._nconns <= self._min_size or bool(self._waiting)
                needed = is_alone or is_missed or self.breaker.is_open
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
        found: str = conceal(super()._resolve_conninfo() or self.settings.resolve())
        return found

    def _resolve_kwargs(self) -> dict[str, Any]:
        return conceal_params(super()._resolve_kwargs())

    def _params(self) -> dict[str, Any]:
        return self.settings.connect_params(self._resolve_conninfo(), self._resolve_kwargs())

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
        cls: Any = self.connection_class
        if self._cursors is not Cursor and (get_origin(cls) or cls) is Connection:
            params = {"cursor_factory": self._cursors, **params}  # a tracer builds upon it
        conn: CT = cls.connect("", **params)  # as the parent does: by position
        try:
            if self.settings.pooler == "transaction":  # which answers the login itself
                self._ping_server(conn, float(params["connect_timeout"]), started)
            self._furnish(conn)
        except BaseException:
            secrets |= secrets_of(params, conn.pgconn)
            self._close_connection(conn)
            raise
        return conn

    def _ping_server(self, conn: CT, timeout: float, started: float) -> None:
        """Make one round trip to the server behind a pooler; without an answer it is saturated."""
        with self._lock:
            self._pinging.add(started)
        try:
            ping(conn, timeout)
        except PingTimeout:
            text = f"the pooler gave no server connection within {timeout:g} s"
            raise psycopg.OperationalError(text) from None
        finally:
            with self._lock:
                self._pinging.discard(started)

    def _unavailable_behind_pooler(self, ex: BaseException | None) -> DatabaseUnavailable | None:
        """What to raise for *ex* if a pooler says by it that it reaches no server.

        Then no idle connection does: they are replaced, which each new connection's ping decides.
        """
        if self.settings.pooler != "transaction" or LOGIN_FAILING not in str(ex):
            return None
        self._retire("dead", lambda slot: True)
        with self._lock:
            return self._unavailable(cause=ex)

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
        standby = conn.pgconn.parameter_status(b"in_hot_standby")
        slot = Slot(conn.fileno(), standby, readability(conn.fileno()), *remember(conn))
        slot.reset_message, slot.has_stock_class = message, has_stock_class
        slot.has_stock_blocks = is_stock(type(conn), *BLOCKS)
        has_stock_cursor = conn.cursor_factory is self._cursors
        slot.has_stock_cursors = has_stock_cursor and is_stock(type(conn), "cursor")
        if self._cursors is not Cursor and not issubclass(conn.cursor_factory, self._cursors):
            self._warn_once(
                "pipeline_begin has no effect: the connections have cursors of their own"
            )
        slot.watch(conn, self._lost.append)
        # As libpq understood it: it may be set by a service file or PGTARGETSESSIONATTRS.
        options = {option.keyword: option.val for option in conn.pgconn.info}
        slot.read_write = options.get(b"target_session_attrs") in {b"read-write", b"primary"}
        slot.expires_at = conn._expire_at
        slot.idle_since = conn._created_at
        conn._slot = slot

    def _attempt_succeeded(self, conn: CT, started: float) -> None:
        now = monotonic()
        with self._lock:
            self._attempts.remove(started)
            self._connecting -= 1
            self._slots.add(conn._slot)  # type: ignore[attr-defined]
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
        if outage is not None:
            self._tell_back(outage)
        if self.listeners.active:
            self.listeners.emit(events.Connected(self.name, now - started))

    def _attempt_failed(
        self, kind: str, error: BaseException, started: float, params: Any, probe: Probe | None
    ) -> None:
        is_lasting = is_permanent(kind) and self._params_now() == params
        self._discard_hung_up()  # what is idle keeps the breaker closed, if it is alive
        with self._lock:
            self._attempts.remove(started)
            self._metrics.connect_failures += 1
            if self._closed:
                return
            self.breaker.failed(started, error, kind, last_seen=self._last_seen)
            failed = events.ConnectFailed(
                self.name, monotonic() - started, self.breaker.last_error or "", kind
            )
            self._try_again(probe or Probe(), params, kind, is_lasting=is_lasting)
            opened = self._judge()
            lasts = self.breaker.failing_for >= self.reconnect_timeout and not self._outage_told
            self._outage_told |= lasts
            self._changed.notify_all()
            exist = self._nconns - self._connecting
        logger.debug("pool %r: connecting failed (%s): %s", self.name, kind, failed.error)
        # Else the breaker tells of it, once it opens.
        if exist and not self.breaker.is_open and (kind == SATURATED or is_permanent(kind)):
            text = (
                f"no new connection ({kind}): {failed.error}; {exist} of at most {self._max_size} exist,"
                f" {len(self._waiting)} waiting"
            )
            with _fork.telling:
                self._warn("connect_failed", f"%d failed connects ({kind})", text, kind=kind)
        if self.listeners.active:
            self.listeners.emit(failed)
        if opened is not None:
            self._tell_down(opened)
        if lasts:
            self.reconnect_failed()

    def _try_again(
        self, probe: Probe, params: dict[str, Any], kind: str, *, is_lasting: bool
    ) -> None:
        """Have *probe* try again later, unless another does. The lock is held."""
        if self._probe not in (None, probe):
            self._drop_slot(None)
            return
        self._probe = probe
        probe.params, probe.watching = params, is_lasting
        probe.postpone(kind)
        self.breaker.retry_at = probe.due
        self._schedule(probe)

    def _attempt_overdue(self, started: float) -> None:
        with self._lock:
            if started not in self._attempts or self._closed:
                return
            error = unanswered(monotonic() - started)
            kind = SATURATED if started in self._pinging else "timeout"
            self.breaker.overdue(started, error, kind, last_seen=self._last_seen)
            opened = self._judge()
            due = max(started, self._last_seen) + self.breaker.patience
            self._await_answer(started, max(due - monotonic(), _LOOK_AGAIN))
        if opened is not None:
            self._tell_down(opened)

    # Giving up

    def _discard(self, conn: Any, reason: str, *, by_server: bool = False) -> None:
        """Close a connection that is out; replace it if it is missed."""
        with self._lock:
            self._remove(conn._slot, reason)
            self._refill()
        if by_server:
            self._count(REPLACED, 1)
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
        slot.ref = None  # its collection means nothing any more
        self._slots.discard(slot)
        self._nconns -= 1
        metrics = self._metrics
        setattr(metrics, reason, getattr(metrics, reason) + 1)

    def _dispose(self, conns: Sequence[Any], reason: str) -> None:
        for conn in conns:
            self._close_connection(conn)
            if self.listeners.active:
                self.listeners.emit(events.Discarded(self.name, reason))

    def _discard_hung_up(self) -> None:
        """Give up all idle ones whose server is gone."""
        if lost := hung_up(conn._slot.fd for conn in list(self._pool)):
            gone = self._take_out("dead", lambda slot: slot.fd in lost)
            self._count(REPLACED, len(gone))
            # Somebody may be waiting: closing many is not their business.
            self._later(lambda pool: pool._dispose(gone, "dead"))


def _advised(error: BaseException, params: dict[str, Any]) -> BaseException:
    """Add what to do about it to an error's text, where that is known."""
    known = {**already_set(params, os.environ), **os.environ}
    if UNSUPPORTED in str(error):
        advice = "a transaction pooler needs DBPOOL_POOLER=transaction"
    elif params and not known.keys() & _NAMES_A_DATABASE:
        advice = "DATABASE_URL is not set: libpq's defaults are used"
    else:
        return error
    if isinstance(error, psycopg.Error):
        error.args = (f"{error}; {advice}",)
    return error
