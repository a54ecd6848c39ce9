"""Errors that only another client setting can cure are DatabaseMisconfigured at once."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.pq import Conninfo

from dbpool import DatabaseMisconfigured, DatabaseUnavailable, Settings
from dbpool.errors import classify, is_permanent
from tests.pools import SLACK, MakePool
from tests.postgres import Server
from tests.proxy import Proxy
from tests.sockets import answering
from tests.threads import Task

# Parameters with free values, or that name something that may be created later.
FREE = {
    "service", "user", "password", "passfile", "dbname", "host", "hostaddr", "application_name",
    "fallback_application_name", "sslcert", "sslkey", "sslpassword", "sslrootcert", "sslcrl",
    "sslcrldir", "requirepeer", "krbsrvname", "oauth_issuer", "oauth_client_id",
    "oauth_client_secret", "oauth_scope", "sslkeylogfile",
}  # fmt: skip
# Parameters that this libpq does not check: it has no compression and needs no library.
IGNORED = {"sslcompression", "sslsni", "gsslib", "gssdelegation"}
CHECKED = sorted({o.keyword.decode() for o in Conninfo.get_defaults()} - FREE - IGNORED)

FILE = str(Path(__file__))  # not a directory

WRONG: dict[str, dict[str, object]] = {
    "no such service": {"service": "nosuch"},
    "ports without hosts": {"port": "5432,5433"},
    "hosts without addresses": {"host": "a,b", "hostaddr": "127.0.0.1"},
    "no number": {"port": "54 32"},
    "no address": {"hostaddr": "localhost"},
    "a name with a port": {"host": "localhost:5432"},
    "a name with a scheme": {"host": "https://localhost"},
    "a name in brackets": {"host": "[::1]"},
    "a name with a blank": {"host": "local host"},
    "a name that cannot be encoded": {"host": "x" * 70 + ".invalid"},
    "a name without letters": {"host": "a..b"},
    "a directory below a file": {"host": f"{FILE}/sub"},
    "a file for a directory": {"host": FILE},
    "a long path": {"host": "/" + "x" * 200},
    "an option without a value": {"options": "-c search_path"},
    "an option without a name": {"options": "-c"},
    "an unknown switch": {"options": "-z"},
    "no switch": {"options": "search_path=public"},
    "a parameter for the start": {"options": "-c max_connections=3"},
    "a value out of range": {"options": "-c work_mem=1"},
    "a library": {"options": "-c session_preload_libraries=nope"},
    "no boolean": {"options": "-c geqo=perhaps"},
    "no number for the planner": {"options": "-c seq_page_cost=cheap"},
    "a time zone": {"options": "-c timezone=Nowhere/None"},
    "negative keepalives": {"keepalives_idle": "-1"},
    "weak sslmode": {"sslrootcert": "system", "sslmode": "require"},
    "weak sslmode, direct": {"sslnegotiation": "direct", "sslmode": "prefer"},
    "TLS versions": {"ssl_min_protocol_version": "TLSv1.3", "ssl_max_protocol_version": "TLSv1.2"},
    "protocol versions": {"min_protocol_version": "3.2", "max_protocol_version": "3.0"},
    "authentication": {"require_auth": "scram-sha-256"},
    "authentication, twice": {"require_auth": "md5,md5"},
    "authentication, mixed": {"require_auth": "md5,!none"},
    "channel binding": {"channel_binding": "require"},
    "GSSAPI": {"gssencmode": "require"},
    "a certificate": {"sslcertmode": "require"},
    "SCRAM keys": {"scram_client_key": "x", "scram_server_key": "y"},
    "password, for replication": {"replication": "true"},
}  # fmt: skip


def refused(make_pool: MakePool, conninfo: str = "", **kwargs: object) -> DatabaseMisconfigured:
    """Return the error of a pool that cannot connect; check that it is raised at once."""
    pool = make_pool(conninfo, kwargs=kwargs)
    caller = Task(pool.getconn)
    error = caller.error()
    assert isinstance(error, DatabaseMisconfigured), error
    assert isinstance(error.__cause__, (psycopg.Error, UnicodeError))
    assert caller.seconds < SLACK
    return error


def at(port: int, wrong: Mapping[str, object]) -> dict[str, Any]:
    """Valid parameters with those of *wrong* replaced."""
    params: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": port,
        "user": "postgres",
        "dbname": "postgres",
    }
    return {**params, **wrong}


@pytest.mark.parametrize("name", CHECKED)
def test_an_invalid_parameter_value_is_misconfigured(
    server: Server, make_pool: MakePool, name: str
) -> None:
    refused(make_pool, **at(server.port, {name: "nonsense"}))


@pytest.mark.parametrize("wrong", WRONG)
def test_an_error_that_only_another_setting_cures_is_misconfigured(
    server: Server, make_pool: MakePool, wrong: str
) -> None:
    refused(make_pool, **at(server.port, WRONG[wrong]))


def test_a_host_of_the_environment_is_named(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise psycopg says "failed to resolve host None"."""
    for host in ("localhost:5432", "tcp://10.0.0.1:5432"):
        monkeypatch.setenv("PGHOST", host)
        error = refused(make_pool)
        assert error.kind == "conninfo"
        assert f"resolve host '{host}'" in str(error)
    settings = Settings.from_env(environ={"PGHOST": "nowhere.invalid"})
    with pytest.raises(DatabaseUnavailable, match=r"resolve host 'nowhere\.invalid'"):
        make_pool(settings=settings, outage_grace=0.01).getconn()


@pytest.mark.parametrize(
    "text", [None, "[mine]\nhost\n", "[mine]\nfoo=1\n", "[mine]\nservice=b\n", "[mine]\nport=x\n"]
)
def test_a_wrong_service_file_is_misconfigured(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None
) -> None:
    file = tmp_path / "services"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    assert refused(make_pool, "service=mine").kind == "conninfo"


# With TLS


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates, keys, and files that are neither."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl command to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    for name in ("server", "client"):
        subprocess.run(
            [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
             "-nodes", "-subj", "/CN=elsewhere", "-days", "2", "-keyout", folder / f"{name}.key",
             "-out", folder / f"{name}.crt"],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
    subprocess.run(
        [openssl, "ec", "-in", folder / "client.key", "-aes256", "-passout", "pass:secret",
         "-out", folder / "locked.key"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    shutil.copy(folder / "client.key", folder / "open.key")
    (folder / "garbage").write_text("garbage")
    for file in folder.iterdir():
        file.chmod(0o600)
    (folder / "open.key").chmod(0o644)
    return folder


@pytest.fixture
def tls_port(server: Server, files: Path) -> Iterator[int]:
    """The port of a proxy that speaks TLS, as the test server may be built without it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files / "server.crt", files / "server.key")
    proxy = Proxy(server.port, tls=context)
    yield proxy.port
    proxy.close()


CLIENT = {"sslcert": "client.crt"}
WRONG_FILES: dict[str, dict[str, str]] = {
    "no key": CLIENT | {"sslkey": "none"},
    "a key that others may read": CLIENT | {"sslkey": "open.key"},
    "a key that is none": CLIENT | {"sslkey": "garbage"},
    "a key below a file": CLIENT | {"sslkey": "garbage/key"},
    "a key that is a directory": CLIENT | {"sslkey": "."},
    "another key": CLIENT | {"sslkey": "server.key"},
    "a locked key": CLIENT | {"sslkey": "locked.key", "sslpassword": "wrong"},
    "a key in no engine": CLIENT | {"sslkey": "nosuch:key"},
    "a certificate that is none": {"sslcert": "garbage", "sslkey": "client.key"},
    "no root": {"sslmode": "verify-ca", "sslrootcert": "none"},
    "a root that is none": {"sslmode": "verify-ca", "sslrootcert": "garbage"},
    "another root": {"sslmode": "verify-ca", "sslrootcert": "client.crt"},
    "another name": {"sslmode": "verify-full", "sslrootcert": "server.crt"},
    "old TLS": {"ssl_min_protocol_version": "TLSv1", "ssl_max_protocol_version": "TLSv1"},
    "a client's certificate": {"sslcertmode": "require"},
}


@pytest.mark.parametrize("wrong", WRONG_FILES)
def test_wrong_files_for_tls_are_misconfigured(
    tls_port: int, make_pool: MakePool, files: Path, wrong: str
) -> None:
    given = {
        name: str(files / value) if name in ("sslcert", "sslkey", "sslrootcert")
        and value != "nosuch:key" else value
        for name, value in WRONG_FILES[wrong].items()
    }  # fmt: skip
    error = refused(make_pool, **at(tls_port, {"sslmode": "require", **given}))
    assert error.kind == "tls"


# Servers that are not PostgreSQL


@pytest.mark.parametrize("sslmode", ["disable", "prefer", "require"])
@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"-ERR unknown\r\n"])
def test_a_port_of_another_service_is_misconfigured(
    make_pool: MakePool, sslmode: str, answer: bytes
) -> None:
    def answer_all(peer: socket.socket) -> None:
        peer.recv(1000)
        peer.sendall(answer)

    with answering(answer_all) as port:
        refused(make_pool, f"host=127.0.0.1 port={port} user=u sslmode={sslmode}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may use every socket")
def test_a_socket_without_permission_is_misconfigured(make_pool: MakePool, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / ".s.PGSQL.5432"))
        listener.listen()
        (tmp_path / ".s.PGSQL.5432").chmod(0)
        assert refused(make_pool, f"host={tmp_path} user=u").kind == "access"


# Several hosts


@pytest.mark.parametrize("ports", ["1,{}", "{},1", "1,1,{}"])
def test_one_host_that_is_down_makes_the_failure_transient(
    server: Server, make_pool: MakePool, ports: str
) -> None:
    hosts = ",".join(["127.0.0.1"] * (ports.count(",") + 1))
    conninfo = f"host={hosts} port={ports.format(server.port)} user=postgres dbname=nowhere"
    pool = make_pool(conninfo, outage_grace=0.1)
    error = Task(pool.getconn).error()
    assert type(error) is DatabaseUnavailable
    assert error.kind == "refused"


def test_the_settings_are_wrong_if_all_hosts_say_so(server: Server, make_pool: MakePool) -> None:
    both = f"host=127.0.0.1,127.0.0.1 port={server.port},{server.port} user=postgres"
    assert refused(make_pool, f"{both} dbname=nowhere").kind == "database"


def test_a_refused_second_address_of_a_host_does_not_hide_the_wrong_setting() -> None:
    """For example ::1 of `localhost`, for a server that listens only on 127.0.0.1."""
    wrong = 'connection failed: FATAL:  password authentication failed for user "u"'
    host = "- host: 'localhost', port: '5432', hostaddr"
    text = f"{wrong}\nMultiple connection attempts failed. All failures were:\n"
    text += f"{host}: '::1': connection failed: Connection refused\n{host}: '127.0.0.1': {wrong}"
    assert classify(psycopg.OperationalError(text)) == "password"


# Messages of errors that cannot be caused here, and of transient ones.


MESSAGES = {
    "connection is bad: local user with ID 12345 does not exist": "conninfo",
    "connection is bad: ungültiger Wert für gssencmode: „x“": "conninfo",
    'connection failed: FATAL:  Peer authentication failed for user "u"': "password",
    'connection failed: FATAL:  Ident authentication failed for user "u"': "password",
    'connection failed: requirepeer specifies "u", but actual peer user name is "v"': "conninfo",
    'connection failed: FATAL:  permission denied to set parameter "log_statement"': "conninfo",
    "connection failed: server requires OAuth authentication, but oauth_issuer and": "conninfo",
    'connection to server on socket "/s/.s.PGSQL.5432" failed: Permission denied': "access",
}


@pytest.mark.parametrize(("text", "kind"), MESSAGES.items())
def test_libpqs_messages_about_settings_are_permanent_errors(text: str, kind: str) -> None:
    assert classify(psycopg.OperationalError(text)) == kind
    assert is_permanent(kind)


@pytest.mark.parametrize(
    "text",
    [
        'connection is bad: connection to server on socket "/s/.s.PGSQL.5432" failed: No such file',
        "connection is bad: Verbindung zum Server auf Socket »/s/.s.PGSQL.5432« fehlgeschlagen: x",
        'connection is bad: connection to server at "10.0.0.1", port 5432 failed: Network is down',
        "connection is bad: la conexión al servidor en «10.0.0.1», puerto 5432 falló: x",
        "connection is bad: out of memory",
        "failed to resolve host 'db': [Errno -3] Temporary failure in name resolution",
        "failed to resolve host 'fe80::1%eth0': [Errno -2] Name or service not known",
    ],
)
def test_messages_of_transient_errors_are_not_permanent_errors(text: str) -> None:
    assert not is_permanent(classify(psycopg.OperationalError(text)))


@pytest.mark.parametrize(
    "conninfo",
    [
        "host=nowhere.invalid user=u",
        "postgresql://u:password@nowhere.invalid/d",
        lambda: "host=db.invalid,nowhere.invalid",
    ],
)
def test_a_name_that_does_not_resolve_is_transient_and_named(
    make_pool: MakePool, conninfo: Any
) -> None:
    pool = make_pool(conninfo, outage_grace=0.1)
    error = Task(pool.getconn).error()
    assert type(error) is DatabaseUnavailable
    assert "failed to resolve host 'nowhere.invalid'" in str(error)
