"""The load of a running application, from two reports of its statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from typing import Any, Final

from dbpool.metrics import BOUNDS, HistogramSnapshot, Snapshot
from dbpool.report import read_snapshot
from dbpool.sizing._queueing import TARGET, Load, connections_needed

MIN_CHECKOUTS: Final = 1000  # checkouts; with fewer the 95th percentile depends on a handful
_SERIOUS: Final = ("warning", "critical")
_IGNORED_CODE: Final = "DB11"  # more configured than the server allows: the load is not affected


@dataclass(frozen=True)
class Measured:
    """A pool's load between two reports, of all processes together; `load` is that of one process.

    If there is not enough data, `load` is None and `reason` says why. Times are in seconds.
    """

    processes: int
    max_size: int  # of one process
    seconds: float
    checkouts: int
    wait_p95: float = 0.0
    load: Load | None = None
    reason: str | None = None

    @property
    def is_too_small(self) -> bool:
        """Whether callers already wait for too long: the load may be larger than what was seen."""
        return self.wait_p95 >= TARGET

    def needs(self, threads: int | None = None, times: float = 1.0) -> int | None:
        """Return the `max_size` that the load needs, None if there is not enough data.

        If the pool is too small and the number of threads is unknown, it may need more.
        """
        if self.load is None:
            return None
        needed = connections_needed(self.load, threads, times)
        return max(needed, self.max_size + 1) if self.is_too_small and not threads else needed


def measure(before: Mapping[str, Any], after: Mapping[str, Any], pool: str) -> Measured:
    """Compare two reports, as `/stats` gives them, of the pool of that name."""
    first, last = (_snapshot(report, pool) for report in (before, after))
    processes = max(1, len(after["processes"]))
    seconds = max(0.0, _written(after) - _written(before))  # 0 if nothing new was published
    use, wait = _since(last.use, first.use), _since(last.wait, first.wait)
    checkouts = 0 if use is None else use.count
    size = last.max_size // processes
    reason = _doubt(after, pool, last)
    if use is None or wait is None:
        reason = reason or "its counters were reset in that time"
    elif checkouts < MIN_CHECKOUTS or seconds <= 0:
        reason = reason or f"{checkouts} of {MIN_CHECKOUTS} needed checkouts in {seconds:.0f} s"
    if reason is not None or use is None or wait is None:
        return Measured(processes, size, seconds, checkouts, reason=f"not enough data: {reason}")
    hold = use.sum / checkouts
    load = Load(
        rate=checkouts / seconds / processes,
        hold=max(hold, 1e-9),
        variation=_variation(use),
        wait=wait.sum / max(1, wait.count),
    )
    return Measured(processes, size, seconds, checkouts, wait.quantile(0.95), load)


def _snapshot(report: Mapping[str, Any], pool: str) -> Snapshot:
    found = report["pools"].get(pool)
    return Snapshot() if found is None else read_snapshot(found)


def _written(report: Mapping[str, Any]) -> float:
    """Return when the processes wrote, on average: each publishes once a second."""
    ages: list[float] = [process["age"] for process in report["processes"]]
    written: float = report["time"] - sum(ages) / max(1, len(ages))
    return written


def _doubt(after: Mapping[str, Any], pool: str, last: Snapshot) -> str | None:
    """Return why the load is not a usual one, None if it is."""
    if last.state != "up":
        return f"the pool is {last.state or 'not running'}"
    if last.breaker.state != "closed":
        return f"its breaker is {last.breaker.state}"
    for finding in after.get("findings", ()):
        is_serious = finding["severity"] in _SERIOUS and finding["code"] != _IGNORED_CODE
        if is_serious and finding["pool"] in (pool, None):
            return f"{finding['code']} was found: {finding['text']}"
    return None


def _since(last: HistogramSnapshot, first: HistogramSnapshot) -> HistogramSnapshot | None:
    """Return what was added between two states of a histogram, None if it began anew."""
    counts = tuple(b - a for a, b in zip(first.counts, last.counts, strict=True))
    if min(counts) < 0 or last.sum_ns < first.sum_ns:
        return None
    return HistogramSnapshot(counts, last.sum_ns - first.sum_ns, last.max)


def _variation(use: HistogramSnapshot) -> float:
    """Return the squared coefficient of variation, each duration taken as its bucket's middle."""
    edges = (0.0, *BOUNDS, max(use.max, BOUNDS[-1]))
    middles = [sqrt(low * high) for low, high in pairwise(edges)]
    weighted = [(middle, n) for middle, n in zip(middles, use.counts, strict=True) if n]
    mean = sum(middle * n for middle, n in weighted) / use.count
    square = sum(middle * middle * n for middle, n in weighted) / use.count
    return max(0.0, square / (mean * mean) - 1) if mean else 0.0
