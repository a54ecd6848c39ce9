"""Values of wrong type or size, and misspelt names, are rejected at once with the name."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from contextlib import suppress
from dataclasses import fields
from datetime import timedelta
from decimal import Decimal
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from flask import Flask

from dbpool import ConfigError, DatabaseMisconfigured, Pool, Settings
from dbpool.flask import DBPool
from dbpool.settings import COMMON, unknown_variables
from dbpool.settings.app import AppSettings

ROOT = Path(__file__).parent.parent
HUGE = 10**5000  # too long for Python to print
FIELDS = [field.name for field in fields(Settings) if field.name != "explicit"]
LARGEST = 2_147_483_647


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize(
    "value", [HUGE, -HUGE, [], {}, b"5", object()], ids=lambda v: type(v).__name__
)
def test_a_setting_of_any_type_and_size_is_a_config_error(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        Settings(**{name: value})


class StringEnum(StrEnum):
    ALWAYS = "always"


ODD: list[Any] = [
    None, True, 1.5, float("nan"), float("-inf"), 10**400, "", "\0", "\ud800", "x" * 10_000, b"x", [1],
    (), {}, {"a": 1}, {None}, object(), Decimal("NaN"), timedelta(1), Path("/x"), range(3), len, int,
    iter([1]), memoryview(b"x"), UUID(int=1), ip_address("::1"), StringEnum.ALWAYS, ...,
]  # fmt: skip


@pytest.mark.parametrize("key", [*sorted(COMMON), "DATABASE_URL", "DATABASE_URL_FILE", "PGHOST",
                                 "PGPASSWORD_FILE", "DBPOOL_A_URL", "DBPOOL_A_TIMEOUT"])  # fmt: skip
def test_any_value_in_app_config_is_accepted_or_a_config_error(key: str) -> None:
    for value in ODD:
        app = Flask("app")
        app.config.update(DATABASE_URL="host=h", DBPOOL_DOTENV="off")
        if key.startswith("DBPOOL_A_"):
            app.config["DBPOOL_DATABASES"] = "a"
        app.config[key] = value
        with suppress(ConfigError):
            DBPool(app)


@pytest.mark.parametrize("key", ["DBPOOL_TOKEN", "DBPOOL_STATS_DIR", "DBPOOL_SERVE"])
@pytest.mark.parametrize(
    "value", [True, HUGE, b"a token of bytes", ["x"], 1.5, object()], ids=lambda v: type(v).__name__
)
def test_an_application_setting_of_a_wrong_type_is_a_config_error(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        AppSettings.from_config({key: value}, environ={})


def test_a_token_may_be_a_number() -> None:
    found = AppSettings.from_config({"DBPOOL_TOKEN": 1234567890123456}, environ={})
    assert found.token == "1234567890123456"


@pytest.mark.parametrize("wrong", [5, b"host=h", Path("/run"), ["host=h"]])
def test_a_conninfo_of_a_wrong_type_is_a_configuration_error(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="conninfo must be"):
        Pool(wrong)
    with Pool(lambda: wrong, timeout=2) as pool, pytest.raises(DatabaseMisconfigured) as caught:
        pool.getconn()
    assert "conninfo must be" in str(caught.value)


@pytest.mark.parametrize("wrong", [5, "host=h", [("host", "h")]])
def test_kwargs_of_a_wrong_type_are_a_configuration_error(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="kwargs must be a mapping"):
        Pool("host=h", kwargs=wrong)
    pool = Pool("host=h", kwargs=lambda: wrong, timeout=2)
    with pool, pytest.raises(DatabaseMisconfigured, match="kwargs must be a mapping"):
        pool.getconn()


@pytest.mark.parametrize("parameter", ["password", "application_name", "options"])
def test_a_parameter_that_is_not_utf_8_is_a_configuration_error(parameter: str) -> None:
    """An environment variable may contain any bytes."""
    kwargs = {parameter: os.fsdecode(b"\xff")}
    with Pool("host=127.0.0.1 port=1", kwargs=kwargs, timeout=2) as pool:
        with pytest.raises(
            DatabaseMisconfigured, match=f"{parameter} must be a str without"
        ) as caught:
            pool.getconn()
    assert "\udcff" not in str(caught.value)


@pytest.mark.parametrize("name", ["keepalives_idle", "keepalives_interval", "keepalives_count"])
@pytest.mark.parametrize("value", [0, 40_000])
def test_keepalives_outside_the_systems_range_are_rejected(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be at (least 1|most)"):
        Settings(**{name: value})


@pytest.mark.parametrize("name", ["connect_timeout", "ping_timeout"])
def test_the_largest_timeouts_work(name: str, dsn: str) -> None:
    options: Any = {name: LARGEST, "session_reset": "session", "ping_after": 0}
    with Pool(dsn, max_size=1, timeout=10, **options) as pool:
        pids = [pool.fetch_value("select pg_backend_pid()") for _ in range(3)]
        with pool.connection() as conn:
            assert conn.info.backend_pid == pids[0]
        assert set(pids) == {pids[0]}, "a connection was replaced"
        with pytest.raises(psycopg.Error):
            pool.execute("select 1/0")


@pytest.mark.parametrize("value", ["transaction\r", " Transaction ", "PGBOUNCER\n"])
def test_blanks_around_a_word_are_ignored(value: str) -> None:
    """Windows' line ends leave them. They are ignored around numbers too."""
    environ = {"DATABASE_URL": "host=h", "DBPOOL_POOLER": value, "DBPOOL_PIPELINE_BEGIN": "true\r"}
    found = Settings.from_env(environ=environ)
    assert (found.pooler, found.pipeline_begin) == ("transaction", True)


@pytest.mark.parametrize(
    "name",
    [
        "database_url", "Database_Url", "DATABASE_URI", "SQLALCHEMY_DATABASE_URI", "POSTGRES_DSN",
        "POSTGRESQL_URL", "PGURL", "DB_DSN", "PG_CONNINFO",
    ],
)  # fmt: skip
def test_a_misspelt_variable_is_reported(name: str) -> None:
    with pytest.raises(ConfigError, match=f"DATABASE_URL is not set, but {name} is: rename it"):
        Settings.from_env(environ={name: "postgresql://h/d", "PGUSER": "app"})


def test_a_lower_case_variable_is_reported() -> None:
    assert unknown_variables({"dbpool_timeout": "3"}) == [("dbpool_timeout", "DBPOOL_TIMEOUT")]


def test_dbpool_runs_from_a_zip_file(tmp_path: Path) -> None:
    """zipapp, shiv and pex run it so."""
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in (ROOT / "dbpool").rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                archive.write(path, path.relative_to(ROOT))
    script = "import dbpool; print(dbpool.Pool('host=h').settings.max_size, dbpool.__file__)"
    environ = {**os.environ, "PYTHONPATH": str(tmp_path / "all.zip")}
    for command in (["-c", script], ["-m", "dbpool", "explain", "DBE01"]):
        done = subprocess.run(
            [sys.executable, *command], env=environ, cwd=tmp_path, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "DBE01" in done.stdout


@pytest.mark.parametrize("wrong", [b"zq7", bytearray(b"zq7"), ["zq7"], {"a": "zq7"}, {"zq7"}])
@pytest.mark.parametrize("parameter", ["password", "host", "options"])
def test_a_parameter_of_a_wrong_type_is_a_configuration_error(parameter: str, wrong: Any) -> None:
    """Otherwise libpq gets its `repr`, and the server refuses the password `b'...'`."""
    given = {"host": "127.0.0.1", "port": 1, parameter: wrong}
    with pytest.raises(ConfigError, match=f"^{parameter} must be a str") as caught:
        Settings().connect_params("", given)
    assert "zq7" not in str(caught.value)
    with Pool(kwargs=given) as pool:
        with pytest.raises(DatabaseMisconfigured, match=f"{parameter} must be a str") as refused:
            pool.getconn()
        assert "zq7" not in str(refused.value)


def test_numbers_and_paths_may_be_parameters(tmp_path: Path) -> None:
    given = {"password": 4711, "port": 5432, "sslrootcert": tmp_path, "keepalives": True}
    assert Settings().connect_params("", given)["password"] == "4711"
