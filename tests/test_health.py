"""Health: down is told from busy, nothing hangs, and nobody's check can do harm."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from time import monotonic

import pytest

from dbpool import ConfigError, Databases, Settings
from dbpool.health import Health

from .postgres import Server, until

NOWHERE = "host=127.0.0.1 port=1 user=u dbname=d"


@pytest.fixture
def databases(dsn: str) -> Iterator[Databases]:
    settings = {"default": Settings(conninfo=dsn, max_size=1, timeout=1)}
    with Databases(settings) as databases:
        yield databases


def test_a_database_nobody_asked_yet_is_opened_and_up(databases: Databases) -> None:
    ready = Health(databases).ready()
    assert (ready.status, ready.is_ready) == ("up", True)


def test_busy_is_not_down(databases: Databases) -> None:
    health = Health(databases)
    pool = databases.default
    with pool.connection():
        assert health.ready().status == "up"
        thread = threading.Thread(target=lambda: pool.fetch_value("select 1"))
        thread.start()
        until(lambda: pool.stats().waiting == 1)
        ready = health.ready()
        assert (ready.status, ready.is_ready) == ("degraded", True)
    thread.join(10)
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


def test_a_closed_pool_is_down(databases: Databases) -> None:
    databases.default.close()
    assert Health(databases).ready().status == "down"


def test_a_frozen_database_does_not_hang_readiness(own_server: Server) -> None:
    settings = {
        name: Settings(name=name, conninfo=own_server.conninfo, ping_timeout=5)
        for name in ("default", "one", "two")
    }
    with Databases(settings) as databases:
        health = Health(databases)
        for pool in databases.values():
            pool.fetch_value("select 1")
            pool._last_seen -= 60.0  # no healthy return in the last minute
        own_server.freeze([own_server.postmaster_pid, *own_server_backends(databases)])
        started = monotonic()
        ready = health.ready()
        assert monotonic() - started < 1.5, "three databases are asked within one bound"
        assert ready.status == "degraded"
        own_server.thaw()


def own_server_backends(databases: Databases) -> list[int]:
    return [conn.info.backend_pid for pool in databases.values() for conn in list(pool._pool)]


def test_required_must_exist(databases: Databases) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        Health(databases, ["nowhere"])


@pytest.mark.parametrize(("required", "status"), [(True, "down"), (False, "degraded")])
def test_a_failing_check_counts_by_its_weight(
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


def test_a_check_that_raises_or_talks_nonsense_is_contained_and_logged_once(
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


def test_a_check_that_hangs_is_given_up_and_not_started_twice(databases: Databases) -> None:
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


def test_names_are_unique(databases: Databases) -> None:
    health = Health(databases)
    with pytest.raises(ConfigError, match="default"):
        health.add("default", lambda: True)


def test_facts_are_kept_for_some_seconds(databases: Databases) -> None:
    health = Health(databases)
    health.ready()
    first = health.detail()["databases"]["default"]
    checkouts = databases.default.stats().counters.checkouts
    second = health.detail()["databases"]["default"]
    assert first["server_version"] == second["server_version"]
    assert second["facts_age"] >= first["facts_age"]
    assert databases.default.stats().counters.checkouts == checkouts
