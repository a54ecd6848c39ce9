"""Use by endpoint: exact over all processes, also ended ones, and of bounded size."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flask import request
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from dbpool import Pool, PoolError, holders
from dbpool.diagnosis.endpoints import (
    LONGEST,
    MAX_NAMES,
    OTHER,
    SHOWN,
    Rows,
    UsageCounter,
    complete,
    merge,
    read_rows,
    to_json,
    totals,
)
from dbpool.diagnosis.history import Step
from dbpool.metrics import HolderSnapshot, Metrics, Snapshot
from dbpool.monitor import Monitor
from dbpool.monitor._shared_files import SharedFiles
from dbpool.processes import Processes

from .conftest import MakeApp
from .fake import FakeServer
from .gunicorn_site import Site
from .threads import run_in_threads
from .waiting import until

CODE = (lambda: None).__code__


def counted(**uses: list[float]) -> Rows:
    """The rows of one process whose endpoints used connections for these seconds."""
    counter = UsageCounter()
    for name, seconds in uses.items():
        for each in seconds:
            counter.ended(0.0, each, name, CODE, 0)
    return counter.rows()


def shown(rows: Rows, **seen: Any) -> dict[str, dict[str, Any]]:
    return {row["endpoint"]: row for row in to_json(rows, seen)}


# Rows


def test_percentiles_of_several_processes_are_those_of_all_uses() -> None:
    """They are not the mean of the processes' percentiles, which would be 0.5 s."""
    busy = counted(pay=[0.002] * 990)
    slow = counted(pay=[1.0] * 10)
    (row,) = to_json(merge([busy, slow]), {})
    assert row["checkouts"] == 1000
    assert row["use_seconds"] == pytest.approx(990 * 0.002 + 10.0)
    assert 0.001 <= row["use_p95"] <= 0.0032
    (row,) = to_json(merge([busy, counted(pay=[1.0] * 110)]), {})
    assert 0.31 <= row["use_p95"] <= 1.0


@given(st.lists(st.dictionaries(st.sampled_from("abcde"), st.lists(st.floats(0, 1e4)))))
def test_the_order_of_merging_changes_nothing(parts: list[dict[str, list[float]]]) -> None:
    rows = [counted(**part) for part in parts]
    assert merge(rows) == merge(reversed(rows)) == merge([merge(rows[:1]), merge(rows[1:])])
    number = sum(len(uses) for part in parts for uses in part.values())
    assert sum(row["checkouts"] for row in to_json(merge(rows), {})) == number


def test_endpoints_beyond_the_bound_are_summed_in_one_row() -> None:
    counter = UsageCounter()
    for n in range(5000):
        counter.ended(0.0, 0.01, f"endpoint-{n}", CODE, 0)
    assert len(counter.rows()) == MAX_NAMES + 1
    other = UsageCounter()
    for n in range(5000, 5150):
        other.ended(0.0, 1.0, f"endpoint-{n}", CODE, 0)
    both = merge([counter.rows(), other.rows()])
    assert len(both) == MAX_NAMES + 1
    assert {f"endpoint-{n}" for n in range(5000, 5150)} <= both.keys(), "the largest are kept"
    found = shown(both)
    assert len(found) == SHOWN + 1
    assert sum(row["checkouts"] for row in found.values()) == 5150
    assert sum(n for _, n, _, _ in totals(both)) == 5150
    assert len(json.dumps(to_json(both, {}))) < 12 * 1024


def test_an_endpoint_that_never_returns_is_shown_before_those_that_do() -> None:
    rows = counted(**{f"e{n}": [float(n)] for n in range(100)})
    found = to_json(rows, {"stuck": {"in_use": 3.0, "longest": 60.0}})
    assert found[0]["endpoint"] == "stuck"
    assert (found[0]["checkouts"], found[0]["in_use"], found[0]["longest"]) == (0, 3.0, 60.0)
    assert found[0]["use_p95"] is None


def test_uses_that_an_ended_process_had_not_written_are_counted_as_other() -> None:
    metrics = Metrics()
    metrics.usage = UsageCounter()
    metrics.finished += [(0.5, 2.0, "pay", CODE, 0)] * 3
    metrics.timeouts, metrics.leaks = 2, 1
    pool = metrics.snapshot([])
    written = counted(pay=[2.0])  # one of the three uses
    found = shown(complete(written, pool))
    assert (found["pay"]["checkouts"], found[OTHER]["checkouts"]) == (1, 3)
    metrics.usage.gave_up("pay", sys._getframe())
    known = complete(metrics.usage.rows(), pool)
    assert shown(known)["pay"]["checkouts"] == 3
    assert shown(known)[OTHER]["gave_up"] == 1


@given(st.recursive(st.none() | st.integers() | st.text(max_size=9) | st.floats(),
       lambda x: st.lists(x, max_size=30) | st.dictionaries(st.text(max_size=9), x)))  # fmt: skip
def test_malformed_rows_are_rejected_or_harmless(data: Any) -> None:
    try:
        rows = read_rows(data)
    except ValueError:
        return
    json.dumps(to_json(rows, {}), allow_nan=False)


def test_a_name_is_printed_on_one_line_of_bounded_length() -> None:
    counter = UsageCounter()
    counter.ended(0.0, 1.0, "a\nb\x1b[31m" + "x" * 999, CODE, 0)
    (name,) = counter.rows()
    assert len(name) <= LONGEST
    assert name.isprintable()


# Pools


@pytest.fixture
def pool(fake: FakeServer) -> Iterator[Pool]:
    with fake.pool(max_size=2, timeout=0.05) as pool:
        pool.count_usage(UsageCounter)
        yield pool
    holders.current.thread.endpoint = None


def test_a_checkout_belongs_to_the_endpoint_that_began_it(pool: Pool) -> None:
    thread = holders.current.thread
    thread.endpoint = "pay"
    conn = pool.getconn()
    thread.endpoint = "list"  # the next request of that thread
    (holder,) = pool.holders()
    assert holder.endpoint == "pay"
    pool.putconn(conn)
    pool.fetch_value("select 1")
    thread.endpoint = None
    pool.stats()
    assert {name: row["checkouts"] for name, row in shown(pool.usage.rows()).items()} == {
        "pay": 1, "list": 1,
    }  # fmt: skip


def test_timeouts_and_forgotten_connections_are_counted_by_endpoint(pool: Pool) -> None:
    thread = holders.current.thread
    thread.endpoint = "greedy"
    held = [pool.getconn(), pool.getconn()]
    thread.endpoint = "hungry"
    for _ in range(3):
        with suppress(PoolError):
            pool.getconn()
    thread.endpoint = None
    with suppress(PoolError):
        pool.getconn()
    del held
    until(lambda: pool.stats().counters.leaks == 2)
    found = shown(pool.usage.rows())
    assert (found["hungry"]["gave_up"], found["greedy"]["forgotten"]) == (3, 2)
    assert found["greedy"]["checkouts"] == 2
    (line,) = [name for name in found if name.startswith("tests/test_endpoints.py:")]
    assert found[line]["gave_up"] == 1


def test_counts_add_up_to_the_pools_counts(pool: Pool) -> None:
    names = iter(["a", "b", "a", None, "c", "a", "b", None])

    def requests() -> None:
        holders.current.thread.endpoint = next(names)
        for _ in range(50):
            with suppress(PoolError), pool.connection():
                pass

    run_in_threads(8, requests)
    stats, found = pool.stats(), shown(pool.usage.rows())
    assert sum(row["checkouts"] for row in found.values()) == stats.counters.checkouts
    assert sum(row["use_seconds"] for row in found.values()) == pytest.approx(stats.use.sum)
    refused = stats.counters.timeouts + stats.counters.rejected
    assert sum(row["gave_up"] for row in found.values()) == refused
    assert stats.counters.checkouts + refused == 400


# Processes

WORKER = """
import sys
from dbpool import holders
from dbpool.processes import Processes
from tests.fake import FakeServer

with FakeServer().pool(max_size=1) as pool:
    processes = Processes({"default": pool}, directory=sys.argv[1])
    for endpoint, number in (("pay", 3), (sys.argv[2], 4)):
        holders.current.thread.endpoint = endpoint
        for _ in range(number):
            pool.fetch_value("select 1")
    processes.start()
    processes.publish()
    print("published", flush=True)
    for line in sys.stdin:
        pool.fetch_value("select 1")
        processes.publish()
        print("published", flush=True)
    processes.close()
"""


def test_the_use_of_ended_and_killed_workers_stays(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), f"of-{n}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parent.parent,
        ) for n in (1, 2)
    ]  # fmt: skip
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "published\n"
    reader = Processes({}, directory=tmp_path)

    def counts() -> dict[str, int]:
        report = reader.collect_others(usage=True)
        assert report is not None
        return {name: row["checkouts"] for name, row in shown(report.usage["default"]).items()}

    assert counts() == {"pay": 6, "of-1": 4, "of-2": 4}
    killed, orderly = workers
    assert killed.stdin is not None
    assert killed.stdout is not None
    killed.stdin.write("\n")  # one more use, published in total but not yet by endpoint
    killed.stdin.flush()
    assert killed.stdout.readline() == "published\n"
    killed.kill()
    for worker in workers:
        worker.communicate()
    assert orderly.returncode == 0
    assert counts() == {"pay": 6, "of-1": 4, "of-2": 4, OTHER: 1}
    assert counts() == {"pay": 6, "of-1": 4, "of-2": 4, OTHER: 1}, "counted once"
    assert not list(tmp_path.glob("*.usage"))


def test_a_damaged_use_file_does_no_harm(
    tmp_path: Path, fake: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(0o700)
    with fake.pool(max_size=1) as pool:
        processes = Processes({"default": pool}, directory=tmp_path)
        pool.fetch_value("select 1")
        processes.publish()
        (path,) = tmp_path.glob("*.usage")
        path.write_text('{"schema": 2, "usage": {"default": {"pay": [1, 2]}}}')
        for _ in range(3):
            report = Processes({}, directory=tmp_path).collect_others(usage=True)
            assert report is not None
            assert report.usage == {}
            assert report.pools["default"].counters.checkouts == 1
        processes.close()
    assert sum(".usage cannot be used" in record.message for record in caplog.records) == 3


def test_the_file_of_two_hundred_endpoints_is_written_at_a_bounded_rate(
    tmp_path: Path, fake: FakeServer
) -> None:
    tmp_path.chmod(0o700)
    with fake.pool(max_size=1) as pool:
        processes = Processes({"default": pool}, directory=tmp_path)
        for n in range(300):
            holders.current.thread.endpoint = f"blueprint.endpoint_number_{n}"
            pool.fetch_value("select 1")
        holders.current.thread.endpoint = None
        processes.publish()
        (path,) = tmp_path.glob("*.usage")
        before, size = path.stat().st_mtime_ns, path.stat().st_size
        assert size < 32 * 1024
        processes.publish()
        assert path.stat().st_mtime_ns == before, "written again within five seconds"
        processes.close()
        assert path.stat().st_mtime_ns > before, "not written at the end"


class Busy:
    """Stands in for a pool: all buckets have counts, and 200 endpoints hold all connections."""

    state, suspicion = "up", ""
    settings = SimpleNamespace(pooler=None)
    chance = random.Random(7)

    def __init__(self) -> None:
        self.metrics = Metrics()
        for times in (self.metrics.wait, self.metrics.use, self.metrics.connect):
            times.counts = [self.chance.randrange(100_000, 1_000_000) for _ in times.counts]
        self.usage = UsageCounter()
        for n in range(MAX_NAMES):
            for _ in range(50):
                self.usage.ended(0.001, 0.01 * n, f"blueprint.some_endpoint_{n}", CODE, 0)

    def stats(self) -> Snapshot:
        for times in (self.metrics.wait, self.metrics.use, self.metrics.connect):
            times.counts = [count + self.chance.randrange(100) for count in times.counts]
        holders = [
            HolderSnapshot(f"ThreadPoolExecutor-0_{n}", n / 7, "app/views.py:41 list_orders",
                           "orders.index", 4711 + n, None, "idle in transaction")
            for n in range(20)
        ]  # fmt: skip
        return self.metrics.snapshot([], state="up", size=20, active=20, holders=tuple(holders))


def test_the_files_of_a_busy_worker_are_small_and_seldom_written(tmp_path: Path) -> None:
    """The files of its monitor may add 1.1 KiB a second and 12 KiB."""
    tmp_path.chmod(0o700)
    processes = Processes({"default": Busy(), "replica": Busy()}, directory=tmp_path)
    started = time.monotonic()
    processes.publish()
    (state,), (usage,) = tmp_path.glob("*.json"), tmp_path.glob("*.usage")
    assert state.stat().st_size + usage.stat().st_size < 52 * 1024
    rate = state.stat().st_size / processes.interval + 450
    assert rate < 2.9 * 1024
    report = Processes({}, directory=tmp_path).collect_others(usage=True)
    assert report is not None
    assert report.pools["default"].holders[0].worker == os.getpid()
    since = report.pools["default"].holders[0].seconds - 19 / 7
    assert -0.01 < since < time.monotonic() - started + 0.01
    assert len(report.usage["default"]) == MAX_NAMES
    processes.close()


@pytest.mark.parametrize("number", [3, 4, 8, 16])
def test_the_files_of_a_worker_with_many_busy_pools_are_as_small(
    tmp_path: Path, number: int
) -> None:
    tmp_path.chmod(0o700)
    pools = {f"pool-{n}": Busy() for n in range(number)}
    processes = Processes(pools, directory=tmp_path)
    processes.publish()
    with closing(SharedFiles(tmp_path, "app", "1-a").record(list(pools))) as record:
        for name in pools:
            for slot in range(100):
                record.write(name, slot, Step())
    state, usage, steps = (
        next(tmp_path.glob(f"*.{ending}")).stat().st_size for ending in ("json", "usage", "steps")
    )
    assert state + usage + steps < 64 * 1024
    report = Processes({}, directory=tmp_path).collect_others(usage=True)
    assert report is not None
    held = [len(pool.holders) for pool in report.pools.values()]
    assert sum(held) <= 40
    assert min(held) >= 1, "a pool shows no holder"
    for rows in report.usage.values():
        assert sum(checkouts for _, checkouts, _, _ in totals(rows)) == 50 * MAX_NAMES
    processes.close()


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs /proc/self/io")
@pytest.mark.parametrize("number", [1, 4, 8, 16, 32])
def test_a_worker_with_any_number_of_busy_pools_writes_less_than_4_kib_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A minute of the watching worker, which also writes findings."""
    tmp_path.chmod(0o700)
    pools = {f"pool-{n}": Busy() for n in range(number)}
    processes = Processes(pools, directory=tmp_path)
    monitor = Monitor(pools, processes, blockers=False)
    now = begin = publish_at = time.monotonic()
    for clock in ("time.monotonic", "dbpool.monitor._monitor.monotonic"):
        monkeypatch.setattr(clock, lambda: now)
    written = 0
    for second in range(-10, 60):
        now = begin + second
        written = written if second > 0 else -bytes_written()  # leaves out the first writes
        if now >= publish_at:
            processes.publish()
            publish_at = now + processes.interval
        monitor.tick()
    assert (written + bytes_written()) / 60 < 4096
    monitor.close()
    processes.close()


def bytes_written() -> int:
    """Return the number of bytes that this process has written."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


# Flask


def test_workers_that_are_replaced_keep_their_share_of_the_use(
    make_site: Callable[..., Site],
) -> None:
    site = make_site(max_requests=20)
    run_in_threads(4, lambda: [site.get("/") for _ in range(60)])

    def counts() -> tuple[int, int]:
        report = json.loads(site.get("/db/stats?include=endpoints"))
        found = {row["endpoint"]: row["checkouts"] for row in report["endpoints"]["default"]}
        total = report["pools"]["default"]["counters"]["checkouts"]
        return found.get("index", 0), total - sum(found.values())

    until(lambda: counts() == (240, 0), 20.0, pause=0.2)


@pytest.mark.parametrize("is_enabled", [True, False])
def test_metrics_have_the_use_by_endpoint_if_asked_for(
    dsn: str, make_app: MakeApp, is_enabled: bool
) -> None:
    app = make_app(dsn, DBPOOL_DETAILS="always", DBPOOL_ENDPOINT_METRICS=is_enabled)
    pool = app.extensions["dbpool"].databases.default

    def view(n: int) -> str:
        holders.current.thread.endpoint = f"e{n}"
        pool.fetch_value("select 1")
        return "done"

    app.add_url_rule("/<int:n>", "view", view)
    for n in range(60):
        app.test_client().get(f"/{n}")
    body = app.test_client().get("/db/metrics").text
    samples = [
        sample
        for family in text_string_to_metric_families(body)
        for sample in family.samples
        if sample.name == "dbpool_endpoint_checkouts_total"
    ]
    assert len(samples) == (SHOWN + 1 if is_enabled else 0)
    assert sum(sample.value for sample in samples) == (60 if is_enabled else 0)
    assert {sample.labels["pool_name"] for sample in samples} <= {"default"}
    assert ('dbpool_endpoint_use_seconds_total{endpoint="other"' in body) is is_enabled


def test_threads_are_busy_while_they_serve_a_request(dsn: str, make_app: MakeApp) -> None:
    app = make_app(dsn, DBPOOL_DETAILS="always")
    processes = app.extensions["dbpool"].processes

    def busy() -> int | None:
        (process,) = processes.report("process")["processes"]
        found: int | None = process["busy"]
        return found

    def view() -> str:
        inner = "" if request.args else app.test_client().get("/view?inner=1").text
        return f"{inner}{busy()}"

    app.add_url_rule("/view", "view", view)
    assert busy() is None, "known before the first request"
    assert app.test_client().get("/view").text == "11", "nested requests count as one busy thread"
    assert busy() == 0
    assert app.test_client().get("/nowhere").status_code == 404
    assert busy() == 0


def test_requests_are_counted_by_endpoint_in_the_stats(dsn: str, make_app: MakeApp) -> None:
    app = make_app(dsn, DBPOOL_DETAILS="always")
    pool = app.extensions["dbpool"].databases.default

    def orders() -> str:
        pool.fetch_value("select 1")
        pool.fetch_value("select 1")
        return "done"

    app.add_url_rule("/orders", "orders.index", orders)

    def requests() -> None:
        for _ in range(5):
            app.test_client().get("/orders")

    run_in_threads(4, requests)
    in_background = threading.Thread(target=lambda: pool.fetch_value("select 1"))
    in_background.start()
    in_background.join()
    report: Any = app.test_client().get("/db/stats?include=endpoints").json
    found = {row["endpoint"]: row for row in report["endpoints"]["default"]}
    assert found["orders.index"]["checkouts"] == 40
    assert sum(row["checkouts"] for row in found.values()) == 41
    assert report["pools"]["default"]["counters"]["checkouts"] == 41
    assert sum(row["use_share"] for row in found.values()) == pytest.approx(1.0, abs=0.01)
