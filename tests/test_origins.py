"""The source of each setting that is in effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbpool import Pool, Settings
from dbpool.databases import settings_from_config
from dbpool.settings.app import AppSettings
from dbpool.settings.origins import describe_settings

from .conftest import MakeApp

URL = "postgresql://app:s3cret-pass@db.example/shop"


def rows_of(
    environ: dict[str, str] | None = None,
    config: dict[str, Any] | None = None,
    dotenv: dict[str, str] | None = None,
    name: str = "default",
) -> dict[str, tuple[Any, str]]:
    """Each setting's value and source, as an application reads them."""
    environ, config, dotenv = environ or {}, config or {}, dotenv or {}
    pools = settings_from_config(config, environ, dotenv)
    found = describe_settings(pools, config, dotenv, environ=environ)
    return {row["name"]: (row["value"], row["source"]) for row in found["pools"][name]}


def test_each_source_is_named() -> None:
    rows = rows_of(
        {"DATABASE_URL": URL, "DBPOOL_MAX_SIZE": "8"},
        {"DBPOOL_TIMEOUT": "500ms"},
        {"DBPOOL_MAX_SIZE": "4", "DBPOOL_MAX_IDLE": "5m"},
    )
    assert rows["max_size"] == (8, "DBPOOL_MAX_SIZE")
    assert rows["timeout"] == (0.5, "DBPOOL_TIMEOUT in app.config")
    assert rows["max_idle"] == (300.0, "DBPOOL_MAX_IDLE in .env")
    assert rows["min_size"] == (1, "default")
    assert rows["conninfo"][1] == "DATABASE_URL"


def test_a_named_databases_source_is_its_own_variable_or_the_common_one() -> None:
    environ = {
        "DATABASE_URL": URL, "DBPOOL_DATABASES": "replica", "DBPOOL_REPLICA_URL": URL,
        "DBPOOL_REPLICA_MAX_SIZE": "3", "DBPOOL_TIMEOUT": "2",
    }  # fmt: skip
    rows = rows_of(environ, name="replica")
    assert rows["max_size"] == (3, "DBPOOL_REPLICA_MAX_SIZE")
    assert rows["timeout"] == (2.0, "DBPOOL_TIMEOUT")
    assert rows["conninfo"][1] == "DBPOOL_REPLICA_URL"
    config = {"DATABASE_URL": URL, "DBPOOL_DATABASES": {"reports": {"url": URL, "max_size": 2}}}
    rows = rows_of({}, config, name="reports")
    assert rows["max_size"] == (2, "argument")
    assert rows["conninfo"][1] == "DBPOOL_DATABASES in app.config"


def test_the_connection_string_is_the_source_instead_of_a_default() -> None:
    rows = rows_of(
        {"DATABASE_URL": f"{URL}?connect_timeout=9&options=-c%20statement_timeout%3D7s&keepalives_idle=11"}
    )  # fmt: skip
    assert rows["connect_timeout"] == ("9", "connection string")
    assert rows["keepalives_idle"] == ("11", "connection string")
    assert rows["statement_timeout"] == ("7s", "options of connection string")
    rows = rows_of({"DATABASE_URL": f"{URL}?connect_timeout=9", "DBPOOL_CONNECT_TIMEOUT": "4"})
    assert rows["connect_timeout"] == (4, "DBPOOL_CONNECT_TIMEOUT")


def test_an_argument_is_the_source_instead_of_a_variable() -> None:
    environ = {"DATABASE_URL": URL, "DBPOOL_MAX_SIZE": "8"}
    with Pool(URL, max_size=3, open=False) as pool:
        found = describe_settings({"default": pool.settings}, environ=environ)
    rows = {row["name"]: row["source"] for row in found["pools"]["default"]}
    assert rows["max_size"] == "argument"


def test_libpqs_own_variables_may_be_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"default": Settings()}
    row = describe_settings(settings, environ={})["pools"]["default"][0]
    assert (row["name"], row["source"]) == ("conninfo", "libpq's defaults")
    row = describe_settings(settings, environ={"PGHOST": "db"})["pools"]["default"][0]
    assert row["source"] == "PGHOST"
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "8")
    found = describe_settings(settings)["pools"]["default"]
    assert {"name": "connect_timeout", "value": "8", "source": "PGCONNECT_TIMEOUT"} in found


SECRET = "hunter2-hunter2"


def test_no_secret_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(f"postgresql://app:{SECRET}@db/shop")
    for environ in (
        {"DATABASE_URL": f"postgresql://app:{SECRET}@db/shop?sslpassword={SECRET}"},
        {"DATABASE_URL": f"host=db password={SECRET}"},
        {"DATABASE_URL_FILE": str(file)},
        {"DATABASE_URL": "host=db", "PGPASSWORD": SECRET},
        {"DATABASE_URL": "host=db", "PGPASSWORD_FILE": str(file)},
    ):
        pools = settings_from_config({"DBPOOL_TOKEN": SECRET}, environ, environ)
        application = AppSettings(token=SECRET)
        found = describe_settings(pools, {"DBPOOL_TOKEN": SECRET}, environ, application, environ)
        assert SECRET not in json.dumps(found)
        token = next(row for row in found["application"] if row["name"] == "token")
        assert (token["value"], token["source"]) == ("***", "DBPOOL_TOKEN in app.config")


@given(st.dictionaries(st.sampled_from(["DBPOOL_MAX_SIZE", "DBPOOL_TIMEOUT", "PGHOST", "PGOPTIONS"]), st.text()))  # fmt: skip
def test_any_configuration_can_be_described(layer: dict[str, str]) -> None:
    assert json.dumps(describe_settings({"default": Settings()}, layer, layer, environ=layer))


def test_stats_shows_the_sources_if_asked(make_app: MakeApp) -> None:
    client = make_app(URL, DBPOOL_DETAILS="always", DBPOOL_MAX_SIZE=7).test_client()
    found = client.get("/db/stats?include=settings").get_json()["settings"]
    rows = {row["name"]: row for row in found["pools"]["default"]}
    assert rows["max_size"]["source"] == "DBPOOL_MAX_SIZE in app.config"
    assert "s3cret-pass" not in json.dumps(found)
    assert {
        "name": "details",
        "value": "always",
        "source": "DBPOOL_DETAILS in app.config",
    } in found["application"]
