"""Connector: one attempt to connect, from the parameters to a connection that can be lent."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from random import random
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, get_origin
from weakref import ref

import psycopg
from psycopg import Connection, Cursor
from psycopg.pq import TransactionStatus

from dbpool import errors
from dbpool._secrets import conceal, conceal_params, secrets_of
from dbpool.breaker import Attempt
from dbpool.liveness import PingTimeout, file_limit_error, ping
from dbpool.pool._psycopg import attach, close, has_stock_class, new_record
from dbpool.pool._server_defaults import ServerDefaults
from dbpool.pool._session import Names, call_traced, reset_message
from dbpool.settings import Settings
from dbpool.settings._conninfo import already_set

if TYPE_CHECKING:
    from dbpool.pool._seam import PoolBase

_DATABASE_NAMES: Final = {"host", "hostaddr", "port", "dbname", "service", "DATABASE_URL"}

# What opened together at a deploy does not reconnect together: lifetimes are shorter by up to this.
_LIFETIME_SPREAD: Final = 0.25


@dataclass(frozen=True)
class Failure:
    """Why an attempt failed; no secret is left in *error*."""

    kind: str
    error: BaseException
    params: dict[str, Any]


class Connector:
    """Makes the connections of a pool, in a worker; the pool's attributes are read at each attempt."""

    def __init__(self, settings: Settings, warn_once: Callable[[str], None]) -> None:
        self.settings = settings
        self.server_defaults = ServerDefaults(settings, warn_once)
        # Names of custom settings that `configure` makes; None until they are known.
        self.custom: Names | None = None if settings.session_reset == "session" else ()
        self.warn_once = warn_once
        self.cursors: type[Cursor[Any]] = Cursor  # of connections for which nothing else is asked
        if settings.pipeline_begin:
            from dbpool.pool._pipelining import PipeliningCursor

            self.cursors = PipeliningCursor

    def params(self, pool: PoolBase[Any]) -> dict[str, Any]:
        """Return the keywords to connect with now, without default timeouts."""
        conninfo = conceal(pool.conninfo() if callable(pool.conninfo) else pool.conninfo)
        kwargs = conceal_params((pool.kwargs() if callable(pool.kwargs) else pool.kwargs) or {})
        return self.settings.connect_params(
            conninfo or self.settings.resolve(), kwargs, defaults=False
        )

    def have_changed(self, pool: PoolBase[Any], params: dict[str, Any]) -> bool:
        """Whether the parameters are not *params* any more."""
        try:
            return self.params(pool) != params
        except BaseException:  # noqa: BLE001  # a user's callback may raise anything
            return bool(params)

    def connect(self, pool: PoolBase[Any], attempt: Attempt) -> Any | Failure:
        """Return a new connection that can be lent, or why there is none."""
        params: dict[str, Any] = {}
        secrets: set[str] = set()
        try:
            params = self.params(pool)
            return self._connect(pool, params, secrets, attempt)
        except BaseException as ex:  # noqa: BLE001  # whatever it is, the place must not be lost
            secrets |= secrets_of(already_set(params, os.environ), getattr(ex, "pgconn", None))
            kind, error = errors.classify(ex), _advise(errors.sanitize(ex, secrets), params)
        # libpq and psycopg give no reason then, or another.
        if "FATAL" not in str(error) and (lack := file_limit_error()):
            error = psycopg.OperationalError(f"{error}: {lack}")
            kind = errors.FailureKind.DESCRIPTORS
        return Failure(kind, error, params)

    def open(self, pool: PoolBase[Any], params: dict[str, Any]) -> Any:
        """Connect as the parent does; the connection is not prepared."""
        cls: Any = pool.connection_class
        if self.cursors is not Cursor and (get_origin(cls) or cls) is Connection:
            params = {"cursor_factory": self.cursors, **params}  # a tracer builds upon it
        return cls.connect("", **params)

    def server_defaults_changed(self, pool: PoolBase[Any]) -> bool:
        """Ask for the server's timeouts again; return whether they have changed."""
        return self.server_defaults.ask_again(lambda p: self.open(pool, p), self.params(pool))

    def _connect(
        self, pool: PoolBase[Any], params: dict[str, Any], secrets: set[str], attempt: Attempt
    ) -> Any:
        conn: Any = self.server_defaults.connect(lambda p: self.open(pool, p), params)
        try:
            known = already_set(params, os.environ)
            if self.settings.pooler == "transaction":  # which answers the login itself
                patience = float(known["connect_timeout"]) or self.settings.connect_timeout
                self._ping_server(conn, patience, attempt)
            self._prepare(pool, conn)
            # psycopg tries twice then, and never tells libpq of the preference.
            prefers_standby = known.get("target_session_attrs") == "prefer-standby"
            conn._record.prefers_standby = prefers_standby
        except BaseException:
            secrets |= secrets_of(params, conn.pgconn)
            close(conn)
            raise
        return conn

    def _ping_server(self, conn: Any, timeout: float, attempt: Attempt) -> None:
        """Make one round trip to the server behind a pooler; without an answer it is saturated."""
        attempt.is_pinging = True
        try:
            ping(conn, timeout)
        except PingTimeout:
            text = f"the pooler gave no server connection within {timeout:g} s"
            raise psycopg.OperationalError(text) from None
        finally:
            attempt.is_pinging = False

    def _prepare(self, pool: PoolBase[Any], conn: Any) -> None:
        """Configure a new connection, and remember how it was set up."""
        attach(conn, pool)
        configure = pool._callbacks.configure
        if has_stock_class(conn) and conn.cursor_factory is Cursor:
            conn.cursor_factory = self.cursors
        if configure:
            self.custom = call_traced(configure, conn, self.custom)
            insist_on_idle(conn, "configure")
        message = b""
        if self.settings.session_reset == "session":
            message = reset_message(conn, self.settings.connect_timeout, self.custom or ())
        record = new_record(conn, self.cursors)
        record.reset_message = message
        record.created_at = record.idle_since = now = monotonic()
        record.expires_at = now + pool.max_lifetime * (1.0 - _LIFETIME_SPREAD * random())  # noqa: S311
        if self.cursors is not Cursor and not issubclass(conn.cursor_factory, self.cursors):
            self.warn_once(
                "pipeline_begin has no effect: the connections have cursors of their own"
            )
        conn._record = record
        record.ref = record.owner = ref(conn, pool._store.collected.append)  # in C: not interrupted


def insist_on_idle(conn: Any, callback: str) -> None:
    """Raise if the user's callback of that name left something open on *conn*."""
    if (status := conn.pgconn.transaction_status) != TransactionStatus.IDLE:
        left = f"connection left in status {TransactionStatus(status).name}"
        raise psycopg.ProgrammingError(f"{left} by the {callback} function: discarded")


def _advise(error: BaseException, params: dict[str, Any]) -> BaseException:
    """Add what to do about it to an error's text, where that is known."""
    known = {**already_set(params, os.environ), **os.environ}
    if errors.UNSUPPORTED_PARAMETER in errors.describe(error):
        advice = "a transaction pooler needs DBPOOL_POOLER=transaction"
    elif params and not known.keys() & _DATABASE_NAMES:
        advice = "DATABASE_URL is not set: libpq's defaults are used"
    else:
        return error
    if isinstance(error, psycopg.Error):
        error.args = (f"{error}; {advice}",)
    return error
