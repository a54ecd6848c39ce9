"""When to try again: back-off, a budget for retries, and whether a lost call may have had effect."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import backoff
import psycopg

# What PgBouncer tells a client whose statement it has passed on to no server. If a server got it, or
# may have, the text is another, such as "server conn crashed?" or "query timeout".
_REFUSALS = (
    "server shutting down", "server login has been failing", "pgbouncer cannot connect to server",
    "query_wait_timeout", "query_timeout", "client_idle_timeout",
)  # fmt: skip

# How many successes pay for one retry: the ratio of gRPC's retry throttling.
_COST = 10

# Literals, names and comments, in which a semicolon or a keyword has no meaning.
_OPAQUE: Final = rb"""'(?:[^']|'')*'|"[^"]*"|--[^\n]*|/\*.*?\*/|\$(\w*)\$.*?\$\1\$"""
_READING: Final = rb"[\s(]*(?:select|show|table|values)\b[^;]*[;\s]*"


def delays(first: float, cap: float, base: float = 2.0) -> Iterator[float]:
    """Yield full-jitter delays in seconds: uniform from 0 to a bound growing to *cap*.

    Full jitter: Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    bounds = backoff.expo(base=base, factor=first, max_value=cap)
    next(bounds)  # the package's generators have to be primed
    yield from map(backoff.full_jitter, bounds)


def is_conflict(exc: BaseException) -> bool:
    """Whether *exc* is a serialization failure or a deadlock: the transaction may be retried."""
    return isinstance(exc, psycopg.Error) and exc.sqlstate in {"40001", "40P01"}


def is_refused(exc: BaseException | None) -> bool:
    """Whether a pooler says by *exc* that no server got the statement: it may be sent again.

    A server names the line of its code that raised an error, a pooler does not.
    """
    is_poolers = isinstance(exc, psycopg.errors.ProtocolViolation) and not exc.diag.source_line
    return is_poolers and str(exc).startswith(_REFUSALS)


def is_lost_unanswered(conn: Any, error: psycopg.Error) -> bool:
    """Whether the connection was lost before the server answered what was sent on it.

    A pooler that lost its server answers with SQLSTATE class 08. False for what a pooler refused and
    for what cannot write: there is nothing to be uncertain about.
    """
    get, default = conn.pgconn.parameter_status, b"default_transaction_read_only"
    is_read_only = conn.read_only or (conn.read_only is None and get(default) == b"on")
    is_certain = is_refused(error) or is_read_only or get(b"in_hot_standby") == b"on"
    return bool(conn.closed and (error.sqlstate or "08")[:2] == "08" and not is_certain)


def is_reading(statement: bytes) -> bool:
    """Whether a statement begins with SELECT, SHOW, TABLE or VALUES, after comments and parentheses.

    False where that is not clear: for several statements in one, or nested comments.
    """
    text = re.sub(_OPAQUE, b" ", statement, flags=re.DOTALL)
    is_clear = b"*/" not in text and not (b"\\" in statement and b";" in statement)
    return is_clear and bool(re.fullmatch(_READING, text, re.IGNORECASE | re.DOTALL))


class Budget:
    """A bucket of retries: each retry draws one, each success gives a tenth back.

    While most calls fail it runs dry, and the failing server is left alone. It has no lock: a signal
    handler may come back in, and what two threads do at once may count as one.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = self._left = capacity * _COST

    def draw(self) -> bool:
        """Take one retry; false if there is none left."""
        if self._left < _COST:
            return False
        self._left -= _COST
        return True

    def refund(self) -> None:
        """Give a tenth of a retry back, up to the capacity."""
        self._left = min(self._capacity, self._left + 1)
