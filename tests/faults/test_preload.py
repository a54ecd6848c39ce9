"""gunicorn with preload_app, and a pool that was opened and used before the fork."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.postgres import Server, free_port, until
from tests.scripts import EXIT_SECONDS, environ

WORKERS, THREADS = 3, 4

APPLICATION = """\
import json, os
from urllib.parse import parse_qs
import dbpool

pool = dbpool.Pool(os.environ["CONNINFO"], min_size=2, max_size=4)
pool.wait()
parents = sorted({conn.info.backend_pid for conn in pool._store.bag.idle})
pool.fetch_value("select 1")


def application(environ, start_response):
    number = int(parse_qs(environ["QUERY_STRING"])["n"][0])
    with pool.connection() as conn:
        value, backend, _ = conn.execute(
            "select %s::int, pg_backend_pid(), pg_sleep(0.002)", [number]
        ).fetchone()
    body = json.dumps([value, backend, os.getpid(), parents]).encode()
    start_response("200 OK", [("Content-Type", "application/json")])
    return [body]
"""


class Gunicorn:
    """A running gunicorn."""

    def __init__(self, folder: Path, conninfo: str) -> None:
        self.port = free_port()
        (folder / "app.py").write_text(APPLICATION)
        (folder / "hooks.py").write_text("from dbpool.gunicorn import *\n")
        self.log = folder / "log"
        excluded = ("GUNICORN", "WEB_", "PYTHONWARNINGS")
        env = {k: v for k, v in environ().items() if not k.startswith(excluded)}
        env |= {"CONNINFO": conninfo, "HOME": str(folder)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", "--preload", "--workers", str(WORKERS),
                 "--threads", str(THREADS), "--bind", f"127.0.0.1:{self.port}",
                 "--pythonpath", folder, "--config", folder / "hooks.py", "app"],
                cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def get(self, number: int) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", f"/?n={number}")
            answer = connection.getresponse()
            assert answer.status == 200, self.log.read_text()
            return json.loads(answer.read())
        finally:
            connection.close()

    def serves(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            self.get(0)
        except OSError:
            return False
        return True

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)


@pytest.fixture
def gunicorn(own_server: Server, tmp_path: Path) -> Iterator[Gunicorn]:
    gunicorn = Gunicorn(tmp_path, own_server.conninfo)
    yield gunicorn
    gunicorn.close()


def test_preloaded_workers_share_no_session_and_stop_in_time(
    own_server: Server, gunicorn: Gunicorn
) -> None:
    until(gunicorn.serves, 30.0, pause=0.05)
    with ThreadPoolExecutor(12) as executor:
        answers = list(executor.map(gunicorn.get, range(300)))
    assert [value for value, *_ in answers] == list(range(300))
    (parents,) = {tuple(parents) for *_, parents in answers}
    sessions = {(backend, process) for _, backend, process, _ in answers}
    assert len({process for _, process in sessions}) == WORKERS
    assert len({backend for backend, _ in sessions}) == len(sessions)
    assert not {backend for backend, _ in sessions} & set(parents)
    assert set(parents) <= set(own_server.backends("dbpool:default"))

    began = time.monotonic()
    gunicorn.process.terminate()
    assert gunicorn.process.wait(30) == 0
    taken = time.monotonic() - began
    output = gunicorn.log.read_text()
    assert taken < EXIT_SECONDS, output
    assert "Traceback" not in output, output
    until(lambda: not own_server.backends("dbpool:default"))


def test_a_worker_that_is_killed_is_replaced_by_one_with_sessions_of_its_own(
    own_server: Server, gunicorn: Gunicorn
) -> None:
    until(gunicorn.serves, 30.0, pause=0.05)
    _, backend, worker, _ = gunicorn.get(1)
    os.kill(worker, signal.SIGKILL)
    until(lambda: backend not in own_server.backends())
    with ThreadPoolExecutor(12) as executor:
        list(executor.map(lambda _: _get_when_served(gunicorn), range(60)))
    gunicorn.process.terminate()
    assert gunicorn.process.wait(30) == 0
    until(lambda: not own_server.backends("dbpool:default"))


def _get_when_served(gunicorn: Gunicorn) -> None:
    """Wait until gunicorn serves: a request in the killed worker is lost, later ones are not."""
    until(gunicorn.serves, 10.0)
