"""Liveness, readiness and details of an application's databases, and of its own checks.

Liveness touches no database. Readiness asks through the pools that serve requests. A connection
that was returned healthy a moment ago is proof enough. A busy database does not count as down.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any, Final

from dbpool._secrets import conceal, mask
from dbpool.databases import Databases, safe_name
from dbpool.errors import ConfigError, PoolError
from dbpool.health._server_info import ping_database, read_server_info
from dbpool.health._single_flight import Call, SingleFlight
from dbpool.metrics import PoolState
from dbpool.pool import Pool
from dbpool.settings._parsing import MAX_INT, parse_number

__all__ = ["Health", "Readiness"]

logger = logging.getLogger("dbpool")

TIMEOUT: Final = 0.5  # seconds, for all databases together
_POSITIVE: Final = (0.001, MAX_INT)  # seconds
_MAX_PROOF_AGE: Final = 2.0  # seconds: a healthy return that recent proves that the server serves
_MAX_INFO_AGE: Final = 5.0  # seconds that server info is kept
_UP: Final = frozenset({PoolState.UP})
_SERVING: Final = frozenset({PoolState.UP, PoolState.DEGRADED})
_NOT_SERVING: Final = frozenset({PoolState.DOWN, PoolState.STOPPED})


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether the application can serve requests, with a status for each part of it."""

    status: PoolState
    databases: Mapping[str, PoolState]
    checks: Mapping[str, PoolState] = field(default_factory=dict)
    retry_after: float | None = None

    @property
    def is_ready(self) -> bool:
        """Whether requests should be sent here."""
        return self.status in _SERVING

    def to_json(self) -> dict[str, Any]:
        """Return the status words, which anybody may see."""
        words: dict[str, Any] = {"status": self.status, "databases": dict(self.databases)}
        return words | {"checks": dict(self.checks)} if self.checks else words


@dataclass(frozen=True, slots=True)
class _Check:
    call: Callable[[], object]
    required: bool
    timeout: float


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The result of a check; `error` is the exception's type, never its text."""

    status: PoolState
    seconds: float | None = None
    error: str | None = None


class Health:
    """The health of an application: its databases, and the checks that you add.

    While a *required* database is down, the application is not ready. If another is down, it is
    only degraded.
    """

    def __init__(self, databases: Databases, required: Iterable[str] = ("default",)) -> None:
        self._databases = databases
        required = conceal(required)  # a name may be a misplaced secret
        self._required = frozenset(required)
        self._checks: dict[str, _Check] = {}
        self._calls = SingleFlight()
        self._server_info: dict[str, tuple[float, dict[str, Any]]] = {}
        self._logged_failures: dict[tuple[str, str], str] = {}
        if unknown := sorted(self._required - databases.keys()):
            raise ConfigError(
                f"DBPOOL_REQUIRED names {safe_name(unknown[0])}, which is not among the databases:"
                f" {', '.join(databases)}"
            )

    def add(
        self,
        name: str,
        check: Callable[[], object],
        *,
        required: bool = False,
        timeout: float = TIMEOUT,
    ) -> None:
        """Also run *check* at each readiness request, in its own thread, for at most *timeout* seconds.

        It is up if it returns None or True. It is down if it returns False, raises or takes too
        long. An exception is logged; its text is never shown. Raises `ConfigError` if the name is
        taken, the check cannot be called, or the timeout is wrong.
        """
        if name in self._databases or name in self._checks:
            raise ConfigError(f"there is already a check called {name!r}")
        if not name or not callable(check):
            raise ConfigError("a check needs a name, and a function that can be called")
        seconds = parse_number(timeout, f"the timeout of check {name!r}", limits=_POSITIVE)
        self._checks[name] = _Check(check, required, seconds)

    def live(self) -> dict[str, str]:
        """Return the status of the process, without touching a database or running a check."""
        return {"status": PoolState.UP}

    def ready(self) -> Readiness:
        """Ask all databases and run all checks at the same time, each within its timeout."""
        checks = self._start_checks()
        return self._evaluate(self._ask_databases(), self._await_checks(checks))

    def detail(self) -> dict[str, Any]:
        """Return the details for a trusted reader: latencies, servers, last errors.

        What a server says is at most a few seconds old. It is missing if the server does not answer.
        """
        deadline = monotonic() + TIMEOUT
        checks = self._start_checks()
        states = self._ask_databases()
        reads = self._start_reads(self._stale())
        outcomes = self._await_checks(checks)
        self._await_reads(reads, deadline)
        ready = self._evaluate(states, outcomes)
        details = {name: self._describe(name, pool, states[name]) for name, pool in self._items()}
        answer = ready.to_json() | {"databases": details, "retry_after": ready.retry_after}
        if outcomes:
            answer["checks"] = {
                name: {"status": each.status, "latency": each.seconds, "error": each.error}
                for name, each in outcomes.items()
            }
        return answer

    def servers(self) -> dict[str, dict[str, Any]]:
        """Return what is known of each database's server, with the keys of `/stats`.

        If it is some seconds old and a connection is idle, it is read again; this never waits for a
        connection. A server is missing until it has answered.
        """
        free = [(name, pool) for name, pool in self._stale() if _has_idle(pool)]
        self._await_reads(self._start_reads(free), monotonic() + TIMEOUT)
        now = time.time() - monotonic()
        return {name: _about(info, now + at) for name, (at, info) in self._server_info.items()}

    def _await_reads(self, reads: Mapping[str, Call[None]], deadline: float) -> None:
        for name, call in reads.items():
            if not call.wait(deadline - call.started):
                continue
            if call.error is None:
                self._logged_failures.pop(("server info", name), None)
            elif not isinstance(call.error, PoolError):  # the pool itself logs those
                self._log_failure("server info", name, call.error)

    def _items(self) -> list[tuple[str, Pool[Any]]]:
        return list(self._databases.items())

    def _evaluate(
        self, databases: dict[str, PoolState], outcomes: dict[str, _Outcome]
    ) -> Readiness:
        checks = {name: outcome.status for name, outcome in outcomes.items()}
        required = {databases[name] for name in self._required}
        required |= {state for name, state in checks.items() if self._checks[name].required}
        if PoolState.DOWN in required:
            status = PoolState.DOWN
        elif PoolState.STARTING in required:
            status = PoolState.STARTING
        else:
            is_up = _UP.issuperset([*databases.values(), *checks.values()])
            return Readiness(PoolState.UP if is_up else PoolState.DEGRADED, databases, checks)
        waits = [self._databases[name].breaker.retry_after or 0.0 for name in self._required]
        return Readiness(status, databases, checks, max(1.0, *waits, 0.0))

    def _describe(self, name: str, pool: Pool[Any], state: PoolState) -> dict[str, Any]:
        read_at, info = self._server_info.get(name, (None, {}))
        return {
            "status": state,
            "breaker": pool.breaker.state,
            "last_error": pool.breaker.last_error,
            "facts_age": None if read_at is None else monotonic() - read_at,
            **info,
        }

    # Databases

    def _ask_databases(self) -> dict[str, PoolState]:
        """Return the state of each database; those in doubt are pinged, all at the same time."""
        known = {name: _known_state(pool) for name, pool in self._items()}
        calls = {
            name: self._calls.start(("ready", name), partial(ping_database, pool, TIMEOUT))
            for name, pool in self._items()
            if known[name] is None
        }
        return {
            name: known[name] or self._await_ping(pool, calls[name]) for name, pool in self._items()
        }

    def _await_ping(self, pool: Pool[Any], call: Call[None]) -> PoolState:
        if call.wait(TIMEOUT) and call.error is None:
            return PoolState.UP
        if pool.state in _NOT_SERVING or pool.breaker.check_failure:
            return PoolState.DOWN
        return PoolState.STARTING if pool.last_alive_at is None else PoolState.DEGRADED

    def _stale(self) -> list[tuple[str, Pool[Any]]]:
        """Return the databases that serve and whose server info is missing or too old."""
        now = monotonic()
        return [
            (name, pool)
            for name, pool in self._items()
            if pool.state == PoolState.UP
            and now - self._server_info.get(name, (-math.inf, {}))[0] > _MAX_INFO_AGE
        ]

    def _start_reads(self, stale: Iterable[tuple[str, Pool[Any]]]) -> dict[str, Call[None]]:
        return {
            name: self._calls.start(("server info", name), self._read_of(name, pool))
            for name, pool in stale
        }

    def _read_of(self, name: str, pool: Pool[Any]) -> Callable[[], None]:
        def read() -> None:
            info = read_server_info(pool, TIMEOUT)
            self._server_info[name] = (monotonic(), info)

        return read

    # The application's own checks

    def _start_checks(self) -> dict[str, Call[object]]:
        return {
            name: self._calls.start(("check", name), check.call)
            for name, check in list(self._checks.items())
        }

    def _await_checks(self, calls: dict[str, Call[object]]) -> dict[str, _Outcome]:
        return {name: self._await_check(name, call) for name, call in calls.items()}

    def _await_check(self, name: str, call: Call[object]) -> _Outcome:
        if not call.wait(self._checks[name].timeout):
            error: BaseException = TimeoutError("it took too long")
        elif call.error is not None:
            error = call.error
        elif call.result is None or isinstance(call.result, bool):
            self._logged_failures.pop(("check", name), None)
            state = PoolState.DOWN if call.result is False else PoolState.UP
            return _Outcome(state, call.seconds)
        else:
            error = TypeError(f"it returned {_type_name(call.result)}, not None or a bool")
        self._log_failure("check", name, error)
        return _Outcome(PoolState.DOWN, call.seconds, _type_name(error))

    def _log_failure(self, what: str, name: str, error: BaseException) -> None:
        """Log a failure once, and again if its kind changes or it comes back."""
        kind = _type_name(error)
        if self._logged_failures.get((what, name)) != kind:
            self._logged_failures[what, name] = kind
            logger.warning("health: %s %r failed: %s: %s", what, name, kind, _text_of(error))


def _has_idle(pool: Pool[Any]) -> bool:
    stats = pool.stats()
    return stats.idle > 0 and stats.waiting == 0


def _about(info: Mapping[str, Any], at: float) -> dict[str, Any]:
    connections, lag = info["connections"], info["replication_lag"]
    return {
        "time": round(at, 1),
        "version": info["server_version"],
        "role": info["role"],
        "latency": info["latency"],
        "lag": lag and lag["seconds"],
        "tls": info["tls"],
        "used": connections["used"],
        "max": connections["max"],
        "ours": sum(connections["ours"].values()),
    }


def _known_state(pool: Pool[Any]) -> PoolState | None:
    """Return the state that needs no round trip, None if the database has to be pinged."""
    if pool.state in _NOT_SERVING:
        return PoolState.DOWN
    if pool.breaker.check_failure:  # connecting proves little then
        return None
    stats = pool.stats()
    busy = stats.active >= stats.max_size
    alive_at = pool.last_alive_at
    if alive_at is not None and monotonic() - alive_at <= _MAX_PROOF_AGE:
        return PoolState.DEGRADED if busy and stats.waiting else PoolState.UP
    if alive_at is not None and busy:
        return PoolState.DEGRADED
    return None


def _type_name(value: object) -> str:
    return type(value).__name__


def _text_of(error: BaseException) -> str:
    try:
        return mask(str(error))
    except Exception:  # noqa: BLE001  # a user's exception may fail at anything
        return "(no text)"
