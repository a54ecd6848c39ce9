"""The commands `flask dbpool …`, and the names in `flask shell`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from flask import Flask
from flask.cli import ScriptInfo
from psycopg.conninfo import conninfo_to_dict

from dbpool.cli import commands
from dbpool.flask import DBPool
from dbpool.flask._commands import group

from .conftest import MakeApp


def invoke(app: Flask, *arguments: str) -> tuple[int, str]:
    result = app.test_cli_runner().invoke(group, list(arguments))
    return result.exit_code, result.output


def test_check_tries_the_databases_of_the_application(
    make_app: MakeApp, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "host=127.0.0.1 port=1")  # must not be used
    app = make_app(dsn, DBPOOL_MAX_SIZE=3, DBPOOL_DATABASES={"replica": dsn})
    status, output = invoke(app, "check", "--json")
    databases = json.loads(output)["databases"]
    assert status == 0
    assert databases.keys() == {"default", "replica"}
    assert databases["default"]["settings"]["max_size"] == 3


@pytest.mark.parametrize("is_callable", [False, True])
def test_the_commands_connect_with_the_applications_keywords(
    make_app: MakeApp, dsn: str, is_callable: bool
) -> None:
    known = conninfo_to_dict(dsn)
    kwargs: Any = (lambda: known) if is_callable else known
    app = make_app("host=127.0.0.1 port=1", db=DBPool(kwargs=kwargs))
    for command in (["check"], ["wait", "--timeout", "5s"], ["stats", "--scope", "process"]):
        assert invoke(app, *command)[0] == 0, command
    assert "unknown" not in invoke(app, "plan", "--for", "0")[1]


def test_a_failed_check_sets_the_exit_status(make_app: MakeApp) -> None:
    status, output = invoke(make_app("host=127.0.0.1 port=1"), "check")
    assert status == 1
    assert output.startswith("default: failed\n")


def test_stats_are_those_of_the_applications_directory(
    make_app: MakeApp, dsn: str, tmp_path: Path
) -> None:
    tmp_path.chmod(0o700)
    app = make_app(dsn, DBPOOL_STATS_DIR=str(tmp_path))
    assert app.test_client().get("/db/health/ready").status_code == 200
    app.extensions["dbpool"].processes.collect()  # publishes this process
    status, output = invoke(app, "stats")
    assert status == 0
    assert json.loads(output)["pools"]["default"]["counters"]["checkouts"] == 1


def test_explain_needs_no_application() -> None:
    result = Flask("app").test_cli_runner().invoke(group, ["explain", "DB04"])
    assert result.exit_code == 0
    assert result.output.startswith("DB04 Waiting for a lock\n")


@pytest.mark.parametrize("command", ["check", "stats", "wait"])
def test_a_wrong_setting_of_the_application_is_one_line(make_app: MakeApp, command: str) -> None:
    found = ScriptInfo(create_app=lambda: make_app("host=h", DBPOOL_MAX_SIZE="many"))
    result = CliRunner().invoke(group, [command], obj=found)
    assert result.exit_code == 1
    assert result.output.startswith("Error: max_size (DBPOOL_MAX_SIZE) must be a whole number")
    assert len(result.output.splitlines()) == 1


def test_all_commands_exist_and_an_unknown_one_is_a_usage_error(
    make_app: MakeApp, dsn: str
) -> None:
    app = make_app(dsn)
    status, output = invoke(app, "--help")
    assert status == 0
    assert {name for name in commands() if f"\n  {name} " not in output} == set()
    assert invoke(app, "chekc")[0] == 2
    assert invoke(app, "check", "--no-such-option")[0] == 2


def test_a_shell_has_the_extension_and_the_default_pool(make_app: MakeApp, dsn: str) -> None:
    db = DBPool()
    app = make_app(dsn, db=db)
    found = app.make_shell_context()
    assert found["db"] is db
    assert found["pool"] is app.extensions["dbpool"].databases.default
