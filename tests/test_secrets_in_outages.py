"""No secret is shown while connects fail or callbacks raise, from whichever source it came."""

from __future__ import annotations

import functools
import html
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import pq

from dbpool import Pool, Settings
from dbpool._secrets import mask
from dbpool.cli import main
from dbpool.cli._probe import is_exposed
from dbpool.events import LoggingListener
from dbpool.monitor import Monitor
from dbpool.processes import Processes
from tests.fake import FakeServer
from tests.sockets import answering
from tests.threads import Task

from .frames import Frames, leaks, of_error
from .postgres import Server, until

PASSWORD = "zq7 Horse/Battery@Staple:9%"
URL = f"postgresql://other:{quote(PASSWORD, safe='')}@db.example/d"


@pytest.fixture
def frames() -> Iterator[Frames]:
    """Records the frames below every log record."""
    handler, logger = Frames(), logging.getLogger()
    loggers = [logging.getLogger(name) for name in ("dbpool", "psycopg.pool")]
    logger.addHandler(handler)
    for each in loggers:
        each.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    for each in loggers:
        each.setLevel(logging.NOTSET)


def error_of(pool: Pool[Any]) -> BaseException:
    with pytest.raises(psycopg.Error) as caught:
        pool.getconn()
    return caught.value


def error_with(pool: Pool[Any], text: str) -> BaseException:
    """The error once it contains *text*: on a busy machine the first may only say "no answer"."""
    errors: list[BaseException] = []

    def has_word() -> bool:
        errors.append(error_of(pool))
        return text in str(errors[-1])

    until(has_word, 30.0)
    return errors[-1]


def texts_of(pool: Pool[Any], error: BaseException) -> list[str]:
    """All texts that callers, views and statistics get."""
    return [*of_error(error), json.dumps(pool.stats().to_json()), repr(pool), repr(pool.breaker)]


# Sources of the password in use


def by_url(port: int, home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    url = f"postgresql://app:{quote(PASSWORD, safe='')}@127.0.0.1:{port}/missing"
    return {"conninfo": url}


def by_kwargs(port: int, home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    kwargs = {"host": "127.0.0.1", "port": port, "user": "app", "password": PASSWORD}
    return {"kwargs": kwargs}


def by_callables(port: int, home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {
        "conninfo": lambda: f"host=127.0.0.1 port={port} user=app",
        "kwargs": lambda: {"password": PASSWORD},
    }


def by_variable(port: int, home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    return {"conninfo": f"host=127.0.0.1 port={port} user=app"}


def by_secret_file(port: int, home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (home / "password").write_text(PASSWORD)
    return {
        "conninfo": f"host=127.0.0.1 port={port} user=app",
        "password_file": str(home / "password"),
    }


def by_password_file(port: int, home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    escaped = PASSWORD.replace("\\", "\\\\").replace(":", "\\:")
    (home / "pgpass").write_text(f"127.0.0.1:{port}:*:app:{escaped}\n")
    (home / "pgpass").chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(home / "pgpass"))
    return {"conninfo": f"host=127.0.0.1 port={port} user=app"}


def by_service(port: int, home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (home / "service").write_text(f"[mine]\nhost=127.0.0.1\nport={port}\npassword={PASSWORD}\n")
    monkeypatch.setenv("PGSERVICEFILE", str(home / "service"))
    return {"conninfo": "service=mine user=app"}


PASSWORD_SOURCES = [
    by_url,
    by_kwargs,
    by_callables,
    by_variable,
    by_secret_file,
    by_password_file,
    by_service,
]
PasswordSource = Callable[[int, Path, pytest.MonkeyPatch], dict[str, Any]]


@contextmanager
def rejecting_server(text: str) -> Iterator[int]:
    """A server that asks for the password in clear text, and refuses it with *text*."""

    def refuse(client: socket.socket) -> None:
        length = int.from_bytes(client.recv(4), "big")
        if client.recv(length - 4)[:4] == (80877103).to_bytes(4, "big"):  # TLS?
            client.sendall(b"N")
            client.recv(4096)
        client.sendall(b"R" + (8).to_bytes(4, "big") + (3).to_bytes(4, "big"))
        client.recv(4096)
        body = b"SFATAL\0VFATAL\0C28P01\0M" + text.encode() + b"\0\0"
        client.sendall(b"E" + (len(body) + 4).to_bytes(4, "big") + body)

    with answering(refuse) as port:
        yield port


@pytest.mark.parametrize("source", PASSWORD_SOURCES)
def test_a_server_that_repeats_the_password_is_not_quoted(
    source: PasswordSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: Frames
) -> None:
    with rejecting_server(f"no, {PASSWORD} (or {quote(PASSWORD)}) is wrong") as port:
        options = source(port, tmp_path, monkeypatch)
        with Pool(**options, timeout=2, outage_grace=0.01, listeners=[LoggingListener()]) as pool:
            texts = texts_of(pool, error_with(pool, "is wrong"))  # only it is masked
    assert not leaks(texts, PASSWORD)
    assert not leaks(frames.shown, PASSWORD)


def test_connections_of_monitor_and_plan_do_not_quote_the_password(
    frames: Frames,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """They connect beside the pool: the monitor while callers wait, and `plan`."""
    monkeypatch.chdir(tmp_path)
    with rejecting_server(f"no, {PASSWORD} is wrong") as port:
        url = f"postgresql://app:{quote(PASSWORD, safe='')}@127.0.0.1:{port}/d"
        with Pool(url, timeout=20, outage_grace=20, max_size=1) as pool:
            monitor = Monitor({"default": pool}, Processes({"default": pool}))
            caller = Task(lambda: error_of(pool))

            def is_reported() -> bool:
                monitor.tick()
                return any("who blocks" in message for message in frames.messages)

            until(is_reported, 15.0)
            monitor.close()
            pool.close(timeout=0)
            caller.result()
        monkeypatch.setenv("DATABASE_URL", url)
        assert main(["plan", "--for", "0"]) == 1
    output = [*capsys.readouterr(), *frames.shown]
    assert any("is wrong" in text for text in output)
    assert not leaks(output, PASSWORD)


@pytest.mark.parametrize("source", PASSWORD_SOURCES)
def test_no_frame_in_an_outage_shows_the_password(
    source: PasswordSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: Frames
) -> None:
    options = source(1, tmp_path, monkeypatch)  # no server listens there
    with Pool(**options, timeout=0.2, outage_grace=0.05, min_size=2) as pool:
        texts = texts_of(pool, error_of(pool))
        until(lambda: pool.stats().counters.connect_failures >= 3)
        texts += texts_of(pool, error_of(pool))
    assert any("unavailable" in message for message in frames.messages)
    assert not leaks(texts, PASSWORD)
    assert not leaks(frames.shown, PASSWORD)


def test_no_frame_under_a_lost_server_shows_the_password(
    own_server: Server, frames: Frames
) -> None:
    own_server.execute(f"create role app login password '{PASSWORD}'")
    conninfo = own_server.conninfo_for(user="app", password=PASSWORD)
    with Pool(conninfo, timeout=1, outage_grace=0.1, max_size=2) as pool:
        with pool.connection() as held:
            assert pool.fetch_value("select 1") == 1
            own_server.stop("immediate")
            with pytest.raises(psycopg.OperationalError) as caught:
                held.execute("select 1")
            texts = list(of_error(caught.value))
        with pytest.raises(psycopg.OperationalError) as caught:
            pool.run(lambda conn: conn.execute("select 1"))
        texts += texts_of(pool, caught.value)
        own_server.start()
        until(lambda: pool.state == "up", 30.0)
        assert pool.fetch_value("select 1") == 1
    assert any("is back" in message for message in frames.messages)
    assert not leaks(texts, PASSWORD)
    assert not leaks(frames.shown, PASSWORD)


@pytest.mark.parametrize(
    "params",
    [
        {"user": "app", "password": "zq7 wrong password"},
        {"user": "app", "password": "zq7 wrong password", "dbname": URL},
        {"user": "nobody_here", "password": "zq7 wrong password"},
        {"user": "postgres", "password": "zq7 wrong password", "dbname": "missing"},
        {"user": "postgres", "password": "zq7 wrong password", "options": "-c nosuch.thing"},
        {"user": "postgres", "password": "zq7 wrong password", "sslmode": "require"},
        {"user": "postgres", "password": "zq7 wrong password", "host": "no-such-host.invalid"},
        {"user": "postgres", "password": "zq7 wrong password", "dbname": URL},
        {"user": "postgres", "password": "zq7 wrong password", "scram_client_key": PASSWORD},
    ],
)
def test_no_kind_of_failure_shows_the_password(
    params: dict[str, Any], server: Server, frames: Frames
) -> None:
    with Pool(
        kwargs={"host": "127.0.0.1", "port": server.port, **params}, timeout=1, outage_grace=0.01
    ) as pool:
        texts = texts_of(pool, error_of(pool))
        texts.append(repr(pool.settings))
    # The server truncates long names.
    assert not leaks([*texts, *frames.shown], PASSWORD, "zq7 wrong password", "Horse")


@pytest.mark.parametrize(
    "variable",
    sorted(
        option.envvar.decode()
        for option in pq.Conninfo.get_defaults()
        if option.envvar and option.keyword not in (b"service", b"servicefile")
    ),
)
def test_a_secret_in_the_wrong_variable_of_libpq_is_not_quoted(
    variable: str, frames: Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, PASSWORD)
    with Pool("host=127.0.0.1 port=1 user=u", timeout=0.2, outage_grace=0.01) as pool:
        texts = texts_of(pool, error_of(pool))
    assert not leaks([*texts, *frames.messages], PASSWORD)


# Callbacks


class Failure(Exception):
    """An application's exception that keeps its text in several places."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.detail = {"url": text}
        self.add_note(f"while using {text}")


class StrRaises(Exception):
    """An exception whose `str` raises."""

    def __str__(self) -> str:
        raise RuntimeError(f"no text, but {URL}")

    __repr__ = __str__


class PsycopgStrRaises(StrRaises, psycopg.OperationalError):
    """An error of psycopg whose `str` raises."""


@pytest.mark.parametrize("error", [StrRaises, PsycopgStrRaises])
def test_a_callback_may_raise_an_error_whose_str_raises(
    error: type[Exception], server: Server, frames: Frames
) -> None:
    wrong = [True]

    def configure(conn: Any) -> None:
        if wrong:
            raise error

    with Pool(server.conninfo, configure=configure, timeout=0.5, outage_grace=0.01) as pool:
        assert "StrRaises" in str(error_with(pool, "StrRaises"))
        wrong.clear()
        until(lambda: pool.state == "up")
        assert pool.fetch_value("select 1") == 1
        assert pool.stats().connecting == 0
    assert not leaks(frames.messages, PASSWORD)


def fail(text: str, *_: Any) -> Any:
    raise Failure(text)


def fail_with_the_password(conn: Any) -> None:
    raise ValueError(f"cannot use {conn.pgconn.password.decode()}")


@pytest.mark.parametrize("role", ["conninfo", "kwargs", "configure", "connection_class"])
def test_views_and_logs_show_only_the_type_of_a_callbacks_error(
    role: str, server: Server, frames: Frames, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"the vault said tk-zq7-4711 and {URL}"

    class Broken(psycopg.Connection[Any]):
        @classmethod
        def connect(cls, *args: Any, **kwargs: Any) -> Any:
            raise Failure(text)

    callback: Any = Broken if role == "connection_class" else functools.partial(fail, text)
    options = {"conninfo": server.conninfo, role: callback}
    with Pool(**options, timeout=0.5, outage_grace=0.01, listeners=[LoggingListener()]) as pool:
        error = error_with(pool, "Failure")
        stats = pool.stats().to_json()
    assert stats["breaker"]["last_error"] == "Failure"
    assert "Failure" in str(error)
    assert type(error.__cause__).__name__ == "Failure"
    views = [str(error), json.dumps(stats), *frames.messages]
    assert not leaks(views, "tk-zq7-4711", PASSWORD)
    own_texts = [text for text in of_error(error) if "tests/" not in text]
    assert not leaks([*own_texts, *frames.shown], PASSWORD)


@pytest.mark.parametrize("role", ["configure", "check", "reset"])
def test_the_password_in_a_callbacks_error_is_masked(
    role: str, own_server: Server, frames: Frames
) -> None:
    own_server.execute(f"create role app login password '{PASSWORD}'")
    conninfo = own_server.conninfo_for(user="app", password=PASSWORD)
    callback: dict[str, Any] = {role: fail_with_the_password}
    with Pool(conninfo, timeout=0.5, outage_grace=0.01, **callback) as pool:
        texts = []
        if role == "reset":
            conn = pool.getconn()
            pool.putconn(conn)
            until(lambda: pool.stats().counters.discarded["broken"] == 1)
        else:
            texts += texts_of(pool, error_of(pool))
    assert not leaks([*texts, *frames.shown], PASSWORD)
    assert any("ValueError" in message for message in frames.messages)


@pytest.mark.parametrize(
    "statement",
    [
        "select set_confg('app.key', 'tk-zq7-4711')",
        "select 'tk-zq7-4711'::int",
        "set statement_timeout = 'tk-zq7-4711'",
        "alter role app password 'tk-zq7-4711' nonsense",
        "select 'tk-zq7-4711",
    ],
)
@pytest.mark.parametrize("role", ["configure", "check", "reset"])
def test_only_the_reason_of_a_callbacks_failed_statement_is_shown(
    statement: str, role: str, server: Server, frames: Frames
) -> None:
    def call(conn: Any) -> None:
        conn.execute(statement.encode())

    seen: list[Any] = []
    options: dict[str, Any] = {"timeout": 0.4, "outage_grace": 0.01, "listeners": [seen.append]}
    with Pool(server.conninfo, **options | {role: call}) as pool:
        if role == "reset":
            pool.wait()
        try:
            pool.putconn(pool.getconn())
        except psycopg.Error as ex:
            seen.append((str(ex), str(ex.__cause__), vars(ex)))
        if role == "reset":
            until(lambda: pool.stats().counters.discarded["broken"])
        seen.append(pool.stats().to_json())
    assert not leaks([repr(seen), *frames.messages, *frames.shown], "tk-zq7-4711")
    reasons = "does not exist|invalid (input|value)|unrecognized|unterminated"
    assert any(re.search(reasons, message) for message in frames.messages)


@pytest.mark.parametrize(
    "statement",
    [
        "alter role app password 'tk zq7 4711' valid until 'x'",
        "ALTER USER app ENCRYPTED PASSWORD E'tk\\'zq7-4711' x",
        "create role app password 'tk''zq7-4711'",
        "create user mapping for app server s options (user 'app', password 'tk-zq7 47",
    ],
)
def test_the_password_in_a_statement_is_masked(statement: str) -> None:
    assert mask(statement).lower().count("password") == 1
    assert not re.search("tk|zq7|47", mask(statement))


def test_a_callback_that_leaves_a_transaction_open_is_named_without_arguments(
    server: Server, frames: Frames
) -> None:
    def begin(token: str, conn: Any) -> None:
        conn.execute("select 1")

    for role in ("configure", "reset"):
        callback = functools.partial(begin, "tk-zq7-4711")
        options: dict[str, Any] = {role: callback, "timeout": 0.3, "outage_grace": 0.01}
        with Pool(server.conninfo, **options) as pool:
            if role == "configure":
                assert "INTRANS" in str(error_of(pool))
            else:
                pool.putconn(pool.getconn())
                until(lambda p=pool: p.stats().counters.discarded["broken"])  # type: ignore[misc]
    assert any("INTRANS" in message for message in frames.messages)
    assert not leaks(frames.messages, "tk-zq7-4711")


NOTATIONS: list[Callable[[str], str]] = [
    str,
    repr,
    ascii,
    str.upper,
    json.dumps,
    html.escape,
    quote,
    quote_plus,
    lambda text: quote(text, safe="@:!'\""),
    lambda text: quote(text, safe="").lower(),
    lambda text: text.replace("'", "''"),
    lambda text: text.replace("\\", "\\\\").replace("'", "\\'"),
    lambda text: repr(text.encode()),
]


@given(
    st.text("zq7. /+%'\"\\<&\x07é€", min_size=4, max_size=20).filter(lambda t: len(t.strip()) > 3),
    st.sampled_from(NOTATIONS),
)
def test_a_secret_is_masked_in_every_notation(secret: str, write: Callable[[str], str]) -> None:
    masked = mask(f"BEGIN{write(secret)}END", {secret})
    remaining = masked.removeprefix("BEGIN").removesuffix("END").replace("***", "")
    assert set(remaining) <= {*" b'\""}, masked


def test_a_secret_is_not_used_as_a_pattern() -> None:
    assert mask("the host is away", {"....", "[a-z]+", "\\w\\w\\w\\w"}) == "the host is away"


def test_masking_takes_linear_time() -> None:
    began = time.monotonic()
    for secret in (
        "\\" * 20 + "x",
        " \\ ' " * 20 + "x",
        "%25" * 20 + "x",
        "é'" * 20,
        "\t" * 20 + "abcd",
    ):
        for char in (
            "\\",
            "'",
            "\\'",
            " x",
            "%25",
            "password=$a$",
            "password $$",
            "://u:",
            "password=''",
            r"password=\'",
        ):
            mask(char * 10_000, {secret})
    assert time.monotonic() - began < 10.0


@pytest.mark.parametrize(
    "text",
    [
        "PGPASSWORD=tk-zq7",
        "DB_PASSWORD = 'tk zq7'",
        "password: tk-zq7",
        "user_password => 'tk''zq7'",
        "pwd=tk-zq7",
        "{'password': b'tk-zq7'}",
        # Those of other services, in the errors of a user's checks and callbacks.
        "https://hooks.example/x?access_token=tk-zq7&a=1",
        "https://api.example/x?api_key=tk-zq7",
        "Authorization: Bearer tk-zq7",
        "{'authorization': 'Basic tk-zq7=='}",
        "X-Api-Key: tk-zq7",
        "client_secret=tk-zq7",
        "ALTER ROLE app PASSWORD $$tk zq7$$",
        "ALTER ROLE app PASSWORD $a$tk $$ zq7$a$ LOGIN",
        "ALTER ROLE app PASSWORD U&'tk-zq7'",
        "ALTER ROLE app PASSWORD $$tk zq7",
        # A connection string within SQL, and JSON or a `repr` within a string.
        "CREATE SUBSCRIPTION s CONNECTION 'host=h password=''tk zq7'' user=u'",
        r"select dblink_connect('password=''tk\'' zq7 tk''')",
        r'"{\"password\": \"tk zq7\", \"user\": \"app\"}"',
        r"'{\'password\': \'tk zq7\'}'",
    ],
)
def test_a_value_after_the_name_of_a_password_is_masked(text: str) -> None:
    assert not re.search("tk|zq7", mask(text)), mask(text)


@pytest.mark.parametrize(
    "text",
    [
        'password authentication failed for user "app"',
        "no password supplied",
        'could not read password file "x"',
        "alter role app password null",
        "password_encryption = 'scram-sha-256'",
        'DETAIL: Token "x" is invalid.',
        "invalid authorization specification",
        "unsupported authentication: basic",
        "select * from t where password = $1 and id = $2",
    ],
)
def test_the_word_password_alone_is_not_masked(text: str) -> None:
    assert mask(text).replace("***", "$1") == text


@pytest.mark.parametrize("write", [repr, json.dumps, quote, str.upper, str])
def test_a_password_is_masked_in_every_form_of_error(write: Callable[[Any], str]) -> None:
    password = 'zq7 it\'s \\ a "b" \x07 é'

    class QuotingConnection(psycopg.Connection[Any]):
        @classmethod
        def connect(cls, *args: Any, **kwargs: Any) -> Any:
            raise psycopg.OperationalError(f"cannot connect by {write(kwargs['password'])} at h")

    kwargs = {"password": password}
    with Pool(
        kwargs=kwargs, connection_class=QuotingConnection, timeout=0.1, outage_grace=0.01
    ) as pool:
        error = error_of(pool)
    assert "cannot connect by" in str(error)
    assert "it" not in str(error).lower().partition("by")[2].partition(" at h")[0]


def test_a_password_may_be_a_number(frames: Frames) -> None:
    kwargs = {"host": "127.0.0.1", "port": 1, "password": 471_147_114_711}
    with pytest.raises(ValueError, match="num_workers") as caught:
        Pool(kwargs=kwargs, num_workers=0)
    texts = list(of_error(caught.value))
    with Pool(kwargs=kwargs, timeout=0.1, outage_grace=0.01) as pool:
        texts += texts_of(pool, error_of(pool))
    assert not leaks([*texts, *frames.shown], "471147114711")


# Hostile and short texts


def test_errors_and_log_lines_have_no_control_characters(
    frames: Frames, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "\x1b[2J\x1b]0;title\x07no\nERROR 2026 forged line\r\x9b31m \u202eevil\u2028x \x7f\u200b"
    with rejecting_server(text) as port:
        conninfo = f"host=127.0.0.1 port={port} user=app password=zq7-and-more"
        with Pool(conninfo, timeout=2, outage_grace=0.01) as pool:
            error = error_with(pool, "forged line")
            last_error = pool.stats().breaker.last_error
        monkeypatch.setenv("DATABASE_URL", conninfo)
        monkeypatch.setenv("DBPOOL_OUTAGE_GRACE", "10ms")
        assert main(["check"]) == 1
        assert main(["check", "--json"]) == 1
        assert main(["wait", "--timeout", "100ms"]) == 1
        out, err = capsys.readouterr()
    assert "forged line" in str(last_error)
    for shown in (str(last_error), str(error), str(error.__cause__), *frames.messages):
        assert shown.isprintable(), repr(shown)
    for line in (out + err).split("\n"):
        assert line.isprintable(), repr(line)


def test_holders_are_shown_without_control_characters(fake: FakeServer, frames: Frames) -> None:
    with fake.pool(max_size=1, timeout=0.05) as pool:
        got, done = threading.Event(), threading.Event()

        def hold() -> None:
            with pool.connection():
                got.set()
                done.wait(10)

        holder = Task(hold, name="\x1b[31mworker\n7")
        try:
            got.wait(10)
            error = error_of(pool)
            assert pool.holders()[0].thread == "[31mworker 7"
            assert str(error).isprintable()
        finally:
            done.set()
            holder.result()


@pytest.mark.parametrize("password", ["e", "no", "app"])
def test_with_a_short_password_the_whole_text_is_left_out(password: str, frames: Frames) -> None:
    with rejecting_server("no such app here") as port:
        conninfo = f"host=127.0.0.1 port={port} user=x password={password}"
        with Pool(conninfo, timeout=2, outage_grace=0.01) as pool:
            error = error_with(pool, "left out")
            texts = [str(pool.stats().breaker.last_error), str(error.__cause__)]
    assert str(error.__cause__) in str(error)
    for text in texts:
        assert "such" not in text
        assert "***" not in text


# A pool whose constructor failed


@pytest.mark.parametrize("options", [{"num_workers": 0}, {"max_size": "x"}, {"nosuch": 1}])
def test_a_pool_whose_constructor_failed_has_a_repr(options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        Pool("host=h password=zq7-and-more", **options)
    texts = list(of_error(caught.value))
    assert any("dbpool.Pool" in text for text in texts)
    assert not leaks(texts, "zq7-and-more")


@pytest.mark.parametrize("made", [Pool, Settings])
def test_an_uninitialised_pool_has_a_repr(made: Any) -> None:
    assert made.__name__ in repr(made.__new__(made))


# Which hosts count as remote


@pytest.mark.parametrize(
    ("host", "is_remote"),
    [
        ("127.0.0.1", False),
        ("127.8.9.10", False),
        ("::1", False),
        ("0:0:0:0:0:0:0:1", False),
        ("localhost", False),
        ("LOCALHOST", False),
        ("/run/postgresql", False),
        ("@abstract", False),
        ("127.evil.example", True),
        ("127.0.0.1.evil.example", True),
        ("localhost.evil.example", True),
        ("::1.evil.example", True),
        ("10.0.0.1", True),
        ("127.0.0.1,127.evil.example", True),
    ],
)
def test_hosts_that_only_look_local_are_remote(host: str, is_remote: bool) -> None:
    assert is_exposed({"host": host}, {}) is is_remote
