"""When to try again: back-off schedules and the budget that keeps retries from storming."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import backoff
import psycopg

# A serialization failure or a deadlock says itself that the transaction may be retried.
_CONFLICTS = frozenset({"40001", "40P01"})

# What one retry costs a budget, in successes: the ratio of gRPC's retry throttling.
_COST = 10


def delays(first: float, cap: float, base: float = 2.0) -> Iterator[float]:
    """Yield full-jitter delays in seconds: uniform from 0 to a bound growing to *cap*.

    Full jitter: Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    bounds = backoff.expo(base=base, factor=first, max_value=cap)
    next(bounds)  # the package's generators want to be primed
    for bound in bounds:
        yield backoff.full_jitter(bound)


def is_conflict(exc: BaseException) -> bool:
    """Whether *exc* is a serialization failure or a deadlock."""
    return isinstance(exc, psycopg.Error) and exc.sqlstate in _CONFLICTS


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
