"""The notes API: requests and answers; with PostgreSQL if a statement is run."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from flask import Flask
from flask.testing import FlaskClient
from psycopg.conninfo import make_conninfo
from werkzeug.test import TestResponse

from dbpool import ConfigError
from dbpool.settings.app import AppSettings
from tests.fake import FakeServer
from tests.scripts import python
from tests.threads import run_in_threads
from webapp import ROOT, create_app, dotenv, schema
from webapp import __main__ as supervisor
from webapp.notes import db
from webapp.validation import MAX_BIGINT, MAX_BODY, MAX_TITLE


def make(**config: Any) -> Flask:
    return create_app({"TESTING": True, "DBPOOL_DETAILS": "always", **config})


@pytest.fixture
def app(dsn: str) -> Iterator[Flask]:
    app = make(DATABASE_URL=dsn)
    with app.app_context():
        schema.create(db.pool)
    yield app
    app.extensions["dbpool"].databases.close()


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def without_tables(fake: FakeServer) -> Iterator[Flask]:
    """An application on the fake server, for requests that run no statement."""
    app = make(DATABASE_URL=fake.conninfo)
    app.extensions["dbpool"].databases.default.connection_class = fake.connection_class
    yield app
    app.extensions["dbpool"].databases.close()
    assert fake.statements == []


@pytest.fixture
def client_without_tables(without_tables: Flask) -> FlaskClient:
    """A client whose requests reach no database."""
    return without_tables.test_client()


def created(client: FlaskClient, title: str = "a title", **fields: Any) -> dict[str, Any]:
    answer = client.post("/notes", json={"title": title, **fields})
    assert answer.status_code == 201, answer.text
    note: dict[str, Any] = answer.get_json()
    return note


def refused(answer: TestResponse, status: int) -> str:
    """Check that the error is JSON with a reason; return that."""
    assert answer.status_code == status, answer.text
    assert answer.mimetype == "application/json"
    reason = answer.get_json()["error"]
    assert isinstance(reason, str)
    assert reason
    return reason


def test_creates_and_reads_a_note(client: FlaskClient) -> None:
    answer = client.post("/notes", json={"title": " Zoë's ☂ ", "body": "a\nb"})
    assert answer.status_code == 201
    note = answer.get_json()
    assert answer.headers["Location"] == f"/notes/{note['id']}"
    assert (note["title"], note["body"], note["version"]) == ("Zoë's ☂", "a\nb", 1)
    assert client.get(answer.headers["Location"]).get_json() == note


def test_text_that_looks_like_sql_is_stored_as_text(client: FlaskClient) -> None:
    injection = "'); drop table notes; -- %s %(a)s"
    assert created(client, injection)["title"] == injection
    assert client.get("/notes").status_code == 200


def test_updates_a_note_and_counts_its_version(client: FlaskClient) -> None:
    note = created(client)
    answer = client.put(f"/notes/{note['id']}", json={"title": "new", "version": 1})
    assert answer.status_code == 200
    updated = answer.get_json()
    assert (updated["title"], updated["body"], updated["version"]) == ("new", "", 2)
    assert updated["created"] == note["created"]
    assert updated["updated"] > note["updated"]


def test_an_update_of_a_stale_version_changes_nothing(client: FlaskClient) -> None:
    note = created(client)
    path = f"/notes/{note['id']}"
    client.put(path, json={"title": "first", "version": 1})
    answer = client.put(path, json={"title": "second", "version": 1})
    assert "version 2" in refused(answer, 409)
    assert answer.get_json()["version"] == 2
    assert client.get(path).get_json()["title"] == "first"


def test_deletes_a_note(client: FlaskClient) -> None:
    path = f"/notes/{created(client)['id']}"
    answer = client.delete(path)
    assert (answer.status_code, answer.data) == (204, b"")
    refused(client.get(path), 404)
    refused(client.delete(path), 404)


def test_deletes_only_the_version_asked_for(client: FlaskClient) -> None:
    note = created(client)
    path = f"/notes/{note['id']}"
    client.put(path, json={"title": "newer", "version": 1})
    refused(client.delete(f"{path}?version=1"), 409)
    assert client.delete(f"{path}?version=2").status_code == 204


def test_pages_through_all_notes_while_others_come_and_go(client: FlaskClient) -> None:
    ids = [created(client, f"note {number}")["id"] for number in range(7)]
    seen, path = [], "/notes?limit=3"
    while path:
        page = client.get(path).get_json()
        assert len(page["notes"]) <= 3
        seen += [note["id"] for note in page["notes"]]
        client.delete(f"/notes/{seen[-1]}")  # the next page starts after it
        path = page["next"]
    assert seen == ids


def test_the_last_page_has_no_next_one(client: FlaskClient) -> None:
    for number in range(2):
        created(client, f"note {number}")
    assert client.get("/notes?limit=2").get_json()["next"] is None
    assert client.get(f"/notes?after={MAX_BIGINT}").get_json() == {"notes": [], "next": None}


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "limit=", "limit=%2B5"])
def test_a_limit_out_of_range_is_rejected(client_without_tables: FlaskClient, query: str) -> None:
    assert (
        refused(client_without_tables.get(f"/notes?{query}"), 400)
        == "limit must be a number from 1 to 100"
    )


@pytest.mark.parametrize("after", ["-1", "x", "1.5", str(2**63), "9" * 5000, "٣"])
def test_a_keyset_out_of_range_is_rejected(client_without_tables: FlaskClient, after: str) -> None:
    refused(client_without_tables.get("/notes", query_string={"after": after}), 400)


@pytest.mark.parametrize("number", ["0", "999999", str(2**63), "9" * 4000, "-1", "one", "1.0"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_an_unknown_id_is_not_found(client: FlaskClient, method: str, number: str) -> None:
    refused(client.open(f"/notes/{number}", method=method), 404)


def test_an_update_of_an_unknown_id_is_not_found(client: FlaskClient) -> None:
    refused(client.put("/notes/999999", json={"title": "x", "version": 1}), 404)
    refused(client.put(f"/notes/{2**63}", json={"title": "x", "version": 1}), 404)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hello",
        b"{",
        b"[]",
        b"null",
        b'"title"',
        b"\xff\xfe",
        b"[" * 60_000,
        b'{"title": "x", "body": ' + b"1" * 5000 + b"}",
    ],
)
def test_a_body_that_is_not_a_json_object_is_rejected(
    client_without_tables: FlaskClient, body: bytes
) -> None:
    answer = client_without_tables.post("/notes", data=body, content_type="application/json")
    refused(answer, 400)


def test_a_body_of_another_content_type_is_rejected(client_without_tables: FlaskClient) -> None:
    answer = client_without_tables.post("/notes", data={"title": "a form"})
    assert "Content-Type" in refused(answer, 400)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "title is missing or empty"),
        ({"title": ""}, "title is missing or empty"),
        ({"title": " \t"}, "title is missing or empty"),
        ({"title": None}, "title must be a string"),
        ({"title": 5}, "title must be a string"),
        ({"title": "x" * (MAX_TITLE + 1)}, "title must not be longer than 200 characters"),
        ({"title": "x", "body": ["y"]}, "body must be a string"),
        ({"title": "x", "body": "y" * (MAX_BODY + 1)}, "body must not be longer"),
        ({"title": "a\0b"}, "title contains a character that cannot be stored"),
        ({"title": "x", "body": "\ud800"}, "body contains a character that cannot be stored"),
        ({"title": "x", "colour": "red"}, "unknown field 'colour'"),
        ({"title": "x", "version": 1}, "unknown field 'version'"),
    ],
)
def test_an_invalid_note_is_rejected_with_the_reason(
    client_without_tables: FlaskClient, fields: dict[str, Any], reason: str
) -> None:
    assert refused(client_without_tables.post("/notes", json=fields), 400).startswith(reason)


@pytest.mark.parametrize("version", [None, "1", 1.0, True, 0, -1, 2**63])
def test_an_update_without_a_valid_version_is_rejected(
    client_without_tables: FlaskClient, version: Any
) -> None:
    answer = client_without_tables.put("/notes/1", json={"title": "x", "version": version})
    assert refused(answer, 400).startswith("version must be")


def test_a_title_as_long_as_allowed_is_stored(client: FlaskClient) -> None:
    note = created(client, "☂" * MAX_TITLE, body="☂" * MAX_BODY)
    assert len(note["body"]) == MAX_BODY


def test_a_body_too_large_is_rejected(client_without_tables: FlaskClient) -> None:
    refused(client_without_tables.post("/notes", json={"title": "x", "body": "y" * 300_000}), 413)


def test_a_body_too_large_is_rejected_without_a_length_too(
    client_without_tables: FlaskClient,
) -> None:
    body = b'{"title": "x"}' + b" " * 300_000  # bytes beyond the limit are not read
    answer = client_without_tables.post(
        "/notes",
        input_stream=io.BytesIO(body),
        content_type="application/json",
        environ_overrides={"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"},
    )
    refused(answer, 413)


def test_an_unsupported_method_is_answered_with_the_supported_ones(
    client_without_tables: FlaskClient,
) -> None:
    answer = client_without_tables.patch("/notes")
    refused(answer, 405)
    assert set(answer.headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS", "POST"}


def test_an_unknown_path_is_not_found(client_without_tables: FlaskClient) -> None:
    refused(client_without_tables.get("/nothing/here"), 404)


def test_an_internal_error_shows_no_details(without_tables: Flask) -> None:
    app = without_tables

    @app.get("/broken")
    def broken() -> str:
        raise RuntimeError("s3cr3t")

    app.config["PROPAGATE_EXCEPTIONS"] = False
    answer = app.test_client().get("/broken")
    assert refused(answer, 500) == "internal error"
    assert "s3cr3t" not in answer.text


def test_a_missing_table_is_named_in_the_error(app: Flask, client: FlaskClient) -> None:
    with app.app_context():
        db.pool.execute("drop table notes")
    assert "webapp.schema" in refused(client.get("/notes"), 503)


def test_a_database_that_is_down_is_unavailable_with_a_time_to_retry() -> None:
    app = make(DATABASE_URL="postgresql://nobody@127.0.0.1:1/none", DBPOOL_OUTAGE_GRACE="100ms")
    try:
        answer = app.test_client().get("/notes")
        refused(answer, 503)
        assert float(answer.headers["Retry-After"]) > 0
    finally:
        app.extensions["dbpool"].databases.close()


def test_a_connection_lost_in_the_middle_is_unavailable(app: Flask, dsn: str) -> None:
    @app.get("/cut")
    def cut() -> str:
        db.pool.fetch_value("select pg_terminate_backend(pg_backend_pid())")
        return "not reached"

    answer = app.test_client().get("/cut")
    refused(answer, 503)
    assert float(answer.headers["Retry-After"]) > 0
    assert app.test_client().get("/notes").status_code == 200


def test_the_views_of_the_pool_are_mounted(client: FlaskClient) -> None:
    created(client)
    assert client.get("/db/health/ready").get_json()["status"] == "up"
    pool = client.get("/db/stats").get_json()["pools"]["default"]
    assert pool["active"] + pool["idle"] + pool["connecting"] == pool["size"]
    index = client.get("/").get_json()
    assert all(client.get(path).status_code == 200 for path in index.values())


def test_making_the_application_touches_no_database() -> None:
    app = make(DATABASE_URL="postgresql://nobody@127.0.0.1:1/none")
    try:
        assert app.test_client().get("/db/health/live").status_code == 200
    finally:
        app.extensions["dbpool"].databases.close()


def test_two_applications_in_one_process_are_independent(without_tables: Flask) -> None:
    other = make(DATABASE_URL=FakeServer.conninfo)
    try:
        with without_tables.app_context():
            first_pool = db.pool
        with other.app_context():
            assert db.pool is not first_pool
    finally:
        other.extensions["dbpool"].databases.close()


def test_a_wrong_setting_is_an_error_when_the_application_is_made() -> None:
    with pytest.raises(ConfigError, match="DBPOOL_MAX_SIZE"):
        make(DATABASE_URL=FakeServer.conninfo, DBPOOL_MAX_SIZE="many")


def test_several_processes_may_make_the_tables_at_once(dsn: str) -> None:
    from dbpool import Pool

    with Pool(dsn, max_size=4) as pool:
        run_in_threads(4, schema.create, pool)
        schema.create(pool)
        assert pool.fetch_value("select count(*) from notes") == 0


STARTED_BY = [
    ["-m", "webapp"],
    ["-c", "import runpy; runpy.run_path('webapp/gunicorn.conf.py')"],
    ["-m", "webapp.serve"],
]
NO_NUMBERS = ["0", "abc", "-1", "1e3", "1001", "\N{ARABIC-INDIC DIGIT THREE}", "9" * 5000]


@pytest.mark.parametrize("command", STARTED_BY, ids=["make run", "configuration", "container"])
@pytest.mark.parametrize("workers", NO_NUMBERS, ids=lambda workers: workers[:5])
def test_an_invalid_number_of_workers_is_an_error_of_one_line(
    workers: str, command: list[str]
) -> None:
    done = python(*command, env={"WEB_CONCURRENCY": workers, "PORT": "8000"})
    assert done.returncode == 1
    shown = repr(workers[:20])
    assert done.stderr == f"webapp: WEB_CONCURRENCY must be a number from 1 to 1000, not {shown}\n"


@pytest.mark.parametrize("workers", ["", " ", "2", "02", "2\n"])
def test_an_empty_number_of_workers_is_the_default(workers: str) -> None:
    script = "import runpy; print(runpy.run_path('webapp/gunicorn.conf.py')['workers'])"
    done = python("-c", script, env={"WEB_CONCURRENCY": workers}, check=True)
    assert done.stdout == "2\n"


def test_a_dotenv_above_the_checkout_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    monkeypatch.setattr("webapp.ROOT", checkout)
    (tmp_path / ".env").write_text("DATABASE_URL=postgresql://somebody@elses/database\n")
    assert dotenv() is None
    (checkout / ".env").touch()
    assert dotenv() == checkout / ".env"


def test_make_run_prints_the_source_of_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("webapp.ROOT", tmp_path)
    (tmp_path / ".env").write_text("DATABASE_URL=postgresql:///\n")
    monkeypatch.delenv("DATABASE_URL", raising=False)
    supervisor._announce("127.0.0.1", 8000, None, AppSettings())
    assert f"the database of {tmp_path}/.env." in capsys.readouterr().out
    monkeypatch.setenv("DATABASE_URL_FILE", "/run/secrets/url")
    supervisor._announce("127.0.0.1", 8000, None, AppSettings())
    assert "the database of DATABASE_URL_FILE." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "details"),
    [
        ({}, "always"),
        ({"DBPOOL_TOKEN": "hunter2"}, None),
        ({"DBPOOL_TOKEN_FILE": "/run/secrets/token"}, None),
        ({"DBPOOL_DETAILS": "token"}, "token"),
    ],
)
def test_the_embedded_demo_shows_everything_unless_a_token_is_set(
    given: dict[str, str], details: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = SimpleNamespace(conninfo="postgresql:///")
    monkeypatch.setattr(supervisor, "server", lambda *_: nullcontext(embedded))
    monkeypatch.setattr(supervisor, "dotenv", lambda: None)
    monkeypatch.setattr(os, "environ", given)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with supervisor._database(listener, lambda: False):  # type: ignore[arg-type]
            assert os.environ.get("DBPOOL_DETAILS") == details


@pytest.mark.parametrize("ignored", [True, False])
def test_a_hangup_stops_it_except_under_nohup(ignored: bool) -> None:
    script = (
        "import os, signal\n"
        f"signal.signal(signal.SIGHUP, signal.{'SIG_IGN' if ignored else 'SIG_DFL'})\n"
        "from webapp.__main__ import Stop\n"
        "stop = Stop()\n"
        "os.kill(os.getpid(), signal.SIGHUP)\n"
        "print(stop())\n"
    )
    done = python("-c", script, check=True)
    assert done.stdout == f"{not ignored}\n"


def test_a_failure_of_the_schema_is_printed_once(server: Any) -> None:
    url = server.conninfo_for(user="nobody_here")
    done = python("-m", "webapp.schema", env={"DATABASE_URL": url})
    assert done.returncode == 1
    assert done.stderr.startswith("webapp: ")
    assert len(done.stderr.splitlines()) == 1


def test_making_an_environment_can_be_interrupted(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.txt"
    lock.write_text("no-such-package-is-there\n")
    prologue = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script = prologue + (ROOT / "tools" / "make_venv.py").read_text()
    (tmp_path / "make_venv.py").write_text(script)
    making = subprocess.Popen(
        [sys.executable, tmp_path / "make_venv.py", tmp_path / "venv", lock],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert making.stdout is not None
    assert making.stdout.readline().startswith("making")
    os.killpg(making.pid, signal.SIGINT)  # to the whole group, as a terminal does
    _, errors = making.communicate(timeout=20)
    assert making.returncode == 1
    assert errors == "venv: interrupted; the next run starts again\n"


# What it prints about the views


@pytest.mark.parametrize(
    ("settings", "page", "parts"),
    [
        (AppSettings(details="always"), True, []),
        (AppSettings(token="a-token-of-some-length"), True, ["a form", "curl"]),
        (AppSettings(), False, ["closed", "set DBPOOL_TOKEN"]),
    ],
)
def test_it_prints_how_the_live_page_opens(
    settings: AppSettings, page: bool, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    supervisor._announce("127.0.0.1", 8000, None, settings)
    output = capsys.readouterr().out
    assert ("the live page" in output) == page
    assert all(word in output for word in parts)
    assert "a-token" not in output


def test_it_prints_the_command_that_reaches_the_demos_database(
    server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    embedded = SimpleNamespace(conninfo=server.conninfo, data="here")
    supervisor._announce("127.0.0.1", 8000, embedded, AppSettings())  # type: ignore[arg-type]
    (line,) = [each for each in capsys.readouterr().out.splitlines() if "psql" in each]
    done = subprocess.run(
        f"{line} -XAtc 'select 40 + 2'", shell=True, capture_output=True, text=True, check=False
    )
    assert done.stdout == "42\n", done.stderr


# Host names


def demo_host_names(monkeypatch: pytest.MonkeyPatch, address: str = "127.0.0.1") -> str:
    """The host names that `make run` lets its demo answer to."""
    embedded = SimpleNamespace(conninfo="postgresql:///")
    monkeypatch.setattr(supervisor, "server", lambda *_: nullcontext(embedded))
    monkeypatch.setattr(supervisor, "dotenv", lambda: None)
    monkeypatch.setattr(os, "environ", {})
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as listener:
        with supervisor._database(listener, lambda: False):  # type: ignore[arg-type]
            return os.environ["WEBAPP_HOSTS"]


@pytest.mark.parametrize("path", ["/", "/notes", "/db/", "/db/stats", "/db/static/live.js", "/no"])
def test_the_demo_answers_to_no_public_host_name(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEBAPP_HOSTS", demo_host_names(monkeypatch))
    app = make(DATABASE_URL="postgresql://nobody@127.0.0.1:1/none", DBPOOL_OUTAGE_GRACE="0s")
    try:
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil",
                     "127.0.0.2", "[::2]", "0.0.0.0", "evil\\@localhost", "localhost, evil"):  # fmt: skip
            with app.test_client().get(path, headers={"Host": host}) as answer:
                assert answer.status_code == 400, host
        for host in ("localhost", "localhost:8000", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000"):
            with app.test_client().get(path, headers={"Host": host}) as answer:
                assert answer.status_code != 400, host
    finally:
        app.extensions["dbpool"].databases.close()


def test_the_demo_answers_to_the_address_it_is_bound_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "127.0.0.3" in demo_host_names(monkeypatch, "127.0.0.3").split(",")


def test_host_names_may_be_added_and_without_the_demo_all_are_accepted(
    client_without_tables: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client_without_tables.get("/", headers={"Host": "notes.example"}).status_code == 200
    monkeypatch.setenv("WEBAPP_HOSTS", "localhost, Notes.Example")
    app = make(DATABASE_URL=FakeServer.conninfo)
    assert app.test_client().get("/", headers={"Host": "notes.example:80"}).status_code == 200
    assert app.test_client().get("/", headers={"Host": "other.example"}).status_code == 400
    app.extensions["dbpool"].databases.close()


# Its log


@pytest.mark.parametrize(
    "set_up",
    [
        "runpy.run_path('webapp/gunicorn.conf.py')",
        "webapp.__main__._set_up_logging()",
    ],
)
def test_a_line_of_the_log_has_time_pid_level_and_name(set_up: str) -> None:
    script = f"import logging, runpy, webapp.__main__; {set_up}; "
    script += "logging.getLogger('webapp').warning('hello')"
    done = python("-c", script, check=True)
    line = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}\] \[\d+\] \[WARNING\] webapp: hello\n"
    assert re.fullmatch(line, done.stderr), done.stderr


def test_retry_after_of_a_transient_failure_is_spread(without_tables: Flask) -> None:
    app = without_tables

    @app.get("/broken")
    def broken() -> str:
        raise psycopg.OperationalError("the connection is lost")

    client = app.test_client()
    assert len({client.get("/broken").headers["Retry-After"] for _ in range(50)}) > 1


# The role that makes the tables


@pytest.fixture
def role(server: Any, dsn: str) -> Iterator[str]:
    """The URL of a role without privileges."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("create role notes_app login password 'secret'")
        yield make_conninfo(dsn, user="notes_app", password="secret")
        conn.execute("reassign owned by notes_app to postgres")
        conn.execute("drop role notes_app")


def test_a_database_owner_without_superuser_makes_the_tables_and_serves(
    role: str, dsn: str
) -> None:
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(f"alter database {conn.info.dbname} owner to notes_app")
    app = make(DATABASE_URL=role)
    try:
        with app.app_context():
            schema.create(db.pool)
            schema.create(db.pool)
        assert created(app.test_client())["version"] == 1
    finally:
        app.extensions["dbpool"].databases.close()


def test_a_role_that_may_not_make_tables_gets_an_error_of_one_line(role: str) -> None:
    done = python("-m", "webapp.schema", env={"DATABASE_URL": role})
    assert done.returncode == 1
    assert done.stderr.startswith("webapp: permission denied for schema public")
    assert len(done.stderr.splitlines()) == 1
