"""The hooks, under a real gunicorn with three workers."""

from __future__ import annotations

import json
import os
import pwd
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import pytest

from dbpool import gunicorn as hooks

from .postgres import free_port, until

ROOT = Path(__file__).parent.parent

APP = """
import os
from flask import Flask
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
"""


class Site:
    """A gunicorn that serves the application."""

    def __init__(
        self, directory: Path, dsn: str, *, preload: int = False, max_requests: int = 0
    ) -> None:
        self.directory = directory
        self.port = free_port()
        (directory / "counted.py").write_text(dedent(APP.format(dsn=dsn)))
        conf = CONF.format(
            directory=str(directory), preload=bool(preload), max_requests=max_requests
        )
        (directory / "gunicorn.conf.py").write_text(dedent(conf))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "-b", f"127.0.0.1:{self.port}", "counted:app"],
            cwd=directory,
            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{directory}"},
            start_new_session=True,
        )
        until(self._serves, 30.0, pause=0.05)

    def _serves(self) -> bool:
        assert self.process.poll() is None, "gunicorn ended"
        try:
            return self.get("/db/health/live") != ""
        except OSError:
            return False

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=20) as answer:
            return str(answer.read().decode())

    def stats(self) -> dict[str, Any]:
        return dict(json.loads(self.get("/db/stats")))

    def checkouts(self) -> int:
        return int(self.stats()["pools"]["default"]["counters"]["checkouts"])

    def directories(self) -> list[Path]:
        return list(self.directory.glob("dbpool-stats-*"))

    def stop(self) -> float:
        """Ask it to end; return how many seconds that took."""
        started = time.monotonic()
        self.process.terminate()
        self.process.wait(30)
        return time.monotonic() - started


@pytest.fixture
def start(tmp_path: Path, dsn: str) -> Iterator[Callable[..., Site]]:
    sites: list[Site] = []

    def start(**options: int) -> Site:
        sites.append(Site(tmp_path, dsn, **options))
        return sites[-1]

    yield start
    for site in sites:
        if site.process.poll() is None:
            os.killpg(site.process.pid, signal.SIGKILL)
            site.process.wait(30)


def test_a_thousand_requests_are_a_thousand_checkouts(start: Callable[..., Site]) -> None:
    site = start()
    with ThreadPoolExecutor(12) as threads:
        workers = Counter(threads.map(lambda _: site.get("/"), range(1000)))
    assert workers.total() == 1000
    assert len(workers) == 3
    # Each worker publishes once a second, and the one that answers at once.
    until(lambda: site.checkouts() == 1000)
    stats = site.stats()
    assert stats["scope"] == "all"
    assert {str(process["pid"]) for process in stats["processes"]} == workers.keys()
    pool = stats["pools"]["default"]
    assert pool["wait"]["count"] == pool["use"]["count"] == 1000
    assert pool["active"] + pool["idle"] + pool["connecting"] == pool["size"]

    os.kill(int(workers.most_common(1)[0][0]), signal.SIGKILL)
    for _ in range(20):
        assert site.checkouts() == 1000
    until(lambda: len(site.stats()["processes"]) >= 2)
    assert site.checkouts() == 1000


def test_workers_that_are_recycled_leave_their_counts(start: Callable[..., Site]) -> None:
    site = start(max_requests=40)
    workers: set[str] = set()
    served = 0
    for _ in range(300):
        try:
            workers.add(site.get("/"))
            served += 1
        except OSError:  # its worker ended between accepting and answering
            continue
    assert len(workers) > 3

    def counted() -> int:
        with suppress(OSError):
            return site.checkouts()
        return 0

    until(lambda: counted() >= served)
    assert all(counted() <= 300 for _ in range(5))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root serves as another user")
def test_the_directory_belongs_to_the_user_of_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = pwd.getpwnam("nobody")
    monkeypatch.setenv("DBPOOL_STATS_DIR", "")
    server = SimpleNamespace(
        cfg=SimpleNamespace(worker_tmp_dir=str(tmp_path), uid=nobody.pw_uid, gid=nobody.pw_gid)
    )
    hooks.on_starting(server)
    (directory,) = tmp_path.glob("dbpool-stats-*")
    assert directory.stat().st_uid == nobody.pw_uid
    assert directory.stat().st_mode & 0o777 == 0o700
    hooks.on_exit(server)
    assert not directory.exists()


@pytest.mark.parametrize("preload", [False, True])
def test_a_pool_is_as_large_as_its_worker_has_threads(
    start: Callable[..., Site], preload: bool
) -> None:
    assert start(preload=preload).get("/size") == "4"


def test_the_directory_is_private_and_goes_with_the_master(start: Callable[..., Site]) -> None:
    site = start()
    site.get("/")
    (directory,) = site.directories()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert directory.stat().st_uid == os.geteuid()
    assert site.stop() < 10
    assert site.directories() == []


def test_what_a_dead_master_left_is_swept_at_the_next_start(start: Callable[..., Site]) -> None:
    first = start()
    first.get("/")
    (left,) = first.directories()
    os.killpg(first.process.pid, signal.SIGKILL)
    first.process.wait(30)
    assert left.exists()
    second = start()
    second.get("/")
    (made,) = second.directories()
    assert made != left
    until(lambda: second.checkouts() >= 1)  # the others hear of it within a second
    assert second.checkouts() == 1
