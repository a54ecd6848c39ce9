"""An application's settings: its token, and who sees details."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from dbpool import ConfigError
from dbpool.flask import DBPool, create_blueprint
from dbpool.settings import COMMON
from dbpool.settings.app import AppSettings

PRINTABLE = [chr(i) for i in range(32, 127)]

made: list[Flask] = []


@pytest.fixture(autouse=True)
def close_pools() -> Iterator[None]:
    """Close the pools of a test's applications, which would try to connect for ever."""
    yield
    while made:
        made.pop().extensions["dbpool"].databases.close()


def make_app(**config: str) -> Flask:
    app = Flask("app")
    app.config.update(DATABASE_URL="host=127.0.0.1 port=1", DBPOOL_DOTENV="off", **config)
    DBPool(app)
    made.append(app)
    app.register_blueprint(create_blueprint(), url_prefix="/db")
    return app


@pytest.mark.parametrize("char", PRINTABLE)
@pytest.mark.parametrize("form", ["{}", "{}-and-so-on-and-on", "and-so-{}-on-and-on"])
def test_every_accepted_token_works_as_a_bearer_token(form: str, char: str) -> None:
    token = form.format(char)
    if token != token.strip() or "=" in token.rstrip("="):
        with pytest.raises(ConfigError, match="DBPOOL_TOKEN cannot be sent"):
            make_app(DBPOOL_TOKEN=token)
        return
    client = make_app(DBPOOL_TOKEN=token).test_client()
    headers = {"Authorization": f"Bearer {token}"}
    assert client.get("/db/stats", headers=headers).status_code == 200
    assert client.get("/db/stats", auth=("any", token)).status_code == 200


@pytest.mark.parametrize(
    "token", ["zwölf-Sätze-lang", "a=b-and-so-on-and-on", "two-lines\nand-more", " " * 16 + "x"]
)
def test_an_unusable_token_is_an_error_from_any_source(token: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(token)
    for environ in ({"DBPOOL_TOKEN": token}, {"DBPOOL_TOKEN_FILE": str(file)}):
        with pytest.raises(ConfigError, match="DBPOOL_TOKEN cannot be sent") as caught:
            AppSettings.from_env(environ)
        assert token not in str(caught.value)


@pytest.mark.parametrize("length", [1, 15, 16, 40])
def test_a_short_token_logs_one_warning(length: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dbpool")
    make_app(DBPOOL_TOKEN="q" * length)
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warned) == (length < 16)
    assert all("DBPOOL_TOKEN is shorter than 16 characters" in text for text in warned)
    assert "qq" not in caplog.text


def warnings_of_open_details(caplog: pytest.LogCaptureFixture, **request: Any) -> list[str]:
    """Send the request three times to views that are open; return what is logged of that."""
    app = make_app(DBPOOL_DETAILS="always")
    for _ in range(3):
        app.test_client().get("/db/health/live", **request)
    return [text for text in caplog.messages if "DBPOOL_DETAILS=always" in text]


@pytest.mark.parametrize(
    ("address", "warnings"),
    [("0.0.0.0", 1), ("10.1.2.3", 1), ("::", 1), ("127.0.0.1", 0), ("127.1.1.1", 0), ("::1", 0),
     ("localhost", 0), ("", 0)],
)  # fmt: skip
def test_details_open_to_other_hosts_log_one_warning(
    address: str, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    logged = warnings_of_open_details(caplog, environ_overrides={"SERVER_NAME": address})
    assert len(logged) == warnings
    assert all(address in text for text in logged)


@pytest.mark.parametrize(
    ("client", "warnings"),
    [("10.1.2.3", 1), ("2001:db8::7", 1), ("127.0.0.1", 0), ("::ffff:127.0.0.1", 0), ("", 0)],
)
def test_details_open_to_a_remote_client_log_one_warning(
    client: str, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Waitress and uWSGI do not report the address on which they listen."""
    environ = {"SERVER_NAME": "waitress.invalid", "REMOTE_ADDR": client}
    logged = warnings_of_open_details(caplog, environ_overrides=environ)
    assert len(logged) == warnings


@pytest.mark.parametrize(
    ("forwarded", "warnings"),
    [("203.0.113.9", 1), ("2001:db8::7, 10.0.0.1", 1), ("127.0.0.1", 0), ("unknown", 0), ("", 0)],
)
def test_details_open_to_the_clients_of_a_proxy_log_one_warning(
    forwarded: str, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    """To the server, a proxy on the same machine is local."""
    logged = warnings_of_open_details(caplog, headers={"X-Forwarded-For": forwarded})
    assert len(logged) == warnings


def test_a_door_that_only_the_application_sets_logs_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_app(DBPOOL_SERVE="127.0.0.1:8900")  # without gunicorn's hooks: `dbpool serve` may use it
    assert not caplog.messages
    monkeypatch.setenv("DBPOOL_STATS_DIR", str(tmp_path))  # as the hooks do
    make_app(DBPOOL_SERVE="127.0.0.1:8900")
    (warning,) = caplog.messages
    assert "starts no door" in warning
    monkeypatch.setenv("DBPOOL_SERVE", "127.0.0.1:8900")
    make_app(DBPOOL_SERVE="127.0.0.1:8900")
    assert len(caplog.messages) == 1


def test_closed_views_log_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    client = make_app(DBPOOL_TOKEN="0123456789abcdef").test_client()
    client.get("/db/health/live", environ_overrides={"SERVER_NAME": "0.0.0.0"})
    assert not caplog.messages


def test_a_setting_that_is_none_has_its_default() -> None:
    names = [field.name for field in fields(AppSettings) if isinstance(field.default, bool)]
    assert len(names) >= 4
    unset: dict[str, Any] = dict.fromkeys(names)
    assert AppSettings(**unset) == AppSettings()


def test_every_setting_has_a_variable_that_is_known() -> None:
    assert {f"DBPOOL_{field.name}".upper() for field in fields(AppSettings)} <= COMMON
