"""The diagnosis: 24 troubles and 16 quiet situations as data, and properties of any report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbpool.diagnosis import (
    CODES,
    Death,
    Finding,
    Prepared,
    Scene,
    ServerFacts,
    ServerView,
    Session,
    Severity,
    Watch,
    diagnose,
    suspicions,
)
from dbpool.diagnosis.history import BOUNDS, Buckets, Step
from dbpool.diagnosis.watching import Watcher

NOW = 1_795_000_000.0
NAME = "default"
HEALTHY = {"state": "closed", "since": None, "last_error": None, "retry_after": None}


def holder(seconds: float = 0.01, status: str = "query", **more: Any) -> dict[str, Any]:
    """A holder as `/stats` shows it."""
    known = {
        "thread": "Thread-1",
        "seconds": seconds,
        "where": "shop/orders.py:41 index",
        "endpoint": "orders.index",
        "pid": 5001,
        "worker": 4711,
        "status": status,
    }
    return known | more


def holders(number: int, seconds: float, status: str, **more: Any) -> list[dict[str, Any]]:
    """That many holders, each with a session of its own."""
    return [
        holder(seconds, status, pid=5001 + n, thread=f"Thread-{n}", **more) for n in range(number)
    ]


def pool(**changes: Any) -> dict[str, Any]:
    """A pool as `/stats` shows it: up, with one of 12 connections in use."""
    counters = {
        "checkouts": 1000,
        "connects": 20,
        "timeouts": 0,
        "rejected": 0,
        "leaks": 0,
        "retries": 0,
    }
    idle = {
        "state": "up", "size": 12, "active": 1, "idle": 11, "connecting": 0, "waiting": 0,
        "min_size": 3, "max_size": 12, "counters": counters, "breaker": HEALTHY, "holders": [],
    }  # fmt: skip
    return idle | changes


def full(waiting: int, held: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A pool without a free connection."""
    return pool(active=12, idle=0, waiting=waiting, holders=held, **changes)


def failing(error: str, since: float, state: str = "open", **changes: Any) -> dict[str, Any]:
    """A pool that cannot connect."""
    breaker = {"state": state, "since": NOW - since, "last_error": error, "retry_after": 0.4}
    word = "down" if state == "open" else "up"
    return pool(**{"state": word, "size": 0, "active": 0, "idle": 0, "breaker": breaker} | changes)


def histogram(seconds: float, number: int = 100) -> Buckets:
    """That many equal durations."""
    bucket = sum(bound < seconds for bound in BOUNDS)
    counts = [0] * 12
    counts[bucket] = number
    return Buckets(tuple(counts), seconds * number)


def step(wait: float = 0.0001, use: float = 0.01, number: int = 100, **more: Any) -> Step:
    """Five seconds of a pool with moderate load."""
    known = {"in_use": 1.0, "size": 12.0, "checkouts": number, "settled_checkouts": number}
    return replace(
        Step(wait=histogram(wait, number), use=histogram(use, number)), **{**known, **more}
    )


NORMAL_STEPS = [step() for _ in range(180)]


def ending_with(number: int, each: Step) -> list[Step]:
    """A normal quarter of an hour whose last *number* steps are *each*."""
    return [*NORMAL_STEPS[number:], *[each] * number]


@dataclass
class Case:
    """A situation: one report a second up to now, and the other facts known now."""

    expected: str
    reports: Callable[[int], dict[str, Any]]  # gets how many seconds ago
    texts: tuple[str, ...] = ()
    seconds: int = 3
    steps: list[Step] = field(default_factory=lambda: NORMAL_STEPS)
    view: ServerView | None = None
    processes: list[dict[str, Any]] = field(
        default_factory=lambda: [{"pid": 4711 + n, "age": 0.5, "uptime": 900.0} for n in range(3)]
    )
    forgotten_by: tuple[tuple[str, int], ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)

    def scene(self) -> Scene:
        watcher = Watcher()
        watches: Mapping[str, Watch] = {}
        report: dict[str, Any] = {}
        for ago in range(self.seconds, -1, -1):
            report = {
                "time": NOW - ago,
                "pools": {NAME: self.reports(ago)},
                "processes": self.processes,
            }
            watches = watcher.look(report, NOW - ago)
        watches = {NAME: replace(watches[NAME], forgotten_by=self.forgotten_by)}
        views = {} if self.view is None else {NAME: self.view}
        return Scene.read(
            report, steps={NAME: self.steps}, watches=watches, views=views, **self.more
        )


def always(state: dict[str, Any]) -> Callable[[int], dict[str, Any]]:
    return lambda ago: state


def growing(held: int, status: str, most: int, waiting: int = 4) -> Callable[[int], dict[str, Any]]:
    """A full pool with the same holders in each report, one second older each time."""
    return lambda ago: full(waiting, holders(held, most - ago + 0.01, status))


def own_session(pid: int, blocked_by: tuple[int, ...] = (), **more: Any) -> Session:
    known: dict[str, Any] = {
        "state": "active", "backend_type": "client backend", "is_ours": True, "user": "shop",
        "application_name": "dbpool:default@web/4711", "query_seconds": 4.0, "state_seconds": 4.0,
        "blocked_by": blocked_by,
    }  # fmt: skip
    if blocked_by:
        known["wait_type"] = "Lock"
    return Session(pid, **(known | more))


def foreign(pid: int, state: str | None = "idle in transaction", **more: Any) -> Session:
    known: dict[str, Any] = {
        "state": state, "backend_type": "client backend", "application_name": "psql",
        "client": "10.0.0.5", "user": "admin", "query_seconds": 30.0, "state_seconds": 14.0,
    }  # fmt: skip
    return Session(pid, **(known | more))


def server_view(*sessions: Session, **more: Any) -> ServerView:
    return ServerView(NOW, {session.pid: session for session in sessions}, **more)


FACTS = ServerFacts(max_connections=100, reserved=3, used=97, ours=12)
WAITERS = [own_session(pid, (99,)) for pid in (5001, 5002, 5003)]

TROUBLES: dict[str, Case] = {
    "server stopped": Case(
        "DB01", always(failing("connection refused", 14)), ("default has been down for 14 s", "refused")
    ),
    "server frozen": Case(
        "DB01", always(failing("connection timeout expired", 6)), ("has not answered", "6.0 s")
    ),
    "wrong password": Case(
        "DB02",
        always(failing('FATAL: password authentication failed for user "shop"', 2)),
        ("failed to connect", "password"),
    ),
    "no such database": Case(
        "DB02", always(failing('FATAL: database "shop" does not exist', 2)), ("does not exist",)
    ),
    "server full": Case(
        "DB03",
        always(failing("FATAL: sorry, too many clients already", 2, "closed", waiting=3)),
        ("no free connection slot", "97 of 100", "3 callers"),
        view=server_view(facts=FACTS),
    ),
    "role's limit reached": Case(
        "DB17",
        always(failing('FATAL: too many connections for role "shop"', 2, "closed", waiting=1)),
        ("too many connections for role", "1 caller"),
    ),
    "PgBouncer is full": Case(
        "DB17", always(failing("FATAL: no more connections allowed (max_client_conn)", 3)),
        ("max_client_conn",),
    ),
    "table locked by psql": Case(
        "DB04",
        always(full(4, holders(3, 4.0, "query"))),
        ("3 connections of default wait for a lock", "session 99 (psql, 10.0.0.5)",
         "idle in transaction for 14 s", "4 callers"),
        view=server_view(*WAITERS, foreign(99)),
    ),
    "row locked by our own code in another worker": Case(
        "DB04",
        always(
            full(4, [*holders(3, 4.0, "query"), holder(14, "idle in transaction", pid=99,
                     worker=4713, endpoint="billing.pay", where="billing/pay.py:88 pay")])
        ),
        ("billing.pay (billing/pay.py:88 pay) in worker 4713",),
        view=server_view(*WAITERS, own_session(99, state="idle in transaction", state_seconds=14.0)),
    ),
    "migration queues behind a report": Case(
        "DB04",
        always(full(4, holders(3, 4.0, "query"))),
        ("ALTER TABLE of alembic (session 99) waits for the session 77", "behind it"),
        view=server_view(
            *WAITERS,
            foreign(99, "active", application_name="alembic", ddl="ALTER TABLE", wait_type="Lock",
                    blocked_by=(77,)),
            foreign(77, "active", application_name="report"),
        ),
    ),
    "prepared transaction forgotten": Case(
        "DB04",
        always(full(4, holders(1, 4.0, "query"))),
        ("prepared transaction 'tx-9'", "5 min"),
        view=server_view(own_session(5001, (0,)), prepared=(Prepared("tx-9", 300.0, "shop"),)),
    ),
    "lock whose holder our role may not see": Case(
        "DB04",
        always(full(4, holders(3, 4.0, "query"))),
        ("session 99",),
        view=server_view(*WAITERS, Session(99, user="admin"), is_limited=True),
    ),
    "idle in transaction, the server says so": Case(
        "DB05",
        always(full(2, holders(12, 9.0, "idle in transaction"))),
        ("12 connections of default are idle in a transaction", "9.0 s", "orders.index"),
        view=server_view(*(own_session(5001 + n, state="idle in transaction", state_seconds=9.0)
                    for n in range(12))),
        steps=ending_with(2, step(number=0)),
    ),
    "idle in transaction, seen from the pool alone": Case(
        "DB05",
        growing(12, "idle in transaction", 12),
        ("idle in a transaction", "the server was not asked"),
        seconds=12, steps=ending_with(2, step(number=0)),
    ),
    "connections forgotten": Case(
        "DB06",
        lambda ago: pool(counters={"leaks": 7 - min(ago, 3)}),
        ("3 connections of default were not returned by orders.index (3 times)",),
        seconds=5, forgotten_by=(("orders.index", 3),),
    ),
    "slow statement everywhere": Case(
        "DB07", growing(12, "query", 8), ("slow statements hold 12 of 12", "8.0 s"),
        seconds=8, view=server_view(*(own_session(5001 + n, query_seconds=8.0) for n in range(12))),
    ),
    "slow statement everywhere, behind a pooler": Case(
        "DB07", growing(12, "query", 8), ("slow statements hold 12 of 12",), seconds=8
    ),
    "pool too small": Case(
        "DB08", lambda ago: full(4, holders(12, 0.01, "query", where=f"a.py:{ago}")),
        ("too small", "one caller in twenty waits"),
        seconds=5, steps=ending_with(6, step(wait=0.5)), view=server_view(facts=replace(FACTS, used=40)),
    ),
    "nested checkouts": Case(
        "DB09", lambda ago: full(12, holders(12, 6.0 - ago, "idle in transaction", waits=True)),
        ("wait for a second connection", "none can become free"),
        seconds=5,
    ),
    "a connection a request": Case(
        "DB10", always(pool()), ("made 960 connections for 1200 checkouts",),
        steps=ending_with(12, step(settled_connects=80, connects=80)),
    ),
    "more configured than allowed": Case(
        "DB11", always(pool(max_size=120)), ("may open 120 connections", "server allows 97"),
        view=server_view(facts=replace(FACTS, used=20)),
    ),
    "worker frozen": Case(
        "DB12", always(pool()), ("1 worker has been silent for 12 s (pid 4712)",),
        processes=[{"pid": 4711, "age": 0.2, "uptime": 90.0},
                   {"pid": 4712, "age": 12.0, "uptime": 90.0}],
    ),
    "slow code holds connections": Case(
        "DB15",
        lambda ago: full(6, holders(12, 2.0, "idle in transaction", where=f"pay.py:{ago % 2}")),
        ("the holders do nothing in the database", "orders.index (pay.py:0"),
        seconds=12, steps=ending_with(2, step(wait=1.5, use=2.0, number=30)),
    ),
    "workers killed again and again": Case(
        "DB16", always(pool()), ("3 workers died",),
        more={"deaths": (Death(NOW - 200), Death(NOW - 90), Death(NOW - 3))},
    ),
}  # fmt: skip

# More than the 24: troubles that need other facts.
MORE_TROUBLES: dict[str, Case] = {
    "server stopped a moment ago": Case(
        "DB01", always(failing("connection refused", 1.2, "closed")), ("has been down for 1.2 s",)
    ),
    "server frozen while it held every connection": Case(
        "DB01", always(full(4, holders(12, 2.5, "query"))),
        ("accepts connections but has not answered for 2.5 s", "12 connections wait for one"),
        view=ServerView(0.0, silent_since=NOW - 0.6),
    ),
    "server full, though no connect fails just now": Case(
        "DB03",
        lambda ago: full(3, holders(12, 0.4, "query", where=f"a.py:{ago}"))
        if ago < 2
        else failing("FATAL: sorry, too many clients already", 2, "closed", waiting=3),
        ("no free connection slot",), seconds=6,
    ),
    "slow statements in all threads, room for one more": Case(
        "DB07", lambda ago: pool(active=10, idle=2, holders=holders(10, 8.0 - ago, "query")),
        ("slow statements hold 10 of 12",), seconds=8,
    ),
    "replica does not stream": Case(
        "DB13", always(pool()), ("does not stream", "90 s"),
        view=server_view(facts=ServerFacts(role="standby", is_streaming=False, lag_seconds=90.0)),
    ),
    "replica promoted": Case(
        "DB13", always(pool()), ("was a standby and is a primary now",),
        view=server_view(facts=ServerFacts(role="primary"), role_before="standby", role_changed_at=NOW - 9),
    ),
    "transactions conflict": Case(
        "DB14", always(pool()), ("ran 120 transactions again, out of 1200",),
        steps=ending_with(12, step(retries=10)),
    ),
    "slower than usual": Case(
        "DB18", lambda ago: pool(waiting=3, active=12, idle=0), ("slower than usual",), seconds=6,
        steps=ending_with(6, step(use=0.2)),
    ),
    "nested, known from those who gave up": Case(
        "DB09", lambda ago: full(3, holders(12, 9.0 - ago, "idle in transaction"),
                                 counters={"nested": 5 - ago}),
        ("wait for a second connection",), seconds=3,
    ),
    "deadlock that the server has not ended yet": Case(
        "DB04", always(full(1, holders(2, 1.5, "query"))), ("2 connections of default wait",),
        view=server_view(own_session(5001, (5002,), query_seconds=1.5), own_session(5002, (5001,), query_seconds=1.5)),
    ),
    "lock, then the server stops": Case(
        "DB01", always(failing("connection refused", 2.5, "closed", waiting=4)),
        ("has been down for 2.5 s",), view=replace(server_view(*WAITERS, foreign(99)), time=NOW - 4),
    ),
    "lock, then the server falls silent": Case(
        "DB01", always(full(4, holders(3, 9.0, "query"))), ("has not answered for 3.0 s",),
        view=replace(server_view(*WAITERS, foreign(99)), time=NOW - 6, silent_since=NOW - 3),
    ),
    "one look at a locked table takes long": Case(
        "DB04", always(full(4, holders(3, 9.0, "query"))), ("session 99",),
        view=replace(server_view(*WAITERS, foreign(99)), time=NOW - 4, silent_since=NOW - 1),
    ),
    "server full, for its connections wait for a lock": Case(
        "DB04",
        always(failing("FATAL: sorry, too many clients already", 2, "closed", waiting=4, active=12,
                       holders=holders(3, 4.0, "query"))),
        ("session 99",), view=replace(server_view(*WAITERS, foreign(99)), time=NOW - 3),
    ),
    "a row that all update, each waiting for a short time": Case(
        "DB04", lambda ago: full(4, holders(12, 0.3, "query", where=f"a.py:{ago}")),
        ("3 connections of default wait for a lock that the session 99",),
        view=server_view(*[own_session(pid, (99,), query_seconds=0.3) for pid in (1, 2, 3)],
                  own_session(99, state="idle in transaction"), locked_since=NOW - 2),
    ),
    "table that a migration rewrites": Case(
        "DB04", always(full(4, holders(3, 4.0, "query"))),
        ("session 99 (alembic, 10.0.0.5) holds, active in ALTER TABLE for 30 s",),
        view=server_view(*WAITERS, foreign(99, "active", application_name="alembic", ddl="ALTER TABLE",
                                    wait_type="IO", wait_event="DataFileRead")),
    ),
    "blocker that waits for a disk": Case(
        "DB04", always(full(4, holders(3, 4.0, "query"))), ("active in IO/DataFileRead for 30 s",),
        view=server_view(*WAITERS, foreign(99, "active", wait_type="IO", wait_event="DataFileRead")),
    ),
    "migration on the primary of a replica": Case(
        "DB04", always(full(4, holders(3, 4.0, "query"))),
        ("lock that the replay of the primary's changes (pid 99) holds;",),
        view=server_view(*WAITERS, Session(99, backend_type="startup", wait_type="IPC"),
                  facts=ServerFacts(role="standby")),
    ),
    "migration on the primary of a replica, not to be seen": Case(
        "DB04", always(full(4, holders(3, 4.0, "query"))), ("replay of the primary's changes",),
        view=server_view(*WAITERS, Session(99), facts=ServerFacts(role="standby"), is_limited=True),
    ),
    "autovacuum, not to be seen": Case(
        "DB04", always(full(4, holders(3, 4.0, "query"))), ("lock that autovacuum (pid 99) holds;",),
        view=server_view(*WAITERS, Session(99), facts=ServerFacts(role="primary"), is_limited=True),
    ),
    "synchronous standby gone": Case(
        "DB07", growing(12, "query", 8), ("most of the statements wait for IPC/SyncRep",), seconds=8,
        view=server_view(*(own_session(5001 + n, query_seconds=8.0, wait_type="IPC", wait_event="SyncRep")
                    for n in range(12))),
    ),
    "background thread keeps a third of the connections": Case(
        "DB15",
        lambda ago: full(4, [
            *holders(4, 60.0 - ago, "idle", where="poller.py:12 run", endpoint=None),
            *holders(8, 0.1, "query", where=f"a.py:{ago}", worker=1)]),
        ("4 callers of default wait while 4 connections have run no query for up to 60 s",
         "poller.py:12 run (4 times)"), seconds=12,
    ),
    "slow statements, and a look that takes long": Case(
        "DB07", growing(12, "query", 8), ("slow statements hold 12 of 12",), seconds=8,
        view=replace(server_view(*(own_session(5001 + n, query_seconds=6.0) for n in range(12))),
                     time=NOW - 2, silent_since=NOW - 0.7),
    ),
    "slow statements beside a thread that listens": Case(
        "DB07", lambda ago: full(4, [holder(900.0 - ago, "idle", where="listen.py:7 run", pid=1),
                                     *holders(11, 9.0 - ago, "query")]),
        ("slow statements hold 11 of 12",), seconds=20,
    ),
    "slow statements beside a transaction left open": Case(
        "DB07", lambda ago: full(4, [holder(60.0 - ago, "idle in transaction", pid=1, thread="cron"),
                                     *holders(11, 9.0 - ago, "query")]),
        ("slow statements hold 11 of 12",), seconds=20,
    ),
    "too small, beside a transaction left open": Case(
        "DB08",
        lambda ago: full(6, [holder(60.0 - ago, "idle in transaction", thread="cron", pid=1),
                             *holders(11, 0.2, "query", where=f"a.py:{ago}")]),
        ("84 callers got none",), seconds=20, steps=ending_with(12, step(wait=0.5, refused=7)),
    ),
    "too small, beside a connection forgotten": Case(
        "DB08",
        lambda ago: full(6, holders(12, 0.2, "query", where=f"a.py:{ago}"),
                         counters={"leaks": int(ago < 2)}),
        ("84 callers got none",), steps=ending_with(12, step(wait=0.5, refused=7)),
    ),
    "a quarter of the connections in transactions left open": Case(
        "DB05",
        lambda ago: full(6, [*holders(3, 60.0 - ago, "idle in transaction", worker=1),
                             *holders(9, 0.2, "query", where=f"a.py:{ago}", worker=1)]),
        ("3 connections of default are idle",), seconds=20,
        steps=ending_with(12, step(wait=0.5, refused=7)),
    ),
    "connections that are never reused, so that callers wait": Case(
        "DB10", lambda ago: full(6, holders(12, 0.2, "query", where=f"a.py:{ago}")),
        ("made 960 connections for 1200 checkouts",),
        steps=ending_with(12, step(wait=0.5, refused=7, settled_connects=80, connects=80)),
    ),
    "too small from the start": Case(
        "DB08", always(full(6, holders(12, 0.2, "query"))),
        ("the work itself has no usual duration yet",), steps=[step(wait=0.5, use=0.4)] * 8,
    ),
    "server stops under nested checkouts": Case(
        "DB01",
        always(failing("connection refused", 8, waiting=4, active=4, size=4,
                       holders=holders(4, 9.0, "idle in transaction", waits=True))),
        ("has been down for 8.0 s",),
    ),
    "server full under nested checkouts": Case(
        "DB03",
        always(failing("FATAL: sorry, too many clients already", 3, "closed", waiting=4, active=4,
                       size=4, holders=holders(4, 9.0, "idle in transaction", waits=True))),
        ("no free connection slot",),
    ),
    "table locked until gunicorn's timeout ends the workers": Case(
        "DB04", always(pool(active=3, idle=0, holders=holders(3, 14.0, "query"))), ("session 99",),
        view=server_view(*[own_session(pid, (99,), query_seconds=14.0) for pid in (5001, 5002, 5003)],
                  foreign(99)),
        more={"deaths": tuple(Death(NOW - ago, -6) for ago in (60, 30, 9))},
    ),
    "requests to others that last until gunicorn's timeout, beside a short wait": Case(
        "DB16", always(pool(active=1, holders=holders(1, 1.0, "query"))), ("3 by SIGABRT",),
        view=server_view(own_session(5001, (99,), query_seconds=1.0), foreign(99)),
        more={"deaths": tuple(Death(NOW - ago, -6) for ago in (60, 30, 9))},
    ),
    "process without files": Case(
        "DB17",
        always(failing("connection failed: Too many open files", 3, "closed", waiting=2)
               | {"breaker": {"state": "closed", "since": NOW - 3, "kind": "descriptors",
                              "last_error": "connection failed: Too many open files"}}),
        ("cannot get another connection", "Too many open files"),
    ),
    "workers that die in two ways": Case(
        "DB16", always(pool()), ("3 workers died within five minutes: 2 by SIGKILL, 1 by SIGABRT",),
        more={"deaths": (Death(NOW - 20, -9), Death(NOW - 9, -6), Death(NOW - 3, -9))},
    ),
}  # fmt: skip


def nightly(ago: int) -> dict[str, Any]:
    return pool(active=1, idle=11, holders=[holder(600.0 - ago, "query", endpoint="report")])


QUIET: dict[str, Case] = {
    "nobody there": Case("DB00", always(pool(active=0, idle=12)), ("0 of 12",)),
    "not opened yet": Case("DB00", always(pool(state="starting", size=0, active=0, idle=0))),
    "nightly report": Case("DB00", nightly, seconds=20, steps=ending_with(60, step(use=0.01))),
    "COPY for minutes": Case(
        "DB00", nightly, seconds=20, view=server_view(own_session(5001, query_seconds=600.0)),
        steps=ending_with(12, step(use=9.0, number=2)),
    ),
    "report read row by row": Case(
        "DB00", lambda ago: pool(holders=[holder(90.0 - ago, "idle in transaction")]), seconds=20,
    ),
    "rolling HUP": Case(
        "DB00", always(pool(max_size=24)),
        processes=[{"pid": 4711 + n, "age": 0.5, "uptime": 2.0} for n in range(6)],
        steps=ending_with(3, step(connects=12)),
    ),
    "max_requests": Case("DB00", always(pool()), steps=ending_with(12, step(connects=4))),
    "restart of two seconds": Case(
        "DB00", lambda ago: failing("connection refused", 1.5, "closed", waiting=3), seconds=1
    ),
    "after a restart": Case(
        "DB00", always(pool()), steps=ending_with(1, step(wait=2.0, settled_connects=36, connects=36))
    ),
    "suspended laptop": Case(
        "DB00", always(pool()), more={"stalled": 3600.0},
        processes=[{"pid": 4711 + n, "age": 3600.0, "uptime": 9000.0} for n in range(3)],
    ),
    "an hour at 80 % load": Case(
        "DB00", lambda ago: pool(active=10, idle=2, waiting=ago % 3 == 0,
                                 holders=holders(10, 0.02, "query", where=f"a.py:{ago}")),
        seconds=60, steps=[step(wait=0.02, use=0.02, number=4000)] * 180,
    ),
    "a burst": Case(
        "DB00", lambda ago: full(20 if ago in (4, 5) else 0, holders(12, 0.3, "query")),
        seconds=20, steps=ending_with(2, step(wait=0.3)),
    ),
    "brief wait for a row": Case(
        "DB00", always(pool(holders=holders(2, 0.5, "query"))),
        view=server_view(own_session(5001, (5002,), query_seconds=0.4), own_session(5002, query_seconds=0.5)),
    ),
    "cold start": Case(
        "DB00", always(pool()), steps=[step(use=0.3, connects=12)],
        processes=[{"pid": 4711, "age": 0.1, "uptime": 5.0}],
    ),
    "one worker dismissed": Case("DB00", always(pool()), more={"deaths": (Death(NOW - 400), Death(NOW - 10))}),
    "transaction pooler, large sizes": Case(
        "DB00", always(pool(max_size=900)), view=server_view(facts=replace(FACTS, used=20)),
        more={"poolers": frozenset({NAME})},
    ),
}  # fmt: skip


# More than the 16.
MORE_QUIET: dict[str, Case] = {
    "a worker with many pools publishes seldom": Case(
        "DB00", always(pool()),
        processes=[{"pid": 4711, "age": 12.0, "uptime": 90.0, "interval": 12.5},
                   {"pid": 4712, "age": 0.2, "uptime": 90.0}],
    ),
    "all threads busy elsewhere": Case(
        "DB00", always(pool(active=0, idle=12)),
        ("default has 0 of 12 connections in use, nobody waits; 12 of 12 threads are busy elsewhere",),
        processes=[{"pid": 4711 + n, "age": 0.5, "uptime": 900.0, "threads": 4, "busy": 4}
                   for n in range(3)],
    ),
    "80 % load by code that sleeps between its statements": Case(
        "DB00",
        lambda ago: full(ago % 2, holders(12, 0.04, "idle in transaction", where=f"a.py:{ago}")),
        seconds=60, steps=[step(wait=0.03, use=0.05, number=1000)] * 180,
    ),
    "one quick migration after another": Case(
        "DB00", lambda ago: full(1, holders(12, 0.3, "query", where=f"a.py:{ago}")),
        view=server_view(*[own_session(pid, (99,), query_seconds=0.3) for pid in (1, 2, 3)], foreign(99),
                  locked_since=NOW - 2),
    ),
    "threads that wait for a connection are not elsewhere": Case(
        "DB00", always(full(3, holders(12, 0.1, "query"))),
        ("3 callers waiting; 1 of 16 threads is busy elsewhere",),
        processes=[{"pid": 4711, "age": 0.5, "uptime": 900.0, "threads": 16, "busy": 16}],
    ),
    "deploy, old and new workers at once": Case(
        "DB00", always(pool(max_size=120)), view=server_view(facts=replace(FACTS, used=20)),
        processes=[{"pid": 4711 + n, "age": 0.5, "uptime": 900.0 if n < 3 else 5.0}
                   for n in range(6)],
    ),
    "thread that listens for notifications": Case(
        "DB00", lambda ago: pool(holders=[holder(900.0 - ago, "idle", where="listen.py:7 run")]),
        seconds=20,
    ),
    "one look that takes a while": Case(
        "DB00", always(pool(holders=holders(2, 2.5, "query"))),
        view=replace(server_view(own_session(5001), own_session(5002)), silent_since=NOW - 0.7),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*TROUBLES, *MORE_TROUBLES])
def test_the_first_finding_names_the_trouble(name: str) -> None:
    case = (TROUBLES | MORE_TROUBLES)[name]
    found = diagnose(case.scene())
    assert found[0].code == case.expected, [each.text for each in found]
    for word in case.texts:
        assert word in found[0].text
    assert found[0].do


@pytest.mark.parametrize("name", [*QUIET, *MORE_QUIET])
def test_quiet_situations_have_no_finding_above_notice(name: str) -> None:
    case = (QUIET | MORE_QUIET)[name]
    found = diagnose(case.scene())
    assert {each.severity for each in found} <= {Severity.OK, Severity.NOTICE}, found
    assert "DB00" in {each.code for each in found}
    for word in case.texts:
        assert any(word in each.text for each in found)


def test_there_are_24_troubles_and_16_quiet_situations() -> None:
    assert (len(TROUBLES), len(QUIET)) == (24, 16)
    expected = {case.expected for case in (TROUBLES | MORE_TROUBLES | QUIET).values()}
    assert expected == CODES.keys()


def test_the_finding_for_a_lock_has_its_start_and_the_blockers_line() -> None:
    found = diagnose(TROUBLES["row locked by our own code in another worker"].scene())[0]
    assert found.id == "DB04/default"
    assert found.severity is Severity.CRITICAL
    assert found.since == pytest.approx(NOW - 4.0)
    assert found.evidence["blockers"] == [
        {
            "pid": 99, "worker": 4713, "endpoint": "billing.pay", "where": "billing/pay.py:88 pay",
            "state": "idle in transaction", "seconds": 14.0, "client": None, "query": None,
            "application_name": "dbpool:default@web/4711", "statement": None, "wait": None,
        }
    ]  # fmt: skip
    assert "pg_terminate_backend(99)" in found.do


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("table that a migration rewrites", "pg_cancel_backend(99)"),
        ("migration on the primary of a replica", "A transaction on the primary holds the lock"),
        ("synchronous standby gone", "synchronous_standby_names"),
        ("process without files", "The database is not the cause"),
        ("workers that die in two ways", "gunicorn's timeout ended the worker"),
    ],
)
def test_the_advice_fits_the_cause(name: str, advice: str) -> None:
    assert advice in diagnose(MORE_TROUBLES[name].scene())[0].do


def test_a_checkout_is_recognised_again_although_its_start_jitters() -> None:
    def jittering(ago: int) -> dict[str, Any]:
        return full(4, holders(12, 15.0 - ago + (0.4 if ago % 2 else 0.0), "idle in transaction"))

    found = diagnose(
        Case("DB05", jittering, seconds=12, steps=ending_with(2, step(number=0))).scene()
    )
    assert found[0].code == "DB05"


def test_short_checkouts_of_one_thread_are_not_a_long_one() -> None:
    state = always(full(0, holders(12, 0.6, "idle in transaction")))
    assert diagnose(Case("DB00", state, seconds=20).scene())[0].code == "DB00"


def test_a_finding_limited_by_privileges_names_the_grant() -> None:
    found = diagnose(TROUBLES["lock whose holder our role may not see"].scene())[0]
    assert found.evidence["limited"] is True
    assert "GRANT pg_read_all_stats" in found.do


def test_an_error_shows_only_pid_and_application_name_of_foreign_sessions() -> None:
    foreign_session = replace(foreign(99), client="10.1.2.3", application_name="psql")
    view = server_view(own_session(5001, (99,), query_seconds=4.0), foreign_session)
    found = diagnose(Case("DB04", always(full(4, holders(12, 4.0, "query"))), view=view).scene())
    assert "10.1.2.3" in found[0].text
    (suspicion,) = suspicions(found).values()
    assert suspicion.startswith(
        "; DB04: 1 connection of default waits for a lock that the session 99"
    )
    assert "(psql)" in suspicion
    assert "10.1.2.3" not in suspicion
    assert suspicions(diagnose(Case("DB00", always(pool())).scene())) == {}


@pytest.mark.parametrize(
    ("application_name", "is_named"),
    [("dbpool:orders@web/4711", True), ("dbpool:orders@web/4712", False), ("psql", False)],
)
def test_a_lock_held_by_another_of_our_pools_is_named(
    application_name: str, is_named: bool
) -> None:
    blocker = own_session(
        99, is_ours=False, state="idle in transaction", application_name=application_name
    )
    held = [holder(9.0, "idle in transaction", pid=99, where="pay.py:8 pay")]
    report = {
        "time": NOW,
        "pools": {NAME: full(4, holders(3, 4.0, "query")), "orders": pool(holders=held)},
    }
    scene = Scene.read(report, views={NAME: server_view(*WAITERS, blocker)})
    found = next(each for each in diagnose(scene) if each.code == "DB04")
    assert ("orders.index (pay.py:8 pay) in worker 4711" in found.text) is is_named
    assert found.evidence["blockers"][0]["pid"] == 99


def test_timed_out_nested_checkouts_are_counted_since_the_first() -> None:
    found = diagnose(MORE_TROUBLES["nested, known from those who gave up"].scene())[0]
    assert found.evidence["timed_out"] == 3
    assert found.since == NOW - 2, "not since the last report"


def busy_rows(ago: int) -> dict[str, Any]:
    return full(4, holders(12, 0.4, "query", where=f"a.py:{ago}"))


@pytest.mark.parametrize("code", ["DB04", "DB07", "DB05"])
def test_an_older_server_view_is_not_used_for_later_checkouts(code: str) -> None:
    state = "idle in transaction" if code == "DB05" else "active"
    blocked_by = (99,) if code == "DB04" else ()
    sessions = [
        own_session(5001 + n, blocked_by, state=state, query_seconds=0.8, state_seconds=0.8)
        for n in range(12)
    ]
    view = replace(server_view(*sessions, foreign(99)), time=NOW - 6)
    found = diagnose(Case("DB00", busy_rows, seconds=6, view=view).scene())
    assert code not in {each.code for each in found}


def test_an_outage_is_a_notice_for_five_seconds_as_it_may_be_a_restart() -> None:
    def severity(seconds: float, **more: Any) -> Severity:
        state = failing("connection refused", seconds, **more)
        return diagnose(Scene.read({"time": NOW, "pools": {NAME: state}}))[0].severity

    assert [severity(3), severity(6)] == [Severity.NOTICE, Severity.CRITICAL]
    # A server that was never reached is not restarting.
    assert severity(3, counters={"connects": 0}) is Severity.CRITICAL


def test_code_that_forgot_connections_is_named() -> None:
    watch = Watch(
        forgotten=3, forgotten_since=NOW - 2, forgotten_by=(("orders.index", 2), ("a.py:1", 1))
    )
    scene = Scene.read({"time": NOW, "pools": {NAME: pool()}}, watches={NAME: watch})
    found = diagnose(scene)[0]
    assert "not returned by orders.index (2 times), a.py:1 (1 time)" in found.text
    assert found.evidence["endpoints"][0] == {"endpoint": "orders.index", "forgotten": 2}


def test_the_longest_queue_is_named_first() -> None:
    sessions = [
        own_session(1, (90,)),
        own_session(2, (91,)),
        own_session(3, (91,)),
        foreign(90),
        foreign(91),
    ]
    case = Case("DB04", always(full(4, holders(3, 4.0, "query"))), view=server_view(*sessions))
    found = diagnose(case.scene())[0]
    assert [blocker["pid"] for blocker in found.evidence["blockers"]] == [91, 90]
    assert "and 1 other" in found.text


def test_sessions_are_locked_if_half_of_the_busy_ones_are() -> None:
    idle = [own_session(pid, state="idle") for pid in range(10, 20)]
    busy = [own_session(pid) for pid in (20, 21, 22)]
    assert server_view(*WAITERS, *busy, *idle, foreign(99)).is_locked
    assert not server_view(*WAITERS, *busy, own_session(23), *idle).is_locked
    assert not server_view(*idle).is_locked


def test_a_chain_of_locks_is_followed_to_its_root() -> None:
    chain = [own_session(1, (2,)), foreign(2, "active", blocked_by=(3,)), foreign(3)]
    case = Case("DB04", always(full(4, holders(1, 4.0, "query"))), view=server_view(*chain))
    assert diagnose(case.scene())[0].evidence["blockers"][0]["pid"] == 3


def test_a_server_view_older_than_ten_seconds_is_not_used() -> None:
    case = TROUBLES["table locked by psql"]
    assert case.view is not None
    old = replace(case, view=replace(case.view, time=NOW - 11))
    assert "DB04" not in {each.code for each in diagnose(old.scene())}


def test_backend_pids_are_not_matched_behind_an_undeclared_pooler() -> None:
    case = TROUBLES["idle in transaction, the server says so"]
    assert case.view is not None
    not_joined = replace(case, view=replace(case.view, is_joined=False))
    assert "DB05" not in {each.code for each in diagnose(not_joined.scene())}


def test_findings_are_sorted_by_severity_then_duration() -> None:
    scene = Scene.read(
        {
            "time": NOW,
            "pools": {
                "a": failing("connection refused", 5),
                "b": failing("connection refused", 50),
                "c": failing('FATAL: role "x" does not exist', 10),
                "d": pool(max_size=120),
            },
        },
        views={"d": server_view(facts=FACTS)},
    )
    found = [(each.pool, each.code) for each in diagnose(scene)]
    assert found == [("b", "DB01"), ("c", "DB02"), ("a", "DB01"), ("d", "DB11")]


def test_more_connections_are_advised_only_if_the_server_has_room() -> None:
    case = TROUBLES["pool too small"]
    assert "60" not in diagnose(case.scene())[0].do
    assert "the server has 57 connections free" in diagnose(case.scene())[0].do
    full_server = replace(case, view=server_view(facts=FACTS))
    assert "no connections to spare" in diagnose(full_server.scene())[0].do


def test_texts_hold_no_control_characters_and_no_password() -> None:
    secret = "postgresql://shop:hunter22@db/shop"
    state = failing(f"cannot reach {secret}\x1b[31m\nnext", 3)
    scene = Scene.read({"time": NOW, "pools": {"a\x1b": state}})
    answer = json.dumps([each.to_json() for each in diagnose(scene)])
    assert "hunter22" not in answer
    assert "\\u001b" not in answer
    assert "DB01" in answer


# Properties of any report

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip
NUMBERS = st.integers(-1, 30) | st.floats(-1, 1e4) | st.none() | st.just(float("nan"))
HOLDERS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "seconds": NUMBERS, "where": JSON, "endpoint": st.none() | st.text(max_size=9),
            "pid": st.integers(0, 9) | st.none(), "worker": st.integers(0, 3), "waits": st.booleans(),
            "status": st.sampled_from(["query", "idle", "idle in transaction", "unknown"]),
        },
    ),
    max_size=6,
)  # fmt: skip
ERRORS = st.sampled_from([
    None, "connection refused", "sorry, too many clients already", "timeout expired",
    'too many connections for role "x"', "password authentication failed for user x",
])  # fmt: skip
POOLS = st.fixed_dictionaries(
    {},
    optional={
        "state": st.sampled_from(["up", "down", "starting", "stopped"]) | JSON,
        "active": NUMBERS, "idle": NUMBERS, "waiting": NUMBERS, "max_size": NUMBERS,
        "counters": st.dictionaries(st.sampled_from(["leaks", "timeouts", "nested"]), NUMBERS) | JSON,
        "breaker": st.fixed_dictionaries(
            {"state": st.sampled_from(["open", "closed", "half-open"]), "since": NUMBERS,
             "last_error": ERRORS}) | JSON,
        "holders": HOLDERS | JSON,
    },
)  # fmt: skip
REPORTS = st.fixed_dictionaries(
    {"pools": st.dictionaries(st.text(max_size=5), POOLS, max_size=3) | JSON},
    optional={"time": NUMBERS, "processes": JSON},
)
SESSIONS = st.builds(
    Session,
    pid=st.integers(0, 9),
    state=st.sampled_from(["active", "idle in transaction", None]),
    wait_type=st.sampled_from(["Lock", "IO", None]),
    wait_event=st.sampled_from(["DataFileRead", None]),
    backend_type=st.sampled_from(["client backend", "startup", None]),
    query_seconds=st.none() | st.floats(0, 99),
    state_seconds=st.none() | st.floats(0, 99),
    ddl=st.none() | st.just("ALTER TABLE"),
    is_ours=st.booleans(),
    blocked_by=st.lists(st.integers(0, 9), max_size=3).map(tuple),
)
VIEWS = st.builds(
    ServerView,
    time=st.just(NOW) | st.floats(0, 2e9),
    sessions=st.lists(SESSIONS, max_size=9).map(lambda found: {s.pid: s for s in found}),
    prepared=st.lists(st.builds(Prepared, st.text(max_size=5), st.floats(0, 99)), max_size=2).map(tuple),
    facts=st.none() | st.builds(ServerFacts, *[st.none() | st.integers(0, 99)] * 6),
    is_joined=st.booleans(),
    is_limited=st.booleans(),
    silent_since=st.none() | st.floats(NOW - 20, NOW),
    locked_since=st.none() | st.floats(NOW - 20, NOW),
)  # fmt: skip
STEPS = st.lists(
    st.none()
    | st.builds(
        step,
        wait=st.floats(0, 200),
        use=st.floats(0, 200),
        number=st.integers(0, 99),
        connects=st.integers(0, 99),
        settled_connects=st.integers(0, 99),
        refused=st.integers(0, 9),
        retries=st.integers(0, 99),
    ),
    max_size=30,
)


DEATHS = st.builds(Death, st.floats(), st.none() | st.integers(-99, 300))


@given(REPORTS | JSON, st.lists(VIEWS, max_size=3), STEPS, st.lists(DEATHS, max_size=4))
def test_no_report_breaks_the_diagnosis(
    report: Any, views: list[ServerView], steps: list[Step | None], deaths: list[Death]
) -> None:
    pools = report.get("pools") if isinstance(report, dict) else None
    names = list(pools) if isinstance(pools, dict) else []
    watcher = Watcher()
    watches = watcher.look(report, NOW - 1)
    watches = watcher.look(report, NOW)
    facts: dict[str, Any] = {
        "now": NOW, "watches": watches, "views": dict(zip(names, views, strict=False)),
        "steps": dict.fromkeys(names, steps), "deaths": tuple(deaths),
    }  # fmt: skip
    found = diagnose(Scene.read(report, **facts))
    repeated = diagnose(Scene.read(report, **facts))
    assert found
    assert [each.to_json() for each in found] == [each.to_json() for each in repeated]
    assert len({each.id for each in found}) == len(found), "two findings have one id"
    for each in found:
        answer = each.to_json()
        json.dumps(answer, allow_nan=False)
        assert answer["text"].isprintable()
        assert answer["id"].startswith(each.code)
    ranks = [list(Severity).index(each.severity) for each in found]
    assert ranks == sorted(ranks, reverse=True)


@given(st.permutations(["a", "b", "c"]))
def test_the_order_of_the_pools_changes_nothing(names: list[str]) -> None:
    state = failing("connection refused", 5)
    scene = Scene.read({"time": NOW, "pools": dict.fromkeys(names, state)})
    assert [each.pool for each in diagnose(scene)] == ["a", "b", "c"]


def test_an_id_stays_while_the_numbers_change() -> None:
    ids = set()
    for ago in range(5):
        state = failing("connection refused", 5 + ago, waiting=ago)
        ids.add(diagnose(Scene.read({"time": NOW, "pools": {NAME: state}}))[0].id)
    assert ids == {"DB01/default"}


def test_a_finding_has_a_json_form() -> None:
    found = Finding("DB01", Severity.CRITICAL, "it is down", "wait", NOW, "default")
    assert found.to_json() == {
        "id": "DB01/default", "code": "DB01", "severity": "critical", "pool": "default",
        "since": NOW, "text": "it is down", "do": "wait", "evidence": {},
    }  # fmt: skip
    assert found.title == "the database is down"


def test_each_code_has_a_page_that_explains_it() -> None:
    from dbpool.codes import pages

    assert CODES.keys() == {code for code in pages() if not code.startswith("DBE")}
