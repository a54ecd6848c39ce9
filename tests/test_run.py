"""`python -m webapp`, as `make run` calls it: what it starts, prints and leaves behind."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from dbpool.embedded import _programs
from tests.postgres import memory
from tests.waiting import until
from webapp import embedded

from .postgres import free_port

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 30.0
STOP_SECONDS = 5.0


class Application:
    """A running supervisor, with requests to the application that it serves."""

    def __init__(self, checkout: Path, **environ: str) -> None:
        self.port = int(environ.setdefault("PORT", str(free_port())))
        self.output_file = checkout / f"output-{time.monotonic_ns()}"
        with self.output_file.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "webapp"],
                cwd=checkout,
                env=clean_environ() | environ,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def get(self, path: str) -> tuple[int, Any]:
        return self.request("GET", path)

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            headers = {"Content-Type": "application/json", "Accept": "application/json"}
            connection.request(method, path, json.dumps(body) if body else None, headers)
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text else None
        finally:
            connection.close()

    def serves(self, path: str = "/db/health/ready") -> bool:
        try:
            return self.get(path)[0] == 200
        except OSError:
            return False

    def await_served(self) -> Application:
        """Wait for its message, as a predecessor may still answer on the port."""
        until(lambda: self.process.poll() is not None or "Serving" in self.output(), 30)
        assert self.process.poll() is None, self.output()
        return self

    def stop(self, signum: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal, and return the exit code and the output."""
        self.process.send_signal(signum)
        return self.wait_for_exit(STOP_SECONDS)

    def wait_for_exit(self, seconds: float = START_SECONDS) -> tuple[int, str]:
        return self.process.wait(seconds), self.output()

    def output(self) -> str:
        return self.output_file.read_text()

    def gunicorn(self) -> int:
        """The pid of the gunicorn master."""
        children = psutil.Process(self.process.pid).children()
        return next(int(each.pid) for each in children if "gunicorn" in command(each.pid))


def clean_environ() -> dict[str, str]:
    excluded = ("DATABASE_URL", "DBPOOL_", "WEBAPP_", "PORT", "GUNICORN_", "WEB_CONCURRENCY")
    environ = _programs.without_pg(os.environ)
    return {key: value for key, value in environ.items() if not key.startswith(excluded)}


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


@pytest.fixture(scope="module")
def checkout() -> Iterator[Path]:
    """A copy of the sources with its own data, in a folder that the server's user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="dbpool-run-", dir=memory()))
    folder.chmod(0o755)
    for package in ("dbpool", "webapp"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignore)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def run(checkout: Path) -> Iterator[Callable[..., Application]]:
    """A function that starts applications; they are killed after the test."""
    started: list[Application] = []

    def start(**environ: str) -> Application:
        started.append(Application(checkout, **environ))
        return started[-1]

    yield start
    for application in started:
        if application.process.poll() is None:
            application.process.terminate()
        application.process.wait(STOP_SECONDS)
    until(lambda: not servers(checkout))


def servers(checkout: Path) -> list[int]:
    return [
        pid
        for cluster in checkout.glob(".data/postgres-*")
        for pid in _programs.servers_in(cluster)
    ]


@contextmanager
def stopping_in_time() -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < STOP_SECONDS


Run = Callable[..., Application]


def test_serves_the_api_and_the_views_and_keeps_the_data(run: Run, checkout: Path) -> None:
    first = run().await_served()
    status, note = first.request("POST", "/notes", {"title": "kept"})
    assert status == 201
    status, stats = first.get("/db/stats")
    pool = stats["pools"]["default"]
    assert status == 200
    assert pool["active"] + pool["idle"] + pool["connecting"] == pool["size"]
    with stopping_in_time():
        code, output = first.stop()
    assert code == 0
    assert f"http://127.0.0.1:{first.port}/db/" in output
    assert "Traceback" not in output
    assert not servers(checkout)

    second = run().await_served()
    assert second.get(f"/notes/{note['id']}") == (200, note)


def test_a_pools_default_size_is_its_workers_threads_and_one(run: Run) -> None:
    assert largest(run()) == 9
    assert largest(run(DBPOOL_MAX_SIZE="3")) == 3
    assert largest(run(DBPOOL_MIN_SIZE="9")) == 9


def largest(application: Application) -> int:
    pools = application.await_served().get("/db/stats?scope=process")[1]["pools"]
    size: int = pools["default"]["max_size"]
    return size


def test_ctrl_c_in_a_terminal_stops_it_quietly(run: Run, checkout: Path) -> None:
    application = run().await_served()
    with stopping_in_time():
        os.killpg(application.process.pid, signal.SIGINT)  # to the whole group, as a terminal does
        code, output = application.wait_for_exit()
    assert code == 0
    assert "Traceback" not in output
    assert "KeyboardInterrupt" not in output
    assert not servers(checkout)


def test_stops_in_time_while_a_request_is_stuck(run: Run, checkout: Path) -> None:
    application = run().await_served()
    with locked_notes(checkout):
        with suppress(OSError), socket.create_connection(("127.0.0.1", application.port)) as client:
            client.sendall(b"GET /notes HTTP/1.1\r\nHost: localhost\r\n\r\n")
            until(lambda: active(application) == 1)
            with stopping_in_time():
                assert application.stop()[0] == 0
    assert not servers(checkout)


def test_a_request_that_holds_a_connection_is_counted(run: Run, checkout: Path) -> None:
    application = run().await_served()
    with locked_notes(checkout):
        with socket.create_connection(("127.0.0.1", application.port)) as busy:
            busy.sendall(b"GET /notes HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            until(lambda: active(application) == 1)
            pool = application.get("/db/stats")[1]["pools"]["default"]
            assert pool["active"] + pool["idle"] + pool["connecting"] == pool["size"]
    until(lambda: active(application) == 0)


def active(application: Application) -> int:
    number: int = application.get("/db/stats")[1]["pools"]["default"]["active"]
    return number


@contextmanager
def locked_notes(checkout: Path) -> Iterator[None]:
    """Keep every request for notes waiting."""
    import psycopg

    conninfo = embedded.Server(checkout / ".data").conninfo
    conn = psycopg.connect(conninfo)
    try:
        conn.execute("lock table notes")
        yield
    finally:
        conn.close()


def test_two_at_once_share_the_server_and_the_last_one_stops_it(run: Run, checkout: Path) -> None:
    first, second = run(), run()
    first.await_served()
    second.await_served()
    status, note = first.request("POST", "/notes", {"title": "shared"})
    assert status == 201
    assert first.stop()[0] == 0
    assert second.get(f"/notes/{note['id']}") == (200, note)
    assert second.stop()[0] == 0
    assert not servers(checkout)


def test_the_next_supervisor_takes_over_from_a_killed_one(run: Run, checkout: Path) -> None:
    killed = run().await_served()
    status, note = killed.request("POST", "/notes", {"title": "survives"})
    assert status == 201
    killed.process.kill()
    killed.process.wait()
    following = run(PORT=str(killed.port)).await_served()
    until(lambda: following.serves(f"/notes/{note['id']}"))
    assert following.stop()[0] == 0
    assert not servers(checkout)


def test_killing_gunicorn_ends_the_supervisor_with_a_message(run: Run, checkout: Path) -> None:
    application = run().await_served()
    with stopping_in_time():
        os.kill(application.gunicorn(), signal.SIGKILL)
        code, output = application.wait_for_exit()
    assert code == 1
    assert "gunicorn ended by itself: killed by SIGKILL" in output
    assert not servers(checkout)
    following = run(PORT=str(application.port)).await_served()
    assert following.stop()[0] == 0


def test_a_postmaster_that_was_killed_is_started_again(run: Run, checkout: Path) -> None:
    application = run().await_served()
    server = embedded.Server(checkout / ".data")
    pid = server.pid_in_file()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    until(lambda: server.pid() not in {None, pid})
    until(lambda: application.serves("/notes"), START_SECONDS)
    code, output = application.stop()
    assert code == 0
    assert "starting it again" in output


def test_the_next_supervisor_serves_after_everything_was_killed(run: Run, checkout: Path) -> None:
    application = run().await_served()
    pid = embedded.Server(checkout / ".data").pid_in_file()
    assert pid is not None
    master = application.gunicorn()
    for victim in (application.process.pid, master, pid):
        os.kill(victim, signal.SIGKILL)
    application.process.wait()
    following = run(PORT=str(application.port)).await_served()
    assert following.get("/notes")[0] == 200
    assert following.stop()[0] == 0


def test_a_port_in_use_is_an_error_of_one_line(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, output = run(PORT=str(port)).wait_for_exit()
    assert code == 1
    assert output == f"webapp: port {port} is in use; another one: make run PORT={port + 1}\n"


def test_an_empty_number_of_workers_is_the_default(run: Run, dsn: str) -> None:
    application = run(DATABASE_URL=dsn, WEB_CONCURRENCY="").await_served()
    assert len(psutil.Process(application.gunicorn()).children()) == 2


@pytest.mark.parametrize("port", ["http", "-1", "65536", "1e3", "9" * 5000])
def test_an_invalid_port_is_an_error_of_one_line(checkout: Path, port: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "webapp"],
        cwd=checkout,
        env=clean_environ() | {"PORT": port},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == f"webapp: PORT must be a number up to 65535, not {port[:20]!r}\n"


def test_an_unreachable_database_is_an_error_of_one_line(run: Run, checkout: Path) -> None:
    url = f"postgresql://someone:s3cr3t@127.0.0.1:{free_port()}/app"
    code, output = run(DATABASE_URL=url).wait_for_exit()
    assert code == 1
    assert output.startswith("webapp: cannot use the database: ")
    assert output.count("\n") == 1
    assert "refused" in output.lower()
    assert "s3cr3t" not in output
    assert not servers(checkout)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DBPOOL_MAX_SIZE", "many"),
        ("DBPOOL_TIMEOUT", "-1"),
        ("DATABASE_URL", "postgresql://someone:s3cr3t@host:port:port/app"),
        ("DATABASE_URL_FILE", "/nonexistent/url"),
    ],
)
def test_a_wrong_setting_is_an_error_of_one_line(run: Run, name: str, value: str) -> None:
    code, output = run(**{name: value}).wait_for_exit()
    assert code == 1
    assert output.startswith("webapp: ")
    assert output.count("\n") == 1
    assert "s3cr3t" not in output


def test_the_open_demo_is_served_to_this_machine_only(run: Run, checkout: Path) -> None:
    code, output = run(WEBAPP_HOST="0.0.0.0").wait_for_exit()
    assert code == 1
    assert output == "webapp: the embedded demo shows everything, so it is not served on 0.0.0.0\n"
    assert not servers(checkout)


def test_details_stay_closed_with_the_users_own_database(
    run: Run, checkout: Path, dsn: str
) -> None:
    application = run(DATABASE_URL=dsn, DBPOOL_TOKEN="knock-knock").await_served()
    assert not servers(checkout)
    assert application.get("/db/stats")[0] == 401
    assert application.request("POST", "/notes", {"title": "elsewhere"})[0] == 201
    assert application.stop()[0] == 0
