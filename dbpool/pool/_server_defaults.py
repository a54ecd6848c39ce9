"""Which default timeouts a server leaves to the pool: asked once, and sent as startup options only."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, Final

from psycopg import Connection
from psycopg.pq import ExecStatus

from dbpool.liveness import poller, run_query
from dbpool.settings import Settings

Names = frozenset[str]
Connect = Callable[[dict[str, Any]], Any]

_NAMES: Final = b"select string_agg(name, ',') from pg_settings where source in "
_FIRST_ANSWER_TIMEOUT: Final = 0.5  # seconds to wait for the answer to another thread
_CLOSE_TIMEOUT_MS: Final = 200.0  # that a server is given to free the place of a connection


class ServerDefaults:
    """What servers answered, by host, port, database and role. Used by workers alone.

    A default is sent as a startup option only where nothing on the server sets that timeout. A
    connection made with it cannot tell, and so the first one is made without.
    """

    def __init__(self, settings: Settings, warn: Callable[[str], None]) -> None:
        self._settings = settings
        self._warn = warn
        self._defaults = settings.default_options()
        self._answers: dict[tuple[object, ...], Names] = {}
        self._verified: set[tuple[object, ...]] = set()
        self._last: Names | None = None
        self._first = threading.Lock()  # held by who asks first: the others go by the answer
        self.asked_at = monotonic()
        self.troubles = 0

    def connect(self, connect: Connect, params: dict[str, Any]) -> Any:
        """Connect, with the defaults that the server leaves to us; warn if it ignores any."""
        is_first = self._last is None and self._first.acquire(timeout=_FIRST_ANSWER_TIMEOUT)
        try:
            return self._connect(connect, params)
        finally:
            if is_first:
                self._first.release()

    def is_due(self, max_age: float, troubles: int) -> bool:
        """Whether to ask again: after that many seconds, or if the count of *troubles* has grown."""
        if not self._defaults or (
            monotonic() < self.asked_at + max_age and troubles == self.troubles
        ):
            return False
        self.asked_at, self.troubles = monotonic(), troubles
        return True

    def ask_again(self, connect: Connect, params: dict[str, Any]) -> bool:
        """Ask on a connection made for that; return whether the answer has changed."""
        conn = connect(params)
        try:
            key, names = _place(conn), self._ask(conn)
        finally:
            conn.close()
        has_changed = self._answers.get(key, names) != names
        self._answers[key] = self._last = names
        return has_changed

    def _connect(self, connect: Connect, params: dict[str, Any]) -> Any:
        sent = self._last or Names()
        conn = connect(self._with(params, sent))
        if not isinstance(conn, Connection) or self._settings.pooler == "transaction":
            self._last = sent
            return conn
        try:
            key = _place(conn)
            names = self._answers.get(key)
            if names is None:
                if sent:
                    conn, sent = connect(_leave(conn, params)), Names()
                names = self._answers[key] = self._ask(conn)
            if names != sent:
                conn = connect(self._with(_leave(conn, params), names))
            self._last = names
            if key not in self._verified:
                self._verify(conn, self._with(params, names))
                self._verified.add(key)
        except BaseException:
            conn.close()
            raise
        return conn

    def _with(self, params: dict[str, Any], names: Names) -> dict[str, Any]:
        options = [*map(self._defaults.get, sorted(names)), params.get("options")]
        return params | ({"options": " ".join(filter(None, options))} if names else {})

    def _ask(self, conn: Any) -> Names:
        """Return the names of the defaults that nothing on the server sets."""
        if not self._defaults:
            return Names()
        answer, self.asked_at = self._names(conn, b"('default')"), monotonic()
        return Names(self._defaults) if answer is None else answer & self._defaults.keys()

    def _verify(self, conn: Any, params: Mapping[str, Any]) -> None:
        # Names with a dot, and `role`, are not in pg_settings.
        sent = re.findall(r"(?:-c\s*|--)([\w-]+)\s*=", str(params.get("options", "")))
        names = {name.replace("-", "_") for name in sent} - {"role"}
        if not names or (honoured := self._names(conn, b"('client', 'session')")) is None:
            return
        if ignored := names - honoured:
            self._warn(
                f"the options of a connection are ignored ({', '.join(sorted(ignored))}): a"
                " transaction pooler in between needs DBPOOL_POOLER=transaction"
            )

    def _names(self, conn: Any, sources: bytes) -> Names | None:
        result = run_query(conn, _NAMES + sources, float(self._settings.connect_timeout))
        if result.status != ExecStatus.TUPLES_OK:  # no PostgreSQL, or not allowed to look
            return None
        return Names((result.get_value(0, 0) or b"").decode().split(","))


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
