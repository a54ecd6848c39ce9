"""Counters and histograms, exact and of constant size; immutable snapshots that merge.

Nothing in here takes a lock: a pool changes its metrics while it holds its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate
from operator import attrgetter
from typing import Any, Final

# Upper bounds in seconds, eight to a decade from 1 us to 1000 s; what is longer has a bucket of
# its own. A quantile is thus off by at most a third.
BOUNDS: Final = tuple(1e-6 * 10 ** (step / 8) for step in range(73))
_BUCKETS: Final = len(BOUNDS) + 1

REASONS: Final = ("dead", "expired", "broken", "idle", "collected")
_HOLDERS: Final = 20  # in one snapshot
_MOST: Final = 1 << 100  # of any count; larger ones would not always fit into a float
_LONGEST: Final = 1e18  # seconds
# Of merged states and breakers the gravest is told.
_STATES: Final = ("", "stopped", "starting", "up", "down")
_BREAKERS: Final = ("closed", "half-open", "open")


def _trimmed(counts: Sequence[int]) -> list[int]:
    """Without the zeros at the end."""
    used = next((n for n in range(len(counts), 0, -1) if counts[n - 1]), 0)
    return list(counts[:used])


def count(value: Any, most: int = _MOST) -> int:
    """Return *value* if it is a count of at most *most*, else raise `ValueError`."""
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def seconds(value: Any) -> float:
    """Return *value* if it is a finite time and not negative, else raise `ValueError`."""
    if type(value) not in (int, float) or not 0 <= value <= _LONGEST:
        raise ValueError(f"{value!r:.40} is no time")
    return float(value)


def text(value: Any) -> str:
    """Return *value* if it is text, its lone surrogates replaced, else raise `ValueError`."""
    if type(value) is not str:
        raise ValueError(f"{value!r:.40} is no text")
    return value.encode(errors="replace").decode()


def _optional(read: Callable[[Any], Any], value: Any) -> Any:
    return None if value is None else read(value)


def _total(values: Iterable[int]) -> int:
    return min(sum(values), _MOST)  # can be read again, and is still associative


def _sums(names: Sequence[str], parts: Sequence[Any]) -> dict[str, Any]:
    """Add up the attributes of those names."""
    rows = zip(*map(attrgetter(*names), parts), strict=True)
    return dict(zip(names, map(_total, rows), strict=True))


class Histogram:
    """How long something took, in seconds: counts by bucket, their sum and maximum."""

    __slots__ = ("counts", "max", "ns")

    def __init__(self) -> None:
        self.counts = [0] * _BUCKETS
        self.ns = 0  # whole ones: a sum of floats may fall when their order changes
        self.max = 0.0

    @property
    def sum(self) -> float:
        """Their sum in seconds."""
        return self.ns / 1e9

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.ns += int(seconds * 1e9)
        if seconds > self.max:
            self.max = seconds

    def snapshot(self, pending: Iterable[float] = ()) -> HistogramSnapshot:
        """Return a copy, with durations counted that are not added yet."""
        copy = Histogram()
        copy.counts, copy.ns, copy.max = self.counts[:], self.ns, self.max
        for seconds in pending:
            copy.add(seconds)
        return HistogramSnapshot(tuple(copy.counts), copy.ns, copy.max)


@dataclass(frozen=True)
class HistogramSnapshot:
    """An immutable histogram: counts by bucket of `BOUNDS`, sum in nanoseconds, maximum."""

    counts: tuple[int, ...] = (0,) * _BUCKETS
    ns: int = 0
    max: float = 0.0

    @property
    def sum(self) -> float:
        """How long all took together, in seconds."""
        return self.ns / 1e9

    @property
    def count(self) -> int:
        """How many durations were counted."""
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

    def merge(self, *others: HistogramSnapshot) -> HistogramSnapshot:
        """Return the histogram of all of them."""
        parts = (self, *others)
        return HistogramSnapshot(
            counts=tuple(map(_total, zip(*(part.counts for part in parts), strict=True))),
            ns=_total(part.ns for part in parts),
            max=max(part.max for part in parts),
        )

    def to_json(self) -> dict[str, Any]:
        """Return count, sums, max and quantiles; `buckets` counts by `BOUNDS` up to the last."""
        return {
            "count": self.count,
            "sum": self.sum,
            "sum_ns": self.ns,
            "max": self.max,
            **{f"p{percent}": self.quantile(percent / 100) for percent in (50, 95, 99)},
            "buckets": _trimmed(self.counts),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HistogramSnapshot:
        """Rebuild from what `to_json` made; raise `ValueError` for anything else."""
        try:
            counts = tuple(map(count, data["buckets"]))
            if len(counts) > _BUCKETS:
                raise ValueError("this histogram has other buckets")
            counts += (0,) * (_BUCKETS - len(counts))
            return cls(counts, count(data["sum_ns"]), seconds(data["max"]))
        except (KeyError, TypeError) as ex:
            raise ValueError("this is no histogram") from ex


@dataclass(frozen=True)
class Counters:
    """Totals since the pool was opened.

    `leaks` counts connections that were forgotten, `held_long` those held for longer than
    `leak_after`; `returned_late` counts how many of the latter came back.
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
    discarded: Mapping[str, int] = field(
        default_factory=lambda: dict.fromkeys(REASONS, 0), hash=False
    )

    def merge(self, *others: Counters) -> Counters:
        """Return the sums."""
        discarded = [part.discarded for part in (self, *others)]
        return Counters(
            **_sums(_COUNTS, (self, *others)),
            discarded={name: _total(each[name] for each in discarded) for name in REASONS},
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Counters:
        """Rebuild from what `to_json` made."""
        discarded = {name: count(data["discarded"][name]) for name in REASONS}
        return cls(**{name: count(data[name]) for name in _COUNTS}, discarded=discarded)


@dataclass(frozen=True)
class BreakerSnapshot:
    """A breaker's state; `since` is Unix time, `retry_after` seconds."""

    state: str = "closed"
    since: float | None = None
    last_error: str | None = None
    retry_after: float | None = None

    def merge(self, *others: BreakerSnapshot) -> BreakerSnapshot:
        """Return the gravest; of equals the one that has failed for longest."""
        return max(self, *others, key=BreakerSnapshot._gravity) if others else self

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BreakerSnapshot:
        """Rebuild from what `to_json` made."""
        state = _BREAKERS[_BREAKERS.index(data["state"])]
        since, left = _optional(seconds, data["since"]), _optional(seconds, data["retry_after"])
        return cls(state, since, _optional(text, data["last_error"]), left)

    def _gravity(self) -> tuple[int, float, str, float]:
        since = float("-inf") if self.since is None else -self.since
        return _BREAKERS.index(self.state), since, self.last_error or "", self.retry_after or 0.0


@dataclass(frozen=True)
class HolderSnapshot:
    """Who holds a connection: thread, seconds so far, code location, endpoint if known."""

    thread: str
    seconds: float
    where: str
    endpoint: str | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HolderSnapshot:
        """Rebuild from what `to_json` made."""
        thread, where = text(data["thread"]), text(data["where"])
        return cls(thread, seconds(data["seconds"]), where, _optional(text, data["endpoint"]))


@dataclass(frozen=True)
class Snapshot:
    """A pool at one moment, or several workers' pools of one name merged.

    `active + idle + connecting == size`. Sizes and counters are sums over what was merged;
    `Snapshot()` is that of nothing.
    """

    state: str = ""
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

    def merge(self, *others: Snapshot) -> Snapshot:
        """Return all of them as one; associative and commutative."""
        parts = (self, *others)
        holders = [holder for part in parts for holder in part.holders]
        holders.sort(key=lambda h: (-h.seconds, h.thread, h.where, h.endpoint or ""))
        return Snapshot(
            state=max((part.state for part in parts), key=_STATES.index),
            holders=tuple(holders[:_HOLDERS]),
            **_sums(_SIZES, parts),
            **{name: getattr(self, name).merge(*map(attrgetter(name), others)) for name in _PARTS},
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON types; times in seconds."""
        counters = {name: getattr(self.counters, name) for name in _COUNTS}
        return {
            "state": self.state,
            **{name: getattr(self, name) for name in _SIZES},
            "counters": counters | {"discarded": dict(self.counters.discarded)},
            **{name: getattr(self, name).to_json() for name in _TIMES},
            "breaker": asdict(self.breaker),
            "holders": [asdict(holder) for holder in self.holders],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Snapshot:
        """Rebuild from what `to_json` made; raise `ValueError` for anything else."""
        try:
            parts: dict[str, Any] = {name: count(data[name]) for name in _SIZES}
            parts |= {name: HistogramSnapshot.from_json(data[name]) for name in _TIMES}
            return cls(
                state=_STATES[_STATES.index(data["state"])],
                counters=Counters.from_json(data["counters"]),
                breaker=BreakerSnapshot.from_json(data["breaker"]),
                holders=tuple(map(HolderSnapshot.from_json, data["holders"])),
                **parts,
            )
        except (KeyError, TypeError) as ex:
            raise ValueError("this is no snapshot") from ex


_COUNTS: Final = tuple(f.name for f in fields(Counters) if f.name != "discarded")
_TIMES: Final = ("wait", "use", "connect")
_PARTS: Final = ("counters", *_TIMES, "breaker")
_SIZES: Final = ("size", "active", "idle", "connecting", "waiting", "min_size", "max_size")


class Metrics:
    """One pool's counters and histograms. The caller holds the pool's lock.

    A checkout that ends leaves its wait and use in `finished`. They are counted `BATCH` at a time,
    or when somebody asks: between two queries nothing of this is in the processor's caches, and
    counting one costs then as much as counting four in a row.
    """

    BATCH = 64

    def __init__(self) -> None:
        self.finished: list[tuple[float, float]] = []
        self.checkouts = self.timeouts = self.rejected = 0
        self.connects = self.connect_failures = 0
        self.dead = self.expired = self.broken = self.idle = self.collected = 0
        self.retries = self.leaks = self.held_long = self.returned_late = self.circuit_opened = 0
        self.wait, self.use, self.connect = Histogram(), Histogram(), Histogram()

    def count_finished(self) -> None:
        """Count the checkouts that ended."""
        while self.finished:  # one by one: an exception of a signal handler may come between
            wait, use = self.finished[-1]
            del self.finished[-1]
            self.checkouts += 1
            self.wait.add(wait)
            self.use.add(use)

    def counters(self, pending: int = 0) -> Counters:
        """Return the totals, with that many checkouts counted that have not ended yet."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        counts["checkouts"] += pending
        return Counters(**counts, discarded={reason: getattr(self, reason) for reason in REASONS})

    def snapshot(self, pending: Sequence[float], **rest: Any) -> Snapshot:
        """Return a snapshot of these and of *rest*, the other fields.

        *pending* are the waits of the checkouts that have not ended.
        """
        self.count_finished()
        return Snapshot(
            counters=self.counters(len(pending)),
            wait=self.wait.snapshot(pending),
            use=self.use.snapshot(),
            connect=self.connect.snapshot(),
            **rest,
        )
