"""The default timeouts never override timeouts that are set on the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from dbpool import ConfigError, Pool, Settings
from tests.postgres import Server, until
from tests.proxy import Proxy

SHOW = """
    select current_setting('statement_timeout'), current_setting('lock_timeout'),
        current_setting('idle_in_transaction_session_timeout')
"""
DEFAULTS = ("30s", "0", "1min")


@pytest.fixture
def role(server: Server, dsn: str) -> Iterator[str]:
    """The connection string of a role of its own on the shared server."""
    server.execute("create role someone login password 'x'")
    yield make_conninfo(dsn, user="someone", password="x")
    server.execute("drop owned by someone; drop role someone")


@pytest.fixture
def change(server: Server, dsn: str) -> Callable[[str], None]:
    """A function that executes ALTER for that role and database."""
    database = str(conninfo_to_dict(dsn)["dbname"])

    def alter(statement: str) -> None:
        server.execute(statement.format(role="someone", database=f'"{database}"'))

    return alter


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    """A proxy in front of the shared server, which it does not harm."""
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


def shown(conninfo: str, **options: Any) -> Any:
    with Pool(conninfo, max_size=1, **options) as pool:
        found = pool.fetch_one(SHOW)
        pool.execute("reset all")
        assert pool.fetch_one(SHOW) == found
        assert pool.stats().counters.connect_failures == 0
        return found


def test_the_defaults_apply_if_the_server_has_no_timeouts(role: str) -> None:
    assert shown(role) == DEFAULTS


TARGETS = ["role {role}", "database {database}", "role {role} in database {database}"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("value", ["2s", "7min", "0"])
def test_timeouts_of_role_and_database_win_over_defaults(
    role: str, change: Callable[[str], None], target: str, value: str
) -> None:
    change(f"alter {target} set statement_timeout = '{value}'")
    assert shown(role) == (value, *DEFAULTS[1:])
    change(f"alter {target} set lock_timeout = '3s'")
    assert shown(role) == (value, "3s", DEFAULTS[2])
    change(f"alter {target} set idle_in_transaction_session_timeout = '4s'")
    assert shown(role) == (value, "3s", "4s")


def test_explicit_settings_win_and_the_value_server_keeps_the_servers(
    role: str, change: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    change("alter role {role} set statement_timeout = '2s'")
    change("alter role {role} set lock_timeout = '3s'")
    assert shown(role, statement_timeout=30, lock_timeout="5s") == ("30s", "5s", "1min")
    assert shown(role, statement_timeout=0, idle_in_transaction_timeout=0) == ("0", "3s", "0")
    server_values: Any = {"statement_timeout": "server", "idle_in_transaction_timeout": " Server "}
    assert shown(role, **server_values) == ("2s", "3s", "0")
    monkeypatch.setenv("DATABASE_URL", role)
    monkeypatch.setenv("DBPOOL_IDLE_IN_TRANSACTION_TIMEOUT", "server")
    assert shown("") == ("2s", "3s", "0")


@pytest.mark.parametrize("by", ["options", "PGOPTIONS", "kwargs"])
def test_timeouts_in_options_win_over_defaults(
    role: str, change: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    change("alter role {role} set statement_timeout = '2s'")
    options = "-c statement_timeout=9s --idle-in-transaction-session-timeout=8s"
    given: dict[str, Any] = {}
    if by == "options":
        role = make_conninfo(role, options=options)
    elif by == "kwargs":
        given = {"kwargs": {"options": options}}
    else:
        monkeypatch.setenv("PGOPTIONS", options)
    assert shown(role, **given) == ("9s", "0", "8s")


@pytest.mark.parametrize("by", ["command line", "alter system", "file"])
def test_timeouts_in_postgresql_conf_win_over_defaults(
    make_server: Callable[..., Server], by: str
) -> None:
    if by == "command line":
        server = make_server(statement_timeout="7min")
    else:
        server = make_server()
        if by == "file":
            with (server.data / "postgresql.conf").open("a") as file:
                file.write("\nstatement_timeout = '7min'\n")
        else:
            server.execute("alter system set statement_timeout = '7min'")
        server.reload()
        until(lambda: server.execute("show statement_timeout") == [("7min",)])
    assert shown(server.conninfo) == ("7min", *DEFAULTS[1:])


def test_the_server_is_asked_once(role: str, proxy: Proxy) -> None:
    conninfo = make_conninfo(role, port=proxy.port)
    with Pool(conninfo, min_size=4, max_size=4) as pool:
        pool.wait()
        assert {pool.fetch_one(SHOW) for _ in range(8)} == {DEFAULTS}
        assert proxy.accepted == 5
        assert proxy.links == 4
        pool.drain()
        until(lambda: proxy.accepted == 9)


@pytest.mark.parametrize(
    "options",
    [
        {"pooler": "transaction"},
        {"statement_timeout": 30, "idle_in_transaction_timeout": 60},
        {"statement_timeout": "server", "idle_in_transaction_timeout": "server"},
        {"statement_timeout": 0, "idle_in_transaction_timeout": "server"},
    ],
)
def test_without_defaults_the_server_is_not_asked(
    role: str, proxy: Proxy, options: dict[str, Any]
) -> None:
    with Pool(make_conninfo(role, port=proxy.port), max_size=1, **options) as pool:
        pool.fetch_one("select 1")
        assert proxy.accepted == 1


def test_asking_uses_no_more_connections_than_the_pool_may_have(
    role: str, server: Server, change: Callable[[str], None]
) -> None:
    change("alter role {role} connection limit 1")
    for _ in range(5):
        assert shown(role) == DEFAULTS
        until(lambda: not server.backends("dbpool:default"))


def test_changed_timeouts_are_noticed_within_a_lifetime(
    role: str, change: Callable[[str], None]
) -> None:
    with Pool(role, max_size=2, max_lifetime=0.5) as pool:
        assert pool.fetch_one(SHOW) == DEFAULTS
        change("alter role {role} set statement_timeout = '2s'")
        until(lambda: pool.fetch_one(SHOW) == ("2s", *DEFAULTS[1:]))
        change("alter role {role} reset statement_timeout")
        until(lambda: pool.fetch_one(SHOW) == DEFAULTS)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_changed_timeouts_are_noticed_after_a_restart(own_server: Server, mode: str) -> None:
    with Pool(own_server.conninfo, max_size=2, timeout=20, outage_grace=20) as pool:
        assert pool.fetch_one(SHOW) == DEFAULTS
        own_server.execute("alter system set statement_timeout = '7min'")
        own_server.stop(mode)
        own_server.start()
        until(lambda: pool.fetch_one(SHOW) == ("7min", *DEFAULTS[1:]))


def test_each_of_several_hosts_is_asked(make_server: Callable[..., Server]) -> None:
    first, second = make_server(statement_timeout="2s"), make_server()
    ports = f"{first.port},{second.port}"
    conninfo = make_conninfo(first.conninfo, host="127.0.0.1,127.0.0.1", port=ports)
    with Pool(conninfo, max_size=2, timeout=20, outage_grace=20) as pool:
        assert pool.fetch_one(SHOW) == ("2s", *DEFAULTS[1:])
        first.stop("immediate")
        assert pool.fetch_one(SHOW) == DEFAULTS
        first.start()
        pool.drain()
        until(lambda: pool.fetch_one(SHOW) == ("2s", *DEFAULTS[1:]))


def test_asking_delays_no_caller_after_a_restart(own_server: Server) -> None:
    with Pool(own_server.conninfo, max_size=1, timeout=20, outage_grace=20) as pool:
        pool.fetch_one("select 1")
        own_server.stop("immediate")
        own_server.start()
        pid = pool.fetch_value("select pg_backend_pid()")
        assert pool.fetch_one(SHOW) == DEFAULTS
        assert pool.fetch_value("select pg_backend_pid()") == pid


def test_a_server_that_may_not_be_asked_gets_the_defaults(
    server: Server, role: str, dsn: str
) -> None:
    server.execute("revoke select on pg_settings from public")  # only in database postgres
    try:
        conninfo = make_conninfo(role, dbname="postgres")
        assert shown(conninfo) == DEFAULTS
    finally:
        server.execute("grant select on pg_settings to public")


@pytest.mark.parametrize(
    "name", ["statement_timeout", "lock_timeout", "idle_in_transaction_timeout"]
)
def test_only_these_settings_accept_the_value_server(name: str) -> None:
    values: list[dict[str, Any]] = [{name: v} for v in ("SERVER", "servers", "server")]
    upper, wrong, lower = values
    settings: Any = replace(Settings(), **upper)
    assert getattr(settings, name) == "server"
    assert f"{name}='server'" in repr(settings)
    pooled: Any = replace(Settings(pooler="transaction"), **lower)
    assert pooled.pooler == "transaction"
    with pytest.raises(ConfigError, match="timeout"):
        Settings(timeout="server")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=name):
        replace(Settings(), **wrong)


def test_explicit_timeouts_through_a_pooler_are_rejected_even_if_default() -> None:
    with pytest.raises(ConfigError, match="pooler"):
        Settings(pooler="transaction", statement_timeout=5)


def test_honoured_options_cause_no_warning(
    role: str, caplog: pytest.LogCaptureFixture, server: Server
) -> None:
    options = "-c search_path=public -c app.tenant=x --work-mem=5MB -c role=pg_monitor"
    options += " -c timezone=UTC -cDATESTYLE=ISO --Lock-Timeout=7 -c seed=0.5"
    server.execute("grant pg_monitor to someone")
    shown(make_conninfo(role, options=options))
    shown(role, statement_timeout=4, lock_timeout=5)
    assert "ignored" not in caplog.text


def test_nothing_is_asked_through_a_declared_pooler(role: str, proxy: Proxy) -> None:
    conninfo = make_conninfo(role, port=proxy.port, options="-c work_mem=5MB")
    received: list[bytes] = []

    def receive(chunk: bytes) -> bytes:
        received.append(chunk)
        return chunk

    proxy.translate = receive
    with Pool(conninfo, max_size=1, pooler="transaction") as pool:
        pool.fetch_one("select 1")
    assert not any(b"string_agg" in chunk for chunk in received)
