"""Quiet or merely busy situations under a real gunicorn: no finding above notice."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from dbpool import Pool
from tests.measured import record
from tests.postgres import Server, binaries, session
from tests.shop import PASSWORD, Shop, open_both

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Row:
    """One situation: *scenario* brings it about; the door is watched meanwhile and for a while after."""

    name: str
    seconds: float  # to watch after that
    scenario: Callable[[Shop], None]
    server: dict[str, object] = field(default_factory=dict)
    shop: dict[str, Any] = field(default_factory=dict)


ROWS: list[Row] = []


def quiet(name: str, seconds: float, **more: Any) -> Callable[..., Any]:
    def add(scenario: Callable[[Shop], None]) -> Callable[[Shop], None]:
        ROWS.append(Row(name, seconds, scenario, **more))
        return scenario

    return add


DEFAULT_POOL_SIZE = {"DBPOOL_MAX_SIZE": ""}  # one more than a worker's threads


@quiet("idle night", 15)
def _(shop: Shop) -> None:
    pass


@quiet("nightly report beside the usual load", 20)
def _(shop: Shop) -> None:
    shop.load("/slow/30.0", 1)
    shop.load("/read", 3, pause=0.05)


@quiet("COPY for long", 15)
def _(shop: Shop) -> None:
    shop.load("/copy/400000", 1)
    shop.load("/read", 3, pause=0.05)


@quiet("export row by row", 15)
def _(shop: Shop) -> None:
    shop.load("/export/20.0", 1)
    shop.load("/read", 3, pause=0.05)


@quiet("rolling HUP", 12)
def _(shop: Shop) -> None:
    shop.load("/read", 4, pause=0.02)
    for _ in range(3):
        shop.site.process.send_signal(signal.SIGHUP)
        time.sleep(4)


@quiet("deploy with more workers, then fewer", 8)
def _(shop: Shop) -> None:
    shop.load("/read", 4, pause=0.02)
    for number in (signal.SIGTTIN, signal.SIGTTIN, signal.SIGHUP, signal.SIGTTOU, signal.SIGTTOU):
        shop.site.process.send_signal(number)
        time.sleep(2)


@quiet("max_requests", 20, shop={"max_requests": 60})
def _(shop: Shop) -> None:
    shop.load("/read", 4, pause=0.02)


@quiet("restart of two seconds", 15)
def _(shop: Shop) -> None:
    shop.load("/read", 6, pause=0.02)
    time.sleep(2)
    shop.server.stop()
    time.sleep(2)
    shop.server.start()


@quiet("restart of two seconds, no load", 15)
def _(shop: Shop) -> None:
    shop.server.stop()
    time.sleep(2)
    shop.server.start()


@quiet("crash and recovery of the server", 15)
def _(shop: Shop) -> None:
    shop.load("/read", 6, pause=0.02)
    time.sleep(1)
    os.kill(shop.server.backends()[0], signal.SIGKILL)


@quiet("everything suspended", 15)
def _(shop: Shop) -> None:
    shop.load("/read", 4, pause=0.05)
    time.sleep(2)
    suspend([*shop.processes(), *of_server(shop)], 15)


@quiet("workers suspended under load", 15)
def _(shop: Shop) -> None:
    shop.load("/slow/0.1", 6)
    time.sleep(2)
    suspend(shop.processes(), 15)


def suspend(processes: list[psutil.Process], seconds: float) -> None:
    for process in processes:
        process.suspend()
    time.sleep(seconds)
    for process in processes:
        process.resume()


def of_server(shop: Shop) -> list[psutil.Process]:
    postmaster = psutil.Process(shop.server.postmaster_pid)
    return [postmaster, *postmaster.children(recursive=True)]


@quiet("80 % load", 40)
def _(shop: Shop) -> None:
    shop.load("/slow/0.05", 5)


@quiet("80 % load, transactions with code between", 30)
def _(shop: Shop) -> None:
    shop.load("/idle/0.05", 5)


@quiet("80 % load, room for all", 20, shop=DEFAULT_POOL_SIZE)
def _(shop: Shop) -> None:
    shop.load("/slow/0.05", 10)


@quiet("bursts of two seconds", 15)
def _(shop: Shop) -> None:
    shop.load("/read", 2, pause=0.1)
    for _ in range(2):
        end = shop.load("/slow/0.2", 12)
        time.sleep(2)
        end()
        time.sleep(5)


@quiet(
    "autovacuum and VACUUM",
    10,
    server={"autovacuum_naptime": "1s", "autovacuum_vacuum_cost_delay": "20ms"},
)
def _(shop: Shop) -> None:
    shop.load("/update", 4, pause=0.01)
    with psycopg.connect(shop.server.conninfo, autocommit=True) as conn:
        for _ in range(10):
            conn.execute("vacuum analyze stock")
            time.sleep(0.5)


@quiet("pg_dump", 5)
def _(shop: Shop) -> None:
    shop.server.execute(
        "create table big as select n, repeat('x', 200) t from generate_series(1, 200000) n"
    )
    shop.load("/update", 4, pause=0.02)
    for _ in range(3):
        subprocess.run(
            [binaries() / "pg_dump", "-f", "/dev/null", shop.server.conninfo],
            check=True,
            timeout=60,
        )


@quiet("long transaction of a script", 5)
def _(shop: Shop) -> None:
    shop.load("/read", 4, pause=0.05)
    with session(shop.server, "update stock set n = 1 where id = 9", name="script"):
        time.sleep(15)


@quiet("statement timeouts", 10)
def _(shop: Shop) -> None:
    shop.load("/limited", 4, pause=0.1)
    shop.load("/read", 2, pause=0.05)


@quiet("clients that hang up", 10)
def _(shop: Shop) -> None:
    import socket

    shop.load("/read", 2, pause=0.05)
    for _ in range(40):
        with socket.create_connection(("127.0.0.1", shop.site.port)) as client:
            client.sendall(b"GET /slow/0.3 HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.2)


@quiet("cancelled statements", 8)
def _(shop: Shop) -> None:
    shop.load("/slow/0.5", 4)
    for _ in range(20):
        shop.server.execute(
            "select pg_cancel_backend(pid) from pg_stat_activity where usename = 'shop' and state = 'active'"
        )
        time.sleep(0.4)


@quiet("a new worker after a crash", 12)
def _(shop: Shop) -> None:
    shop.load("/read", 4, pause=0.05)
    os.kill(shop.workers()[0], signal.SIGKILL)


@quiet("two workers crash", 12)
def _(shop: Shop) -> None:
    shop.load("/read", 4, pause=0.05)
    for pid in shop.workers()[:2]:
        os.kill(pid, signal.SIGKILL)


@quiet("quick migration", 6)
def _(shop: Shop) -> None:
    shop.load("/update", 6, pause=0.02)
    for n in range(5):
        with session(shop.server, f"alter table stock add x{n} int"):
            time.sleep(0.4)
        time.sleep(1)
    with psycopg.connect(shop.server.conninfo, autocommit=True) as conn:
        conn.execute("create index concurrently on stock (n)")


@quiet("many short waits for one row", 15, shop=DEFAULT_POOL_SIZE)
def _(shop: Shop) -> None:
    shop.load("/hold/0.05", 8)


@quiet("slow views outside the database", 15)
def _(shop: Shop) -> None:
    shop.load("/elsewhere/3.0", 10)
    shop.load("/read", 2, pause=0.05)


@quiet("short lifetimes", 20, shop={"DBPOOL_MAX_LIFETIME": "2s", "DBPOOL_MAX_IDLE": "1s"})
def _(shop: Shop) -> None:
    shop.load("/read", 4, pause=0.02)


@quiet("a few conflicts", 20, shop=DEFAULT_POOL_SIZE)
def _(shop: Shop) -> None:
    shop.load("/conflict", 2, pause=0.3)
    shop.load("/read", 4, pause=0.02)


@quiet("connections ended by an administrator", 10)
def _(shop: Shop) -> None:
    shop.load("/read", 4, pause=0.05)
    for _ in range(5):
        shop.server.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'shop'"
        )
        time.sleep(1)


@quiet("server reloads and checkpoints", 5)
def _(shop: Shop) -> None:
    shop.load("/update", 4, pause=0.02)
    for _ in range(4):
        shop.server.reload()
        shop.server.execute("checkpoint")
        time.sleep(1)


@quiet("script with slow statements in all its connections", 2)
def _(shop: Shop) -> None:
    with Pool(shop.server.conninfo_for(user="shop", password=PASSWORD), max_size=4) as pool:
        threads = [
            threading.Thread(target=pool.fetch_value, args=("select pg_sleep(12)",))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


@quiet("a new master takes over", 10)
def _(shop: Shop) -> None:
    shop.load("/read", 4, pause=0.05)
    shop.site.process.send_signal(signal.SIGUSR2)
    time.sleep(5)
    shop.site.process.send_signal(signal.SIGTERM)


@quiet(
    "deploy that doubles the connections", 10,
    server={"max_connections": 45}, shop={"DBPOOL_MAX_SIZE": "10"},
)  # fmt: skip
def _(shop: Shop) -> None:
    shop.load("/read", 4, pause=0.05)
    shop.load("/elsewhere/3.0", 6)
    for _ in range(2):
        time.sleep(5)
        shop.site.process.send_signal(signal.SIGHUP)


@quiet("thread that listens for notifications", 20, shop=DEFAULT_POOL_SIZE)
def _(shop: Shop) -> None:
    for _ in range(3):
        shop.get("/listen")
    shop.load("/read", 4, pause=0.02)
    shop.load("/slow/0.1", 4)


@quiet("VACUUM FULL, REINDEX and TRUNCATE of a small table", 5)
def _(shop: Shop) -> None:
    shop.load("/update", 4, pause=0.02)
    shop.server.execute("create table small as select n from generate_series(1, 1000) n")
    for _ in range(5):
        for statement in (
            "vacuum full stock",
            "reindex table concurrently stock",
            "truncate small",
        ):
            shop.server.execute(statement)
        time.sleep(1)


@quiet("server frozen for two seconds", 12)
def _(shop: Shop) -> None:
    shop.load("/read", 6, pause=0.02)
    time.sleep(2)
    suspend(of_server(shop), 2)


@quiet("batches of a thousand short checkouts", 15)
def _(shop: Shop) -> None:
    shop.load("/batch", 3)


@quiet("requests that fail", 10)
def _(shop: Shop) -> None:
    shop.load("/fail/0.0", 4, pause=0.02)
    shop.load("/no-such-page", 2, pause=0.05)


@dataclass
class Measured:
    """What one shop's door reported meanwhile: severities and codes."""

    seen: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # above a notice


def watch(row: Row, shop: Shop) -> Measured:
    """Bring the situation about, and watch the door meanwhile and for some time after."""
    measured, done = Measured(), threading.Event()

    def poll() -> None:
        while not done.wait(0.1):
            for found in shop.findings():
                mark = f"{found['severity']} {found['code']}"
                if mark in measured.seen:
                    continue
                measured.seen.append(mark)
                if found["severity"] in ("warning", "critical"):
                    measured.wrong.append(f"{mark}: {found['text']}")

    poller = threading.Thread(target=poll)
    poller.start()
    try:
        row.scenario(shop)
        time.sleep(row.seconds)
    finally:
        done.set()
        poller.join()
    return measured


@pytest.fixture
def shops(
    make_server: Callable[..., Server], tmp_path: Path
) -> Iterator[Callable[[Row, str], list[Shop]]]:
    """Make the two shops of a row."""
    made: list[Shop] = []

    def make(row: Row, name: str) -> list[Shop]:
        made.extend(both := open_both(make_server, tmp_path / name, row.server, row.shop))
        return both

    yield make
    with ThreadPoolExecutor(6) as workers:
        list(workers.map(Shop.close, made))


def id_of(rows: tuple[Row, ...]) -> str:
    return " + ".join(row.name for row in rows)


# Three at a time: most of it is waiting.
GROUPS = [tuple(ROWS[n : n + 3]) for n in range(0, len(ROWS), 3)]


@pytest.mark.parametrize("rows", GROUPS, ids=id_of)
def test_nothing_above_a_notice_is_found(
    rows: tuple[Row, ...], shops: Callable[[Row, str], list[Shop]]
) -> None:
    opened = [(row, shop) for n, row in enumerate(rows) for shop in shops(row, str(n))]
    with ThreadPoolExecutor(len(opened)) as watchers:
        measured = list(watchers.map(lambda each: watch(*each), opened))
    for (row, shop), each in zip(opened, measured, strict=True):
        record(row.name, shop.privilege, fixed={"code": None}, measured=vars(each))
    assert [each.wrong for each in measured] == [[]] * len(measured)
