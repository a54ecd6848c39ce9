"""The documentation's commands are tested, each in an empty directory."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psycopg
import pytest
from werkzeug.serving import make_server

from dbpool.cli import commands as dbpool_commands
from dbpool.databases import databases_from_env

from .conftest import MakeApp
from .postgres import Server, binaries, free_port, until
from .test_docs import DOCS, PAGES, ROOT, blocks, comment_after, pieces, shape
from .threads import Task

MORE_PAGES = [ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
# Commands tested elsewhere: they need a network, a container engine, or another host.
TESTED_ELSEWHERE = {
    "pip install '.[flask,gunicorn,prometheus]'": ".ci/package",
    "flask dbpool check": ".ci/package",
    "flask dbpool stats": "tests/test_flask_commands.py",
    "flask dbpool explain DB04": ".ci/package",
    "flask run": "tests/test_docs_commands.py",
    'gunicorn "app:create_app()"': "tests/test_docs_commands.py",
    "make run": ".ci/end-to-end",
    "make test": ".ci/run",
}
# The same for lines of shell blocks, by their beginning. Each file reads the line from the page.
SHELL_TESTED_ELSEWHERE = {
    "curl ": "tests/test_docs_commands.py",
    "docker run ": "tests/containers/test_docs.py",
    "gunicorn ": "tests/test_docs_commands.py",
    "kubernetes-validate ": "tools/check_manifests.py",
    "promtool ": "tests/containers/test_cluster.py",
    "psql -c ": "tests/test_docs_commands.py",
    "while ": "tests/test_docs_commands.py",
    "python -m dbpool serve ": "tests/test_docs_commands.py",
    "cd ": "tests/test_rotation.py",
    "openssl ": "tests/test_rotation.py",
    "psql --host ": "tests/test_rotation.py",
}


def commands(code: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with the output that the page shows."""
    for part in re.split(r"^\$ ", code, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield re.sub(r"\s+#.*", "", command).strip(), output


@pytest.mark.parametrize(("path", "code"), blocks("console"))
def test_commands_print_what_the_page_shows(
    path: Path, code: str, dsn: str, tmp_path: Path
) -> None:
    for command, output in commands(code):
        if command.startswith("export ") or command in TESTED_ELSEWHERE:
            continue
        assert command.startswith("python -m dbpool "), f"{command}: add where it is tested"
        done = subprocess.run(
            [sys.executable, *shlex.split(command)[1:]],
            cwd=tmp_path,
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(ROOT),
                "DATABASE_URL": dsn,
                "COLUMNS": "120",
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        status = int(comment_after(path, code, "exit") or 0)
        assert done.returncode == status, done.stdout + done.stderr
        pattern = re.escape(shape(output)).replace(re.escape("..."), ".*")
        assert not output.strip() or re.fullmatch(pattern, shape(done.stdout), re.DOTALL)


@pytest.mark.parametrize(("command", "file"), TESTED_ELSEWHERE.items())
def test_commands_tested_elsewhere_are_tested_there(command: str, file: str) -> None:
    argument = command.removeprefix("pip install ").removeprefix("flask dbpool ")
    assert argument in (ROOT / file).read_text()


@pytest.mark.parametrize("path", [*PAGES, *MORE_PAGES], ids=lambda path: path.stem)
def test_every_command_that_a_page_names_exists(path: Path) -> None:
    text = path.read_text()
    named = set(re.findall(r"(?:python -m|flask) dbpool ([a-z]+)", text))
    assert named <= set(dbpool_commands())
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"[`$] ?make ([a-z-]+)", text)) <= set(targets)


@pytest.mark.parametrize(("path", "code"), blocks("sh"))
def test_each_line_of_a_shell_block_is_tested_somewhere(path: Path, code: str) -> None:
    for line in code.splitlines():
        files = {p for start, p in SHELL_TESTED_ELSEWHERE.items() if line.startswith(start)}
        assert line.startswith("export ") or len(files) == 1, f"{line}: add where it is tested"
        assert all(path.name in (ROOT / file).read_text() for file in files)


@pytest.mark.parametrize(("path", "code"), blocks("sh"))
def test_exported_settings_are_valid_together(path: Path, code: str) -> None:
    pairs = dict(
        word.split("=", 1)
        for line in code.splitlines()
        if line.startswith("export ")
        for word in shlex.split(line.removeprefix("export "), comments=True)
    )
    if pairs:
        databases_from_env(pairs)


def samples_of_start(directory: Path) -> None:
    """Write the samples that begin with a file name into files, as a user does."""
    for piece in pieces(DOCS / "start.md"):
        if name := re.match(r"# (\S+\.py)\n", piece.text):
            (directory / name[1]).write_text(piece.text)


@pytest.mark.parametrize("command", ["flask run", 'gunicorn "app:create_app()"'])
def test_the_site_of_the_start_page_is_served(command: str, dsn: str, tmp_path: Path) -> None:
    pytest.importorskip("gunicorn")
    samples_of_start(tmp_path)
    port = free_port()
    environ = {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}",
        "DATABASE_URL": dsn,
        "DBPOOL_TOKEN": "a token of the test",
        "FLASK_RUN_PORT": f"{port}",
        "GUNICORN_CMD_ARGS": f"--bind 127.0.0.1:{port} --no-control-socket",
    }
    get = partial(fetch, f"http://127.0.0.1:{port}")
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-m", *shlex.split(command)],
            cwd=tmp_path,
            env=os.environ | environ,
            stdout=log,
            stderr=log,
        ) as process,
    ):
        try:
            until(lambda: get("/db/health/live") == 200, 30.0, pause=0.05)
            assert get("/db/health/ready") == 200
            assert get("/db/stats") == 401
            (curl,) = re.findall(r"^curl .*", (DOCS / "start.md").read_text(), re.MULTILINE)
            curl = curl.replace(":5000/", f":{port}/")
            answer = subprocess.check_output(
                ["sh", "-c", f"{curl} --silent"], env=os.environ | environ, text=True, timeout=30
            )
            assert json.loads(answer)["findings"]
        finally:
            process.terminate()


def fetch(site: str, path: str, **headers: str) -> int:
    """The status of the answer, 0 while nothing listens."""
    return fetch_text(site, path, **headers)[0]


def fetch_text(site: str, path: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(site + path, headers=headers)) as answer:
            return int(answer.status), answer.read().decode()
    except urllib.error.HTTPError as ex:
        return ex.code, ""
    except OSError:
        return 0, ""


@contextlib.contextmanager
def shell(script: str, directory: Path, **environ: str) -> Iterator[None]:
    """Run a script during a block, with PostgreSQL's programs and ours on the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), str(binaries()), os.environ["PATH"]])
    with (
        (directory / "log").open("a") as log,
        subprocess.Popen(
            ["sh", "-c", script],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, **environ},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)


def test_the_alert_on_exhaustion_can_be_tested_as_the_page_shows(
    own_server: Server, tmp_path: Path
) -> None:
    pytest.importorskip("gunicorn")
    samples_of_start(tmp_path)
    serve, load = [
        piece.text
        for piece in pieces(DOCS / "alerts.md")
        if piece.label == "sh" and "promtool" not in piece.text
    ]
    port, door = free_port(), free_port()
    environ = {
        "DATABASE_URL": own_server.conninfo,
        "PGHOST": "127.0.0.1",
        "PGPORT": f"{own_server.port}",
        "PGUSER": "postgres",
        "DBPOOL_TOKEN": "a token of the test",
        "DBPOOL_TIMEOUT": "1",
        "GUNICORN_CMD_ARGS": f"--bind 127.0.0.1:{port} --no-control-socket",
    }
    with psycopg.connect(own_server.conninfo) as conn:
        conn.execute("create table visits ()")
    get = partial(
        fetch_text, f"http://127.0.0.1:{door}", Authorization="Bearer a token of the test"
    )

    def is_reported() -> bool:
        text = get("/metrics")[1]
        timeouts = re.findall(
            r"^db_client_connection_timeouts_total{.*} (\S+)$", text, re.MULTILINE
        )
        is_found = re.search(r'^dbpool_finding{.*"DB04".*} 1', text, re.MULTILINE)
        return is_found is not None and any(float(each) > 0 for each in timeouts)

    with shell(serve.replace(":8900", f":{door}"), tmp_path, **environ):
        until(lambda: get("/health/ready")[0] == 200, 30.0, pause=0.05)
        with shell(load.replace(":8000", f":{port}"), tmp_path, **environ):
            until(is_reported, 30.0, pause=0.2)


NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")


@pytest.mark.skipif(NGINX is None, reason="needs nginx")
def test_the_proxy_of_the_security_page_passes_only_readiness(
    make_app: MakeApp, dsn: str, tmp_path: Path
) -> None:
    (locations,) = [each.text for each in pieces(DOCS / "security.md") if each.label == "nginx"]
    server = make_server("127.0.0.1", 0, make_app(dsn, DBPOOL_DETAILS="always"), threaded=True)
    port = free_port()
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    files = "".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in kinds)
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error.log; events {{}}"
        f" http {{ access_log off; {files} upstream app {{ server 127.0.0.1:{server.port}; }}"
        f" server {{ listen 127.0.0.1:{port}; {locations} }} }}"
    )
    serving = Task(server.serve_forever)
    with shell(f"exec {NGINX} -p {tmp_path} -c {tmp_path}/nginx.conf", tmp_path):
        try:
            get = partial(fetch, f"http://127.0.0.1:{port}")
            until(lambda: get("/db/health/ready") == 200, 30.0, pause=0.05)
            for path in ("/db/", "/db/stats", "/db/metrics", "/db/health", "/db/health/live"):
                assert get(path) == 404
        finally:
            server.shutdown()
            serving.result()
            server.server_close()


def test_the_door_starts_as_the_page_shows(tmp_path: Path) -> None:
    (command,) = [
        piece.text
        for piece in pieces(DOCS / "door.md")
        if piece.label == "sh" and not piece.text.startswith("export")
    ]
    port = free_port()
    (tmp_path / "shared").mkdir(0o700)
    command = command.replace(":8900", f":{port}")
    with shell(command, tmp_path, DBPOOL_STATS_DIR=str(tmp_path / "shared")):
        until(lambda: fetch(f"http://127.0.0.1:{port}", "/health/live") == 200, 30.0, pause=0.05)
