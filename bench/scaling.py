"""What grows with what: cost by pool size and by waiters, memory, and the time to import."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import tracemalloc
from functools import partial
from statistics import median
from typing import Any
from weakref import ref

from psycopg_pool import ConnectionPool

from bench._measure import interleaved, one_cpu, spread
from bench._peers import Dbpool, Peer, PsycopgPool
from bench._report import Cell, Table
from dbpool import Pool
from dbpool.pool._waiting import Waiter
from tests.postgres import Server, served, until

PEERS: list[type[Peer]] = [Dbpool, PsycopgPool]


def run(quick: bool) -> Table:
    """Measure dbpool beside the pool it wraps."""
    table = Table("scaling", "What grows with what", [cls.name for cls in PEERS])
    rounds = 1 if quick else 25
    with served(max_connections=800) as server:
        _sizes(server, table, (4, 16) if quick else (1, 4, 16, 64, 256), rounds)
        _waiters(server, table, (8, 64) if quick else (8, 64, 256), rounds)
        _memory(server, table)
    _imports(table, 3 * rounds)  # the ratio of two is the least certain
    return table


def _sizes(server: Server, table: Table, sizes: tuple[int, ...], rounds: int) -> None:
    peers: dict[tuple[str, int], Any] = {}
    for size in sizes:
        peers[Dbpool.name, size] = Pool(server.conninfo, min_size=size, max_size=size, open=True)
        peers[PsycopgPool.name, size] = ConnectionPool(
            server.conninfo, min_size=size, max_size=size, open=True
        )
    for pool in peers.values():
        pool.wait()

    def check_out(pool: Any) -> None:
        with pool.connection():
            pass

    with one_cpu():
        calls = {f"{n}|{s}": (lambda p=pool: check_out(p)) for (n, s), pool in peers.items()}
        figures = interleaved(calls, 100, 40 * rounds)
    for (name, size), pool in peers.items():
        seconds = median(figures[f"{name}|{size}"])
        pairs = zip(figures[f"{name}|{size}"], figures[f"{name}|4"], strict=True)
        ratios = [value / base for value, base in pairs]
        ratio = median(ratios)
        text = f"{seconds * 1e6:.1f} us ({ratio:.2f} x ±{spread(ratios):.2f} of a pool of 4)"
        table.put(f"checkout, pool of {size}", name, Cell(text, {"median": seconds, "of_4": ratio}))
        pool.close()


def _waiters(server: Server, table: Table, counts: tuple[int, ...], rounds: int) -> None:
    """Hand one connection through a queue of so many waiters."""
    for count in counts:
        figures: dict[str, list[float]] = {cls.name: [] for cls in PEERS}
        with one_cpu():
            for _ in range(rounds):
                for cls in PEERS:
                    figures[cls.name].append(_hand_over(server, cls, count))
        for name, seconds in figures.items():
            each = median(seconds)
            text = f"{each * 1e6:.1f} us each ±{spread(seconds) / each:.0%}"
            table.put(f"hand-over, {count} waiters", name, Cell(text, {"seconds": each}))


def _hand_over(server: Server, cls: type[Peer], count: int) -> float:
    with cls.opened(server.conninfo, 1, timeout=60.0) as peer:
        peer.query()
        held = peer.pool.getconn()
        threads = [threading.Thread(target=peer.checkout) for _ in range(count)]
        for thread in threads:
            thread.start()
        until(partial(_waiting, peer, count), 30.0)
        started = time.perf_counter()
        peer.pool.putconn(held)
        for thread in threads:
            thread.join()
        return (time.perf_counter() - started) / count


def _waiting(peer: Peer, count: int) -> bool:
    return bool(peer.pool.get_stats()["requests_waiting"] == count)


def _memory(server: Server, table: Table) -> None:
    for name, make in ((Dbpool.name, Pool), (PsycopgPool.name, ConnectionPool)):
        make(server.conninfo, open=False)  # excludes what is allocated only once
        tracemalloc.start()
        pools = [make(server.conninfo, open=False) for _ in range(20)]
        pool_bytes = tracemalloc.get_traced_memory()[0] / len(pools)
        pool: Any = make(server.conninfo, min_size=20, max_size=20, open=True)
        before = tracemalloc.get_traced_memory()[0]
        pool.wait()
        connection_bytes = (tracemalloc.get_traced_memory()[0] - before) / 20
        pool.close()
        tracemalloc.stop()
        for row, size in (("memory of a pool", pool_bytes), ("of a connection", connection_bytes)):
            table.put(row, name, Cell(f"{size / 1024:.1f} KiB", {"bytes": size}))
    tracemalloc.start()
    owner = ref(table)
    waiters = [Waiter(owner, 0.0, 0.0) for _ in range(1000)]
    size = tracemalloc.get_traced_memory()[0] / len(waiters)
    tracemalloc.stop()
    table.put("of a waiter", Dbpool.name, Cell(f"{size:.0f} B", {"bytes": size}))


def _imports(table: Table, rounds: int) -> None:
    """Import in fresh processes, in turns; what was installed has been compiled."""
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    script = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
    # `import dbpool` alone imports nothing: what is public comes on first use.
    statements = {"dbpool": "from dbpool import *", "psycopg_pool": "import psycopg_pool"}
    figures: dict[str, list[float]] = {name: [] for name in statements}
    for _ in range(rounds):
        for name, seconds in figures.items():
            command = [sys.executable, "-c", script.format(statements[name])]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
            seconds.append(float(done.stdout))
    for name, seconds in figures.items():
        ratios = [
            value / base_value
            for value, base_value in zip(seconds, figures["psycopg_pool"], strict=True)
        ]
        text = f"{median(seconds) * 1e3:.0f} ms ({median(ratios):.2f} x ±{spread(ratios):.2f})"
        table.put("import", name, Cell(text, {"median": median(seconds), "ratio": median(ratios)}))
