"""gunicorn's hooks, under a real gunicorn, with workers of each class."""

from __future__ import annotations

import logging
import os
import pwd
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import psycopg
import pytest

from dbpool import gunicorn as hooks
from dbpool.processes import Processes
from dbpool.report import Process

from .gunicorn_site import ROOT, Site, conf_of
from .postgres import Server, until
from .scripts import python


def test_a_thousand_requests_are_a_thousand_checkouts(make_site: Callable[..., Site]) -> None:
    site = make_site()
    until(lambda: len(site.stats()["processes"]) == 3)  # all workers have started
    with ThreadPoolExecutor(12) as threads:
        workers = Counter(threads.map(lambda _: site.get("/"), range(1000)))
    assert workers.total() == 1000
    assert len(workers) == 3
    # Each worker publishes once a second; the one that answers publishes at once.
    until(lambda: site.stats()["pools"]["default"]["use"]["count"] == 1000)
    stats = site.stats()
    assert stats["scope"] == "all"
    assert {str(process["pid"]) for process in stats["processes"]} == workers.keys()
    pool = stats["pools"]["default"]
    assert pool["wait"]["count"] == pool["use"]["count"] == 1000
    assert pool["active"] + pool["idle"] + pool["connecting"] == pool["size"]

    assert {process["threads"] for process in stats["processes"]} == {4}
    assert max(process["busy"] for process in stats["processes"]) >= 1, "the one that answers"

    killed = workers.most_common(1)[0][0]
    os.kill(int(killed), signal.SIGKILL)
    for _ in range(20):
        assert site.checkouts() == 1000
    line = f"worker {killed} died by SIGKILL"
    until(lambda: line in site.get("/db/stats?include=journal"), 20.0)
    until(lambda: len(site.stats()["processes"]) >= 2)
    assert site.checkouts() == 1000


def test_pools_of_one_name_are_added_up_against_max_connections(server: Server) -> None:
    """A `Pool` without a name is called `default`."""
    script = f"""
        import time
        from types import SimpleNamespace
        from dbpool import Pool, gunicorn

        warnings = []
        pools = [Pool({server.conninfo!r}, max_size=40) for _ in range(2)]
        cfg = SimpleNamespace(threads=1, workers=1)
        worker = SimpleNamespace(age=1, cfg=cfg, log=SimpleNamespace(warning=lambda *a: warnings.append(a)))
        gunicorn.post_worker_init(worker)
        deadline = time.monotonic() + 10
        while not warnings and time.monotonic() < deadline:
            time.sleep(0.05)
        print(warnings)
    """
    done = python("-c", dedent(script))
    assert "max_connections" in done.stdout, done.stderr


def test_workers_that_are_recycled_leave_their_counts(make_site: Callable[..., Site]) -> None:
    site = make_site(max_requests=40)
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
        cfg=SimpleNamespace(worker_tmp_dir=str(tmp_path), uid=nobody.pw_uid, gid=nobody.pw_gid),
        log=logging.getLogger("gunicorn.error"),
    )
    hooks.on_starting(server)
    (directory,) = tmp_path.glob("dbpool-stats-*")
    assert directory.stat().st_uid == nobody.pw_uid
    assert directory.stat().st_mode & 0o777 == 0o700
    hooks.on_exit(server)
    assert not directory.exists()


SIZES = {"gthread": 5, "sync": 2, "gevent": 10}  # a worker's threads and one more, or the default
RECORD = """
def pre_fork(server, worker):
    import pathlib, sys
    path = pathlib.Path({directory!r}, f"modules-{{worker.age}}")
    path.with_suffix(".new").write_text(" ".join(sys.modules))
    path.with_suffix(".new").rename(path)
"""


@pytest.fixture(scope="module", params=SIZES)
def served(
    request: pytest.FixtureRequest, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Site]]:
    """Two workers of each class in turn, for tests that do not harm them."""
    directory = tmp_path_factory.mktemp(request.param)
    conf = conf_of(request.param, workers=2) + RECORD.format(directory=str(directory))
    site = Site(directory, server.conninfo, more=f"loglevel = 'warning'\n{conf}")
    yield request.param, site
    site.kill()


def test_a_pools_size_fits_its_workers_concurrency(served: tuple[str, Site]) -> None:
    worker_class, site = served
    size = SIZES[worker_class]
    assert site.get("/size") == str(size)
    assert site.get("/late/1") == str(size)  # a pool made after the hooks ran
    assert site.get("/late/20") == "20"
    with ThreadPoolExecutor(8) as threads:  # each request holds one connection and takes another
        assert set(threads.map(lambda _: site.get("/nested"), range(16))) == {"1"}


def test_every_request_is_served_by_each_class(served: tuple[str, Site]) -> None:
    _, site = served
    with ThreadPoolExecutor(16) as threads:
        answers = Counter(threads.map(lambda _: site.get("/many"), range(400)))
    assert answers == {"True": 400}
    until(lambda: site.checkouts() >= 400)
    discarded = site.stats()["pools"]["default"]["counters"]["discarded"]
    assert sum(discarded.values()) == 0
    assert site.output() == ""


def test_the_master_imports_neither_psycopg_nor_the_pool(served: tuple[str, Site]) -> None:
    _, site = served
    site.get("/")
    site.process.send_signal(signal.SIGHUP)  # forks two more workers
    path = site.directory / "modules-4"
    until(path.exists)
    modules = set(path.read_text().split())
    assert not {name for name in modules if name.startswith(("psycopg", "flask", "backoff"))}
    own_modules = {name for name in modules if name.partition(".")[0] == "dbpool"}
    files = {"dbpool.processes._directory", "dbpool.processes._files"}
    assert own_modules == {"dbpool", "dbpool.gunicorn", "dbpool.processes", *files}


def test_a_pool_of_a_preloaded_application_is_sized_too(make_site: Callable[..., Site]) -> None:
    site = make_site(preload=True)
    assert site.get("/size") == site.get("/late/1") == "5"


@pytest.mark.parametrize("given", [1, 3, 10])
def test_a_size_that_is_set_stays(make_site: Callable[..., Site], given: int) -> None:
    site = make_site(more=conf_of("gthread"), DBPOOL_MAX_SIZE=str(given))
    assert site.get("/size") == str(given)


def test_more_connections_than_the_server_allows_log_one_warning_at_the_start(
    make_site: Callable[..., Site],
) -> None:
    """A worker logs it, as the master must not import psycopg."""
    conf = f"loglevel = 'warning'\n{conf_of('gthread', workers=3)}"
    site = make_site(more=conf, DBPOOL_MAX_SIZE="40")
    until(lambda: "more connections are configured" in site.output(), 20.0)
    warning = "the server of default allows"
    assert site.output().count(warning) == 1
    assert "3 x 40 + 1 (default) = 121, or 242 during a deploy" in site.output()
    assert "set DBPOOL_MAX_SIZE to 1" in site.output()
    assert site.checkouts() == 0  # the question uses a connection of its own


def test_a_pool_resized_before_the_fork_keeps_its_size(make_site: Callable[..., Site]) -> None:
    app = """
    with app.app_context():
        db.pool.resize(2, 17)
    """
    assert make_site(more=conf_of("gthread"), preload=True, app=app).get("/size") == "17"


LATE_PATCH = "before gevent patched"


@pytest.fixture
def held_lock(dsn: str) -> Iterator[psycopg.Connection]:
    """An advisory lock for which the application's `/lock` waits."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("select pg_advisory_lock(1)")
        yield conn


def assert_serves_while_a_query_waits(site: Site, held_lock: psycopg.Connection) -> None:
    waiting = "select count(*) from pg_locks where locktype = 'advisory' and not granted"
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(site.get, "/lock")
        until(lambda: held_lock.execute(waiting).fetchone() == (1,))
        assert site.get("/size") == "10"
        assert site.get("/nested") == "1"
        held_lock.execute("select pg_advisory_unlock_all()")
        assert answer.result(20) == ""


def test_a_query_does_not_stop_a_gevent_worker(
    make_site: Callable[..., Site], held_lock: psycopg.Connection
) -> None:
    site = make_site(more=f"loglevel = 'warning'\n{conf_of('gevent')}")
    assert_serves_while_a_query_waits(site, held_lock)
    assert LATE_PATCH not in site.output()


def test_an_application_may_be_preloaded_if_gevent_patched_first(
    make_site: Callable[..., Site], held_lock: psycopg.Connection
) -> None:
    patch = "import gevent.monkey; gevent.monkey.patch_all()"
    conf = f"loglevel = 'warning'\n{conf_of('gevent')}\n"
    site = make_site(preload=True, first=patch, more=conf)
    assert_serves_while_a_query_waits(site, held_lock)
    assert LATE_PATCH not in site.output()


@pytest.mark.parametrize(
    ("preload", "more"),
    [
        pytest.param(True, "", id="preload"),
        pytest.param(False, "def post_fork(server, worker):\n    import counted", id="post_fork"),
        pytest.param(False, "import psycopg", id="configuration", marks=pytest.mark.slow),
        pytest.param(False, "import dbpool.holders", id="part", marks=pytest.mark.slow),
    ],
)
def test_gevent_patching_after_the_import_logs_one_warning(
    make_site: Callable[..., Site], preload: bool, more: str
) -> None:
    conf = f"loglevel = 'warning'\n{conf_of('gevent', workers=3)}\n{more}"
    site = make_site(preload=preload, more=conf)
    until(lambda: len(site.stats()["processes"]) == 3)  # all have run their hooks
    assert site.output().count(LATE_PATCH) == 1


MARKS_APP = """
import sys

@app.get("/marks")
def marks():
    modules = [m for n, m in sys.modules.items() if n.partition(".")[0] == "dbpool"]
    return " ".join(sorted({str(getattr(module, "MARK", 0)) for module in modules}))
"""


@pytest.mark.parametrize("is_watched", [False, True], ids=["HUP", "--reload"])
def test_a_reload_reloads_the_whole_library(
    make_site: Callable[..., Site], tmp_path: Path, is_watched: bool
) -> None:
    shutil.copytree(ROOT / "dbpool", tmp_path / "dbpool", ignore=shutil.ignore_patterns("*.pyc"))
    site = make_site(
        more=f"{conf_of('gthread')}\nreload = {is_watched}", app=MARKS_APP, PYTHONPATH=str(tmp_path)
    )
    assert site.get("/marks") == "0"
    # All files at once, so that no worker starts between the changes.
    changed = shutil.copytree(tmp_path / "dbpool", tmp_path / "changed")
    for path in changed.rglob("*.py"):
        path.write_text(path.read_text() + "\nMARK = 1\n")
    (tmp_path / "dbpool").rename(tmp_path / "before")
    changed.rename(tmp_path / "dbpool")
    if not is_watched:
        site.process.send_signal(signal.SIGHUP)

    def marks() -> str:
        with suppress(OSError):  # the worker ended meanwhile
            if (found := site.get("/marks")) == "0" and is_watched:
                # The reloader may scan for the first time now, and take the new files as unchanged.
                (tmp_path / "dbpool" / "__init__.py").touch()
            return found
        return ""

    until(lambda: marks() == "1", 20.0)
    assert site.get("/size") == "5"


def test_a_worker_publishes_before_it_has_served(make_site: Callable[..., Site]) -> None:
    site = make_site(is_awaited=False)

    def published_pids() -> set[int]:
        found: list[Process] = []
        for directory in site.directories():
            report = Processes({}, directory, "counted").collect_others()
            found = list(report.processes) if report else []
        return {process.pid for process in found}

    until(lambda: len(published_pids()) == 3, 30.0)
    before = published_pids()
    killed = min(before)
    os.kill(killed, signal.SIGKILL)
    until(lambda: len(published_pids() - before) == 1)
    assert published_pids() >= before - {killed}


def test_the_directory_is_private_and_is_removed_with_the_master(
    make_site: Callable[..., Site],
) -> None:
    site = make_site()
    site.get("/")
    (directory,) = site.directories()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert directory.stat().st_uid == os.geteuid()
    assert site.stop() < 10
    assert site.directories() == []


def test_a_dead_masters_directory_is_removed_at_the_next_start(
    make_site: Callable[..., Site],
) -> None:
    first = make_site()
    first.get("/")
    (remaining,) = first.directories()
    os.killpg(first.process.pid, signal.SIGKILL)
    first.process.wait(30)
    assert remaining.exists()
    second = make_site()
    second.get("/")
    (made,) = second.directories()
    assert made != remaining
    until(lambda: second.checkouts() >= 1)  # the other workers publish within a second
    assert second.checkouts() == 1
