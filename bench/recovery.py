"""What happens to callers when the database restarts, goes away, hangs or refuses.

Every case is made for real on a private server, and every peer meets it in the same run.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import psycopg

from bench._peers import PEERS, Dbpool, Peer, PsycopgPool
from bench._report import Cell, Table
from tests.postgres import Server, free_port, until
from tests.proxy import Proxy

ROOT = Path(__file__).parent.parent
PATIENCE = 60.0  # seconds after which a peer is given up


def run(quick: bool) -> Table:
    """Run all cases against all peers that have an answer to them."""
    table = Table("recovery", "What a caller meets", [peer.name for peer in PEERS])
    outage, seconds = (3.5, 2.0) if quick else (20.0, 10.0)
    with _server() as server:
        for mode in ("immediate",) if quick else ("immediate", "fast"):
            for peer in _fit_for(quick):
                cell = _restart(server, peer, mode)
                table.put(f"restart ({mode}), 10 idle, next 30 requests", peer.name, cell)
        # Where the others wait or hang for long, a quick run is ours alone.
        those = PEERS[: 1 if quick else None]
        for peer in those:
            served, refused = _outage(server, peer, outage)
            table.put(f"{outage:.0f} s outage under load: served after", peer.name, served)
            table.put("the same: a call while it is down", peer.name, refused)
        for kind, params in (
            ("password", {"user": "app", "password": "wrong"}),
            ("role", {"user": "nobody_here", "password": "x"}),
            ("database", {"dbname": "nowhere"}),
        ):
            for peer in _fit_for(quick):
                conninfo = server.conninfo_for(**params)
                table.put(f"wrong {kind}", peer.name, _refused(conninfo, peer, quick))
        for peer in those:
            table.put("all frozen, timeout 2: call; after thaw", peer.name, _frozen(server, peer))
            table.put("10 idle, network silent: first answer", peer.name, _silent(server, peer))
            table.put("100 dead: until one is served", peer.name, _many_dead(server, peer))
        for peer in _fit_for(quick):
            table.put(f"16 threads, room for 8, {seconds:.0f} s", peer.name, _full(peer, seconds))
        table.put("restarts under run(idempotent=True)", Dbpool.name, _run_restarts(server))
    for peer in PEERS[: 1 if quick else 2]:
        table.put("gunicorn --preload, 3 workers, 300 requests", peer.name, _preload(peer))
    return table


def _fit_for(quick: bool) -> list[type[Peer]]:
    """All peers; a quick run leaves out those that need half a minute for a case."""
    return [peer for peer in PEERS if not (quick and issubclass(peer, PsycopgPool))]


@contextlib.contextmanager
def _server(**options: object) -> Iterator[Server]:
    server = Server(**options)  # type: ignore[arg-type]
    try:
        server.start()
        server.execute("create role app login password 'right'")
        yield server
    finally:
        server.close()


def _restart(server: Server, cls: type[Peer], mode: str) -> Cell:
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
    seconds = PATIENCE if first is None else first
    return Cell(f"{_time(seconds)}, {errors} errors", {"first": seconds, "errors": errors})


def _outage(server: Server, cls: type[Peer], length: float) -> tuple[Cell, Cell]:
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
        back = time.monotonic()
        with contextlib.suppress(AssertionError):
            until(lambda: any(ok and started > down + 3 for started, _, ok in calls[-500:])
                  or any(ok and ended > back for _, ended, ok in calls[-500:]), PATIENCE)  # fmt: skip
        done.set()
        for thread in threads:
            thread.join(PATIENCE)
    served = min(
        (ended for _, ended, ok in calls if ok and ended > down + 2), default=PATIENCE + back
    )
    refused = [
        ended - started for started, ended, ok in calls if not ok and down + 2.5 < started < back
    ]
    after = max(0.0, served - back)
    call = median(refused) if refused else length
    return (
        Cell(_time(after), {"seconds": after}),
        Cell(_time(call) if refused else "waits", {"seconds": call}),
    )


def _refused(conninfo: str, cls: type[Peer], quick: bool) -> Cell:
    with cls.opened(conninfo, 4) as peer:
        started = time.monotonic()
        try:
            peer.query()
        except Exception as ex:  # noqa: BLE001  # as above
            seconds = time.monotonic() - started
            told = "with cause" if _names_a_cause(ex) else "no cause"
            return Cell(f"{_time(seconds)}, {type(ex).__name__}, {told}", {"seconds": seconds})
    raise AssertionError("it was let in")


def _names_a_cause(ex: BaseException) -> bool:
    return ex.__cause__ is not None or "FATAL" in str(ex)


def _frozen(server: Server, cls: type[Peer]) -> Cell:
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
        thread.join(PATIENCE)
        while time.monotonic() < thawed + PATIENCE:
            try:
                peer.query()
                break
            except Exception:  # noqa: BLE001  # as above
                time.sleep(0.01)
        after = time.monotonic() - thawed
    text = _time(waits[0]) if returned else "hangs until the thaw"
    return Cell(f"{text}; {_time(after)}", {"call": waits[0], "after": after})


def _silent(server: Server, cls: type[Peer]) -> Cell:
    proxy = Proxy(server.port)
    proxy.listen()
    try:
        with cls.opened(proxy.conninfo, 10) as peer:
            peer.fill(10)
            peer.age()
            proxy.go_dark()
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
    return Cell(_time(seconds) if answered else "none in 15 s", {"seconds": seconds})


def _many_dead(server: Server, cls: type[Peer]) -> Cell:
    if cls.is_slow:
        return Cell("minutes", {})
    with cls.opened(server.conninfo, 100) as peer:
        peer.fill(100)
        server.restart("immediate")
        started = time.monotonic()
        errors = 0
        while True:
            try:
                peer.query()
                break
            except Exception:  # noqa: BLE001  # as above
                errors += 1
        seconds = time.monotonic() - started
    return Cell(f"{_time(seconds)}, {errors} errors", {"seconds": seconds, "errors": errors})


def _full(cls: type[Peer], length: float) -> Cell:
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
                thread.join(PATIENCE)
    return Cell(f"{sum(served)} served, {sum(failed)} failed",
                {"served": sum(served), "failed": sum(failed)})  # fmt: skip


def _run_restarts(server: Server) -> Cell:
    server.execute("create table if not exists inserts (id text)")
    server.execute("truncate inserts")
    calls, failed = [0] * 8, [0] * 8
    with Dbpool.opened(server.conninfo, 6) as peer:
        end = time.monotonic() + 6

        def work(n: int) -> None:
            while time.monotonic() < end:
                calls[n] += 1
                try:
                    peer.pool.run(
                        lambda conn, key: conn.execute("insert into inserts values (%s)", [key]),
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
            time.sleep(1.0)
            server.restart(mode)
        for thread in threads:
            thread.join(PATIENCE)
        rows = peer.pool.fetch_value("select count(distinct id) from inserts")
    return Cell(f"{sum(calls)} calls, {sum(failed)} failed, {rows} rows",
                {"calls": sum(calls), "failed": sum(failed), "rows": rows})  # fmt: skip


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


def _preload(cls: type[Peer]) -> Cell:
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
    users: dict[str, set[str]] = {}
    for worker, backend in map(str.split, answers):
        users.setdefault(backend, set()).add(worker)
    shared = sum(len(workers) > 1 for workers in users.values())
    failed = 300 - len(answers)
    return Cell(f"{shared} shared, {failed} failed, stops in {_time(seconds)}",
                {"shared": shared, "failed": failed, "shutdown": seconds})  # fmt: skip


def _listens(port: int) -> bool:
    with (
        contextlib.suppress(OSError),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2),
    ):
        return True
    return False


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
