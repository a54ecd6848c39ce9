"""`python -m dbpool top` and `stats --human`: the live page's texts in a terminal."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbpool import Databases, PoolError, Settings
from dbpool.cli import main
from dbpool.cli._text import as_text
from dbpool.monitor import Monitor
from dbpool.processes import Processes
from dbpool.processes._files import start_time

from .page_states import STATES

NOW = 1_795_000_000.0
REPORT: dict[str, Any] = {
    "time": NOW,
    "findings": [
        {"code": "DB04", "severity": "critical", "pool": "default", "since": NOW - 14,
         "text": "3 connections of default wait for a lock", "do": "End it."},
    ],
    "processes": [{"pid": 4711, "age": 0.2, "uptime": 9.0}],
    "pools": {
        "default": {
            "state": "up", "active": 4, "max_size": 4, "idle": 0, "waiting": 6,
            "holders": [{"seconds": 14.0, "where": "pay.py:88 pay", "endpoint": "billing.pay",
                         "thread": "T-1", "status": "idle in transaction"}],
        },
    },
    "history": {"pools": {"default": {"in_use": [None, 0, 2, 4], "refused": [0, 0, 0, 0],
                                      "wait_p95": [None, None, 0.5, 1.0]}}},
    "journal": [{"time": NOW, "pool": None, "event": "worker started", "text": "worker 1 started"}],
}  # fmt: skip


def test_findings_come_first_then_the_pools() -> None:
    lines = as_text(REPORT).splitlines()
    assert lines[:2] == [
        "CRITICAL DB04 for 14 s: 3 connections of default wait for a lock",
        "    End it.",
    ]
    assert "default: full, 4 of 4 in use, 0 idle, 6 waiting" in lines
    assert "    in use    · ▄█  peak 4" in lines
    assert "    wait p95  ··▄█  peak 1.0 s" in lines
    assert not any("refused" in line for line in lines), "counters that did not change are left out"
    assert "       14 s  billing.pay (pay.py:88 pay)  idle in transaction  T-1" in lines
    assert "1 process  4711 (200 ms ago)" in lines
    assert lines[-1].endswith("  -  worker 1 started")


def test_it_shows_what_the_page_shows() -> None:
    shown = as_text(STATES["locked"](), 120).splitlines()
    assert shown[0].startswith("CRITICAL DB04 for 14 s: 12 connections of default wait for a lock")
    for line in (
        "    server     PostgreSQL 18.4 primary, 33 of 100 connections used, 12 ours, latency 0.4 ms, TLS",
        "    worker 4711  4 of 4 in use, 2 waiting, 98214 checkouts, 4 refused",
    ):
        assert line in shown
    assert any(
        re.fullmatch(r"    last minute  wait p95 .* ms, use p95 .* ms", each) for each in shown
    )
    assert any(re.fullmatch(r"        3\.0  orders\.index: \d+ checkouts, use p95 \d.*, longest 14 s", each) for each in shown)  # fmt: skip
    assert shown[-4].endswith("all 12 connections in use, callers wait")


def test_many_workers_are_shortened_and_counted() -> None:
    shown = as_text(STATES["locked"]() | {"workers": {"default": [{"pid": n} for n in range(20)]}})
    assert "    and 4 other workers" in shown.splitlines()


def test_no_line_is_wider_than_the_terminal() -> None:
    assert max(map(len, as_text(REPORT, 30).splitlines())) <= 30


def test_findings_are_shown_in_full() -> None:
    finding = {"code": "DB00", "severity": "ok", "text": "x " * 99 + "end", "do": "y " * 99}
    shown = as_text(REPORT | {"findings": [finding]}, 60).partition("\n\n")[0]
    assert shown.split() == f"OK DB00: {finding['text']} {finding['do']}".split()


JSON = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
)


PARTS = ["servers", "endpoints", "workers"]


@given(
    st.dictionaries(
        st.sampled_from([*REPORT, *PARTS]), JSON | st.dictionaries(st.just("default"), JSON)
    )
)
def test_any_report_is_shown_without_control_characters(report: Any) -> None:
    assert all(line.isprintable() for line in as_text(REPORT | report).splitlines())


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Path]:
    """The directory of an application whose database is down, watched by one process."""
    directory = tmp_path / "stats"
    directory.mkdir(mode=0o700)
    settings = Settings(conninfo="host=127.0.0.1 port=1 user=u dbname=d", outage_grace=0.0)
    databases = Databases({"default": settings})
    processes = Processes(databases, directory, "shop")
    monitor = Monitor(databases, processes)
    with suppress(PoolError):
        databases.default.fetch_value("select 1")
    processes.publish()
    monitor.tick()
    yield directory
    monitor.close()
    processes.close()
    databases.close()


@pytest.mark.parametrize("command", ["top --once", "stats --human"])
def test_commands_show_what_the_watching_process_found(
    running: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    status = main([*command.split(), "--dir", str(running)])
    shown = capsys.readouterr().out
    assert shown.startswith("CRITICAL DB01 for ")
    assert "default: down, 0 of 10 in use" in shown
    assert "  default  down: connection failed" in shown, "the journal"
    assert status == (0 if "top" in command else 1)


def test_the_findings_follow_the_processes_that_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are written again at once, not only after the interval of a calm application."""
    directory = tmp_path / "stats"
    directory.mkdir(mode=0o700)

    def shown() -> str:
        main(["top", "--once", "--dir", str(directory)])
        return capsys.readouterr().out.splitlines()[0]

    databases = Databases({"default": Settings(conninfo="host=127.0.0.1 port=1")})
    processes = Processes(databases, directory)
    monitor = Monitor(databases, processes, blockers=False)
    monitor.tick()  # the first poll may come before the first report
    assert monitor.findings()[0]["text"] == "nothing is known yet: no process has reported a pool"
    processes.publish()
    assert shown().startswith("OK DB00: the pools are not the cause: default has 0 of 10 ")
    monitor.tick()
    (own,) = directory.glob("*.json")
    parent = {"pid": os.getppid(), "start": start_time(os.getppid())}
    (directory / "app-1-1.json").write_text(json.dumps(json.loads(own.read_text()) | parent))
    monitor.tick()
    assert "default has 0 of 20 connections" in shown()
    monitor.close()
    processes.close()
    databases.close()


def test_the_statistics_as_json_have_the_findings(
    running: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stats", "--dir", str(running)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [each["id"] for each in report["findings"]] == ["DB01/default"]
    assert "history" not in report


def test_without_an_application_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dbpool.cli._running.find_directories", list)
    assert main(["top", "--once"]) == 1
    assert "DBPOOL_STATS_DIR" in capsys.readouterr().err
