"""The breaker's rules, on a clock that the tests move."""

from __future__ import annotations

import time

import psycopg
import pytest

from dbpool.breaker import Attempt, Breaker
from tests.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(grace=2.0, clock=clock)


def begun(breaker: Breaker, started: float) -> Attempt:
    """An attempt that began at *started*."""
    attempt = breaker.reserve()
    attempt.started = started
    return attempt


def fail(
    breaker: Breaker,
    clock: Clock,
    kind: str = "refused",
    *,
    alive_at: float = 0.0,
    idle: int = 0,
    out: int = 0,
) -> bool:
    """Record a failure; return whether it opened the breaker."""
    breaker.last_alive_at = alive_at
    error = psycopg.OperationalError(f"failed: {kind}")
    breaker.failed(begun(breaker, clock.now), error, kind)
    return breaker.trip_if_due(idle=idle, out=out)


def overdue(breaker: Breaker, started: float, alive_at: float = 0.0) -> bool:
    """Whether an unanswered attempt that began at *started* opens the breaker."""
    breaker.last_alive_at = alive_at
    attempt = Attempt()
    attempt.started = started
    breaker.overdue(attempt, psycopg.OperationalError("no answer"))
    return breaker.trip_if_due(idle=0, out=0)


def test_starts_closed_and_says_so(breaker: Breaker) -> None:
    assert breaker.state == "closed"
    assert repr(breaker) == "<Breaker closed kind='unknown' failing_for=0.0>"
    assert (breaker.since, breaker.retry_after, breaker.last_error) == (None, None, None)


def test_failures_within_the_grace_leave_it_closed(breaker: Breaker, clock: Clock) -> None:
    assert not fail(breaker, clock)
    clock.now += 1.9
    assert not fail(breaker, clock)
    assert breaker.is_failing
    assert breaker.state == "closed"


def test_opens_once_when_failures_outlast_the_grace(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, clock)
    clock.now += 2.0
    assert fail(breaker, clock)
    assert not fail(breaker, clock)
    assert breaker.state == "open"
    assert breaker.last_error == "failed: refused"


def test_an_attempt_in_an_outage_is_half_open(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, clock, "password")
    begun(breaker, clock.now)
    assert breaker.state == "half-open"
    assert breaker.is_open
    (attempt,) = (each for each in breaker.attempts if each.started)
    breaker.failed(attempt, psycopg.OperationalError("failed"), "password")
    assert breaker.state == "open"


def test_success_closes_it_and_returns_the_outages_duration(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, clock)
    clock.now += 2.5
    assert fail(breaker, clock)
    clock.now += 5.0
    assert breaker.succeeded(breaker.reserve()) == 7.5
    assert breaker.state == "closed"
    assert breaker.succeeded(breaker.reserve()) is None


@pytest.mark.parametrize("kind", ["password", "role", "database", "access", "tls", "conninfo"])
def test_a_permanent_failure_needs_no_grace(breaker: Breaker, clock: Clock, kind: str) -> None:
    assert fail(breaker, clock, kind)


def test_a_permanent_failure_waits_for_connections_that_are_out(
    breaker: Breaker, clock: Clock
) -> None:
    assert not fail(breaker, clock, "password", out=3)
    clock.now += 2.0
    assert fail(breaker, clock, "password", out=3)


def test_a_full_server_is_not_down_while_connections_are_out(
    breaker: Breaker, clock: Clock
) -> None:
    fail(breaker, clock, "saturated", out=8)
    clock.now += 60.0
    assert not fail(breaker, clock, "saturated", out=8)
    assert fail(breaker, clock, "saturated", out=0)


@pytest.mark.parametrize("kind", ["refused", "password", "saturated"])
def test_it_stays_closed_while_there_are_idle_connections(
    breaker: Breaker, clock: Clock, kind: str
) -> None:
    fail(breaker, clock, kind, idle=1)
    clock.now += 60.0
    assert not fail(breaker, clock, kind, idle=1)
    assert breaker.trip_if_due(idle=0, out=0), "without idle connections it opens at once"


def test_a_sign_of_life_restarts_the_grace(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, clock)
    clock.now += 1.5
    seen = clock.now
    clock.now += 1.0
    assert not fail(breaker, clock, alive_at=seen)
    clock.now += 1.9
    assert not fail(breaker, clock, alive_at=seen)
    clock.now += 0.1
    assert fail(breaker, clock, alive_at=seen)


def test_an_unanswered_attempt_counts_as_failing(breaker: Breaker, clock: Clock) -> None:
    started = clock.now
    clock.now += 2.0
    assert overdue(breaker, started)
    assert breaker.state == "open"
    assert breaker.kind == "timeout"


def test_an_attempt_has_half_a_second_however_short_the_grace(clock: Clock) -> None:
    breaker, started = Breaker(0.0, clock), clock.now
    clock.now += 0.4
    assert not overdue(breaker, started)
    clock.now += 0.1
    assert overdue(breaker, started)


def test_the_last_error_is_one_line(breaker: Breaker, clock: Clock) -> None:
    breaker.failed(breaker.reserve(), psycopg.OperationalError("connection\n\tlost"), "x")
    assert breaker.last_error == "connection lost"
    breaker.failed(breaker.reserve(), Exception("of a callback"), "unknown")
    assert breaker.last_error == "Exception"


def test_a_slow_attempt_is_no_outage_while_others_come_back(breaker: Breaker, clock: Clock) -> None:
    started = clock.now
    clock.now += 2.0
    assert not overdue(breaker, started, alive_at=started + 1.0)
    assert breaker.state == "closed"
    clock.now += 1.0  # no connection has come back since
    assert overdue(breaker, started, alive_at=started + 1.0)


def test_a_slow_failure_counts_from_the_last_sign_of_life(breaker: Breaker, clock: Clock) -> None:
    started = clock.now
    clock.now += 5.0
    breaker.last_alive_at = started + 4.9
    error = psycopg.errors.ConnectionTimeout("timeout expired")
    breaker.failed(begun(breaker, started), error, "timeout")
    assert not breaker.trip_if_due(idle=0, out=2)
    clock.now += 2.0
    assert breaker.trip_if_due(idle=0, out=2)


def test_a_connection_that_comes_back_healthy_closes_it(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, clock, "password")
    breaker.last_alive_at = clock.now - 1.0
    breaker.close_if_alive()
    assert breaker.state == "open"
    breaker.last_alive_at = clock.now + 1.0
    breaker.close_if_alive()
    assert breaker.state == "closed"
    assert breaker.is_failing, "the cause stays known, as connecting may still fail"
    assert breaker.last_error == "failed: password"


def test_an_outage_is_reported_once_until_a_connect_succeeds(
    breaker: Breaker, clock: Clock
) -> None:
    fail(breaker, clock)
    assert not breaker.report_failure(1.0)
    clock.now += 1.0
    assert breaker.report_failure(1.0)
    fail(breaker, clock, alive_at=clock.now)  # starts the grace again
    assert not breaker.report_failure(1.0)
    clock.now += 1.0
    assert not breaker.report_failure(1.0)
    breaker.succeeded(breaker.reserve())
    fail(breaker, clock)
    assert breaker.report_failure(0.0)


def test_reset_forgets_everything(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, clock, "password")
    breaker.reset()
    assert breaker.state == "closed"
    assert not breaker.is_failing
    assert breaker.last_error is None


def test_it_uses_a_replaced_time_monotonic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Freezegun replaces the clock for a while, perhaps before dbpool is imported."""
    breaker = Breaker(grace=2.0)
    monkeypatch.setattr(time, "monotonic", lambda: 42.0)
    assert breaker.clock() == 42.0
