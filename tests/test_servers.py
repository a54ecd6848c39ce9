"""Servers and workers besides gunicorn: uWSGI with threads, waitress, Celery's prefork."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from .postgres import free_port, until

ROOT = Path(__file__).parent.parent
REQUESTS = 200

# The pool is used before any fork, so that each child inherits connections it must not use.
APP = """
import os, time
from flask import Flask
from dbpool.flask import DBPool, create_blueprint

db = DBPool()
app = Flask("counted")
app.config.update(DATABASE_URL={dsn!r}, DBPOOL_DETAILS="always")
db.init_app(app)
app.register_blueprint(create_blueprint(), url_prefix="/db")
with app.app_context():
    in_parent = db.pool.fetch_value("select pg_backend_pid()")

@app.get("/")
def index():
    with db.pool.connection() as conn:
        backend = conn.execute("select pg_backend_pid(), pg_sleep(0.005)").fetchone()[0]
    return f"{{os.getpid()}} {{backend}} {{in_parent}}"
"""


class Running:
    """A server or worker in a process of its own."""

    def __init__(self, directory: Path, *command: str, **environ: str) -> None:
        self._log = directory / "log"
        path = os.pathsep.join([str(ROOT), str(directory), *sys.path])
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                cwd=directory,
                env=os.environ | {"PYTHONPATH": path, **environ},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def output(self) -> str:
        return self._log.read_text()

    def stop(self, number: int = signal.SIGTERM) -> float:
        """Send a signal; return how many seconds it took to end."""
        started = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(30)
        return time.monotonic() - started

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    made: list[Running] = []

    def start(*command: str, **environ: str) -> Running:
        made.append(Running(tmp_path, *command, **environ))
        return made[-1]

    yield start
    for running in made:
        running.kill()


def get(port: int, path: str = "/") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
        return str(answer.read().decode())


def await_serving(port: int, running: Running) -> None:
    def serves() -> bool:
        assert running.process.poll() is None, running.output()
        try:
            return get(port, "/db/health/live") != ""
        except OSError:
            return False

    until(serves, 30.0, pause=0.05)


def answers(port: int) -> list[list[int]]:
    """Return process, backend and the parent's backend for many concurrent requests."""
    with ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(lambda _: get(port), range(REQUESTS)))
    return [[int(part) for part in text.split()] for text in texts]


def assert_no_backend_is_shared(pairs: list[tuple[int, int]], in_parent: int) -> None:
    owners = dict(pairs)
    by_backend = {backend: pid for pid, backend in pairs}
    assert all(by_backend[backend] == pid for pid, backend in pairs)
    assert len(owners) > 1, "more than one process served"
    assert in_parent not in by_backend


def await_no_backends(dsn: str) -> None:
    query = (
        "select count(*) from pg_stat_activity"
        " where datname = current_database() and application_name like 'dbpool:%'"
    )
    with psycopg.connect(dsn, autocommit=True) as conn:
        until(lambda: conn.execute(query).fetchone() == (0,), 10.0)


def test_uwsgi_with_threads(start: Callable[..., Running], tmp_path: Path, dsn: str) -> None:
    """It forks without Python's hooks: the pool notices the fork by itself."""
    pytest.importorskip("pyuwsgi", reason="uWSGI is not installed (pip install pyuwsgi)")
    (tmp_path / "counted.py").write_text(APP.format(dsn=dsn))
    port = free_port()
    server = start(
        "-c", "import pyuwsgi; pyuwsgi.run()",
        "--master", "--processes", "2", "--threads", "4", "--enable-threads", "--die-on-term",
        "--http-socket", f"127.0.0.1:{port}", "--module", "counted:app", "--need-app",
    )  # fmt: skip
    await_serving(port, server)
    found = answers(port)
    assert_no_backend_is_shared([(pid, backend) for pid, backend, _ in found], found[0][2])
    server.process.send_signal(signal.SIGHUP)  # a graceful reload
    until(lambda: server.output().count("spawned uWSGI worker 1 (") == 2, 20.0)
    await_serving(port, server)
    assert len(answers(port)) == REQUESTS
    assert server.stop() < 10
    await_no_backends(dsn)


def test_waitress_serves(start: Callable[..., Running], tmp_path: Path, dsn: str) -> None:
    pytest.importorskip("waitress", reason="waitress is not installed")
    (tmp_path / "counted.py").write_text(APP.format(dsn=dsn))
    port = free_port()
    server = start(
        "-m", "waitress", "--threads", "8", "--listen", f"127.0.0.1:{port}", "counted:app"
    )
    await_serving(port, server)
    found = answers(port)
    assert {pid for pid, _, _ in found} == {server.process.pid}
    assert len({backend for _, backend, _ in found}) <= 10  # the default max_size
    assert server.stop(signal.SIGINT) < 10
    assert "Traceback" not in server.output()
    await_no_backends(dsn)


CELERY = """
import os
from celery import Celery
from dbpool import Pool

pool = Pool({dsn!r})
in_parent = pool.fetch_value("select pg_backend_pid()")

app = Celery("tasks")
app.conf.update(
    broker_url="filesystem://",
    broker_transport_options={{
        "data_folder_in": "queue", "data_folder_out": "queue", "control_folder": "control",
    }},
    worker_max_tasks_per_child=15,
    broker_connection_retry_on_startup=False,
)

@app.task
def work(n):
    with pool.connection() as conn:
        conn.execute(
            "insert into work values (%s, %s, pg_backend_pid(), %s)", [n, os.getpid(), in_parent]
        )
        conn.execute("select pg_sleep(0.02)")
"""

TASKS = 60


def test_celery_prefork_processes_share_no_session(
    start: Callable[..., Running], tmp_path: Path, dsn: str
) -> None:
    """Its processes are forked from one that used the pool, and replaced after 15 tasks."""
    pytest.importorskip("celery", reason="Celery is not installed")
    for folder in ("queue", "control"):
        (tmp_path / folder).mkdir()
    (tmp_path / "tasks.py").write_text(CELERY.format(dsn=dsn))
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("create table work (n int, pid int, backend int, in_parent int)")
        send = f"from tasks import work; [work.delay(n) for n in range({TASKS})]"
        sender = start("-c", send)
        assert sender.process.wait(30) == 0, sender.output()
        worker = start(
            "-m", "celery", "-A", "tasks", "worker", "--pool", "prefork", "--concurrency", "2",
            "--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "warning",
            C_FORCE_ROOT="1",
        )  # fmt: skip

        def done() -> bool:
            assert worker.process.poll() is None, worker.output()
            return conn.execute("select count(distinct n) from work").fetchone() == (TASKS,)

        until(done, 60.0, pause=0.1)
        rows = conn.execute("select pid, backend, in_parent, n from work").fetchall()
    assert len(rows) == TASKS
    assert_no_backend_is_shared([(pid, backend) for pid, backend, _, _ in rows], rows[0][2])
    assert len({pid for pid, _, _, _ in rows}) > 2, "no process was replaced"
    assert worker.stop() < 20
    assert "Traceback" not in worker.output()
    await_no_backends(dsn)
