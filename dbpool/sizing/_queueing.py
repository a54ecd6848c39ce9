"""How many connections a load needs: Little's law and the M/M/c queue, pure functions.

A pool is a queue with `max_size` servers. Arrivals are Poisson unless the number of threads is
known: then each thread asks again only after its last request was served (a finite source, as in
the machine repair model). If hold times vary more or less than exponential ones, the waits are
longer or shorter by the factor (1 + variation) / 2, after Allen and Cunneen.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from math import erfc, exp, lgamma, log, sqrt
from operator import mul
from typing import Final

TARGET: Final = 0.005  # seconds that the 95th percentile of waits may take
_MAY_WAIT: Final = 0.05  # the share of checkouts that may wait longer
_LARGE_MEAN: Final = 500.0  # from here on a Poisson distribution counts as a normal one
_MAX_SOURCES: Final = 10_000  # connections, and threads; no process has more


@dataclass(frozen=True)
class Load:
    """The load of one process on its pool; times are in seconds.

    `rate` is checkouts per second, `hold` and `wait` are means per checkout, `variation` is the
    squared coefficient of variation of the hold time: 0 if constant, 1 if exponential.
    """

    rate: float
    hold: float
    variation: float = 1.0
    wait: float = 0.0

    @property
    def busy(self) -> float:
        """Return the mean number of connections in use, by Little's law."""
        return self.rate * self.hold


def connections_needed(
    load: Load, threads: int | None = None, times: float = 1.0, target: float = TARGET
) -> int:
    """Return the smallest `max_size` at which 95 % of the checkouts wait less than *target* seconds.

    *threads* is how many can ask at once: with it, the load comes only from them, and their number
    is always enough. *times* scales the load: 2.0 is twice as many requests.
    """
    if threads is not None:
        sources = max(1, min(threads, _MAX_SOURCES))
        think = max(0.0, sources / load.rate - load.hold - load.wait) / times

        def fits(size: int) -> bool:
            return _finite_wait_share(size, sources, think, load, target) <= _MAY_WAIT
    else:
        sources = _MAX_SOURCES

        def fits(size: int) -> bool:
            return _open_wait_share(size, load, times, target) <= _MAY_WAIT

    # The share that waits falls as the size grows, so bisection finds the first size that fits.
    return 1 + bisect_left(range(1, sources), True, key=fits)


def erlang_c(servers: int, busy: float) -> float:
    """Return the share of arrivals that wait in an M/M/c queue; *busy* servers on average."""
    if busy >= servers:
        return 1.0
    blocked = 1.0  # Erlang's B formula, by its recursion: it neither overflows nor cancels
    for n in range(1, servers + 1):
        blocked = busy * blocked / (n + busy * blocked)
    return blocked / (1 - busy / servers * (1 - blocked))


def _open_wait_share(size: int, load: Load, times: float, target: float) -> float:
    """Return the share of Poisson arrivals that wait longer than *target*."""
    busy = load.busy * times
    if busy >= size:
        return 1.0
    drained = (size - busy) * target / (load.hold * _stretch(load))
    return erlang_c(size, busy) * exp(-drained)


def _finite_wait_share(size: int, sources: int, think: float, load: Load, target: float) -> float:
    """Return the share of waits longer than *target* where only *sources* threads can ask.

    Who asks meets the others as they would be without it (the arrival theorem).
    """
    others = sources - 1
    if think <= 0.0:
        weights = [0.0] * others + [1.0]
    else:
        ratio = log(load.hold / think)
        logs = [_log_weight(n, size, others, ratio) for n in range(others + 1)]
        highest = max(logs)
        weights = [exp(each - highest) for each in logs]
    steps = size * target / (load.hold * _stretch(load))
    late: float = sum(map(mul, weights[size:], _poisson_up_to(steps)))
    return late / sum(weights)


def _log_weight(n: int, size: int, others: int, ratio: float) -> float:
    """Return the logarithm of how likely *n* of *others* hold or wait for a connection."""
    chosen = lgamma(others + 1) - lgamma(others - n + 1)
    served = lgamma(min(n, size) + 1) + max(0, n - size) * log(size)
    return chosen - served + n * ratio


def _poisson_up_to(mean: float) -> Iterator[float]:
    """Yield the chance that at most 0, 1, 2 … connections come back in a time in which *mean* do."""
    if mean > _LARGE_MEAN:
        for n in count():
            yield 0.5 * erfc((mean - n - 0.5) / sqrt(2 * mean))
    term = total = exp(-mean)
    for n in count(1):
        yield min(1.0, total)
        term *= mean / n
        total += term


def _stretch(load: Load) -> float:
    return max(0.05, (1 + load.variation) / 2)
