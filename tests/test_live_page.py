"""The live page in a browser: what it makes of the answers of several workers."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, jsonify
from werkzeug.serving import make_server

from .conftest import MakeApp

BROWSER = next(
    filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), ""
)

pytestmark = pytest.mark.skipif(not BROWSER, reason="there is no chromium")

Answer = dict[str, Any]


@pytest.fixture
def page(make_app: MakeApp, tmp_path: Path) -> Iterator[Callable[[list[Answer]], str]]:
    """Show the page to a browser, with these answers one after the other; return what is seen."""
    app: Flask = make_app("host=127.0.0.1 port=1", DBPOOL_DETAILS="always")
    answers: list[Answer] = []
    asked = 0

    def stats() -> Any:
        nonlocal asked
        asked += 1
        return jsonify(answers[min(asked, len(answers)) - 1])

    report = app.extensions["dbpool"].processes.report()
    app.view_functions["dbpool.stats"] = stats
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def show(wanted: list[Answer]) -> str:
        answers.extend(complete(report, answer) for answer in wanted)
        done = subprocess.run(
            [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", "--no-first-run",
             f"--user-data-dir={tmp_path}", f"--virtual-time-budget={1000 * len(wanted) - 500}",
             "--dump-dom", f"http://127.0.0.1:{server.server_port}/db/"],
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        assert asked >= len(wanted)
        return done.stdout

    yield show
    server.shutdown()
    thread.join()
    server.server_close()


def complete(report: Answer, answer: Answer) -> Answer:
    """The JSON of `/stats` for a worker's time, pids, checkouts and state."""
    pool = report["pools"]["default"]
    counters = pool["counters"] | {"checkouts": answer["checkouts"]}
    processes = [
        {"pid": pid, "age": 0.0, "uptime": answer["time"] - born} for pid, born in answer["born"]
    ]
    changed: Answer = {
        "time": answer["time"],
        "scope": answer.get("scope", "process"),
        "processes": processes,
        "pools": {"default": pool | {"counters": counters} | answer.get("pool", {})},
    }
    more = {
        key: answer[key] for key in ("findings", "history", "journal", "endpoints") if key in answer
    }
    return report | changed | more


def rate(dom: str) -> str:
    found = re.search(r'data-rate="">([^<]*)<', dom)
    assert found
    return found[1]


def test_the_rates_of_different_workers_are_not_mixed(page: Callable[[list[Answer]], str]) -> None:
    one, two = [(11, 0.0)], [(22, 0.5)]
    dom = page([
        {"time": 100.0, "born": one, "checkouts": 50},
        {"time": 101.0, "born": two, "checkouts": 9000},
        {"time": 102.0, "born": two, "checkouts": 9007},
        {"time": 104.0, "born": one, "checkouts": 90},
    ])  # fmt: skip
    assert rate(dom) == "10.0 /s"
    assert "process 11 only" in dom
    assert re.search(r'<p id="alone" class="note">', dom), "it says that it shows one worker"
    assert "dbpool.gunicorn" in dom


@pytest.mark.parametrize("second", [(22, 0.0), (11, 50.0)], ids=["other pid", "pid given again"])
def test_a_worker_seen_for_the_first_time_has_no_rate(
    page: Callable[[list[Answer]], str], second: tuple[int, float]
) -> None:
    dom = page([
        {"time": 100.0, "born": [(11, 0.0)], "checkouts": 50},
        {"time": 101.0, "born": [second], "checkouts": 9000},
    ])  # fmt: skip
    assert rate(dom) == "\N{EN DASH}"


def test_the_answers_of_all_workers_are_compared_though_one_is_new(
    page: Callable[[list[Answer]], str],
) -> None:
    dom = page([
        {"time": 100.0, "scope": "all", "born": [(11, 0.0), (22, 0.0)], "checkouts": 100},
        {"time": 102.0, "scope": "all", "born": [(11, 0.0), (33, 100.0)], "checkouts": 150},
    ])  # fmt: skip
    assert rate(dom) == "25.0 /s"
    assert ">2 processes<" in dom
    assert re.search(r'<p id="alone" class="note" hidden="">', dom)


FINDING = {
    "id": "DB04/default", "code": "DB04", "severity": "critical", "pool": "default", "since": 86.0,
    "text": "3 connections of default wait for a lock that <b>psql</b> holds", "do": "End it.",
    "evidence": {},
}  # fmt: skip


def test_the_verdict_comes_first_and_is_in_title_and_icon(
    page: Callable[[list[Answer]], str],
) -> None:
    notice = FINDING | {
        "id": "DB18/default",
        "code": "DB18",
        "severity": "notice",
        "text": "slower",
    }
    dom = page([
        {"time": 100.0, "born": [(1, 0.0)], "checkouts": 1, "findings": [FINDING, notice]},
    ])  # fmt: skip
    assert re.search(r'<section id="verdict" [^>]*class="verdict critical"', dom)
    assert "wait for a lock that &lt;b&gt;psql&lt;/b&gt; holds</h2>" in dom, "shown as text"
    assert ">DB04 \N{MIDDLE DOT} critical \N{MIDDLE DOT} default \N{MIDDLE DOT} for 14.0 s<" in dom
    assert "<title>critical: DB04 default" in dom
    assert re.search(r'<link rel="icon" id="icon" href="[^"]*icon-critical.svg"', dom)
    assert re.search(r'<li class="notice">slower \(DB18', dom)
    assert dom.index("End it.") < dom.index("checked out at")


def test_a_pool_without_a_free_connection_is_full_not_up(
    page: Callable[[list[Answer]], str],
) -> None:
    full = {"state": "up", "size": 4, "active": 4, "max_size": 4, "waiting": 6}
    dom = page([{"time": 100.0, "born": [(1, 0.0)], "checkouts": 1, "pool": full}])
    assert re.search(r'class="state full" data-state="">full<', dom)


def test_history_and_journal_are_shown(page: Callable[[list[Answer]], str]) -> None:
    series = {
        key: [None] * 90 + [0] * 80 + [value] * 10
        for key, value in (
            ("in_use", 4),
            ("waiting", 6),
            ("wait_p95", 1.5),
            ("checkouts", 9),
            ("refused", 0),
        )
    }
    lines = [{"time": 99.0, "pool": "default", "event": "down", "text": "down: <i>refused</i>"}]
    dom = page([
        {"time": 100.0, "born": [(1, 0.0)], "checkouts": 1, "journal": lines,
         "history": {"step": 5.0, "until": 100.0, "pools": {"default": series}}},
    ])  # fmt: skip
    assert dom.count("<svg") == 5
    assert "at most 1.5 s" in dom
    assert re.search(r'<div class="refused calm"><dt>refused</dt>', dom)
    assert "down: &lt;i&gt;refused&lt;/i&gt;" in dom


def test_who_holds_connections_is_shown_with_session_and_worker(
    page: Callable[[list[Answer]], str],
) -> None:
    held = {"thread": "T-1", "seconds": 14.0, "where": "pay.py:88", "endpoint": "billing.pay"}
    waiting = {"pid": 5001, "worker": 4711, "status": "idle in transaction", "waits": True}
    endpoints = {
        "default": [{"endpoint": "<b>pay</b>", "in_use": 1.5, "use_share": 0.75, "longest": 14.0}]
    }
    dom = page([
        {"time": 100.0, "born": [(1, 0.0)], "checkouts": 1, "endpoints": endpoints,
         "pool": {"holders": [held | waiting, held | {"status": "query"}]}},
    ])  # fmt: skip
    cells = re.findall(r'<td data-label="([^"]*)">([^<]*)</td>', dom)
    assert cells[3:6] == [
        ("now", "waits for another connection"), ("session", "5001"), ("worker", "4711"),
    ]  # fmt: skip
    assert cells[10:12] == [("now", "query"), ("session", "\N{EN DASH}")]
    assert "&lt;b&gt;pay&lt;/b&gt;</th><td>1.5</td><td>75 %</td><td>14.0 s</td>" in dom
