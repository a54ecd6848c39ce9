"""Liveness, readiness and details of an application's databases and of its own checks.

Liveness touches no database. Readiness asks through the pools that serve, never by a pool of its
own, and accepts a recent healthy return as proof. It tells a busy database from one that is down.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final

from dbpool._secrets import mask
from dbpool.databases import Databases, shown_name
from dbpool.errors import ConfigError, PoolError
from dbpool.health._server_info import ping_database, read_server_info
from dbpool.health._single_flight import Call, SingleFlight
from dbpool.pool import Pool

__all__ = ["Health", "Readiness"]

logger = logging.getLogger("dbpool")

UP: Final = "up"
DEGRADED: Final = "degraded"
STARTING: Final = "starting"
DOWN: Final = "down"

BOUND: Final = 0.5  # seconds for all databases together
_PROOF_AGE: Final = 2.0  # seconds: a healthy return this recent proves life
_SERVER_INFO_AGE: Final = 5.0  # seconds that server info is kept


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


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What came of a check. `error` is the name of what was raised, never its text."""

    status: str
    seconds: float | None = None
    error: str | None = None


class Health:
    """The health of some databases, and of whatever else `add` names.

    Without *required* databases the application is not ready; the others only degrade it.
    """

    def __init__(self, databases: Databases, required: Iterable[str] = ("default",)) -> None:
        self._databases = databases
        self._required = frozenset(required)
        self._checks: dict[str, _Check] = {}
        self._calls = SingleFlight()
        self._server_info: dict[str, tuple[float, dict[str, Any]]] = {}
        self._logged_failures: dict[tuple[str, str], str] = {}
        if unknown := sorted(self._required - databases.keys()):
            raise ConfigError(
                f"DBPOOL_REQUIRED names {shown_name(unknown[0])}, which is not among the databases:"
                f" {', '.join(databases)}"
            )

    def add(
        self,
        name: str,
        check: Callable[[], object],
        *,
        required: bool = False,
        timeout: float = BOUND,
    ) -> None:
        """Run *check* with each question too, in a thread of its own, for at most *timeout* seconds.

        It is up when it returns None or True, and down when it returns False, raises, or
        takes too long. What it raises is logged; its text is never shown. Raises
        `ConfigError` for a name that is taken, a check that cannot be called, or a wrong timeout.
        """
        if name in self._databases or name in self._checks:
            raise ConfigError(f"there is a check called {name!r} already")
        if not name or not callable(check):
            raise ConfigError("a check needs a name, and a function that can be called")
        if not 0.0 < timeout < math.inf:
            raise ConfigError(f"check {name!r} needs a timeout of more than 0 s, not {timeout!r}")
        self._checks[name] = _Check(check, required, timeout)

    def live(self) -> dict[str, str]:
        """Say that the process serves; touches no database and runs no check."""
        return {"status": UP}

    def ready(self) -> Readiness:
        """Ask all databases and checks, side by side, within their bounds."""
        checks = self._start_checks()
        return self._evaluate(self._ask_databases(), self._await_checks(checks))

    def detail(self) -> dict[str, Any]:
        """Return what a trusted reader may know: latencies, servers, last errors.

        Server info is at most some seconds old, and missing if the server does not answer within
        the bound.
        """
        deadline = monotonic() + BOUND
        checks = self._start_checks()
        words = self._ask_databases()
        reads = self._start_reads()
        outcomes = self._await_checks(checks)
        for name, call in reads.items():
            if not call.wait(deadline - call.started):
                continue
            if call.error is None:
                self._logged_failures.pop(("facts", name), None)
            elif not isinstance(call.error, PoolError):  # the pool itself logs those
                self._log_failure("facts", name, call.error)
        ready = self._evaluate(words, outcomes)
        details = {name: self._describe(name, pool, words[name]) for name, pool in self._items()}
        answer = ready.to_json() | {"databases": details, "retry_after": ready.retry_after}
        if outcomes:
            answer["checks"] = {
                name: {"status": each.status, "latency": each.seconds, "error": each.error}
                for name, each in outcomes.items()
            }
        return answer

    def _items(self) -> list[tuple[str, Pool[Any]]]:
        return list(self._databases.items())

    def _evaluate(self, databases: dict[str, str], outcomes: dict[str, _Outcome]) -> Readiness:
        checks = {name: outcome.status for name, outcome in outcomes.items()}
        required = {databases[name] for name in self._required}
        required |= {word for name, word in checks.items() if self._checks[name].required}
        if DOWN in required:
            status = DOWN
        elif STARTING in required:
            status = STARTING
        else:
            well = {*databases.values(), *checks.values()} <= {UP}
            return Readiness(UP if well else DEGRADED, databases, checks)
        waits = [self._databases[name].breaker.retry_after or 0.0 for name in self._required]
        return Readiness(status, databases, checks, max(1.0, *waits, 0.0))

    def _describe(self, name: str, pool: Pool[Any], word: str) -> dict[str, Any]:
        read_at, info = self._server_info.get(name, (None, {}))
        return {
            "status": word,
            "breaker": pool.breaker.state,
            "last_error": pool.breaker.last_error,
            "facts_age": None if read_at is None else monotonic() - read_at,
            **info,
        }

    # Databases

    def _ask_databases(self) -> dict[str, str]:
        words = {name: _known_status(pool) for name, pool in self._items()}
        calls = {
            name: self._calls.start(("ready", name), _ping_of(self._databases[name]))
            for name, word in words.items()
            if word is None
        }
        answers: dict[str, str] = {}
        for name, word in words.items():
            if word is not None:
                answers[name] = word
            elif calls[name].wait(BOUND) and calls[name].error is None:
                answers[name] = UP
            else:
                answers[name] = _status_without_answer(self._databases[name])
        return answers

    def _start_reads(self) -> dict[str, Call[None]]:
        """Read the server info of each database whose info is missing or too old."""
        now = monotonic()
        stale = [
            (name, pool)
            for name, pool in self._items()
            if pool.state == UP
            and now - self._server_info.get(name, (-math.inf, {}))[0] > _SERVER_INFO_AGE
        ]
        return {
            name: self._calls.start(("facts", name), self._read_of(name, pool))
            for name, pool in stale
        }

    def _read_of(self, name: str, pool: Pool[Any]) -> Callable[[], None]:
        def read() -> None:
            info = read_server_info(pool, BOUND)
            self._server_info[name] = (monotonic(), info)

        return read

    # Checks of the application's own

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
            return _Outcome(DOWN if call.result is False else UP, call.seconds)
        else:
            error = TypeError(f"it answered with {_type_name(call.result)}, not None or a bool")
        self._log_failure("check", name, error)
        return _Outcome(DOWN, call.seconds, _type_name(error))

    def _log_failure(self, what: str, name: str, error: BaseException) -> None:
        """Log a failure once, and again when its kind changes or after it was well."""
        kind = _type_name(error)
        if self._logged_failures.get((what, name)) != kind:
            self._logged_failures[what, name] = kind
            logger.warning("health: %s %r failed: %s: %s", what, name, kind, _text_of(error))


def _known_status(pool: Pool[Any]) -> str | None:
    """The status word that needs no round trip; None if the database has to be pinged."""
    if pool.state in ("stopped", DOWN):
        return DOWN
    stats = pool.stats()
    busy = stats.active >= stats.max_size
    last_seen = pool.last_seen
    if last_seen is not None and monotonic() - last_seen <= _PROOF_AGE:
        return DEGRADED if busy and stats.waiting else UP
    if last_seen is not None and busy:
        return DEGRADED
    return None


def _ping_of(pool: Pool[Any]) -> Callable[[], None]:
    return lambda: ping_database(pool, BOUND)


def _status_without_answer(pool: Pool[Any]) -> str:
    """The status word of a database that did not answer a ping in time."""
    if pool.state in ("stopped", DOWN):
        return DOWN
    return STARTING if pool.last_seen is None else DEGRADED


def _type_name(value: object) -> str:
    return type(value).__name__


def _text_of(error: BaseException) -> str:
    try:
        return mask(str(error))
    except Exception:  # noqa: BLE001  # a user's exception may fail at anything
        return "(no text)"
