"""What each endpoint used of a pool, counted; each line of code where there is no endpoint.

A row of numbers for each, which add up over processes, those that have ended among them. No I/O.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping
from operator import add
from types import CodeType, FrameType
from typing import Any, Final

from dbpool import holders
from dbpool._secrets import printable
from dbpool.diagnosis._scene import mapping, number
from dbpool.diagnosis.history import BOUNDS, Buckets, rounded
from dbpool.metrics import HistogramSnapshot, Snapshot

__all__ = [
    "MAX_NAMES", "OTHER", "SHOWN", "Rows", "UsageCounter", "complete", "forgotten", "merge", "read_rows",
    "to_json", "totals",
]  # fmt: skip

MAX_NAMES: Final = 200  # that are told apart in one pool
SHOWN: Final = 50  # of these
OTHER: Final = "other"  # all that are beyond
LONGEST: Final = 100  # characters of a name

Row = list[int]  # two counts, nanoseconds of use, and durations by bucket: see below
Rows = dict[str, Row]  # by name
_GAVE_UP, _FORGOTTEN, _USE_NS, _WAIT = range(4)
_USE: Final = _WAIT + len(BOUNDS) + 1
_WIDTH: Final = _USE + len(BOUNDS) + 1


class UsageCounter:
    """Counts the use of one pool in this process, from the day it is given to `count_usage`."""

    def __init__(self) -> None:
        self._rows: Rows = {}
        self._known: dict[object, Row] = {}  # the same rows, by what is quick to look up
        self._lock = threading.RLock()  # a signal handler may come back in

    def ended(
        self, wait: float, use: float, endpoint: str | None, code: CodeType, lasti: int
    ) -> None:
        """Count a checkout that ended; its pool's lock is held."""
        row = self._row(endpoint, code, lasti)
        row[_WAIT + bisect_left(BOUNDS, wait)] += 1
        row[_USE + bisect_left(BOUNDS, use)] += 1
        row[_USE_NS] += int(use * 1e9)

    def forgotten(self, endpoint: str | None, code: CodeType, lasti: int) -> None:
        """Count a connection that was not returned; its pool's lock is held."""
        self._row(endpoint, code, lasti)[_FORGOTTEN] += 1

    def gave_up(self, endpoint: str | None, frame: FrameType) -> None:
        """Count a caller who got no connection, in the caller's own thread."""
        if endpoint is None:
            frame = holders.caller(frame)
        with self._lock:
            self._row(endpoint, frame.f_code, frame.f_lasti)[_GAVE_UP] += 1

    def rows(self) -> Rows:
        """Return a copy."""
        return {name: row[:] for name, row in list(self._rows.items())}

    def _row(self, endpoint: str | None, code: CodeType, lasti: int) -> Row:
        # Hashing the code itself would take longer than all the rest.
        key = endpoint or (code.co_filename, code.co_firstlineno, lasti)
        return self._known.get(key) or self._add(
            key, endpoint or holders.where(code, lasti, code.co_filename)
        )

    def _add(self, key: object, name: str) -> Row:
        if len(self._known) >= MAX_NAMES:
            return self._rows.setdefault(OTHER, [0] * _WIDTH)
        row = self._rows.setdefault(_printable(name), [0] * _WIDTH)
        return self._known.setdefault(key, row)


def _printable(name: str) -> str:
    return printable(name)[:LONGEST] or OTHER


def merge(parts: Iterable[Rows], most: int = MAX_NAMES) -> Rows:
    """Return the sums; beyond *most* names those that used the least become one."""
    found: Rows = {}
    for part in parts:
        for name, row in part.items():
            found[name] = list(map(add, found[name], row)) if name in found else row
    return _largest(found, most)


def _largest(rows: Rows, number: int, first: Collection[str] = ()) -> Rows:
    """Return that many rows, those in *first* and the largest, and one of all others."""
    ranked = sorted(rows.items(), key=lambda x: (x[0] not in first, -x[1][_USE_NS], x[0]))
    kept = dict([each for each in ranked if each[0] != OTHER][:number])
    rest = [row for name, row in ranked if name not in kept]
    return kept | {OTHER: [sum(numbers) for numbers in zip(*rest, strict=True)]} if rest else kept


def complete(rows: Rows, pool: Snapshot) -> Rows:
    """Return the rows of a process that ended, with what it had not written yet as `OTHER`.

    So the rows add up to the pool's own totals, which are written more often.
    """
    counters = pool.counters
    total = [counters.timeouts + counters.rejected, counters.leaks, pool.use.sum_ns]
    for times in (pool.wait, pool.use):
        total += Buckets.between(HistogramSnapshot(), times).counts
    known = [sum(numbers) for numbers in zip(*rows.values(), [0] * _WIDTH, strict=True)]
    missing = [max(0, whole - part) for whole, part in zip(total, known, strict=True)]
    return merge([rows, {OTHER: missing}]) if any(missing) else rows


def read_rows(data: Any) -> Rows:
    """Read rows out of JSON; raise `ValueError` if they are none."""
    if not isinstance(data, dict) or len(data) > MAX_NAMES + 1:
        raise ValueError("these are no rows")
    for name, row in data.items():
        is_row = type(row) is list and len(row) == _WIDTH
        if not is_row or not all(type(n) is int and 0 <= n < 1 << 80 for n in row):
            raise ValueError(f"{name!r:.40} has no row")
    return {_printable(name): row for name, row in data.items()}


def forgotten(after: Rows, before: Rows) -> tuple[tuple[str, int], ...]:
    """Return who forgot how many connections between two readings, the worst first."""
    counts = [
        (name, row[_FORGOTTEN] - (before[name][_FORGOTTEN] if name in before else 0))
        for name, row in after.items()
    ]
    return tuple(
        sorted((each for each in counts if each[1] > 0), key=lambda each: (-each[1], each))
    )


def totals(rows: Rows) -> Iterator[tuple[str, int, float, int]]:
    """Yield name, checkouts, seconds of use and callers that gave up: `SHOWN`, and all others."""
    for name, row in _largest(rows, SHOWN).items():
        yield name, sum(row[_WAIT:_USE]), row[_USE_NS] / 1e9, row[_GAVE_UP]


def to_json(rows: Rows, seen: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the `SHOWN` largest users for `/stats`, and all others as one; times in seconds.

    *seen* is what looks at the holders showed: `in_use`, a mean number of connections of late, and
    `longest`, the longest hold. The other numbers are those of all checkouts that have ended.
    """
    used = sum(row[_USE_NS] for row in rows.values())
    known = rows | {name: [0] * _WIDTH for name in seen.keys() - rows.keys()}
    largest = _largest(known, SHOWN, seen.keys())
    shown = [
        _row_to_json(name, row, used, mapping(seen.get(name))) for name, row in largest.items()
    ]
    return sorted(shown, key=lambda each: (-each["in_use"], -each["use_seconds"]))


def _row_to_json(name: str, row: Row, used: int, seen: Mapping[str, Any]) -> dict[str, Any]:
    wait, use = (Buckets(tuple(row[at : at + len(BOUNDS) + 1])) for at in (_WAIT, _USE))
    return {
        "endpoint": name,
        "checkouts": wait.count,
        "use_seconds": row[_USE_NS] / 1e9,
        "use_share": round(row[_USE_NS] / used, 3) if used else None,
        "use_p95": rounded(use.quantile(0.95)),
        "wait_p95": rounded(wait.quantile(0.95)),
        "gave_up": row[_GAVE_UP],
        "forgotten": row[_FORGOTTEN],
        "in_use": number(seen.get("in_use")),
        "longest": number(seen.get("longest")),
    }
