"""Troubles under a real gunicorn: the first finding is the right one, soon after its threshold.

Each row is tried twice at once: by a role with pg_read_all_stats, and by one without. What was
measured is written to `bench/results/troubles.json`.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.faults.test_pgbouncer import PROGRAM, Bouncer
from tests.measured import record
from tests.postgres import Server, session, until
from tests.proxy import Mode, Proxy
from tests.replication import make_standby
from tests.shop import PASSWORD, Shop, line_of, open_both

pytestmark = pytest.mark.slow

DETECTION_SECONDS = 3.0  # seconds after a code's threshold
STABLE_SECONDS = 2.0  # seconds that the right finding has to stay the first

Known = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One trouble: *begin* brings it about, and returns what is known of its culprit."""

    name: str
    code: str
    due: float  # seconds: its code's threshold
    begin: Callable[[Shop], Known]
    server: dict[str, object] = field(default_factory=dict)
    shop: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Server], dict[str, Any]] | None = None  # before the shop opens
    before: str = ""  # the code of a trouble that may come first until this one is found


ROWS: list[Row] = []
DEFAULT_POOL_SIZE = {"DBPOOL_MAX_SIZE": ""}  # one more than a worker's threads


def trouble(name: str, code: str, due: float, **more: Any) -> Callable[..., Any]:
    def add(begin: Callable[[Shop], Known]) -> Callable[[Shop], Known]:
        ROWS.append(Row(name, code, due, begin, **more))
        return begin

    return add


def through_proxy(server: Server) -> dict[str, Any]:
    proxy = Proxy(server.port)
    return {"conninfo": proxy.conninfo_for(user="shop", password=PASSWORD), "extra": proxy}


def few_connections(server: Server) -> dict[str, Any]:
    server.execute("alter role shop connection limit 4")
    return {}


def standby_of(server: Server) -> dict[str, Any]:
    standby = make_standby(server)
    return {"conninfo": standby.conninfo_for(user="shop", password=PASSWORD), "extra": standby}


def second_database(server: Server) -> dict[str, Any]:
    server.execute("create database reports")
    with psycopg.connect(server.conninfo_for(dbname="reports"), autocommit=True) as conn:
        conn.execute("create table stock (id int)")
        conn.execute("grant all on stock to shop")
    url = server.conninfo_for(user="shop", password=PASSWORD, dbname="reports")
    return {"DBPOOL_DATABASES": "reports", "DBPOOL_REPORTS_URL": url}


def own_database(server: Server) -> dict[str, Any]:
    server.execute("create database shop")
    with psycopg.connect(server.conninfo_for(dbname="shop"), autocommit=True) as conn:
        conn.execute("create table stock (id int)")
        conn.execute("grant all on stock to shop")
    return {"conninfo": server.conninfo_for(user="shop", password=PASSWORD, dbname="shop")}


def two_pools(server: Server) -> dict[str, Any]:
    url = server.conninfo_for(user="shop", password=PASSWORD)
    return {"DBPOOL_DATABASES": "reports", "DBPOOL_REPORTS_URL": url}


def through_bouncer(server: Server) -> dict[str, Any]:
    if PROGRAM is None:
        pytest.skip("there is no pgbouncer here")
    server.execute("create role app superuser login password 'right'")
    bouncer = Bouncer(server)
    bouncer.start()
    conninfo = bouncer.conninfo_for()
    return {"conninfo": conninfo, "DBPOOL_POOLER": "transaction", "extra": kill_at_end(bouncer)}


def kill_at_end(bouncer: Bouncer) -> ExitStack:
    stack = ExitStack()
    stack.callback(bouncer.kill)
    return stack


# The server


@trouble("server stopped", "DB01", 1.0)
def _(shop: Shop) -> Known:
    shop.load("/read", 6, pause=0.05)
    time.sleep(1.0)
    shop.begin()
    shop.server.stop()
    return {}


@trouble("server stopped, nobody asks", "DB01", 6.0)  # five until an unused pool is pinged
def _(shop: Shop) -> Known:
    shop.begin()
    shop.server.stop()
    return {}


@trouble("server frozen under load", "DB01", 1.0)
def _(shop: Shop) -> Known:
    shop.load("/read", 12, pause=0.02)
    time.sleep(1.0)
    shop.begin()
    backends = shop.server.backends()
    shop.server.freeze([shop.server.postmaster_pid, *backends])
    return {}


@trouble("network silent", "DB01", 1.0, prepare=through_proxy)
def _(shop: Shop) -> Known:
    shop.load("/read", 12, pause=0.02)
    time.sleep(1.0)
    shop.begin()
    shop.extra.mode = Mode.SILENT
    shop.extra.go_silent()
    return {}


@trouble("server stopped under nested checkouts", "DB01", 1.0, before="DB09")
def _(shop: Shop) -> Known:
    shop.load("/nest", 4, pause=0.1)
    time.sleep(2.0)
    shop.begin()
    shop.server.stop()
    return {}


@trouble("password changed", "DB02", 1.0)
def _(shop: Shop) -> Known:
    shop.load("/read", 6, pause=0.05)
    time.sleep(1.0)
    shop.server.execute("alter role shop password 'other'")
    shop.begin()
    end_shop_sessions(shop)
    return {}


@trouble("role may not log in", "DB02", 1.0)
def _(shop: Shop) -> Known:
    shop.load("/read", 6, pause=0.05)
    shop.server.execute("alter role shop nologin")
    shop.begin()
    end_shop_sessions(shop)
    return {}


@trouble("password expired", "DB02", 1.0)
def _(shop: Shop) -> Known:
    shop.load("/read", 6, pause=0.05)
    shop.server.execute("alter role shop valid until '2020-01-01'")
    shop.begin()
    end_shop_sessions(shop)
    return {}


@trouble("pg_hba.conf rejects the role", "DB02", 1.0)
def _(shop: Shop) -> Known:
    shop.load("/read", 6, pause=0.05)
    rules = shop.server.data / "pg_hba.conf"
    rules.write_text(f"host all shop 127.0.0.1/32 reject\n{rules.read_text()}")
    shop.server.reload()
    shop.begin()
    end_shop_sessions(shop)
    return {"text": "pg_hba.conf"}


@trouble("TLS asked for by the server alone", "DB02", 1.0)
def _(shop: Shop) -> Known:
    shop.load("/read", 6, pause=0.05)
    rules = shop.server.data / "pg_hba.conf"
    rules.write_text(f"hostnossl all shop 127.0.0.1/32 reject\n{rules.read_text()}")
    shop.server.reload()
    shop.begin()
    end_shop_sessions(shop)
    return {"text": "no encryption"}


@trouble("database dropped", "DB02", 1.0, prepare=own_database)
def _(shop: Shop) -> Known:
    shop.load("/read", 6, pause=0.05)
    time.sleep(1.0)
    shop.begin()
    shop.server.execute("drop database shop with (force)")
    return {"text": "does not exist"}


@trouble("database renamed", "DB02", 1.0, prepare=own_database)
def _(shop: Shop) -> Known:
    shop.load("/read", 6, pause=0.05)
    shop.server.execute("alter database shop allow_connections false")
    shop.begin()
    end_shop_sessions(shop)
    until(lambda: not shop.server.execute("select 1 from pg_stat_activity where datname = 'shop'"))
    shop.server.execute("alter database shop rename to store")
    return {}


def end_shop_sessions(shop: Shop) -> None:
    shop.server.execute("select pg_terminate_backend(pid) from pg_stat_activity"
                        " where usename = 'shop'")  # fmt: skip


@trouble("server full", "DB03", 1.0, server={"max_connections": 14})
def _(shop: Shop) -> Known:
    for _ in range(14):
        with suppress(psycopg.OperationalError):
            conninfo = shop.server.conninfo_for(user="shop", password=PASSWORD)
            shop.stack.enter_context(psycopg.connect(conninfo, application_name="hog"))
    shop.load("/slow/0.5", 12)
    return {}


@trouble(
    "server full of another application's sessions", "DB03", 1.0, server={"max_connections": 14}
)
def _(shop: Shop) -> Known:
    shop.server.execute(f"create role billing login password '{PASSWORD}'")
    end_shop_sessions(shop)
    for _ in range(14):
        with suppress(psycopg.OperationalError):
            conninfo = shop.server.conninfo_for(user="billing", password=PASSWORD)
            shop.stack.enter_context(psycopg.connect(conninfo, application_name="billing"))
    shop.load("/slow/0.5", 12)
    return {}


@trouble("role's connection limit", "DB17", 1.0)
def _(shop: Shop) -> Known:
    shop.server.execute("alter role shop connection limit 1")
    shop.load("/slow/0.5", 12)
    return {}


@trouble("database's connection limit", "DB17", 1.0)
def _(shop: Shop) -> Known:
    shop.server.execute("alter database postgres connection limit 1")
    shop.load("/slow/0.5", 12)
    return {}


@trouble(
    "PgBouncer takes no more clients",
    "DB17",
    1.0,
    prepare=through_bouncer,
    shop={"DBPOOL_MAX_SIZE": "4"},
)
def _(shop: Shop) -> Known:
    for _ in range(3):
        shop.stack.enter_context(psycopg.connect(shop.conninfo))
    shop.load("/slow/0.5", 12)
    return {}


@trouble("more configured than allowed", "DB11", 0.0, prepare=few_connections)
def _(shop: Shop) -> Known:
    shop.begin()
    return {}


@trouble("outage, then connections not given back", "DB06", 0.0)
def _(shop: Shop) -> Known:
    shop.load("/read", 4, pause=0.05)
    shop.server.stop()
    until(lambda: shop.first() == "DB01", 20, pause=0.1)
    time.sleep(5)
    shop.server.start()
    until(lambda: shop.first() == "DB00", 20, pause=0.1)
    shop.load("/forget", 2, pause=0.2)
    return {"endpoint": "forget"}


# Locks


@trouble("table locked by psql", "DB04", 1.0)
def _(shop: Shop) -> Known:
    pid = shop.stack.enter_context(session(shop.server, "lock table stock"))
    shop.load("/read", 12)
    return {"pid": pid}


@trouble("row locked by our code in another worker", "DB04", 1.0)
def _(shop: Shop) -> Known:
    shop.load("/hold/30.0", 1)
    time.sleep(0.5)
    shop.load("/update", 12)
    return {"endpoint": "hold", "line": "hold", "worker": True}


@trouble("row locked by our code in a slow statement", "DB04", 1.0)
def _(shop: Shop) -> Known:
    shop.load("/busy/20.0", 1)
    time.sleep(0.5)
    shop.load("/update", 12)
    return {"endpoint": "busy", "line": "busy", "worker": True}


@trouble("migration waits for a report", "DB04", 1.0)
def _(shop: Shop) -> Known:
    root = shop.stack.enter_context(session(shop.server, "select * from stock", name="report"))

    def migrate() -> None:
        with (
            suppress(psycopg.Error),
            session(shop.server, "alter table stock add x int", name="alembic"),
        ):
            pass

    migration = threading.Thread(target=migrate)
    migration.start()
    shop.stack.callback(migration.join, 30)
    shop.stack.callback(end_alembic, shop)
    until(lambda: shop.server.execute("select 1 from pg_locks where not granted"))
    shop.load("/read", 12)
    return {"pid": root}


def begin_in_background(shop: Shop, statement: str, name: str) -> int:
    """Run a statement in a session of its own, which ends with the shop; return its pid."""
    conn = psycopg.connect(shop.server.conninfo_for(application_name=name), autocommit=True)

    def run() -> None:
        with suppress(psycopg.Error), conn:
            conn.execute(statement.encode())

    thread = threading.Thread(target=run)
    shop.stack.callback(thread.join, 30)
    shop.stack.callback(conn.cancel_safe)
    thread.start()
    return conn.info.backend_pid


@trouble("migration waits for a report of our own", "DB04", 1.0)
def _(shop: Shop) -> Known:
    shop.load("/report/30.0", 1)
    time.sleep(0.5)
    begin_in_background(shop, "alter table stock add x int", "alembic")
    until(lambda: shop.server.execute("select 1 from pg_locks where not granted"))
    shop.load("/read", 12)
    return {"endpoint": "report", "line": "report", "worker": True}


@trouble("index built without CONCURRENTLY", "DB04", 1.0)
def _(shop: Shop) -> Known:
    shop.server.execute(
        "create function slow(int) returns int language plpgsql immutable as"
        " 'begin perform pg_sleep(3); return $1; end'"
    )
    pid = begin_in_background(shop, "create index on stock (slow(n))", "alembic")
    until(
        lambda: shop.server.execute("select 1 from pg_locks where mode = 'ShareLock' and granted")
    )
    shop.load("/update", 12)
    return {"pid": pid}


@trouble("row locked by another application", "DB04", 1.0)
def _(shop: Shop) -> Known:
    update = "update stock set n = 1 where id = 1"
    pid = shop.stack.enter_context(session(shop.server, update, name="billing"))
    shop.load("/update", 12)
    return {"pid": pid}


@trouble("a row that all requests update", "DB04", 1.0)
def _(shop: Shop) -> Known:
    shop.load("/hold/0.4", 12)
    return {"endpoint": "hold", "line": "hold", "worker": True}


@trouble("request that waits for itself over a second pool", "DB04", 1.0, prepare=two_pools)
def _(shop: Shop) -> Known:
    shop.load("/twice", 1)
    return {"endpoint": "twice", "line": "twice", "worker": True, "pool": "reports"}


@trouble("migration on the primary stops a replica's readers", "DB04", 1.0, prepare=standby_of)
def _(shop: Shop) -> Known:
    shop.stack.enter_context(session(shop.server, "lock table stock", name="alembic"))
    shop.server.execute("select pg_switch_wal()")
    until(lambda: shop.extra.execute("select 1 from pg_locks where mode = 'AccessExclusiveLock'"))
    shop.load("/read", 12)
    return {"text": "the replay of the primary's changes"}


@trouble("table locked, then the server stops", "DB01", 1.0, before="DB04")
def _(shop: Shop) -> Known:
    shop.stack.enter_context(session(shop.server, "lock table stock"))
    shop.load("/read", 12)
    until(lambda: shop.first() == "DB04", 20, pause=0.1)
    shop.begin()
    shop.server.stop()
    return {}


@trouble("table locked, then the server is frozen", "DB01", 5.0, before="DB04")
def _(shop: Shop) -> Known:
    shop.stack.enter_context(session(shop.server, "lock table stock"))
    shop.load("/read", 12)
    until(lambda: shop.first() == "DB04", 20, pause=0.1)
    shop.begin()
    shop.server.freeze([shop.server.postmaster_pid, *shop.server.backends()])
    return {}


def end_alembic(shop: Shop) -> None:
    shop.server.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'alembic'"
    )


@trouble("prepared transaction forgotten", "DB04", 1.0, server={"max_prepared_transactions": 5})
def _(shop: Shop) -> Known:
    with closing(psycopg.connect(shop.server.conninfo, autocommit=True)) as conn:
        for statement in (
            "begin",
            "update stock set n = 1 where id = 1",
            "prepare transaction 'orphan'",
        ):
            conn.execute(statement)
    shop.load("/update", 12)
    return {"pid": 0, "text": "orphan"}


@trouble("advisory lock", "DB04", 1.0)
def _(shop: Shop) -> Known:
    pid = shop.stack.enter_context(session(shop.server, "select pg_advisory_lock(1)"))
    shop.load("/advisory", 12)
    return {"pid": pid}


@trouble("table locked by psql, room for all threads", "DB04", 1.0, shop=DEFAULT_POOL_SIZE)
def _(shop: Shop) -> Known:
    pid = shop.stack.enter_context(session(shop.server, "lock table stock"))
    shop.load("/read", 20)
    return {"pid": pid}


@trouble(
    "table locked, one thread a worker",
    "DB04",
    1.0,
    shop={**DEFAULT_POOL_SIZE, "worker_class": "sync"},
)
def _(shop: Shop) -> Known:
    pid = shop.stack.enter_context(session(shop.server, "lock table stock"))
    shop.load("/read", 8)
    return {"pid": pid}


@trouble("table locked, gevent", "DB04", 1.0, shop={"worker_class": "gevent"})
def _(shop: Shop) -> Known:
    pid = shop.stack.enter_context(session(shop.server, "lock table stock"))
    shop.load("/read", 12)
    return {"pid": pid}


@trouble("table of the second database locked", "DB04", 1.0, prepare=second_database)
def _(shop: Shop) -> Known:
    conninfo = shop.server.conninfo_for(dbname="reports", application_name="psql")
    conn = shop.stack.enter_context(psycopg.connect(conninfo))
    conn.execute("lock table stock")
    shop.load("/reports", 8)
    shop.load("/read", 2, pause=0.1)
    return {"pid": conn.info.backend_pid, "pool": "reports"}


# Our code


@trouble("transaction left open", "DB05", 5.0)
def _(shop: Shop) -> Known:
    shop.load("/idle/60.0", 8)
    shop.load("/read", 4)
    return {"endpoint": "idle", "line": "idle", "worker": True}


@trouble("failed transaction left open", "DB05", 5.0)
def _(shop: Shop) -> Known:
    shop.load("/fail/60.0", 8)
    shop.load("/read", 4)
    return {"endpoint": "fail", "line": "fail", "worker": True}


@trouble("slow statements", "DB07", 5.0)
def _(shop: Shop) -> Known:
    shop.load("/slow/20.0", 12)
    return {"endpoint": "slow", "line": "slow", "worker": True}


@trouble("slow statements in all threads, room for all", "DB07", 5.0, shop=DEFAULT_POOL_SIZE)
def _(shop: Shop) -> Known:
    shop.load("/slow/20.0", 16)
    return {"endpoint": "slow", "line": "slow", "worker": True}


@trouble("synchronous standby gone", "DB07", 5.0)
def _(shop: Shop) -> Known:
    shop.server.execute("alter system set synchronous_standby_names = 'gone'")
    shop.server.reload()
    shop.load("/insert", 12)
    return {"endpoint": "insert", "line": "insert", "worker": True, "text": "IPC/SyncRep"}


@trouble("background thread leaves a transaction open", "DB05", 5.0)
def _(shop: Shop) -> Known:
    shop.get("/keep/1")
    shop.load("/read", 12)
    return {"line": "keep", "endpoint": None, "worker": True}


@trouble("background thread keeps connections", "DB15", 10.0)
def _(shop: Shop) -> Known:
    shop.get("/keep/none")
    shop.load("/slow/0.1", 12)
    return {"line": "keep", "endpoint": None, "worker": True}


@trouble("rows read slowly", "DB15", 10.0)
def _(shop: Shop) -> Known:
    shop.load("/export/20.0", 12)
    return {"endpoint": "export", "worker": True}


@trouble("nested checkouts", "DB09", 0.0)
def _(shop: Shop) -> Known:
    shop.load("/nest", 12)
    return {"endpoint": "nest", "line": "nest", "worker": True}


@trouble("connections not given back", "DB06", 0.0)
def _(shop: Shop) -> Known:
    shop.load("/forget", 2, pause=0.2)
    return {"endpoint": "forget"}


@trouble(
    "slow statements, one thread a worker",
    "DB07",
    5.0,
    shop={**DEFAULT_POOL_SIZE, "worker_class": "sync"},
)
def _(shop: Shop) -> Known:
    shop.load("/slow/20.0", 6)
    return {"endpoint": "slow", "line": "slow", "worker": True}


@trouble("connections lost in the code", "DB06", 0.0)
def _(shop: Shop) -> Known:
    shop.load("/lose", 2, pause=0.2)
    return {"endpoint": "lose"}


@trouble("slow code holds connections", "DB15", 10.0)
def _(shop: Shop) -> Known:
    shop.load("/idle/1.5", 12)
    return {"endpoint": "idle", "line": "idle", "worker": True}


@trouble("slow code holds connections in autocommit", "DB15", 10.0)
def _(shop: Shop) -> Known:
    shop.load("/call/1.5", 12)
    return {"endpoint": "call", "line": "call", "worker": True}


# The workers


@trouble("worker frozen", "DB12", 10.0)
def _(shop: Shop) -> Known:
    frozen = shop.workers()[0]
    os.kill(frozen, signal.SIGSTOP)
    shop.stack.callback(resume, frozen)
    shop.begin()
    return {"workers": [frozen]}


def resume(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


@trouble("worker's interpreter taken", "DB12", 10.0)
def _(shop: Shop) -> Known:
    shop.load("/spin", 1)
    return {}


@trouble("workers end by SIGSEGV in a request", "DB16", 0.0)
def _(shop: Shop) -> Known:
    for _ in range(3):
        until(lambda: len(shop.workers()) == 3, 20)
        shop.get("/die/11")
        shop.begin()
        time.sleep(1.0)
    return {"text": "by SIGSEGV"}


@trouble("workers killed", "DB16", 0.0)
def _(shop: Shop) -> Known:
    for _ in range(3):
        until(lambda: len(shop.workers()) == 3, 20)
        os.kill(shop.workers()[0], signal.SIGKILL)
        shop.begin()
        time.sleep(1.0)
    return {"text": "by SIGKILL"}


@trouble(
    "requests longer than gunicorn's timeout", "DB16", 4.0,
    shop={"worker_class": "sync", "more": "timeout = 3"},
)  # fmt: skip
def _(shop: Shop) -> Known:
    shop.load("/elsewhere/60.0", 3)
    return {"text": "by SIGABRT"}


# What takes its time


@trouble("pool too small", "DB08", 30.0)
def _(shop: Shop) -> Known:
    shop.load("/slow/0.3", 12)
    return {}


@trouble("pool too small, callers refused", "DB08", 30.0, shop={"DBPOOL_MAX_WAITING": "1"})
def _(shop: Shop) -> Known:
    shop.load("/slow/0.3", 12, pause=0.05)
    return {}


@trouble("conflicts", "DB14", 60.0, shop=DEFAULT_POOL_SIZE)
def _(shop: Shop) -> Known:
    shop.load("/conflict", 6)
    return {}


@trouble("connections ended by each request", "DB10", 60.0)
def _(shop: Shop) -> Known:
    time.sleep(62)
    shop.load("/end", 2, pause=0.1)
    return {}


@trouble("slower than usual", "DB18", 30.0, shop=DEFAULT_POOL_SIZE)
def _(shop: Shop) -> Known:
    shop.server.execute("update stock set n = 5 where id = 3")
    shop.load("/paced", 6, pause=0.05)
    time.sleep(70)
    shop.begin()
    shop.server.execute("update stock set n = 200 where id = 3")
    return {}


@trouble("replica without a primary", "DB13", 60.0, prepare=standby_of)
def _(shop: Shop) -> Known:
    shop.load("/read", 2, pause=0.2)
    shop.server.execute("update stock set n = 1")
    shop.begin()
    shop.server.stop()
    return {}


@trouble("replica stops replaying", "DB13", 60.0, prepare=standby_of)
def _(shop: Shop) -> Known:
    shop.load("/read", 2, pause=0.2)
    time.sleep(20)
    shop.extra.execute("select pg_wal_replay_pause()")
    shop.server.execute("update stock set n = 1")
    shop.begin()
    return {}


@trouble(
    "replay that waits for a query of our own", "DB13", 60.0,
    prepare=standby_of, shop={"DBPOOL_STATEMENT_TIMEOUT": "0"},
)  # fmt: skip
def _(shop: Shop) -> Known:
    shop.extra.execute("alter system set max_standby_streaming_delay = -1")
    shop.extra.reload()
    client = shop.stack.enter_context(socket.create_connection(("127.0.0.1", shop.site.port)))
    client.sendall(b"GET /report/120.0 HTTP/1.1\r\nHost: shop\r\n\r\n")  # once: it takes long
    until(lambda: shop.extra.execute("select 1 from pg_stat_activity where wait_event = 'PgSleep'"))
    for statement in ("update stock set n = 1", "vacuum stock", "update stock set n = 2"):
        shop.server.execute(statement)
    shop.begin()
    return {}


@trouble("replica promoted", "DB13", 60.0, prepare=standby_of)
def _(shop: Shop) -> Known:
    shop.load("/read", 2, pause=0.2)
    time.sleep(3)
    shop.extra.promote()
    shop.begin()
    return {}


@dataclass
class Measured:
    """What one shop's door reported about a trouble."""

    after: float | None = None  # seconds until the right finding was the first
    text: str = ""
    known: list[str] = field(default_factory=list)  # of the culprit, all of it checked
    wrong: list[str] = field(default_factory=list)


@pytest.fixture
def shops(
    make_server: Callable[..., Server], tmp_path: Path
) -> Iterator[Callable[[Row], list[Shop]]]:
    """Make the two shops of a row."""
    made: list[Shop] = []

    def make(row: Row) -> list[Shop]:
        made.extend(
            both := open_both(
                make_server, tmp_path / str(len(made)), row.server, row.shop, row.prepare
            )
        )
        return both

    yield make
    with ThreadPoolExecutor(4) as workers:
        list(workers.map(Shop.close, made))


def watch(row: Row, shop: Shop) -> Measured:
    """Bring the trouble about, and watch the door until the right finding was first for some time."""
    known = row.begin(shop)
    measured = Measured(known=sorted(known))
    limit, after = row.due + DETECTION_SECONDS, measured.after
    while (seconds := time.monotonic() - shop.began) < limit or (
        after and seconds < after + STABLE_SECONDS
    ):
        first = (shop.findings() or [{"code": "nothing", "severity": "ok"}])[0]
        seconds = time.monotonic() - shop.began
        if first["code"] == row.code:
            if after is None and seconds <= limit:
                after = measured.after = round(seconds, 2)
                measured.text = first["text"]
                measured.wrong += mismatches(first, known, shop)
        elif after is not None or (
            first["severity"] in ("warning", "critical") and first["code"] != row.before
        ):
            measured.wrong.append(f"{first['code']} after {seconds:.1f} s: {first.get('text')}")
        time.sleep(0.1)
    if after is None:
        measured.wrong.append(f"not in time: {[each['text'] for each in shop.findings()]}")
    return measured


def mismatches(finding: Known, known: Known, shop: Shop) -> list[str]:
    """Return the facts about the culprit that the finding has wrong."""
    evidence = finding["evidence"]
    culprits = (evidence.get(name) for name in ("blockers", "holders", "endpoints"))
    first: Known = next(filter(None, culprits), [{}])[0]
    checks = {
        "line": f"/{line_of(known['line'])} " in str(first.get("where"))
        if "line" in known
        else True,
        "pid": first.get("pid") == known.get("pid", first.get("pid")),
        "endpoint": first.get("endpoint") == known.get("endpoint", first.get("endpoint")),
        "worker": not known.get("worker") or first.get("worker") in shop.workers(),
        "workers": evidence.get("workers") == known.get("workers", evidence.get("workers")),
        "pool": finding["pool"] == known.get("pool", finding["pool"]),
        "text": known.get("text", "") in finding["text"],
    }
    return [f"wrong {name}: {finding}" for name, is_correct in checks.items() if not is_correct]


def id_of(rows: tuple[Row, ...]) -> str:
    return " + ".join(row.name for row in rows)


# Those that take long are tried three at a time.
SHORT = [(row,) for row in ROWS if row.due < 30]
_LONG = [row for row in ROWS if row.due >= 30]
LONG = [tuple(_LONG[n : n + 3]) for n in range(0, len(_LONG), 3)]


@pytest.mark.parametrize("rows", [*SHORT, *LONG], ids=id_of)
def test_the_first_finding_is_the_right_one(
    rows: tuple[Row, ...], shops: Callable[[Row], list[Shop]]
) -> None:
    opened = [(row, shop) for row in rows for shop in shops(row)]
    with ThreadPoolExecutor(len(opened)) as watchers:
        measured = list(watchers.map(lambda each: watch(*each), opened))
    for (row, shop), each in zip(opened, measured, strict=True):
        fixed = {"code": row.code, "due": row.due, "known": each.known}
        record(row.name, shop.privilege, fixed=fixed, measured=vars(each))
    assert [each.wrong for each in measured] == [[]] * len(measured)
