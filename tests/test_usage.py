"""Sampled use of connections by endpoint: bounded and robust."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbpool.diagnosis.endpoints import OTHER, SHOWN
from dbpool.diagnosis.usage import Usage


def report(*endpoints: str | None, active: int | None = None, seconds: float = 1.0) -> Any:
    held = [{"endpoint": each, "where": "app.py:1 f", "seconds": seconds} for each in endpoints]
    return {"pools": {"default": {"active": active or len(held), "holders": held}}}


def rows(usage: Usage) -> dict[str, dict[str, float]]:
    return usage.to_json()["default"]


def test_an_endpoints_share_is_its_share_of_the_samples() -> None:
    usage = Usage()
    for second in range(61):
        usage.look(report("pay", "pay", *(["list"] if second % 2 else [])), 100.0 + second)
    found = rows(usage)
    assert found["pay"]["in_use"] == pytest.approx(2.0, abs=0.01)
    assert found["list"]["in_use"] == pytest.approx(0.5, abs=0.02)
    assert found["pay"]["longest"] == 1.0


def test_old_samples_count_less() -> None:
    usage = Usage()
    for second in range(900):
        usage.look(report("old" if second < 300 else "new"), 100.0 + second)
    found = rows(usage)
    assert found["old"]["in_use"] < 0.3 * found["new"]["in_use"]


def test_a_holder_without_an_endpoint_is_named_by_its_line() -> None:
    usage = Usage()
    usage.look(report(None), 100.0)
    usage.look(report(None), 101.0)
    assert "app.py:1 f" in rows(usage)


def test_unlisted_holders_are_summed_as_others() -> None:
    usage = Usage()
    for second in range(10):
        usage.look(report("pay", active=5), 100.0 + second)
    assert rows(usage)[OTHER]["in_use"] == pytest.approx(4.0, abs=0.05)


def test_the_number_of_endpoints_is_bounded() -> None:
    usage = Usage()
    for second in range(20):
        names = [f"e{n}" for n in range(second * 50, second * 50 + 50)]
        usage.look(report(*names), 100.0 + second)
    found = rows(usage)
    assert len(found) == SHOWN
    assert next(iter(found)) == OTHER
    assert len(json.dumps(found)) < 10 * 1024


def test_a_clock_jump_gives_no_sample_more_weight() -> None:
    usage = Usage()
    for now in (100.0, 101.0, 5000.0, 10.0, 11.0):
        usage.look(report("pay"), now)
    assert rows(usage)["pay"]["in_use"] == pytest.approx(1.0, abs=0.2)


@given(st.lists(st.tuples(st.recursive(st.none() | st.floats() | st.text(max_size=5),
       lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x)), st.floats(0, 1e6))))  # fmt: skip
def test_no_report_breaks_it(samples: list[tuple[Any, float]]) -> None:
    usage = Usage()
    for pools, now in samples:
        usage.look({"pools": pools}, now)
    json.dumps(usage.to_json(), allow_nan=False)
