"""The sample application's log: each line has time, level, pid and request, and no secret."""

from __future__ import annotations

import json
import logging
import logging.config
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from webapp import ROOT, create_app
from webapp.logs import JSONFormatter, TextFormatter, config

from .fake import FakeServer
from .postgres import free_port, until

SECRET = "hunter2secret"


def record(**fields: Any) -> logging.LogRecord:
    return logging.makeLogRecord(
        {"msg": "pool %r: down", "args": ("default",), "name": "dbpool", "levelname": "ERROR"}
        | fields
    )


def test_a_json_line_has_time_level_pid_and_message() -> None:
    event = {"pool": "default", "event": "circuit_opened"}
    line = json.loads(JSONFormatter().format(record(dbpool=event, created=1795000000.25)))
    assert line == {
        "time": "2026-11-18T11:06:40.250+00:00",
        "level": "ERROR",
        "pid": os.getpid(),
        "logger": "dbpool",
        "text": "pool 'default': down",
        "dbpool": event,
    }


def test_an_exception_is_logged_in_one_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        text = JSONFormatter().format(record(exc_info=sys.exc_info()))
    assert "\n" not in text
    assert json.loads(text)["exception"].endswith("ValueError: two\nlines")


@pytest.mark.parametrize("formatter", [JSONFormatter, TextFormatter])
def test_a_line_names_its_request(fake: FakeServer, formatter: type[logging.Formatter]) -> None:
    app = create_app({"TESTING": True, "DATABASE_URL": fake.conninfo})
    lines = []

    @app.get("/talk", endpoint="talk")
    def talk() -> str:
        lines.append(formatter().format(record()))
        return "done"

    answer = app.test_client().get("/talk", headers={"X-Request-ID": "abc-1"})
    assert answer.headers["X-Request-ID"] == "abc-1"
    if formatter is JSONFormatter:
        assert json.loads(lines[0])["request"] == {"id": "abc-1", "endpoint": "talk"}
    else:
        assert re.fullmatch(
            r"\[[-\d]+ [\d:]+ [+-]\d{4}\] \[\d+\] \[ERROR\] dbpool: pool 'default': down"
            r" \[request abc-1 talk\]",
            lines[0],
        )


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "a\tb", "<b>", "ä"])
def test_a_request_without_a_valid_id_gets_one(fake: FakeServer, given: str) -> None:
    app = create_app({"TESTING": True, "DATABASE_URL": fake.conninfo})
    client = app.test_client()
    headers = [("X-Request-ID", given.encode().decode("latin-1"))]
    ids = {client.get("/", headers=headers).headers["X-Request-ID"] for _ in range(2)}
    assert len(ids) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in ids)


def test_a_request_is_logged_without_its_query(
    fake: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="webapp.access")
    client = create_app({"TESTING": True, "DATABASE_URL": fake.conninfo}).test_client()
    client.get(f"/?token={SECRET}")
    client.get("/db/health/live")
    client.get("/no/such/page")
    first, second = [each.getMessage() for each in caplog.records]
    assert re.fullmatch(r"GET / 200 in \d+\.\d ms", first)
    assert re.fullmatch(r"GET /no/such/page 404 in \d+\.\d ms", second)


@contextmanager
def serving(log: Path, **environ: str) -> Iterator[int]:
    port = free_port()
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "webapp.serve"],
            cwd=ROOT,
            env={**os.environ, "PORT": str(port), "WEB_CONCURRENCY": "1", **environ},
            stdout=output,
            stderr=output,
        )
    try:
        until(lambda: process.poll() is not None or "Booting worker" in log.read_text(), 30.0)
        yield port
    finally:
        process.terminate()
        process.wait(10)


def status_of(port: int, path: str) -> int:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    request.add_header("X-Request-ID", "from-the-client")
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as ex:
        return ex.code


def test_under_gunicorn_every_line_is_json_and_shows_no_secret(tmp_path: Path) -> None:
    url = f"postgresql://app:{SECRET}@127.0.0.1:1/shop"
    environ = {"DATABASE_URL": url, "DBPOOL_TOKEN": SECRET, "DBPOOL_OUTAGE_GRACE": "0.1"}
    log = tmp_path / "log"
    with serving(log, WEBAPP_LOG="json", DBPOOL_DOTENV="off", **environ) as port:
        until(lambda: status_of(port, f"/notes?token={SECRET}") == 503, 20.0)
    text = log.read_text()
    assert SECRET not in text
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        assert {"time", "level", "pid", "logger", "text"} <= line.keys()
        assert datetime.fromisoformat(line["time"]).tzinfo == UTC
    assert {"dbpool", "gunicorn.error", "webapp.access"} <= {line["logger"] for line in lines}
    request = {"id": "from-the-client", "endpoint": "notes.list_notes"}
    answers = [line["text"] for line in lines if line.get("request") == request]
    assert any(re.fullmatch(r"GET /notes 503 in [\d.]+ ms", text) for text in answers)
    page = (ROOT / "docs" / "observability.md").read_text()
    (quoted,) = [json.loads(each) for each in re.findall(r"```json\n(.*?)```", page, re.DOTALL)]
    accesses = [line for line in lines if line.get("request") == request]
    assert quoted.keys() in [line.keys() for line in accesses]
    assert re.fullmatch(r"GET /notes 503 in [\d.]+ ms", quoted["text"])
    assert quoted["request"].keys() == request.keys()
    assert quoted["request"]["endpoint"] == request["endpoint"]
    (down,) = [line for line in lines if line.get("dbpool", {}).get("event") == "circuit_opened"]
    assert down["dbpool"]["kind"] == "refused"


def test_an_unknown_log_format_is_an_error_of_one_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving(log, WEBAPP_LOG="xml"):
        pass
    assert "webapp: WEBAPP_LOG must be text or json\n" in log.read_text()


def test_the_text_format_has_no_line_for_each_request() -> None:
    assert config("text")["loggers"] == {"webapp.access": {"level": "WARNING"}}
