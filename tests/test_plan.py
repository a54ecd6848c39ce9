"""`python -m dbpool plan` with real servers, a real PgBouncer and a running application."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from dbpool import Databases, Settings
from dbpool.cli import main
from dbpool.processes import Processes
from tests.faults.test_pgbouncer import PROGRAM, Bouncer

from .postgres import Server, until
from .threads import Load

Plan = Callable[..., tuple[int, str]]


@pytest.fixture
def plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Plan:
    """Run the command in this process; return its status and what it printed."""

    def plan(*arguments: str, **environ: str) -> tuple[int, str]:
        monkeypatch.chdir(tmp_path)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        # Without a directory it would find any application that runs on this machine.
        return main(["plan", "--for", "0", *arguments]), capsys.readouterr().out

    return plan


@pytest.fixture
def narrow(make_server: Callable[..., Server]) -> Server:
    """A server with 30 connections, 3 of them reserved, and an ordinary role."""
    server = make_server(max_connections=30, superuser_reserved_connections=3)
    server.execute("create role app login password 'right'")
    until(lambda: not sessions(server))  # they would count as sessions of others
    return server


def sessions(server: Server) -> list[str]:
    """A server's sessions from the system's process list, as a query would add its own."""
    titles = []
    for child in psutil.Process(server.postmaster_pid).children():
        with suppress(psutil.Error):  # it has just ended
            titles.append(" ".join(child.cmdline()))
    return [title for title in titles if "127.0.0.1(" in title or "[local]" in title]


def url_of(server: Server) -> str:
    return server.conninfo_for(user="app", password="right")


def limits(printed: str) -> dict[str, Any]:
    return {limit["what"]: limit for limit in json.loads(printed)["limits"]}


def test_a_plan_that_fits_exits_with_zero(narrow: Server, plan: Plan) -> None:
    status, printed = plan("--workers", "2", DATABASE_URL=url_of(narrow), DBPOOL_MAX_SIZE="6")
    assert status == 0
    assert printed == (
        "ok: the server of default allows 27 connections (30, minus 3 reserved); the pools may open"
        " 2 x 6 + 1 (default) = 13, or 26 during a deploy\n"
    )


def test_a_database_in_sql_ascii_is_read(narrow: Server, plan: Plan) -> None:
    url = f"{url_of(narrow)} client_encoding=sql_ascii"
    _, printed = plan("--json", DATABASE_URL=url, DBPOOL_MAX_SIZE="6")
    assert limits(printed)["the server of default"]["need"] == 7


def test_without_the_monitor_its_connection_is_not_counted(narrow: Server, plan: Plan) -> None:
    _, printed = plan("--json", DATABASE_URL=url_of(narrow), DBPOOL_BLOCKERS="false")
    assert limits(printed)["the server of default"]["need"] == 10


def test_a_plan_that_does_not_fit_names_the_setting(narrow: Server, plan: Plan) -> None:
    status, printed = plan("--workers", "2", DATABASE_URL=url_of(narrow), DBPOOL_MAX_SIZE="7")
    assert status == 1
    assert printed.startswith("too many: the server of default allows 27 connections (30, minus 3")
    assert printed.splitlines()[1] == "set DBPOOL_MAX_SIZE to 6, or raise max_connections to 33"


def test_databases_of_one_server_share_its_connections(narrow: Server, plan: Plan) -> None:
    narrow.execute("create database reports")
    status, printed = plan(
        "--json",
        DATABASE_URL=url_of(narrow),
        DBPOOL_DATABASES="reports",
        DBPOOL_REPORTS_URL=narrow.conninfo_for(user="app", password="right", dbname="reports"),
        DBPOOL_REPORTS_MAX_SIZE="4",
        WEB_CONCURRENCY="2",
    )
    found = limits(printed)["the server of default, reports"]
    assert (found["need"], found["need_in_deploy"], status) == (2 * 10 + 1 + 2 * 4 + 1, 60, 1)


def test_only_sessions_of_others_take_room(narrow: Server, plan: Plan) -> None:
    """An ordinary role can count them, although it sees none of their details."""
    own_url = url_of(narrow) + " application_name=dbpool:default@web1/17"
    monitor = url_of(narrow) + " application_name=dbpool:monitor"
    with psycopg.connect(narrow.conninfo), psycopg.connect(own_url), psycopg.connect(monitor):
        _, printed = plan("--json", DATABASE_URL=url_of(narrow))
    assert limits(printed)["the server of default"]["others"] == 1


def test_reserved_connections_are_subtracted(
    make_server: Callable[..., Server], plan: Plan
) -> None:
    server = make_server(
        max_connections=30, superuser_reserved_connections=2, reserved_connections=5
    )
    server.execute("create role app login password 'right'")
    _, printed = plan("--json", DATABASE_URL=url_of(server))
    assert limits(printed)["the server of default"]["reserved"] == 7


def test_the_limits_of_role_and_database_are_respected(narrow: Server, plan: Plan) -> None:
    narrow.execute("alter role app connection limit 7")
    narrow.execute("alter database postgres connection limit 6")
    with psycopg.connect(narrow.conninfo):
        status, printed = plan("--json", DATABASE_URL=url_of(narrow), DBPOOL_MAX_SIZE="2")
    found = limits(printed)
    role = found["the CONNECTION LIMIT of role app"]
    database = found["the CONNECTION LIMIT of database postgres"]
    assert (role["most"], role["others"], role["ok"]) == (7, 0, True)
    assert (database["most"], database["others"], database["ok"]) == (6, 1, False)
    assert "ALTER DATABASE postgres CONNECTION LIMIT) to 7" in database["advice"]
    assert status == 1


def test_a_database_that_cannot_be_asked_is_named(narrow: Server, plan: Plan) -> None:
    url = narrow.conninfo_for(user="app", password="wr0ng")
    status, printed = plan(DATABASE_URL=url)
    assert status == 1
    assert printed.startswith("unknown: default: ")
    assert "password authentication failed" in printed
    assert "wr0ng" not in printed


def test_an_invalid_host_name_causes_no_traceback(plan: Plan) -> None:
    environ = {"DATABASE_URL": f"postgresql://u@{'x' * 70}/d", "WEB_CONCURRENCY": " "}
    code, output = plan(**environ)
    assert code == 1
    assert re.fullmatch("unknown: default: Unicode(Encode)?Error\n", output)


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "9" * 5000, "\u0663"])
def test_an_invalid_web_concurrency_is_an_error(value: str, plan: Plan) -> None:
    url = "host=127.0.0.1 port=1"
    status, printed = plan("--json", DATABASE_URL=url, WEB_CONCURRENCY=value)
    assert status == 1
    assert json.loads(printed)["error"].startswith("WEB_CONCURRENCY cannot be read: it must be")


# Behind PgBouncer


@pytest.fixture
def bouncer(narrow: Server) -> Iterator[Bouncer]:
    extra = "stats_users = app\nreserve_pool_size = 2"
    bouncer = Bouncer(narrow, size=5, extra=extra)
    bouncer.start()
    yield bouncer
    bouncer.kill()


@pytest.mark.skipif(PROGRAM is None, reason="there is no pgbouncer here")
def test_behind_pgbouncer_its_limits_are_used(bouncer: Bouncer, plan: Plan) -> None:
    """max_client_conn, here 6, limits clients; only its 5 + 2 connections reach the server."""
    settings = {"DATABASE_URL": bouncer.conninfo_for(), "DBPOOL_POOLER": "transaction"}
    status, printed = plan("--json", "--workers", "4", **settings, DBPOOL_MAX_SIZE="2")
    clients = limits(printed)["PgBouncer in front of default"]
    assert (clients["most"], clients["need_in_deploy"], clients["ok"]) == (6, 16, False)
    assert "max_client_conn to 16" in clients["advice"]
    server = limits(printed)["the server of default through PgBouncer"]
    assert (server["need"], server["need_in_deploy"], server["ok"]) == (7, 7, True)
    assert status == 1


@pytest.mark.skipif(PROGRAM is None, reason="there is no pgbouncer here")
def test_databases_behind_one_pooler_share_its_clients(bouncer: Bouncer, plan: Plan) -> None:
    status, printed = plan(
        "--json",
        DATABASE_URL=bouncer.conninfo_for(),
        DBPOOL_DATABASES="reports",
        DBPOOL_REPORTS_URL=bouncer.conninfo_for(),
        DBPOOL_POOLER="transaction",
        DBPOOL_MAX_SIZE="2",
    )
    clients = limits(printed)["PgBouncer in front of default, reports"]
    assert (clients["need"], clients["need_in_deploy"], status) == (4, 8, 1)


@pytest.mark.skipif(PROGRAM is None, reason="there is no pgbouncer here")
def test_a_console_that_denies_access_is_named(narrow: Server, plan: Plan) -> None:
    bouncer = Bouncer(narrow, extra="admin_users = somebody_else")
    bouncer.start()
    try:
        status, printed = plan(DATABASE_URL=bouncer.conninfo_for(), DBPOOL_POOLER="transaction")
    finally:
        bouncer.kill()
    assert status == 1
    assert printed.startswith("unknown: default: PgBouncer's sizes are unknown: its console does")
    assert "stats_users" in printed


# A running application


def test_a_running_applications_load_gives_the_size_it_needs(
    dsn: str, tmp_path: Path, plan: Plan
) -> None:
    (tmp_path / "stats").mkdir(mode=0o700)
    with Databases({"default": Settings(conninfo=dsn, max_size=8)}) as databases:
        processes = Processes(databases, tmp_path / "stats", app="shop")
        processes.start()
        processes.publish()
        load = Load(lambda: databases.default.fetch_value("select 1"), threads=4)
        try:
            load.await_calls(10)
            status, printed = plan(
                "--json", "--for", "4s", "--threads", "4", "--dir", str(tmp_path / "stats"),
                DATABASE_URL=dsn,
            )  # fmt: skip
        finally:
            load.stop()
            processes.close()
    found = json.loads(printed)["load"]["default"]
    assert status == 0
    assert found["max_size"] == 8  # of the running pool, not of the environment
    assert found["reason"] is None, found
    assert 1 <= found["threads_need"] <= found["twice_the_load_needs"] <= 4
    assert found["busy"] == pytest.approx(found["rate"] * found["hold"])


def test_an_idle_application_does_not_give_enough_data(
    dsn: str, tmp_path: Path, plan: Plan
) -> None:
    (tmp_path / "stats").mkdir(mode=0o700)
    with Databases({"default": Settings(conninfo=dsn)}) as databases:
        databases.default.fetch_value("select 1")
        processes = Processes(databases, tmp_path / "stats", app="shop")
        processes.start()
        processes.publish()
        try:
            status, printed = plan(
                "--for", "100ms", "--dir", str(tmp_path / "stats"), DATABASE_URL=dsn
            )
        finally:
            processes.close()
    assert status == 0
    assert printed.splitlines()[-1].startswith(
        "default: max_size is 10; not enough data: 0 of 1000 needed"
    )
