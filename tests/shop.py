"""A shop under a real gunicorn, with a server of its own, and the findings that its door reports."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil

from .gunicorn_site import APP as BASE
from .gunicorn_site import Site, conf_of
from .postgres import Server, free_port, until

PASSWORD = "a-good-password"
WORKERS = 3

APP = """
import re, signal, threading

def retried(conn):
    n = conn.execute("select n from stock where id = 2").fetchone()[0]
    time.sleep(0.02)
    conn.execute("update stock set n = %s where id = 2", [n + 1])

@app.get("/update")
def update():
    return str(db.pool.execute("update stock set n = n + 1 where id = 1"))  # update

@app.get("/read")
def read():
    return str(db.pool.fetch_value("select count(*) from stock"))  # read

@app.get("/hold/<float:seconds>")
def hold(seconds):
    with db.pool.connection() as conn:  # hold
        conn.execute("update stock set n = n + 1 where id = 1")
        time.sleep(seconds)
    return "held"

@app.get("/busy/<float:seconds>")
def busy(seconds):
    with db.pool.connection() as conn:  # busy
        conn.execute("update stock set n = n + 1 where id = 1")
        conn.execute("select pg_sleep(%s)", [seconds])
    return "held"

@app.get("/idle/<float:seconds>")
def idle(seconds):
    with db.pool.connection() as conn:  # idle
        conn.execute("select 1")
        time.sleep(seconds)
    return "held"

@app.get("/fail/<float:seconds>")
def fail(seconds):
    with db.pool.connection() as conn:  # fail
        try:
            conn.execute("select 1 / 0")
        except Exception:
            time.sleep(seconds)
            conn.rollback()
    return "failed"

@app.get("/call/<float:seconds>")
def call(seconds):
    with db.pool.connection() as conn:  # call
        conn.autocommit = True
        conn.execute("select 1")
        time.sleep(seconds)
    return "called"

@app.get("/slow/<float:seconds>")
def slow(seconds):
    return str(db.pool.fetch_value("select pg_sleep(%s)", [seconds]))  # slow

@app.get("/report/<float:seconds>")
def report(seconds):
    query = "select count(*), pg_sleep(%s) from stock"
    return str(db.pool.fetch_value(query, [seconds]))  # report

@app.get("/paced")
def paced():
    return str(db.pool.fetch_value("select pg_sleep(n / 1000.0) from stock where id = 3"))

@app.get("/nest")
def nest():
    with db.pool.connection() as conn:  # nest
        conn.execute("select 1")
        time.sleep(0.5)
        return str(db.pool.fetch_value("select 1"))

@app.get("/forget")
def forget():
    db.pool.getconn()  # forget
    return "forgotten"

@app.get("/lose")
def lose():
    db.pool.getconn().cursor().execute("select 1")  # lose
    return "lost"

@app.get("/keep/<statement>")
def keep(statement):
    pool = db.pool

    def run():
        kept = []
        while len(kept) < pool.max_size:
            kept.append(pool.getconn())  # keep
            if statement != "none":
                kept[-1].execute(f"select '{statement}'")
        time.sleep(600)

    threading.Thread(target=run, daemon=True).start()
    return "kept"

@app.get("/twice")
def twice():
    with db.pool.connection() as conn:  # twice
        conn.execute("update stock set n = n + 1 where id = 1")
        return str(db["reports"].execute("update stock set n = n + 1 where id = 1"))

@app.get("/listen")
def listen():
    pool = db.pool

    def run():
        with pool.connection() as conn:
            conn.autocommit = True
            conn.execute("listen news")
            for _ in conn.notifies():
                pass

    threading.Thread(target=run, daemon=True).start()
    return "listening"

@app.get("/insert")
def insert():
    return str(db.pool.execute("insert into stock select random() * 1e9, 0"))  # insert

@app.get("/batch")
def batch():
    return str(sum(db.pool.fetch_value("select 1") for _ in range(1000)))

@app.get("/end")
def end():
    with db.pool.connection() as conn:
        conn.execute("select 1")
        conn.close()
    return "ended"

@app.get("/conflict")
def conflict():
    from psycopg import IsolationLevel
    db.pool.run(retried, isolation=IsolationLevel.SERIALIZABLE, attempts=20)
    return "done"

@app.get("/elsewhere/<float:seconds>")
def elsewhere(seconds):
    time.sleep(seconds)
    return "slept"

@app.get("/spin")
def spin():
    return str(re.match("(a+)+$", "a" * 40 + "b"))

@app.get("/die/<int:number>")
def die(number):
    os.kill(os.getpid(), number)
    return "never"

@app.get("/advisory")
def advisory():
    return str(db.pool.fetch_value("select pg_advisory_lock_shared(1)"))  # advisory

@app.get("/copy/<int:rows>")
def copy(rows):
    with db.pool.connection() as conn:
        with conn.cursor().copy(f"copy (select repeat('x', 100) from generate_series(1, {rows})) to stdout") as data:
            for n, _ in enumerate(data):
                if n % 1000 == 0:
                    time.sleep(0.05)
    return "copied"

@app.get("/export/<float:seconds>")
def export(seconds):
    with db.pool.connection() as conn:
        with conn.cursor("export") as cursor:
            cursor.itersize = 10
            cursor.execute("select n from generate_series(1, 100000) n")
            until = time.monotonic() + seconds
            for n, _ in enumerate(cursor):
                if n % 10 == 0:
                    time.sleep(0.2)
                if time.monotonic() > until:
                    break
    return "exported"

@app.get("/limited")
def limited():
    import psycopg
    with db.pool.connection() as conn:
        try:
            conn.execute("set local statement_timeout = 200")
            conn.execute("select pg_sleep(5)")
        except psycopg.errors.QueryCanceled:
            conn.rollback()
    return "limited"

@app.get("/reports")
def reports():
    return str(db["reports"].fetch_value("select count(*) from stock"))  # reports
"""


def line_of(marker: str) -> str:
    """Return the line of that endpoint's checkout, as `counted.py:41`, in a site's application."""
    lines = (BASE.format(dsn="") + APP).splitlines()
    return (
        f"counted.py:{next(n for n, line in enumerate(lines, 1) if line.endswith(f'# {marker}'))}"
    )


class Shop:
    """Three workers of four threads, with two connections each, and a door."""

    def __init__(
        self,
        directory: Path,
        server: Server,
        *,
        conninfo: str = "",
        worker_class: str = "gthread",
        workers: int = WORKERS,
        max_requests: int = 0,
        more: str = "",
        extra: Any = None,
        **environ: str,
    ) -> None:
        self.server = server
        self.privilege = directory.name
        self.stack = ExitStack()
        self.extra = extra  # stands between the shop and its server, and is closed with it
        if extra is not None:
            self.stack.callback(extra.close)
        self.began = 0.0  # the trouble
        self.door = free_port()
        directory.mkdir(exist_ok=True)
        self.conninfo = role = conninfo or server.conninfo_for(user="shop", password=PASSWORD)
        chosen = {
            "DBPOOL_MAX_SIZE": "2", "DBPOOL_TIMEOUT": "4s", "DBPOOL_DOTENV": "off",
            "DBPOOL_SERVE": f"127.0.0.1:{self.door}", "DBPOOL_DETAILS": "always",
        } | environ  # fmt: skip
        chosen = {name: value for name, value in chosen.items() if value}
        conf = f"loglevel = 'warning'\n{conf_of(worker_class, workers)}\n{more}"
        options: dict[str, Any] = chosen
        self.site = Site(directory, role, more=conf, app=APP, max_requests=max_requests, **options)
        self._stopped = threading.Event()
        self._clients: list[threading.Thread] = []
        until(lambda: len(self.workers()) == workers and self.first() == "DB00", 60, pause=0.1)

    def get(self, path: str) -> None:
        with suppress(OSError, HTTPException):
            self.site.get(path)

    def begin(self) -> None:
        """Record that the trouble begins now."""
        self.began = time.monotonic()

    def load(self, path: str, clients: int, pause: float = 0.0) -> Callable[[], None]:
        """Start clients that request *path* repeatedly; the trouble begins now.

        Returns a function that stops them.
        """
        self.begin()
        stop = threading.Event()

        def ask() -> None:
            while not self._stopped.is_set() and not stop.wait(pause):
                self.get(path)

        for _ in range(clients):
            self._clients.append(threading.Thread(target=ask))
            self._clients[-1].start()
        return stop.set

    def stats(self) -> dict[str, Any]:
        """Return the door's `/stats`; an empty dict if it does not answer."""
        with suppress(OSError, ValueError):
            address = f"http://127.0.0.1:{self.door}/stats"
            with urllib.request.urlopen(address, timeout=2) as answer:
                return dict(json.loads(answer.read()))
        return {}

    def findings(self) -> list[dict[str, Any]]:
        """Return the findings that the door reports."""
        return list(self.stats().get("findings", []))

    def first(self) -> str:
        """Return the code of the first finding."""
        return next((each["code"] for each in self.findings()), "")

    def workers(self) -> list[int]:
        return [process["pid"] for process in self.stats().get("processes", [])]

    def processes(self) -> list[psutil.Process]:
        """Return the master, its workers and the door."""
        master = psutil.Process(self.site.process.pid)
        return [master, *master.children(recursive=True)]

    def stop_load(self) -> None:
        """End the load."""
        self._stopped.set()
        for client in self._clients:
            client.join(60)

    def close(self) -> None:
        """Stop the load and all processes."""
        self._stopped.set()
        self.server.thaw()
        with suppress(psutil.NoSuchProcess):
            for process in self.processes():
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        with suppress(ProcessLookupError):  # a master that took the place of the first
            os.killpg(self.site.process.pid, signal.SIGKILL)
        self.stack.close()
        self.site.process.wait(30)
        self.site.kill()
        self.stop_load()


def open_both(
    make_server: Callable[..., Server],
    directory: Path,
    server: Mapping[str, object],
    options: Mapping[str, Any],
    prepare: Callable[[Server], Mapping[str, Any]] | None = None,
) -> list[Shop]:
    """Open two shops: of a role with pg_read_all_stats, and of one without."""
    servers = [make_server(**server) for _ in range(2)]

    def opened(server: Server, privilege: str) -> Shop:
        create_schema(server, may_see=privilege == "with")
        more = prepare(server) if prepare else {}
        return Shop(directory / privilege, server, **{**options, **more})

    directory.mkdir(exist_ok=True)
    with ThreadPoolExecutor(2) as executor:
        return list(executor.map(opened, servers, ("with", "without")))


def create_schema(server: Server, *, may_see: bool) -> Server:
    """Create the shop's table and role; with *may_see* the role sees what other roles do."""
    server.execute("create table stock (id int primary key, n int)")
    server.execute("insert into stock select n, 0 from generate_series(1, 10) n")
    server.execute(f"create role shop login password '{PASSWORD}'")
    server.execute("grant all on stock to shop")
    if may_see:
        server.execute("grant pg_read_all_stats to shop")
    return server
