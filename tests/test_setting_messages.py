"""Messages about wrong settings name the setting and the cause, and show no secret."""

from __future__ import annotations

import logging
import re
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from flask import Flask
from hypothesis import example, given
from hypothesis import strategies as st
from psycopg.pq import Conninfo

from dbpool import ConfigError, DatabaseUnavailable, Pool, Settings
from dbpool.cli import main
from dbpool.databases import databases_from_env, settings_from_config
from dbpool.flask import DBPool
from dbpool.settings import unknown_variables
from dbpool.settings.app import AppSettings

SECRET = "hunter2"


def refusal(conninfo: str) -> str:
    """Return the error; it mentions percent-encoding only for a URL with one @ too many."""
    with pytest.raises(ConfigError) as caught:
        databases_from_env({"DATABASE_URL": conninfo})
    text = str(caught.value)
    assert text.startswith("conninfo (DATABASE_URL) is malformed: ")
    assert SECRET not in text
    if "in user and password" in text:
        assert re.search("//[^@/]*[@/].*@", conninfo)
    return text


# Connection strings


@pytest.mark.parametrize(
    ("url", "scheme"),
    [
        (f"mysql://u:{SECRET}@h/d", "mysql"),
        (f"mysql+pymysql://u:{SECRET}@h/d", "mysql+pymysql"),
        ("sqlite:///d.sqlite", "sqlite"),
        ("mongodb://h", "mongodb"),
        (f"postgresql+asyncpg://u:{SECRET}@h/d", "postgresql+asyncpg"),
        ("postgresql+psycopg_async://h/d", "postgresql+psycopg_async"),
        (f"postgres//u:{SECRET}@h/d", "postgres"),
        (f"postgres:/u:{SECRET}@h/d", "postgres"),
        ("POSTGRES://h/d", "POSTGRES"),
        (f"postgis://u:{SECRET}@h/d", "postgis"),
        ("psql://h/d", "psql"),
        (f"jdbc:postgresql://h/d?user=u&password={SECRET}", "jdbc:postgresql"),
    ],
)
def test_another_scheme_is_named(url: str, scheme: str) -> None:
    text = refusal(url)
    assert f"its scheme is {scheme}:" in text
    assert "write postgresql://" in text
    assert "percent-encode" not in text


@pytest.mark.parametrize("url", [f"{SECRET}://h", f"https://u:{SECRET}@h"])
def test_a_doubtful_scheme_is_not_quoted(url: str) -> None:
    assert "its scheme is not postgresql://" in refusal(url)


@pytest.mark.parametrize(
    ("query", "name", "suggestion"),
    [
        ("sslmod=require", "sslmod", "sslmode"),
        ("connect_timout=3", "connect_timout", "connect_timeout"),
        ("application-name=x", "application-name", "application_name"),
        ("sslmode=require&username=u", "username", "user"),
        ("database=d", "database", "dbname"),
        ("ssl=require", "ssl", "sslmode"),
        # Prisma
        ("schema=public", "schema", "options=-csearch_path"),
        ("pgbouncer=true&connection_limit=1", "pgbouncer", "DBPOOL_POOLER"),
        ("connection_limit=1", "connection_limit", "DBPOOL_MAX_SIZE"),
        ("pool_timeout=3", "pool_timeout", "DBPOOL_TIMEOUT"),
        # JDBC, pgxpool, node-postgres, SQLAlchemy
        ("currentSchema=x", "currentSchema", "options=-csearch_path"),
        ("pool_max_conns=3", "pool_max_conns", "DBPOOL_MAX_SIZE"),
        ("idleTimeoutMillis=3", "idleTimeoutMillis", "DBPOOL_MAX_IDLE"),
        ("pool_pre_ping=1", "pool_pre_ping", "DBPOOL_PING_AFTER"),
        ("statement_timeout=3", "statement_timeout", "DBPOOL_STATEMENT_TIMEOUT"),
        ("targetServerType=primary", "targetServerType", "target_session_attrs"),
        ("timezone=UTC", "timezone", "options=-ctimezone%3D"),
        ("sslaccept=strict", "sslaccept", "sslmode"),
        ("charset=utf8", "charset", "client_encoding"),
        ("statement_cache_size=0", "statement_cache_size", "DBPOOL_POOLER"),
    ],
)
def test_an_unknown_parameter_is_named_with_a_suggestion(
    query: str, name: str, suggestion: str
) -> None:
    text = refusal(f"postgresql://u:{SECRET}@h/d?{query}")
    assert f"the parameter {name};" in text
    assert f"did you mean {suggestion}" in text
    assert "percent-encode" not in text


def test_an_unknown_parameter_in_a_key_value_string_is_named() -> None:
    text = refusal(f"host=h sslmod=require password={SECRET}")
    assert "the parameter sslmod; did you mean sslmode?" in text
    assert "did you mean max_size" not in text
    # After a password the word may be the rest of a password with a blank.
    text = refusal("host=h password=an sslmod=require")
    assert "sslmod;" not in text
    assert "did you mean sslmode?" in text


@pytest.mark.parametrize(
    ("string", "message"),
    [
        (f"'postgresql://u:{SECRET}@h/d'", "in quotes"),
        (f'"host=h password={SECRET}"', "in quotes"),
        (f"postgresql://u:{SECRET}@h/d'", "in quotes"),
        (f"<postgresql://u:{SECRET}@h/d>", "in quotes"),
        (f"“postgresql://u:{SECRET}@h/d”", "in quotes"),
        (f"postgresql://u:{SECRET}@h/d;ssl=true", "its database contains ;"),
        (f"postgresql://u:{SECRET}@h/d?options=-csearch_path=x", "%3D"),
        ("**********", "asterisks"),  # pydantic's SecretStr as text
        ("${DATABASE_URL}", "placeholder"),
        ("$(DATABASE_URL)", "placeholder"),
        ("{{ .Values.databaseUrl }}", "placeholder"),
        (f"psql 'postgresql://u:{SECRET}@h/d'", "psql command"),
        (f"psql -h h -W {SECRET}", "psql command"),
        (f"DATABASE_URL=postgresql://u:{SECRET}@h/d", "name of a variable"),
        (f"export DATABASE_URL='postgresql://u:{SECRET}@h/d'", "name of a variable"),
        (f"postgresql://u:{SECRET}@h/d\npostgresql://u@h2/d", "line break"),
        (f"postgresql://u:{SECRET} x@h/d", "blank"),
        (f"postgresql://u:{SECRET}\0x@h/d", "NUL"),
        (f"host=h password={SECRET}\0", "NUL"),
        (f"Host=h;Username=u;Password={SECRET}", "semicolons"),
        (f"User ID=u;Password={SECRET};Server=h", "semicolons"),
        (f"\ufeffpostgresql://u:{SECRET}@h/d", "an invisible character"),
        (f"postgresql://u:{SECRET}@h/d\u200b", "an invisible character"),
        ("server=h dbname=d", "the parameter server; did you mean host?"),
        ('host="h"', 'its host contains "'),
        (f"u:{SECRET}@h/d", "neither a URL"),
        ("localhost:5432/d", "neither a URL"),
        (f"{{'NAME': '{SECRET}'}}", "neither a URL"),
        (f"postgresql://u:{SECRET}@x@h/d", "percent-encode"),
        (f"postgresql://u:x@{SECRET}@h/d", "its host contains @ (percent-encode"),
        (f"postgresql://u:x@@{SECRET}@h/d", "its host contains @ (percent-encode"),
        (f"postgresql://u:{SECRET}/x@h/d", "percent-encode"),
        (f"postgresql://u:{SECRET}%@h/d", "percent-encode it as %25"),
        (f"postgresql://u:{SECRET}@[fe80::1%eth0]/d", "percent-encode it as %25"),
        (f"postgresql://u:{SECRET}@h/d?options=-c%zz", "percent-encode it as %25"),
        (f"postgresql://u:{SECRET}%00@h/d", "%00"),
        (f"postgresql://u:{SECRET}@::1/d", "in brackets: [::1]"),
        ("postgresql://fe80::1:5432/d", "in brackets: [::1]"),
        (f"postgresql://u:{SECRET}@[::1/d", "its brackets are wrong"),
        (f"postgresql://u:{SECRET}@h,[::1]x/d", "its brackets are wrong"),
        (f"postgresql://u:{SECRET}@%2Fcloudsql%2Fp:r:i/d", "write %3A for a :"),
        (f"postgresql://u:{SECRET}@h/d?sslmode", "no name or no value"),
        (f"postgresql://u:{SECRET}@h/d?a=b&&c=d", "no name or no value"),
        (f"postgresql://u:{SECRET}@h:PORT/d", "its port is not a number"),
        ("postgresql://u:[YOUR-PASSWORD]@h/d", "placeholder"),
        ("postgresql://${PGUSER}:${PGPASSWORD}@h/d", "placeholder"),
        ("postgresql://u:{{ password }}@h/d", "placeholder"),
        ("postgresql://u:%(password)s@h/d", "placeholder"),
        ("postgresql://<user>:<password>@<host>/d", "placeholder"),
        (f"url: postgresql://u:{SECRET}@h/d", "give the URL alone"),
        (f"pg_dump postgresql://u:{SECRET}@h/d", "give the URL alone"),
        (f"$env:DATABASE_URL='postgresql://u:{SECRET}@h/d'", "name of a variable"),
        ("/run/secrets/url", "ends in _FILE"),
        ("file:///run/secrets/url", "ends in _FILE"),
        (f"postgresql://u:{SECRET}@h/d?sslmode=require&sslmode=disable", "sslmode twice"),
        (f"host=h password={SECRET} 2", "quote values"),
        (f"host=h password='{SECRET}", "quote values"),
        ("host=localhost:5432", "its host contains a port"),
        ("host=h;port=1", "its host contains ;"),
        ("host=h,port=1", "its host contains ="),
        ("postgresql://u@h..example/d", "its host contains .."),
    ],
)
def test_the_mistake_in_a_string_is_named(string: str, message: str) -> None:
    assert message in refusal(string)


@pytest.mark.parametrize(
    "query", ["host=h1:5432&host=h2:5433", "host=h1&host=h2", "host=h1:5432", "host=h1,h2:5433"]
)
def test_sqlalchemys_notation_of_hosts_is_not_mistaken(query: str) -> None:
    text = refusal(f"postgresql://u:{SECRET}@/d?{query}")
    assert "host twice" in text or "its host contains a port" in text


@pytest.mark.parametrize(
    "string",
    [
        "postgresql://u:p@h1:1,h2:2/d",
        "postgresql://u:p@/d?host=h1,h2&port=1,2",
        "postgresql://u:p@[::1]:5432/d?ssl=true",
        "postgresql://u:p%40%20x@h/d?options=-c%20search_path%3Dx",
        "postgresql+psycopg2://h/d",
        "postgres://",
        "host=::1",
        "host=fe80::1%eth0 port=1",
        "host=/var/run/postgresql",
        "host='@abstract' user='a b'\n dbname = d",
        "",
    ],
)
def test_a_valid_string_is_accepted(string: str) -> None:
    assert Settings(conninfo=string).conninfo.strip() == string.replace("+psycopg2", "")


PIECES = st.sampled_from(["@", "/", ":", "?", "&", "=", "#", "%", " ", "'", "\\", ";", "x", "ssl"])


@given(st.lists(PIECES, max_size=6), st.lists(PIECES, max_size=6))
@example(["&"], ["=x"])
@example([" "], ["="])
def test_no_part_of_a_password_is_quoted(before: list[str], after: list[str]) -> None:
    password = f"{''.join(before)}zQ7q{''.join(after)}"
    for string in (
        f"postgresql://u:{password}@h/d",
        f"postgresql://u@h/d?password={password}",
        f"postgresql+asyncpg://u:{password}@h/d",
        f"host=h password={password} dbname=d",
        f"Host=h;Password={password}",
    ):
        try:
            Settings(conninfo=string)
        except ConfigError as ex:
            assert "zQ7q" not in str(ex)  # noqa: PT017  # some of the strings are well-formed


class Dsn:
    def __str__(self) -> str:
        return "postgresql://u:***@h/d"


def test_a_url_with_a_masked_password_is_reported() -> None:
    """SQLAlchemy, for example, prints *** instead of the password."""
    with pytest.raises(ConfigError, match=r"DATABASE_URL.*its password is [*]{3}"):
        settings_from_config({"DATABASE_URL": Dsn()}, environ={})
    assert "its password is ***" in refusal(str(Dsn()))


@pytest.mark.parametrize("value", [5, b"postgresql://h", ["host=h"], {"NAME": SECRET}])
def test_a_connection_string_of_another_type_is_rejected(value: object) -> None:
    with pytest.raises(ConfigError, match=r"DATABASE_URL.*is malformed") as caught:
        settings_from_config({"DATABASE_URL": value}, environ={})
    assert SECRET not in str(caught.value)


# Nothing names a database


def test_an_empty_secret_file_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "url"
    for content in ("", "\n", "  \n"):
        file.write_text(content)
        settings = Settings.from_env(environ={"DATABASE_URL_FILE": str(file)})
        with pytest.raises(ConfigError, match=r"^DATABASE_URL_FILE: the file is empty"):
            settings.connect_params()


@pytest.mark.parametrize("content", ["", "\n", " \t\n"])
def test_an_empty_file_for_a_password_is_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(content)
    with pytest.raises(ConfigError, match=r"^PGPASSWORD_FILE: the file is empty"):
        Settings(conninfo="host=h", password_file=str(tmp_path / "secret")).connect_params()


@pytest.mark.parametrize("blank", [" ", "\n", "\t \u00a0"])
def test_a_blank_value_does_not_count_as_unset(blank: str) -> None:
    """It may come from an empty template; libpq's defaults would be another database."""
    with pytest.raises(ConfigError, match=r"DATABASE_URL.* is blank"):
        databases_from_env({"DATABASE_URL": blank})
    with pytest.raises(ConfigError, match=r"DBPOOL_B_URL.* is blank"):
        databases_from_env(
            {"DATABASE_URL": "host=h", "DBPOOL_DATABASES": "b", "DBPOOL_B_URL": blank}
        )
    with pytest.raises(ConfigError, match="is blank"):
        Pool(blank)
    with pytest.raises(ConfigError, match="is blank"):
        settings_from_config({"DATABASE_URL": blank}, environ={})
    with pytest.raises(ConfigError, match="conninfo_file must be a path"):
        databases_from_env({"DATABASE_URL_FILE": blank})


@pytest.mark.parametrize("name", ["DATABASE_URL", "DATABASE_URL_FILE", "PGHOST"])
def test_an_empty_variable_is_an_error_if_nothing_else_names_a_database(
    name: str, tmp_path: Path
) -> None:
    """It comes from a secret that is missing; libpq's defaults would be another database."""
    (tmp_path / ".env").write_text(f"{name}=\n")
    for environ, config in ({name: ""}, {}), ({}, {name: ""}):
        with pytest.raises(ConfigError, match=f"^{name} is empty, and nothing else names"):
            settings_from_config(config, environ)
    with pytest.raises(ConfigError, match=f"^{name} is empty, and nothing else names"):
        databases_from_env({}, tmp_path / ".env")
    assert databases_from_env({name: "", "PGPORT": "1"})["default"].resolve() == ""
    environ = {"DATABASE_URL_FILE": "", "DATABASE_URL": "host=h"}
    assert databases_from_env(environ)["default"].resolve() == "host=h"
    with pytest.raises(ConfigError, match="DB_URL is: rename it"):
        databases_from_env({name: "", "DB_URL": "host=h"})


@pytest.mark.parametrize(
    "name",
    ["DATABASE_URI", "SQLALCHEMY_DATABASE_URI", "POSTGRES_URL", "DATABSE_URL", "DATABASE_URLS",
     "DATABASE_ULR", "DATABASE-URL", "DATABASE_URL ", "database_url", "DJANGO_DATABASE_URL",
     "DB_CONNECTION_STRING", "CONNECTION_STRING", "POSTGRES_URL_FILE", "DATABASE_URL_FIEL",
     "DB_HOST", "POSTGRES_HOST", "PG_HOST", "PGHOSTNAME"],
)  # fmt: skip
def test_another_variable_that_names_the_database_is_reported(name: str) -> None:
    suggestion = "PGHOST" if "HOST" in name else "DATABASE_URL" + "_FILE" * ("_FI" in name)
    for config, environ in ({name: f"postgresql://u:{SECRET}@h/d"}, {}), ({}, {name: SECRET}):
        with pytest.raises(
            ConfigError, match=f"^{suggestion} is not set, but {name} is: "
        ) as caught:
            settings_from_config(config, environ=environ)
        assert SECRET not in str(caught.value)
    both = {name: "sqlite://", "DATABASE_URL": "host=h"}
    assert settings_from_config(both, environ={})["default"].resolve() == "host=h"


def test_the_error_says_if_nothing_names_a_database(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    message = "DATABASE_URL is not set: libpq's defaults are used"
    app, db = Flask("app"), DBPool()
    app.config.update(DBPOOL_OUTAGE_GRACE="0s", DBPOOL_DOTENV="off")
    db.init_app(app)
    with app.app_context(), pytest.raises(DatabaseUnavailable, match=message):
        db.pool.fetch_value("select 1")
    with Pool(outage_grace=0) as pool, pytest.raises(DatabaseUnavailable, match=message):
        pool.getconn()
    for conninfo in ("host=127.0.0.1 port=1", "host=/nowhere"):
        with (
            Pool(conninfo, outage_grace=0) as pool,
            pytest.raises(DatabaseUnavailable) as caught,
        ):
            pool.getconn()
        assert message not in str(caught.value)


# libpq's variables in places that libpq does not read


def test_pg_variables_in_a_dotenv_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / ".env"
    file.write_text(f"PGHOST=of-the-file\nPGUSER=u\nPGPASSWORD={SECRET}\nPGOPTIONS='-c geqo=off'\n")
    settings = Settings.from_env(dotenv=file)
    params = settings.connect_params()
    assert (params["host"], params["user"], params["password"]) == ("of-the-file", "u", SECRET)
    assert params["options"].endswith("-c geqo=off")
    assert SECRET not in repr(settings)
    assert SECRET not in str(settings.masked())
    # The setting closest to the connection wins, as in libpq.
    assert settings.connect_params("host=h user=v")["host"] == "h"
    assert settings.connect_params("host=h")["password"] == SECRET
    monkeypatch.setenv("PGHOST", "of-the-environment")
    params = Settings.from_env(dotenv=file).connect_params()
    assert params["host"] == "of-the-environment", "psycopg's errors would name none"
    (tmp_path / "services").write_text("[mine]\nuser=of-the-service\n")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    assert settings.connect_params("service=mine")["user"] == "of-the-service"
    params = Settings().connect_params("service=mine")
    assert "host" not in params, "the service may have a port of its own"


def test_pg_variables_of_a_given_environment_and_configuration_are_used() -> None:
    settings = Settings.from_env(environ={"PGHOST": "h", "PGCONNECT_TIMEOUT": "9"})
    assert settings.connect_params()["host"] == "h"
    assert settings.connect_params()["connect_timeout"] == "9"
    databases = settings_from_config(
        {"PGUSER": "u", "DBPOOL_DATABASES": {"b": "host=b"}}, environ={"PGUSER": "v"}
    )
    assert [each.connect_params()["user"] for each in databases.values()] == ["u", "u"]


PG_VARIABLES = {
    option.envvar.decode(): option.keyword.decode()
    for option in Conninfo.get_defaults()
    if option.envvar
}


@pytest.mark.parametrize(("variable", "keyword"), PG_VARIABLES.items())
def test_every_pg_variable_is_used(variable: str, keyword: str) -> None:
    params = Settings.from_env(environ={variable: "7"}).connect_params()
    assert "7" in str(params[keyword])


@pytest.mark.parametrize("name", ["PGTZ", "PGDATESTYLE", "PGGEQO", "PGSERVICEFILE", "PGSYSCONFDIR"])
def test_a_variable_that_only_libpq_reads_is_reported(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It reads these from the environment of the process alone."""
    file = tmp_path / ".env"
    file.write_text(f"{name}=x\nDATABASE_URL=host=h\n")
    assert unknown_variables({}, file) == [(name, None)]
    databases_from_env({}, file)
    assert caplog.messages == [f"unknown variable {name} is ignored"]
    monkeypatch.setenv(name, "x")
    assert unknown_variables() == []


# Numbers


@pytest.mark.parametrize("name", ["DBPOOL_TIMEOUT", "DBPOOL_MAX_SIZE", "DBPOOL_STATEMENT_TIMEOUT"])
@pytest.mark.parametrize("value", ["-1", "-0.5", -1])
def test_the_error_for_a_negative_number_names_the_allowed_range(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{name}\) must be (0 or more|a whole number), not"):
        settings_from_config({name: value}, environ={})


@pytest.mark.parametrize("value", [timedelta(seconds=3), b"3", [3], {"s": 3}])
def test_the_error_names_a_wrong_type(value: Any) -> None:
    with pytest.raises(ConfigError, match="must be a number of seconds or a time") as caught:
        Settings(timeout=value)
    assert type(value).__name__ in str(caught.value)
    assert "connection string" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["statement_timeout", "lock_timeout", "idle_in_transaction_timeout", "tcp_user_timeout"]
)
@pytest.mark.parametrize("value", ["0.4ms", "0.9ms", 0.0001])
def test_a_time_that_would_be_rounded_to_zero_is_rejected(name: str, value: Any) -> None:
    given: dict[str, Any] = {name: value}
    with pytest.raises(ConfigError, match=f"^{name}.*must be at least 0.001 s"):
        Settings(**given)
    for right in (0, 0.001):
        given[name] = right
        assert getattr(Settings(**given), name) == right


@pytest.mark.parametrize("value", ['"10"', "'10s'", "1_000", "inf", "-nan", "1e3", "null", "5S"])
def test_a_malformed_number_is_quoted(value: str) -> None:
    with pytest.raises(ConfigError, match=r"DBPOOL_MAX_SIZE.* whole number, not ") as caught:
        Settings.from_env(environ={"DATABASE_URL": "host=h", "DBPOOL_MAX_SIZE": value})
    assert value in str(caught.value)


def test_minus_zero_is_zero() -> None:
    assert str(Settings(timeout="-0").timeout) == "0.0"  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["4711471147114711", "/run/secret/token", "root.key", "prefer"])
@pytest.mark.parametrize("name", ["DBPOOL_DETAILS", "DBPOOL_BLOCKERS", "DBPOOL_SHOW_QUERIES"])
def test_an_invalid_choice_is_not_quoted(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be ") as caught:
        AppSettings.from_env({name: value})
    assert value not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^pooler \(DBPOOL_POOLER\) must be none or") as caught:
        Settings.from_env(environ={"DATABASE_URL": "host=h", "DBPOOL_POOLER": value})
    assert value not in str(caught.value)


@pytest.mark.parametrize("name", [" DBPOOL_MAX_SIZE", "DBPOOL-MAX-SIZE", "dbpool.max.size"])
def test_another_spelling_of_a_variable_is_reported(name: str) -> None:
    assert unknown_variables({name: "5"}) == [(name, "DBPOOL_MAX_SIZE")]


def test_a_long_text_is_rejected_quickly() -> None:
    began = monotonic()
    for text in ("1" + " " * 100_000 + "x", " " * 100_000 + "x", "1" * 100_000 + "x"):
        with pytest.raises(ConfigError) as caught:
            Settings(timeout=text)  # type: ignore[arg-type]
        assert len(str(caught.value)) < 300
    for text in ("host=h password=" + "\\'" * 50_000, "'" * 100_001, "x" + " " * 100_000 + "=;"):
        with pytest.raises(ConfigError):
            Settings(conninfo=f"host=h nonsense=x {text}")
    assert monotonic() - began < 2.0


@pytest.mark.parametrize(
    ("environ", "is_warned"),
    [
        ({"DBPOOL_STATEMENT_TIMEOUT": "30000"}, True),
        ({"DBPOOL_LOCK_TIMEOUT": " 5000 "}, True),
        ({"DBPOOL_TIMEOUT": "1000"}, True),
        ({"DBPOOL_CONNECT_TIMEOUT": "5000"}, True),
        ({"DBPOOL_MAX_IDLE": "600000"}, True),
        ({"DBPOOL_MAX_LIFETIME": "86400"}, False),
        ({"DBPOOL_STATEMENT_TIMEOUT": "30000s"}, False),
        ({"DBPOOL_STATEMENT_TIMEOUT": "30000ms"}, False),
        ({"DBPOOL_STATEMENT_TIMEOUT": "999"}, False),
        ({"DBPOOL_MAX_SIZE": "2000"}, False),
    ],
)
def test_seconds_that_look_like_milliseconds_log_one_warning(
    environ: dict[str, str], is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    databases_from_env(environ)
    assert len(caplog.messages) == is_warned
    for text in caplog.messages:
        assert next(iter(environ)) in text
        assert "hours" in text


@pytest.mark.parametrize("key", ["password", "user", "dbname"])
def test_a_nul_is_rejected(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} must be a str without NUL"):
        Settings().connect_params("host=h", {key: "a\0b"})
    file = tmp_path / "password"
    file.write_text("a\0b")
    with pytest.raises(ConfigError, match=r"^password must be a str without NUL"):
        Settings(password_file=str(file)).connect_params("host=h")


def test_a_secret_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_bytes("host=h".encode("utf-8-sig"))
    assert Settings(conninfo_file=str(file)).resolve() == "host=h"


# Names

# Names in other pools: SQLAlchemy, psycopg2, HikariCP, Django, pgxpool, asyncpg, Npgsql,
# node-postgres, Druid.
ELSEWHERE = {
    "pool_size": "max_size",
    "maxsize": "max_size",
    "max_overflow": "max_size",
    "maxconn": "max_size",
    "minconn": "min_size",
    "maximumPoolSize": "max_size",
    "minimumIdle": "min_size",
    "connectionTimeout": "timeout",
    "idleTimeout": "max_idle",
    "maxLifetime": "max_lifetime",
    "leakDetectionThreshold": "leak_after",
    "validationTimeout": "ping_timeout",
    "CONN_MAX_AGE": "max_lifetime",
    "CONN_HEALTH_CHECKS": "ping_after",
    "pool_max_conns": "max_size",
    "pool_min_conns": "min_size",
    "pool_max_conn_lifetime": "max_lifetime",
    "pool_max_conn_idle_time": "max_idle",
    "command_timeout": "statement_timeout",
    "max_inactive_connection_lifetime": "max_idle",
    "MaxPoolSize": "max_size",
    "MinPoolSize": "min_size",
    "ConnectionIdleLifetime": "max_idle",
    "max": "max_size",
    "min": "min_size",
    "idleTimeoutMillis": "max_idle",
    "connectionTimeoutMillis": "timeout",
    "maxActive": "max_size",
    "initialSize": "min_size",
    "maxWait": "timeout",
    "pool_recycle": "max_lifetime",
    "pool_pre_ping": "ping_after",
    "pool_timeout": "timeout",
    "max_sise": "max_size",
}


@pytest.mark.parametrize(("foreign", "suggested"), ELSEWHERE.items())
def test_names_of_other_pools_get_a_suggestion(foreign: str, suggested: str) -> None:
    keyword: dict[str, Any] = {foreign: 3}
    with pytest.raises(ConfigError, match=f"did you mean {suggested}[?]"):
        Pool("host=h", **keyword)
    with pytest.raises(ConfigError, match=f"did you mean {suggested}[?]"):
        Settings.from_env(environ={}, **keyword)
    name = f"DBPOOL_{foreign}".upper()
    variable = f"DBPOOL_{suggested}".upper()
    assert unknown_variables({name: "3"}) == [(name, variable)]
    with pytest.raises(ConfigError, match=f"did you mean {variable}[?]"):
        settings_from_config({name: 3}, environ={})
    environ = {"DBPOOL_DATABASES": "b", "DBPOOL_B_URL": "host=b"}
    environ[name.replace("DBPOOL_", "DBPOOL_B_")] = "3"
    assert unknown_variables(environ)[0][1] == variable.replace("DBPOOL_", "DBPOOL_B_")


# Kubernetes sets some of them for a service called dbpool.
@pytest.mark.parametrize(
    "word",
    ["WORKERS", "THREADS", "RETRIES", "DEBUG", "LOG_LEVEL", "TLS", "SCHEMA", "TIMEZONE", "AUTH",
     "CHECK", "API_KEY", "METRICS", "OPEN", "ENABLED", "TESTING", "KEEPALIVES", "SERVICE_HOST",
     "SERVICE_PORT", "PORT_5432_TCP", "CONFIG_FILE", "LOG_FILE", "REPLICAS", "APP", ""],
)  # fmt: skip
def test_a_name_that_resembles_none_gets_no_suggestion(word: str) -> None:
    assert unknown_variables({f"DBPOOL_{word}": "x"}) == [(f"DBPOOL_{word}", None)]


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("DBPOOL_SESSION_RESET", "DBPOOL_RESET"),
        ("DBPOOL_ENV_FILE", "DBPOOL_DOTENV"),
        ("DBPOOL_BIND", "DBPOOL_SERVE"),
        ("DBPOOL_METRICS_DIR", "DBPOOL_STATS_DIR"),
        ("DBPOOL_DEFAULT_MAX_SIZE", "DBPOOL_MAX_SIZE"),
        ("DBPOOL_READ_TIMEOUT", "DBPOOL_STATEMENT_TIMEOUT"),
        ("DBPOOL_PASSWORD_FILE", "PGPASSWORD_FILE"),
        ("DBPOOL_PASSWORD", "PGPASSWORD"),
        ("DBPOOL_USER", "PGUSER"),
        ("DBPOOL_HOST", "PGHOST"),
        ("DBPOOL_DSN", "DATABASE_URL"),
        ("DBPOOL_URI_FILE", "DATABASE_URL_FILE"),
        ("DBPOOL_CONNINFO", "DATABASE_URL"),
        ("DBPOOL_B_DSN", "DBPOOL_DATABASES=b"),
        ("DBPOOL_SSLMODE", "PGSSLMODE"),
        ("DBPOOL_TOKEN_FIEL", "DBPOOL_TOKEN_FILE"),
    ],
)
def test_libpqs_variables_with_our_prefix_get_a_suggestion(name: str, suggestion: str) -> None:
    assert unknown_variables({name: "x"}) == [(name, suggestion)]


def test_another_variable_for_the_url_of_a_named_database_is_reported() -> None:
    environ = {"DBPOOL_DATABASES": "b", "DBPOOL_B_DSN": "host=b"}
    assert unknown_variables(environ) == [("DBPOOL_B_DSN", "DBPOOL_B_URL")]


@pytest.mark.parametrize(
    "word", ["PASSWORD", "PASSWD", "PWD", "PASS", "SECRET", "SECRET_KEY", "DB_PASSWORD", "CRED"]
)
@pytest.mark.parametrize("ending", ["", "_FILE"])
@pytest.mark.parametrize("database", ["", "B_"])
def test_a_password_is_not_suggested_as_another_secret(
    word: str, ending: str, database: str
) -> None:
    name = f"DBPOOL_{database}{word}{ending}"
    environ = {"DBPOOL_DATABASES": "b", "DBPOOL_B_URL": "host=b", name: "x"}
    ((_, suggestion),) = unknown_variables(environ)
    assert suggestion in (None, "PGPASSWORD", "PGPASSWORD_FILE")
    assert suggestion is None or suggestion.endswith("_FILE") is (ending == "_FILE")


@pytest.mark.parametrize("option", ["password", "host", "dbname", "connect_args", "row_factory"])
def test_connection_parameters_as_keywords_suggest_kwargs(option: str) -> None:
    with pytest.raises(ConfigError, match=r"did you mean kwargs\?"):
        Pool(**{option: SECRET})  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{}, "host=h", 5, Settings])
def test_settings_of_another_type_are_rejected(settings: Any) -> None:
    with pytest.raises(ConfigError, match=r"settings must be a dbpool\.Settings, not"):
        Pool(settings=settings)


def test_default_may_not_be_listed_as_a_database() -> None:
    with pytest.raises(ConfigError, match="leave it out, it is the database of DATABASE_URL"):
        databases_from_env({"DBPOOL_DATABASES": "default,a", "DBPOOL_A_URL": "host=a"})


# Messages of a pool


def test_a_first_failure_is_reported_without_a_duration() -> None:
    with Pool("host=127.0.0.1 port=1", timeout=0) as pool:
        with pytest.raises(DatabaseUnavailable) as caught:
            pool.getconn()
        assert "0.0 s" not in str(caught.value)
        assert "unknown" not in str(caught.value)


def test_the_log_does_not_call_a_wrong_setting_unavailable(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="dbpool")
    with Pool("host=127.0.0.1 port=1 sslmode=never") as pool:
        with pytest.raises(DatabaseUnavailable) as caught:
            pool.getconn()
        assert "0.0 s" not in str(caught.value)
    assert "cannot be used as configured" in caplog.text
    assert "unavailable" not in caplog.text


def test_the_command_line_shows_warnings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "DATABASE_URL": "host=127.0.0.1 port=1",
        "DBPOOL_OUTAGE_GRACE": "0s",
        "DBPOOL_STATEMENT_TIMEOUT": "30000",
        "DBPOOL_TOKEN": "short",
        "DBPOOL_POOL_SIZE": "3",
    }.items():
        monkeypatch.setenv(name, value)
    assert main(["check"]) == 1
    out, err = capsys.readouterr()
    assert [line.partition("warning: ")[2].partition(" ")[0] for line in err.splitlines()] == [
        "statement_timeout",
        "DBPOOL_TOKEN",
    ]
    assert out.count("DBPOOL_POOL_SIZE; did you mean DBPOOL_MAX_SIZE?") == 1
    assert not logging.getLogger("dbpool").handlers
