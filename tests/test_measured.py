"""The tables of measurements that the diagnosis' slow tests made."""

from __future__ import annotations

from .measured import README, SAVED, read, written


def test_the_tables_in_bench_are_those_of_the_last_kept_run() -> None:
    results = read(SAVED)
    assert len([row for row in results.values() if row["code"]]) >= 24
    assert len([row for row in results.values() if not row["code"]]) >= 16
    assert written(README.read_text(), results) == README.read_text(), (
        "run python -m tests.measured"
    )


def test_no_kept_result_is_a_wrong_one() -> None:
    for name, row in read(SAVED).items():
        for privilege in ("with", "without"):
            assert row[privilege]["wrong"] == [], name
