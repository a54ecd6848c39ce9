"""Settings: precedence, validation and names; nothing shows a secret."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import pickle
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, quote_plus

import psycopg
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from psycopg.conninfo import make_conninfo

from dbpool import ConfigError, Pool, Settings
from dbpool._secrets import mask
from dbpool.databases import databases_from_env, settings_from_config
from dbpool.settings import COMMON, unknown_variables, variable
from dbpool.settings._conninfo import already_set, mask_conninfo, parse
from dbpool.settings.app import AppSettings


def from_env(**environ: str) -> Settings:
    return Settings.from_env(environ=environ)


# Values


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2", 2.0),
        ("1.5", 1.5),
        (".5", 0.5),
        (" 2 s ", 2.0),
        ("500ms", 0.5),
        ("30s", 30.0),
        ("5m", 300.0),
        ("1h", 3600.0),
        ("5 min", 300.0),
        ("1d", 86400.0),
        ("1500us", 0.0015),
    ],
)
def test_durations_are_parsed(text: str, seconds: float) -> None:
    assert from_env(DBPOOL_TIMEOUT=text).timeout == pytest.approx(seconds)
    assert Settings(timeout=text).timeout == pytest.approx(seconds)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["x", "5 minutes", "1w", "5M", "nan", "inf", "1e3", "٣s", "1,5"])
def test_the_error_for_an_invalid_duration_names_variable_and_units(text: str) -> None:
    units = r"\(us, ms, s, m, min, h, d\)"
    with pytest.raises(ConfigError, match=rf"\(DBPOOL_TIMEOUT\) must be .* {units}, not "):
        from_env(DBPOOL_TIMEOUT=text)
    with pytest.raises(
        ConfigError, match=rf'LOCK_TIMEOUT\) .* {units}, 0 \(off\) or "server", not'
    ):
        from_env(DBPOOL_LOCK_TIMEOUT=text)
    with pytest.raises(ConfigError, match=rf"^tcp_user_timeout must be .* {units} or 0 \(off\)"):
        Settings(tcp_user_timeout=text)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["timeout", "max_lifetime", "connect_timeout", "max_size"])
@pytest.mark.parametrize("value", ["9" * 500, "9" * 20, 2**31, 10**400, float("inf")])
def test_a_number_that_is_too_large_is_rejected_with_its_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{field} .* must be at most 2147483647") as caught:
        Settings(**{field: value})
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize("field", ["statement_timeout", "lock_timeout", "tcp_user_timeout"])
def test_a_time_that_overflows_as_milliseconds_is_rejected(dsn: str, field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}.* must be at most 2147483 s"):
        Settings(**{field: "1000h"})  # type: ignore[arg-type]
    with Pool(dsn, **{field: 2_147_483}) as pool:  # type: ignore[arg-type]
        assert pool.fetch_value("select 1") == 1


@pytest.mark.parametrize("text", ["1.5", "3s", "x", "-1"])
def test_an_invalid_size_is_rejected_with_its_name(text: str) -> None:
    with pytest.raises(ConfigError, match="DBPOOL_MAX_SIZE"):
        from_env(DBPOOL_MAX_SIZE=text)


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"DBPOOL_MIN_SIZE": "5", "DBPOOL_MAX_SIZE": "2"}, "DBPOOL_MIN_SIZE"),
        ({"DBPOOL_MAX_SIZE": "0"}, "DBPOOL_MAX_SIZE"),
        ({"DBPOOL_CONNECT_TIMEOUT": "500ms"}, "DBPOOL_CONNECT_TIMEOUT"),
        ({"DBPOOL_CONNECT_TIMEOUT": "0"}, "DBPOOL_CONNECT_TIMEOUT"),
        ({"DBPOOL_PING_TIMEOUT": "0"}, "DBPOOL_PING_TIMEOUT"),
        ({"DBPOOL_POOLER": "statement"}, "DBPOOL_POOLER"),
    ],
)
def test_contradictions_and_ranges_name_the_variable(environ: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        from_env(**environ)


@pytest.mark.parametrize("pooler", ["transaction", "pgbouncer"])
def test_timeouts_behind_a_transaction_pooler_are_rejected_with_advice(pooler: str) -> None:
    with pytest.raises(ConfigError, match="ALTER ROLE … SET statement_timeout"):
        from_env(DBPOOL_POOLER=pooler, DBPOOL_STATEMENT_TIMEOUT="5s")
    params = from_env(DBPOOL_POOLER=pooler).connect_params("host=h")
    assert params["prepare_threshold"] is None
    assert "options" not in params


def test_min_size_alone_raises_max_size() -> None:
    assert from_env(DBPOOL_MIN_SIZE="20").max_size == 20


def test_unknown_keywords_are_rejected_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"max_sise.*max_size"):
        Settings.from_env(environ={}, max_sise=3)


def test_settings_are_frozen_and_survive_copies() -> None:
    settings = from_env(DATABASE_URL="postgresql://u:hunter2@h/d", DBPOOL_MAX_SIZE="3")
    with pytest.raises(AttributeError):
        settings.max_size = 4  # type: ignore[misc]
    twin = copy.deepcopy(settings)
    assert twin == settings
    assert twin.explicit == settings.explicit
    with pytest.raises(TypeError, match="secret cannot be pickled"):
        pickle.dumps(settings)
    plain = Settings(max_size=3)
    assert pickle.loads(pickle.dumps(plain)) == plain
    assert replace(settings, timeout=1).explicit >= {"max_size", "timeout"}


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "texts": st.one_of(
        st.text(max_size=12),
        st.sampled_from(["a", "default,a", "host=h", "postgresql://u:p@h/d", "1" * 5000, "server"]),
    ),
    "objects": st.one_of(
        st.none(), st.integers(), st.just(10**400), st.floats(), st.booleans(), st.binary(max_size=4),
        st.lists(st.text(max_size=5), max_size=2), st.just(object()), st.just(Path("/nowhere")),
    ),
}  # fmt: skip
FIELDS = [f.name for f in dataclasses.fields(Settings) if f.name != "explicit"]
VARIABLES = sorted(
    {*COMMON, "DATABASE_URL", "DATABASE_URL_FILE", "PGPASSWORD_FILE", "PGSERVICE", "PGPORT"}
    - {"DBPOOL_DOTENV"}
)


@given(st.dictionaries(st.sampled_from(VARIABLES), VALUES["texts"] | VALUES["objects"], max_size=4))
@example({"DATABASE_URL_FILE": "\0"})
@example({"PGPORT": "1" * 5000})
@example({"PGPORT": "\r\x00"})
def test_any_configuration_is_accepted_or_a_config_error(config: dict[str, Any]) -> None:
    with suppress(ConfigError):
        AppSettings.from_config(config, {})
    with suppress(ConfigError):
        for settings in settings_from_config(config, {}).values():
            repr(settings)
            settings.connect_params()


@given(st.dictionaries(st.sampled_from(FIELDS), VALUES["texts"] | VALUES["objects"], max_size=3))
def test_any_keywords_are_accepted_or_a_config_error(keywords: dict[str, Any]) -> None:
    with suppress(ConfigError):
        settings = Settings(**keywords)
        repr(settings)
        settings.connect_params()


def test_a_file_may_be_a_path(tmp_path: Path) -> None:
    (tmp_path / "url").write_text("host=of-the-file")
    settings = Settings(conninfo_file=tmp_path / "url")  # type: ignore[arg-type]
    assert settings.resolve() == "host=of-the-file"
    assert settings == Settings(conninfo_file=str(tmp_path / "url"))
    with pytest.raises(ConfigError, match=r"^password_file must be a path, not 5"):
        Settings(password_file=5)  # type: ignore[arg-type]


# Precedence


def test_keyword_beats_environment_beats_secret_file_beats_dotenv(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("host=from-secret-file\n")
    dotenv = tmp_path / ".env"
    dotenv.write_text("DATABASE_URL=host=from-dotenv\nDBPOOL_TIMEOUT=7\n")
    environ = {"DATABASE_URL": "host=from-environment", "DATABASE_URL_FILE": str(secret)}
    read = Settings.from_env
    assert read(environ=environ, dotenv=dotenv, conninfo="host=keyword").resolve() == "host=keyword"
    assert read(environ=environ, dotenv=dotenv).resolve() == "host=from-environment"
    del environ["DATABASE_URL"]
    assert read(environ=environ, dotenv=dotenv).resolve() == "host=from-secret-file"
    assert read(environ={}, dotenv=dotenv).resolve() == "host=from-dotenv"
    assert read(environ={}, dotenv=dotenv).timeout == 7
    assert read(environ={"DBPOOL_TIMEOUT": "8"}, dotenv=dotenv).timeout == 8
    assert read(environ={}).resolve() == ""


def test_an_empty_variable_counts_as_unset() -> None:
    assert from_env(DBPOOL_TIMEOUT="", DATABASE_URL="", PGHOST="h").timeout == 5


def test_a_secret_file_is_read_again_at_each_connect(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("old\n")
    settings = from_env(DATABASE_URL="host=h user=u", PGPASSWORD_FILE=str(file))
    assert settings.connect_params()["password"] == "old"
    file.write_text("new\n")
    assert settings.connect_params()["password"] == "new"
    assert settings.connect_params("host=h password=given")["password"] == "given"


def test_a_missing_secret_file_is_named() -> None:
    settings = from_env(DATABASE_URL_FILE="/nowhere/secret")
    with pytest.raises(ConfigError, match=r"DATABASE_URL_FILE.*/nowhere/secret"):
        settings.resolve()


def test_defaults_are_added_if_nothing_is_set() -> None:
    params = Settings().connect_params("host=h")
    assert params == {
        "host": "h",
        "connect_timeout": 5,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 30000,
        "fallback_application_name": f"dbpool:default@{os.uname().nodename}/{os.getpid()}",
        "options": "-c statement_timeout=30000 -c idle_in_transaction_session_timeout=60000",
    }


@pytest.mark.parametrize("name", ["default", "a" * 99, "größe" * 9, "kunden\n", "a@b"])
@pytest.mark.parametrize("host", ["web-1", "h" * 200, "höst"])
def test_the_server_does_not_change_the_default_application_name(
    name: str, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.uname", lambda: SimpleNamespace(nodename=host))
    found = Settings(name=name).connect_params("host=h")["fallback_application_name"]
    assert len(found.encode()) <= 63
    assert found.isascii()
    assert found.isprintable()
    assert found.startswith("dbpool:")
    assert found.endswith(f"/{os.getpid()}")


@pytest.mark.parametrize(
    ("given", "found"),
    [({"application_name": "shop"}, "shop"), ({"pooler": "transaction"}, "dbpool:default")],
)
def test_a_users_application_name_is_kept_and_a_pooler_gets_one_for_all_processes(
    given: dict[str, Any], found: str
) -> None:
    assert Settings(**given).connect_params("host=h")["fallback_application_name"] == found


def test_the_connection_string_wins_over_defaults() -> None:
    conninfo = "host=h connect_timeout=9 keepalives_idle=1 options='-c statement_timeout=1'"
    params = Settings().connect_params(conninfo)
    assert params["connect_timeout"] == "9"
    assert params["keepalives_idle"] == "1"
    assert params["options"].endswith("-c statement_timeout=1")


def test_an_explicit_setting_wins_over_the_connection_string() -> None:
    conninfo = "host=h connect_timeout=9 options='-c statement_timeout=1'"
    params = from_env(DBPOOL_STATEMENT_TIMEOUT="30", DBPOOL_CONNECT_TIMEOUT="5").connect_params(
        conninfo
    )
    assert params["connect_timeout"] == 5
    assert params["options"].endswith("-c statement_timeout=30000")
    off = Settings(statement_timeout=0).connect_params(conninfo)
    assert off["options"].endswith("-c statement_timeout=0")


def test_libpqs_variables_win_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGOPTIONS", "-c geqo=off")
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "11")
    params = Settings().connect_params("host=h")
    assert "connect_timeout" not in params
    assert params["options"].endswith("-c geqo=off")


def test_a_service_file_wins_over_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "service.conf"
    file.write_text(
        "stray\n[other]\nhost=x\nldap://x\n[mine]\n# a comment\n  host=h\n\n  connect_timeout=7\n"
    )
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    assert "connect_timeout" not in Settings().connect_params("service=mine")
    assert Settings().connect_params("service=other")["connect_timeout"] == 5
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "missing"))
    monkeypatch.setenv("PGSYSCONFDIR", str(tmp_path))
    assert Settings().connect_params("service=mine")["connect_timeout"] == 5
    file.rename(tmp_path / "pg_service.conf")
    assert "connect_timeout" not in Settings().connect_params("service=mine")


@pytest.mark.parametrize(
    ("text", "timeout"),
    [
        (b"[mine]\nconnect_timeout=7\nconnect_timeout=8\n", "7"),  # the first of two equal keys
        (b"[mine]\nconnect_timeout=7\n[mine]\nconnect_timeout=8\n", "7"),
        (b"[mine] # see [other]\nconnect_timeout=7\n", "7"),
        (b"# caf\xe9\n[mine]\nconnect_timeout=7\n", "7"),
        (b"[mine]\n[]\nconnect_timeout=7\n", None),
    ],
)
def test_a_service_file_is_read_as_libpq_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: bytes, timeout: str | None
) -> None:
    (tmp_path / "service.conf").write_bytes(text)
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "service.conf"))
    assert already_set({"service": "mine"}, os.environ).get("connect_timeout") == timeout


def test_without_a_home_directory_there_is_no_service_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_without_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", fail_without_home)
    assert already_set({"service": "mine"}, {}) == {"service": "mine"}


def test_the_users_kwargs_win_and_psycopgs_own_pass_through() -> None:
    params = Settings().connect_params("host=h", {"autocommit": True, "connect_timeout": 3})
    assert params["autocommit"] is True
    assert params["connect_timeout"] == 3


def test_options_arrive_at_the_server(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGOPTIONS", r"-c datestyle=iso,\ dmy -c lock_timeout=123")
    with Pool(dsn, statement_timeout="2s") as pool:
        assert pool.fetch_value("show statement_timeout") == "2s"
        assert pool.fetch_value("show lock_timeout") == "123ms"
        assert pool.fetch_value("show datestyle") == "ISO, DMY"


# Several databases


def test_more_databases_fall_back_to_the_common_settings() -> None:
    databases = databases_from_env(
        {
            "DATABASE_URL": "host=main",
            "DBPOOL_TIMEOUT": "3",
            "DBPOOL_DATABASES": "replica, reports",
            "DBPOOL_REPLICA_URL": "host=replica",
            "DBPOOL_REPLICA_MAX_SIZE": "2",
            "DBPOOL_REPORTS_URL": "host=reports",
            "DBPOOL_REPORTS_TIMEOUT": "60",
        }
    )
    assert list(databases) == ["default", "replica", "reports"]
    assert [d.resolve() for d in databases.values()] == [
        "host=main",
        "host=replica",
        "host=reports",
    ]
    assert [d.timeout for d in databases.values()] == [3, 3, 60]
    assert [d.max_size for d in databases.values()] == [10, 2, 10]
    name = databases["replica"].connect_params()["fallback_application_name"]
    assert name.startswith("dbpool:replica@")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ("statement", "DBPOOL_STATEMENT_TIMEOUT ambiguous"),
        ("a,a", "twice"),
        ("default", "twice"),
        ("Replica", "not a valid name"),
        ("replica", "DBPOOL_REPLICA_URL"),
    ],
)
def test_bad_names_are_rejected(names: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        databases_from_env({"DBPOOL_DATABASES": names, "DBPOOL_A_URL": "host=a"})


def test_an_applications_configuration_wins_and_takes_dicts() -> None:
    databases = settings_from_config(
        {
            "DATABASE_URL": "host=config",
            "DBPOOL_TIMEOUT": 1.5,
            "DBPOOL_DATABASES": {"replica": {"url": "host=r", "max_size": 3}, "b": "host=b"},
            "SECRET_KEY": "not ours",
        },
        environ={"DATABASE_URL": "host=environment", "DBPOOL_MAX_SIZE": "7"},
    )
    assert databases["default"].resolve() == "host=config"
    assert [d.timeout for d in databases.values()] == [1.5, 1.5, 1.5]
    assert [d.max_size for d in databases.values()] == [7, 3, 7]
    assert databases["b"].resolve() == "host=b"


def test_an_unknown_key_of_a_configuration_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"DBPOOL_TIMEOT.*DBPOOL_TIMEOUT"):
        settings_from_config({"DBPOOL_TIMEOT": 3}, environ={})


def test_an_unknown_variable_logs_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    environ = {"DBPOOL_PORT": "tcp://10.0.0.1:80", "DBPOOL_MAX_SISE": "3"}
    assert unknown_variables(environ) == [
        ("DBPOOL_MAX_SISE", "DBPOOL_MAX_SIZE"),
        ("DBPOOL_PORT", unknown_variables(environ)[1][1]),
    ]
    with caplog.at_level(logging.WARNING, logger="dbpool"):
        databases_from_env(environ)
    assert len(caplog.records) == 2
    assert "DBPOOL_MAX_SISE" in caplog.messages[0]
    assert "10.0.0.1" not in caplog.text


def test_variables_of_a_database_named_in_the_configuration_are_known(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config: dict[str, Any] = {"DBPOOL_DATABASES": {"replica": {}}}
    databases = settings_from_config(config, environ={"DBPOOL_REPLICA_URL": "host=r"})
    assert databases["replica"].resolve() == "host=r"
    assert not caplog.messages


def test_the_url_of_an_unlisted_database_is_reported() -> None:
    environ = {"DBPOOL_DATABASES": "a", "DBPOOL_A_URL": "host=a", "DBPOOL_B_URL_FILE": "/b"}
    assert unknown_variables(environ) == [("DBPOOL_B_URL_FILE", "DBPOOL_DATABASES=a,b")]


@pytest.mark.parametrize("name", ["DBPOOL_URL", "DBPOOL_DATABASE_URL", "DBPOOL_DEFAULT_URL"])
def test_another_variable_for_the_default_url_is_reported(name: str) -> None:
    assert unknown_variables({name: "host=h"}) == [(name, "DATABASE_URL")]
    assert unknown_variables({f"{name}_FILE": "/h"}) == [(f"{name}_FILE", "DATABASE_URL_FILE")]


def test_the_variables_of_the_database_that_is_read_are_known(
    caplog: pytest.LogCaptureFixture,
) -> None:
    environ = {"DBPOOL_REPLICA_URL": "host=r", "DBPOOL_REPLICA_MAX_SIZE": "3"}
    assert Settings.from_env("replica", environ).max_size == 3
    assert not caplog.messages


@pytest.mark.parametrize("detail", ["", None, {}, {"max_size": 3}, {"url": None}, {"url": ""}])
def test_a_named_database_needs_a_url_of_its_own(detail: Any) -> None:
    environ = {"DATABASE_URL": "host=default"}
    with pytest.raises(ConfigError, match=r"'replica' needs DBPOOL_REPLICA_URL"):
        settings_from_config({"DBPOOL_DATABASES": {"replica": detail}}, environ=environ)
    with pytest.raises(ConfigError, match=r"'replica' needs DBPOOL_REPLICA_URL"):
        Settings.from_env("replica", environ, max_size=3)


def test_a_detail_of_none_counts_as_unset() -> None:
    config = {"DBPOOL_DATABASES": {"replica": {"url": None, "max_size": None}}}
    databases = settings_from_config(config, environ={"DBPOOL_REPLICA_URL": "host=r"})
    assert databases["replica"].resolve() == "host=r"
    assert databases["replica"].max_size == 10


def test_the_error_for_a_wrong_value_names_all_its_variables() -> None:
    environ = {"DBPOOL_REPLICA_URL": "host=r", "DBPOOL_MAX_SIZE": "many"}
    with pytest.raises(ConfigError, match=r"DBPOOL_REPLICA_MAX_SIZE or DBPOOL_MAX_SIZE"):
        Settings.from_env("replica", environ)
    with pytest.raises(ConfigError, match=r"^max_size must be"):
        Settings(name="My-Pool", max_size="many")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^conninfo is malformed"):
        Settings("My-Pool", "nonsense")


def test_names_that_are_not_words_are_rejected() -> None:
    with pytest.raises(ConfigError, match=r"'1' is not a valid name"):
        settings_from_config({"DBPOOL_DATABASES": [1]}, environ={})


def test_a_list_of_names_of_another_type_is_rejected() -> None:
    with pytest.raises(ConfigError, match="DBPOOL_DATABASES must be a list of names, not 5"):
        settings_from_config({"DBPOOL_DATABASES": 5}, environ={})
    with pytest.raises(ConfigError, match="DBPOOL_REQUIRED must be a list of names, not 5"):
        AppSettings.from_config({"DBPOOL_REQUIRED": 5}, environ={})


@pytest.mark.parametrize("field", ["name", "conninfo", "pooler", "application_name"])
@pytest.mark.parametrize("value", [None, 5, ["transaction"]])
def test_a_value_of_another_type_is_rejected_with_its_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{field} (\(\w+\) )?must be a string, not of type"):
        Settings(**{field: value})
    if field == "name":
        with pytest.raises(ConfigError, match="needs DBPOOL_"):
            Settings.from_env(value, environ={})


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({"DATABASE_URL": "postgresql://u:p@ss@h/d"}, "DATABASE_URL"),
        ({"DBPOOL_DATABASES": "b", "DBPOOL_B_URL": "postgresql://h:p"}, "DBPOOL_B_URL"),
        ({"DATABASE_URL": "nonsense"}, "DATABASE_URL"),
    ],
)
def test_a_malformed_string_is_reported_by_its_variable(environ: dict[str, str], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^conninfo \({name}\) is malformed") as caught:
        databases_from_env(environ)
    assert ("percent-encode" in str(caught.value)) == ("@" in environ[name])


def test_a_malformed_secret_file_is_reported_by_its_variable(tmp_path: Path) -> None:
    (tmp_path / "url").write_text("nonsense")
    settings = Settings.from_env(environ={"DATABASE_URL_FILE": str(tmp_path / "url")})
    with pytest.raises(ConfigError, match=r"^DATABASE_URL_FILE is malformed"):
        settings.resolve()


def test_names_of_variables() -> None:
    assert variable("conninfo") == "DATABASE_URL"
    assert variable("conninfo", "replica") == "DBPOOL_REPLICA_URL"
    assert variable("max_size") == "DBPOOL_MAX_SIZE"
    assert variable("max_size", "replica") == "DBPOOL_REPLICA_MAX_SIZE"


def test_settings_of_an_application(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    settings = AppSettings.from_env(
        {"DBPOOL_TOKEN_FILE": str(file), "DBPOOL_REQUIRED": "default,replica"}
    )
    assert settings.token == "s3cret"
    assert "s3cret" not in repr(settings)
    assert settings.required == ("default", "replica")
    assert AppSettings.from_config({"DBPOOL_ERROR_HANDLERS": False}, {}).error_handlers is False
    with pytest.raises(ConfigError, match="DBPOOL_DETAILS"):
        AppSettings.from_env({"DBPOOL_DETAILS": "yes"})


# Secrets

# Different from every word that an error or a repr may contain.
SECRETS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=3, max_size=20
).map("zQ7{}".format)


def all_output(make: Any) -> str:
    """Everything that a user could see of settings, or of the error they raise."""
    try:
        settings = make()
    except ConfigError as ex:
        chain: BaseException | None = ex
        shown = "".join(traceback.format_exception(ex))
        while chain is not None:
            shown += repr(chain) + repr(chain.args)
            chain = chain.__context__ or chain.__cause__
        return shown
    return repr(settings) + str(settings) + repr(settings.masked())


@given(SECRETS)
@example("p@ss/w0rd:")
@example("100%zz?#x")
@example("it's \\ here")
def test_no_secret_is_shown_in_a_well_formed_string(secret: str) -> None:
    for conninfo in (
        f"postgresql://user:{quote(secret, safe='')}@host:5432/db",
        f"postgresql+psycopg://user@host/db?password={quote(secret, safe='')}",
        make_conninfo("host=h", password=secret, sslpassword=secret),
    ):
        assert secret not in all_output(lambda c=conninfo: Settings(conninfo=c))
        assert secret not in mask_conninfo(conninfo)
        settings = Settings(conninfo=conninfo)
        assert parse(settings.resolve())["password"] == secret


@given(SECRETS)
@example("abc@def/ghi")
@example("abcdef/ghijkl")
@example("abcdef:ghijkl")
@example("%zzabcdef")
@example("'abcdef")
def test_no_part_of_a_secret_is_shown_by_a_malformed_string(secret: str) -> None:
    for conninfo in (
        f"postgresql://user:{secret}@host:5432/db",
        f"host=h password={secret}",
        f"host=h password='{secret}",
        f"postgresql://user@host:{secret}/db",
    ):
        shown = all_output(lambda c=conninfo: Settings(conninfo=c))
        assert secret not in shown


@given(SECRETS, st.text(max_size=20))
def test_mask_leaves_no_occurrence(secret: str, text: str) -> None:
    assume("*" not in secret)
    forms = {secret, quote(secret), quote(secret, safe=""), quote_plus(secret)}
    masked = mask(text.join(forms), [secret])
    assert not any(form in masked for form in forms)


def test_psycopgs_own_error_would_show_the_password() -> None:
    """This is why a malformed string is rejected before libpq gets it."""
    with pytest.raises(psycopg.ProgrammingError, match="hunter2"):
        psycopg.connect("postgresql://u:hunter2%zz@h/d")
