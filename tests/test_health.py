"""Health: busy is not down, no answer hangs, and no user's check does harm."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic
from typing import Any

import psycopg
import pytest

from dbpool import ConfigError, Databases, Settings
from dbpool.health import TIMEOUT, Health, Readiness
from tests.clock import ShiftedClock
from tests.fake import FakeServer
from tests.postgres import copy
from tests.threads import Task, run_in_threads

from .postgres import Server, until

NOWHERE = "host=127.0.0.1 port=1 user=u dbname=d"


@pytest.fixture
def databases(fake: FakeServer) -> Iterator[Databases]:
    """A database on the fake server, for tests of what health does with answers."""
    settings = {"default": Settings(conninfo=fake.conninfo, max_size=1, timeout=1)}
    with Databases(settings, connection_class=fake.connection_class) as databases:
        yield databases


@pytest.fixture
def on_server(dsn: str) -> Iterator[Databases]:
    """A database on PostgreSQL, for tests of facts about the server."""
    with Databases({"default": Settings(conninfo=dsn, max_size=1, timeout=1)}) as databases:
        yield databases


def test_readiness_opens_an_unused_database(databases: Databases) -> None:
    ready = Health(databases).ready()
    assert (ready.status, ready.is_ready) == ("up", True)


def test_servers_are_described_with_the_fields_of_stats(on_server: Databases) -> None:
    assert on_server.default.fetch_value("select 1") == 1
    found = Health(on_server).servers()["default"]
    assert found["version"].partition(".")[0].isdecimal()
    assert (found["role"], found["lag"], found["tls"]) == ("primary", None, False)
    assert 0 < found["ours"] <= found["used"] <= found["max"]
    assert 0 < found["latency"] < 1
    assert abs(found["time"] - time.time()) < 5


def test_asking_the_servers_takes_no_connection_from_callers(databases: Databases) -> None:
    health, pool = Health(databases), databases.default
    with pool.connection():
        assert health.servers() == {}
    assert health.servers() == {}, "the fake server has no facts"
    assert pool.stats().counters.timeouts == 0


def test_busy_is_not_down(databases: Databases) -> None:
    health = Health(databases)
    pool = databases.default
    with pool.connection():
        assert health.ready().status == "up"
        waiter = Task(pool.fetch_value, "select 1")
        until(lambda: pool.stats().waiting == 1)
        ready = health.ready()
        assert (ready.status, ready.is_ready) == ("degraded", True)
        pool.breaker.last_alive_at -= 60.0  # no healthy return in the last minute
        assert health.ready().status == "degraded"
    assert waiter.result() == 1
    assert health.ready().status == "up"


def test_starting_is_not_ready_and_not_down() -> None:
    settings = {"default": Settings(conninfo=NOWHERE, outage_grace=30)}
    with Databases(settings) as databases:
        ready = Health(databases).ready()
    assert (ready.status, ready.is_ready) == ("starting", False)
    assert ready.retry_after is not None


def test_an_open_breaker_is_down_at_once() -> None:
    settings = {"default": Settings(conninfo=NOWHERE, outage_grace=0.05)}
    with Databases(settings) as databases:
        health = Health(databases)
        until(lambda: health.ready().status == "down")
        assert not health.ready().is_ready


def test_a_database_of_which_every_connection_fails_the_check_is_down(fake: FakeServer) -> None:
    fails = True

    def check(conn: Any) -> None:
        if fails:
            raise LookupError("the schema is not the one of this version")

    settings = {"default": Settings(conninfo=fake.conninfo)}
    options: dict[str, Any] = {"connection_class": fake.connection_class, "check": check}
    with Databases(settings, **options) as databases:
        health = Health(databases)
        until(lambda: health.ready().status == "down")
        assert databases.default.stats().counters.connects > 0
        fails = False
        until(lambda: health.ready().status == "up")


def test_retry_after_is_the_pools_next_attempt() -> None:
    with Databases({"default": Settings(conninfo=NOWHERE, outage_grace=0.05)}) as databases:
        health = Health(databases)
        until(lambda: health.ready().status == "down")
        databases.default.breaker.clock = ShiftedClock(-60.0)
        assert (health.ready().retry_after or 0.0) > 30.0


def test_a_closed_pool_is_down(databases: Databases) -> None:
    databases.default.close()
    assert Health(databases).ready().status == "down"


@contextmanager
def frozen(fake: FakeServer) -> Iterator[Databases]:
    """Three databases that served, on a server that has stopped answering."""
    settings = {
        name: Settings(name=name, conninfo=fake.conninfo, ping_timeout=5)
        for name in ("default", "one", "two")
    }
    with Databases(settings, connection_class=fake.connection_class) as databases:
        for pool in databases.values():
            pool.fetch_value("select 1")
            pool.breaker.last_alive_at -= 60.0  # no healthy return in the last minute
        fake.go_silent()
        try:
            yield databases
        finally:
            fake.accept()


def ping_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "dbpool-ask" in thread.name]


def test_hanging_databases_are_asked_in_parallel_within_one_timeout(fake: FakeServer) -> None:
    with frozen(fake) as databases:
        health = Health(databases)
        started = monotonic()
        ready = health.ready()
        assert monotonic() - started < 2 * TIMEOUT, "they were asked one after the other"
        assert dict(ready.databases) == dict.fromkeys(databases, "degraded")
        until(lambda: not ping_threads())
        assert all(pool.stats().active == 0 for pool in databases.values())


def test_the_details_of_hanging_databases_come_within_the_timeout(
    fake: FakeServer,
) -> None:
    with frozen(fake) as databases:
        health = Health(databases)
        started = monotonic()
        detail = health.detail()
        assert monotonic() - started < 2 * TIMEOUT
        assert detail["databases"]["one"] == {
            "status": "degraded", "breaker": "closed", "last_error": None, "facts_age": None
        }  # fmt: skip
        until(lambda: not ping_threads())


def test_concurrent_requests_share_one_answer(databases: Databases) -> None:
    health = Health(databases)
    callers: list[int] = []
    calls: list[int] = []
    answers: list[Readiness] = []

    def check() -> bool:
        calls.append(1)
        until(lambda: len(callers) == 8)
        return True

    def ask() -> None:
        callers.append(1)
        answers.append(health.ready())

    health.add("redis", check, required=True, timeout=10)
    run_in_threads(8, ask)
    assert [ready.status for ready in answers] == ["up"] * 8
    assert 1 <= len(calls) <= 8


def test_readiness_runs_no_query_after_a_recent_healthy_return(databases: Databases) -> None:
    databases.default.fetch_value("select 1")
    health = Health(databases)
    for _ in range(5):
        assert health.ready().status == "up"
    assert databases.default.stats().counters.checkouts == 1
    databases.default.breaker.last_alive_at -= 60.0
    assert health.ready().status == "up"
    assert databases.default.stats().counters.checkouts == 2


def test_readiness_asks_through_the_existing_pool(databases: Databases) -> None:
    databases.default.fetch_value("select 1")
    before = databases.default.stats().counters.connects
    databases.default.breaker.last_alive_at -= 60.0
    Health(databases).ready()
    assert databases.default.stats().counters.connects == before == 1


def test_required_databases_must_exist(databases: Databases) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        Health(databases, ["nowhere"])


@pytest.mark.parametrize(("required", "status"), [(True, "down"), (False, "degraded")])
def test_a_failing_check_is_down_if_required_else_degraded(
    databases: Databases, required: bool, status: str
) -> None:
    health = Health(databases)
    health.add("redis", lambda: False, required=required)
    ready = health.ready()
    assert (ready.status, dict(ready.checks)) == (status, {"redis": "down"})


@pytest.mark.parametrize("answer", [None, True])
def test_a_passing_check_is_up(databases: Databases, answer: bool | None) -> None:
    health = Health(databases)
    health.add("redis", lambda: answer)
    assert health.ready().to_json() == {
        "status": "up", "databases": {"default": "up"}, "checks": {"redis": "up"}
    }  # fmt: skip


def test_a_check_that_raises_or_returns_nonsense_is_down_and_logged_once(
    databases: Databases, caplog: pytest.LogCaptureFixture
) -> None:
    health = Health(databases)
    health.add("raises", lambda: 1 / 0)
    health.add("nonsense", lambda: "fine, thanks")
    for _ in range(3):
        ready = health.ready()
        assert dict(ready.checks) == {"raises": "down", "nonsense": "down"}
    assert "division" not in str(ready.to_json())
    assert len([r for r in caplog.records if "ZeroDivisionError" in r.message]) == 1


def test_a_check_that_hangs_times_out_and_is_not_started_twice(databases: Databases) -> None:
    health = Health(databases)
    release = threading.Event()
    calls: list[int] = []

    def hang() -> None:
        calls.append(1)
        release.wait(30)

    health.add("slow", hang, timeout=0.05)
    started = monotonic()
    for _ in range(3):
        assert dict(health.ready().checks) == {"slow": "down"}
    assert monotonic() - started < 5
    assert len(calls) == 1
    release.set()
    until(lambda: dict(health.ready().checks) == {"slow": "up"})


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_a_check_that_raises_system_exit_is_down(
    databases: Databases, error: BaseException
) -> None:
    health = Health(databases)

    def check() -> None:
        raise error

    health.add("rude", check)
    assert health.ready().to_json()["checks"] == {"rude": "down"}


def test_a_check_whose_error_has_no_text_is_down(databases: Databases) -> None:
    class StrRaises(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    def check() -> None:
        raise StrRaises

    health = Health(databases)
    health.add("odd", check)
    assert dict(health.ready().checks) == {"odd": "down"}


def test_a_checks_failure_is_logged_again_after_a_success(
    databases: Databases, caplog: pytest.LogCaptureFixture
) -> None:
    health = Health(databases)
    answers = iter([ValueError("one"), ValueError("two"), None, ValueError("three")])

    def check() -> None:
        if error := next(answers):
            raise error

    health.add("moody", check)
    for _ in range(4):
        health.ready()
    logged = [r.message.rpartition(": ")[2] for r in caplog.records if "moody" in r.message]
    assert logged == ["one", "three"]


def test_details_show_the_class_of_a_checks_error_and_not_its_text(
    databases: Databases,
) -> None:
    health = Health(databases)

    def check() -> None:
        raise ConnectionError("redis://:hunter2@cache")

    health.add("redis", check)
    health.add("disk", lambda: True)
    detail = health.detail()
    assert detail["status"] == "degraded"
    assert detail["checks"]["redis"]["error"] == "ConnectionError"
    assert detail["checks"]["disk"] | {"latency": 0} == {
        "status": "up", "latency": 0, "error": None
    }  # fmt: skip
    assert "hunter2" not in str(detail)


def test_names_of_checks_are_unique(databases: Databases) -> None:
    health = Health(databases)
    health.add("redis", lambda: True)
    for name in ("default", "redis"):
        with pytest.raises(ConfigError, match=name):
            health.add(name, lambda: True)


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan"), None, "soon", "0s"])
def test_a_check_needs_a_finite_timeout(databases: Databases, timeout: Any) -> None:
    with pytest.raises(ConfigError, match="timeout"):
        Health(databases).add("redis", lambda: True, timeout=timeout)


def test_a_check_must_be_callable(databases: Databases) -> None:
    check: Any = "redis"
    with pytest.raises(ConfigError, match="call"):
        Health(databases).add("redis", check)


def test_facts_of_a_primary(on_server: Databases, server: Server) -> None:
    on_server.default.fetch_value("select 1")
    facts = Health(on_server).detail()["databases"]["default"]
    assert (facts["role"], facts["replication_lag"], facts["tls"]) == ("primary", None, False)
    assert facts["server_version"].startswith(f"{server.version}.")
    assert 0.0 < facts["latency"] < TIMEOUT
    assert facts["connections"]["max"] == 100
    assert facts["connections"]["used"] >= 1
    assert facts["connections"]["ours"] == {"active": 1}


def test_facts_count_connections_that_are_hidden_from_the_role(server: Server, dsn: str) -> None:
    server.execute("create role lowly login password 'lowly'")
    conninfo = server.conninfo_for(user="lowly", password="lowly")
    try:
        with (
            psycopg.connect(dsn),
            psycopg.connect(dsn),
            Databases({"default": Settings(conninfo=conninfo)}) as databases,
        ):
            databases.default.fetch_value("select 1")
            connections = Health(databases).detail()["databases"]["default"]["connections"]
            assert connections["used"] >= 3
            assert connections["ours"] == {"active": 1}
    finally:
        server.execute("drop role lowly")


def test_unavailable_facts_are_missing_and_logged_once(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.execute("create role blind login password 'blind'")
    server.execute("create database dark")
    with psycopg.connect(server.conninfo_for(dbname="dark"), autocommit=True) as conn:
        conn.execute("revoke select on pg_stat_activity from public")
    conninfo = server.conninfo_for(user="blind", password="blind", dbname="dark")
    try:
        with Databases({"default": Settings(conninfo=conninfo)}) as databases:
            databases.default.fetch_value("select 1")
            health = Health(databases)
            for _ in range(3):
                detail = health.detail()
            assert detail["status"] == "up"
            assert detail["databases"]["default"]["facts_age"] is None
            assert databases.default.fetch_value("select 1") == 1
            assert databases.default.stats().counters.connects == 1
    finally:
        server.execute("drop database dark with (force)")
        server.execute("drop role blind")
    assert len([r for r in caplog.records if "server info 'default'" in r.message]) == 1


def test_facts_of_a_standby_include_its_lag(own_server: Server) -> None:
    with (own_server.data / "pg_hba.conf").open("a") as hba:
        hba.write("host replication postgres 127.0.0.1/32 trust\n")
    own_server.stop()
    standby = Server(copy(own_server.data))
    try:
        own_server.start()
        (standby.data / "standby.signal").touch()
        with (standby.data / "postgresql.auto.conf").open("a") as conf:
            conf.write(f"primary_conninfo = '{own_server.conninfo}'\n")
        standby.start()
        own_server.execute("create table t as select 1")
        until(lambda: standby.execute("select to_regclass('t')") != [(None,)])
        until(lambda: standby.execute(
            "select pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn()") == [(True,)]
        )  # fmt: skip
        with Databases({"default": Settings(conninfo=standby.conninfo)}) as databases:
            databases.default.fetch_value("select 1")
            facts = Health(databases).detail()["databases"]["default"]
            assert facts["role"] == "standby"
            assert facts["replication_lag"] == {"bytes": 0, "seconds": 0}

            standby.execute("select pg_wal_replay_pause()")
            own_server.execute("insert into t select generate_series(1, 1000)")
            until(lambda: standby.execute(
                "select pg_last_wal_receive_lsn() > pg_last_wal_replay_lsn()") == [(True,)]
            )  # fmt: skip
            facts = Health(databases).detail()["databases"]["default"]
            assert facts["replication_lag"]["bytes"] > 1000
            assert facts["replication_lag"]["seconds"] > 0
    finally:
        standby.close()


def test_liveness_asks_no_database(databases: Databases) -> None:
    assert Health(databases).live() == {"status": "up"}
    assert databases.default.closed


def test_readiness_in_a_forked_child_does_not_wait_for_the_parents_threads(
    databases: Databases,
) -> None:
    health = Health(databases)
    hanging = threading.Event()
    release = threading.Event()

    def check() -> None:
        hanging.set()
        release.wait(30)

    health.add("slow", check, timeout=0.01)
    assert dict(health.ready().checks) == {"slow": "down"}
    assert hanging.wait(10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the test forks a process with threads
        pid = os.fork()
    if pid == 0:
        release.set()  # the parent's waiting thread does not exist in the child
        health._checks["slow"] = replace(health._checks["slow"], timeout=10.0)
        try:
            is_expected = dict(health.ready().checks) == {"slow": "up"}
        finally:
            os._exit(0 if is_expected else 1)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        release.set()


def test_facts_are_kept_for_some_seconds(on_server: Databases) -> None:
    health = Health(on_server)
    health.ready()
    first = health.detail()["databases"]["default"]
    checkouts = on_server.default.stats().counters.checkouts
    second = health.detail()["databases"]["default"]
    assert first["server_version"] == second["server_version"]
    assert second["facts_age"] >= first["facts_age"]
    assert on_server.default.stats().counters.checkouts == checkouts
