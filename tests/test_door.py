"""The door: the views in a process of their own, which answer while every worker hangs."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dbpool import ConfigError
from dbpool.cli import main
from dbpool.cli._running import find_processes
from dbpool.door._pages import Response
from dbpool.door._server import Door, parse_address
from dbpool.door._views import Views
from dbpool.metrics import Metrics, Snapshot
from dbpool.processes import Processes
from dbpool.settings.app import AppSettings

from .gunicorn_site import ROOT, Site, conf_of
from .postgres import free_port, until

TOKEN = "a-token-of-some-length"
OPEN = {"host": "localhost:8900"}


class Pool:
    """Stands in for a pool; the test sets its state."""

    def __init__(self, state: str = "up", **sizes: int) -> None:
        self.state, self.sizes = state, {"max_size": 4, **sizes}

    def stats(self) -> Snapshot:
        return Metrics().snapshot([], state=self.state, **self.sizes)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "stats"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def publish(directory: Path) -> Iterator[Callable[..., Processes]]:
    with ExitStack() as stack:

        def publish(**pools: Pool) -> Processes:
            """Publish statistics as a worker with these pools does."""
            processes = Processes(pools, directory, "shop")
            stack.callback(processes.close)
            assert processes.publish()
            return processes

        yield publish


def views_of(directory: Path, **options: Any) -> Views:
    settings = AppSettings(**{"details": "always", **options})

    def find() -> Processes:
        if not list(directory.glob("*.json")):
            raise ConfigError("there is no application")
        return Processes({}, directory, "shop")

    return Views(settings, find)


def get(views: Views, path: str, **headers: str) -> tuple[int, Any]:
    answer = views.respond(path, OPEN | headers)
    return answer.status, json.loads(answer.body)


# Answers


def test_a_damaged_file_is_logged_once_and_not_at_each_request(
    directory: Path, publish: Callable[..., Processes], caplog: pytest.LogCaptureFixture
) -> None:
    publish(default=Pool(active=1, size=1))
    (directory / "shop-1-1.json").write_text("{")
    (directory / "shop-1-1.json").chmod(0o600)
    views = Views(AppSettings(details="always"), lambda: find_processes(directory, None))
    assert [get(views, "/stats")[0] for _ in range(3)] == [200] * 3
    views.close()
    assert len([text for text in caplog.messages if "cannot be used" in text]) == 1


def test_it_answers_what_the_workers_published(
    directory: Path, publish: Callable[..., Processes]
) -> None:
    views = views_of(directory)
    publish(default=Pool(active=2, idle=1, size=3))
    publish(default=Pool(active=1, idle=1, size=2))
    status, report = get(views, "/stats")
    assert status == 200
    assert report["pools"]["default"]["active"] == 3
    assert report["findings"][0]["code"] == "DB00"
    assert "history" not in report
    assert get(views, "/stats?include=history,journal")[1]["journal"] == []
    workers = get(views, "/stats?include=workers")[1]["workers"]["default"]
    assert sorted(worker["in_use"] for worker in workers) == [1, 2]
    assert get(views, "/stats?include=all")[0] == 400
    assert get(views, "/nothing")[0] == 404
    metrics = views.respond("/metrics", OPEN)
    assert b'db_client_connections{pool_name="default",state="used"} 3.0' in metrics.body
    assert b'dbpool_finding{code="DB01",pool_name="default"} 0.0' in metrics.body


def test_retry_after_differs_between_clients(directory: Path) -> None:
    views = views_of(directory, details="token", token=TOKEN)
    for path in ("/health/ready", "/stats"):
        headers = OPEN | {"authorization": f"Bearer {TOKEN}"}
        answers = [views.respond(path, headers) for _ in range(60)]
        assert {answer.status for answer in answers} == {503}
        waits = {int(answer.headers["Retry-After"]) for answer in answers}
        assert len(waits) > 1
        assert 1 <= min(waits) <= max(waits) <= 10


def test_without_an_application_it_says_so(directory: Path) -> None:
    status, answer = get(views_of(directory), "/stats")
    assert status == 503
    assert answer["error"].startswith("there is no application")
    assert views_of(directory).respond("/metrics", OPEN).status == 503
    assert views_of(directory).respond("/", OPEN).status == 200


def test_parameters_are_those_of_the_blueprint(
    directory: Path, publish: Callable[..., Processes]
) -> None:
    publish()
    views = views_of(directory)
    both = views.respond("/stats?include=history&include=journal,%20workers", OPEN)
    assert {"history", "journal", "workers"} <= json.loads(both.body).keys()
    for path in ("/stats", "/metrics"):
        assert views.respond(f"{path}?scope=all", OPEN).status == 200
        for query in ("scope=x", "scope=process", "limit=1&limit=2", "include=x"):
            assert views.respond(f"{path}?{query}", OPEN).status == 400, query


def test_the_live_page_loads_only_from_the_door(directory: Path) -> None:
    page = views_of(directory).respond("/", OPEN)
    text = page.body.decode()
    assert "{{" not in text
    assert 'data-stats="/stats"' in text
    for name, kind in (("live.js", "javascript"), ("live.css", "css"), ("icon.svg", "svg")):
        assert f'"/static/{name}"' in text
        answer = views_of(directory).respond(f"/static/{name}", OPEN)
        assert (answer.status, kind in answer.content_type) == (200, True)
    assert "default-src 'none'" in page.all_headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    "path", ["/static/../_views.py", "/static/%2e%2e/app.py", "//etc/passwd", "/static/x.css", "/static/"]
)  # fmt: skip
def test_no_other_file_is_served(directory: Path, path: str) -> None:
    assert views_of(directory).respond(path, OPEN).status == 404


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"me:{password}".encode()).decode()


@pytest.mark.parametrize(
    ("offered", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Basic \xff", 401),
        ("Basic !!!", 401),
        ("", 401),
        (f"Bearer {TOKEN}", 200),
        (basic(TOKEN), 200),
        (basic("wrong"), 401),
    ],
)
def test_details_need_the_token(
    directory: Path, publish: Callable[..., Processes], offered: str | None, status: int
) -> None:
    publish(default=Pool())
    views = views_of(directory, details="token", token=TOKEN)
    headers = {} if offered is None else {"authorization": offered}
    for path in ("/stats", "/metrics", "/"):
        answer = views.respond(path, headers)
        assert answer.status == status
        assert ("WWW-Authenticate" in answer.headers) == (status == 401)
    assert views.respond("/health/live", headers).status == 200


def test_without_a_token_details_are_closed(directory: Path) -> None:
    views = views_of(directory, details="token")
    assert views.respond("/stats", {"authorization": "Bearer "}).status == 403
    assert "findings" not in json.loads(views.respond("/health", {}).body)


def test_open_details_are_for_localhost_only(directory: Path) -> None:
    views = views_of(directory)
    for host in ("evil.example", "localhost.evil.example", "127.evil.example", ""):
        assert views.respond("/stats", {"host": host}).status == 403
    for host in ("localhost", "127.0.0.1:8900", "[::1]:8900"):
        assert views.respond("/", {"host": host}).status == 200


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=40), st.dictionaries(st.sampled_from(["host", "authorization", "accept"]), st.text()))  # fmt: skip
def test_any_request_headers_get_an_answer(
    directory: Path, target: str, headers: dict[str, str]
) -> None:
    views = views_of(directory, details="token", token=TOKEN)
    assert isinstance(views.respond(f"/{target}", headers), Response)
    assert isinstance(views.respond(target, headers), Response)


@pytest.mark.parametrize(
    ("pools", "status", "expected"),
    [
        ([Pool("up", idle=1)], 200, "up"),
        ([Pool("up", active=4, waiting=2)], 200, "degraded"),
        ([Pool("down"), Pool("up")], 200, "up"),
        ([Pool("down"), Pool("starting")], 503, "down"),
        ([Pool("starting")], 503, "starting"),
        ([], 503, "starting"),
    ],
)
def test_it_is_ready_while_one_worker_is(
    directory: Path,
    publish: Callable[..., Processes],
    pools: list[Pool],
    status: int,
    expected: str,
) -> None:
    for pool in pools:
        publish(default=pool)
    answer = views_of(directory).respond("/health/ready", {})
    assert (answer.status, json.loads(answer.body)["status"]) == (status, expected)
    assert ("Retry-After" in answer.headers) == (status == 503)


def test_it_is_ready_if_no_database_is_required(
    directory: Path, publish: Callable[..., Processes]
) -> None:
    publish(default=Pool("down"))
    views = views_of(directory, required=())
    assert get(views, "/health/ready") == (
        200,
        {"status": "degraded", "databases": {"default": "down"}},
    )


def test_old_statistics_of_a_worker_do_not_make_it_ready(
    directory: Path, publish: Callable[..., Processes], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(default=Pool("up"))
    views, now = views_of(directory), time.monotonic()
    for later, ready, live in ((9, 200, 200), (12, 503, 200), (29, 503, 200), (40, 503, 503)):
        monkeypatch.setattr("time.monotonic", lambda later=later: now + later)
        assert views.respond("/health/ready", {}).status == ready
        assert views.respond("/health/live", {}).status == live


def test_a_worker_that_publishes_rarely_is_overdue_later(
    directory: Path, publish: Callable[..., Processes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One with many pools has much to write."""
    publish(default=Pool("up"))
    (path,) = directory.glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"interval": 14.0}))
    views, now = views_of(directory), time.monotonic()
    for later, ready in ((12, 200), (27, 200), (30, 503)):
        monkeypatch.setattr("time.monotonic", lambda later=later: now + later)
        assert views.respond("/health/ready", {}).status == ready


def test_it_runs_without_a_worker_for_a_minute(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views, now = views_of(directory), time.monotonic()
    for later, live in ((50, 200), (70, 503)):
        monkeypatch.setattr("dbpool.door._views.monotonic", lambda later=later: now + later)
        assert views.respond("/health/live", {}).status == live


def test_it_logs_once_why_there_is_nothing_to_serve(
    directory: Path,
    publish: Callable[..., Processes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    views, now = views_of(directory), time.monotonic()
    views.tick()
    assert caplog.messages == [], "the workers may still start"
    monkeypatch.setattr("dbpool.door._views.monotonic", lambda: now + 20)
    line = "door: there is nothing to serve: there is no application [DBE07]"
    for _ in range(3):
        views.tick()
        assert caplog.messages == [line]
    processes = publish(default=Pool("up"))
    views.tick()
    processes.close()
    for path in directory.glob("shop-*"):
        path.unlink()
    views.tick()
    assert caplog.messages == [line] * 2


def test_it_runs_the_monitor_only_while_no_worker_does(
    directory: Path, publish: Callable[..., Processes]
) -> None:
    from dbpool.monitor import Monitor

    processes = publish(default=Pool("up"))
    views = views_of(directory)
    views.tick()
    assert json.loads((directory / "shop.lease").read_bytes())["reader"] is True
    assert json.loads((directory / "shop.findings").read_bytes())["findings"][0]["code"] == "DB00"
    monitor = Monitor({}, processes)
    monitor.tick()
    assert json.loads((directory / "shop.lease").read_bytes())["reader"] is False
    views.tick()
    assert json.loads((directory / "shop.lease").read_bytes())["reader"] is False
    monitor.close()
    views.close()


# Its server


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8900", ("127.0.0.1", 8900)),
        (":8900", ("127.0.0.1", 8900)),
        ("[::1]:8900", ("::1", 8900)),
        ("unix:/run/x", "/run/x"),
        ("/run/x", "/run/x"),
    ],
)
def test_addresses_are_parsed(text: str, address: object) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    ["8900", "localhost", "x:y", "127.0.0.1:99999", "http://127.0.0.1:8900", "tcp://10.0.0.1:8900",
     "::1:8900", "[::1]", "127.0.0.1:\u0661", f"127.0.0.1:{'9' * 5000}", "a b:80", "unix:", " ",
     f"unix:/{'x' * 107}"],
)  # fmt: skip
def test_invalid_addresses_are_rejected(text: str) -> None:
    with pytest.raises(ConfigError, match="DBPOOL_SERVE"):
        parse_address(text)


@pytest.fixture
def serve(directory: Path) -> Iterator[Callable[..., Door]]:
    with ExitStack() as stack:

        def serve(address: tuple[str, int] | str = ("127.0.0.1", 0), *, wait: bool = True) -> Door:
            door = Door(address, views_of(directory))
            thread = threading.Thread(target=door.run)
            thread.start()
            stack.callback(thread.join, 10)
            stack.callback(door.stop)
            if wait:
                until(lambda: door.address is not None)
            return door

        yield serve


def fetch(port: int, path: str = "/health/live", method: str = "GET") -> http.client.HTTPResponse:
    conn = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    conn.request(method, path)
    return conn.getresponse()


def test_it_speaks_http(serve: Callable[..., Door]) -> None:
    port = serve().address[1]
    answer = fetch(port)
    assert (answer.status, json.loads(answer.read())) == (200, {"status": "up"})
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    head = fetch(port, method="HEAD")
    assert (head.status, head.read()) == (200, b"")
    assert int(head.headers["Content-Length"]) > 0
    for method in ("POST", "PUT", "BREW"):
        refused = fetch(port, method=method)
        assert refused.status == 501
        assert refused.headers["X-Content-Type-Options"] == "nosniff"
        assert refused.headers["Cache-Control"] == "no-store"
        assert json.loads(refused.read())["error"]
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(b"POST /stats HTTP/1.0\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.0 501")


@pytest.mark.parametrize("request_line", [b"GET /<b>x y z HTTP/1.1", b"GET /<b> HTTP/3.0", b"<b>"])
def test_a_malformed_request_is_rejected_without_quoting_it(
    serve: Callable[..., Door], request_line: bytes
) -> None:
    port = serve().address[1]
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(request_line + b"\r\n\r\n")
        answer = b"".join(iter(lambda: client.recv(10_000), b""))
    assert b"<b>" not in answer
    assert b"error" in answer


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="needs IPv6")
def test_it_listens_on_ipv6_too(serve: Callable[..., Door]) -> None:
    port = serve(("::1", 0)).address[1]
    conn = http.client.HTTPConnection("::1", port, timeout=10)
    conn.request("GET", "/health/live")
    assert conn.getresponse().status == 200
    conn.close()


def test_connections_are_bounded_in_number_and_time(
    serve: Callable[..., Door], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dbpool.door._server._CONNECTION_TIMEOUT", 1.5)
    port = serve().address[1]
    began = time.monotonic()
    slow = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(16)]
    for each in slow:
        each.sendall(b"GET / HTTP/1.0\r\nX-")

    def is_refused() -> bool:
        try:
            return not fetch(port).status
        except (OSError, http.client.HTTPException):
            return True

    until(is_refused, 1.0)  # after all sixteen have been accepted
    for each in slow:  # although they go on sending
        while time.monotonic() < began + 1.0:
            each.sendall(b"x")
            time.sleep(0.1)
        each.settimeout(10)
        with suppress(ConnectionError):
            assert each.recv(10_000) == b""
        each.close()
    assert 1.4 < time.monotonic() - began < 6
    until(lambda: is_served(port))


def test_a_port_in_use_logs_one_warning_and_is_retried(
    serve: Callable[..., Door], caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        door = serve(("127.0.0.1", port), wait=False)
        until(lambda: caplog.records)
        time.sleep(1.2)
        assert len(caplog.records) == 1
        assert f"cannot listen on 127.0.0.1:{port} yet" in caplog.text
    until(lambda: door.address is not None)
    assert fetch(port).status == 200


def test_a_unix_socket_is_private_and_replaces_an_old_one(
    serve: Callable[..., Door], tmp_path: Path
) -> None:
    path = tmp_path / "door.sock"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
    door = serve(str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(b"GET /health/live HTTP/1.0\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.0 200")
    door.stop()
    until(lambda: not path.exists())


def test_open_details_on_a_public_address_are_rejected(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DBPOOL_DETAILS", "always")
    assert main(["serve", "0.0.0.0:8900"]) == 1
    assert "DBPOOL_TOKEN" in capsys.readouterr().err
    assert main(["serve"]) == 1
    assert "DBPOOL_SERVE" in capsys.readouterr().err


def test_the_settings_are_read_once(
    directory: Path, publish: Callable[..., Processes], tmp_path: Path
) -> None:
    """The warning about a short token is logged at the start, not at each request."""
    publish(default=Pool())
    port, log = free_port(), tmp_path / "log"
    with log.open("w") as errors:
        server = subprocess.Popen(
            [sys.executable, "-m", "dbpool", "serve", f":{port}", f"--dir={directory}"],
            cwd=tmp_path, stderr=errors, env=os.environ | {"PYTHONPATH": str(ROOT), "DBPOOL_TOKEN": "short"},
        )  # fmt: skip
    try:
        until(lambda: is_served(port), 20)
        for _ in range(5):
            assert fetch(port, "/health").status == 200
            assert fetch(port, "/stats").status == 401
        until((directory / "shop.findings").exists)
    finally:
        server.terminate()
        assert server.wait(10) == 0
    logged = log.read_text()
    assert f"page, stats, metrics and health on :{port}" in logged
    assert logged.count("may be guessed") <= 1


def test_the_command_says_where_it_serves_once_it_does(directory: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with socket.create_server(("127.0.0.1", 0)) as taken, log.open("w") as errors:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        server = subprocess.Popen(
            [sys.executable, "-m", "dbpool", "serve", address, f"--dir={directory}"],
            cwd=tmp_path, stderr=errors, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        until(lambda: "cannot listen" in log.read_text(), 20)
        assert "health on" not in log.read_text()
    until(lambda: f"health on {address}\n" in log.read_text(), 20)
    server.terminate()
    assert server.wait(10) == 0


# Its processes


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(each) for each in found.read_text().split()] if found.exists() else []


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def is_served(port: int) -> bool:
    with suppress(OSError, http.client.HTTPException):
        return fetch(port).status == 200
    return False


def test_the_server_is_restarted_and_ends_with_its_master(
    directory: Path, publish: Callable[..., Processes]
) -> None:
    processes, port = publish(default=Pool()), free_port()
    supervisor = subprocess.Popen(
        [sys.executable, "-m", "dbpool.door._supervisor", f"127.0.0.1:{port}", f"--dir={directory}"],
        stdin=subprocess.PIPE, cwd=ROOT, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until(lambda: is_served(port), 20)
        (first,) = children(supervisor.pid)
        os.kill(first, signal.SIGKILL)
        until(lambda: children(supervisor.pid) not in ([], [first]) and is_served(port), 20)
        (second,) = children(supervisor.pid)
        assert supervisor.stdin is not None
        supervisor.stdin.close()
        time.sleep(0.7)
        assert is_served(port), "it ended although a worker lives"
        processes.close()
        for path in directory.glob("*.alive"):
            path.unlink()
        for path in directory.glob("*.json"):
            path.unlink()
        assert supervisor.wait(20) == 0
        assert is_gone(second)
    finally:
        supervisor.kill()
        supervisor.wait()


@pytest.mark.parametrize(("address", "details"), [("8900", "token"), ("0.0.0.0:0", "always")])
def test_a_server_with_wrong_settings_is_not_started_again(
    directory: Path, address: str, details: str
) -> None:
    environ = {**os.environ, "DBPOOL_SERVE": address, "DBPOOL_DETAILS": details}
    with subprocess.Popen(
        [sys.executable, "-m", "dbpool.door._supervisor", f"--dir={directory}"],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=environ, text=True,
    ) as supervisor:  # fmt: skip
        assert supervisor.wait(20) == 2
        assert supervisor.stderr is not None
        (line,) = supervisor.stderr.read().splitlines()
        assert line.startswith("dbpool: "), line
        assert "DBPOOL_" in line


def test_the_server_ends_if_its_supervisor_is_killed(directory: Path) -> None:
    port = free_port()
    supervisor = subprocess.Popen(
        [sys.executable, "-m", "dbpool.door._supervisor", f"127.0.0.1:{port}", f"--dir={directory}"],
        stdin=subprocess.PIPE, cwd=ROOT, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until(lambda: is_served(port), 20)
    (server,) = children(supervisor.pid)
    supervisor.kill()
    supervisor.wait()
    until(lambda: is_gone(server), 20)
    assert supervisor.stdin is not None
    supervisor.stdin.close()


@pytest.fixture
def site(tmp_path: Path, dsn: str) -> Iterator[tuple[Site, int]]:
    """Two gunicorn workers with a door."""
    port = free_port()
    site = Site(
        tmp_path, dsn, more=f"loglevel = 'warning'\n{conf_of('gthread', workers=2)}",
        DBPOOL_SERVE=f"127.0.0.1:{port}", DBPOOL_DETAILS="always", DBPOOL_DOTENV="off",
    )  # fmt: skip
    yield site, port
    with suppress(ProcessLookupError):
        os.killpg(site.process.pid, signal.SIGKILL)
    until(lambda: not is_served(port), 20)
    site.kill()


def doors(site: Site) -> list[int]:
    """The pids of the door's supervisor and its server."""
    found = [pid for pid in children(site.process.pid) if b"_supervisor" in command(pid)]
    return found + [child for pid in found for child in children(pid)]


def command(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def test_it_answers_while_every_thread_of_every_worker_hangs(
    site: tuple[Site, int], dsn: str
) -> None:
    served, port = site
    until(lambda: is_served(port), 20)
    until(lambda: fetch(port, "/health/ready").status == 200)  # although no worker was asked
    waiting = "select count(*) from pg_locks where locktype = 'advisory' and not granted"
    with psycopg.connect(dsn, autocommit=True) as conn, ThreadPoolExecutor(100) as clients:
        conn.execute("select pg_advisory_lock(1)")

        def all_hang() -> bool:
            clients.submit(served.get, "/lock")  # gunicorn chooses the worker
            return bool((conn.execute(waiting).fetchone() or (0,))[0] == 8)

        until(all_hang, 20, pause=0.1)
        with pytest.raises(TimeoutError):
            urllib.request.urlopen(f"http://127.0.0.1:{served.port}/db/health/live", timeout=0.5)
        slowest = 0.0
        for n in range(100):
            path = ("/", "/stats", "/metrics", "/health")[n % 4]
            began = time.monotonic()
            answer = fetch(port, path)
            answer.read()
            slowest = max(slowest, time.monotonic() - began)
            assert answer.status == 200
        assert slowest < 1.0  # a tenth of that on a quiet machine

        def findings() -> list[Any]:
            report = json.loads(fetch(port, "/stats").read())
            return [each["code"] for each in report["findings"]]

        until(lambda: findings()[0] == "DB04", 20, pause=0.2)
        conn.execute("select pg_advisory_unlock_all()")


def test_a_master_that_is_killed_leaves_no_door(site: tuple[Site, int]) -> None:
    served, port = site
    until(lambda: is_served(port), 20)
    pids = doors(served)
    assert len(pids) == 2
    os.kill(served.process.pid, signal.SIGKILL)
    served.process.wait(10)
    until(lambda: all(map(is_gone, pids)), 30)


def test_it_survives_a_reload_and_ends_with_the_server(site: tuple[Site, int]) -> None:
    served, port = site
    until(lambda: is_served(port), 20)
    pids = doors(served)
    before = {process["pid"] for process in served.stats()["processes"]}
    os.kill(served.process.pid, signal.SIGHUP)
    until(lambda: before.isdisjoint(p["pid"] for p in json.loads(fetch(port, "/stats").read())["processes"]), 30)  # fmt: skip
    assert doors(served) == pids
    assert served.stop() < 10
    until(lambda: all(map(is_gone, pids)), 20)
    assert served.process.returncode == 0


PLAIN_APP = """
{sample}

def app(environ, start_response):
    databases.default.fetch_value("select 1")
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"done"]
"""


def test_it_serves_an_application_without_flask(tmp_path: Path, dsn: str) -> None:
    """As on the documentation's page, with the pool made in the master."""
    found = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "door.md").read_text(), re.DOTALL)
    assert found is not None
    port = free_port()
    site = Site(
        tmp_path, dsn, preload=True, base="", app=PLAIN_APP.format(sample=found[1]),
        is_awaited=False, more=conf_of("gthread", workers=2), DATABASE_URL=dsn,
        DBPOOL_SERVE=f"127.0.0.1:{port}", DBPOOL_DETAILS="always", DBPOOL_DOTENV="off",
    )  # fmt: skip
    try:
        until(lambda: is_served(port) and fetch(port, "/health/ready").status == 200, 20)
        assert [site.get("/") for _ in range(3)] == ["done"] * 3

        def checkouts() -> int:
            report = json.loads(fetch(port, "/stats").read())
            return int(report["pools"]["default"]["counters"]["checkouts"])

        until(lambda: checkouts() >= 3, 20)
    finally:
        site.stop()
        site.kill()
    until(lambda: not is_served(port), 20)


# Signing in with a browser


@pytest.fixture
def closed(directory: Path, publish: Callable[..., Processes]) -> Views:
    publish(default=Pool())
    return views_of(directory, details="token", token=TOKEN)


HTML = {"accept": "text/html,*/*;q=0.8"}


def test_a_browser_signs_in_at_the_door_and_out_again(closed: Views) -> None:
    form = closed.respond("/stats", HTML)
    assert (form.status, form.content_type) == (401, "text/html; charset=utf-8")
    assert form.headers["WWW-Authenticate"] == 'Bearer realm="dbpool"'
    assert b'action="/sign-in"' in form.body
    assert b'name="next" value="stats"' in form.body
    assert b"{{" not in form.body
    wrong = closed.submit("/sign-in", HTML, b"token=no")
    assert (wrong.status, b"This token is wrong." in wrong.body) == (401, True)
    right = closed.submit("/sign-in", HTML, f"token={TOKEN}&next=stats".encode())
    assert (right.status, right.headers["Location"]) == (303, "/stats")
    cookie = right.headers["Set-Cookie"]
    assert cookie.endswith("Path=/; HttpOnly; SameSite=Strict")
    signed_in = HTML | {"cookie": f"other=1; {cookie.partition(';')[0]}"}
    for path in ("/stats", "/metrics", "/"):
        assert closed.respond(path, signed_in).status == 200
    assert closed.respond("/sign-in", signed_in).headers["Location"] == "/"
    assert b'action="/sign-out" >' in closed.respond("/", signed_in).body
    answer = closed.respond("/stats", {"accept": "*/*", "x-requested-with": "fetch"})
    assert answer.headers["WWW-Authenticate"] == 'Bearer realm="dbpool"', "no dialog"
    out = closed.submit("/sign-out", signed_in, b"")
    assert out.headers["Location"] == "/sign-in"
    assert "Max-Age=0" in out.headers["Set-Cookie"]
    old = HTML | {"cookie": cookie.partition("=")[0] + "=old"}
    assert b"Your session has ended" in closed.respond("/", old).body


def test_a_browser_signs_in_behind_a_proxy_that_takes_a_prefix_off(closed: Views) -> None:
    proxied = HTML | {"x-forwarded-prefix": "/ops/db", "x-forwarded-proto": "https, http"}
    assert b'href="/ops/db/static/live.css"' in closed.respond("/", proxied).body
    right = closed.submit("/sign-in", proxied, f"token={TOKEN}".encode())
    assert right.headers["Location"] == "/ops/db/"
    assert right.headers["Set-Cookie"].endswith("Path=/ops/db; HttpOnly; SameSite=Strict; Secure")
    for prefix in ("//evil.example", "/a\r\nX: y", "evil", '/"><b>', "/" + "a" * 999):
        prefixed = HTML | {"x-forwarded-prefix": prefix}
        assert b'action="/sign-in"' in closed.respond("/", prefixed).body


def test_foreign_forms_are_rejected(closed: Views, directory: Path) -> None:
    form = f"token={TOKEN}".encode()
    assert closed.submit("/sign-in", {"sec-fetch-site": "cross-site"}, form).status == 403
    assert closed.submit("/stats", HTML, form).status == 501
    assert closed.submit("/sign-in", HTML, b"&".join([b"a=b"] * 99)).status == 401
    assert b"closed: set" in views_of(directory, details="token").respond("/", HTML).body


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=30), st.binary(max_size=200), st.text(max_size=60))
def test_any_form_content_gets_an_answer(
    closed: Views, target: str, form: bytes, cookie: str
) -> None:
    for path in ("/sign-in", "/sign-out", target):
        assert "token" not in closed.submit(path, HTML | {"cookie": cookie}, form).headers


def test_a_forms_size_is_bounded(serve: Callable[..., Door]) -> None:
    port = serve().address[1]
    for length in ("5000", "-1", "x", "1_0", "9" * 5000, None):
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            given = b"" if length is None else f"Content-Length: {length}\r\n".encode()
            client.sendall(b"POST /sign-in HTTP/1.0\r\n" + given + b"\r\n")
            assert client.recv(100).startswith(b"HTTP/1.0 413")
