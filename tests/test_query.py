"""The query parameters of `/stats`."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbpool.monitor import INCLUDES, Query

REPORT: dict[str, Any] = {
    "schema": 2,
    "pools": {"default": {"size": 2, "holders": [{"where": "a"}, {"where": "b"}]}},
    "history": {"step": 5.0, "until": 1000.0, "pools": {"default": {"in_use": [1, 2, 3, 4]}}, "minute": {}},
    "journal": [{"time": 990.0, "text": "late"}, {"time": 900.0, "text": "early"}],
    "endpoints": {"default": [{"endpoint": "a"}, {"endpoint": "b"}]},
    "workers": {"default": [{"pid": 1}, {"pid": 2}]},
}  # fmt: skip


@pytest.mark.parametrize(
    ("since", "steps"),
    [("", [1, 2, 3, 4]), ("1000", []), ("995", [4]), ("994.9", [4]), ("990.1", [3, 4]), ("1", [1, 2, 3, 4]), ("2000", [])],
)  # fmt: skip
def test_since_limits_the_history_to_newer_steps(since: str, steps: list[int]) -> None:
    shown = Query.parse({"since": since}).trim(REPORT)
    assert shown["history"]["pools"]["default"]["in_use"] == steps
    assert len(REPORT["history"]["pools"]["default"]["in_use"]) == 4, "the report was changed"


def test_lists_are_shortened_and_old_lines_left_out() -> None:
    shown = Query.parse({"limit": "1"}).trim(REPORT)
    assert [line["text"] for line in shown["journal"]] == ["late"]
    assert shown["endpoints"] == {"default": [{"endpoint": "a"}]}
    assert shown["workers"] == REPORT["workers"], "a worker is missing"
    assert shown["pools"]["default"] == {"size": 2, "holders": [{"where": "a"}]}
    assert len(Query.parse({"since": "950"}).trim(REPORT)["journal"]) == 1
    assert Query().trim(REPORT) == REPORT


def test_the_parts_may_be_limited_to_one_pool() -> None:
    shown = Query.parse({"pool": "replica"}).trim(REPORT)
    assert shown["history"]["pools"] == shown["endpoints"] == shown["workers"] == {}
    assert shown["pools"] == REPORT["pools"], "the other pools are missing"
    assert Query.parse({"pool": "default"}).trim(REPORT) == REPORT


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"include": "all"}, "include is a list of history"),
        ({"include": "history,,x"}, "include is"),
        ({"since": "yesterday"}, "since is Unix time"),
        ({"since": "nan"}, "since is Unix time"),
        ({"since": "-1"}, "since is"),
        ({"limit": "-1"}, "limit is a number"),
        ({"limit": "1e3"}, "limit is"),
        ({"limit": "\u0663"}, "limit is"),
    ],
)
def test_an_invalid_parameter_is_named_in_the_error(given: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Query.parse(given)


@given(st.dictionaries(st.sampled_from(["include", "since", "limit"]), st.text(max_size=9)))
def test_any_query_is_accepted_or_a_value_error(given: dict[str, str]) -> None:
    with suppress(ValueError):
        query = Query.parse(given)
        assert set(query.include) <= set(INCLUDES)
        assert query.trim(REPORT)["schema"] == 2
