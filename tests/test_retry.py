"""Back-off schedules and the retry budget."""

from __future__ import annotations

from itertools import islice

import psycopg
from hypothesis import given
from hypothesis import strategies as st

from dbpool.retry import Budget, delays, is_conflict
from tests.threads import run_in_threads


@given(first=st.floats(0.001, 1.0), cap=st.floats(1.0, 60.0), base=st.floats(1.1, 4.0))
def test_delays_stay_between_zero_and_the_growing_bound(
    first: float, cap: float, base: float
) -> None:
    for n, delay in enumerate(islice(delays(first, cap, base), 60)):
        assert 0.0 <= delay <= min(cap, first * base**n) * 1.0000001


def test_delays_are_jittered_over_the_whole_range() -> None:
    values = [next(delays(1.0, 1.0)) for _ in range(400)]
    assert min(values) < 0.1
    assert max(values) > 0.9


def test_a_budget_is_used_up_and_refilled_by_tenths() -> None:
    budget = Budget(2)
    assert [budget.draw() for _ in range(3)] == [True, True, False]
    for _ in range(9):
        budget.refund()
    assert not budget.draw()
    budget.refund()
    assert budget.draw()


def test_a_budget_never_exceeds_its_capacity() -> None:
    budget = Budget(1)
    for _ in range(100):
        budget.refund()
    assert [budget.draw(), budget.draw()] == [True, False]


def test_a_budget_is_exact_under_threads() -> None:
    budget = Budget(1000)
    drawn = run_in_threads(8, lambda: sum(budget.draw() for _ in range(300)))
    assert sum(drawn) == 1000


def test_only_serialization_failures_and_deadlocks_are_conflicts() -> None:
    assert is_conflict(psycopg.errors.SerializationFailure())
    assert is_conflict(psycopg.errors.DeadlockDetected())
    assert not is_conflict(psycopg.errors.UniqueViolation())
    assert not is_conflict(ValueError())
