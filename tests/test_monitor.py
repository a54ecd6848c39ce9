"""The monitor: it finds blockers over at most one connection, and shares its findings."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import psycopg
import pytest

from dbpool import Databases, PoolError, PoolExhausted, Settings
from dbpool.diagnosis import Finding, Severity
from dbpool.diagnosis.history import STEP, Step, slot_of
from dbpool.monitor import Monitor
from dbpool.monitor._episodes import Episodes
from dbpool.monitor._shared_files import SharedFiles
from dbpool.processes import Processes
from dbpool.report import Report

from .faults.test_pgbouncer import PROGRAM, Bouncer
from .postgres import Server, session, until
from .scripts import python
from .threads import Task

NAME = "dbpool:monitor"


class Shop:
    """An application in one process: pools, a monitor, and callers in threads."""

    def __init__(self, conninfo: str, directory: Path | None = None, **options: Any) -> None:
        settings = Settings(conninfo=conninfo, **{"max_size": 2, "timeout": 20.0, **options})
        self.databases = Databases({"default": settings})
        self.pool = self.databases.default
        self.processes = Processes(self.databases, directory)
        self.monitor = Monitor(self.databases, self.processes)
        self.callers = ThreadPoolExecutor(8)
        self.pids: set[int] = set()  # of the callers' sessions

    def call(self, statement: str, before_return: Callable[[], object] = lambda: None) -> None:
        """Run a statement in another thread; call *before_return* before its connection is returned."""

        def run() -> None:
            with suppress(psycopg.Error, PoolError), self.pool.connection() as conn:
                self.pids.add(conn.info.backend_pid)
                conn.execute(statement.encode())
                before_return()

        self.callers.submit(run)

    def await_finding(self, code: str, seconds: float = 15.0) -> dict[str, Any]:
        """Run the monitor's steps until *code* is the first finding; return that."""
        found: list[dict[str, Any]] = []

        def is_first() -> bool:
            self.monitor.tick()
            found[:] = self.monitor.findings()
            return bool(found[0]["code"] == code)

        until(is_first, seconds, pause=0.1)
        return found[0]

    def close(self) -> None:
        self.callers.shutdown(cancel_futures=True)
        self.monitor.close()
        self.processes.close()
        self.databases.close()


@pytest.fixture
def make_shop() -> Iterator[Callable[..., Shop]]:
    with ExitStack() as stack:

        def make(*args: Any, **options: Any) -> Shop:
            shop = Shop(*args, **options)
            stack.callback(shop.close)
            return shop

        yield make


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "stats"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def table(own_server: Server) -> Server:
    own_server.execute("create table stock (id int primary key, n int)")
    own_server.execute("insert into stock select n, 0 from generate_series(1, 10) n")
    own_server.execute("grant all on stock to public")
    return own_server


def test_a_foreign_session_that_holds_a_lock_is_named(
    table: Server, make_shop: Callable[..., Shop]
) -> None:
    shop = make_shop(table.conninfo)
    with session(table, "lock table stock") as pid:
        for _ in range(5):
            shop.call("select count(*) from stock")
        found = shop.await_finding("DB04")
        (blocker,) = found["evidence"]["blockers"]
        assert (blocker["pid"], blocker["application_name"]) == (pid, "psql")
        assert (blocker["state"], blocker["where"]) == ("idle in transaction", None)
        assert found["severity"] == "critical"
        assert f"session {pid} (psql, 127.0.0.1) holds, idle in transaction" in found["text"]
        assert f"pg_terminate_backend({pid})" in found["do"]
        assert len(table.backends(NAME)) == 1, "more than one connection beside the pool's"
        with pytest.raises(PoolExhausted) as info:
            shop.pool.getconn(timeout=0.05)
        assert "; DB04: 2 connections of default wait for a lock that the" in str(info.value)
        assert f"session {pid} (psql) holds" in str(info.value)
        assert "127.0.0.1" not in str(info.value), "errors must not show addresses"
    shop.await_finding("DB00")
    shop.monitor.tick()
    held = [shop.pool.getconn() for _ in range(2)]
    with pytest.raises(PoolExhausted) as info:
        shop.pool.getconn(timeout=0.0)
    assert "DB0" not in str(info.value), "the finding has not ended"
    for conn in held:
        shop.pool.putconn(conn)


def test_a_database_in_sql_ascii_is_read(table: Server, make_shop: Callable[..., Shop]) -> None:
    """In SQL_ASCII psycopg returns text as bytes."""
    shop = make_shop(f"{table.conninfo} client_encoding=sql_ascii")
    with session(table, "lock table stock") as pid:
        for _ in range(5):
            shop.call("select count(*) from stock")
        (blocker,) = shop.await_finding("DB04")["evidence"]["blockers"]
    assert (blocker["pid"], blocker["state"]) == (pid, "idle in transaction")


@pytest.mark.parametrize(
    ("variable", "more"), [("shop", ""), ("", f" application_name={'shop-' * 20}")]
)
def test_our_sessions_are_recognised_by_any_application_name(
    table: Server, make_shop: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch,
    variable: str, more: str,
) -> None:  # fmt: skip
    if variable:
        monkeypatch.setenv("PGAPPNAME", variable)
    shop = make_shop(table.conninfo + more)
    with session(table, "lock table stock") as pid:
        for _ in range(3):
            shop.call("select count(*) from stock")
        found = shop.await_finding("DB04")
        assert found["evidence"]["blockers"][0]["pid"] == pid
        assert {each["worker"] for each in found["evidence"]["blocked"]} == {os.getpid()}


def test_errors_in_another_process_name_the_watching_process_finding(
    table: Server, directory: Path, make_shop: Callable[..., Shop]
) -> None:
    watching, other = (make_shop(table.conninfo, directory) for _ in range(2))
    watching.processes.start()
    with session(table, "lock table stock") as pid:
        for _ in range(3):
            watching.call("select count(*) from stock")
        until(lambda: watching.pool.stats().waiting)
        found = watching.await_finding("DB04")
        assert str(pid) in found["text"]
        held = [other.pool.getconn() for _ in range(2)]
        other.monitor.tick()
        error = Task(other.pool.getconn, 0.05).error()
        assert re.search(f"; DB04: .*session {pid}", str(error))
        for conn in held:
            other.pool.putconn(conn)


def test_our_own_line_that_holds_a_lock_is_named(
    table: Server, make_shop: Callable[..., Shop]
) -> None:
    shop, holding, done = make_shop(table.conninfo), threading.Event(), threading.Event()

    def hold() -> None:
        holding.set()
        done.wait(30)

    try:
        shop.call("update stock set n = 1 where id = 1", before_return=hold)
        assert holding.wait(10)
        shop.call("update stock set n = 2 where id = 1")
        shop.call("select 1")
        found = shop.await_finding("DB04")
        (blocker,) = found["evidence"]["blockers"]
        assert blocker["pid"] in shop.pids
        assert blocker["worker"] == os.getpid()
        assert "test_monitor.py:" in blocker["where"]
        assert f"test_monitor.py:{blocker['where'].partition(':')[2]}" in found["text"]
    finally:
        done.set()


def test_a_migration_at_the_head_of_the_queue_is_named(
    table: Server, make_shop: Callable[..., Shop]
) -> None:
    shop = make_shop(table.conninfo)
    with (
        ThreadPoolExecutor(1) as other,
        session(table, "select * from stock", name="report") as root,
    ):

        def migrate() -> None:
            with (
                suppress(psycopg.Error),
                session(table, "alter table stock add x int", name="alembic"),
            ):
                pass

        other.submit(migrate)
        until(lambda: table.execute("select 1 from pg_locks where not granted"))
        for _ in range(3):
            shop.call("select count(*) from stock")
        found = shop.await_finding("DB04")
        assert found["evidence"]["blockers"][0]["pid"] == root
        assert found["evidence"]["schema_change"]["statement"] == "ALTER TABLE"
        assert "ALTER TABLE of alembic" in found["text"]
        assert "(report, 127.0.0.1)" in found["text"]


def test_a_prepared_transaction_that_holds_a_lock_is_named(
    make_server: Callable[..., Server], make_shop: Callable[..., Shop]
) -> None:
    server = make_server(max_prepared_transactions=5)
    server.execute("create table stock (id int primary key, n int)")
    with psycopg.connect(server.conninfo) as conn:
        conn.execute("lock table stock")
        conn.execute("prepare transaction 'order-7'")
    with psycopg.connect(server.conninfo) as conn:  # older, and not the blocker
        conn.execute("select 1")
    shop = make_shop(server.conninfo)
    for _ in range(3):
        shop.call("select count(*) from stock")
    found = shop.await_finding("DB04")
    assert found["evidence"]["blockers"][0]["gid"] == "order-7"
    assert "the prepared transaction 'order-7'" in found["text"]
    assert "ROLLBACK PREPARED" in found["do"]
    server.execute("rollback prepared 'order-7'")


def test_without_pg_read_all_stats_the_finding_names_the_pid_and_the_grant(
    table: Server, make_shop: Callable[..., Shop]
) -> None:
    table.execute("create role shop login password 'pw'")
    shop = make_shop(table.conninfo_for(user="shop", password="pw"))
    with session(table, "lock table stock") as pid:
        for _ in range(3):
            shop.call("select count(*) from stock")
        found = shop.await_finding("DB04")
    (blocker,) = found["evidence"]["blockers"]
    assert blocker["pid"] == pid
    assert (blocker["state"], blocker["seconds"]) == (None, None)
    assert found["evidence"]["limited"] is True
    assert "GRANT pg_read_all_stats" in found["do"]


def test_a_server_that_denies_pg_stat_activity_is_logged_once(
    table: Server,
    make_shop: Callable[..., Shop],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passed = [0.0]
    monkeypatch.setattr("dbpool.monitor._inspector.monotonic", lambda: monotonic() + passed[0])
    table.execute("create role shop login password 'pw'")
    table.execute("revoke all on pg_stat_activity from public")
    shop = make_shop(table.conninfo_for(user="shop", password="pw"))
    with session(table, "lock table stock"):
        for _ in range(3):
            shop.call("select count(*) from stock")

        def warnings() -> list[str]:
            shop.monitor.tick()
            texts = [record.getMessage() for record in caplog.records]
            return [text for text in texts if "who blocks whom" in text]

        until(warnings, 15.0, pause=0.1)
        for _ in range(5):  # it asks and is denied each time
            passed[0] += 2.5
            until(lambda: len(warnings()) == 1, pause=0.05)
            until(lambda: not any("monitor-default" in t.name for t in threading.enumerate()))
        assert len(warnings()) == 1
        assert "pg_stat_activity" in warnings()[0]


def test_an_idle_connection_of_the_pool_is_used_if_no_caller_waits(
    table: Server, make_shop: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dbpool.monitor._watching._SLOW_HOLD", 0.5)
    shop = make_shop(table.conninfo, max_size=4, min_size=3)
    shop.pool.open()
    shop.pool.wait()
    with session(table, "lock table stock") as pid:
        shop.call("select count(*) from stock")
        found = shop.await_finding("DB04")
        assert found["evidence"]["blockers"][0]["pid"] == pid
        assert table.backends(NAME) == []


@pytest.mark.slow
def test_a_query_that_hangs_is_given_up_and_does_no_harm(
    table: Server, make_shop: Callable[..., Shop]
) -> None:
    shop = make_shop(table.conninfo)
    with session(table, "lock table stock"):
        for _ in range(3):
            shop.call("select count(*) from stock")
        shop.await_finding("DB04")
        frozen = table.backends(NAME)
        table.freeze(frozen)
        began = monotonic()

        def has_another() -> bool:
            shop.monitor.tick()
            return bool(set(table.backends(NAME)) - set(frozen))

        until(has_another, 30.0, pause=0.1)
        assert monotonic() - began < 15.0
        table.thaw()
    shop.await_finding("DB00")


def test_the_server_is_asked_at_once_when_callers_begin_to_wait(
    table: Server, make_shop: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a long-running query, for which it asks less and less often."""
    shop, passed = make_shop(table.conninfo), [0.0]
    monkeypatch.setattr("dbpool.monitor._inspector.monotonic", lambda: monotonic() + passed[0])
    shop.call("select pg_sleep(60)")
    until(lambda: [each.status for each in shop.pool.holders()] == ["query"])
    until(lambda: shop.pool.holders()[0].seconds > 2.0)
    for _ in range(15):
        passed[0] += 11.0
        shop.monitor.tick()
    with session(table, "lock table stock") as pid:
        for _ in range(3):
            shop.call("select count(*) from stock")
        found = shop.await_finding("DB04", 7.0)  # the next query would be due after ten seconds
        assert found["evidence"]["blockers"][0]["pid"] == pid
        table.execute("select pg_cancel_backend(pid) from pg_stat_activity"
                      " where query = 'select pg_sleep(60)'")  # fmt: skip


def test_its_connection_is_closed_when_no_longer_needed(
    table: Server, make_shop: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch
) -> None:
    shop, passed = make_shop(table.conninfo), [0.0]
    now = lambda: monotonic() + passed[0]  # noqa: E731
    monkeypatch.setattr("dbpool.monitor._inspector.monotonic", now)
    with session(table, "lock table stock"):
        for _ in range(3):
            shop.call("select count(*) from stock")
        shop.await_finding("DB04")
    shop.await_finding("DB00")
    assert len(table.backends(NAME)) == 1
    passed[0] += 11.0

    def is_closed() -> bool:
        shop.monitor.tick()
        return not table.backends(NAME)

    until(is_closed, 20.0, pause=0.2)


def test_a_changed_role_and_a_stopped_replay_are_findings(
    own_server: Server, make_shop: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = [0.0]
    monkeypatch.setattr("dbpool.monitor._inspector.monotonic", lambda: monotonic() + passed[0])
    own_server.stop()
    own_server.demote()  # it follows no primary, and has replayed no commit since its start
    own_server.start()
    shop = make_shop(own_server.conninfo)
    shop.pool.fetch_value("select 1")

    def await_first(code: str) -> dict[str, Any]:
        def is_first() -> bool:
            passed[0] += 16.0
            shop.monitor.tick()
            return bool(shop.monitor.findings()[0]["code"] == code)

        until(is_first, 15.0, pause=0.1)
        return shop.monitor.findings()[0]

    found = await_first("DB13")
    assert found["evidence"]["streaming"] is False
    assert found["evidence"]["lag_seconds"] >= 60.0
    own_server.promote()
    until(lambda: "was a standby and is a primary now" in await_first("DB13")["text"], 15.0)


def test_the_limits_of_a_server_are_read_without_a_checkout(
    own_server: Server, make_shop: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch
) -> None:
    own_server.execute("create role shop login password 'a-good-password' connection limit 8")
    passed = [0.0]
    monkeypatch.setattr("dbpool.monitor._inspector.monotonic", lambda: monotonic() + passed[0])
    shop = make_shop(own_server.conninfo_for(user="shop", password="a-good-password"), max_size=9)
    shop.pool.fetch_value("select 1")
    shop.monitor.tick()
    passed[0] = 11.0
    found = shop.await_finding("DB11")
    assert found["evidence"]["role_limit"] == 8
    assert "may open 9 connections together, but the server allows 8" in found["text"]
    assert shop.pool.stats().counters.checkouts == 1

    def is_closed() -> bool:
        shop.monitor.tick()
        return not own_server.backends(NAME)

    until(is_closed, pause=0.1)


def test_nothing_is_asked_if_it_is_turned_off(
    table: Server, make_shop: Callable[..., Shop]
) -> None:
    shop = make_shop(table.conninfo)
    shop.monitor = Monitor(shop.databases, shop.processes, blockers=False)
    with session(table, "lock table stock"):
        for _ in range(3):
            shop.call("select count(*) from stock")
        until(lambda: shop.pool.stats().waiting)
        began = monotonic()

        def has_queried() -> bool:
            shop.monitor.tick()
            return bool(table.backends(NAME))

        until(lambda: has_queried() or monotonic() - began > 2.0, 10.0, pause=0.2)
        assert not has_queried()


def test_two_processes_that_share_a_directory_ask_over_one_connection(
    table: Server, make_shop: Callable[..., Shop], directory: Path
) -> None:
    first, second = (make_shop(table.conninfo, directory) for _ in range(2))
    with session(table, "lock table stock") as pid:
        for _ in range(4):
            first.call("select count(*) from stock")
            second.call("select count(*) from stock")
        first.monitor.tick()  # becomes the watching process

        def both_report() -> bool:
            second.processes.publish()
            second.monitor.tick()
            first.monitor.tick()
            found = [shop.monitor.findings()[0] for shop in (first, second)]
            assert len(table.backends(NAME)) <= 1
            return all(
                each["code"] == "DB04" and each["evidence"]["blockers"][0]["pid"] == pid
                for each in found
            )

        until(both_report, 15.0, pause=0.1)


# What processes share; without a server


def test_another_process_watches_after_five_silent_seconds_of_the_first(
    directory: Path,
) -> None:
    first, second = (SharedFiles(directory, "app", key) for key in ("1-a", "2-b"))
    assert first.lead(100.0)
    assert not second.lead(100.5)
    assert first.lead(101.0)
    assert not second.lead(105.9)
    assert second.lead(106.5)
    assert not first.lead(107.0), "the second process watches now"
    second.give_up()
    assert first.lead(107.5)


def test_another_process_watches_at_once_if_the_first_was_killed(directory: Path) -> None:
    first, second = (SharedFiles(directory, "app", key) for key in ("1-a", "2-b"))
    record = first.record(["default"])
    assert first.lead(100.0)
    assert not second.lead(100.5)
    record.abandon()  # as when the process is killed
    assert second.lead(100.6)


def test_deaths_written_during_a_takeover_are_not_lost(
    directory: Path, make_shop: Callable[..., Shop]
) -> None:
    killed = [SharedFiles(directory, "app", f"{n}-a").record(["default"]) for n in (1, 2, 3)]
    shop = make_shop("host=127.0.0.1 port=1", directory)
    shop.monitor.tick()
    deaths = {"app-8-a": time.time(), "app-9-a": time.time()}
    SharedFiles(directory, "app", "7-b").save("journal", {"journal": [], "deaths": deaths})
    killed[0].abandon()
    shop.monitor.tick()
    assert shop.monitor.findings()[0]["code"] == "DB16"


def test_the_line_that_forgot_a_connection_is_named(
    own_server: Server, make_shop: Callable[..., Shop], directory: Path
) -> None:
    shop = make_shop(own_server.conninfo, directory)
    shop.processes.publish()
    shop.monitor.tick()
    shop.pool.getconn()

    def is_named() -> bool:
        gc.collect()
        shop.processes.publish()
        shop.monitor.tick()
        return "test_monitor.py" in shop.monitor.findings()[0]["text"]

    until(is_named, 15.0, pause=0.1)
    (found, *_) = shop.monitor.findings()
    assert found["code"] == "DB06"
    assert "test_the_line_that_forgot" in found["evidence"]["endpoints"][0]["endpoint"]


def test_with_a_door_a_worker_pings_unused_pools(
    own_server: Server, make_shop: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = [0.0]
    monkeypatch.setattr("dbpool.monitor._monitor.monotonic", lambda: monotonic() + passed[0])
    shop = make_shop(own_server.conninfo, min_size=1)
    shop.pool.fetch_value("select 1")
    shop.monitor.tick()
    own_server.stop()
    passed[0] = 6.0
    shop.monitor.tick()
    assert shop.pool.state == "up"
    monkeypatch.setenv("DBPOOL_SERVE", "127.0.0.1:1")
    shop.monitor.tick()
    passed[0] = 12.0
    shop.monitor.tick()
    until(lambda: shop.pool.stats().breaker.last_error)
    assert shop.pool.stats().counters.checkouts == 1


def test_the_next_watching_process_knows_of_earlier_deaths(
    directory: Path, make_shop: Callable[..., Shop]
) -> None:
    killed = [SharedFiles(directory, "app", f"{n}-a").record(["default"]) for n in (1, 2, 3)]
    first, second = (make_shop("host=127.0.0.1 port=1", directory) for _ in range(2))
    first.monitor.tick()
    for record in killed[:2]:
        record.abandon()
        first.monitor.tick()
    killed[2].abandon()
    first.monitor.close()
    for path in directory.glob("*.steps"):
        if path.stem in ("app-1-a", "app-2-a"):
            path.unlink(missing_ok=True)  # old files are removed
    second.monitor.tick()
    assert second.monitor.findings()[0]["code"] == "DB16"


def test_a_process_that_was_stopped_reports_it_whichever_process_watched(
    directory: Path, make_shop: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = [0.0]
    monkeypatch.setattr("dbpool.monitor._monitor.monotonic", lambda: monotonic() + passed[0])
    first, second = (make_shop("host=127.0.0.1 port=1", directory) for _ in range(2))
    first.monitor.tick()
    second.monitor.tick()
    passed[0] += 15.0
    second.monitor.tick()
    found = second.monitor.findings()
    assert (found[0]["code"], found[0]["severity"]) == ("DB12", "notice")


def test_a_process_that_was_stopped_while_looking_reports_it(
    directory: Path, make_shop: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch
) -> None:
    passed, lead = [0.0], SharedFiles.lead

    def lead_then_pause(shared: SharedFiles, now: float, **kwargs: Any) -> bool:
        passed[0] += 15.0
        return lead(shared, now, **kwargs)

    monkeypatch.setattr("dbpool.monitor._monitor.monotonic", lambda: monotonic() + passed[0])
    shop = make_shop("host=127.0.0.1 port=1", directory)
    monkeypatch.setattr(SharedFiles, "lead", lead_then_pause)
    shop.monitor.tick()
    passed[0] = 0.0  # so that its findings are fresh
    found = shop.monitor.findings()
    assert (found[0]["code"], found[0]["severity"]) == ("DB12", "notice")


@pytest.mark.parametrize("step", [3600.0, -3600.0])
def test_a_changed_system_clock_causes_no_long_wait(
    dsn: str, make_shop: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch, step: float
) -> None:
    shop, set_by = make_shop(dsn), [0.0]
    now = time.time
    monkeypatch.setattr("dbpool.monitor._watching.time.time", lambda: now() + set_by[0])
    held = [shop.pool.getconn() for _ in range(2)]
    waiting = Task(shop.pool.getconn, 20.0)
    until(lambda: shop.pool.stats().waiting)
    for set_by[0] in (0.0, 0.0, step, step):
        shop.monitor.tick()
    assert shop.monitor.findings()[0]["code"] == "DB00"
    for conn in held:
        shop.pool.putconn(conn)
    shop.pool.putconn(waiting.result(20))


def test_a_lease_from_before_the_systems_start_is_ignored(directory: Path) -> None:
    SharedFiles(directory, "app", "1-a").lead(90_000.0)
    assert SharedFiles(directory, "app", "2-b").lead(10.0)


@pytest.mark.parametrize("content", [b"", b"{", b'{"key": 7, "at": "x"}', b"\xff" * 99, b"[1]"])
def test_damaged_shared_files_do_no_harm(directory: Path, content: bytes) -> None:
    for name in ("lease", "findings", "journal", "history"):
        (directory / f"app.{name}").write_bytes(content)
    for name in ("app-9-z.steps", "exits"):
        (directory / name).write_bytes(content)
    databases = Databases({"default": Settings(conninfo="host=127.0.0.1 port=1")})
    monitor = Monitor(databases, Processes(databases, directory))
    monitor.tick()
    report = monitor.extend(Report({}), ("history", "journal", "endpoints"))
    assert report["findings"][0]["code"] == "DB00"
    assert report["journal"] == []
    monitor.close()


def test_the_steps_of_all_processes_add_up_also_of_ended_ones(directory: Path) -> None:
    now = 1000 * STEP + 2.5
    shared = SharedFiles(directory, "app", "1-a")
    records = [
        SharedFiles(directory, "app", f"{n}-a").record(["default", "replica"]) for n in (1, 2, 3)
    ]
    for slot in (995, 998, 999):
        for record in records:
            record.write("default", slot, Step(checkouts=slot, in_use=0.5))
    records[1].close()
    shared.add_up(["default", "replica"], {}, now)
    found = shared.history(now)["default"]
    assert {slot: step.checkouts for slot, step in found.steps.items()} == {
        995: 3 * 995, 998: 3 * 998, 999: 3 * 999,
    }  # fmt: skip
    assert found.steps[999].in_use == 1.5
    assert shared.ended() == {"app-2-a": True}
    for later in range(1, 30):
        now += STEP
        records[0].write("default", 999 + later, Step(checkouts=1))
        shared.add_up(["default", "replica"], shared.history(now), now)
    assert shared.ended() == {}, "the added-up file was not removed"
    found = shared.history(now)["default"]
    assert found.steps[999].checkouts == 3 * 999, "the ended process' checkouts are missing"
    for record in (records[0], records[2]):
        record.close()
    sizes = [path.stat().st_size for path in directory.iterdir()]
    assert max(sizes) < 64 * 1024


def test_a_killed_process_differs_from_one_that_ended(directory: Path) -> None:
    orderly, killed = (SharedFiles(directory, "app", f"{n}-a").record(["default"]) for n in (1, 2))
    orderly.close()
    killed.abandon()  # as when the process is killed
    assert SharedFiles(directory, "app", "3-a").ended() == {"app-1-a": True, "app-2-a": False}


def test_the_history_of_this_process_is_in_its_report(
    dsn: str, make_shop: Callable[..., Shop], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = make_shop(dsn, directory)
    shop.monitor = Monitor(shop.databases, shop.processes, blockers=False)
    clock = [1000 * STEP]
    for module in ("_monitor", "_inspector"):
        monkeypatch.setattr(f"dbpool.monitor.{module}.monotonic", lambda: clock[0])
    for second in range(20):
        clock[0] = 1000 * STEP + second
        shop.pool.fetch_value("select 1")
        shop.monitor.tick()
    history = shop.monitor.extend(Report({}), ("history",))["history"]
    assert history["step"] == 5.0
    checkouts = history["pools"]["default"]["checkouts"]
    assert checkouts[-3:] == [5, 5, 5]
    assert len(checkouts) == 180
    assert checkouts[0] is None
    assert slot_of(clock[0]) == 1003


# The log


def finding(code: str = "DB01", severity: Severity = Severity.CRITICAL) -> Finding:
    return Finding(code, severity, "it is down for 3 s", "wait", 1.0, "default")


def test_a_finding_is_logged_as_it_begins_and_after_1_10_and_60_minutes() -> None:
    episodes = Episodes()
    logged = [second for second in range(4000) if episodes.due([finding()], 1000.0 + second)]
    assert logged == [0, 60, 600, 3600]


def test_a_finding_that_comes_back_within_a_minute_is_the_same_episode() -> None:
    episodes = Episodes()
    assert episodes.due([finding()], 1000.0)
    assert not episodes.due([], 1030.0)
    assert not episodes.due([finding()], 1050.0)
    assert not episodes.due([], 1100.0)
    assert episodes.due([finding()], 1120.0)


def test_a_finding_that_grows_worse_is_logged_again() -> None:
    episodes = Episodes()
    notice, critical = finding(severity=Severity.NOTICE), finding()
    assert episodes.due([notice], 1000.0)
    assert episodes.due([critical], 1004.0) == [(critical, 2)]
    assert not episodes.due([notice], 1005.0)
    assert not episodes.due([critical], 1006.0)


def test_ok_is_not_logged() -> None:
    assert not Episodes().due([finding("DB00", Severity.OK)], 1000.0)


def test_a_log_line_has_code_and_advice_and_no_changing_numbers(
    own_server: Server, make_shop: Callable[..., Shop], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dbpool")
    shop = make_shop(own_server.conninfo, outage_grace=0.1, timeout=0.3)
    own_server.stop()
    with suppress(PoolError):
        shop.pool.fetch_value("select 1")
    shop.await_finding("DB01")
    shop.monitor.tick()
    records = [r for r in caplog.records if getattr(r, "dbpool", {}).get("event") == "finding"]
    assert [record.getMessage().partition(". ")[0] for record in records] == [
        "pool 'default': DB01 the database is down"
    ]
    assert records[0].levelno == logging.ERROR
    assert vars(records[0])["dbpool"]["id"] == "DB01/default"
    journal = shop.monitor.extend(Report({}), ("journal",))["journal"]
    assert [line["event"] for line in journal] == ["down"]
    own_server.start()
    shop.await_finding("DB00")
    journal = shop.monitor.extend(Report({}), ("journal",))["journal"]
    assert [line["event"] for line in journal] == ["back", "down"]


def test_the_shared_files_are_small_and_seldom_written(
    dsn: str, make_shop: Callable[..., Shop], directory: Path
) -> None:
    shop = make_shop(dsn, directory)
    shop.processes.publish()
    written = 0
    before: dict[str, tuple[int, int]] = {}
    for _ in range(20):
        shop.monitor.tick()
        for path in directory.iterdir():
            found = path.stat()
            if before.get(path.name) != (found.st_mtime_ns, found.st_ino):
                written += found.st_size if path.suffix in (".findings", ".journal") else 200
            before[path.name] = (found.st_mtime_ns, found.st_ino)
    assert written < 20 * 4096
    total = sum(p.stat().st_size for p in directory.iterdir() if p.suffix != ".json")
    assert total < 64 * 1024
    assert json.loads((directory / "app.findings").read_bytes())["findings"]


def test_a_full_journal_is_written_less_often(directory: Path) -> None:
    databases = Databases({"default": Settings(conninfo="host=127.0.0.1 port=1")})
    monitor = Monitor(databases, Processes(databases, directory), blockers=False)
    lines = [
        {"time": 1e9 + n, "pool": "default", "event": "down", "text": os.urandom(55).hex()}
        for n in range(100)
    ]
    path = directory / "app.journal"
    path.write_text(json.dumps({"journal": lines}))
    monitor.tick()
    written = [path.stat().st_ino]
    size = path.stat().st_size
    assert size > 5000
    with pytest.MonkeyPatch.context() as patch:
        began = monotonic()
        for second in range(1, 121):
            patch.setattr("dbpool.monitor._monitor.monotonic", lambda s=second: began + s)
            monitor.tick()
            written += [path.stat().st_ino] if path.stat().st_ino != written[-1] else []
    assert (len(written) - 1) * size / 120 <= 600  # bytes a second
    monitor.close()


@pytest.mark.skipif(PROGRAM is None, reason="needs pgbouncer")
def test_behind_an_undeclared_pooler_no_holders_are_named(
    table: Server, make_shop: Callable[..., Shop], caplog: pytest.LogCaptureFixture
) -> None:
    table.execute("create role app login password 'right'")
    table.execute("grant pg_read_all_stats to app")
    bouncer = Bouncer(table, extra="ignore_startup_parameters = options", query_wait_timeout=30.0)
    bouncer.start()
    try:
        shop = make_shop(bouncer.conninfo_for(), statement_timeout="server", pooler="none")
        with session(table, "lock table stock"):
            for _ in range(3):
                shop.call("select count(*) from stock")

            def is_reported() -> bool:
                shop.monitor.tick()
                return "a pooler hides the server" in caplog.text

            until(is_reported, 20.0, pause=0.1)
            for found in shop.monitor.findings():
                assert found["code"] != "DB04"
                assert not found["evidence"].get("blockers")
            assert caplog.text.count("a pooler hides the server") == 1
        shop.databases.close()
    finally:
        bouncer.kill()


@pytest.mark.parametrize("ends", [Monitor.close, lambda monitor: None])
def test_its_thread_ends_when_it_is_closed_or_dropped(
    ends: Callable[[Monitor], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dbpool.monitor._monitor.INTERVAL", 3600.0)
    with Databases({"default": Settings(conninfo="host=127.0.0.1 port=1")}) as databases:
        before = set(threading.enumerate())
        monitor = Monitor(databases, Processes(databases, None))
        monitor.start()
        (thread,) = set(threading.enumerate()) - before
        ends(monitor)
        del monitor
        thread.join(5.0)
        assert not thread.is_alive()


def test_a_full_disk_is_logged_with_its_reason_and_watching_goes_on_after_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "stats").mkdir(0o700)
    script = f"""
import resource, signal
from pathlib import Path
from dbpool import Databases, Settings
from dbpool.monitor import Monitor
from dbpool.processes import Processes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, most))
directory = Path({str(tmp_path / "stats")!r})
pools = Databases({{"default": Settings(conninfo="host=127.0.0.1 port=1 user=u dbname=d")}})
monitor = Monitor(pools, Processes(pools, directory=directory))
for _ in range(3):
    monitor.try_tick()
assert not (directory / "app.findings").exists()
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
monitor.try_tick()
assert (directory / "app.findings").exists()
"""
    done = python("-c", script, check=True)
    assert done.stderr.splitlines() == ["diagnosis: watching failed: File too large"]
