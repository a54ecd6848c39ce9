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
_SAME_START: Final = 1.0  # seconds by which the start of one checkout may seem to differ
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
    """How long a holder has been seen to do the same: *looks* in a row, a second apart.

    `began` is when it checked out, in Unix time.
    """

    status: str
    looks: int
    began: float

    def is_of(self, holder: Holder, now: float) -> bool:
        """Whether it is of the same checkout: when that began is not known exactly."""
        return abs(self.began - (now - holder.seconds)) < _SAME_START


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
        run = self.runs.get(key_of(holder))
        return run if run is not None and run.is_of(holder, now) else None


def key_of(holder: Holder) -> tuple[object, ...]:
    """Tell one holder from all others of the same look."""
    return holder.worker, holder.pid, holder.thread, holder.where


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
    neighbours: Mapping[str, tuple[Holder, ...]] = field(default_factory=dict)  # of other pools

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

    def neighbour_of(self, session: Session) -> Holder | None:
        """Return who holds the connection of that session, if another pool's holder does.

        Other pools may be on other servers, where the same pids are others.
        """
        called = session.application_name or ""
        for name, holders in self.neighbours.items():
            for holder in holders if called.startswith(f"dbpool:{name}@") else ():
                if holder.pid == session.pid and called.endswith(f"/{holder.worker}"):
                    return holder
        return None

    def lasted(self, session: Session, then: float | None) -> float | None:
        """Return for how long one of our sessions does what it did *then*; None if it has ended.

        A server is not asked at each look. What it said is still so if the same checkout goes on.
        """
        holder, view = self.holder_of(session.pid), self.last_view
        if holder is None or view is None or then is None:  # another host's, or a shorter one
            return then
        age = max(0.0, self.now - view.time)
        is_idle = (session.state or "").startswith(IDLE_IN_TRANSACTION)
        is_same = holder.status == UNKNOWN or holder.is_unused == is_idle
        return min(then + age, holder.seconds) if is_same and holder.seconds >= age else None

    def known(self, number: int) -> list[Step]:
        """Return those of the last *number* steps that are known."""
        return [step for step in self.steps[-number:] if step is not None]


@dataclass(frozen=True)
class Process:
    """A worker. It published last `age` seconds ago, and does so every `interval` seconds.

    `threads` is how many it serves with, `busy` how many of them serve a request now, if known.
    """

    pid: int
    age: float
    uptime: float
    threads: int | None = None
    busy: int | None = None
    interval: float = 1.0


@dataclass(frozen=True, slots=True)
class Death:
    """A worker that was lost at *time*, Unix time; its exit code if known, below 0 a signal."""

    time: float
    code: int | None = None


@dataclass(frozen=True)
class Scene:
    """All that a diagnosis looks at.

    `stalled` is the longest pause between two looks of the last seconds, which should be a second:
    it says that the host or the watching process itself stood still.
    """

    now: float
    pools: tuple[PoolScene, ...] = ()
    processes: tuple[Process, ...] = ()
    deaths: tuple[Death, ...] = ()
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
        found = list(mapping(data.get("pools")).items())[:_MAX_ROWS]
        pools = {name: _read_pool(str(name), mapping(pool), at) for name, pool in found}
        holders = {pool.name: pool.holders for pool in pools.values() if pool.holders}
        return cls(
            now=at,
            pools=tuple(
                replace(
                    pool,
                    steps=(steps or {}).get(name, ()),
                    watch=(watches or {}).get(name, Watch()),
                    view=(views or {}).get(name),
                    pooler=name in poolers,
                    neighbours=holders,
                )
                for name, pool in pools.items()
            ),
            processes=tuple(
                Process(
                    whole(each.get("pid")) or 0,
                    number(each.get("age")),
                    number(each.get("uptime")),
                    whole(each.get("threads")),
                    whole(each.get("busy")),
                    number(each.get("interval"), 1.0),
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
