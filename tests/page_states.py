"""The content of `/stats` in each situation in which the live page is checked.

Made with the library's own classes: three workers, a quarter of an hour of history, and the
real findings of the diagnosis.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from math import sin
from typing import Any, Final

from dbpool.diagnosis import Scene, ServerFacts, ServerView, Session, diagnose, endpoints
from dbpool.diagnosis.history import BOUNDS, STEPS, Buckets, History, Step, slot_of
from dbpool.diagnosis.journal import Journal, Line
from dbpool.diagnosis.usage import Usage
from dbpool.diagnosis.watching import Watcher
from dbpool.metrics import (
    BreakerSnapshot,
    Counters,
    Histogram,
    HistogramSnapshot,
    HolderSnapshot,
    Snapshot,
)
from dbpool.report import Process, Report
from dbpool.settings import Settings
from dbpool.settings.app import AppSettings
from dbpool.settings.origins import describe_settings

Answer = dict[str, Any]

NOW: Final = 1_795_000_000.0
CLOCK: Final = 50_000.0  # monotonic
URL: Final = "postgresql://shop:a-password@db.internal/shop"
CALL_SITES: Final = (
    ("orders.index", "shop/orders.py:41 list_orders"),
    ("orders.create", "shop/orders.py:67 create_order"),
    ("stock.reserve", "shop/stock.py:23 reserve"),
    ("catalog.search", "shop/catalog.py:58 search"),
)


@cache
def durations(typical: float, count: int) -> HistogramSnapshot:
    """That many durations, spread around a typical one."""
    chance = random.Random(count)
    found = Histogram()
    for _ in range(min(count, 500)):
        found.add(typical * chance.lognormvariate(0, 0.9))
    shown = found.snapshot()
    factor = max(1, count // 500)
    counts = [n * factor for n in shown.counts]
    counts[shown.counts.index(max(shown.counts))] += count - sum(counts)
    return replace(shown, counts=tuple(counts), sum_ns=shown.sum_ns * factor)


def holders(
    number: int, seconds: float, status: str, worker: int = 4711, **more: Any
) -> tuple[HolderSnapshot, ...]:
    """Checked-out connections, the longest first."""
    found = []
    for n in range(number):
        endpoint, where = CALL_SITES[n % len(CALL_SITES)]
        known = {"endpoint": endpoint, "where": where} | more
        found.append(
            HolderSnapshot(
                thread=f"ThreadPoolExecutor-0_{n}", seconds=max(0.001, seconds - 0.13 * n),
                pid=5001 + n + (worker - 4711) * 10, worker=worker, status=status, **known,
            )
        )  # fmt: skip
    return tuple(found)


def worker(active: int, idle: int, *held: HolderSnapshot, **more: Any) -> Snapshot:
    """One worker's part of the pool, of four connections at most."""
    size = active + idle
    base = Snapshot(
        state="up", size=size, active=active, idle=idle, min_size=1, max_size=4, holders=held,
        counters=Counters(checkouts=98_214, connects=6, discarded={**Counters().discarded, "expired": 2}),
        wait=durations(0.0008, 98_214), use=durations(0.004, 98_214), connect=durations(0.006, 6),
    )  # fmt: skip
    return replace(base, **more)


def histogram(seconds: float, number: int) -> Buckets:
    """That many durations, spread around one."""
    chance = random.Random(number)
    counts = [0] * 12
    for _ in range(number):
        each = seconds * chance.lognormvariate(0, 0.8)
        counts[sum(bound < each for bound in BOUNDS)] += 1
    return Buckets(tuple(counts), seconds * number)


def history(recent: Callable[[int], Mapping[str, Any]], load: float = 1.0) -> History:
    """A quarter of an hour of normal load; *recent* returns changes for the step that many ago."""
    chance = random.Random(7)
    found = History()
    for ago in range(1, STEPS + 1):
        wave = load * (1.6 + 0.7 * sin(ago / 23.0) + 0.5 * chance.random())
        count = int(150 * wave)
        values: dict[str, Any] = {"in_use": wave, "size": 8.0, "checkouts": count, "connects": 0}
        wait, use = 0.0002 * wave, 0.004
        changed = dict(recent(ago))
        wait, use = changed.pop("wait", wait), changed.pop("use", use)
        values |= changed
        number = min(60, values["checkouts"])
        values |= {"settled_checkouts": values["checkouts"], "settled_connects": values["connects"]}
        found.add(
            slot_of(CLOCK) - ago,
            Step(wait=histogram(wait, number), use=histogram(use, number), **values),
        )
    return found


def answer(
    workers: Sequence[Snapshot],
    steps: History,
    *,
    ages: Sequence[float] = (0.2, 0.4, 0.7),
    view: ServerView | None = None,
    lines: Sequence[tuple[float, str, str, str]] = (),
    samples: int = 12,
) -> Answer:
    """The whole content of `/stats` at NOW."""
    parts = [
        Report(
            {"default": snapshot},
            (
                Process(
                    4711 + n,
                    start=str(n),
                    uptime=5400.0 + 7 * n,
                    age=age,
                    threads=8,
                    busy=min(8, snapshot.active + snapshot.waiting + 1),
                ),
            ),
        )
        for n, (snapshot, age) in enumerate(zip(workers, ages, strict=True))
    ]
    report = Report({}, time=NOW).merge(*parts)
    shown = report.to_json()
    watcher, usage = Watcher(), Usage()
    watches: Any = {}
    for ago in range(samples, -1, -1):
        earlier = earlier_report(shown, ago)
        watches = watcher.look(earlier, NOW - ago)
        usage.look(earlier, CLOCK - ago)
    view = view or ServerView(NOW - 2, facts=FACTS)
    scene = Scene.read(
        shown, now=NOW, steps={"default": steps.last(CLOCK)}, watches=watches,
        views={"default": view},
    )  # fmt: skip
    started = [
        Line(NOW - 5400 + n, "", "worker started", f"worker {4711 + n} started") for n in range(3)
    ]
    journal = Journal([*started, *(Line(NOW - ago, *rest) for ago, *rest in lines)])
    settings = Settings(conninfo=URL, max_size=4, timeout=5.0)
    environ = {"DATABASE_URL": URL, "DBPOOL_MAX_SIZE": "4"}
    application = AppSettings(token="a-token-of-some-length")
    return shown | {
        "findings": [finding.to_json() for finding in diagnose(scene)],
        "history": {
            "step": 5.0,
            "until": NOW,
            "pools": {"default": steps.to_json(CLOCK)},
            "minute": {"default": steps.minute(CLOCK)},
        },
        "journal": journal.to_json(),
        "endpoints": {"default": endpoints.to_json(used(lines), usage.to_json()["default"])},
        "workers": report.workers_to_json(),
        "servers": {
            "default": view.about() if view.facts else ServerView(NOW, facts=FACTS).about()
        },
        "settings": describe_settings(
            {"default": settings}, {}, {}, application, environ | {"DBPOOL_TOKEN": "x"}
        ),
    }


def earlier_report(report: Answer, ago: float) -> Answer:
    """The report as it was *ago* seconds before; younger holders are replaced by earlier ones."""
    pools = {}
    for name, pool in report["pools"].items():
        held = [
            each | {"seconds": each["seconds"] - ago}
            if each["seconds"] > ago
            else each | {"status": "query", "waits": False}
            for each in pool["holders"]
        ]
        pools[name] = pool | {"holders": held}
    return report | {"time": report["time"] - ago, "pools": pools}


def later(shown: Answer, checkouts: int) -> Answer:
    """The same report a second later, after that many more checkouts."""
    pools = {
        name: pool | {"counters": pool["counters"] | {"checkouts": pool["counters"]["checkouts"] + checkouts}}
        for name, pool in shown["pools"].items()
    }  # fmt: skip
    return shown | {"time": shown["time"] + 1.0, "pools": pools}


FACTS: Final = ServerFacts(
    max_connections=100, reserved=3, used=31, ours=12, role="primary", version="18.4",
    latency=0.00041, tls=True,
)  # fmt: skip


def used(lines: Sequence[tuple[float, str, str, str]]) -> endpoints.Rows:
    """What each endpoint used, the first the most."""
    found = {}
    for n, (name, _) in enumerate(CALL_SITES):
        count = 120_000 // (n + 1)
        wait, use = (histogram(typical, 500).counts for typical in (0.00004, 0.003 + 0.002 * n))
        spread = [number * count // 500 for number in (*wait, *use)]
        forgotten = sum(event == "forgotten" and not n for _, _, event, _ in lines)
        found[name] = [0, forgotten, count * 5_000_000, *spread]
    return found


def nothing(ago: int) -> dict[str, Any]:
    """No changes: a normal quarter of an hour."""
    return {}


def up() -> Answer:
    """Low load."""
    return answer(
        [worker(0, 2), worker(1, 1, *holders(1, 0.003, "query")), worker(0, 2)],
        history(nothing, 0.5),
    )


def busy() -> Answer:
    """High load, with enough connections."""
    parts = [worker(3, 1, *holders(3, 0.3, "query", 4711 + n)) for n in range(3)]
    return answer(parts, history(lambda ago: {"size": 12.0}, 4.0))


def full() -> Answer:
    """More callers than connections, for a while."""

    def recent(ago: int) -> dict[str, Any]:
        if ago > 14:
            return {}
        return {
            "in_use": 12.0,
            "size": 12.0,
            "waiting": 9,
            "wait": 0.15,
            "use": 0.006,
            "checkouts": 900,
            "refused": 6,
        }

    wait = durations(0.05, 98_214)
    counters = Counters(checkouts=98_214, connects=6, timeouts=28)
    parts = [
        worker(4, 0, *holders(4, 0.5, "query", 4711 + n), waiting=3, wait=wait, counters=counters)
        for n in range(3)
    ]
    lines = [(70.0, "default", "full", "all 12 connections in use, callers wait")]
    return answer(parts, history(recent, 3.0), lines=lines)


def down() -> Answer:
    """The server refuses connections."""
    error = 'connection failed: connection to server at "10.0.3.7", port 5432 failed: Connection refused'
    breaker = BreakerSnapshot("open", NOW - 41, error, 0.6, "refused")

    def recent(ago: int) -> dict[str, Any]:
        return {"in_use": 0.0, "size": 0.0, "checkouts": 0, "refused": 39} if ago <= 8 else {}

    counters = Counters(checkouts=98_214, connects=6, rejected=104, connect_failures=58)
    parts = [
        worker(0, 0, state="down", size=1, connecting=1, breaker=breaker, counters=counters)
        for _ in range(3)
    ]
    lines = [(41.0, "default", "down", f"down: {error}")]
    return answer(parts, history(recent), lines=lines, view=ServerView(NOW - 300, facts=FACTS))


def locked() -> Answer:
    """A report has locked a table."""
    counters = Counters(checkouts=98_214, connects=6, timeouts=4)
    parts = [
        worker(4, 0, *holders(4, 14.0, "query", 4711 + n), waiting=2, counters=counters)
        for n in range(3)
    ]

    def recent(ago: int) -> dict[str, Any]:
        if ago > 2:
            return {}
        return {
            "in_use": 12.0,
            "size": 12.0,
            "waiting": 6,
            "checkouts": 0,
            "refused": 12 * (ago == 1),
        }

    report = Session(17023, "idle in transaction", state_seconds=15.2, transaction_seconds=16.0,
                     application_name="nightly report", user="reports", client="10.0.3.9")  # fmt: skip
    waiting = [
        Session(holder.pid or 0, "active", wait_type="Lock", is_ours=True, query_seconds=13.9, blocked_by=(17023,))
        for part in parts for holder in part.holders
    ]  # fmt: skip
    sessions = {each.pid: each for each in [report, *waiting]}
    lines = [(11.0, "default", "full", "all 12 connections in use, callers wait")]
    view = ServerView(NOW - 0.5, sessions, facts=replace(FACTS, used=33))
    return answer(parts, history(recent, 2.4), view=view, lines=lines)


def nested() -> Answer:
    """Requests that hold a connection wait for another one."""
    held = [
        tuple(
            replace(each, waits=True) for each in holders(4, 3.1, "idle in transaction", 4711 + n)
        )
        for n in range(3)
    ]
    counters = Counters(checkouts=98_214, connects=6, leaks=3, timeouts=9)
    parts = [worker(4, 0, *each, waiting=4, counters=counters) for each in held]

    def recent(ago: int) -> dict[str, Any]:
        return (
            {"in_use": 12.0, "waiting": 12, "refused": 4, "checkouts": 2, "forgotten": 1}
            if ago <= 2
            else {}
        )

    lines = [(9.0, "default", "forgotten", "1 connection forgotten by the application")]
    return answer(parts, history(recent), lines=lines)


def silent() -> Answer:
    """One worker publishes nothing any more."""
    parts = [
        worker(1, 1, *holders(1, 0.02, "query")),
        worker(0, 2),
        worker(2, 1, *holders(2, 48.0, "query", 4713)),
    ]
    return answer(parts, history(nothing), ages=(0.3, 0.6, 47.0))


def many() -> Answer:
    """Sixteen workers, each with many holders."""
    parts = [worker(4, 0, *holders(4, 9.0, "query", 4711 + n), waiting=3) for n in range(16)]
    lines = [
        (float(n), "default", "forgotten", f"{n} connections forgotten by the application " * 3)
        for n in range(120)
    ]
    shown = answer(parts, history(nothing, 9.0), ages=[0.123456] * 16, lines=lines)
    names = [f"shop.department_{n}.some_rather_long_name_of_an_endpoint" for n in range(50)]
    rows = [shown["endpoints"]["default"][0] | {"endpoint": name} for name in names]
    return shown | {"endpoints": {"default": rows}}


RATES: Final = {"up": 27, "busy": 215, "full": 180, "silent": 54}  # checkouts a second
STATES: Final[Mapping[str, Callable[[], Answer]]] = {
    each.__name__: each for each in (up, busy, full, down, locked, nested, silent)
}
