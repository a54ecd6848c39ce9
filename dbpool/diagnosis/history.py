"""What a pool did in the last fifteen minutes, in steps of five seconds that merge over processes.

Pure: no file, no thread, and the clock comes with each call. A step is numbered by the system's
monotonic clock, which the processes of a host share, so that a wall clock that is set changes
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, Final

from dbpool.metrics import BOUNDS as FINE_BOUNDS
from dbpool.metrics import HistogramSnapshot, Snapshot

__all__ = ["BOUNDS", "STEP", "STEPS", "Buckets", "History", "Recorder", "Step", "slot_of"]

STEP: Final = 5.0  # seconds
STEPS: Final = 180
_MINUTE: Final = 12  # steps
_WARM_UP: Final = 60.0  # seconds of a worker's life in which its connects are no churn

# Every fourth of the pool's own bounds, 100 us to 10 s, two to a decade; a twelfth bucket takes
# what is longer. Buckets can be added up, percentiles cannot.
_FIRST_BOUND, _BOUND_STEP, _BUCKETS = 16, 4, 12
BOUNDS: Final = FINE_BOUNDS[
    _FIRST_BOUND : _FIRST_BOUND + _BOUND_STEP * (_BUCKETS - 1) : _BOUND_STEP
]
_LONGEST: Final = 100.0  # seconds that a duration in the last bucket is taken for


def slot_of(now: float) -> int:
    """Return the number of the step at *now* on the monotonic clock."""
    return int(now // STEP)


@dataclass(frozen=True, slots=True)
class Buckets:
    """Durations by bucket of `BOUNDS`, and their sum in seconds."""

    counts: tuple[int, ...] = (0,) * _BUCKETS
    seconds: float = 0.0

    @classmethod
    def between(cls, before: HistogramSnapshot, after: HistogramSnapshot) -> Buckets:
        """Return what was added from one snapshot to the next; all of *after* if it began anew."""
        if after.sum_ns < before.sum_ns or after.count < before.count:
            before = HistogramSnapshot()
        fine = [max(0, b - a) for a, b in zip(before.counts, after.counts, strict=True)]
        edges = [
            0,
            *range(_FIRST_BOUND + 1, _FIRST_BOUND + _BOUND_STEP * (_BUCKETS - 1) + 1, _BOUND_STEP),
            len(fine),
        ]
        counts = tuple(sum(fine[a:b]) for a, b in pairwise(edges))
        return cls(counts, (after.sum_ns - before.sum_ns) / 1e9)

    @property
    def count(self) -> int:
        """How many durations there are."""
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """Their mean in seconds, None if there are none."""
        return self.seconds / self.count if self.count else None

    def quantile(self, q: float) -> float | None:
        """Return the *q*-quantile in seconds, interpolated in its bucket; None if there are none."""
        rank, below = q * self.count, 0
        for n, count in enumerate(self.counts):
            if count and below + count >= rank:
                lower = BOUNDS[n - 1] if n else 0.0
                upper = BOUNDS[n] if n < len(BOUNDS) else _LONGEST
                return lower + (upper - lower) * max(0.0, rank - below) / count
            below += count
        return None

    def merge(self, *others: Buckets) -> Buckets:
        """Return the buckets of all of them."""
        parts = (self, *others)
        counts = tuple(map(sum, zip(*(part.counts for part in parts), strict=True)))
        return Buckets(counts, sum(part.seconds for part in parts))


@dataclass(frozen=True, slots=True)
class Step:
    """What a pool did in one step; several workers' steps add up.

    `in_use` and `size` are mean numbers of connections, `waiting` is the largest number of waiting
    callers that was seen. `refused` counts callers that got none. The `settled_` counts are those
    of workers older than a minute: a new one has to connect.
    """

    in_use: float = 0.0
    size: float = 0.0
    waiting: int = 0
    checkouts: int = 0
    refused: int = 0
    connects: int = 0
    connect_failures: int = 0
    retries: int = 0
    forgotten: int = 0
    settled_checkouts: int = 0
    settled_connects: int = 0
    wait: Buckets = field(default_factory=Buckets)
    use: Buckets = field(default_factory=Buckets)
    connect: Buckets = field(default_factory=Buckets)

    def merge(self, *others: Step) -> Step:
        """Return the sums."""
        parts = (self, *others)
        sums: dict[str, Any] = {
            name: sum(getattr(part, name) for part in parts) for name in NUMBERS
        }
        for name in TIMES:
            sums[name] = getattr(self, name).merge(*(getattr(other, name) for other in others))
        return Step(**sums)


TIMES: Final = ("wait", "use", "connect")
NUMBERS: Final = tuple(f.name for f in fields(Step) if f.name not in TIMES)
_COUNTERS: Final = ("checkouts", "connects", "connect_failures", "retries")
# What `/stats` shows, by the name it has there.
_SERIES: Final = ("in_use", "size", "waiting", "checkouts", "refused", "connects", "forgotten")


class History:
    """The last `STEPS` steps of one pool by number; what is not known is missing."""

    def __init__(self, steps: Mapping[int, Step] | None = None) -> None:
        latest = sorted(steps or {})[-STEPS:]
        self.steps: dict[int, Step] = {slot: (steps or {})[slot] for slot in latest}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, History) and self.steps == other.steps

    __hash__ = None  # type: ignore[assignment]  # it changes

    def add(self, slot: int, step: Step) -> None:
        """Add a step to what is known of its five seconds, and forget what is too old."""
        known = self.steps.get(slot)
        self.steps[slot] = step if known is None else known.merge(step)
        for old in [each for each in self.steps if each <= slot - STEPS]:
            del self.steps[old]
        while len(self.steps) > STEPS:  # a clock that jumped back left some of its future
            del self.steps[max(self.steps)]

    def merge(self, *others: History) -> History:
        """Return the history of all of them, step by step."""
        merged: dict[int, list[Step]] = {}
        for history in (self, *others):
            for slot, step in history.steps.items():
                merged.setdefault(slot, []).append(step)
        return History({slot: first.merge(*rest) for slot, (first, *rest) in merged.items()})

    def last(self, now: float, number: int = STEPS) -> list[Step | None]:
        """Return the *number* steps before the one of *now*, oldest first; unknown ones are None."""
        end = slot_of(now)
        return [self.steps.get(slot) for slot in range(end - number, end)]

    def minute(self, now: float) -> dict[str, dict[str, float | int | None]]:
        """Return count, p50, p95 and p99 of each kind of time in the last minute, in seconds."""
        steps = [step for step in self.last(now, _MINUTE) if step is not None]
        found: dict[str, dict[str, float | int | None]] = {}
        for name in TIMES:
            times = Buckets().merge(*(getattr(step, name) for step in steps))
            quantiles = {f"p{q}": times.quantile(q / 100) for q in (50, 95, 99)}
            found[name] = {"count": times.count} | {k: rounded(v) for k, v in quantiles.items()}
        return found

    def around(self, now: float) -> History:
        """Return it without steps that cannot be of the last quarter of an hour.

        A file may be older than the system's start, and then of a clock that began anew.
        """
        end = slot_of(now)
        known = self.steps.items()
        return History({slot: step for slot, step in known if end - STEPS <= slot <= end})

    def to_json(self, now: float) -> dict[str, list[float | None]]:
        """Return series of one length, oldest first, for `/stats`; times in seconds."""
        steps = self.last(now)
        series: dict[str, list[float | None]] = {
            name: [None if s is None else rounded(getattr(s, name)) for s in steps]
            for name in _SERIES
        }
        for name in TIMES[:2]:
            quantiles = [None if s is None else getattr(s, name).quantile(0.95) for s in steps]
            series[f"{name}_p95"] = [rounded(q) for q in quantiles]
        return series


def rounded(value: float | None) -> float | None:
    """Return three digits of a number; a whole number as it is."""
    return value if value is None or isinstance(value, int) else float(f"{value:.3g}")


class Recorder:
    """Makes steps of one pool's snapshots; *started* is when its worker began, monotonic."""

    def __init__(self, started: float = 0.0) -> None:
        self._started = started
        self._slot: int | None = None
        self._samples: list[tuple[int, int, int]] = []  # active, size, waiting
        self._before: Snapshot | None = None  # as it was when the step began
        self._latest: Snapshot | None = None

    def sample(self, snapshot: Snapshot, now: float) -> tuple[int, Step] | None:
        """Take a look at the pool; return the step that ended before this look, if one did.

        Looks further apart than a step, as after a suspend, leave a gap: no step is made up.
        """
        slot, ended = slot_of(now), None
        if self._slot is None or not 0 <= slot - self._slot <= 1:
            self._begin(slot, snapshot)
        elif slot != self._slot:
            ended = (self._slot, self._step(snapshot, now))
            self._begin(slot, snapshot)
        self._samples.append((snapshot.active, snapshot.size, snapshot.waiting))
        return ended

    def _begin(self, slot: int, snapshot: Snapshot) -> None:
        self._slot, self._before, self._samples = slot, snapshot, []

    def _step(self, after: Snapshot, now: float) -> Step:
        before = self._before or after
        delta = {name: _delta(before, after, name) for name in _COUNTERS}
        is_settled = now - self._started > _WARM_UP + STEP
        number = max(1, len(self._samples))
        return Step(
            in_use=sum(active for active, _, _ in self._samples) / number,
            size=sum(size for _, size, _ in self._samples) / number,
            waiting=max((waiting for _, _, waiting in self._samples), default=0),
            refused=_delta(before, after, "timeouts") + _delta(before, after, "rejected"),
            forgotten=_delta(before, after, "leaks"),
            settled_checkouts=delta["checkouts"] if is_settled else 0,
            settled_connects=delta["connects"] if is_settled else 0,
            wait=Buckets.between(before.wait, after.wait),
            use=Buckets.between(before.use, after.use),
            connect=Buckets.between(before.connect, after.connect),
            **delta,
        )


def _delta(before: Snapshot, after: Snapshot, name: str) -> int:
    """How much a counter grew; all of it if the pool was opened anew meanwhile."""
    first, last = getattr(before.counters, name), getattr(after.counters, name)
    return int(last - first if last >= first else last)


def merged(histories: Iterable[Mapping[str, History]]) -> dict[str, History]:
    """Merge the histories of several processes, by the pool's name."""
    found: dict[str, list[History]] = {}
    for each in histories:
        for name, history in each.items():
            found.setdefault(name, []).append(history)
    return {name: first.merge(*rest) for name, (first, *rest) in found.items()}


def median(values: Sequence[float]) -> float | None:
    """Return the median, None of nothing."""
    ranked = sorted(values)
    return ranked[len(ranked) // 2] if ranked else None
