"""A gunicorn that serves an application with a pool, for tests of the hooks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from .postgres import free_port, until

ROOT = Path(__file__).parent.parent

APP = """
import os, time
from flask import Flask
from dbpool import Pool
from dbpool.flask import DBPool, create_blueprint

db = DBPool()
app = Flask("counted")
app.config.update(DATABASE_URL={dsn!r}, DBPOOL_DETAILS="always")
db.init_app(app)
app.register_blueprint(create_blueprint(), url_prefix="/db")

@app.get("/")
def index():
    db.pool.fetch_value("select 1")
    return str(os.getpid())

@app.get("/size")
def size():
    return str(db.pool.max_size)

@app.get("/late/<int:min_size>")
def late(min_size):
    return str(Pool({dsn!r}, min_size=min_size).max_size)

@app.get("/nested")
def nested():
    with db.pool.connection() as conn:
        conn.execute("select pg_sleep(0.05)")
        return str(db.pool.fetch_value("select 1"))

@app.get("/lock")
def lock():
    return str(db.pool.fetch_value("select pg_advisory_lock_shared(1)"))

@app.get("/many")
def many():
    with db.pool.connection() as conn:
        first = conn.execute("select pg_backend_pid(), pg_sleep(0.005)").fetchone()[0]
        time.sleep(0.005)  # where greenlets take turns, whoever waits for the database
        return str(first == conn.execute("select pg_backend_pid()").fetchone()[0])
"""

CONF = """
from dbpool.gunicorn import *
workers = 3
threads = 4
worker_tmp_dir = {directory!r}
control_socket_disable = True
loglevel = "critical"
preload_app = {preload}
max_requests = {max_requests}
{more}
"""


class Site:
    """A gunicorn that serves the application."""

    def __init__(
        self,
        directory: Path,
        dsn: str,
        *,
        preload: bool = False,
        max_requests: int = 0,
        first: str = "",
        more: str = "",
        app: str = "",
        base: str = APP,
        is_awaited: bool = True,
        prefix: Sequence[str] = (),
        **environ: str,
    ) -> None:
        self.directory = directory
        self.port = free_port()
        (directory / "counted.py").write_text(base.format(dsn=dsn) + dedent(app))
        conf = CONF.format(
            directory=str(directory), preload=preload, max_requests=max_requests, more=dedent(more)
        )
        (directory / "gunicorn.conf.py").write_text(f"{first}\n{conf}")
        self._log = directory / "log"
        command = [sys.executable, "-m", "gunicorn", "-b", f"127.0.0.1:{self.port}", "counted:app"]
        path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{directory}"}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*prefix, *command],
                cwd=directory,
                env=os.environ | path | environ,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if is_awaited:
            until(self._serves, 30.0, pause=0.05)

    def _serves(self) -> bool:
        assert self.process.poll() is None, self.output()
        try:
            return self.get("/db/health/live") != ""
        except OSError:
            return False

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=20) as answer:
            return str(answer.read().decode())

    def output(self) -> str:
        return self._log.read_text()

    def stats(self) -> dict[str, Any]:
        return dict(json.loads(self.get("/db/stats")))

    def checkouts(self) -> int:
        return int(self.stats()["pools"]["default"]["counters"]["checkouts"])

    def directories(self) -> list[Path]:
        return list(self.directory.glob("dbpool-stats-*"))

    def stop(self, timeout: float = 30.0) -> float:
        """Send SIGTERM; return how many seconds it took to end."""
        started = time.monotonic()
        self.process.terminate()
        self.process.wait(timeout)
        return time.monotonic() - started

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
        for directory in self.directories():
            # A process that is ending may remove its files at the same time.
            shutil.rmtree(directory, ignore_errors=True)


def conf_of(worker_class: str, workers: int = 1) -> str:
    """A configuration for workers of that class; `sync` with threads would become `gthread`."""
    if worker_class == "gevent":
        pytest.importorskip("gevent")
    threads = 1 if worker_class == "sync" else 4
    return f"workers, threads, worker_class = {workers}, {threads}, {worker_class!r}\n"
