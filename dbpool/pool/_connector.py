"""Connector: one attempt to connect, from the parameters to a connection that can be lent.

And ServerDefaults: which default timeouts a server leaves to the pool, asked once, and sent as
startup options only.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from random import random
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, NamedTuple, get_origin
from weakref import ref

import psycopg
from psycopg import Connection, Cursor
from psycopg.pq import ExecStatus

from dbpool import errors
from dbpool._secrets import conceal, secrets_of
from dbpool.breaker import Attempt
from dbpool.liveness import PingTimeout, file_limit_error, ping, poller, run_query
from dbpool.pool._psycopg import attach, close, insist_on_idle, is_stock, new_record
from dbpool.pool._session import Names, call_traced, reset_message
from dbpool.settings import Settings
from dbpool.settings._conninfo import already_set, insist_on_types

if TYPE_CHECKING:
    from dbpool.pool._seam import PoolBase

_DATABASE_NAMES: Final = {"host", "hostaddr", "port", "dbname", "service", "DATABASE_URL"}

# What opened together at a deploy does not reconnect together: lifetimes are shorter by up to this.
_LIFETIME_SPREAD: Final = 0.25

_NAMES: Final = b"select string_agg(lower(name), ',') from pg_settings where source in "
_FIRST_ANSWER_TIMEOUT: Final = 0.5  # seconds to wait for the answer to another thread
_CLOSE_TIMEOUT_MS: Final = 200.0  # that a server is given to free the place of a connection

Defaults = frozenset[str]  # names of timeouts
Opener = Callable[[dict[str, Any]], Any]  # connects with these parameters


class Failure(NamedTuple):
    """Why an attempt failed; no secret is left in *error*."""

    kind: str
    error: BaseException


class Connector:
    """Makes the connections of a pool, in a worker; the pool's attributes are read at each attempt."""

    def __init__(self, settings: Settings, warn_once: Callable[[str], None]) -> None:
        self.settings, self.warn_once = settings, warn_once
        self.server_defaults = ServerDefaults(settings, warn_once)
        # Names of custom settings that `configure` makes; None until they are known.
        self.custom: Names | None = None if settings.session_reset == "session" else ()
        self.cursors: type[Cursor[Any]] = Cursor  # of connections for which nothing else is asked
        if settings.pipeline_begin:
            from dbpool.pool._pipelining import PipeliningCursor

            self.cursors = PipeliningCursor

    def params(self, pool: PoolBase[Any]) -> dict[str, Any]:
        """Return the keywords to connect with now, without default timeouts."""
        conninfo = conceal(pool.conninfo() if callable(pool.conninfo) else pool.conninfo)
        kwargs = conceal(pool.kwargs() if callable(pool.kwargs) else pool.kwargs)
        insist_on_types(conninfo, kwargs)
        return self.settings.connect_params(conninfo or None, kwargs, defaults=False)

    def have_changed(self, pool: PoolBase[Any], params: dict[str, Any] | None = None) -> bool:
        """Whether the parameters are not *params*, by default those of a moment ago, any more."""
        try:
            return self.params(pool) != (self.params(pool) if params is None else params)
        except BaseException:  # noqa: BLE001  # a user's callback may raise anything
            return params != {}

    def connect(self, pool: PoolBase[Any], attempt: Attempt) -> Any | Failure:
        """Return a new connection that can be lent, or why there is none."""
        attempt.params, conn, settings = {}, None, self.settings
        try:
            attempt.params = self.params(pool)
            conn = self.server_defaults.connect(partial(self.open, pool), attempt.params)
            known = already_set(attempt.params, os.environ)
            if settings.pooler == "transaction":  # which answers the login itself
                timeout = float(known["connect_timeout"]) or settings.connect_timeout
                self._ping_server(conn, timeout, attempt)
            self._prepare(pool, conn)
            # psycopg tries twice then, and never tells libpq of the preference.
            conn._record.prefers_standby = known.get("target_session_attrs") == "prefer-standby"
        except BaseException as ex:  # noqa: BLE001  # whatever it is, the place must not be lost
            known = already_set(attempt.params, os.environ)
            secrets = secrets_of(known, getattr(ex, "pgconn", None))
            if conn is not None:
                secrets |= secrets_of({}, getattr(conn, "pgconn", None))
                with suppress(BaseException):  # of a class of the user's
                    close(conn)
            is_default = bool(attempt.params) and not _DATABASE_NAMES & {*known, *os.environ}
            kind, error = errors.classify(ex), _advise(errors.sanitize(ex, secrets), is_default)
        else:
            return conn
        # libpq and psycopg give no reason then, or another.
        if "FATAL" not in str(error) and (limit_error := file_limit_error()):
            error = psycopg.OperationalError(f"{error}: {limit_error}")
            kind = errors.FailureKind.DESCRIPTORS
        return Failure(kind, error)

    def open(self, pool: PoolBase[Any], params: dict[str, Any]) -> Any:
        """Connect as the parent does; the connection is not prepared."""
        cls: Any = pool.connection_class
        if self.cursors is not Cursor and (get_origin(cls) or cls) is Connection:
            params = {"cursor_factory": self.cursors, **params}  # a tracer builds upon it
        return cls.connect("", **params)

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
        if is_stock(conn.__class__) and conn.cursor_factory is Cursor:
            conn.cursor_factory = self.cursors
        if configure := pool._user_configure:
            self.custom = call_traced(configure, conn, self.custom)
            insist_on_idle(conn, "configure")
        record, settings = new_record(conn, self.cursors), self.settings
        if settings.session_reset == "session":
            record.reset_message = reset_message(conn, settings.connect_timeout, self.custom or ())
        record.created_at = record.idle_since = now = monotonic()
        record.expires_at = now + pool.max_lifetime * (1.0 - _LIFETIME_SPREAD * random())  # noqa: S311
        if self.cursors is not Cursor and not issubclass(conn.cursor_factory, self.cursors):
            self.warn_once("pipeline_begin has no effect: the connections have their own cursors")
        conn._record = record
        record.ref = record.owner = ref(conn, pool._store.collected.append)  # in C: not interrupted


def _advise(error: BaseException, is_default: bool) -> BaseException:
    """Add to an error's text what to do; *is_default*: nothing says which database is meant."""
    if errors.UNSUPPORTED_PARAMETER.search(errors.describe(error)):
        advice = "a transaction pooler needs DBPOOL_POOLER=transaction, one in session mode"
        advice += " DBPOOL_STATEMENT_TIMEOUT=server and DBPOOL_IDLE_IN_TRANSACTION_TIMEOUT=server"
    elif is_default:
        advice = "DATABASE_URL is not set: libpq's defaults are used"
    else:
        return error
    if isinstance(error, psycopg.Error):
        error.args = (f"{error}; {advice}",)
    return error


class ServerDefaults:
    """What servers answered, by host, port, database and role. Used by workers alone.

    A default is sent as a startup option only where nothing on the server sets that timeout. A
    connection made with it cannot tell, and so the first one is made without.
    """

    def __init__(self, settings: Settings, warn: Callable[[str], None]) -> None:
        self._settings, self._warn = settings, warn
        self._defaults = settings.default_options()
        self._answers: dict[tuple[object, ...], Defaults] = {}
        self._verified: set[tuple[object, ...]] = set()
        self._last: Defaults | None = None
        self._first = threading.Lock()  # held by the first to ask; the others wait for its answer
        self.asked_at, self.troubles = monotonic(), 0

    def connect(self, opener: Opener, params: dict[str, Any]) -> Any:
        """Connect, with the defaults that the server leaves to us; warn if it ignores any."""
        is_first = self._last is None and self._first.acquire(timeout=_FIRST_ANSWER_TIMEOUT)
        try:
            return self._connect(opener, params)
        finally:
            if is_first:
                self._first.release()

    def begin_if_due(self, max_age: float, troubles: int) -> bool:
        """Return whether to ask again now: that many seconds have passed, or *troubles* has grown."""
        is_new = monotonic() < self.asked_at + max_age and troubles == self.troubles
        if is_new or not self._defaults:
            return False
        self.asked_at, self.troubles = monotonic(), troubles
        return True

    def ask_again(self, opener: Opener, params: dict[str, Any]) -> bool:
        """Ask on a connection made for that; return whether the answer has changed."""
        conn = opener(params)
        try:
            key, names = _place(conn), self._ask(conn)
        finally:
            conn.close()
        has_changed = self._answers.get(key, names) != names
        self._answers[key] = self._last = names
        return has_changed

    def _connect(self, opener: Opener, params: dict[str, Any]) -> Any:
        sent = self._last or Defaults()
        conn = opener(self._with(params, sent))
        if not isinstance(conn, Connection) or self._settings.pooler == "transaction":
            self._last = sent
            return conn
        try:
            key = _place(conn)
            names = self._answers.get(key)
            if names is None:
                if sent:
                    conn, sent = opener(_leave(conn, params)), Defaults()
                names = self._answers[key] = self._ask(conn)
            if names != sent:
                conn = opener(self._with(_leave(conn, params), names))
            self._last = names
            if key not in self._verified:
                self._verify(conn, self._with(params, names))
                self._verified.add(key)
        except BaseException:
            conn.close()
            raise
        return conn

    def _with(self, params: dict[str, Any], names: Defaults) -> dict[str, Any]:
        options = [*map(self._defaults.get, sorted(names)), params.get("options")]
        return params | ({"options": " ".join(filter(None, options))} if names else {})

    def _ask(self, conn: Any) -> Defaults:
        """Return the names of the defaults that nothing on the server sets."""
        if not self._defaults:
            return Defaults()
        answer, self.asked_at = self._names(conn, b"('default')"), monotonic()
        return Defaults(self._defaults) if answer is None else answer & self._defaults.keys()

    def _verify(self, conn: Any, params: Mapping[str, Any]) -> None:
        # Names with a dot, and these two, are not in pg_settings.
        sent = re.findall(r"(?:-c\s*|--)([\w-]+)\s*=", str(params.get("options", "")))
        names = {name.replace("-", "_").lower() for name in sent} - {"role", "seed"}
        honoured = self._names(conn, b"('client', 'session')") if names else None
        if honoured is not None and (ignored := names - honoured):
            text = f"the options of a connection are ignored ({', '.join(sorted(ignored))})"
            self._warn(f"{text}: a transaction pooler in between needs DBPOOL_POOLER=transaction")

    def _names(self, conn: Any, sources: bytes) -> Defaults | None:
        result = run_query(conn, _NAMES + sources, float(self._settings.connect_timeout))
        if result.status != ExecStatus.TUPLES_OK:  # no PostgreSQL, or not allowed to look
            return None
        return Defaults((result.get_value(0, 0) or b"").decode().split(","))


def _place(conn: Any) -> tuple[object, ...]:
    """Return host, address, port, database and role of a connection, as libpq understood them."""
    found = {option.keyword: option.val for option in conn.pgconn.info}
    return tuple(map(found.get, (b"host", b"hostaddr", b"port", b"dbname", b"user")))


def _leave(conn: Any, params: dict[str, Any]) -> dict[str, Any]:
    """Close a connection, and wait until its place is free; return how to reach the same server."""
    same = zip(("host", "hostaddr", "port"), _place(conn), strict=False)
    fd = os.dup(conn.fileno())
    try:
        conn.close()
        poller(fd)(_CLOSE_TIMEOUT_MS)
    finally:
        os.close(fd)
    return params | {key: value.decode() for key, value in same if isinstance(value, bytes)}
