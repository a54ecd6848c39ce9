"""The report: the numbers of the pools of several processes, merged into one object.

`/stats`, the live page and `python -m dbpool stats` show it as JSON; `/metrics` reads it. Each
process writes its own report to a file, and the others parse that into the same object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import attrgetter, itemgetter
from typing import Any, Final, TypeVar

from dbpool.diagnosis.endpoints import MAX_NAMES, Rows, read_rows
from dbpool.diagnosis.endpoints import merge as merge_rows
from dbpool.metrics import (
    BUCKETS,
    COUNTS,
    REASONS,
    SIZES,
    TIMES,
    BreakerSnapshot,
    Counters,
    HistogramSnapshot,
    HolderSnapshot,
    PoolState,
    Snapshot,
)

__all__ = ["SCHEMA", "Process", "Report", "merge", "read_snapshot"]

T = TypeVar("T")

SCHEMA: Final = 2
_SHOWN: Final = ("pid", "age", "uptime", "threads", "busy")  # of a process
_MAX_COUNT: Final = 1 << 100  # a thousand of them still fit into a float
_MAX_SECONDS: Final = 1e18
_MAX_PID: Final = (1 << 31) - 1
_MAX_HOLDERS: Final = 20  # of one pool
_MAX_ROWS: Final = 1600  # of use by endpoint, in all pools: what a file has room for
_MAX_WORKERS: Final = 64  # of one pool, that are shown
# Ordered by severity: when several are merged, the most severe one counts.
_STATES: Final = tuple(PoolState)
_BREAKER_STATES: Final = ("closed", "half-open", "open")


@dataclass(frozen=True)
class Process:
    """A process that reports; `start` and `number` tell it from others with the same pid.

    `written` is when it reported, on the system's monotonic clock; `age` is how many seconds ago
    that was, and `uptime` how long the process has run. It reports again after `interval` seconds.
    `threads` is how many it serves with, and `busy` how many of them served a request then; None if
    that is not known.
    """

    pid: int
    start: str = "0"
    number: int = 0
    written: float = 0.0
    uptime: float = 0.0
    age: float = 0.0
    interval: float = 1.0
    threads: int | None = None
    busy: int | None = None

    @property
    def key(self) -> str:
        """What identifies it among all processes of the host."""
        return f"{self.pid}-{self.start}-{self.number}"


@dataclass(frozen=True)
class Report:
    """Pools by name, merged over all *processes*.

    `scope` is "process" if the report covers only the process that answers, else "all". `time` is
    Unix time. `parts` are the reports of the living processes, if several were merged. `usage` are
    each pool's rows of `dbpool.diagnosis.endpoints`, if they were asked for.
    """

    pools: Mapping[str, Snapshot]
    processes: tuple[Process, ...] = ()
    scope: str = "all"
    time: float = 0.0
    parts: tuple[Report, ...] = field(default=(), compare=False, repr=False)
    usage: Mapping[str, Rows] = field(default_factory=dict, compare=False, repr=False)

    def merge(self, *others: Report) -> Report:
        """Return this report and the others as one, with this one's scope and time."""
        found: dict[str, list[Snapshot]] = {}
        for report in (self, *others):
            for name, pool in report.pools.items():
                found.setdefault(name, []).append(pool)
        processes = [process for report in (self, *others) for process in report.processes]
        # A process counts as fresh if any of its parts is: an application in it may be closed.
        youngest = {(p.pid, p.start): p for p in sorted(processes, key=lambda p: -p.age)}
        return replace(
            self,
            pools={name: merge(*pools) for name, pools in found.items()},
            processes=tuple(process for _, process in sorted(youngest.items())),
            parts=tuple(part for report in (self, *others) for part in report._parts_of_living()),
            usage=_merge_usage([report.usage for report in (self, *others)]),
        )

    def _parts_of_living(self) -> tuple[Report, ...]:
        return self.parts or ((self,) if len(self.processes) == 1 else ())

    def as_of(self, now: float) -> Report:
        """Return one process's report as of *now*: its holders have held for longer by then."""
        (process,) = self.processes
        age = max(0.0, now - process.written)
        return replace(
            self,
            pools={name: _aged(pool, age) for name, pool in self.pools.items()},
            processes=(replace(process, age=age, uptime=process.uptime + age),),
        )

    def totals_only(self) -> Report:
        """Return what remains when the processes have ended: no sizes, states and holders."""
        kept = ("counters", *TIMES)
        pools = {
            name: Snapshot(**{key: getattr(pool, key) for key in kept})
            for name, pool in self.pools.items()
        }
        return replace(self, pools=pools, processes=())

    def to_json(self) -> dict[str, Any]:
        """Return it as `/stats` shows it; all durations are in seconds."""
        return {
            "schema": SCHEMA,
            "time": self.time,
            "scope": self.scope,
            "processes": [
                {name: getattr(process, name) for name in _SHOWN} for process in self.processes
            ],
            "pools": {name: pool.to_json() for name, pool in self.pools.items()},
        }

    def workers_to_json(self) -> dict[str, list[dict[str, Any]]]:
        """Return each living process's share of each pool, by pid; at most the busiest 64.

        `checkouts`, `refused` and `use_seconds` are totals since the process opened the pool.
        """
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in self.pools}
        for part in self._parts_of_living():
            for name, pool in part.pools.items():
                found[name].append(_worker_to_json(part.processes[0], pool))
        return {name: _busiest(workers) for name, workers in found.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """Rebuild a report from what `to_json` made; raise `ValueError` for anything else."""
        with malformed("report"):
            processes = (
                Process(read_pid(each["pid"]), age=read_seconds(each["age"]))
                for each in data["processes"]
            )
            return cls(read_pools(data["pools"]), tuple(processes))


def _worker_to_json(process: Process, pool: Snapshot) -> dict[str, Any]:
    counters = pool.counters
    return {
        "pid": process.pid,
        "age": round(process.age, 1),
        "interval": round(process.interval, 1),
        "uptime": round(process.uptime, 1),
        "state": pool.state,
        "in_use": pool.active,
        "waiting": pool.waiting,
        "max_size": pool.max_size,
        "checkouts": counters.checkouts,
        "refused": counters.timeouts + counters.rejected,
        "use_seconds": round(pool.use.sum, 3),
    }


def _busiest(workers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    workers.sort(key=lambda each: (-each["in_use"], -each["use_seconds"]))
    return sorted(workers[:_MAX_WORKERS], key=itemgetter("pid"))


def merge(*parts: Snapshot) -> Snapshot:
    """Return the snapshots as one; associative and commutative."""
    holders = [holder for part in parts for holder in part.holders]
    holders.sort(
        key=lambda h: (
            -h.seconds,
            h.thread,
            h.where,
            h.endpoint or "",
            h.worker or 0,
            h.pid or 0,
            h.status,
            h.waits,
        )
    )
    sizes: dict[str, Any] = _sums(SIZES, parts)
    times = {name: _merge_times([getattr(part, name) for part in parts]) for name in TIMES}
    return Snapshot(
        state=max((part.state for part in parts), key=_STATES.index),
        counters=_merge_counters([part.counters for part in parts]),
        breaker=max((part.breaker for part in parts), key=_severity),
        holders=tuple(holders[:_MAX_HOLDERS]),
        **sizes | times,
    )


def _merge_usage(parts: Sequence[Mapping[str, Rows]]) -> dict[str, Rows]:
    names = dict.fromkeys(name for part in parts for name in part)
    most = min(MAX_NAMES, _MAX_ROWS // max(1, len(names)))
    return {name: merge_rows((part.get(name, {}) for part in parts), most) for name in names}


def _merge_counters(parts: Sequence[Counters]) -> Counters:
    return Counters(
        discarded={reason: sum(part.discarded[reason] for part in parts) for reason in REASONS},
        **_sums(COUNTS, parts),
    )


def _sums(names: Sequence[str], parts: Iterable[object]) -> dict[str, int]:
    """Return the sum of each of those attributes."""
    rows = map(attrgetter(*names), parts)
    return dict(zip(names, map(sum, zip(*rows, strict=True)), strict=True))


def _merge_times(parts: Sequence[HistogramSnapshot]) -> HistogramSnapshot:
    return HistogramSnapshot(
        counts=tuple(map(sum, zip(*(part.counts for part in parts), strict=True))),
        sum_ns=sum(part.sum_ns for part in parts),
        max=max(part.max for part in parts),
    )


def _severity(breaker: BreakerSnapshot) -> tuple[int, float, str, float, str]:
    """Sort by the state, then by how long it has failed: the largest is the most severe."""
    since = float("-inf") if breaker.since is None else -breaker.since
    state = _BREAKER_STATES.index(breaker.state)
    return state, since, breaker.last_error or "", breaker.retry_after or 0.0, breaker.kind or ""


def _aged(pool: Snapshot, elapsed: float) -> Snapshot:
    left = pool.breaker.retry_after
    breaker = replace(pool.breaker, retry_after=left and max(0.0, left - elapsed))
    holders = (HolderSnapshot(**vars(h) | {"seconds": h.seconds + elapsed}) for h in pool.holders)
    return replace(pool, breaker=breaker, holders=tuple(holders))


# Reading JSON: a file may be half written, old, or of another program.


@contextmanager
def malformed(what: str) -> Iterator[None]:
    """Raise `ValueError` if the JSON that is read inside lacks something or has a wrong type."""
    try:
        yield
    except (AttributeError, KeyError, TypeError) as ex:
        raise ValueError(f"this is not a {what}") from ex


def read_snapshot(data: Mapping[str, Any]) -> Snapshot:
    """Rebuild a snapshot from what `Snapshot.to_json` made; raise `ValueError` for anything else."""
    with malformed("snapshot"):
        counters, breaker = data["counters"], data["breaker"]
        sizes: dict[str, Any] = {name: read_count(data[name]) for name in SIZES}
        times = {name: _read_histogram(data[name]) for name in TIMES}
        return Snapshot(
            state=PoolState(data["state"]),
            counters=Counters(
                discarded={name: read_count(counters["discarded"][name]) for name in REASONS},
                **{name: read_count(counters[name]) for name in COUNTS},
            ),
            breaker=BreakerSnapshot(
                state=_BREAKER_STATES[_BREAKER_STATES.index(breaker["state"])],
                since=read_optional(read_seconds, breaker["since"]),
                last_error=read_optional(read_text, breaker["last_error"]),
                retry_after=read_optional(read_seconds, breaker["retry_after"]),
                kind=read_optional(read_text, breaker["kind"]),
            ),
            holders=tuple(map(_read_holder, data["holders"])),
            **sizes | times,
        )


def read_pools(data: Any) -> dict[str, Snapshot]:
    """Rebuild the pools of a report or of a file."""
    return {read_text(name): read_snapshot(pool) for name, pool in data.items()}


def read_usage(data: Any) -> dict[str, Rows]:
    """Rebuild the use by endpoint of a file."""
    return {read_text(name): read_rows(rows) for name, rows in data.items()}


def _read_holder(data: Any) -> HolderSnapshot:
    return HolderSnapshot(
        thread=read_text(data["thread"]),
        seconds=read_seconds(data["seconds"]),
        where=read_text(data["where"]),
        endpoint=read_optional(read_text, data["endpoint"]),
        pid=read_optional(read_pid, data["pid"]),
        worker=read_optional(read_pid, data["worker"]),
        status=read_text(data["status"]),
        waits=data["waits"] is True,
    )


def _read_histogram(data: Any) -> HistogramSnapshot:
    counts = tuple(map(read_count, data["buckets"]))
    if len(counts) > BUCKETS:
        raise ValueError("this histogram has other buckets")
    counts += (0,) * (BUCKETS - len(counts))
    return HistogramSnapshot(counts, read_count(data["sum_ns"]), read_seconds(data["max"]))


def read_count(value: Any) -> int:
    """Return *value* if it is a count, else raise `ValueError`; an absurdly large one is capped."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.40} is not a count")
    return value if value < _MAX_COUNT else _MAX_COUNT  # noqa: FURB136  # min() takes longer


def read_pid(value: Any) -> int:
    """Return *value* if it can be a process id, else raise `ValueError`."""
    if read_count(value) > _MAX_PID:
        raise ValueError(f"{value!r:.40} is not a pid")
    return int(value)


def read_seconds(value: Any) -> float:
    """Return *value* if it is a finite time and not negative, else raise `ValueError`."""
    if type(value) not in (int, float) or not 0 <= value <= _MAX_SECONDS:
        raise ValueError(f"{value!r:.40} is not a time")
    return float(value)


def read_text(value: Any) -> str:
    """Return *value* if it is text, its lone surrogates replaced, else raise `ValueError`."""
    if type(value) is not str:
        raise ValueError(f"{value!r:.40} is not a text")
    return value.encode(errors="replace").decode()


def read_optional(read: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else read(value)
