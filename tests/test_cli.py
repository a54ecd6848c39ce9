"""The command `python -m dbpool`: its output and exit status."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dbpool import Databases, Settings, __version__
from dbpool.cli import main
from dbpool.cli._probe import is_exposed
from dbpool.processes import Processes
from dbpool.settings._conninfo import parse

from .postgres import Server

ROOT = Path(__file__).parent.parent


def dbpool(
    *arguments: str, cwd: Path | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dbpool", *arguments],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "HOME": "/nonexistent",
            **environ,
        },
        cwd=cwd or "/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


Call = Callable[[str, dict[str, str]], tuple[int, str, str]]


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    """Call a command in this process; return its status and its output on both streams."""

    def call(command: str, environ: dict[str, str]) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        status = main(command.split())
        return status, *capsys.readouterr()

    return call


def test_check_reports_and_masks(server: Server) -> None:
    url = f"postgresql://postgres:hunter2@127.0.0.1:{server.port}/postgres"
    done = dbpool("check", DATABASE_URL=url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("default: ok\n")
    assert "server version: " in done.stdout
    assert "hunter2" not in done.stdout + done.stderr


def test_check_as_json(server: Server) -> None:
    done = dbpool("check", "--json", DATABASE_URL=server.conninfo)
    report = json.loads(done.stdout)
    assert report["ok"] is True
    assert report["databases"]["default"]["port"] == server.port


@pytest.mark.parametrize(
    ("params", "kind"),
    [
        ({"user": "nobody_here"}, "password"),
        ({"dbname": "nowhere"}, "database"),
        ({"port": 1}, "refused"),
        ({"host": "does-not-resolve.invalid"}, "dns"),
    ],
)
def test_check_prints_the_error_without_a_traceback(
    server: Server, params: dict[str, object], kind: str
) -> None:
    done = dbpool("check", DATABASE_URL=server.conninfo_for(**params), DBPOOL_OUTAGE_GRACE="1")
    assert done.returncode == 1
    assert "default: failed" in done.stdout
    assert f"kind: {kind}" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "environ",
    [
        {"DATABASE_URL": "postgresql://u:hunter2%zz@h/d"},
        {"DATABASE_URL": "host=h password='hunter2"},
        {"DBPOOL_TIMEOUT": "soon"},
        {"DBPOOL_DATABASES": "replica"},
        {"DATABASE_URL_FILE": "/nowhere"},
        # A connection string in the wrong place is not repeated.
        {"DBPOOL_DATABASES": "postgresql://u:hunter2@h/d"},
        {"DBPOOL_POOLER": "host=h password=hunter2"},
        {"DBPOOL_TIMEOUT": "postgresql://u:hunter2@h/d"},
        {"DATABASE_URL_FILE": "postgresql://u:hunter2@h/d"},
    ],
)
@pytest.mark.parametrize("command", ["check", "wait --timeout 1"])
def test_wrong_settings_are_one_line(environ: dict[str, str], command: str, call: Call) -> None:
    status, output, errors = call(command, environ)
    error = errors.strip() or output.partition("error: ")[2].partition("\n")[0]
    assert status == 1
    assert len(error.splitlines()) == 1
    assert next(iter(environ)).partition("_")[0] in error  # the variable or one like it
    assert "hunter2" not in output + errors


@pytest.mark.parametrize(
    "environ",
    [
        {"DBPOOL_DETAILS": "nonsense"},
        {"DBPOOL_REQUIRED": "nowhere"},
        {"DBPOOL_REQUIRED": "postgresql://u:hunter2@h/d"},
        {"DBPOOL_TOKEN_FILE": "/nowhere"},
        {"DBPOOL_ERROR_HANDLERS": "perhaps"},
    ],
)
def test_check_rejects_wrong_settings_of_the_application(
    server: Server, environ: dict[str, str], call: Call
) -> None:
    environ = {**environ, "DATABASE_URL": server.conninfo}
    status, output, _ = call("check", environ)
    assert status == 1
    assert output.startswith("default: ok\n")
    assert output.splitlines()[-1].startswith(f"error: {next(iter(environ))}")
    status, output, _ = call("check --json", environ)
    assert status == 1
    assert json.loads(output)["error"].startswith(next(iter(environ)))


def test_strict_fails_on_unknown_variables(server: Server) -> None:
    environ = {"DATABASE_URL": server.conninfo, "DBPOOL_MAX_SISE": "3"}
    lenient = dbpool("check", cwd=None, **environ)
    assert lenient.returncode == 0
    assert "DBPOOL_MAX_SISE; did you mean DBPOOL_MAX_SIZE?" in lenient.stdout
    assert dbpool("check", "--strict", cwd=None, **environ).returncode == 1


def test_unknown_variables_in_a_dotenv_are_reported(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DBPOOL_DATABASES=replica\nDBPOOL_MAX_SISE=3\n")
    environ = {"DATABASE_URL": server.conninfo, "DBPOOL_REPLICA_URL": server.conninfo}
    done = dbpool("check", "--strict", cwd=tmp_path, **environ)
    assert done.returncode == 1
    assert done.stdout.count("unknown variable") == 1
    assert "DBPOOL_MAX_SISE; did you mean DBPOOL_MAX_SIZE?" in done.stdout


def test_a_remote_host_below_verify_full_is_a_warning() -> None:
    url = "host=db.invalid user=u"
    done = dbpool("check", DATABASE_URL=url, DBPOOL_OUTAGE_GRACE="0.1")
    assert "warning: the server is remote" in done.stdout


def test_check_shows_what_is_in_effect(server: Server) -> None:
    url = server.conninfo_for(
        connect_timeout=7, tcp_user_timeout=4000, options="-c statement_timeout=1500"
    )
    done = dbpool("check", DATABASE_URL=url, DBPOOL_LOCK_TIMEOUT="3s")
    assert done.returncode == 0, done.stderr
    for line in (
        "connect_timeout = 7",
        "tcp_user_timeout = 4.0",
        "statement_timeout = 1.5",
        "lock_timeout = 3.0",
        "idle_in_transaction_timeout = 60.0",
    ):
        assert f"  {line}\n" in done.stdout


def test_check_reads_a_database_in_sql_ascii(server: Server, call: Call) -> None:
    url = server.conninfo_for(client_encoding="sql_ascii")
    status, shown, _ = call("check", {"DATABASE_URL": url})
    assert status == 0
    assert "  statement_timeout = 30.0\n" in shown


def test_check_shows_the_server_s_own_timeouts_behind_a_pooler(server: Server) -> None:
    url = server.conninfo_for()
    done = dbpool("check", "--json", DATABASE_URL=url, DBPOOL_POOLER="transaction")
    shown = json.loads(done.stdout)["databases"]["default"]["settings"]
    assert shown["statement_timeout"] == 0.0  # nothing was sent
    unreachable = dbpool("check", DATABASE_URL="host=127.0.0.1 port=1", DBPOOL_POOLER="transaction")
    assert "statement_timeout" not in unreachable.stdout


@pytest.mark.parametrize(
    ("conninfo", "exposed"),
    [
        ("host=db.example.com", True),
        ("host=db.example.com sslmode=require", True),
        ("host=db.example.com sslmode=verify-full", False),
        ("host=localhost", False),
        ("host=/run/postgresql", False),
        ("host=127.0.0.1,db.example.com", True),
        ("", False),
    ],
)
def test_exposed_connections(conninfo: str, exposed: bool) -> None:
    assert is_exposed(parse(conninfo), {}) is exposed


@pytest.mark.parametrize(
    ("environ", "exposed"),
    [
        ({"PGHOSTADDR": "10.1.2.3"}, True),
        ({"PGHOST": "db.example.com", "PGSSLROOTCERT": "system"}, False),  # implies verify-full
    ],
)
def test_exposed_connections_of_the_environment(environ: dict[str, str], exposed: bool) -> None:
    assert is_exposed({}, environ) is exposed


def test_wait_does_not_wait_for_a_connect_that_hangs() -> None:
    with socket.create_server(
        ("127.0.0.1", 0)
    ) as silent:  # the kernel accepts, and nothing answers
        url = f"host=127.0.0.1 port={silent.getsockname()[1]} user=u connect_timeout=40"
        began = time.monotonic()
        assert dbpool("wait", "--timeout", "0.5", DATABASE_URL=url).returncode == 1
        assert time.monotonic() - began < 20.0  # the connect itself takes 40 s


def test_wait_returns_when_the_database_serves(server: Server) -> None:
    assert dbpool("wait", "--timeout", "10", DATABASE_URL=server.conninfo).returncode == 0


def test_wait_gives_up_with_the_reason() -> None:
    done = dbpool("wait", "--timeout", "0.5", DATABASE_URL="host=127.0.0.1 port=1 user=u")
    assert done.returncode == 1
    assert "Connection refused" in done.stderr
    assert "Traceback" not in done.stderr


def test_wait_goes_on_until_a_misconfiguration_is_corrected(server: Server, tmp_path: Path) -> None:
    url = server.conninfo_for(user="latecomer", dbname="postgres", password="secret")
    server.execute("drop role if exists latecomer")
    with subprocess.Popen(
        [sys.executable, "-m", "dbpool", "wait", "--timeout", "30"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "DATABASE_URL": url},
        cwd=tmp_path,
    ) as waiting:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(1.5)
        server.execute("create role latecomer login password 'secret'")
        assert waiting.wait(20) == 0
    server.execute("drop role latecomer")


def test_stats_of_this_process_are_json(server: Server) -> None:
    done = dbpool("stats", "--scope", "process", DATABASE_URL=server.conninfo)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report.keys() == {"schema", "time", "scope", "processes", "pools", "findings"}
    assert report["pools"]["default"]["counters"]["checkouts"] == 1


def test_the_exit_status_of_stats_shows_that_a_database_is_down() -> None:
    url = "host=127.0.0.1 port=1 user=u"
    done = dbpool("stats", "--scope", "process", DATABASE_URL=url, DBPOOL_OUTAGE_GRACE="0.1")
    assert done.returncode == 1
    assert json.loads(done.stdout)["pools"]["default"]["state"] == "down"


def test_stats_reads_an_applications_statistics_without_joining_it(
    dsn: str, tmp_path: Path
) -> None:
    tmp_path.chmod(0o700)
    with Databases({"default": Settings(conninfo=dsn)}) as databases:
        for _ in range(3):
            databases.default.fetch_value("select 1")
        processes = Processes(databases, tmp_path, app="shop")
        processes.start()
        processes.publish()
        try:
            done = dbpool("stats", "--dir", str(tmp_path))
        finally:
            processes.close()
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [process["pid"] for process in report["processes"]] == [os.getpid()]
    assert report["scope"] == "all"
    assert report["pools"]["default"]["counters"]["checkouts"] == 3
    assert len(list(tmp_path.glob("*.json"))) == 1


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_directory_without_statistics_is_one_line(tmp_path: Path, mode: int) -> None:
    (tmp_path / "stats").mkdir()
    (tmp_path / "stats").chmod(mode)
    if mode == 0o755:
        (tmp_path / "stats" / "app-1-1.json").write_text("{}")
    done = dbpool("stats", "--dir", str(tmp_path / "stats"))
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["stats", "top --once", "plan --for 0.1"])
def test_a_missing_directory_is_named_with_its_variable(
    tmp_path: Path, command: str, call: Call
) -> None:
    status, _, errors = call(f"{command} --dir {tmp_path}/nowhere", {"PGHOST": "/nowhere"})
    assert status == 1
    assert f"(--dir, DBPOOL_STATS_DIR) is missing: '{tmp_path}/nowhere'" in errors
    (tmp_path / "4711-zq7").mkdir(0o700)
    _, _, errors = call(f"{command} --dir {tmp_path}/4711-zq7", {})
    assert f"{tmp_path}/4711-zq7 contains no statistics" in errors


def test_stats_of_an_application_that_does_not_run_are_an_error(call: Call) -> None:
    status, output, errors = call("stats --app nowhere", {"PGHOST": "/nowhere"})
    assert (status, output) == (1, "")  # whether or not others run here
    assert len(errors.splitlines()) == 1


def test_a_url_in_place_of_a_directory_is_not_repeated() -> None:
    done = dbpool("stats", DBPOOL_STATS_DIR="postgresql://app:s3cr3t@db/shop")
    assert done.returncode == 1
    assert "s3cr3t" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_dotenv_is_read(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"DATABASE_URL={server.conninfo}\n")
    assert dbpool("check", cwd=tmp_path).returncode == 0


def test_an_unreadable_dotenv_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"DATABASE_URL=\xff\xfe")
    done = dbpool("check", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"dbpool: cannot read {tmp_path / '.env'}: it is not UTF-8 [DBE07]\n"


def test_json_is_json_for_wrong_settings_too() -> None:
    done = dbpool("check", "--json", DBPOOL_TIMEOUT="soon")
    assert done.returncode == 1
    assert "DBPOOL_TIMEOUT" in json.loads(done.stdout)["error"]


@pytest.mark.parametrize("command", ["wait --timeout", "plan --for", "serve --worker-timeout"])
@pytest.mark.parametrize("time", ["-1", "nan", "inf", "soon", ""])
def test_options_take_a_time(command: str, time: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(f"{command}={time}".split())
    assert caught.value.code == 2
    assert f"argument {command.split()[1]}: it must be " in capsys.readouterr().err


def test_wait_takes_a_duration_with_a_unit(server: Server) -> None:
    assert dbpool("wait", "--timeout", "1m", DATABASE_URL=server.conninfo).returncode == 0


def test_wait_waits_for_every_database(server: Server) -> None:
    environ = {
        "DATABASE_URL": server.conninfo,
        "DBPOOL_DATABASES": "replica",
        "DBPOOL_REPLICA_URL": "host=127.0.0.1 port=1 user=u",
    }
    done = dbpool("wait", "--timeout", "2s", cwd=None, **environ)
    assert done.returncode == 1
    assert done.stderr.startswith("dbpool: replica does not serve: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_closed_output_pipe_causes_no_traceback(server: Server) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "dbpool", "check", "--json"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "DATABASE_URL": server.conninfo},
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""


def test_version_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"dbpool {__version__}\n"


def test_wrong_usage_exits_with_two() -> None:
    assert dbpool("dance").returncode == 2
    assert dbpool().returncode == 2


@pytest.mark.parametrize("command", ["check", "check --json", "wait", "explain DBE01"])
@pytest.mark.parametrize("closed", ["<&-", ">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_streams_closed_at_the_start_change_no_exit_status(
    server: Server, tmp_path: Path, command: str, closed: str
) -> None:
    """Nor does an ASCII terminal. Probes and cron jobs rely on the exit status."""
    environ = {"DATABASE_URL": server.conninfo, "PATH": os.environ["PATH"], "LC_ALL": "C"}
    environ |= {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    line = f"exec {sys.executable} -m dbpool {command} {closed}"
    done = subprocess.run(
        ["sh", "-c", line], env=environ, cwd=tmp_path, capture_output=True, timeout=60, check=False
    )
    assert b"Traceback" not in done.stderr
    assert done.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(server: Server) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dbpool", "check"], stdout=full, stderr=subprocess.PIPE,
            env={"DATABASE_URL": server.conninfo, "PYTHONPATH": str(ROOT)}, cwd="/", text=True,
            timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "dbpool: cannot print: No space left on device\n"
