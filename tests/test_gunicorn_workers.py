"""gunicorn's workers under load: replaced, reloaded, aborted, stopped; dirty ones; users' hooks."""

from __future__ import annotations

import re
import signal
import socket
import sys
import urllib.error
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest

from dbpool import Pool
from dbpool import gunicorn as hooks

from .gunicorn_site import Site, conf_of
from .postgres import until

CLASSES = ["gthread", "sync", "gevent"]
# Worker class and number of requests; most of the time goes into starting workers.
LOADS = [("gthread", 200), *(pytest.param(c, 2000, marks=pytest.mark.slow) for c in CLASSES)]

MakeSite = Callable[..., Site]


@pytest.fixture
def held_lock(dsn: str) -> Iterator[psycopg.Connection]:
    """An advisory lock for which the application's `/lock` waits."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("select pg_advisory_lock(1)")
        yield conn


def outcomes(
    site: Site, number: int, every: int = 0, do: Callable[[], None] | None = None
) -> Counter[str]:
    """Send requests from eight threads; count the answers and errors of each kind.

    *do* is called after each *every* requests.
    """

    def ask(n: int) -> str:
        if do is not None and n % every == every - 1:
            do()
        try:
            return "ok" if site.get("/").isdecimal() else "odd"
        except urllib.error.HTTPError as ex:
            return str(ex.code)
        except OSError as ex:
            return repr(ex)

    with ThreadPoolExecutor(8) as threads:
        return Counter(threads.map(ask, range(number)))


# Replaced workers


@pytest.mark.parametrize(("worker_class", "number"), LOADS)
def test_a_reload_under_load_fails_no_request(
    make_site: MakeSite, worker_class: str, number: int
) -> None:
    site = make_site(more=conf_of(worker_class, workers=2))
    found = outcomes(site, number, number // 3, lambda: site.process.send_signal(signal.SIGHUP))
    assert found == {"ok": number}


@pytest.mark.parametrize(("worker_class", "number"), LOADS)
def test_workers_that_are_recycled_under_load_fail_no_request(
    make_site: MakeSite, worker_class: str, number: int
) -> None:
    site = make_site(max_requests=number // 5, more=conf_of(worker_class, workers=2))
    assert outcomes(site, number) == {"ok": number}


@pytest.mark.parametrize("worker_class", CLASSES)
def test_requests_in_flight_are_answered_before_a_stop(
    make_site: MakeSite, held_lock: psycopg.Connection, worker_class: str
) -> None:
    site = make_site(more=conf_of(worker_class, workers=2))
    number = 2 if worker_class == "sync" else 4
    waiting = "select count(*) from pg_locks where locktype = 'advisory' and not granted"
    with ThreadPoolExecutor(number) as threads:
        answers = [threads.submit(site.get, "/lock") for _ in range(number)]
        until(lambda: held_lock.execute(waiting).fetchone() == (number,), 20.0)
        site.process.terminate()
        held_lock.execute("select pg_advisory_unlock_all()")
        assert [answer.result(20) for answer in answers] == [""] * number
    site.process.wait(20)


# Aborted workers


def test_an_aborted_worker_logs_its_holders_and_cancels_their_queries(
    make_site: MakeSite, dsn: str, held_lock: psycopg.Connection
) -> None:
    site = make_site(more=f"{conf_of('sync')}loglevel = 'error'\ntimeout = 1\n")
    with socket.create_connection(("127.0.0.1", site.port), timeout=30) as client:
        client.sendall(b"GET /lock HTTP/1.0\r\n\r\n")
        client.recv(1)  # the connection ends without an answer
    waiting = "select count(*) from pg_locks where locktype = 'advisory' and not granted"
    until(lambda: held_lock.execute(waiting).fetchone() == (0,), 10.0)
    output = site.output()
    assert "the worker is aborted; thread MainThread held a connection of pool 'default'" in output
    assert "counted.py" in output
    assert "(lock)" in output
    assert site.get("/").isdecimal()  # another worker took its place
    until(lambda: "died by SIGABRT" in site.get("/db/stats?include=journal"), 20.0)


def test_an_error_in_worker_abort_is_logged_not_raised(dsn: str) -> None:
    class Log:
        calls = 0

        def error(self, *args: object) -> None:
            self.calls += 1
            raise RuntimeError("reentrant call inside a buffered writer")

    log = Log()
    with Pool(dsn) as pool, pool.connection():
        hooks.worker_abort(SimpleNamespace(log=log))
    assert log.calls == 1


# Dirty workers

DIRTY_APP = """
import os
from dbpool import Databases, Settings
from dbpool.processes import Processes
from gunicorn.dirty.app import DirtyApp


class Reports(DirtyApp):
    def init(self):
        self.databases = Databases({{"default": Settings(conninfo={dsn!r})}})
        self.processes = Processes(self.databases, app="counted")
        self.processes.start()

    def run(self):
        pool = self.databases.default
        return [os.getpid(), pool.fetch_value("select pg_backend_pid()"), pool.max_size]

    def close(self):
        self.databases.close()
"""

DIRTY_VIEW = """
@app.get("/report")
def report():
    from gunicorn.dirty import get_dirty_client
    return get_dirty_client().execute("reports:Reports", "run")
"""


def test_dirty_workers_have_pools_of_their_own(
    make_site: MakeSite, tmp_path: Path, dsn: str
) -> None:
    pytest.importorskip("gunicorn.dirty", reason="gunicorn 25 and newer have dirty workers")
    (tmp_path / "reports.py").write_text(DIRTY_APP.format(dsn=dsn))
    conf = conf_of("gthread", workers=2) + (
        "dirty_apps = ['reports:Reports']\ndirty_workers = 2\ndirty_threads = 3\n"
        "loglevel = 'info'\n"
    )
    site = make_site(more=conf, app=DIRTY_VIEW, preload=True)
    # The ordinary workers serve before the dirty ones do.
    until(lambda: len(re.findall(r"Dirty worker \d+ listening", site.output())) == 2)
    with ThreadPoolExecutor(8) as threads:
        reports = list(threads.map(lambda _: tuple(eval(site.get("/report"))), range(60)))
    workers = {pid for pid, _, _ in reports}
    assert len(workers) == 2
    assert {size for _, _, size in reports} == {4}
    by_backend = {backend: pid for pid, backend, _ in reports}
    assert all(by_backend[backend] == pid for pid, backend, _ in reports), "a backend is shared"
    until(lambda: {each["pid"] for each in site.stats()["processes"]} >= workers)
    until(lambda: site.checkouts() == 60)
    # From Python 3.12 on, gunicorn's own process for dirty workers takes 30 s to end.
    assert site.stop(60.0) < (10 if sys.version_info < (3, 12) else 40)
    names = "select count(*) from pg_stat_activity where application_name like 'dbpool:%%'"
    with psycopg.connect(dsn, autocommit=True) as conn:
        own = f"{names} and datname = current_database()"
        until(lambda: conn.execute(own).fetchone() == (0,), 10.0)


# Users' own hooks

OWN_HOOKS = """
from dbpool.gunicorn import combined

def note(name):
    with open({path!r}, "a") as file:
        print(name, file=file)

@combined
def on_starting(server):
    import os
    note("on_starting" if os.environ.get("DBPOOL_STATS_DIR") else "no directory yet")

@combined
def post_worker_init(worker):
    from counted import app, db
    with app.app_context():
        note("post_worker_init" if db.pool.max_size == 5 else "not sized yet")

@combined
def worker_exit(server, worker):
    import os
    if os.getpid() == worker.pid:
        from counted import app, db
        with app.app_context():
            note("worker_exit" if not db.pool.closed else "closed already")

@combined
def on_exit(server):
    note("on_exit")
"""


def test_hooks_combine_with_the_users_own(make_site: MakeSite, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    site = make_site(more=conf_of("gthread") + OWN_HOOKS.format(path=str(notes)))
    site.get("/")
    (directory,) = site.directories()
    site.stop()
    assert not directory.exists()
    assert notes.read_text().split() == [
        "on_starting",
        "post_worker_init",
        "worker_exit",
        "on_exit",
    ]


def test_dbpools_hook_runs_although_the_users_hook_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(hooks, "worker_exit", lambda server, worker: seen.append("ours"))

    def worker_exit(server: object, worker: object) -> None:
        raise RuntimeError("theirs")

    with pytest.raises(RuntimeError, match="theirs"):
        hooks.combined(worker_exit)(None, None)
    assert seen == ["ours"]


def test_combine_rejects_unknown_hooks() -> None:
    def post_forks(server: object, worker: object) -> None: ...

    with pytest.raises(ValueError, match="no hook post_forks: only child_exit, dirty_worker_init"):
        hooks.combined(post_forks)
