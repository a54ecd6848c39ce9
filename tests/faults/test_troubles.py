"""Troubles under a real gunicorn: the first finding is the right one, soon after its threshold."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.gunicorn_site import Site, conf_of
from tests.postgres import Server, session
from tests.waiting import until

pytestmark = pytest.mark.slow

SOON = 3.0  # seconds after a code's threshold
PASSWORD = "a-good-password"
SLACK = 2.0  # a busy machine's

APP = """
@app.get("/update")
def update():
    return str(db.pool.execute("update stock set n = n + 1 where id = 1"))

@app.get("/read")
def read():
    return str(db.pool.fetch_value("select count(*) from stock"))

@app.get("/hold/<float:seconds>")
def hold(seconds):
    with db.pool.connection() as conn:
        conn.execute("update stock set n = n + 1 where id = 1")
        time.sleep(seconds)
    return "held"

@app.get("/idle/<float:seconds>")
def idle(seconds):
    with db.pool.connection() as conn:
        conn.execute("select 1")
        time.sleep(seconds)
    return "held"

@app.get("/slow/<float:seconds>")
def slow(seconds):
    return str(db.pool.fetch_value("select pg_sleep(%s)", [seconds]))

@app.get("/nest")
def nest():
    with db.pool.connection() as conn:
        conn.execute("select 1")
        time.sleep(0.5)
        return str(db.pool.fetch_value("select 1"))

@app.get("/forget")
def forget():
    db.pool.getconn()
    return "forgotten"
"""


class Shop:
    """Three workers of four threads, with two connections each."""

    def __init__(self, directory: Path, server: Server, **environ: str) -> None:
        self.server = server
        role = server.conninfo_for(user="shop", password=PASSWORD)
        more = f"loglevel = 'warning'\n{conf_of('gthread', workers=3)}"
        chosen: Any = {
            "DBPOOL_MAX_SIZE": "2",
            "DBPOOL_TIMEOUT": "4s",
            "DBPOOL_DOTENV": "off",
        } | environ
        self.site = Site(directory, role, more=more, app=APP, **chosen)
        self.stop = threading.Event()
        self._clients: list[threading.Thread] = []
        self.get("/read")
        self.await_first("DB00", 30)

    def get(self, path: str) -> None:
        with suppress(OSError):
            self.site.get(path)

    def load(self, path: str, clients: int, pause: float = 0.0) -> None:
        """Have clients ask for a path again and again."""

        def ask() -> None:
            while not self.stop.wait(pause):
                self.get(path)

        for _ in range(clients):
            self._clients.append(threading.Thread(target=ask))
            self._clients[-1].start()

    def calm(self) -> None:
        self.stop.set()
        for client in self._clients:
            client.join(30)

    def findings(self) -> list[dict[str, Any]]:
        """Return what the workers' monitor left for all to see."""
        with suppress(OSError, ValueError):
            (directory,) = self.site.directories()
            return list(json.loads((directory / "counted.findings").read_bytes())["findings"])
        return []

    def await_first(self, code: str, seconds: float) -> dict[str, Any]:
        """Wait until that is the first finding; return it, with how many seconds that took."""
        began, seen = time.monotonic(), set()
        while time.monotonic() - began < seconds:
            found = self.findings()
            if found and found[0]["code"] == code:
                return found[0] | {"after": time.monotonic() - began}
            seen |= {each["code"] for each in found[:1]}
            time.sleep(0.05)
        pytest.fail(f"not {code} first but {seen}: {self.findings()}")

    def worst(self, seconds: float) -> set[str]:
        """Return the severities that are seen for so long."""
        until_then, seen = time.monotonic() + seconds, set()
        while time.monotonic() < until_then:
            seen |= {f"{each['severity']} {each['code']}" for each in self.findings()}
            time.sleep(0.1)
        return {each for each in seen if not each.startswith(("ok", "notice"))}


@pytest.fixture
def make_shop(tmp_path: Path, make_server: Callable[..., Server]) -> Iterator[Callable[..., Shop]]:
    with ExitStack() as stack:

        def make(options: dict[str, object] | None = None, **environ: str) -> Shop:
            server = make_server(**(options or {}))
            server.execute("create table stock (id int primary key, n int)")
            server.execute("insert into stock select n, 0 from generate_series(1, 10) n")
            server.execute("create role shop login password 'a-good-password'")
            server.execute("grant all on stock to shop")
            shop = Shop(tmp_path, server, **environ)
            stack.callback(shop.site.kill)
            stack.callback(shop.calm)
            return shop

        yield make


@pytest.mark.parametrize("may_see", [True, False], ids=["pg_read_all_stats", "ordinary role"])
def test_a_table_that_a_foreign_session_locked(
    make_shop: Callable[..., Shop], may_see: bool
) -> None:
    shop = make_shop()
    if may_see:
        shop.server.execute("grant pg_read_all_stats to shop")
    with session(shop.server, "lock table stock") as pid:
        shop.load("/read", 20)
        found = shop.await_first("DB04", 1 + SOON + SLACK)
        assert found["evidence"]["blockers"][0]["pid"] == pid
        assert found["evidence"]["limited"] is not may_see
        assert len(shop.server.backends("dbpool:monitor")) <= 1
        shop.stop.set()
    shop.await_first("DB00", 20)


def test_a_row_that_our_own_code_locked_in_another_worker(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop()
    shop.load("/hold/30.0", 1)
    time.sleep(1.0)
    shop.load("/update", 12)
    found = shop.await_first("DB04", 1 + SOON + SLACK)
    (blocker,) = found["evidence"]["blockers"]
    assert blocker["endpoint"] == "hold"
    assert "counted.py" in blocker["where"]
    assert (
        blocker["worker"] in {p["pid"] for p in shop.site.stats()["processes"]} or blocker["worker"]
    )


def test_a_migration_that_waits_for_a_report(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop()
    shop.server.execute("grant pg_read_all_stats to shop")

    def migrate() -> None:
        with suppress(psycopg.Error):
            with session(shop.server, "alter table stock add x int", name="alembic"):
                pass

    migration = threading.Thread(target=migrate)
    with ExitStack() as stack:
        stack.callback(migration.join, 30)
        root = stack.enter_context(session(shop.server, "select * from stock", name="report"))
        migration.start()
        until(lambda: shop.server.execute("select 1 from pg_locks where not granted"))
        shop.load("/read", 20)
        found = shop.await_first("DB04", 1 + SOON + SLACK)
        assert found["evidence"]["blockers"][0]["pid"] == root
        assert "ALTER TABLE of alembic" in found["text"]


def test_a_transaction_that_is_left_open(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop()
    shop.load("/idle/60.0", 8)
    shop.load("/read", 4)
    found = shop.await_first("DB05", 5 + SOON + SLACK)
    assert found["evidence"]["holders"][0]["endpoint"] == "idle"
    assert found["severity"] == "critical"


def test_slow_statements(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop()
    shop.load("/slow/20.0", 14)
    found = shop.await_first("DB07", 5 + SOON + SLACK)
    assert found["evidence"]["holders"][0]["endpoint"] == "slow"


def test_nested_checkouts(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop()
    shop.load("/nest", 20)
    found = shop.await_first("DB09", SOON + SLACK)
    assert found["evidence"]["holders"][0]["endpoint"] == "nest"


def test_forgotten_connections(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop()
    shop.load("/forget", 2, pause=0.2)
    shop.await_first("DB06", SOON + SLACK)


def test_code_that_holds_connections_without_using_them(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop()
    shop.load("/idle/1.5", 20)
    found = shop.await_first("DB15", 10 + SOON + SLACK)
    assert found["evidence"]["holders"][0]["endpoint"] == "idle"


def test_a_pool_that_is_too_small(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop()
    shop.load("/slow/0.3", 20)
    shop.await_first("DB08", 30 + SOON + 2 * SLACK)


def test_a_server_that_stopped(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop()
    shop.server.stop()
    shop.load("/read", 6, pause=0.1)
    shop.await_first("DB01", 1 + 2 + SOON + SLACK)  # two seconds are the outage's grace
    shop.server.start()
    shop.await_first("DB00", 20)


def test_a_password_that_changed(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop()
    shop.server.execute("alter role shop password 'other'")
    for pid in shop.server.backends("dbpool:default"):
        shop.server.execute("select pg_terminate_backend(%s)", pid)
    shop.load("/read", 6, pause=0.1)
    shop.await_first("DB02", 1 + SOON + SLACK)


def test_a_server_without_a_free_slot(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop({"max_connections": 12})
    with ExitStack() as stack:
        for _ in range(12):
            with suppress(psycopg.OperationalError):
                stack.enter_context(
                    psycopg.connect(shop.server.conninfo_for(user="shop", password=PASSWORD))
                )
        shop.load("/slow/0.5", 20)
        shop.await_first("DB03", 1 + SOON + SLACK)


def test_a_role_that_may_not_have_more_connections(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop()
    shop.server.execute("alter role shop connection limit 1")
    shop.load("/slow/0.5", 20)
    shop.await_first("DB17", 1 + SOON + SLACK)


def workers(shop: Shop) -> list[int]:
    return [process["pid"] for process in shop.site.stats()["processes"]]


def test_a_worker_that_is_frozen(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop()
    until(lambda: len(workers(shop)) == 3)
    frozen = workers(shop)[0]
    os.kill(frozen, signal.SIGSTOP)
    try:
        found = shop.await_first(
            "DB12", 10 + 5 + SOON + SLACK
        )  # five if it was the one that watched
        assert found["evidence"]["workers"] == [frozen]
    finally:
        os.kill(frozen, signal.SIGCONT)


def test_workers_that_are_killed(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop()
    for _ in range(3):
        until(lambda: len(workers(shop)) == 3, 20)
        os.kill(workers(shop)[0], signal.SIGKILL)
        time.sleep(1.5)
    shop.await_first("DB16", 5 + SOON + SLACK)


# What is quiet, or merely busy


def test_rolling_reloads_and_recycled_workers(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop()
    shop.load("/read", 4, pause=0.02)
    for _ in range(3):
        os.kill(shop.site.process.pid, signal.SIGHUP)
        assert shop.worst(5.0) == set()


def test_a_nightly_report_beside_the_usual_load(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop()
    shop.load("/slow/30.0", 1)
    shop.load("/read", 3, pause=0.05)
    assert shop.worst(20.0) == set()


def test_a_restart_within_the_grace(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop(DBPOOL_OUTAGE_GRACE="10s")
    shop.load("/read", 4, pause=0.05)
    shop.server.stop()
    assert shop.worst(2.0) == set()
    shop.server.start()
    assert shop.worst(10.0) == set()


def test_a_busy_pool_that_keeps_up(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop(DBPOOL_MAX_SIZE="5")
    shop.load("/slow/0.05", 9)
    assert shop.worst(25.0) == set()


def test_a_host_that_was_suspended(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop()
    pids = workers(shop)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(13)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    assert shop.worst(8.0) == set()
