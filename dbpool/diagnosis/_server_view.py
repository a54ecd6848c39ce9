"""What a server said of its sessions, and who is at the root of a queue for a lock. No I/O here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

_DEEPEST: Final = 10  # sessions from a waiting one to the root of its queue

# The backend_type of the server's own processes that hold locks.
AUTOVACUUM: Final = "autovacuum worker"
REPLAY: Final = "startup"  # of a standby


@dataclass(frozen=True, slots=True)
class Session:
    """A row of pg_stat_activity. Times are seconds so far; None is not known, or not visible."""

    pid: int
    state: str | None = None
    wait_type: str | None = None  # wait_event_type
    wait_event: str | None = None
    backend_type: str | None = None
    application_name: str | None = None
    user: str | None = None
    client: str | None = None
    query_seconds: float | None = None
    state_seconds: float | None = None
    transaction_seconds: float | None = None
    ddl: str | None = None  # the command's first words, if it changes the schema
    query: str | None = None  # only where queries may be shown
    is_ours: bool = False
    blocked_by: tuple[int, ...] = ()

    @property
    def wait(self) -> str | None:
        """What it waits for, as `IO/DataFileRead`; None if it runs, or waits for a lock."""
        is_known = self.wait_type is not None and self.wait_type != "Lock"
        return f"{self.wait_type}/{self.wait_event}" if is_known and self.wait_event else None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prepared transaction: it holds its locks without any session."""

    gid: str
    seconds: float
    owner: str | None = None


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server says of itself. Limits are numbers of connections, None for no limit."""

    max_connections: int | None = None
    reserved: int | None = None
    used: int | None = None
    ours: int | None = None
    role_limit: int | None = None
    database_limit: int | None = None
    role: str | None = None  # primary or standby
    is_streaming: bool | None = None
    lag_seconds: float | None = None
    version: str | None = None
    latency: float | None = None  # seconds of a round trip
    tls: bool | None = None

    @property
    def room(self) -> int | None:
        """How many connections our role may have at most, whoever has them now."""
        limits = [self.role_limit, self.database_limit]
        if self.max_connections is not None:
            limits.append(self.max_connections - (self.reserved or 0))
        known = [limit for limit in limits if limit is not None]
        return min(known) if known else None

    @property
    def free(self) -> int | None:
        """How many more connections the server would take now."""
        if self.max_connections is None or self.used is None:
            return None
        return max(0, self.max_connections - (self.reserved or 0) - self.used)


@dataclass(frozen=True, slots=True)
class ServerView:
    """What one look at a server showed; `time` is Unix time.

    `is_joined` is false where pids mean nothing, behind a pooler. `is_limited` says that other
    roles' sessions are hidden. `silent_since` is the Unix time since which the server has not
    answered, None if it did. `locked_since` is that of the first of the looks in a row that found
    most of our busy sessions waiting for locks. `role_before` is what the server was until
    `role_changed_at`, if it has changed of late.
    """

    time: float
    sessions: Mapping[int, Session] = field(default_factory=dict)
    prepared: tuple[Prepared, ...] = ()
    facts: ServerFacts | None = None
    is_joined: bool = True
    is_limited: bool = False
    silent_since: float | None = None
    locked_since: float | None = None
    role_before: str | None = None
    role_changed_at: float | None = None

    def about(self) -> dict[str, object]:
        """Return what a reader wants to know of the server, for `/stats`."""
        facts = self.facts or ServerFacts()
        return {
            "time": round(self.time, 1),
            "version": facts.version,
            "role": facts.role,
            "latency": facts.latency,
            "lag": facts.lag_seconds,
            "tls": facts.tls,
            "used": facts.used,
            "max": facts.max_connections,
            "ours": facts.ours,
        }

    def waiting_for_locks(self) -> list[Session]:
        """Return our sessions that wait for a lock, longest first."""
        waiting = [s for s in self.sessions.values() if s.is_ours and s.wait_type == "Lock"]
        return sorted(waiting, key=lambda s: (-(s.query_seconds or 0.0), s.pid))

    @property
    def is_locked(self) -> bool:
        """Whether half of our sessions that are not idle, or more, wait for locks."""
        busy = [s for s in self.sessions.values() if s.is_ours and s.state != "idle"]
        return bool(busy) and 2 * len(self.waiting_for_locks()) >= len(busy)

    def background_of(self, session: Session) -> str | None:
        """Return the kind of the server's own process if this session is one that holds locks.

        Of one that may not be seen it is known only that it has no user.
        """
        kind = session.backend_type
        if kind is None and session.user is None:
            is_standby = self.facts is not None and self.facts.role == "standby"
            kind = REPLAY if is_standby else AUTOVACUUM
        return kind if kind in (AUTOVACUUM, REPLAY) else None

    def roots(self, waiting: Iterable[Session]) -> list[int]:
        """Return the pids at the roots of these sessions' queues, those of the most waiting first.

        Pid 0 is a prepared transaction. In a deadlock, which the server ends itself, the first
        session of the circle stands for it.
        """
        counts: dict[int, int] = {}
        for session in waiting:
            for root in set(self._roots_of(session.pid)):
                counts[root] = counts.get(root, 0) + 1
        return sorted(counts, key=lambda pid: (-counts[pid], pid))

    def _roots_of(self, pid: int) -> Iterator[int]:
        seen, level = {pid}, [pid]
        for _ in range(_DEEPEST):
            blockers = [b for each in level for b in self._blockers(each)]
            yield from (b for b in blockers if not self._blockers(b))
            level = [b for b in dict.fromkeys(blockers) if b not in seen and self._blockers(b)]
            if not level and blockers and all(b in seen for b in blockers):
                yield blockers[0]
            seen.update(level)

    def _blockers(self, pid: int) -> tuple[int, ...]:
        session = self.sessions.get(pid)
        return () if session is None else session.blocked_by

    def schema_change(self, waiting: Iterable[Session]) -> Session | None:
        """Return the session that changes the schema, or waits to, and holds up these, if any."""
        level = [session.pid for session in waiting]
        seen = set(level)
        for _ in range(_DEEPEST):
            level = [b for pid in level for b in self._blockers(pid) if b not in seen]
            seen.update(level)
            for session in filter(None, map(self.sessions.get, level)):
                if session.ddl and (session.blocked_by or session.state == "active"):
                    return session
        return None
