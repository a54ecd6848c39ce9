"""When to try again: back-off schedules and the budget that keeps retries from storming."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import backoff
import psycopg

# Says PgBouncer to a client whose statement it has passed on to no server. Where it has, or may
# have, it says something else, such as "server conn crashed?" or "query timeout".
_REFUSALS = (
    "server shutting down", "server login has been failing", "pgbouncer cannot connect to server",
    "query_wait_timeout", "query_timeout", "client_idle_timeout",
)  # fmt: skip

# What one retry costs a budget, in successes: the ratio of gRPC's retry throttling.
_COST = 10


def delays(first: float, cap: float, base: float = 2.0) -> Iterator[float]:
    """Yield full-jitter delays in seconds: uniform from 0 to a bound growing to *cap*.

    Full jitter: Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    bounds = backoff.expo(base=base, factor=first, max_value=cap)
    next(bounds)  # the package's generators want to be primed
    yield from map(backoff.full_jitter, bounds)


def is_conflict(exc: BaseException) -> bool:
    """Whether *exc* is a serialization failure or a deadlock: the transaction may be retried."""
    return isinstance(exc, psycopg.Error) and exc.sqlstate in {"40001", "40P01"}


def is_refused(exc: BaseException | None) -> bool:
    """Whether *exc* is a pooler's word that no server has got the statement: it may be sent again."""
    return isinstance(exc, psycopg.errors.ProtocolViolation) and str(exc).startswith(_REFUSALS)


class Budget:
    """A bucket of retries: each retry draws one, each success gives a tenth back.

    While most calls fail it runs dry, and the failing server is left alone.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = self._left = capacity * _COST
        self._lock = threading.Lock()

    def draw(self) -> bool:
        """Take one retry; false if there is none left."""
        with self._lock:
            if self._left < _COST:
                return False
            self._left -= _COST
            return True

    def refund(self) -> None:
        """Give a tenth of a retry back, up to the capacity."""
        with self._lock:
            self._left = min(self._capacity, self._left + 1)
