"""Is the application alive, is it ready, and how are its databases? Down is told from busy.

Liveness touches nothing. Readiness asks through the pools that serve, never by connecting anew,
and takes what they have just seen for proof where it can.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final

import psycopg

from dbpool.databases import Databases
from dbpool.errors import ConfigError, PoolError, PoolTimeout, TooManyRequests
from dbpool.liveness import ping
from dbpool.pool import Pool

__all__ = ["Health", "Readiness"]

logger = logging.getLogger("dbpool")

UP: Final = "up"
DEGRADED: Final = "degraded"
STARTING: Final = "starting"
DOWN: Final = "down"

BOUND: Final = 0.5  # seconds for all databases together
_FRESH: Final = 2.0  # a healthy return this recent proves life
_FACTS_AGE: Final = 5.0  # seconds that facts about a server are kept

_FACTS: Final = """
select current_setting('server_version'),
       pg_is_in_recovery(),
       case when pg_is_in_recovery()
            then pg_wal_lsn_diff(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn())::float8 end,
       case when not pg_is_in_recovery() then null
            when pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() then 0
            else extract(epoch from now() - pg_last_xact_replay_timestamp()) end::float8,
       current_setting('max_connections')::int,
       (select count(*) from pg_stat_activity where backend_type = 'client backend'),
       (select coalesce(json_object_agg(state, n), '{}') from
           (select coalesce(state, 'unknown') as state, count(*) as n from pg_stat_activity
             where application_name = current_setting('application_name')
               and usename = current_user group by 1) as ours)
"""


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether the application can serve, with a status word for each part of it."""

    status: str
    databases: Mapping[str, str]
    checks: Mapping[str, str] = field(default_factory=dict)
    retry_after: float | None = None

    @property
    def is_ready(self) -> bool:
        """Whether requests should be sent here."""
        return self.status in (UP, DEGRADED)

    def to_json(self) -> dict[str, Any]:
        """Return the status words, safe to show to anybody."""
        words: dict[str, Any] = {"status": self.status, "databases": dict(self.databases)}
        return words | {"checks": dict(self.checks)} if self.checks else words


@dataclass(frozen=True, slots=True)
class _Check:
    call: Callable[[], object]
    required: bool
    timeout: float


class Health:
    """The health of some databases, and of whatever else `add` names.

    Without *required* databases the application is not ready; the others only degrade it.
    """

    def __init__(self, databases: Databases, required: Iterable[str] = ("default",)) -> None:
        self._databases = databases
        self._required = frozenset(required)
        self._checks: dict[str, _Check] = {}
        self._side = _SideBySide()
        self._facts: dict[str, tuple[float, dict[str, Any]]] = {}
        if unknown := sorted(self._required - databases.keys()):
            raise ConfigError(f"DBPOOL_REQUIRED names {unknown[0]!r}, which is no database")

    def add(
        self,
        name: str,
        check: Callable[[], object],
        *,
        required: bool = False,
        timeout: float = BOUND,
    ) -> None:
        """Ask *check* too, for at most *timeout* seconds; it runs in a thread of its own.

        It is well when it returns None or True, and down when it returns False, raises, or
        takes too long. What it raises is logged and never shown.
        """
        if name in self._databases or name in self._checks:
            raise ConfigError(f"there is a check called {name!r} already")
        self._checks[name] = _Check(check, required, timeout)

    def live(self) -> dict[str, str]:
        """Say that the process serves; asks nobody."""
        return {"status": UP}

    def ready(self) -> Readiness:
        """Ask all databases and checks, side by side, within their bounds."""
        databases = self._ask_databases()
        checks = self._ask_checks()
        required = [databases[name] for name in self._required]
        required += [word for name, word in checks.items() if self._checks[name].required]
        if DOWN in required:
            status = DOWN
        elif STARTING in required:
            status = STARTING
        else:
            status = UP if {*databases.values(), *checks.values()} <= {UP} else DEGRADED
        waits = [pool.breaker.retry_after for pool in self._databases.values()]
        retry_after = max((wait for wait in waits if wait is not None), default=1.0)
        return Readiness(
            status, databases, checks, None if status in (UP, DEGRADED) else retry_after
        )

    def detail(self) -> dict[str, Any]:
        """Return what a trusted reader may know: latencies, servers, last errors.

        Facts about servers are some seconds old at most, or missing if they cannot be had
        within the bound.
        """
        ready = self.ready()
        missing = {
            name: (lambda name=name, pool=pool: self._learn(name, pool))
            for name, pool in self._databases.items()
            if pool.state == UP and self._stale(name)
        }
        self._side.ask("facts", missing, BOUND)
        return ready.to_json() | {
            "databases": {
                name: self._describe(name, pool, ready.databases[name])
                for name, pool in self._databases.items()
            }
        }

    def _describe(self, name: str, pool: Pool[Any], word: str) -> dict[str, Any]:
        learned, facts = self._facts.get(name, (None, {}))
        return {
            "status": word,
            "breaker": pool.breaker.state,
            "last_error": pool.breaker.last_error,
            "facts_age": None if learned is None else monotonic() - learned,
            **facts,
        }

    def _ask_databases(self) -> dict[str, str]:
        words = {name: _seen(pool) for name, pool in self._databases.items()}
        doubtful = {
            name: (lambda pool=self._databases[name]: _asked(pool))
            for name, word in words.items()
            if word is None
        }
        asked = self._side.ask("ready", doubtful, BOUND)
        return {
            name: word or asked.get(name) or _unanswered(self._databases[name])
            for name, word in words.items()
        }

    def _ask_checks(self) -> dict[str, str]:
        if not self._checks:
            return {}
        tasks = {
            name: (lambda name=name, check=check: _word_of(name, check))
            for name, check in self._checks.items()
        }
        bounds = {name: check.timeout for name, check in self._checks.items()}
        answers = self._side.ask("check", tasks, bounds)
        return {name: answers.get(name) or DOWN for name in self._checks}

    def _stale(self, name: str) -> bool:
        learned, _ = self._facts.get(name, (float("-inf"), {}))
        return monotonic() - learned > _FACTS_AGE

    def _learn(self, name: str, pool: Pool[Any]) -> None:
        """Ask a server about itself; `_facts` gets the answer whenever it comes."""
        with pool.connection(timeout=BOUND) as conn:
            started = monotonic()
            ping(conn, BOUND)
            latency = monotonic() - started
            conn.execute("set local statement_timeout = '2s'")
            row = conn.execute(_FACTS.encode()).fetchone()
            tls = conn.pgconn.ssl_in_use
        assert row is not None
        version, standby, lag_bytes, lag_seconds, most, used, ours = row
        facts = {
            "latency": latency,
            "server_version": version,
            "role": "standby" if standby else "primary",
            "replication_lag": {"bytes": lag_bytes, "seconds": lag_seconds} if standby else None,
            "tls": bool(tls),
            "connections": {"used": used, "max": most, "ours": ours},
        }
        self._facts[name] = (monotonic(), facts)


def _seen(pool: Pool[Any]) -> str | None:
    """What a database's pool knows of it without asking; None if it has to ask."""
    if pool.state == "stopped" or pool.breaker.is_open:
        return DOWN
    stats = pool.stats()
    busy = stats.active >= stats.max_size
    last_seen = pool.last_seen
    if last_seen is not None and monotonic() - last_seen <= _FRESH:
        return DEGRADED if busy and stats.waiting else UP
    if last_seen is not None and busy:
        return DEGRADED
    return None


def _asked(pool: Pool[Any]) -> str:
    """Ask through the pool, opening it if need be, within the bound."""
    deadline = monotonic() + BOUND
    try:
        with pool.connection(timeout=BOUND) as conn:
            ping(conn, max(0.001, deadline - monotonic()))
    except (PoolTimeout, TooManyRequests, psycopg.OperationalError):
        return _unanswered(pool)
    return UP


def _unanswered(pool: Pool[Any]) -> str:
    """What to say of a database that did not answer in time."""
    if pool.state in ("stopped", DOWN):
        return DOWN
    return STARTING if pool.last_seen is None else DEGRADED


def _word_of(name: str, check: _Check) -> str:
    answer = check.call()
    if answer is not None and not isinstance(answer, bool):
        raise TypeError(f"the check answered {type(answer).__name__}, not a bool or None")
    return DOWN if answer is False else UP


class _SideBySide:
    """Runs calls in threads side by side; one that is still running is not started again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[tuple[str, str]] = set()
        self._complained: set[tuple[str, str]] = set()

    def ask(
        self,
        kind: str,
        tasks: Mapping[str, Callable[[], Any]],
        bounds: float | Mapping[str, float],
    ) -> dict[str, Any]:
        """Return the answers that came within the bounds, in seconds, by name."""
        answers: dict[str, Any] = {}
        started = monotonic()
        threads = {name: self._start(kind, name, task, answers) for name, task in tasks.items()}
        for name, thread in threads.items():
            bound = bounds if isinstance(bounds, float) else bounds[name]
            if thread is not None:
                thread.join(max(0.0, started + bound - monotonic()))
        return dict(answers)

    def _start(
        self, kind: str, name: str, task: Callable[[], Any], answers: dict[str, Any]
    ) -> threading.Thread | None:
        key = (kind, name)
        with self._lock:
            if key in self._running:
                return None
            self._running.add(key)
        thread = threading.Thread(
            target=self._run,
            args=(key, task, answers),
            name=f"dbpool-health-{name}",
            daemon=True,
        )
        thread.start()
        return thread

    def _run(self, key: tuple[str, str], task: Callable[[], Any], answers: dict[str, Any]) -> None:
        try:
            answers[key[1]] = task()
        except Exception as ex:  # noqa: BLE001  # a user's check may raise anything
            self._complain(key, ex)
        else:
            self._complained.discard(key)
        finally:
            with self._lock:
                self._running.discard(key)

    def _complain(self, key: tuple[str, str], ex: Exception) -> None:
        """Log a failure, once until it is well again; a database's own is logged by its pool."""
        if key not in self._complained:
            self._complained.add(key)
            if not isinstance(ex, PoolError):
                logger.warning("health %s of %r failed: %s: %s", *key, type(ex).__name__, ex)
