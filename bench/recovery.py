"""What happens to callers when the database restarts, goes away, hangs or refuses.

Every case really happens on a private server; the peers run it in turns, in the same run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psycopg

from bench._peers import PEERS, Dbpool, Peer, PsycopgPool
from bench._report import Cell, Table
from tests.postgres import Server, free_port, served, until
from tests.proxy import Proxy

ROOT = Path(__file__).parent.parent
MAX_SECONDS = 60.0  # seconds after which a peer counts as hanging
REPETITIONS = 5
MAX_CASE_SECONDS = 25.0  # seconds that a peer may spend on a case before it is not run again

Figures = dict[str, Any]  # the result of one case for one peer; times in seconds, None for never
Results = Sequence[Figures]


def run(quick: bool) -> Table:
    """Run all cases against all peers that have an answer to them."""
    table = Table("recovery", "What a caller meets", [peer.name for peer in PEERS])
    compare = partial(_compare, table, 1 if quick else REPETITIONS)
    # Where other peers wait or hang for long, a quick run measures dbpool alone.
    slow_case_peers = PEERS[:1] if quick else PEERS
    quick_peers = [peer for peer in PEERS if not (quick and issubclass(peer, PsycopgPool))]
    outage, seconds, length = (3.0, 1.0, 2.0) if quick else (20.0, 10.0, 6.0)
    with _server() as server:
        for mode in ("immediate",) if quick else ("immediate", "fast"):
            title = f"restart ({mode}), 10 idle, next 30 requests"
            compare(partial(_restart, server, mode), quick_peers, {title: _first_and_errors})
        rows = {
            f"{outage:.0f} s outage under load: served after": _after,
            "the same: a call while it is down": _call,
        }
        compare(partial(_outage, server, outage), slow_case_peers, rows)
        for kind, params in (
            ("password", {"user": "app", "password": "wrong"}),
            ("role", {"user": "nobody_here", "password": "x"}),
            ("database", {"dbname": "nowhere"}),
        ):
            conninfo = server.conninfo_for(**params)
            compare(partial(_refused, conninfo), quick_peers, {f"wrong {kind}": _seconds_and_error})
        title = "all frozen, idle for 60 s, timeout 2: call; after thaw"
        compare(partial(_frozen, server), slow_case_peers, {title: _call_and_after})
        title = "10 idle for 60 s, network silent: first answer"
        compare(partial(_silent, server), slow_case_peers, {title: _first})
        title = "100 dead: until one is served"
        compare(partial(_many_dead, server), slow_case_peers, {title: _first_and_errors})
        title = "100 dead and no server: all given up"
        compare(partial(_evict_dead, server), [Dbpool], {title: _seconds_and_dead})
        title = f"16 threads, room for 8, {seconds:.0f} s"
        compare(partial(_full, seconds), quick_peers, {title: _served_and_failed})
        title = "restarts under run(idempotent=True)"
        compare(partial(_run_restarts, server, length), [Dbpool], {title: _calls_and_rows})
    title = "gunicorn --preload, 3 workers, 300 requests"
    compare(_preload, PEERS[: 1 if quick else 2], {title: _shared_and_stop})
    return table


def _compare(
    table: Table,
    times: int,
    case: Callable[[type[Peer]], Figures],
    peers: Sequence[type[Peer]],
    rows: Mapping[str, Callable[[Results], Cell]],
) -> None:
    """Run a case for all peers in turns, *times* times; a peer that takes long is run less often.

    *rows* maps the titles of its rows in the table to functions that summarize the results.
    """
    turns = deque(peers)
    results: dict[type[Peer], list[Figures]] = {peer: [] for peer in peers}
    taken = dict.fromkeys(peers, 0.0)
    for _ in range(times):
        for peer in turns:
            if taken[peer] < MAX_CASE_SECONDS:
                started = time.monotonic()
                results[peer].append(case(peer))
                taken[peer] += time.monotonic() - started
        turns.rotate()
    for title, summarize in rows.items():
        for peer, figures in results.items():
            table.put(title, peer.name, summarize(figures))


# Cells of the table: times as medians, failures as the worst round.


def _first(results: Results) -> Cell:
    return _times(results, "first")


def _first_and_errors(results: Results) -> Cell:
    return _times(results, "first", f", {_worst(results, 'errors')} errors")


def _after(results: Results) -> Cell:
    return _times(results, "after")


def _call(results: Results) -> Cell:
    return _times(results, "call", never="waits")


def _call_and_after(results: Results) -> Cell:
    return _times(results, "call", f"; {_time(results, 'after')}", never="hangs until the thaw")


def _seconds_and_error(results: Results) -> Cell:
    return _times(results, "seconds", f", {results[0]['error']}")


def _seconds_and_dead(results: Results) -> Cell:
    return _times(results, "seconds", f", {min(figures['dead'] for figures in results)} given up")


def _served_and_failed(results: Results) -> Cell:
    served = median(figures["served"] for figures in results)
    return Cell(f"{served:.0f} served, {_worst(results, 'failed')} failed", _values(results))


def _calls_and_rows(results: Results) -> Cell:
    calls, failed, rows = (
        sum(each[key] for each in results) for key in ("calls", "failed", "rows")
    )
    return Cell(f"{calls} calls, {failed} failed, {rows} rows", _values(results))


def _shared_and_stop(results: Results) -> Cell:
    failures = f"{_worst(results, 'shared')} shared, {_worst(results, 'failed')} failed"
    return Cell(f"{failures}, stops in {_time(results, 'stop')}", _values(results))


def _times(results: Results, key: str, rest: str = "", never: str = "") -> Cell:
    """The times of that name, then *rest*; *never* is shown if one did not come."""
    times = [figures[key] for figures in results if figures[key] is not None]
    drawn = {"seconds": median(times)} if times else {}
    return Cell(f"{_time(results, key, never)}{rest}", _values(results) | drawn)


def _values(results: Results) -> Figures:
    return {"rounds": len(results), "figures": results}


def _worst(results: Results, key: str) -> int:
    worst: int = max(figures[key] for figures in results)
    return worst


def _time(results: Results, key: str, never: str = "") -> str:
    """The median of the times of that name, and the longest if there are more than two."""
    times = [figures[key] for figures in results if figures[key] is not None]
    if len(times) < len(results):
        return never or f"none in {results[0]['given']:.0f} s"
    longest = f" (at most {_seconds(max(times))})" if len(times) > 2 else ""
    return f"{_seconds(median(times))}{longest}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.4g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


# The cases, each run once for one peer.


@contextlib.contextmanager
def _server(**options: object) -> Iterator[Server]:
    with served(**options) as server:
        server.execute("create role app login password 'right'")
        yield server


def _restart(server: Server, mode: str, cls: type[Peer]) -> Figures:
    with cls.opened(server.conninfo, 10) as peer:
        peer.fill(10)
        server.restart(mode)
        started, first, errors = time.monotonic(), None, 0
        for _ in range(30):
            try:
                peer.query()
            except Exception:  # noqa: BLE001  # whatever a peer raises is an error to its user
                errors += 1
            else:
                first = first or time.monotonic() - started
    return {"first": first, "errors": errors, "given": time.monotonic() - started}


def _outage(server: Server, length: float, cls: type[Peer]) -> Figures:
    calls: list[tuple[float, float, bool]] = []
    done = threading.Event()

    def load(peer: Peer) -> None:
        while not done.is_set():
            started, ok = time.monotonic(), True
            try:
                peer.query()
            except Exception:  # noqa: BLE001  # as above
                ok = False
            calls.append((started, time.monotonic(), ok))
            done.wait(0.01)

    with cls.opened(server.conninfo, 8) as peer:
        peer.fill(8)
        threads = [threading.Thread(target=load, args=(peer,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        down = time.monotonic()
        server.stop("fast")
        time.sleep(length)
        server.start()
        restarted = time.monotonic()
        with contextlib.suppress(AssertionError):
            until(lambda: any(ok and started > down + 3 for started, _, ok in calls[-500:])
                  or any(ok and ended > restarted for _, ended, ok in calls[-500:]), MAX_SECONDS)  # fmt: skip
        done.set()
        for thread in threads:
            thread.join(MAX_SECONDS)
    served = min((ended for _, ended, ok in calls if ok and ended > down + 2), default=None)
    refused = [
        ended - started
        for started, ended, ok in calls
        if not ok and down + 2.5 < started < restarted
    ]
    return {
        "after": None if served is None else max(0.0, served - restarted),
        "call": median(refused) if refused else None,
        "given": MAX_SECONDS,
    }


def _refused(conninfo: str, cls: type[Peer]) -> Figures:
    with cls.opened(conninfo, 4) as peer:
        started = time.monotonic()
        try:
            peer.query()
        except Exception as ex:  # noqa: BLE001  # as above
            seconds = time.monotonic() - started
            cause = "with cause" if _names_a_cause(ex) else "no cause"
            return {"seconds": seconds, "error": f"{type(ex).__name__}, {cause}"}
    raise AssertionError("it was let in")


def _names_a_cause(ex: BaseException) -> bool:
    return ex.__cause__ is not None or "FATAL" in str(ex)


def _frozen(server: Server, cls: type[Peer]) -> Figures:
    with cls.opened(server.conninfo, 4, timeout=2.0) as peer:
        peer.fill(4)
        server.freeze([*server.backends(), server.postmaster_pid])
        done = threading.Event()
        waits: list[float] = []

        def call() -> None:
            started = time.monotonic()
            with contextlib.suppress(Exception):
                peer.checkout()
            waits.append(time.monotonic() - started)
            done.set()

        peer.age()
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        returned = done.wait(8.0)
        server.thaw()
        thawed = time.monotonic()
        thread.join(MAX_SECONDS)
        while time.monotonic() < thawed + MAX_SECONDS:
            try:
                peer.query()
                break
            except Exception:  # noqa: BLE001  # as above
                time.sleep(0.01)
        after = time.monotonic() - thawed
    return {"call": waits[0] if returned else None, "after": after}


def _silent(server: Server, cls: type[Peer]) -> Figures:
    proxy = Proxy(server.port)
    proxy.listen()
    try:
        with cls.opened(proxy.conninfo, 10) as peer:
            peer.fill(10)
            peer.age()
            proxy.go_silent()
            done = threading.Event()

            def call() -> None:
                with contextlib.suppress(Exception):
                    peer.query()
                    done.set()

            started = time.monotonic()
            threading.Thread(target=call, daemon=True).start()
            answered = done.wait(15.0)
            seconds = time.monotonic() - started
            proxy.drop()
    finally:
        proxy.close()
    return {"first": seconds if answered else None, "given": seconds}


def _many_dead(server: Server, cls: type[Peer]) -> Figures:
    with cls.opened(server.conninfo, 100) as peer:
        peer.fill(100)
        server.restart("immediate")
        started, first, errors = time.monotonic(), None, 0
        while first is None and time.monotonic() < started + MAX_SECONDS:
            try:
                peer.query()
            except Exception:  # noqa: BLE001  # as above
                errors += 1
            else:
                first = time.monotonic() - started
    return {"first": first, "errors": errors, "given": MAX_SECONDS}


def _evict_dead(server: Server, cls: type[Peer]) -> Figures:
    """Ask once without waiting: all the time it takes is for evicting dead connections."""
    with cls.opened(server.conninfo, 100) as peer:
        peer.fill(100)
        server.stop("immediate")
        started = time.monotonic()
        with contextlib.suppress(psycopg.OperationalError):
            peer.pool.getconn(timeout=0)
        seconds = time.monotonic() - started
        dead = peer.pool.stats().counters.discarded["dead"]
        server.start()
    return {"seconds": seconds, "dead": dead}


def _full(length: float, cls: type[Peer]) -> Figures:
    options = {"max_connections": 11, "superuser_reserved_connections": 3}
    with _server(reserved_connections=0, **options) as server:
        conninfo = server.conninfo_for(user="app", password="right")
        served, failed = [0] * 16, [0] * 16
        with cls.opened(conninfo, 16, timeout=5.0) as peer:
            end = time.monotonic() + length

            def work(n: int) -> None:
                while time.monotonic() < end:
                    try:
                        peer.query("select pg_sleep(0.005)")
                        served[n] += 1
                    except Exception:  # noqa: BLE001  # as above
                        failed[n] += 1

            threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(MAX_SECONDS)
    return {"served": sum(served), "failed": sum(failed)}


def _run_restarts(server: Server, length: float, cls: type[Peer]) -> Figures:
    server.execute("drop table if exists inserts")
    server.execute("create table inserts (id text primary key)")
    # Idempotent: an insert whose answer was lost is not there twice.
    insert = "insert into inserts values (%s) on conflict do nothing"
    calls, failed = [0] * 8, [0] * 8
    with cls.opened(server.conninfo, 6) as peer:
        end = time.monotonic() + length

        def work(n: int) -> None:
            while time.monotonic() < end:
                calls[n] += 1
                try:
                    peer.pool.run(
                        lambda conn, key: conn.execute(insert, [key]),
                        f"{n}-{calls[n]}",
                        idempotent=True,
                        timeout=15,
                    )
                except psycopg.Error:
                    failed[n] += 1

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for mode in ("immediate", "fast"):
            time.sleep(length / 6)
            server.restart(mode)
        for thread in threads:
            thread.join(MAX_SECONDS)
        rows = peer.pool.fetch_value("select count(*) from inserts")
    return {"calls": sum(calls), "failed": sum(failed), "rows": rows}


_APP = """
import os
from bench._peers import {peer}
peer = {peer}({conninfo!r}, 4)
peer.query()  # used at import: the master has the pool open

def application(environ, start_response):
    try:
        body = f"{{os.getpid()}} {{peer.query('select pg_backend_pid()')}}".encode()
        start_response("200 OK", [("Content-Type", "text/plain")])
    except Exception as ex:
        body = repr(ex).encode()
        start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
    return [body]
"""


def _preload(cls: type[Peer]) -> Figures:
    with _server() as server, tempfile.TemporaryDirectory() as directory:
        code = _APP.format(peer=cls.__name__, conninfo=server.conninfo)
        Path(directory, "preloaded.py").write_text(code)
        port = free_port()
        gunicorn = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "--preload", "-w3", "--threads=4", "-b",
             f"127.0.0.1:{port}", "--chdir", directory, "--no-control-socket",
             "--log-level=critical", "preloaded"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )  # fmt: skip
        answers: list[str] = []

        def ask(_: object) -> None:
            with contextlib.suppress(Exception):
                url = f"http://127.0.0.1:{port}/"
                with urllib.request.urlopen(url, timeout=5) as answer:
                    answers.append(answer.read().decode())

        try:
            until(lambda: _listens(port), 20.0)
            with ThreadPoolExecutor(12) as threads:
                list(threads.map(ask, range(300)))
            started = time.monotonic()
            gunicorn.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                gunicorn.wait(45)
            seconds = time.monotonic() - started
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(gunicorn.pid, signal.SIGKILL)
            gunicorn.wait()
    workers_by_backend: dict[str, set[str]] = {}
    for worker, backend in map(str.split, answers):
        workers_by_backend.setdefault(backend, set()).add(worker)
    shared = sum(len(workers) > 1 for workers in workers_by_backend.values())
    return {"shared": shared, "failed": 300 - len(answers), "stop": seconds}


def _listens(port: int) -> bool:
    with (
        contextlib.suppress(OSError),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2),
    ):
        return True
    return False
