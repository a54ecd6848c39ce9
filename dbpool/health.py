"""Is the application alive, is it ready, and how are its databases? Down is told from busy.

Liveness touches nothing. Readiness asks through the pools that serve, never by connecting anew,
and takes what they have just seen for proof where it can.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final

from dbpool._facts import learn, probe
from dbpool._flights import Flight, Flights
from dbpool._values import shown
from dbpool.databases import Databases
from dbpool.errors import ConfigError, PoolError
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
        self._flights = Flights()
        self._facts: dict[str, tuple[float, dict[str, Any]]] = {}
        self._complaints: dict[tuple[str, str], str] = {}
        if unknown := sorted(self._required - databases.keys()):
            raise ConfigError(f"DBPOOL_REQUIRED names {shown(unknown[0])}, which is no database")

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
        takes too long. What it raises is logged; its text is never shown. Raises
        `ConfigError` for a name that is taken, or for what is no check.
        """
        if name in self._databases or name in self._checks:
            raise ConfigError(f"there is a check called {name!r} already")
        if not name or not callable(check):
            raise ConfigError(f"check {name!r} needs a name and something to call")
        if not 0.0 < timeout < math.inf:
            raise ConfigError(f"check {name!r} needs a timeout of more than 0 s, not {timeout!r}")
        self._checks[name] = _Check(check, required, timeout)

    def live(self) -> dict[str, str]:
        """Say that the process serves; asks nobody."""
        return {"status": UP}

    def ready(self) -> Readiness:
        """Ask all databases and checks, side by side, within their bounds."""
        checks = self._start_checks()
        return self._judge(self._ask_databases(), self._await_checks(checks))

    def detail(self) -> dict[str, Any]:
        """Return what a trusted reader may know: latencies, servers, last errors.

        Facts about servers are some seconds old at most, or missing if they cannot be had
        within the bound.
        """
        deadline = monotonic() + BOUND
        checks = self._start_checks()
        words = self._ask_databases()
        learning = self._start_learning()
        outcomes = self._await_checks(checks)
        for name, flight in learning.items():
            flight.wait(deadline - flight.started)
            if flight.error is None:
                self._complaints.pop(("facts", name), None)
            elif not isinstance(flight.error, PoolError):  # of which the pool itself tells
                self._complain("facts", name, flight.error)
        ready = self._judge(words, outcomes)
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

    def _judge(self, databases: dict[str, str], outcomes: dict[str, _Outcome]) -> Readiness:
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
        learned, facts = self._facts.get(name, (None, {}))
        return {
            "status": word,
            "breaker": pool.breaker.state,
            "last_error": pool.breaker.last_error,
            "facts_age": None if learned is None else monotonic() - learned,
            **facts,
        }

    # Databases

    def _ask_databases(self) -> dict[str, str]:
        words = {name: _seen(pool) for name, pool in self._items()}
        flights = {
            name: self._flights.start(("ready", name), _probing(self._databases[name]))
            for name, word in words.items()
            if word is None
        }
        answers: dict[str, str] = {}
        for name, word in words.items():
            if word is not None:
                answers[name] = word
            elif flights[name].wait(BOUND) and flights[name].error is None:
                answers[name] = UP
            else:
                answers[name] = _unanswered(self._databases[name])
        return answers

    def _start_learning(self) -> dict[str, Flight[None]]:
        """Ask those servers about themselves of which too little is known."""
        now = monotonic()
        stale = [
            (name, pool)
            for name, pool in self._items()
            if pool.state == UP and now - self._facts.get(name, (-math.inf, {}))[0] > _FACTS_AGE
        ]
        return {
            name: self._flights.start(("facts", name), self._learning(name, pool))
            for name, pool in stale
        }

    def _learning(self, name: str, pool: Pool[Any]) -> Callable[[], None]:
        def call() -> None:
            facts = learn(pool, BOUND)
            self._facts[name] = (monotonic(), facts)

        return call

    # Checks of the application's own

    def _start_checks(self) -> dict[str, Flight[object]]:
        return {
            name: self._flights.start(("check", name), check.call)
            for name, check in list(self._checks.items())
        }

    def _await_checks(self, flights: dict[str, Flight[object]]) -> dict[str, _Outcome]:
        return {name: self._await_check(name, flight) for name, flight in flights.items()}

    def _await_check(self, name: str, flight: Flight[object]) -> _Outcome:
        if not flight.wait(self._checks[name].timeout):
            error: BaseException = TimeoutError("it took too long")
        elif flight.error is not None:
            error = flight.error
        elif flight.answer is None or isinstance(flight.answer, bool):
            self._complaints.pop(("check", name), None)
            return _Outcome(DOWN if flight.answer is False else UP, flight.seconds)
        else:
            error = TypeError(f"it answered with {_kind_of(flight.answer)}, not None or a bool")
        self._complain("check", name, error)
        return _Outcome(DOWN, flight.seconds, _kind_of(error))

    def _complain(self, what: str, name: str, error: BaseException) -> None:
        """Log a failure once, and again when its kind changes or after it was well."""
        kind = _kind_of(error)
        if self._complaints.get((what, name)) != kind:
            self._complaints[what, name] = kind
            logger.warning("health: %s %r failed: %s: %s", what, name, kind, _text_of(error))


def _seen(pool: Pool[Any]) -> str | None:
    """What a database's pool knows of it without asking; None if it has to ask."""
    if pool.state in ("stopped", DOWN):
        return DOWN
    stats = pool.stats()
    busy = stats.active >= stats.max_size
    last_seen = pool.last_seen
    if last_seen is not None and monotonic() - last_seen <= _FRESH:
        return DEGRADED if busy and stats.waiting else UP
    if last_seen is not None and busy:
        return DEGRADED
    return None


def _probing(pool: Pool[Any]) -> Callable[[], None]:
    return lambda: probe(pool, BOUND)


def _unanswered(pool: Pool[Any]) -> str:
    """What to say of a database that did not answer in time."""
    if pool.state in ("stopped", DOWN):
        return DOWN
    return STARTING if pool.last_seen is None else DEGRADED


def _kind_of(value: object) -> str:
    return type(value).__name__


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001  # a user's exception may fail at anything
        return "(no text)"
