"""No error, frame, log record, repr, view or command shows a secret."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from flask import Flask
from psycopg.conninfo import make_conninfo

from dbpool import ConfigError, Databases, Pool, PoolError, Settings
from dbpool._sign_in import SecretBytes
from dbpool.cli import main
from dbpool.databases import settings_from_config
from dbpool.events import Emitter, Opened
from dbpool.flask import DBPool, create_blueprint
from dbpool.health import Health
from dbpool.settings import unknown_variables
from dbpool.settings.app import AppSettings

from .conftest import MakeApp
from .frames import Frames, leaks, of_error
from .postgres import Server

PASSWORD = "zq7 Horse/Battery@Staple:9%"
URL = f"postgresql://app:{quote(PASSWORD, safe='')}@127.0.0.1:1/db"
NOWHERE = "host=127.0.0.1 port=1 user=u dbname=d"
TOKEN = "tk-4711-zq7-token-of-the-views"

# Values that could be a secret in the wrong place, in several forms.
SHAPES = [
    "hunter2-zq7",
    "Swordfish",
    "zq7hunterzqzq7",
    "s3cr3t/zq7+base64==",
    "/zq7Ab+cd",
    "p@ss:zq7",
    "zq7 with blanks",
    "postgresql://u:zq7hunter@h/d",
    "host=h password=zq7hunter",
    "4711zq7",
    "{'zq7': 1}",
    "\x1b[31mzq7\n",
]

FIELDS = [f.name for f in fields(Settings) if f.name != "explicit"]
VARIABLES = [
    "DATABASE_URL",
    "DATABASE_URL_FILE",
    "PGPASSWORD_FILE",
    *(f"DBPOOL_{name.upper()}" for name in FIELDS),
    "DBPOOL_DATABASES",
    "DBPOOL_REQUIRED",
    "DBPOOL_DETAILS",
    "DBPOOL_TOKEN_FILE",
    "DBPOOL_STATS_DIR",
    "DBPOOL_SERVE",
    "DBPOOL_DOTENV",
    "DBPOOL_RESET",
    "DBPOOL_ERROR_HANDLERS",
]


def raised(make: Callable[[], Any]) -> BaseException | None:
    try:
        make()
    except Exception as ex:  # noqa: BLE001  # the kind does not matter here
        return ex
    return None


@pytest.fixture
def frames() -> Iterator[Frames]:
    """Records the frames below every log record."""
    handler, root = Frames(), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    logging.getLogger("dbpool").setLevel(logging.DEBUG)
    yield handler
    root.removeHandler(handler)
    logging.getLogger("dbpool").setLevel(logging.NOTSET)
    root.setLevel(level)


# The type of secrets


def test_a_secret_stays_a_secret_and_is_never_shown() -> None:
    settings = Settings(conninfo=URL)
    for each in (settings, copy.copy(settings), copy.deepcopy(settings), replace(settings)):
        conninfo = each.conninfo
        assert conninfo == URL
        assert (str(conninfo), f"{conninfo}") == (URL, URL)
        assert not leaks([repr(conninfo), repr(conninfo[:40]), repr([conninfo])], URL, "zq7")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(settings.conninfo, protocol)


def test_secret_bytes_are_never_shown() -> None:
    """The token of the views is kept as bytes."""
    secret = SecretBytes(b"tk-4711-zq7")
    assert secret == b"tk-4711-zq7"
    shown = [repr(secret), str(secret), f"{secret}", repr(secret[:9]), repr(copy.copy(secret)),
             repr(copy.deepcopy([secret]))]  # fmt: skip
    assert not leaks(shown, "4711")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(secret, protocol)


def test_a_secret_is_still_used(server: Server) -> None:
    server.execute("drop role if exists reader")
    server.execute("create role reader login password 'zq7 it''s \\ a @/: secret'")
    try:
        password = "zq7 it's \\ a @/: secret"
        for conninfo, kwargs in (
            (f"postgresql://reader:{quote(password, safe='')}@127.0.0.1:{server.port}/postgres", {}),
            ("", {"password": password, "user": "reader", "host": "127.0.0.1",
                  "port": server.port, "dbname": "postgres"}),
        ):  # fmt: skip
            with Pool(conninfo, kwargs=kwargs) as pool:
                assert pool.fetch_value("select current_user") == "reader"
    finally:
        server.execute("drop role reader")


# Wrong settings beside a good connection string


def test_an_address_with_a_zone_is_no_secret() -> None:
    assert "fe80::1%eth0" in repr(Settings(conninfo="hostaddr=fe80::1%eth0"))


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("value", ["x", "-1", "", "a,b", PASSWORD])
def test_no_frame_of_a_wrong_setting_shows_the_url(
    name: str, value: str, frames: Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"DATABASE_URL": URL, "PGPASSWORD": PASSWORD, "DBPOOL_TOKEN": TOKEN, name: value}
    app = Flask("app")
    app.config.update(environ, DBPOOL_DATABASES={"replica": {"url": URL}})
    app.config[name] = value
    for key, each in environ.items():
        monkeypatch.setenv(key, each)
    doors: list[Callable[[], Any]] = [
        lambda: Settings.from_env(environ=environ),
        lambda: Databases.from_env(environ, kwargs={"password": PASSWORD}),
        lambda: AppSettings.from_env(environ),
        lambda: unknown_variables(environ),
        Pool,
        lambda: Pool(kwargs={"password": PASSWORD}, conninfo=URL, settings=Settings.from_env()),
        lambda: DBPool(app, kwargs={"password": PASSWORD}),
        lambda: Settings.from_env().connect_params(),
        lambda: Settings.from_env().connect_params(URL, {"password": PASSWORD}),
    ]
    for door in doors:
        assert not leaks(of_error(raised(door)), PASSWORD, TOKEN)
    assert not leaks(frames.shown, PASSWORD, TOKEN)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", ["x", -1, None, [], "zq7 of another kind", 0.5])
def test_no_frame_of_a_wrong_keyword_shows_the_url(field: str, value: Any, frames: Frames) -> None:
    wrong = {field: value}
    doors: list[Callable[[], Any]] = [
        lambda: Settings(**{"conninfo": URL, **wrong}),
        lambda: Settings("default", URL, **({} if field in ("name", "conninfo") else wrong)),
        lambda: Settings.from_env(environ={}, **{"conninfo": URL, **wrong}),
        lambda: Pool(URL, kwargs={"password": PASSWORD}, **wrong),
        lambda: Pool(URL, kwargs={"password": PASSWORD}, num_workers=0, **wrong),
        lambda: Pool(settings=Settings(conninfo=URL), **wrong),
    ]
    for door in doors:
        secrets = [PASSWORD] if field == "name" else [PASSWORD, "zq7 of another kind"]
        assert not leaks(of_error(raised(door)), *secrets)
    assert not leaks(frames.shown, PASSWORD)


@pytest.mark.parametrize(
    "conninfo",
    [
        f"postgresql://app:{PASSWORD}@h/d",
        f"postgresql://app:{quote(PASSWORD, safe='')}%zz@h/d",
        f"postgresql://app@h:{quote(PASSWORD, safe='')}/d",
        f"host=h password={PASSWORD}",
        f"host=h password='{PASSWORD}",
        PASSWORD,
        "Horse9Battery8Staple7=",
        "Horse9Battery8Staple7==",
        f"mysql://app:{quote(PASSWORD, safe='')}@h/d",
        f"postgresql://app:{quote(PASSWORD, safe='')}@h/d?nosuch=1",
    ],
)
def test_no_frame_of_a_malformed_string_shows_a_part_of_it(
    conninfo: str, frames: Frames, tmp_path: Path
) -> None:
    (tmp_path / "url").write_text(conninfo)
    (tmp_path / ".env").write_text(f"DATABASE_URL={json.dumps(conninfo)}\nDBPOOL_MAX_SIZE=x\n")
    doors: list[Callable[[], Any]] = [
        lambda: Settings(conninfo=conninfo),
        lambda: Pool(conninfo),
        lambda: Settings.from_env(environ={"DATABASE_URL": conninfo}),
        lambda: Settings.from_env(environ={"DATABASE_URL_FILE": str(tmp_path / "url")}).resolve(),
        lambda: Settings.from_env(environ={}, dotenv=tmp_path / ".env"),
        lambda: Settings().connect_params(conninfo),
    ]
    for door in doors:
        error = raised(door)
        assert error is not None
        assert not leaks(of_error(error), PASSWORD, "Staple", "Horse", "Battery")
    assert not leaks(frames.shown, PASSWORD, "Staple", "Horse", "Battery")


def test_no_frame_shows_the_content_of_an_unreadable_file(frames: Frames, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(URL.encode() + b"\xe9")
    (tmp_path / ".env").write_bytes(b"DATABASE_URL='" + URL.encode() + b"'\xe9\n")
    (tmp_path / "broken.env").write_text(f"DATABASE_URL='{URL}\nX={URL}\n")
    (tmp_path / "unset.env").write_text(f"DBPOOL_TOKEN={TOKEN}\nDATABASE_URL={URL}${{nothing}}\n")
    for name in ("DATABASE_URL_FILE", "PGPASSWORD_FILE", "DBPOOL_TOKEN_FILE"):
        environ = {"DATABASE_URL": URL, name: str(tmp_path / "latin")}
        if name == "DATABASE_URL_FILE":
            del environ["DATABASE_URL"]
        doors: list[Callable[[], Any]] = [
            lambda e=environ: Settings.from_env(environ=e).connect_params(),  # type: ignore[misc]
            lambda e=environ: AppSettings.from_env(e),  # type: ignore[misc]
        ]
        for door in doors:
            assert not leaks(of_error(raised(door)), PASSWORD)
    for path in (".env", "broken.env", "unset.env"):
        error = raised(lambda p=path: Settings.from_env(environ={}, dotenv=tmp_path / p))  # type: ignore[misc]
        assert isinstance(error, ConfigError)
        assert not leaks(of_error(error), PASSWORD, TOKEN)
    assert not leaks(frames.shown, PASSWORD, TOKEN)


# A secret in the wrong variable


def texts_of(make: Callable[[], Any]) -> list[str]:
    """The texts that users see of what *make* returns or raises."""
    try:
        return [repr(make())]
    except Exception as ex:  # noqa: BLE001  # the kind does not matter here
        return [str(ex), repr(ex), str(ex.__cause__), repr(ex.__cause__)]


def quotes(value: str, texts: Any) -> list[str]:
    """Those of *texts* that show a part of a misplaced value."""
    parts = {value, value.strip(), json.dumps(value)[1:-1], repr(value)[1:-1], "zq7hunter"}
    return [text for text in texts if any(part in text for part in parts)]


MISPLACED = [
    (name, value)
    for name in VARIABLES
    for value in SHAPES
    if name not in ("DBPOOL_NAME", "DATABASE_URL")
    # These are valid names of a database.
    and not (name in ("DBPOOL_DATABASES", "DBPOOL_REQUIRED") and value == "zq7hunterzqzq7")
]


@pytest.mark.parametrize(("name", "value"), MISPLACED)
def test_a_value_in_the_wrong_variable_is_not_quoted(name: str, value: str, frames: Frames) -> None:
    environ = {"DATABASE_URL": "host=h", name: value}
    if name == "DATABASE_URL_FILE":
        del environ["DATABASE_URL"]
    texts = texts_of(lambda: Settings.from_env(environ=environ))
    texts += texts_of(lambda: Settings.from_env(environ=environ).resolve())
    texts += texts_of(lambda: Settings.from_env(environ=environ).connect_params() and None)
    field: dict[str, Any] = {name.lower().removeprefix("dbpool_"): value}
    texts += texts_of(lambda: Settings(**field))
    texts += texts_of(lambda: AppSettings.from_env(environ))
    with Databases({"default": Settings(conninfo="host=h")}) as databases:
        texts += texts_of(lambda: Health(databases, AppSettings.from_env(environ).required))
    texts += texts_of(lambda: Databases.from_env(environ))
    assert not quotes(value, [*texts, *frames.messages])


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in MISPLACED))
@pytest.mark.parametrize("value", ["hunter2-zq7", "s3cr3t/zq7+base64=="])
def test_no_view_and_no_command_quotes_a_value_in_the_wrong_variable(
    name: str,
    value: str,
    frames: Frames,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", "postgresql://u@127.0.0.1:1/d?connect_timeout=2")
    if name == "DATABASE_URL_FILE":
        monkeypatch.delenv("DATABASE_URL")
    monkeypatch.setenv("DBPOOL_OUTAGE_GRACE", "10ms")
    monkeypatch.setenv("DBPOOL_TIMEOUT", "50ms")
    monkeypatch.setenv(name, value)
    texts = texts_of(served)
    for command in (["check", "--json"], ["check"], ["stats", "--scope", "process"]):
        texts += texts_of(lambda c=command: main(c))  # type: ignore[misc]
        texts += capsys.readouterr()
    assert not quotes(value, [*texts, *frames.messages])


def served() -> str:
    """What the views show about a database that cannot be reached."""
    app = Flask("app")
    db = DBPool(app)
    app.register_blueprint(create_blueprint(authorize=lambda: True), url_prefix="/db")
    try:
        with app.app_context():
            with pytest.raises(PoolError) as caught:
                db.pool.getconn()
            client = app.test_client()
            paths = ("stats?include=settings", "health", "metrics")
            answers = [client.get(f"/db/{path}").text for path in paths]
            return f"{answers} {app.extensions['dbpool']} {caught.value} {caught.value.__cause__!r}"
    finally:
        app.extensions["dbpool"].databases.close()


PARAMETERS = [
    "sslmode", "channel_binding", "gssencmode", "target_session_attrs", "load_balance_hosts",
    "sslnegotiation", "require_auth", "sslcertmode", "connect_timeout", "keepalives_idle",
    "sslrootcert", "sslkey", "passfile", "ssl_min_protocol_version", "tcp_user_timeout",
]  # fmt: skip


@pytest.mark.parametrize("value", SHAPES)
def test_a_secret_in_the_wrong_parameter_is_not_quoted(value: str, frames: Frames) -> None:
    texts: list[str] = []
    for key in PARAMETERS:
        params: dict[str, Any] = {"host": "127.0.0.1", "port": 1, "user": "u", key: value}
        with Pool(kwargs=params, timeout=0.3, outage_grace=0.01) as pool:
            texts += texts_of(pool.getconn)
            texts.append(json.dumps(pool.stats().to_json()))
        settings = Settings(conninfo=make_conninfo("", **params))
        texts += [repr(settings), json.dumps(settings.masked())]
    assert not quotes(value, [*texts, *frames.messages])


def test_harmless_values_are_shown() -> None:
    settings = Settings(
        conninfo="host=h port=5432 dbname=d sslmode=verify-full sslrootcert=/etc/ssl/root.crt"
        " connect_timeout=7 target_session_attrs=read-write",
        password_file="/run/secrets/db_password",
    )
    for part in (*settings.conninfo.split(), "/run/secrets/db_password"):
        assert part in repr(settings)
    with pytest.raises(ConfigError, match="not '5 minutes'"):
        Settings(timeout="5 minutes")  # type: ignore[arg-type]


def test_a_list_with_a_url_in_it_is_not_shown(frames: Frames) -> None:
    shapes: list[Any] = [[URL], (URL,), {URL: {}}, f"a,{URL}"]
    for names in shapes:
        config: dict[str, Any] = {"DATABASE_URL": URL, "DBPOOL_DATABASES": names}
        error = raised(lambda c=config: settings_from_config(c, environ={}))  # type: ignore[misc]
        assert isinstance(error, ConfigError)
        assert PASSWORD not in str(error)
        assert not leaks([str(error), repr(error)], PASSWORD)
    assert not leaks(frames.messages, PASSWORD)


@pytest.mark.parametrize(
    "arguments", [[URL], ["check", URL], ["wait", "--timeout", URL], ["check", f"--url={URL}"]]
)
def test_a_url_as_an_argument_is_not_quoted(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert not leaks(capsys.readouterr(), PASSWORD)


class Dsn:
    """A connection string that is not a `str`, like pydantic's."""

    def __str__(self) -> str:
        return URL

    __repr__ = __str__


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: Settings(URL),
        lambda: Settings.from_env(URL),
        lambda: Settings.from_env(f"host=h password={PASSWORD}"),
        lambda: Pool("host=h", name=URL),
        lambda: Pool(settings=URL),  # type: ignore[arg-type]
        lambda: Pool(settings={"password": PASSWORD}),  # type: ignore[arg-type]
        lambda: Pool("host=h", password=PASSWORD),  # type: ignore[call-arg]
        lambda: Databases(URL),  # type: ignore[arg-type]
        lambda: Databases({"default": URL}),  # type: ignore[dict-item]
        lambda: Databases.from_env(URL),  # type: ignore[arg-type]
        lambda: DBPool(URL),  # type: ignore[arg-type]
        lambda: create_blueprint(authorize=URL),  # type: ignore[arg-type]
        lambda: settings_from_config({"DATABASE_URL": Dsn(), "DBPOOL_MAX_SIZE": "x"}, environ={}),
        lambda: settings_from_config({"DBPOOL_DATABASES": {"a": {"url": [URL]}}}, environ={}),
        lambda: settings_from_config({"DBPOOL_DATABASES": {"A": URL}}, environ={}),
        lambda: AppSettings(token=PASSWORD, details="x"),
    ],
)
def test_a_users_mistake_shows_no_secret(mistake: Callable[[], Any], frames: Frames) -> None:
    error = raised(mistake)
    assert error is not None
    assert not leaks([*of_error(error), *frames.shown], PASSWORD)


WRONG_TYPES: list[Callable[[], Any]] = [
    URL.encode,
    lambda: bytearray(URL.encode()),
    lambda: (URL,),
    lambda: {URL},
    lambda: [URL.encode()],
    lambda: {URL: 1},
    lambda: {"dsn": Dsn()},
    lambda: {"url": URL.encode()},
]


def setting(value: object, key: str = "DBPOOL_DATABASES") -> Any:
    config = {"DATABASE_URL": "host=h", key: value}
    app = Flask("app")
    app.config.update(config)
    return DBPool(app)


@pytest.mark.parametrize("make", [*WRONG_TYPES, Dsn], ids=range(len(WRONG_TYPES) + 1))
def test_a_secret_of_another_type_is_in_no_frame(make: Callable[[], Any], frames: Frames) -> None:
    doors: list[Callable[[Any], Any]] = [
        Pool,
        lambda value: Pool(kwargs=value, num_workers=0),
        lambda value: Pool(kwargs={"password": value}, num_workers=0),
        lambda value: Pool("host=h", settings=value),
        lambda value: Pool("host=h", listeners=[value]),
        lambda value: Pool("host=h", configure=value),
        lambda value: Pool("host=h", name=value),
        lambda value: Settings(conninfo=value),
        lambda value: Settings.from_env(environ={}, dotenv=value),
        lambda value: AppSettings(token=value),
        lambda value: create_blueprint(authorize=value),
        setting,
        lambda value: setting({"a": value, "b": "mysql://"}),
        lambda value: setting(value, "DBPOOL_TOKEN"),
        lambda value: setting(value, "DBPOOL_MAX_SIZE"),
        lambda value: setting(value, "DBPOOL_DOTENV"),
        lambda value: setting(value, "DBPOOL_SERVE"),
    ]
    errors = [raised(lambda d=door: d(make())) for door in doors]  # type: ignore[misc]
    assert errors.count(None) <= 2, "some are valid as a mapping"
    assert not leaks([text for error in errors for text in of_error(error)], PASSWORD)
    assert not leaks(frames.shown, PASSWORD)


def test_the_arguments_of_a_partial_are_never_shown(frames: Frames) -> None:
    def configure(conn: Any, password: str) -> None:
        raise AssertionError(password)

    call = partial(configure, password=PASSWORD)
    assert not leaks(of_error(raised(lambda: Pool(URL, configure=call, max_size="x"))), PASSWORD)  # type: ignore[arg-type]
    emitter = Emitter([call])
    emitter.emit(Opened("p"))
    emitter.close(5)
    (line,) = [message for message in frames.messages if "a listener failed on opened" in message]
    assert "AssertionError at " in line
    assert "in configure>" in line  # the place
    assert not leaks([*frames.messages, *frames.shown], PASSWORD)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DBPOOL_REPLICA_URL", "host=h"),  # the suggestion names this database too
        ("DBPOOL_TOKEN:zq7hunter", "="),  # as in YAML
        ("DBPOOL_TOKEN zq7hunter", ""),
    ],
)
def test_no_name_and_no_suggestion_quotes_a_secret(
    name: str, value: str, frames: Frames, capsys: pytest.CaptureFixture[str]
) -> None:
    environ = {"DATABASE_URL": "host=h", "DBPOOL_DATABASES": URL, name: value}
    assert raised(lambda: Databases.from_env(environ)) is not None
    del environ["DBPOOL_DATABASES"]
    texts = [
        *frames.messages,
        str(unknown_variables(environ)),
        str(raised(lambda: setting(1, name))),
    ]
    texts += [str(raised(lambda: Pool("host=h", **{name: 1})))]  # type: ignore[arg-type]
    more: dict[str, Any] = {name: 1}
    texts += [str(raised(lambda: Settings.from_env(environ={}, **more)))]
    assert len(texts) > 4
    assert not leaks(texts, PASSWORD, "zq7hunter")


def test_a_variable_like_a_databases_url_names_that_database() -> None:
    environ = {"DATABASE_URL": "host=h", "DBPOOL_DATABASES": "curl", "DBPOOL_CURL_URL": "host=c"}
    assert [*Databases.from_env(environ)] == ["default", "curl"]
    names = [*Databases({"default": Settings(), "my-curl": Settings()})]
    assert repr(names) == "['default', 'my-curl']"
    config = {"DATABASE_URL": "host=h", "DBPOOL_DATABASES": {"dsn": {"url": "host=c"}, "a": Dsn()}}
    assert settings_from_config(config, environ={})["dsn"].conninfo == "host=c"


def test_a_debugger_sees_no_token(make_app: MakeApp) -> None:
    own = make_app(NOWHERE, DBPOOL_TOKEN=TOKEN).extensions["dbpool"]
    found = [repr(vars(each)) for each in (own, own.sign_in, own.settings, own.monitor)]
    assert not leaks(found, TOKEN, repr(TOKEN.encode())[2:-1])


def test_a_configuration_may_refer_to_itself(frames: Frames) -> None:
    app = Flask("app")
    app.config.update(DATABASE_URL=URL, ITSELF=app.config, LIST=[app.config], DBPOOL_TOKEN=TOKEN)
    app.config["DBPOOL_DATABASES"] = {"replica": {"url": URL}}
    DBPool(app)
    assert list(app.extensions["dbpool"].databases) == ["default", "replica"]
    assert not leaks(frames.shown, PASSWORD, TOKEN)
