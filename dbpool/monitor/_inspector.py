"""Asks the server of one pool about its sessions while callers wait for long, in its own thread."""

from __future__ import annotations

import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from time import monotonic
from typing import Any, Final

import psycopg

from dbpool._secrets import conceal
from dbpool.diagnosis import ServerView
from dbpool.errors import describe
from dbpool.monitor._server import look

logger = logging.getLogger("dbpool")

NAME: Final = "dbpool:monitor"  # the application_name of its connection
_SPREAD: Final = 0.25  # seconds at most before the first look, so that hosts do not look at once
_PAUSES: Final = (2.0,) * 10 + (4.0, 6.0, 8.0)  # seconds between two looks, then the longest
_LONGEST_PAUSE: Final = 10.0
_FACTS_FIRST: Final = 1.0  # seconds until the server's limits and its role are read first
_FACTS_PAUSE: Final = 60.0
_STANDBY_PAUSE: Final = 15.0
_LAG: Final = 60.0  # seconds that are reported
_USUAL_AFTER: Final = 900.0  # seconds after which a server's new role is no news
_KEPT: Final = 10.0  # seconds that its connection is kept without need
_HUNG: Final = 3.0  # seconds that a look may take
_SILENT: Final = 0.5  # seconds after which a server counts as one that does not answer
_OPTIONS: Final = (
    "-c statement_timeout=1000 -c lock_timeout=100 -c default_transaction_read_only=on"
    " -c idle_in_transaction_session_timeout=10000"
)
_OF_PSYCOPG: Final = ("autocommit", "row_factory", "cursor_factory", "prepare_threshold", "context")


class Inspector:
    """Asks one pool's server what its sessions do, and keeps the last answer.

    It uses an idle connection of the pool if nobody waits for one. Otherwise it opens one connection
    of its own, beyond max_size, and closes it ten seconds after the last need. It reads the server's
    limits and role each minute in any case, and the lag of a standby more often. Behind a transaction
    pooler it asks nothing.
    """

    def __init__(self, pool: Any, *, queries: bool = False) -> None:
        self._view: ServerView | None = None  # of the last look that was answered
        self._asked_at: float | None = None  # when the look began that is under way, Unix time
        self._silent_since: float | None = None  # of the first that was not answered
        self._pool = pool
        self._queries = queries
        self._is_off = pool.settings.pooler == "transaction"
        self._conn: psycopg.Connection[Any] | None = None
        self._asked: psycopg.Connection[Any] | None = None  # the one that is asked now
        self._thread: threading.Thread | None = None
        self._started = 0.0
        self._inspections = 0  # since looking became necessary, or urgent
        self._is_urgent = False
        self._next: float | None = None
        self._facts_at = monotonic() + _FACTS_FIRST
        self._caught_up_at: float | None = None  # when a standby last had replayed all
        self._role: tuple[str | None, float] | None = None  # the usual one, and when last seen
        self._locked_since: float | None = None  # as a view's
        self._needed_at = 0.0
        self._warned: set[str] = set()

    def tick(self, *, is_needed: bool, is_urgent: bool) -> None:
        """Look if it is time to, and at once when it becomes urgent; called about once a second."""
        now = monotonic()
        if self._thread is not None and self._thread.is_alive():
            if now - self._started > _HUNG:
                self._shut_down()
            return
        if self._is_off:
            return
        became_urgent, self._is_urgent = is_urgent and not self._is_urgent, is_urgent
        if not is_needed:
            self._rest(now)
        elif self._next is None or now >= self._next or became_urgent:
            is_first = self._next is None
            self._needed_at = now
            self._inspections = 0 if became_urgent else self._inspections
            pause = (
                _PAUSES[self._inspections] if self._inspections < len(_PAUSES) else _LONGEST_PAUSE
            )
            self._inspections, self._next = self._inspections + 1, now + pause
            self._start(self._inspect_soon if is_first else self._inspect)

    def view(self) -> ServerView | None:
        """Return the server's last answer, and since when it has been silent, if it is."""
        now = time.time()
        since = self._silent_since
        if since is None and (asked := self._asked_at) is not None and now - asked > _SILENT:
            since = asked
        if since is None:
            return self._view
        return replace(self._view or ServerView(0.0), silent_since=since)

    def wait(self, seconds: float) -> None:
        """Wait for the end of a look that is under way, for at most *seconds*."""
        if self._thread is not None:
            self._thread.join(max(0.0, seconds))

    def close(self) -> None:
        """Close its connection; a look that is under way fails."""
        self._shut_down()
        if self._thread is not None:
            self._thread.join(1.0)
        self._close_own()

    def _rest(self, now: float) -> None:
        """While nobody waits for long, close what is unused, and read the limits at times."""
        if self._next is not None and self._view is not None:  # what was seen there is over
            self._view = replace(self._view, sessions={}, prepared=(), locked_since=None)
        self._inspections, self._next, self._silent_since, self._locked_since = 0, None, None, None
        if self._conn is not None and now - self._needed_at > _KEPT:
            self._start(self._close_own)
        elif now >= self._facts_at and self._has_idle():
            self._facts_at = now + _FACTS_PAUSE
            self._start(self._read_facts)

    def _start(self, task: Callable[[], object]) -> None:
        self._started = monotonic()
        thread = threading.Thread(None, task, f"dbpool-monitor-{self._pool.name}", daemon=True)
        with suppress(RuntimeError):  # no thread can be had: the next tick tries again
            thread.start()
            self._thread = thread

    def _read_facts(self) -> None:
        """Read the server's limits, and how far a standby is behind.

        Not over the pool: its numbers are those of the application alone.
        """
        self._inspect(is_own=True)

    def _inspect_soon(self) -> None:
        time.sleep(random.uniform(0.0, _SPREAD))  # noqa: S311
        self._inspect()

    def _inspect(self, *, is_own: bool = False) -> None:
        began, problem = time.time(), ""
        self._asked_at = began
        try:
            with self._connection(is_own=is_own) as conn:
                self._asked = conn
                name, prefix = _names(self._pool, conn)
                view = look(conn, name, prefix, queries=self._queries)
            self._view = self._with_past(view)
            self._silent_since = None
            if not view.is_joined:
                problem = "a pooler hides the server's sessions, so blockers cannot be named;"
                problem += " set DBPOOL_POOLER=transaction"
        except Exception as ex:  # noqa: BLE001  # whatever it is, the application goes on
            if time.time() - began < _SILENT:  # it answered that it will not say
                self._silent_since = None
            elif self._silent_since is None:
                self._silent_since = began
            self._close_own()
            problem = f"cannot find out who blocks whom: {describe(ex, self._asked)}"
        finally:
            self._asked = self._asked_at = None
        if problem:  # out here, where no frame has the error
            self._warn_once(problem)

    def _with_past(self, view: ServerView) -> ServerView:
        """Add the results of earlier looks, and decide when to read the server's role again."""
        now, facts = monotonic(), view.facts
        self._locked_since = (self._locked_since or view.time) if view.is_locked else None
        view = replace(view, locked_since=self._locked_since)
        if facts is None:
            return view
        usual, seen = self._role or (facts.role, view.time)
        if facts.role == usual or view.time - seen > _USUAL_AFTER:
            self._role = facts.role, view.time
        else:
            view = replace(view, role_before=usual, role_changed_at=seen)
        if facts.role != "standby":
            return view
        # The last commit that it replayed may be old because nothing was committed, or of another
        # life of this server, which does not know it any more.
        lag = facts.lag_seconds
        if lag == 0 or (lag is None and self._caught_up_at is None):
            self._caught_up_at = now
        if self._caught_up_at is not None:
            lag = min(now - self._caught_up_at, now if lag is None else lag)
        self._facts_at = now + min(_STANDBY_PAUSE, max(1.0, _LAG - (lag or 0.0)))
        return replace(view, facts=replace(facts, lag_seconds=lag))

    @contextmanager
    def _connection(self, *, is_own: bool) -> Iterator[psycopg.Connection[Any]]:
        if not is_own and self._conn is None and self._has_idle():
            with self._pool.connection(timeout=0.0) as conn:
                yield conn
            return
        if self._conn is None or self._conn.closed:
            self._conn = _connect(self._pool)
        yield self._conn

    def _has_idle(self) -> bool:
        stats = self._pool.stats()
        return bool(stats.state == "up" and stats.idle > 0 and stats.waiting == 0)

    def _close_own(self) -> None:
        conn, self._conn = self._conn, None
        if conn is not None:
            with suppress(Exception):
                conn.close()

    def _shut_down(self) -> None:
        """End a look that takes too long: its thread then reads end of file."""
        conn = self._asked
        with suppress(Exception):  # it may have ended just now
            if conn is not None:
                with socket.socket(fileno=os.dup(conn.fileno())) as copy:
                    copy.shutdown(socket.SHUT_RDWR)

    def _warn_once(self, text: str) -> None:
        """Log a problem of the inspector itself, once."""
        kind = text.partition(":")[0]
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("pool %r: %s", self._pool.name, text)


def _params(pool: Any) -> dict[str, Any]:
    """Return what the pool connects with now, as libpq knows it."""
    conninfo = conceal(pool.conninfo() if callable(pool.conninfo) else pool.conninfo)
    kwargs = conceal(pool.kwargs() if callable(pool.kwargs) else pool.kwargs)
    params = pool.settings.connect_params(conninfo or None, kwargs, defaults=False)
    return {key: value for key, value in params.items() if key not in _OF_PSYCOPG}


def _connect(pool: Any) -> psycopg.Connection[Any]:
    """Connect as the pool does, under another name and with short limits."""
    params = _params(pool)
    params |= {
        "application_name": NAME,
        "options": f"{params.get('options', '')} {_OPTIONS}".strip(),
        "connect_timeout": 2,
        "tcp_user_timeout": 2000,
    }
    return psycopg.Connection.connect(**params, autocommit=True, prepare_threshold=None)


def _names(pool: Any, conn: psycopg.Connection[Any]) -> tuple[str, str]:
    """Return the pool's application_name, and the part that all its processes share."""
    own = conn.info.parameter_status("application_name")
    if own == NAME:
        params = _params(pool)
        own = params.get("application_name") or os.environ.get("PGAPPNAME")
        own = str(own or params.get("fallback_application_name"))
        own = own.encode()[:63].decode(errors="ignore")  # what the server keeps
    own = str(own)
    begins = own.partition("@")[0] if own.startswith("dbpool:") else own
    return own, f"{begins}@"  # a worker's own ends in its host and pid
