"""What a diagnosis looks at: a report, read leniently, with what happened over time beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import psycopg

from dbpool._secrets import printable
from dbpool.diagnosis._server_view import ServerView, Session
from dbpool.diagnosis.history import Step
from dbpool.errors import classify

_MAX_ROWS: Final = 1000  # of anything in a report
_LONGEST: Final = 300  # characters of a text
_BIGGEST: Final = 1e15
STALE: Final = 10.0  # seconds after which what a server said is no longer used

QUERY: Final = "query"
IDLE_IN_TRANSACTION: Final = "idle in transaction"
ABORTED: Final = "idle in transaction (aborted)"
IDLE: Final = "idle"
UNKNOWN: Final = "unknown"


def mapping(value: Any) -> Mapping[str, Any]:
    """Return *value* if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def rows(value: Any) -> list[Mapping[str, Any]]:
    """Return the mappings of a list."""
    found = value if isinstance(value, (list, tuple)) else ()
    return [each for each in found[:_MAX_ROWS] if isinstance(each, Mapping)]


def number(value: Any, otherwise: float = 0.0) -> float:
    """Return a finite number that is not negative, else *otherwise*."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = min(value, _BIGGEST)
        if math.isfinite(value) and value >= 0:
            return float(value)
    return otherwise


def whole(value: Any) -> int | None:
    """Return a whole number, None for anything else."""
    return int(number(value)) if isinstance(value, int) and not isinstance(value, bool) else None


def text(value: Any) -> str | None:
    """Return a text on one line and of bounded length, None for anything else or nothing."""
    if not isinstance(value, str):
        return None
    return printable(value[:_LONGEST].encode(errors="replace").decode()) or None


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a connection; what the report does not say is None."""

    seconds: float
    where: str | None = None
    endpoint: str | None = None
    thread: str | None = None
    pid: int | None = None  # its backend
    worker: int | None = None  # its process
    status: str = UNKNOWN
    is_waiting: bool = False  # whether its thread waits for another connection of this pool

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Holder:
        """Read what `/stats` says of a holder."""
        return cls(
            seconds=number(data.get("seconds")),
            where=text(data.get("where")),
            endpoint=text(data.get("endpoint")),
            thread=text(data.get("thread")),
            pid=whole(data.get("pid")),
            worker=whole(data.get("worker")),
            status=text(data.get("status")) or UNKNOWN,
            is_waiting=data.get("waits") is True,
        )

    @property
    def is_unused(self) -> bool:
        """Whether its connection does nothing in the database."""
        return self.status in (IDLE, IDLE_IN_TRANSACTION, ABORTED)

    @property
    def place(self) -> str:
        """The endpoint and the line of code, as a sentence names them."""
        where = self.where or "an unknown place"
        return f"{self.endpoint} ({where})" if self.endpoint else where


@dataclass(frozen=True, slots=True)
class Run:
    """How long a holder has been seen to do the same: *looks* in a row, a second apart."""

    status: str
    looks: int


@dataclass(frozen=True, slots=True)
class Limit:
    """A connection limit that a connect met: since when, and when that was seen last."""

    error: str
    since: float
    seen: float


@dataclass(frozen=True, slots=True)
class Watch:
    """What repeated looks at a pool showed; see `dbpool.diagnosis.watching`.

    `waiting_since` is the Unix time since which callers have waited at every look. The share of
    holders that did nothing in the database is that of the last looks while callers waited.
    `forgotten` counts connections of the last minute, `forgotten_by` by endpoint or line, `refused` and `nested` callers of the last
    ten seconds.
    """

    waiting_since: float | None = None
    unused_since: float | None = None
    unused_share: float | None = None
    forgotten: int = 0
    forgotten_since: float | None = None
    forgotten_by: tuple[tuple[str, int], ...] = ()
    refused: int = 0
    nested: int = 0
    nested_since: float | None = None
    limit: Limit | None = None
    runs: Mapping[tuple[object, ...], Run] = field(default_factory=dict)

    def run_of(self, holder: Holder, now: float) -> Run | None:
        """Return how long this holder has done what it does now."""
        return self.runs.get(key_of(holder, now))


def key_of(holder: Holder, now: float) -> tuple[object, ...]:
    """Tell one checkout from another: its start is known to within two seconds."""
    return (
        holder.worker,
        holder.pid,
        holder.thread,
        holder.where,
        round((now - holder.seconds) / 4),
    )


@dataclass(frozen=True)
class PoolScene:
    """One pool: now, over the last steps, and as its server sees it."""

    name: str
    now: float  # Unix time
    state: str
    active: int
    idle: int
    waiting: int
    max_size: int
    breaker: Mapping[str, Any]
    counters: Mapping[str, Any]
    holders: tuple[Holder, ...]
    steps: Sequence[Step | None] = ()
    watch: Watch = field(default_factory=Watch)
    view: ServerView | None = None
    pooler: bool = False

    @property
    def error_kind(self) -> str:
        """What kind of failure the last error of a connect is."""
        error = text(self.breaker.get("last_error")) or ""
        return text(self.breaker.get("kind")) or classify(psycopg.OperationalError(error))

    @property
    def is_short(self) -> bool:
        """Whether callers lack connections: in one worker, or in all together."""
        return self.waiting > 0 or self.refused > 0 or 0 < self.max_size <= self.active

    @property
    def refused(self) -> int:
        """How many callers got no connection in the last ten seconds."""
        return max(self.watch.refused, sum(step.refused for step in self.known(2)))

    @property
    def is_stuck(self) -> bool:
        """Whether callers have waited for long, or were refused."""
        since = self.watch.waiting_since
        return self.refused > 0 or (since is not None and self.now - since >= 4.0)

    @property
    def last_view(self) -> ServerView | None:
        """What the server said, unless that is too old to be used."""
        is_fresh = self.view is not None and -1.0 <= self.now - self.view.time <= STALE
        return self.view if is_fresh else None

    def session_of(self, holder: Holder) -> Session | None:
        """Return the server's own word on a holder's session."""
        view = self.last_view
        if view is None or not view.is_joined or holder.pid is None:
            return None
        session = view.sessions.get(holder.pid)
        return session if session is not None and session.is_ours else None

    def holder_of(self, pid: int) -> Holder | None:
        """Return who holds the connection of that backend, if one of ours does."""
        return next((holder for holder in self.holders if holder.pid == pid), None)

    def known(self, number: int) -> list[Step]:
        """Return those of the last *number* steps that are known."""
        return [step for step in self.steps[-number:] if step is not None]


@dataclass(frozen=True)
class Process:
    """A worker; `age` is how old what it published last is, in seconds.

    `threads` is how many it serves with, `busy` how many of them serve a request now, if known.
    """

    pid: int
    age: float
    uptime: float


@dataclass(frozen=True)
class Scene:
    """All that a diagnosis looks at. `deaths` are the Unix times at which workers were lost.

    `stalled` is the longest pause between two looks of the last seconds, which should be a second:
    it says that the host or the watching process itself stood still.
    """

    now: float
    pools: tuple[PoolScene, ...] = ()
    processes: tuple[Process, ...] = ()
    deaths: tuple[float, ...] = ()
    stalled: float = 0.0

    @classmethod
    def read(
        cls,
        report: Any,
        *,
        now: float | None = None,
        steps: Mapping[str, Sequence[Step | None]] | None = None,
        watches: Mapping[str, Watch] | None = None,
        views: Mapping[str, ServerView] | None = None,
        poolers: frozenset[str] = frozenset(),
        **rest: Any,
    ) -> Scene:
        """Read a report as `/stats` shows it; whatever does not fit is left out.

        *steps*, *watches* and *views* are by pool, *poolers* are those behind a transaction
        pooler; *rest* are the other fields.
        """
        data = mapping(report)
        at = number(data.get("time")) if now is None else now
        pools = list(mapping(data.get("pools")).items())[:_MAX_ROWS]
        return cls(
            now=at,
            pools=tuple(
                replace(
                    _read_pool(str(name), mapping(pool), at),
                    steps=(steps or {}).get(name, ()),
                    watch=(watches or {}).get(name, Watch()),
                    view=(views or {}).get(name),
                    pooler=name in poolers,
                )
                for name, pool in pools
            ),
            processes=tuple(
                Process(
                    whole(each.get("pid")) or 0,
                    number(each.get("age")),
                    number(each.get("uptime")),
                )
                for each in rows(data.get("processes"))
            ),
            **rest,
        )


def _read_pool(name: str, data: Mapping[str, Any], now: float) -> PoolScene:
    return PoolScene(
        name=text(name) or "?",
        now=now,
        state=text(data.get("state")) or "",
        active=int(number(data.get("active"))),
        idle=int(number(data.get("idle"))),
        waiting=int(number(data.get("waiting"))),
        max_size=int(number(data.get("max_size"))),
        breaker=mapping(data.get("breaker")),
        counters=mapping(data.get("counters")),
        holders=tuple(Holder.read(each) for each in rows(data.get("holders"))),
    )
                    whole(each.get("threads")),
                    whole(each.get("busy")),
