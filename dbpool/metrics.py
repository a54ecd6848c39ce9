"""Counters and histograms of one pool, exact and of constant size; snapshots of them and of holders.

Nothing here takes a lock: a pool changes its metrics while it holds its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from dbpool._secrets import printable

if TYPE_CHECKING:
    from dbpool.holders import ConnectionRecord, ThreadInfo

# Upper bounds in seconds, eight to a decade from 1 us to 1000 s; a last bucket holds what is
# longer. The error of a quantile is a third at most.
BOUNDS: Final = tuple(1e-6 * 10 ** (step / 8) for step in range(73))
BUCKETS: Final = len(BOUNDS) + 1

REASONS: Final = ("dead", "expired", "broken", "idle", "collected")  # why one was evicted
TIMES: Final = ("wait", "use", "connect")
_PARENT_SIZES: Final = ("pool_min", "pool_max", "pool_size", "pool_available", "requests_waiting")
# What a connection does, by psycopg's TransactionStatus.
_STATUS = "idle", "query", "idle in transaction", "idle in transaction (aborted)", "unknown"
SIZES: Final = ("size", "active", "idle", "connecting", "waiting", "min_size", "max_size")


class PoolState(StrEnum):
    """The state of a pool, or of a database in a view; each equals its string.

    They are in order of severity. If pools of several processes are merged, the most severe state
    counts. `NONE` means that all processes of the pool have ended; only views use `DEGRADED`.
    """

    NONE = ""  # all its processes have ended
    STOPPED = "stopped"
    STARTING = "starting"
    UP = "up"
    DEGRADED = "degraded"  # only in views: it serves, but not well
    DOWN = "down"

    __repr__ = str.__repr__  # in logs and events as in JSON


class Histogram:
    """How long something took, in seconds: counts by bucket, their sum and maximum."""

    __slots__ = ("counts", "max", "sum_ns")

    def __init__(self) -> None:
        self.counts = [0] * BUCKETS
        self.sum_ns = 0  # an integer: a sum of floats may fall when their order changes
        self.max = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.sum_ns += int(seconds * 1e9)
        if seconds > self.max:
            self.max = seconds

    def snapshot(self, pending: Iterable[float] = ()) -> HistogramSnapshot:
        """Return a copy that also counts *pending* durations."""
        copy = Histogram()
        copy.counts, copy.sum_ns, copy.max = self.counts[:], self.sum_ns, self.max
        for seconds in pending:
            copy.add(seconds)
        return HistogramSnapshot(tuple(copy.counts), copy.sum_ns, copy.max)


@dataclass(frozen=True)
class HistogramSnapshot:
    """A histogram of durations: a count for each bucket, the sum in nanoseconds, the maximum."""

    counts: tuple[int, ...] = (0,) * BUCKETS
    sum_ns: int = 0
    max: float = 0.0

    @property
    def sum(self) -> float:
        """The sum of all durations, in seconds."""
        return self.sum_ns / 1e9

    @property
    def count(self) -> int:
        """The number of durations."""
        return sum(self.counts)

    def quantile(self, q: float) -> float:
        """Return the *q*-quantile in seconds, interpolated within its bucket; 0 when empty."""
        below = list(accumulate(self.counts, initial=0))
        if not below[-1]:
            return 0.0
        rank = max(q * below[-1], 5e-324)  # above 0: in a bucket that is not empty
        n = bisect_left(below, rank) - 1
        lower = BOUNDS[n - 1] if n else 0.0
        upper = min(BOUNDS[n], self.max) if n < len(BOUNDS) else self.max
        return lower + max(0.0, upper - lower) * (rank - below[n]) / self.counts[n]

    def to_json(self) -> dict[str, Any]:
        """Return count, sums, max, quantiles, and `buckets` without the zeros at the end."""
        used = (n for n, count in enumerate(self.counts, 1) if count)
        return {
            "count": self.count,
            "sum": self.sum,
            "sum_ns": self.sum_ns,
            "max": self.max,
            **{f"p{percent}": self.quantile(percent / 100) for percent in (50, 95, 99)},
            "buckets": list(self.counts[: max(used, default=0)]),
        }


@dataclass(frozen=True)
class Counters:
    """Totals since the pool was opened.

    `leaks` counts forgotten connections. `held_long` counts connections held for longer than
    `leak_after`, and `returned_late` those of them that came back. `timeouts` counts callers that
    got no connection in time, and `nested` those of them whose own thread held another.
    """

    checkouts: int = 0
    timeouts: int = 0
    rejected: int = 0
    connects: int = 0
    connect_failures: int = 0
    retries: int = 0
    leaks: int = 0
    held_long: int = 0
    returned_late: int = 0
    circuit_opened: int = 0
    nested: int = 0
    discarded: Mapping[str, int] = field(
        default_factory=lambda: dict.fromkeys(REASONS, 0), hash=False
    )


COUNTS: Final = tuple(each.name for each in fields(Counters) if each.name != "discarded")


@dataclass(frozen=True)
class BreakerSnapshot:
    """A breaker's state; `since` is Unix time, `retry_after` seconds."""

    state: str = "closed"
    since: float | None = None
    last_error: str | None = None
    retry_after: float | None = None
    kind: str | None = None


@dataclass(frozen=True)
class HolderSnapshot:
    """Who holds a connection: thread, seconds so far, code location, endpoint if known.

    `pid` is the process id of the server's process, `worker` that of the holder's process. `status`
    says what the connection does, `waits` whether the thread waits for another connection of the
    same pool.
    """

    thread: str
    seconds: float
    where: str
    endpoint: str | None = None
    pid: int | None = None
    worker: int | None = None
    status: str = "unknown"
    waits: bool = False


def describe_holders(
    records: Iterable[ConnectionRecord], now: float, waiting: Collection[ThreadInfo] = (),
    most: int | None = 20,
) -> tuple[HolderSnapshot, ...]:  # fmt: skip
    """Describe who holds the connections of *records*, the longest first.

    *waiting* are the threads that wait for one. *most* bounds the number, by default that of a
    snapshot; None describes all.
    """
    held = sorted((r for r in records if r.since and r.thread), key=lambda r: r.since)
    return tuple(
        HolderSnapshot(
            thread=printable(thread.name()),
            seconds=now - record.since,
            where=record.where(),
            endpoint=record.endpoint and printable(record.endpoint),
            waits=thread in waiting,
            **_session_of(record),
        )
        for record in held[:most]
        if (thread := record.thread) is not None
    )


def _session_of(record: ConnectionRecord) -> dict[str, Any]:
    """Return the backend's pid and what it does, as libpq knows without asking."""
    if not record.is_open or (conn := record.ref()) is None:  # it may be closed at any moment
        return {}
    pid = max(record.backend_pid or 0, 0) or None  # a pooler makes up any number
    return {"pid": pid, "status": _STATUS[conn.pgconn.transaction_status]}


def holders_by_place(held: Iterable[HolderSnapshot]) -> str:
    """Return on one line who holds connections, grouped by place, five places at most."""
    places: dict[str, list[HolderSnapshot]] = {}
    for holder in held:
        places.setdefault(holder.where, []).append(holder)
    return "; ".join(
        f"{first.thread}{f' and {len(others)} more' if others else ''} {first.seconds:.1f} s at {where}"
        for where, (first, *others) in list(places.items())[:5]
    )


@dataclass(frozen=True)
class Snapshot:
    """A pool at one moment, or the pools of one name in several processes, merged.

    `active + idle + connecting == size`. In a merged snapshot, sizes and counters are sums.
    """

    state: str = PoolState.NONE
    size: int = 0
    active: int = 0
    idle: int = 0
    connecting: int = 0
    waiting: int = 0
    min_size: int = 0
    max_size: int = 0
    counters: Counters = Counters()
    wait: HistogramSnapshot = HistogramSnapshot()
    use: HistogramSnapshot = HistogramSnapshot()
    connect: HistogramSnapshot = HistogramSnapshot()
    breaker: BreakerSnapshot = BreakerSnapshot()
    holders: tuple[HolderSnapshot, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the snapshot as plain JSON types; times are in seconds."""
        return vars(self) | {
            "counters": vars(self.counters) | {"discarded": dict(self.counters.discarded)},
            **{name: getattr(self, name).to_json() for name in TIMES},
            "breaker": dict(vars(self.breaker)),
            "holders": [dict(vars(holder)) for holder in self.holders],
        }


class Metrics:
    """One pool's counters and histograms. The caller holds the pool's lock.

    A checkout that ends appends its wait, its use and its caller to `finished`. They are counted
    `BATCH` at a time, or when a snapshot is taken: between two queries nothing of this is in the
    processor's caches, so that counting one costs as much as counting four in a row. If `usage` is
    set, it counts the use by endpoint too.
    """

    BATCH = 64

    def __init__(self) -> None:
        self.finished: list[tuple[Any, ...]] = []
        self.usage: Any = None
        self.checkouts = self.timeouts = self.rejected = self.connects = self.connect_failures = 0
        self.discarded = dict.fromkeys(REASONS, 0)
        self.retries = self.leaks = self.held_long = self.returned_late = self.circuit_opened = 0
        self.wait, self.use, self.connect = Histogram(), Histogram(), Histogram()
        self.nested, self.queued, self.timed_out_seconds = 0, 0, 0.0
        self._popped: dict[str, int] = {}

    def count_finished(self) -> None:
        """Count the checkouts that ended."""
        while self.finished:  # one by one: a signal handler may raise in between
            wait, use, endpoint, code, lasti = self.finished[-1]
            del self.finished[-1]
            self.checkouts += 1
            self.wait.add(wait)
            self.use.add(use)
            if self.usage:
                self.usage.ended(wait, use, endpoint, code, lasti)

    def count_forgotten(self, record: ConnectionRecord) -> None:
        """Count a connection that its holder forgot."""
        self.leaks += 1
        if self.usage:
            self.usage.forgotten(record.endpoint, record.code, record.lasti)

    def snapshot(self, pending: Sequence[float], **rest: Any) -> Snapshot:
        """Return a snapshot of these, with the other fields in *rest*.

        *pending* are the waits of the checkouts that have not ended.
        """
        self.count_finished()
        counts = {name: getattr(self, name) for name in COUNTS}
        counts["checkouts"] += len(pending)
        return Snapshot(
            counters=Counters(**counts, discarded=dict(self.discarded)),
            wait=self.wait.snapshot(pending),
            use=self.use.snapshot(),
            connect=self.connect.snapshot(),
            **rest,
        )

    def parent_stats(
        self, pending: Sequence[float], sizes: tuple[int, ...], *, pop: bool
    ) -> dict[str, int]:
        """Return psycopg_pool's statistics: *sizes*, and what was counted since the last *pop*."""
        self.count_finished()
        failed, before = self.timeouts + self.rejected, self._popped
        wait = self.wait.sum_ns / 1e9 + sum(pending) + self.timed_out_seconds
        totals = {
            "requests_num": self.checkouts + len(pending) + failed,
            "requests_queued": self.queued,
            "requests_wait_ms": int(1000.0 * wait),
            "requests_errors": failed,
            "usage_ms": self.use.sum_ns // 1_000_000,
            "returns_bad": self.discarded["broken"],
            "connections_num": self.connects + self.connect_failures,
            "connections_ms": self.connect.sum_ns // 1_000_000,
            "connections_errors": self.connect_failures,
            "connections_lost": self.discarded["dead"],
        }
        if pop:
            self._popped = totals
        counted = {key: value - before.get(key, 0) for key, value in totals.items()}
        return counted | dict(zip(_PARENT_SIZES, sizes, strict=True))
