"""Many threads on 8 connections: throughput, the wait for a connection, and fairness."""

from __future__ import annotations

import threading
import time
from collections import deque
from statistics import median

from bench._measure import one_cpu, spread
from bench._peers import Dbpool, Floor, Peer, PsycopgPool, SQLAlchemy
from bench._report import Cell, Table
from tests.postgres import Server, served

BASE = PsycopgPool.name


def run(quick: bool) -> Table:
    """Let each peer serve as many threads as there are, for a second, in many turns."""
    seconds, rounds = (0.5, 1) if quick else (1.0, 15)
    peers: deque[type[Peer]] = deque([Dbpool, PsycopgPool, SQLAlchemy, Floor])
    table = Table("contention", "8 connections", [cls.name for cls in peers])
    with one_cpu(), served() as server:
        for count in (8, 64) if quick else (1, 8, 16, 64, 128):
            found: dict[str, list[dict[str, float]]] = {cls.name: [] for cls in peers}
            for _ in range(rounds):
                for cls in peers:
                    found[cls.name].append(_serve(server, cls, count, seconds))
                peers.rotate()
            for name in table.columns:
                table.put(f"{count} threads", name, _cell(found[name], found[BASE]))
    return table


def _serve(server: Server, cls: type[Peer], count: int, seconds: float) -> dict[str, float]:
    waits: list[list[float]] = [[] for _ in range(count)]
    with cls.opened(server.conninfo, 8, timeout=60.0) as peer:
        peer.fill(8)
        ready = threading.Barrier(count + 1)
        done = threading.Event()

        def work(thread_waits: list[float]) -> None:
            ready.wait()
            while not done.is_set():
                started_waiting = time.perf_counter()
                with peer.connection() as conn:
                    thread_waits.append(time.perf_counter() - started_waiting)
                    conn.execute("select 1")

        threads = [threading.Thread(target=work, args=(thread_waits,)) for thread_waits in waits]
        for thread in threads:
            thread.start()
        ready.wait()
        started = time.perf_counter()
        time.sleep(seconds)
        done.set()
        for thread in threads:
            thread.join()
        taken = time.perf_counter() - started
    served = [len(thread_waits) for thread_waits in waits]
    ranked = sorted(wait for thread_waits in waits for wait in thread_waits)
    return {
        "throughput": sum(served) / taken,
        "p50": ranked[len(ranked) // 2],
        "p99": ranked[int(len(ranked) * 0.99)],
        "p999": ranked[int(len(ranked) * 0.999)],
        "fairness": min(served) / max(served),
    }


def _cell(figures: list[dict[str, float]], base: list[dict[str, float]]) -> Cell:
    middle = {key: median(figure[key] for figure in figures) for key in figures[0]}
    ratios = {
        key: [own[key] / other[key] for own, other in zip(figures, base, strict=True)]
        for key in ("throughput", "p99")
    }
    ratio = {key: f"{median(each):.2f} x ±{spread(each):.2f}" for key, each in ratios.items()}
    text = (
        f"{middle['throughput']:.0f}/s ({ratio['throughput']}), "
        f"p50 {middle['p50'] * 1e3:.2f} p99 {middle['p99'] * 1e3:.2f} ({ratio['p99']}) "
        f"p99.9 {middle['p999'] * 1e3:.2f} ms, fair {middle['fairness']:.2f}"
    )
    values = {f"{key}_ratio": median(each) for key, each in ratios.items()}
    return Cell(text, {**middle, **values, "rounds": len(figures)})
