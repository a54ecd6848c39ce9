"""The same Flask view under gunicorn with each peer, driven by wrk. Needs Debian's `wrk`."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

from bench._measure import one_cpu, spread
from bench._report import Cell, Missing, Table
from tests.postgres import Server, free_port, served, until

ROOT = Path(__file__).parent.parent

VIEWS = {
    "no database": ("", "return '1'"),
    "dbpool, fetch_one": (
        "from dbpool import Pool; pool = Pool(DSN, max_size=8)",
        "return str(pool.fetch_one('select 1')[0])",
    ),
    "dbpool, connection": (
        "from dbpool import Pool; pool = Pool(DSN, max_size=8)",
        "with pool.connection() as c: return str(c.execute('select 1').fetchone()[0])",
    ),
    "psycopg_pool": (
        "from psycopg_pool import ConnectionPool; pool = ConnectionPool(DSN, max_size=8, open=True)",
        "with pool.connection() as c: return str(c.execute('select 1').fetchone()[0])",
    ),
    "psycopg_pool, check": (
        (
            "from psycopg_pool import ConnectionPool as P;"
            "pool = P(DSN, max_size=8, open=True, check=P.check_connection)"
        ),
        "with pool.connection() as c: return str(c.execute('select 1').fetchone()[0])",
    ),
    "Flask-SQLAlchemy": (
        (
            "from flask_sqlalchemy import SQLAlchemy;"
            "app.config['SQLALCHEMY_DATABASE_URI'] = URL;"
            "app.config['SQLALCHEMY_ENGINE_OPTIONS'] = {'pool_size': 8}; db = SQLAlchemy(app)"
        ),
        "return str(db.session.execute(db.text('select 1')).scalar())",
    ),
    "Flask-SQLAlchemy, pre_ping": (
        (
            "from flask_sqlalchemy import SQLAlchemy;"
            "app.config['SQLALCHEMY_DATABASE_URI'] = URL;"
            "app.config['SQLALCHEMY_ENGINE_OPTIONS'] = {'pool_size': 8, 'pool_pre_ping': True};"
            "db = SQLAlchemy(app)"
        ),
        "return str(db.session.execute(db.text('select 1')).scalar())",
    ),
    "connect per request": (
        "import psycopg",
        "with psycopg.connect(DSN) as c: return str(c.execute('select 1').fetchone()[0])",
    ),
}

APP = """
from flask import Flask
DSN = {dsn!r}
URL = {url!r}
app = Flask(__name__)
{setup}

@app.get("/")
def index():
    {view}
"""


def run(quick: bool) -> Table:
    """Measure requests per second: 1 worker, 8 threads, 8 connections of wrk, in turns.

    wrk has CPUs of its own; a site and the database share one, as they take turns anyway.
    """
    table = Table("web", "Requests per second", ["requests/s"])
    if shutil.which("wrk") is None:
        raise Missing("it needs wrk, which Debian has: apt-get install wrk")
    seconds, rounds = (1, 1) if quick else (2, 15)
    views = list(VIEWS)[: 4 if quick else None]
    found: dict[str, list[float]] = {name: [] for name in views}
    with contextlib.ExitStack() as stack:
        others = stack.enter_context(one_cpu())
        server = stack.enter_context(served())
        ports = {name: stack.enter_context(_site(server, *VIEWS[name])) for name in views}
        for port in ports.values():
            until(partial(_serves, port), 20.0, pause=0.05)
        turns = deque(ports.items())
        for _ in range(rounds):
            for name, port in turns:
                found[name].append(_drive(port, seconds, others))
            turns.rotate()
    for name, rates in found.items():
        ratios = [rate / base for rate, base in zip(rates, found["psycopg_pool"], strict=True)]
        middle, ratio = median(rates), median(ratios)
        text = (
            f"{middle:.0f} ±{spread(rates) / middle:.0%}"
            f" ({ratio:.2f} x ±{spread(ratios):.2f} psycopg_pool)"
        )
        values = {"median": middle, "spread": spread(rates), "ratio": ratio, "rounds": len(rates)}
        table.put(name, "requests/s", Cell(text, values))
    return table


@contextlib.contextmanager
def _site(server: Server, setup: str, view: str) -> Iterator[int]:
    port = free_port()
    url = f"postgresql+psycopg://postgres@127.0.0.1:{server.port}/postgres"
    with tempfile.TemporaryDirectory() as directory:
        code = APP.format(dsn=server.conninfo, url=url, setup=setup, view=view)
        Path(directory, "site_app.py").write_text(code)
        process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "-w1", "-k", "gthread", "--threads=8", "-b",
             f"127.0.0.1:{port}", "--no-control-socket", "--log-level=error", "site_app:app"],
            cwd=directory,
            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{directory}"},
        )  # fmt: skip
        try:
            yield port
        finally:
            process.terminate()
            process.wait(40)


def _serves(port: int) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/") as got:
        return bool(got.read() == b"1")
    return False


def _drive(port: int, seconds: int, cpus: set[int]) -> float:
    done = subprocess.run(
        ["wrk", "-t2", "-c8", f"-d{seconds}s", f"http://127.0.0.1:{port}/"],
        capture_output=True, text=True, check=True, timeout=60,
        preexec_fn=partial(os.sched_setaffinity, 0, cpus),
    )  # fmt: skip
    assert "Non-2xx" not in done.stdout, done.stdout
    match = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    assert match is not None
    return float(match[1])
