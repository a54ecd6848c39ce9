"""The report about the pools of all processes: merging it, and reading it from JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbpool.metrics import BreakerSnapshot, HolderSnapshot, Metrics, PoolState, Snapshot
from dbpool.processes import Processes
from dbpool.prometheus import expose
from dbpool.report import Process, Report
from tests.fake import FakeServer

from .conftest import MakeApp
from .postgres import until
from .test_metrics import snapshots
from .test_processes import ODD, paths, replaced


def part(pid: int, pool: Snapshot, written: float = 0.0, number: int = 0) -> Report:
    process = Process(pid, start="1", number=number, written=written, uptime=1.0)
    return Report({"default": pool}, (process,), "process", time=5.0)


def busy(seconds: float) -> Snapshot:
    """A pool with a wait, a holder and an open breaker."""
    return Metrics().snapshot(
        [seconds],
        state="down",
        size=1,
        active=1,
        holders=(HolderSnapshot("a", seconds, "a.py:1 f"),),
        breaker=BreakerSnapshot("open", 1.0, "refused", 2.0),
    )


@given(snapshots(), snapshots())
def test_a_report_is_the_same_after_json(one: Snapshot, two: Snapshot) -> None:
    report = Report({"default": one, "replica": two}, (Process(1, age=2.0),), time=5.0)
    copy = Report.from_json(json.loads(json.dumps(report.to_json())))
    assert copy.pools == report.pools
    assert copy.processes == report.processes
    assert expose(copy) == expose(report) == expose(report.to_json())


@given(snapshots(), snapshots())
def test_merged_reports_hold_every_process_and_each_pool_once(one: Snapshot, two: Snapshot) -> None:
    other = Report({"default": two, "replica": two}, (Process(2),))
    merged = part(1, one).merge(other)
    assert [process.pid for process in merged.processes] == [1, 2]
    assert merged.pools["default"].size == one.size + two.size
    assert merged.pools["replica"].counters == two.counters
    assert merged.pools == other.merge(part(1, one)).pools


def test_a_processes_age_is_that_of_its_newest_part() -> None:
    parts = [
        part(1, Snapshot(), written, number).as_of(10.0) for number, written in ((1, 3), (2, 9))
    ]
    assert [p.age for p in parts[0].merge(parts[1]).processes] == [1.0]
    assert [p.age for p in parts[1].merge(parts[0]).processes] == [1.0]


def test_as_of_ages_holders_and_brings_the_next_attempt_nearer() -> None:
    report = part(1, busy(3.0), written=10.0)
    later, long_after = report.as_of(11.5), report.as_of(100.0)
    assert later.pools["default"].holders[0].seconds == 4.5
    assert later.pools["default"].breaker.retry_after == 0.5
    assert (later.processes[0].age, later.processes[0].uptime) == (1.5, 2.5)
    assert long_after.pools["default"].breaker.retry_after == 0.0
    assert report.as_of(9.0).processes[0].age == 0.0, "an age is never negative"


def test_totals_of_ended_processes_remain() -> None:
    remaining = part(1, busy(3.0)).totals_only()
    pool = remaining.pools["default"]
    assert remaining.processes == ()
    assert (pool.state, pool.size, pool.holders) == (PoolState.NONE, 0, ())
    assert pool.breaker == BreakerSnapshot()
    assert (pool.counters.checkouts, pool.wait.count) == (1, 1)


def test_each_live_worker_keeps_its_own_numbers() -> None:
    totals = part(9, busy(3.0)).totals_only()
    merged = totals.merge(part(2, busy(1.0), written=8.0).as_of(10.0), part(1, Snapshot()))
    restored = Report({}).merge(merged)
    first, second = restored.workers_to_json()["default"]
    assert (first["pid"], first["in_use"], first["checkouts"]) == (1, 0, 0)
    assert (second["pid"], second["age"], second["uptime"]) == (2, 2.0, 3.0)
    assert (second["state"], second["in_use"], second["checkouts"]) == ("down", 1, 1)
    assert merged.pools["default"].counters.checkouts == 2, "with those of the ended worker"


def test_the_busiest_of_many_workers_are_shown() -> None:
    parts = [part(pid, busy(1.0) if pid > 90 else Snapshot()) for pid in range(1, 101)]
    shown = parts[0].merge(*parts[1:]).workers_to_json()["default"]
    assert len(shown) == 64
    assert {each["pid"] for each in shown} >= set(range(91, 101))


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"processes": [], "pools": []},
        {"processes": [], "pools": {"default": {}}},
        {"processes": [{"pid": 1}], "pools": {}},
        {"processes": [{"pid": -1, "age": 0}], "pools": {}},
        {"processes": [{"pid": 1 << 31, "age": 0}], "pools": {}},
        {"processes": None, "pools": {}},
    ],
)
def test_a_malformed_report_is_a_value_error(data: Any) -> None:
    with pytest.raises(ValueError):
        Report.from_json(data)


A_REPORT = part(1, busy(3.0)).to_json()


@given(st.sampled_from(list(paths(A_REPORT))), ODD)
def test_any_json_is_a_strict_report_or_rejected(path: tuple[Any, ...], odd: Any) -> None:
    try:
        report = Report.from_json(replaced(A_REPORT, path, odd))
    except ValueError:
        return
    json.dumps(report.to_json(), allow_nan=False, ensure_ascii=False).encode()
    expose(report)


def test_a_request_does_not_parse_its_own_json(
    make_app: MakeApp, fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("JSON inside one process")

    client = make_app(fake, DBPOOL_DETAILS="always").test_client()
    monkeypatch.setattr(Report, "from_json", refuse)
    assert client.get("/db/stats").status_code == 200
    monkeypatch.setattr(Report, "to_json", refuse)
    monkeypatch.setattr(Snapshot, "to_json", refuse)
    assert client.get("/db/metrics").status_code == 200


def test_without_a_directory_requests_do_not_publish(
    make_app: MakeApp, fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_app(fake).test_client()
    assert client.get("/db/health/live").status_code == 200
    monkeypatch.delattr(Processes, "start")
    assert client.get("/db/health/live").status_code == 200


def test_requests_publish_once_the_directory_exists(
    make_app: MakeApp, fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "stats"
    client = make_app(fake, DBPOOL_STATS_DIR=str(directory)).test_client()
    assert client.get("/db/health/live").status_code == 200
    directory.mkdir(mode=0o700)

    def published() -> bool:
        assert client.get("/db/health/live").status_code == 200
        return bool(list(directory.glob("*.json")))

    until(published)
    monkeypatch.delattr(Processes, "start")
    assert client.get("/db/health/live").status_code == 200
